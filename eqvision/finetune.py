"""Beginning with other parameters than fresh ones: those of a run or published weights, as the start of training, or as
a teacher that does not change."""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from eqvision.checkpoint import CheckpointError
from eqvision.classifiers import Classifier
from eqvision.detectors import OwlViT
from eqvision.layers import SinCos2D, resample_grid
from eqvision.multimodal import Clip
from eqvision.names import nearest
from eqvision.predict import load_run
from eqvision.pretrained.leaf_names import named_arrays, with_leaves
from eqvision.pretraining import MAE, MAES
from eqvision.recipes import (
    ContrastiveConfig,
    DetectionConfig,
    MaskedConfig,
    OpenVocabularyConfig,
    PromptedConfig,
    SegmentationConfig,
    TrainConfig,
)
from eqvision.run_folder import RunFolder
from eqvision.segmenters import Segmenter, UNet
from eqvision.segmenters.sam import SAM
from eqvision.state import Teacher
from eqvision.zoo import DETECTORS, MODELS, PROMPTED, SEGMENTERS
from eqvision.zoo_language import LANGUAGE

Leaves = dict[str, Array]

# A batch norm's statistics are state where it trains and parameters where it is frozen.
STATISTICS = {"mean": "running_mean", "variance": "running_var"}


class Start(NamedTuple):
    """What a run begins with."""

    model: Any
    stats: eqx.nn.State
    name: str
    """Of the model in the zoo."""
    said: str
    """Where it is from."""


def start_from(init: str | Path, model: Any, stats: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
    """``model`` and ``stats`` with the numbers that ``init`` names.

    ``init`` is a run folder, of which the newest checkpoint is taken (its average, where it keeps one), or published
    weights: ``MODEL`` or ``MODEL:SOURCE``, with a name of the zoo and what ``eqvision eval MODEL --weights SOURCE``
    takes. Between a classifier, a detector, a segmenter and a masked autoencoder the backbone alone goes over. Between
    two of a kind all does but a classification layer of another shape, which stays fresh. Learned positions are
    resampled to the new grid and begin as the sin-cos table where that is fixed there; the statistics of batch norms
    become parameters where they are frozen. A final norm is left out where the new model has it behind its pooling.
    Models of images and text begin with their like alone, and an open-vocabulary detector with one too, of which its
    towers begin with those of CLIP. What stays fresh, is left out or is resampled is said on
    stderr.

    Raises CheckpointError with the first names where anything else differs; UnknownNameError for a model that does not
    exist; what ``load_run`` and ``eqvision.load`` raise.
    """
    start = _start(str(init), model)
    notes: list[str] = []
    new = named_arrays(model, stats)
    old = _as_learned(start.model, named_arrays(start.model, start.stats), new, notes)
    old = _as_towers(start.model, model, old, new, notes)
    leaves = _copied(old, new, _kinds(start.model, model), notes, f"{init} ({start.name})")
    print("\n".join([f"begins with {start.said}", *notes]), file=sys.stderr)
    return with_leaves(model, stats, leaves)


def _start(init: str, model: Any) -> Start:
    folder, name = RunFolder(init), init.partition(":")[0]
    if folder.config_file.exists():
        return _run(folder)
    known = [*MODELS, *DETECTORS, *SEGMENTERS, *PROMPTED, *LANGUAGE, *MAES]
    if name in known:
        return _published(name, init.partition(":")[2] or None, model)
    if not folder.path.exists() and len(Path(name).parts) == 1:
        raise nearest(name, known, f"--init {init}: no run folder is there, and model")
    return _run(folder)


def _run(folder: RunFolder) -> Start:
    config = folder.config() if folder.config_file.exists() else None
    if isinstance(config, DetectionConfig):
        from eqvision.predict_objects import load_detector_run  # which needs the problems, and they need this

        run = load_detector_run(folder.path)
    elif isinstance(config, SegmentationConfig):
        from eqvision.predict_pixels import load_segmenter_run  # likewise

        run = load_segmenter_run(folder.path)
    elif isinstance(config, PromptedConfig):
        from eqvision.predict_prompted import load_prompted_run  # likewise

        run = load_prompted_run(folder.path)
    elif isinstance(config, MaskedConfig):
        from eqvision.evaluate_masked import load_masked_run  # likewise

        run = load_masked_run(folder.path)
    elif isinstance(config, OpenVocabularyConfig):
        from eqvision.predict_queried import load_open_vocabulary_run  # likewise

        run = load_open_vocabulary_run(folder.path)
    elif isinstance(config, ContrastiveConfig):
        from eqvision.predict_pairs import load_contrastive_run  # likewise

        run = load_contrastive_run(folder.path)
    else:
        run = load_run(folder.path)
    return Start(run.model, run.stats, run.config.model.name, f"{folder.path}, step {run.step}")


def _published(name: str, source: str | None, model: Any) -> Start:
    from eqvision.pretrained.assemble import Sizes
    from eqvision.pretrained.load import read_model  # all layouts are behind it

    if (name in LANGUAGE) != isinstance(model, (Clip, OwlViT)):
        raise _other_kind(name)
    # Where the head is not used, weights without one will do.
    tables: dict[str, Any] = {
        "contrastive": LANGUAGE,
        "open_vocabulary": LANGUAGE,
        "classifier": MODELS,
        "detector": DETECTORS,
        "segmenter": SEGMENTERS,
        "prompted": PROMPTED,
        "masked": MAES,
    }
    backbone_only = name not in tables.get(_kind(model), {})
    tower = model.image_tower if isinstance(model, Clip) else model.backbone
    classes = 1 if backbone_only and name not in MAES else None
    sizes = Sizes(num_classes=classes, in_channels=tower.in_channels)
    loaded = read_model(name, source, sizes)
    return Start(loaded.model, loaded.state, name, f"published weights of {name}, {loaded.path}")


class _Kinds(NamedTuple):
    """What may differ: all but the backbone, or what matches this expression."""

    backbone_only: bool
    head: re.Pattern[str]


# Of each kind of model, what depends on the number of classes: of detectors DETR's, CenterNet's, and R-CNN's layers.
HEADS = {
    "classifier": re.compile(r"head\."),
    "detector": re.compile(r"head\.(classes|heatmap)\.|box_heads\.\d+\.(logits|deltas)\.|mask_head\.logits\."),
    "segmenter": re.compile(r"(head|auxiliary)\."),
    "prompted": re.compile(r"(?!)"),  # nothing does
    "masked": re.compile(r"(?!)"),
    "contrastive": re.compile(r"(?!)"),
    "open_vocabulary": re.compile(r"head\.|merge_norm\."),  # CLIP has none, and the first version no objectness
}


def _kind(model: Any) -> str:
    if isinstance(model, Classifier):
        return "classifier"
    if isinstance(model, SAM):
        return "prompted"
    if isinstance(model, MAE):
        return "masked"
    if isinstance(model, Clip):
        return "contrastive"
    if isinstance(model, OwlViT):
        return "open_vocabulary"
    return "segmenter" if isinstance(model, (Segmenter, UNet)) else "detector"


def _kinds(old: Any, new: Any) -> _Kinds:
    towers = isinstance(new, OwlViT) and isinstance(old, (Clip, OwlViT))
    if not towers and {type(old), type(new)} & {Clip, OwlViT} and type(old) is not type(new):
        raise _other_kind(type(old).__name__)
    return _Kinds(_kind(old) != _kind(new) and not towers, HEADS[_kind(new)])


def _other_kind(what: str) -> CheckpointError:
    """Their towers are no backbones of each other: nothing would go over."""
    return CheckpointError(
        f"--init {what}: a model of images and text (CLIP, SigLIP) begins with another such model, and no other kind "
        "of model begins with one"
    )


def _copied(old: Leaves, new: Leaves, kinds: _Kinds, notes: list[str], what: str) -> Leaves:
    """The leaves to begin with, in the names and the order of ``new``."""
    old = _renamed_statistics(old, new)
    wanted = {name: leaf for name, leaf in new.items() if _in_backbone(name) or not kinds.backbone_only}
    if kinds.backbone_only:
        notes += _other_parts(old, new)
        old = {name: leaf for name, leaf in old.items() if _in_backbone(name)}
    wrong = sorted(name for name in {*old, *wanted} if not _fits(name, old, wanted, kinds.head))
    if wrong:
        lines = [f"{name}: {_shape(old, name)} there, {_shape(new, name)} here" for name in wrong[:5]]
        raise CheckpointError(
            f"--init {what} does not fit this model; {len(wrong)} parameters differ:\n  " + "\n  ".join(lines)
        )
    return new | {name: _brought(name, old.get(name), leaf, notes) for name, leaf in wanted.items()}


def _as_learned(model: Any, old: Leaves, new: Leaves, notes: list[str]) -> Leaves:
    """The leaves of ``model`` as a fine-tuned ViT has them, where it differs from the one that was pre-trained: learned
    positions in place of a fixed table, and the final norm behind the pooling, where it is fresh."""
    table, name = getattr(getattr(model, "backbone", None), "position", None), "backbone.position.weight"
    if isinstance(table, SinCos2D) and name in new and name not in old:
        notes.append(f"  {name}: the fixed sin-cos table, which trains from here")
        old = old | {name: table((new[name].shape[0], new[name].shape[1]))}
        single = "backbone.class_position"
        old |= {single: jnp.zeros_like(new[single])} if single in new and single not in old else {}
    norm = [f"backbone.norm.{part}" for part in ("weight", "bias")]
    if set(norm) <= old.keys() and not set(norm) & new.keys() and "head.norm.weight" in new:
        notes.append("  backbone.norm: left out; the norm is behind the pooling here")
        old = {name: leaf for name, leaf in old.items() if name not in norm}
    return old


def _as_towers(model: Any, wanted: Any, old: Leaves, new: Leaves, notes: list[str]) -> Leaves:
    """The leaves of a CLIP by the names of an open-vocabulary detector's towers; positions of texts are cut to those
    that it has."""
    if not (isinstance(model, Clip) and isinstance(wanted, OwlViT)):
        return old
    parts = {"image_tower.": "backbone.", "text_tower.": "text_tower.", "text_head.": "text_head."}
    pairs = [(ours, theirs, name) for theirs, ours in parts.items() for name in old if name.startswith(theirs)]
    found = {ours + name.removeprefix(theirs): old[name] for ours, theirs, name in pairs}
    positions = "text_tower.position.weight"
    if len(found[positions]) > len(new[positions]):
        notes.append(f"  {positions}: the first {len(new[positions])} of {len(found[positions])}")
        found[positions] = found[positions][: len(new[positions])]
    return found


def _renamed_statistics(old: Leaves, new: Leaves) -> Leaves:
    """Means and variances by the names that the new model has for them."""
    names = {}
    for ours, frozen in STATISTICS.items():
        for name in old:
            layer, _, field = name.rpartition(".")
            if field == ours and f"{layer.removeprefix('stats.')}.{frozen}" in new:
                names[name] = f"{layer.removeprefix('stats.')}.{frozen}"
            if field == frozen and f"stats.{layer}.{ours}" in new:
                names[name] = f"stats.{layer}.{ours}"
    return {names.get(name, name): leaf for name, leaf in old.items()}


def _in_backbone(name: str) -> bool:
    return name.startswith(("backbone.", "stats.backbone."))


def _other_parts(old: Leaves, new: Leaves) -> list[str]:
    """What is said of all but the backbone."""

    def parts(leaves: Leaves) -> str:
        return ", ".join(dict.fromkeys(name.split(".")[0] for name in leaves if not _in_backbone(name)))

    return [f"  the backbone alone; left out: {parts(old) or 'nothing'}; fresh: {parts(new) or 'nothing'}"]


def _fits(name: str, old: Leaves, new: Leaves, head: re.Pattern[str]) -> bool:
    if head.match(name):
        return True
    if name not in old or name not in new:
        return False
    return old[name].shape == new[name].shape or _is_grid(name, old[name], new[name])


def _is_grid(name: str, old: Array, new: Array) -> bool:
    return name.endswith("position.weight") and old.ndim == new.ndim == 3 and old.shape[2] == new.shape[2]


def _brought(name: str, old: Array | None, new: Array, notes: list[str]) -> Array:
    if old is not None and old.shape == new.shape:
        return jnp.asarray(np.asarray(old), new.dtype)  # not bound to the one device that it was read to
    if old is not None and _is_grid(name, old, new):
        notes.append(f"  {name}: resampled from {old.shape[:2]} to {new.shape[:2]} positions")
        return resample_grid(jnp.asarray(np.asarray(old)), (new.shape[0], new.shape[1]))
    notes.append(f"  {name}: fresh, {tuple(new.shape)}" + ("" if old is None else f" instead of {tuple(old.shape)}"))
    return new


def _shape(leaves: Leaves, name: str) -> str:
    return str(tuple(leaves[name].shape)) if name in leaves else "absent"


def load_teacher(config: TrainConfig, mesh: Mesh) -> Teacher | None:
    """The model of ``config.distill.teacher``, on every device; None where there is none.

    Raises ValueError for settings out of range or a teacher for other images, and what ``load_run`` raises.
    """
    distill = config.distill
    if not distill.teacher:
        return None
    if not 0 < distill.weight <= 1 or distill.temperature <= 0:
        raise ValueError(
            f"--distill.weight {distill.weight}, --distill.temperature {distill.temperature}; "
            "expected 0 < weight <= 1 and a positive temperature"
        )
    run = load_run(distill.teacher)
    sees, gets = (run.config.data.mean, run.config.data.std), (config.data.mean, config.data.std)
    if sees != gets or run.config.model.in_channels != config.model.in_channels:
        raise ValueError(
            f"the teacher {distill.teacher} was trained with (mean, std) {sees} and {run.config.model.in_channels} "
            f"channels, this run has {gets} and {config.model.in_channels}; give both the same --data.mean, --data.std"
        )
    return jax.device_put(Teacher(run.model, run.stats), NamedSharding(mesh, P()))
