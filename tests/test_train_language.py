"""Training language models: resuming bit for bit, one device against eight, the baseline, and messages."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_train import Interrupted, interrupt_in_step, read_csv
from toy import bytes_of, saved_steps, with_loop
from toy_detection import first_batches
from toy_language import emptied, install, of_steps, toy_config, toy_problem, weightless, write_text
from toy_runs import Stepper, optimizer_of

from eqvision import UnknownNameError
from eqvision.checkpoint import Checkpoints
from eqvision.cli import main
from eqvision.data.text import Tokenizer, find_texts, split_text, text_lines, train_bpe, train_wordpiece
from eqvision.data.text.vocabularies import unigram_backend
from eqvision.mesh import make_mesh
from eqvision.problems import language_problem
from eqvision.problems.language import unigram_logs
from eqvision.replay import replay
from eqvision.state import abstract_state
from eqvision.train import train

MODELS = ["toy_bert", "toy_t5"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "a.txt")


@pytest.fixture
def toys(monkeypatch):
    install(monkeypatch)


@pytest.fixture(scope="module", params=MODELS)
def stepper(request, text):
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        made = Stepper(toy_problem(toy_config("", text, model=request.param)))
    return made


@pytest.fixture(scope="module")
def batches(stepper):
    return first_batches(stepper.problem, 3)


def as_one(model):
    """All parameters in a row: the gradient of the bias of keys is zero, and what stands there is rounding."""
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(model)])


# The loss, and rows that weigh nothing


@pytest.mark.slow
def test_the_loss_is_the_mean_over_all_targets_of_the_batch(stepper, batches):
    """Texts of few hidden words weigh less; by hand in float64, from the model's own logits."""
    batch = weightless(emptied(batches[0], [1]), [7], 3)
    told = jax.jit(lambda m, b: stepper.problem.objective.tell(m, b, np.dtype("float32")))(stepper.built[0], batch)
    used = batch.target_mask & (batch.weights > 0)[:, None]
    expected = np.asarray(told.values, np.float64)[used].mean()
    for part in told.loss_parts.values():
        expected += float(part.total) / float(part.weight)
    state, logs = stepper([batch])
    assert logs[0][0] == pytest.approx(expected, rel=1e-5)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_rows_of_weight_0_change_nothing(stepper, batches):
    """Bit for bit the same, whatever words the rows hold."""
    one, other = (stepper([weightless(batches[0], [2, 7], junk)]) for junk in (0, 20))
    assert one[1] == other[1]
    assert bytes_of(one[0]) == bytes_of(other[0])


@pytest.mark.slow
def test_one_device_equals_eight(assert_close, stepper, batches, toys):
    """With rows of which nothing is to be told, so that devices differ in what they count. 1e-4 after three steps: the
    gradients of eight devices are added in another order than those of one."""
    given = [weightless(emptied(batch, [1, 5]), [7], 5) for batch in batches]
    one, eight = stepper(given), Stepper(stepper.problem, devices=8)(given)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-4)
    assert_close(as_one(eight[0].model), as_one(one[0].model), 1e-4)


@pytest.mark.slow
def test_accumulated_gradients_equal_the_full_batch(assert_close, stepper, batches, toys):
    """The parts have unequal numbers of hidden words, so that means of means would be wrong. 1e-5: the gradients of a
    batch's rows are added in another order."""
    given = [emptied(batches[0], [0, 1, 2])]
    whole, parts = stepper(given), Stepper(toy_problem(with_loop(stepper.config, accumulate=2)))(given)
    assert parts[1][0] == pytest.approx(whole[1][0], rel=1e-5)
    assert_close(as_one(parts[0].model), as_one(whole[0].model), 1e-5)


# Resuming


def state_of(config):
    """What the newest checkpoint of a run holds, on one device."""
    like = abstract_state(toy_problem(config).build, config, optimizer_of(config), make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


def assert_same_run(one, other):
    for name in ("metrics.csv", "metrics.jsonl", "result.json", "predictions.txt", "tokenizer.json"):
        assert Path(one.out, name).read_bytes() == Path(other.out, name).read_bytes(), name
    assert saved_steps(one) == saved_steps(other)
    assert bytes_of(state_of(one)) == bytes_of(state_of(other))


@pytest.fixture(scope="module", params=MODELS)
def finished(request, text, tmp_path_factory):
    """An uninterrupted run of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        config = of_steps(toy_config(tmp_path_factory.mktemp("finished") / "run", text, model=request.param))
        return config, train(config)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_keeps_its_vocabulary(finished, tmp_path, monkeypatch, toys):
    """It is not made again, which takes minutes for large texts."""
    config, _ = finished
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 5)
        with pytest.raises(Interrupted):
            train(broken)
    assert saved_steps(broken) == [3]
    for name in ("train_wordpiece", "train_unigram"):
        monkeypatch.setattr(f"eqvision.problems.language_data.{name}", None)
    train(broken)
    assert_same_run(config, broken)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_dropout_and_the_average(tmp_path, monkeypatch, toys, text):
    config = of_steps(toy_config(tmp_path / "whole", text, model="toy_bert_dropout", name="adamw", ema=0.9))
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    train(config)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 6)
        with pytest.raises(Interrupted):
            train(broken)
    train(broken)
    assert_same_run(config, broken)


@pytest.mark.slow
def test_only_words_behind_the_mask_count_as_words(text, toys):
    """A tenth of what BERT is asked for stands in its text: to copy that is no knowledge of words."""
    problem = toy_problem(toy_config("", text))
    model, stats = problem.build()
    losses = []
    for batch in problem.evaluation_stream():
        text, positions = jax.tree.map(jnp.asarray, (batch.text, batch.positions))
        logits = np.asarray(model(text, positions=positions).mlm_logits, np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        told = -np.take_along_axis(logs, batch.targets[..., None], axis=-1)[..., 0]
        shown = np.take_along_axis(batch.text.ids, batch.positions, axis=1)
        hidden = (shown == problem.tokenizer.special.mask) & batch.target_mask & (batch.weights[:, None] > 0)
        losses += told[hidden].tolist()
    metrics = problem.evaluator(make_mesh(num_devices=1))(model, stats).metrics
    assert metrics["word_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_what_a_run_of_a_language_model_writes(finished, capsys, toys):
    config, result = finished
    rows, spans = read_csv(config), config.model.name == "toy_t5"
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["step"] for row in rows if "test/word_loss" in row] == [3, 6]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert stored == {f"test/{name}": value for name, value in result.metrics.items()}
    assert result.metrics["perplexity"] == pytest.approx(np.exp(result.metrics["word_loss"]))
    assert ("next_sentence_accuracy" in result.metrics) == (not spans)
    parts = result.metrics["loss"] - result.metrics["word_loss"] - result.metrics.get("next_sentence_loss", 0)
    assert abs(parts) < 1.0  # sentinels and ends are no words, nor are words that BERT saw
    names = {path.name for path in Path(config.out).iterdir()}
    assert {"predictions.txt", "tokenizer.json", "learning_curve.png"} <= names
    assert ("infilled.txt" in names) == spans
    told = Path(config.out, "predictions.txt").read_text()
    assert "validation part, tokens 0.." in told
    assert ("told: " if spans else "[CLS] ") in told
    main(["eval", config.out])
    printed = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["test/word_loss"]) == pytest.approx(result.metrics["word_loss"], abs=1e-4)
    assert {"test/unigram_loss", "test/perplexity"} <= printed.keys()


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["toy_bert"], indirect=True)
def test_a_step_is_replayed(finished, toys):
    config, _ = finished
    again = replay(config.out, 4)
    row = next(row for row in read_csv(config) if row["step"] == 4)
    assert again.loss == pytest.approx(row["train/loss"], rel=1e-6)
    assert all("training part, tokens" in place for place in again.examples)


@pytest.mark.slow
def test_commands_for_images_refuse_the_run(finished, tmp_path, capsys):
    config, _ = finished
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    for command in (["predict", config.out, str(image)], ["viz", "attention", config.out, str(image)]):
        with pytest.raises(SystemExit):
            main(command)
        assert f"is a run of the language model {config.model.name}" in capsys.readouterr().err, command
    with pytest.raises(SystemExit):
        main(["export", config.out, "--format", "safetensors", "--out", str(tmp_path / "out")])
    assert f"is a run of the language model {config.model.name}" in capsys.readouterr().err


# Evaluation


@pytest.mark.slow
def test_metrics_depend_on_no_batch_size_and_no_devices(toys, text):
    def evaluated(batch_size, devices):
        problem = toy_problem(with_loop(toy_config("", text), eval_batch_size=batch_size))
        return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics

    one, three, eight = evaluated(1, 1), evaluated(3, 1), evaluated(8, 8)
    assert three == pytest.approx(one, rel=1e-5)
    assert eight == pytest.approx(one, rel=1e-5)


def test_the_unigram_baseline_is_that_of_the_training_text(text, tmp_path):
    """By hand; tokens that are no words take no share."""
    train_part, _ = split_text(find_texts(text), 0.2)
    tokenizer = train_wordpiece(text_lines(train_part), 80)
    ids = [number for line in text_lines(train_part) for number in tokenizer.ids_of([line])[0]]
    logs = unigram_logs(np.array(ids), tokenizer)
    words = tokenizer.vocab_size - 4  # all but pad, start, end and mask
    assert np.isnan(logs).sum() == 4
    assert np.nansum(np.exp(logs)) == pytest.approx(1, rel=1e-5)
    the = tokenizer.id_of("the")
    assert logs[the] == pytest.approx(np.log((ids.count(the) + 1) / (len(ids) + words)), rel=1e-5)


# What does not fit together


def changed(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"model": {"name": "bert_bb"}}, UnknownNameError, "--model.name: language model for hidden_words 'bert_bb' "),
        ({"model": {"name": "resnet18"}}, ValueError, "resnet18 is not trained with --task.objective hidden_words: "),
        ({"model": {"name": "toy_t5"}}, ValueError, "toy_t5 is not trained with --task.objective hidden_words: bert_"),
        ({"model": {"vocab_size": 50}}, ValueError, "--model.vocab-size of toy_bert is 50: it is of another model"),
        ({"model": {"length": 5}}, ValueError, "length=5 has no room for texts"),
        ({"data": {"path": ""}}, ValueError, "a language model needs a text: --data.path PATH, a file or a folder"),
        ({"data": {"path": "/absent.txt"}}, FileNotFoundError, "no text at /absent.txt"),
        ({"data": {"validation_share": 1.5}}, ValueError, "--data.validation-share 1.5; expected a share between"),
        ({"task": {"share": 0.0}}, ValueError, "share=0.0, short=0.1; expected shares"),
        ({"tokenizer": {"size": 10}}, ValueError, "size=10 has no room for the characters of these texts"),
        ({"tokenizer": {"path": "/absent.txt"}}, FileNotFoundError, "no vocabulary: no file /absent.txt"),
    ],
)
def test_options_that_do_not_fit_are_refused(sections, error, message, text, toys):
    with pytest.raises(error) as caught:
        language_problem(changed(toy_config("", text), **sections))
    assert message in str(caught.value)


def test_language_models_begin_fresh(text, toys):
    with pytest.raises(ValueError, match=r"--init bert_b: language models begin fresh; leave it out"):
        language_problem(dataclasses.replace(toy_config("", text), init="bert_b"))


def test_vocabularies_of_other_models_are_refused(text, toys, tmp_path):
    lines = list(text_lines(find_texts(text)))
    train_bpe(lines, 530).save(tmp_path / "clip.json")
    train_wordpiece(lines, 80).save(tmp_path / "bert.json")
    given = {"tokenizer": {"path": str(tmp_path / "clip.json")}}
    with pytest.raises(ValueError, match=r"clip\.json is a tokenizer of CLIP; expected one of BERT"):
        language_problem(changed(toy_config("", text), **given))
    given = {"tokenizer": {"path": str(tmp_path / "bert.json")}}
    with pytest.raises(ValueError, match=r"bert\.json is a tokenizer of BERT; expected one of T5"):
        language_problem(changed(toy_config("", text, model="toy_t5"), **given))
    assert language_problem(changed(toy_config("", text), **given)).num_classes <= 80


def test_a_text_too_short_for_an_example(tmp_path, toys):
    """A single token is left for validation, of which T5 cannot take one out."""
    short, words = tmp_path / "short.txt", tmp_path / "tokenizer.json"
    short.write_text("the dog\n" * 20 + "the\n")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -1.0), ("▁dog", -1.0)]
    Tokenizer(unigram_backend(pieces, 2, num_sentinels=8)).save(words)
    config = changed(toy_config("", short, model="toy_t5"), data={"validation_share": 0.025})
    with pytest.raises(ValueError, match=r"the validation part of .*short\.txt has no example: the text is too short"):
        language_problem(changed(config, tokenizer={"path": str(words)}))


def test_the_stream_of_a_run_begins_at_any_step(text, toys):
    for model in MODELS:
        problem = toy_problem(toy_config("", text, model=model))
        *_, third = first_batches(problem, 3)
        stream = problem.stream(2)
        assert bytes_of(next(stream)) == bytes_of(third)
        stream.close()
        assert problem.forward_macs() > 0
