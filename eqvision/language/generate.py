"""Texts from a decoder, word by word: the likeliest word each time, or one that is drawn.

A whole generation is one program, a ``while_loop`` that ends when all texts have ended. Whatever writes texts needs one
method, ``decode_step``; its ``start`` reads what the text is about. Beams are in ``beam_search.py``.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.layers.kv_cache import KVCache
from eqvision.types import TextTokens

Logits = Float[Array, "b v"]
Words = Int[Array, " b"]


@runtime_checkable
class Writer(Protocol):
    """What texts can be generated with: ``T5``, ``TextDecoder``."""

    def decode_step(
        self, ids: Int[Array, "b n"], cache: KVCache, *, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n v"], KVCache]:
        """Logits behind each of the next tokens, which are kept in the cache; ``mask`` is False on padding."""
        ...


class Generated(NamedTuple):
    """One text for each example. ``mask`` is True up to the end token, and with it; ``log_prob`` is of all of these."""

    ids: Int[Array, "b n"]
    mask: Bool[Array, "b n"]
    log_prob: Float[Array, " b"]


class _Loop(NamedTuple):
    number: Int[Array, ""]
    generated: Generated
    ended: Bool[Array, " b"]
    cache: KVCache


def prompt_of(start_id: int, batch: int) -> TextTokens:
    """The prompt that is nothing but a start token, as T5's (0) and GIT's (101)."""
    ids = jnp.full((batch, 1), start_id, jnp.int32)
    return TextTokens(ids, jnp.ones(ids.shape, bool))


@eqx.filter_jit
def greedy(
    model: Writer, cache: KVCache, prompt: TextTokens, *, max_new_tokens: int, end_id: int, pad_id: int = 0
) -> Generated:
    """The likeliest word each time, up to ``end_id`` or ``max_new_tokens`` words; behind the end stands ``pad_id``.

    ``cache`` is what ``model.start`` gives. Prompts of several lengths are filled up behind, as texts are.
    """
    return _write(model, cache, prompt, lambda logits, _: jnp.argmax(logits, axis=-1), max_new_tokens, end_id, pad_id)


def sample(
    model: Writer,
    cache: KVCache,
    prompt: TextTokens,
    *,
    max_new_tokens: int,
    end_id: int,
    pad_id: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray,
) -> Generated:
    """A word drawn each time, of probabilities at ``temperature``, among the ``top_k`` likeliest and of these among the
    fewest that have ``top_p`` of the probability together (Holtzman et al. 2020).

    What is drawn depends on ``key``, the row in the batch and the number of the word, and on nothing else. Another
    temperature or ``top_p`` needs no compilation. ``log_prob`` is of the model's own probabilities.
    """
    if not temperature > 0:
        raise ValueError(f"sample: temperature must be above 0, got {temperature}; greedy() takes the likeliest word")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must be above 0 and at most 1, got {top_p}")
    limits = (jnp.float32(temperature), top_k, None if top_p is None else jnp.float32(top_p))
    return _sample(model, cache, prompt, limits, max_new_tokens=max_new_tokens, end_id=end_id, pad_id=pad_id, key=key)


@eqx.filter_jit
def _sample(model, cache, prompt, limits, *, max_new_tokens, end_id, pad_id, key) -> Generated:
    temperature, top_k, top_p = limits

    def choose(logits: Logits, number: Int[Array, ""]) -> Words:
        of_word = jax.random.fold_in(key, number)
        rows = jax.vmap(lambda row: jax.random.fold_in(of_word, row))(jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(rows, restricted(logits / temperature, top_k=top_k, top_p=top_p))

    return _write(model, cache, prompt, choose, max_new_tokens, end_id, pad_id)


def restricted(logits: Logits, *, top_k: int | None = None, top_p: Float[Array, ""] | float | None = None) -> Logits:
    """-inf for all but the ``top_k`` highest, and for those that the likelier ones leave no room in ``top_p``.

    The likeliest stays. Of equal logits at the border all stay.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is None:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(falling, axis=-1)
    likelier = jnp.cumsum(probability, axis=-1) - probability
    inside = ((likelier < top_p) | (top_p >= 1)).at[:, 0].set(True)  # rounding may make the sum one too early
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def _write(
    model: Writer,
    cache: KVCache,
    prompt: TextTokens,
    choose: Callable[[Logits, Int[Array, ""]], Words],
    max_new_tokens: int,
    end_id: int,
    pad_id: int,
) -> Generated:
    logits, cache = read_prompt(model, cache, prompt, max_new_tokens)
    batch = prompt.ids.shape[0]
    empty = Generated(
        jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros((batch, max_new_tokens), bool),
        jnp.zeros((batch,), jnp.float32),
    )

    def add(logits: Logits, state: _Loop) -> _Loop:
        words = choose(logits.astype(jnp.float32), state.number).astype(jnp.int32)
        words = jnp.where(state.ended, pad_id, words)
        text = _appended(state.generated, words, ~state.ended, logits, state.number)
        return _Loop(state.number + 1, text, state.ended | (words == end_id), state.cache)

    def step(state: _Loop) -> _Loop:
        last = lax.dynamic_slice_in_dim(state.generated.ids, state.number - 1, 1, axis=1)
        logits, cache = model.decode_step(last, state.cache)
        return add(logits[:, 0], state._replace(cache=cache))

    def goes_on(state: _Loop) -> Bool[Array, ""]:
        return (state.number < max_new_tokens) & ~jnp.all(state.ended)

    first = add(logits, _Loop(jnp.int32(0), empty, jnp.zeros((batch,), bool), cache))
    return lax.while_loop(goes_on, step, first).generated


def read_prompt(model: Writer, cache: KVCache, prompt: TextTokens, max_new_tokens: int) -> tuple[Logits, KVCache]:
    """Logits of the first new word, and a cache with room for all but the last of ``max_new_tokens``.

    Raises ValueError for a prompt of no tokens, of another batch than the cache's, and for no new words.
    """
    batch, length = prompt.ids.shape
    if length == 0:
        raise ValueError("generation needs a prompt of one token or more: prompt_of(start_id, batch) is the least")
    if max_new_tokens < 1:
        raise ValueError(f"generation needs max_new_tokens of 1 or more, got {max_new_tokens}")
    if batch != cache.mask.shape[0]:
        raise ValueError(f"generation: {batch} prompts for a cache of {cache.mask.shape[0]} rows")
    logits, cache = model.decode_step(prompt.ids, cache.grown(length + max_new_tokens - 1), mask=prompt.mask)
    last = jnp.maximum(jnp.sum(prompt.mask.astype(jnp.int32), axis=1) - 1, 0)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0].astype(jnp.float32), cache


def _appended(text: Generated, words: Words, real: Bool[Array, " b"], logits: Logits, place: Int[Array, ""]):
    each = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), words[:, None], axis=1)[:, 0]
    return Generated(
        lax.dynamic_update_slice(text.ids, words[:, None], (0, place)),
        lax.dynamic_update_slice(text.mask, real[:, None], (0, place)),
        text.log_prob + jnp.where(real, each, 0),
    )
