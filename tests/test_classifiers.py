"""Classifiers: equal to transformers with copied weights, and what pooling, positions and shortcuts do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision import Classifier, create, reset_head
from eqvision.backbones import VisionTransformer, ViTSize, resnet_cifar
from eqvision.backbones.resnet import ConvNorm, ResidualBlock, ResNet
from eqvision.classifiers import Neck
from eqvision.heads import AttentionPool, MapHead, TokenHead, zeros
from eqvision.layers import LayerNorm, Linear, resample_grid, sincos_2d
from eqvision.types import TokenFeatures

SIZE = ViTSize(width=32, depth=3, num_heads=4, mlp_dim=64)
KEY = jax.eval_shape(jax.random.key, 0)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def no_state():
    """The state of a model without statistics."""
    return eqx.nn.make_with_state(LayerNorm)(1)[1]


def make_vit(image_size=16, **options):
    return VisionTransformer(SIZE, 4, image_size=image_size, key=jax.random.key(0), **options)


@jax.jit
def run(module, inputs):
    """Outputs of a model, backbone or head without statistics."""
    return module(inputs, no_state())[0]


# Equal to transformers: each name of theirs is written out beside ours


def randomised(module):
    """Every parameter and running statistic away from its start; variances stay positive."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(start + 0.2 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def tensors_of(module):
    return {name: jnp.asarray(tensor.numpy()) for name, tensor in module.state_dict().items()}


def run_torch(module, images):
    """Logits and hidden states."""
    import torch

    first = np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, 1))
    with torch.no_grad():
        outputs = module(torch.from_numpy(first), output_hidden_states=True)
    return outputs.logits.numpy(), [hidden.numpy() for hidden in outputs.hidden_states]


def linear_from(tensors, name):
    weight, bias = tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]
    linear = eqx.filter_eval_shape(Linear, *weight.shape, key=KEY)
    return eqx.tree_at(lambda m: (m.weight, m.bias), linear, (weight, bias))


def norm_from(tensors, name, norm):
    return eqx.tree_at(lambda m: (m.weight, m.bias), norm, (tensors[f"{name}.weight"], tensors[f"{name}.bias"]))


def transformer_block_from(tensors, name, block):
    def parts(b):
        attention = b.attention
        return (
            b.norm1,
            b.norm2,
            attention.query,
            attention.key,
            attention.value,
            attention.out,
            b.mlp.fc1,
            b.mlp.fc2,
        )

    filled = (
        norm_from(tensors, f"{name}.layernorm_before", block.norm1),
        norm_from(tensors, f"{name}.layernorm_after", block.norm2),
        linear_from(tensors, f"{name}.attention.q_proj"),
        linear_from(tensors, f"{name}.attention.k_proj"),
        linear_from(tensors, f"{name}.attention.v_proj"),
        linear_from(tensors, f"{name}.attention.o_proj"),
        linear_from(tensors, f"{name}.mlp.fc1"),
        linear_from(tensors, f"{name}.mlp.fc2"),
    )
    return eqx.tree_at(parts, block, filled)


def vit_from(tensors, backbone):
    embeddings = "vit.embeddings"
    position = tensors[f"{embeddings}.position_embeddings"][0]
    one = jax.tree.map(lambda leaf: leaf[0], backbone.encoder.blocks)
    names = [f"vit.layers.{i}" for i in range(backbone.encoder.depth)]
    blocks = [transformer_block_from(tensors, name, one) for name in names]
    return eqx.tree_at(
        lambda m: (
            m.patch_embed.weight,
            m.patch_embed.bias,
            m.class_token,
            m.class_position,
            m.position.weight,
            m.encoder.blocks,
            m.norm,
        ),
        backbone,
        (
            tensors[f"{embeddings}.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
            tensors[f"{embeddings}.patch_embeddings.projection.bias"],
            tensors[f"{embeddings}.cls_token"][0, 0],
            position[0],
            position[1:].reshape(backbone.position.weight.shape),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
            norm_from(tensors, "vit.layernorm", backbone.norm),
        ),
    )


@pytest.mark.parity
def test_vit_equals_transformers(assert_close):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=(16, 24),
        patch_size=4,
        layer_norm_eps=1e-3,  # large enough to be seen
        num_labels=5,
    )
    reference = randomised(ViTForImageClassification(config))
    tensors, images = tensors_of(reference), draw(2, 16, 24, 3)
    backbone = vit_from(tensors, make_vit((16, 24), eps=1e-3))
    head = TokenHead(32, 5, key=jax.random.key(0))
    head = eqx.tree_at(lambda h: h.linear, head, linear_from(tensors, "classifier"))
    logits, hidden = run_torch(reference, images)
    assert_close(run(Classifier(backbone, None, head), images), logits, 1e-5)

    @jax.jit
    def blocks(backbone, images):
        features = backbone.intermediates(images, no_state(), (0, 1, 2), normalise=False)
        return [jnp.concatenate([f.prefix, f.patches.reshape(2, 24, 32)], axis=1) for f in features]

    # Theirs begin with the embeddings.
    assert_close(blocks(backbone, images)[:2], hidden[1:3], 1e-5)


def conv_norm_from(tensors, name, module, state):
    norm = f"{name}.normalization"
    weight = tensors[f"{name}.convolution.weight"].transpose(2, 3, 1, 0)
    filled = (weight, tensors[f"{norm}.weight"], tensors[f"{norm}.bias"])
    statistics = tensors[f"{norm}.running_mean"], tensors[f"{norm}.running_var"]
    state = state.set(module.norm.stats, statistics)
    return eqx.tree_at(lambda m: (m.conv.weight, m.norm.weight, m.norm.bias), module, filled), state


def residual_block_from(tensors, name, block, state):
    convs = []
    for i, conv in enumerate(block.convs):
        filled, state = conv_norm_from(tensors, f"{name}.layer.{i}", conv, state)
        convs.append(filled)
    block = eqx.tree_at(lambda b: b.convs, block, tuple(convs))
    if block.projection is not None:
        projection, state = conv_norm_from(tensors, f"{name}.shortcut", block.projection, state)
        block = eqx.tree_at(lambda b: b.projection, block, projection)
    return block, state


def resnet_from(tensors, backbone, state):
    stem, state = conv_norm_from(tensors, "resnet.embedder.embedder", backbone.stem, state)
    stages = []
    for i, stage in enumerate(backbone.stages):
        blocks = []
        for j, block in enumerate(stage):
            filled, state = residual_block_from(tensors, f"resnet.encoder.stages.{i}.layers.{j}", block, state)
            blocks.append(filled)
        stages.append(tuple(blocks))
    return eqx.tree_at(lambda m: (m.stem, m.stages), backbone, (stem, tuple(stages))), state


def toy_resnet(kernels, key):
    """Two stages of two blocks, 16 and 32 channels; bottlenecks for three kernels."""
    keys = iter(jax.random.split(key, 6))
    stages, channels = [], 8
    for stride, width in ((1, 16), (2, 32)):
        widths = (width // 4, width // 4, width) if len(kernels) == 3 else (width, width)
        strided = (1, stride, 1) if len(kernels) == 3 else (stride, 1)
        plain = (1,) * len(kernels)
        options = {"shortcut": "projection", "zero_scale": False}
        first = ResidualBlock(channels, widths, kernels, strided, key=next(keys), **options)
        second = ResidualBlock(width, widths, kernels, plain, key=next(keys), **options)
        stages.append((first, second))
        channels = width
    backbone = ResNet(ConvNorm(3, 8, 7, stride=2, key=next(keys)), tuple(stages), pool_stem=True, in_channels=3)
    return Classifier(backbone, None, MapHead(32, 5, key=next(keys)))


@pytest.mark.parity
@pytest.mark.parametrize(("layer_type", "kernels"), [("bottleneck", (1, 3, 1)), ("basic", (3, 3))])
def test_resnet_equals_transformers(layer_type, kernels, assert_close):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        layer_type=layer_type,
        downsample_in_bottleneck=False,
        num_labels=5,
    )
    reference = randomised(ResNetForImageClassification(config))
    # Odd sides show on which side a strided window is padded.
    tensors, images = tensors_of(reference), draw(2, 37, 46, 3)
    model, state = eqx.nn.make_with_state(toy_resnet)(kernels, jax.random.key(0))
    backbone, state = resnet_from(tensors, model.backbone, state)
    model = eqx.tree_at(lambda m: (m.backbone, m.head.linear), model, (backbone, linear_from(tensors, "classifier.1")))
    logits, hidden = run_torch(reference, images)
    maps, ours = jax.jit(lambda m, s, x: (m.backbone(x, s)[0], m(x, s)[0]))(model, state, images)
    assert_close(ours, logits, 1e-5)
    # Theirs begin with the stem, and are channels-first.
    assert_close(maps, tuple(np.moveaxis(map_, 1, -1) for map_ in hidden[1:]), 1e-5)


# Pooling of tokens


FEATURES = TokenFeatures(draw(2, 3, 32), draw(2, 4, 5, 32, seed=1))
TOKENS = np.concatenate([FEATURES.prefix, FEATURES.patches.reshape(2, 20, 32)], axis=1)


def make_head(pool, **options):
    map_pool = AttentionPool(32, 4, 48, key=jax.random.key(2)) if pool == "map" else None
    return TokenHead(32, 5, pool=pool, map_pool=map_pool, key=jax.random.key(1), **options)


def linear(layer, x):
    return np.asarray(x, np.float64) @ np.asarray(layer.weight, np.float64) + np.asarray(layer.bias, np.float64)


@pytest.mark.parametrize(
    ("pool", "pooled"),
    [("token", TOKENS[:, 0]), ("mean", TOKENS[:, 3:].mean(axis=1)), ("none", TOKENS)],
)
def test_pooling(pool, pooled, assert_close):
    head = make_head(pool)
    assert_close(run(head, FEATURES), linear(head.linear, pooled), 1e-5)


def pooled_by_attention(pool, tokens):
    """Attention pooling written out in numpy, 4 heads of 8 channels."""
    split = lambda x: x.reshape(*x.shape[:-1], 4, 8)  # noqa: E731
    query = split(linear(pool.attention.query, pool.probe))[0]
    keys, values = (split(linear(layer, tokens)) for layer in (pool.attention.key, pool.attention.value))
    logits = np.einsum("hd,bnhd->bhn", query, keys) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    mixed = linear(pool.attention.out, np.einsum("bhn,bnhd->bhd", weights, values).reshape(-1, 32))
    normed = (mixed - mixed.mean(-1, keepdims=True)) / np.sqrt(mixed.var(-1, keepdims=True) + 1e-6)
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(linear(pool.mlp.fc1, normed), jnp.float32), approximate=True))
    return mixed + linear(pool.mlp.fc2, hidden)


def test_pooling_by_attention_reads_all_tokens(assert_close):
    head = make_head("map")
    expected = linear(head.linear, pooled_by_attention(head.map_pool, TOKENS))
    assert_close(run(head, FEATURES), expected, 1e-5)


def test_pre_logits(assert_close):
    head = make_head("mean", pre_logits=16)
    hidden = np.tanh(linear(head.pre_logits, TOKENS[:, 3:].mean(axis=1)))
    assert head.linear.weight.shape == (16, 5)
    assert_close(run(head, FEATURES), linear(head.linear, hidden), 1e-5)


def test_mean_of_bfloat16_features_is_taken_in_float32(assert_close):
    head = make_head("mean")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FEATURES)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert_close(run(head, rounded), run(head, widened), 1e-6)


def test_map_head_is_the_mean_of_the_coarsest_map(assert_close):
    maps = draw(2, 8, 8, 16), draw(2, 4, 4, 32, seed=1)
    head = MapHead(32, 5, key=jax.random.key(0))
    assert_close(run(head, maps), linear(head.linear, np.mean(maps[1], axis=(1, 2))), 1e-5)


@pytest.mark.parametrize("pool", ["token", "mean", "map", "none"])
def test_reset_keeps_the_pooling_and_drops_the_pre_logits(pool):
    head = make_head(pool, pre_logits=16, init=zeros)
    fresh = head.reset(7, key=jax.random.key(5))
    assert fresh.pool == pool
    assert fresh.pre_logits is None
    assert fresh.linear.weight.shape == (32, 7)
    assert np.ptp(fresh.linear.weight) > 0
    assert fresh.map_pool is head.map_pool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "cls"}, r"pool 'cls' is unknown; choose from \('token', 'mean', 'token_mean', 'map', 'none'\)"),
        ({"pool": "map"}, r"pool='map' needs map_pool=AttentionPool\(...\), and no other pool takes it"),
    ],
)
def test_impossible_pooling(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        TokenHead(32, 5, key=jax.random.key(0), **options)


def test_attention_pool_for_another_pooling_is_refused():
    pool = AttentionPool(32, 4, 48, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no other pool takes it"):
        TokenHead(32, 5, pool="mean", map_pool=pool, key=jax.random.key(0))


def test_class_token_that_is_not_there():
    model = Classifier(make_vit(class_token=False), None, make_head("token"))
    message = "pool='token' reads the class token and the backbone has none; use pool='mean' or 'map'"
    with pytest.raises(ValueError, match=message):
        run(model, draw(1, 16, 16, 3))


# Tokens, registers and positions


def test_registers_follow_the_class_token_and_have_no_positions(assert_close):
    backbone = make_vit(num_registers=2)
    backbone = eqx.tree_at(lambda m: m.registers, backbone, draw(2, 32))
    swapped = eqx.tree_at(lambda m: m.registers, backbone, backbone.registers[::-1])
    features, other = (run(model, draw(2, 16, 16, 3)) for model in (backbone, swapped))
    assert features.prefix.shape == (2, 3, 32)
    assert_close(other.patches, features.patches, 1e-5)
    assert_close(other.prefix, features.prefix[:, jnp.array([0, 2, 1])], 1e-5)
    assert np.max(np.abs(features.prefix[:, 1] - features.prefix[:, 2])) > 0.1


def test_registers_change_the_patches():
    with_registers, without = make_vit(num_registers=2), make_vit()
    with_registers = eqx.tree_at(lambda m: m.registers, with_registers, draw(2, 32))
    patches = [run(model, draw(2, 16, 16, 3)).patches for model in (with_registers, without)]
    assert np.max(np.abs(patches[0] - patches[1])) > 1e-3


def test_position_of_the_class_token_may_be_folded_into_it(assert_close):
    """Positions are added after the class token joins (ViT) or before (big_vision)."""
    after, before = make_vit(), make_vit(position_on_class=False)
    after = eqx.tree_at(lambda m: m.class_position, after, draw(32))
    folded = eqx.tree_at(lambda m: m.class_token, before, after.class_token + after.class_position)
    assert before.class_position is None
    images = draw(2, 16, 16, 3)
    assert_close(run(folded, images), run(after, images), 1e-6)
    assert np.max(np.abs(run(before, images).prefix - run(after, images).prefix)) > 0.1


@pytest.mark.parametrize("size", [(24, 16), (8, 40), (16, 16)])
def test_learned_positions_are_resampled_for_other_images(size, assert_close):
    backbone, images = make_vit(), draw(2, *size, 3)
    backbone = eqx.tree_at(lambda m: m.position.weight, backbone, draw(4, 4, 32))
    grid = size[0] // 4, size[1] // 4
    table = resample_grid(backbone.position.weight, grid)
    native = eqx.tree_at(lambda m: m.position.weight, backbone, table)
    assert run(backbone, images).patches.shape == (2, *grid, 32)
    assert_close(run(backbone, images), run(native, images), 1e-6)


def test_fixed_positions_are_those_of_the_grid_at_hand(assert_close):
    fixed, learned = make_vit(position="sincos2d"), make_vit((24, 16))
    table = jnp.asarray(sincos_2d((6, 4), 32))
    learned = eqx.tree_at(lambda m: m.position.weight, learned, table)
    images = draw(2, 24, 16, 3)
    assert jax.tree.leaves(fixed.position) == []
    assert_close(run(fixed, images), run(learned, images), 1e-6)


def test_patches_at_other_places_give_other_features():
    """Without positions a transformer only permutes its output with its input."""
    images = draw(1, 16, 16, 3)
    swapped = jnp.concatenate([images[:, 8:], images[:, :8]], axis=1)
    features, other = (run(make_vit(), x).patches for x in (images, swapped))
    back = jnp.concatenate([other[:, 2:], other[:, :2]], axis=1)
    assert np.max(np.abs(features - back)) > 1e-3


@pytest.mark.slow
def test_scanned_and_unrolled_vit_are_equal(assert_close):
    images = draw(2, 16, 16, 3)

    @jax.jit
    def loss_and_gradients(model, images):
        loss, gradients = jax.value_and_grad(lambda m: jnp.sum(jnp.sin(m(images, no_state())[0].patches)))(model)
        # The bias of the keys has no gradient but rounding: softmax does not see a common shift.
        where = lambda m: m.encoder.blocks.attention.key.bias  # noqa: E731
        return loss, jax.tree.leaves(eqx.tree_at(where, gradients, replace_fn=jnp.zeros_like))

    scanned, unrolled = loss_and_gradients(make_vit(), images), loss_and_gradients(make_vit(unroll=3), images)
    assert_close(unrolled, scanned, 1e-5)


# The family's conventions


def abstract(name):
    return eqx.filter_eval_shape(create, name, key=KEY)[0]


@pytest.mark.parametrize(
    ("name", "activation", "class_position", "pool"),
    [
        ("vit_b16", "gelu", True, "token"),
        ("vit_b16_augreg", "gelu_tanh", True, "token"),
        ("vit_b16_in21k", "gelu_tanh", True, "token"),
        ("vit_b16_big_vision", "gelu_tanh", False, "map"),
        ("vit_s16_big_vision", "gelu_tanh", False, "mean"),
        ("vit_b16_reg4_mean", "gelu", False, "mean"),
    ],
)
def test_conventions_of_the_sources(name, activation, class_position, pool):
    model = abstract(name)
    assert model.backbone.encoder.blocks.mlp.activation == activation
    assert (model.backbone.class_position is not None) is class_position
    assert model.head.pool == pool
    assert (model.head.map_pool is not None) is (pool == "map")
    assert (model.head.pre_logits is not None) is (name in ("vit_b16_in21k", "vit_s16_big_vision"))
    if pool == "map":
        assert model.head.map_pool.mlp.activation == activation


def test_head_of_zeros_until_it_is_reset():
    model, _ = create("vit_ti16_augreg", image_size=32, num_classes=10, key=jax.random.key(0))
    assert not np.any(model.head.linear.weight)
    assert np.ptp(reset_head(model, 10, key=jax.random.key(1)).head.linear.weight) > 0


class Doubled(eqx.Module):
    """A neck that doubles the features."""

    def __call__(self, features, state, *, train=False, key=None):
        return jax.tree.map(lambda x: 2 * x, features), state


def test_neck_stands_between_backbone_and_head(assert_close):
    backbone, head, images = make_vit(), make_head("mean"), draw(2, 16, 16, 3)
    model = Classifier(backbone, Doubled(), head)
    assert isinstance(model.neck, Neck)
    doubled = jax.tree.map(lambda x: 2 * x, run(backbone, images))
    assert_close(run(model, images), run(head, doubled), 1e-6)


# Residual networks


def size_of(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize(
    ("depth", "millions", "digits"), [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1)]
)
def test_cifar_resnets_have_the_layers_and_parameters_of_the_paper(depth, millions, digits):
    """He et al. 2016, table 6."""
    model, _ = eqx.filter_eval_shape(create, f"resnet{depth}_cifar", num_classes=10, key=KEY)
    assert round(size_of(model) / 1e6, digits) == millions
    assert sum(leaf.ndim > 1 for leaf in jax.tree.leaves(model)) == depth


def test_cifar_resnet_of_another_depth_is_refused():
    with pytest.raises(ValueError, match=r"6n\+2 layers \(20, 32, 44, 56, 110\), got 21"):
        resnet_cifar(21, key=jax.random.key(0))


def residual_block(in_channels, width, stride, shortcut, zero_scale=True):
    """With ``zero_scale`` the block is its shortcut."""
    options = {"shortcut": shortcut, "zero_scale": zero_scale, "key": jax.random.key(0)}
    return eqx.nn.make_with_state(ResidualBlock)(in_channels, (width, width), (3, 3), (stride, 1), **options)


@jax.jit
def run_block(block, state, x):
    return block(x, state, train=False)[0]


@pytest.mark.parametrize(
    ("in_channels", "width", "stride", "before", "after"),
    [(4, 8, 2, 2, 2), (3, 6, 2, 1, 2), (4, 6, 1, 1, 1), (4, 4, 2, 0, 0)],
)
def test_option_a_subsamples_and_appends_zeros(in_channels, width, stride, before, after):
    block, state = residual_block(in_channels, width, stride, "pad")
    x = draw(2, 6, 5, in_channels)
    taken = np.maximum(x[:, ::stride, ::stride], 0)
    expected = np.pad(taken, ((0, 0), (0, 0), (0, 0), (before, after)))
    np.testing.assert_array_equal(run_block(block, state, x), expected)
    assert block.projection is None


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_shortcut_is_the_identity_where_nothing_changes(shortcut):
    block, state = residual_block(4, 4, 1, shortcut)
    x = draw(2, 6, 5, 4)
    np.testing.assert_array_equal(run_block(block, state, x), np.maximum(x, 0))
    assert block.projection is None


def test_option_b_projects(assert_close):
    block, state = residual_block(4, 8, 2, "projection")
    x = draw(2, 6, 5, 4)
    # Running statistics start at mean 0 and variance 1.
    projected = x[:, ::2, ::2] @ block.projection.conv.weight[0, 0] / np.sqrt(1 + 1e-5)
    assert_close(run_block(block, state, x), np.maximum(projected, 0), 1e-5)


@pytest.mark.parametrize(("depth", "last"), [(18, 1), (50, 2)])
def test_imagenet_resnets_start_as_their_shortcuts(depth, last):
    """And have the stride in the 3x3 convolution: version 1.5."""
    stages = abstract(f"resnet{depth}").backbone.stages
    strided = [[conv.conv.stride for conv in stage[0].convs].index(2) for stage in stages[1:]]
    assert {stages[i + 1][0].convs[at].conv.weight.shape[0] for i, at in enumerate(strided)} == {3}
    block, _ = residual_block(4, 4, 1, "projection")
    assert [bool(np.any(conv.norm.weight)) for conv in block.convs] == [True, False]
    assert len(stages[0][0].convs) == last + 1


def test_training_moves_the_statistics_and_inference_reads_them(assert_close):
    model, state = eqx.nn.make_with_state(toy_resnet)((3, 3), jax.random.key(0))
    images = 3 + draw(4, 32, 32, 3)
    train = jax.jit(lambda m, s, x: m(x, s, train=True))
    predict = jax.jit(lambda m, s, x: m(x, s)[0])
    trained = train(model, state, images)[0]
    for _ in range(150):
        state = train(model, state, images)[1]
    # Running variances are unbiased: at the coarsest map 4 * 4 * 4 values stand for the batch's own 64.
    assert_close(predict(model, state, images), trained, 0.05)
