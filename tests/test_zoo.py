"""Every model of the zoo against its row in cases.py: abstractly in full size, and run as a toy of its family."""

import functools
import math
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, SLOW_TOYS, TOYS

import eqvision
from eqvision import UnknownNameError, create, inference, reset_head
from eqvision.checkpoint import CheckpointError, Checkpoints
from eqvision.classifiers import Backbone, Head
from eqvision.counting import count
from eqvision.layers import MissingKeyError
from eqvision.types import TokenFeatures

KEY = jax.eval_shape(jax.random.key, 0)
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])

# Published in whole millions, and for "about 30 000 classes": only good for 1 %.
ROUGHLY_PUBLISHED = ("vit_e14", "vit_e14_big_vision")
# All keys of an attention shift by their bias together, which the softmax over them does not see.
GRADIENT_IS_ZERO = (".attention.key.bias",)


# Full size, on shapes: nothing is allocated, compiled or run


@functools.cache
def abstract(name, image_size, num_classes, in_channels):
    options = {"image_size": image_size, "num_classes": num_classes, "in_channels": in_channels}
    return eqx.filter_eval_shape(create, name, key=KEY, **options)


def images_of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes(tree):
    return tuple(leaf.shape for leaf in jax.tree.leaves(tree))


def features_of(model, state, images):
    return jax.eval_shape(lambda m, s, x: m.backbone(x, s)[0], model, state, images)


def logits_of(model, state, images):
    return jax.eval_shape(lambda m, s, x: m(x, s)[0], model, state, images)


def decimals(published):
    return len(str(published).partition(".")[2])


def test_every_name_of_the_zoo_has_one_row():
    assert sorted(case.name for case in CASES) == eqvision.list_models()


@every_case
def test_published_figures(case):
    model, state = abstract(case.name, case.image_size, case.num_classes, 3)
    counts = count(model, images_of(1, case.image_size, case.image_size, 3), state)
    if case.params is not None:
        millions = (counts.params - case.extra) / 1e6
        if case.name in ROUGHLY_PUBLISHED:
            assert millions == pytest.approx(case.params, rel=0.01)
        else:
            assert round(millions, decimals(case.params)) == case.params
    if case.gmacs is not None:
        assert (counts.macs + case.additions) / 1e9 == pytest.approx(case.gmacs, rel=0.01)


@every_case
def test_features(case):
    model, state = abstract(case.name, case.image_size, case.num_classes, 3)
    features = features_of(model, state, images_of(2, case.image_size, case.image_size, 3))
    assert shapes(features) == tuple((2, *shape) for shape in case.features)


@every_case
def test_channels_and_strides_describe_the_features(case):
    backbone = abstract(case.name, case.image_size, case.num_classes, 3)[0].backbone
    grids = [shape for shape in case.features if len(shape) == 3]
    assert backbone.channels == tuple(shape[2] for shape in grids)
    assert backbone.strides == tuple(case.image_size // shape[0] for shape in grids)


@every_case
def test_leaves_are_float32_arrays_and_parts_keep_their_contracts(case):
    model, state = abstract(case.name, case.image_size, case.num_classes, 3)
    kept, dropped = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    # The markers of batch norm's statistics hold a default that ``make_with_state`` has taken out.
    assert jax.tree.leaves(dropped) == []
    assert {leaf.dtype for leaf in jax.tree.leaves((kept, state))} == {jnp.dtype(jnp.float32)}
    assert isinstance(model.backbone, Backbone)
    assert isinstance(model.head, Head)


@every_case
def test_images_that_are_not_square(case):
    model, state = abstract(case.name, case.image_size, case.num_classes, 3)
    coarsest = model.backbone.strides[-1]
    images = images_of(2, 3 * coarsest, 5 * coarsest, 3)
    if not case.resizes:
        with pytest.raises(ValueError, match=f"built for images of {case.image_size}x{case.image_size}"):
            features_of(model, state, images)
        return
    features = features_of(model, state, images)
    grids = [shape[1:] for shape in shapes(features) if len(shape) == 4]
    factors = [coarsest // stride for stride in model.backbone.strides]
    assert [grid[:2] for grid in grids] == [(3 * factor, 5 * factor) for factor in factors]
    assert jax.eval_shape(lambda m, s, x: m(x, s)[0], model.head, state, features).shape == (2, case.num_classes)


@every_case
def test_logits_of_other_channels_and_classes(case):
    model, state = abstract(case.name, case.image_size, 7, 1)
    images = images_of(2, case.image_size, case.image_size, 1, dtype=jnp.bfloat16)
    logits = logits_of(model, state, images)
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32
    assert model.backbone.in_channels == 1


# Toys, run


class Made(NamedTuple):
    model: Any
    state: Any
    images: jax.Array
    logits: jax.Array
    random: bool


def initial(toy, seed=0, num_classes=5, in_channels=3):
    build = eqx.nn.make_with_state(toy.build)
    return build(num_classes=num_classes, in_channels=in_channels, key=jax.random.key(seed))


def disturbed(tree, seed=1):
    """Noise on every leaf: zero heads and zero scales would hide most of a model."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [leaf + 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


def draw_images(toy, in_channels=3):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.normal(size=(4, toy.image_size, toy.image_size, in_channels)), jnp.float32)


ALL_TOYS = [*TOYS, *(pytest.param(toy, marks=pytest.mark.slow) for toy in SLOW_TOYS)]


@pytest.fixture(scope="module", params=ALL_TOYS, ids=[toy.name for toy in (*TOYS, *SLOW_TOYS)])
def toy(request):
    return request.param


@pytest.fixture(scope="module")
def made(toy):
    model, state = disturbed(initial(toy))
    images = draw_images(toy)
    return Made(model, state, images, inference(model, state)(images), toy.random)


@pytest.fixture(scope="module")
def step(made):
    """One step of AdamW on the model as it is: no filter, no partition."""
    optimizer = optax.adamw(1e-2)

    def loss_of(model, state, key):
        logits, state = model(made.images, state, train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean(), state

    @jax.jit
    def run(model, state, key):
        (loss, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(model, state, key)
        updates, _ = optimizer.update(gradients, optimizer.init(model), model)
        return loss, gradients, optax.apply_updates(model, updates), state

    return lambda seed: run(made.model, made.state, jax.random.key(seed))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_gradients_of_all_parameters(step):
    for path, gradient in jax.tree.leaves_with_path(step(0)[1]):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(gradient)), name
        if name.endswith(GRADIENT_IS_ZERO):
            assert np.max(np.abs(gradient)) < 1e-6, name
        else:
            # Stacked parameters have one gradient for each layer.
            assert np.max(np.abs(gradient)) > 1e-6, name


def test_step_moves_all_parameters_and_the_statistics(step, made):
    _, _, model, state = step(0)
    for (path, old), new in zip(jax.tree.leaves_with_path(made.model), jax.tree.leaves(model), strict=True):
        assert not np.array_equal(old, new), jax.tree_util.keystr(path)
        assert new.dtype == jnp.float32
    assert jax.tree.structure(state) == jax.tree.structure(made.state)
    for old, new in zip(jax.tree.leaves(made.state), jax.tree.leaves(state), strict=True):
        assert not np.array_equal(old, new)


def test_training_depends_on_the_key_alone(step, made):
    first, again, other = step(0), step(0), step(1)
    assert equal(first, again)
    assert equal(first[0], other[0]) is not made.random


def test_random_model_needs_a_key(made):
    def train(model, state):
        return model(made.images, state, train=True)[0]

    if made.random:
        with pytest.raises(MissingKeyError, match=r"random in training and got key=None; pass key=jax.random.key"):
            jax.eval_shape(train, made.model, made.state)
    else:
        assert jax.eval_shape(train, made.model, made.state).shape == (4, 5)


def test_inference_is_the_model_and_repeats_itself(made):
    predict = inference(made.model, made.state)
    logits, state = jax.jit(lambda m, s, x: m(x, s))(made.model, made.state, made.images)
    assert equal(logits, made.logits)
    assert equal(predict(made.images), made.logits)
    assert equal(state, made.state)
    assert np.all(np.isfinite(logits))
    assert np.ptp(logits, axis=0).min() > 0, "all images give the same logits"


def test_images_do_not_see_each_other(made, assert_close):
    halves = [inference(made.model, made.state)(half) for half in jnp.split(made.images, 2)]
    assert_close(jnp.concatenate(halves), made.logits, 1e-5)


def test_bfloat16_images_give_float32_logits(made, assert_close):
    logits = inference(made.model, made.state)(made.images.astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert not equal(logits, made.logits)
    # Sixteen steps of bfloat16's last bit, 2^-8: each layer rounds once or twice.
    assert_close(logits, made.logits, 2**-4)


def test_checkpoint_is_bit_equal_in_a_model_of_another_seed(toy, made, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, (made.model, made.state))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(checkpoints.latest_step(), like=initial(toy, seed=9))
    assert jax.tree.structure(restored) == jax.tree.structure((made.model, made.state))
    assert equal(restored, (made.model, made.state))


def test_intermediates(toy, made, assert_close):
    @jax.jit
    def run(model, state, images):
        layers = (-1, 0, toy.layers - 1, -toy.layers)
        return model.intermediates(images, state, layers), model.backbone(images, state)[0]

    (ending, first, ending_too, first_too), features = run(made.model, made.state, made.images)
    assert_close(ending, features if isinstance(features, TokenFeatures) else features[-1], 1e-6)
    assert equal(ending, ending_too)
    assert equal(first, first_too)
    assert shapes(first) != shapes(ending) or not equal(first, ending)


@pytest.mark.parametrize("behind", [False, True])
def test_intermediates_of_a_layer_that_does_not_exist(toy, made, behind):
    layer = -1 - toy.layers if behind else toy.layers
    message = f"layer {layer} does not exist, the backbone has layers 0..{toy.layers - 1}"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda m, s: m.intermediates(made.images, s, (layer,)), made.model, made.state)


def test_reset_head(made):
    model = reset_head(made.model, 3, key=jax.random.key(4))
    assert logits_of(model, made.state, made.images).shape == (4, 3)
    assert equal(model.backbone, made.model.backbone)
    assert np.ptp(model.head.linear.weight) > 0


# What is refused, and in which words


SMALL = TOYS[2]  # vit_ti16: it has a patch size, and statistics would be no use here


@pytest.fixture(scope="module")
def small():
    return eqx.filter_eval_shape(initial, SMALL)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32, 3), r"got one array of shape \(32, 32, 3\); add the batch axis with images\[None\]"),
        ((2, 1, 32, 32, 3), r"expected images of shape \(batch, height, width, 3\), got \(2, 1, 32, 32, 3\)"),
        ((2, 3, 32, 32), r"look channels-first; .* use jnp.moveaxis\(images, 1, -1\)"),
        ((2, 32, 32, 1), r"have 1 channels and the model was built with in_channels=3; build it with in_channels=1"),
        ((2, 40, 47, 3), r"40x47 cannot be cut into steps of 16x16 pixels; .* for instance to 32x48"),
        ((2, 0, 32, 3), r"0x32 cannot be cut into steps of 16x16 pixels; .* for instance to 16x32"),
    ],
    ids=["no batch axis", "five axes", "channels first", "channels", "size", "empty"],
)
def test_images_of_the_wrong_shape(small, shape, message, unchecked):
    model, state = small
    with pytest.raises(ValueError, match=message):
        logits_of(model, state, images_of(*shape))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("vit_b17", "vit_b16"), ("resnet_50", "resnet50"), ("resnet20", "resnet20_cifar"), ("ViT_ti16", "vit_ti16")],
)
def test_unknown_name_lists_the_nearest(name, nearest):
    with pytest.raises(UnknownNameError, match=f"model '{name}' does not exist; nearest: .*{nearest}"):
        create(name, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"dropout": 0.1}, "model 'resnet50' has no option 'dropout'; it has: none of them"),
        ("resnet18", {"drop_path": 0.0}, "model 'resnet18' has no option 'drop_path'"),
        ("vit_h14", {"image_size": 384}, "384x384 is not divisible by 14, .* the nearest legal size is 378x378"),
        ("vit_b16", {"image_size": (224, 230)}, "224x230 is not divisible by 16, .* size is 224x224"),
        ("vit_b_r50_s16", {"image_size": 100}, "100x100 is not divisible by 16, .* size is 96x96"),
        ("vit_b16", {"remat": "all"}, r"remat 'all' is unknown; choose from \('none', 'dots', 'full'\)"),
    ],
)
def test_options_that_a_model_cannot_take(name, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        eqx.filter_eval_shape(create, name, key=KEY, **options)


def test_misspelt_option_is_a_type_error():
    with pytest.raises(TypeError, match="num_class"):
        create("vit_ti16", num_class=10, key=jax.random.key(0))


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_options_reach_the_model(option):
    model, state = eqx.filter_eval_shape(create, "vit_ti16", image_size=32, key=KEY, **{option: 0.1})
    with pytest.raises(MissingKeyError, match=option):
        jax.eval_shape(lambda m, s, x: m(x, s, train=True), model, state, images_of(1, 32, 32, 3))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    toy = TOYS[0]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, initial(toy))
    message = r"0 is of another model; 2 leaves differ:\n.*head.*bias: checkpoint float32\[5\], model float32\[7\]"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(0, like=initial(toy, num_classes=7))


def test_list_models_by_pattern():
    assert eqvision.list_models("resnet??") == ["resnet18", "resnet34", "resnet50"]
    assert eqvision.list_models("nothing*") == []


def test_create_gives_what_its_seed_says():
    build = functools.partial(create, "resnet20_cifar", num_classes=10)
    first, again, other = (build(key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, other)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first))
    assert math.prod(first[0].head.linear.weight.shape) == 640
