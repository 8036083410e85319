"""What tests of training share for every kind of run: a compiled step, runs that are killed and resumed."""

import dataclasses
from pathlib import Path

import pytest
from test_train import Interrupted, interrupt_in_step
from toy import bytes_of, saved_steps
from toy_detection import on_devices

import eqvision.train as train_module
from eqvision.checkpoint import Checkpoints
from eqvision.mesh import make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.problems import make_problem
from eqvision.state import abstract_state, first_state
from eqvision.step import make_step
from eqvision.train import train


def optimizer_of(config, steps=6):
    return make_optimizer(config.optimizer, make_schedule(config.schedule, config.optimizer.learning_rate, steps))


class Stepper:
    """A compiled step of a problem, to be begun anew as often as one likes."""

    def __init__(self, problem, devices=1):
        self.problem, self.config, self.mesh = problem, problem.config, make_mesh(num_devices=devices)
        self.optimizer = optimizer_of(self.config)
        self.step = make_step(problem, self.optimizer, self.mesh, self.config)
        self.built = problem.build()

    def __call__(self, batches):
        """The last state, and the losses and gradient norms on the way."""
        state, logs = first_state(*self.built, self.config, self.optimizer, self.mesh), []
        for batch in batches:
            state, log = self.step(on_devices(batch, self.mesh), state)
            logs.append((float(log.loss), float(log.grad_norm)))
        return state, logs


def use_devices(monkeypatch, count):
    """So many devices for ``train``."""
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=count))


def state_of(config):
    """What the newest checkpoint of a run holds, on one device."""
    like = abstract_state(make_problem(config).build, config, optimizer_of(config), make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


def killed_and_resumed(config, out, monkeypatch, at):
    """The same run in the folder ``out``, killed in the step ``at`` and begun again; its configuration."""
    config = dataclasses.replace(config, out=str(out))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, at)
        with pytest.raises(Interrupted):
            train(config)
    train(config)
    return config


def assert_same_run(one, other, files=("metrics.csv", "metrics.jsonl", "result.json")):
    """Bit for bit."""
    for name in files:
        assert Path(one.out, name).read_bytes() == Path(other.out, name).read_bytes(), name
    assert saved_steps(one) == saved_steps(other)
    assert bytes_of(state_of(one)) == bytes_of(state_of(other))
