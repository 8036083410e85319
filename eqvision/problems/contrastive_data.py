"""Sources, transforms and the tokenizer of a contrastive run, from its configuration."""

import functools
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from eqvision.data import ImageFolder, eval_transform, random_resized_crop, train_transform
from eqvision.data.pairs import TEMPLATES as DIGIT_TEMPLATES
from eqvision.data.pairs import (
    CaptionedDigits,
    PairSource,
    all_captions,
    captioned_folder,
    coco_captions,
    count_cut,
)
from eqvision.data.text import Tokenizer, clip_bpe, load_tokenizer, train_bpe, train_unigram, train_wordpiece
from eqvision.data.text import unigram as unigram_file
from eqvision.data.text import wordpiece as wordpiece_file
from eqvision.data.transforms import INTERPOLATIONS, EvalTransform, TrainTransform
from eqvision.multimodal import PHOTOS, check_templates, read_templates
from eqvision.names import nearest
from eqvision.recipes.contrastive_config import ContrastiveConfig, PairsDataConfig, TokenizerConfig
from eqvision.run_folder import RunFolder

KEPT = "tokenizer.json"
MOST_COUNTED = 20_000  # captions whose length is looked at before training


class Plan(NamedTuple):
    """What happens to each image, in training and in evaluation."""

    train: TrainTransform
    evaluate: EvalTransform


def load_pairs(data: PairsDataConfig, in_channels: int, split: str) -> PairSource:
    """The images and captions of a split. Raises ValueError where the configuration names no path, and what sources
    raise."""
    if data.kind == "digits":
        return CaptionedDigits(split, channels=in_channels)
    if not data.path:
        layout = "train/captions.jsonl" if data.kind == "folder" else "annotations/captions_train2017.json"
        raise ValueError(f"data.kind {data.kind!r} needs a path: --data.path PATH, a folder with {layout}")
    load = captioned_folder if data.kind == "folder" else coco_captions
    return load(data.path, split, in_channels=in_channels, on_corrupt=data.on_corrupt)


def load_zero_shot(data: PairsDataConfig, in_channels: int) -> ImageFolder | None:
    """Images of classes that are told by their names, where the configuration has any."""
    if not data.zero_shot_path:
        return None
    return ImageFolder(data.zero_shot_path, data.zero_shot_split, in_channels=in_channels, on_corrupt=data.on_corrupt)


def templates_of(data: PairsDataConfig) -> tuple[str, ...]:
    """The sentences that classes are asked for with. Raises ValueError for two lists of them, and as
    ``read_templates`` and ``check_templates`` do."""
    if data.templates and data.templates_file:
        raise ValueError("--data.templates and --data.templates-file are both given; leave one of them out")
    if data.templates_file:
        return read_templates(data.templates_file)
    if data.templates:
        check_templates(data.templates)
        return data.templates
    return DIGIT_TEMPLATES if data.kind == "digits" and not data.zero_shot_path else PHOTOS


def check_splits(data: PairsDataConfig) -> None:
    """Raise ValueError where both splits are the same."""
    if data.train_split == data.test_split:
        raise ValueError(f"--data.train-split and --data.test-split are both {data.train_split}; evaluate on another")


def image_plan(config: ContrastiveConfig) -> Plan:
    """Raises UnknownNameError for an interpolation, ValueError for a scale out of range."""
    data, size = config.data, config.model.image_size
    if data.interpolation not in INTERPOLATIONS:
        raise nearest(data.interpolation, list(INTERPOLATIONS), "--data.interpolation")
    evaluate = eval_transform("none", size, data.interpolation)
    if data.transform != "crop":
        return Plan(train_transform(data.transform, size, data.interpolation), evaluate)
    low, high = data.scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"--data.scale {low:g} {high:g}; expected shares of the area, 0 < smallest <= largest <= 1")
    crop = functools.partial(random_resized_crop, size=size, scale=data.scale, interpolation=data.interpolation)
    return Plan(crop, evaluate)


def load_run_tokenizer(config: ContrastiveConfig, source: PairSource) -> Tokenizer:
    """What the run folder keeps, else the vocabulary that the configuration names, else one of the captions.

    Says on stderr how many captions are longer than the model's context. Raises ValueError for a context that holds no
    text and for parameters to begin with that are of another vocabulary, and what tokenizers raise.
    """
    kept, length = Path(config.out, KEPT), config.model.length
    if config.out and kept.exists():
        return load_tokenizer(kept, pad=config.tokenizer.pad or None)
    tokenizer = make_tokenizer(config.tokenizer, source)
    _check_start(config, tokenizer)
    try:
        tokenizer.encode_batch(source.captions(0)[:1], length)
    except ValueError as error:
        raise ValueError(f"--model.length {length}: {error}") from error
    _tell_cut(source, tokenizer, length)
    return tokenizer


def _check_start(config: ContrastiveConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError where a run begins with parameters that were trained with another vocabulary: their numbers of
    words would mean others, in silence where both have as many."""
    if not config.init:
        return
    folder = RunFolder(config.init)
    if not folder.config_file.exists():
        if not config.tokenizer.path:
            raise ValueError(
                f"--init {config.init} needs the vocabulary that belongs to these weights, and not one made of the "
                "captions: --tokenizer.path FILE, with --tokenizer.kind"
            )
        return
    kept = folder.path / KEPT
    if kept.exists() and load_tokenizer(kept).to_json() != tokenizer.to_json():
        raise ValueError(
            f"--init {config.init} was trained with another vocabulary than this run has: give it with "
            f"--tokenizer.path {config.init}"
        )


def make_tokenizer(options: TokenizerConfig, source: PairSource) -> Tokenizer:
    """From a file or from the captions of ``source``. Raises as ``tokenizer_of``."""
    return tokenizer_of(options, all_captions(source))


def tokenizer_of(options: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """From a file or from ``texts``. Raises ValueError for a token to pad with that does not exist, and for a size
    without room."""
    if options.path:
        pad = options.pad or None
        if options.kind == "wordpiece":
            return wordpiece_file(options.path)
        return (clip_bpe if options.kind == "clip_bpe" else unigram_file)(options.path, pad=pad)
    if options.pad:
        raise ValueError(
            f"--tokenizer.pad {options.pad} is for a vocabulary that is given, and --tokenizer.path is empty; "
            "leave it out"
        )
    train = {"clip_bpe": train_bpe, "wordpiece": train_wordpiece, "unigram": _train_unigram}[options.kind]
    return train(texts, options.size)


def _train_unigram(texts, size: int) -> Tokenizer:
    """Without the tokens for spans that are taken out: no text of ours has any."""
    return train_unigram(texts, size, num_sentinels=0)


def _tell_cut(source: PairSource, tokenizer: Tokenizer, length: int) -> None:
    texts = list(itertools.islice(all_captions(source), MOST_COUNTED))
    cut = count_cut(texts, tokenizer, length)
    if cut:
        print(
            f"{cut} of the first {len(texts)} captions have more than --model.length {length} tokens and lose "
            "their end",
            file=sys.stderr,
        )
