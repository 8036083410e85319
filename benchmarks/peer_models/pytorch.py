"""ViT and ResNet v1.5 as Hugging Face transformers builds them, random weights, on PyTorch for the CPU."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.peer_models.specs import ResNetSpec, Spec, ViTSpec
from benchmarks.peer_models.torchvision_operators import usable_torchvision

usable_torchvision()
import transformers  # noqa: E402


class TorchModel(NamedTuple):
    """A model with its two programs; each call runs to completion."""

    num_params: int
    forward: Callable[[], torch.Tensor]
    train_step: Callable[[], torch.Tensor]


def vit(spec: ViTSpec) -> torch.nn.Module:
    """``ViTForImageClassification`` with fused attention and the LayerNorm epsilon of the other contestants."""
    config = transformers.ViTConfig(
        hidden_size=spec.width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads,
        intermediate_size=spec.mlp_dim,
        image_size=spec.image_size,
        patch_size=spec.patch,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        num_labels=spec.num_classes,
    )
    config._attn_implementation = "sdpa"
    return transformers.ViTForImageClassification(config)


def resnet(spec: ResNetSpec) -> torch.nn.Module:
    """``ResNetForImageClassification`` with the stride in the 3x3 convolution."""
    widths = [4 * spec.width * 2**stage for stage in range(len(spec.depths))]
    config = transformers.ResNetConfig(
        embedding_size=spec.width,
        hidden_sizes=widths,
        depths=list(spec.depths),
        layer_type="bottleneck",
        downsample_in_bottleneck=False,
        num_labels=spec.num_classes,
    )
    return transformers.ResNetForImageClassification(config)


def network(spec: Spec) -> torch.nn.Module:
    """The model that one contestant times."""
    return vit(spec) if isinstance(spec, ViTSpec) else resnet(spec)


def build(spec: Spec, batch: int, compiled: bool, channels_last: bool) -> TorchModel:
    """The PyTorch contestant for one network, on all cores, with the fused optimizer."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = network(spec).to(memory_format=layout)
    images = torch.randn(batch, 3, spec.image_size, spec.image_size).to(memory_format=layout)
    labels = torch.arange(batch) % spec.num_classes
    num_params = sum(parameter.numel() for parameter in model.parameters())
    run = torch.compile(model) if compiled else model
    return TorchModel(num_params, _forward(run, model, images), _train_step(run, model, images, labels))


def _forward(run, model, images):
    def forward():
        model.eval()
        with torch.inference_mode():
            return run(pixel_values=images).logits

    return forward


def _train_step(run, model, images, labels):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def train_step():
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(run(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train_step
