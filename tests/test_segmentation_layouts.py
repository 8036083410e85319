"""Published data sets of semantic segmentation are read as they lie on disk."""

import pytest
from segmentation_files import write_pair

from eqvision.data.segmentation import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_IDS,
    COCO_STUFF_CLASSES,
    PET_CLASSES,
    FolderSegmentation,
)
from eqvision.types import IGNORE_LABEL


@pytest.mark.parametrize(("kind", "values"), [("labelTrainIds", (0, 18, 255)), ("labelIds", (7, 33, 1))])
def test_cityscapes(tmp_path, kind, values):
    for city, value in zip(("aachen", "bochum", "ulm"), values, strict=True):
        name = f"{city}_000000_000019"
        image = tmp_path / "leftImg8bit/train" / city / f"{name}_leftImg8bit.png"
        write_pair(image, tmp_path / "gtFine/train" / city / f"{name}_gtFine_{kind}.png", value)
    source = FolderSegmentation(tmp_path, "train")
    assert (source.layout, source.class_names) == ("cityscapes", CITYSCAPES_CLASSES)
    assert [int(source[i].labels[0, 0]) for i in range(3)] == [0, 18, IGNORE_LABEL]


def test_cityscapes_has_an_id_for_each_of_its_classes():
    assert len(CITYSCAPES_IDS) == len(CITYSCAPES_CLASSES) == 19
    assert dict(zip(CITYSCAPES_IDS, CITYSCAPES_CLASSES, strict=True))[26] == "car"


def test_ade20k_has_0_for_void(tmp_path):
    for split in ("training", "validation"):
        for number, value in enumerate((0, 1, 150)):
            name = f"ADE_{split}_{number:08}"
            write_pair(
                tmp_path / "images" / split / f"{name}.jpg", tmp_path / "annotations" / split / f"{name}.png", value
            )
    source = FolderSegmentation(tmp_path, "val")
    assert (source.layout, len(source.class_names), len(source)) == ("ade20k", 150, 3)
    assert [int(source[i].labels[0, 0]) for i in range(3)] == [IGNORE_LABEL, 0, 149]
    lines = [f"{k}\t0.1\t10\t1\t1\t{'screen, tv' if k in (5, 9) else f'thing {k}, it'}" for k in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *lines]))
    names = FolderSegmentation(tmp_path, "train").class_names
    assert (names[0], names[4], names[8], names[149]) == ("thing 1", "screen 5", "screen 9", "thing 150")
    with pytest.raises(ValueError, match=r"void_labels=\(3,\), but the layout 'ade20k' says itself what is void"):
        FolderSegmentation(tmp_path, "train", void_labels=(3,))


@pytest.mark.parametrize(
    ("images", "labels", "suffix", "values"),
    [
        ("train2017", "stuffthingmaps/train2017", "", (0, 181, 255, 11)),
        ("images/train2017", "annotations/train2017", "_labelTrainIds", (0, 170, 255, 255)),
    ],
)
def test_coco_stuff(tmp_path, images, labels, suffix, values):
    for number, value in enumerate(values):  # 11 would be id 12, which no class has
        write_pair(tmp_path / images / f"{number}.jpg", tmp_path / labels / f"{number}{suffix}.png", value)
    source = FolderSegmentation(tmp_path, "train")
    assert (source.layout, len(source.class_names)) == ("coco_stuff", 171)
    assert (source.class_names[0], source.class_names[80], source.class_names[170]) == ("person", "banner", "wood")
    assert [int(source[i].labels[0, 0]) for i in range(4)] == [0, 170, IGNORE_LABEL, IGNORE_LABEL]


def test_coco_stuff_numbers_are_those_of_the_panoptic_files():
    from eqvision.data.detection import COCO_STUFF

    assert list(COCO_STUFF_CLASSES)[80:] == list(range(92, 183))
    for number, name in COCO_STUFF.items():
        if number <= 182:
            assert COCO_STUFF_CLASSES[number] == name


def test_pets_are_cut_out_of_their_trimaps(tmp_path):
    for name, value in (("Abyssinian_1", [[1, 1, 2, 2, 3, 3, 2, 1]]), ("beagle_7", 2), ("Bombay_3", 1)):
        write_pair(tmp_path / "images" / f"{name}.jpg", tmp_path / "annotations/trimaps" / f"{name}.png", value)
    (tmp_path / "annotations/trainval.txt").write_text("#Image CLASS-ID\nbeagle_7 5 2 1\nAbyssinian_1 1 1 1\n")
    (tmp_path / "annotations/test.txt").write_text("Bombay_3 8 1 3\n")
    source = FolderSegmentation(tmp_path, "train")
    assert (source.layout, source.class_names, len(source)) == ("pets", PET_CLASSES, 2)
    assert source[0].labels[0].tolist() == [0, 0, 1, 1, 2, 2, 1, 0]
    assert len(FolderSegmentation(tmp_path, "test")) == 1
