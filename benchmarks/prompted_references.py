"""Small reference models that take prompts for ``weights.py``, as ``weight_references.py`` has classifiers."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.weight_references import Case, Made, save_arrays


def clicks(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two prompts in each of so many images, of two points: places x, y, and labels."""
    points = np.array([[[10.0, 20.0], [40.5, 33.0]], [[50.0, 9.0], [3.0, 60.0]]], np.float32)
    return np.stack([points] * count), np.stack([np.array([[1, 0], [1, 1]])] * count)


def sam_cases() -> list[Case]:
    """transformers' model, under its own names and under those of the authors."""
    import sam_references as source
    import torch

    def outputs(module: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, labels = (torch.from_numpy(x) for x in clicks(len(images)))
        with torch.no_grad():
            pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            found = module(pixel_values=pixels, input_points=points, input_labels=labels)
        return found.pred_masks.numpy(), found.iou_scores.numpy()

    def hub(folder: Path, images: np.ndarray) -> Made:
        module = source.reference()
        module.save_pretrained(folder)
        return folder, outputs(module, images)

    def official(folder: Path, images: np.ndarray) -> Made:
        module = source.reference(eps=1e-5)
        tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        return save_arrays(source.official_of_hf(tensors), folder), outputs(module, images)

    sides = (source.SIDE, source.SIDE)
    return [
        Case(layout, "transformers", source.toy_sam, make, sides, prompted=True)
        for layout, make in (("official_sam", official), ("hf_sam", hub))
    ]
