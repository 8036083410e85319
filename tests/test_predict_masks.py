"""Masks that are found: at the size of the file, drawn, and written as COCO's run lengths."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, annotation, content, image_row, write_set
from detection_boards import board
from PIL import Image

import eqvision.predict_objects as module
from eqvision import cli
from eqvision.data.detection import (
    CocoDetection,
    CompressedRLE,
    DetectionExample,
    UncompressedRLE,
    crops_in_boxes,
    decode_mask,
)
from eqvision.data.detection.collate import Collate
from eqvision.detection_pictures import class_color, draw_objects
from eqvision.detectors.rcnn_dialects import DETECTRON2, TORCHVISION, RCNNDialect
from eqvision.drawn import DecodedMasks, drawn_found, drawn_truth, target_masks
from eqvision.losses import DETECTRON2_LOSS
from eqvision.ops import paste_mask
from eqvision.predict_objects import DetectorRun, draw_found, find_objects
from eqvision.recipes import DetectionConfig, DetectionDataConfig, DetectorConfig
from eqvision.run_folder import RunFolder
from eqvision.types import Detections

SIDE = 14
RING = np.pad(np.zeros((6, 6), np.float32), 4, constant_values=1.0)


class RingFinder(eqx.Module):
    """Finds one ring where it is told to, and a second of low score; what an R-CNN gives."""

    box: tuple[float, ...] = eqx.field(static=True)  # shares of the image
    dialect: RCNNDialect = eqx.field(static=True)

    def __call__(self, inputs, state, *, train=False, key=None):
        extent = jnp.tile(inputs.size[:, ::-1].astype(jnp.float32), 2)
        boxes = jnp.stack([extent * jnp.array(self.box), extent * 0], axis=1)
        rows = boxes.shape[:2]
        scores = jnp.broadcast_to(jnp.array([0.9, 0.0]), rows)
        labels, valid = jnp.zeros(rows, jnp.int32), jnp.broadcast_to(jnp.array([True, False]), rows)
        masks = jnp.broadcast_to(jnp.asarray(RING), (*rows, SIDE, SIDE))
        return Detections(boxes, scores, labels, valid, masks), state


def ring_run(dialect=DETECTRON2, box=(0.25, 0.125, 0.75, 0.625)):
    data = DetectionDataConfig(transform="lsj", size=(64, 64), mean=(0.0,), std=(1.0,))
    config = DetectionConfig(model=DetectorConfig(in_channels=3), task=DETECTRON2_LOSS, data=data)
    model, state = eqx.nn.make_with_state(lambda: RingFinder(box, dialect))()
    return DetectorRun(config, ("ring", "other"), model, state, 0)


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.full((48, 80, 3), 60, np.uint8)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


@pytest.mark.parametrize("dialect", [DETECTRON2, TORCHVISION], ids=lambda dialect: dialect.name)
def test_masks_in_boxes_are_pasted_at_the_size_of_the_file(dialect, image):
    found = find_objects(ring_run(dialect), [image])[0]
    assert (found.size, found.names, len(found.masks)) == ((48, 80), ("ring",), 1)
    np.testing.assert_allclose(found.boxes, [[20, 6, 60, 30]], rtol=1e-6)
    mask = decode_mask(found.masks[0], 48, 80)
    np.testing.assert_array_equal(mask, paste_mask(RING, found.boxes[0], (48, 80), rule=dialect.paste))
    assert mask.any()
    assert not mask[16:20, 36:44].any()  # the hole


def test_masks_are_drawn_and_written(image, tmp_path, monkeypatch, capsys):
    run = ring_run()
    RunFolder(tmp_path / "run").open_for_training(dataclasses.replace(run.config, out=str(tmp_path / "run")), ("a",), 1)
    monkeypatch.setattr(module, "load_detector_run", lambda path: run)
    monkeypatch.chdir(tmp_path)
    cli.main(["predict", str(tmp_path / "run"), str(image), "--json", "found.json"])
    assert "1 object of score 0.4 or more" in capsys.readouterr().out
    (result,) = json.loads(Path("found.json").read_text())
    assert result["bbox"] == [20, 6, 40, 24]
    code = result["segmentation"]
    assert code["size"] == [48, 80]
    mask = decode_mask(CompressedRLE((48, 80), code["counts"].encode()), 48, 80)
    found = find_objects(run, [image])[0]
    np.testing.assert_array_equal(mask, decode_mask(found.masks[0], 48, 80))
    with Image.open(tmp_path / "run" / "predictions" / "grey.png") as opened:
        pixels = np.asarray(opened)[::4, ::4].astype(float)  # enlarged four times
    filled = 0.55 * 60 + 0.45 * np.array(class_color(0))
    np.testing.assert_allclose(pixels[28, 30], filled, atol=1)
    np.testing.assert_allclose(pixels[18, 40], 60, atol=1)  # the hole
    plain = np.asarray(Image.open(draw_found(run, found._replace(masks=None), tmp_path)))
    assert (plain[112, 120] == 60).all()


def test_masks_of_a_single_class_have_colours_and_outlines_of_their_own():
    masks = np.zeros((3, 40, 40), np.uint8)
    masks[0, 5:15, 5:15] = masks[1, 5:15, 20:30] = 1  # the third covers nothing
    boxes = np.array([[5, 5, 15, 15], [20, 5, 30, 15], [1, 30, 1, 30]])
    objects = drawn_found(
        Detections(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, int), np.ones(3, bool)), (40, 40)
    )._replace(masks=list(masks))
    image = np.zeros((40, 40, 3), np.uint8)
    alone = draw_objects(image, objects, ("nucleus",))
    both = draw_objects(image, objects, ("nucleus", "other"))
    factor = len(alone) // 40
    for x, own in ((10, 0), (25, 1)):
        color = np.array(class_color(own))
        np.testing.assert_allclose(alone[10 * factor, x * factor], 0.45 * color, atol=1)
        np.testing.assert_allclose(both[10 * factor, x * factor], 0.45 * np.array(class_color(0)), atol=1)
        np.testing.assert_array_equal(alone[10 * factor, (x + 5) * factor - 1], color)  # outline
    plates = [(np.abs(each.astype(int)).sum(axis=-1) > 0).sum() for each in (alone, both)]
    assert plates[0] < plates[1]  # scores only


def test_plates_of_very_many_objects_are_left_out():
    boxes = np.tile([[4, 4, 30, 30]], (31, 1))
    found = Detections(boxes, np.linspace(0.5, 0.9, 31), np.zeros(31, int), np.ones(31, bool))
    image = np.zeros((320, 320, 3), np.uint8)
    many = draw_objects(image, drawn_found(found, (320, 320)), ("a",))
    few = draw_objects(image, drawn_found(found, (320, 320), least_score=0.55), ("a",))
    assert not many[:, 40:].any()
    assert few[:, 40:].any()


# What pictures are made from


def test_truth_and_detections_with_masks(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:9, 5:20] = 1
    runs = np.diff(np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0)), prepend=0, append=mask.size).tolist()
    rows = [annotation(1, 10, box=(5, 3, 15, 6), segmentation={"size": [HEIGHT, WIDTH], "counts": runs})]
    write_set(tmp_path, content([image_row(10)], rows))
    truth = CocoDetection(tmp_path, "train").truth(0)
    drawn = drawn_truth(truth, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(drawn.masks[0], mask)
    assert drawn_truth(truth._replace(segmentations=(None,)), (HEIGHT, WIDTH)).masks is None
    small = crops_in_boxes(mask[None], truth.boxes, 7).astype(np.float32)
    boxes, scores = np.repeat(truth.boxes, 3, axis=0).astype(np.float32), np.array([0.9, 0.8, 0.1], np.float32)
    found = Detections(boxes, scores, np.array([2, 1, 0]), np.array([True, False, True]), np.repeat(small, 3, axis=0))
    kept = drawn_found(found, (HEIGHT, WIDTH), paste="detectron2", least_score=0.4)
    assert kept.labels.tolist() == [2]
    np.testing.assert_array_equal(kept.masks[0], mask)
    assert drawn_found(found, (HEIGHT, WIDTH)).masks is None


def test_masks_are_made_when_asked_for():
    codes = [UncompressedRLE((2, 3), np.array([1, 2, 3])), UncompressedRLE((2, 3), np.array([0, 6])), None]
    masks = DecodedMasks(codes, (2, 3))
    assert len(masks) == 3
    np.testing.assert_array_equal(masks[0], [[0, 1, 0], [1, 0, 0]])
    assert [int(mask.sum()) for mask in masks] == [2, 6, 0]
    assert [int(mask.sum()) for mask in masks[1:]] == [6, 0]


@pytest.mark.parametrize("crop", [None, 12])
def test_targets_are_drawn_as_the_model_gets_them(crop):
    example: DetectionExample = board(24, 32, [(4, 4, 16, 16), (20, 2, 32, 14)])
    collate = Collate(max_objects=4, masks=True, mask_crop=crop, describe=str)
    targets = collate([example], 1, (32, 40), 3).targets
    masks = target_masks(targets, 0, (32, 40))
    expected = np.pad(example.masks, ((0, 0), (0, 8), (0, 8)))
    np.testing.assert_array_equal(masks, expected)
    assert target_masks(targets._replace(masks=None, frames=None), 0, (32, 40)) is None
