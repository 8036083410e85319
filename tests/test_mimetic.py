"""Mimetic initialisation: attention begins with what is near, and only there do parameters differ."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.bert import BertEncoder, BertSize, mimetic_bert
from eqvision.backbones.t5 import T5Size
from eqvision.language import T5
from eqvision.layers import (
    Attention,
    DecoderBlock,
    PositionEmbedding1D,
    RelativeBias,
    TransformerStack,
    mimetic_attention,
    near_bias,
    sine_positions,
)


def first_attention(encoder, length):
    """Weights of the first block for a text of one and the same word, averaged over heads."""
    block = jax.tree.map(lambda leaf: leaf[0], encoder.encoder.blocks)
    word = jnp.broadcast_to(encoder.token_embedding.weight[3], (length, encoder.channels[0]))
    tokens = block.norm1(encoder.embedding_norm(word + encoder.position(length)))
    query, key = (linear(tokens).reshape(length, 2, -1) for linear in (block.attention.query, block.attention.key))
    logits = jnp.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return np.asarray(jax.nn.softmax(logits, axis=-1).mean(axis=0))


def share_near(encoder, length=64, reach=4):
    weights, place = first_attention(encoder, length), np.arange(length)
    return weights[np.abs(place[:, None] - place) <= reach].sum() / length


def test_attention_begins_with_what_is_near(key):
    encoder = BertEncoder(BertSize(128, 2, 2, 256), vocab_size=50, max_positions=64, norm_order="pre", key=key)
    assert share_near(encoder) < 0.2  # nine of 64 places
    assert share_near(mimetic_bert(encoder, key=key)) > 0.4


def test_nothing_else_is_changed(key):
    stack = TransformerStack(3, 16, 2, 32, key=key)
    other = eqx.tree_at(lambda s: s.blocks.attention, stack, mimetic_attention(stack.blocks.attention, key=key))
    changed = {
        jax.tree_util.keystr(path)
        for (path, one), two in zip(jax.tree.leaves_with_path(stack), jax.tree.leaves(other), strict=True)
        if not np.array_equal(one, two)
    }
    assert changed == {".blocks.attention.query.weight", ".blocks.attention.key.weight"}
    attention = other.blocks.attention
    np.testing.assert_array_equal(attention.query.weight, attention.key.weight)
    assert attention.query.weight.unsafe_buffer_pointer() != attention.key.weight.unsafe_buffer_pointer()  # donated


def test_product_is_nearly_the_identity(key):
    weights = mimetic_attention(Attention(256, 1, key=key), gain=3.0, key=key)
    product = np.asarray(weights.query.weight @ weights.key.weight.T)
    assert abs(np.diag(product).mean() - 3.0) < 0.1
    assert abs(product[~np.eye(256, dtype=bool)].mean()) < 0.01


def test_keys_of_another_width_are_refused(key):
    with pytest.raises(ValueError, match=r"queries are made by \(8, 8\) and keys by \(4, 8\); they cannot begin equal"):
        mimetic_attention(DecoderBlock(8, 2, 16, memory_width=4, key=key).cross_attention, key=key)


def test_positions_are_sines_of_the_size_of_words(key):
    table = sine_positions(PositionEmbedding1D(40, 16, key=key)).weight
    assert abs(float(jnp.sqrt(jnp.mean(table**2))) - 0.02) < 1e-6
    likeness = np.asarray(table @ table.T)
    np.testing.assert_allclose(np.diagonal(likeness, 1), likeness[0, 1], rtol=1e-5)  # of the distance alone
    assert eqx.tree_equal(sine_positions(PositionEmbedding1D(40, 16, key=key)).weight, table)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_near_bias_falls_with_the_distance(bidirectional, key):
    places = jnp.arange(12)[None]
    bias = near_bias(RelativeBias(3, bidirectional=bidirectional, key=key), slope=0.5)(places, places)
    np.testing.assert_allclose(bias[0, :, 9, 2:10], np.broadcast_to(-0.5 * np.arange(8)[::-1], (3, 8)))
    if bidirectional:
        np.testing.assert_allclose(bias[0, 1, 2], bias[0, 1, 2, :] * 0 - 0.5 * np.abs(np.arange(12) - 2), atol=0.51)


def test_words_of_a_decoder_look_for_themselves_in_the_memory(key):
    """Queries and keys have the sizes that published weights have; the scale of bare logits is in them."""

    def looked_up(mimetic):
        model = T5(T5Size(128, 1, 4, 32, 64, gated=False), tied=True, vocab_size=50, mimetic=mimetic, key=key)
        attention = jax.tree.map(lambda leaf: leaf[0], model.decoder.blocks.cross_attention)
        words = model.encoder.token_embedding.weight[:20]
        query, keys = (linear(words).reshape(20, 4, -1) for linear in (attention.query, attention.key))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, keys), axis=-1)
        return float(jnp.mean(jnp.diagonal(weights, axis1=1, axis2=2)))

    assert looked_up(False) < 0.2
    assert looked_up(True) > 0.9
