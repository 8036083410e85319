"""Where data sets of semantic segmentation keep their images and label files, and what the labels mean.

A layout is a function ``(root, split) -> Found | Missing``. They are tried in the order of ``LAYOUTS``: those with
folder names of their own first.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from eqvision.data.decode import IMAGE_EXTENSIONS
from eqvision.data.listing import nearest_existing
from eqvision.data.segmentation.class_names import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_IDS,
    COCO_STUFF_CLASSES,
    PET_CLASSES,
)
from eqvision.data.segmentation.label_files import LabelValues
from eqvision.names import nearest

ADE20K_CLASSES = 150
_LABEL_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")  # none that loses: JPEG changes labels


class Found(NamedTuple):
    """Images and label files, pair by pair, in the order of their names; None for what users have to say."""

    layout: str
    pairs: tuple[tuple[Path, Path], ...]
    class_names: tuple[str, ...] | None = None
    values: LabelValues | None = None
    other_labels: tuple[Path, ...] = ()  # folders of the other splits, which may hold further classes


class Missing(NamedTuple):
    """What a layout looked for, for the message."""

    looked_for: tuple[str, ...]


Layout = Callable[[Path, str | None], Found | Missing]


def find_segmentation(root: Path, split: str | None, layout: str | None = None) -> Found:
    """The files of a split, in the first layout that has them, or in the one that is named.

    Raises UnknownNameError for another layout, FileNotFoundError with all that was looked for where there is nothing,
    for images without labels, and for a folder that does not exist.
    """
    if layout is not None and layout not in LAYOUTS:
        raise nearest(layout, list(LAYOUTS), "layout of segmentation data")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; {nearest_existing(root)}")
    looked_for = []
    for name, find in LAYOUTS.items() if layout is None else [(layout, LAYOUTS[layout])]:
        result = find(root, split)
        if isinstance(result, Found):
            return result
        looked_for += [f"  {name}: {pattern}" for pattern in result.looked_for]
    here = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    shown = ", ".join(here[:8]) + (", ..." if len(here) > 8 else "") or "nothing"
    raise FileNotFoundError(
        f"{root} (which has {shown}) holds no segmentation data of split {split!r}. Looked for:\n"
        + "\n".join(looked_for)
    )


def _folders(root: Path, split: str | None) -> Found | Missing:
    """Pairs of equal names without their endings, in folders beside each other."""
    for images, labels in _folder_names(split):
        if (root / images).is_dir() and (root / labels).is_dir():
            found = _matched(root / images, root / labels)
            others = _other_labels(root, labels, split)
            return Found("folder", found, _listed_names(root), other_labels=others)
    return Missing(tuple(f"{images}/*.jpg with {labels}/*.png" for images, labels in _folder_names(split)))


def _folder_names(split: str | None) -> tuple[tuple[str, str], ...]:
    if split is None:
        return (("images", "labels"), ("images", "masks"), ("images", "annotations"))
    return (
        (split, f"{split}_labels"),
        (f"images/{split}", f"labels/{split}"),
        (f"images/{split}", f"annotations/{split}"),
        (f"{split}/images", f"{split}/labels"),
        (split, f"{split}annot"),
    )


def _other_labels(root: Path, labels: str, split: str | None) -> tuple[Path, ...]:
    """Label folders of the same pattern for any other split."""
    if split is None:
        return ()
    before, _, after = labels.rpartition(split)
    return tuple(sorted(path for path in root.glob(f"{before}*{after}") if path.is_dir() and path != root / labels))


def _listed_names(root: Path) -> tuple[str, ...] | None:
    """One name a line in classes.txt; the place of a line is the value in the label files."""
    file = root / "classes.txt"
    if not file.is_file():
        return None
    names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file} has {len(names)} names, {len(set(names))} of them different; expected one a class")
    return names


def _cityscapes(root: Path, split: str | None) -> Found | Missing:
    images, labels = root / "leftImg8bit" / str(split), root / "gtFine" / str(split)
    if not (images.is_dir() and labels.is_dir()):
        return Missing(
            (f"leftImg8bit/{split}/CITY/*_leftImg8bit.png with gtFine/{split}/CITY/*_gtFine_labelTrainIds.png",)
        )
    prepared = next(labels.glob("*/*_gtFine_labelTrainIds.png"), None) is not None
    kind = "labelTrainIds" if prepared else "labelIds"
    pairs = [
        (file, labels / file.parent.name / file.name.replace("_leftImg8bit", f"_gtFine_{kind}"))
        for file in sorted(images.glob("*/*_leftImg8bit.png"))
    ]
    classes = tuple(range(len(CITYSCAPES_IDS))) if prepared else CITYSCAPES_IDS
    return Found("cityscapes", _existing(pairs, images), CITYSCAPES_CLASSES, LabelValues(classes, strict=False))


def _ade20k(root: Path, split: str | None) -> Found | Missing:
    """ADEChallengeData2016: 0 is void, and class i has the value i + 1."""
    own = {"train": "training", "val": "validation"}.get(str(split), str(split))
    images, labels = root / "images" / own, root / "annotations" / own
    if own not in ("training", "validation") or not (images.is_dir() and labels.is_dir()):
        return Missing(("images/{training,validation}/*.jpg with annotations/{training,validation}/*.png",))
    values = LabelValues(tuple(range(1, ADE20K_CLASSES + 1)), void=(0,))
    return Found("ade20k", _matched(images, labels), _ade20k_names(root), values)


def _ade20k_names(root: Path) -> tuple[str, ...]:
    """From the table beside the images: a head, then a line for each class whose last column has its names."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return tuple(str(number) for number in range(1, ADE20K_CLASSES + 1))
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()[1:] if line.strip()]
    names = tuple(row[-1].split(",")[0].strip() for row in rows)
    if len(names) != ADE20K_CLASSES:
        raise ValueError(f"{file} names {len(names)} classes; expected a head and {ADE20K_CLASSES} lines")
    return tuple(name if names.count(name) == 1 else f"{name} {place + 1}" for place, name in enumerate(names))


def _coco_stuff(root: Path, split: str | None) -> Found | Missing:
    """Label files have the id less one, 255 for void; ids without a class are void too."""
    own = {"train": "train2017", "val": "val2017"}.get(str(split), str(split))
    for labels in (f"annotations/{own}", f"stuffthingmaps/{own}", f"stuffthingmaps_trainval2017/{own}"):
        for images in (f"images/{own}", own):
            if re.fullmatch("(train|val)[0-9]+", own) and (root / labels).is_dir() and (root / images).is_dir():
                pairs = _matched(root / images, root / labels, suffixes=("", "_labelTrainIds"))
                return Found("coco_stuff", pairs, *_coco_stuff_classes(pairs))
    return Missing(("[images/]{train,val}2017/*.jpg with {annotations,stuffthingmaps}/{train,val}2017/*.png",))


def _coco_stuff_classes(pairs: Sequence[tuple[Path, Path]]) -> tuple[tuple[str, ...], LabelValues]:
    """Prepared files (``_labelTrainIds.png``) number the 171 classes, the others have ids less one."""
    ids, names = tuple(COCO_STUFF_CLASSES), tuple(COCO_STUFF_CLASSES.values())
    prepared = pairs[0][1].stem.endswith("_labelTrainIds")
    classes = tuple(range(len(ids))) if prepared else tuple(number - 1 for number in ids)
    return names, LabelValues(classes, strict=False)


def _pets(root: Path, split: str | None) -> Found | Missing:
    """Trimaps: 1 the pet, 2 what is behind it, 3 its border. There are two splits: trainval (train) and test."""
    own = {"train": "trainval", "val": "test"}.get(str(split), str(split))
    listing, trimaps = root / "annotations" / f"{own}.txt", root / "annotations" / "trimaps"
    if not (listing.is_file() and trimaps.is_dir()):
        return Missing((f"images/*.jpg with annotations/trimaps/*.png and annotations/{own}.txt",))
    lines = [line.split()[0] for line in listing.read_text("utf-8").splitlines() if line.strip() and line[0] != "#"]
    pairs = [(root / "images" / f"{name}.jpg", trimaps / f"{name}.png") for name in sorted(lines)]
    return Found("pets", _existing(pairs, listing), PET_CLASSES, LabelValues((1, 2, 3)))


LAYOUTS: dict[str, Layout] = {
    "cityscapes": _cityscapes,
    "pets": _pets,
    "ade20k": _ade20k,
    "coco_stuff": _coco_stuff,
    "folder": _folders,
}


def _matched(images: Path, labels: Path, suffixes: tuple[str, ...] = ("",)) -> tuple[tuple[Path, Path], ...]:
    """Every image with the label file of its name; ``suffixes`` are what label files may have behind the name."""
    by_name = {file.stem: file for file in _files(labels, _LABEL_EXTENSIONS)}
    pairs = []
    for image in _files(images, IMAGE_EXTENSIONS):
        named = [by_name[image.stem + suffix] for suffix in reversed(suffixes) if image.stem + suffix in by_name]
        pairs.append((image, named[0] if named else labels / f"{image.stem}.png"))
    return _existing(pairs, images)


def _files(folder: Path, extensions: tuple[str, ...]) -> Iterable[Path]:
    found = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in found if file.suffix.lower() in extensions)


def _existing(pairs: Sequence[tuple[Path, Path]], where: Path) -> tuple[tuple[Path, Path], ...]:
    """The pairs as they are. Raises FileNotFoundError where there are none and where a file is missing."""
    if not pairs:
        raise FileNotFoundError(f"{where} holds no images")
    missing = [str(file) for pair in pairs for file in pair if not file.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} files are missing for the {len(pairs)} images of {where}: {shown}. Every image needs a "
            "label file (a PNG) of its name"
        )
    return tuple(pairs)
