"""OWL-ViT and OWLv2 against transformers, from files as they are published."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqvision
from eqvision.detectors import decode_queried, like_object
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.zoo_language import LANGUAGE

pytest.importorskip("flax", reason="extra [parity]")
import owlvit_references as source

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, row in source.TOYS.items():
        monkeypatch.setitem(LANGUAGE, name, row)


def numpy_of(tensor):
    return tensor.detach().numpy()


@pytest.mark.parametrize("version", [1, 2])
def test_transformers(version, tmp_path, assert_close):
    """Logits, boxes, embeddings of places and texts, objectness; detection by an image; and the way back."""
    import torch

    module = source.reference(version)
    module.save_pretrained(tmp_path)
    model, state = eqvision.load(f"toy_owlv{'it' if version == 1 else 2}", tmp_path)
    inputs = source.inputs()
    pixels = torch.from_numpy(inputs.images.transpose(0, 3, 1, 2))
    ids, mask = (torch.from_numpy(x.reshape(-1, source.LENGTH)).long() for x in inputs.queries[:2])
    theirs = module(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    ours, _ = eqx.filter_jit(model)(inputs, state)
    asked = inputs.queries.mask.any(axis=-1)
    real = np.broadcast_to(asked[:, None], ours.logits.shape)
    assert_close(np.asarray(ours.logits)[real], numpy_of(theirs.logits)[real], 1e-5)
    assert not jax.nn.sigmoid(ours.logits)[~real].any()
    assert not torch.sigmoid(theirs.logits).detach().numpy()[~real].any()
    assert_close(ours.boxes_cxcywh, numpy_of(theirs.pred_boxes), 1e-5)
    # transformers gives them with length one
    assert_close(unit(ours.embeddings), numpy_of(theirs.class_embeds), 1e-5)
    texts = eqx.filter_jit(lambda model, text: model.encode_queries(text))(model, inputs.queries)
    assert_close(unit(texts)[asked], numpy_of(theirs.text_embeds)[asked], 1e-5)
    if version == 2:
        assert_close(ours.objectness, numpy_of(theirs.objectness_logits), 1e-5)
    check_decoding(ours, theirs)
    check_like(model, state, module, pixels, inputs.images, assert_close)
    tensors = to_layout(model, state, LAYOUTS["hf_owlvit" if version == 1 else "hf_owlv2"])
    published = {name: numpy_of(tensor) for name, tensor in module.state_dict().items()}
    absent = {name for name in published if name not in tensors}
    assert {name.partition(".")[2] for name in absent} <= {"visual_projection.weight", "logit_scale", ""}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, published[name])


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def check_decoding(ours, theirs):
    """Each place is an object of its best query there; images are squeezed, so boxes are of the original sizes."""
    import torch
    from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

    sizes = [(90, 120), (64, 50)]
    wanted = OwlViTImageProcessorPil().post_process_object_detection(
        theirs, threshold=0.0, target_sizes=torch.tensor(sizes)
    )
    found = decode_queried(ours, jnp.array(sizes), exclusive=True, count=16)
    for row, expected in enumerate(wanted):
        order = np.argsort(-numpy_of(expected["scores"]), kind="stable")
        np.testing.assert_allclose(found.scores[row], numpy_of(expected["scores"])[order], atol=1e-5)
        np.testing.assert_array_equal(found.labels[row], numpy_of(expected["labels"])[order])
        np.testing.assert_allclose(found.boxes[row], numpy_of(expected["boxes"])[order], atol=2e-3)


def detect_like(model, state, examples, images):
    example = like_object(model, examples, state)
    patches, _ = model.encode_images(images, state)
    return example, model.predict(patches, example.embedding[:, None], jnp.ones((2, 1), bool))


def check_like(model, state, module, pixels, images, assert_close):
    theirs = module.image_guided_detection(pixel_values=pixels, query_pixel_values=pixels.flip(0))
    _, places, _ = module.embed_image_query(theirs.query_image_embeds.flatten(1, 2), theirs.query_image_embeds)
    example, found = eqx.filter_jit(detect_like)(model, state, images[::-1].copy(), images)
    assert np.asarray(example.place).tolist() == places[:, 0].tolist()
    assert_close(found.logits, numpy_of(theirs.logits), 1e-5)
    assert_close(found.boxes_cxcywh, numpy_of(theirs.target_pred_boxes), 1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_scenic(version, tmp_path, assert_close):
    """The dialect of the heads, and both generations of names."""
    from safetensors.numpy import save_file

    inputs, module = source.inputs(), source.ScenicOwlViT(objectness=version == 2)
    arguments = (inputs.images, inputs.queries.ids)
    parameters = source.scenic_parameters(module, *arguments)
    theirs = source.scenic_outputs(module, parameters, *arguments)
    for number, tensors in enumerate((parameters, source.earlier_names(parameters))):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        model, state = eqvision.load(f"toy_owlv{'it' if version == 1 else 2}", tmp_path / f"{number}.safetensors")
        ours, _ = eqx.filter_jit(model)(inputs, state)
        assert_close((ours.logits, ours.boxes_cxcywh), theirs[:2], 1e-5)
    if version == 2:
        assert_close(ours.objectness, theirs[2], 1e-5)
    back = to_layout(model, state, LAYOUTS["scenic_owlvit" if version == 1 else "scenic_owlv2"])
    assert set(parameters) - set(back) == {"backbone/clip/logit_scale"}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, parameters[name])
