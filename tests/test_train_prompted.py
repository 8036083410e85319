"""Training models with prompts: scores of clicks, resuming bit for bit, one device against eight, and messages."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_references as source
from toy_detection import first_batches
from toy_runs import Stepper, assert_same_run, killed_and_resumed, use_devices

from eqvision import UnknownNameError
from eqvision.cli import main
from eqvision.mesh import make_mesh
from eqvision.problems import make_problem
from eqvision.problems.prompted import prompted_problem, small_masks
from eqvision.recipes import (
    DetectionDataConfig,
    LoopConfig,
    OptimizerConfig,
    PromptedConfig,
    PromptedLossConfig,
    PromptedModelConfig,
    ScheduleConfig,
)
from eqvision.segmenters import sam as segment
from eqvision.train import train
from eqvision.types import DetectionBatch, DetectionTargets
from eqvision.zoo import PROMPTED

SIDE = source.SIDE


def toy_config(out="unused", *, model="toy_sam", train_encoder=True, size=(SIDE, SIDE), **data):
    """Six steps of 8 scenes, evaluated and saved every third."""
    return PromptedConfig(
        out=str(out),
        model=PromptedModelConfig(name=model, train_encoder=train_encoder),
        task=PromptedLossConfig(points=1, clicks=2),
        data=DetectionDataConfig(
            **{"kind": "digits", "length": 24, "test_split": "test", "size": size, "max_objects": 3, "num_threads": 0}
            | data
        ),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
    )


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """In the zoo, on one device, evaluated on few scenes."""
    monkeypatch.setitem(PROMPTED, "toy_sam", functools.partial(source.toy_sam))
    use_devices(monkeypatch, 1)


def batch_of(masks, valid):
    """A batch of these masks, of images in which nothing is."""
    b, p, h, w = masks.shape
    targets = DetectionTargets(jnp.zeros((b, p, 4)), jnp.zeros((b, p), jnp.int32), jnp.asarray(valid), masks)
    sizes = jnp.full((b, 2), h)
    images = jnp.zeros((b, h, w, 3), jnp.uint8)
    return DetectionBatch(images, sizes, sizes, targets, jnp.ones(b), jnp.arange(b))


# What is asked for, and how well it is found


def test_small_masks_are_where_half_a_cell_is_object():
    masks = np.zeros((1, 3, 8, 8), np.uint8)
    masks[0, 0, :2, :1], masks[0, 0, 4:5, 4:5] = 1, 1  # half of a cell of 2x2, and a quarter of another
    masks[0, 1, 3, 3] = 1  # a single pixel: nothing is left of it
    masks[0, 2] = 1
    small, valid = small_masks(batch_of(jnp.asarray(masks), [[True, True, False]]), (4, 4))
    assert np.argwhere(np.asarray(small[0, 0])).tolist() == [[0, 0]]
    assert np.asarray(valid).tolist() == [[True, False, False]]


@pytest.mark.slow
def test_scores_of_clicks(rng):
    """Each click's mask is what the model gives for the points so far and the mask before; padding changes nothing."""
    model = source.noisy_sam()
    features = jnp.asarray(rng.normal(size=(1, source.GRID, source.GRID, source.OUT)), jnp.float32)
    masks = jnp.zeros((1, 2, 32, 32)).at[0, 0, 8:20, 4:16].set(1).at[0, 1].set(jnp.nan)
    valid, key = jnp.array([[True, False]]), jax.random.key(3)
    score = source.quickly(functools.partial(segment.score_clicks, clicks=2))
    found = score(model, features, masks, valid, key=key)
    assert np.asarray(found.box)[0, 1] == 0
    assert not np.asarray(found.clicks)[:, 0, 1].any()
    other = score(model, features, masks.at[0, 1].set(7.0), valid, key=key)
    np.testing.assert_array_equal(found.box, other.box)
    np.testing.assert_array_equal(found.clicks, other.clicks)
    np.testing.assert_array_equal(found.logits[:, :1], other.logits[:, :1])
    mask = np.asarray(found.logits)[0, 0] > 0
    wanted = np.asarray(masks)[0, 0] > 0.5
    assert float(found.box[0, 0]) == pytest.approx((mask & wanted).sum() / (mask | wanted).sum(), abs=1e-6)
    prompts = segment.box_prompts(masks, valid, stride=2)
    np.testing.assert_array_equal(np.asarray(prompts.points)[0, 0], [[8, 16], [32, 40]])  # x, y of two corners
    assert np.asarray(prompts.labels).tolist() == [[[2, 3], [-2, -2]]]


# The step


@pytest.fixture(scope="module")
def stepper():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROMPTED, "toy_sam", functools.partial(source.toy_sam))
        built = Stepper(make_problem(toy_config()))
        built.built = noisy(built.built[0]), built.built[1]
        yield built


def noisy(model):
    """Biases of keys begin at zero and have no gradient: their rounding alone would be compared."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), model)


@pytest.fixture(scope="module")
def batches(stepper):
    return first_batches(stepper.problem, 2)


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, images, masks = batch.weights.copy(), batch.images.copy(), batch.targets.masks.copy()
    weights[rows], images[rows], masks[rows] = 0.0, junk, junk % 2
    return batch._replace(weights=weights, images=images, targets=batch.targets._replace(masks=masks))


def without_objects(batch, rows):
    valid = batch.targets.valid.copy()
    valid[rows] = False
    return batch._replace(targets=batch.targets._replace(valid=valid))


@pytest.mark.slow
def test_one_device_equals_eight(assert_close, stepper, batches):
    """With images without objects and rows of weight 0, so that devices differ in what they count."""
    given = [weightless(without_objects(batch, [1, 5]), [7], 50) for batch in batches]
    many = Stepper(stepper.problem, devices=8)
    many.built = stepper.built
    one, eight = stepper(given), many(given)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-4)
    assert_close(eight[0].model, one[0].model, 1e-4)


@pytest.mark.slow
def test_rows_that_do_not_count(stepper, batches):
    """Rows of weight 0 may hold anything; a batch without objects changes nothing."""
    one, other = (stepper([weightless(batches[0], [2, 7], junk)]) for junk in (0, 201))
    assert one[1] == other[1]
    _, logs = stepper([without_objects(batches[0], slice(None))])
    assert logs == [(0.0, 0.0)]


@pytest.mark.slow
def test_a_frozen_encoder_has_no_gradient(batches):
    problem = make_problem(toy_config(train_encoder=False))
    stepper = Stepper(problem)
    state, _ = stepper(batches[:1])
    same = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), state.model, stepper.built[0])
    assert all(jax.tree.leaves((same.backbone, same.neck)))
    assert not all(jax.tree.leaves(same.head))


# Runs


@pytest.mark.slow
def test_a_run_killed_and_used(tmp_path, monkeypatch, capsys):
    """Resumed equals uninterrupted; then the run is evaluated, described, drawn, and the start of another."""
    config = toy_config(tmp_path / "whole")
    result = train(config)
    broken = killed_and_resumed(config, tmp_path / "broken", monkeypatch, at=5)
    assert_same_run(config, broken)
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert stored.keys() == {"test/box_iou", "test/click_iou", "test/click2_iou"}
    assert all(0 <= value <= 1 for value in stored.values())
    assert Path(config.out, "predictions.png").stat().st_size > 1000
    _use(Path(config.out), result.metrics, tmp_path, capsys)


def _use(run, metrics, tmp_path, capsys):
    main(["eval", str(run)])
    assert f"test/box_iou {metrics['box_iou']:.4f}" in capsys.readouterr().out
    main(["info", str(run)])
    assert "a run of the model with prompts toy_sam" in capsys.readouterr().out
    image = tmp_path / "image.png"
    _picture(image)
    main(["predict", str(run), str(image), "--prompt-points", "20", "30", "1"])
    assert "3 masks" in capsys.readouterr().out
    assert (run / "predictions" / "image_mask1.png").exists()
    again = toy_config(tmp_path / "again")
    begun = train(PromptedConfig(**{**vars(again), "init": str(run), "loop": LoopConfig(epochs=1 / 3, batch_size=8)}))
    assert begun.metrics.keys() == metrics.keys()
    assert f"begins with {run}, step 6" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--evaluator", "knn"])
    assert "is for classifiers" in capsys.readouterr().err


def _picture(path):
    from PIL import Image

    Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)).save(path)


@pytest.mark.slow
def test_figures_depend_on_no_batch_size():
    def evaluated(size, devices):
        config = toy_config()
        config = PromptedConfig(**{**vars(config), "loop": LoopConfig(eval_batch_size=size)})
        problem = make_problem(config)
        object.__setattr__(problem.test_source, "_length", 7)
        return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics

    one, eight = evaluated(3, 1), evaluated(8, 8)
    assert one == pytest.approx(eight, rel=1e-5)


# What does not fit together


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "sam_vit_c"}, UnknownNameError, "--model.name: model with prompts 'sam_vit_c' does not exist"),
        ({"model": "unet"}, ValueError, "--model.name unet takes no prompts, and this recipe trains models that do"),
        ({"size": (64, 32)}, ValueError, "--data.size 64 32; models with prompts take squares, such as 32 32"),
        ({"transform": "detr"}, ValueError, "--data.transform detr gives images of many sizes"),
        ({"kind": "coco"}, ValueError, "data.kind 'coco' needs a path: --data.path PATH"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, error, message):
    with pytest.raises(error) as caught:
        prompted_problem(toy_config(**options))
    assert message in str(caught.value)


def test_rounds_must_be_possible():
    config = PromptedConfig(**{**vars(toy_config()), "task": PromptedLossConfig(clicks=0)})
    with pytest.raises(ValueError, match=r"--task\.clicks 0; expected 0 or more points and 1 click or more"):
        prompted_problem(config)
