"""Training masked autoencoders: resuming bit for bit, one device against eight, probes, fine-tuning, and messages."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_train import Interrupted, interrupt_in_step, read_csv
from toy import bytes_of, saved_steps, with_loop, write_npz
from toy_detection import first_batches, on_devices
from toy_masked import WIDTH, install, toy_config, toy_problem, weightless, with_evaluators

from eqvision import UnknownNameError, create
from eqvision.checkpoint import Checkpoints
from eqvision.cli import main as cli
from eqvision.data import normalize
from eqvision.evaluate_masked import evaluate_encoder, load_masked_run
from eqvision.finetune import start_from
from eqvision.layers.position import sincos_2d
from eqvision.losses import normalised_pixels
from eqvision.mesh import make_mesh
from eqvision.ops import patch_pixels
from eqvision.optim import make_optimizer, make_schedule
from eqvision.predict import load_run
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.problems import masked_problem
from eqvision.problems.masked_image_evaluator import MaskedSample
from eqvision.problems.masked_image_report import draw_reconstructions, reconstruction
from eqvision.recipes import MaskedConfig, MaskedModelConfig
from eqvision.replay import replay
from eqvision.run_folder import RunFolderError
from eqvision.state import abstract_state, first_state
from eqvision.step import make_step
from eqvision.train import train


@pytest.fixture
def toys(monkeypatch):
    install(monkeypatch)


def optimizer_of(config):
    return make_optimizer(config.optimizer, make_schedule(config.schedule, config.optimizer.learning_rate, 6))


def stepper(config, devices=1):
    """``batches -> (last state, losses and gradient norms on the way)``, compiled once."""
    problem, mesh, optimizer = toy_problem(config), make_mesh(num_devices=devices), optimizer_of(config)
    step = make_step(problem, optimizer, mesh, config)

    def run(batches):
        state, logs = first_state(*problem.build(), config, optimizer, mesh), []
        for batch in batches:
            state, log = step(on_devices(batch, mesh), state)
            logs.append((float(log.loss), float(log.grad_norm)))
        return state, logs

    return run


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return write_npz(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, npz):
    """An uninterrupted run of six steps."""
    config = toy_config(tmp_path_factory.mktemp("finished") / "run", npz)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return config, train(config)


def state_of(config):
    """What the newest checkpoint of a run holds, on one device."""
    like = abstract_state(toy_problem(config).build, config, optimizer_of(config), make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


# The run


@pytest.mark.slow
def test_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, toys):
    config, _ = finished
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 5)
        with pytest.raises(Interrupted):
            train(broken)
    assert saved_steps(broken) == [3]
    train(broken)
    for name in ("metrics.csv", "metrics.jsonl", "result.json", "reconstructions.png"):
        assert Path(config.out, name).read_bytes() == Path(broken.out, name).read_bytes(), name
    assert bytes_of(state_of(config)) == bytes_of(state_of(broken))


@pytest.mark.slow
def test_what_a_run_writes(finished, toys):
    config, result = finished
    rows = read_csv(config)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert [row["step"] for row in rows if "test/loss" in row] == [3, 6]
    assert [row["step"] for row in rows if "test/knn/accuracy" in row] == [6]
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert stored == {"test/loss": result.metrics["loss"], "test/knn/accuracy": rows[-1]["test/knn/accuracy"]}
    assert replay(config.out, 4).loss == pytest.approx(
        next(row for row in rows if row["step"] == 4)["train/loss"], rel=1e-6
    )


def compared(state):
    """Parameters but for key biases, whose gradients are zero but for rounding: a softmax does not change with them."""
    leaves = jax.tree_util.tree_leaves_with_path(state.model)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if not name.endswith("key.bias")}


@pytest.mark.slow
def test_one_device_equals_eight_and_parts_equal_the_whole(assert_close, toys):
    """Masks belong to images. With rows of weight 0, whose pixels do not count. 1e-4 after three steps: the gradients
    of eight devices are added in another order than those of one."""
    config = toy_config("unused")
    batches = [weightless(batch, [3, 7], junk=200) for batch in first_batches(toy_problem(config), 3)]
    alone = stepper(config)
    one, logs = alone(batches)
    for run in (stepper(config, devices=8), stepper(with_loop(config, accumulate=2))):
        other, found = run(batches)
        np.testing.assert_allclose(found, logs, rtol=1e-4)
        assert_close(compared(other), compared(one), 1e-4)
    again, same = alone([weightless(batch, [3, 7], junk=0) for batch in batches])
    assert same == logs
    assert bytes_of(again) == bytes_of(one)


@pytest.mark.slow
def test_the_test_loss_depends_on_no_batch_size_and_no_devices(toys):
    def loss(size, devices):
        problem = toy_problem(with_loop(toy_config("unused"), eval_batch_size=size))
        return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics["loss"]

    assert loss(16, 8) == pytest.approx(loss(7, 1), rel=1e-6)


# What a run is used for


@pytest.mark.slow
def test_the_encoder_is_probed_and_so_is_the_random_one(finished, toys, capsys):
    config, _ = finished
    trained, random = load_masked_run(config.out), load_masked_run(config.out, untrained=True)
    assert (trained.step, random.step) == (6, 0)
    assert bytes_of(random.model) == bytes_of(toy_problem(config).build()[0])
    assert bytes_of(random.model) != bytes_of(trained.model)
    probed = evaluate_encoder(config.out, ["knn"])
    assert probed["test/knn/accuracy"] == read_csv(config)[-1]["test/knn/accuracy"]
    capsys.readouterr()
    cli(["eval", config.out, "--evaluator", "knn", "few_shot", "--untrained"])
    printed = capsys.readouterr().out
    assert "test/knn/accuracy" in printed
    assert "test/few_shot_1/accuracy" in printed
    cli(["eval", config.out])
    assert capsys.readouterr().out == f"test/loss {read_csv(config)[-1]['test/loss']:.4f}\n"


@pytest.mark.slow
def test_what_a_run_is_not_used_for(finished, toys, tmp_path, capsys):
    config, _ = finished
    with pytest.raises(RunFolderError, match=r"masked autoencoder toy_mae, and this takes runs of image classifiers; "):
        load_run(config.out)
    for arguments, message in (
        (["eval", config.out, "--untrained"], "--untrained True is for linear_probe, few_shot and knn"),
        (["predict", config.out, "image.png"], "train RECIPE --init its encoder"),
        (
            ["export", config.out, "--format", "safetensors", "--out", str(tmp_path)],
            "this takes runs of classifiers and detectors",
        ),
    ):
        with pytest.raises(SystemExit):
            cli(arguments)
        assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_classifier_begins_with_the_encoder(finished, toys, key, capsys):
    """Its positions are learned and begin as the fixed ones, its norm is behind the pooling and begins fresh."""
    config, _ = finished
    fresh, stats = create("toy_vit_mae", num_classes=3, image_size=16, in_channels=1, key=key)
    model, _ = start_from(config.out, fresh, stats)
    encoder = load_masked_run(config.out).model.backbone
    assert bytes_of(model.backbone.encoder) == bytes_of(encoder.encoder)
    assert bytes_of(model.head) == bytes_of(fresh.head)
    np.testing.assert_array_equal(model.backbone.position.weight, sincos_2d((8, 8), WIDTH))
    np.testing.assert_array_equal(model.backbone.class_token, encoder.class_token)
    assert not np.any(model.backbone.class_position)
    said = capsys.readouterr().err
    assert "the backbone alone; left out: decoder; fresh: head" in said
    assert "backbone.norm: left out; the norm is behind the pooling here" in said


@pytest.mark.slow
def test_another_run_goes_on_with_the_model(finished, toys):
    config, _ = finished
    model, _ = start_from(config.out, *toy_problem(config).build())
    assert bytes_of(model) == bytes_of(load_masked_run(config.out).model)


def test_both_begin_with_published_weights(toys, tmp_path, key):
    """In the names of facebookresearch/mae."""
    theirs, state = create("toy_mae", image_size=8, in_channels=1, key=key)
    file = tmp_path / "mae_pretrain.safetensors"
    save_file(to_layout(theirs, state, LAYOUTS["mae_pretraining"]), file)
    model, _ = start_from(f"toy_mae:{file}", *toy_problem(toy_config("unused")).build())
    assert bytes_of(model) == bytes_of(theirs)
    classifier, stats = create("toy_vit_mae", num_classes=3, image_size=8, in_channels=1, key=key)
    model, _ = start_from(f"toy_mae:{file}", classifier, stats)
    assert bytes_of(model.backbone.encoder) == bytes_of(theirs.backbone.encoder)


# Messages and pictures


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"name": "mae_vit_b"},
            UnknownNameError,
            r"--model\.name: masked autoencoder 'mae_vit_b' .*mae_vit_b16",
        ),
        ({"name": "toy_mae", "image_size": 9}, ValueError, r"image_size 9x9 is not divisible by 2"),
        ({"name": "toy_mae", "image_size": 8, "mask_ratio": 0.99}, ValueError, r"mask_ratio 0\.99 of 16 patches"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_data_is_read(toys, options, error, message):
    with pytest.raises(error, match=message):
        masked_problem(MaskedConfig(model=MaskedModelConfig(**options)))


def test_evaluators_need_a_split_of_their_own(toys, npz):
    config = toy_config("unused", npz)
    data = dataclasses.replace(config.data, test_split="train")
    with pytest.raises(ValueError, match=r"knn would be fitted and measured on the same split 'train'"):
        masked_problem(dataclasses.replace(config, data=data))
    masked_problem(dataclasses.replace(with_evaluators(config), data=data))


@pytest.mark.parametrize("normalise", [True, False])
def test_perfect_predictions_give_the_image(normalise, tmp_path, rng):
    """Of normalised pixels, too, for which the picture takes mean and variance from the image."""
    config = toy_config("unused")
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, normalise_pixels=normalise))
    image = rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)
    pixels = patch_pixels(jnp.asarray(normalize(image[None], config.data.mean, config.data.std)), 2)
    pixels = normalised_pixels(pixels) if normalise else pixels
    mask = rng.uniform(size=16) < 0.75
    sample = MaskedSample(image, np.asarray(pixels[0]), mask)
    seen, predicted, whole = reconstruction(sample, config)
    np.testing.assert_array_equal(predicted, image)
    np.testing.assert_array_equal(whole, image)
    assert (seen == image).mean() < 0.6
    file = draw_reconstructions([sample] * 3, config, tmp_path / "picture.png")
    assert file.stat().st_size > 0


def test_the_run_is_described_by_its_problem(toys):
    """Multiply-adds of an encoder that sees 4 of 16 patches, and of the decoder."""
    problem = toy_problem(toy_config("unused"))
    whole = dataclasses.replace(problem.config, model=dataclasses.replace(problem.config.model, mask_ratio=0.0))
    assert 0 < problem.forward_macs() < toy_problem(whole).forward_macs()
    assert problem.teacher(make_mesh(num_devices=1)) is None
