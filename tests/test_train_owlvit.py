"""Training open-vocabulary detectors: resuming bit for bit, one device against eight, use of a run, and messages."""

import dataclasses
import functools
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from toy_detection import first_batches
from toy_runs import Stepper, assert_same_run, killed_and_resumed, use_devices

from eqvision import UnknownNameError
from eqvision.backbones import ViTSize
from eqvision.backbones.clip_text import TextSize
from eqvision.cli import main
from eqvision.data.pairs.digits import WORDS
from eqvision.data.text import train_bpe
from eqvision.detectors import OwlViTSize, decode_queried, owlvit
from eqvision.mesh import make_mesh
from eqvision.predict_queried import find_named, load_published_open_vocabulary
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.problems import make_problem
from eqvision.problems.open_vocabulary import open_vocabulary_problem
from eqvision.recipes import (
    LoopConfig,
    OpenVocabularyConfig,
    OpenVocabularyDataConfig,
    OpenVocabularyModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TokenizerConfig,
)
from eqvision.train import train
from eqvision.types import QueriedImages, TextTokens
from eqvision.zoo_language import LANGUAGE

SIZE = OwlViTSize(ViTSize(16, 1, 2, 32), 16, 48, TextSize(16, 1, 2, 32), 16)


def toy_config(out="unused", *, model="toy_owlvit", **data):
    """Six steps of 8 scenes, evaluated and saved every third."""
    options = {
        "kind": "digits", "length": 24, "test_split": "test", "size": 48, "mosaics": (1, 2),
        "mosaic_probabilities": (0.5, 0.5), "max_objects": 6, "max_queries": 6, "num_negatives": 3, "count": 20,
        "mean": (0.3,), "std": (0.2,), "num_threads": 0,
    }  # fmt: skip
    return OpenVocabularyConfig(
        out=str(out),
        model=OpenVocabularyModelConfig(name=model, in_channels=1, length=8),
        data=OpenVocabularyDataConfig(**options | data),
        tokenizer=TokenizerConfig(kind="wordpiece", size=256),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
    )


TOY = functools.partial(owlvit, SIZE, class_std=0.02)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """In the zoo, on one device."""
    monkeypatch.setitem(LANGUAGE, "toy_owlvit", TOY)
    use_devices(monkeypatch, 1)


# What does not fit together


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"model": "owlvit_b61"},
            UnknownNameError,
            "open-vocabulary detector 'owlvit_b61' does not exist",
        ),
        ({"model": "bert_s"}, ValueError, "--model.name bert_s is no open-vocabulary detector, and this recipe trains"),
        ({"model": "resnet50"}, ValueError, "--model.name resnet50 is no open-vocabulary detector"),
        ({"size": 50}, ValueError, "--data.size 50 is no multiple of 16, the patch of toy_owlvit"),
        ({"max_objects": 10}, ValueError, "--data.max-objects 10 is more than the 9 places of toy_owlvit"),
        ({"class_names": ("one", "two")}, ValueError, "--data.class-names has 2 names and the data 10 classes"),
        ({"hide_rare": True}, ValueError, "--data.hide-rare is for LVIS"),
        ({"mosaics": (1, 5)}, ValueError, "a mosaic of 48 pixels cannot be cut into 5 equal tiles"),
        ({"templates": ("a digit",)}, ValueError, "sentences with {} where it stands"),
        ({"kind": "coco"}, ValueError, "data.kind 'coco' needs a path: --data.path PATH"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, error, message):
    with pytest.raises(error) as caught:
        open_vocabulary_problem(toy_config(**options))
    assert message in str(caught.value)


# The step


@pytest.fixture(scope="module")
def stepper():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LANGUAGE, "toy_owlvit", TOY)
        yield Stepper(make_problem(toy_config()))


@pytest.fixture(scope="module")
def batches(stepper):
    return first_batches(stepper.problem, 2)


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, images, boxes = batch.weights.copy(), batch.images.copy(), batch.targets.boxes.copy()
    weights[rows], images[rows], boxes[rows] = 0.0, junk, np.nan
    return batch._replace(weights=weights, images=images, targets=batch.targets._replace(boxes=boxes))


def without_objects(batch, rows):
    valid = batch.targets.valid.copy()
    valid[rows] = False
    return batch._replace(targets=batch.targets._replace(valid=valid))


@pytest.mark.slow
def test_one_device_equals_eight(stepper, batches):
    """With images without objects and rows of weight 0, so that devices differ in what they count."""
    given = [weightless(without_objects(batch, [1, 5]), [7], 50) for batch in batches]
    one, eight = stepper(given), Stepper(stepper.problem, devices=8)(given)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-4)
    # not by each leaf's own scale: keys have biases of rounding alone, as softmax does not see them
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), eight[0].model, one[0].model)


@pytest.mark.slow
def test_what_changes_nothing(stepper, batches):
    """What is in rows of weight 0, tokens where the mask says there is none, and the order of the questions."""
    batch = batches[0]
    one, other = (stepper([weightless(batch, [2, 7], junk)]) for junk in (0, 201))
    assert one[1] == other[1]
    ids = np.where(batch.queries.mask, batch.queries.ids, 7)
    order = np.random.default_rng(0).permutation(ids.shape[1])
    queries = batch.queries._replace(ids=ids[:, order], mask=batch.queries.mask[:, order])
    targets = batch.targets._replace(answers=batch.targets.answers[..., order])
    plain, shuffled = stepper([batch])[1], stepper([batch._replace(queries=queries, targets=targets)])[1]
    np.testing.assert_allclose(plain, shuffled, rtol=1e-5)
    assert plain[0][0] != one[1][0][0]


@pytest.mark.slow
def test_questions_are_the_same_from_the_middle_on(stepper, batches):
    stream = stepper.problem.stream(1)
    later = next(stream)
    stream.close()
    same = jax.tree.map(np.array_equal, later, batches[1])
    assert all(jax.tree.leaves(same))


# Runs


@pytest.mark.slow
def test_a_run_killed_and_used(tmp_path, monkeypatch, capsys):
    """Resumed equals uninterrupted; then the run is evaluated, described, asked, and the start of another."""
    config = toy_config(tmp_path / "whole")
    result = train(config)
    broken = killed_and_resumed(config, tmp_path / "broken", monkeypatch, at=5)
    assert_same_run(config, broken)
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert {"test/loss", "test/AP", "test/AP50"} <= stored.keys()
    assert Path(config.out, "predictions.png").stat().st_size > 1000
    assert Path(config.out, "tokenizer.json").exists()
    _use(Path(config.out), result.metrics, tmp_path, capsys)


def _use(run, metrics, tmp_path, capsys):
    main(["eval", str(run)])
    assert f"test/loss {metrics['loss']:.4f}" in capsys.readouterr().out
    main(["info", str(run)])
    assert "a run of the open-vocabulary detector toy_owlvit" in capsys.readouterr().out
    image = tmp_path / "image.png"
    Image.fromarray(np.arange(48 * 40, dtype=np.uint8).reshape(48, 40)).save(image)
    main(["predict", str(run), str(image), "--queries", "a photo of a Seven!", "two", "--threshold", "0", "--top", "3"])
    printed = capsys.readouterr().out
    assert "3 objects of score 0 or more" in printed
    assert all(line.split("  ")[1] in ("a photo of a Seven!", "two") for line in printed.splitlines()[1:])
    assert (run / "predictions" / "image.png").exists()
    for options in (["--json", "found.json"], ["--queries", "?"]):
        with pytest.raises(SystemExit):
            main(["predict", str(run), str(image), *options])
    assert "query 1 of 1 is '?': it has no word" in capsys.readouterr().err
    again = dataclasses.replace(
        toy_config(tmp_path / "again"), init=str(run), loop=LoopConfig(epochs=1 / 3, batch_size=8)
    )
    assert train(again).metrics.keys() == metrics.keys()
    assert f"begins with {run}, step 6" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_depend_on_no_batch_size():
    def evaluated(size, devices):
        config = dataclasses.replace(toy_config(), loop=LoopConfig(eval_batch_size=size))
        problem = make_problem(config)
        object.__setattr__(problem.test_source, "_length", 7)
        assert problem.test_source.class_names == WORDS
        return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics

    one, eight = evaluated(3, 1), evaluated(8, 8)
    assert one == pytest.approx(eight, rel=1e-4, nan_ok=True)


# Published weights


@pytest.mark.slow
def test_published_weights_are_asked(tmp_path, rng, capsys):
    """Images are padded to a square in grey, and boxes are in pixels of the file; what is missing is said."""
    tokenizer = train_bpe(["a photo of a cat", "a hat"], 514)
    model, state = eqx.nn.make_with_state(TOY)(vocab_size=tokenizer.vocab_size, key=jax.random.key(0))
    noise = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), model)
    save_file(dict(to_layout(noise, state, LAYOUTS["hf_owlvit"])), tmp_path / "model.safetensors")
    image = tmp_path / "image.png"
    pixels = rng.integers(0, 255, (24, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    with pytest.raises(FileNotFoundError, match="no vocabulary"):
        load_published_open_vocabulary("toy_owlvit", tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    run = load_published_open_vocabulary("toy_owlvit", tmp_path)
    (found,) = find_named(run, [image], ["A cat", "a hat"], threshold=0, top=5)
    canvas = np.full((1, 48, 48, 3), 0.5, np.float32)
    canvas[0, :24] = pixels / 255
    text = tokenizer.encode_batch(["a cat", "a hat"], 16)
    queries = TextTokens(text.ids[None], text.mask[None])
    mean, std = np.array(run.config.data.mean, np.float32), np.array(run.config.data.std, np.float32)
    inputs = QueriedImages((canvas - mean) / std, np.array([[24, 48]], np.int32), queries)
    detect = jax.jit(lambda model, inputs: decode_queried(model(inputs, state)[0], jnp.array([[48, 48]]), count=5))
    expected = detect(noise, inputs)
    np.testing.assert_allclose(found.scores, expected.scores[0], rtol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes[0], rtol=1e-3, atol=1e-2)
    assert found.names == tuple(("A cat", "a hat")[label] for label in np.asarray(expected.labels[0]))
    with pytest.raises(SystemExit):
        main(["predict", "toy_owlvit", str(image), "--weights", str(tmp_path)])
    assert "published weights know no classes: say what to look for" in capsys.readouterr().err
