"""Fine-tuning on GLUE: batches, what a classifier begins with, resuming bit for bit, one device against eight."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import toy_language
from safetensors.numpy import save_file
from test_train import Interrupted, interrupt_in_step, read_csv
from toy import bytes_of, saved_steps, with_loop
from toy_detection import first_batches
from toy_runs import Stepper

from eqvision import UnknownNameError
from eqvision.checkpoint import Checkpoints
from eqvision.cli import main
from eqvision.data.text import LabelledTexts, labelled_eval_stream, read_glue, train_wordpiece
from eqvision.language import bert_classifier, bert_pretraining
from eqvision.mesh import make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.problems import glue_problem
from eqvision.recipes import (
    CheckpointConfig,
    GlueConfig,
    GlueDataConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextClassifierConfig,
)
from eqvision.state import abstract_state
from eqvision.train import train
from eqvision.zoo_language import LANGUAGE

pytest.importorskip("tokenizers")

GOOD, BAD = ("fine", "lovely", "great"), ("poor", "dull", "awful")
THINGS = ("film", "book", "play", "song")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Reviews whose one word says it all, and pairs of sentences of which the second word decides."""
    folder, rng = tmp_path_factory.mktemp("GLUE"), np.random.default_rng(0)
    for split, count in (("train", 64), ("dev", 13)):
        rows = ["sentence\tlabel"]
        for _ in range(count):
            label = int(rng.integers(2))
            rows.append(f"A {rng.choice((BAD, GOOD)[label])} {rng.choice(THINGS)}.\t{label}")
        write(folder / "SST-2" / f"{split}.tsv", rows)
        rows = ["index\tsentence1\tsentence2\tscore"]
        for number in range(count):
            first, second = rng.choice(THINGS, 2)
            rows.append(f"{number}\tA {first}.\tThe {second}.\t{5.0 * (second in THINGS[:2])}")
        write(folder / "STS-B" / f"{split}.tsv", rows)
    return folder


def write(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(rows) + "\n")


@pytest.fixture
def toys(monkeypatch):
    install(monkeypatch)


def install(monkeypatch):
    toy_language.install(monkeypatch)
    monkeypatch.setitem(LANGUAGE, "toy_bert_classifier", partial(bert_classifier, "toy"))


def toy_config(out, tables, *, task="sst2", weights="", **optimizer):
    """Steps of 8 texts with SGD, evaluated and saved every third, six in all."""
    return GlueConfig(
        out=str(out),
        model=TextClassifierConfig(name="toy_bert_classifier", weights=str(weights), length=16, dropout=0.0),
        data=GlueDataConfig(task=task, path=str(tables), num_threads=0),
        optimizer=OptimizerConfig(**{"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=0.75, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def changed(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


# Batches


def test_every_text_comes_once_and_the_rest_is_padding(tables):
    texts = read_glue(tables, "sst2", "dev")
    tokenizer = train_wordpiece(texts.first, 80)
    source = LabelledTexts(texts, ("negative", "positive"), tokenizer, length=8)
    batches = list(labelled_eval_stream(source, batch_size=8, num_threads=0))
    assert [batch.text.ids.shape for batch in batches] == [(8, 8)] * 2
    indices = np.concatenate([batch.indices for batch in batches])
    assert indices.tolist() == [*range(13), -1, -1, -1]
    assert np.concatenate([batch.weights for batch in batches]).sum() == 13
    assert not batches[1].text.mask[5:].any()
    row = batches[1].text
    assert tokenizer.decode(row.ids[0][row.mask[0]]) == texts.first[8].lower()
    assert batches[0].labels.tolist() == texts.labels[:8].tolist()
    assert source[3] == (texts.first[3], None, texts.labels[3])
    assert "example 3 of" in source.describe(3)


def test_a_table_without_labels_is_no_source(tables, tmp_path):
    write(tmp_path / "SST-2" / "test.tsv", ["index\tsentence", "0\tA film."])
    texts = read_glue(tmp_path, "sst2", "test")
    with pytest.raises(ValueError, match=r"test\.tsv has no labels; GLUE keeps those"):
        LabelledTexts(texts, ("a", "b"), train_wordpiece(["a film"], 60), length=8)


# What does not fit together


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"path": ""}}, ValueError, "needs its tables: --data.path FOLDER"),
        ({"data": {"task": "rte"}}, FileNotFoundError, r"no train table of GLUE's rte: expected .*RTE/train\.tsv"),
        ({"model": {"name": "toy_bert_clasifier"}}, UnknownNameError, "toy_bert_classifier"),
        ({"model": {"length": 2}}, ValueError, "length=2 holds no text"),
        ({"tokenizer": {"path": "nowhere.txt"}}, FileNotFoundError, "nowhere.txt"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_is_written(
    sections, error, message, tables, toys, tmp_path
):
    config = changed(toy_config(tmp_path / "run", tables), **sections)
    with pytest.raises(error, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_init_is_called_weights_here(tables, toys):
    with pytest.raises(ValueError, match=r"--init bert_b: give it as --model\.weights"):
        glue_problem(dataclasses.replace(toy_config("", tables), init="bert_b"))


# What a classifier begins with


@pytest.mark.slow
def test_published_weights_bring_their_vocabulary(tables, toys, tmp_path):
    tokenizer = train_wordpiece(read_glue(tables, "sst2", "train").first, 90)
    build = eqx.nn.make_with_state(bert_pretraining)
    model, state = build("toy", vocab_size=100, max_positions=16, key=jax.random.key(3))
    save_file(to_layout(model, state, LAYOUTS["hf_bert"]), tmp_path / "model.safetensors")
    config = toy_config("", tables, weights=tmp_path)
    with pytest.raises(ValueError, match=r"no vocab\.txt and no tokenizer\.json lies beside .*--tokenizer\.path"):
        glue_problem(config)
    tokenizer.save(tmp_path / "tokenizer.json")
    problem = glue_problem(config)
    built, _ = problem.build()
    assert bytes_of(built.backbone) == bytes_of(model.backbone)
    assert bytes_of(built.pooler) == bytes_of(model.pooler)
    assert built.head.weight.shape == (16, 2)
    assert problem.tokenizer.to_json() == tokenizer.to_json()
    with pytest.raises(ValueError, match=r"--model\.length 17 is more than the 16 positions"):
        glue_problem(changed(config, model={"length": 17}))
    train_wordpiece([f"{a}{b}{c}" for a in "abcdefg" for b in "hijklm" for c in "nopqrst"] * 3, 300).save(
        tmp_path / "tokenizer.json"
    )
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and toy_bert_classifier has 100"):
        glue_problem(config)


@pytest.mark.slow
def test_a_bert_that_was_trained_here_is_gone_on_with(tables, toys, tmp_path):
    text = toy_language.write_text(tmp_path / "a.txt")
    before = toy_language.of_steps(toy_language.toy_config(tmp_path / "bert", text), 3)
    train(before)
    config = toy_config(tmp_path / "run", tables, weights=tmp_path / "bert")
    model, _ = glue_problem(config).build()
    fresh = glue_problem(toy_config("", tables, weights="")).build()[0]
    assert model.backbone.dropout == fresh.backbone.dropout == 0.0
    train(config)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "bert" / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"is a run that trains toy_bert, and --model\.name bert_ti_classifier"):
        glue_problem(changed(config, model={"name": "bert_ti_classifier"}))
    with pytest.raises(ValueError, match=r"has other norms than --model\.norm-order asks for"):
        glue_problem(changed(config, model={"norm_order": "pre"}))


# Steps


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, ids, labels = batch.weights.copy(), batch.text.ids.copy(), batch.labels.copy()
    weights[rows], ids[rows], labels[rows] = 0.0, junk, junk
    return batch._replace(weights=weights, text=batch.text._replace(ids=ids), labels=labels)


@pytest.mark.slow
def test_one_device_equals_eight_and_rows_of_weight_0_change_nothing(tables, toys, assert_close):
    one, eight = (Stepper(glue_problem(toy_config("", tables, task="stsb")), devices) for devices in (1, 8))
    batches = [weightless(batch, [1, 2, 7], 5) for batch in first_batches(one.problem, 3)]
    junk = [weightless(batch, [1, 2, 7], 9) for batch in batches]
    state, losses = one(batches)
    others, again = one(junk)
    assert losses == again
    assert bytes_of(state) == bytes_of(others)
    shared, split = eight(batches)
    np.testing.assert_allclose(split, losses, rtol=1e-4)
    # A bias of keys changes no attention: its gradient is rounding alone.
    without = [
        eqx.tree_at(lambda m: m.backbone.encoder.blocks.attention.key.bias, each.model, None)
        for each in (shared, state)
    ]
    assert_close(*without, 1e-4)


# Runs


def state_of(config):
    stepper = make_optimizer(config.optimizer, make_schedule(config.schedule, config.optimizer.learning_rate, 6))
    like = abstract_state(glue_problem(config).build, config, stepper, make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_dropout(tables, toys, tmp_path, monkeypatch, capsys):
    config = changed(toy_config(tmp_path / "whole", tables, name="adamw", ema=0.9), model={"dropout": 0.2})
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    result = train(config)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 5)
        with pytest.raises(Interrupted):
            train(broken)
    assert saved_steps(broken) == [3]
    train(broken)
    for name in ("metrics.csv", "result.json", "predictions.txt", "tokenizer.json"):
        assert Path(config.out, name).read_bytes() == Path(broken.out, name).read_bytes(), name
    assert bytes_of(state_of(config)) == bytes_of(state_of(broken))
    assert {"loss", "accuracy"} == result.metrics.keys()
    assert json.loads(Path(config.out, "result.json").read_text())["test/accuracy"] == result.metrics["accuracy"]
    said = Path(config.out, "predictions.txt").read_text().splitlines()
    assert len(said) == 13
    assert said[0].split("\t")[0] in ("negative", "positive")
    capsys.readouterr()
    main(["eval", config.out])
    printed = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["test/accuracy"]) == pytest.approx(result.metrics["accuracy"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "figure", "least"), [("sst2", "accuracy", 1.0), ("stsb", "pearson", 0.9)])
def test_a_tiny_classifier_learns_the_task(task, figure, least, tables, toys, tmp_path):
    config = toy_config(tmp_path / "run", tables, task=task, name="adamw", learning_rate=1e-2)
    result = train(with_loop(config, epochs=15.0, eval_every=120, log_every=20))
    assert result.metrics[figure] >= least
    assert read_csv(config)[-1]["train/loss"] < read_csv(config)[0]["train/loss"]
