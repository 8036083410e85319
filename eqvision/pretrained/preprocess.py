"""How images are prepared for a file of weights: by its card, by what lies beside it, or as is usual for its layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eqvision.pretrained.cards import Card, Preprocessing, cards
from eqvision.pretrained.errors import WeightsError

# Pillow's numbers, which Hugging Face writes as "resample"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
# transformers' processors whose default filter is another than bicubic
BILINEAR = ("ViTImageProcessor", "ViTFeatureExtractor", "ViTImageProcessorFast")


class Found(NamedTuple):
    """A preprocessing, and in words where it is from."""

    preprocessing: Preprocessing
    origin: str


def card_of(name: str, source: str | Path | None) -> Card | None:
    """The card that a source is of: by location, by tag, or by the published name of the file; None: of none."""
    own = cards(name)
    if source is None:
        return own[0] if own else None
    text = str(source)
    for card in own:
        if text in (card.tag, card.location) or Path(text).name == published_name(card.location):
            return card
    return None


def published_name(location: str) -> str:
    """What a card's file is called."""
    return location.rpartition("#")[2].rpartition("/")[2]


def known_preprocessing(name: str, source: str | Path | None, path: Path) -> Found | None:
    """That of the card, or of ``preprocessor_config.json`` or timm's ``config.json`` beside the file; None: neither.

    Raises WeightsError for a configuration that cannot be followed.
    """
    card = card_of(name, source)
    if card is not None:
        return Found(card.preprocessing, f"card {card.tag}")
    folder = path if path.is_dir() else path.parent
    for file, read in (("preprocessor_config.json", _hugging_face), ("config.json", _timm)):
        if (folder / file).is_file():
            found = read(json.loads((folder / file).read_text()), str(folder / file))
            if found is not None:
                return found
    return None


def usual_preprocessing(name: str, layout: str) -> Found:
    """That of the model's cards with this layout, or of other models' with it, or ImageNet's."""
    fitting = [card for card in (*cards(name), *cards()) if card.layout == layout]
    if fitting:
        card = fitting[0]
        return Found(card.preprocessing, f"usual for layout {layout} (card {card.tag} of {card.name})")
    return Found(Preprocessing(224), "ImageNet's mean and deviation, as nothing is known of these weights")


def known_class_names(config: Mapping[str, Any] | None, count: int) -> tuple[str, ...]:
    """``id2label`` of a ``config.json``, or timm's ``label_names``, where there are so many; else none."""
    config = config or {}
    labels = config.get("id2label") or {}
    names: list[Any] = [labels.get(str(number)) for number in range(count)] if len(labels) == count else []
    names = names or list(config.get("label_names") or ())
    return tuple(names) if len(names) == count and all(isinstance(name, str) for name in names) else ()


def _timm(config: Mapping[str, Any], where: str) -> Found | None:
    """``pretrained_cfg`` of a repository of timm; None: the file is another's."""
    entry = config.get("pretrained_cfg")
    if not isinstance(entry, Mapping) or "input_size" not in entry:
        return None
    squeezed = entry.get("crop_mode") == "squash"
    preprocessing = Preprocessing(
        int(entry["input_size"][-1]),
        tuple(map(float, entry["mean"])),
        tuple(map(float, entry["std"])),
        entry.get("interpolation", "bicubic"),
        0.0 if squeezed else float(entry.get("crop_pct", 0.875)),
    )
    return Found(preprocessing, where)


def _hugging_face(config: Mapping[str, Any], where: str) -> Found:
    """What the image processors of ViT, DeiT, ConvNeXt, BiT and their kin do. Raises WeightsError for what is not
    read here: images that are not resized, or not to a square."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    if not config.get("do_resize", True) or not config.get("do_rescale", True):
        raise WeightsError(f"{where}: do_resize and do_rescale must be true; prepare the images by hand")
    size, fraction = _geometry(config, kind, where)
    given = config.get("do_normalize", True)
    mean = tuple(map(float, config["image_mean"])) if given else (0.0,)
    std = tuple(map(float, config["image_std"])) if given else (1.0,)
    resample = config.get("resample", 2 if kind in BILINEAR or not kind else 3)
    return Found(Preprocessing(size, mean, std, FILTERS[int(resample)], fraction), where)


def _geometry(config: Mapping[str, Any], kind: str, where: str) -> tuple[int, float]:
    """The size of the model's input, and the share that the crop keeps (0: no crop)."""
    size = config.get("size")
    if kind.startswith("ConvNext"):  # the shorter side to size / crop_pct and a crop; from 384 on no crop
        edge = _side(size, where)
        return edge, float(config.get("crop_pct") or 0.875) if edge < 384 else 0.0
    if config.get("do_center_crop") and "crop_size" in config:
        crop = _side(config["crop_size"], where)
        return crop, crop / _side(size, where)
    return _side(size, where), 1.0 if isinstance(size, Mapping) and "shortest_edge" in size else 0.0


def _side(size: Any, where: str) -> int:
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        if "shortest_edge" in size and "height" not in size:
            return int(size["shortest_edge"])
        if size.get("height") == size.get("width") and size.get("height"):
            return int(size["height"])
    raise WeightsError(f"{where}: size is {size!r}; expected a number, or equal height and width")
