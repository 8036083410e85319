"""BERT against transformers: logits, and gradients of the loss, of tiny models with random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqvision
from eqvision.backbones.bert import BERT_SIZES, BertSize
from eqvision.language import bert_classifier, bert_pretraining
from eqvision.losses import BertTargets, bert_counts, bert_loss
from eqvision.pretrained import LAYOUTS
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.pretrained.rules import load_rule
from eqvision.zoo_language import LANGUAGE

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setitem(BERT_SIZES, "toy", BertSize(32, 3, 4, 48))
    monkeypatch.setitem(LANGUAGE, "toy", functools.partial(bert_pretraining, "toy"))
    monkeypatch.setitem(LANGUAGE, "toy_classifier", functools.partial(bert_classifier, "toy"))


def _loss(model, text, targets):
    outputs = model(text)
    weights = jnp.ones(text.ids.shape[0])
    loss, _ = bert_loss(outputs, targets, weights, bert_counts(targets, weights))
    return loss, outputs


def test_pretraining_gives_the_logits_the_loss_and_its_gradients(tmp_path, assert_close):
    from bert_references import batch, reference, theirs
    from transformers import BertForPreTraining

    other, text = reference(BertForPreTraining), batch()
    rng = np.random.default_rng(1)
    hidden = text.mask & (rng.random(text.mask.shape) < 0.4)
    words, order = rng.integers(0, 61, text.ids.shape).astype(np.int32), np.array([0, 1, 1], np.int32)
    labels = torch.from_numpy(np.where(hidden, words, -100)).long()
    expected = other(**theirs(text), labels=labels, next_sentence_label=torch.from_numpy(order).long())
    expected.loss.backward()
    other.save_pretrained(tmp_path)

    model, state = eqvision.load("toy", tmp_path)
    targets = BertTargets(jnp.asarray(words), jnp.asarray(hidden, jnp.float32), jnp.asarray(order))
    (loss, outputs), gradients = jax.jit(jax.value_and_grad(_loss, has_aux=True))(
        model, jax.tree.map(jnp.asarray, text), targets
    )
    assert hidden.any(axis=1).tolist() == [True, True, False]  # a text without hidden words is one, too
    real = expected.prediction_logits.detach().numpy()
    assert_close(np.asarray(outputs.mlm_logits)[text.mask], real[text.mask], 1e-5)
    assert_close(outputs.next_sentence, expected.seq_relationship_logits.detach().numpy(), 1e-5)
    assert_close(loss, expected.loss.detach().numpy(), 1e-5)
    theirs_by_name = {name: p.grad.numpy() for name, p in other.named_parameters()}
    ours, layout = named_tensors(gradients, state), LAYOUTS["hf_bert"]
    for rule in layout.rules(model):
        for name, leaf in load_rule(rule, theirs_by_name).items():
            if name.endswith("attention.key.bias"):  # 0 but for rounding: a bias of keys changes no attention
                assert np.abs(ours[name]).max() < 1e-6
            else:
                assert_close({name: ours[name]}, {name: leaf}, 2e-5)


def test_hidden_words_alone_and_classifiers_give_the_logits(tmp_path, assert_close):
    from bert_references import batch, reference, theirs
    from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

    text = batch(2)
    given = jax.tree.map(jnp.asarray, text)
    words = reference(BertForMaskedLM, 3, hidden_act="gelu_new")
    words.save_pretrained(tmp_path / "words")
    model, _ = eqvision.load("toy", tmp_path / "words")
    assert model.next_sentence is None
    at = np.array([[1, 4], [0, 6], [2, 2]], np.int32)
    got = jax.jit(lambda model, text, at: model(text, positions=at).mlm_logits)(model, given, jnp.asarray(at))
    expected = words(**theirs(text)).logits.detach().numpy()
    assert_close(got, np.take_along_axis(expected, at[..., None], axis=1), 1e-5)

    classifier = reference(BertForSequenceClassification, 4, num_labels=5)
    classifier.save_pretrained(tmp_path / "classes")
    model, _ = eqvision.load("toy_classifier", tmp_path / "classes")
    run = jax.jit(lambda model, text: model(text))
    assert_close(run(model, given), classifier(**theirs(text)).logits.detach().numpy(), 1e-5)

    bare = BertModel(classifier.config)
    bare.load_state_dict(classifier.bert.state_dict())
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(eqvision.WeightsError, match=r"no classification layer .*classifier.*num_classes="):
        eqvision.load("toy_classifier", tmp_path / "bare")
    fresh, _ = eqvision.load("toy_classifier", tmp_path / "bare", num_classes=5)
    assert not np.array_equal(fresh.head.weight, model.head.weight)
    assert np.array_equal(fresh.pooler.linear.weight, model.pooler.linear.weight)
