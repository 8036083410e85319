"""Segmentation sources read their layouts, labels move with the images and never blend, streams are pure functions."""

import functools
import itertools
import logging

import jax
import numpy as np
import pytest
from images import take
from PIL import Image
from segmentation_files import Blocks, write_folder, write_pair

from eqvision.data import CorruptImageError
from eqvision.data.detection import Crop, DigitScenes, Flip, Resize, size_after
from eqvision.data.segmentation import (
    LAYOUTS,
    DigitSegmentation,
    FolderSegmentation,
    SegmentationSource,
    SegmentationTransform,
    fit_labels_eval,
    fixed_size_labels_eval,
    fixed_size_labels_train,
    move_image,
    move_labels,
    pixel_counts,
    random_scale_plan,
    random_window_plan,
    resize_labels,
    segmentation_eval,
    segmentation_eval_stream,
    segmentation_train,
    segmentation_train_stream,
)
from eqvision.names import UnknownNameError
from eqvision.types import IGNORE_LABEL, SegmentationBatch

COLUMNS = [[0, 0, 1, 1, 2, 2, 11, 11]]  # of values, in every row


# Folders


@pytest.mark.parametrize(
    ("images", "labels"),
    [("{}", "{}_labels"), ("images/{}", "labels/{}"), ("{}/images", "{}/labels"), ("images/{}", "annotations/{}")],
)
def test_folders_beside_each_other(tmp_path, images, labels):
    write_folder(tmp_path, "train", [COLUMNS, 2], images=images, labels=labels)
    source = FolderSegmentation(tmp_path, "train", void_labels=(11,))
    assert isinstance(source, SegmentationSource)
    assert (len(source), source.class_names, source.layout) == (2, ("0", "1", "2"), "folder")
    example = source[0]
    assert example.labels[0].tolist() == [0, 0, 1, 1, 2, 2, 255, 255]
    assert example.image[0, :, 0].tolist() == [0, 0, 10, 10, 20, 20, 110, 110]
    assert (example.original_size, example.index, example.weight) == ((6, 8), 0, 1.0)
    assert source.sizes.tolist() == [[6, 8], [6, 8]]
    np.testing.assert_array_equal(source.truth(0), example.labels)
    assert source.describe(1).endswith("1.png")


def test_folders_without_splits(tmp_path):
    for number in range(2):
        write_pair(tmp_path / "images" / f"{number}.png", tmp_path / "labels" / f"{number}.png", number)
    assert FolderSegmentation(tmp_path).class_names == ("0", "1")


def test_names_come_from_classes_txt_and_void_lines_have_no_class(tmp_path):
    write_folder(tmp_path, "train", [COLUMNS])
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\n")
    assert FolderSegmentation(tmp_path, "train", void_labels=(11,)).class_names == ("sky", "road", "car")
    without = FolderSegmentation(tmp_path, "train", void_labels=(0, 11))
    assert without.class_names == ("road", "car")
    assert without[0].labels[0].tolist() == [255, 255, 0, 0, 1, 1, 255, 255]  # those behind a void value move down


def test_numbers_reach_to_the_largest_value_of_any_split(tmp_path):
    write_folder(tmp_path, "train", [COLUMNS])
    write_folder(tmp_path, "val", [4])
    sources = [FolderSegmentation(tmp_path, split, void_labels=(11,)) for split in ("train", "val")]
    assert [source.class_names for source in sources] == [tuple("01234")] * 2
    named = FolderSegmentation(tmp_path, "val", class_names=tuple("abcdefg"), void_labels=(11,))
    assert named.class_names == tuple("abcdefg")


def test_a_value_that_means_nothing_names_file_and_pixel(tmp_path):
    write_folder(tmp_path, "train", [COLUMNS])
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    source = FolderSegmentation(tmp_path, "train")
    with pytest.raises(
        ValueError, match=r"0\.png has the value 11 at row 0, column 6.*none of the 3 classes.*void_labels"
    ):
        source[0]


def test_palette_pictures_are_read_by_their_positions(tmp_path):
    write_folder(tmp_path, "train", [[[0, 1, 1, 0, 2, 2, 1, 0]]])
    file = tmp_path / "train_labels" / "0.png"
    picture = Image.open(file).convert("L")
    flat = picture.convert("P")
    flat.putdata(list(picture.tobytes()))
    flat.putpalette([200, 0, 0, 0, 100, 0, 9, 9, 9] + [0] * 759)
    flat.save(file)
    assert FolderSegmentation(tmp_path, "train")[0].labels[0].tolist() == [0, 1, 1, 0, 2, 2, 1, 0]


def test_labels_with_colours_are_refused(tmp_path):
    write_folder(tmp_path, "train", [0])
    Image.new("RGB", (8, 6)).save(tmp_path / "train_labels" / "0.png")
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(CorruptImageError, match=r"0\.png has colours \(RGB\); expected one value for each pixel"):
        FolderSegmentation(tmp_path, "train")[0]


def test_labels_of_another_size_are_refused_or_skipped(tmp_path, caplog):
    write_folder(tmp_path, "train", [0, 1])
    Image.new("L", (6, 8)).save(tmp_path / "train_labels" / "0.png")
    with pytest.raises(
        CorruptImageError, match=r"is 6x8 \(height x width, upright\) and its labels .* are 8x6; .*EXIF"
    ):
        FolderSegmentation(tmp_path, "train")[0]
    source = FolderSegmentation(tmp_path, "train", on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        source[0], source[0]
    assert (source[0].weight, source.num_skipped, len(caplog.records)) == (0.0, 1, 1)
    assert (source[0].labels == IGNORE_LABEL).all()


def test_images_without_labels_are_named(tmp_path):
    write_folder(tmp_path, "train", [0, 1, 2])
    (tmp_path / "train_labels" / "1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 files are missing for the 3 images.*1\.png.*Every image needs a label"
    ):
        FolderSegmentation(tmp_path, "train")


def test_an_unknown_layout_lists_what_was_looked_for(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        FolderSegmentation(tmp_path, "train")
    message = str(caught.value)
    assert "(which has pictures/)" in message
    for layout in LAYOUTS:
        assert f"  {layout}: " in message
    assert "train/*.jpg with train_labels/*.png" in message
    with pytest.raises(UnknownNameError, match=r"'citiscapes' does not exist; nearest: cityscapes"):
        FolderSegmentation(tmp_path, "train", layout="citiscapes")
    with pytest.raises(FileNotFoundError, match=r"does not exist; .* has no 'picturez'; did you mean 'pictures'"):
        FolderSegmentation(tmp_path / "picturez", "train")


def test_options_out_of_range_are_refused(tmp_path):
    write_folder(tmp_path, "train", [0])
    with pytest.raises(ValueError, match=r"void_labels=\(256,\); expected values of label files, 0 to 255"):
        FolderSegmentation(tmp_path, "train", void_labels=(256,))
    with pytest.raises(ValueError, match="unknown on_corrupt 'drop'; expected 'raise' or 'skip'"):
        FolderSegmentation(tmp_path, "train", on_corrupt="drop")
    with pytest.raises(ValueError, match="has 0 classes; expected 1 to 255"):
        FolderSegmentation(tmp_path, "train", void_labels=(0,))


# Digits


def test_each_pixel_of_a_digit_scene_has_the_front_digit():
    scenes = DigitScenes("train", size=48, digit_size=(16, 24), length=6)
    source = DigitSegmentation("train", size=48, digit_size=(16, 24), length=6)
    assert isinstance(source, SegmentationSource)
    assert source.class_names == ("background", *"0123456789")
    for index in range(6):
        example, scene = source[index], scenes[index]
        np.testing.assert_array_equal(example.image, scene.image)
        expected = np.zeros((48, 48), int)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            expected[mask != 0] = label + 1
        np.testing.assert_array_equal(example.labels, expected)
        np.testing.assert_array_equal(source.truth(index), expected)


def test_pixels_are_counted_by_class():
    source = DigitSegmentation("train", size=32, digit_size=(8, 12), length=3)
    counts = pixel_counts((source.truth(i) for i in range(3)), 11)
    assert counts.sum() == 3 * 32 * 32
    assert counts[0] == sum(int((source.truth(i) == 0).sum()) for i in range(3))
    assert pixel_counts([np.array([[1, 255]], np.uint8)], 2).tolist() == [0, 1]


# Moves


def test_labels_stay_on_their_pixels_through_any_moves(rng):
    labels = rng.integers(0, 5, (24, 36)).astype(np.uint8)
    image = np.repeat((labels * 40)[..., None], 3, axis=-1)
    for moves in itertools.permutations([Flip(), Resize(48, 72), Crop(5, 3, 17, 19)]):
        moved = move_image(image, moves, "nearest")  # without blending, pixels tell their labels
        np.testing.assert_array_equal(moved[..., 0] // 40, move_labels(labels, moves))


def test_resized_labels_are_those_of_the_nearest_centres():
    labels = np.array([[0, 4], [9, 255]], np.uint8)
    np.testing.assert_array_equal(resize_labels(labels, (4, 4)), labels.repeat(2, axis=0).repeat(2, axis=1))
    assert set(np.unique(resize_labels(labels, (7, 5)))) == {0, 4, 9, 255}  # and nothing in between
    assert resize_labels(labels, (1, 1)).shape == (1, 1)


def test_training_scales_and_cuts_evenly(rng):
    plan = functools.partial(random_scale_plan, scale=(0.5, 2.0), shortest=None)
    heights = [size_after((100, 50), plan((100, 50), rng))[0] for _ in range(300)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200
    assert random_scale_plan((30, 60), rng, scale=(1.0, 1.0), shortest=None) == ()
    assert random_scale_plan((30, 60), rng, scale=(1.0, 1.0), shortest=45) == (Resize(45, 90),)
    crops = [random_window_plan((40, 20), rng, window=(10, 30))[0] for _ in range(300)]
    assert {(c.height, c.width, c.left) for c in crops} == {(10, 20, 0)}
    assert {c.top for c in crops} == set(range(31))


def test_a_transform_tells_its_size_and_changes_no_label_by_colour(rng):
    example = Blocks([(40, 60)])[0]
    transform = segmentation_train((32, 32), color_jitter=0.5)
    for seed in range(20):
        moved = transform(example, np.random.default_rng(seed))
        assert moved.image.shape[:2] == moved.labels.shape
        assert transform.output_size((40, 60), np.random.default_rng(seed)) == moved.labels.shape
        assert max(moved.labels.shape) <= 32
        plain = segmentation_train((32, 32))(example, np.random.default_rng(seed))
        np.testing.assert_array_equal(plain.labels, moved.labels)
        assert set(np.unique(moved.labels)) <= set(range(7))
    assert not np.array_equal(plain.image, moved.image)


def test_evaluation_transforms(rng):
    example = Blocks([(40, 60)])[0]
    for transform, size in (
        (segmentation_eval(), (40, 60)),
        (segmentation_eval(20), (20, 30)),
        (segmentation_eval(20, 24), (16, 24)),
        (fixed_size_labels_eval(16), (16, 16)),
        (fixed_size_labels_train((16, 24), flip=0), (16, 24)),
        (fit_labels_eval((32, 32)), (21, 32)),
    ):
        assert transform(example, rng).labels.shape == size
        assert transform.output_size((40, 60), rng) == size


def test_transforms_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"scale=\(2.0, 1.0\); expected 0 < lowest <= highest"):
        segmentation_train(32, scale=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"flip=1.5; expected a probability"):
        segmentation_train(32, flip=1.5)
    with pytest.raises(ValueError, match=r"size=\(0, 4\); expected lengths in pixels"):
        segmentation_train((0, 4))
    with pytest.raises(UnknownNameError, match="interpolation 'linear' does not exist"):
        SegmentationTransform(interpolation="linear")
    with pytest.raises(ValueError, match="color_jitter=2; expected 0"):
        SegmentationTransform(color_jitter=2)


# Streams

SIZES = [(24, 32), (32, 24), (20, 20), (28, 40), (40, 16), (16, 16), (30, 30)]
TRANSFORM = segmentation_train((24, 24), color_jitter=0.3)


def train(count=4, **options):
    options = {"batch_size": 4, "seed": 3, "canvas": (24, 24), "transform": TRANSFORM, "num_threads": 0} | options
    return take(segmentation_train_stream(Blocks(SIZES), **options), count)


def evaluate(**options):
    options = {"batch_size": 4, "canvas": (40, 40), "num_threads": 0} | options
    return take(segmentation_eval_stream(Blocks(SIZES), **options), 1000)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(jax.tree.leaves(batches), jax.tree.leaves(others), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_batches_lie_at_the_top_left_and_are_void_elsewhere():
    for batch in train():
        assert isinstance(batch, SegmentationBatch)
        assert (batch.images.shape, batch.images.dtype) == ((4, 24, 24, 3), np.uint8)
        assert (batch.labels.shape, batch.labels.dtype) == ((4, 24, 24), np.int32)
        for image, labels, (height, width) in zip(batch.images, batch.labels, batch.size, strict=True):
            inside = np.zeros((24, 24), bool)
            inside[:height, :width] = True
            assert (labels[~inside] == IGNORE_LABEL).all()
            assert (image[~inside] == 0).all()
            assert (labels[inside] < 7).all()


def test_a_training_stream_resumes_at_any_step_with_any_number_of_threads():
    whole = train(6)
    assert_same(whole[4:], train(2, start_step=4))
    assert_same(whole, train(6, num_threads=3))
    assert not np.array_equal(whole[0].images, train(1, seed=4)[0].images)
    seen = np.concatenate([batch.indices for batch in train(7)])  # 28 rows of 7 images
    assert np.bincount(seen).tolist() == [4] * 7


@pytest.mark.parametrize("stream", [train, evaluate])
def test_hosts_split_every_batch(stream):
    parts = [stream(process_index=i, process_count=2) for i in range(2)]
    joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *rows) for rows in zip(*parts, strict=True)]
    assert_same(stream(), joined)


def test_evaluation_sees_each_image_once_and_pads_the_last_batch():
    batches = evaluate()
    assert np.concatenate([batch.indices for batch in batches]).tolist() == [*range(7), -1]
    assert np.concatenate([batch.weights for batch in batches]).tolist() == [1] * 7 + [0]
    last = batches[-1]
    assert (last.labels[-1] == IGNORE_LABEL).all()
    assert last.size[-1].tolist() == [40, 40]
    np.testing.assert_array_equal(batches[0].original_size, SIZES[:4])
    np.testing.assert_array_equal(batches[0].labels[0, :24, :32], Blocks(SIZES)[0].labels)
    assert_same(batches, evaluate(num_threads=2))


def test_a_batch_takes_the_size_of_its_largest_image():
    assert [b.labels.shape for b in evaluate(canvas=None)] == [(4, 32, 40), (4, 40, 30)]
    assert [b.labels.shape for b in evaluate(canvas=None, multiple=16)] == [(4, 32, 48), (4, 48, 32)]
    halves = [evaluate(canvas=None, process_index=i, process_count=2) for i in range(2)]
    assert [b.labels.shape for b in halves[1]] == [(2, 32, 40), (2, 40, 30)]


def test_streams_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"block image 3 is 28x40 .* does not fit into its batch of 32x32"):
        evaluate(canvas=(32, 32))
    with pytest.raises(ValueError, match=r"canvas=\(0, 4\); expected height and width of batches"):
        train(canvas=(0, 4))
    with pytest.raises(ValueError, match="batch_size=3 is global; expected a positive multiple of process_count=2"):
        train(batch_size=3, process_count=2)
    with pytest.raises(ValueError, match="multiple=0; expected what sides are rounded up to"):
        evaluate(canvas=None, multiple=0)
