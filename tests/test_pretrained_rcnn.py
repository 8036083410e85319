"""Layouts of R-CNNs: state dicts with the names and shapes of the published files, loaded and written again."""

import functools
import os
import pickle

import equinox as eqx
import jax
import numpy as np
import pytest
import rcnn_names
from rcnn_names import PUBLISHED, TOY, TOY_VIT, VIT_B

import eqvision
from eqvision.backbones import VitDet, ViTSize
from eqvision.backbones.resnet import DEPTHS
from eqvision.detectors import build_rcnn, rcnn_dialect, rcnn_resnet_fpn
from eqvision.necks import SimplePyramid
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.files import read_tensors
from eqvision.pretrained.layouts.rcnn_detectron2 import match_endings
from eqvision.pretrained.leaf_names import named_arrays, named_tensors
from eqvision.pretrained.rules import load_rule
from eqvision.zoo import DETECTORS

DEPTH = 14  # bottlenecks, one in each stage
SMALL = functools.partial(
    rcnn_resnet_fpn, DEPTH, backbone_width=TOY.width, width=TOY.fpn, head_width=TOY.head, num_classes=TOY.classes
)
ROWS = {
    "faster": SMALL,
    "mask": functools.partial(SMALL, masks=True),
    "faster_v2": functools.partial(SMALL, v2=True, norm="batch"),
    "mask_v2": functools.partial(SMALL, v2=True, norm="batch", masks=True),
    "cascade": functools.partial(SMALL, cascade=True, dialect="mmdet"),
    "cascade_mask": functools.partial(SMALL, cascade=True, masks=True, dialect="detectron2"),
}


def names_of(function, **options):
    return lambda size: dict(function(size, **options))


# Model, layout, and the table of the published file.
FILES = {
    "torchvision_2019": ("faster", "torchvision_rcnn", names_of(rcnn_names.torchvision_2019)),
    "torchvision_2019_mask": ("mask", "torchvision_rcnn", names_of(rcnn_names.torchvision_2019, masks=True)),
    "torchvision": ("faster", "torchvision_rcnn", names_of(rcnn_names.torchvision_today)),
    "torchvision_mask": ("mask", "torchvision_rcnn", names_of(rcnn_names.torchvision_today, masks=True)),
    "torchvision_v2": ("faster_v2", "torchvision_rcnn", names_of(rcnn_names.torchvision_v2)),
    "torchvision_v2_mask": ("mask_v2", "torchvision_rcnn", names_of(rcnn_names.torchvision_v2, masks=True)),
    "detectron2": ("faster", "detectron2_rcnn", names_of(rcnn_names.detectron2)),
    "detectron2_mask": ("mask", "detectron2_rcnn", names_of(rcnn_names.detectron2, masks=True)),
    "detectron2_cascade": (
        "cascade_mask",
        "detectron2_rcnn",
        names_of(rcnn_names.detectron2, masks=True, cascade=True),
    ),
    "mmdet": ("faster", "mmdet_rcnn", names_of(rcnn_names.mmdet)),
    "mmdet_mask": ("mask", "mmdet_rcnn", names_of(rcnn_names.mmdet, masks=True)),
    "mmdet_cascade": ("cascade", "mmdet_rcnn", names_of(rcnn_names.mmdet, cascade=True)),
}
ZOO = {
    "faster": "faster_rcnn_r50_fpn",
    "mask": "mask_rcnn_r50_fpn",
    "faster_v2": "faster_rcnn_r50_fpn_v2",
    "mask_v2": "mask_rcnn_r50_fpn_v2",
    "cascade": "cascade_rcnn_r50_fpn",
    "cascade_mask": "cascade_mask_rcnn_r50_fpn",
}
QUICK = ("torchvision_2019_mask", "torchvision_v2_mask", "detectron2_cascade", "mmdet_mask")
every_file = pytest.mark.parametrize(
    "file", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FILES]
)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(DEPTHS, DEPTH, (TOY.blocks, True))
    for name, row in ROWS.items():
        monkeypatch.setitem(DETECTORS, name, row)


def published(file, rng):
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in FILES[file][2](TOY).items()}


def saved(path, tensors):
    np.savez(path / "rcnn.npz", **tensors)
    return path / "rcnn.npz"


def pickled(path, content):
    (path / "model.pkl").write_bytes(pickle.dumps(content))
    return path / "model.pkl"


def today(name):
    """torchvision's renaming, written anew."""
    for place in range(4):
        name = name.replace(f"mask_head.mask_fcn{place + 1}.", f"mask_head.{place}.0.")
        for blocks in ("inner_blocks", "layer_blocks"):
            for kind in ("weight", "bias"):
                name = name.replace(f"{blocks}.{place}.{kind}", f"{blocks}.{place}.0.{kind}")
    return name.replace("rpn.head.conv.weight", "rpn.head.conv.0.0.weight").replace(
        "rpn.head.conv.bias", "rpn.head.conv.0.0.bias"
    )


@every_file
def test_every_tensor_there_and_back(file, tmp_path, rng):
    name, layout, _ = FILES[file]
    tensors, layout = published(file, rng), LAYOUTS[layout]
    assert [each.name for each in LAYOUTS.values() if each.recognises(tensors)] == [layout.name]
    model, state = eqvision.load(name, saved(tmp_path, tensors))
    assert layout.computes(model)
    again = to_layout(model, state, layout)
    read = {today(n) if "2019" in file else n: x for n, x in tensors.items() if not layout.ignores(n)}
    assert set(again) == set(read)
    for each, tensor in read.items():
        np.testing.assert_array_equal(again[each], tensor, err_msg=each)


@every_file
def test_every_name_has_a_rule_at_the_published_size(file):
    """From shapes: every leaf of the zoo's model, and every tensor of the published file once."""
    name, layout, table = FILES[file]
    layout = LAYOUTS[layout]
    classes = 90 if layout.name == "torchvision_rcnn" else 80
    build = functools.partial(DETECTORS[ZOO[name]], num_classes=classes, **layout.options)
    model, state = shapes_of(build)
    shapes = {today(n) if "2019" in file else n: s for n, s in table(PUBLISHED._replace(classes=classes)).items()}
    tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items() if not layout.ignores(n)}
    check_rules(layout, model, state, tensors)


def check_rules(layout, model, state, tensors):
    rules = layout.rules(model)
    theirs = [each for rule in rules for each in rule.their_names]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) == set(tensors)
    leaves = {n: leaf.shape for rule in rules for n, leaf in load_rule(rule, tensors).items()}
    assert leaves == {n: leaf.shape for n, leaf in named_arrays(model, state).items()}


def shapes_of(build):
    return eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(build)(key=jax.random.key(0)))


def test_a_linear_layer_on_pooled_maps_reads_them_in_torchs_order(tmp_path, rng):
    """torch flattens channels, rows, columns; here rows and columns come first."""
    tensors = published("torchvision_2019", rng)
    model, _ = eqvision.load("faster", saved(tmp_path, tensors))
    pooled = rng.normal(size=(2, TOY.fpn, 7, 7)).astype(np.float32)
    weight, bias = tensors["roi_heads.box_head.fc6.weight"], tensors["roi_heads.box_head.fc6.bias"]
    there = pooled.reshape(2, -1) @ weight.T + bias
    layer = model.box_heads[0].layers[0]
    here = pooled.transpose(0, 2, 3, 1).reshape(2, -1) @ np.asarray(layer.weight) + np.asarray(layer.bias)
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-4)


def test_channels_of_the_image_and_columns_of_classes(tmp_path, rng):
    """detectron2 reads BGR; what a place's anchors say, and the order of classes and boxes, is the file's."""
    tensors = published("detectron2_mask", rng)
    model, _ = eqvision.load("mask", pickled(tmp_path, {"model": tensors}))
    stem = tensors["backbone.bottom_up.stem.conv1.weight"]
    np.testing.assert_array_equal(model.backbone.stem.conv.weight, stem.transpose(2, 3, 1, 0)[:, :, [2, 1, 0]])
    np.testing.assert_array_equal(
        model.rpn.deltas.weight[0, 0], tensors["proposal_generator.rpn_head.anchor_deltas.weight"][..., 0, 0].T
    )
    np.testing.assert_array_equal(
        model.box_heads[0].deltas.weight, tensors["roi_heads.box_predictor.bbox_pred.weight"].T
    )
    deconv = tensors["roi_heads.mask_head.deconv.weight"]  # (in, out, height, width)
    np.testing.assert_array_equal(model.mask_head.upsample.weight[1, 0], deconv[:, :, 1, 0])


def test_files_bring_their_dialect_and_number_of_classes(tmp_path, rng):
    found = {}
    for file in ("torchvision", "detectron2", "mmdet"):
        model, _ = eqvision.load("faster", saved(tmp_path, published(file, rng)))
        found[file] = (model.dialect.name, model.num_classes, model.backbone.stem.norm.eps)
        assert model.box_heads[0].deltas.bias.shape == (4 * (TOY.classes + (file == "torchvision")),)
    assert found == {"torchvision": ("torchvision", 3, 0.0), "detectron2": ("detectron2", 3, 1e-5),
                     "mmdet": ("mmdet", 3, 1e-5)}  # fmt: skip


@pytest.mark.parametrize("file", [pytest.param("torchvision_mask", marks=pytest.mark.slow), "detectron2_cascade"])
def test_another_number_of_classes_gets_fresh_layers(file, tmp_path, rng):
    """All that have a column for each class; boxes for all classes together stay."""
    name = FILES[file][0]
    tensors = published(file, rng)
    path = saved(tmp_path, tensors)
    model, _ = eqvision.load(name, path, num_classes=7)
    other, _ = eqvision.load(name, path, num_classes=7, key=jax.random.key(5))
    same, _ = eqvision.load(name, path)
    assert model.num_classes == 7
    assert model.box_heads[0].logits.bias.shape == (8,)
    assert not np.array_equal(model.mask_head.logits.weight, other.mask_head.logits.weight)
    cascade = "cascade" in file
    np.testing.assert_array_equal(np.shape(model.box_heads[-1].deltas.bias), [4 if cascade else 32])
    assert np.array_equal(model.box_heads[0].deltas.weight, same.box_heads[0].deltas.weight) == cascade
    np.testing.assert_array_equal(model.box_heads[0].layers[0].weight, same.box_heads[0].layers[0].weight)
    np.testing.assert_array_equal(model.mask_head.upsample.weight, same.mask_head.upsample.weight)


# ViTDet


def toy_vitdet(*, num_classes=TOY_VIT.classes, image_size=64, in_channels=3, cascade=False, key):
    size = ViTSize(TOY_VIT.width, TOY_VIT.depth, TOY_VIT.heads, TOY_VIT.mlp)
    pretraining, window, _ = TOY_VIT.sides
    backbone = VitDet(
        size,
        image_size=image_size,
        position_size=16 * pretraining,
        window=window,
        global_blocks=TOY_VIT.whole,
        in_channels=in_channels,
        key=key,
    )
    return build_rcnn(
        backbone,
        SimplePyramid(backbone.channels, backbone.strides, TOY_VIT.fpn, key=key),
        dialect=rcnn_dialect("detectron2"),
        num_classes=num_classes,
        masks=True,
        cascade=cascade,
        rpn_depth=2,
        num_convs=4,
        num_linears=1,
        norm="layer",
        head_width=TOY_VIT.head,
        key=key,
    )


@pytest.mark.parametrize("cascade", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_vitdet_there_and_back(cascade, tmp_path, rng, monkeypatch):
    """All but the position of the class token, which nothing reads."""
    monkeypatch.setitem(DETECTORS, "vitdet", functools.partial(toy_vitdet, cascade=cascade))
    names = dict(rcnn_names.vitdet(TOY_VIT, cascade))
    tensors = {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in names.items()}
    assert [each.name for each in LAYOUTS.values() if each.recognises(tensors)] == ["detectron2_vitdet"]
    model, state = eqvision.load("vitdet", pickled(tmp_path, {"model": tensors, "__author__": "ViTDet"}))
    assert model.backbone.global_blocks.attention.rows.shape == (2, 7, 4)  # as in the file, not as create's 224
    again = to_layout(model, state, LAYOUTS["detectron2_vitdet"])
    np.testing.assert_array_equal(again["backbone.net.pos_embed"][0, 0], 0)
    tensors["backbone.net.pos_embed"][0, 0] = 0
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


@pytest.mark.parametrize("cascade", [False, True])
def test_every_name_of_vitdet_has_a_rule_at_the_published_size(cascade):
    layout, name = LAYOUTS["detectron2_vitdet"], f"{'cascade_' * cascade}mask_rcnn_vitdet_b"
    model, state = shapes_of(functools.partial(DETECTORS[name], image_size=1024))
    tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in rcnn_names.vitdet(VIT_B, cascade)}
    check_rules(layout, model, state, tensors)
    assert layout.describes(model)


# detectron2's pickles


def test_a_pickle_of_the_model_zoo(tmp_path, rng):
    tensors = published("detectron2_mask", rng)
    file = pickled(tmp_path, {"model": tensors, "__author__": "Detectron2 Model Zoo"})
    assert set(read_tensors(file)) == set(tensors)
    model, state = eqvision.load("mask", file)
    again = to_layout(model, state, LAYOUTS["detectron2_rcnn"])
    np.testing.assert_array_equal(again["roi_heads.box_head.fc1.weight"], tensors["roi_heads.box_head.fc1.weight"])


def test_matching_heuristics_names_are_endings(tmp_path, rng):
    full = published("detectron2_mask", rng)
    short = {
        name.removeprefix("backbone.bottom_up.").removeprefix("proposal_generator."): x for name, x in full.items()
    }
    file = pickled(tmp_path, {"model": short, "__author__": "torchvision", "matching_heuristics": True})
    model, _ = eqvision.load("mask", file)
    there, _ = eqvision.load("mask", saved(tmp_path, full))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_endings_that_fit_several_parts_are_refused():
    x = np.zeros(1)
    wanted = ["a.stem.conv.weight", "a.res2.conv.weight", "b.fc.weight"]
    found = match_endings(wanted, {"stem.conv.weight": x, "res2.conv.weight": x, "fc.weight": x}, "file")
    assert sorted(found) == sorted(wanted)
    assert set(match_endings(wanted, {"other": x}, "file")) == {"other"}
    with pytest.raises(
        WeightsError, match=r"(?s)file: 1 names fit several parts.*conv\.weight: a\.stem\.conv\.weight, "
    ):
        match_endings(wanted, {"conv.weight": x}, "file")


def test_a_backbone_alone_is_no_detector(tmp_path, rng):
    """R-50.pkl and its like: for training."""
    tensors = {
        n.removeprefix("backbone.bottom_up."): x for n, x in published("detectron2", rng).items() if "bottom_up" in n
    }
    file = pickled(tmp_path, {"model": tensors, "__author__": "torchvision", "matching_heuristics": True})
    with pytest.raises(WeightsError, match=r"(?s)of no known layout for faster; nearest: .*detectron2_rcnn"):
        eqvision.load("faster", file)
    with pytest.raises(WeightsError, match=r"(?s)tensors are missing:.*backbone\.fpn_lateral2\.weight"):
        eqvision.load("faster", file, layout="detectron2_rcnn", num_classes=3)


class Evil:
    """Calls a function where it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["beside", "in the model", "as a tensor's name"])
def test_a_malicious_pickle_is_refused_and_does_not_run(place, tmp_path, rng):
    marker = tmp_path / "marker"
    evil = Evil(os.mkdir, str(marker))
    tensors = published("detectron2", rng)
    content = {
        "beside": {"model": tensors, "__author__": evil},
        "in the model": {"model": {**tensors, "roi_heads.extra": evil}},
        "as a tensor's name": {"model": {**tensors, ("name", evil): np.zeros(2)}},
    }[place]
    file = pickled(tmp_path, content)
    with pytest.raises(
        WeightsError, match=r"model\.pkl: its pickle asks for .*mkdir, which is refused: a pickle may run"
    ):
        eqvision.load("faster", file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.is_dir(), "the attack was none"


# Errors


@pytest.mark.parametrize(
    "file", ["torchvision_2019", *(pytest.param(f, marks=pytest.mark.slow) for f in ("detectron2", "mmdet"))]
)
def test_missing_and_foreign_tensors_and_shapes(file, tmp_path, rng):
    name, layout, _ = FILES[file]
    tensors = published(file, rng)
    gone = next(n for n in tensors if n.endswith(("fc7.weight", "fc2.weight", "shared_fcs.1.weight")))
    less = {n: x for n, x in tensors.items() if n != gone} | {"roi_heads.more": np.zeros(2, np.float32)}
    with pytest.raises(WeightsError) as caught:
        eqvision.load(name, saved(tmp_path, less))
    message = str(caught.value)
    assert f"does not hold this model (read as layout {layout}, " in message
    assert "1 tensors are missing" in message
    assert gone in message
    assert "1 tensors belong to no part of this model" in message
    assert "roi_heads.more" in message
    wrong = tensors | {gone: np.zeros((TOY.head, TOY.head + 1), np.float32)}
    with pytest.raises(
        WeightsError, match=r"(?s)1 leaves differ.*box_heads\.0\.layers\.1\.weight: \(13, 12\) in the file"
    ):
        eqvision.load(name, saved(tmp_path, wrong))


def test_a_pooled_layer_of_another_size_is_refused(tmp_path, rng):
    tensors = published("torchvision_2019", rng)
    tensors["roi_heads.box_head.fc6.weight"] = np.zeros((TOY.head, TOY.fpn * 49 + 1), np.float32)
    with pytest.raises(
        WeightsError, match=r"(?s)have no legal shape.*box_heads\.0\.layers\.0\.weight .*expected \(12, 392\)"
    ):
        eqvision.load("faster", saved(tmp_path, tensors))


def test_files_of_other_models_are_refused(tmp_path, rng):
    with pytest.raises(WeightsError, match=r"(?s)belong to no part of this model.*roi_heads\.mask_head"):
        eqvision.load("faster", saved(tmp_path, published("torchvision_2019_mask", rng)))
    with pytest.raises(WeightsError, match="tensors are missing"):
        eqvision.load("faster_v2", saved(tmp_path, published("torchvision", rng)))
    with pytest.raises(
        WeightsError, match=r"of layout torchvision_rcnn \(torchvision .*which cascade is not a model of"
    ):
        eqvision.load("cascade", saved(tmp_path, published("torchvision", rng)))


def test_mmdets_cascade_with_masks_says_why_not(tmp_path, rng):
    tensors = {n: np.zeros(s, np.float32) for n, s in rcnn_names.mmdet(TOY, masks=True, cascade=True)}
    with pytest.raises(WeightsError, match=r"a mask head for every stage .*averages their masks.*cascade_rcnn_r50_fpn"):
        eqvision.load("cascade_mask", saved(tmp_path, tensors))


@pytest.mark.slow
def test_own_files(tmp_path, rng, assert_close):
    """Saved and loaded again, with the dialect that the file brought."""
    from eqvision.convert import convert

    file = saved(tmp_path, published("detectron2_mask", rng))
    convert(file, tmp_path / "own.safetensors", to="eqvision", name="mask")
    again, state = eqvision.load("mask", tmp_path / "own.safetensors")
    assert again.dialect.name == "detectron2"
    assert_close(named_tensors(again, state), named_tensors(*eqvision.load("mask", file)), 0)
    fewer, _ = eqvision.load("mask", tmp_path / "own.safetensors", num_classes=2)
    assert (fewer.num_classes, fewer.mask_head.logits.bias.shape) == (2, (2,))


def test_models_are_written_in_their_own_dialect_alone(tmp_path, rng):
    from eqvision.convert import convert

    file = saved(tmp_path, published("mmdet_mask", rng))
    done = convert(file, tmp_path / "again.npz", to="mmdet", name="mask")
    assert (done.layout.name, done.differences) == ("mmdet_rcnn", ())
    with pytest.raises(WeightsError, match="this model cannot be written as torchvision"):
        convert(file, tmp_path / "other.npz", to="torchvision", name="mask")
