"""Weight files of all formats -> tensors by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, or of the weight file in a folder."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    from safetensors.numpy import load_file

    return load_file(path / "model.safetensors" if path.is_dir() else path)


def read_config(path: Path) -> dict[str, Any] | None:
    """``config.json`` beside the file or in the folder; None where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None
