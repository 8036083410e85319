"""Small Segment Anything: ours, transformers' with the same sizes, and the names and shapes of both kinds of files."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.backbones import ViTSize
from eqvision.segmenters.sam import sam

SIDE, PATCH, GRID = 64, 8, 8
WIDTH, MLP, HEADS, WINDOW = 32, 64, 4, 3  # the window does not divide the grid
OUT, MASK_CHANNELS, DECODER_MLP, QUALITY = 16, 8, 32, 16
STATE = eqx.nn.State(eqx.nn.make_with_state(lambda: ())()[0])
# XLA at its full level takes longer for these than the runs gain.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def toy_sam(*, num_classes=3, image_size=SIDE, in_channels=3, eps=1e-5, key):
    """As a row of the zoo, whose classes are the masks."""
    return sam(
        ViTSize(WIDTH, 2, HEADS, MLP), PATCH, image_size=image_size, global_blocks=(1,), window=WINDOW,
        in_channels=in_channels, width=OUT, num_masks=num_classes, mask_channels=MASK_CHANNELS, num_heads=HEADS,
        mlp_dim=DECODER_MLP, quality_width=QUALITY, eps=eps, key=key,
    )  # fmt: skip


@functools.cache
def noisy_sam():
    """Noise everywhere: tables that start at zero would hide mistakes, and initialisers take seconds to compile."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(lambda: toy_sam(key=jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


def reference(*, eps=1e-6):
    """transformers' SamModel with noise in every parameter."""
    import torch
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH, "output_channels": OUT, "num_hidden_layers": 2, "num_attention_heads": HEADS,
            "image_size": SIDE, "patch_size": PATCH, "window_size": WINDOW, "global_attn_indexes": [1],
            "num_pos_feats": OUT // 2, "mlp_dim": MLP,
        },
        prompt_encoder_config={
            "hidden_size": OUT, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": MASK_CHANNELS,
        },
        mask_decoder_config={
            "hidden_size": OUT, "mlp_dim": DECODER_MLP, "num_attention_heads": HEADS, "iou_head_hidden_dim": QUALITY,
            "layer_norm_eps": eps,
        },
        attn_implementation="eager",
    )  # fmt: skip
    model = SamModel(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


# The published modules, by the names that torch gives their tensors


def line(name, i, o):
    yield f"{name}.weight", (o, i)
    yield f"{name}.bias", (o,)


def conv(name, i, o, k, bias=True):
    yield f"{name}.weight", (o, i, k, k)
    if bias:
        yield f"{name}.bias", (o,)


def up(name, i, o):
    yield f"{name}.weight", (i, o, 2, 2)
    yield f"{name}.bias", (o,)


def norm(name, c):
    yield f"{name}.weight", (c,)
    yield f"{name}.bias", (c,)


def block(name, number, norms):
    side = GRID if number == 1 else WINDOW
    yield from norm(f"{name}.{norms}1", WIDTH)
    yield from line(f"{name}.attn.qkv", WIDTH, 3 * WIDTH)
    yield from line(f"{name}.attn.proj", WIDTH, WIDTH)
    yield f"{name}.attn.rel_pos_h", (2 * side - 1, WIDTH // HEADS)
    yield f"{name}.attn.rel_pos_w", (2 * side - 1, WIDTH // HEADS)
    yield from norm(f"{name}.{norms}2", WIDTH)
    yield from line(f"{name}.mlp.lin1", WIDTH, MLP)
    yield from line(f"{name}.mlp.lin2", MLP, WIDTH)


def attention(name, inner):
    for letter in "qkv":
        yield from line(f"{name}.{letter}_proj", OUT, inner)
    yield from line(f"{name}.out_proj", inner, OUT)


def two_way(name, norms):
    yield from attention(f"{name}.self_attn", OUT)
    yield from attention(f"{name}.cross_attn_token_to_image", OUT // 2)
    yield from attention(f"{name}.cross_attn_image_to_token", OUT // 2)
    for number in (1, 2, 3, 4):
        yield from norm(f"{name}.{norms}{number}", OUT)
    yield from line(f"{name}.mlp.lin1", OUT, DECODER_MLP)
    yield from line(f"{name}.mlp.lin2", DECODER_MLP, OUT)


def mlp(names, widths):
    for name, i, o in zip(names, widths[:-1], widths[1:], strict=True):
        yield from line(name, i, o)


def vectors(prefix):
    """What both call alike."""
    yield f"{prefix}.iou_token.weight", (1, OUT)
    yield f"{prefix}.mask_tokens.weight", (4, OUT)
    yield from attention(f"{prefix}.transformer.final_attn_token_to_image", OUT // 2)
    yield "prompt_encoder.not_a_point_embed.weight", (1, OUT)
    yield "prompt_encoder.no_mask_embed.weight", (1, OUT)


def official_names():
    """facebookresearch/segment-anything."""
    encoder, prompts, decoder = "image_encoder", "prompt_encoder", "mask_decoder"
    yield f"{encoder}.pos_embed", (1, GRID, GRID, WIDTH)
    yield from conv(f"{encoder}.patch_embed.proj", 3, WIDTH, PATCH)
    for number in (0, 1):
        yield from block(f"{encoder}.blocks.{number}", number, "norm")
        yield from two_way(f"{decoder}.transformer.layers.{number}", "norm")
    yield from conv(f"{encoder}.neck.0", WIDTH, OUT, 1, bias=False)
    yield from norm(f"{encoder}.neck.1", OUT)
    yield from conv(f"{encoder}.neck.2", OUT, OUT, 3, bias=False)
    yield from norm(f"{encoder}.neck.3", OUT)
    yield f"{prompts}.pe_layer.positional_encoding_gaussian_matrix", (2, OUT // 2)
    for number in range(4):
        yield f"{prompts}.point_embeddings.{number}.weight", (1, OUT)
        hyper = [f"{decoder}.output_hypernetworks_mlps.{number}.layers.{i}" for i in range(3)]
        yield from mlp(hyper, (OUT, OUT, OUT, OUT // 8))
    yield from conv(f"{prompts}.mask_downscaling.0", 1, MASK_CHANNELS // 4, 2)
    yield from norm(f"{prompts}.mask_downscaling.1", MASK_CHANNELS // 4)
    yield from conv(f"{prompts}.mask_downscaling.3", MASK_CHANNELS // 4, MASK_CHANNELS, 2)
    yield from norm(f"{prompts}.mask_downscaling.4", MASK_CHANNELS)
    yield from conv(f"{prompts}.mask_downscaling.6", MASK_CHANNELS, OUT, 1)
    yield from vectors(decoder)
    yield from norm(f"{decoder}.transformer.norm_final_attn", OUT)
    yield from up(f"{decoder}.output_upscaling.0", OUT, OUT // 4)
    yield from norm(f"{decoder}.output_upscaling.1", OUT // 4)
    yield from up(f"{decoder}.output_upscaling.3", OUT // 4, OUT // 8)
    quality = [f"{decoder}.iou_prediction_head.layers.{i}" for i in range(3)]
    yield from mlp(quality, (OUT, QUALITY, QUALITY, 4))


def hf_names():
    """transformers' SamModel, as ``save_pretrained`` writes it."""
    encoder, prompts, decoder = "vision_encoder", "prompt_encoder", "mask_decoder"
    yield f"{encoder}.pos_embed", (1, GRID, GRID, WIDTH)
    yield from conv(f"{encoder}.patch_embed.projection", 3, WIDTH, PATCH)
    for number in (0, 1):
        yield from block(f"{encoder}.layers.{number}", number, "layer_norm")
        yield from two_way(f"{decoder}.transformer.layers.{number}", "layer_norm")
    yield from conv(f"{encoder}.neck.conv1", WIDTH, OUT, 1, bias=False)
    yield from norm(f"{encoder}.neck.layer_norm1", OUT)
    yield from conv(f"{encoder}.neck.conv2", OUT, OUT, 3, bias=False)
    yield from norm(f"{encoder}.neck.layer_norm2", OUT)
    yield "shared_image_embedding.positional_embedding", (2, OUT // 2)
    layers = ("proj_in", "layers.0", "proj_out")
    for number in range(4):
        yield f"{prompts}.point_embed.{number}.weight", (1, OUT)
        hyper = [f"{decoder}.output_hypernetworks_mlps.{number}.{layer}" for layer in layers]
        yield from mlp(hyper, (OUT, OUT, OUT, OUT // 8))
    yield from conv(f"{prompts}.mask_embed.conv1", 1, MASK_CHANNELS // 4, 2)
    yield from norm(f"{prompts}.mask_embed.layer_norm1", MASK_CHANNELS // 4)
    yield from conv(f"{prompts}.mask_embed.conv2", MASK_CHANNELS // 4, MASK_CHANNELS, 2)
    yield from norm(f"{prompts}.mask_embed.layer_norm2", MASK_CHANNELS)
    yield from conv(f"{prompts}.mask_embed.conv3", MASK_CHANNELS, OUT, 1)
    yield from vectors(decoder)
    yield from norm(f"{decoder}.transformer.layer_norm_final_attn", OUT)
    yield from up(f"{decoder}.upscale_conv1", OUT, OUT // 4)
    yield from norm(f"{decoder}.upscale_layer_norm", OUT // 4)
    yield from up(f"{decoder}.upscale_conv2", OUT // 4, OUT // 8)
    yield from mlp([f"{decoder}.iou_prediction_head.{layer}" for layer in layers], (OUT, QUALITY, QUALITY, 4))


def official_of_hf(tensors):
    """The tensors of a transformers file under the official names: the two tables are in the same order."""
    pairs = zip(official_names(), hf_names(), strict=True)
    return {official: tensors[theirs] for (official, _), (theirs, _) in pairs}
