"""T5: parameter counts of the published sizes, gradients, mixed precision, files that are not what they should be."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from text_references import SIZE, VOCAB, add_git_toy, add_t5_toys

from eqvision.language import T5, TextDecoder, shift_right
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.types import TextTokens
from eqvision.zoo_language import LANGUAGE

# As transformers counts them in the published checkpoints; T5's own papers give rounded numbers.
PARAMETERS = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_xl": 2_851_598_336,
    "t5_xxl": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
}


def _model(gated=True, **options):
    sizes = {"vocab_size": VOCAB, "num_buckets": 8, "max_distance": 12}
    return T5(SIZE._replace(gated=gated), tied=not gated, **sizes, **options, key=jax.random.key(0))


def _batch():
    ids = jnp.arange(2 * 6).reshape(2, 6) + 2
    return TextTokens(ids, jnp.arange(6) < jnp.array([[6], [4]])), ids[:, :5]


@pytest.mark.slow
def test_published_sizes_have_the_published_number_of_parameters():
    for name, expected in PARAMETERS.items():
        model = eqx.filter_eval_shape(LANGUAGE[name], key=jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(model)) == expected, name


def test_text_is_shifted_by_a_start_token():
    np.testing.assert_array_equal(shift_right(jnp.array([[5, 6, 1], [7, 1, 0]])), [[0, 5, 6], [0, 7, 1]])


@pytest.mark.slow
def test_training_reaches_every_parameter_and_needs_a_key_for_dropout():
    model, (source, targets) = _model(dropout=0.2), _batch()

    @eqx.filter_jit
    def gradient(model, key):

        def loss(model):
            return jnp.sum(jnp.sin(model(source, targets, train=True, key=key)))

        return jax.grad(loss)(model)

    for path, leaf in jax.tree.leaves_with_path(gradient(model, jax.random.key(0))):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    with pytest.raises(ValueError, match="key"):
        model(source, targets, train=True)


def test_computes_in_the_type_that_is_asked_for_and_gives_float32_logits():
    model, (source, targets) = _model(), _batch()
    half = jnp.dtype("bfloat16")
    assert jax.eval_shape(lambda: model.encode(source, dtype=half)).dtype == half
    assert jax.eval_shape(lambda: model(source, targets, dtype=half)).dtype == jnp.float32
    cache = jax.eval_shape(lambda: model.start(model.encode(source, dtype=half), source.mask))
    assert cache.keys.dtype == half
    decoder = TextDecoder(vocab_size=9, width=8, depth=1, num_heads=2, mlp_dim=8, prefix_width=4, key=jax.random.key(0))
    prefix = jnp.zeros((2, 3, 4), half)
    assert jax.eval_shape(lambda: decoder(source, prefix=prefix)).dtype == jnp.float32
    assert jax.eval_shape(lambda: decoder.start(prefix)).values.dtype == half


def test_files_of_other_models_are_refused_in_words(monkeypatch, tmp_path):
    add_t5_toys(monkeypatch)
    add_git_toy(monkeypatch)
    model = _model(gated=False)
    tensors = to_layout(model, eqx.nn.State(model), LAYOUTS["hf_t5"])
    file = tmp_path / "model.safetensors"

    def refused(change, name, config=None):
        save_file({**tensors, **change}, file)
        (tmp_path / "config.json").unlink(missing_ok=True)
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(WeightsError) as error:
            load(name, file)
        return str(error.value)

    other = {"lm_head.weight": tensors["shared.weight"] + 1}
    assert "shared.weight and lm_head.weight are one tensor in this model" in refused(other, "toy_t5")
    assert "DenseReluDense.wi_0.weight" in refused({}, "toy_t5_v1_1")
    assert "num_heads = 4, expected 3" in refused({}, "toy_t5", '{"model_type": "t5", "num_heads": 4}')
    assert "model_type = 'umt5', expected 't5 or mt5'" in refused({}, "toy_t5", '{"model_type": "umt5"}')
    assert "toy_git" in refused({}, "toy_git")
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"]}, file)
    (tmp_path / "config.json").unlink(missing_ok=True)
    read, _ = load("toy_t5", file)  # a copy is none
    assert read.encoder.relative.weight.shape == (8, 3)
