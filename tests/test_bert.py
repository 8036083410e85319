"""BERT without another library: properties of the encoder, its losses, its weights in files."""

import functools
import json
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import eqvision
from eqvision.backbones.bert import BERT_SIZES, BertSize, bert_encoder
from eqvision.language import bert_classifier, bert_pretraining
from eqvision.losses import (
    BertTargets,
    bert_counts,
    bert_loss,
    softmax_cross_entropy,
    token_cross_entropy,
)
from eqvision.ops.collectives import global_sum
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.load import read_model
from eqvision.types import BertOutputs, TextTokens
from eqvision.zoo_language import LANGUAGE, language_builder

SIZES = {"vocab_size": 13, "max_positions": 6, "num_segments": 2}


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setitem(BERT_SIZES, "toy", BertSize(8, 2, 2, 16))
    toys = {"toy": bert_pretraining, "toy_classifier": bert_classifier, "toy_encoder": bert_encoder}
    for name, build in toys.items():
        monkeypatch.setitem(LANGUAGE, name, functools.partial(build, "toy"))


def shaken(model, seed=0):
    """All parameters random and far from their initial values."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(leaf + 0.5 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, model)


def made(build=bert_pretraining, **options):
    """Random leaves of the model's shapes; initialising would compile."""
    abstract = eqx.filter_eval_shape(lambda: build("toy", **{**SIZES, **options}, key=jax.random.key(0)))
    return shaken(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract))


def texts():
    ids = jnp.array([[2, 5, 7, 3, 0], [2, 9, 3, 0, 0]], jnp.int32)
    return TextTokens(ids, ids > 0, jnp.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], jnp.int32))


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("ti", 4.386), ("s", 17.489), ("b", 109.482), ("l", 335.142)])
def test_sizes_have_the_published_numbers_of_parameters(name, millions):
    """Encoder and pooler: Devlin et al. 2019 say 110 M and 340 M, Turc et al. 2019 4.4 M of BERT tiny."""
    model = eqx.filter_eval_shape(lambda: bert_classifier(name, num_classes=1, key=jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.tree_at(lambda m: m.head, model, None)))
    assert count / 1e6 == pytest.approx(millions, abs=5e-4)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"BERT size 'base' does not exist; choose from ti, mini"):
        bert_encoder("base", key=jax.random.key(0))


# --- the encoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_order", ["pre", pytest.param("post", marks=pytest.mark.slow)])
def test_padding_may_hold_anything_and_scan_is_a_loop(norm_order, assert_close):
    model, text = made(bert_encoder, norm_order=norm_order), texts()
    junk = text._replace(
        ids=jnp.where(text.mask, text.ids, jnp.array([9999, -5, 3, 12, 1])),
        segments=jnp.where(text.mask, text.segments, 77),
    )

    def loss(model, text):
        tokens = model(text)
        return jnp.sum(jnp.where(text.mask[..., None], jnp.sin(tokens), 0)), tokens

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, clean), gradient = run(model, text)
    (_, dirty), dirty_gradient = run(model, junk)
    np.testing.assert_array_equal(np.asarray(clean)[text.mask], np.asarray(dirty)[text.mask])
    jax.tree.map(np.testing.assert_array_equal, gradient, dirty_gradient)
    assert (model.norm is None) == (norm_order == "post")

    @jax.jit
    def loop(model, text):
        x = model._embed(text, None)
        for i in range(model.encoder.depth):
            x = jax.tree.map(operator.itemgetter(i), model.encoder.blocks)(x, key_mask=text.mask)
        return x if model.norm is None else model.norm(x)

    assert_close(loop(model, text), clean, 1e-6)
    (last,) = jax.jit(lambda model, text: model.intermediates(text, (-1,)))(model, text)
    assert_close(last, clean, 1e-6)


def test_a_word_outside_the_vocabulary_spoils_its_own_text_alone():
    model, text = made(bert_encoder), texts()
    run = jax.jit(lambda model, text: model(text))
    for stranger in (13, -1):
        tokens = run(model, text._replace(ids=text.ids.at[1, 1].set(stranger)))
        assert np.isnan(tokens[1]).all(axis=-1).any()
        assert np.isfinite(tokens[0]).all()


def test_a_text_longer_than_the_positions_is_refused():
    ids = jnp.ones((1, 7), jnp.int32)
    with pytest.raises(ValueError, match="texts of 7 tokens are given, and this BERT has 6 positions; cut them"):
        made(bert_encoder)(TextTokens(ids, ids > 0))


def test_dropout_needs_a_key_and_numbers_may_be_of_half_precision():
    model, text = made(bert_classifier, num_classes=3), texts()
    with pytest.raises(ValueError, match="key=None"):
        jax.eval_shape(lambda: model(text, train=True))
    train = functools.partial(model, text, dtype=jnp.dtype("bfloat16"), train=True)
    assert jax.eval_shape(lambda key: train(key=key), jax.random.key(0)) == jax.ShapeDtypeStruct((2, 3), jnp.float32)


# --- losses ---------------------------------------------------------------------------------------------------------


def predictions(rng, texts=4):
    outputs = BertOutputs(
        jnp.asarray(rng.normal(size=(texts, 3, 7)), jnp.float32), jnp.asarray(rng.normal(size=(texts, 2)), jnp.float32)
    )
    hidden = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]] * 4, np.float32)[:texts]
    words, order = rng.integers(0, 7, (texts, 3)), rng.integers(0, 2, texts)
    targets = BertTargets(jnp.asarray(words, jnp.int32), jnp.asarray(hidden), jnp.asarray(order, jnp.int32))
    return outputs, targets, jnp.array([1.0, 1.0, 1.0, 0.0] * 4)[:texts]


@jax.jit
def value_and_gradient(outputs, targets, weights):
    def loss(outputs):
        return bert_loss(outputs, targets, weights, bert_counts(targets, weights))

    return jax.value_and_grad(loss, has_aux=True)(outputs)


def test_the_loss_is_the_mean_over_hidden_words_and_that_over_texts(rng):
    outputs, targets, weights = predictions(rng)
    (loss, terms), _ = value_and_gradient(outputs, targets, weights)
    log_p = np.asarray(outputs.mlm_logits, np.float64)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    found = [log_p[b, n, targets.words[b, n]] for b, n in ((0, 0), (0, 1), (2, 0), (2, 2))]
    assert terms["mlm"] == pytest.approx(-np.mean(found), rel=1e-5)
    order = np.asarray(outputs.next_sentence, np.float64)[:3]
    order = order - np.log(np.exp(order).sum(-1, keepdims=True))
    expected = -np.mean([order[i, targets.next_sentence[i]] for i in range(3)])
    assert terms["next_sentence"] == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(float(terms["mlm"]) + float(terms["next_sentence"]), rel=1e-6)


def test_what_does_not_count_may_hold_anything(rng):
    outputs, targets, weights = predictions(rng)
    used = np.asarray(targets.word_weights * weights[:, None]) > 0
    junk = BertOutputs(
        jnp.where(used[..., None], outputs.mlm_logits, jnp.nan),
        jnp.where(weights[:, None] > 0, outputs.next_sentence, jnp.nan),
    )
    strangers = BertTargets(
        jnp.where(used, targets.words, -100),
        targets.word_weights.at[3].set(jnp.nan),
        jnp.where(weights > 0, targets.next_sentence, 99),
    )
    clean, dirty = value_and_gradient(outputs, targets, weights), value_and_gradient(junk, strangers, weights)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    wrong = targets._replace(words=targets.words.at[0, 0].set(7))
    assert np.isnan(value_and_gradient(outputs, wrong, weights)[0][0])
    nothing, gradient = value_and_gradient(outputs, targets, 0 * weights)
    assert nothing[0] == 0
    assert not np.any(gradient.mlm_logits)


@pytest.mark.slow
def test_eight_devices_give_the_loss_of_one(rng, mesh, assert_close):
    outputs, targets, weights = predictions(rng, 16)

    def share(outputs, targets, weights):
        counts = jax.tree.map(global_sum, bert_counts(targets, weights))
        return global_sum(bert_loss(outputs, targets, weights, counts)[0])

    split = jax.shard_map(share, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P())
    loss, gradient = jax.jit(jax.value_and_grad(split))(outputs, targets, weights)
    (expected, _), expected_gradient = value_and_gradient(outputs, targets, weights)
    assert_close((loss, gradient), (expected, expected_gradient), 1e-6)


def test_a_model_and_data_that_differ_in_next_sentences_are_refused(rng):
    outputs, targets, weights = predictions(rng)
    with pytest.raises(ValueError, match="the data has next sentences and the model none"):
        jax.eval_shape(value_and_gradient, outputs._replace(next_sentence=None), targets, weights)
    with pytest.raises(ValueError, match="the model has next sentences and the data none"):
        jax.eval_shape(value_and_gradient, outputs, targets._replace(next_sentence=None), weights)


def cross_entropies(logits, targets, weights):
    smooth = token_cross_entropy(logits, targets, weights, label_smoothing=0.1)
    as_classes = softmax_cross_entropy(logits.reshape(6, 5), targets.reshape(6), label_smoothing=0.1)
    drifting = token_cross_entropy(logits, targets, weights, z_loss=0.5)
    return token_cross_entropy(logits, targets, weights), smooth, drifting, as_classes


def test_token_cross_entropy_is_that_of_classes_with_smoothing_too(rng, assert_close):
    logits = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    targets, weights = jnp.array([[0, 4, 2], [1, 3, 9]], jnp.int32), jnp.array([[1.0, 1, 1], [1, 1, 0]])
    plain, values, drifting, expected = jax.jit(cross_entropies)(logits, targets, weights)
    assert_close(values.reshape(6)[:5], expected[:5], 1e-6)
    assert values[1, 2] == 0
    assert_close(drifting[0] - plain[0], 0.5 * np.log(np.exp(np.asarray(logits[0])).sum(axis=-1)) ** 2, 1e-5)
    with pytest.raises(ValueError, match=r"targets have shape \(2, 2\)"):
        token_cross_entropy(logits, targets[:, :2], weights)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0; expected a value in \[0, 1\)"):
        token_cross_entropy(logits, targets, weights, label_smoothing=1.0)


# --- weights --------------------------------------------------------------------------------------------------------


def hub_tensors(model=None, layout="hf_bert"):
    model = made() if model is None else model
    return to_layout(model, eqx.nn.State(model), LAYOUTS[layout])


@pytest.fixture
def write(tmp_path):
    def write(tensors, **config):
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(whole, tmp_path / "model.safetensors")
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_vocabulary_positions_and_segments_are_those_of_the_file(write):
    model = made()
    tensors = hub_tensors(model)
    tensors["bert.embeddings.position_ids"] = np.arange(6)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    loaded, _ = eqvision.load("toy", write(tensors, layer_norm_eps=0.5, vocab_size=13, hidden_dropout_prob=0.25))
    assert same(loaded, model)
    assert loaded.backbone.embedding_norm.eps == loaded.words.norm.eps == 0.5
    assert loaded.backbone.dropout == 0.25


def test_old_files_call_scale_and_shift_gamma_and_beta(write):
    model = made(next_sentence=False)
    new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in hub_tensors(model).items():
        end = next((end for end in new if name.endswith(end)), "")
        old[name.removesuffix(end) + new.get(end, "")] = tensor
    assert sum(".gamma" in name for name in old) == 6
    assert same(eqvision.load("toy", write(old))[0], model)


def test_every_layout_is_written_and_read_back_and_known_by_its_names(write):
    classifier = made(bert_classifier, num_classes=3)
    cases = {
        "hf_bert": ("toy", made()),
        "hf_bert_classifier": ("toy_classifier", classifier),
        "hf_bert_classifier_backbone": ("toy_classifier", classifier),
        "hf_bert_encoder": ("toy_encoder", classifier.backbone),
        "hf_bert_encoder_backbone": ("toy_encoder", classifier.backbone),
    }
    for layout, (name, model) in cases.items():
        loaded = read_model(name, write(hub_tensors(model, layout)), Sizes())
        assert loaded.layout.name == layout
        assert same(loaded.model, model)


@pytest.mark.slow
def test_a_classifier_begins_with_the_encoder_of_a_pretrained_model(write):
    model = made()
    path = write(hub_tensors(model))
    with pytest.raises(eqvision.WeightsError, match=r"no classification layer .*classifier\.bias.*give num_classes"):
        eqvision.load("toy_classifier", path)
    loaded, _ = eqvision.load("toy_classifier", path, num_classes=4, key=jax.random.key(1))
    assert same(loaded.backbone, model.backbone)
    assert same(loaded.pooler, model.pooler)
    assert loaded.head.weight.shape == (8, 4)
    assert np.abs(loaded.head.weight).max() > 0
    encoder, _ = eqvision.load("toy_encoder", path)
    assert same(encoder, model.backbone)


def test_another_vocabulary_heads_or_kind_of_model_is_refused(write):
    path = write(hub_tensors())
    with pytest.raises(eqvision.WeightsError, match="vocab_size is 13 in the file, and 30522 is asked for"):
        read_model("toy", path, Sizes(), options={"vocab_size": 30522})
    with pytest.raises(eqvision.WeightsError, match="vocab_size = 30522, expected 13"):
        eqvision.load("toy", write(hub_tensors(), vocab_size=30522))
    with pytest.raises(eqvision.WeightsError, match="num_attention_heads = 4, expected 2"):
        eqvision.load("toy", write(hub_tensors(), num_attention_heads=4))
    with pytest.raises(eqvision.WeightsError, match="model_type = 'roberta', expected 'bert'"):
        eqvision.load("toy", write(hub_tensors(), model_type="roberta"))
    with pytest.raises(ValueError, match="model 'toy' has no num_classes, and 3 is given; leave it out"):
        eqvision.load("toy", path, num_classes=3)
    with pytest.raises(ValueError, match=r"no option 'image'; it has: vocab_size, max_positions"):
        language_builder("toy", {"image": 3})


def test_a_file_with_a_decoder_of_its_own_is_refused(write):
    tensors = hub_tensors()
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
    with pytest.raises(eqvision.WeightsError, match=r"word_embeddings.weight and cls.* are one tensor"):
        eqvision.load("toy", write(tensors))


def test_a_file_that_lacks_a_block_names_what_is_missing(write):
    tensors = {name: tensor for name, tensor in hub_tensors().items() if "layer.1." not in name}
    message = r"16 tensors are missing:(\n  bert\.encoder\.layer\.1\..*){5}\n  and 11 more"
    with pytest.raises(eqvision.WeightsError, match=message):
        eqvision.load("toy", write(tensors, vocab_size=13))
