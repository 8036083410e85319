"""Language models: hidden words (BERT) and spans (T5) are told from the text around them."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from eqvision.counting import count
from eqvision.data.text import (
    MaskedExamples,
    SpanExamples,
    TextStream,
    Tokenizer,
    text_eval_stream,
    text_train_stream,
)
from eqvision.distributed import check_same
from eqvision.keys import StepKeys
from eqvision.losses import BertCounts
from eqvision.metrics import Mean, Perplexity, all_reduce
from eqvision.names import nearest
from eqvision.problems.language_data import KEPT, TextSplits, find_splits, make_examples, part_corpus, run_tokenizer
from eqvision.problems.language_evaluator import LanguageEvaluation, LanguageEvaluator, LanguageSums
from eqvision.problems.language_objectives import HiddenWords, Objective, Spans, target_counts, target_weights
from eqvision.recipes.text_config import LanguageConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.types import LanguageBatch
from eqvision.zoo_language import LANGUAGE, language_builder

# Options that tell the models of one objective from others.
TELLING = {"hidden_words": "next_sentence", "spans": "decoder_depth"}


@dataclass(frozen=True)
class Language:
    """A ``Problem``: words from the words around them."""

    config: LanguageConfig
    source: MaskedExamples | SpanExamples
    test_source: MaskedExamples | SpanExamples
    tokenizer: Tokenizer
    unigram: Float[np.ndarray, " v"]
    """Logarithm of how often each word comes in the training text; NaN for tokens that are no words."""
    headline: str = "word_loss"

    @property
    def num_classes(self) -> int:
        """Words of the vocabulary."""
        return self.tokenizer.vocab_size

    def build(self) -> tuple[Any, eqx.nn.State]:
        return build_language_model(self.config, self.tokenizer)

    @functools.cached_property
    def objective(self) -> Objective:
        task, special = self.config.task, self.tokenizer.special
        if task.objective == "hidden_words":
            return HiddenWords(task, cast(int, special.mask))  # MaskedExamples has refused tokenizers without
        return Spans(task, special.pad)

    def forward_macs(self) -> int:
        """Of one text, and of the logits that training asks for."""
        model, _ = eqx.filter_eval_shape(self.build)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.source.collate([], [], 1))
        if self.config.task.objective == "hidden_words":
            return count(lambda m, text, at: m(text, positions=at), model, batch.text, batch.positions).macs
        return count(model, batch.text, batch.targets).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> TextStream:
        """The run folder gets the vocabulary before the first step."""
        self._keep_tokenizer()
        return text_train_stream(
            self.source,
            batch_size=self.config.loop.batch_size,
            seed=self.config.seed,
            num_threads=self.config.data.num_threads,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _keep_tokenizer(self) -> None:
        folder = RunFolder(self.config.out)
        if self.config.out and jax.process_index() == 0 and folder.config_file.exists():
            kept = folder.path / KEPT
            if not kept.exists() or kept.read_text("utf-8") != self.tokenizer.to_json():
                self.tokenizer.save(kept)

    def evaluation_stream(self) -> TextStream:
        return text_eval_stream(
            self.test_source,
            batch_size=self.config.loop.eval_batch_size,
            num_threads=self.config.data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: LanguageBatch) -> BertCounts:
        return target_counts(batch)

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        batch: LanguageBatch,
        keys: StepKeys,
        counts: BertCounts,
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        loss, terms = self.objective.loss(model, batch, self._dtype, keys.own, counts)
        return loss, terms, stats

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.loop.compute_dtype)

    def evaluate_batch(
        self, model: Any, batch: LanguageBatch, stats: eqx.nn.State
    ) -> tuple[LanguageSums, Int[Array, "b m"]]:
        """Sums over the global batch, and the likeliest token in place of each target. Words are the targets that the
        model did not see; tokens that are no words are left out."""
        told = self.objective.tell(model, batch, self._dtype)
        weights, unigram = target_weights(batch), jnp.asarray(self.unigram)[batch.targets]
        words = jnp.where(jnp.isnan(unigram), 0.0, weights * told.unseen)
        right = (told.likeliest == batch.targets).astype(jnp.float32)
        sums = LanguageSums(
            {"targets": _mean(told.values, weights), **told.loss_parts},
            Perplexity.of(told.values, words),
            {
                "word_loss": _mean(told.values, words),
                "word_accuracy": _mean(right, words),
                "unigram_loss": _mean(-jnp.where(jnp.isnan(unigram), 0.0, unigram), words),
                **told.figures,
            },
        )
        return all_reduce(sums), told.likeliest

    def evaluator(self, mesh: Mesh) -> LanguageEvaluator:
        return LanguageEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        """None; at the end of a run, a T5 writes spans into texts of the evaluation, for people to read."""
        from eqvision.problems.language_report import write_infilled

        if last and self.config.task.objective == "spans" and jax.process_count() == 1:
            write_infilled(folder, model, self)
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: LanguageEvaluation) -> None:
        from eqvision.problems.language_report import write_language_report

        write_language_report(folder, rows, evaluation, self)


def _mean(values: Float[Array, "b m"], weights: Float[Array, "b m"]) -> Mean:
    return Mean.of(values.ravel(), weights.ravel())


def build_language_model(config: LanguageConfig, tokenizer: Tokenizer) -> tuple[Any, eqx.nn.State]:
    """The model of a run as it is before step 0. Raises ValueError for options that the model does not have, and for
    fewer words than the vocabulary has."""
    model, accepted = config.model, inspect.signature(LANGUAGE[config.model.name]).parameters
    chosen = {
        "norm_order": model.norm_order,
        "mimetic": model.mimetic,
        "dropout": model.dropout,
        "remat": model.remat,
        "unroll": model.unroll,
        "attention": model.attention,
    }
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options["vocab_size"] = model.vocab_size or tokenizer.vocab_size
    tokenizer.require_fits(options["vocab_size"], f"--model.vocab-size of {model.name} is")
    if "max_positions" in accepted:
        options["max_positions"] = max(model.length, accepted["max_positions"].default)
    if config.task.objective == "hidden_words":
        options["next_sentence"] = config.task.next_sentence
    build = language_builder(model.name, options)
    return eqx.nn.make_with_state(build)(key=jax.random.fold_in(jax.random.key(config.seed), 0))


def require_language_model(name: str, objective: str) -> None:
    """Raise UnknownNameError for a name that no model has, ValueError for one that another objective trains."""
    known = [other for other, row in LANGUAGE.items() if TELLING[objective] in inspect.signature(row).parameters]
    if name in known:
        return
    from eqvision.zoo import DETECTORS, MODELS, PROMPTED, SEGMENTERS

    if name in {**LANGUAGE, **MODELS, **DETECTORS, **SEGMENTERS, **PROMPTED}:
        raise ValueError(f"--model.name {name} is not trained with --task.objective {objective}: {', '.join(known)}")
    raise nearest(name, known, f"--model.name: language model for {objective}")


def language_problem(config: LanguageConfig) -> Language:
    """Find the text, make or read the vocabulary, and check that everything fits together, before anything is written.

    Raises ValueError and UnknownNameError for a model and options that do not fit, FileNotFoundError and what
    tokenizers raise.
    """
    require_language_model(config.model.name, config.task.objective)
    if config.init:
        raise ValueError(f"--init {config.init}: language models begin fresh; leave it out")
    splits = find_splits(config.data)
    tokenizer = run_tokenizer(config, splits.train)
    check_same("the vocabulary", tokenizer.to_json())
    problem = _problem(config, splits, tokenizer)
    eqx.filter_eval_shape(problem.build)
    return problem


def _problem(config: LanguageConfig, splits: TextSplits, tokenizer: Tokenizer) -> Language:
    train = part_corpus(config, splits.train, tokenizer)
    source = make_examples(config, train, tokenizer, f"{config.data.path}, training part")
    test_source, split = source, config.data.test_split
    if split == "validation":
        corpus = part_corpus(config, splits.validation, tokenizer)
        test_source = make_examples(config, corpus, tokenizer, f"{config.data.path}, validation part")
    for part, name in ((source, "training"), (test_source, split)):
        if not len(part):
            raise ValueError(f"the {name} part of {config.data.path} has no example: the text is too short")
    return Language(config, source, test_source, tokenizer, unigram_logs(train.ids, tokenizer))


def unigram_logs(ids: Integer[np.ndarray, " n"], tokenizer: Tokenizer) -> Float[np.ndarray, " v"]:
    """Logarithm of each word's share of a text, each counted once more than it comes, so that none has no share.

    Its cross entropy is what a model reaches that knows how often words come and nothing of where. NaN for tokens that
    are no words: pad, start, end, mask and sentinels.
    """
    size = tokenizer.vocab_size
    counts = np.ones(size)
    for first in range(0, len(ids), 2**24):  # a large text stays on disk
        counts += np.bincount(ids[first : first + 2**24], minlength=size)
    special = {tokenizer.special.pad, tokenizer.special.start, tokenizer.special.end, tokenizer.special.mask}
    counts[[number for number in (*special, *tokenizer.sentinels) if number is not None]] = np.nan
    return cast(Any, np.log(counts / np.nansum(counts)).astype(np.float32))
