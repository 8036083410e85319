"""What people look at in the run folder of a language model."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eqvision.data.text import Tokenizer
from eqvision.problems.language_evaluator import LanguageSample
from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan

NUM_INFILLED = 4


def write_language_report(folder: RunFolder, rows: list[Row], evaluation: Any, problem: Any) -> None:
    """``result.json``, ``predictions.txt`` (samples of the evaluation) and the learning curve, where matplotlib is
    installed, else a line that says how."""
    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    texts = [_described(sample, problem) for sample in evaluation.samples]
    _write(folder.path / "predictions.txt", HEADS[problem.config.task.objective], texts)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, "word_loss")


HEADS = {
    "hidden_words": "Hidden words: [likeliest word], and behind a bar the true one where that is another.",
    "spans": "Spans: each word is the likeliest one behind the true words before it; what the model writes without "
    "these is in infilled.txt.",
}


def _write(file: Path, head: str, texts: list[str]) -> None:
    file.write_text("\n\n".join([head, *texts]) + "\n", "utf-8")


def _described(sample: LanguageSample, problem: Any) -> str:
    head = problem.test_source.describe(sample.index)
    if sample.positions is None:
        return "\n".join([head, *_spans(sample.ids, sample.targets, sample.likeliest, problem.tokenizer)])
    return f"{head}\n{hidden_words_text(sample, problem.tokenizer)}"


def hidden_words_text(sample: LanguageSample, tokenizer: Tokenizer) -> str:
    """The text with the words that were told in their places."""
    words = [tokenizer.token_of(number) for number in sample.ids.tolist()]
    places = [] if sample.positions is None else sample.positions.tolist()
    for place, told, true in zip(places, sample.likeliest.tolist(), sample.targets.tolist(), strict=True):
        said, right = tokenizer.token_of(told), tokenizer.token_of(true)
        words[place] = f"[{said}]" if told == true else f"[{said}|{right}]"
    return " ".join(words).replace(" ##", "")


def _spans(ids: np.ndarray, targets: np.ndarray, told: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text, what was taken out and what was told; numbers without a word, of a larger model, are left out."""
    known = told[told < tokenizer.vocab_size]
    return [
        f"text: {tokenizer.decode(ids, special=True)}",
        f"true: {tokenizer.decode(targets, special=True)}",
        f"told: {tokenizer.decode(known, special=True)}",
    ]


def write_infilled(folder: RunFolder, model: Any, problem: Any) -> None:
    """``infilled.txt``: spans that the model writes by itself, the likeliest token each time, into texts of the
    evaluation."""
    from eqvision.language.generate import greedy, prompt_of

    tokenizer, source = problem.tokenizer, problem.test_source
    indices = np.linspace(0, len(source) - 1, min(NUM_INFILLED, len(source))).round().astype(int).tolist()
    examples = [source.example(index, np.random.default_rng([0, index])) for index in indices]
    batch = source.collate(examples, indices, len(indices))
    text = batch.text._replace(ids=jnp.asarray(batch.text.ids), mask=jnp.asarray(batch.text.mask))
    cache = model.start(model.encode(text), text.mask)
    prompt = prompt_of(tokenizer.special.pad, len(indices))
    length, end = batch.targets.shape[1], tokenizer.special.end
    written = greedy(model, cache, prompt, max_new_tokens=length, end_id=end, pad_id=tokenizer.special.pad)
    texts = []
    for row, index in enumerate(indices):
        told = np.asarray(written.ids[row])[np.asarray(written.mask[row])]
        true = batch.targets[row][batch.target_mask[row]]
        lines = _spans(batch.text.ids[row][batch.text.mask[row]], true, told, tokenizer)
        texts.append("\n".join([source.describe(index), *lines]))
    _write(folder.path / "infilled.txt", "Spans as the model writes them, the likeliest token each time.", texts)
