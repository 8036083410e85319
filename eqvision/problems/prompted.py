"""Training of models with prompts (Segment Anything): masks of objects for simulated clicks and boxes."""

from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from eqvision.counting import count
from eqvision.data.detection import DetectionStream, detection_eval_stream, detection_train_stream, normalize_padded
from eqvision.keys import StepKeys, image_keys
from eqvision.losses.prompted_masks import PromptedMaskConfig
from eqvision.metrics import Mean, all_reduce
from eqvision.names import nearest
from eqvision.problems.detection_data import check_splits, eval_plan, load_detection, train_plan
from eqvision.problems.prompted_evaluator import PromptedEvaluation, PromptedEvaluator, PromptedFound
from eqvision.recipes.prompted_config import PromptedConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.segmenters.sam import box_prompts, score_clicks, train_rounds
from eqvision.types import DetectionBatch, PromptedImages
from eqvision.zoo import PROMPTED, builder, row_of

FINER = 4  # how many cells of the masks lie along a side of one of the features


@dataclass(frozen=True)
class Prompted:
    """A ``Problem``: the masks of objects, each asked for by rounds of clicks. Classes are of no matter."""

    config: PromptedConfig
    source: Any
    test_source: Any
    num_classes: int
    cells: tuple[int, int]
    """Height and width of the masks that the model gives."""
    headline: str = "click_iou"

    def build(self) -> tuple[Any, eqx.nn.State]:
        return build_prompted(self.config)

    def forward_macs(self) -> int:
        """With the box of one object as the prompt."""
        height, width = self.config.data.size
        model, stats = eqx.filter_eval_shape(self.build)
        masks, valid = jnp.zeros((1, 1, *self.cells)), jnp.ones((1, 1), bool)
        prompts = jax.eval_shape(lambda: box_prompts(masks, valid, stride=height // self.cells[0]))
        images = cast(Array, jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))
        return count(model, PromptedImages(images, prompts), stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> DetectionStream:
        data, plan = self.config.data, train_plan(self.config.data)
        return detection_train_stream(
            self.source,
            batch_size=self.config.loop.batch_size,
            seed=self.config.seed,
            transform=plan.transform,
            buckets=plan.buckets,
            max_objects=data.max_objects,
            masks=True,
            num_threads=data.num_threads,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluation_stream(self) -> DetectionStream:
        data, plan = self.config.data, eval_plan(self.config.data)
        return detection_eval_stream(
            self.test_source,
            batch_size=self.config.loop.eval_batch_size,
            transform=plan.transform,
            buckets=plan.buckets,
            max_objects=data.max_objects,
            masks=True,
            num_threads=data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: DetectionBatch) -> Float[Array, ""]:
        """Objects, by which the loss is divided."""
        _, valid = small_masks(batch, self.cells)
        return (valid * batch.weights[:, None]).astype(jnp.float32).sum()

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        batch: DetectionBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        """Of all rounds alike. What is drawn depends on the step and the image, not on the device it is on."""
        task = self.config.task
        features, new = model.encode(self._images(batch), stats, train=True, key=keys.own)
        if not self.config.model.train_encoder:
            features = lax.stop_gradient(features)
        masks, valid = small_masks(batch, self.cells)
        weights = PromptedMaskConfig(focal=task.focal, dice=task.dice, iou=task.iou)

        def one(features: Array, masks: Array, valid: Array, key: Key[Array, ""]) -> Any:
            rows = features[None], masks[None], valid[None]
            return train_rounds(model, *rows, key=key, points=task.points, config=weights).losses

        losses = jax.vmap(one)(features, masks, valid, image_keys(keys.common, batch.indices))
        share = batch.weights[:, None, None, None] / (jnp.maximum(counts, 1.0) * losses.total.shape[1])

        def shared(values: Float[Array, "b r 1 p"]) -> Float[Array, ""]:
            return jnp.sum(jnp.where(share > 0, share * values, 0.0))

        terms = {"focal": losses.focal, "dice": losses.dice, "iou": losses.iou, "actual_iou": losses.actual_iou}
        return shared(losses.total), {name: shared(values) for name, values in terms.items()}, new

    def _images(self, batch: DetectionBatch) -> Array:
        images = normalize_padded(batch.images, batch.size, self.config.data.mean, self.config.data.std).images
        return images.astype(jnp.dtype(self.config.loop.compute_dtype))

    def evaluate_batch(
        self, model: Any, batch: DetectionBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], PromptedFound]:
        """Sums of the IoU over the objects of the global batch, and what was found for boxes in these rows."""
        features, _ = model.encode(self._images(batch), stats)
        masks, valid = small_masks(batch, self.cells)
        seed = jax.random.fold_in(jax.random.key(self.config.seed), 2)

        def one(features: Array, masks: Array, valid: Array, key: Key[Array, ""]) -> Any:
            rows = features[None], masks[None], valid[None]
            return score_clicks(model, *rows, clicks=self.config.task.clicks, key=key)

        scores = jax.vmap(one)(features, masks, valid, image_keys(seed, batch.indices))
        weight = (valid * batch.weights[:, None]).astype(jnp.float32)
        last = scores.clicks.shape[1]
        columns = {"box_iou": scores.box[:, 0], "click_iou": scores.clicks[:, 0, 0]}
        columns |= {f"click{last}_iou": scores.clicks[:, -1, 0]} if last > 1 else {}
        sums = {
            name: Mean(jnp.sum(jnp.where(weight > 0, weight * iou, 0.0)), weight.sum()) for name, iou in columns.items()
        }
        return all_reduce(sums), PromptedFound(scores.logits[:, 0], masks, valid, scores.box[:, 0])

    def evaluator(self, mesh: Mesh) -> PromptedEvaluator:
        return PromptedEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: PromptedEvaluation) -> None:
        from eqvision.problems.prompted_report import write_prompted_report

        write_prompted_report(folder, rows, evaluation, self.test_source)


def small_masks(batch: DetectionBatch, size: tuple[int, int]) -> tuple[Float[Array, "b p h w"], Bool[Array, "b p"]]:
    """Masks of 0 and 1 at the size of logits: a cell is 1 where half of it or more is object.

    Objects of which nothing is left at that size are no prompts, so they are not valid.
    """
    masks = batch.targets.masks
    assert masks is not None
    (b, p, rows, columns), (height, width) = masks.shape, size
    cells = masks.reshape(b, p, height, rows // height, width, columns // width).astype(jnp.float32)
    small = (cells.mean(axis=(3, 5)) >= 0.5).astype(jnp.float32)
    return small, batch.targets.valid & jnp.any(small > 0, axis=(2, 3))


def build_prompted(config: PromptedConfig) -> tuple[Any, eqx.nn.State]:
    """The model of a run as it is before step 0. Raises UnknownNameError, ValueError for what takes no prompts."""
    model = config.model
    require_prompted(model.name)
    options = {} if model.drop_path is None else {"drop_path": model.drop_path}
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return eqx.nn.make_with_state(builder(model.name, options))(image_size=config.data.size, in_channels=3, key=key)


def require_prompted(name: str) -> None:
    """Raise UnknownNameError for a name that no model has, ValueError for a model that takes no prompts."""
    if name in PROMPTED:
        return
    try:
        row_of(name)
    except ValueError:
        raise nearest(name, list(PROMPTED), "--model.name: model with prompts") from None
    raise ValueError(
        f"--model.name {name} takes no prompts, and this recipe trains models that do: {', '.join(PROMPTED)}"
    )


def prompted_problem(config: PromptedConfig) -> Prompted:
    """Read the annotations and check that everything fits together, before anything is computed or written."""
    require_prompted(config.model.name)
    _check(config)
    data = config.data
    check_splits(data)
    source = load_detection(data, 3, data.train_split, masks=True)
    known = {} if data.kind == "digits" else {"categories": source.categories}
    test_source = load_detection(data, 3, data.test_split, masks=True, **known)
    return Prompted(config, source, test_source, len(source.class_names), _cells(config))


def _cells(config: PromptedConfig) -> tuple[int, int]:
    """Raises ValueError for a size that the model's patches do not divide."""
    model, _ = eqx.filter_eval_shape(lambda: build_prompted(config))
    height, width = config.data.size
    return FINER * height // model.backbone.strides[-1], FINER * width // model.backbone.strides[-1]


def _check(config: PromptedConfig) -> None:
    task, (height, width) = config.task, config.data.size
    if task.points < 0 or task.clicks < 1:
        raise ValueError(
            f"--task.points {task.points}, --task.clicks {task.clicks}; expected 0 or more points and 1 click or more"
        )
    if height != width:
        raise ValueError(f"--data.size {height} {width}; models with prompts take squares, such as {width} {width}")
    if config.data.transform in ("detr", "resize"):
        raise ValueError(
            f"--data.transform {config.data.transform} gives images of many sizes, and models with prompts take one; "
            "choose lsj, shifted or fixed"
        )
