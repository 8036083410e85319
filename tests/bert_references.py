"""Tiny BERTs of transformers with all parameters random, and ours beside them."""

import numpy as np
import torch
from transformers import BertConfig

from eqvision.types import TextTokens

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,  # far from any default
    "attn_implementation": "eager",
}


def reference(cls, seed=0, **options):
    """A model of class ``cls`` in inference, every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    model = cls(BertConfig(**CONFIG, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embeddings" in name else 0.3
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn + 1.0 if name.endswith("LayerNorm.weight") else drawn)
    return model


def batch(seed=0):
    """Three padded pairs of texts; padding has the id 0, as in transformers."""
    rng = np.random.default_rng(seed)
    lengths = np.array([12, 7, 3])
    mask = np.arange(12) < lengths[:, None]
    ids = np.where(mask, rng.integers(1, 61, (3, 12)), 0).astype(np.int32)
    segments = np.where(mask, rng.integers(0, 3, (3, 12)), 0).astype(np.int32)
    return TextTokens(ids, mask, segments)


def theirs(text):
    """The arguments of transformers' models for the same texts."""
    return {
        "input_ids": torch.from_numpy(np.asarray(text.ids)).long(),
        "attention_mask": torch.from_numpy(np.asarray(text.mask)).long(),
        "token_type_ids": torch.from_numpy(np.asarray(text.segments)).long(),
    }
