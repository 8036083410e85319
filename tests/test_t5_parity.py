"""T5 and GIT give transformers' numbers: encoders, logits of decoders, padded batches, files both ways."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_references import GIT, SIZE, add_git_toy, add_t5_toys, draw_sources, hf_git, hf_t5, ours

from eqvision.layers import relative_buckets
from eqvision.pretrained import LAYOUTS, load, to_layout
from eqvision.types import TextTokens

pytestmark = pytest.mark.parity
LENGTHS = (19, 7, 1)


def _text(ids, mask):
    return TextTokens(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 12), (16, 1000)])
def test_buckets_are_those_of_transformers(bidirectional, buckets, farthest):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-1200, 1200)
    expected = T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional, buckets, farthest)
    options = {"bidirectional": bidirectional, "num_buckets": buckets, "max_distance": farthest}
    np.testing.assert_array_equal(relative_buckets(jnp.asarray(distance), **options), expected.numpy())


DIALECTS = {
    "v1_0": {"gated": False},
    "v1_1": {"gated": True},
    "v1_1_one_table": {"gated": True, "own_head": False},
    "mt5": {"gated": True, "multilingual": True},
}


@eqx.filter_jit
def _run(model, text, targets):
    return model.encode(text), model(text, targets)


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_t5_gives_the_numbers_of_transformers(dialect, monkeypatch, tmp_path, assert_close):
    import torch

    add_t5_toys(monkeypatch)
    reference = hf_t5(**DIALECTS[dialect])
    name = "toy_t5_v1_1" if DIALECTS[dialect]["gated"] else "toy_t5"
    model = ours(reference, name, tmp_path)
    (ids, mask), targets = draw_sources(1, LENGTHS), draw_sources(2, (23, 23, 23))[0]
    with torch.no_grad():
        options = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        expected = reference(**options, decoder_input_ids=torch.tensor(targets))

    memory, logits = _run(model, _text(ids, mask), jnp.asarray(targets, jnp.int32))
    real = mask[:, :, None]
    assert_close(memory * real, expected.encoder_last_hidden_state.numpy() * real, 1e-5)
    assert_close(logits, expected.logits.numpy(), 1e-5)
    assert np.std(logits) > 0.1  # a comparison of something
    encoder, _ = load(f"{name}_encoder", tmp_path)
    for ours_alone, part in zip(jax.tree.leaves(encoder), jax.tree.leaves(model.encoder), strict=True):
        np.testing.assert_array_equal(ours_alone, part)


def test_encoder_model_of_transformers_is_read(monkeypatch, tmp_path, assert_close):
    import torch
    from transformers import T5EncoderModel

    add_t5_toys(monkeypatch)
    hf_t5(gated=False).save_pretrained(tmp_path / "whole")
    reference = T5EncoderModel.from_pretrained(tmp_path / "whole").eval()
    model = ours(reference, "toy_t5_encoder", tmp_path / "encoder")
    ids, mask = draw_sources(1, LENGTHS)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    assert_close(eqx.filter_jit(model)(_text(ids, mask)) * mask[:, :, None], expected * mask[:, :, None], 1e-5)


def test_git_gives_the_numbers_of_transformers(monkeypatch, tmp_path, assert_close):
    import torch

    add_git_toy(monkeypatch)
    reference = hf_git()
    model = ours(reference, "toy_git", tmp_path)
    (ids, mask), pixels = draw_sources(1, LENGTHS), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = reference.git.image_encoder(pixels).last_hidden_state.numpy()
        tokens = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        expected = reference(**tokens, pixel_values=pixels).logits.numpy()[:, 5:]
        alone = reference(**tokens).logits.numpy()

    @jax.jit
    def run(model, text, prefix):
        return model(text, prefix=prefix), model(text)

    real = mask[:, :, None]
    found = run(model, _text(ids, mask), jnp.asarray(features))
    assert_close([each * real for each in found], [expected * real, alone * real], 1e-5)
    assert np.abs(expected - alone).max() > 0.1  # the image counts


def test_files_are_written_in_the_names_of_transformers(monkeypatch, tmp_path):
    add_t5_toys(monkeypatch)
    add_git_toy(monkeypatch)
    for reference, name, layout in (
        (hf_t5(gated=True), "toy_t5_v1_1", "hf_t5"),
        (hf_git(), "toy_git", "hf_git"),
    ):
        model = ours(reference, name, tmp_path / name)
        written = to_layout(model, eqx.nn.State(model), LAYOUTS[layout])
        for tensor, array in written.items():
            np.testing.assert_array_equal(array, reference.state_dict()[tensor].numpy(), err_msg=tensor)
        assert len(written) > 20
    assert GIT["width"] == SIZE.width
