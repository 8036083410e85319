"""Captioned images on disk, a source in memory, and a tokenizer of whole words."""

import json

import numpy as np
from PIL import Image

from eqvision.data.pairs import PairExample
from eqvision.types import TextTokens


def write_images(root, names, size=(6, 8)):
    """PNGs of one colour each, so that they can be told apart."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), 10 * number, np.uint8)).save(root / name)


def write_lines(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def jsonl(**row):
    return json.dumps(row, ensure_ascii=False)


class WordTokenizer:
    """Begin 1, end 2, padding 0, then the given words from 4 on; others are 3."""

    def __init__(self, *words):
        self.ids = {word: 4 + number for number, word in enumerate(words)}
        self.vocab_size = 4 + len(words)

    def encode_batch(self, texts, length):
        ids, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            numbers = [1, *(self.ids.get(word, 3) for word in text.replace(",", " ,").split()), 2]
            numbers = numbers if len(numbers) <= length else [*numbers[: length - 1], 2]
            ids[row, : len(numbers)], mask[row, : len(numbers)] = numbers, True
        return TextTokens(ids, mask)


class ToyPairs:
    """Images whose pixels tell their index; of several captions each."""

    class_names, num_skipped = (), 0

    def __init__(self, count, captions=3, sizes=((4, 5),), corrupt=()):
        self.count, self.each, self.sizes, self.corrupt = count, captions, sizes, corrupt
        self.labels = np.full(count, -1, np.int32)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((*self.sizes[index % len(self.sizes)], 1), index, np.uint8)
        return PairExample(image, self.captions(index), index, float(index not in self.corrupt))

    def captions(self, index):
        return tuple(f"image {index} text {number}" for number in range(self.each))

    def describe(self, index):
        return f"toy {index}"
