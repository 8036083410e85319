"""The tasks of GLUE: a class of each text or pair of texts, or how alike two texts are."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from eqvision.counting import count
from eqvision.data.text import (
    LabelledStream,
    LabelledTexts,
    Tokenizer,
    labelled_eval_stream,
    labelled_train_stream,
    read_glue,
)
from eqvision.distributed import check_same
from eqvision.keys import StepKeys
from eqvision.language import TextClassifier
from eqvision.losses import mask_rows, softmax_cross_entropy, squared_error
from eqvision.metrics import Mean, all_reduce, glue_task
from eqvision.problems.glue_evaluator import GlueEvaluation, GlueEvaluator, write_glue_report
from eqvision.problems.glue_start import KEPT, begin, check_model, run_tokenizer
from eqvision.recipes.glue_config import GlueConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.types import LabelledTextBatch


@dataclass(frozen=True)
class Glue:
    """A ``Problem``: one task of GLUE."""

    config: GlueConfig
    source: LabelledTexts
    test_source: LabelledTexts
    tokenizer: Tokenizer
    start: TextClassifier
    """The model as it is before step 0."""

    @property
    def task_name(self) -> str:
        return self.config.data.task

    @property
    def num_classes(self) -> int:
        """Width of the head: 1 of a regression."""
        return glue_task(self.task_name).num_outputs

    @property
    def headline(self) -> str:
        """The first figure that the task reports."""
        return glue_task(self.task_name).metrics[0]

    def build(self) -> tuple[Any, eqx.nn.State]:
        return self.start, eqx.nn.State(self.start)

    def forward_macs(self) -> int:
        """Of one text."""
        text = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.source.collate([], 1).text)
        return count(self.start, text).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> LabelledStream:
        """The run folder gets the vocabulary before the first step."""
        self._keep_tokenizer()
        return labelled_train_stream(
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
            if not kept.exists():
                self.tokenizer.save(kept)

    def evaluation_stream(self) -> LabelledStream:
        return labelled_eval_stream(
            self.test_source,
            batch_size=self.config.loop.eval_batch_size,
            num_threads=self.config.data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: LabelledTextBatch) -> Float[Array, ""]:
        """Texts."""
        return batch.weights.sum()

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        batch: LabelledTextBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        outputs = model(batch.text, dtype=self._dtype, train=True, key=keys.own)
        values = self._values(outputs, batch)
        return (values * batch.weights).sum() / jnp.where(counts == 0, 1.0, counts), {}, stats

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.loop.compute_dtype)

    def _values(self, outputs: Float[Array, "b k"], batch: LabelledTextBatch) -> Float[Array, " b"]:
        """Cross entropy, or the squared error of a regression; 0 for rows that only pad the batch."""
        outputs = mask_rows(outputs, batch.weights)
        if glue_task(self.task_name).classes:
            values = softmax_cross_entropy(outputs, batch.labels)
        else:
            values = squared_error(outputs[:, 0], batch.labels)
        return mask_rows(values, batch.weights)

    def evaluate_batch(
        self, model: Any, batch: LabelledTextBatch, stats: eqx.nn.State
    ) -> tuple[Mean, Float[Array, "b k"]]:
        """Sums of the loss over the global batch, and the outputs."""
        outputs = model(batch.text, dtype=self._dtype)
        return all_reduce(Mean.of(self._values(outputs, batch), batch.weights)), outputs

    def evaluator(self, mesh: Mesh) -> GlueEvaluator:
        return GlueEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: GlueEvaluation) -> None:
        write_glue_report(folder, rows, evaluation, self)


def glue_problem(config: GlueConfig) -> Glue:
    """Read the tables and the weights, and check that all fits together, before anything is written.

    Raises ValueError and UnknownNameError for a model, weights and a vocabulary that do not fit, FileNotFoundError
    for tables that are not there, and what ``eqvision.load`` raises.
    """
    data = config.data
    check_model(config)
    if not data.path:
        raise ValueError("a task of GLUE needs its tables: --data.path FOLDER, from gluebenchmark.com/tasks")
    texts = read_glue(data.path, data.task, "train")
    test = read_glue(data.path, data.task, data.test_split)
    task = glue_task(data.task)
    tokenizer = run_tokenizer(config, texts)
    check_same("the vocabulary", tokenizer.to_json())
    options: dict[str, Any] = {"tokenizer": tokenizer, "length": config.model.length}
    source, test_source = (LabelledTexts(each, task.classes, **options) for each in (texts, test))
    return Glue(config, source, test_source, tokenizer, begin(config, task.num_outputs, tokenizer))
