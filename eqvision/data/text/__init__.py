"""Texts: tokenizers, files, and what language models are trained on."""

from eqvision.data.text.corpus import Corpus, make_corpus
from eqvision.data.text.examples import CausalExamples, MaskedExamples, SpanExamples, TextExample, TextExamples
from eqvision.data.text.files import TextPart, documents, find_texts, sample_text, split_text, text_lines
from eqvision.data.text.glue import GlueTexts, read_glue
from eqvision.data.text.labelled import (
    LabelledStream,
    LabelledTexts,
    labelled_eval_stream,
    labelled_train_stream,
)
from eqvision.data.text.spans import corrupt_spans, fill_spans, noise_mask, text_length
from eqvision.data.text.stream import TextStream, text_eval_stream, text_train_stream
from eqvision.data.text.tokenizer import SpecialIds, Tokenizer, check_ids
from eqvision.data.text.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from eqvision.data.text.vocabularies import clip_bpe, load_tokenizer, unigram, wordpiece

__all__ = [
    "CausalExamples",
    "Corpus",
    "GlueTexts",
    "LabelledStream",
    "LabelledTexts",
    "MaskedExamples",
    "SpanExamples",
    "SpecialIds",
    "TextExample",
    "TextExamples",
    "TextPart",
    "TextStream",
    "Tokenizer",
    "check_ids",
    "clip_bpe",
    "corrupt_spans",
    "documents",
    "fill_spans",
    "find_texts",
    "labelled_eval_stream",
    "labelled_train_stream",
    "load_tokenizer",
    "make_corpus",
    "noise_mask",
    "read_glue",
    "sample_text",
    "split_text",
    "text_eval_stream",
    "text_length",
    "text_lines",
    "text_train_stream",
    "train_bpe",
    "train_unigram",
    "train_wordpiece",
    "unigram",
    "wordpiece",
]
