"""The folder of a run: its configuration, its metrics as CSV and JSONL, and where everything else lies."""

import csv
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from eqvision.recipes import (
    ContrastiveConfig,
    DetectionConfig,
    GlueConfig,
    LanguageConfig,
    MaskedConfig,
    OpenVocabularyConfig,
    PromptedConfig,
    RunConfig,
    SegmentationConfig,
    TrainConfig,
    difference,
    from_dict,
    to_dict,
)

Row = dict[str, int | float]  # one line of the metrics: the step, and values by name


# Options that decide how a run is executed, watched and kept, and not what it computes (but for rounding).
HARMLESS = (
    "out:",
    "allow_config_change:",
    "checkpoint.",
    "eval.",
    "log.",
    "mesh.",
    "data.crop_fraction:",
    "data.num_threads:",
    "data.num_workers:",
    "loop.eval_batch_size:",
    "loop.eval_every:",
    "loop.log_every:",
    "model.attention:",
    "model.remat:",
    "model.unroll:",
)


KINDS: dict[str, Any] = {
    "classification": TrainConfig,
    "detection": DetectionConfig,
    "segmentation": SegmentationConfig,
    "prompted": PromptedConfig,
    "contrastive": ContrastiveConfig,
    "open_vocabulary": OpenVocabularyConfig,
    "masked": MaskedConfig,
    "language": LanguageConfig,
    "glue": GlueConfig,
}
# What a run of each kind trains, in words for messages.
TRAINED = {
    "classification": "classifier",
    "detection": "detector",
    "segmentation": "segmenter",
    "prompted": "model with prompts",
    "contrastive": "model of images and text",
    "open_vocabulary": "open-vocabulary detector",
    "masked": "masked autoencoder",
    "language": "language model",
    "glue": "classifier of texts",
}


def kind_of(config: RunConfig) -> str:
    """The name of the kind of run that a configuration is for."""
    return next(kind for kind, each in KINDS.items() if isinstance(config, each))


def model_kind(config: RunConfig) -> str:
    """What a run trains, in words for messages."""
    return TRAINED[kind_of(config)]


class RunFolderError(RuntimeError):
    """The run folder cannot be used as asked; nothing in it was changed."""


class RunFolder:
    """Paths and files of one run. Opening it for training refuses a folder that holds another configuration."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.metrics_csv = self.path / "metrics.csv"
        self.metrics_jsonl = self.path / "metrics.jsonl"

    def open_for_training(self, config: RunConfig, class_names: tuple[str, ...], num_classes: int) -> None:
        """Create the folder, or check that it holds a run of the same configuration.

        Raises RunFolderError that lists the differences, or for a folder that holds something else.
        """
        if not self.config_file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise RunFolderError(
                    f"{self.path} is not empty and holds no config.yaml, so it is not a run folder; "
                    "choose another with --out"
                )
            self._write_config(config, class_names, num_classes)
            return
        self._reopen(config, class_names, num_classes)

    def _reopen(self, config: RunConfig, class_names: tuple[str, ...], num_classes: int) -> None:
        """Resume, if the configuration is the same but for what cannot change the run's numbers."""
        lines = difference(self.read()["config"], json.loads(json.dumps(to_dict(config))))
        unsafe = [line for line in lines if not line.startswith(HARMLESS)]
        untouched = not self.checkpoints.exists() and not read_rows(self)  # it failed before it did anything
        if unsafe and not untouched and not config.allow_config_change:
            raise RunFolderError(
                f"{self.path} holds a run with another configuration; nothing was changed. It differs in\n  "
                + "\n  ".join(unsafe)
                + "\nChoose another folder with --out, repeat the run's own options to resume it, or go on with the "
                "new ones by --allow-config-change."
            )
        changes = self.read().get("changes", [])
        lines = [line for line in lines if not line.startswith(("out:", "allow_config_change:"))]
        if lines and not untouched:
            print("resumes with other options:\n  " + "\n  ".join(lines), file=sys.stderr)
            changes = [*changes, lines]
        if lines:
            self._write_config(config, class_names, num_classes, changes)

    def read(self) -> dict[str, Any]:
        """config.yaml. Raises RunFolderError where there is none."""
        if not self.config_file.exists():
            raise RunFolderError(f"{self.path} is not a run folder: there is no {self.config_file}")
        return yaml.safe_load(self.config_file.read_text())

    def config(self) -> RunConfig:
        content = self.read()
        kind = content.get("kind", "classification")  # which older folders do not say
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise RunFolderError(f"{self.config_file} is of a run of kind {kind!r}; this version has {known}")
        return from_dict(KINDS[kind], content["config"])

    def classification(self) -> TrainConfig:
        """The configuration of an image classifier's run. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, TrainConfig):
            return config
        wanted = "runs of image classifiers; eqvision predict, eval and replay take every kind of run"
        if isinstance(config, LanguageConfig):
            wanted = "runs of image classifiers; eqvision eval, info and replay take it"
        if isinstance(config, MaskedConfig):
            wanted = "runs of image classifiers; eqvision eval and replay take it, and train RECIPE --init its encoder"
        raise self.refusal(config, wanted)

    def detection(self) -> DetectionConfig:
        """The configuration of a detector's run. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, DetectionConfig):
            return config
        raise self.refusal(config, "detectors")

    def segmentation(self) -> SegmentationConfig:
        """The configuration of a segmenter's run. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, SegmentationConfig):
            return config
        raise self.refusal(config, "segmenters")

    def prompted(self) -> PromptedConfig:
        """The configuration of a run of a model with prompts. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, PromptedConfig):
            return config
        raise self.refusal(config, "models with prompts")

    def contrastive(self) -> ContrastiveConfig:
        """The configuration of a run of a model of images and text. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, ContrastiveConfig):
            return config
        raise self.refusal(config, "models of images and text")

    def masked(self) -> MaskedConfig:
        """The configuration of a masked autoencoder's run. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, MaskedConfig):
            return config
        raise self.refusal(config, "masked autoencoders")

    def open_vocabulary(self) -> OpenVocabularyConfig:
        """The configuration of an open-vocabulary detector's run. Raises RunFolderError for a run of another kind."""
        config = self.config()
        if isinstance(config, OpenVocabularyConfig):
            return config
        raise self.refusal(config, "open-vocabulary detectors")

    def refusal(self, config: RunConfig, wanted: str) -> RunFolderError:
        """The error to raise where a run of another kind is ``wanted``."""
        what = f"{self.path} is a run of the {model_kind(config)} {config.model.name}"
        return RunFolderError(f"{what}, and this takes {wanted}")

    def class_names(self) -> tuple[str, ...]:
        return tuple(self.read()["class_names"])

    def _write_config(
        self, config: RunConfig, class_names: tuple[str, ...], num_classes: int, changes: Sequence[list[str]] = ()
    ) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "kind": kind_of(config),
            "config": to_dict(config),
            "num_classes": num_classes,
            "class_names": list(class_names),
            "command": " ".join(sys.argv),
            "versions": versions(),
            "git": git_commit(),
            **({"changes": list(changes)} if changes else {}),
        }
        temporary = self.config_file.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(content, sort_keys=False))
        temporary.replace(self.config_file)


def versions() -> dict[str, str]:
    """Versions of what determines a run's numbers."""
    from importlib.metadata import version

    packages = ("eqvision", "jax", "jaxlib", "equinox", "optax", "grain", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def git_commit() -> str | None:
    """Commit of the source tree that eqvision is imported from; None where it is no git checkout."""
    here = Path(__file__).parent
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


class MetricLog:
    """Rows of metrics by step, in metrics.csv (one column per name, in order of appearance) and metrics.jsonl.

    On resume, rows after the restored step are dropped: the run will write them again.
    """

    def __init__(self, folder: RunFolder, *, resume_step: int = 0):
        self._folder = folder
        self._rows = [row for row in read_rows(folder) if row["step"] <= resume_step]
        self._rewrite()

    @property
    def rows(self) -> list[Row]:
        return self._rows

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add values to the row of ``step``, which must be the last one or a new one."""
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1].update(values)
            self._rewrite()
            return
        known = len(self._columns())
        self._rows.append({"step": step, **values})
        if len(self._columns()) != known or len(self._rows) == 1:
            self._rewrite()
            return
        self._append(self._rows[-1])

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def _append(self, row: Row) -> None:
        if jax.process_index():
            return
        with self._folder.metrics_csv.open("a", newline="") as file:
            csv.DictWriter(file, self._columns(), restval="").writerow(row)
        with self._folder.metrics_jsonl.open("a") as file:
            file.write(_line(row))

    def _rewrite(self) -> None:
        if jax.process_index():
            return
        temporary = self._folder.metrics_csv.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns(), restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        temporary.replace(self._folder.metrics_csv)
        temporary = self._folder.metrics_jsonl.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(map(_line, self._rows)))
        temporary.replace(self._folder.metrics_jsonl)


def read_rows(folder: RunFolder) -> list[Row]:
    """The rows of metrics.jsonl; none where the file does not exist yet. A last line cut off by a kill is left out."""
    if not folder.metrics_jsonl.exists():
        return []
    whole, _, _ = folder.metrics_jsonl.read_text().rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in lines]


def _line(row: Row) -> str:
    """JSON knows no NaN (the AP of sizes that no object has): null."""
    return json.dumps(without_nan(row)) + "\n"


def without_nan(row: Row) -> dict[str, int | float | None]:
    return {name: None if math.isnan(value) else value for name, value in row.items()}
