"""Segment Anything against transformers: every kind of prompt, the parts, processing before and after, weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_references as source

import eqvision
from eqvision.layers import mask_prompts
from eqvision.segmenters import sam as segment
from eqvision.segmenters.sam import automatic
from eqvision.zoo import PROMPTED

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model, and ours with the file that it saves."""
    folder, theirs = tmp_path_factory.mktemp("sam"), source.reference()
    theirs.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROMPTED, "toy_sam", source.toy_sam)
        model, _ = eqvision.load("toy_sam", folder)
    return theirs, model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).normal(size=(2, source.SIDE, source.SIDE, 3)).astype(np.float32)


@functools.cache
def encoder():
    return source.quickly(lambda model, images: model.encode(images, source.STATE)[0])


@functools.cache
def decoder():
    return source.quickly(lambda model, features, prompts: model.decode(features, prompts))


@pytest.fixture(scope="module")
def features(pair, images):
    return encoder()(pair[1], jnp.asarray(images))


def first(x):
    return x.transpose(0, 3, 1, 2)


def drawn(kind):
    """Prompts for two images, three objects each: what transformers takes, and what we do."""
    import torch

    rng, theirs = np.random.default_rng(5), {}
    points, labels = rng.uniform(0, 63, (2, 3, 2, 2)).astype(np.float32), rng.integers(0, 2, (2, 3, 2))
    boxes = np.sort(rng.uniform(0, 63, (2, 3, 2, 2)), axis=2).reshape(2, 3, 4).astype(np.float32)
    masks = rng.normal(0, 4, (2, 1, 32, 32)).astype(np.float32)
    if kind == "not_points":
        labels[:, :, 1] = -1
    if kind in ("points", "not_points", "points_boxes", "points_masks", "all"):
        theirs |= {"input_points": torch.tensor(points), "input_labels": torch.tensor(labels)}
    if kind in ("boxes", "points_boxes", "all"):
        theirs["input_boxes"] = torch.tensor(boxes)
    if kind in ("masks", "points_masks", "all"):
        theirs["input_masks"] = torch.tensor(masks)
    given = (points, labels) if "input_points" in theirs else (None, None)
    count = 1 if kind == "masks" else 3
    prompts = mask_prompts(
        *given,
        boxes if "input_boxes" in theirs else None,
        np.repeat(masks, count, axis=1) if "input_masks" in theirs else None,
        count=(2, 1),
        slots=6,
    )
    return theirs, prompts


KINDS = ("points", "not_points", "boxes", "points_boxes", "masks", "points_masks", "all", "none")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompt(pair, images, features, assert_close, kind):
    import torch

    theirs, model = pair
    given, prompts = drawn(kind)
    every = decoder()(model, features, prompts)
    for multimask in (True, False):
        with torch.no_grad():
            expected = theirs(pixel_values=torch.tensor(first(images)), multimask_output=multimask, **given)
        ours = segment.choose_masks(every, multimask=multimask)
        assert_close(ours.logits, expected.pred_masks.numpy(), 1e-5)
        assert_close(ours.iou, expected.iou_scores.numpy(), 1e-5)


def test_parts(pair, images, features, assert_close):
    import torch

    theirs, model = pair
    given, prompts = drawn("all")
    with torch.no_grad():
        expected = theirs.get_image_embeddings(torch.tensor(first(images))).permute(0, 2, 3, 1).numpy()
        sparse, dense = theirs.get_prompt_embeddings(**given)
        place = theirs.get_image_wide_positional_embeddings()[0].permute(1, 2, 0).numpy()
    assert_close(features, expected, 1e-5)
    size = (source.SIDE, source.SIDE)

    @source.quickly
    def parts(encoder, prompts):
        tokens = encoder.tokens(prompts.points, prompts.labels, size)
        return tokens, encoder.map(prompts.masks, None, (8, 8), jnp.dtype("float32")), encoder.position.grid(8, 8)

    tokens, added, position = parts(model.prompts, prompts)
    assert_close(tokens[:, :, :4], sparse.numpy(), 1e-5)
    assert not np.asarray(tokens)[:, :, 4:].any()
    assert_close(added[:, 0], dense.permute(0, 2, 3, 1).numpy(), 1e-5)
    assert_close(position, place, 1e-5)


def processors():
    """transformers' processing with Pillow, for our size."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
    from transformers.models.sam.processing_sam import SamProcessor

    side, small = {"height": 64, "width": 64}, {"height": 32, "width": 32}
    image = SamImageProcessorPil(size={"longest_edge": 64}, pad_size=side, mask_size={"longest_edge": 32},
                                 mask_pad_size=small)  # fmt: skip
    return SamProcessor(image)


def quiet_threshold(logits):
    """In the widest gap between the middle values: rounding moves none across it."""
    values = np.sort(logits.ravel())
    values = values[len(values) // 3 : 2 * len(values) // 3]
    widest = np.argmax(np.diff(values))
    return float(values[widest : widest + 2].mean())


@pytest.mark.parametrize("size", [(48, 90), (131, 77), (64, 64), (20, 31)])
def test_an_image_from_file_to_masks(pair, assert_close, size):
    """The predictor on images that are no squares, against processor, model and masks of transformers."""
    import torch

    theirs, model = pair
    rng = np.random.default_rng(size[0])
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    points = rng.uniform(0, 1, (3, 2, 2)) * np.array(size[::-1])
    labels = np.array([[1, 0], [1, 1], [0, 1]])
    boxes = (np.sort(rng.uniform(0, 1, (3, 2, 2)), axis=1) * np.array(size[::-1])).reshape(3, 4)
    processor = processors()
    inputs = processor(images=image, input_points=[points.tolist()], input_labels=[labels.tolist()],
                       input_boxes=[boxes.tolist()], return_tensors="pt")  # fmt: skip
    pixels = inputs["pixel_values"].float()
    assert_close(segment.prepare_image(image, 64), pixels[0].permute(1, 2, 0).numpy(), 1e-6)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_points=inputs["input_points"].float(),
                          input_labels=inputs["input_labels"], input_boxes=inputs["input_boxes"].float())  # fmt: skip
    enlarge = functools.partial(processor.post_process_masks, expected.pred_masks, inputs["original_sizes"],
                                inputs["reshaped_input_sizes"])  # fmt: skip
    threshold = quiet_threshold(enlarge(binarize=False)[0].numpy())
    masks = enlarge(mask_threshold=threshold)[0].numpy()
    predictor = segment.Predictor(model, source.STATE, prompts_per_batch=2, max_points=3)
    predictor.set_image(image)
    found = predictor.predict(points, labels, boxes, threshold=threshold)
    assert_close(found.logits, expected.pred_masks[0].numpy(), 1e-4)
    assert_close(found.iou, expected.iou_scores[0].numpy(), 1e-4)
    assert np.array_equal(found.masks, masks)
    assert 0.2 < masks.mean() < 0.8


@pytest.mark.parametrize("size", [(48, 90), (131, 77), (64, 64), (20, 31)])
def test_masks_at_zero(size):
    """Logits of both signs, at the threshold that is published."""
    import torch

    logits = np.random.default_rng(3).normal(size=(1, 4, 32, 32)).astype(np.float32)
    sizes = segment.geometry(size, 64)
    expected = processors().post_process_masks([torch.tensor(logits[0][None])], [sizes.original], [sizes.inner])
    assert np.array_equal(segment.resize_masks(logits, sizes), expected[0].numpy())


def test_official_weights_are_the_same_model_with_another_epsilon(images, assert_close, tmp_path, monkeypatch):
    import torch

    theirs = source.reference(eps=1e-5)
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    torch.save({n: torch.tensor(x) for n, x in source.official_of_hf(tensors).items()}, tmp_path / "sam.pth")
    monkeypatch.setitem(PROMPTED, "toy_sam", source.toy_sam)
    model, state = eqvision.load("toy_sam", tmp_path / "sam.pth")
    given, prompts = drawn("points")
    with torch.no_grad():
        expected = theirs(pixel_values=torch.tensor(first(images)), **given).pred_masks.numpy()
    assert not jax.tree.leaves(state)
    features = encoder()(model, jnp.asarray(images))
    assert_close(decoder()(model, features, prompts).logits[:, :, 1:], expected, 1e-5)


def test_names_are_those_of_transformers(pair):
    theirs = {name: tuple(x.shape) for name, x in pair[0].state_dict().items()}
    theirs.pop("prompt_encoder.shared_embedding.positional_embedding")
    assert dict(source.hf_names()) == theirs


@pytest.mark.parametrize(("size", "options"), [("b", {}), ("l", {"hidden_size": 1024, "num_hidden_layers": 24})])
def test_parameter_counts(size, options):
    import torch
    from transformers import SamConfig, SamModel

    if size == "l":
        options |= {"num_attention_heads": 16, "global_attn_indexes": [5, 11, 17, 23]}
    with torch.device("meta"):
        theirs = SamModel(SamConfig(vision_config=options))
    ours = jax.eval_shape(lambda: segment.sam(size, key=jax.random.key(0)))
    count = sum(each.numel() for each in {id(p): p for p in theirs.parameters()}.values())
    assert sum(x.size for x in jax.tree.leaves(ours)) == count


def test_search_for_masks_filters_as_transformers_does():
    """Crops, grids, expected IoU, stability, edges: those of its mask generation, up to suppression."""
    import torch
    from transformers.models.sam import image_processing_sam as theirs

    for size, layers in (((333, 500), 2), ((64, 64), 1)):
        boxes, numbers = theirs._generate_per_layer_crops(layers, 512 / 1500, size)
        assert segment.crop_boxes(size, layers) == [(tuple(b), n) for b, n in zip(boxes, numbers, strict=True)]
    np.testing.assert_allclose(segment.point_grid(32), theirs._build_point_grid(32).numpy(), atol=1e-7)
    rng = np.random.default_rng(2)
    crop, size = (30, 0, 130, 90), (120, 160)
    low, high = np.sort(rng.uniform(0, 1, (2, 200, 2)), axis=0) * np.array([100, 90])
    x, y, slope = np.arange(100), np.arange(90)[:, None], rng.uniform(0.5, 30, (200, 1, 1))
    inside = [
        np.minimum(np.minimum(x - x1, x2 - x), np.minimum(y - y1, y2 - y))
        for (x1, y1), (x2, y2) in zip(low, high, strict=True)
    ]
    logits = torch.tensor((np.stack(inside) * slope)[:, None].astype(np.float32))
    iou = torch.tensor(rng.uniform(0.8, 1, (200, 1)), dtype=torch.float32)
    masks, scores, boxes = processors().image_processor.filter_masks(
        logits, iou, size, crop, stability_score_thresh=0.9
    )
    kept = []
    for mask, score in zip(logits.numpy()[:, 0], iou.numpy()[:, 0], strict=True):
        stable = segment.stability_score(mask) > 0.9 and score > 0.88
        box = automatic._box_of(mask > 0) + np.array([30, 0, 30, 0]) if stable else None
        if box is not None and not automatic._is_cut_off(box, crop, size):
            found = automatic._found(mask > 0, box, float(score), 1.0, (0.0, 0.0), crop, size)
            kept.append(
                (found.run_lengths.counts.tolist(), float(score), (np.array(found.box) - [0, 0, 1, 1]).tolist())
            )
    assert 3 < len(kept) < 60
    assert [each["counts"] for each in masks] == [each[0] for each in kept]
    assert scores.tolist() == [each[1] for each in kept]
    assert boxes.tolist() == [each[2] for each in kept]
