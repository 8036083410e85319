"""What ViT's dialects need beyond the plain model: DeiT's second token and head, DINOv2's MLP and pooling, timm's."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import SIZES, VisionTransformer, ViTSize
from eqvision.classifiers import vit_classifier
from eqvision.heads import DistilledHead, TokenHead
from eqvision.layers import GatedMLP, LayerNorm, TransformerBlock
from eqvision.types import TokenFeatures

SIZE = ViTSize(width=32, depth=2, num_heads=4, mlp_dim=48)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", SIZE)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(**options):
    build = eqx.nn.make_with_state(vit_classifier)
    return build("toy", 4, num_classes=5, image_size=8, in_channels=3, key=KEY, **options)


FEATURES = TokenFeatures(draw(2, 3, 32), draw(2, 4, 5, 32, seed=1))
MEAN = np.asarray(FEATURES.patches).mean(axis=(1, 2))
STATE = eqx.nn.make_with_state(lambda: 0)()[1]


def test_class_token_and_mean_in_this_order(assert_close):
    head = TokenHead(32, 5, pool="token_mean", key=KEY)
    assert head.linear.weight.shape == (64, 5)
    assert_close(head.pooled(FEATURES), np.concatenate([FEATURES.prefix[:, 0], MEAN], axis=1), 1e-6)
    assert head.reset(7, key=KEY).linear.weight.shape == (64, 7)


def test_class_token_and_mean_without_a_class_token():
    head = TokenHead(32, 5, pool="token_mean", key=KEY)
    with pytest.raises(ValueError, match="pool='token_mean' reads the class token and the backbone has none"):
        head.pooled(FEATURES._replace(prefix=draw(2, 0, 32)))


def test_norm_behind_the_pooling(assert_close):
    norm = LayerNorm(32, eps=1e-3)
    head = TokenHead(32, 5, pool="mean", norm=norm, key=KEY)
    expected = (MEAN - MEAN.mean(-1, keepdims=True)) / np.sqrt(MEAN.var(-1, keepdims=True) + 1e-3)
    assert_close(head.pooled(FEATURES), expected, 1e-5)
    assert head.reset(7, key=KEY).norm is norm


@pytest.mark.parametrize("train", [False, True])
def test_logits_of_two_tokens_are_averaged(train, assert_close):
    head = DistilledHead(32, 5, key=KEY)
    one, two = (layer(FEATURES.prefix[:, i]) for i, layer in enumerate((head.linear, head.linear_distilled)))
    assert_close(head(FEATURES, STATE, train=train)[0], (one + two) / 2, 1e-6)
    assert_close(head.pooled(FEATURES), (FEATURES.prefix[:, 0] + FEATURES.prefix[:, 1]) / 2, 1e-6)
    fresh = head.reset(7, key=KEY)
    assert fresh.linear.weight.shape == fresh.linear_distilled.weight.shape == (32, 7)


def test_one_token_for_two_heads():
    message = r"reads a class token and a distillation token, and the backbone gives 1 prefix tokens"
    with pytest.raises(ValueError, match=message):
        DistilledHead(32, 5, key=KEY)(FEATURES._replace(prefix=draw(2, 1, 32)), STATE)


def test_prefix_is_class_token_distillation_token_registers(assert_close):
    options = {"image_size": 8, "distillation_token": True, "num_registers": 2, "key": KEY}
    model = VisionTransformer(SIZE, 4, **options)
    tokens, grid = model._embed(draw(1, 8, 8, 3))
    first, second = model.class_token + model.class_position, model.distillation_token + model.distillation_position
    assert grid == (2, 2)
    assert_close(tokens[0, :4], jnp.stack([first, second, *model.registers]), 1e-6)
    without = VisionTransformer(SIZE, 4, position_on_class=False, **options)
    assert without.class_position is None
    assert without.distillation_position is None


@pytest.mark.parametrize("given", [{"pool": "mean"}, {"pre_logits": 8}, {"norm_after_pool": True}])
def test_distillation_with_another_head(given):
    with pytest.raises(ValueError, match="distillation_token=True has its own head: pool='token', no pre_logits"):
        made(distillation_token=True, **given)


def test_norm_is_in_one_place():
    before, _ = made(pool="mean")
    behind, _ = made(pool="mean", norm_after_pool=True)
    assert before.backbone.norm is not None
    assert before.head.norm is None
    assert behind.backbone.norm is None
    assert behind.head.norm is not None


def test_intermediates_without_a_final_norm(assert_close):
    model, state = made(pool="mean", norm_after_pool=True)
    images = draw(1, 8, 8, 3)
    assert_close(
        model.backbone.intermediates(images, state, (0, 1)),
        model.backbone.intermediates(images, state, (0, 1), normalise=False),
        0,
    )


def test_a_class_token_that_the_head_does_not_read():
    model, _ = made(pool="mean", class_token=True)
    assert model.backbone.class_token.shape == (32,)
    assert made(pool="mean")[0].backbone.class_token is None
    assert made(pool="token_mean")[0].backbone.class_token is not None


def test_no_bias_on_queries_keys_and_values_alone():
    attention = made(use_qkv_bias=False)[0].backbone.encoder.blocks.attention
    assert [layer.bias is None for layer in (attention.query, attention.key, attention.value, attention.out)] == [
        True,
        True,
        True,
        False,
    ]


def test_gated_mlp_has_silu_whatever_the_activation_is():
    mlp = made(mlp="swiglu", activation="gelu_tanh")[0].backbone.encoder.blocks.mlp
    assert isinstance(mlp, GatedMLP)
    assert mlp.activation == "silu"
    assert mlp.gate.weight.shape == (2, 32, 48)


def test_unknown_mlp(unchecked):
    with pytest.raises(ValueError, match=r"mlp 'glu' is unknown; choose from \('plain', 'swiglu'\)"):
        TransformerBlock(32, 4, 48, mlp="glu", key=KEY)


def test_eps_is_that_of_all_norms():
    model, _ = made(eps=1e-3, pool="map")
    blocks, pool = model.backbone.encoder.blocks, model.head.map_pool
    assert {norm.eps for norm in (blocks.norm1, blocks.norm2, model.backbone.norm, pool.norm)} == {1e-3}
    assert made(eps=1e-3, pool="mean", norm_after_pool=True)[0].head.norm.eps == 1e-3
