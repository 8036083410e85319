"""``config.json`` and ``preprocessor_config.json`` of detectors that go to Hugging Face's transformers.

Field names are those of transformers' ``configuration_detr.py`` and ``configuration_deformable_detr.py``. The backbone
is transformers' own ResNet or timm's, as the layout says; only timm's can be dilated. Batch norms are frozen there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eqvision.detectors import DETR, DeformableDETR
from eqvision.detectors.deformable_detr import ProposedQueries
from eqvision.pretrained.errors import WeightsError

# timm's names of our ResNets, by their blocks in each stage and the convolutions in a block.
TIMM_RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 2, 2), 2): "resnet18",
    ((3, 4, 6, 3), 2): "resnet34",
    ((2, 2, 2, 2), 3): "resnet26",
    ((3, 4, 6, 3), 3): "resnet50",
    ((3, 4, 23, 3), 3): "resnet101",
    ((3, 8, 36, 3), 3): "resnet152",
}
BILINEAR = 2  # Pillow's number


def detector_config(layout: str, model: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """What transformers needs to build the detector whose tensors are in ``layout``.

    Raises WeightsError for a layout without a configuration here, and for a backbone that is not to be had there.
    """
    if layout not in DETECTOR_CONFIGS:
        known = ", ".join(DETECTOR_CONFIGS)
        raise WeightsError(f"no config.json is known for layout {layout}; those of detectors with one: {known}")
    architecture, model_type, fields = DETECTOR_CONFIGS[layout]
    stages = _stages(model, layout)
    backbone = _own_backbone(model, stages) if layout.endswith("_no_timm") else _timm_backbone(model, stages)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_channels": model.backbone.in_channels,
        "id2label": {str(number): name for number, name in enumerate(class_names)},
        "label2id": {name: number for number, name in enumerate(class_names)},
        "use_timm_backbone": not layout.endswith("_no_timm"),
        "backbone_config": backbone,
        "dilation": model.backbone.strides[-1] == 16,
        **fields(model),
    }


def _stages(model: Any, layout: str) -> tuple[int, ...]:
    """The stages that the detector reads, from 1. Raises WeightsError where transformers would read others."""
    if isinstance(model, DETR):
        return (1, 2, 3, 4)
    if len(model.projections) == 2:
        raise WeightsError(f"layout {layout}: transformers reads one or three maps of the backbone, and this model two")
    return (4,) if len(model.projections) == 1 else (2, 3, 4)


def _own_backbone(model: Any, stages: Sequence[int]) -> dict[str, Any]:
    backbone = model.backbone
    if backbone.strides[-1] != 32:
        raise WeightsError(
            "transformers' own ResNet knows no dilation, and this model has stride 16 (DC5); "
            "choose the layout with timm's backbone: --to hf, or the layout's name without _no_timm"
        )
    return {
        "model_type": "resnet",
        "num_channels": backbone.in_channels,
        "embedding_size": backbone.stem.conv.weight.shape[-1],
        "hidden_sizes": list(backbone.channels),
        "depths": [len(stage) for stage in backbone.stages],
        "layer_type": "bottleneck" if len(backbone.stages[0][0].convs) == 3 else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "out_features": [f"stage{number}" for number in stages],
    }


def _timm_backbone(model: Any, stages: Sequence[int]) -> dict[str, Any]:
    backbone = model.backbone
    key = (tuple(len(stage) for stage in backbone.stages), len(backbone.stages[0][0].convs))
    usual = backbone.stem.conv.weight.shape[-1] == 64
    if key not in TIMM_RESNETS or not usual:
        raise WeightsError(
            f"timm has no ResNet of {key[0]} blocks, {key[1]} convolutions each, behind a stem of "
            f"{backbone.stem.conv.weight.shape[-1]} channels; choose the layout whose name ends in _no_timm"
        )
    dilated = {"output_stride": 16} if backbone.strides[-1] == 16 else {}
    return {
        "model_type": "timm_backbone",
        "backbone": TIMM_RESNETS[key],
        "num_channels": backbone.in_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": list(stages),
        **dilated,
    }


def _detr(model: DETR) -> dict[str, Any]:
    encoder, decoder = model.encoder, model.decoder
    return {
        "num_queries": model.queries.shape[0],
        **_sizes(model, encoder.layers.attention.num_heads, decoder.layers.self_attention.num_heads),
        "auxiliary_loss": False,  # it changes the forward pass there
    }


def _deformable(model: DeformableDETR) -> dict[str, Any]:
    queries, encoder, decoder = model.queries, model.encoder.layers.attention, model.decoder.layers
    two_stage = isinstance(queries, ProposedQueries)
    count = queries.count if isinstance(queries, ProposedQueries) else queries.position.shape[0]
    return {
        "num_queries": count,
        "two_stage": two_stage,
        "two_stage_num_proposals": count,
        "with_box_refine": model.decoder.refine,
        "num_feature_levels": len(model.projections),
        "encoder_n_points": encoder.num_points,
        "decoder_n_points": decoder.cross_attention.num_points,
        **_sizes(model, encoder.num_heads, decoder.self_attention.num_heads),
        "auxiliary_loss": False,
    }


def _sizes(model: Any, encoder_heads: int, decoder_heads: int) -> dict[str, Any]:
    return {
        "d_model": model.encoder.layers.mlp.fc1.weight.shape[-2],
        "encoder_layers": model.encoder.depth,
        "decoder_layers": model.decoder.depth,
        "encoder_attention_heads": encoder_heads,
        "decoder_attention_heads": decoder_heads,
        "encoder_ffn_dim": model.encoder.layers.mlp.fc1.weight.shape[-1],
        "decoder_ffn_dim": model.decoder.layers.mlp.fc1.weight.shape[-1],
        "activation_function": "relu",
        "position_embedding_type": "sine",
    }


def detector_preprocessor_config(
    model_type: str, sizes: Mapping[str, int], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """For DetrImageProcessor or DeformableDetrImageProcessor; ``sizes`` is its ``size``, such as ``shortest_edge``."""
    return {
        "image_processor_type": "DetrImageProcessor" if model_type == "detr" else "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "size": dict(sizes),
        "resample": BILINEAR,
    }


DETECTION, SEGMENTATION = "DetrForObjectDetection", "DetrForSegmentation"
DEFORMABLE = "DeformableDetrForObjectDetection"
# Layout -> the class of transformers, its model_type, and the rest of its configuration
DETECTOR_CONFIGS: dict[str, tuple[str, str, Callable[[Any], dict[str, Any]]]] = {
    "hf_detr": (DETECTION, "detr", _detr),
    "hf_detr_no_timm": (DETECTION, "detr", _detr),
    "hf_detr_panoptic": (SEGMENTATION, "detr", _detr),
    "hf_detr_panoptic_no_timm": (SEGMENTATION, "detr", _detr),
    "hf_deformable_detr": (DEFORMABLE, "deformable_detr", _deformable),
    "hf_deformable_detr_no_timm": (DEFORMABLE, "deformable_detr", _deformable),
}
