"""Segment Anything without a reference: prompts, sizes, names in files, predictor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_references as source

import eqvision
from eqvision.layers import mask_prompts
from eqvision.ops import resize_bilinear
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.segmenters import sam as segment
from eqvision.segmenters.sam import predictor as predictor_module
from eqvision.zoo import PROMPTED

# Prompts


def test_slots_of_prompts():
    points, labels = np.ones((1, 2, 1, 2)), np.array([[[1], [0]]])
    boxes = np.arange(8.0).reshape(1, 2, 4)
    alone = mask_prompts(points, labels, slots=4)
    assert np.asarray(alone.labels).tolist() == [[[1, -1, -2, -2], [0, -1, -2, -2]]]
    both = mask_prompts(points, labels, boxes, slots=4)
    assert np.asarray(both.labels).tolist() == [[[1, 2, 3, -2], [0, 2, 3, -2]]]
    assert np.asarray(both.points)[0, 1, 1:3].tolist() == [[4, 5], [6, 7]]
    assert mask_prompts(count=(2, 3)).labels.shape == (2, 3, 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "with a label for each point; got points"),
        ({"boxes": np.zeros((1, 3, 4))}, r"of the same images, .* boxes \(1, 3, 4\)"),
        ({"labels": np.full((1, 2, 1), 3)}, r"labels must be 1 \(inside\), 0 \(outside\) or -1"),
        ({"slots": 1}, "2 points, corners and signs of no box for each prompt do not fit into 1 slots"),
    ],
)
def test_prompts_that_do_not_fit(arguments, message):
    given = {"points": np.ones((1, 2, 1, 2)), "labels": np.ones((1, 2, 1), int)} | arguments
    with pytest.raises(ValueError, match=message):
        mask_prompts(**given)


def test_masks_of_another_size():
    model = jax.eval_shape(lambda: source.toy_sam(key=jax.random.key(0)))
    prompts = mask_prompts(masks=np.zeros((1, 1, 64, 64), np.float32))
    with pytest.raises(ValueError, match="prompt masks of 64x64 do not fit features of 8x8; expected 32x32"):
        jax.eval_shape(lambda m: m.decode(jnp.zeros((1, 8, 8, source.OUT)), prompts), model)


# Sizes


@pytest.mark.parametrize(
    ("size", "inner"),
    [((1365, 2048), (683, 1024)), ((2048, 3), (1024, 2)), ((3, 4096), (1, 1024)), ((5, 5), (1024,) * 2)],
)
def test_sizes(size, inner):
    assert segment.geometry(size).inner == inner


def test_an_image_is_normalised_before_it_is_padded():
    image = np.full((30, 60, 3), 255, np.uint8)
    prepared = segment.prepare_image(image, 64)
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(prepared[:32], np.broadcast_to(white, (32, 64, 3)), rtol=1e-5)
    assert not prepared[32:].any()


@pytest.mark.parametrize("size", [(50, 23), (7, 64)])
def test_logits_are_resized_twice(assert_close, rng, size):
    logits, sizes = rng.normal(size=(2, 16, 16)).astype(np.float32), segment.geometry(size, 64)
    padded = resize_bilinear(jnp.asarray(logits)[..., None], (64, 64))[:, : sizes.inner[0], : sizes.inner[1]]
    expected = resize_bilinear(padded, size)[..., 0]
    assert_close(segment.resize_logits(logits, sizes), expected, 1e-6)
    assert np.array_equal(segment.resize_masks(logits, sizes, threshold=0.3), np.asarray(expected) > 0.3)


# The model and its weights


@pytest.mark.parametrize(("size", "count"), [("b", 93_735_472), ("l", 312_342_832), ("h", 641_090_608)])
def test_parameter_counts(size, count):
    """Those of the official models, in which the 2 x 128 matrix of positions is a buffer."""
    model = jax.eval_shape(lambda: segment.sam(size, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count + 256


@pytest.mark.usefixtures("unchecked")
def test_refused_options():
    with pytest.raises(ValueError, match="size 'g' does not exist; choose from b, l, h"):
        segment.sam("g", key=jax.random.key(0))
    with pytest.raises(ValueError, match="width 20 must be divisible by 8"):
        jax.eval_shape(lambda: segment.sam("b", width=20, key=jax.random.key(0)))


@pytest.mark.parametrize(("name", "names"), [("official_sam", source.official_names), ("hf_sam", source.hf_names)])
def test_every_tensor_there_and_back(name, names, tmp_path, rng, monkeypatch):
    monkeypatch.setitem(PROMPTED, "toy_sam", source.toy_sam)
    tensors = {each: rng.normal(size=shape).astype(np.float32) for each, shape in names()}
    np.savez(tmp_path / "sam.npz", **tensors)
    model, state = eqvision.load("toy_sam", tmp_path / "sam.npz")
    assert model.head.transformer.blocks[0].norm1.eps == (1e-5 if name == "official_sam" else 1e-6)
    assert model.head.transformer.norm.eps == 1e-5
    again = to_layout(model, state, LAYOUTS[name])
    assert set(again) == set(tensors)
    for each, tensor in tensors.items():
        np.testing.assert_array_equal(again[each], tensor, err_msg=each)


def test_the_matrix_of_positions_under_two_names(tmp_path, rng, monkeypatch):
    monkeypatch.setitem(PROMPTED, "toy_sam", source.toy_sam)
    tensors = {each: rng.normal(size=shape).astype(np.float32) for each, shape in source.hf_names()}
    matrix = tensors["shared_image_embedding.positional_embedding"]
    tied = "prompt_encoder.shared_embedding.positional_embedding"
    np.savez(tmp_path / "same.npz", **tensors, **{tied: matrix})
    model, _ = eqvision.load("toy_sam", tmp_path / "same.npz")
    np.testing.assert_array_equal(model.prompts.position.matrix, matrix)
    np.savez(tmp_path / "other.npz", **tensors, **{tied: matrix + 1})
    with pytest.raises(WeightsError, match="are one matrix in SamModel, and differ in this file"):
        eqvision.load("toy_sam", tmp_path / "other.npz")


# The predictor


@pytest.fixture(scope="module")
def predictor():
    predictor = segment.Predictor(source.noisy_sam(), source.STATE, prompts_per_batch=2, max_points=2)
    predictor.set_image(np.random.default_rng(4).integers(0, 256, (48, 90, 3), dtype=np.uint8))
    return predictor


def test_one_program_for_every_kind_of_prompt(predictor, assert_close, rng):
    points, labels = rng.uniform(0, 48, (5, 2, 2)), rng.integers(0, 2, (5, 2))
    boxes = np.tile([[3.0, 4, 60, 40]], (5, 1))
    every = predictor.predict(points, labels, boxes)
    programs = predictor_module._decode._cache_size()
    assert (every.masks.shape, every.logits.shape, every.iou.shape) == ((5, 3, 48, 90), (5, 3, 32, 32), (5, 3))
    alone = [predictor.predict(points[i : i + 1], labels[i : i + 1], boxes[i : i + 1]) for i in range(5)]
    assert_close(every.logits, np.concatenate([each.logits for each in alone]), 1e-5)
    assert_close(every.iou, np.concatenate([each.iou for each in alone]), 1e-5)
    one = predictor.predict(points, labels, multimask=False)
    assert one.masks.shape == (5, 1, 48, 90)
    again = predictor.predict(points[:, :1], labels[:, :1], masks=one.logits[:, 0])
    for kind in (one, again, predictor.predict(boxes=boxes), predictor.predict()):
        assert np.abs(kind.logits[0, 0] - every.logits[0, 0]).max() > 1e-3
    assert predictor_module._decode._cache_size() == programs


@pytest.mark.slow
def test_absent_points_change_nothing(predictor, assert_close, rng):
    points, labels = rng.uniform(0, 48, (2, 1, 2)), np.array([[1], [0]])
    wide = segment.Predictor(predictor.model, source.STATE, prompts_per_batch=2, max_points=3)
    wide._image = predictor._image
    assert_close(wide.predict(points, labels).logits, predictor.predict(points, labels).logits, 1e-5)
    junk = np.concatenate([points, np.full((2, 1, 2), np.nan)], axis=1)
    absent = np.concatenate([labels, [[-1], [-1]]], axis=1)
    assert np.isfinite(predictor.predict(junk, absent).logits).all()


BOX, ONE = np.array([[1.0, 1, 9, 9]]), np.ones((1, 1), int)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": np.ones((1, 2))}, r"points must be \(p, n, 2\) for p prompts, got \(1, 2\)"),
        ({"points": np.ones((1, 1, 2))}, "points need labels"),
        (
            {"points": np.array([[[10.0, 60]]]), "labels": ONE},
            r"\[10.0, 60.0\] is outside the image of 48x90",
        ),
        ({"points": np.ones((1, 3, 2)), "labels": np.ones((1, 3), int)}, "3 points for a prompt, and max_points is 2"),
        ({"boxes": BOX[:, [2, 1, 0, 3]]}, r"the box \[9.0, 1.0, 1.0, 9.0\] is empty, or outside"),
        (
            {"boxes": BOX, "masks": np.zeros((1, 48, 90))},
            r"masks must be \(p, 32, 32\) for p prompts, got \(1, 48, 90\)",
        ),
        ({"boxes": np.tile(BOX, (2, 1)), "masks": np.zeros((1, 32, 32))}, "all parts must be of the same prompts"),
        ({"boxes": np.zeros((0, 4))}, "one or more"),
    ],
)
def test_refused_prompts(predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_refused_images():
    fresh = segment.Predictor(source.noisy_sam(), source.STATE)
    with pytest.raises(segment.NoImageError, match="no image yet; call set_image first"):
        fresh.predict(boxes=BOX)
    with pytest.raises(ValueError, match=r"must be RGB \(height, width, 3\) of uint8, got \(8, 8\) uint8"):
        fresh.set_image(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="max_points must be at least 1, got 0"):
        segment.Predictor(source.noisy_sam(), source.STATE, max_points=0)
