"""Detection: boxes, and masks where the model has them, of the objects in an image."""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from eqvision.counting import count
from eqvision.data.detection import DetectionStream, detection_eval_stream, detection_train_stream, normalize_padded
from eqvision.detectors import RCNN, CenterNet, CenterNet2
from eqvision.keys import StepKeys
from eqvision.losses import CenterNetConfig, RCNNLossConfig, SetPredictionConfig
from eqvision.metrics import Mean, all_reduce
from eqvision.names import nearest
from eqvision.ops import PasteRule
from eqvision.problems.centernet import CenterNetFamily
from eqvision.problems.detection_data import check_splits, eval_plan, load_detection, train_plan
from eqvision.problems.detection_evaluator import DetectionEvaluation, DetectionEvaluator
from eqvision.problems.family import Family
from eqvision.problems.frozen import check_frozen
from eqvision.problems.problem import Counts
from eqvision.problems.rcnn import RCNNFamily
from eqvision.problems.set_prediction import SetPredictionFamily
from eqvision.recipes.detection_config import DetectionConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.types import DetectionBatch, Detections, PaddedImages
from eqvision.zoo import DETECTORS, MODELS, SEGMENTERS, builder

TRAINED_BY = {
    SetPredictionConfig: "detectors of DETR's kind",
    RCNNLossConfig: "R-CNNs and CenterNet2",
    CenterNetConfig: "CenterNets",
}
OTHER_RECIPES = (
    "Recipes for R-CNNs: instances, coco_mask_rcnn_r50_fpn; for CenterNets: coco_centernet_r18; for DETR's kind: detect"
)


@dataclass(frozen=True)
class Detection:
    """A ``Problem``: objects of each image. What depends on the kind of detector is its ``family``."""

    config: DetectionConfig
    source: Any
    test_source: Any
    num_classes: int
    family: Family
    headline: str = "AP"

    def build(self) -> tuple[Any, eqx.nn.State]:
        """Raises ValueError for frozen batch norms without weights to begin with: they would do nothing for good."""
        model, stats = build_detector(self.config, self.num_classes)
        check_frozen(model, self.config.model.name, self.config.init)
        return model, stats

    def forward_macs(self) -> int:
        height, width = self.config.data.size
        images = jax.ShapeDtypeStruct((1, height, width, self.config.model.in_channels), jnp.float32)
        inputs = PaddedImages(cast(Array, images), cast(Array, jax.ShapeDtypeStruct((1, 2), jnp.int32)))
        model, stats = eqx.filter_eval_shape(self.build)
        return count(model, inputs, stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> DetectionStream:
        data, config = self.config.data, self.config
        plan = train_plan(data)
        return detection_train_stream(
            self.source,
            batch_size=config.loop.batch_size,
            seed=config.seed,
            transform=plan.transform,
            buckets=plan.buckets,
            max_objects=data.max_objects,
            masks=self.family.masks,
            mask_crop=data.mask_crop,
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
            masks=self.family.masks,
            mask_crop=data.mask_crop,
            num_threads=data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: DetectionBatch) -> Counts:
        return self.family.counts(batch)

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        batch: DetectionBatch,
        keys: StepKeys,
        counts: Counts,
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        return self.family.loss(model, stats, self._inputs(batch), batch, keys, counts)

    def _inputs(self, batch: DetectionBatch) -> PaddedImages:
        data = self.config.data
        inputs = normalize_padded(batch.images, batch.size, data.mean, data.std)
        return inputs._replace(images=inputs.images.astype(jnp.dtype(self.config.loop.compute_dtype)))

    def evaluate_batch(
        self, model: Any, batch: DetectionBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], Detections]:
        """Sums of the loss over the global batch, and what is found in these rows, in pixels of the original images."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2)
        sums, found = self.family.evaluate(model, stats, self._inputs(batch), batch, key)
        return all_reduce(sums), found

    @property
    def paste(self) -> PasteRule | None:
        return self.family.paste

    def evaluator(self, mesh: Mesh) -> DetectionEvaluator:
        return DetectionEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: DetectionEvaluation) -> None:
        from eqvision.problems.detection_report import write_detection_report

        write_detection_report(folder, rows, evaluation, self.test_source, self.paste)


def build_detector(config: DetectionConfig, num_classes: int) -> tuple[Any, eqx.nn.State]:
    """The model of a run as it is before step 0. Raises UnknownNameError, ValueError for what is no detector."""
    model = config.model
    require_detector(model.name)
    names = ("num_queries", "norm", "dropout", "dialect", "remat", "unroll")
    options = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    return eqx.nn.make_with_state(builder(model.name, options))(
        num_classes=num_classes,
        image_size=config.data.size,
        in_channels=model.in_channels,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )


def require_detector(name: str) -> None:
    """Raise ValueError for an image classifier, UnknownNameError for a name that no model has."""
    if name in MODELS:
        raise ValueError(
            f"--model.name {name} is an image classifier, and this recipe trains detectors (eqvision list --kind "
            f"detector). A run of it can be the start of a detector's backbone: --init RUN"
        )
    if name in SEGMENTERS:
        raise ValueError(
            f"--model.name {name} is a segmenter, and this recipe trains detectors (eqvision list --kind detector)"
        )
    if name not in DETECTORS:
        raise nearest(name, list(DETECTORS), "--model.name: detector")


def choose_family(config: DetectionConfig) -> Family:
    """Raises ValueError where the recipe's loss is not for the model."""
    model, _ = eqx.filter_eval_shape(lambda: build_detector(config, 1))
    task = config.task
    if isinstance(task, RCNNLossConfig) and isinstance(model, (RCNN, CenterNet2)):
        _check_divisor(config, model)
        return RCNNFamily(task, model.dialect.paste if model.mask_head is not None else None)
    if isinstance(task, CenterNetConfig) and isinstance(model, CenterNet):
        return CenterNetFamily(task)
    if isinstance(task, SetPredictionConfig) and not isinstance(model, (RCNN, CenterNet2, CenterNet)):
        return SetPredictionFamily(task)
    kind = {RCNN: "an R-CNN", CenterNet2: "a CenterNet2", CenterNet: "a CenterNet"}.get(type(model), "of DETR's kind")
    raise ValueError(
        f"--model.name {config.model.name} is {kind}, and this recipe is for {TRAINED_BY[type(task)]}. {OTHER_RECIPES}"
    )


def _check_divisor(config: DetectionConfig, model: RCNN | CenterNet2) -> None:
    """A CenterNet2 draws no anchors, so nothing may be divided by their number."""
    assert isinstance(config.task, RCNNLossConfig)
    if isinstance(model, CenterNet2) and config.task.anchors_per_image:
        raise ValueError(
            f"{config.model.name} has no anchors, and --task.anchors-per-image is {config.task.anchors_per_image}; "
            "with the published weights of its loss: --task.anchors-per-image 0 --task.objectness-weight 0.5"
        )


def detection_problem(config: DetectionConfig) -> Detection:
    """Read the annotations and check that everything fits together, before anything is computed or written."""
    require_detector(config.model.name)
    family = choose_family(config)
    source, test_source = _load_splits(config, family.masks)
    _check_queries(config)
    num_classes = config.model.num_classes or len(source.class_names)
    if num_classes < len(source.class_names):
        raise ValueError(
            f"--model.num-classes {num_classes} is fewer than the {len(source.class_names)} classes of the data; "
            "leave it out to take their number"
        )
    return Detection(config, source, test_source, num_classes, family)


def _load_splits(config: DetectionConfig, masks: bool) -> tuple[Any, Any]:
    """To train on and to evaluate on. The classes are those that the file of the training split lists."""
    data, channels = config.data, config.model.in_channels
    check_splits(data)
    source = load_detection(data, channels, data.train_split, masks=masks)
    if data.kind == "digits":
        return source, load_detection(data, channels, data.test_split, masks=masks)
    if not source.num_objects.sum():
        raise ValueError(
            f"{source.json} has {len(source)} images and not one object to train on; left out: {source.dropped}"
        )
    return source, load_detection(data, channels, data.test_split, source.categories, masks=masks)


def _check_queries(config: DetectionConfig) -> None:
    """An object beyond the queries would have none to learn it."""
    model, row = config.model, inspect.signature(DETECTORS[config.model.name]).parameters
    most = model.num_queries or (row["num_queries"].default if "num_queries" in row else None)
    if most is not None and config.data.max_objects > most:
        raise ValueError(
            f"--data.max-objects {config.data.max_objects} is more than the {most} queries of {model.name}, which find "
            "one object each; raise --model.num-queries or keep fewer objects"
        )
