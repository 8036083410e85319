"""What a step costs before it runs, out-of-memory in words, and traces of chosen steps."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from toy import toy_problem

from eqvision.profiling import (
    DeviceMemoryError,
    Memory,
    StepTrace,
    describe_program,
    explain_out_of_memory,
    flops_text,
    is_out_of_memory,
    memory_errors,
    parse_steps,
    peak_flops,
    program_memory,
    size_text,
    step_cost,
    training_flops,
)
from eqvision.recipes import LoopConfig, ModelConfig, TrainConfig
from eqvision.setup import build_model


class Device:
    """A device that reports what it is told to."""

    def __init__(self, kind="NVIDIA H100 80GB HBM3", limit=None, used=0):
        self.device_kind, self._limit, self._used = kind, limit, used

    def memory_stats(self):
        return None if self._limit is None else {"bytes_limit": self._limit, "bytes_in_use": self._used}


@pytest.fixture
def compiled():
    """Arguments of 256 KiB and 128 B, an output that takes the memory of the first."""
    argument = jnp.zeros((256, 256))
    return jax.jit(lambda x, y: (jnp.sin(x) @ x) + y[0], donate_argnums=0).lower(argument, jnp.zeros(32)).compile()


# Memory


def test_memory_of_a_compiled_program(compiled):
    memory = program_memory(compiled)
    assert memory.arguments == 256 * 256 * 4 + 32 * 4
    assert memory.outputs == memory.aliased == 256 * 256 * 4
    assert memory.temporaries >= 256 * 256 * 4  # the sine
    assert memory.needed == memory.arguments + memory.temporaries + memory.code


def test_memory_of_a_program_compiled_by_equinox():
    program = eqx.filter_jit(lambda x: x + 1).lower(jnp.zeros(1024)).compile()
    assert program_memory(program).arguments == 4096


def test_the_description_says_what_fits(compiled):
    lines = describe_program(compiled, 3e12, Device(limit=2**30))
    assert len(lines) == 2
    assert "1.0 GiB available" in lines[0]
    assert "256.1 KiB arguments" in lines[0]
    assert "3.0 TFLOP (model" in lines[1]
    assert "peak of NVIDIA H100 80GB HBM3: 989.5 TFLOP/s" in lines[1]


def test_a_step_that_does_not_fit_is_announced_with_remedies(compiled):
    needed = program_memory(compiled).needed
    warning = describe_program(compiled, 3e12, Device(limit=needed - 1024))[1]
    assert warning.startswith("warning: the step needs 1.0 KiB more than the device has")
    for remedy in ("--loop.batch-size", "--loop.accumulate", "--model.remat full", "--loop.compute-dtype bfloat16"):
        assert remedy in warning


def test_memory_that_others_hold_is_not_available(compiled):
    memory = program_memory(compiled)
    state_only = Device(limit=memory.needed, used=memory.arguments)  # the state waits on the device already
    others = Device(limit=memory.needed, used=memory.arguments + 4096)
    assert not any("warning" in line for line in describe_program(compiled, 1.0, state_only))
    assert "4.0 KiB more" in describe_program(compiled, 1.0, others)[1]


def test_unknown_devices_have_no_peak_and_no_limit(compiled):
    lines = describe_program(compiled, 3e12, Device(kind="cpu"))
    assert "available memory unknown" in lines[0]
    assert "peak" not in lines[1]


# Arithmetic


def config_of(model, **loop):
    return dataclasses.replace(TrainConfig(), model=model, loop=LoopConfig(**loop))


def test_training_flops_are_six_for_each_weight_of_a_perceptron():
    """Without weight sharing each weight takes part in one multiply-add of an example."""
    config = config_of(ModelConfig(name="mlp", image_size=8, in_channels=1))
    model, _ = build_model(config, 3)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model) if leaf.ndim == 2)
    assert training_flops(toy_problem(config).forward_macs(), 32) == 6 * weights * 32


def test_training_flops_do_not_depend_on_how_they_are_computed():
    model = ModelConfig(name="vit_ti16", image_size=32)
    plain = toy_problem(config_of(model)).forward_macs()
    for changes in ({"remat": "full"}, {"attention": "cudnn"}, {"attention": "blocked"}):
        assert toy_problem(config_of(dataclasses.replace(model, **changes))).forward_macs() == plain
    assert toy_problem(config_of(model, batch_size=8, accumulate=4)).forward_macs() == plain


def test_published_figure_of_vit_ti16():
    """timm prints 1.26 G multiply-adds for an image (tests/cases.py)."""
    problem = toy_problem(config_of(ModelConfig(name="vit_ti16", image_size=224)))
    macs = dataclasses.replace(problem, num_classes=1000).forward_macs()
    assert training_flops(macs, 1) == pytest.approx(6 * 1.26e9, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 4090", "TPU v3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_unknown_peaks(kind):
    assert peak_flops(kind) is None


def test_cost_counts_all_devices(monkeypatch):
    assert step_cost(1000, 32) == (6000 * 32, None)
    monkeypatch.setattr(jax, "devices", lambda: [Device("TPU v4")])
    assert step_cost(1000, 32).peak == 8 * 275e12


def test_sizes_and_flops_in_words():
    assert [size_text(n) for n in (12, 2048, 3 * 2**20, 5.5 * 2**30)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.5 GiB"]
    assert [flops_text(n) for n in (5.0, 2e3, 3e12, 4e15)] == ["5.0 FLOP", "2.0 KFLOP", "3.0 TFLOP", "4.0 PFLOP"]


# Out of memory

TEXTS = {  # as XLA words it
    "RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.": "1024.0 GiB more were needed",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes.": "3.0 GiB more were needed",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB.": "1.5 GiB more were needed",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 23.42G of 15.48G hbm. Exceeded hbm capacity by 7.93G.": "the program needs 23.4 GiB of 15.5 GiB",
    "RESOURCE_EXHAUSTED: Memory is gone": "the size was not reported",
}


@pytest.mark.parametrize("text", TEXTS)
def test_out_of_memory_in_words(text):
    memory = Memory(arguments=2**30, outputs=2**30, temporaries=3 * 2**30, aliased=2**30, code=0)
    message = explain_out_of_memory(text, memory, Device(limit=8 * 2**30, used=7 * 2**30))
    assert f"NVIDIA H100 80GB HBM3 ran out of memory: {TEXTS[text]}" in message
    assert "1.0 GiB of 8.0 GiB are free now" in message
    assert "needs, per device: 4.0 GiB" in message
    for remedy in ("--loop.batch-size", "--loop.accumulate", "--model.remat full", "--loop.compute-dtype bfloat16"):
        assert remedy in message
    assert text[:60] in message


def test_a_real_lack_of_memory_becomes_a_message():
    with pytest.raises(DeviceMemoryError) as error, memory_errors(lambda: None):
        jnp.zeros((2**48,)).block_until_ready()
    assert "cpu ran out of memory: 1048576.0 GiB more were needed" in str(error.value)
    assert "does not report what is free" in str(error.value)
    assert isinstance(error.value.__cause__, jax.errors.JaxRuntimeError)


def test_the_message_holds_what_the_compiled_step_needs():
    step = eqx.filter_jit(lambda x: x + 1).lower(jnp.zeros(2**18)).compile()  # 1 MiB in, 1 MiB out
    with (
        pytest.raises(DeviceMemoryError, match=r"needs, per device: 2.0 MiB = 1.0 MiB arguments"),
        memory_errors(lambda: step),
    ):
        jnp.zeros((2**48,)).block_until_ready()


def test_other_errors_pass():
    with pytest.raises(ValueError, match="mine"), memory_errors():
        raise ValueError("RESOURCE_EXHAUSTED: memory, says mine")
    quota = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too many requests")
    assert not is_out_of_memory(quota)
    with pytest.raises(jax.errors.JaxRuntimeError, match="too many"), memory_errors():
        raise quota


# Traces


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "'10' is no range of steps; expected FIRST:LAST, such as 10:15"),
        ("a:b", "is no range of steps"),
        ("5:", "is no range of steps"),
        ("-1:3", "is no range of steps"),
        ("1:2:3", "is no range of steps"),
        ("0:3", "expected 1 <= FIRST <= LAST"),
        ("7:5", "expected 1 <= FIRST <= LAST"),
        ("90:101", "'90:101' ends after the run, which has 100 steps"),
    ],
)
def test_bad_ranges(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_steps(text, 100)
    with pytest.raises(ValueError, match=re.escape("--log.profile")):
        StepTrace(text, tmp_path, first=0, total=100)


def test_good_ranges():
    assert parse_steps("10:15", 100) == (10, 15)
    assert parse_steps(" 3 : 3 ", 3) == (3, 3)


class Recorder:
    """Stands in for jax.profiler: what was begun, ended and waited for, in order."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: self.calls.append("start"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.calls.append("stop"))
        monkeypatch.setattr(jax.profiler, "save_device_memory_profile", lambda file: self.calls.append("memory"))
        monkeypatch.setattr(jax, "block_until_ready", lambda x: self.calls.append(f"wait {x}"))

    def run(self, trace, steps):
        with trace:
            for step in steps:
                trace.before(step, f"before {step}")
                trace.after(step, f"results {step}")
        return self.calls


def test_only_whole_steps_are_traced(tmp_path, monkeypatch):
    calls = Recorder(monkeypatch).run(StepTrace("3:4", tmp_path, first=0, total=9), range(1, 10))
    assert calls == ["wait before 3", "start", "wait results 4", "memory", "stop"]


def test_no_range_traces_nothing(tmp_path, monkeypatch):
    assert Recorder(monkeypatch).run(StepTrace("", tmp_path / "profile", first=0, total=9), range(1, 10)) == []
    assert not (tmp_path / "profile").exists()


def test_a_resumed_run_traces_what_is_left(tmp_path, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    assert recorder.run(StepTrace("3:6", tmp_path, first=4, total=9), range(5, 10))[0] == "wait before 5"
    assert "trace of steps 5:6" in capsys.readouterr().out
    recorder.calls.clear()
    assert recorder.run(StepTrace("3:4", tmp_path, first=4, total=9), range(5, 10)) == []
    assert "these steps lie before the restored step 4; nothing is traced" in capsys.readouterr().out


def fail_within(trace):
    with trace:
        trace.before(3, "x")
        raise ZeroDivisionError


def test_a_run_that_fails_within_the_range_still_ends_its_trace(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    trace = StepTrace("3:6", tmp_path, first=0, total=9)
    with pytest.raises(ZeroDivisionError):
        fail_within(trace)
    assert recorder.calls == ["wait x", "start", "stop"]


def test_a_trace_of_the_real_profiler(tmp_path):
    double = jax.jit(lambda x: x * 2)
    with StepTrace("2:3", tmp_path, first=0, total=4) as trace:
        x = double(jnp.ones(8))
        for step in range(1, 5):
            trace.before(step, x)
            x = double(x)
            trace.after(step, x)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert any(name.endswith(".xplane.pb") for name in names), names
    assert {"perfetto_trace.json.gz", "memory.prof"} <= names
