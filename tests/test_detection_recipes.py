"""Recipes of detectors: what they are made of, what they refuse, what they never train, and what they begin with."""

import dataclasses
import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from toy_detection import toy_centernet, toy_mask_rcnn

from eqvision import finetune
from eqvision.backbones.resnet import ConvNorm
from eqvision.checkpoint import CheckpointError
from eqvision.commands.arguments import parse_recipe
from eqvision.detectors import deformable_detr
from eqvision.finetune import Start, start_from
from eqvision.names import UnknownNameError
from eqvision.optim import make_optimizer, make_schedule, parameter_settings, update_ema
from eqvision.pretrained.leaf_names import named_arrays
from eqvision.problems import detection_problem
from eqvision.problems.detection import build_detector
from eqvision.recipes import RECIPES, DetectionConfig, OptimizerConfig
from eqvision.segmenters import unet
from eqvision.zoo import builder

CONFIGS = {name: recipe() for name, recipe in RECIPES.items() if isinstance(recipe(), DetectionConfig)}
COCO = ("coco_deformable_detr_r50", "coco_detr_r50")
FROZEN = (*COCO, "coco_faster_rcnn_r50_fpn", "coco_mask_rcnn_r50_fpn")  # stem, first stage and norms of the backbone


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_gives_a_model_and_groups_of_its_parameters(name):
    config = CONFIGS[name]
    model, _ = eqx.filter_eval_shape(lambda: build_detector(config, 80))
    settings = parameter_settings(config.optimizer, model)
    frozen = {name for name, each in settings.items() if each.frozen}
    assert bool(frozen) == (name in FROZEN)
    assert all(each.multiplier == 0.1 for name, each in settings.items() if "sampling_offsets" in name)
    if name in FROZEN:
        norms = {name for name in settings if name.startswith("backbone.") and ".norm." in name}
        fixed = {name for name in settings if name.startswith(("backbone.stem.", "backbone.stages.0."))}
        assert frozen == norms | fixed
        assert {each.weight_decay for each in settings.values()} == {1e-4}
    if name in COCO:
        assert all(settings[name].multiplier == 0.1 for name in settings if name.startswith("backbone."))
        assert settings["head.classes.weight"].multiplier == 1


def test_the_coco_recipes_have_the_published_numbers():
    detr, deformable = CONFIGS["coco_detr_r50"], CONFIGS["coco_deformable_detr_r50"]
    published = [(1e-4, 500.0, 64, "softmax"), (2e-4, 50.0, 32, "sigmoid")]
    for config, (rate, epochs, batch, classification) in zip((detr, deformable), published, strict=True):
        assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (rate, 0.1)
        assert (config.loop.epochs, config.loop.batch_size) == (epochs, batch)
        assert config.task.classification == classification
        schedule = make_schedule(config.schedule, rate, 500)
        np.testing.assert_allclose(
            [schedule(399), schedule(400), schedule(499)], [rate, rate / 10, rate / 10], rtol=1e-6
        )


def test_the_recipes_of_rcnns_and_centernet_have_the_published_numbers():
    for name in ("coco_mask_rcnn_r50_fpn", "coco_faster_rcnn_r50_fpn"):
        config = CONFIGS[name]
        assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.clip_norm) == ("sgd", 0.9, None)
        assert (config.loop.epochs, config.loop.batch_size, config.task.box_beta) == (12.0, 16, 0.0)
        schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 12_000)
        rates = [schedule(step) for step in (249, 7999, 8010, 10_990, 11_010)]
        np.testing.assert_allclose(rates, [0.01, 0.02, 0.002, 0.002, 0.0002], rtol=1e-5)
    centers = CONFIGS["coco_centernet_r18"]
    schedule = make_schedule(centers.schedule, centers.optimizer.learning_rate, 140_000)
    rates = [schedule(step) for step in (89_000, 91_000, 119_000, 121_000)]
    np.testing.assert_allclose(rates, [1.25e-4, 1.25e-5, 1.25e-5, 1.25e-6], rtol=1e-5)
    vit = CONFIGS["coco_vitdet_b"]
    settings = parameter_settings(vit.optimizer, eqx.filter_eval_shape(lambda: build_detector(vit, 80))[0])
    decays = {name: each.weight_decay for name, each in settings.items()}
    free = ("position", ".norm", "attention.rows", "attention.columns")
    assert {decay for name, decay in decays.items() if any(each in name for each in free)} == {0.0}
    assert {decays["backbone.global_blocks.mlp.fc1.weight"], decays["backbone.patch_embed.weight"]} == {0.1}
    rates = {name: each.layer_factors for name, each in settings.items()}
    assert {rate for name, rate in rates.items() if not name.startswith("backbone.")} == {(1.0,)}
    assert rates["backbone.patch_embed.weight"] == pytest.approx((0.7**13,))
    assert rates["backbone.global_blocks.norm1.bias"] == pytest.approx([0.7**n for n in (10, 7, 4, 1)])
    assert rates["backbone.window_blocks.mlp.fc1.bias"] == pytest.approx([0.7**n for n in (12, 11, 9, 8, 6, 5, 3, 2)])


def test_the_list_of_recipes_sets_names_apart(capsys):
    assert parse_recipe([], "eqvision train") is None
    said = capsys.readouterr().out
    for name in CONFIGS:
        assert f"\n  {name}  " in said


# Constants


def test_frozen_norms_stay_bit_for_bit_whatever_the_options_say():
    layer, state = eqx.nn.make_with_state(ConvNorm)(2, 3, 3, norm="frozen", key=jax.random.key(0))
    values = jnp.array([0.3, -1.7, 2.9])
    layer = first = eqx.tree_at(
        lambda m: (m.norm.weight, m.norm.bias, m.norm.running_mean, m.norm.running_var),
        layer,
        (values, -values, 2 * values, values**2),
    )
    config = OptimizerConfig(learning_rate=0.1, weight_decays={".": 0.5}, learning_rate_multipliers={"norm": 2.0})
    optimizer = make_optimizer(config, make_schedule(CONFIGS["digits_detr"].schedule, 0.1, 10))

    @jax.jit
    def step(layer, opt_state, average):
        grads = jax.grad(lambda m: m(jnp.ones((1, 4, 4, 2)), state, train=True)[0].sum())(layer)
        # as if there were gradients
        updates, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, grads), opt_state, layer)
        layer = eqx.apply_updates(layer, updates)
        return layer, opt_state, update_ema(average, layer, 0.7), grads

    opt_state, average = jax.jit(optimizer.init)(layer), layer
    for _ in range(2):
        layer, opt_state, average, grads = step(layer, opt_state, average)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads.norm))
    for tree in (layer, average):
        for before, after in zip(jax.tree.leaves(first.norm), jax.tree.leaves(tree.norm), strict=True):
            assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    assert np.all(np.asarray(layer.conv.weight) != np.asarray(first.conv.weight))


def test_layers_of_detectors_are_stacks_whose_norms_do_not_decay():
    config = CONFIGS["digits_detr"]
    model, _ = eqx.filter_eval_shape(lambda: build_detector(config, 10))
    settings = parameter_settings(config.optimizer, model)
    norms = [name for name in settings if name.startswith("decoder.layers.norm")]
    assert norms
    assert all(settings[name].weight_decay == 0 for name in norms)
    assert settings["decoder.layers.mlp.fc1.weight"].weight_decay == 1e-4


# What is refused


@pytest.fixture
def coco(tmp_path):
    """``write(split, categories, labels)`` writes a split of an image with a box for each label."""

    def write(split, categories, labels, images=1):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / split).mkdir(exist_ok=True)
        Image.new("RGB", (16, 12)).save(tmp_path / split / "0.png")
        content = {
            "images": [{"id": 5, "file_name": "0.png", "height": 12, "width": 16}][:images],
            "categories": [{"id": number, "name": name} for number, name in categories.items()],
            "annotations": [
                {"id": i, "image_id": 5, "category_id": label, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
                for i, label in enumerate(labels, 1)
            ],
        }
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def with_data(path, **options):
    config = CONFIGS["detect"]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path), **options))


def test_both_splits_have_the_classes_of_the_training_split(coco):
    coco("train", {1: "cat", 3: "dog", 7: "cow"}, [1, 3, 7])
    problem = detection_problem(with_data(coco("val", {7: "cow", 3: "dog"}, [7, 3])))
    assert problem.num_classes == 3
    assert problem.test_source.class_names == ("cat", "dog", "cow")
    assert problem.test_source[0].labels.tolist() == [2, 1]


def refused(config, error=ValueError):
    with pytest.raises(error) as caught:
        detection_problem(config)
    return str(caught.value)


def test_data_that_does_not_fit_is_refused(coco, tmp_path):
    assert "--data.path PATH" in refused(with_data(""))
    assert "does not exist" in refused(with_data(tmp_path / "nothing"), FileNotFoundError)
    root = coco("train", {1: "cat"}, [1])
    assert "no annotations of split 'val'" in refused(with_data(root), FileNotFoundError)
    assert "nearest: val" in refused(with_data(root, test_split="vall"), UnknownNameError)
    assert "evaluate on another" in refused(with_data(root, test_split="train"))
    assert "is one file" in refused(with_data(root / "annotations" / "train.json"))
    coco("val", {1: "cat", 4: "dog"}, [4])
    said = refused(with_data(root))
    assert "val.json has category 4=dog" in said
    assert "1=cat" in said
    coco("val", {1: "cat"}, [1])
    coco("train", {1: "cat"}, [])
    assert "not one object to train on" in refused(with_data(root))
    coco("train", {1: "cat"}, [], images=0)
    assert "train.json" in refused(with_data(root))


def test_models_that_do_not_fit_are_refused(coco):
    coco("train", {1: "cat"}, [1])
    config = with_data(coco("val", {1: "cat"}, [1]))

    def with_model(**options):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **options))

    assert "is an image classifier" in refused(with_model(name="resnet18"))
    assert "unet_small is a segmenter, and this recipe trains detectors" in refused(with_model(name="unet_small"))
    assert "nearest: detr_r50" in refused(with_model(name="detr_r5"), UnknownNameError)
    assert "100 is more than the 20 queries" in refused(with_model(num_queries=20))
    said = refused(with_model(name="mask_rcnn_small", num_queries=None, dropout=None))
    assert "is an R-CNN, and this recipe is for detectors of DETR's kind. Recipes for R-CNNs: instances" in said
    said = refused(dataclasses.replace(with_model(num_queries=None, dropout=None), task=CONFIGS["instances"].task))
    assert "is of DETR's kind, and this recipe is for R-CNNs and CenterNet2" in said
    with pytest.raises(ValueError, match=r"are frozen, so it needs weights to begin with: --init resnet50"):
        eqx.filter_eval_shape(detection_problem(with_model(norm="frozen")).build)


# What a run begins with


SMALL = {"width": 32, "mlp_dim": 32, "num_heads": 2, "num_levels": 1, "encoder_depth": 1, "decoder_depth": 1}


def filled(build, seed, num_classes):
    """A model whose leaves are numbers of no use."""
    made = eqx.nn.make_with_state(build)
    shapes = eqx.filter_eval_shape(lambda: made(num_classes=num_classes, key=jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), shapes)


def detector(seed, num_classes, *, norm="batch", num_queries=6):
    row = functools.partial(deformable_detr, 18, norm=norm, num_queries=num_queries, **SMALL)
    return filled(row, seed, num_classes)


def classifier(name, seed=0):
    return filled(builder(name, {}), seed, 10)


def begun(monkeypatch, old, name, new):
    monkeypatch.setattr(finetune, "_start", lambda init, model: Start(*old, name, "there"))
    return named_arrays(*start_from("there", *new))


def same(one, other, names):
    assert names
    return all(np.array_equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_classifier_gives_its_backbone_and_the_statistics_of_its_norms(monkeypatch, capsys, norm):
    old, new = classifier("resnet18"), detector(1, 3, norm=norm)
    found, there, fresh = begun(monkeypatch, old, "resnet18", new), named_arrays(*old), named_arrays(*new)
    assert same(found, there, [name for name in there if name.startswith("backbone.")])
    assert same(found, fresh, [name for name in fresh if "backbone." not in name])
    frozen, trained = "backbone.stages.1.0.convs.0.norm.running_var", "stats.backbone.stages.1.0.convs.0.norm.variance"
    assert np.array_equal(found[frozen if norm == "frozen" else trained], there[trained])
    said = capsys.readouterr().err
    assert "the backbone alone; left out: head; fresh: projections, level_embed" in said


def test_a_detector_gives_all_but_a_head_of_other_classes(monkeypatch, capsys):
    old, new = detector(0, 5), detector(1, 3, norm="frozen")
    found, there, fresh = begun(monkeypatch, old, "x", new), named_arrays(*old), named_arrays(*new)
    head = ["head.classes.weight", "head.classes.bias"]
    assert same(found, fresh, head)
    assert same(found, there, [name for name in there if name not in head and not name.startswith("stats.")])
    assert "head.classes.bias: fresh, (1, 3) instead of (1, 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "fresh"),
    [
        (toy_mask_rcnn, {"box_heads.0.logits", "box_heads.0.deltas", "mask_head.logits"}),
        (toy_centernet, {"head.heatmap.out"}),
        (functools.partial(unet, width=4, depth=1), {"head.conv"}),
    ],
)
def test_other_models_give_all_but_what_tells_classes(monkeypatch, row, fresh):
    old, new = filled(row, 0, 3), filled(row, 1, 4)
    found, there = begun(monkeypatch, old, "toy", new), named_arrays(*old)
    others = {name for name, leaf in there.items() if not np.array_equal(found[name], leaf)}
    assert {name.rpartition(".")[0] for name in others} == fresh


def test_another_backbone_and_another_number_of_queries_are_refused(monkeypatch):
    new = detector(1, 3)
    with pytest.raises(
        CheckpointError, match=r"(?s)--init there \(resnet34\) does not fit.*backbone\.stages\.0\.2.*absent here"
    ):
        begun(monkeypatch, classifier("resnet34"), "resnet34", new)
    other = detector(0, 3, num_queries=5)
    with pytest.raises(CheckpointError, match=r"queries.content: \(5, 32\) there, \(6, 32\) here"):
        begun(monkeypatch, other, "deformable_detr_small", new)


def test_a_start_that_does_not_exist_is_named(tmp_path):
    new = detector(1, 3)
    with pytest.raises(UnknownNameError, match=r"--init resnt18: no run folder is there, .* nearest: resnet18"):
        start_from("resnt18", *new)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        start_from(f"resnet18:{tmp_path / 'nothing.pth'}", *new)


def test_a_published_file_gives_the_backbone(tmp_path):
    from safetensors.numpy import save_file

    from eqvision.pretrained.layouts.resnet_torchvision import LAYOUT

    shapes = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(builder("resnet18", {}))(key=jax.random.key(0)))
    leaves = named_arrays(*shapes)
    tensors = {}
    for rule in LAYOUT.rules(shapes[0]):
        shape = leaves[rule.our_names[0]].shape
        turned = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)]
        tensors[rule.their_names[0]] = np.full([shape[axis] for axis in turned], len(tensors), np.float32)
    save_file(tensors, tmp_path / "weights.safetensors")
    new = detector(1, 3, norm="frozen")
    found = named_arrays(*start_from(f"resnet18:{tmp_path / 'weights.safetensors'}", *new))
    place = list(tensors).index("layer1.0.bn1.running_mean")
    assert np.all(np.asarray(found["backbone.stages.0.0.convs.0.norm.running_mean"]) == place)
