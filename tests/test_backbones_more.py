"""Mixer, BiT, hybrid ViT, Axial-ResNet and the small backbones: counts, shapes, properties, parity."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from eqvision.backbones.axial_resnet import AxialAttention, AxialBlock, AxialResNet, axial_resnet
from eqvision.backbones.bit import BiT, PreActivationBlock, Stage, bit
from eqvision.backbones.hybrid import HybridStem, HybridViT, hybrid_vit
from eqvision.backbones.mixer import Mixer, MixerBlock, MixerSize, mixer
from eqvision.backbones.small import MLPBackbone, SmallCNN, mlp, small_cnn
from eqvision.backbones.vit import VisionTransformer, ViTSize
from eqvision.heads import MapHead, TokenHead
from eqvision.layers import MissingKeyError
from eqvision.types import TokenFeatures

KEY = jax.random.key(0)
TINY_MIXER = MixerSize(width=24, depth=3, token_dim=20, channel_dim=40)
TINY_VIT = ViTSize(width=24, depth=2, num_heads=2, mlp_dim=32)


def tiny_mixer(**options):
    return Mixer(TINY_MIXER, 8, image_size=(16, 32), key=KEY, **options)


def tiny_bit(**options):
    return BiT((1, 2), 8, num_groups=4, key=KEY, **options)


def tiny_hybrid(**options):
    stem = HybridStem((1, 2), 8, num_groups=4, key=KEY, **options)
    vit = VisionTransformer(
        TINY_VIT,
        1,
        image_size=(2, 4),
        in_channels=64,
        activation="gelu_tanh",
        key=KEY,
    )
    return HybridViT(stem, vit)


def tiny_axial(**options):
    return AxialResNet((1, 2), 8, image_size=(16, 32), num_heads=2, num_groups=4, key=KEY, **options)


TINY = {
    "mixer": tiny_mixer,
    "bit": tiny_bit,
    "hybrid": tiny_hybrid,
    "axial": tiny_axial,
    "small_cnn": lambda: SmallCNN((1, 2), 8, key=KEY),
    "mlp": lambda: MLPBackbone((24, 16), image_size=(16, 32), key=KEY),
}


@functools.cache
def build(name, **options):
    """One compiled initialisation for each model; drawing parameters op by op takes ten times as long."""
    return eqx.filter_jit(eqx.nn.make_with_state(functools.partial(TINY[name], **options)))()


@jax.jit
def run(model, state, images):
    return model(images, state)


@jax.jit
def run_in_training(model, state, images, key):
    return model(images, state, train=True, key=key)


# Run once: compiling it well takes twice as long and gains nothing.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def gradients(model, state, images):
    def loss(model):
        return jnp.mean(jnp.sin(flat(model(images, state, train=True, key=KEY)[0])))

    return jax.grad(loss)(model)


def wake(model):
    """Random norms instead of ones and zeros, so that no branch is silent."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def images_of(height=16, width=32, channels=3, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, height, width, channels))


def flat(features):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(features)])


# Parameters with a head of 1000 classes: big_transfer and timm (BiT), timm (mixer, hybrid).
PUBLISHED = [
    (bit, (50, 1), {}, 25.55),
    (bit, (50, 3), {}, 217.32),
    (bit, (101, 1), {}, 44.54),
    (bit, (101, 3), {}, 387.93),
    (bit, (152, 2), {}, 236.34),
    (bit, (152, 4), {}, 936.53),
    (mixer, ("s", 16), {}, 18.53),
    (mixer, ("s", 32), {}, 19.10),
    (mixer, ("b", 16), {}, 59.88),
    (mixer, ("b", 32), {}, 60.29),
    (mixer, ("l", 16), {}, 208.20),
    (mixer, ("h", 14), {}, 432.35),
    (hybrid_vit, ("r_ti16",), {}, 6.34),
    (hybrid_vit, ("r26_s32",), {}, 36.43),
    (hybrid_vit, ("r50_b16",), {"image_size": 384}, 98.95),
    (hybrid_vit, ("r50_l32",), {}, 328.99),
]


@pytest.mark.parametrize(("function", "arguments", "options", "millions"), PUBLISHED)
def test_published_parameter_counts(function, arguments, options, millions):
    head = MapHead if function is bit else TokenHead

    def whole(key):
        backbone = function(*arguments, key=key, **options)
        return backbone, head(backbone.channels[-1], 1000, key=key)

    shapes = eqx.filter_eval_shape(whole, KEY)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 2) == millions


def test_axial_resnet_count_from_its_formula():
    def attention(c, length):
        return 2 * c * c + (2 * length - 1) * 2 * (c // 8) + 2 * 2 * c + 2 * c

    def block(c_in, c, length, project):
        bottleneck = c_in * c + 2 * c + 2 * attention(c, length) + 4 * c * c + 2 * 4 * c
        return bottleneck + (c_in * 4 * c + 2 * 4 * c if project else 0)

    expected, c_in = 7 * 7 * 3 * 64 + 2 * 64, 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        c, length = 64 * 2**stage, 56 // 2**stage
        expected += block(c_in, c, length * (2 if stage else 1), True) + (depth - 1) * block(4 * c, c, length, False)
        c_in = 4 * c
    shapes = eqx.filter_eval_shape(lambda key: axial_resnet(50, key=key), KEY)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


FOUR_MAPS = [(2, 56, 56, 256), (2, 28, 28, 512), (2, 14, 14, 1024), (2, 7, 7, 2048)]
SHAPES = [
    (functools.partial(bit, 50), 224, 3, FOUR_MAPS),
    (
        functools.partial(bit, 50, 3),
        32,
        1,
        [(2, 8, 8, 768), (2, 4, 4, 1536), (2, 2, 2, 3072), (2, 1, 1, 6144)],
    ),
    (functools.partial(axial_resnet, 50), 224, 3, FOUR_MAPS),
    (functools.partial(mixer, "b", 16), 224, 3, [(2, 0, 768), (2, 14, 14, 768)]),
    (functools.partial(hybrid_vit, "r50_b16"), 224, 3, [(2, 1, 768), (2, 14, 14, 768)]),
    (functools.partial(hybrid_vit, "r26_s32"), 256, 3, [(2, 1, 384), (2, 8, 8, 384)]),
    (functools.partial(hybrid_vit, "r_ti16"), 224, 4, [(2, 1, 192), (2, 7, 7, 192)]),
    (small_cnn, 8, 1, [(2, 8, 8, 32), (2, 4, 4, 64), (2, 2, 2, 128)]),
    (functools.partial(mlp, image_size=28), 28, 1, [(2, 1, 1, 256)]),
]


@pytest.mark.parametrize(("function", "size", "channels", "expected"), SHAPES)
def test_abstract_shapes(function, size, channels, expected):
    def whole(key, images):
        model, state = eqx.nn.make_with_state(function)(in_channels=channels, key=key)
        return model(images, state)[0]

    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    features = eqx.filter_eval_shape(whole, KEY, images)
    assert [leaf.shape for leaf in jax.tree.leaves(features)] == expected
    maps = features[1:] if isinstance(features, TokenFeatures) else features
    model = eqx.filter_eval_shape(lambda key: function(in_channels=channels, key=key), KEY)
    assert tuple(m.shape[-1] for m in maps) == model.channels
    assert tuple(size // m.shape[1] for m in maps) == model.strides


SLOW = ("axial", "bit", "mixer")  # to compile


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TINY]
)
def test_all_leaves_are_arrays_and_gradients_are_finite(name):
    model, state = build(name)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((model, state)))

    found = gradients(wake(model), state, images_of())
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    for leaf_name, leaf in zip(names, jax.tree.leaves(found), strict=True):
        assert jnp.all(jnp.isfinite(leaf)), leaf_name
        if not re.search(r"\.key\.bias|positions", leaf_name):  # keys' bias has no effect on a softmax
            assert jnp.any(leaf != 0), leaf_name


@pytest.mark.parametrize("name", TINY)
def test_intermediates_end_with_the_output(name, assert_close):
    model, state = build(name)

    @jax.jit
    def both(model, state, images):
        return model.intermediates(images, state, (-1,))[0], model(images, state)

    last, (features, after) = both(model, state, images_of())
    expected = features if name in ("mixer", "hybrid") else features[-1]
    assert_close(last, expected, 1e-5)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, after))
    with pytest.raises(ValueError, match=r"layer 9 does not exist, the backbone has layers 0\.\."):
        jax.eval_shape(lambda model, state: model.intermediates(images_of(), state, (9,)), model, state)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_stays_bfloat16(name):
    model, state = build(name)
    images = jax.ShapeDtypeStruct((2, 16, 32, 3), jnp.bfloat16)
    features, _ = jax.eval_shape(lambda model, state, images: model(images, state), model, state, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype(jnp.bfloat16)}


def unstacked(stacked, depth):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)]


def stage_of(kind, **options):
    if kind == "axial":
        block = functools.partial(AxialBlock, 16, 4, (4, 2), num_heads=1, num_groups=2)
    else:
        block = functools.partial(PreActivationBlock, 16, 4, num_groups=2)
    return wake(eqx.filter_jit(lambda: Stage(block(key=KEY), lambda key: block(key=key), 4, key=KEY, **options))())


@jax.jit
def stage_gradients(stage, x):
    return jax.value_and_grad(lambda stage: jnp.sum(jnp.sin(stage(x, train=True))))(stage)


@pytest.mark.parametrize("unroll", [pytest.param(1, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", ["bit", "axial"])
def test_stage_scan_equals_loop(kind, unroll, assert_close):
    stage, x = stage_of(kind, unroll=unroll), jax.random.normal(KEY, (2, 4, 2, 16))

    @jax.jit
    def loop(stage, x):
        for block in [stage.first, *unstacked(stage.rest, 3)]:
            x = block(x)
        return x

    assert_close(jax.jit(lambda stage, x: stage(x))(stage, x), loop(stage, x), 3e-6)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
@pytest.mark.parametrize("kind", ["bit", "axial"])
def test_stage_remat_changes_no_gradient(kind, remat, assert_close):
    x = jax.random.normal(KEY, (2, 4, 2, 16))
    value, plain = stage_gradients(stage_of(kind, unroll=1), x)
    value_remade, remade = stage_gradients(stage_of(kind, unroll=1, remat=remat), x)
    assert_close((value_remade, jax.tree.leaves(remade)), (value, jax.tree.leaves(plain)), 1e-5)


def test_mixer_scan_equals_loop(assert_close):
    model, state = build("mixer", drop_path=0.5)
    model = wake(model)

    @jax.jit
    def loop(model, images):
        x = model.patch_embed(images).reshape(2, 8, 24)
        for i, block in enumerate(unstacked(model.blocks, 3)):
            x = block(x, drop_path_rate=(0.0, 0.25, 0.5)[i], train=True, key=jax.random.fold_in(KEY, i))
        return model.norm(x)

    features, _ = run_in_training(model, state, images_of(), KEY)
    assert_close(features.patches.reshape(2, 8, 24), loop(model, images_of()), 3e-6)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_mixer_remat_changes_no_gradient(remat, assert_close):
    plain, state = build("mixer")
    remade, _ = build("mixer", remat=remat)
    expected = flat(gradients(wake(plain), state, images_of()))
    assert_close(flat(gradients(wake(remade), state, images_of())), expected, 1e-5)


def test_mixer_drop_path_is_random_only_in_training():
    model, state = build("mixer", drop_path=0.9)
    model = wake(model)
    with pytest.raises(MissingKeyError, match="pass key="):
        model(images_of(), state, train=True)
    first = run_in_training(model, state, images_of(), jax.random.key(1))[0].patches
    second = run_in_training(model, state, images_of(), jax.random.key(2))[0].patches
    assert not jnp.array_equal(first, second)
    with_key = jax.jit(lambda model, state, images: model(images, state, key=KEY))(model, state, images_of())[0]
    assert jnp.array_equal(run(model, state, images_of())[0].patches, with_key.patches)


@pytest.mark.parametrize(
    ("name", "size"), [("bit", (20, 28)), ("hybrid", (32, 24)), ("axial", (32, 24)), ("small_cnn", (9, 7))]
)
def test_other_image_sizes_are_legal(name, size):
    model, state = build(name)
    features, _ = run(model, state, images_of(*size))
    maps = jax.tree.leaves(features)[-len(model.strides) :]
    for one, stride in zip(maps, model.strides, strict=True):
        assert one.shape[1:3] == (-(-size[0] // stride), -(-size[1] // stride))
        assert jnp.all(jnp.isfinite(one))


def test_axial_attention_is_equation_4(assert_close):
    layer = wake(AxialAttention(16, 1, 5, num_heads=2, num_groups=4, key=KEY))
    x = jax.random.normal(KEY, (2, 5, 3, 16))
    eight = np.asarray(layer.qkv_norm(layer.qkv(x.swapaxes(1, 2).reshape(6, 5, 16)))).reshape(6, 5, 2, 16)
    table, mixed = np.asarray(layer.positions), np.zeros((6, 5, 2, 8))
    for line, head, o in np.ndindex(6, 2, 5):
        rows, relative = eight[line, :, head], np.stack([table[p - o + 4] for p in range(5)])
        query, keys, values = rows[o, :4], rows[:, 4:8], rows[:, 8:]
        logits = keys @ query + relative[:, 4:8] @ query + np.sum(keys * relative[:, :4], axis=1)
        weights = np.exp(logits - logits.max())
        mixed[line, o, head] = weights / weights.sum() @ (values + relative[:, 8:])
    expected = layer.out_norm(jnp.asarray(mixed.reshape(6, 5, 16), jnp.float32)).reshape(2, 3, 5, 16).swapaxes(1, 2)
    assert_close(layer(x), expected, 1e-5)


def test_axial_attention_is_equivariant_along_the_other_axis(assert_close):
    layer = wake(AxialAttention(16, 2, 6, num_heads=2, num_groups=4, key=KEY))
    x = jax.random.normal(KEY, (1, 4, 6, 16))
    assert_close(layer(x[:, ::-1]), layer(x)[:, ::-1], 1e-5)
    assert not np.allclose(layer(x[:, :, ::-1]), layer(x)[:, :, ::-1], atol=1e-2)


def largest_array(jaxpr):
    sizes = [math.prod(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars]
    inner = [largest_array(sub) for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return max(sizes + inner)


def test_axial_attention_memory_grows_with_the_third_power_of_the_side():
    def largest(side):
        layer = AxialAttention(16, 1, side, num_heads=2, num_groups=4, key=KEY)
        x = jnp.zeros((1, side, side, 16))
        return largest_array(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(layer(x))))(x).jaxpr)

    assert largest(64) == 2 * 64**3  # heads * columns * rows * rows
    assert largest(128) == 8 * largest(64)


def test_small_cnn_updates_statistics_only_in_training():
    model, state = build("small_cnn")
    _, trained = run_in_training(model, state, images_of(), KEY)
    moved = [not jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(trained), strict=True)]
    assert all(moved)


ERRORS = [
    (lambda: mixer("x", 16, key=KEY), "mixer size 'x' does not exist; choose from s, b, l, h"),
    (
        lambda: mixer("s", 16, image_size=225, key=KEY),
        "225x225 is not divisible by 16.*224x224",
    ),
    (lambda: tiny_mixer(remat="all"), "remat 'all' is unknown; choose from"),
    (lambda: tiny_bit(remat="all"), "remat 'all' is unknown; choose from"),
    (lambda: bit(18, key=KEY), "BiT of depth 18 does not exist; choose from 50, 101, 152"),
    (lambda: hybrid_vit("r50", key=KEY), "hybrid ViT 'r50' does not exist; choose from r_ti16, .*r50_b16"),
    (lambda: hybrid_vit("r50_l32", image_size=240, key=KEY), "240x240 is not divisible by 32.*256x256"),
    (
        lambda: HybridViT(HybridStem((), 32, key=KEY), VisionTransformer(TINY_VIT, 1, image_size=4, key=KEY)),
        "stem gives maps of 32 channels and .* in_channels=3; build it with in_channels=32",
    ),
    (lambda: axial_resnet(18, key=KEY), "depth 18 does not exist; choose from 26, 50, 101, 152"),
    (lambda: axial_resnet(26, image_size=(224, 100), key=KEY), "224x100 is not divisible by 32.*224x96"),
    (lambda: AxialAttention(12, 1, 4, num_heads=4, key=KEY), "12 channels cannot be split into 4 heads"),
    (lambda: MLPBackbone((), image_size=8, key=KEY), "widths is empty; give the width of at least one"),
]


@pytest.mark.parametrize(("build_wrong", "message"), ERRORS)
def test_construction_errors(build_wrong, message, unchecked):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: (build_wrong(), None)[1])


INPUT_ERRORS = [
    ("mixer", (2, 32, 32, 3), r"built for images of 16x32 and got 32x32.*image_size=\(32, 32\)"),
    ("mlp", (2, 8, 8, 3), r"built for images of 16x32 and got 8x8.*image_size=\(8, 8\)"),
    ("hybrid", (2, 16, 20, 3), "16x20 cannot be cut into steps of 8x8 pixels.*16x16"),
    ("axial", (2, 16, 36, 3), "16x36 cannot be cut into steps of 8x8 pixels.*16x32"),
    *[(name, (2, 16, 32, 1), "have 1 channels and the model was built with in_channels=3") for name in TINY],
    *[(name, (2, 3, 16, 32), "look channels-first") for name in TINY],
]


@pytest.mark.parametrize(("name", "shape", "message"), INPUT_ERRORS)
def test_input_errors(name, shape, message, unchecked):
    model, state = build(name)
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(shape), state)
    with pytest.raises(ValueError, match=message):
        model.intermediates(jnp.zeros(shape), state, (0,))


# Parity: the reference has random weights, which are copied by name.


def to_jax(tensor):
    array = tensor.detach().numpy()
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)


def randomised(torch_model):
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
    return torch_model.eval()


def fill(model, lookup):
    """``model`` with every leaf replaced by ``lookup(its path)``."""

    def leaf(path, old):
        new = lookup(jax.tree_util.keystr(path))
        assert new.shape == old.shape, path
        return new

    return jax.tree_util.tree_map_with_path(leaf, model)


def bit_lookup(weights, depths, used):
    """Names of this library's stems and stages in those of transformers; stacked blocks are stacked."""
    rules = [
        (r"^\.(stem|root\.conv)\.", "embedder.convolution."),
        (r"^\.root\.norm\.", "embedder.norm."),
        (r"^\.norm\.", "norm."),
        (r"^\.stages\[(\d+)\]\.first\.", r"encoder.stages.\1.layers.0."),
        (r"^\.stages\[(\d+)\]\.rest\.", r"encoder.stages.\1.layers.*."),
        (r"conv(\d)\.conv\.", r"conv\1."),
        (r"conv(\d)\.norm\.", r"norm\1."),
        (r"projection\.(conv|norm)\.", r"downsample.\1."),
        (r"projection\.", r"downsample.conv."),
    ]

    def lookup(path):
        for pattern, replacement in rules:
            path = re.sub(pattern, replacement, path)
        if "*" not in path:
            used.add(path)
            return to_jax(weights[path])
        names = [path.replace("*", str(i)) for i in range(1, depths[int(path.split(".")[2])])]
        used.update(names)
        return jnp.stack([to_jax(weights[name]) for name in names])

    return lookup


@pytest.mark.parity
@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
def test_bit_equals_transformers(size, assert_close):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    depths = (2, 3, 1)
    config = transformers.BitConfig(embedding_size=16, hidden_sizes=[64, 128, 256], depths=list(depths), num_groups=4)
    reference = randomised(transformers.BitModel(config))
    weights, used = reference.state_dict(), set()
    model, state = eqx.nn.make_with_state(BiT)(depths, 16, num_groups=4, conv_eps=1e-8, key=KEY)
    model = fill(model, bit_lookup(weights, depths, used))
    assert used == set(weights)
    images = images_of(*size)
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2), output_hidden_states=True)
    features, _ = run(model, state, images)
    assert_close(features[-1], expected.last_hidden_state.permute(0, 2, 3, 1).numpy(), 1e-5)
    for ours, theirs in zip(features[:-1], expected.hidden_states[1:-1], strict=True):
        assert_close(ours, theirs.permute(0, 2, 3, 1).numpy(), 1e-5)


def vit_lookup(weights, used):
    names = {
        ".patch_embed.": "embeddings.patch_embeddings.projection.",
        ".encoder.blocks.norm1.": "layers.*.layernorm_before.",
        ".encoder.blocks.norm2.": "layers.*.layernorm_after.",
        ".encoder.blocks.attention.query.": "layers.*.attention.q_proj.",
        ".encoder.blocks.attention.key.": "layers.*.attention.k_proj.",
        ".encoder.blocks.attention.value.": "layers.*.attention.v_proj.",
        ".encoder.blocks.attention.out.": "layers.*.attention.o_proj.",
        ".encoder.blocks.mlp.": "layers.*.mlp.",
        ".norm.": "layernorm.",
    }

    def lookup(path):
        if path == ".class_token":
            used.add("embeddings.cls_token")
            return jnp.asarray(weights["embeddings.cls_token"][0, 0].numpy())
        if path in (".class_position", ".position.weight"):
            used.add("embeddings.position_embeddings")
            table = jnp.asarray(weights["embeddings.position_embeddings"][0].numpy())
            return table[0] if path == ".class_position" else table[1:].reshape(4, 4, -1)
        prefix = next(prefix for prefix in names if path.startswith(prefix))
        name = path.replace(prefix, names[prefix])
        every = [name.replace("*", str(i)) for i in range(TINY_VIT.depth)] if "*" in name else [name]
        used.update(every)
        found = [to_jax(weights[one]) for one in every]
        return jnp.stack(found) if "*" in name else found[0]

    return lookup


@pytest.mark.parity
def test_hybrid_equals_transformers(assert_close):
    """transformers 5 has no ViTHybrid; its two parts are still there: BiT with post-activation, and ViT."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    depths = (2, 3)
    stem_config = transformers.BitConfig(
        embedding_size=16,
        hidden_sizes=[64, 128],
        depths=list(depths),
        num_groups=4,
        layer_type="bottleneck",
        global_padding="SAME",
        embedding_dynamic_padding=True,
    )
    vit_config = transformers.ViTConfig(
        hidden_size=TINY_VIT.width,
        num_hidden_layers=TINY_VIT.depth,
        num_attention_heads=TINY_VIT.num_heads,
        intermediate_size=TINY_VIT.mlp_dim,
        image_size=4,
        patch_size=1,
        num_channels=128,
        layer_norm_eps=1e-6,
    )
    reference_stem = randomised(transformers.BitModel(stem_config))
    reference_vit = randomised(transformers.ViTModel(vit_config, add_pooling_layer=False))
    stem = HybridStem(depths, 16, num_groups=4, key=KEY)
    vit = VisionTransformer(TINY_VIT, 1, image_size=4, in_channels=128, key=KEY)
    used_stem, used_vit = set(), set()
    stem = fill(stem, bit_lookup(reference_stem.state_dict(), depths, used_stem))
    vit = fill(vit, vit_lookup(reference_vit.state_dict(), used_vit))
    assert used_stem == set(reference_stem.state_dict())
    assert used_vit == set(reference_vit.state_dict())
    images = images_of(32, 32)
    with torch.no_grad():
        maps = reference_stem(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).last_hidden_state
        expected = reference_vit(maps).last_hidden_state
    assert_close(jax.jit(lambda stem, images: stem(images))(stem, images), maps.permute(0, 2, 3, 1).numpy(), 1e-5)
    model, state = eqx.nn.make_with_state(HybridViT)(stem, vit)
    features, _ = run(model, state, images)
    tokens = jnp.concatenate([features.prefix, features.patches.reshape(2, 16, -1)], axis=1)
    assert_close(tokens, expected.numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("activation", "approximate"), [("gelu_tanh", "tanh"), ("gelu", "none")])
def test_mixer_equals_torch(activation, approximate, assert_close):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, state = build("mixer", activation=activation)
    model, images = wake(model), images_of()
    t = lambda x: torch.from_numpy(np.array(x))  # noqa: E731

    def mlp_of(layer, x):
        hidden = functional.linear(x, t(layer.fc1.weight).T, t(layer.fc1.bias))
        return functional.linear(
            functional.gelu(hidden, approximate=approximate), t(layer.fc2.weight).T, t(layer.fc2.bias)
        )

    def norm_of(layer, x):
        return functional.layer_norm(x, (24,), t(layer.weight), t(layer.bias), 1e-6)

    kernel = t(model.patch_embed.weight).permute(3, 2, 0, 1)
    x = functional.conv2d(t(images).permute(0, 3, 1, 2), kernel, t(model.patch_embed.bias), stride=8)
    x = x.flatten(2).mT
    for block in unstacked(model.blocks, 3):
        assert isinstance(block, MixerBlock)
        x = x + mlp_of(block.token_mlp, norm_of(block.norm1, x).mT).mT
        x = x + mlp_of(block.channel_mlp, norm_of(block.norm2, x))
    features, _ = run(model, state, images)
    assert_close(features.patches.reshape(2, 8, 24), norm_of(model.norm, x).numpy(), 1e-5)
