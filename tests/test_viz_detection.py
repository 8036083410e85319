"""Pictures of detection batches: they show what the stream gives, with its boxes, and padding as padding."""

import dataclasses

import numpy as np
import pytest
import toy_detection
from PIL import Image

import eqvision.detection_pictures as pictures_module
import eqvision.train as train_module
import eqvision.viz_detection as viz_module
from eqvision import cli
from eqvision.detection_pictures import draw_samples
from eqvision.mesh import make_mesh
from eqvision.train import set_up
from eqvision.viz_detection import (
    TargetObjects,
    TrainingObjects,
    detection_batch,
    draw_detection_batch,
    smaller,
    striped,
)

NAMES = tuple("0123456789")


@pytest.fixture
def config(tmp_path, monkeypatch):
    toy_detection.install(monkeypatch)
    return toy_detection.toy_config(tmp_path / "run")


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_the_batch_is_that_of_the_stream_with_its_valid_objects(config):
    jittered = with_data(config, transform="lsj")
    batch = detection_batch(jittered, step=3, count=5)
    setup = set_up(jittered)
    stream = setup.problem.stream(2)
    expected = next(stream)
    stream.close()
    np.testing.assert_array_equal(batch.images, expected.images[:5])
    np.testing.assert_array_equal(batch.sizes, expected.size[:5])
    np.testing.assert_array_equal(batch.indices, expected.indices[:5])
    assert (batch.size, batch.class_names) == (8, NAMES)
    assert batch.descriptions[0] == setup.problem.source.describe(int(expected.indices[0]))
    assert len({tuple(size) for size in batch.sizes}) > 1
    for row, objects in enumerate(batch.objects):
        valid = expected.targets.valid[row]
        assert valid.sum() == len(objects.labels)
        np.testing.assert_array_equal(objects.boxes, expected.targets.boxes[row][valid])
        np.testing.assert_array_equal(objects.labels, expected.targets.labels[row][valid])


def test_other_steps_have_other_images_and_all_rows_are_enough(config):
    first, second = (detection_batch(config, step=step, count=99) for step in (1, 2))
    assert len(first.images) == len(first.objects) == 8
    assert not np.array_equal(first.indices, second.indices)


@pytest.mark.parametrize("place", [{"step": 0, "count": 1}, {"step": 1, "count": 0}])
def test_steps_and_counts_begin_with_1(place, config):
    with pytest.raises(ValueError, match="steps are counted from 1, and at least one image is drawn"):
        detection_batch(config, **place)


def test_padding_is_striped_and_the_image_is_not():
    image = np.arange(40 * 60 * 3, dtype=np.uint64).reshape(40, 60, 3).astype(np.uint8)
    shown = striped(image, 25, 32)
    np.testing.assert_array_equal(shown[:25, :32], image[:25, :32])
    assert set(np.unique(shown[25:])) == set(np.unique(shown[:, 32:])) == {150, 190}
    np.testing.assert_array_equal(striped(image, 40, 60), image)
    assert image[30, 40, 0] == (30 * 60 + 40) * 3 % 256  # the batch itself is left alone


def test_large_images_are_drawn_smaller_with_their_boxes():
    image = np.zeros((400, 1280, 3), np.uint8)
    image[100:300, 640:960] = 255
    shown, factor = smaller(image)
    assert (shown.shape, factor) == ((200, 640, 3), 0.5)
    assert shown[60:140, 330:470].min() == 255
    assert smaller(image[:, :640])[1] == 1.0
    assert smaller(image[..., :1])[0].shape == (200, 640, 1)


def some_batch(**changes) -> TrainingObjects:
    """Two grey images of which the second is padded; the first has one box."""
    images = np.full((2, 80, 160, 1), 100, np.uint8)
    box = TargetObjects(np.array([[20, 10, 60, 50]], np.float32), np.array([3], np.int32))
    nothing = TargetObjects(np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    batch = TrainingObjects(
        images=images,
        sizes=np.array([[80, 160], [40, 50]], np.int32),
        objects=(box, nothing),
        weights=np.array([1.0, 0.0], np.float32),
        indices=np.array([4, 9], np.int32),
        class_names=NAMES,
        descriptions=("four", "nine"),
        size=8,
    )
    return batch._replace(**changes)


def test_titles_say_sizes_objects_and_weights(tmp_path, monkeypatch):
    drawn = []

    def draw(samples, names, path, **options):
        drawn.append((samples, options))
        return path

    monkeypatch.setattr(viz_module, "draw_samples", draw)
    draw_detection_batch(some_batch(), tmp_path / "batch.png", "the title")
    samples, options = drawn[0]
    assert [sample.title for sample in samples] == [
        "four: 80x160, 1 object", "nine: 40x50 in 80x160, 0 objects, weight 0"
    ]  # fmt: skip
    assert options == {"columns": 2, "title": "the title"}
    np.testing.assert_array_equal(samples[0].objects.boxes, [[20, 10, 60, 50]])


def test_boxes_are_drawn_where_the_targets_are(tmp_path):
    path = draw_detection_batch(some_batch(), tmp_path / "new" / "batch.png", "recipe: 2 of 8\ntransform lsj")
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
    color = np.array(pictures_module.class_color(3))
    _, columns = np.nonzero((pixels == color).all(axis=-1))
    # Two times enlarged: 40 x 40 become 80 x 80 pixels, and the plate with the name above.
    assert columns.max() - columns.min() == 80
    sides = np.flatnonzero((pixels == color).all(axis=-1).sum(axis=0) > 60)
    assert set(np.diff(sides)) <= {1, sides[-1] - sides[0] - 2}
    assert (pixels == 150).all(axis=-1).any()  # stripes
    assert (pixels == 190).all(axis=-1).any()


def test_masks_of_large_images_shrink_with_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(viz_module, "draw_samples", lambda samples, names, path, **_: drawn.extend(samples) or path)
    mask = np.zeros((400, 1280), np.uint8)
    mask[100:300, 640:960] = 1
    objects = TargetObjects(np.array([[640, 100, 960, 300]], np.float32), np.array([3], np.int32), [mask])
    batch = some_batch(images=np.zeros((1, 400, 1280, 1), np.uint8), sizes=np.array([[400, 1280]]), objects=(objects,))
    draw_detection_batch(batch, tmp_path / "batch.png", "")
    (shown,) = drawn[0].objects.masks
    assert shown.shape == drawn[0].image.shape[:2] == (200, 640)
    rows, columns = np.nonzero(shown)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 149, 320, 479)


def test_a_title_stands_above_the_sheet_and_is_wrapped(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    nothing = pictures_module.DrawnObjects(np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    samples = [pictures_module.Sample(image, nothing)]
    heights = []
    for number, title in enumerate(("", "short", "two\nlines", "many words " * 10)):
        path = draw_samples(samples, NAMES, tmp_path / f"{number}.png", title=title)
        with Image.open(path) as opened:
            heights.append(opened.height)
            pixels = np.asarray(opened)
    assert heights[0] < heights[1] < heights[2] < heights[3]
    assert heights[2] - heights[1] == 26
    assert (pixels[:, -3:] == 255).all()  # nothing runs over the edge


def test_by_the_command_line(tmp_path, monkeypatch, capsys):
    titles = []
    draw = viz_module.draw_detection_batch
    monkeypatch.setattr(viz_module, "draw_detection_batch", lambda *given: titles.append(given[2]) or draw(*given))
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=1))
    monkeypatch.chdir(tmp_path)
    options = ["--data.length", "16", "--data.transform", "lsj", "--loop.batch-size", "4", "--data.color-jitter", "0.2"]
    cli.main(["viz", "data", "digits_detr", *options, "--data.flip", "0.5", "--step", "3", "--count", "2"])
    assert capsys.readouterr().out == "digits_detr_batch.png\n"
    assert titles == ["digits_detr: 2 of the 4 images of training step 3\ntransform lsj, flip 0.5, color jitter 0.2"]
    with Image.open("digits_detr_batch.png") as picture:
        assert picture.width > 2 * 320
    with pytest.raises(SystemExit):
        cli.main(["viz", "data", "digits_detr", "--out", "folder"])
    assert "--out folder is the picture here and not a run folder" in capsys.readouterr().err
