"""Decoders with a cache: cached equals uncached, padding changes nothing, one compilation a generation, errors."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw, shaken

from eqvision.backbones import T5Size
from eqvision.language import T5, TextDecoder, beam_search, greedy, prefix_visible, prompt_of, restricted, sample
from eqvision.language.beam_search import Beams
from eqvision.layers import DecoderStack, attention
from eqvision.types import TextTokens

SIZE = T5Size(width=16, depth=2, num_heads=2, head_width=6, mlp_dim=24, gated=True)
VOCAB, LENGTHS = 11, (6, 3, 1)


@pytest.fixture(scope="module")
def t5():
    model = T5(SIZE, tied=True, vocab_size=VOCAB, num_buckets=8, max_distance=12, key=jax.random.key(0))
    return shaken(model, 0.3)


def _decoder(**options):
    sizes = {"vocab_size": VOCAB, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "max_positions": 12}
    return shaken(TextDecoder(**sizes, **options, key=jax.random.key(0)), 0.3)


def _text(seed=0, lengths=LENGTHS, junk=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    ids = np.where(mask, rng.integers(0, VOCAB, mask.shape), junk)
    return TextTokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


def _in_steps(model, cache, text, steps):
    """The logits of all words, which are given to the cache so many at a time."""
    cache, logits, first = cache.grown(text.ids.shape[1]), [], 0
    for count in steps:
        part = slice(first, first + count)
        each, cache = model.decode_step(text.ids[:, part], cache, mask=text.mask[:, part])
        logits.append(each)
        first += count
    return jnp.concatenate(logits, axis=1)


def test_t5_writes_with_a_cache_as_without(t5, assert_close):
    source, target = _text(), _text(1, (7, 7, 7))

    @jax.jit
    def both(model, source, target):
        memory = model.encode(source)
        cached = _in_steps(model, model.start(memory, source.mask), target, (3, 1, 1, 2))
        return cached, model(source, target.ids)

    cached, uncached = both(t5, source, target)
    assert_close(cached, uncached, 1e-5)
    assert np.std(cached) > 0.1


@pytest.mark.slow
def test_padding_of_the_source_changes_nothing(t5, assert_close):
    target = _text(1, (4, 4, 4)).ids
    run = jax.jit(lambda source: t5(source, target))
    for junk in (7, 10**6, -3):
        assert_close(run(_text(junk=junk)), run(_text()), 0)
    other = _text(lengths=(6, 3, 3))
    assert np.abs(run(other) - run(_text()))[2].max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "memory", "both"])
def test_decoder_writes_with_a_cache_as_without(kind, assert_close):
    prefix, memory = kind in ("prefix", "both"), kind in ("memory", "both")
    model = _decoder(prefix_width=5 if prefix else None, memory_width=7 if memory else None)
    about = {"prefix": jnp.asarray(draw(3, 4, 5))} if prefix else {}
    about |= {"memory": jnp.asarray(draw(3, 5, 7, seed=1))} if memory else {}
    masks = {f"{name}_mask": jnp.arange(x.shape[1]) < jnp.asarray([[4], [2], [1]]) for name, x in about.items()}
    spoiled = {name: jnp.where(masks[f"{name}_mask"][:, :, None], x, jnp.nan) for name, x in about.items()}
    text = _text(1, (6, 4, 2))

    @jax.jit
    def both(model, about, text):
        return _in_steps(model, model.start(**about, **masks), text, (2, 1, 3)), model(text, **about, **masks)

    cached, uncached = both(model, about, text)
    real = text.mask[:, :, None]
    assert_close(cached * real, uncached * real, 1e-5)
    assert_close([x * real for x in both(model, spoiled, text)], [cached * real, uncached * real], 0)


def test_words_see_the_prefix_and_what_is_before_them():
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(prefix_visible(2, 3)[0], np.array(expected, bool))


@pytest.mark.parametrize("implementation", ["xla", pytest.param("blocked", marks=pytest.mark.slow)])
def test_visible_and_unscaled_attention_are_plain_formulas(implementation, assert_close):
    query, key, value = (draw(2, 5, 3, 4, seed=seed) for seed in range(3))
    visible = np.random.default_rng(3).random((2, 5, 5)) < 0.6
    visible[0, 1] = False
    options = {"implementation": implementation, "block_size": 2}
    found = attention(*map(jnp.asarray, (query, key, value)), visible=jnp.asarray(visible), scaled=False, **options)
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", query, key)) * visible[:, None]
    total = np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    assert_close(found, np.einsum("bhqk,bkhd->bqhd", weights / total, value), 1e-5)
    shared = attention(*map(jnp.asarray, (query, key, value)), visible=jnp.asarray(visible[:1, 2:3]), **options)
    one = attention(*map(jnp.asarray, (query, key, value)), key_mask=jnp.asarray(visible[[0, 0], 2]), **options)
    assert_close(shared, one, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_stack_is_its_blocks_one_after_the_other(norm_order, key, assert_close):
    options = {"memory_width": 6, "inner_width": 12, "norm": "rms", "mlp": "gated", "use_bias": False, "scaled": False}
    stack = shaken(DecoderStack(3, 8, 2, 16, norm_order=norm_order, **options, key=key))
    x, memory = jnp.asarray(draw(2, 5, 8)), jnp.asarray(draw(2, 4, 6))

    def loop(stack, x):
        for index in range(3):
            block = jax.tree.map(operator.itemgetter(index), stack.blocks)
            x, _ = block(x, memory=block.remembered(memory, None), causal=True)
        return x

    assert_close(jax.jit(lambda stack, x: stack(x, memory=memory))(stack, x), jax.jit(loop)(stack, x), 1e-5)


@pytest.mark.slow
def test_remat_changes_no_gradient(key, assert_close):
    x, memory = jnp.asarray(draw(2, 5, 8)), jnp.asarray(draw(2, 4, 6))

    def gradient(**options):
        stack = DecoderStack(3, 8, 2, 16, memory_width=6, use_bias=False, dropout=0.1, **options, key=key)
        return jax.jit(jax.grad(lambda stack: jnp.sum(jnp.sin(stack(x, memory=memory, train=True, key=key)))))(stack)

    assert_close(jax.tree.leaves(gradient(remat="full")), jax.tree.leaves(gradient()), 1e-5)


class Traces(list):
    """A list that may be a static field."""

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other if isinstance(other, Traces) else list.__eq__(self, other)


class Chain(eqx.Module):
    """Writes by a table of what follows what, so that the best text can be found by trying all of them."""

    logits: jax.Array

    def decode_step(self, ids, cache, *, mask=None):
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        return self.logits[ids], cache.taken(mask)


def _no_memory(rows):
    return DecoderStack(1, 4, 1, 4, key=jax.random.key(0)).start(jnp.zeros((rows, 0, 4)))


class Counted(eqx.Module):
    """Counts how often ``decode_step`` is traced."""

    model: Chain
    traces: list = eqx.field(static=True)

    def decode_step(self, ids, cache, *, mask=None):
        self.traces.append(ids.shape)
        return self.model.decode_step(ids, cache, mask=mask)


def test_a_generation_is_one_program_and_beams_of_one_are_greedy():
    model, cache = Counted(Chain(jnp.asarray(draw(6, 6))), Traces()), _no_memory(3)
    options, prompts = {"max_new_tokens": 6, "end_id": 3, "pad_id": 9}, _text(lengths=(3, 2, 1))
    for least in (0, 1):
        prompts = prompts._replace(ids=jnp.clip(prompts.ids, least, 5))
        found = greedy(model, cache, prompts, **options)
    assert model.traces == [(3, 3), (3, 1)]  # the prompt, and the loop
    model.traces.clear()
    for stopping, penalty in ((False, 1.0), (True, 2.0), ("never", -1.0)):
        rules = {"early_stopping": stopping, "length_penalty": penalty}
        beams = beam_search(model, cache, prompts, num_beams=1, **options, **rules)
        np.testing.assert_array_equal(beams.ids[:, 0], found.ids)
        np.testing.assert_array_equal(beams.mask[:, 0], found.mask)
        lengths = np.asarray(found.mask).sum(1)
        np.testing.assert_allclose(beams.scores[:, 0] * lengths**penalty, found.log_prob, rtol=1e-5)
    assert model.traces == [(3, 3), (3, 1)]
    assert isinstance(beams, Beams)
    assert (np.asarray(found.ids)[~np.asarray(found.mask)] == 9).all()


def test_wide_enough_beams_find_the_best_of_all_texts():
    logits, steps, end = 2 * draw(4, 4), 5, 3
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    found = beam_search(
        Chain(jnp.asarray(logits)),
        _no_memory(2),
        prompt_of(0, 2),
        num_beams=64,
        max_new_tokens=steps,
        end_id=end,
        length_penalty=0.7,
        early_stopping="never",
        num_texts=3,
    )
    texts = []

    def write(text, score, last):
        for word in range(4):
            longer, total = (*text, word), score + log_probs[last, word]
            if word == end or len(longer) == steps:
                texts.append((total / len(longer) ** 0.7, longer))
            else:
                write(longer, total, word)

    write((), 0.0, 0)
    best = sorted(texts, reverse=True)[:3]
    for row in range(2):
        for place, (score, text) in enumerate(best):
            assert tuple(np.asarray(found.ids[row, place])[np.asarray(found.mask[row, place])]) == text
            np.testing.assert_allclose(found.scores[row, place], score, rtol=1e-5)


@pytest.mark.slow
def test_drawn_words_depend_on_key_row_and_number_only():
    model, key = Chain(jnp.asarray(draw(6, 6))), jax.random.key(1)
    options = {"max_new_tokens": 20, "end_id": 7, "key": key}
    found = sample(model, _no_memory(3), prompt_of(0, 3), **options)
    alone = sample(model, _no_memory(1), prompt_of(0, 1), **options)
    np.testing.assert_array_equal(alone.ids[0], found.ids[0])
    assert len({tuple(row) for row in np.asarray(found.ids)}) == 3
    coldest = sample(model, _no_memory(3), prompt_of(0, 3), **options, temperature=1e-4)
    word = 0
    for drawn in np.asarray(coldest.ids)[1]:
        word = int(np.argmax(model.logits[word]))
        assert drawn == word
    many = sample(model, _no_memory(400), prompt_of(0, 400), **(options | {"max_new_tokens": 1}), top_k=3, top_p=0.8)
    expected = np.asarray(jax.nn.softmax(restricted(model.logits[:1], top_k=3, top_p=0.8)))[0]
    counts = np.bincount(np.asarray(many.ids)[:, 0], minlength=6) / 400
    assert (counts[expected == 0] == 0).all()
    assert np.abs(counts - expected).max() < 0.1


def test_what_cannot_be_generated_is_refused_in_words(unchecked):
    model = Chain(jnp.zeros((4, 4)))
    options = {"max_new_tokens": 3, "end_id": 1}
    empty = TextTokens(jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0), bool))
    for message, call in (
        ("prompt of one token or more", lambda: greedy(model, _no_memory(2), empty, **options)),
        ("max_new_tokens of 1", lambda: greedy(model, _no_memory(2), prompt_of(0, 2), max_new_tokens=0, end_id=1)),
        ("3 prompts for a cache of 2 rows", lambda: greedy(model, _no_memory(2), prompt_of(0, 3), **options)),
        ("temperature must be above 0", lambda: _sample(model, temperature=0.0)),
        ("top_k must be 1 or more", lambda: _sample(model, top_k=0)),
        ("top_p must be above 0 and at most 1", lambda: _sample(model, top_p=1.5)),
        ("num_texts must be 1 to num_beams", lambda: _beams(model, num_beams=2, num_texts=3)),
        ("early_stopping must be True, False or 'never'", lambda: _beams(model, num_beams=2, early_stopping="always")),
        ("room for 1", lambda: _no_memory(2).grown(1).taken(jnp.ones((2, 2), bool))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def _sample(model, **options):
    start = (_no_memory(2), prompt_of(0, 2))
    return sample(model, *start, max_new_tokens=3, end_id=1, key=jax.random.key(0), **options)


def _beams(model, **options):
    return beam_search(model, _no_memory(2), prompt_of(0, 2), max_new_tokens=3, end_id=1, **options)


def test_texts_longer_than_cache_or_positions_do_not_go_unnoticed():
    model = _decoder()
    with pytest.raises(ValueError, match="needs a prefix or a memory"):
        model.start()
    with pytest.raises(ValueError, match="14 words is longer than the 12 learned positions"):
        greedy(model, model.start(jnp.zeros((1, 0, 16))), prompt_of(0, 1), max_new_tokens=14, end_id=1)
    cache = model.start(jnp.zeros((1, 0, 16))).grown(2)
    step = eqx.filter_jit(model.decode_step)
    ids = jnp.zeros((1, 1), jnp.int32)
    for _ in range(2):
        logits, cache = step(ids, cache)
        assert np.isfinite(logits).all()
    assert np.isnan(step(ids, cache)[0]).all()
