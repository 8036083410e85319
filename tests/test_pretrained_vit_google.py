"""ViT files of google-research/vision_transformer, big_vision and Scenic, against a ViT in Flax and timm's reader.

The original code is in no package index. The oracle, ``flax_vit.py``, has its names and its order of operations; timm
has a reader of the same files of its own.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.vit import SIZES, ViTSize
from eqvision.classifiers import vit_classifier
from eqvision.layers import SinCos2D
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.zoo import MODELS, create

WIDTH, PATCH, SIDE, CLASSES = 32, 8, 32, 5
TOLERANCE = 1e-5

toy = functools.partial(vit_classifier, "toy_google", PATCH)
mean, attentive = functools.partial(toy, pool="mean"), functools.partial(toy, pool="map")
fixed = functools.partial(mean, position="sincos2d_big_vision", pre_logits=16)

# test id: (layout, options of the oracle, our builder)
CASES = {
    "google": ("google_vit", {"names": "PRE_LINEN"}, toy),
    "google_in21k": ("google_vit", {"names": "PRE_LINEN", "pre_logits": 16}, functools.partial(toy, pre_logits=16)),
    "google_mean": ("google_vit", {"names": "PRE_LINEN", "pool": "mean"}, mean),
    "big_vision_token": ("big_vision_vit", {"positions": "outside"}, toy),
    "big_vision_mean": ("big_vision_vit", {"positions": "outside", "pool": "mean"}, mean),
    "big_vision_map": ("big_vision_vit", {"positions": "outside", "pool": "map"}, attentive),
    "big_vision_fixed": ("big_vision_vit", {"positions": "sincos", "pool": "mean", "pre_logits": 16}, fixed),
    "big_vision_stacked": (
        "big_vision_vit_stacked",
        {"positions": "outside", "pool": "map", "stacked": True},
        attentive,
    ),
    "scenic_token": ("scenic_vit", {"head": "output_projection"}, toy),
    "scenic_mean": ("scenic_vit", {"head": "output_projection", "pool": "mean"}, mean),
    "scenic_map": ("scenic_vit", {"head": "output_projection", "pool": "map"}, attentive),
    "scenic_pre_logits": (
        "scenic_vit",
        {"head": "output_projection", "pre_logits": 16},
        functools.partial(toy, pre_logits=16),
    ),
}


@pytest.fixture
def rows(monkeypatch):
    """``rows(builder)`` makes a zoo row ``toy_google`` of a builder."""
    monkeypatch.setitem(SIZES, "toy_google", ViTSize(WIDTH, 3, 2, 64))
    return lambda builder: monkeypatch.setitem(MODELS, "toy_google", builder)


def draw(rng, side: int = SIDE) -> jax.Array:
    return jnp.asarray(rng.standard_normal((2, side, side, 3)).astype(np.float32))


def oracle(options: dict, images):
    """The Flax model and random parameters of it."""
    import flax_vit

    names = getattr(flax_vit, options.get("names", "LINEN"))
    model = flax_vit.FlaxViT(**{**options, "names": names})
    return model, flax_vit.random_parameters(model, images)


def tokens(features) -> np.ndarray:
    b, h, w, d = features.patches.shape
    return np.concatenate([features.prefix, np.reshape(features.patches, (b, h * w, d))], axis=1)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_gives_the_numbers_of_flax(case, rows, rng, tmp_path, assert_close):
    import flax_vit

    layout, options, builder = CASES[case]
    images = draw(rng)
    reference, parameters = oracle(options, images)
    np.savez(tmp_path / "model.npz", **parameters)
    rows(builder)
    model, state = load("toy_google", tmp_path / "model.npz")
    logits, outputs = flax_vit.run(reference, parameters, images)
    assert_close(model(images, state)[0], logits, TOLERANCE)
    ours = model.backbone.intermediates(images, state, (0, 1, 2), normalise=False)
    assert_close([tokens(each) for each in ours], list(outputs), TOLERANCE)
    assert [each.name for each in LAYOUTS.values() if each.recognises(parameters)] == [layout]


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_saved_in_their_names_is_the_same_file(case, rows, rng, tmp_path, assert_close):
    layout, options, builder = CASES[case]
    _, parameters = oracle(options, draw(rng))
    np.savez(tmp_path / "model.npz", **parameters)
    rows(builder)
    assert_close(to_layout(*load("toy_google", tmp_path / "model.npz"), LAYOUTS[layout]), parameters, 0)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["google", "big_vision_map", "scenic_mean"])
def test_gradients_are_those_of_flax(case, rows, rng, tmp_path, assert_close):
    import flax_vit

    layout, options, builder = CASES[case]
    images, weights = draw(rng), jnp.asarray(rng.standard_normal((2, CLASSES)).astype(np.float32))
    reference, parameters = oracle(options, images)
    np.savez(tmp_path / "model.npz", **parameters)
    rows(builder)
    model, state = load("toy_google", tmp_path / "model.npz")
    expected = jax.grad(lambda p: jnp.sum(flax_vit.run(reference, p, images)[0] * weights))(parameters)
    gradients = eqx.filter_grad(lambda m: jnp.sum(m(images, state)[0] * weights))(model)
    ours = to_layout(gradients, state, LAYOUTS[layout])
    # the gradients of key biases are zero but for rounding: a softmax does not change with them
    names = [name for name in expected if not name.endswith("key/bias")]
    assert_close({name: ours[name] for name in names}, {name: expected[name] for name in names}, TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("grid", [6, 3])
@pytest.mark.parametrize("case", ["google", "big_vision_map", "scenic_mean"])
def test_another_image_size_is_resampled_as_by_google(case, grid, rows, rng, tmp_path, assert_close):
    """All three call ``scipy.ndimage.zoom(order=1)`` on the grid, and keep the row of the class token apart."""
    import flax_vit
    from scipy.ndimage import zoom

    _, options, builder = CASES[case]
    reference, parameters = oracle(options, draw(rng))
    np.savez(tmp_path / "model.npz", **parameters)
    rows(builder)
    model, state = load("toy_google", tmp_path / "model.npz", image_size=grid * PATCH)
    name = next(name for name in parameters if name.endswith("pos_embedding"))
    prefix = 1 if case == "google" else 0
    table = parameters[name][0, prefix:].reshape(4, 4, WIDTH)
    other = zoom(table, (grid / 4, grid / 4, 1), order=1).reshape(grid * grid, WIDTH)
    parameters[name] = np.concatenate([parameters[name][0, :prefix], other])[None]
    images = draw(rng, grid * PATCH)
    assert_close(model(images, state)[0], flax_vit.run(reference, parameters, images)[0], TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["google", "big_vision_token", "big_vision_map", "big_vision_stacked"])
def test_gives_the_numbers_of_timms_reader(case, rows, rng, tmp_path, assert_close):
    """timm reads these files by code of its own. Its GELU is exact by default; here it is told to take theirs."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    layout, options, builder = CASES[case]
    images = draw(rng)
    _, parameters = oracle(options, images)
    np.savez(tmp_path / "model.npz", **parameters)
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    pooled = {"global_pool": "map", "class_token": False} if options.get("pool") == "map" else {}
    no_class = {"no_embed_class": True} if layout != "google_vit" else {}
    theirs = VisionTransformer(**sizes, num_classes=CLASSES, act_layer="gelu_tanh", **pooled, **no_class).eval()
    theirs.load_pretrained(str(tmp_path / "model.npz"))
    rows(builder)
    model, state = load("toy_google", tmp_path / "model.npz")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy())).numpy()
    assert_close(model(images, state)[0], expected, TOLERANCE)


# Without oracles


def built(builder, key):
    return eqx.nn.make_with_state(builder)(num_classes=CLASSES, image_size=SIDE, in_channels=3, key=key)


def written(path, model, state, layout: str, prefix: str = "", **extra):
    tensors = to_layout(model, state, LAYOUTS[layout])
    np.savez(path, **{prefix + name: array for name, array in tensors.items()}, **extra)
    return path


def same(model, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_a_training_state_around_the_parameters_is_not_read(prefix, rows, key, tmp_path):
    rows(attentive)
    model, state = built(attentive, key)
    extra = {"chrono/last_step": np.array(3), "opt/0/count": np.array(3)} if prefix else {}
    file = written(tmp_path / "model.npz", model, state, "big_vision_vit", prefix, **extra)
    assert same(load("toy_google", file)[0], model)


@pytest.mark.parametrize("layout", ["big_vision_siglip", "big_vision_siglip_stacked"])
def test_the_image_encoder_of_siglip(layout, rows, key, tmp_path):
    rows(attentive)
    model, state = built(attentive, key)
    tensors = to_layout(model, state, LAYOUTS[layout])
    tensors = {f"params/{name}": array for name, array in tensors.items() if "/head/" not in name}
    text = {"params/txt/head/kernel": np.zeros((4, 4), np.float32), "params/t": np.zeros(1), "params/b": np.zeros(1)}
    np.savez(tmp_path / "siglip.npz", **tensors, **text)
    with pytest.raises(WeightsError, match=r"no classification layer \(it would be img/head/bias, img/head/kernel\)"):
        load("toy_google", tmp_path / "siglip.npz")
    again, _ = load("toy_google", tmp_path / "siglip.npz", num_classes=3)
    assert same(again.backbone, model.backbone)
    assert same(again.head.map_pool, model.head.map_pool)
    assert again.head.linear.bias.shape == (3,)


@pytest.mark.parity
def test_a_scenic_checkpoint_of_a_training_state(rows, key, tmp_path):
    import flax.serialization
    from flax.traverse_util import unflatten_dict

    rows(toy)
    model, state = built(toy, key)
    parameters = unflatten_dict(to_layout(model, state, LAYOUTS["scenic_vit"]), sep="/")
    train_state = {
        "global_step": 7,
        "opt_state": {"0": {"mu": parameters, "nu": parameters}},
        "params": parameters,
        "model_state": {},
        "rng": np.zeros(2, np.uint32),
        "metadata": None,
    }
    (tmp_path / "checkpoint_7").write_bytes(flax.serialization.msgpack_serialize(train_state))
    assert same(load("toy_google", tmp_path / "checkpoint_7")[0], model)


def test_heads_of_another_number_are_an_error(rows, key, tmp_path, monkeypatch):
    rows(toy)
    file = written(tmp_path / "model.npz", *built(toy, key), "google_vit")
    monkeypatch.setitem(SIZES, "toy_google", ViTSize(WIDTH, 3, 4, 64))
    with pytest.raises(WeightsError, match=r"query/kernel \(32, 2, 16\).*: shape \(32, 2, 16\), expected \(32, 4, 8\)"):
        load("toy_google", file)


def test_another_pooling_than_the_files_names_both(rows, key, tmp_path):
    rows(attentive)
    file = written(tmp_path / "model.npz", *built(attentive, key), "big_vision_vit")
    rows(toy)
    with pytest.raises(WeightsError, match=r"1 tensors are missing:\s+cls\n15 tensors .*\s+MAPHead_0/probe") as error:
        load("toy_google", file)
    assert "layout big_vision_vit" in str(error.value)


def test_options_of_the_dialects_come_with_the_layout(rows, key, tmp_path):
    """A row with timm's conventions computes as the file's authors did, once it has read their file."""
    rows(toy)
    google = written(tmp_path / "google.npz", *built(toy, key), "google_vit")
    before = functools.partial(toy, position_on_class=False)
    big_vision = written(tmp_path / "big_vision.npz", *built(before, key), "big_vision_vit")
    model, _ = load("toy_google", google)
    assert model.backbone.encoder.blocks.mlp.activation == "gelu_tanh"
    assert model.backbone.class_position is not None
    assert load("toy_google", big_vision)[0].backbone.class_position is None


def test_fixed_positions_of_big_vision_end_at_the_temperature():
    """MAE's and Scenic's frequencies stop short of one over it."""
    table = SinCos2D(16, endpoint=True)((2, 3))
    assert table.shape == (2, 3, 16)
    np.testing.assert_allclose(table[1, 2, 3], np.sin(2e-4), rtol=1e-5)  # the column's slowest wave
    np.testing.assert_allclose(table[1, 2, 11], np.sin(1e-4), rtol=1e-5)  # the row's
    assert abs(SinCos2D(16)((2, 3))[1, 2, 3] - np.sin(2e-4)) > 1e-4
    with pytest.raises(ValueError, match="endpoint=True needs a width of 4 or more per axis, got 2"):
        SinCos2D(4, endpoint=True)((2, 3))


def test_the_small_big_vision_model_is_that_of_the_published_files(key):
    """big_vision/configs/vit_s16_i1k.py: rep_size=True, pool_type="gap", posemb="sincos2d"."""
    model, state = eqx.filter_eval_shape(create, "vit_s16_big_vision", key=key)
    names = to_layout_names(model, state)
    assert "pre_logits/kernel" in names
    assert not any("pos_embedding" in name or name == "cls" for name in names)
    assert model.backbone.position.endpoint


def to_layout_names(model, state) -> set[str]:
    del state
    return {name for rule in LAYOUTS["big_vision_vit"].rules(model) for name in rule.their_names}
