"""``eqvision export``: of a run, with and without an average of its parameters, and of the zoo; what is refused."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import NAMES, fresh_state, toy_config, with_optimizer

from eqvision import cli
from eqvision.checkpoint import Checkpoints, Record
from eqvision.data import normalize
from eqvision.export import load_exported, load_safetensors, model_of_run, read_card
from eqvision.run_folder import RunFolder


def same(tree, other) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module", params=[None, 0.9], ids=["parameters", "average"])
def run(request, tmp_path_factory):
    """A run folder with a checkpoint of step 7, and the state that is in it."""
    root = tmp_path_factory.mktemp("export")
    config = with_optimizer(toy_config(root / "run", root / "toy.npz", model="resnet20_cifar"), ema=request.param)
    RunFolder(config.out).open_for_training(config, NAMES, 3)
    state = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.01, leaf.dtype), fresh_state(config))
    if state.ema is not None:
        state = eqx.tree_at(lambda s: s.ema, state, jax.tree.map(lambda leaf: leaf * 0.5, state.ema))
    with Checkpoints(RunFolder(config.out).checkpoints) as checkpoints:
        checkpoints.save(7, state, Record(7))
    return root / "run", state


def test_the_model_of_a_run_is_what_is_evaluated(run):
    folder, state = run
    model, stats, card = model_of_run(folder)
    assert same((model, stats), (state.evaluated, state.stats))
    assert (card.model, card.num_classes, card.image_size, card.in_channels) == ("resnet20_cifar", 3, (8, 8), 1)
    assert (card.class_names, card.mean, card.std, card.task) == (NAMES, (0.5,), (0.25,), "single_label")
    assert (card.origin, card.crop_fraction) == ("run run, step 7", 1.0)


def test_a_run_survives_both_formats(run, tmp_path, capsys, assert_close):
    folder, state = run
    cli.main(["export", str(folder), "--format", "safetensors", "--out", str(tmp_path / "weights")])
    assert "resnet20_cifar, run run, step 7, 268,979 parameters\n" in capsys.readouterr().out
    assert same(load_safetensors(tmp_path / "weights"), (state.evaluated, state.stats))
    cli.main(["export", str(folder), "--format", "stablehlo", "--out", str(tmp_path / "program")])
    printed = capsys.readouterr().out
    assert "uint8[b, 8, 8, 1] pixels 0..255 -> float32[b, 3] logits" in printed
    assert "runs on cpu, cuda, tpu" in printed
    exported = load_exported(tmp_path / "program")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    expected = state.evaluated(normalize(jnp.asarray(images), (0.5,), (0.25,)), state.stats)[0]
    assert_close(exported(images), expected, 1e-5)  # the reference is computed operation by operation, not compiled
    assert exported.program.card.class_names == NAMES


def test_a_program_of_a_run_may_take_another_size(run, tmp_path, capsys):
    command = ["export", str(run[0]), "--image-size=16", "--no-normalize", f"--out={tmp_path / 'model'}", "--format"]
    cli.main([*command, "stablehlo"])
    assert "float32[b, 16, 16, 1] normalised images -> float32[b, 3] logits" in capsys.readouterr().out
    assert load_exported(tmp_path / "model")(np.ones((2, 16, 16, 1), np.float32)).shape == (2, 3)
    assert "--image-size 16: the run was trained at 8" in refused(capsys, *command, "safetensors", "--force")


def test_the_command_refuses_what_it_cannot_do(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    to = ["--format", "safetensors", "--out", "model"]
    assert "--seed 3 is for models of the zoo" in refused(capsys, "export", str(run[0]), *to, "--seed", "3")
    assert "resnet5 is no run folder, and model 'resnet5' does not exist; nearest: resnet50" in refused(
        capsys, "export", "resnet5", *to
    )
    assert f"there is no run folder {tmp_path / 'runs/x'}" in refused(capsys, "export", "runs/x", *to)
    assert "is not a run folder: there is no" in refused(capsys, "export", ".", *to)
    assert "the nearest legal size is 8x8" in refused(capsys, "export", "vit_ti4", *to, "--image-size", "9")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").write_text("mine")
    assert "model exists; nothing was written" in refused(capsys, "export", "small_cnn", *to)


def test_a_model_of_the_zoo_is_said_to_be_untrained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_cnn").mkdir()  # a folder of that name that is no run does not hide the model
    for seed, name in (("3", "a"), ("3", "b"), ("4", "c")):
        options = ["--image-size=8", "--num-classes=4", "--in-channels=1", f"--seed={seed}", f"--out={name}"]
        cli.main(["export", "small_cnn", "--format=safetensors", *options])
        assert f"small_cnn, random parameters of seed {seed}: untrained" in capsys.readouterr().out
    assert same(load_safetensors("a"), load_safetensors("b"))
    assert not same(load_safetensors("a"), load_safetensors("c"))
    assert read_card("a").num_classes == 4


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    to = ["--format", "stablehlo", "--image-size", "8", "--out", str(tmp_path / "model")]
    assert "pip install 'eqvision[export]'" in refused(capsys, "export", "small_cnn", *to)
    assert list(tmp_path.iterdir()) == []
