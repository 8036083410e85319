"""A DETR small enough for tests, the same model in transformers, and DETR written with torch's own layers."""

import functools
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.backbones.resnet import ConvNorm, ResidualBlock, ResNet
from eqvision.detectors import DETR
from eqvision.pretrained.leaf_names import named_arrays, with_leaves
from eqvision.types import PaddedImages

WIDTHS, BLOCKS = (8, 16, 24, 32), (1, 1, 1, 2)
CLASSES, QUERIES = 5, 7
SIZES = {"num_queries": QUERIES, "width": 32, "num_heads": 4, "mlp_dim": 64, "encoder_depth": 2, "decoder_depth": 3}
# (d_model + heads) % 8 and d_model % 16 must be 0 for masks.
MASK_SIZES = {**SIZES, "width": 64, "num_heads": 8, "encoder_depth": 1, "decoder_depth": 2}


def toy_resnet(*, in_channels=3, norm="frozen", dilate_last=False, key):
    """A ResNet of 8 to 32 channels; the last stage has two blocks, so that dilation shows."""
    stem, stages, channels = ConvNorm(in_channels, 8, 7, stride=2, norm=norm, key=key), [], 8
    for i, (width, count) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
        stage = []
        for j in range(count):
            dilated = dilate_last and i == 3
            stride, dilation = 2 if i and not j and not dilated else 1, 2 if dilated and j else 1
            narrow = width // 4
            options = {"shortcut": "projection", "zero_scale": False, "norm": norm, "dilation": dilation}
            shape = ((narrow, narrow, width), (1, 3, 1), (1, stride, 1))
            stage.append(ResidualBlock(channels, *shape, **options, key=jax.random.fold_in(key, 10 * i + j)))
            channels = width
        stages.append(tuple(stage))
    return ResNet(stem, tuple(stages), pool_stem=True, in_channels=in_channels)


def toy_detr(
    *, num_classes=CLASSES, in_channels=3, masks=False, dc5=False, norm="frozen", norm_order="post", dropout=0.0,
    eps=1e-5, remat="none", key,
):  # fmt: skip
    """A row for ``zoo.DETECTORS``."""
    keys = jax.random.split(key)
    backbone = toy_resnet(in_channels=in_channels, norm=norm, dilate_last=dc5, key=keys[0])
    sizes = MASK_SIZES if masks else SIZES
    options = {"norm_order": norm_order, "dropout": dropout, "eps": eps, "remat": remat}
    return DETR(backbone, num_classes=num_classes, masks=masks, **sizes, **options, key=keys[1])


TOYS = {
    "toy_detr": toy_detr,
    "toy_detr_dc5": functools.partial(toy_detr, dc5=True),
    "toy_detr_pre": functools.partial(toy_detr, norm_order="pre"),
    "toy_detr_panoptic": functools.partial(toy_detr, masks=True),
}


@functools.cache
def made(name="toy_detr", **options):
    """A toy whose leaves are random numpy arrays of the right shapes: nothing is compiled."""
    row = eqx.nn.make_with_state(functools.partial(TOYS[name], **options))
    model, state = eqx.filter_eval_shape(lambda: row(key=jax.random.key(0)))
    rng = np.random.default_rng(1)

    def random(name, shape):
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) > 1 and name != "queries":
            return noise * math.prod(shape[-4:-1] if "conv" in name else shape[-2:-1]) ** -0.5
        return 0.5 + np.abs(noise) if name.endswith(("running_var", "variance")) else 1 + 0.2 * noise

    leaves = {leaf: random(leaf, array.shape) for leaf, array in named_arrays(model, state).items()}
    return with_leaves(model, state, leaves)


def randomise(module, seed=0):
    """Every parameter and every buffer of a torch module anew: a fresh model hides what is never used."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim > 1 and "query" not in name:
                gain = 0.8 if tensor.ndim == 4 else 1.5  # maps that grow would saturate the softmax of the encoder
                tensor.copy_(noise / np.sqrt(np.prod(tensor.shape[1:])) * gain)
            else:
                is_scale = name.endswith("weight") and tensor.ndim == 1
                tensor.copy_(noise * 0.3 + 1 if is_scale else noise * (1.0 if tensor.ndim > 1 else 0.2))
    return module.eval()


def hf_detr(*, masks=False, dc5=False):
    """transformers' model of the toy's sizes, random in all its numbers.

    ``auxiliary_loss`` stays off: its decoder then feeds normed outputs on to the next layer (another model).
    """
    import transformers

    sizes = MASK_SIZES if masks else SIZES
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=list(WIDTHS),
        depths=list(BLOCKS),
        layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=sizes["width"],
        encoder_layers=sizes["encoder_depth"],
        decoder_layers=sizes["decoder_depth"],
        encoder_attention_heads=sizes["num_heads"],
        decoder_attention_heads=sizes["num_heads"],
        encoder_ffn_dim=sizes["mlp_dim"],
        decoder_ffn_dim=sizes["mlp_dim"],
        num_queries=QUERIES,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    module = transformers.DetrForSegmentation(config) if masks else transformers.DetrForObjectDetection(config)
    if dc5:
        dilate(module.model.backbone.model.encoder.stages[-1].layers)
        config.dilation = True
    return randomise(module)


def dilate(blocks):
    """The last stage of transformers' ResNet as torchvision's ``replace_stride_with_dilation`` makes it."""
    blocks[0].layer[1].convolution.stride = blocks[0].shortcut.convolution.stride = (1, 1)
    for block in blocks[1:]:
        block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)


def padded_batch(rng, canvas=(83, 118), sizes=((83, 97), (61, 118))):
    """Images in numpy with zeros behind them, and their sizes; the sides are no multiples of a stride."""
    images = np.zeros((len(sizes), *canvas, 3), np.float32)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:height, :width] = rng.normal(size=(height, width, 3))
    return PaddedImages(jnp.asarray(images), jnp.asarray(sizes, jnp.int32))


def torch_inputs(inputs):
    """``pixel_values`` and ``pixel_mask``."""
    import torch

    pixels = torch.tensor(np.asarray(inputs.images).transpose(0, 3, 1, 2))
    mask = torch.zeros(pixels.shape[0], *pixels.shape[2:], dtype=torch.long)
    for row, (height, width) in zip(mask, np.asarray(inputs.size), strict=True):
        row[:height, :width] = 1
    return pixels, mask


def hf_layers(module, output):
    """Logits and boxes after every decoder layer, from the hidden states.

    Of these the first is what goes in, and the last went through the decoder's norm already.
    """
    import torch

    inner = getattr(module, "detr", module)
    normed = [inner.model.decoder.layernorm(x) for x in output.decoder_hidden_states[1:-1]]
    normed = torch.stack([*normed, output.last_hidden_state])
    return inner.class_labels_classifier(normed), inner.bbox_predictor(normed).sigmoid()


def published(module, folder: Path):
    """The tensors that ``save_pretrained`` writes."""
    from safetensors.numpy import load_file

    module.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def torch_detr(*, pre_norm=False, dc5=False):
    """DETR as the paper's section A.3 says, of torch's own attention and torchvision's ResNet, by facebook's names."""
    import torch
    from torch import nn
    from torchvision.models.resnet import Bottleneck
    from torchvision.models.resnet import ResNet as TorchResNet
    from torchvision.ops.misc import FrozenBatchNorm2d

    width, heads, hidden = SIZES["width"], SIZES["num_heads"], SIZES["mlp_dim"]

    class Layer(nn.Module):
        def __init__(self, cross):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
            if cross:
                self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
            for i in range(3 if cross else 2):
                setattr(self, f"norm{i + 1}", nn.LayerNorm(width))

        def forward(self, x, position, hidden, memory=None, memory_position=None):
            def among(y):
                mask = hidden if memory is None else None
                return self.self_attn(y + position, y + position, y, key_padding_mask=mask)[0]

            def across(y):
                return self.multihead_attn(y + position, memory + memory_position, memory, key_padding_mask=hidden)[0]

            branches = [among, *([] if memory is None else [across]), lambda y: self.linear2(self.linear1(y).relu())]
            for i, branch in enumerate(branches):
                norm = getattr(self, f"norm{i + 1}")
                x = x + branch(norm(x)) if pre_norm else norm(x + branch(x))
            return x

    class Stack(nn.Module):
        def __init__(self, depth, cross):
            super().__init__()
            self.layers = nn.ModuleList([Layer(cross) for _ in range(depth)])
            if cross or pre_norm:
                self.norm = nn.LayerNorm(width)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

        def forward(self, x):
            return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu()).sigmoid()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            dilation = [False, False, dc5]
            body = TorchResNet(
                Bottleneck, [1, 1, 1, 2], replace_stride_with_dilation=dilation, norm_layer=FrozenBatchNorm2d
            )
            del body.fc
            self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
            self.transformer = nn.ModuleDict({"encoder": Stack(2, False), "decoder": Stack(3, True)})
            self.input_proj = nn.Conv2d(2048, width, 1)
            self.query_embed = nn.Embedding(QUERIES, width)
            self.class_embed, self.bbox_embed = nn.Linear(width, CLASSES + 1), Heads()

        def features(self, pixels):
            body = self.backbone[0]["body"]
            x = body.maxpool(body.bn1(body.conv1(pixels)).relu())
            return body.layer4(body.layer3(body.layer2(body.layer1(x))))

        def forward(self, pixels, mask):
            x = self.input_proj(self.features(pixels))
            hidden = nn.functional.interpolate(mask[None].float(), size=x.shape[-2:])[0] == 0
            position = sine(~hidden, width).flatten(1, 2)
            x, hidden = x.flatten(2).transpose(1, 2), hidden.flatten(1)
            encoder, decoder = self.transformer["encoder"], self.transformer["decoder"]
            for layer in encoder.layers:
                x = layer(x, position, hidden)
            x = encoder.norm(x) if pre_norm else x
            placed = self.query_embed.weight[None].expand(len(x), -1, -1)
            y, outputs = torch.zeros_like(placed), []
            for layer in decoder.layers:
                y = layer(y, placed, hidden, x, position)
                outputs.append(decoder.norm(y))
            outputs = torch.stack(outputs)
            return self.class_embed(outputs), self.bbox_embed(outputs)

    return randomise(Model())


def sine(mask, width):
    """Section A.4: for rows and then columns, waves of the share of the image's side that lies up to here."""
    import torch

    half = width // 2
    wavelength = 10000 ** (2 * (torch.arange(half) // 2) / half)
    axes = []
    for axis in (1, 2):
        count = mask.cumsum(axis, dtype=torch.float32)
        angle = (count / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6) * 2 * np.pi)[..., None] / wavelength
        axes.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3))
    return torch.cat(axes, dim=3)
