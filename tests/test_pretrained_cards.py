"""Cards of published weights, the preprocessing that travels with them, and the commands that print and use both."""

import json
import math

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image

import eqvision
from eqvision import cli
from eqvision.data import eval_transform, normalize
from eqvision.data.detection import detection_eval
from eqvision.export import export_safetensors, model_of_zoo
from eqvision.names import UnknownNameError
from eqvision.predict import Run, predict, prepare
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.cards import CARDS, Card, Preprocessing, cards, default_card, find_card
from eqvision.pretrained.cards.resnet import TORCHVISION
from eqvision.pretrained.cards.text import describe_card
from eqvision.pretrained.preprocess import card_of, known_class_names, known_preprocessing, usual_preprocessing
from eqvision.published import evaluate_published, load_published
from eqvision.zoo import DETECTORS, LANGUAGE, MODELS, PROMPTED, builder

DIGITS = set("0123456789abcdef")


def abstract(name: str):
    return eqx.filter_eval_shape(lambda: builder(name, {})(key=jax.random.key(0)))


# The table


def test_every_card_names_a_model_and_a_layout_that_describes_it():
    models = {name: abstract(name) for name in {card.name for card in CARDS}}
    for card in CARDS:
        assert LAYOUTS[card.layout].describes(models[card.name]), f"{card.name} {card.tag}: {card.layout}"


def test_every_card_is_complete():
    assert len({(card.name, card.tag) for card in CARDS}) == len(CARDS)
    for card in CARDS:
        where = f"{card.name} {card.tag}"
        assert card.location.startswith(("hf:", "https://")), where
        assert " " not in card.location, where
        assert card.metric, where
        assert card.licence, where
        assert card.source.startswith("https://"), where
        assert card.sha256 is None or (len(card.sha256) in (8, 64) and set(card.sha256) <= DIGITS), where


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.name}-{card.tag}")
def test_the_preprocessing_of_every_card_can_be_done(card):
    prepared = card.preprocessing
    if card.name in DETECTORS:
        assert prepared.interpolation == "bilinear"
        transform = detection_eval(prepared.size, prepared.longest)
        kind = "centernet" if card.name.startswith("centernet") else "vitdet" if "vitdet" in card.name else "others"
        expected = {"centernet": (384, 512), "vitdet": (768, 1024), "others": (800, 1066)}[kind]
        assert transform.output_size((480, 640), np.random.default_rng(0)) == expected
        return
    transform = eval_transform("imagenet", prepared.size, prepared.interpolation, prepared.crop_fraction)
    image = transform(np.zeros((40, 60, 3), np.uint8))
    assert image.shape == (prepared.size, prepared.size, 3)
    assert np.isfinite(normalize(image, prepared.mean, prepared.std)).all()


def test_digests_that_file_names_hold_are_those_of_the_cards():
    for card in CARDS:
        stem = card.location.rpartition("/")[2].rpartition(".")[0]
        digits = stem.rpartition("-")[2]
        if len(digits) == 8 and set(digits) <= DIGITS and not card.location.startswith("hf:"):
            assert card.sha256 is not None, card.location
            assert card.sha256.startswith(digits), card.location


def test_torchvisions_shares_give_its_sizes():
    found = {(card.name, card.tag): card.preprocessing for card in cards("resnet*")}
    for name, tag, _, _, resized in TORCHVISION:
        assert math.floor(224 / found[name, tag].crop_fraction) == resized


def test_the_first_card_is_the_default():
    assert default_card("resnet50").tag == "torchvision_v2"
    assert find_card("resnet50", "torchvision_v1").metric == "ImageNet-1k top-1 76.13 %"
    names = [card.name for card in cards("resnet*")]
    assert names == sorted(names, key=names.index)
    assert cards("resnet50")[0] == default_card("resnet50")


def test_unknown_models_and_tags_name_what_there_is():
    with pytest.raises(UnknownNameError, match=r"no published weights of 'resnet51' are known; nearest .*resnet50"):
        default_card("resnet51")
    with pytest.raises(UnknownNameError, match=r"weights of resnet50 with the tag 'timm_a2' does not exist; .*timm_a1"):
        find_card("resnet50", "timm_a2")


def test_models_with_weights_can_be_listed():
    names = eqvision.list_models("resnet*", pretrained=True)
    assert "resnet50" in names
    assert names == sorted({card.name for card in CARDS if card.name.startswith("resnet")})
    assert "small_cnn" not in eqvision.list_models(pretrained=True)
    assert "small_cnn" in eqvision.list_models()


# The commands


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_list_prints_the_table(capsys):
    cli.main(["list", "resnet50", "--pretrained"])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["model", "tag", "layout", "size", "metric", "licence", "location"]
    assert [line.split()[1] for line in lines] == ["torchvision_v2", "torchvision_v1", "timm_a1"]
    assert "ImageNet-1k top-1 80.858 %" in lines[0]
    assert lines[0].endswith("https://download.pytorch.org/models/resnet50-11ad3fa6.pth")


def test_cards_of_detectors_are_listed_apart(capsys):
    cli.main(["list", "*r50", "--pretrained", "--kind", "detector"])
    _, *lines = capsys.readouterr().out.splitlines()
    found = {(line.split()[0], line.split()[1]) for line in lines}
    assert found == {
        *(("detr_r50", tag) for tag in ("facebook", "hf", "scenic")),
        *(("deformable_detr_r50", tag) for tag in ("hf", "fundamentalvision")),
    }
    assert any("COCO val2017 box AP 44.5" in line for line in lines)
    cli.main(["list", "--pretrained"])
    assert "detr_r50" not in capsys.readouterr().out
    assert "detr_r50" in eqvision.list_models(pretrained=True, kind="detector")


def test_every_detector_of_a_paper_has_a_card():
    names = {card.name for card in CARDS if card.name in DETECTORS}
    assert names == set(DETECTORS) - {"deformable_detr_small", "deformable_detr_r18", "mask_rcnn_small"}


def test_a_file_that_only_browsers_get_says_where_it_belongs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gives files to browsers alone") as caught:
        eqvision.load("deformable_detr_r50", "fundamentalvision")
    assert "https://drive.google.com/file/d/1nDWZWHuRwtwGden77NLM9JoWe-YisJnA/view" in str(caught.value)
    assert str(caught.value).endswith("YisJnA/r50_deformable_detr-checkpoint.pth")
    card = card_of("deformable_detr_r50", tmp_path / "r50_deformable_detr-checkpoint.pth")
    assert card is not None
    assert card.tag == "fundamentalvision"


def test_detectron2s_files_are_for_rgb_here():
    """0..255 less the mean, in the order of the file BGR."""
    card = find_card("mask_rcnn_r50_fpn", "detectron2_3x")
    assert (card.layout, card.licence) == ("detectron2_rcnn", "CC-BY-SA-3.0")
    grey = normalize(np.full((1, 1, 1, 3), 255, np.uint8), card.preprocessing.mean, card.preprocessing.std)
    np.testing.assert_allclose(np.ravel(grey), [255 - 123.675, 255 - 116.28, 255 - 103.53], rtol=1e-5)
    printed = describe_card(find_card("cascade_mask_rcnn_r50_fpn", None))
    assert "metric        COCO val2017 box AP 44.3, mask AP 38.5" in printed
    assert "note          MSRA's ResNet, which reads BGR of 0..255 less the mean 103.53 116.28 123.675" in printed


def test_list_says_where_there_are_none(capsys):
    assert "no published weights of 'small_cnn' are known" in refused(capsys, "list", "small_cnn", "--pretrained")


def test_info_prints_the_cards(capsys):
    cli.main(["info", "resnet20_cifar", "--image-size", "32", "--num-classes", "10"])
    printed = capsys.readouterr().out
    assert "parameters by part" in printed
    assert "weights cifar10" in printed
    assert "metric        CIFAR-10 test error 8.27 %" in printed
    assert "sha256        12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8" in printed
    assert "shorter side to 32, middle 32x32 (bicubic), mean 0.485 0.456 0.406" in printed


# Preprocessing of files


def written(folder, name: str, **content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


HF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"size": 224}, (224, "bilinear", 0.0)),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}}, (96, "bilinear", 0.0)),
        ({"resample": 3, "size": {"height": 96, "width": 96}}, (96, "bicubic", 0.0)),
        (
            {"image_processor_type": "DeiTImageProcessor", "size": 256, "do_center_crop": True, "crop_size": 224},
            (224, "bicubic", 0.875),
        ),
        (
            {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": 448},
                "do_center_crop": True,
                "crop_size": {"height": 448, "width": 448},
            },
            (448, "bicubic", 1.0),
        ),
        (
            {"feature_extractor_type": "ConvNextFeatureExtractor", "size": {"shortest_edge": 224}, "crop_pct": 0.9},
            (224, "bicubic", 0.9),
        ),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}}, (384, "bicubic", 0.0)),
    ],
)
def test_preprocessor_config_is_followed(tmp_path, entries, expected):
    folder = written(tmp_path / "weights", "preprocessor_config.json", **HF, **entries)
    found = known_preprocessing("vit_b16", folder, folder)
    assert found is not None
    size, interpolation, fraction = expected
    assert found.preprocessing == Preprocessing(size, (0.5,) * 3, (0.25,) * 3, interpolation, fraction)
    assert found.origin.endswith("preprocessor_config.json")


def test_preprocessor_config_that_cannot_be_followed_is_refused(tmp_path):
    folder = written(tmp_path / "a", "preprocessor_config.json", **HF, size={"height": 96, "width": 64})
    with pytest.raises(WeightsError, match=r"preprocessor_config.json: size is .*expected a number, or equal height"):
        known_preprocessing("vit_b16", folder, folder)
    folder = written(tmp_path / "b", "preprocessor_config.json", **HF, size=96, do_resize=False)
    with pytest.raises(WeightsError, match="do_resize and do_rescale must be true"):
        known_preprocessing("vit_b16", folder, folder)


def test_timms_config_is_followed(tmp_path):
    entry = {"input_size": [3, 160, 160], "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.95}
    folder = written(tmp_path / "weights", "config.json", architecture="resnet50", pretrained_cfg=entry)
    found = known_preprocessing("resnet50", folder / "model.safetensors", folder / "model.safetensors")
    assert found is not None
    assert found.preprocessing == Preprocessing(160, (0.1,) * 3, (0.2,) * 3, "bicubic", 0.95)


def test_the_card_of_a_file_is_found_by_tag_location_and_name(tmp_path):
    card = find_card("resnet50", "torchvision_v1")
    assert card_of("resnet50", None) == default_card("resnet50")
    assert card_of("resnet50", "torchvision_v1") == card
    assert card_of("resnet50", card.location) == card
    assert card_of("resnet50", tmp_path / "resnet50-0676ba61.pth") == card
    assert card_of("resnet50", tmp_path / "model.safetensors") is None
    assert card_of("small_cnn", None) is None


def test_files_without_a_card_are_prepared_as_is_usual_for_the_layout(tmp_path):
    assert known_preprocessing("resnet50", tmp_path / "mine.safetensors", tmp_path / "mine.safetensors") is None
    usual = usual_preprocessing("resnet50", "torchvision_resnet")
    assert usual.preprocessing == default_card("resnet50").preprocessing
    assert "usual for layout torchvision_resnet" in usual.origin
    assert usual_preprocessing("vit_ti4", "timm_vit").preprocessing.mean == (0.5, 0.5, 0.5)
    assert "nothing is known" in usual_preprocessing("small_cnn", "eqvision").origin


def test_class_names_come_from_the_configuration():
    assert known_class_names({"id2label": {"0": "ant", "1": "bee"}}, 2) == ("ant", "bee")
    assert known_class_names({"label_names": ["ant", "bee"]}, 2) == ("ant", "bee")
    assert known_class_names({"id2label": {"0": "ant", "1": "bee"}}, 3) == ()
    assert known_class_names(None, 2) == ()


def test_a_crop_fraction_of_zero_resizes_both_sides():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    squeezed = eval_transform("imagenet", 4, "nearest", 0.0)(image)
    assert squeezed.shape == (4, 4, 3)
    np.testing.assert_array_equal(squeezed[:, 0], image[:, 0])
    np.testing.assert_array_equal(squeezed[:, -1], image[:, -1])


# Prediction and evaluation


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR ResNet of ours, a file with akamaster's names under the published name, and its model and state."""
    source = model_of_zoo("resnet20_cifar", num_classes=10, image_size=32)
    tensors = to_layout(source.model, source.state, LAYOUTS["akamaster_resnet_cifar"])
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "weights.safetensors")
    return source, tmp_path / "weights.safetensors"


def picture(file, size=(50, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def test_predict_takes_a_model_with_a_file(cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, file = cifar
    image = picture(tmp_path / "image.png")
    cli.main(["predict", "resnet20_cifar", str(image), "--weights", str(file), "--top", "2"])
    printed = capsys.readouterr()
    assert "images are prepared by usual for layout akamaster_resnet_cifar (card cifar10" in printed.err
    pixels = eval_transform("imagenet", 32, "bicubic", 1.0)(np.asarray(Image.open(image)))
    prepared = normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    logits = np.asarray(eqvision.inference(source.model, source.state)(prepared[None]))[0]
    best = int(logits.argmax())
    probability = np.exp(logits - logits.max())[best] / np.exp(logits - logits.max()).sum()
    assert f"{image}: class {best} {probability:.3f}, " in printed.out
    assert (tmp_path / "predictions" / "resnet20_cifar" / "image.png").is_file()


def test_published_weights_are_prepared_as_the_configuration_beside_them_says(cifar, tmp_path):
    _, file = cifar
    written(tmp_path, "preprocessor_config.json", **HF, size=48, resample=3)
    written(tmp_path, "config.json", id2label={str(n): f"animal {n}" for n in range(10)})
    run = load_published("resnet20_cifar", file)
    assert isinstance(run, Run)
    assert run.config.model.image_size == 48
    assert prepare(run, picture(tmp_path / "image.png")).shape == (48, 48, 3)
    assert run.class_names[3] == "animal 3"
    [prediction] = predict(run, [tmp_path / "image.png"], top=1)
    assert prediction.labels[0].startswith("animal ")
    assert load_published("resnet20_cifar", file, image_size=40).config.model.image_size == 40


def test_positions_are_brought_to_the_size_of_the_preprocessing(tmp_path):
    """The layout's own resampling is used then, and not that of a call with other images."""
    source = model_of_zoo("vit_ti16", num_classes=3, image_size=64)
    from safetensors.numpy import save_file

    save_file(to_layout(source.model, source.state, LAYOUTS["timm_vit"]), tmp_path / "file.safetensors")
    written(tmp_path, "preprocessor_config.json", **HF, size=96)
    run = load_published("vit_ti16", tmp_path / "file.safetensors")
    assert run.model.backbone.position.weight.shape[:2] == (6, 6)
    (tmp_path / "preprocessor_config.json").unlink()
    run = load_published("vit_ti16", tmp_path / "file.safetensors")
    assert run.config.model.image_size == 64


def test_eval_measures_published_weights_on_a_folder(cifar, tmp_path, capsys):
    source, file = cifar
    names = [f"c{n}" for n in range(10)]
    right = 0
    for number, name in enumerate(names):
        (tmp_path / "images" / "test" / name).mkdir(parents=True)
        image = picture(tmp_path / "images" / "test" / name / "1.png", (32, 32), seed=number)
        prepared = normalize(np.asarray(Image.open(image)), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        logits = eqvision.inference(source.model, source.state)(prepared[None])
        right += int(np.asarray(logits).argmax() == number)
    cli.main(["eval", "resnet20_cifar", "--weights", str(file), "--data.path", str(tmp_path / "images")])
    assert f"test/accuracy {right / 10:.4f}" in capsys.readouterr().out


def test_eval_refuses_a_folder_whose_labels_cannot_be_numbered(cifar, tmp_path):
    _, file = cifar
    for name in ("cat", "dog"):
        (tmp_path / "few" / "test" / name).mkdir(parents=True)
        picture(tmp_path / "few" / "test" / name / "1.png")
    with pytest.raises(ValueError, match=r"has 2 classes \(cat, dog ...\) and resnet20_cifar .* 10 outputs"):
        evaluate_published("resnet20_cifar", file, data_path=str(tmp_path / "few"))
    written(tmp_path, "config.json", id2label={str(n): f"animal {n}" if n != 7 else "dog" for n in range(10)})
    (tmp_path / "few" / "test" / "cat").rename(tmp_path / "few" / "test" / "animal 1")
    metrics = evaluate_published("resnet20_cifar", file, data_path=str(tmp_path / "few"))
    assert 0 <= metrics["test/accuracy"] <= 1


def test_frozen_features_of_published_weights_are_probed(cifar, tmp_path):
    _, file = cifar
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(tmp_path / "pets" / split / name / f"{number}.png", (32, 32), seed=100 * label + number)
    metrics = evaluate_published("resnet20_cifar", file, data_path=str(tmp_path / "pets"), evaluators=("knn",))
    assert metrics.keys() == {"test/knn/accuracy"}


def test_runs_and_models_have_their_own_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("config: {}\n")
    error = refused(capsys, "predict", "run", "image.png", "--weights", "file.pth")
    assert "--weights file.pth is for models of the zoo; the run run has its own" in error
    assert "name images with --data-path" in refused(capsys, "eval", "resnet20_cifar")
    assert "resnet20 is no run folder, and model 'resnet20' does not exist; nearest: resnet20_cifar" in refused(
        capsys, "predict", "resnet20", "image.png"
    )


# eqvision's own files


def test_an_export_is_loaded_by_name(tmp_path, assert_close):
    source = model_of_zoo("vit_ti16", num_classes=3, image_size=64)
    export_safetensors(source, tmp_path / "file.safetensors")
    model, state = eqvision.load("vit_ti16", tmp_path / "file.safetensors")
    assert_close((model, state), (source.model, source.state), 0)
    model, _ = eqvision.load("vit_ti16", tmp_path / "file.safetensors", num_classes=5, image_size=96, in_channels=1)
    assert model.head.linear.weight.shape == (192, 5)
    assert model.backbone.position.weight.shape == (6, 6, 192)
    assert model.backbone.patch_embed.weight.shape == (16, 16, 1, 192)


def test_an_export_of_another_model_or_damaged_is_refused(tmp_path):
    file = tmp_path / "file.safetensors"
    export_safetensors(model_of_zoo("small_cnn", num_classes=3, image_size=8), file)
    with pytest.raises(eqvision.WeightsError, match="holds the model small_cnn, and mlp is asked for"):
        eqvision.load("mlp", file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its contents do not have the SHA-256"):
        eqvision.load("small_cnn", file)


def test_an_export_brings_its_preprocessing(tmp_path, capsys):
    import dataclasses

    source = model_of_zoo("small_cnn", num_classes=2, image_size=8)
    card = dataclasses.replace(source.card, class_names=("ant", "bee"), mean=(0.1,), std=(0.2,), crop_fraction=1.0)
    export_safetensors(source._replace(card=card), tmp_path / "file.safetensors")
    run = load_published("small_cnn", tmp_path / "file.safetensors")
    assert (run.class_names, run.config.data.mean, run.config.data.crop_fraction) == (("ant", "bee"), (0.1,), 1.0)
    assert run.config.model.image_size == 8
    assert "the header of" in capsys.readouterr().err


def test_every_model_of_the_table_exists():
    assert {card.name for card in CARDS} <= {*MODELS, *DETECTORS, *PROMPTED, *LANGUAGE}
    assert isinstance(CARDS[0], Card)
