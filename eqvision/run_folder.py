"""The folder of a run: its configuration, its metrics as CSV and JSONL, and where everything else lies."""

import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from eqvision.recipes import TrainConfig, difference, from_dict, to_dict

Row = dict[str, int | float]  # one line of the metrics: the step, and values by name


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

    def open_for_training(self, config: TrainConfig, class_names: tuple[str, ...], num_classes: int) -> None:
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
        new = {**to_dict(config), "out": ""}
        lines = difference({**self.read()["config"], "out": ""}, json.loads(json.dumps(new)))
        if lines and not self.checkpoints.exists() and not read_rows(self):
            self._write_config(config, class_names, num_classes)  # a run that failed before it did anything
        elif lines:
            raise RunFolderError(
                f"{self.path} holds a run with another configuration; nothing was changed. It differs in\n  "
                + "\n  ".join(lines)
                + "\nChoose another folder with --out, or repeat the run's own options to resume it."
            )

    def read(self) -> dict[str, Any]:
        """config.yaml. Raises RunFolderError where there is none."""
        if not self.config_file.exists():
            raise RunFolderError(f"{self.path} is not a run folder: there is no {self.config_file}")
        return yaml.safe_load(self.config_file.read_text())

    def config(self) -> TrainConfig:
        return from_dict(TrainConfig, self.read()["config"])

    def class_names(self) -> tuple[str, ...]:
        return tuple(self.read()["class_names"])

    def _write_config(self, config: TrainConfig, class_names: tuple[str, ...], num_classes: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "config": to_dict(config),
            "num_classes": num_classes,
            "class_names": list(class_names),
            "command": " ".join(sys.argv),
            "versions": versions(),
            "git": git_commit(),
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
        with self._folder.metrics_csv.open("a", newline="") as file:
            csv.DictWriter(file, self._columns(), restval="").writerow(row)
        with self._folder.metrics_jsonl.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _rewrite(self) -> None:
        temporary = self._folder.metrics_csv.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns(), restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        temporary.replace(self._folder.metrics_csv)
        temporary = self._folder.metrics_jsonl.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        temporary.replace(self._folder.metrics_jsonl)


def read_rows(folder: RunFolder) -> list[Row]:
    """The rows of metrics.jsonl; none where the file does not exist yet. A last line cut off by a kill is left out."""
    if not folder.metrics_jsonl.exists():
        return []
    whole, _, _ = folder.metrics_jsonl.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
