"""U-Net: the figure of the paper, the padded form for any size, mirrored tiles, and the messages about sizes."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqvision
from eqvision.backbones import UNetEncoder, legal_side, lost_pixels
from eqvision.counting import count
from eqvision.necks import UNetDecoder
from eqvision.segmenters import mirrored, unet
from eqvision.types import PaddedImages

KEY = jax.eval_shape(jax.random.key, 0)


def made(**options):
    return eqx.nn.make_with_state(functools.partial(unet, key=jax.random.key(0), **options))()


def abstract(**options):
    return eqx.filter_eval_shape(eqx.nn.make_with_state(unet), key=KEY, **options)


def images_of(height, width, channels=3, batch=1):
    return jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32)


def logits_of(model, state, images):
    return jax.eval_shape(lambda m, s, x: m(x, s)[0], model, state, images)


def convolutions(jaxpr):
    """Shapes (side, channels) that each convolution reads and writes, in order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield tuple((v.aval.shape[1], v.aval.shape[3]) for v in (eqn.invars[0], eqn.outvars[0]))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from convolutions(inner)


# Ronneberger et al. 2015, figure 1: each 3x3 convolution's input and output
DOWN = [
    [(572, 1), (570, 64), (568, 64)],
    [(284, 64), (282, 128), (280, 128)],
    [(140, 128), (138, 256), (136, 256)],
    [(68, 256), (66, 512), (64, 512)],
    [(32, 512), (30, 1024), (28, 1024)],
]
UP = [
    [(56, 1024), (54, 512), (52, 512)],
    [(104, 512), (102, 256), (100, 256)],
    [(200, 256), (198, 128), (196, 128)],
    [(392, 128), (390, 64), (388, 64)],
]


def test_every_map_has_the_shape_of_the_papers_figure():
    model, state = abstract(in_channels=1, norm="none", border="valid", mirror=False)
    jaxpr = jax.make_jaxpr(lambda m, s, x: m(x, s)[0])(model, state, images_of(572, 572, 1))
    assert list(convolutions(jaxpr.jaxpr)) == [pair for level in DOWN + UP for pair in itertools.pairwise(level)]
    assert jaxpr.out_avals[0].shape == (1, 388, 388, 2)
    assert model.backbone.channels == (64, 128, 256, 512, 1024)
    maps = jax.eval_shape(lambda m, s, x: m.backbone.intermediates(x, s, (0, -1)), model, state, images_of(572, 572, 1))
    assert [m.shape[1:] for m in maps] == [(568, 568, 64), (28, 28, 1024)]


def test_parameters_of_the_paper_by_its_figure():
    """Windows of 3x3, 2x2 and 1x1 with a bias each."""
    threes = sum((9 * i + 1) * o for level in DOWN + UP for (_, i), (_, o) in itertools.pairwise(level))
    twos = sum((4 * 2 * c + 1) * c for c in (512, 256, 128, 64))
    model, state = eqx.filter_eval_shape(eqvision.create, "unet_paper", num_classes=2, in_channels=1, key=KEY)
    params = count(model, images_of(100, 90, 1), state).params
    assert params == threes + twos + (64 + 1) * 2 == 31_030_658


@pytest.mark.parametrize(("up", "params"), [("transposed", 31_037_633), ("bilinear", 17_262_977)])
def test_parameters_of_the_padded_form(up, params):
    """milesial/Pytorch-UNet for RGB and one class."""
    model, state = abstract(num_classes=1, up=up)
    assert count(model, images_of(32, 32), state).params == params


def test_the_small_one_is_cheap():
    model, state = eqx.filter_eval_shape(eqvision.create, "unet_small", num_classes=11, key=KEY)
    counts = count(model, images_of(352, 480), state)
    assert counts.macs < 6.7e9
    assert logits_of(model, state, images_of(352, 480)).shape == (1, 352, 480, 11)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_padded_form_takes_any_size(norm, up):
    model, state = abstract(width=16, depth=3, norm=norm, up=up)
    for height, width in ((8, 8), (9, 15), (37, 22)):
        logits = logits_of(model, state, images_of(height, width))
        assert logits.shape == (1, height, width, 2)
        assert logits.dtype == jnp.float32


@pytest.mark.parametrize("poolings", [1, 2, 4])
def test_legal_sides_by_walking_through_the_network(poolings):
    def result(side):
        """What remains of a side, None where a pooling finds an odd one or nothing remains."""
        for _ in range(poolings):
            side -= 4
            if side % 2 or side < 1:
                return None
            side //= 2
        side -= 4
        for _ in range(poolings):
            side = 2 * side - 4
        return side if side > 0 else None

    results = ((side, result(side)) for side in range(1, 400))
    legal = {side: rest for side, rest in results if rest is not None}
    for side in range(1, max(legal)):
        assert legal_side(side, poolings) == min(s for s in legal if s >= side)
    assert {side - rest for side, rest in legal.items()} == {lost_pixels(poolings)}
    assert (legal_side(572, 4), lost_pixels(4)) == (572, 184)


def test_valid_convolutions_say_which_sizes_they_take(key):
    model, state = abstract(norm="none", border="valid", mirror=False, width=2)
    with pytest.raises(ValueError, match="images of 570x572 do not fit") as error:
        logits_of(model, state, images_of(570, 572))
    assert "188 + a multiple of 16" in str(error.value)
    assert "mirror them to 572x572" in str(error.value)
    assert "184 pixels smaller" in str(error.value)
    assert "mirror=True" in str(error.value)
    with pytest.raises(ValueError, match=r"images of 100x100 do not fit .* mirror them to 188x188"):
        logits_of(model, state, images_of(100, 100))
    assert logits_of(model, state, images_of(188, 204)).shape == (1, 4, 20, 2)


def test_padded_form_says_when_nothing_would_remain():
    model, state = abstract(width=2)
    with pytest.raises(ValueError, match=r"images of 40x15 are too small .* at least 16 pixels"):
        logits_of(model, state, images_of(40, 15))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, r"norm 'layer' is unknown; choose from \('none', 'batch', 'group'\)"),
        ({"border": "reflect"}, r"border 'reflect' is unknown; choose from \('same', 'valid'\)"),
        ({"up": "nearest"}, r"up 'nearest' is unknown; choose from \('transposed', 'bilinear'\)"),
        ({"depth": 0}, "at least two levels"),
        ({"mirror": True}, "mirror=True is for border='valid'"),
        ({"border": "valid", "stem_stride": 2}, "stem_stride must be 1, got 2"),
    ],
)
def test_options_that_are_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        abstract(width=2, **options)


def test_decoder_refuses_maps_of_another_encoder(key):
    decoder = UNetDecoder((2, 4), (1, 2), key=key)
    with pytest.raises(ValueError, match=r"built for maps of \(2, 4\) channels and got \(2, 5\)"):
        jax.eval_shape(lambda: decoder((jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 5))), eqx.nn.State(decoder)))


def test_mirrored_images_give_logits_for_each_pixel(rng, assert_close):
    """Those of the middle of an image that numpy reflects."""
    options = {"width": 2, "depth": 1, "norm": "none", "border": "valid", "in_channels": 1}
    model, state = made(**options)
    raw, _ = made(**options, mirror=False)
    images = rng.normal(size=(2, 7, 12, 1)).astype(np.float32)
    half = lost_pixels(1) // 2
    assert (half, mirrored(jnp.asarray(images), 1).shape) == (8, (2, 24, 28, 1))
    pads = ((0, 0), (half, 24 - 7 - half), (half, 28 - 12 - half), (0, 0))
    whole = raw(jnp.asarray(np.pad(images, pads, mode="reflect")), state)[0]
    assert_close(model(jnp.asarray(images), state)[0], whole[:, :7, :12], 1e-6)


def test_padded_images_and_bare_ones_are_the_same_to_it(rng):
    model, state = made(width=2, depth=1, dropout=0.5)
    images = jnp.asarray(rng.normal(size=(2, 5, 6, 3)), jnp.float32)
    padded = PaddedImages(images, jnp.asarray([[5, 6], [4, 4]]))
    np.testing.assert_array_equal(model(images, state)[0], model(padded, state)[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"up": "bilinear", "norm": "group"}, {"border": "valid", "norm": "none"}])
def test_gradients_reach_every_parameter(options, rng):
    model, state = made(width=16, depth=2, dropout=0.1, **options)
    images = jnp.asarray(rng.normal(size=(2, 19, 14, 3)), jnp.float32)

    @jax.jit
    def gradient(model, state):
        def loss(model):
            logits, new = model(images, state, train=True, key=jax.random.key(1))
            return jnp.mean(jnp.square(logits - 1)), new

        return jax.grad(loss, has_aux=True)(model)

    gradients, new = gradient(model, state)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf) != 0), path
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)]
    assert all(moved)


def test_encoder_alone_is_a_backbone():
    encoder = eqx.filter_eval_shape(UNetEncoder, (2, 4, 8), stem_stride=2, key=KEY)
    assert (encoder.strides, encoder.channels) == ((2, 4, 8), (2, 4, 8))


def test_a_new_head_for_other_classes(key):
    model, _ = abstract(width=2, num_classes=3)
    assert eqx.filter_eval_shape(model.head.reset, 5, key=key).conv.weight.shape == (1, 1, 2, 5)


def test_zoo_knows_segmenters():
    assert {"unet", "unet_paper", "unet_small"} <= set(eqvision.list_models(kind="segmenter"))
    with pytest.raises(ValueError, match=r"unet_smal.*unet_small"):
        eqvision.create("unet_smal", key=jax.random.key(0))
