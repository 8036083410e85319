"""ViTDet: windows and global blocks, relative positions, scans against a loop, sizes, and transformers' numbers."""

import functools
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import VitDet, ViTSize, position_grid, vitdet
from eqvision.backbones.vitdet import _period, _steps
from eqvision.layers import MissingKeyError, RelativeAttention

KEY = jax.random.key(0)
SIZE = ViTSize(width=16, depth=6, num_heads=2, mlp_dim=32)
TINY = functools.partial(VitDet, SIZE, 8, image_size=64, position_size=32, window=3, global_blocks=(2, 5))
# XLA at its full level takes longer for these than the runs gain.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
STATE = eqx.nn.State(eqx.nn.make_with_state(lambda: ())()[0])


@functools.cache
def tiny(**options):
    return noise(lambda: TINY(key=KEY, **options))


def noise(build):
    """Noise everywhere: tables that start at zero would hide mistakes, and initialisers take seconds to compile."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), jax.eval_shape(build))


def images_of(height, width, batch=2):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, height, width, 3)), jnp.float32)


# Relative positions


def plain_attention(layer, x):
    """One head after the other, one pair of places after the other."""
    b, h, w, d = x.shape
    n, e = layer.num_heads, d // layer.num_heads

    def project(linear):
        return np.asarray(x).reshape(-1, d) @ np.asarray(linear.weight) + np.asarray(linear.bias)

    q, k, v = (project(each).reshape(b, h, w, n, e) for each in (layer.query, layer.key, layer.value))
    rows, columns = np.asarray(layer.rows), np.asarray(layer.columns)
    out = np.zeros((b, h, w, n, e))
    for i, y, z, head in np.ndindex(b, h, w, n):
        query = q[i, y, z, head]
        logits = np.array(
            [
                [query @ (k[i, r, c, head] / e**0.5 + rows[y - r + h - 1] + columns[z - c + w - 1]) for c in range(w)]
                for r in range(h)
            ]
        )
        weights = np.exp(logits - logits.max())
        out[i, y, z, head] = np.einsum("rc,rce->e", weights / weights.sum(), v[i, :, :, head])
    return out.reshape(-1, d) @ np.asarray(layer.out.weight) + np.asarray(layer.out.bias)


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_relative_attention_is_a_loop_over_pairs(assert_close, implementation):
    layer = noise(lambda: RelativeAttention(8, 2, grid=(3, 4), implementation=implementation, key=KEY))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4, 8)), jnp.float32)
    assert_close(quickly(layer.__call__)(x).reshape(-1, 8), plain_attention(layer, x), 1e-5)


def test_relative_attention_that_cannot_be_split():
    with pytest.raises(ValueError, match="width 10 cannot be split into 4 heads"):
        RelativeAttention(10, 4, grid=None, key=KEY)


# The network


@pytest.mark.parametrize(
    ("depth", "globals_", "residuals", "period"),
    [(12, (2, 5, 8, 11), (), 3), (32, (7, 15, 23, 31), (), 8), (6, (), (2, 5), 4), (6, (0, 5), (), 6), (4, (), (), 1)],
)
def test_periods(depth, globals_, residuals, period):
    assert _period(tuple(_steps(depth, globals_, residuals))) == period


UNEVEN = {"global_blocks": (1, 2), "residual_blocks": (2, 3)}


@pytest.mark.parametrize("options", [{}, pytest.param(UNEVEN, marks=pytest.mark.slow)])
def test_scan_is_a_loop_over_blocks(assert_close, options):
    model, images = tiny(**options), images_of(40, 64)

    @functools.partial(quickly, static_argnames="step")
    def one(block, x, step):
        return block(x) if step == "residual" else block(x, window=3 if step == "window" else None)

    @quickly
    def scanned(model, images):
        embedded = model._embed(images)
        return embedded, *model._run(embedded, train=False, key=None, collect=True)

    x, last, outputs = scanned(model, images)
    stacks = {"window": model.window_blocks, "global": model.global_blocks, "residual": model.residuals}
    taken, expected = dict.fromkeys(stacks, 0), []
    for step in model.steps:
        block = jax.tree.map(lambda leaf, i=taken[step]: jnp.asarray(np.asarray(leaf)[i]), stacks[step])
        taken[step] += 1
        x = one(block, x, step)
        expected = [*(expected[:-1] if step == "residual" else expected), x]
    assert_close(np.asarray(outputs), np.stack(expected), 1e-5)
    assert_close(last, expected[-1], 1e-5)


def test_window_blocks_see_their_window_only():
    model, images = tiny(global_blocks=()), images_of(48, 48, batch=1)
    other = images.at[0, 0, 0].add(1.0)
    run = quickly(lambda x: model(x, STATE)[0][0])
    changed = np.any(np.asarray(run(images) != run(other))[0], axis=-1)
    expected = np.zeros((6, 6), bool)
    expected[:3, :3] = True
    assert np.array_equal(changed, expected)


@pytest.mark.parametrize("side", [(64, 64), (8, 8), (24, 200)])
def test_images_of_any_size(side):
    model = jax.eval_shape(lambda: TINY(key=KEY))
    (features,), _ = jax.eval_shape(lambda m, x: m(x, STATE), model, images_of(*side))
    assert features.shape == (2, side[0] // 8, side[1] // 8, 16)
    assert (model.channels, model.strides) == ((16,), (8,))


# Image encoders of Segment Anything without their necks (transformers' SamVisionConfig): positions 64x64, not 14x14.
@pytest.mark.parametrize(("size", "count"), [("b", 88_883_456), ("l", 307_425_280), ("h", 636_107_520)])
def test_parameter_counts(size, count):
    model = eqx.filter_eval_shape(vitdet, size, position_size=1024, key=KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


def test_blocks_are_stacked_by_kind():
    model = eqx.filter_eval_shape(vitdet, "b", key=KEY)
    assert model.window_blocks.attention.rows.shape == (8, 27, 64)
    assert model.global_blocks.attention.rows.shape == (4, 127, 64)
    assert model.position.shape == (14, 14, 768)
    assert (model.residuals, model.drop_path) == (None, 0.1)
    assert vitdet_drop_path("h") == 0.5


def vitdet_drop_path(size):
    return eqx.filter_eval_shape(vitdet, size, key=KEY).drop_path


def test_drop_path_needs_a_key():
    model = jax.eval_shape(lambda: TINY(drop_path=0.1, key=KEY))
    with pytest.raises(MissingKeyError, match="drop_path is random in training"):
        jax.eval_shape(lambda m: m(images_of(16, 16), STATE, train=True), model)


@pytest.mark.slow
def test_remat_changes_no_gradient(assert_close):
    images = images_of(40, 24)

    def gradient(model):
        def loss(m):
            return jnp.sum(m(images, STATE, train=True, key=KEY)[0][0] ** 2)

        return quickly(jax.grad(loss))(model)

    # The bias of keys has no gradient but rounding.
    options = {"drop_path": 0.3, "use_qkv_bias": False}
    plain, other = tiny(**options), tiny(**options, remat="full")
    assert_close(jax.tree.leaves(gradient(other)), jax.tree.leaves(gradient(plain)), 1e-5)


@pytest.mark.slow
def test_gradients_of_blocked_attention(assert_close):
    def gradient(model):
        return quickly(jax.grad(lambda m: jnp.sum(m(images_of(40, 24), STATE)[0][0] ** 2)))(model)

    leaves = [jax.tree.leaves(gradient(tiny(implementation=each, use_qkv_bias=False))) for each in ("xla", "blocked")]
    assert_close(*leaves, 1e-5)


@pytest.mark.slow
def test_bfloat16_stays_bfloat16_and_near(assert_close):
    model, images = tiny(), images_of(40, 24)
    run = quickly(lambda x: model(x, STATE)[0][0])
    half = run(images.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(jnp.float32), run(images), 0.05)


# Positions


def test_position_grid():
    table = np.arange(2 * 10, dtype=np.float32).reshape(1, 10, 2)
    assert np.array_equal(position_grid(table, class_token=True), table[0, 1:].reshape(3, 3, 2))
    assert position_grid(table[:, :9], class_token=False).shape == (3, 3, 2)
    with pytest.raises(ValueError, match=r"10 rows: 10 of them should be a square grid; try it with a class token"):
        position_grid(table, class_token=False)


def test_without_positions():
    model = jax.eval_shape(lambda: TINY(position_size=None, relative_positions=False, key=KEY))
    assert model.position is None
    assert model.window_blocks.attention.rows is model.global_blocks.attention.columns is None
    jax.eval_shape(lambda m: m(images_of(16, 40), STATE), model)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_blocks": (6,)}, r"global_blocks \(6,\) must be different blocks, of which 0..5 exist"),
        ({"residual_blocks": (1, 1)}, r"residual_blocks \(1, 1\) must be different blocks"),
        ({"window": 0}, "window 0 is no number of places"),
        ({"drop_path": 1.0}, "drop_path rate 1.0 is not in"),
        ({"image_size": 60}, "image_size 60x60 is not divisible by 8"),
        ({"position_size": 30}, "image_size 30x30 is not divisible by 8"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        TINY(**options, key=KEY)


@pytest.mark.usefixtures("unchecked")
def test_refused_names():
    with pytest.raises(ValueError, match="size 'g' does not exist; choose from b, l, h"):
        vitdet("g", key=KEY)
    with pytest.raises(ValueError, match="remat 'all' is unknown"):
        TINY(remat="all", key=KEY)


def test_images_that_the_patch_does_not_divide():
    model = jax.eval_shape(lambda: TINY(key=KEY))
    with pytest.raises(ValueError, match="images of 60x64 cannot be cut into steps of 8x8 pixels"):
        jax.eval_shape(lambda m: m(images_of(60, 64), STATE), model)


# transformers


def reference(**options):
    """VitDetBackbone with noise in every parameter; VitDet's depth, windows and sizes."""
    import torch
    from transformers import VitDetBackbone, VitDetConfig

    global_blocks = options.pop("global_blocks", (2, 5))
    windows = [i for i in range(6) if i not in global_blocks]
    config = VitDetConfig(
        hidden_size=16, num_hidden_layers=6, num_attention_heads=2, mlp_ratio=2, image_size=64, pretrain_image_size=32,
        patch_size=8, window_size=3, window_block_indices=windows, use_relative_position_embeddings=True,
        out_features=["stage1", "stage3", "stage6"], **options,
    )  # fmt: skip
    model = VitDetBackbone(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def copied(ours, theirs):
    """The tree ``ours`` with the parameters of a VitDetBackbone."""
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}

    def conv(name):
        return state[name].transpose(2, 3, 1, 0)

    def block(prefix, like):
        names = {"norm1": "norm1", "norm2": "norm2", "mlp": "mlp", "out": "attention.proj"}
        qkv_weight = np.split(state[f"{prefix}.attention.qkv.weight"].T, 3, axis=1)
        qkv_bias = np.split(state.get(f"{prefix}.attention.qkv.bias", np.zeros(0)), 3)

        def norm(each):
            return (state[f"{prefix}.{each}.weight"], state[f"{prefix}.{each}.bias"])

        def line(each):
            return (state[f"{prefix}.{each}.weight"].T, state[f"{prefix}.{each}.bias"])

        values = [*norm(names["norm1"])]
        for weight, bias in zip(qkv_weight, qkv_bias, strict=True):
            values += [weight, bias] if bias.size else [weight]
        values += [
            *line("attention.proj"),
            state[f"{prefix}.attention.rel_pos_h"],
            state[f"{prefix}.attention.rel_pos_w"],
        ]
        values += [*norm("norm2"), *line("mlp.fc1"), *line("mlp.fc2")]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def residual(prefix, like):
        convs = [conv(f"{prefix}.residual.conv{i}.weight") for i in (1, 2, 3)]
        norms = [state[f"{prefix}.residual.norm{i}.{each}"] for i in (1, 2, 3) for each in ("weight", "bias")]
        return jax.tree.unflatten(jax.tree.structure(like), [*convs, *norms])

    layers, position = {"window": [], "global": [], "residual": []}, -1
    stacks = {"window": ours.window_blocks, "global": ours.global_blocks, "residual": ours.residuals}
    for step in ours.steps:
        position += step != "residual"
        build = residual if step == "residual" else block
        layers[step].append(build(f"encoder.layer.{position}", stacks[step]))

    def stack(each):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if each else None

    where = operator.attrgetter(
        "patch_embed.weight", "patch_embed.bias", "position", "window_blocks", "global_blocks", "residuals"
    )
    new = (
        jnp.asarray(conv("embeddings.projection.weight")),
        jnp.asarray(state["embeddings.projection.bias"]),
        jnp.asarray(position_grid(state["embeddings.position_embeddings"], class_token=True)),
        *(stack(layers[step]) for step in ("window", "global", "residual")),
    )
    return eqx.tree_at(where, ours, new, is_leaf=lambda leaf: leaf is None)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("theirs", "ours", "side"),
    [
        ({}, {}, (64, 64)),
        ({}, {"implementation": "blocked"}, (40, 72)),
        ({"qkv_bias": False}, {"use_qkv_bias": False}, (32, 32)),
        ({"residual_block_indices": [1, 2]}, {"residual_blocks": (1, 2)}, (56, 24)),
        (
            {"residual_block_indices": [2, 5], "global_blocks": ()},
            {"residual_blocks": (2, 5), "global_blocks": ()},
            (8, 80),
        ),
    ],
)
def test_equal_to_transformers(assert_close, theirs, ours, side):
    import torch

    images, reference_model = images_of(*side), reference(**theirs)
    model = copied(tiny(**ours), reference_model)
    with torch.no_grad():
        expected = reference_model(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)).feature_maps
    maps = quickly(lambda m, x: m.intermediates(x, STATE, (0, 2, 5)))(model, images)
    assert_close(list(maps), [each.permute(0, 2, 3, 1).numpy() for each in expected], 1e-5)
    (last,), _ = quickly(lambda m, x: m(x, STATE))(model, images)
    assert_close(last, maps[-1], 1e-6)
