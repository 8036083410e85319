"""The run folder and its files; the configuration as data; what opening a folder refuses."""

import csv
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from toy import NAMES, toy_config, with_loop, with_optimizer, write_npz

import eqvision.train as train_module
from eqvision import list_models
from eqvision.mesh import make_mesh
from eqvision.optim import make_schedule
from eqvision.pretraining import MAES
from eqvision.recipes import (
    RECIPES,
    DataConfig,
    DetectionConfig,
    LoopConfig,
    MaskedConfig,
    PromptedConfig,
    SegmentationConfig,
    TrainConfig,
    difference,
    from_dict,
    to_dict,
)
from eqvision.run_folder import MetricLog, RunFolder, RunFolderError, read_rows
from eqvision.tasks import make_task
from eqvision.train import train


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def opened(tmp_path):
    """A run folder that has just been opened for training."""
    config = toy_config(tmp_path / "run", tmp_path / "toy.npz")
    folder = RunFolder(config.out)
    folder.open_for_training(config, NAMES, 3)
    return config, folder


# Opening


def test_config_yaml_holds_the_configuration_and_what_determines_numbers(opened):
    config, folder = opened
    stored = yaml.safe_load(folder.config_file.read_text())
    assert from_dict(TrainConfig, stored["config"]) == config
    assert stored["config"]["loop"]["batch_size"] == 16
    assert stored["num_classes"] == 3
    assert stored["class_names"] == list(NAMES)
    assert {"python", "eqvision", "jax", "jaxlib", "equinox", "optax", "grain", "numpy"} <= stored["versions"].keys()
    assert stored["git"] is None or re.fullmatch("[0-9a-f]{40}", stored["git"])
    assert list(folder.path.iterdir()) == [folder.config_file]  # no temporary file is left


def test_reading_back(opened):
    config, folder = opened
    assert folder.config() == config
    assert folder.class_names() == NAMES


def test_the_same_configuration_opens_again_and_changes_nothing(opened):
    config, folder = opened
    before = contents(folder.path)
    folder.open_for_training(config, NAMES, 3)
    assert contents(folder.path) == before


def test_a_moved_run_folder_is_the_same_run(opened, tmp_path):
    config, folder = opened
    moved = folder.path.rename(tmp_path / "moved")
    RunFolder(moved).open_for_training(dataclasses.replace(config, out=str(moved)), NAMES, 3)


def test_another_configuration_is_refused_with_the_differences(opened):
    config, folder = opened
    MetricLog(folder).write(20, {"train/loss": 1.0})
    other = with_optimizer(with_loop(config, batch_size=32), learning_rate=0.5)
    with pytest.raises(RunFolderError) as caught:
        folder.open_for_training(other, NAMES, 3)
    message = str(caught.value)
    assert "loop.batch_size: 16 -> 32" in message
    assert "optimizer.learning_rate: 0.003 -> 0.5" in message
    assert "momentum" not in message  # only what differs
    assert "--out" in message


def test_a_run_that_failed_before_its_first_row_can_be_started_with_other_options(opened):
    config, folder = opened
    other = with_optimizer(config, learning_rate=0.5)
    folder.open_for_training(other, NAMES, 3)
    assert folder.config().optimizer.learning_rate == 0.5


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark and stormy night")
    before = contents(tmp_path)
    config = toy_config(tmp_path / "thesis", tmp_path)
    with pytest.raises(RunFolderError, match=r"thesis is not empty and holds no config\.yaml.*--out"):
        RunFolder(config.out).open_for_training(config, NAMES, 3)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    config = toy_config(tmp_path / "run", tmp_path)
    RunFolder(config.out).open_for_training(config, NAMES, 3)
    assert (tmp_path / "run" / "config.yaml").exists()


def test_reading_what_is_no_run_folder(tmp_path):
    with pytest.raises(RunFolderError, match=r"is not a run folder: there is no .*config\.yaml"):
        RunFolder(tmp_path).config()


@pytest.mark.slow
def test_training_into_a_folder_of_another_run_changes_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))
    config = with_loop(toy_config(tmp_path / "run", write_npz(tmp_path / "toy.npz")), epochs=1.0)
    train(config)
    before = contents(tmp_path)
    for other in (with_optimizer(config, learning_rate=1.0), dataclasses.replace(config, seed=7)):
        with pytest.raises(RunFolderError, match="another configuration"):
            train(other)
        assert contents(tmp_path) == before


def test_training_into_a_folder_that_is_no_run_changes_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))
    config = toy_config(tmp_path / "run", write_npz(tmp_path / "toy.npz"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match="so it is not a run folder"):
        train(config)
    assert contents(tmp_path) == before


# Metrics


def table(folder):
    with folder.metrics_csv.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_go_to_both_files(opened):
    _, folder = opened
    log = MetricLog(folder)
    log.write(10, {"train/loss": 0.1})
    log.write(20, {"train/loss": 1 / 3})
    assert table(folder) == [{"step": "10", "train/loss": "0.1"}, {"step": "20", "train/loss": repr(1 / 3)}]
    assert read_rows(folder) == [{"step": 10, "train/loss": 0.1}, {"step": 20, "train/loss": 1 / 3}] == log.rows


def test_a_metric_that_is_not_defined_is_null_in_json(opened):
    """Which has no NaN: another reader than Python's would refuse the line."""
    _, folder = opened
    MetricLog(folder).write(1, {"test/APs": math.nan, "test/AP": 0.5})
    assert folder.metrics_jsonl.read_text() == '{"step": 1, "test/APs": null, "test/AP": 0.5}\n'
    (row,) = read_rows(folder)
    assert math.isnan(row["test/APs"])
    assert table(folder) == [{"step": "1", "test/APs": "nan", "test/AP": "0.5"}]


def test_values_of_one_step_share_a_row_and_new_names_get_a_column(opened):
    _, folder = opened
    log = MetricLog(folder)
    log.write(1, {"train/loss": 2.0})
    log.write(2, {"train/loss": 1.5})
    log.write(2, {"test/accuracy": 0.25})
    log.write(3, {"train/loss": 1.0})
    lines = folder.metrics_csv.read_text().splitlines()
    assert lines == ["step,train/loss,test/accuracy", "1,2.0,", "2,1.5,0.25", "3,1.0,"]
    assert [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()] == log.rows


def test_appending_gives_the_bytes_of_writing_anew(opened):
    _, folder = opened
    log = MetricLog(folder)
    for step in range(1, 6):
        log.write(step, {"train/loss": 1 / step, "train/epoch": step / 7})
    before = contents(folder.path)
    MetricLog(folder, resume_step=5)
    assert contents(folder.path) == before


def test_rows_behind_the_restored_step_are_dropped(opened):
    _, folder = opened
    log = MetricLog(folder)
    for step in (2, 4, 6, 8):
        log.write(step, {"train/loss": float(step)})
    resumed = MetricLog(folder, resume_step=4)
    assert [row["step"] for row in resumed.rows] == [2, 4]
    resumed.write(6, {"train/loss": 0.5})
    assert table(folder)[-1] == {"step": "6", "train/loss": "0.5"}
    assert [row["step"] for row in read_rows(folder)] == [2, 4, 6]


def test_a_row_cut_off_by_a_kill_does_not_stop_the_next_start(opened):
    _, folder = opened
    log = MetricLog(folder)
    log.write(2, {"train/loss": 2.0})
    log.write(4, {"train/loss": 1.0})
    whole = folder.metrics_jsonl.read_text()
    for cut in range(1, len('{"step": 4, "train/loss": 1.0}\n')):
        folder.metrics_jsonl.write_text(whole[:-cut])
        assert read_rows(folder) == [{"step": 2, "train/loss": 2.0}], cut


def test_no_metrics_yet(opened):
    assert read_rows(opened[1]) == []


# The configuration as data


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_survives_being_written_and_read(name):
    config = RECIPES[name]()
    kind = type(config)
    assert from_dict(kind, to_dict(config)) == config
    text = yaml.safe_dump(to_dict(config))
    assert from_dict(kind, yaml.safe_load(text)) == config
    assert difference(to_dict(config), yaml.safe_load(text)) == []


def test_tuples_and_small_numbers_survive_yaml():
    config = TrainConfig(data=DataConfig(mean=(0.1, 0.2, 1e-7)), seed=2**32 - 1)
    config = with_optimizer(config, learning_rate=1e-05, clip_norm=None)
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_missing_fields_take_their_defaults():
    assert from_dict(TrainConfig, {"loop": {"batch_size": 8}}) == TrainConfig(loop=LoopConfig(batch_size=8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "TrainConfig has no field sed: sed does not exist; nearest: seed"),
        (
            {"loop": {"batchsize": 8, "epoch": 1}},
            "LoopConfig has no field batchsize, epoch: loop.batchsize does not exist",
        ),
    ],
)
def test_an_unknown_field_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)


def test_an_unknown_field_in_config_yaml_is_refused(opened):
    _, folder = opened
    folder.config_file.write_text(folder.config_file.read_text().replace("batch_size: 16", "batch_sise: 16", 1))
    with pytest.raises(ValueError, match="LoopConfig has no field batch_sise"):
        folder.config()


def test_difference():
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 3}
    new = {"a": 1, "b": {"c": [1, 3], "d": 0.5}, "new": 4}
    expected = ["b.c: [1, 2] -> [1, 3]", "b.d: None -> 0.5", "gone: 3 -> absent", "new: absent -> 4"]
    assert difference(old, new) == expected
    assert difference(old, old) == []


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_build_and_say_how_to_run_them(name):
    config = RECIPES[name]()
    if isinstance(config, TrainConfig):
        assert config.model.name in list_models()
        make_task(config.task.kind, config.task.loss, config.task.label_smoothing)
    elif isinstance(config, MaskedConfig):
        assert config.model.name in MAES
    else:
        kinds = {DetectionConfig: "detector", SegmentationConfig: "segmenter", PromptedConfig: "prompted"}
        assert config.model.name in list_models(kind=kinds.get(type(config), "language"))
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 1000)
    assert float(schedule(config.schedule.warmup_steps)) == pytest.approx(config.optimizer.learning_rate)
    assert re.search(rf"^ *Command: eqvision train {name}\b", RECIPES[name].__doc__, re.MULTILINE)


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1
