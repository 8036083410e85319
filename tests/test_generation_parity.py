"""Texts are those of transformers' ``generate``, token for token: greedy, beams, prompts of several lengths.

The random models here (``talkative``) write texts of different words that end at different times; the seeds are chosen
for that.
"""

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from text_references import (
    END,
    GIT,
    GIT_END,
    GIT_START,
    SIZE,
    START,
    VOCAB,
    converted,
    draw_sources,
    hf_git,
    hf_t5,
    talkative,
)

from eqvision.language import T5, TextDecoder, beam_search, greedy, prompt_of, restricted
from eqvision.pretrained import LAYOUTS
from eqvision.types import TextTokens

pytestmark = pytest.mark.parity
NEW = 12
LENGTHS = (9, 7, 4, 1)
T5_SEEDS = ((True, 13), (True, 32), (False, 42))  # version 1.1 and 1.0
GIT_SEEDS = (12, 49, 56)
RULES = ((False, 1.0), (True, 1.0), ("never", 1.0), (False, -1.0), (True, 0.0), ("never", 2.0))


@pytest.fixture(autouse=True)
def one_thread():
    """Products of a few numbers: threads of torch that wait for one another take longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _text(ids, mask):
    return TextTokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


def _lengths(ids, end):
    """Up to the first end token, and with it."""
    return np.where((ids == end).any(-1), (ids == end).argmax(-1) + 1, ids.shape[-1])


def _same(found, expected, end):
    """``found`` has ids and mask of one text in a row; ``expected`` are transformers' ids without the prompt."""
    wide = np.full(np.shape(found.ids), end)
    wide[:, : expected.shape[1]] = expected
    np.testing.assert_array_equal(np.asarray(found.mask).sum(1), _lengths(wide, end))
    np.testing.assert_array_equal(np.where(found.mask, found.ids, -1), np.where(found.mask, wide, -1))


def _same_beams(found, expected, prompt, end):
    """All beams, and their scores."""
    flat = found._replace(ids=found.ids.reshape(-1, NEW), mask=found.mask.reshape(-1, NEW))
    _same(flat, expected.sequences.numpy()[:, prompt:], end)
    np.testing.assert_allclose(np.ravel(found.scores), expected.sequences_scores.numpy(), rtol=1e-4, atol=1e-5)


def _generate(reference, early_stopping=False, length_penalty=1.0, num_beams=1, **inputs):
    beams = {"num_beams": num_beams, "num_return_sequences": num_beams, "early_stopping": early_stopping}
    beams |= {"length_penalty": length_penalty, "return_dict_in_generate": True, "output_scores": True}
    return reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, **(beams if num_beams > 1 else {}))


@eqx.filter_jit
def _start(model, text):
    return model.start(model.encode(text), text.mask)


def test_t5_writes_what_transformers_writes():
    import torch

    ids, mask = draw_sources(1, LENGTHS)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    options, ends, texts = {"max_new_tokens": NEW, "end_id": END}, set(), set()
    for gated, seed in T5_SEEDS:
        reference, size = talkative(hf_t5(gated=gated, seed=seed)), SIZE._replace(gated=gated)
        build = functools.partial(T5, size, tied=not gated, vocab_size=VOCAB, num_buckets=8, max_distance=12)
        model = converted(reference, build, LAYOUTS["hf_t5"])
        cache, prompt = _start(model, _text(ids, mask)), prompt_of(START, len(LENGTHS))
        found = greedy(model, cache, prompt, **options)
        _same(found, _generate(reference, **inputs).numpy()[:, 1:], END)
        ends |= set(np.asarray(found.mask).sum(1).tolist())
        for early_stopping, penalty in RULES if gated else ():
            rules = {"early_stopping": early_stopping, "length_penalty": penalty}
            found = beam_search(model, cache, prompt, num_beams=3, num_texts=3, **options, **rules)
            _same_beams(found, _generate(reference, num_beams=3, **rules, **inputs), 1, END)
            ends |= set(np.asarray(found.mask).sum(2).ravel().tolist())
            texts.add(np.where(found.mask, found.ids, -1).tobytes())
    assert len(ends) > 6
    assert len(texts) == 2 * len(RULES)  # each rule makes a difference


def test_git_writes_what_transformers_writes():
    import torch

    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "input_ids": torch.full((4, 1), GIT_START)}
    options = {"max_new_tokens": NEW, "end_id": GIT_END}
    build, ends, texts = functools.partial(TextDecoder, prefix_width=20, **GIT), set(), set()
    for seed in GIT_SEEDS:
        reference = talkative(hf_git(seed=seed))
        model = converted(reference, build, LAYOUTS["hf_git"])
        with torch.no_grad():
            features = jnp.asarray(reference.git.image_encoder(pixels).last_hidden_state.numpy())
        cache, prompt = eqx.filter_jit(model.start)(features), prompt_of(GIT_START, 4)
        found = greedy(model, cache, prompt, **options)
        _same(found, _generate(reference, **inputs).numpy()[:, 1:], GIT_END)
        ends |= set(np.asarray(found.mask).sum(1).tolist())
        for early_stopping, penalty in RULES[:4]:
            rules = {"early_stopping": early_stopping, "length_penalty": penalty}
            found = beam_search(model, cache, prompt, num_beams=3, num_texts=3, **options, **rules)
            _same_beams(found, _generate(reference, num_beams=3, **rules, **inputs), 1, GIT_END)
            texts.add(np.where(found.mask, found.ids, -1).tobytes())
    assert len(ends) > 4
    assert len(texts) == 3 * 4


def test_git_goes_on_from_prompts_of_several_lengths():
    """transformers wants them filled up in front, and here they are behind."""
    import torch

    reference = talkative(hf_git(seed=GIT_SEEDS[0]))
    model = converted(reference, functools.partial(TextDecoder, prefix_width=20, **GIT), LAYOUTS["hf_git"])
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ids, mask = draw_sources(3, (5, 2, 1))
    ahead = np.stack([np.roll(row, 5 - count) for row, count in zip(ids, mask.sum(1), strict=True)])
    tokens = {"input_ids": torch.tensor(ahead), "attention_mask": torch.tensor(ahead > 0)}
    with torch.no_grad():
        features = jnp.asarray(reference.git.image_encoder(pixels).last_hidden_state.numpy())
    cache = eqx.filter_jit(model.start)(features)
    options = {"num_beams": 3, "num_texts": 3, "max_new_tokens": NEW, "end_id": GIT_END}
    found = beam_search(model, cache, _text(ids, mask), **options)
    _same_beams(found, _generate(reference, num_beams=3, pixel_values=pixels, **tokens), 5, GIT_END)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.6), (7, 0.8), (None, 1e-6), (100, 1.0)])
def test_words_that_may_be_drawn_are_those_of_transformers(top_k, top_p):
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    expected = torch.tensor(logits)
    for warper in (top_k and TopKLogitsWarper(top_k), top_p and TopPLogitsWarper(top_p)):
        expected = expected if warper is None else warper(None, expected)
    np.testing.assert_array_equal(restricted(jnp.asarray(logits), top_k=top_k, top_p=top_p), expected.numpy())
