"""Published weights of detectors, used as a detector's run is, with the preprocessing that belongs to them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eqvision.data.detection import coco_class_names
from eqvision.detectors import RCNN, CenterNet, DeformableDETR
from eqvision.export import Card as ExportCard
from eqvision.export import has_card, read_card
from eqvision.losses import CenterNetConfig, RCNNLossConfig, SetPredictionConfig
from eqvision.losses.set_prediction import DEFORMABLE_DETR_LOSS, DETR_LOSS
from eqvision.predict_objects import DetectorRun
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.cards import Preprocessing, cards
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.leaf_names import named_arrays
from eqvision.pretrained.load import Loaded, read_model
from eqvision.pretrained.locate import locate
from eqvision.pretrained.preprocess import card_of, known_class_names
from eqvision.problems.detection import require_detector
from eqvision.recipes import DetectionConfig, DetectionDataConfig, DetectorConfig

SHORTEST, LONGEST = 800, 1333  # of DETR and Deformable DETR, in pixels


class PublishedDetector(NamedTuple):
    """Published weights with all that is known of them."""

    run: DetectorRun
    loaded: Loaded
    named: bool
    """Whether the names of the classes are known, and not numbers."""


class _Prepared(NamedTuple):
    """How images are prepared: one of ``sides`` (shorter, longer) and ``fixed`` (height, width)."""

    sides: tuple[int, int] = (SHORTEST, LONGEST)
    fixed: tuple[int, int] | None = None
    mean: tuple[float, ...] = DetectionDataConfig.mean
    std: tuple[float, ...] = DetectionDataConfig.std
    origin: str = "as DETR's are"
    fitted: bool = False
    """Images are as large as fits into ``fixed``, and keep their shape."""

    def text(self) -> str:
        """In words, for the screen."""
        if self.fixed is None:
            return f"{self.origin}: shorter side {self.sides[0]}, longer at most {self.sides[1]}"
        fitted = ", as large as fits" * self.fitted
        return f"{self.origin}: {self.fixed[0]}x{self.fixed[1]} (height x width){fitted}"


def load_published_detector(
    name: str, source: str | Path | None = None, *, layout: str | None = None, image_size: int | None = None
) -> DetectorRun:
    """The zoo's detector ``name`` with published weights, ready for ``find_objects``.

    Images are prepared by the card of the weights or the header of a file of ours, else by
    ``preprocessor_config.json`` beside the file, else as is usual for R-CNNs and CenterNets of the file's layout, else
    as DETR's are: the shorter side to 800 pixels, the longer one to at most 1333; standard error says which.
    ``image_size`` is another length of the shorter side. Classes have the
    names of the header or of ``config.json`` beside the file, else those of COCO where the number of outputs is one of
    COCO's. Raises what ``eqvision.load`` raises, and ValueError for the name of a classifier.
    """
    return read_published_detector(name, source, layout=layout, image_size=image_size).run


def read_published_detector(
    name: str, source: str | Path | None = None, *, layout: str | None = None, image_size: int | None = None
) -> PublishedDetector:
    """``load_published_detector``, with what was found out."""
    require_detector(name)
    location = locate(name, source)
    own = _own_card(location.path)
    known = _of_own(own) if own else _of_card(name, source) or _known(location.path)
    loaded = read_model(name, location.path, Sizes(), layout=layout or location.layout)
    prepared = _resized(known or _usual(name, loaded), image_size)
    print(f"images are prepared {prepared.text()}", file=sys.stderr)
    count = loaded.layout.class_count(named_arrays(loaded.model, loaded.state))
    own_names = own.class_names if own and len(own.class_names) == count else ()
    names = own_names or known_class_names(loaded.config, count) or coco_class_names(count)
    classes = names or tuple(f"class {number}" for number in range(count))
    run = DetectorRun(_config(name, loaded, prepared), classes, loaded.model, loaded.state, 0)
    return PublishedDetector(run, loaded, bool(names))


def _own_card(path: Path) -> ExportCard | None:
    """The header of a file of ``eqvision export`` or ``convert``."""
    file = path / "model.safetensors" if path.is_dir() else path
    return read_card(file) if file.suffix == ".safetensors" and file.is_file() and has_card(file) else None


def _of_own(card: ExportCard) -> _Prepared:
    origin = f"by the header of the file ({card.origin})"
    if card.transform in ("detr", "resize"):
        return _Prepared(card.sides, None, card.mean, card.std, origin)
    return _Prepared(
        (SHORTEST, LONGEST), card.image_size, card.mean, card.std, origin, card.transform in ("lsj", "shifted")
    )


def _of_card(name: str, source: str | Path | None) -> _Prepared | None:
    """What the card of the weights says, if they have one."""
    card = card_of(name, source)
    if card is None:
        return None
    return _by(card.preprocessing, f"by card {card.tag}")


def _by(known: Preprocessing, origin: str) -> _Prepared:
    return _Prepared((known.size, known.longest), None, known.mean, known.std, origin)


def _usual(name: str, loaded: Loaded) -> _Prepared:
    """That of cards with the layout of the file, of this model first; DETRs are prepared alike everywhere."""
    layout = loaded.layout.name
    fitting = [card for card in (*cards(name), *cards()) if card.layout == layout]
    if not fitting or not isinstance(loaded.model, RCNN | CenterNet):
        return _Prepared()
    return _by(fitting[0].preprocessing, f"as is usual for layout {layout}")


def _known(path: Path) -> _Prepared | None:
    """What ``preprocessor_config.json`` beside the weights says. Raises WeightsError for what is not read here."""
    file = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    if not config.get("do_resize", True) or not config.get("do_rescale", True):
        raise WeightsError(f"{file}: do_resize and do_rescale must be true; prepare the images by hand")
    given = config.get("do_normalize", True)
    mean = tuple(map(float, config.get("image_mean", _Prepared().mean))) if given else (0.0,)
    std = tuple(map(float, config.get("image_std", _Prepared().std))) if given else (1.0,)
    size = config.get("size", SHORTEST)
    for rows, columns in (("height", "width"), ("max_height", "max_width")):
        if isinstance(size, Mapping) and rows in size and columns in size:
            fixed = (int(size[rows]), int(size[columns]))
            return _Prepared(fixed=fixed, mean=mean, std=std, origin=f"by {file}", fitted=rows == "max_height")
    return _Prepared(_sides(size, config, str(file)), None, mean, std, f"by {file}")


def _sides(size: Any, config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The shorter side and the most that the longer may have."""
    if isinstance(size, int):
        return size, int(config.get("max_size", LONGEST))
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size.get("longest_edge", config.get("max_size", LONGEST)))
    raise WeightsError(
        f"{where}: size is {size!r}; expected a number, shortest_edge and longest_edge, or height and width"
    )


def _resized(prepared: _Prepared, image_size: int | None) -> _Prepared:
    """Another length of the shorter side; the longer one in proportion. Raises ValueError for a length below 32."""
    if image_size is None:
        return prepared
    if image_size < 32:
        raise ValueError(f"image_size={image_size}; expected the length of the shorter side in pixels, 32 or more")
    if prepared.fixed is not None:
        return prepared._replace(fixed=(image_size, image_size))
    shortest, longest = prepared.sides
    return prepared._replace(sides=(image_size, round(longest * image_size / shortest)))


def _config(name: str, loaded: Loaded, prepared: _Prepared) -> DetectionConfig:
    """The configuration of a run that would evaluate so."""
    shortest, longest = prepared.sides
    canvas = -(-longest // 32) * 32
    data = DetectionDataConfig(
        transform="detr" if prepared.fixed is None else "lsj" if prepared.fitted else "fixed",
        size=prepared.fixed or (canvas, canvas),
        scales=(shortest,),
        longest=longest,
        mean=prepared.mean,
        std=prepared.std,
    )
    dialect = loaded.options.get("dialect")
    model = DetectorConfig(name=name, in_channels=loaded.model.backbone.in_channels, dialect=dialect)
    return DetectionConfig(model=model, task=_task(loaded.model), data=data)


def _task(model: Any) -> SetPredictionConfig | RCNNLossConfig | CenterNetConfig:
    """The loss by which such models are trained, which tells how they are read."""
    if isinstance(model, RCNN):
        return RCNNLossConfig()
    if isinstance(model, CenterNet):
        return CenterNetConfig(stride=model.stride)
    return DEFORMABLE_DETR_LOSS if isinstance(model, DeformableDETR) else DETR_LOSS
