"""Text, tokenizer and examples of a language model's run, from its configuration."""

from pathlib import Path
from typing import NamedTuple

from eqvision.data.text import (
    Corpus,
    MaskedExamples,
    SpanExamples,
    TextPart,
    Tokenizer,
    find_texts,
    load_tokenizer,
    make_corpus,
    sample_text,
    split_text,
    text_lines,
    train_unigram,
    train_wordpiece,
    unigram,
    wordpiece,
)
from eqvision.recipes.text_config import LanguageConfig, TextDataConfig
from eqvision.run_folder import RunFolder

KEPT = "tokenizer.json"


class TextSplits(NamedTuple):
    """The part that is trained on, and the part behind it."""

    train: TextPart
    validation: TextPart


def find_splits(data: TextDataConfig) -> TextSplits:
    """Raises ValueError where the configuration names no text, and what ``find_texts`` and ``split_text`` raise."""
    if not data.path:
        raise ValueError("a language model needs a text: --data.path PATH, a file or a folder with *.txt")
    if not 0 < data.validation_share < 1:
        raise ValueError(f"--data.validation-share {data.validation_share:g}; expected a share between 0 and 1")
    return TextSplits(*split_text(find_texts(data.path), data.validation_share))


def run_tokenizer(config: LanguageConfig, train: TextPart) -> Tokenizer:
    """What the run has been trained with; else the vocabulary that the configuration names; else one made of the
    training text.

    Raises ValueError for the vocabulary of another kind of model, and what tokenizers raise.
    """
    kept = kept_tokenizer(config)
    if kept is not None:
        return _checked(load_tokenizer(kept), config)
    options = config.tokenizer
    if options.path:
        return _checked(_from_file(config), config)
    lines = (line for part in sample_text(train, options.sample_bytes) for line in text_lines(part))
    if config.task.objective == "hidden_words":
        return train_wordpiece(lines, options.size, lowercase=options.lowercase)
    return train_unigram(lines, options.size, num_sentinels=options.num_sentinels)


def kept_tokenizer(config: LanguageConfig) -> Path | None:
    """The vocabulary in a run folder that has a checkpoint; before that other options may still change it."""
    folder = RunFolder(config.out)
    steps = folder.checkpoints.iterdir() if config.out and folder.checkpoints.is_dir() else ()
    kept = folder.path / KEPT
    return kept if kept.exists() and any(step.name.isdigit() for step in steps) else None


def _from_file(config: LanguageConfig) -> Tokenizer:
    options = config.tokenizer
    if config.task.objective == "hidden_words":
        return wordpiece(options.path, lowercase=options.lowercase)
    return unigram(options.path, num_sentinels=options.num_sentinels)


def _checked(tokenizer: Tokenizer, config: LanguageConfig) -> Tokenizer:
    """Whether it has the tokens that stand for what is taken out."""
    if config.task.objective == "hidden_words" and tokenizer.special.mask is None:
        raise ValueError(
            f"--task.objective hidden_words needs a vocabulary of BERT, and this one is of {tokenizer.dialect.name}"
        )
    if config.task.objective == "spans" and not tokenizer.sentinels:
        raise ValueError(
            f"--task.objective spans needs a vocabulary with sentinels, as T5's, and this one, of "
            f"{tokenizer.dialect.name}, has none"
        )
    return tokenizer


def part_corpus(config: LanguageConfig, part: TextPart, tokenizer: Tokenizer) -> Corpus:
    return make_corpus(part, tokenizer, config.data.documents)


def make_examples(
    config: LanguageConfig, corpus: Corpus, tokenizer: Tokenizer, name: str
) -> MaskedExamples | SpanExamples:
    """What is trained on or evaluated; ``name`` is for messages. Raises ValueError for options that do not fit."""
    task, length = config.task, config.model.length
    if task.objective == "hidden_words":
        options = {"share": task.share, "next_sentence": task.next_sentence, "short": task.short, "name": name}
        return MaskedExamples(corpus, tokenizer, length=length, **options)
    return SpanExamples(corpus, tokenizer, length=length, share=task.share, mean=task.mean_span, name=name)
