"""Small OWL-ViTs: ours, transformers' with the same sizes, and Scenic's in Flax by its published names."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from eqvision.backbones import ViTSize
from eqvision.backbones.clip_text import TextSize
from eqvision.detectors import OwlViTSize, owlvit
from eqvision.types import QueriedImages, TextTokens

SIDE, PATCH, VOCAB, LENGTH = 64, 16, 99, 16
SIZE = OwlViTSize(ViTSize(32, 2, 4, 64), PATCH, SIDE, TextSize(24, 2, 3, 48), 24)
TOYS = {
    "toy_owlvit": functools.partial(owlvit, SIZE, vocab_size=VOCAB),
    "toy_owlv2": functools.partial(owlvit, SIZE, objectness=True, vocab_size=VOCAB),
}


def reference(version, seed=0):
    """transformers' detector with noise in every parameter."""
    import torch
    from transformers import Owlv2Config, Owlv2ForObjectDetection, OwlViTConfig, OwlViTForObjectDetection

    config, kind = {1: (OwlViTConfig, OwlViTForObjectDetection), 2: (Owlv2Config, Owlv2ForObjectDetection)}[version]
    text = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": VOCAB - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    model = kind(config(text_config=text, vision_config=vision, projection_dim=24, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn + 1.0 if "norm" in name and name.endswith("weight") else drawn)
    return model


def queries(seed=0, images=2, count=3):
    """Texts of several lengths between a first and a last token; the last of the last image asks for nothing."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, LENGTH + 1, (images, count, 1))
    places = np.arange(LENGTH)
    ids = np.where(places < lengths - 1, rng.integers(2, VOCAB - 1, (images, count, LENGTH)), VOCAB - 1)
    ids = np.where(places == 0, 1, ids)
    mask = places < lengths
    mask[-1, -1] = False
    return TextTokens(np.where(mask, ids, 0).astype(np.int32), mask)


def inputs(seed=0, images=2, count=3, side=SIDE):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(images, side, side, 3)).astype(np.float32)
    sizes = np.full((images, 2), side, np.int32)
    return QueriedImages(pixels, sizes, queries(seed, images, count))


# Scenic's model, from the facts in scenic/projects/owl_vit/{layers,models,utils}.py and clip/layers.py


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.hidden, name="c_fc")(x)
        return nn.Dense(x.shape[-1], name="c_proj")(y * jax.nn.sigmoid(1.702 * y))


class Block(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, mask=None):
        x = x + nn.SelfAttention(self.heads, name="attn")(nn.LayerNorm(1e-5, name="ln_0")(x), mask)
        return x + Mlp(self.hidden, name="mlp")(nn.LayerNorm(1e-5, name="ln_1")(x))


class Transformer(nn.Module):
    size: ViTSize | TextSize

    @nn.compact
    def __call__(self, x, mask=None):
        for i in range(self.size.depth):
            x = Block(self.size.num_heads, self.size.mlp_dim, name=f"resblocks_{i}")(x, mask)
        return x


def drawn(module, name, *shape):
    return module.param(name, jax.nn.initializers.normal(1.0), shape)


class Visual(nn.Module):
    @nn.compact
    def __call__(self, images):
        width, patch = SIZE.vision.width, (PATCH, PATCH)
        x = nn.Conv(width, patch, patch, use_bias=False, name="conv1")(images).reshape(len(images), -1, width)
        token = jnp.tile(drawn(self, "class_embedding", width), (len(images), 1, 1))
        x = jnp.concatenate([token, x], axis=1)
        x = nn.LayerNorm(1e-5, name="ln_pre")(x + drawn(self, "positional_embedding", x.shape[1], width))
        return nn.LayerNorm(1e-5, name="ln_post")(Transformer(SIZE.vision, name="transformer")(x))


class Text(nn.Module):
    @nn.compact
    def __call__(self, ids):
        mask = nn.combine_masks(nn.make_attention_mask(ids > 0, ids > 0), nn.make_causal_mask(ids))
        x = nn.Embed(VOCAB, SIZE.text.width, name="token_embedding")(ids)
        x = x + drawn(self, "positional_embedding", LENGTH, SIZE.text.width)
        x = nn.LayerNorm(1e-5, name="ln_final")(Transformer(SIZE.text, name="transformer")(x, mask))
        ends = x[jnp.arange(len(ids)), ids.argmax(-1)]
        return nn.Dense(SIZE.embed_dim, use_bias=False, name="text_projection")(ends)


class Clip(nn.Module):
    @nn.compact
    def __call__(self, images, ids):
        drawn(self, "logit_scale")
        return Visual(name="visual")(images), Text(name="text")(ids)


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, images, ids):
        x, text = Clip(name="clip")(images, ids)
        return nn.LayerNorm(name="merged_class_token")(x[:, 1:] * x[:, :1]), text


class Predictor(nn.Module):
    out: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.gelu(nn.Dense(x.shape[-1])(x))
        return nn.Dense(self.out)(x)


class ClassHead(nn.Module):
    @nn.compact
    def __call__(self, x, queries, mask):
        found = nn.Dense(SIZE.embed_dim)(x)
        cosine = jnp.einsum("bpd,bqd->bpq", *(y / (jnp.linalg.norm(y, axis=-1, keepdims=True) + 1e-6)
                                              for y in (found, queries)))  # fmt: skip
        scale = nn.elu(nn.Dense(1, name="logit_scale")(x)) + 1
        return jnp.where(mask[:, None], (cosine + nn.Dense(1, name="logit_shift")(x)) * scale, -1e6)


class ScenicOwlViT(nn.Module):
    """Logits, boxes and objectness."""

    objectness: bool = False

    @nn.compact
    def __call__(self, images, ids):
        x, text = Backbone(name="backbone")(images, ids.reshape(-1, ids.shape[-1]))
        logits = ClassHead(name="class_head")(x, text.reshape(*ids.shape[:2], -1), ids[..., 0] > 0)
        objects = Predictor(1, name="objectness_head")(x)[..., 0] if self.objectness else None
        side = SIDE // PATCH
        places = np.stack(np.meshgrid(*[np.arange(1, side + 1) / side] * 2), axis=-1).reshape(-1, 2)
        places = np.concatenate([places, np.full_like(places, 1 / side)], axis=-1)
        bias = np.log(places + 1e-4) - np.log1p(-places + 1e-4)
        return logits, nn.sigmoid(Predictor(4, name="obj_box_head")(x) + bias), objects


def scenic_parameters(module, *arguments):
    """By names joined with ``/``, all of them noise."""
    rng = np.random.default_rng(5)
    shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"], sep="/")
    noise = {name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    return {name: np.asarray(leaf + name.endswith("/scale")) for name, leaf in noise.items()}


def scenic_outputs(module, parameters, *arguments):
    return jax.jit(module.apply)({"params": unflatten_dict(parameters, sep="/")}, *arguments)


def earlier_names(parameters):
    """As the first files have them."""
    names = {}
    for name in parameters:
        tower = "/transformer/resblocks_" in name
        new = name.replace("/ln_1/", "/ln_2/").replace("/ln_0/", "/ln_1/") if tower else name
        names[name] = new.replace("/resblocks_", "/resblocks.")
    return {names[name]: leaf for name, leaf in parameters.items()}
