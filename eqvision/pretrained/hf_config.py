"""``config.json`` and ``preprocessor_config.json`` of models that go to Hugging Face's transformers.

Field names and what they mean are those of transformers' configuration files (``configuration_vit.py`` and so on).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eqvision.classifiers import Classifier
from eqvision.pretrained.cards import Preprocessing
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.preprocess import FILTERS

# transformers' names of our activations
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
Options = Mapping[str, Any]  # what the zoo's builder was called with, defaults included


def hf_config(
    layout: str, model: Classifier, options: Options, image_size: int, class_names: Sequence[str]
) -> dict[str, Any]:
    """What transformers needs to build the model whose tensors are in ``layout``.

    Raises WeightsError for a layout without a configuration here, and for what the architecture there cannot do.
    """
    if layout not in CONFIGS:
        raise WeightsError(f"no config.json is known for layout {layout}; those with one: {', '.join(CONFIGS)}")
    architecture, model_type, fields = CONFIGS[layout]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_size": image_size,
        "num_channels": model.backbone.in_channels,
        "id2label": {str(number): name for number, name in enumerate(class_names)},
        "label2id": {name: number for number, name in enumerate(class_names)},
        **fields(model, options),
    }


def preprocessor_config(prepared: Preprocessing) -> dict[str, Any]:
    """For ViTImageProcessor where both sides are resized, else for BitImageProcessor, which cuts out the middle."""
    size, fraction = prepared.size, prepared.crop_fraction
    numbers = {name: number for number, name in FILTERS.items()}
    common = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(prepared.mean),
        "image_std": list(prepared.std),
        "resample": numbers[prepared.interpolation],
    }
    if not fraction:
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}, **common}
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": int(size / fraction)},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        **common,
    }


def _vit(model: Classifier, options: Options) -> dict[str, Any]:
    return _transformer(model, options, pool="token") | {
        "intermediate_size": _backbone(model).encoder.blocks.mlp.fc1.weight.shape[-1]
    }


def _dinov2(model: Classifier, options: Options) -> dict[str, Any]:
    """Its head reads the class token and the mean of the patches."""
    mlp, width = _backbone(model).encoder.blocks.mlp, _backbone(model).channels[0]
    gated = hasattr(mlp, "gate")
    ratio = _mlp_ratio(width, mlp.fc1.weight.shape[-1], gated)
    return _transformer(model, options, pool="token_mean") | {"mlp_ratio": ratio, "use_swiglu_ffn": gated}


def _mlp_ratio(width: int, hidden: int, gated: bool) -> int:
    """transformers takes two thirds of a gated MLP's width, up to the next multiple of 8."""
    for ratio in range(1, 17):
        if hidden == ((int(ratio * width * 2 / 3) + 7) // 8 * 8 if gated else ratio * width):
            return ratio
    raise WeightsError(f"transformers' DINOv2 has no MLP of {hidden} features for a width of {width}")


def _dinov2_registers(model: Classifier, options: Options) -> dict[str, Any]:
    return _dinov2(model, options) | {"num_register_tokens": len(_backbone(model).registers)}


def _transformer(model: Classifier, options: Options, pool: str) -> dict[str, Any]:
    backbone = _backbone(model)
    if options["pool"] != pool or backbone.class_token is None or options["norm_after_pool"]:
        raise WeightsError(
            f"transformers' model reads pool={pool!r} behind a norm of all tokens, and this one has "
            f"pool={options['pool']!r}, norm_after_pool={options['norm_after_pool']}; choose another layout"
        )
    return {
        "hidden_size": backbone.channels[0],
        "num_hidden_layers": backbone.encoder.depth,
        "num_attention_heads": backbone.encoder.blocks.attention.num_heads,
        "patch_size": backbone.strides[0],
        "hidden_act": ACTIVATIONS[options["activation"]],
        "layer_norm_eps": options["eps"],
        "qkv_bias": options["use_qkv_bias"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _backbone(model: Classifier) -> Any:
    """The layout has said of which family it is."""
    return model.backbone


def _resnet(model: Classifier, options: Options) -> dict[str, Any]:
    stages = _backbone(model).stages
    return {
        "embedding_size": _backbone(model).stem.conv.weight.shape[-1],
        "hidden_sizes": list(model.backbone.channels),
        "depths": [len(stage) for stage in stages],
        "layer_type": "bottleneck" if len(stages[0][0].convs) == 3 else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
    }


def _bit(model: Classifier, options: Options) -> dict[str, Any]:
    """The sizes are the whole ones, so that ``width_factor`` is 1."""
    return {
        "embedding_size": _backbone(model).stem.weight.shape[-1],
        "hidden_sizes": list(model.backbone.channels),
        "depths": [stage.depth for stage in _backbone(model).stages],
        "layer_type": "preactivation",
        "hidden_act": "relu",
        "num_groups": 32,
        "width_factor": 1,
    }


def _convnext(model: Classifier, options: Options) -> dict[str, Any]:
    """``layer_norm_eps`` is that of the last norm alone."""
    return {
        "patch_size": 4,
        "hidden_sizes": list(model.backbone.channels),
        "depths": [len(stage.rates) for stage in _backbone(model).stages],
        "hidden_act": ACTIVATIONS[options["activation"]],
        "layer_norm_eps": options["head_eps"],
    }


def _swin(model: Classifier, options: Options) -> dict[str, Any]:
    blocks = [stage.blocks for stage in _backbone(model).stages]
    return {
        "patch_size": 4,
        "embed_dim": model.backbone.channels[0],
        "depths": [len(stage.drop_path) for stage in _backbone(model).stages],
        "num_heads": [block.attention.num_heads for block in blocks],
        "window_size": (blocks[0].relative_bias.shape[1] + 1) // 2,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": ACTIVATIONS[options["activation"]],
        "layer_norm_eps": options["eps"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


# Layout -> the class of transformers, its model_type, and the rest of its configuration
CONFIGS: dict[str, tuple[str, str, Callable[[Classifier, Options], dict[str, Any]]]] = {
    "hf_vit": ("ViTForImageClassification", "vit", _vit),
    "hf_deit": ("DeiTForImageClassification", "deit", _vit),
    "hf_deit_distilled": ("DeiTForImageClassificationWithTeacher", "deit", _vit),
    "hf_dinov2": ("Dinov2ForImageClassification", "dinov2", _dinov2),
    "hf_dinov2_registers": ("Dinov2WithRegistersForImageClassification", "dinov2_with_registers", _dinov2_registers),
    "hf_resnet": ("ResNetForImageClassification", "resnet", _resnet),
    "hf_bit": ("BitForImageClassification", "bit", _bit),
    "hf_convnext": ("ConvNextForImageClassification", "convnext", _convnext),
    "hf_convnextv2": ("ConvNextV2ForImageClassification", "convnextv2", _convnext),
    "hf_swin": ("SwinForImageClassification", "swin", _swin),
}
