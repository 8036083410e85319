"""CLIP and SigLIP: what their towers see, where texts end, sizes, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import TextSize, VisionTransformer, ViTSize, pool_end
from eqvision.multimodal import (
    CLIP_RESNET_SIZES,
    CLIP_VIT_SIZES,
    SIGLIP_SIZES,
    ClipResNetSize,
    ClipViTSize,
    SiglipSize,
    clip_logits,
    clip_resnet,
    clip_vit,
    siglip,
)
from eqvision.ops import unit_length
from eqvision.types import ClipOutputs, TextTokens

VOCAB, LENGTH = 30, 6
VISION, TEXT = ViTSize(16, 2, 2, 32), TextSize(8, 2, 2, 16)
KEY = jax.random.key(0)
TOKENS = TextTokens(
    jnp.array([[27, 4, 28, 0, 0, 0], [27, 5, 6, 7, 8, 28]]), jnp.array([[1, 1, 1, 0, 0, 0], [1] * 6], bool)
)
SMALL = {"vocab_size": VOCAB, "length": LENGTH, "key": KEY}
encode_text = eqx.filter_jit(lambda model, text: model.encode_text(text))


@pytest.fixture(scope="module")
def clip():
    return clip_vit(ClipViTSize(VISION, 4, 8, TEXT, 12), **SMALL)


@pytest.mark.parametrize("end_id", [None, 28])
def test_the_end_of_a_text(end_id):
    features = jnp.arange(4 * 6.0).reshape(4, 6, 1)
    ids = jnp.array([[27, 4, 28, 28, 28, 28], [27, 5, 6, 7, 8, 28], [28, 0, 0, 0, 0, 0], [1, 2, 28, 29, 30, 31]])
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1] * 6, [1] + [0] * 5, [1, 1, 1, 0, 0, 0]], bool)
    found = pool_end(features, TextTokens(ids, mask), end_id=end_id)
    assert found[:, 0].tolist() == [2, 11, 12, 20]


def test_a_text_without_an_end_gives_its_first_feature():
    text = TextTokens(jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool))
    assert pool_end(jnp.arange(3.0)[None, :, None], text, end_id=28).item() == 0


def test_padding_of_a_text_may_hold_anything(clip, assert_close):
    """Also ids that the vocabulary does not have; the length that a text is filled up to does not matter."""
    expected = encode_text(clip, TOKENS)
    junk = TOKENS._replace(ids=jnp.where(TOKENS.mask, TOKENS.ids, 99))
    assert_close(encode_text(clip, junk), expected, 0)
    short = jax.tree.map(lambda x: x[:1, :4], TOKENS)
    assert_close(encode_text(clip, short), expected[:1], 1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-6)


def test_a_causal_tower_sees_nothing_behind(clip, assert_close):
    run = eqx.filter_jit(lambda text: clip.text_tower(text))
    other = TOKENS._replace(ids=TOKENS.ids.at[:, 3:].set(9), mask=jnp.ones_like(TOKENS.mask))
    assert_close(run(other)[:, :3], run(TOKENS)[:, :3], 1e-6)


def test_ids_of_another_vocabulary_and_long_texts_show(clip):
    strange = encode_text(clip, TOKENS._replace(ids=TOKENS.ids.at[0, 1].set(VOCAB)))
    assert np.all(np.isnan(strange[0]))
    assert np.all(np.isfinite(strange[1]))
    long = TextTokens(jnp.ones((1, LENGTH + 1), int), jnp.ones((1, LENGTH + 1), bool))
    with pytest.raises(ValueError, match="sequence of 7 is longer than the 6 learned positions"):
        clip.encode_text(long)


def test_siglip_reads_the_last_place(assert_close):
    model = siglip(SiglipSize(VISION, 3, 8, TEXT), **SMALL)
    expected = encode_text(model, TOKENS)
    other = encode_text(model, TOKENS._replace(ids=TOKENS.ids.at[0, -1].set(9)))
    assert np.max(np.abs(other[0] - expected[0])) > 1e-3
    assert_close(encode_text(model, TOKENS._replace(mask=~TOKENS.mask)), expected, 0)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    state = eqx.nn.State(model)
    run = jax.jit(lambda model, images: model(images, TOKENS, state)[0])
    outputs = run(model, images)
    images[:, 6:], images[:, :, 6:] = np.nan, np.nan
    assert_close(run(model, images).image, outputs.image, 0)  # patches of 3 in 8 pixels
    assert outputs.image.shape == outputs.text.shape == (2, 16)
    assert_close(clip_logits(outputs), 10 * outputs.image @ outputs.text.T - 10, 1e-5)


RESNET = ClipResNetSize((1, 1, 1, 1), 8, 2, 32, TEXT, 12)


def test_the_maps_of_a_resnet():
    """Images of another size than the model was built for."""
    model, state = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(clip_resnet)(RESNET, **SMALL))
    assert model.image_tower.channels == (32, 64, 128, 256)
    images = jax.ShapeDtypeStruct((1, 32, 64, 3), jnp.float32)
    maps = eqx.filter_eval_shape(lambda model, *given: model.image_tower(*given)[0], model, images, state)
    assert [x.shape[1:3] for x in maps] == [(8 // 2**i, 16 // 2**i) for i in range(4)]
    vectors = eqx.filter_eval_shape(lambda model, *given: model.encode_images(*given)[0], model, images, state)
    assert vectors.shape == (1, 12)


@pytest.mark.slow
def test_training_of_a_resnet():
    """Statistics of batches, and gradients of all parts."""
    model, state = eqx.nn.make_with_state(clip_resnet)(RESNET, **SMALL)

    def loss(model, images, state):
        vectors, new = model.encode_images(images, state, train=True)
        return jnp.sum(vectors[:, 0]), new

    images = jax.random.normal(KEY, (2, 32, 32, 3))
    (_, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model, images, state)
    for leaf in jax.tree.leaves((grads.image_head.query.weight, grads.image_head.position, grads.image_tower.stem)):
        assert np.any(leaf != 0)
    assert not np.array_equal(new.get(model.image_tower.stem[0].norm.stats)[0], np.zeros(4))


def test_the_scale_is_held_at_its_limit_and_can_come_back(clip):
    high = eqx.tree_at(lambda m: m.logit_scale, clip, jnp.float32(7.0))
    value, grad = jax.value_and_grad(lambda m: m.scale())(high)
    np.testing.assert_allclose(value, 100, rtol=1e-5)
    np.testing.assert_allclose(grad.logit_scale, 100, rtol=1e-5)
    np.testing.assert_allclose(clip.scale(), 1 / 0.07, rtol=1e-5)


def test_half_precision_gives_float32_vectors(clip):
    images = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    outputs, _ = eqx.filter_eval_shape(lambda: clip(images, TOKENS, eqx.nn.State(clip)))
    assert outputs.image.dtype == outputs.text.dtype == jnp.float32
    assert eqx.filter_eval_shape(lambda: clip.text_tower(TOKENS, dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def test_unit_length_of_nothing():
    value, grad = jax.value_and_grad(lambda x: unit_length(x).sum())(jnp.zeros(3))
    assert value == 0
    assert np.all(np.isfinite(grad))


# Of OpenAI's and Google's files, without running statistics
PARAMETERS = {
    "b32": 151_277_313,
    "b16": 149_620_737,
    "l14": 427_616_513,
    "l14_336": 427_944_193,
    "50": 102_007_137,
    "101": 119_688_033,
    "50x4": 178_300_601,
    "50x16": 290_979_217,
    "50x64": 623_258_305,
    "siglip b16": 203_155_970,
    "siglip l16": 652_150_786,
    "siglip so400m14": 877_960_498,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    if name.startswith("siglip"):
        build, size = siglip, SIGLIP_SIZES[name.split()[1]]
    else:
        build = clip_vit if name in CLIP_VIT_SIZES else clip_resnet
        size = {**CLIP_VIT_SIZES, **CLIP_RESNET_SIZES}[name]
    model = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(build)(size, key=KEY)[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == PARAMETERS[name]


def test_options_of_the_tower_change_no_other_model():
    model = VisionTransformer(VISION, 4, image_size=8, key=KEY)
    assert model.pre_norm is None
    assert model.patch_embed.bias is not None
    with pytest.raises(ValueError, match="image_size 9x9 is not divisible by 4"):
        VisionTransformer(VISION, 4, image_size=9, key=KEY)
    with pytest.raises(ValueError, match="image_size 40x40 is not divisible by 32"):
        clip_resnet(ClipResNetSize((1, 1, 1, 1), 8, 2, 32, TEXT, 12), image_size=40, **SMALL)


def test_logits_have_the_scale():
    outputs = ClipOutputs(jnp.eye(2), jnp.ones((1, 2)), jnp.float32(3))
    assert clip_logits(outputs).tolist() == [[3], [3]]
