"""Contrastive training: resuming bit for bit, one device against eight, rows of weight 0, evaluation, and messages."""

import dataclasses
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs_files import jsonl, write_images, write_lines
from test_train import Interrupted, interrupt_in_step, read_csv
from toy import bytes_of, saved_steps, with_loop, write_folder
from toy_contrastive import FewDigits, install, toy_config, toy_problem, vectors_of, weightless
from toy_detection import first_batches, on_devices

from eqvision import UnknownNameError, cli
from eqvision.checkpoint import CheckpointError, Checkpoints
from eqvision.data import ImageFolder
from eqvision.data.text import load_tokenizer
from eqvision.evaluate_problem import evaluate_problem_run
from eqvision.finetune import start_from
from eqvision.mesh import make_mesh
from eqvision.multimodal import Clip
from eqvision.optim import make_optimizer, make_schedule
from eqvision.predict_pairs import load_contrastive_run, tell_by_name
from eqvision.problems import contrastive_problem
from eqvision.problems.contrastive import require_clip
from eqvision.recipes import (
    RECIPES,
    ClipModelConfig,
    ContrastiveConfig,
    PairsDataConfig,
    TokenizerConfig,
)
from eqvision.run_folder import RunFolder, RunFolderError
from eqvision.state import abstract_state, first_state
from eqvision.step import make_step
from eqvision.tasks.contrastive import pair_loss
from eqvision.train import train
from eqvision.types import ClipOutputs
from eqvision.zoo_language import LANGUAGE


@pytest.fixture
def toys(monkeypatch):
    install(monkeypatch)


def optimizer_of(config):
    return make_optimizer(config.optimizer, make_schedule(config.schedule, config.optimizer.learning_rate, 6))


class Stepper:
    """A compiled step of a configuration, to be begun anew as often as one likes."""

    def __init__(self, config, devices=1):
        self.problem, self.mesh, self.config = toy_problem(config), make_mesh(num_devices=devices), config
        self.optimizer = optimizer_of(config)
        self.step = make_step(self.problem, self.optimizer, self.mesh, config)
        self.built = self.problem.build()

    def __call__(self, batches):
        """The last state, and the losses, gradient norms and scales on the way."""
        state, logs = first_state(*self.built, self.config, self.optimizer, self.mesh), []
        for batch in batches:
            state, log = self.step(on_devices(batch, self.mesh), state)
            logs.append((float(log.loss), float(log.grad_norm), float(log.terms["scale"])))
        return state, logs


@pytest.fixture(scope="module")
def stepper():
    """On one device; the program that the runs of this file have, too."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield Stepper(toy_config("unused"))


@pytest.fixture(scope="module")
def batches(stepper):
    return first_batches(stepper.problem, 3)


# The loss


def by_hand(logits, loss="softmax"):
    """In float64."""
    if loss == "sigmoid":
        signs = 2 * np.eye(len(logits)) - 1
        return np.logaddexp(0, -signs * logits).sum(axis=1).mean()
    both = np.logaddexp.reduce(logits, axis=1) + np.logaddexp.reduce(logits, axis=0)
    return (both / 2 - np.diag(logits)).mean()


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "bias"), [("softmax", None), ("sigmoid", -3.0), ("sigmoid", None)])
def test_a_loss_by_its_name(rng, loss, bias):
    image, text = rng.normal(size=(2, 5, 3)).astype(np.float32)
    outputs = ClipOutputs(
        jnp.asarray(image), jnp.asarray(text), jnp.float32(2.0), None if bias is None else jnp.float32(bias)
    )
    weights = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])
    used = np.array([0, 1, 3, 4])
    logits = 2.0 * image[used].astype(np.float64) @ text[used].T.astype(np.float64) + (bias or 0.0)
    found = pair_loss(outputs, weights, weights.sum(), loss=loss, chunk=2)
    assert float(found) == pytest.approx(by_hand(logits, loss), rel=1e-5)


@pytest.mark.slow
def test_the_loss_is_that_of_the_paper_over_the_whole_batch(stepper, batches):
    """Without the rows of weight 0, which are nobody's negatives."""
    batch = weightless(batches[0], [2, 7], 50)
    _, logs = stepper([batch])
    used = batch.weights > 0
    image, text = (each[used].astype(np.float64) for each in vectors_of(*stepper.built, batch))
    logits = np.exp(float(stepper.built[0].logit_scale)) * image @ text.T
    assert logs[0][0] == pytest.approx(by_hand(logits), rel=1e-5)
    assert logs[0][2] == pytest.approx(float(stepper.built[0].scale()), rel=1e-6)


@pytest.mark.slow
def test_rows_of_weight_0_change_nothing(stepper, batches):
    """Padding and corrupt images: bit for bit the same, whatever the rows hold. A batch of them changes nothing."""
    one, other = (stepper([weightless(batches[0], [2, 7], junk)]) for junk in (0, 200))
    assert one[1] == other[1]
    assert bytes_of(one[0]) == bytes_of(other[0])
    state, logs = stepper([weightless(batches[0], slice(None), 100)])
    assert logs == [(0.0, 0.0, 0.0)]
    assert bytes_of(state.model) == bytes_of(stepper.built[0])


@pytest.mark.slow
def test_one_device_equals_eight(assert_close, stepper, batches):
    """Each device has one image and one text, and compares them with those of all. 1e-5, of loss, gradient and
    parameters after three steps: sums over devices are added in another order."""
    given = [weightless(batches[0], [3], 50), *batches[1:]]
    one, eight = stepper(given), Stepper(stepper.config, devices=8)(given)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-5)
    assert_close(without_noise(eight[0].model), without_noise(one[0].model), 1e-5)


def without_noise(model):
    """The bias of keys moves every logit of a row alike, and so has no gradient but rounding."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * (".key.bias" not in jax.tree_util.keystr(path)), model)


# Resuming


def state_of(config):
    """What the newest checkpoint of a run holds, on one device."""
    like = abstract_state(toy_problem(config).build, config, optimizer_of(config), make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


def assert_same_run(one, other):
    for name in ("metrics.csv", "metrics.jsonl", "result.json", "tokenizer.json"):
        assert Path(one.out, name).read_bytes() == Path(other.out, name).read_bytes(), name
    assert saved_steps(one) == saved_steps(other)
    assert bytes_of(state_of(one)) == bytes_of(state_of(other))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of six steps."""
    config = toy_config(tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return config, train(config)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, toys):
    config, _ = finished
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 5)
        with pytest.raises(Interrupted):
            train(broken)
    assert saved_steps(broken) == [3]
    train(broken)
    assert_same_run(config, broken)


@pytest.mark.slow
def test_what_a_run_of_images_and_text_writes(finished, toys):
    config, result = finished
    rows = read_csv(config)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert all({"train/loss", "train/scale", "train/grad_norm"} <= row.keys() for row in rows)
    ways = [f"{way}/recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    assert list(result.metrics) == ["loss", "zero_shot_accuracy", "zero_shot_top5_accuracy", *ways]
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert stored == {f"test/{name}": value for name, value in result.metrics.items()}
    names = {path.name for path in Path(config.out).iterdir()}
    assert {"predictions.png", "similarity.png", "learning_curve.png", "tokenizer.json"} <= names
    kept = load_tokenizer(Path(config.out, "tokenizer.json"))
    assert kept.to_json() == toy_problem(dataclasses.replace(config, out="")).tokenizer.to_json()


@pytest.mark.slow
def test_a_run_is_evaluated_again_and_tells_images_by_name(finished, tmp_path, toys, capsys):
    config, result = finished
    again = evaluate_problem_run(config.out)
    assert again == pytest.approx({f"test/{name}": value for name, value in result.metrics.items()}, rel=1e-5)
    run = load_contrastive_run(config.out)
    assert (run.step, run.class_names[3]) == (6, "three")
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    told = tell_by_name(run, paths, batch_size=2)
    assert [each.path for each in told] == paths
    assert all(len(each.labels) == 3 and list(each.scores) == sorted(each.scores, reverse=True) for each in told)
    both = tell_by_name(run, paths, names=("seven", "two_birds"), templates=("the digit {}",))
    assert all(set(each.labels) == {"seven", "two birds"} and sum(each.scores) == pytest.approx(1) for each in both)
    cli.main(["predict", config.out, str(paths[0]), "--out", str(tmp_path / "told"), "--queries", "seven", "two"])
    printed = capsys.readouterr().out
    assert re.search(r"a\.png: (seven|two) 0\.\d{3}, (seven|two) 0\.\d{3}  -> .*told/a\.png", printed)
    assert (tmp_path / "told/a.png").exists()
    with pytest.raises(ValueError, match=r"no classes are known, .*: say what may be in the images"):
        tell_by_name(run._replace(class_names=()), paths)
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        tell_by_name(run, [tmp_path / "nothing.png"])


def test_what_a_run_of_images_and_text_cannot_be_asked_for(tmp_path, capsys):
    """Before anything is computed."""
    folder, image = RunFolder(tmp_path / "run"), str(tmp_path / "a.png")
    folder.open_for_training(toy_config(folder.path), (), 0)
    with pytest.raises(RunFolderError, match=r"has no tokenizer\.json, which its texts were encoded with"):
        load_contrastive_run(folder.path)
    for options, message in (
        (["--threshold", "0.5"], "--threshold 0.5 is for detectors, and"),
        (["--weights", "x"], "--weights x is for models of the zoo"),
        (["--window", "8", "8"], "--window 8 8 is for runs of segmenters"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["predict", str(folder.path), image, *options])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


# Beginning with another model


@pytest.mark.slow
def test_a_run_begins_with_another_runs_parameters(finished, toys, capsys):
    """With the other's vocabulary: made of other captions, a table of words of another size does not fit."""
    config, _ = finished
    problem = toy_problem(dataclasses.replace(config, out="", seed=1))
    model, _ = start_from(config.out, *problem.build())
    assert bytes_of(model) == bytes_of(load_contrastive_run(config.out).model)
    assert f"begins with {config.out}, step 6" in capsys.readouterr().err
    other = TokenizerConfig(kind="clip_bpe", size=600)
    with pytest.raises(
        CheckpointError, match=r"does not fit this model; .*\n  text_tower\.token_embedding\.weight: \(\d+, 16\) there"
    ):
        start_from(config.out, *toy_problem(dataclasses.replace(config, out="", tokenizer=other)).build())


def test_parameters_and_vocabulary_belong_together(tmp_path, toys):
    """Refused before training: the same numbers would stand for other words."""
    config, folder = toy_config(""), RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"--init clip_vit_b32 needs the vocabulary that belongs to these weights"):
        contrastive_problem(dataclasses.replace(config, init="clip_vit_b32"))
    folder.open_for_training(config, (), 0)
    contrastive_problem(config).tokenizer.save(folder.path / "tokenizer.json")
    begun = dataclasses.replace(config, init=str(folder.path))
    contrastive_problem(begun)
    other = dataclasses.replace(begun, tokenizer=TokenizerConfig(kind="wordpiece", size=60))
    with pytest.raises(ValueError, match=r"was trained with another vocabulary than this run has: give it with --tok"):
        contrastive_problem(other)
    given = dataclasses.replace(other.tokenizer, path=str(folder.path))
    contrastive_problem(dataclasses.replace(other, tokenizer=given))


def test_models_of_images_and_text_begin_with_their_like(toys):
    """A classifier has no text tower, and its backbone goes by other names."""
    model, stats = eqx.filter_eval_shape(toy_problem(toy_config("")).build)
    with pytest.raises(
        CheckpointError, match=r"--init resnet18: a model of images and text \(CLIP, SigLIP\) begins with"
    ):
        start_from("resnet18", model, stats)


# Evaluation


def evaluated(*, batch_size, devices=1, test=None, **options):
    config = with_loop(toy_config("unused", **options), eval_batch_size=batch_size)
    problem = toy_problem(config, test)
    return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics


@pytest.mark.slow
def test_metrics_depend_on_no_batch_size_and_no_devices(toys):
    """Seven images in batches of three, and of eight on eight devices. The loss, too: it is that of batches as in
    training."""
    three, eight = evaluated(batch_size=3), evaluated(batch_size=8, devices=8)
    assert eight.keys() == three.keys()
    assert eight.pop("loss") == pytest.approx(three.pop("loss"), rel=1e-5)  # rounded otherwise
    assert eight == three  # made of counts


@pytest.mark.slow
def test_a_corrupt_image_is_not_evaluated(toys):
    """It is as if it were not in the split; only what was said of it can still be found, and may be in the way."""
    whole = evaluated(batch_size=3, test=FewDigits("test", length=6))
    other = evaluated(batch_size=3, test=FewDigits("test", corrupt=(6,)))
    same = ("loss", "zero_shot_accuracy", "zero_shot_top5_accuracy")
    assert {name: other[name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.slow
def test_zero_shot_images_may_come_from_a_folder_of_classes(tmp_path, toys):
    """Names of folders are what classes are called."""
    problem = toy_problem(toy_config("unused"))
    write_folder(tmp_path, test=2)
    other = dataclasses.replace(problem, zero_shot=ImageFolder(tmp_path, "test", in_channels=1))
    assert (problem.headline, other.headline) == ("zero_shot_accuracy", "zero_shot_accuracy")
    model, stats = problem.build()
    found = other.evaluator(make_mesh(num_devices=1))(model, stats)
    assert "zero_shot_top5_accuracy" not in found.metrics  # of three classes
    assert found.metrics["zero_shot_accuracy"] in [n / 6 for n in range(7)]
    assert all(set(sample.truth) <= set(problem.test_source.captions(sample.index)) for sample in found.samples)


# What does not fit together


def problem_of(*, model=None, task=None, loop=None, tokenizer=None, **data):
    base = toy_config("")
    changed = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **(model or {})),
        task=dataclasses.replace(base.task, **(task or {})),
        loop=dataclasses.replace(base.loop, **(loop or {})),
        tokenizer=dataclasses.replace(base.tokenizer, **(tokenizer or {})),
        data=dataclasses.replace(base.data, **data),
    )
    return contrastive_problem(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "resnet18"}}, "--model.name resnet18 is no model of images and text, and this recipe"),
        ({"model": {"name": "bert_b"}}, "--model.name bert_b is no model of images and text, and this recipe trains"),
        ({"model": {"dropout": 0.1, "name": "toy_narrow"}}, "model 'toy_narrow' has no option 'dropout'"),
        ({"loop": {"accumulate": 2}}, "--loop.accumulate 2: a contrastive loss compares every image with every text"),
        ({"task": {"chunk": 0}}, "--task.chunk 0, --model.length 12; expected 1 or more of each"),
        ({"task": {"loss": "sigmoid"}}, "--task.loss sigmoid needs a model with a bias, as SigLIP has, and toy_clip"),
        ({"train_split": "test"}, "--data.train-split and --data.test-split are both test"),
        ({"transform": "crop", "scale": (0.5, 2.0)}, "--data.scale 0.5 2; expected shares of the area"),
        ({"templates": ("the digit",)}, "the template 'the digit' has no {} where the class's name stands"),
        ({"templates": ("a {}",), "templates_file": "x"}, "--data.templates and --data.templates-file are both given"),
        ({"tokenizer": {"size": 5}}, "size=5 has no room for the characters"),
        ({"tokenizer": {"pad": "</s>"}}, "--tokenizer.pad </s> is for a vocabulary that is given"),
        ({"model": {"length": 2}}, "--model.length 2: length=2 holds no text"),
    ],
)
def test_options_that_do_not_fit_are_refused(toys, monkeypatch, change, message):
    def toy_narrow(*, image_size, in_channels, vocab_size, length, key) -> Clip: ...

    monkeypatch.setitem(LANGUAGE, "toy_narrow", toy_narrow)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        problem_of(**change)


def test_unknown_names_are_refused_before_any_data_is_read(toys):
    with pytest.raises(UnknownNameError, match=r"--model\.name: model of images and text 'toy_clap' does not exist"):
        problem_of(model={"name": "toy_clap"})
    with pytest.raises(UnknownNameError, match=r"--data\.interpolation 'bicubik' does not exist; nearest: bicubic"):
        problem_of(interpolation="bicubik")


@pytest.mark.parametrize("name", [name for name, each in RECIPES.items() if isinstance(each(), ContrastiveConfig)])
def test_recipes_name_models_that_exist(name):
    require_clip(RECIPES[name]().model.name)


def of_folder(path, **data):
    return ContrastiveConfig(
        model=ClipModelConfig(name="toy_clip", image_size=8, length=8),
        data=PairsDataConfig(path=str(path), **data),
        tokenizer=TokenizerConfig(kind="wordpiece", size=100),
    )


def test_own_images_with_captions(tmp_path, monkeypatch, capsys):
    """Captions that are cut are told before training; without classes, retrieval sums an evaluation up."""
    install(monkeypatch, sources=None)
    with pytest.raises(ValueError, match=r"data\.kind 'folder' needs a path: --data\.path PATH, a folder with train/"):
        contrastive_problem(of_folder(""))
    with pytest.raises(ValueError, match=r"data\.kind 'coco' needs a path: .*captions_train2017"):
        contrastive_problem(of_folder("", kind="coco"))
    for split in ("train", "val"):
        write_images(tmp_path / split, ["a.png", "b.png"], size=(12, 16))
        lines = [jsonl(image="a.png", caption="a b a b"), jsonl(image="b.png", caption="a b a b a b a b")]
        write_lines(tmp_path / split / "captions.jsonl", *lines)
    problem = contrastive_problem(of_folder(tmp_path))
    said = "1 of the first 2 captions have more than --model.length 8 tokens and lose their end"
    assert said in capsys.readouterr().err
    assert (problem.headline, problem.num_classes) == ("image_to_text/recall_at_1", 0)
    batch = next(problem.evaluation_stream())
    assert batch.images.shape[1:] == (8, 8, 3)
    assert batch.text.mask.sum(axis=1).tolist()[:2] == [6, 8]


def test_a_run_folder_keeps_its_vocabulary(tmp_path, toys):
    """Other captions make another one; what the folder has counts. Another kind's file is refused."""
    config = toy_config(tmp_path)
    own = contrastive_problem(config).tokenizer
    other = dataclasses.replace(config, tokenizer=TokenizerConfig(kind="clip_bpe", size=600))
    assert contrastive_problem(other).tokenizer.vocab_size != own.vocab_size
    own.save(tmp_path / "tokenizer.json")
    assert contrastive_problem(other).tokenizer.to_json() == own.to_json()
    given = dataclasses.replace(other.tokenizer, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        contrastive_problem(dataclasses.replace(other, out="", tokenizer=given))
