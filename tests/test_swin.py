"""Swin: windows, shift and mask, scan against loop, any image size, and what is refused."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.swin import (
    SwinBlock,
    SwinSize,
    SwinTransformer,
    cut_windows,
    join_windows,
    offset_index,
    shifted_regions,
    swin,
    window_shift,
)
from eqvision.heads import NormPoolHead
from eqvision.layers import MissingKeyError

KEY = jax.random.key(0)
SIZE = SwinSize(width=8, depths=(2, 4), num_heads=(2, 4))
RULES = ("torchvision", "timm", "huggingface")
# XLA at its full level takes longer for these than the runs gain.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def tiny(**options):
    return eqx.filter_jit(eqx.nn.make_with_state(functools.partial(SwinTransformer, SIZE, 3, key=KEY, **options)))()


def images_of(height, width, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


def wake(model):
    """Noise everywhere: norms of ones and biases of zeros would hide mistakes."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


# Windows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("height", "width", "shift"), [(6, 9, (1, 1)), (7, 5, (0, 1)), (2, 4, (1, 0))])
def test_windows_join_to_the_map(rule, height, width, shift):
    x = jnp.arange(2 * height * width * 2, dtype=jnp.float32).reshape(2, height, width, 2)
    windows, joined = quickly(lambda y: (z := cut_windows(y, 3, shift, rule), join_windows(z, y, shift, rule)))(x)
    assert windows.shape == (2 * -(-height // 3) * -(-width // 3), 9, 2)
    assert np.array_equal(joined, x)


def test_windows_of_a_shifted_map():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert cut_windows(x, 2)[1, :, 0].tolist() == [2, 3, 6, 7]
    assert cut_windows(x, 2, (1, 1))[0, :, 0].tolist() == [5, 6, 9, 10]
    assert cut_windows(x, 2, (1, 1))[3, :, 0].tolist() == [15, 12, 3, 0]


def test_padding_comes_before_the_shift_but_in_timm():
    x = jnp.arange(1.0, 4).reshape(1, 1, 3, 1)
    assert cut_windows(x, 2, (0, 1), "torchvision")[..., 0].tolist() == [[2, 3, 0, 0], [0, 1, 0, 0]]
    assert cut_windows(x, 2, (0, 1), "timm")[..., 0].tolist() == [[2, 3, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("sides", "each", "both"), [((14, 21), (3, 3), (3, 3)), ((7, 14), (0, 3), (0, 0)), ((5, 7), (0, 0), (0, 0))]
)
def test_no_shift_where_one_window_covers_the_map(sides, each, both):
    assert window_shift(*sides, 7, "torchvision") == window_shift(*sides, 7, "timm") == each
    assert window_shift(*sides, 7, "huggingface") == both


def test_offsets_have_a_place_of_the_table_each():
    index = offset_index(4)
    rows, columns = np.divmod(index, 7)
    for query in range(16):
        for key in range(16):
            offset = (query // 4 - key // 4 + 3, query % 4 - key % 4 + 3)
            assert (rows[query, key], columns[query, key]) == offset


@pytest.mark.parametrize("shift", [(1, 1), (0, 2), (2, 0)])
def test_regions_tell_what_the_shift_has_brought_together(shift):
    """Two places of a window were neighbours before if the shift has kept their distance."""
    height, width, window = 12, 8, 4
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    moved = np.roll(place, (-shift[0], -shift[1]), axis=(0, 1))
    before, after = (cut_windows(jnp.asarray(each[None], jnp.float32), window) for each in (moved, place))
    distance = [np.asarray(each[:, :, None] - each[:, None]) for each in (before, after)]
    together = np.all(distance[0] == distance[1], axis=-1)
    region = shifted_regions(height, width, window, shift)
    assert np.array_equal(region[:, :, None] == region[:, None], together)


def reach(block, shift, row, column):
    """Places of an 8x8 map whose attention reads the place."""
    x = jax.random.normal(KEY, (1, 8, 8, 8))
    other = x.at[0, row, column].add(1.0)
    run = eqx.filter_jit(lambda b, y: b._attend(y, shift, "torchvision", train=False, key=None))
    return np.any(np.asarray(run(block, x) != run(block, other))[0], axis=-1)


def test_attention_stays_inside_windows_and_does_not_cross_the_border():
    block = wake(SwinBlock(8, 2, 4, key=KEY))
    expected = np.zeros((8, 8), bool)
    expected[:4, 4:] = True
    assert np.array_equal(reach(block, (0, 0), 1, 5), expected)
    expected = np.zeros((8, 8), bool)
    expected[2:6, 2:6] = True
    assert np.array_equal(reach(block, (2, 2), 3, 3), expected)
    expected = np.zeros((8, 8), bool)
    expected[:2, :2] = True  # the shifted window of the corner has the other three corners in it, masked
    assert np.array_equal(reach(block, (2, 2), 0, 1), expected)


# The network


@pytest.mark.parametrize(
    ("side", "maps"), [((28, 40), (7, 10, 4, 5)), ((1, 3), (1, 1, 1, 1)), ((30, 33), (8, 9, 4, 5))]
)
def test_images_of_any_size(side, maps):
    model, state = tiny()
    features, _ = jax.eval_shape(model, images_of(*side), state)
    assert [x.shape for x in features] == [(2, *maps[:2], 8), (2, *maps[2:], 16)]
    assert (model.channels, model.strides) == ((8, 16), (4, 8))


def test_scan_is_a_loop_over_blocks(assert_close):
    model, state = tiny(window_rule="timm")
    model, images = wake(model), images_of(28, 40)

    @quickly
    def loop(model, images):
        x = model.norm(model.patch_embed(images))
        for stage in model.stages:
            x = x if stage.merge is None else stage.merge(x)
            for i in range(len(stage.drop_path)):
                block = jax.tree.map(lambda leaf, i=i: leaf[i], stage.blocks)
                x = block(x, shift=(0, 0) if i % 2 == 0 else (1, 1), rule="timm")
        return x

    features = quickly(lambda m, s, x: m(x, s)[0])(model, state, images)
    assert_close(features[-1], loop(model, images), 1e-5)


def test_neighbours_are_merged_column_by_column():
    merge = tiny()[0].stages[1].merge
    # One channel of each place is put out; the norm keeps their order.
    pick = jnp.zeros((32, 16)).at[::8, :4].set(jnp.eye(4))
    merge = eqx.tree_at(lambda m: m.reduction.weight, merge, pick)
    x = jnp.broadcast_to(jnp.array([[0.0, 1.0], [2.0, 3.0]])[None, :, :, None], (1, 2, 2, 8))
    assert np.argsort(merge(x)[0, 0, 0, :4]).tolist() == np.argsort([0, 2, 1, 3]).tolist()
    assert merge(jnp.zeros((1, 3, 5, 8))).shape == (1, 2, 3, 16)


@functools.cache
def gradient(**options):
    """Of one stage whose map the windows do not divide, without key biases: theirs is zero but for rounding."""
    build = functools.partial(SwinTransformer, SwinSize(8, (4,), (2,)), 3, drop_path=0.3, key=KEY, **options)
    model, state = eqx.filter_jit(eqx.nn.make_with_state(build))()
    model, images = wake(model), images_of(16, 20)
    loss = quickly(jax.grad(lambda m: jnp.sum(jnp.sin(m(images, state, train=True, key=KEY)[0][-1]))))
    found = jax.tree_util.tree_leaves_with_path(loss(model))
    return {name: x for path, x in found if not (name := jax.tree_util.keystr(path)).endswith("key.bias")}


@pytest.mark.slow
def test_rematerialised_and_unrolled_gradients_are_the_same(assert_close):
    assert_close(gradient(remat="full", unroll=2), gradient(), 1e-5)


@pytest.mark.slow
def test_drop_path_rises_over_the_whole_network():
    rates = [stage.drop_path for stage in tiny(drop_path=0.5)[0].stages]
    assert rates == [pytest.approx((0, 0.1)), pytest.approx((0.2, 0.3, 0.4, 0.5))]


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_random_options_need_a_key(option):
    model, state = tiny(**{option: 0.2})
    with pytest.raises(MissingKeyError, match=f"{option}.* is random in training"):
        jax.eval_shape(lambda m, s: m(images_of(8, 8), s, train=True), model, state)


def test_program_does_not_grow_with_depth():
    def lines(depth):
        model, state = eqx.filter_eval_shape(
            eqx.nn.make_with_state(functools.partial(SwinTransformer, SwinSize(8, (depth,), (2,)), 3, key=KEY))
        )
        return len(str(jax.make_jaxpr(lambda m, s, x: m(x, s)[0])(model, state, images_of(28, 28))).splitlines())

    assert lines(2) == lines(12)


def test_mask_is_no_constant_of_the_program():
    """For detectors' images it has tens of millions of elements; it is computed from one number for each place."""
    model, state = tiny()
    jaxpr = jax.make_jaxpr(lambda m, s, x: m(x, s)[0])(model, state, images_of(256, 256, batch=1))
    assert max((np.size(constant) for constant in jaxpr.consts), default=0) <= 66**2


def test_head_normalises_before_it_averages(assert_close):
    head = wake(NormPoolHead(4, 3, key=KEY))
    x = jax.random.normal(KEY, (2, 3, 5, 4))
    assert_close(head.pooled((x,)), jnp.mean(head.norm(x), axis=(1, 2)), 1e-6)
    again = head.reset(7, key=KEY)
    assert again.linear.weight.shape == (4, 7)
    assert np.array_equal(again.norm.weight, head.norm.weight)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": SwinSize(8, (2, 3), (2, 4))},
            r"come in pairs \(plain, shifted\) and depths \(2, 3\) are not all even",
        ),
        ({"window": 0}, "window 0 is no number of places along a side"),
        ({"window_rule": "mmdet"}, r"window_rule 'mmdet' is unknown; choose from \('torchvision', 'timm', 'huggingf"),
        ({"remat": "all"}, r"remat 'all' is unknown; choose from \('none', 'dots', 'full'\)"),
        ({"drop_path": 1.0}, r"drop_path rate 1.0 is not in \[0, 1\)"),
    ],
)
def test_options_that_do_not_exist(options, message, unchecked):
    options = {"size": SIZE, "window": 3, **options}
    with pytest.raises(ValueError, match=message):
        SwinTransformer(**options, key=KEY)


def test_size_that_does_not_exist():
    with pytest.raises(ValueError, match="Swin size 'tiny' does not exist; choose from t, s, b, l"):
        swin("tiny", key=KEY)
