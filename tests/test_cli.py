"""The command line: every command, its help, its errors, and how little it imports."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from toy import NAMES, toy_images, toy_labels, write_folder, write_npz

import eqvision.predict as predict_module
import eqvision.train as train_module
from eqvision import cli, list_models
from eqvision.commands import train as train_command
from eqvision.mesh import make_mesh
from eqvision.recipes import RECIPES


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    """No restart of the test process, no listings in the home folder, wide help, runs in a folder of the test."""
    monkeypatch.setenv("EQVISION_ALLOCATOR", "default")
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("EQVISION_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))


TINY = [
    "--model.name=small_cnn",
    "--model.image-size=8",
    "--optimizer.name=adamw",
    "--optimizer.learning-rate=3e-3",
    "--schedule.warmup-steps=2",
    "--loop.batch-size=6",
    "--loop.eval-batch-size=6",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of 18 training and 9 test images of three classes, made by the command line."""
    root = tmp_path_factory.mktemp("cli")
    images, run = write_folder(root / "images"), root / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQVISION_ALLOCATOR", "default")
        patch.setenv("EQVISION_CACHE", str(root / "cache"))
        patch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))
        cli.main(["train", "folder", f"--data.path={images}", f"--out={run}", "--loop.epochs=8", *TINY])
    return images, run


def refused(capsys, *arguments: str) -> str:
    """What the command prints on standard error when it ends with code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


# train


def test_train_prints_metrics_and_the_run_folder(tmp_path, two_devices, capsys):
    cli.main(["train", "digits", "--out=here", "--loop.epochs=0.1", "--loop.eval-batch-size=128", *TINY[:2]])
    printed = capsys.readouterr()
    assert "test/accuracy 0." in printed.out
    assert printed.out.endswith("run folder: here\n")
    assert "step 2/2" in printed.err
    assert "data wait" in printed.err
    assert (tmp_path / "here" / "config.yaml").exists()


def test_the_default_run_folder_bears_the_name_of_the_recipe(tmp_path, two_devices, monkeypatch):
    configs = []

    def train(config):
        configs.append(config)
        return train_module.Result(Path(config.out), 0, {}, 0)

    monkeypatch.setattr(train_module, "train", train)
    cli.main(["train", "digits", "--seed", "3"])
    assert configs == [dataclasses.replace(RECIPES["digits"](), out="runs/digits", seed=3)]


def test_train_alone_lists_the_recipes(capsys):
    for arguments in (["train"], ["train", "--help"]):
        cli.main(arguments)
        printed = capsys.readouterr().out
        assert all(f"  {name}" in printed for name in RECIPES)


def test_an_unknown_recipe_names_the_nearest(capsys):
    assert "recipe 'digit' does not exist; nearest: digits" in refused(capsys, "train", "digit")


def test_a_misspelt_option_is_refused_with_a_suggestion(capsys):
    error = refused(capsys, "train", "digits", "--loop.batchsize", "8")
    assert "--loop.batchsize" in error
    assert "--loop.batch-size" in error


def test_an_impossible_value_is_refused(capsys):
    error = refused(capsys, "train", "digits", "--task.kind", "multilabel")
    assert "multi_label" in error


def test_errors_of_the_input_are_printed_without_a_trace(tmp_path, two_devices, capsys):
    assert "--data.path PATH" in refused(capsys, "train", "folder")
    error = refused(capsys, "train", "folder", "--data.path", "nowhere", *TINY)
    assert error.startswith("error: ")
    assert f"image folder {tmp_path / 'nowhere'} does not exist" in error
    assert "Traceback" not in error
    error = refused(capsys, "train", "digits", "--model.name", "smal_cnn")
    assert "model 'smal_cnn' does not exist; nearest: small_cnn" in error
    assert not (tmp_path / "runs").exists()


def test_a_trace_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("EQVISION_TRACEBACK", "1")
    with pytest.raises(ValueError, match="needs a path"):
        cli.main(["train", "folder"])


def test_a_key_error_is_printed_as_its_message(tmp_path, capsys):
    np.savez(tmp_path / "odd.npz", pictures=np.zeros((2, 8, 8, 1), np.uint8))
    error = refused(capsys, "train", "arrays", "--data.path=odd.npz")
    assert error.startswith(f"error: {tmp_path / 'odd.npz'} has no images for split 'train': it has pictures")


def test_another_configuration_in_the_same_folder_is_refused(trained, two_devices, capsys):
    images, run = trained
    error = refused(capsys, "train", "folder", f"--data.path={images}", f"--out={run}", "--loop.epochs=9", *TINY)
    assert "loop.epochs: 8.0 -> 9.0" in error


def test_a_corrupt_image_is_named(tmp_path, two_devices, capsys):
    images = write_folder(tmp_path / "images")
    broken = images / "train" / "cat" / "1.jpg"
    broken.write_bytes(b"")
    error = refused(capsys, "train", "folder", f"--data.path={images}", "--out=run", *TINY)
    assert f"corrupt image {broken}: the file is empty" in error


# eval


def metrics_in(printed: str) -> dict[str, float]:
    lines = (line.split() for line in printed.splitlines() if line.startswith("test/"))
    return {name: float(value) for name, value in lines}


def test_eval_repeats_the_last_evaluation_of_the_run(trained, capsys):
    _, run = trained
    cli.main(["eval", str(run)])  # on eight devices, which 6 examples to a batch cannot share
    found = metrics_in(capsys.readouterr().out)
    stored = json.loads((run / "result.json").read_text())
    assert found == pytest.approx(stored, abs=1e-4)
    assert found["test/accuracy"] > 0.9


def test_eval_on_another_split_and_another_folder(trained, tmp_path, capsys):
    _, run = trained
    cli.main(["eval", str(run), "--split", "train"])
    assert metrics_in(capsys.readouterr().out)["test/accuracy"] > 0.9
    other = write_folder(tmp_path / "other")
    for name in ("ant", "bee"):  # only cats are left; their label is still 2
        for file in (other / "test" / name).iterdir():
            file.unlink()
        (other / "test" / name).rmdir()
    cli.main(["eval", str(run), "--data-path", str(other)])
    assert metrics_in(capsys.readouterr().out)["test/accuracy"] > 0.9


def test_eval_of_a_class_that_the_run_does_not_know(trained, tmp_path, capsys):
    _, run = trained
    other = write_folder(tmp_path / "other")
    (other / "test" / "bee").rename(other / "test" / "dog")
    error = refused(capsys, "eval", str(run), "--data-path", str(other))
    assert "dog is not among the 3 class_names" in error


def test_eval_of_labels_outside_the_head(tmp_path, two_devices, capsys):
    npz = write_npz(tmp_path / "toy.npz")
    grey = ["--model.in-channels=1", "--loop.epochs=1", *TINY]
    cli.main(["train", "arrays", f"--data.path={npz}", "--out=run", *grey])
    np.savez(tmp_path / "more.npz", x_test=toy_images(toy_labels(8)), y_test=toy_labels(8) + 2)
    error = refused(capsys, "eval", "run", "--data-path", str(tmp_path / "more.npz"))
    assert "label 3 in row 1" in error
    assert "the head has 3 classes" in error


def test_eval_and_predict_of_what_is_no_run(tmp_path, capsys):
    assert "is not a run folder" in refused(capsys, "eval", str(tmp_path))
    assert "is not a run folder" in refused(capsys, "predict", str(tmp_path), "image.png")


def test_a_run_without_a_checkpoint_is_explained(trained, tmp_path, capsys):
    _, run = trained
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "holds no checkpoint yet" in refused(capsys, "eval", str(tmp_path / "young"))


# predict


def test_predict_prints_labels_and_draws_them(trained, tmp_path, capsys):
    images, run = trained
    files = [images / "test" / name / "0.png" for name in NAMES]
    cli.main(["predict", str(run), *map(str, files), "--out", "pictures"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, file, name in zip(lines, files, NAMES, strict=True):
        assert line.startswith((f"{file}: {name} 0.", f"{file}: {name} 1."))
    # three inputs of one name: three pictures
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["0.png", "0_2.png", "0_3.png"]
    with Image.open("pictures/0.png") as picture, Image.open(files[0]) as original:
        assert picture.format == "PNG"
        factor = 256 // 12
        assert picture.height > 12 * factor  # the labels stand on a strip below
        left = (picture.width - 12 * factor) // 2
        assert picture.getpixel((left + factor // 2, factor // 2)) == original.getpixel((0, 0))


def test_probabilities_are_those_of_all_classes(trained):
    images, run = trained
    loaded = predict_module.load_run(run)
    files = sorted((images / "test" / "bee").iterdir())
    for prediction in predict_module.predict(loaded, files, top=5, batch_size=2):
        assert sorted(prediction.labels) == list(NAMES)
        assert sum(prediction.scores) == pytest.approx(1, abs=1e-5)
        assert list(prediction.scores) == sorted(prediction.scores, reverse=True)


def test_predictions_do_not_depend_on_the_batch(trained):
    images, run = trained
    loaded = predict_module.load_run(run)
    files = sorted((images / "test").rglob("*.*"))
    one, other = (predict_module.predict(loaded, files, batch_size=size) for size in (2, 32))
    for a, b in zip(one, other, strict=True):
        assert (a.path, a.labels) == (b.path, b.labels)
        assert a.scores == pytest.approx(b.scores, abs=1e-5)


def test_predict_shows_as_many_classes_as_asked_for_in_the_run_folder(trained, capsys):
    images, run = trained
    cli.main(["predict", str(run), str(images / "test" / "ant" / "1.jpg"), "--top", "1"])
    printed = capsys.readouterr().out
    assert printed.count("ant ") == 1
    assert "bee" not in printed
    assert (run / "predictions" / "1.png").exists()


def test_predict_refuses_what_is_no_image(trained, tmp_path, capsys):
    images, run = trained
    good = str(images / "test" / "ant" / "0.png")
    (tmp_path / "text.png").write_text("no image")
    out = ["--out", "pictures"]
    assert f"no image file at {tmp_path / 'gone.png'}" in refused(capsys, "predict", str(run), good, "gone.png", *out)
    assert f"no image file at {tmp_path}, which is a folder" in refused(capsys, "predict", str(run), ".", *out)
    assert f"corrupt image {tmp_path / 'text.png'}" in refused(capsys, "predict", str(run), good, "text.png", *out)
    assert not Path("pictures").exists()
    assert "name at least one image" in refused(capsys, "predict", str(run))


def test_a_regression_is_not_drawn_as_percentages(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **options: drawn.append(text))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    outputs = predict_module.Prediction(tmp_path / "image.png", ("output 0", "output 1"), (1.5, -2.0), False)
    predict_module.draw(outputs, tmp_path / "out")
    classes = predict_module.Prediction(tmp_path / "image.png", ("ant",), (0.25,))
    predict_module.draw(classes, tmp_path / "out")
    assert drawn == ["output 0  1.5", "output 1  -2", "ant  25.0%"]


# info and list


def test_info(capsys):
    cli.main(["info", "resnet20_cifar", "--image-size", "32", "--num-classes", "10"])
    printed = capsys.readouterr().out
    assert printed.startswith("resnet20_cifar, 32x32x3, 10 classes\n")
    # He et al. 2016, table 6: 0.27 M; 269,722 without the projections, which the paper does not use on CIFAR
    assert "0.041 G" in printed
    assert "multiply-adds" in printed


def test_info_of_an_unknown_model(capsys):
    assert "model 'vit_b17' does not exist; nearest: vit_b1" in refused(capsys, "info", "vit_b17")


def test_list(capsys):
    cli.main(["list"])
    assert capsys.readouterr().out.split() == list_models()
    cli.main(["list", "resnet*_cifar"])
    found = capsys.readouterr().out.split()
    assert found == sorted(f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110))


def test_list_and_info_of_detectors(capsys):
    cli.main(["list", "detr_*", "--kind", "detector"])
    assert capsys.readouterr().out.splitlines()[:2] == ["detr_r101", "detr_r101_dc5"]
    message = refused(capsys, "list", "detr_r55", "--kind", "detector")
    assert "detector 'detr_r55' does not exist; nearest: detr_r" in message
    cli.main(["info", "detr_r50", "--image-size", "64"])
    assert capsys.readouterr().out.startswith("detr_r50, 64x64x3, 91 classes\n  parameters      41,631,008 ")


def test_a_detector_is_not_trained_by_a_classifiers_recipe(tmp_path, capsys):
    data, out = write_npz(tmp_path / "data.npz"), tmp_path / "run"
    command = ("train", "arrays", "--data.path", str(data), "--model.name", "detr_r50", "--out", str(out))
    assert "model 'detr_r50' is a detector" in refused(capsys, *command)
    assert not out.exists()


def test_list_of_nothing_names_the_nearest(capsys):
    assert "model 'resnet21_cifar' does not exist; nearest: resnet" in refused(capsys, "list", "resnet21_cifar")


# help


def options_of(section, prefix: str = "") -> list[str]:
    """Of a configuration as it is: which fields a section has may depend on the recipe."""
    names = []
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name.replace('_', '-')}", getattr(section, field.name)
        names += options_of(value, f"{name}.") if dataclasses.is_dataclass(value) else [f"--{name}"]
    return names


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_help_of_a_recipe_mentions_every_option_with_its_default(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # in one column of boxes
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", recipe, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    config = RECIPES[recipe]()
    options = options_of(config)
    assert len(options) > 35
    assert [option for option in options if not re.search(rf"{option}[ ,]", printed)] == []
    words = " ".join(printed.replace("│", " ").split())  # lines may break anywhere
    assert f"(default: {config.optimizer.learning_rate})" in words
    assert f"Command: eqvision train {recipe}" in words


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("eval", ["--data-path", "--split", "Run folder"]),
        ("predict", ["--out", "--top", "Run folder", "Image files"]),
        ("info", ["--image-size", "--num-classes", "--in-channels", "Name in the zoo"]),
        ("list", ["Shell pattern", "(default: '*')"]),
    ],
)
def test_help_of_a_command_mentions_every_option(command, options, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert [option for option in options if option not in printed] == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage_names_every_command_and_recipe(arguments, capsys):
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*cli.COMMANDS, *RECIPES])


def test_an_unknown_command_names_the_nearest(capsys):
    assert "command 'trian' does not exist; nearest: train" in refused(capsys, "trian")


# Processes of their own

HEAVY = ("grain", "orbax", "PIL", "matplotlib", "tqdm", "sklearn", "tensorboardX")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "EQVISION_ALLOCATOR"}
    root = str(Path(cli.__file__).parents[1])
    variables = {**clean, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import eqvision",
        "from eqvision.cli import main; main(['list', 'vit*'])",
        "from eqvision.cli import main; main(['info', 'resnet20_cifar'])",
        "import eqvision.data, eqvision.recipes, eqvision.train, eqvision.predict",
    ],
)
def test_heavy_packages_are_not_imported_before_they_are_needed(code):
    answer = python("-c", f"{code}\nimport sys\nprint('LOADED', [name for name in {HEAVY} if name in sys.modules])")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "LOADED []"


def test_python_m_eqvision_train_is_the_same_command(tmp_path):
    answer = python("-m", "eqvision.train", "folder", "--data.path", "nowhere", EQVISION_ALLOCATOR="default")
    assert answer.returncode == 2
    assert f"image folder {tmp_path / 'nowhere'} does not exist" in answer.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
@pytest.mark.parametrize("module", ["eqvision.train", "eqvision.cli"])
def test_a_cpu_run_starts_again_once_with_the_same_arguments(module, tmp_path):
    arguments = [*(["train"] if module == "eqvision.cli" else []), "folder", "--data.path", "no where"]
    answer = python("-m", module, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.count("starting again") == 1
    assert f"image folder {tmp_path / 'no where'} does not exist" in answer.stderr


class Replaced(BaseException):
    """Stands for the end of this process in ``os.execve``."""


@pytest.fixture
def execve(monkeypatch):
    """Records the calls of ``os.execve``, on what claims to be Linux."""
    calls = []

    def replace(program, arguments, environment):
        calls.append((program, arguments, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", replace)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["/somewhere/eqvision/train.py", "digits", "--seed", "1"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "eqvision.train", "digits", "--seed", "1"])
    monkeypatch.delenv("EQVISION_ALLOCATOR")
    return calls


def test_the_allocator_is_set_for_the_restart(execve, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(Replaced):
        train_command.tune_allocator()
    [(program, arguments, environment)] = execve
    assert program == sys.executable
    assert arguments == [sys.executable, "-m", "eqvision.train", "digits", "--seed", "1"]
    assert environment["EQVISION_ALLOCATOR"] == "tuned"
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert environment["PATH"] == os.environ["PATH"]


def test_what_the_user_has_set_for_the_allocator_stays(execve, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    with pytest.raises(Replaced):
        train_command.tune_allocator()
    assert execve[0][2]["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"


def test_a_program_that_calls_main_is_not_restarted(execve, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/notebook.py"])
    train_command.tune_allocator()
    assert execve == []


@pytest.mark.parametrize("value", ["tuned", "default"])
def test_there_is_no_second_restart(execve, monkeypatch, value):
    monkeypatch.setenv("EQVISION_ALLOCATOR", value)
    train_command.tune_allocator()
    assert execve == []


def test_other_platforms_and_devices_do_not_restart(execve, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        train_command.tune_allocator()
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    train_command.tune_allocator()
    assert execve == []
