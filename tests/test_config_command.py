"""``eqvision config``, ``--config FILE``, and what is refused in a file of options."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

import eqvision.train as train_module
from eqvision import cli
from eqvision.commands import train as train_command
from eqvision.commands.arguments import parse_recipe
from eqvision.recipes import RECIPES, LoopConfig, TrainConfig, from_dict, to_dict
from eqvision.recipes.serialise import overlay


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("EQVISION_TRACEBACK", raising=False)


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["config", *arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


# The command


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_what_is_printed_reads_back_as_the_same_configuration(recipe, capsys):
    options = [
        "--seed=7",
        "--optimizer.learning-rate=1e-5",
        "--optimizer.clip-norm=None",
        "--optimizer.freeze",
        "stem",
        "norm$",
        "--optimizer.weight-decays",
        "bias",
        "0",
        "--data.path=1e-5",
        "--loop.eval-every=5",
    ]
    kind = type(RECIPES[recipe]())
    options += ["--data.mixture", "süß", "0.25", "1e-5", "3"] if kind is TrainConfig else []
    config = from_dict(kind, yaml.safe_load(printed(capsys, recipe, *options)))
    assert config == parse_recipe([recipe, *options], "eqvision config")
    assert config.out == f"runs/{recipe}"
    assert (config.seed, config.loop.eval_every, config.optimizer.clip_norm) == (7, 5, None)
    assert config.optimizer.freeze == ("stem", "norm$")
    assert kind is not TrainConfig or config.data.mixture == {"süß": 0.25, "1e-5": 3.0}
    assert config.data.path == "1e-5"


def test_patterns_replace_those_of_the_recipe(capsys):
    given = ["digits_detr", "--optimizer.learning-rate-multipliers", "head", "10", "embed", "1e-1"]
    config = yaml.safe_load(printed(capsys, *given))
    assert config["optimizer"]["learning_rate_multipliers"] == {"head": 10.0, "embed": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [(["head"], "expected pairs of a name and a number, got 1 words: head"), (["head", "ten"], "convert .* 'ten'")],
)
def test_patterns_without_a_number_are_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["config", "digits", "--optimizer.weight-decays", *given])
    assert re.search(message, " ".join(capsys.readouterr().err.replace("│", "").split()))


def test_train_is_given_what_config_prints(capsys, monkeypatch):
    given = []
    monkeypatch.setattr(train_command, "tune_allocator", lambda: None)
    monkeypatch.setattr(train_module, "train", given.append)
    options = ["digits", "--loop.epochs", "3"]
    with pytest.raises(AttributeError):  # there is no result to print
        cli.main(["train", *options])
    assert given == [from_dict(TrainConfig, yaml.safe_load(printed(capsys, *options)))]


def test_alone_it_lists_the_recipes(capsys):
    for arguments in ([], ["--help"]):
        assert all(f"  {name}" in printed(capsys, *arguments) for name in RECIPES)


def test_help_tells_of_the_file(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["config", "digits", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--config FILE" in text
    assert "--loop.batch-size" in text


def test_unknown_recipes_and_options_are_refused(capsys):
    assert "recipe 'digit' does not exist; nearest: digits" in refused(capsys, "config", "digit")
    assert "--loop.batch-size" in refused(capsys, "config", "digits", "--loop.batchsize", "8")


# The file


def test_a_file_gives_defaults_and_the_command_line_wins(tmp_path, capsys):
    (tmp_path / "part.yaml").write_text(
        "seed: 5\nloop: {batch_size: 8, epochs: 2}\noptimizer:\n  learning_rate: 1e-3\n"
    )
    for form in (["--config", "part.yaml"], ["--config=part.yaml"]):
        config = parse_recipe(["digits", "--seed", "6", *form], "eqvision train")
        expected = dataclasses.replace(RECIPES["digits"](), out="runs/digits", seed=6)
        assert config.loop == dataclasses.replace(expected.loop, batch_size=8, epochs=2.0)
        assert config.optimizer == dataclasses.replace(expected.optimizer, learning_rate=1e-3)
        assert dataclasses.replace(config, loop=expected.loop, optimizer=expected.optimizer) == expected


def test_a_printed_configuration_is_such_a_file(tmp_path, capsys):
    text = printed(capsys, "folder", "--model.name", "vit_ti4", "--data.mean", "0.1", "0.2", "0.3", "--out", "there")
    (tmp_path / "whole.yaml").write_text(text)
    assert printed(capsys, "digits", "--config", "whole.yaml") == text


def test_the_config_yaml_of_a_run_is_such_a_file(tmp_path, capsys):
    config = dataclasses.replace(RECIPES["digits"](), seed=11, out="elsewhere")
    stored = {"config": to_dict(config), "num_classes": 10, "class_names": ["0"], "versions": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    assert from_dict(TrainConfig, yaml.safe_load(printed(capsys, "folder", "--config", "config.yaml"))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: {batchsize: 8}", "loop.batchsize does not exist; nearest: loop.batch_size, loop.eval_batch_size"),
        ("loop: {batch-size: 8}", "loop.batch-size does not exist; nearest: loop.batch_size"),
        ("sed: 1", "sed does not exist; nearest: seed"),
        ("loop: {batch_size: 8.5}", "loop.batch_size: expected a whole number, got float 8.5"),
        ("loop: {batch_size: true}", "loop.batch_size: expected a whole number, got bool True"),
        ("loop: {epochs: many}", "loop.epochs: expected a number, got str 'many'"),
        ("loop: {epochs: yes}", "loop.epochs: expected a number, got bool True"),
        ("loop: {epochs: null}", "loop.epochs: expected a number, got nothing"),
        ("loop: {eval_every: often}", "loop.eval_every: expected a whole number, got str 'often'"),
        ("loop:", "loop: expected a section of options, got nothing"),
        (
            "task: {kind: multilabel}",
            "task.kind: 'multilabel' is none of single_label, multi_label, regression; did yo",
        ),
        ("model: {remat: 3}", "model.remat: 3 is none of none, dots, full"),
        ("data: {mean: 0.5}", "data.mean: expected a list, such as [...], got float 0.5"),
        ("data: {mean: [0.5, x]}", "data.mean[1]: expected a number, got str 'x'"),
        (
            "eval: {evaluators: [kn]}",
            "eval.evaluators[0]: 'kn' is none of linear_probe, few_shot, knn; did you mean knn",
        ),
        ("data: {path: 12}", "data.path: expected text (in quotes, if it looks like something else), got int 12"),
        ("data: {mixture: [a]}", "data.mixture: expected names with values, such as {name: value}, got list ['a']"),
        ("data: {mixture: {a: b}}", "data.mixture[a]: expected a number, got str 'b'"),
        ("data: {mixture: {1: 2}}", "data.mixture (name): expected text"),
        ("log: {tensorboard: 'yes'}", "log.tensorboard: expected true or false, got str 'yes'"),
        ("just text", "expected options, such as `loop: {batch_size: 64}`, got str 'just text'"),
        ("", "expected options, such as `loop: {batch_size: 64}`, got nothing"),
        ("config: 3", "config does not exist; nearest: "),
        ("a: [", "is no YAML: while parsing"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, message, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    error = refused(capsys, "config", "digits", "--config", "wrong.yaml")
    assert error.startswith("error: wrong.yaml")
    assert message in error


def test_a_missing_file_and_a_folder_are_named(tmp_path, capsys):
    error = refused(capsys, "config", "digits", "--config", "none.yaml")
    assert f"no configuration at {tmp_path / 'none.yaml'}" in error
    assert "which is a folder" in refused(capsys, "config", "digits", "--config", ".")


# from_dict and overlay


@dataclass(frozen=True)
class Inner:
    size: tuple[int, float] = (1, 2.0)
    names: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Other:
    weight: float = 1.0
    size: int = 1


@dataclass(frozen=True)
class Either:
    part: Inner | Other = field(default_factory=Inner)


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", 1]
    inner: Inner = field(default_factory=Inner)
    rate: float | None = 0.5


def test_every_type_of_field_survives_json():
    outer = Outer("a", Inner((3, 0.25), {"x": (1, 2), "y": ()}), None)
    assert from_dict(Outer, json.loads(json.dumps(to_dict(outer)))) == outer
    assert type(from_dict(Outer, {"kind": 1, "rate": 1}).rate) is float


@pytest.mark.parametrize("part", [Inner((3, 0.25)), Other(2.0, 4)])
def test_one_of_two_sections_is_known_by_its_fields(part):
    assert from_dict(Either, json.loads(json.dumps(to_dict(Either(part))))) == Either(part)


def test_a_section_that_is_neither_names_the_field():
    with pytest.raises(ValueError, match=r"part\.wieght does not exist; nearest"):
        from_dict(Either, {"part": {"wieght": 1.0}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Outer lacks kind"),
        ({"kind": True}, "kind: True is none of a, 1"),  # True == 1, and is not meant
        ({"kind": "a", "inner": {"size": [1]}}, r"inner.size: expected 2 values, got 1: \[1\]"),
        ({"kind": "a", "inner": {"names": {"x": 3}}}, r"inner.names\[x\]: expected a list"),
        ({"kind": "a", "inner": {"names": {"x": [0.5]}}}, r"inner.names\[x\]\[0\]: expected a whole number"),
        ({"kind": "a", "inner": []}, "inner: expected a section of options, got list"),
    ],
)
def test_from_dict_names_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, values)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "0.001e0"])
def test_numbers_that_yaml_1_1_takes_for_text(text):
    assert yaml.safe_load(text) == text  # else the rule is not needed
    assert from_dict(LoopConfig, {"epochs": text}).epochs == 1e-3


@pytest.mark.parametrize("text", ["1", "nan", "1e", "e3", "0x1", "1_0e3", " 1e3", "1e3 "])
def test_other_text_is_no_number(text):
    with pytest.raises(ValueError, match=r"epochs: expected a number, got str"):
        from_dict(LoopConfig, {"epochs": text})


def test_overlay_changes_only_what_is_named():
    base = dataclasses.replace(RECIPES["digits"](), seed=4)
    changed = overlay(base, {"data": {"mean": [0.1], "mixture": {"a": 1}}})
    assert changed.data == dataclasses.replace(base.data, mean=(0.1,), mixture={"a": 1.0})
    assert dataclasses.replace(changed, data=base.data) == base
    assert overlay(base, {}) == base
