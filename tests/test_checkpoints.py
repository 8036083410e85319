"""Checkpoints: digests, damage of every kind, retention, a full disk, and what is said about them."""

import collections
import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eqvision import cli
from eqvision.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    Record,
    describe_checkpoint,
    digests,
    steps_to_keep,
)
from eqvision.checkpoint.record import unpack
from eqvision.mesh import make_mesh
from eqvision.recipes import CheckpointConfig


def toy_state(step: int = 0):
    """A little of everything that a state holds."""
    key = jax.random.key(step)
    return {
        "weight": jax.random.normal(key, (16, 24)),
        "half": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
        "count": jnp.int32(step),
        "mask": jnp.arange(7) % 3 == 0,
        "nested": ({"bias": jnp.zeros(3)}, jnp.ones((2, 2), jnp.float16)),
    }


def save_all(folder, steps, config=None, scores=None, **options):
    with Checkpoints(folder, config or CheckpointConfig(keep_last=100), **options) as checkpoints:
        history = {}
        for step in steps:
            if scores:
                history[str(step)] = scores[step]
            checkpoints.save(step, toy_state(step), Record(step, history=dict(history)))
    return Checkpoints(folder)


def assert_equal(one, other):
    for (name, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


# Digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "int8"])
def test_every_bit_of_every_type_counts(dtype, rng):
    x = np.asarray(jnp.asarray(rng.integers(0, 2, 40)).astype(dtype))
    before = digests({"x": jnp.asarray(x)})["x"]
    assert before.startswith(f"{dtype}[40]:")
    seen = {before}
    for bit in range(8 * x.itemsize if dtype != "bool" else 1):
        raw = x.copy()
        raw.view(np.uint8)[17 * x.itemsize + bit // 8] ^= 1 << (bit % 8)
        seen.add(digests({"x": jnp.asarray(raw)})["x"])
    assert len(seen) == 1 + (8 * x.itemsize if dtype != "bool" else 1)


def test_order_sign_and_shape_count():
    x = jnp.arange(12.0)
    variants = [x, x[::-1], -x, x.reshape(3, 4), x.at[0].set(-0.0), jnp.zeros(12), jnp.zeros(13)]
    assert len({digests({"x": variant})["x"] for variant in variants}) == len(variants)


def test_a_digest_does_not_depend_on_the_sharding():
    mesh = make_mesh()
    x = jax.random.normal(jax.random.key(0), (64, 48))
    one = digests({"x": x})
    for spec in (P(), P("data"), P(None, "data")):
        assert digests({"x": jax.device_put(x, NamedSharding(mesh, spec))}) == one


def test_collisions_are_as_rare_as_chance(rng):
    """2,000 neighbours of one array: any two of equal digest would be a defect of the mixing."""
    base = rng.integers(0, 2**32, 64, dtype=np.uint32)
    seen = set()
    for _ in range(2000):
        x = base.copy()
        for position in rng.integers(0, 64, 2):
            x[position] ^= np.uint32(1 << int(rng.integers(32)))
        seen.add(digests({"x": jnp.asarray(x)})["x"])
    different = 2000 - len(seen)
    assert different < 20  # drawn twice, or the same bit flipped back


# Writing and reading


def test_what_is_restored_is_what_was_saved(tmp_path):
    checkpoints = save_all(tmp_path / "checkpoints", [3, 10, 7])
    assert checkpoints.steps() == [3, 7, 10]
    for step in (3, 7, 10):
        assert_equal(checkpoints.restore(step, toy_state()), toy_state(step))
    newest = checkpoints.restore_newest(toy_state())
    assert newest is not None
    assert newest.record.step == 10
    assert newest.record.digests == digests(toy_state(10))


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nothing").restore_newest(toy_state()) is None
    assert Checkpoints(tmp_path / "nothing").latest_step() is None


def test_it_is_restored_onto_other_devices(tmp_path):
    mesh = make_mesh()
    spread = NamedSharding(mesh, P("data"))
    state = {"x": jax.device_put(jnp.arange(64.0), spread)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    for sharding in (NamedSharding(make_mesh(num_devices=1), P()), NamedSharding(make_mesh(num_devices=4), P("data"))):
        like = {"x": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding)}
        restored = Checkpoints(tmp_path).restore(1, like)
        assert restored["x"].sharding == sharding
        assert_equal(restored, state)


def test_another_model_is_named_leaf_by_leaf(tmp_path):
    checkpoints = save_all(tmp_path, [5])
    other = toy_state()
    other["weight"] = jnp.zeros((16, 25))
    other["half"] = other["half"].astype(jnp.float32)
    other["new"] = other.pop("mask")
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore_newest(other)
    message = str(error.value)
    assert "another model; 4 leaves differ" in message
    assert "weight: checkpoint float32[16, 24], model float32[16, 25]" in message
    assert "half: checkpoint bfloat16[5], model float32[5]" in message
    assert "mask: checkpoint bool[7], model has none" in message
    assert checkpoints.steps() == [5]


def test_unfinished_ones_are_removed_at_the_start_and_said(tmp_path, capsys):
    checkpoints = save_all(tmp_path, [5])
    for name in ("6.orbax-checkpoint-tmp", "3.deleting"):
        shutil.copytree(tmp_path / "5", tmp_path / name)
    assert checkpoints.steps() == [5]
    checkpoints.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    assert f"removed an unfinished checkpoint: {tmp_path}/6.orbax" in capsys.readouterr().err


# Damage


def damage(path, kind, rng):
    """One bit flipped, the end cut off, or the file gone."""
    if kind == "deletion":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "truncation":
        path.write_bytes(content[: int(rng.integers(len(content)))] if content else b"")
    elif content:
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flip", "truncation", "deletion"])
def test_damage_is_found_and_the_step_before_is_used(kind, tmp_path, rng, capsys):
    """Every file in turn. Some hold nothing that matters: then the newest state is restored, and it is right."""
    save_all(tmp_path / "whole" / "checkpoints", [1, 2])
    files = sorted(path for path in (tmp_path / "whole/checkpoints/2").rglob("*") if path.is_file())
    outcomes = collections.Counter()
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file.relative_to(tmp_path / "whole"), kind, rng)
        restored = Checkpoints(folder / "checkpoints").restore_newest(toy_state(), set_aside=True)
        assert restored is not None
        step = restored.record.step
        assert_equal(restored.state, toy_state(step))
        outcomes[step] += 1
        said = capsys.readouterr().err
        if step == 1:
            assert "checkpoints/step 2 is damaged: " in said
            assert (folder / "damaged" / "2").is_dir()
            assert Checkpoints(folder / "checkpoints").steps() == [1]
    assert outcomes[1] > 2


def test_a_flipped_bit_of_the_values_names_the_leaf(tmp_path):
    state = {"small": jnp.zeros(3), "large": jax.random.normal(jax.random.key(0), (400, 300))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with pytest.raises(DamagedError, match="1 leaves are not what was written: large"):
        Checkpoints(tmp_path).restore(1, state)


def test_where_all_are_damaged_nothing_is_restored_or_deleted(tmp_path):
    checkpoints = save_all(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / f"{step}/record/metadata").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore_newest(toy_state())
    assert "no checkpoint in" in str(error.value)
    assert "step 2 is damaged: record/metadata does not have the digest" in str(error.value)
    assert "Nothing was deleted" in str(error.value)
    assert checkpoints.steps() == [1, 2]


# Retention


def test_last_best_and_every():
    steps, scores = [10, 20, 30, 40, 50, 60], {10: 0.5, 20: 0.9, 30: 0.7, 40: 0.9, 50: 0.1}
    keep = {"keep_last": 1, "keep_best": 0, "keep_every": None}
    assert steps_to_keep(steps, scores, **keep) == {60}
    assert steps_to_keep(steps, scores, **{**keep, "keep_last": 2}) == {50, 60}
    assert steps_to_keep(steps, scores, **{**keep, "keep_best": 1}) == {20, 60}
    assert steps_to_keep(steps, scores, **{**keep, "keep_best": 3}) == {20, 40, 30, 60}
    assert steps_to_keep(steps, scores, **{**keep, "keep_best": 1}, lower_is_better=True) == {50, 60}
    assert steps_to_keep(steps, scores, **{**keep, "keep_every": 20}) == {20, 40, 60}
    with pytest.raises(ValueError, match=r"checkpoint.keep_last=0, .* expected keep_last >= 1"):
        steps_to_keep(steps, scores, **{**keep, "keep_last": 0})


def test_the_best_survives_a_restart_with_worse_scores_after_it(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best=1)
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.6, 5: 0.7}
    assert save_all(tmp_path, [1, 2, 3], config, scores).steps() == [2, 3]
    with Checkpoints(tmp_path, config) as checkpoints:
        history = checkpoints.record(3).history
        for step in (4, 5):
            history = {**history, str(step): scores[step]}
            checkpoints.save(step, toy_state(step), Record(step, history=history))
    assert Checkpoints(tmp_path).steps() == [2, 5]


# A full disk


def fill(monkeypatch, free: int):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - free, free))


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(tmp_path, monkeypatch):
    save_all(tmp_path, [1])
    fill(monkeypatch, 10 * 2**20)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.save(2, toy_state(2))
    message = str(error.value)
    assert "no room for the checkpoint of step 2" in message
    assert "it needs 0.06 GiB and 0.01 GiB are free" in message
    assert "Checkpoints on disk: 1; they are intact" in message
    assert "--checkpoint.on-full continue" in message
    assert_equal(checkpoints.restore(1, toy_state()), toy_state(1))


def test_or_the_run_goes_on_and_tries_again(tmp_path, monkeypatch, capsys):
    config = CheckpointConfig(on_full="continue")
    with Checkpoints(tmp_path, config) as checkpoints:
        with monkeypatch.context() as patch:
            fill(patch, 0)
            checkpoints.save(1, toy_state(1))
        assert "Checkpoints on disk: none" in capsys.readouterr().err
        checkpoints.save(2, toy_state(2))
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_writer_that_finds_no_space_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, toy_state(1))
        checkpoints.wait()

        checkpoints.save(2, toy_state(2))
        finish = checkpoints._writer.wait_until_finished

        def failing():
            finish()
            (tmp_path / "2.orbax-checkpoint-tmp").mkdir(exist_ok=True)
            raise OSError("[Errno 28] No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._writer, "wait_until_finished", failing)
            with pytest.raises(CheckpointError, match="the disk became full while it was written"):
                checkpoints.wait()
    assert not list(tmp_path.glob("*tmp*"))


# Inspecting


def test_inspect_shows_one_step_and_all(tmp_path, capsys):
    save_all(tmp_path / "checkpoints", [1, 2], scores={1: 0.5, 2: 0.25})
    cli.main(["checkpoint", "inspect", str(tmp_path / "checkpoints" / "2")])
    text = capsys.readouterr().out
    assert "6 leaves" in text
    assert "every leaf has its digest" in text
    assert "weight" in text
    assert "float32[16, 24]" in text
    both = describe_checkpoint(tmp_path)
    assert both.count("every leaf has its digest") == 2


def test_inspect_says_what_is_damaged_and_exits_with_1(tmp_path, capsys):
    save_all(tmp_path / "checkpoints", [1])
    (tmp_path / "checkpoints/1/state/_METADATA").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["checkpoint", "inspect", str(tmp_path)])
    assert stop.value.code == 1
    assert "DAMAGED: its arrays cannot be read" in capsys.readouterr().out


def test_inspect_of_something_else_says_what_to_give(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "inspect", str(tmp_path)])
    assert "holds no checkpoint; give RUN_FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "inspct", str(tmp_path)])
    assert "inspect" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"digest_version": 2}, {"colour": "blue"}])
def test_a_checkpoint_of_another_version_is_not_called_damaged(change):
    values = {**dataclasses.asdict(Record(3, versions={"eqvision": "9.1"})), **change}
    text = json.dumps(values)
    stored = {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(CheckpointError, match=r"eqvision 9\.1, with digests of version .*read it with") as caught:
        unpack(stored)
    assert not isinstance(caught.value, DamagedError)
