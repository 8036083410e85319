"""Layouts of Deformable DETR: names there and back, heads under several names, and files of other models."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
from deformable_detr_references import TOYS

import eqvision
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.leaf_names import named_arrays, named_tensors, with_leaves
from eqvision.zoo import DETECTORS, builder

OFFICIAL, TIMM, OWN = "fundamentalvision_deformable_detr", "hf_deformable_detr", "hf_deformable_detr_no_timm"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, row in TOYS.items():
        monkeypatch.setitem(DETECTORS, name, row)


def made(kind):
    """The toy with numbers of numpy: nothing is compiled."""
    build = eqx.nn.make_with_state(builder(f"toy_deformable_{kind}", {}))
    model, state = eqx.filter_eval_shape(lambda: build(key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    shapes = named_arrays(model, state)
    return with_leaves(model, state, {n: rng.normal(size=x.shape).astype(np.float32) for n, x in shapes.items()})


def save(path, tensors):
    np.savez(path / "detector.npz", **tensors)
    return path / "detector.npz"


@pytest.mark.parametrize("layout", [OFFICIAL, TIMM, OWN])
@pytest.mark.parametrize("kind", ["multi_scale", "refine", "two_stage", "single_scale"])
def test_every_layout_there_and_back(layout, kind, tmp_path, assert_close):
    model, state = made(kind)
    tensors = to_layout(model, state, LAYOUTS[layout])
    assert [each for each in LAYOUTS if LAYOUTS[each].recognises(tensors)] == [layout]
    again, state_again = eqvision.load(f"toy_deformable_{kind}", save(tmp_path, tensors))
    assert_close(named_tensors(again, state_again), named_tensors(model, state), 0)


def test_the_decoders_norms_change_places():
    model, state = made("multi_scale")
    theirs = to_layout(model, state, LAYOUTS[OFFICIAL])
    layer = "transformer.decoder.layers.2"
    np.testing.assert_array_equal(theirs[f"{layer}.norm2.weight"], model.decoder.layers.norm1.weight[2])
    np.testing.assert_array_equal(theirs[f"{layer}.norm1.weight"], model.decoder.layers.norm2.weight[2])


def test_position_stands_before_content():
    model, state = made("multi_scale")
    theirs = to_layout(model, state, LAYOUTS[OFFICIAL])["query_embed.weight"]
    np.testing.assert_array_equal(theirs, np.concatenate([model.queries.position, model.queries.content], axis=1))


def doubled(tensors, inner):
    """As the official program saves: the decoder's references to the heads beside the model's own."""
    heads = {n: x for n, x in tensors.items() if n.startswith(("class_embed", "bbox_embed"))}
    return tensors | {f"{inner}{name}": tensor for name, tensor in heads.items()}


@pytest.mark.parametrize("kind", ["refine", "two_stage"])
def test_heads_that_are_stored_twice(kind, tmp_path, assert_close):
    model, state = made(kind)
    tensors = doubled(to_layout(model, state, LAYOUTS[OFFICIAL]), "transformer.decoder.")
    again, state_again = eqvision.load(f"toy_deformable_{kind}", save(tmp_path, tensors))
    assert_close(named_tensors(again, state_again), named_tensors(model, state), 0)
    tensors["transformer.decoder.bbox_embed.1.layers.0.bias"] = tensors["bbox_embed.1.layers.0.bias"] + 1
    with pytest.raises(WeightsError, match=r"bbox_embed\.1\.layers\.0\.bias are one head in this layout"):
        eqvision.load(f"toy_deformable_{kind}", save(tmp_path, tensors))


def test_older_files_of_transformers_have_the_heads_outside(tmp_path, assert_close):
    model, state = made("two_stage")
    tensors = to_layout(model, state, LAYOUTS[TIMM])
    inner = [name for name in tensors if "_embed." in name and name.startswith("model.decoder.")]
    assert len(inner) == 4 * 8  # a class head and three layers of a box head for each decoder layer and the encoder
    outside = {name.removeprefix("model.decoder.") if name in inner else name: x for name, x in tensors.items()}
    again, state_again = eqvision.load("toy_deformable_two_stage", save(tmp_path, outside))
    assert_close(named_tensors(again, state_again), named_tensors(model, state), 0)


def test_one_head_that_is_stored_for_every_layer(tmp_path, assert_close):
    model, state = made("multi_scale")
    tensors = to_layout(model, state, LAYOUTS[OFFICIAL])
    heads = {n: x for n, x in tensors.items() if n.startswith(("class_embed.0", "bbox_embed.0"))}
    for i in (1, 2):
        tensors |= {name.replace("embed.0", f"embed.{i}"): x for name, x in heads.items()}
    again, state_again = eqvision.load("toy_deformable_multi_scale", save(tmp_path, tensors))
    assert_close(named_tensors(again, state_again), named_tensors(model, state), 0)
    tensors["class_embed.2.bias"] = tensors["class_embed.2.bias"] + 1
    with pytest.raises(WeightsError, match=r"class_embed\.2\.bias differs from class_embed.*choose a name with"):
        eqvision.load("toy_deformable_multi_scale", save(tmp_path, tensors))


def test_a_file_of_another_variant_is_refused(tmp_path):
    file = save(tmp_path, to_layout(*made("two_stage"), LAYOUTS[OFFICIAL]))
    with pytest.raises(WeightsError, match=r"(?s)are missing.*reference_points.*belong to no part.*enc_output"):
        eqvision.load("toy_deformable_refine", file)


def test_another_number_of_classes_keeps_the_boxes(tmp_path, assert_close):
    model, state = made("refine")
    file = save(tmp_path, to_layout(model, state, LAYOUTS[TIMM]))
    other, _ = eqvision.load("toy_deformable_refine", file, num_classes=7)
    assert other.head.classes.weight.shape == (3, 64, 7)
    assert_close(other.head.boxes, model.head.boxes, 0)
    np.testing.assert_allclose(np.asarray(other.head.classes.bias), -4.595, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dilation": True}, "dilation True and the model has False"),
        ({"encoder_n_points": 6, "encoder_attention_heads": 2}, "encoder_attention_heads 2 and the model has 4"),
        ({"position_embedding_type": "learned"}, "position_embedding_type = 'learned', expected 'sine'"),
    ],
)
def test_config_json_of_another_model_is_refused(config, message, tmp_path):
    from safetensors.numpy import save_file

    save_file(to_layout(*made("single_scale"), LAYOUTS[OWN]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        eqvision.load("toy_deformable_single_scale", tmp_path)
