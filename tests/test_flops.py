"""The counter of multiply-adds: exact counts of small programs, and published figures of whole models."""

import csv
import operator
import os
import subprocess
import sys
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import eqvision
from benchmarks import flops
from benchmarks.flops import PUBLISHED
from eqvision.backbones import resnet, vit
from eqvision.counting import Counts, UncountedWarning, count, count_model
from eqvision.heads import MapHead, TokenHead
from eqvision.layers import Linear, TransformerStack, convolve

ROOT = Path(__file__).resolve().parents[1]
N = 4
CUBE = N**3  # one product of two N x N matrices
SQUARE = N**2
KEY = jax.eval_shape(jax.random.key, 0)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def work(fn, *args):
    counts = count(fn, *args)
    return counts.macs, counts.activations


def product(x):
    return x @ x


def squared(products):
    """What ``products`` products of two N x N matrices count."""
    return products * CUBE, products * SQUARE


# Matrix products and convolutions


def test_matrix_product():
    assert count(jnp.matmul, shape(3, 5), shape(5, 7)) == Counts(0, 3 * 5 * 7, 3 * 7)


def test_batched_einsum():
    attend = lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k)  # noqa: E731
    assert work(attend, shape(2, 5, 3, 8), shape(2, 7, 3, 8)) == (2 * 3 * 5 * 7 * 8, 2 * 3 * 5 * 7)


def test_contraction_over_two_axes():
    assert work(lambda x, y: jnp.tensordot(x, y, 2), shape(2, 3, 5), shape(3, 5, 7)) == (2 * 3 * 5 * 7, 2 * 7)


def test_vmap_multiplies():
    assert work(jax.vmap(product), shape(6, N, N)) == squared(6)


def conv(window, *, stride=1, padding="SAME", dilation=1, groups=1, input_dilation=1, batch_groups=1):
    def run(x):
        return lax.conv_general_dilated(
            x,
            jnp.zeros(window),
            (stride, stride),
            padding,
            lhs_dilation=(input_dilation, input_dilation),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    return run


@pytest.mark.parametrize(
    ("run", "outputs", "per_output"),
    [
        (conv((3, 3, 6, 10)), 2 * 8 * 8 * 10, 3 * 3 * 6),
        (conv((3, 5, 6, 10), padding="VALID"), 2 * 6 * 4 * 10, 3 * 5 * 6),
        (conv((3, 3, 6, 10), stride=2), 2 * 4 * 4 * 10, 3 * 3 * 6),
        (conv((3, 3, 6, 10), dilation=2, padding="VALID"), 2 * 4 * 4 * 10, 3 * 3 * 6),
        (conv((3, 3, 2, 9), groups=3), 2 * 8 * 8 * 9, 3 * 3 * 2),
        (conv((3, 3, 1, 6), groups=6, stride=2, dilation=2), 2 * 4 * 4 * 6, 3 * 3),
        (conv((3, 3, 6, 10), batch_groups=2), 8 * 8 * 10, 3 * 3 * 6),
        (conv((1, 1, 6, 10), stride=2), 2 * 4 * 4 * 10, 6),
    ],
    ids=["same", "valid", "stride", "dilation", "groups", "depthwise", "batch groups", "1x1 stride"],
)
def test_convolution(run, outputs, per_output):
    assert work(run, shape(2, 8, 8, 6)) == (outputs * per_output, outputs)


def test_transposed_convolution_reads_each_input_once_per_window_element():
    run = conv((3, 3, 6, 10), input_dilation=2, padding=((1, 2), (1, 2)))
    assert work(run, shape(2, 8, 8, 6)) == (2 * 8 * 8 * 3 * 3 * 6 * 10, 2 * 16 * 16 * 10)


@pytest.mark.parametrize("padding", ["SAME", 1])
def test_strided_one_by_one_of_the_library(padding):
    """With SAME it is a slice and a matrix product, with explicit padding a convolution."""
    outputs = 2 * 4 * 4 if padding == "SAME" else 2 * 5 * 5
    run = lambda x, w: convolve(x, w, stride=2, padding=padding)  # noqa: E731
    assert work(run, shape(2, 8, 8, 6), shape(1, 1, 6, 10)) == (outputs * 6 * 10, outputs * 10)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 3)])
def test_gradients_of_a_convolution_cost_two_forward_passes(stride, groups):
    def forward(x, w):
        return convolve(x, w, stride=stride, groups=groups)

    args = shape(2, 8, 8, 6), shape(3, 3, 6 // groups, 9)
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(forward(x, w))), argnums=(0, 1))
    assert count(gradient, *args).macs == 3 * count(forward, *args).macs


# Programs inside programs


def scanned(x):
    return lax.scan(lambda carry, _: (product(carry), None), x, None, length=5)[0]


@jax.custom_vjp
def with_own_gradient(x):
    return product(x)


with_own_gradient.defvjp(lambda x: (product(x), x), lambda x, g: (g @ x @ x,))


@jax.custom_jvp
def with_own_tangent(x):
    return product(x)


with_own_tangent.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ primals[0]))


def dearer_of_three(x):
    branches = [lambda x: x, lambda x: product(product(x)), product]
    return lax.switch(jnp.int32(x[0, 0]), branches, x)


def summed(fn):
    return jax.grad(lambda x: jnp.sum(jnp.sin(fn(x))))


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (scanned, 5),
        (jax.jit(jax.checkpoint(scanned)), 5),
        (jax.checkpoint(jax.jit(lambda x: scanned(scanned(x)))), 10),
        (lambda x: lax.scan(lambda c, _: (scanned(c), None), x, None, length=3)[0], 15),
        (lambda x: lax.scan(lambda c, _: (product(c), None), x, None, length=5, unroll=2)[0], 5),
        (lambda x: lax.fori_loop(0, 7, lambda _, c: product(c), x), 7),
        (lambda x: lax.map(lambda _: product(x), jnp.arange(6)), 6),
        (with_own_gradient, 1),
        (summed(with_own_gradient), 3),
        (with_own_tangent, 1),
        (summed(product), 3),
        (summed(jax.checkpoint(product)), 3),
        (summed(jax.checkpoint(lambda x: jnp.sin(product(x)))), 4),
        (dearer_of_three, 2),
        (lambda x: lax.cond(x[0, 0] > 0, scanned, product, x), 5),
        (lambda x: jnp.fft.fft(x) + jnp.sum(x), 0),
    ],
    ids=[
        "scan",
        "scan in checkpoint in jit",
        "two scans in jit in checkpoint",
        "scan in scan",
        "unrolled scan",
        "fori_loop",
        "map",
        "custom_vjp",
        "custom_vjp gradient",
        "custom_jvp",
        "gradient",
        "gradient of checkpoint, nothing to recompute",
        "gradient of checkpoint, one product again",
        "switch",
        "cond",
        "no products",
    ],
)
def test_nested_programs(fn, products):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert work(fn, shape(N, N)) == squared(products)


def two_by_three():
    return AbstractMesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_shard_map_counts_the_work_of_all_devices():
    rows = P(("data", "model"))
    split = jax.shard_map(jnp.matmul, mesh=two_by_three(), in_specs=(rows, P()), out_specs=rows)
    assert work(split, shape(12, 5), shape(5, 7)) == (12 * 5 * 7, 12 * 7)


def test_shard_map_over_one_axis_leaves_the_others_whole():
    options = {"mesh": two_by_three(), "axis_names": {"data"}}
    split = jax.shard_map(jnp.matmul, in_specs=(P("data"), P()), out_specs=P("data"), **options)
    assert work(split, shape(12, 5), shape(5, 7)) == (12 * 5 * 7, 12 * 7)


def test_while_counts_its_body_once_and_says_so():
    def run(x):
        return lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: product(product(c)), x)

    with pytest.warns(UncountedWarning, match=f"number of times; its {2 * CUBE} multiply-adds count once"):
        assert work(run, shape(N, N)) == squared(2)


def test_while_without_products_is_silent():
    def run(x):
        return lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c + 1, x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert work(run, shape(N, N)) == (0, 0)


def test_opaque_kernel_warns():
    def run(x, w):
        return lax.ragged_dot(x, w, jnp.array([2, 1])) + x @ w[0]

    with pytest.warns(UncountedWarning, match="products inside ragged_dot_general are not counted"):
        assert work(run, shape(3, 4), shape(2, 4, 4)) == (3 * 4 * 4, 3 * 4)


def test_primitive_with_several_programs_warns():
    def solve(x):
        return lax.custom_linear_solve(lambda v: x @ v, x, lambda _, b: product(b), symmetric=True)

    with pytest.warns(UncountedWarning, match="custom_linear_solve holds several programs"):
        count(solve, shape(N, N))


# Parameters and models


class Scaled(eqx.Module):
    linear: Linear
    steps: jax.Array

    def __call__(self, x, *, twice: bool = False):
        y = self.linear(x) * self.steps
        return self.linear(y) if twice else y


def test_parameters_are_the_floating_leaves_of_the_callable():
    model = Scaled(Linear(6, 6, key=jax.random.key(0)), jnp.arange(6))
    expected = Counts(6 * 6 + 6, 2 * 6 * 6, 2 * 6)
    assert count(model, shape(2, 6)) == expected
    assert count(model, jnp.ones((2, 6))) == expected
    assert count(jax.eval_shape(lambda: model), shape(2, 6)) == expected


def test_bound_option_reaches_the_model():
    model = Scaled(Linear(6, 6, key=jax.random.key(0)), jnp.arange(6))
    assert count(eqx.Partial(model, twice=True), shape(2, 6)) == Counts(42, 2 * 2 * 36, 2 * 2 * 6)


def stack(unroll):
    return eqx.filter_eval_shape(TransformerStack, 3, 8, 2, 16, unroll=unroll, key=KEY)


def test_scanned_stack_counts_as_its_blocks_one_by_one():
    def loop(stack, x):
        for i in range(stack.depth):
            block = jax.tree.map(operator.itemgetter(i), stack.blocks)
            x = block(x)
        return x

    x, model = shape(2, 5, 8), stack(1)
    tokens, attended = 2 * 5, 2 * 2 * 5 * 5
    one_block = tokens * (4 * 8 * 8 + 2 * 8 * 16) + 2 * attended * 4
    assert count(model, x).macs == 3 * one_block
    assert work(loop, model, x) == work(model, x) == work(stack(3), x)


def abstract(build, *args):
    return eqx.filter_eval_shape(eqx.nn.make_with_state(build), *args, key=KEY)


def through(backbone, head, images, state):
    return head(backbone(images, state)[0], state)[0]


@pytest.mark.parametrize(
    ("backbone", "head", "name"),
    [((vit, "b", 16), (TokenHead, 768), "vit_b16"), ((resnet, 50), (MapHead, 2048), "resnet50")],
    ids=["vit_b16", "resnet50"],
)
def test_backbone_and_head_built_by_hand_count_as_published(backbone, head, name):
    backbone, state = abstract(*backbone)
    head, _ = abstract(*head, 1000)
    model = eqx.Partial(through, backbone, head)
    counts = count(model, shape(1, 224, 224, 3), state)
    assert counts == count_model(name, 224)
    assert counts.macs == pytest.approx(PUBLISHED[name].gmacs * 1e9, rel=0.01)


def test_unrolled_vit_counts_as_scanned():
    model, state = eqx.filter_eval_shape(eqvision.create, "vit_b16", unroll=12, key=KEY)
    assert count(model, shape(1, 224, 224, 3), state) == count_model("vit_b16", 224)


@pytest.mark.parametrize("name", PUBLISHED)
def test_zoo_counts_as_published(name):
    counts, published = count_model(name, 224), PUBLISHED[name]
    assert counts.params == pytest.approx(published.params * 1e6, rel=1e-3)
    assert counts.macs + flops.fvcore_additions(name) == pytest.approx(published.gmacs * 1e9, rel=0.01)
    assert counts.activations == pytest.approx(published.activations * 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "params"),
    [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("vit_b16", 86_567_656), ("vit_h14", 632_045_800)],
)
def test_parameters_exactly_as_torchvision(name, params):
    assert count_model(name, 224).params == params


# The program


def test_program_writes_table_and_csv(tmp_path, capsys):
    flops.main(["resnet18", "resnet1[85]*", "--csv", str(tmp_path / "counts.csv")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`python benchmarks/flops.py resnet18 'resnet1[85]*' --csv")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| resnet18", "| resnet152"]
    assert lines[4].split(" | ")[1:8] == ["224", "11.69", "+0.00", "1.814", "+0.00", "2.48", "+0.19"]
    with (tmp_path / "counts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["params"]) == 11.689512
    assert rows[1]["source"] == "torchvision ResNet152_Weights"


def test_no_deviation_where_nothing_is_published():
    other_size, other_model = flops.row("vit_ti16", 192), flops.row("vit_ti16_augreg", 224)
    assert other_size.gmacs_deviation is other_model.gmacs_deviation is None
    assert "| vit_ti16 | 192 | 5.7" in flops.markdown([other_size])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "vit_b17"], "model 'vit_b17' does not exist; nearest: vit_b16"),
        (["resnet18", "--csv", "nowhere/counts.csv"], "the folder nowhere does not exist; create it first"),
    ],
)
def test_program_refuses_before_counting(arguments, message, capsys):
    with pytest.raises(SystemExit):
        flops.main(arguments)
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_impossible_image_size_names_the_model():
    with pytest.raises(ValueError, match="not divisible by 14") as caught:
        count_model("vit_h14", 384)
    assert "while counting vit_h14 at 384 px" in caught.value.__notes__


def test_default_is_every_published_model_of_the_zoo(monkeypatch, capsys):
    monkeypatch.setattr(flops, "PUBLISHED", dict.fromkeys(("vit_b16", "vit_b17", "resnet50")))
    assert flops.published_names() == ["vit_b16", "resnet50"]
    assert capsys.readouterr().err == "published, but not in the zoo: vit_b17\n"


def test_runs_as_a_script_from_the_repository_root():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "benchmarks/flops.py", "resnet18"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "| resnet18 | 224 | 11.69 |" in done.stdout
