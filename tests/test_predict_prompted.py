"""Segment Anything by name and on the command line: the zoo, weights, prompts, pictures, JSON, refusals."""

import json
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import sam_references as source
from PIL import Image

import eqvision
from eqvision import cli, predict_prompted
from eqvision.data.detection import decode_mask, encode_uncompressed
from eqvision.names import UnknownNameError
from eqvision.predict_prompted import MaskFound, load_predictor, numbered
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.cards import cards
from eqvision.segmenters.sam import SAM, FoundMask
from eqvision.zoo import PROMPTED, require_classifier

ASK = ("predict", "toy_sam", "--weights", "sam.npz", "photo.png")


@pytest.fixture(scope="module")
def weights():
    return to_layout(source.noisy_sam(), source.STATE, LAYOUTS["official_sam"])


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch, weights):
    """A folder with an image and weights, and their model among the zoo's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setitem(PROMPTED, "toy_sam", source.toy_sam)
    np.savez("sam.npz", **weights)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save("photo.png")


def refused(capsys, *arguments):
    """What the command prints on standard error when it ends with code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(each) for each in arguments])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def drawn(name):
    with Image.open(name) as image:
        return np.asarray(image)


# The zoo


def test_names_and_cards():
    assert eqvision.list_models("sam_vit*", kind="prompted") == ["sam_vit_b", "sam_vit_h", "sam_vit_l"]
    assert eqvision.list_models(kind="prompted", pretrained=True) == ["sam_vit_b", "sam_vit_h", "sam_vit_l"]
    assert [card.layout for card in cards("sam_vit_b")] == ["official_sam", "hf_sam"]
    assert {(card.preprocessing.size, card.preprocessing.longest) for card in cards("sam*")} == {(1024, 1024)}


def test_created_by_name():
    """Those of other sizes are counted in test_sam.py."""
    key = jax.eval_shape(jax.random.key, 0)
    model, _ = eqx.filter_eval_shape(eqvision.create, "sam_vit_b", image_size=1024, key=key)
    assert isinstance(model, SAM)
    assert model.head.mask_tokens.shape[0] == 4  # three, and one for prompts that mean one thing
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 93_735_472 + 256


def test_what_is_for_classifiers_refuses_them(capsys):
    with pytest.raises(ValueError, match="'sam_vit_b' gives masks for prompts, and this takes image classifiers"):
        require_classifier("sam_vit_b")
    cli.main(["list", "--kind", "prompted", "*_b"])
    assert capsys.readouterr().out.split() == ["sam_vit_b"]


# Prompts


def test_a_click_gives_three_masks(capsys, assert_close):
    cli.main([*ASK, "--prompt-points", "30", "10", "1", "--out", "out"])
    printed = capsys.readouterr().out
    result = json.loads((Path("out") / "photo.json").read_text())
    assert result["size"] == [40, 60]
    assert result["prompt"] == {"points": [[30, 10, 1]], "box": None}
    predictor = load_predictor("toy_sam", "sam.npz", max_points=1)
    predictor.set_image(drawn("photo.png"))
    expected = predictor.predict(np.array([[[30.0, 10]]]), np.array([[1]]))
    order = np.argsort(-expected.iou[0])
    assert_close(np.array([row["iou"] for row in result["masks"]]), expected.iou[0][order], 1e-4)
    for number, (row, mask) in enumerate(zip(result["masks"], expected.masks[0][order], strict=True), 1):
        assert np.array_equal(drawn(f"out/photo_mask{number}.png") == 255, mask)
        assert row["segmentation"]["counts"] == encode_uncompressed(mask).counts.tolist()
        assert row["area"] == mask.sum()
        assert f"mask {number}: expected IoU {row['iou']:.3f}" in printed
    assert drawn("out/photo.png").shape[1] > 3 * 480  # enlarged eight times, side by side


def test_a_box_gives_one_mask_and_the_best_of_three_is_the_first(capsys):
    cli.main([*ASK, "--prompt-box", "5", "6", "50", "30", "--out", "out"])
    assert len(json.loads((Path("out") / "photo.json").read_text())["masks"]) == 1
    for choice in ("three", "best"):
        cli.main([*ASK, "--prompt-box", "5", "6", "50", "30", "--masks", choice, "--out", choice])
    three, best = (json.loads((Path(each) / "photo.json").read_text())["masks"] for each in ("three", "best"))
    assert best == three[:1]
    assert [row["iou"] for row in three] == sorted((row["iou"] for row in three), reverse=True)
    assert capsys.readouterr().out.count("1 mask,") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no prompt: give points (--prompt-points X Y LABEL ..., label 1 inside the object, 0 outside)"),
        (("--prompt-points", 3, 4, 2), "the point (3, 4) has label 2; expected 1 inside the object or 0 outside"),
        (("--prompt-points", 30, 50, 1), "the point (x, y) = [30.0, 50.0] is outside the image of 40x60"),
        (("--prompt-box", 9, 9, 3, 3), "the box [9.0, 9.0, 3.0, 3.0] is empty, or outside"),
        (
            ("--everything", "--prompt-box", 1, 1, 3, 3),
            "--prompt-box 1 1 3 3 is a prompt, and --everything asks",
        ),
        (("--prompt-box", 1, 1, 3, 3, "--top", 3), "--top 3 is for --everything, which is not given"),
        (("--prompt-box", 1, 1, 3, 3, "--image-size", 512), "--image-size 512 is not for toy_sam"),
        (("--everything", "--points-per-side", 0), "0 points per side"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refused_prompts(capsys, arguments, message):
    assert message in refused(capsys, *ASK, *arguments)
    assert not Path("predictions").exists()


def test_models_without_prompts_refuse_them(capsys):
    prompts = ("--prompt-points", "3", "4", "1")
    for name in ("detr_r50", "resnet18"):
        error = refused(capsys, "predict", name, "photo.png", *prompts)
        assert "--prompt-points 3 4 1 is for models that take prompts (eqvision list --kind prompted)" in error
        assert f"{name} takes none" in error
    assert "--everything True is for models that take" in refused(capsys, "predict", "mlp", "photo.png", "--everything")
    assert "nearest: toy_sam" in refused(capsys, "predict", "toy_sum", "photo.png", *prompts)
    with pytest.raises(ValueError, match=r"model 'detr_r50' takes no prompts; those that do are sam_vit_b, sam_vit_l"):
        load_predictor("detr_r50", "sam.npz")
    with pytest.raises(UnknownNameError, match="model 'sam_vit_x' does not exist; nearest: sam_vit_"):
        load_predictor("sam_vit_x", "sam.npz")


def test_weights_for_other_images(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(WeightsError, match=r"has image_mean \[0.5, 0.5, 0.5\], and images are prepared with \[0.485"):
        load_predictor("toy_sam", tmp_path / "sam.npz")


# Everything


def test_masks_of_everything(capsys, monkeypatch):
    small, large = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    small[10:20, 10:20], large[5:35, 5:35] = True, True
    planted = [
        FoundMask(encode_uncompressed(mask), (0.0, 0.0, 9.0, 9.0), iou, 0.97, (15.0, 15.0), (0, 0, 60, 40))
        for mask, iou in ((small, 0.95), (large, 0.9), (~large, 0.89))
    ]
    searches = []

    def find(predictor, image, search, *, progress):
        searches.append((search, predictor.prompts_per_batch))
        progress(4)
        return planted

    monkeypatch.setattr(predict_prompted, "find_masks", find)
    cli.main([*ASK, "--everything", "--points-per-side", "2", "--threshold", "0.5", "--top", "2"])
    printed = capsys.readouterr().out
    assert "photo.png: 2 masks, 37.5% of the image covered, expected IoU 0.900 to 0.950" in printed
    (search, batch), folder = searches[0], Path("predictions/toy_sam")
    assert (search.points_per_side, search.least_iou, batch) == (2, 0.5, 4)
    numbers = drawn(folder / "photo_masks.png")
    assert (numbers[15, 15], numbers[30, 30], numbers[0, 0]) == (1, 2, 0)
    rows = json.loads((folder / "photo.json").read_text())["masks"]
    assert [(row["bbox"], row["stability"], row["point"]) for row in rows] == [
        ([10, 10, 10, 10], 0.97, [15, 15]), ([5, 5, 30, 30], 0.97, [15, 15])
    ]  # fmt: skip
    picture, plain = drawn(folder / "photo.png"), drawn("photo.png").repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(picture[:30], plain[:30])
    assert (picture[100:250, 100:250] != plain[100:250, 100:250]).mean() > 0.9


def test_nothing_found_is_said():
    found = predict_prompted.ImageMasks(Path("a.png"), (4, 4), None, (), 1.0)
    assert "0 masks, 0.0% of the image covered (lower --threshold finds more)" in predict_prompted.summary(found)
    assert not numbered([], (4, 4)).any()
    empty = MaskFound(encode_uncompressed(np.zeros((4, 4), bool)), 0.5)
    row = predict_prompted.as_json(found._replace(masks=(empty,)))["masks"][0]
    assert (row["area"], row["bbox"]) == (0, [0, 0, 0, 0])
    assert not decode_mask(empty.run_lengths, 4, 4).any()
