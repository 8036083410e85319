"""Beam search with a length penalty and the three rules of stopping of transformers' ``generate``.

Each example has ``num_beams`` texts that are being written and as many that have ended, of which the best are kept. All
of it is one program. Scores of ended texts are log-probabilities divided by length to the power of the penalty.
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.language.generate import Writer, read_prompt
from eqvision.layers.kv_cache import KVCache
from eqvision.types import TextTokens

NEVER = -1e9  # a score that no text has; float32 of transformers, whose ties are ours then

EarlyStopping = bool | Literal["never"]


class Beams(NamedTuple):
    """``r`` texts for each example, the best first. ``mask`` is True up to the end token, and with it."""

    ids: Int[Array, "b r n"]
    mask: Bool[Array, "b r n"]
    scores: Float[Array, "b r"]


class _Texts(NamedTuple):
    ids: Int[Array, "b r n"]
    lengths: Int[Array, "b r"]
    scores: Float[Array, "b r"]

    def best(self, order: Int[Array, "b s"]) -> "_Texts":
        return jax.tree.map(lambda x: _chosen(x, order), self)


class _Search(NamedTuple):
    number: Int[Array, ""]
    running: _Texts
    ended: _Texts
    has_ended: Bool[Array, "b r"]
    hopeful: Bool[Array, " b"]
    stuck: Bool[Array, ""]
    cache: KVCache


class _Rules(NamedTuple):
    """What is asked of the search; the last three are early stopping in two switches, and the penalty: arrays."""

    num_beams: int
    max_new_tokens: int
    end_id: int
    pad_id: int
    when_full: Bool[Array, ""]
    never: Bool[Array, ""]
    length_penalty: Float[Array, ""]


def beam_search(
    model: Writer,
    cache: KVCache,
    prompt: TextTokens,
    *,
    num_beams: int,
    max_new_tokens: int,
    end_id: int,
    pad_id: int = 0,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_texts: int = 1,
) -> Beams:
    """The ``num_texts`` best of ``num_beams`` texts.

    ``early_stopping`` True: an example is done when ``num_beams`` of its texts have ended. False: when the best that is
    being written would, if it ended now, be worse than these. "never": when it could not become better at any length.
    Positive ``length_penalty`` favours long texts. Words and scores are those of transformers' ``generate`` with
    options of these names, where floating point agrees. Another penalty or rule of stopping needs no compilation.

    ``cache`` is what ``model.start`` gives, with one row for each example.
    """
    if not 1 <= num_texts <= num_beams:
        raise ValueError(f"beam_search: num_texts must be 1 to num_beams ({num_beams}), got {num_texts}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"beam_search: early_stopping must be True, False or 'never', got {early_stopping!r}")
    stopping = (jnp.asarray(early_stopping is True), jnp.asarray(early_stopping == "never"))
    rules = _Rules(num_beams, max_new_tokens, end_id, pad_id, *stopping, jnp.float32(length_penalty))
    found = _beam_search(model, cache, prompt, rules)
    mask = jnp.arange(max_new_tokens) < found.lengths[:, :num_texts, None]
    return Beams(found.ids[:, :num_texts], mask, found.scores[:, :num_texts])


@eqx.filter_jit
def _beam_search(model: Writer, cache: KVCache, prompt: TextTokens, rules: _Rules) -> _Texts:
    logits, cache = read_prompt(model, cache, prompt, rules.max_new_tokens)
    batch, beams = logits.shape[0], rules.num_beams
    if logits.shape[1] < 2:
        raise ValueError("beam_search: a vocabulary of one word leaves nothing to search")
    logits = jnp.repeat(logits, beams, axis=0)
    cache = cache.rows(jnp.repeat(jnp.arange(batch), beams))

    def step(state: _Search) -> _Search:
        last = lax.dynamic_slice_in_dim(state.running.ids, state.number - 1, 1, axis=2)
        logits, cache = model.decode_step(last.reshape(batch * beams, 1), state.cache)
        return _advanced(logits[:, 0], state._replace(cache=cache), rules)

    first = _advanced(logits, _begun(batch, cache, rules), rules)
    return lax.while_loop(lambda state: _goes_on(state, rules), step, first).ended


def _begun(batch: int, cache: KVCache, rules: _Rules) -> _Search:
    """Only the first beam counts at first: all have the same words."""
    ids = jnp.full((batch, rules.num_beams, rules.max_new_tokens), rules.pad_id, jnp.int32)
    lengths, never = jnp.zeros(ids.shape[:2], jnp.int32), jnp.full(ids.shape[:2], NEVER, jnp.float32)
    return _Search(
        number=jnp.int32(0),
        running=_Texts(ids, lengths, never.at[:, 0].set(0.0)),
        ended=_Texts(ids, lengths, never),
        has_ended=jnp.zeros(ids.shape[:2], bool),
        hopeful=jnp.ones((batch,), bool),
        stuck=jnp.zeros((), bool),
        cache=cache,
    )


def _advanced(logits: Float[Array, "rows v"], state: _Search, rules: _Rules) -> _Search:
    """One word more. Twice as many candidates as beams are looked at, for half of them may end."""
    batch, beams = state.running.scores.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, -1)
    total = (log_probs + state.running.scores[:, :, None]).reshape(batch, -1)
    scores, index = lax.top_k(total, 2 * beams)
    beam, words = index // log_probs.shape[-1], (index % log_probs.shape[-1]).astype(jnp.int32)
    ids = lax.dynamic_update_slice(_chosen(state.running.ids, beam), words[:, :, None], (0, 0, state.number))
    count = state.number + 1
    candidates = _Texts(ids, jnp.full(scores.shape, count), scores)
    ends = (words == rules.end_id) | (count >= rules.max_new_tokens)

    open_scores = scores + jnp.where(ends, NEVER, 0.0)
    order = lax.top_k(open_scores, beams)[1]
    running = candidates._replace(scores=open_scores).best(order)
    ended, has_ended = _kept(candidates, ends, state, rules, count)
    rows = (_chosen(beam, order) + jnp.arange(batch)[:, None] * beams).reshape(-1)
    hopeful = state.hopeful & _may_improve(running.scores, ended.scores, has_ended, rules, count)
    return _Search(count, running, ended, has_ended, hopeful, jnp.all(ends), state.cache.rows(rows))


def _kept(candidates: _Texts, ends, state: _Search, rules: _Rules, count) -> tuple[_Texts, Bool[Array, "b r"]]:
    """The best of all that have ended; of the candidates only the first half may, the others are there to go on."""
    beams = rules.num_beams
    new = ends & (jnp.arange(2 * beams) < beams)
    closed = ~state.hopeful[:, None] | (rules.when_full & jnp.all(state.has_ended, axis=1, keepdims=True))
    scores = candidates.scores / count.astype(jnp.float32) ** rules.length_penalty
    scores = scores + jnp.where(closed, NEVER, 0.0) + jnp.where(new, 0.0, NEVER)
    merged = jax.tree.map(
        lambda old, more: jnp.concatenate([old, more], axis=1), state.ended, candidates._replace(scores=scores)
    )
    order = lax.top_k(merged.scores, beams)[1]
    return merged.best(order), _chosen(jnp.concatenate([state.has_ended, new], axis=1), order)


def _may_improve(running, ended, has_ended, rules: _Rules, count) -> Bool[Array, " b"]:
    """Whether the best text that is being written could push out one that has ended, by the rule that is asked for."""
    longest = rules.never & (rules.length_penalty > 0)
    length = jnp.where(longest, rules.max_new_tokens, count).astype(jnp.float32)
    best = running[:, :1] / length**rules.length_penalty
    worst = jnp.where(has_ended, jnp.min(ended, axis=1, keepdims=True), NEVER)
    return jnp.any(best > worst, axis=1)


def _goes_on(state: _Search, rules: _Rules) -> Bool[Array, ""]:
    full = rules.when_full & jnp.all(state.has_ended)
    return jnp.any(state.hopeful) & ~full & ~state.stuck


def _chosen(x: Array, index: Int[Array, "b s"]) -> Array:
    """Along the second axis."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
