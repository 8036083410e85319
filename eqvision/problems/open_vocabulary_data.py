"""Sources, transforms, questions and the tokenizer of an open-vocabulary run, from its configuration."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eqvision.data.detection import Categories, Mosaic, Questions, canonical, federated_absent
from eqvision.data.pairs.digits import WORDS
from eqvision.data.text import Tokenizer, load_tokenizer
from eqvision.multimodal import PHOTOS
from eqvision.problems.contrastive_data import KEPT, tokenizer_of
from eqvision.problems.detection_data import Plan, eval_plan, load_detection
from eqvision.recipes.detection_config import DetectionDataConfig
from eqvision.recipes.open_vocabulary_config import OpenVocabularyConfig, OpenVocabularyDataConfig

DIGIT_TEMPLATES = ("{}", "a {}", "the digit {}", "a handwritten {}", "a photo of a {}", "a photo of the number {}")


def detection_data(data: OpenVocabularyDataConfig) -> DetectionDataConfig:
    """What of it any detector has."""
    return DetectionDataConfig(
        kind=data.kind,
        path=data.path,
        train_split=data.train_split,
        test_split=data.test_split,
        length=data.length,
        size=(data.size, data.size),
        transform="lsj" if data.fit == "pad" else "fixed",
        keep_empty=data.keep_empty,
        max_objects=data.max_objects,
        on_corrupt=data.on_corrupt,
    )


def load_named(
    data: OpenVocabularyDataConfig, in_channels: int, split: str, categories: Categories | None = None
) -> Any:
    """The images of a split, whose classes have the names that they are asked for with. Raises as ``load_detection``,
    and ValueError for names that are not as many as the classes."""
    source = load_detection(detection_data(data), in_channels, split, categories)
    names = data.class_names or (WORDS if data.kind == "digits" else tuple(source.class_names))
    if len(names) != len(source.class_names):
        raise ValueError(
            f"--data.class-names has {len(names)} names and the data {len(source.class_names)} classes: "
            f"{', '.join(source.class_names[:5])} ..."
        )
    source.class_names = names
    return source


def train_mosaic(data: OpenVocabularyDataConfig, source: Any) -> Mosaic:
    """Raises ValueError for values that do not fit."""
    whole = data.crop == (1.0, 1.0)
    return Mosaic(
        source,
        data.size,
        grids=data.mosaics,
        probabilities=data.mosaic_probabilities,
        flip=data.flip,
        crop=None if whole else data.crop,
        least_left=data.least_left,
        pad=data.fit == "pad",
        fill=round(255 * data.padding),
    )


def evaluation_plan(data: OpenVocabularyDataConfig) -> Plan:
    return eval_plan(detection_data(data))


def train_templates(data: OpenVocabularyDataConfig) -> tuple[str, ...]:
    return data.templates or (DIGIT_TEMPLATES if data.kind == "digits" else ("{}", *PHOTOS))


def evaluation_templates(data: OpenVocabularyDataConfig) -> tuple[str, ...]:
    return data.test_templates or (("{}",) if data.kind == "digits" else PHOTOS)


def class_texts(data: OpenVocabularyDataConfig, names: tuple[str, ...]) -> list[str]:
    """What evaluation asks for: the sentences of the first class, then those of the next."""
    return _sentences(names, evaluation_templates(data))


def questions(config: OpenVocabularyConfig, source: Any, tokenizer: Tokenizer) -> Questions:
    """Raises ValueError for values that do not fit."""
    data = config.data
    return Questions(
        tuple(source.class_names),
        train_templates(data),
        tokenizer,
        config.model.length,
        max_queries=data.max_queries,
        num_negatives=data.num_negatives,
        frequencies=label_frequencies(source),
        absent=federated_absent(source),
        hidden=rare_labels(source) if data.hide_rare else frozenset(),
        merge=data.merge_iou if data.merge_iou <= 1 else None,
        seed=config.seed,
    )


def label_frequencies(source: Any) -> Float[np.ndarray, " k"] | None:
    """The share of each label among all objects; None where that is not known without reading all images."""
    counts = getattr(source, "label_counts", None)
    return None if counts is None or not counts.sum() else counts / counts.sum()


def rare_labels(source: Any) -> frozenset[int]:
    """Raises ValueError for data that does not say which classes are rare."""
    frequencies = getattr(getattr(source, "index", None), "frequencies", None)
    if frequencies is None:
        raise ValueError("--data.hide-rare is for LVIS, whose file says which classes are rare; this data does not")
    return frozenset(label for label, frequency in enumerate(frequencies) if frequency == "r")


def run_tokenizer(config: OpenVocabularyConfig, names: tuple[str, ...], *, kept_in: Path | None = None) -> Tokenizer:
    """What the run folder (``kept_in``, or that of the configuration) keeps, else the vocabulary that the configuration
    names, else one of the names in all sentences. Raises what tokenizers raise."""
    kept = (kept_in or Path(config.out)) / KEPT
    if (kept_in or config.out) and kept.exists():
        return load_tokenizer(kept, pad=config.tokenizer.pad or None)
    templates = (*train_templates(config.data), *evaluation_templates(config.data))
    return tokenizer_of(config.tokenizer, _sentences(names, templates))


def _sentences(names: tuple[str, ...], templates: tuple[str, ...]) -> list[str]:
    return [canonical(template.format(canonical(name) or name)) for name in names for template in templates]
