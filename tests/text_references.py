"""Small T5 and GIT of transformers with random parameters, and ours with the same numbers, read by their layouts.

Outputs of a freshly initialised model hardly depend on what it reads, and all of its texts are alike: parameters are
drawn large enough here that each text goes its own way and ends at its own time.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.backbones import T5Encoder, T5Size
from eqvision.language import T5, TextDecoder
from eqvision.pretrained import load
from eqvision.pretrained.leaf_names import with_leaves
from eqvision.pretrained.rules import load_rule
from eqvision.zoo_language import LANGUAGE

VOCAB, START, END = 40, 0, 1  # of T5
SIZE = T5Size(width=24, depth=2, num_heads=3, head_width=6, mlp_dim=32, gated=False)
GIT = {"vocab_size": 40, "width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 32, "max_positions": 32}
GIT_START, GIT_END = 3, 1


def randomise(module, seed):
    """All parameters anew: matrices by their width, vectors (norms, biases) about what they were."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def hf_t5(*, gated, seed=0, multilingual=False, own_head=True):
    """``gated``: version 1.1, with an output layer of its own, which transformers makes only as it reads a file."""
    import torch
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

    config = (MT5Config if multilingual else T5Config)(
        vocab_size=VOCAB,
        d_model=SIZE.width,
        d_kv=SIZE.head_width,
        d_ff=SIZE.mlp_dim,
        num_layers=SIZE.depth,
        num_heads=SIZE.num_heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=START,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
    )
    model = (MT5ForConditionalGeneration if multilingual else T5ForConditionalGeneration)(config).eval()
    if gated and own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, SIZE.width))
    randomise(model, seed)
    return model


def talkative(reference):
    """With logits far apart that depend on what is read more than on the last word, and an end token that is common."""
    import torch
    from transformers import T5ForConditionalGeneration

    with torch.no_grad():
        if isinstance(reference, T5ForConditionalGeneration):
            gated = reference.lm_head.weight is not reference.shared.weight
            reference.decoder.final_layer_norm.weight.mul_(3.0 if gated else 15.0)
            reference.lm_head.weight[END] *= 2
        else:
            reference.git.embeddings.position_embeddings.weight.mul_(2)
            reference.output.weight.mul_(3)
            reference.output.weight[GIT_END] *= 2
    return reference


def add_t5_toys(monkeypatch):
    """Rows of the zoo: ``toy_t5`` (version 1.0), ``toy_t5_v1_1`` and their encoders."""
    gated = SIZE._replace(gated=True)
    monkeypatch.setitem(LANGUAGE, "toy_t5", functools.partial(T5, SIZE, tied=True))
    monkeypatch.setitem(LANGUAGE, "toy_t5_v1_1", functools.partial(T5, gated, tied=False))
    monkeypatch.setitem(LANGUAGE, "toy_t5_encoder", functools.partial(T5Encoder, SIZE))
    monkeypatch.setitem(LANGUAGE, "toy_t5_v1_1_encoder", functools.partial(T5Encoder, gated))


def ours(reference, name, folder):
    """The same model here, by way of the files that transformers writes."""
    reference.save_pretrained(folder)
    return load(name, folder)[0]


def hf_git(seed=0):
    """GIT with a tower of one block, for images of 8 x 8 in four patches."""
    from transformers import GitConfig, GitForCausalLM

    vision = {"hidden_size": 20, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GitConfig(
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        vocab_size=GIT["vocab_size"],
        hidden_size=GIT["width"],
        num_hidden_layers=GIT["depth"],
        num_attention_heads=GIT["num_heads"],
        intermediate_size=GIT["mlp_dim"],
        max_position_embeddings=GIT["max_positions"],
        bos_token_id=GIT_START,
        eos_token_id=GIT_END,
        pad_token_id=0,
    )
    model = GitForCausalLM(config).eval()
    randomise(model, seed)
    return model


def add_git_toy(monkeypatch):
    monkeypatch.setitem(LANGUAGE, "toy_git", functools.partial(TextDecoder, prefix_width=5, **GIT))


def draw_sources(seed, lengths):
    """Ids and mask of texts of these lengths, filled up behind, as numpy arrays; no end token among them."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    return np.where(mask, rng.integers(2, VOCAB, mask.shape), 0), mask


def converted(reference, build, layout):
    """``reference`` as the model that ``build`` makes, without a file between."""
    model = eqx.filter_eval_shape(build, key=jax.random.key(0))
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    if layout.prepare is not None:
        tensors = layout.prepare(model, tensors, "memory")
    leaves = {}
    for rule in layout.rules(model):
        leaves |= load_rule(rule, tensors)
    state = eqx.nn.State(model)
    return with_leaves(model, state, {name: jnp.asarray(leaf) for name, leaf in leaves.items()})[0]
