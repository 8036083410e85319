"""Layouts of CenterNet: state dicts with the names and shapes of the published code, loaded and written again."""

import functools
import itertools

import jax
import numpy as np
import pytest

import eqvision
from eqvision.backbones import DLA, DLASize, HourglassSize, StackedHourglass
from eqvision.detectors import CenterNet, centernet_resnet
from eqvision.heads import CenterHead
from eqvision.necks import DLAUp
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.zoo import DETECTORS

CLASSES, STEM = 5, 4
RESNET, UPS = (4, 8, 16, 32), (10, 9, 8)
DLA_CHANNELS, DLA_LEVELS = (2, 3, 4, 6, 8, 10), (1, 2, 1, 2, 2, 1)
HOURGLASS, BLOCKS, WIDTH = (4, 6, 8), (1, 2, 3), 7


def toy_resnet(*, num_classes=CLASSES, in_channels=3, conv="deformable", norm="batch", key):
    options = {"width": 4, "up_widths": UPS, "head_width": 6, "conv": conv, "norm": norm}
    return centernet_resnet(18, num_classes=num_classes, in_channels=in_channels, **options, key=key)


def toy_dla(*, num_classes=CLASSES, in_channels=3, norm="batch", key):
    backbone = DLA(DLASize(DLA_LEVELS, DLA_CHANNELS), in_channels=in_channels, norm=norm, key=key)
    neck = DLAUp(backbone.channels, backbone.strides, norm=norm, key=key)
    return CenterNet(backbone, neck, CenterHead(4, num_classes, width=6, key=key))


def toy_hourglass(*, num_classes=CLASSES, in_channels=3, norm="batch", key):
    size = HourglassSize(HOURGLASS, BLOCKS, stem=STEM, width=WIDTH)
    backbone = StackedHourglass(size, 2, in_channels=in_channels, norm=norm, key=key)
    return CenterNet(backbone, None, CenterHead(WIDTH, num_classes, stacks=2, width=6, key=key))


# The published modules, by the names that torch gives their tensors


def conv(name, i, o, k, bias=False):
    yield f"{name}.weight", (o, i, k, k)
    if bias:
        yield f"{name}.bias", (o,)


def norm(name, c):
    for each in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{each}", (c,)
    yield f"{name}.num_batches_tracked", ()


def deformable(name, i, o):
    yield from conv(name, i, o, 3, bias=True)
    yield from conv(f"{name}.conv_offset_mask", i, 27, 3, bias=True)


def pair(names, i, o, k):
    """A convolution and its batch norm."""
    yield from conv(names[0], i, o, k)
    yield from norm(names[1], o)


def head(channels, names):
    for name, outputs in (("hm", CLASSES), ("wh", 2), ("reg", 2)):
        yield from conv(f"{name}.{names[0]}", channels, 6, 3, bias=True)
        yield from conv(f"{name}.{names[1]}", 6, outputs, 1, bias=True)


def resnet_names():
    yield from pair(("conv1", "bn1"), 3, 4, 7)
    for stage, (i, o) in enumerate(itertools.pairwise((4, *RESNET))):
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            yield from pair((f"{name}.conv1", f"{name}.bn1"), o if block else i, o, 3)
            yield from pair((f"{name}.conv2", f"{name}.bn2"), o, o, 3)
            if stage and not block:
                yield from pair((f"{name}.downsample.0", f"{name}.downsample.1"), i, o, 1)
    for number, (i, o) in zip((0, 6, 12), itertools.pairwise((RESNET[-1], *UPS)), strict=True):
        yield from deformable(f"deconv_layers.{number}", i, o)
        yield from norm(f"deconv_layers.{number + 1}", o)
        yield f"deconv_layers.{number + 3}.weight", (o, o, 4, 4)
        yield from norm(f"deconv_layers.{number + 4}", o)
    yield from head(UPS[-1], ("0", "2"))


def tree(name, levels, i, o, level_root=False, root=0):
    root = root or 2 * o
    root += i if level_root else 0
    if levels == 1:
        for block, channels in (("tree1", i), ("tree2", o)):
            yield from pair((f"{name}.{block}.conv1", f"{name}.{block}.bn1"), channels, o, 3)
            yield from pair((f"{name}.{block}.conv2", f"{name}.{block}.bn2"), o, o, 3)
        yield from pair((f"{name}.root.conv", f"{name}.root.bn"), root, o, 1)
    else:
        yield from tree(f"{name}.tree1", levels - 1, i, o)
        yield from tree(f"{name}.tree2", levels - 1, o, o, root=root + o)
    if i != o:
        yield from pair((f"{name}.project.0", f"{name}.project.1"), i, o, 1)


def join(name, inputs, o, factors):
    for number, (i, factor) in enumerate(zip(inputs, factors, strict=True), 1):
        for part, channels in (("proj", i), ("node", o)):
            yield from norm(f"{name}.{part}_{number}.actf.0", o)
            yield from deformable(f"{name}.{part}_{number}.conv", channels, o)
        yield f"{name}.up_{number}.weight", (o, 1, 2 * factor, 2 * factor)


def dla_names():
    c = DLA_CHANNELS
    yield from pair(("base.base_layer.0", "base.base_layer.1"), 3, c[0], 7)
    for level, i in ((0, c[0]), (1, c[0])):
        for number in range(DLA_LEVELS[level]):
            names = [f"base.level{level}.{3 * number + part}" for part in (0, 1)]
            yield from pair(names, c[level] if number else i, c[level], 3)
    for level in range(2, 6):
        yield from tree(f"base.level{level}", DLA_LEVELS[level], c[level - 1], c[level], level_root=level > 2)
    yield from conv("base.fc", c[-1], 1000, 1, bias=True)
    yield from join("dla_up.ida_0", [c[5]], c[4], [2])
    yield from join("dla_up.ida_1", [c[4]] * 2, c[3], [2, 2])
    yield from join("dla_up.ida_2", [c[3]] * 3, c[2], [2, 2, 2])
    yield from join("ida_up", c[3:5], c[2], [2, 4])
    yield from head(c[2], ("0", "2"))


def residual(name, i, o, stride=1):
    yield from pair((f"{name}.conv1", f"{name}.bn1"), i, o, 3)
    yield from pair((f"{name}.conv2", f"{name}.bn2"), o, o, 3)
    if stride > 1 or i != o:
        yield from pair((f"{name}.skip.0", f"{name}.skip.1"), i, o, 1)


def module(name, channels, blocks):
    """``kp_module``: blocks at this size, and at half of it around the next."""
    (here, below), count = channels[:2], blocks[0]
    for number in range(count):
        yield from residual(f"{name}.up1.{number}", here, here)
        yield from residual(f"{name}.low1.{number}", below if number else here, below, stride=1 if number else 2)
        yield from residual(f"{name}.low3.{number}", below, here if number == count - 1 else below)
    if len(channels) > 2:
        yield from module(f"{name}.low2", channels[1:], blocks[1:])
        return
    for number in range(blocks[1]):
        yield from residual(f"{name}.low2.{number}", below, below)


def hourglass_names():
    inside = HOURGLASS[0]
    yield from pair(("pre.0.conv", "pre.0.bn"), 3, STEM, 7)
    yield from residual("pre.1", STEM, inside, stride=2)
    for stack in (0, 1):
        yield from module(f"kps.{stack}", HOURGLASS, BLOCKS)
        yield from pair((f"cnvs.{stack}.conv", f"cnvs.{stack}.bn"), inside, WIDTH, 3)
        yield from head(WIDTH, (f"{stack}.0.conv", f"{stack}.1"))
    yield from residual("inters.0", inside, inside)
    yield from pair(("inters_.0.0", "inters_.0.1"), inside, inside, 1)
    yield from pair(("cnvs_.0.0", "cnvs_.0.1"), WIDTH, inside, 1)


ROWS = {"resnet": toy_resnet, "dla": toy_dla, "hourglass": toy_hourglass}
NAMES = {"resnet": resnet_names, "dla": dla_names, "hourglass": hourglass_names}
slow, OTHERS = pytest.mark.slow, ("hourglass", "resnet", "frozen_dla", "frozen_hourglass")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for kind, row in ROWS.items():
        monkeypatch.setitem(DETECTORS, kind, row)
        monkeypatch.setitem(DETECTORS, f"frozen_{kind}", functools.partial(row, norm="frozen"))


def published(kind, rng):
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in NAMES[kind]()}


def saved(path, tensors):
    np.savez(path / "centernet.npz", **tensors)
    return path / "centernet.npz"


@pytest.mark.parametrize("name", ["frozen_resnet", "dla", *(pytest.param(name, marks=slow) for name in OTHERS)])
def test_every_tensor_there_and_back(name, tmp_path, rng):
    kind = name.removeprefix("frozen_")
    tensors, layout = published(kind, rng), LAYOUTS[f"centernet_{kind}"]
    assert layout.recognises(tensors)
    model, state = eqvision.load(name, saved(tmp_path, tensors))
    assert {each.name for each in LAYOUTS.values() if each.describes(model)} == {"eqvision", layout.name}
    again, read = to_layout(model, state, layout), {n: x for n, x in tensors.items() if not layout.ignores(n)}
    assert set(again) == set(read)
    for each, tensor in read.items():
        np.testing.assert_array_equal(again[each], tensor, err_msg=each)
    first = named_tensors(model, state)[layout.first_conv]
    theirs = {"resnet": "conv1", "dla": "base.base_layer.0", "hourglass": "pre.0.conv"}[kind]
    np.testing.assert_array_equal(first, tensors[f"{theirs}.weight"].transpose(2, 3, 1, 0)[:, :, [2, 1, 0]])  # BGR


@pytest.mark.parametrize("kind", list(NAMES))
def test_every_name_has_a_rule(kind):
    """From shapes alone."""
    layout = LAYOUTS[f"centernet_{kind}"]
    rules = layout.rules(jax.eval_shape(lambda: ROWS[kind](norm="frozen", key=jax.random.key(0))))
    theirs = [name for rule in rules for name in rule.their_names]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) == {name for name, _ in NAMES[kind]() if not layout.ignores(name)}


def test_trees_of_two_levels_have_projections_that_nothing_reads(tmp_path, rng):
    """Only those: a file without the projections of the others is refused."""
    tensors = published("dla", rng)
    unread = {name for name in tensors if LAYOUTS["centernet_dla"].ignores(name) and "tracked" not in name}
    assert {name.rsplit(".", 2)[0] for name in unread} == {"base", "base.level3.project", "base.level4.project"}
    del tensors["base.level5.project.0.weight"]
    with pytest.raises(WeightsError, match=r"(?s)1 tensors are missing.*base\.level5\.project\.0\.weight"):
        eqvision.load("dla", saved(tmp_path, tensors))


@pytest.mark.slow
def test_another_number_of_classes_keeps_the_sizes(tmp_path, rng):
    tensors = published("hourglass", rng)
    model, _ = eqvision.load("hourglass", saved(tmp_path, tensors), num_classes=7)
    assert model.head.heatmap.out.weight.shape == (2, 1, 1, 6, 7)
    np.testing.assert_allclose(model.head.heatmap.out.bias, -2.19)
    np.testing.assert_array_equal(model.head.size.out.bias[1], tensors["wh.1.1.bias"])


def test_files_with_more_than_the_model_are_refused(tmp_path, rng):
    tensors = published("resnet", rng) | {"hps.0.weight": np.zeros((6, 8, 3, 3), np.float32)}
    with pytest.raises(WeightsError, match=r"(?s)1 tensors belong to no part of this model.*hps\.0\.weight"):
        eqvision.load("resnet", saved(tmp_path, tensors))


def test_plain_convolutions_have_no_published_layout():
    build = functools.partial(toy_resnet, conv="plain")
    model = jax.eval_shape(lambda: build(norm="frozen", key=jax.random.key(0)))
    assert {name for name, each in LAYOUTS.items() if each.describes(model)} == {"eqvision"}
