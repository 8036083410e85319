"""Small reference detectors for ``weights.py``, as ``weight_references.py`` has classifiers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.weight_references import TORCH, Case, Made, save_arrays, save_state


def _found(module: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and boxes of transformers' module on images without padding."""
    import torch

    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        outputs = module(pixels, pixel_mask=torch.ones(pixels[:, 0].shape, dtype=torch.long))
    return outputs.logits.numpy(), outputs.pred_boxes.numpy()


def _hf_detector(build: Callable[[], Any], folder: Path, images: np.ndarray) -> Made:
    module = build()
    module.save_pretrained(folder)
    return folder, _found(module, images)


def detector_cases() -> list[Case]:
    """Layouts of DETR, then of Deformable DETR."""
    return [*_detr(), *_deformable_detr()]


def _detr() -> list[Case]:
    import detr_references as source

    from eqvision.backbones.resnet import DEPTHS
    from eqvision.detectors import detr

    DEPTHS.update({17: (source.BLOCKS, True), 26: ((2, 2, 2, 2), True)})
    size = (70, 101)

    def facebook(folder: Path, images: np.ndarray) -> Made:
        import torch

        module, pixels = source.torch_detr(), torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            logits, boxes = module(pixels, torch.ones(pixels[:, 0].shape, dtype=torch.long))
        return save_state(module, folder), (logits[-1].numpy(), boxes[-1].numpy())

    def timm() -> Any:
        import transformers

        config = source.hf_detr().config
        config.backbone_config = transformers.TimmBackboneConfig(
            backbone="resnet26", features_only=True, use_pretrained_backbone=False, out_indices=[1, 2, 3, 4]
        )
        return source.randomise(transformers.DetrForObjectDetection(config))

    def case(layout: str, row: Callable[..., Any], build: Callable[[], Any]) -> Case:
        return Case(layout, "transformers", row, functools.partial(_hf_detector, build), size, detector=True)

    sizes = {"num_classes": source.CLASSES, **source.SIZES}
    masks = functools.partial(source.hf_detr, masks=True)
    return [
        Case("facebook_detr", TORCH, functools.partial(detr, 17, **sizes), facebook, size, detector=True),
        case("hf_detr", functools.partial(detr, 26, **sizes), timm),
        case("hf_detr_no_timm", source.TOYS["toy_detr"], source.hf_detr),
        case("hf_detr_panoptic_no_timm", source.TOYS["toy_detr_panoptic"], masks),
    ]


def _deformable_detr() -> list[Case]:
    import deformable_detr_references as source

    def official(folder: Path, images: np.ndarray) -> Made:
        module = source.hf_deformable("two_stage")
        return save_arrays(source.official_tensors(module), folder), _found(module, images)

    def case(layout: str, kind: str, make: Callable[[Path, np.ndarray], Made]) -> Case:
        row = source.TOYS[f"toy_deformable_{kind}"]
        return Case(layout, "transformers", row, make, (70, 101), detector=True)

    def hub(kind: str) -> Callable[[Path, np.ndarray], Made]:
        return functools.partial(_hf_detector, functools.partial(source.hf_deformable, kind))

    kinds = ("multi_scale", "refine", "two_stage", "single_scale")
    return [
        case("fundamentalvision_deformable_detr", "two_stage", official),
        *(case("hf_deformable_detr_no_timm", kind, hub(kind)) for kind in kinds),
    ]
