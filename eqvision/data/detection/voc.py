"""Pascal VOC: one XML file for each image, ``Annotations/NAME.xml`` beside ``JPEGImages/NAME.jpg``.

Which box is meant by ``xmin`` ... ``ymax`` is a convention. The PASCAL development kit numbers pixels from 1 and counts
the last one in, so a box covers ``xmin - 1`` to ``xmax`` in edges that count from 0 (so Detectron2 reads it, too).
That is "one-based". Some tools write edges as they are; for them there is "edges".
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from xml.parsers import expat

from eqvision.data.decode import IMAGE_EXTENSIONS
from eqvision.data.detection.parsed import ParsedImage, ParsedObject, ParsedSet, upright_size
from eqvision.data.listing import nearest_existing
from eqvision.names import nearest

COORDINATES = ("one-based", "edges")


def parse_voc(
    source: Path,
    *,
    split: str | None = None,
    images: Path | None = None,
    class_names: Sequence[str] | None = None,
    coordinates: str = "one-based",
) -> ParsedSet:
    """Read the XML files of a folder (``source`` itself, or its ``Annotations``).

    ``split`` keeps the images named in ``ImageSets/Main/SPLIT.txt``. Classes are all names that occur in the folder,
    in any split, sorted; ``class_names`` fixes them. Objects marked difficult become crowd ones, so that training and
    evaluation leave them out (COCO matches detections to them by the share of the detection that lies inside, VOC by
    IoU). Raises FileNotFoundError for images and lists that are missing, ValueError with file and line for what is
    wrong in one.
    """
    from tqdm import tqdm

    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates={coordinates!r}; expected {' or '.join(map(repr, COORDINATES))}")
    files = _xml_files(source)
    bar = tqdm(files, "reading XML", unit="file", dynamic_ncols=True, delay=1)
    reader = _Reader(_image_folders(files[0].parent, images), coordinates, class_names)
    wanted = None if split is None else _names_of_split(files[0].parent.parent, split)
    found = {file.stem: reader.image(file, whole=wanted is None or file.stem in wanted) for file in bar}
    missing = sorted((wanted or set()) - set(found))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of split {split!r} have no XML file, such as {files[0].parent / missing[0]}.xml"
        )
    chosen = tuple(image for image in found.values() if image is not None)
    return ParsedSet(tuple(class_names) if class_names else tuple(sorted(reader.seen)), chosen)


def voc_folder(source: Path) -> Path | None:
    """The folder of XML files in ``source``, or None."""
    for folder in (source / "Annotations", source / "annotations", source):
        if folder.is_dir() and next(folder.glob("*.xml"), None) is not None:
            return folder
    return None


def _xml_files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder; expected one with Annotations/*.xml or *.xml")
    folder = voc_folder(source)
    if folder is None:
        raise FileNotFoundError(f"no XML files in {source} or {source / 'Annotations'}")
    return sorted(file for file in folder.glob("*.xml") if not file.name.startswith("."))


def _image_folders(annotations: Path, images: Path | None) -> list[Path]:
    if images is not None:
        if not images.is_dir():
            raise FileNotFoundError(f"image folder {images} does not exist; {nearest_existing(images)}")
        return [images]
    beside = [annotations.parent / name for name in ("JPEGImages", "images", "Images")]
    return [folder for folder in (*beside, annotations) if folder.is_dir()]


def _names_of_split(root: Path, split: str) -> set[str]:
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        there = ", ".join(sorted(each.stem for each in file.parent.glob("*.txt"))[:8]) or "none"
        raise FileNotFoundError(f"no list {file} of split {split!r}; lists there: {there}")
    return {line.split()[0] for line in file.read_text().splitlines() if line.strip()}


class _Reader:
    """XML file -> image; ``seen`` collects the names of classes."""

    def __init__(self, folders: list[Path], coordinates: str, class_names: Sequence[str] | None):
        self._folders, self._class_names = folders, class_names
        self._offset = 1.0 if coordinates == "one-based" else 0.0
        self.seen: set[str] = set()

    def image(self, file: Path, *, whole: bool) -> ParsedImage | None:
        """The image of an XML file; with ``whole`` False only its classes are noted."""
        xml = _Xml(file)
        objects = tuple(self._object(xml, element) for element in xml.root.findall("object"))
        if not whole:
            return None
        picture = self._picture(xml)
        return ParsedImage(picture, *self._size(xml, picture), objects)

    def _object(self, xml: "_Xml", element: ET.Element) -> ParsedObject:
        name = xml.text(element, "name")
        if self._class_names is not None and name not in self._class_names:
            raise ValueError(f"{xml.place(element)}: {nearest(name, list(self._class_names), 'class')}")
        self.seen.add(name)
        box = element.find("bndbox")
        if box is None:
            raise ValueError(f"{xml.place(element)}: object {name!r} has no <bndbox>")
        left, top, right, bottom = (xml.number(box, key) for key in ("xmin", "ymin", "xmax", "ymax"))
        if right < left or bottom < top:
            raise ValueError(
                f"{xml.place(box)}: <bndbox> from ({left:g}, {top:g}) to ({right:g}, {bottom:g}); expected "
                "xmin <= xmax and ymin <= ymax"
            )
        left, top = left - self._offset, top - self._offset
        difficult = element.find("difficult") is not None and xml.number(element, "difficult") != 0
        return ParsedObject(name, (left, top, right, bottom), (right - left) * (bottom - top), difficult)

    def _picture(self, xml: "_Xml") -> Path:
        """The file that the XML names, else one with the XML's own name: files are often renamed together."""
        named = xml.root.findtext("filename", "").strip()
        names = [Path(named).name] if named else []
        names += [xml.file.stem + extension for each in IMAGE_EXTENSIONS for extension in (each, each.upper())]
        for folder in self._folders:
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        looked = ", ".join(map(str, self._folders))
        raise FileNotFoundError(f"the image of {xml.file} ({named or xml.file.stem + '.jpg'}) is in none of {looked}")

    def _size(self, xml: "_Xml", picture: Path) -> tuple[int, int]:
        """As the XML says; where it says nothing or 0, as some tools do, as the image says."""
        element = xml.root.find("size")
        if element is None:
            return upright_size(picture)
        height, width = (int(xml.number(element, key)) for key in ("height", "width"))
        return (height, width) if min(height, width) > 0 else upright_size(picture)


class _Xml:
    """An XML file whose elements know their lines."""

    def __init__(self, file: Path):
        self.file = file
        self._lines: dict[ET.Element, int] = {}
        self.root = self._parse()
        if self.root.tag != "annotation":
            raise ValueError(f"{self.place(self.root)}: the root is <{self.root.tag}>, not <annotation> of VOC")

    def _parse(self) -> ET.Element:
        builder, parser = ET.TreeBuilder(), expat.ParserCreate()

        def start(tag: str, attributes: dict[str, str]) -> None:
            self._lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

        parser.StartElementHandler = start
        parser.EndElementHandler = builder.end
        parser.CharacterDataHandler = builder.data
        try:
            parser.Parse(self.file.read_bytes(), True)
        except expat.ExpatError as error:
            raise ValueError(f"{self.file}:{error.lineno}: not XML: {expat.ErrorString(error.code)}") from error
        return builder.close()

    def place(self, element: ET.Element) -> str:
        """File and line of an element."""
        return f"{self.file}:{self._lines[element]}"

    def text(self, parent: ET.Element, tag: str) -> str:
        """The text of a child that must be there."""
        text = parent.findtext(tag, "").strip()
        if not text:
            raise ValueError(f"{self.place(parent)}: <{parent.tag}> has no <{tag}>")
        return text

    def number(self, parent: ET.Element, tag: str) -> float:
        """The finite number in a child that must be there."""
        text = self.text(parent, tag)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            child = parent.find(tag)
            place = self.place(parent if child is None else child)
            raise ValueError(f"{place}: <{tag}> is {text[:40]!r}; expected a number")
        return value
