"""Segmenters in use: images of any size, windows, label maps as files, runs evaluated again, pictures, refusals."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import toy_segmentation
from PIL import Image
from segmentation_files import write_folder

from eqvision import cli
from eqvision.checkpoint import Checkpoints, Record
from eqvision.data.segmentation import move_image
from eqvision.info import describe_run
from eqvision.mesh import make_mesh
from eqvision.ops import restored_logits
from eqvision.optim import make_optimizer, make_schedule
from eqvision.predict_pixels import (
    SegmenterRun,
    Windows,
    draw_labelled,
    evaluate_segmenter_run,
    label_pixels,
    load_segmenter_run,
)
from eqvision.problems.segmentation import build_segmenter
from eqvision.problems.segmentation_data import eval_plan
from eqvision.recipes import SegmentationConfig, SegmentationDataConfig, SegmenterConfig
from eqvision.run_folder import RunFolder, RunFolderError
from eqvision.state import first_state
from eqvision.train import set_up, train
from eqvision.viz_segmentation import draw_segmentation_batch, segmentation_batch

NAMES = ("background", *"0123456789")


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """What the command prints on standard error when it ends with code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


# A segmenter that is known to be right


class Threshold(eqx.Module):
    """Dark pixels are of class 0, light ones of class 1; the last class has the highest logit, and no name."""

    shapes: list = eqx.field(static=True)  # of the batches that it was traced for

    def __call__(self, inputs, state, *, train=False, key=None):
        self.shapes.append(inputs.shape)
        light = inputs.mean(axis=-1) - 0.5
        return jnp.stack([-light, light, light - 9, light + 9], axis=-1).astype(jnp.float32), state


def threshold(**data) -> SegmenterRun:
    options = {"mean": (0.0,), "std": (1.0,), **data}
    config = SegmentationConfig(model=SegmenterConfig(in_channels=3), data=SegmentationDataConfig(**options))
    model, state = eqx.nn.make_with_state(lambda: Threshold([]))()
    return SegmenterRun(config, ("night", "day", "dusk"), model, state, 0)


SHAPES = {"a.png": (60, 100), "b.png": (40, 50), "c.png": (64, 101), "d.png": (30, 30)}


@pytest.fixture
def pictures(tmp_path):
    """Black, with a white box; and where the boxes are."""
    truths = {}
    for name, (height, width) in SHAPES.items():
        truths[tmp_path / name] = np.zeros((height, width), np.uint8)
        truths[tmp_path / name][height // 3 : height - 5, width // 5 : width // 2] = 1
        Image.fromarray(255 * truths[tmp_path / name]).save(tmp_path / name)
    return truths


def test_labels_have_the_size_of_the_file_and_one_program_serves_a_padded_shape(pictures):
    run = threshold()
    for found, (path, truth) in zip(label_pixels(run, list(pictures)), pictures.items(), strict=True):
        assert found.path == path
        np.testing.assert_array_equal(found.labels, truth)
        np.testing.assert_allclose(found.shares, [(truth == 0).mean(), truth.mean(), 0])
    assert sorted(run.model.shapes) == [(1, 32, 32, 3), (1, 40, 56, 3), (1, 64, 104, 3)]


@pytest.mark.parametrize("stride", [None, (16, 24)])
def test_windows_of_one_shape_serve_images_of_any_size(stride, pictures):
    run = threshold()
    windows = Windows((32, 48), stride, 3)
    for found, truth in zip(label_pixels(run, list(pictures), windows=windows), pictures.values(), strict=True):
        np.testing.assert_array_equal(found.labels, truth)
    assert run.model.shapes == [(3, 32, 48, 3)]


@pytest.mark.parametrize("data", [{"transform": "fixed", "size": (32, 64)}, {"transform": "crop", "shortest": 32}])
def test_labels_of_resized_images_are_the_argmax_at_the_size_of_the_file(data, pictures):
    """Logits are brought to that size, not labels: compared with a model that is written out here."""
    run, path = threshold(**data), next(iter(pictures))
    found = next(label_pixels(run, [path]))
    image = np.asarray(Image.open(path).convert("RGB"))
    small = move_image(image, eval_plan(run.config.data).transform.plan(image.shape[:2], np.random.default_rng(0)))
    light = small.mean(axis=-1) / 255 - 0.5
    logits = restored_logits(np.stack([-light, light], axis=-1).astype(np.float32), small.shape[:2], image.shape[:2])
    assert small.shape[0] == 32
    np.testing.assert_array_equal(found.labels, logits.argmax(axis=-1))


def test_what_is_written(pictures, tmp_path):
    run, path = threshold(), next(iter(pictures))
    found = next(label_pixels(run, [path]))
    files = [draw_labelled(run, found, tmp_path / "out") for _ in range(2)]
    assert [file.name for pair in files for file in pair] == ["a.png", "a_labels.png", "a_2.png", "a_2_labels.png"]
    with Image.open(files[0][1]) as labels:
        assert labels.mode == "L"
        np.testing.assert_array_equal(np.asarray(labels), pictures[path])
    with Image.open(files[0][0]) as drawn:
        assert drawn.width == 400  # enlarged, so that it can be seen
        assert drawn.height > 240  # the legend is below


def test_windows_and_images_that_cannot_be(tmp_path, pictures):
    run, path = threshold(), next(iter(pictures))
    with pytest.raises(
        ValueError, match=r"stride=\(40, 8\) for windows of \(32, 48\) pixels; expected 1 to the window"
    ):
        label_pixels(run, [path], windows=Windows((32, 48), (40, 8)))
    with pytest.raises(ValueError, match=r"window=\(0, 48\), 4 at once; expected 1 pixel or more"):
        label_pixels(run, [path], windows=Windows((0, 48)))
    with pytest.raises(FileNotFoundError, match=r"no image file at .*none\.png"):
        label_pixels(run, [path, tmp_path / "none.png"])


# Run folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run as training leaves it, with an untrained model that has more outputs than the data classes."""
    path = tmp_path_factory.mktemp("segmenter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        toy_segmentation.install(patch)
        config = toy_segmentation.toy_config(path)
        RunFolder(path).open_for_training(config, NAMES, 12)
        optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, 1e-3, 6))
        state = first_state(*build_segmenter(config, 12), config, optimizer, make_mesh(num_devices=1))
        with Checkpoints(path / "checkpoints") as checkpoints:
            checkpoints.save(3, state, Record(3))
        (path / "metrics.jsonl").write_text(json.dumps({"step": 3, "test/mean_iou": 0.25}) + "\n")
    return path


@pytest.fixture
def toys(monkeypatch):
    toy_segmentation.install(monkeypatch)


def test_a_run_says_what_it_is(folder, toys, capsys):
    cli.main(["info", str(folder)])
    text = capsys.readouterr().out
    assert text == describe_run(folder) + "\n"
    assert f"{folder}: a run of the segmenter toy_unet, 32x48x1, 12 classes\n" in text
    assert "  checkpoint      step 3\n  last test       mean_iou 0.2500\n" in text
    assert "  classes         background, 0, 1" in text
    assert "  parameters by part\n" in text
    message = refused(capsys, "info", str(folder), "--image-size", "64")
    assert f"--image-size 64 is for models of the zoo; the run {folder} has its own" in message
    assert "runs/none is not a run folder" in refused(capsys, "info", "runs/none")


def test_refused_by_the_command_line(folder, capsys):
    def predict(*arguments):
        return refused(capsys, "predict", *arguments)

    run = str(folder)
    why = f"is for classifiers and detectors, and {run} is a segmenter"
    assert f"--threshold 0.5 {why}" in predict(run, "a.png", "--threshold", "0.5")
    assert f"--top 2 {why}" in predict(run, "a.png", "--top", "2")
    assert f"--json x.json {why}" in predict(run, "a.png", "--json", "x.json")
    assert "--stride 8 8 is of a segmenter for --window, which is missing" in predict(
        run, "a.png", "--stride", "8", "8"
    )
    assert "--batch-size 2 is of a segmenter for --window" in predict(run, "a.png", "--batch-size", "2")
    assert "--masks one is for models that take prompts" in predict(run, "a.png", "--masks", "one")
    for other in ("resnet18", "detr_r50", "sam_vit_b"):
        message = predict(other, "a.png", "--window", "32", "32")
        assert f"--window 32 32 is for runs of segmenters, and {other} is none" in message
    assert "unet_small is a segmenter, and published weights are used for classifiers" in predict("unet_small", "a.png")
    message = refused(capsys, "eval", run, "--evaluator", "knn", "few_shot")
    assert f"--evaluator knn few_shot is for classifiers, and {run} is a segmenter" in message
    message = refused(capsys, "eval", "unet_small", "--data-path", "x")
    assert "unet_small is a segmenter, and published weights are evaluated for classifiers only" in message
    message = refused(capsys, "viz", "attention", run, "x.png")
    assert f"{run} is a run of the segmenter toy_unet, and this takes runs of image classifiers" in message
    message = refused(capsys, "export", run, "--format", "safetensors", "--out", "x")
    assert f"{run} is a run of the segmenter toy_unet, and this takes runs of classifiers and detectors" in message
    message = refused(capsys, "export", "unet_small", "--format", "safetensors", "--out", "x")
    assert "unet_small is a segmenter, and models are exported of classifiers and detectors" in message


def test_a_run_of_another_kind_is_refused(folder, tmp_path):
    from toy import toy_config
    from toy_detection import toy_config as detection_config

    with pytest.raises(RunFolderError, match="is a run of the segmenter toy_unet, and this takes detectors"):
        RunFolder(folder).detection()
    for name, config in (("c", toy_config(tmp_path, tmp_path)), ("d", detection_config(tmp_path))):
        RunFolder(tmp_path / name).open_for_training(config, NAMES, 11)
    with pytest.raises(RunFolderError, match="is a run of the classifier small_cnn, and this takes segmenters"):
        load_segmenter_run(tmp_path / "c")
    with pytest.raises(RunFolderError, match="is a run of the detector toy_deformable, and this takes segmenters"):
        load_segmenter_run(tmp_path / "d")


def test_other_classes_are_not_evaluated(folder, tmp_path, monkeypatch):
    """Without names, values are what the run has learnt them as; names must be the same."""
    write_folder(tmp_path / "data", "val", [0, 3])
    (tmp_path / "data" / "classes.txt").write_text("sky\nroad\n")
    toy_segmentation.install(monkeypatch, sources=None)
    with pytest.raises(ValueError, match=r"has the classes sky, road, and the run has background, 0, 1, 2, 3 \.\.\.; "):
        evaluate_segmenter_run(folder, data_path=str(tmp_path / "data"), split="val")


@pytest.mark.slow
def test_a_run_is_used(folder, toys, tmp_path, capsys):
    """What ``eqvision predict`` prints and writes, with the model itself beside it; classes without a name are none."""
    scene = Image.fromarray(toy_segmentation.VoidScenes("test")[0].image[..., 0]).resize((70, 50))
    scene.save(tmp_path / "scene.png")
    cli.main(["predict", str(folder), "scene.png", "--out", "out"])
    lines = capsys.readouterr().out.splitlines()
    run = load_segmenter_run(folder)
    small = np.asarray(scene.resize((48, 32), Image.Resampling.BILINEAR))[None, :, :, None]
    logits = toy_segmentation.logits_of(run.model, run.stats, small)
    expected = restored_logits(logits[0, ..., :11], (32, 48), (50, 70)).argmax(axis=-1)
    labels = np.asarray(Image.open("out/scene_labels.png"))
    assert (labels != expected).mean() < 1e-3  # logits that are equal but for rounding
    seen, counts = np.unique(labels, return_counts=True)
    assert lines[0] == f"scene.png: 50x70, {len(seen)} of 11 classes  -> out/scene.png out/scene_labels.png"
    shares = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert shares == {NAMES[k]: f"{count / labels.size:.1%}" for k, count in zip(seen, counts, strict=True)}
    assert [float(share[:-1]) for share in shares.values()] == sorted(map(float, (s[:-1] for s in shares.values())))[
        ::-1
    ]
    assert Path("out/scene.png").exists()
    cli.main(["predict", str(folder), "scene.png", "--window", "32", "32", "--out", "slid"])
    assert np.asarray(Image.open("slid/scene_labels.png")).shape == (50, 70)


@pytest.mark.slow
def test_evaluation_gives_the_figures_of_training(tmp_path, toys, capsys):
    result = train(toy_segmentation.toy_config(tmp_path / "run"))
    metrics = evaluate_segmenter_run(tmp_path / "run")  # on eight devices, where the run had one
    assert metrics.pop("test/loss") == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert metrics == {f"test/{name}": value for name, value in result.metrics.items() if name != "loss"}
    cli.main(["eval", str(tmp_path / "run")])
    assert f"test/mean_iou {result.metrics['mean_iou']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_evaluated_on_other_images(folder, tmp_path, monkeypatch):
    """A folder without names of classes: values are the run's classes, void where a label says so."""
    toy_segmentation.install(monkeypatch, sources=None)
    write_folder(tmp_path / "data", "val", [0, 3, 255], size=(32, 48))
    metrics = evaluate_segmenter_run(folder, data_path=str(tmp_path / "data"), split="val")
    run, right = load_segmenter_run(folder), []
    for name, label in (("0", 0), ("1", 3)):
        found = next(label_pixels(run, [tmp_path / "data" / "val" / f"{name}.png"]))
        right.append((found.labels == label).mean())
    assert metrics["test/pixel_accuracy"] == pytest.approx(np.mean(right), abs=1e-3)


# Training batches


def test_the_picture_of_a_batch_shows_what_the_stream_gives(toys, tmp_path):
    config = toy_segmentation.toy_config(tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, transform="crop", scale=(0.5, 0.8)))
    batch = segmentation_batch(config, step=3, count=5)
    stream = set_up(config).problem.stream(2)
    expected = next(stream)
    stream.close()
    np.testing.assert_array_equal(batch.images, expected.images[:5])
    np.testing.assert_array_equal(batch.labels, expected.labels[:5])
    np.testing.assert_array_equal(batch.sizes, expected.size[:5])
    assert (batch.size, batch.class_names) == (8, NAMES)
    assert len({tuple(size) for size in batch.sizes.tolist()}) > 1
    assert "digit scenes/train" in batch.descriptions[0]
    drawn = np.asarray(Image.open(draw_segmentation_batch(batch, tmp_path / "batch.png", "a title")))
    assert drawn.shape[1] == 4 * 336 + 5 * 12
    with pytest.raises(ValueError, match="step=0, count=5"):
        segmentation_batch(config, step=0, count=5)


def test_the_command_draws_a_batch(toys, tmp_path, capsys):
    cli.main(["viz", "data", "digits_segmentation", "--model.name", "toy_unet", "--count", "2", "--out", "b.png"])
    assert capsys.readouterr().out == "b.png\n"
    assert Image.open("b.png").width > 600
