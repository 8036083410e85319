"""Language models of seconds, a text of generated sentences, and the run that trains them."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

import eqvision.train as train_module
from eqvision.backbones.bert import BERT_SIZES, BertSize
from eqvision.backbones.t5 import T5Size
from eqvision.language import T5, bert_pretraining
from eqvision.mesh import make_mesh
from eqvision.problems import Language, language_problem
from eqvision.recipes import (
    CheckpointConfig,
    LanguageConfig,
    LanguageModelConfig,
    LanguageTaskConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextDataConfig,
    TextTokenizerConfig,
)
from eqvision.zoo_language import LANGUAGE

TOYS = {
    "toy_bert": partial(bert_pretraining, "toy", dropout=0.0),
    "toy_bert_dropout": partial(bert_pretraining, "toy", dropout=0.2),
    "toy_t5": partial(T5, T5Size(16, 1, 2, 8, 32, gated=False), tied=True, dropout=0.0),
}
OBJECTIVES = {"toy_t5": "spans"}
NOUNS, VERBS = ("dog", "cat", "fox", "moon", "king", "queen"), ("sees", "hears", "calls", "likes")


def write_text(file: Path, *, sentences: int = 150, seed: int = 0) -> Path:
    """Sentences of one kind, in documents of five."""
    rng = np.random.default_rng(seed)
    lines = [f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}." for _ in range(sentences)]
    file.write_text("\n\n".join("\n".join(lines[first : first + 5]) for first in range(0, sentences, 5)) + "\n")
    return file


def install(monkeypatch, *, devices=1):
    """The toys in the zoo, and so many devices for ``train``."""
    monkeypatch.setitem(BERT_SIZES, "toy", BertSize(16, 1, 2, 32))
    for name, row in TOYS.items():
        monkeypatch.setitem(LANGUAGE, name, row)
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=devices))


def toy_config(out: Path | str, text: Path | str, *, model="toy_bert", **optimizer) -> LanguageConfig:
    """Steps of 8 texts with SGD, evaluated and saved every third."""
    objective = OBJECTIVES.get(model, "hidden_words")
    return LanguageConfig(
        out=str(out),
        model=LanguageModelConfig(name=model, length=24),
        task=LanguageTaskConfig(objective=objective),
        tokenizer=TextTokenizerConfig(size=80, num_sentinels=8),
        data=TextDataConfig(path=str(text), validation_share=0.2, num_threads=0),
        # SGD does not make full steps of the rounding of gradients that are zero, as AdamW does
        optimizer=OptimizerConfig(**{"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=1.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def of_steps(config: LanguageConfig, count: int = 6) -> LanguageConfig:
    """The configuration with exactly so many steps."""
    per_epoch = max(1, len(language_problem(config).source) // config.loop.batch_size)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=count / per_epoch))


def toy_problem(config: LanguageConfig) -> Language:
    return language_problem(config)


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, ids, targets = batch.weights.copy(), batch.text.ids.copy(), batch.targets.copy()
    weights[rows], ids[rows], targets[rows] = 0.0, junk, junk
    return batch._replace(weights=weights, text=batch.text._replace(ids=ids), targets=targets)


def emptied(batch, rows):
    """Rows of which nothing is to be told."""
    asked = batch.target_mask.copy()
    asked[rows] = False
    return batch._replace(target_mask=asked)
