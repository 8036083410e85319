"""A Deformable DETR small enough for tests, the same model in transformers, and its tensors by the official names."""

import functools

import jax
import numpy as np
from detr_references import BLOCKS, CLASSES, WIDTHS, dilate, randomise, toy_resnet

from eqvision.detectors import DeformableDETR

QUERIES = 9
# At width 32 the 32 groups of the norms would be single channels on as few as four places, of hardly any spread.
SIZES = {
    "num_queries": QUERIES,
    "width": 64,
    "num_heads": 4,
    "mlp_dim": 64,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "num_points": 3,
}
OPTIONS = {
    "multi_scale": {},
    "refine": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
    "single_scale": {"num_levels": 1},
    "single_scale_dc5": {"num_levels": 1, "dc5": True},
    "five_levels": {"num_levels": 5},
}


def toy_deformable(
    *, num_classes=CLASSES, in_channels=3, dc5=False, norm="frozen", num_levels=4, refine=False, two_stage=False,
    dropout=0.0, remat="none", unroll=1, key,
):  # fmt: skip
    """A row for ``zoo.DETECTORS``."""
    keys = jax.random.split(key)
    backbone = toy_resnet(in_channels=in_channels, norm=norm, dilate_last=dc5, key=keys[0])
    kind = {"num_levels": num_levels, "refine": refine, "two_stage": two_stage}
    options = {"dropout": dropout, "remat": remat, "unroll": unroll}
    return DeformableDETR(backbone, num_classes=num_classes, **SIZES, **kind, **options, key=keys[1])


TOYS = {f"toy_deformable_{name}": functools.partial(toy_deformable, **kind) for name, kind in OPTIONS.items()}


def hf_deformable(name):
    """transformers' model of the toy's sizes, random in all its numbers, each layer with heads of its own.

    A fresh model with refinement has the same class head for all layers there, which would hide a mistake.
    """
    import transformers

    kind = OPTIONS[name]
    levels = kind.get("num_levels", 4)
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=list(WIDTHS),
        depths=list(BLOCKS),
        layer_type="bottleneck",
        out_features=["stage4"] if levels == 1 else ["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=SIZES["width"],
        encoder_layers=SIZES["encoder_depth"],
        decoder_layers=SIZES["decoder_depth"],
        encoder_attention_heads=SIZES["num_heads"],
        decoder_attention_heads=SIZES["num_heads"],
        encoder_ffn_dim=SIZES["mlp_dim"],
        decoder_ffn_dim=SIZES["mlp_dim"],
        encoder_n_points=SIZES["num_points"],
        decoder_n_points=SIZES["num_points"],
        num_queries=QUERIES,
        num_labels=CLASSES,
        num_feature_levels=levels,
        with_box_refine=kind.get("refine", False),
        two_stage=kind.get("two_stage", False),
        two_stage_num_proposals=QUERIES,
        attn_implementation="eager",
    )
    module = transformers.DeformableDetrForObjectDetection(config)
    if kind.get("dc5"):
        dilate(module.model.backbone.model.encoder.stages[-1].layers)
        config.dilation = True
    if kind.get("refine"):
        _untie(module, two_stage=kind.get("two_stage", False))
    return randomise(module)


def _untie(module, *, two_stage):
    import copy

    import torch

    for name in ("class_embed", "bbox_embed"):
        setattr(module, name, torch.nn.ModuleList([copy.deepcopy(each) for each in getattr(module, name)]))
    module.model.decoder.bbox_embed = module.bbox_embed
    if two_stage:
        module.model.decoder.class_embed = module.class_embed


def hf_outputs(module, pixels, mask):
    """What its parts give, with ``layers``: logits and boxes behind every decoder layer, by its heads."""
    import torch

    output = module(pixels, pixel_mask=mask)
    hidden, references = output.intermediate_hidden_states, output.intermediate_reference_points
    logits, boxes = [], []
    for i in range(hidden.shape[1]):
        reference = (output.init_reference_points if i == 0 else references[:, i - 1]).clamp(1e-5, 1 - 1e-5)
        change = module.bbox_embed[i](hidden[:, i])
        known = torch.log(reference / (1 - reference))
        known = torch.nn.functional.pad(known, (0, 4 - known.shape[-1]))
        boxes.append((change + known).sigmoid())
        logits.append(module.class_embed[i](hidden[:, i]))
    return output, (torch.stack(logits), torch.stack(boxes))


def official_tensors(module):
    """The state of transformers' model by the names of fundamentalvision/Deformable-DETR, duplicates and all.

    Written from the names in its ``deformable_transformer.py`` and ``deformable_detr.py``, with norm2 behind the
    self-attention of the decoder; the backbone by torchvision's.
    """
    renamed = {}
    state = {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if "_proj." in name and ".self_attn." in name and "decoder" in name and name.split(".")[-2][0] in "kv":
            continue
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            head, kind = name.rsplit(".q_proj.", 1)
            renamed[official_name(f"{head}.in_proj_{kind}")] = np.concatenate(parts)
        else:
            renamed[official_name(name)] = tensor
    return renamed


def official_name(name):
    if name.startswith("model.backbone.model."):
        return f"backbone.0.body.{_torchvision(name.removeprefix('model.backbone.model.'))}"
    if name.startswith("model.input_proj") or not name.startswith("model."):
        return name.removeprefix("model.")
    name = name.removeprefix("model.").replace("query_position_embeddings", "query_embed")
    if name.startswith("query_embed"):
        return name
    if name.startswith("decoder"):
        name = name.replace("self_attn_layer_norm", "norm2").replace("encoder_attn_layer_norm", "norm1")
        name = name.replace("final_layer_norm", "norm3").replace("encoder_attn", "cross_attn")
    name = name.replace("self_attn_layer_norm", "norm1").replace("final_layer_norm", "norm2")
    name = name.replace("mlp.fc", "linear").replace("o_proj", "out_proj")
    return f"transformer.{name}"


def _torchvision(name):
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    for i in range(3):
        name = name.replace(f"layer.{i}.convolution", f"conv{i + 1}").replace(f"layer.{i}.normalization", f"bn{i + 1}")
    for s in range(4):
        name = name.replace(f"encoder.stages.{s}.layers.", f"layer{s + 1}.")
    return name
