"""Detectors in use: images of any size, boxes in their pixels, results as files, runs and published weights."""

import dataclasses
import json
import types
from pathlib import Path

import detr_references
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import toy_detection
from PIL import Image
from toy import write_npz

import eqvision.predict_objects as module
from eqvision import cli
from eqvision.checkpoint import Checkpoints, Record
from eqvision.data.detection import COCO_STUFF, COCO_THINGS, coco_category_ids, coco_class_names, decode_masks
from eqvision.mesh import make_mesh
from eqvision.metrics import CocoMetric
from eqvision.optim import make_optimizer, make_schedule
from eqvision.predict_objects import (
    DetectorRun,
    coco_results,
    draw_found,
    evaluate_detector_run,
    file_mask,
    find_objects,
    load_detector_run,
    write_results,
)
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.problems.detection import Detection, DetectionEvaluation, build_detector
from eqvision.published_detector import load_published_detector
from eqvision.recipes import DetectionConfig, DetectionDataConfig, DetectorConfig
from eqvision.run_folder import RunFolder, RunFolderError
from eqvision.state import first_state
from eqvision.train import train
from eqvision.types import SetPredictions
from eqvision.zoo import DETECTORS

NAMES = tuple("0123456789")


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """What the command prints on standard error when it ends with code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


# A detector that is known to be right


class Finder(eqx.Module):
    """Says where the light pixels are: one object for certain, and the whole image with less certainty."""

    shapes: list = eqx.field(static=True)  # of the batches that it was traced for

    def __call__(self, inputs, state, *, train=False, key=None):
        images, size = inputs
        self.shapes.append(images.shape)
        light, extent = images.mean(axis=-1) > 0.8, size.astype(jnp.float32)
        sides = []
        for axis, length in ((1, extent[:, 1]), (2, extent[:, 0])):  # x, then y
            seen = light.any(axis=axis)
            first = jnp.argmax(seen, axis=1)
            end = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
            sides.append(((first + end) / 2 / length, (end - first) / length))
        (cx, w), (cy, h) = sides
        box = jnp.stack([cx, cy, w, h], axis=-1)
        boxes = jnp.stack([box, jnp.broadcast_to(jnp.array([0.5, 0.5, 1.0, 1.0]), box.shape)], axis=1)
        logits = jnp.broadcast_to(jnp.array([[-9.0, 4.0, -9.0], [0.0, -9.0, -9.0]]), (len(images), 2, 3))
        return SetPredictions(logits[None], boxes[None]), state


def finder(**data) -> DetectorRun:
    options = {"mean": (0.0,), "std": (1.0,), **data}
    config = DetectionConfig(model=DetectorConfig(in_channels=3), data=DetectionDataConfig(**options))
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, classification="sigmoid"))
    model, state = eqx.nn.make_with_state(lambda: Finder([]))()
    return DetectorRun(config, ("cat", "dog", "bird"), model, state, 0)


def picture(file: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """A black image, height and width ``size``, with a white box."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(file)
    return file


SHAPES = {"a.png": (60, 100), "b.png": (120, 50), "c.png": (60, 100), "d.png": (30, 30), "e.png": (75, 125)}
BOXES = {name: (width // 5, height // 3, width // 2, height * 3 // 4) for name, (height, width) in SHAPES.items()}
PLANS = {
    "fixed": ({"transform": "fixed", "size": (96, 64)}, {(96, 64)}),
    "lsj": ({"transform": "lsj", "size": (96, 96)}, {(96, 96)}),
    "detr": ({"transform": "detr", "size": (160, 160), "scales": (64,), "longest": 150}, {(64, 160), (160, 64)}),
}


@pytest.fixture
def pictures(tmp_path):
    return [picture(tmp_path / name, size, BOXES[name]) for name, size in SHAPES.items()]


@pytest.mark.parametrize("plan", PLANS)
def test_boxes_are_in_pixels_of_files_of_any_size(plan, pictures):
    data, shapes = PLANS[plan]
    run = finder(**data)
    found = find_objects(run, pictures, threshold=0.4)
    assert [each.path for each in found] == pictures
    for each in found:
        assert each.size == SHAPES[each.path.name]
        assert each.names == ("dog", "cat")
        height, width = each.size
        np.testing.assert_allclose(each.boxes[0], BOXES[each.path.name], atol=1 + max(each.size) / 64)
        np.testing.assert_allclose(each.boxes[1], (0, 0, width, height), atol=1e-3)
        np.testing.assert_allclose(each.scores, (1 / (1 + np.exp(-4.0)), 0.5), rtol=1e-6)
    assert {shape[1:3] for shape in run.model.shapes} == shapes


def test_a_program_is_compiled_for_each_shape_and_not_for_each_image(pictures):
    run = finder(**PLANS["detr"][0])
    find_objects(run, pictures)
    find_objects(run, pictures[:2])
    assert sorted(run.model.shapes) == [(1, 64, 160, 3), (1, 160, 64, 3)]
    one = finder(**PLANS["lsj"][0])
    find_objects(one, pictures * 3)  # 15: one whole batch and one that is filled
    assert one.model.shapes == [(8, 96, 96, 3)]


def test_an_image_too_long_for_every_bucket_gets_a_shape_of_its_own(tmp_path):
    run = finder(transform="detr", size=(96, 96), scales=(64,), longest=96)
    long = picture(tmp_path / "long.png", (3, 300), (100, 1, 200, 2))
    assert find_objects(run, [long])[0].size == (3, 300)
    assert run.model.shapes == [(1, 32, 128, 3)]  # 1x100: no bucket, as rounding made it longer than ``longest``


@pytest.mark.parametrize("size", [1, 2, 5])
def test_results_do_not_depend_on_the_batch(size, pictures):
    run = finder(**PLANS["lsj"][0])
    for one, other in zip(find_objects(run, pictures), find_objects(run, pictures, batch_size=size), strict=True):
        assert one.path == other.path
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-6)


def test_threshold_and_top(pictures):
    run = finder(**PLANS["lsj"][0])
    counts = {
        limits: len(find_objects(run, pictures[:1], threshold=limits[0], top=limits[1])[0].names)
        for limits in ((0.0, None), (0.0, 3), (0.4, None), (0.6, None), (0.99, None))
    }
    assert counts == {(0.0, None): 6, (0.0, 3): 3, (0.4, None): 2, (0.6, None): 1, (0.99, None): 0}
    nothing = find_objects(run, pictures[:1], threshold=0.99)[0]
    assert nothing.boxes.shape == (0, 4)
    assert nothing.best == pytest.approx(0.982, abs=1e-3)


def test_an_upright_image_is_seen_and_drawn(tmp_path):
    """A camera held on its side: the file is 100 wide and 60 high, the image upright the other way round."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[10:30, 20:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    run = finder(**PLANS["lsj"][0])
    found = find_objects(run, [tmp_path / "turned.png"], threshold=0.9)[0]
    assert found.size == (100, 60)
    np.testing.assert_allclose(found.boxes[0], (30, 20, 50, 50), atol=2)
    with Image.open(draw_found(run, found, tmp_path / "out")) as drawn:
        assert drawn.size == (60 * 4, 100 * 4)  # enlarged to a longer side of 320 or more
        assert drawn.getpixel((40 * 4, 35 * 4)) == (255, 255, 255)
        assert drawn.getpixel((10 * 4, 80 * 4)) == (0, 0, 0)


def test_what_does_not_fit_is_refused(pictures, tmp_path):
    run = finder(**PLANS["lsj"][0])
    for limits in ({"threshold": 1.5}, {"threshold": -0.1}, {"top": 0}):
        with pytest.raises(ValueError, match="expected a score of 0 to 1, and 1 object or more"):
            find_objects(run, pictures, **limits)
    with pytest.raises(FileNotFoundError, match=r"no image file at .*gone\.png"):
        find_objects(run, [*pictures, tmp_path / "gone.png"])
    assert run.model.shapes == []
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"corrupt image .*text\.png"):
        find_objects(run, [tmp_path / "text.png"])


# Results


def test_results_in_coco_form(pictures, tmp_path):
    run = finder(**PLANS["lsj"][0])
    found = find_objects(run, pictures, threshold=0.9)
    file = write_results(run, found, tmp_path / "new" / "found.json")
    results = json.loads(file.read_text())
    assert results == coco_results(run, found)
    assert [each["image_id"] for each in results] == [1, 2, 3, 4, 5]
    assert [each["file_name"] for each in results] == [str(path) for path in pictures]
    x, y, width, height = results[0]["bbox"]
    np.testing.assert_allclose((x, y, x + width, y + height), found[0].boxes[0], atol=0.02)
    assert {(each["category_id"], each["category_name"]) for each in results} == {(1, "dog")}


def test_images_named_by_numbers_have_these_as_ids(tmp_path):
    run = finder(**PLANS["lsj"][0])
    files = [picture(tmp_path / f"{number:012}.png", (40, 40), (5, 5, 9, 9)) for number in (139, 7)]
    assert [each["image_id"] for each in coco_results(run, find_objects(run, files, threshold=0.9))] == [139, 7]


@pytest.mark.parametrize(("count", "label", "name"), [(80, 14, "bird"), (90, 15, "bird"), (91, 16, "bird")])
def test_classes_of_coco_have_its_ids(count, label, name, pictures):
    run = finder(**PLANS["lsj"][0])
    names = coco_class_names(count)
    assert names[label] == name
    assert coco_category_ids(count)[label] == 16
    found = find_objects(run, pictures[:1], threshold=0.9)[0]._replace(labels=np.array([label], np.int32))
    assert coco_results(run._replace(class_names=names), [found])[0]["category_id"] == 16


def test_names_of_cocos_classes():
    assert len(COCO_THINGS) == 80
    assert len(COCO_STUFF) == 53
    assert (COCO_THINGS[1], COCO_THINGS[90], COCO_STUFF[92], COCO_STUFF[200]) == (
        "person", "toothbrush", "banner", "rug-merged"
    )  # fmt: skip
    assert coco_class_names(91)[:2] == ("unused 0", "person")
    assert coco_class_names(250)[200] == "rug-merged"
    assert coco_class_names(5) == coco_category_ids(5) == ()


def test_a_mask_is_brought_to_its_file():
    logits = np.full((16, 16), -1.0, np.float32)
    logits[4:8, 2:6] = 1.0  # rows 4 to 8 and columns 2 to 6, of 16 in a padded image of 64
    mask = file_mask(logits, padded=(64, 64), resized=(48, 32), size=(96, 64))
    assert mask.shape == (96, 64)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    np.testing.assert_allclose((rows[0], rows[-1] + 1, columns[0], columns[-1] + 1), (32, 64, 16, 48), atol=2)


# Runs


def open_folder(path: Path, num_classes: int) -> DetectionConfig:
    """A run folder of the toy detector without a checkpoint."""
    config = toy_detection.toy_config(path)
    RunFolder(config.out).open_for_training(config, NAMES, num_classes)
    return config


@pytest.fixture
def folder(tmp_path):
    open_folder(tmp_path / "run", 10)
    return tmp_path / "run"


def test_a_run_by_the_command_line(folder, pictures, monkeypatch, capsys):
    run = finder(**PLANS["lsj"][0])
    monkeypatch.setattr(module, "load_detector_run", lambda path: run)
    cli.main(["predict", str(folder), *map(str, pictures), "--threshold", "0.1", "--json", "found/all.json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * 3 + 1
    for place, each in enumerate(find_objects(run, pictures, threshold=0.1)):
        head, *objects = lines[3 * place : 3 * place + 3]
        assert head == f"{each.path}: 2 objects of score 0.1 or more  -> {folder / 'predictions' / each.path.stem}.png"
        for text, name, score, box in zip(objects, each.names, each.scores, each.boxes, strict=True):
            shown_name, shown_score, word, *sides = text.split()
            assert (shown_name, word) == (name, "xyxy")
            assert float(shown_score) == pytest.approx(float(score), abs=6e-4)
            np.testing.assert_allclose([float(side) for side in sides], box, atol=0.06)
    assert lines[-1] == "COCO results of 5 images -> found/all.json"
    assert len(json.loads(Path("found/all.json").read_text())) == 10
    with Image.open(folder / "predictions" / "a.png") as drawn:
        assert drawn.size == (400, 240)  # 100x60, enlarged to a longer side of 320 or more
    cli.main(["predict", str(folder), str(pictures[0]), "--top", "1", "--threshold", "0.99", "--out", "pictures"])
    expected = f"{pictures[0]}: 0 objects of score 0.99 or more (the best has 0.982)  -> pictures/a.png\n"
    assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_a_checkpoint_is_restored_and_used(tmp_path, monkeypatch):
    toy_detection.install(monkeypatch)
    config = open_folder(tmp_path / "run", 12)
    with pytest.raises(RunFolderError, match="holds no checkpoint yet"):
        load_detector_run(tmp_path / "run")
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, config.optimizer.learning_rate, 6))
    state = first_state(*build_detector(config, 12), config, optimizer, make_mesh(num_devices=1))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, Record(3))
    run = load_detector_run(tmp_path / "run")
    assert run.step == 3
    assert run.class_names == (*NAMES, "class 10", "class 11")  # the model has more outputs than the data classes
    np.testing.assert_array_equal(run.model.head.classes.bias, state.model.head.classes.bias)
    Image.fromarray(toy_detection.Scenes("test")[0].image[..., 0]).resize((96, 72)).save(tmp_path / "scene.png")
    found = find_objects(run, [tmp_path / "scene.png"], threshold=0)[0]
    assert found.size == (72, 96)
    assert found.boxes.shape == (6 * 12, 4)


def test_refused_by_the_command_line(folder, capsys):
    message = refused(capsys, "predict", str(folder), "a.png", "--weights", "x")
    assert f"--weights x is for models of the zoo; the run {folder} has its own" in message
    assert "name at least one image" in refused(capsys, "predict", str(folder))
    assert "--batch-size 0; expected 1 or more" in refused(capsys, "predict", str(folder), "a.png", "--batch-size", "0")
    message = refused(capsys, "eval", str(folder), "--evaluator", "knn", "few_shot")
    assert f"--evaluator knn few_shot is for classifiers, and {folder} is a detector" in message
    message = refused(capsys, "eval", "detr_r50", "--data-path", "x")
    assert "detr_r50 is a detector, and published weights are evaluated for classifiers only" in message
    message = refused(capsys, "viz", "attention", str(folder), "x.png")
    assert f"{folder} is a run of the detector toy_deformable, and this takes runs of image classifiers" in message
    message = refused(capsys, "predict", "resnet18", "x.png", "--threshold", "0.5")
    assert "--threshold 0.5 is for detectors, and resnet18 is a classifier" in message
    message = refused(capsys, "predict", "detr_r5", "x.png")
    assert "detr_r5 is no run folder, and model 'detr_r5' does not exist; nearest: detr_r50" in message


def test_a_classifiers_run_is_no_detectors(tmp_path):
    from toy import toy_config

    config = toy_config(tmp_path / "run", write_npz(tmp_path / "toy.npz"))
    RunFolder(config.out).open_for_training(config, ("a", "b", "c"), 3)
    with pytest.raises(RunFolderError, match="is a run of the classifier small_cnn, and this takes detectors"):
        load_detector_run(tmp_path / "run")


def test_a_run_of_an_unknown_kind_is_refused(folder, tmp_path):
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text().replace("kind: detection", "kind: new"))
    with pytest.raises(RunFolderError, match="is of a run of kind 'new'; this version has classification, detection"):
        RunFolder(tmp_path).config()


def test_other_classes_are_not_evaluated(folder, monkeypatch):
    run, scenes = finder(), types.SimpleNamespace(class_names=tuple("abcdefghij"))
    monkeypatch.setattr(module, "load_detector_run", lambda path: run)
    monkeypatch.setattr(module, "load_detection", lambda data, in_channels, split, *, masks: scenes)
    expected = "coco, split val, has the classes a, b, c, d, e, which the run does not have; it has 0, 1, 2, 3, 4 "
    with pytest.raises(ValueError, match=expected):
        evaluate_detector_run(folder)


def test_classes_elsewhere_are_those_of_the_same_names(folder, tmp_path, monkeypatch):
    """A file that numbers two of the run's classes otherwise."""
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    boxes = [
        {"id": number, "image_id": 1, "category_id": category, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
        for number, category in ((1, 40), (2, 30))
    ]
    categories = [{"id": 30, "name": "7"}, {"id": 40, "name": "2"}]
    picture(tmp_path / "a.png", (20, 30), (1, 2, 4, 6))
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"images": [image], "annotations": boxes, "categories": categories}))
    seen = []

    def evaluator(self, mesh):
        seen.append(self.source)
        return lambda model, stats: DetectionEvaluation({"AP": 0.5}, CocoMetric(NAMES), ())

    run = finder()
    monkeypatch.setattr(module, "load_detector_run", lambda path: run)
    monkeypatch.setattr(Detection, "evaluator", evaluator)
    assert evaluate_detector_run(folder, data_path=str(file)) == {"test/AP": 0.5}
    assert seen[0].class_names == NAMES
    assert seen[0].truth(0).labels.tolist() == [2, 7]


@pytest.mark.slow
def test_a_trained_run_is_evaluated_as_it_was_in_training(tmp_path, monkeypatch, capsys):
    """And predictions on files are what the evaluation found in the same images."""
    pytest.importorskip("faster_coco_eval")
    toy_detection.install(monkeypatch)
    asked = []

    def load(data, in_channels, split, *, masks):
        assert not masks
        asked.append((data.kind, data.path, split))
        return toy_detection.Scenes(split)

    monkeypatch.setattr(module, "load_detection", load)
    monkeypatch.setattr(module, "make_mesh", lambda: make_mesh(num_devices=8))
    config = toy_detection.toy_config(tmp_path / "run")
    loop = dataclasses.replace(config.loop, epochs=2 / 3, eval_every=2, eval_batch_size=3)
    metrics = train(dataclasses.replace(config, loop=loop)).metrics
    cli.main(["eval", str(tmp_path / "run")])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == {f"test/{name}" for name in metrics}
    assert len(printed) == 13
    for name, value in metrics.items():
        assert float(printed[f"test/{name}"]) == pytest.approx(value, abs=1e-3, nan_ok=True)
    cli.main(["eval", str(tmp_path / "run"), "--split", "train", "--data-path", "boxes.json"])
    assert asked == [("digits", "", "test"), ("coco", "boxes.json", "train")]
    assert capsys.readouterr().out.startswith("test/loss ")
    _assert_files_are_seen_as_in_evaluation(config, tmp_path)


def _assert_files_are_seen_as_in_evaluation(config, tmp_path):
    scenes = toy_detection.Scenes("test")
    Image.fromarray(scenes[0].image[..., 0]).save(tmp_path / "scene.png")
    loaded = load_detector_run(tmp_path / "run")
    problem = toy_detection.toy_problem(config, test=scenes)
    evaluation = problem.evaluator(make_mesh(num_devices=1))(loaded.model, loaded.stats)
    sample = next(each for each in evaluation.samples if each.index == 0)
    found = find_objects(loaded, [tmp_path / "scene.png"], threshold=0)[0]
    np.testing.assert_allclose(found.scores, sample.found.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes[:3], sample.found.boxes[:3], atol=1e-3)


# Published weights


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Random weights of toys in files as published."""
    for name, row in detr_references.TOYS.items():
        monkeypatch.setitem(DETECTORS, name, row)

    def write(name: str, layout: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        np.savez(folder / "weights.npz", **to_layout(*detr_references.made(name), LAYOUTS[layout]))
        return folder / "weights.npz"

    return write


@pytest.mark.slow
def test_published_weights_by_the_command_line(published, tmp_path, capsys):
    file = published("toy_detr", "facebook_detr")
    image = picture(tmp_path / "image.png", (40, 60), (10, 10, 30, 30))
    options = ["--weights", str(file), "--image-size", "64", "--threshold", "0", "--top", "1"]
    cli.main(["predict", "toy_detr", str(image), *options])
    printed = capsys.readouterr()
    assert "images are prepared as DETR's are: shorter side 64, longer at most 107" in printed.err
    assert printed.out.startswith(f"{image}: 1 object of score 0 or more  -> predictions/toy_detr/image.png\n  class ")
    assert Path("predictions/toy_detr/image.png").exists()


@pytest.mark.slow
def test_masks_of_published_weights_are_drawn(published, tmp_path):
    file = published("toy_detr_panoptic", "facebook_detr_panoptic")
    run = load_published_detector("toy_detr_panoptic", file, image_size=64)
    assert run.config.task.classification == "softmax"
    found = find_objects(run, [picture(tmp_path / "image.png", (40, 60), (10, 10, 30, 30))], threshold=0, top=3)[0]
    assert found.masks is not None
    assert [mask.size for mask in found.masks] == [(40, 60)] * 3
    drawn = np.asarray(Image.open(draw_found(run, found, tmp_path / "out")))
    plain = np.asarray(Image.open(draw_found(run, found._replace(masks=None), tmp_path / "out")))
    assert (drawn != plain).any(axis=-1).mean() > 0.5 * np.mean(np.any(decode_masks(found.masks, 40, 60), axis=0)) > 0


def test_preparation_and_names_lie_beside_the_weights(published, capsys):
    file = published("toy_detr", "facebook_detr")
    names = {str(number): name for number, name in enumerate(("ant", "bee", "cat", "dog", "elk"))}
    (file.parent / "config.json").write_text(json.dumps({"id2label": names}))
    config = {"size": {"shortest_edge": 96, "longest_edge": 128}, "image_mean": [0.5], "image_std": [0.25]}
    beside = file.parent / "preprocessor_config.json"
    beside.write_text(json.dumps(config))
    run = load_published_detector("toy_detr", file)
    data = run.config.data
    assert run.class_names == ("ant", "bee", "cat", "dog", "elk")
    assert (data.transform, data.scales, data.longest, data.mean, data.std) == ("detr", (96,), 128, (0.5,), (0.25,))
    assert f"images are prepared by {beside}: shorter side 96, longer at most 128" in capsys.readouterr().err
    beside.write_text(json.dumps({"size": {"height": 64, "width": 96}, "do_normalize": False}))
    data = load_published_detector("toy_detr", file).config.data
    assert (data.transform, data.size, data.mean, data.std) == ("fixed", (64, 96), (0.0,), (1.0,))
    beside.write_text(json.dumps({"size": 480, "max_size": 800}))
    data = load_published_detector("toy_detr", file).config.data
    assert (data.scales, data.longest, data.size) == ((480,), 800, (800, 800))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"do_resize": False}, "do_resize and do_rescale must be true"), ({"size": "large"}, "size is 'large'; expected")],
)
def test_preparation_that_is_not_known_is_refused(config, message, published):
    file = published("toy_detr", "facebook_detr")
    (file.parent / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        load_published_detector("toy_detr", file)


def test_sizes_and_names_that_do_not_fit_are_refused(published):
    file = published("toy_detr", "facebook_detr")
    with pytest.raises(ValueError, match="image_size=8; expected the length of the shorter side in pixels, 32 or more"):
        load_published_detector("toy_detr", file, image_size=8)
    with pytest.raises(ValueError, match="resnet18 is an image classifier"):
        load_published_detector("resnet18", file)
