"""The benchmark programs at toy size: what they measure, what they write, and that contestants build equal networks."""

import csv
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flops, peer_report, peers, throughput, timing
from benchmarks.peer_models.specs import PARAMETERS, SPECS, TOY_SPECS
from eqvision.counting import count

INFERENCE_COLUMNS = [
    "model",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "infer_img_size",
    "infer_gmacs",
    "infer_macts",
    "param_count",
]
TRAINING_COLUMNS = [
    "model",
    "train_samples_per_sec",
    "train_step_time",
    "train_batch_size",
    "train_img_size",
    "param_count",
]
EXTRA_COLUMNS = ["trace_s", "compile_s", "dtype", "peak_mem", "device", "versions"]
JAX_PEERS = ["flax", "equinox"]
TORCH_PEERS = ["torch", "torch_channels_last"]


def toy_job(model="vit_s16", task="forward", contestant="ours", malloc="default"):
    return peers.Job(model, task, contestant, malloc, 2, 32, repeats=2, warmup=1, toy=True)


def result(wall, others=(0.0, 0.0, 0.0), parameters=1):
    return peers.Result(parameters, 1.0, 2.0, 3e6, 4e6, list(wall), list(wall), list(others))


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_throughput(out, *more):
    size = ["--image-size", "32", "--num-classes", "10", "--batch", "2", "--repeats", "2", "--warmup", "1"]
    throughput.main(["--models", "resnet20_cifar", *size, "--out", str(out), *more])
    return table(out)


class TestThroughput:
    def test_inference_row(self, tmp_path):
        (row,) = run_throughput(tmp_path / "infer.csv")
        assert [name for name in row if name in INFERENCE_COLUMNS] == INFERENCE_COLUMNS
        assert set(EXTRA_COLUMNS) <= set(row)
        images_per_s, step_ms = float(row["infer_samples_per_sec"]), float(row["infer_step_time"])
        assert images_per_s * step_ms == pytest.approx(2 * 1000, rel=0.01)
        counts = flops.count_model("resnet20_cifar", 32)
        assert float(row["infer_gmacs"]) == pytest.approx(counts.macs / 1e9, abs=0.006)
        assert float(row["infer_macts"]) == pytest.approx(counts.activations / 1e6, abs=0.006)
        assert row["param_count"] == "0.27"  # He et al. 2016, table 6
        assert row["device"]
        assert int(row["peak_mem"]) >= 1

    def test_training_row_and_appending(self, tmp_path):
        out = tmp_path / "train.csv"
        run_throughput(out, "--train", "--dtype", "bfloat16")
        rows = run_throughput(out, "--train", "--dtype", "float32")
        assert [row["dtype"] for row in rows] == ["bfloat16", "float32"]
        assert [name for name in rows[0] if name in TRAINING_COLUMNS] == TRAINING_COLUMNS

    def test_other_columns_are_refused(self, tmp_path):
        out = tmp_path / "rows.csv"
        throughput.append(out, {"model": "a", "x": 1})
        with pytest.raises(
            ValueError, match=r"rows.csv has the columns \['model', 'x'\].*name another file with --out"
        ):
            throughput.append(out, {"model": "a", "y": 1})

    def test_unknown_model(self, tmp_path):
        with pytest.raises(ValueError, match="resnet50"):
            throughput.main(["--models", "resnet5O", "--out", str(tmp_path / "rows.csv")])

    def test_patterns(self):
        assert throughput.expand(["resnet*_cifar", "resnet20_cifar"])[0] == "resnet110_cifar"
        assert len(throughput.expand(["resnet*_cifar", "resnet20_cifar"])) == 5


class TestOutOfMemory:
    def test_halves_until_it_fits(self):
        tried = []

        def measure(batch):
            tried.append(batch)
            if batch > 3:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")
            return batch

        assert throughput.halve_until_fits(measure, 24) == 3
        assert tried == [24, 12, 6, 3]

    def test_one_image_too_many(self):
        def measure(batch):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: at batch {batch}")

        with pytest.raises(jax.errors.JaxRuntimeError, match=r"at batch 1$"):
            throughput.halve_until_fits(measure, 4)

    def test_other_errors_stand(self):
        def measure(batch):
            raise jax.errors.JaxRuntimeError(f"INTERNAL: at batch {batch}")

        with pytest.raises(jax.errors.JaxRuntimeError, match="at batch 4"):
            throughput.halve_until_fits(measure, 4)


class TestTiming:
    def test_summary(self):
        assert timing.summarise([3.0, 1.0, 2.0, 4.0, 100.0]) == timing.Summary(3.0, 1.0, 1.0)
        assert timing.summarise([5.0]) == timing.Summary(5.0, 0.0, 5.0)

    def test_warmup_is_not_timed(self):
        calls = []
        runs = timing.time_runs(lambda: calls.append(1), repeats=3, warmup=2)
        assert len(calls) == 5
        assert [len(values) for values in runs] == [3, 3, 3]

    def test_compiled_program_and_its_memory(self):
        compiled = timing.compile_ahead(lambda x: x @ x + 1, (jnp.ones((64, 64)),))
        assert compiled.call(jnp.ones((64, 64)))[0, 0] == 65
        assert compiled.peak_bytes >= 2 * 64 * 64 * 4
        assert compiled.compile_s > 0

    def test_steps_learn_two_images(self):
        spec = TOY_SPECS["vit_s16"]
        model = peers.ours("vit_s16", spec, "ours", jax.random.key(0))
        init, step = timing.adamw_step(model.train, spec.num_classes)
        images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
        carry = init(model.params, model.state)
        compiled = timing.compile_ahead(step, (carry, images), donate=(0,))
        call = timing.repeated_step(compiled.call, carry, images)
        losses = [float(call()) for _ in range(200)]
        assert losses[0] == pytest.approx(math.log(10), rel=0.3)
        assert losses[-1] < 0.1 * losses[0]


class TestOurs:
    @pytest.mark.parametrize("name", list(SPECS))
    def test_published_parameters(self, name):
        shapes = jax.eval_shape(lambda key: peers.ours(name, SPECS[name], "ours", key).params, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]

    def test_variants_agree(self):
        images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

        def logits(variant):
            model = peers.ours("vit_s16", TOY_SPECS["vit_s16"], variant, jax.random.key(0))
            return jax.jit(model.train)(model.params, model.state, images)[0]

        expected = logits("ours")
        for variant in peers.OURS[1:]:
            assert jnp.allclose(logits(variant), expected, atol=1e-5 * jnp.abs(expected).max())

    @pytest.mark.parametrize("task", peers.TASKS)
    @pytest.mark.parametrize("model", list(TOY_SPECS))
    def test_measured(self, model, task):
        measured = peers.measure(toy_job(model, task))
        assert len(measured.wall) == 2
        assert min(measured.wall) > 0
        assert measured.peak_rss_bytes > 5e7


class TestDriver:
    def test_tables(self, tmp_path, monkeypatch, capsys):
        out = tmp_path / "peers.md"
        toy = ["--toy", "--models", "vit_s16", "--tasks", "forward", "--contestants", "ours"]
        peers.main([*toy, "--rounds", "1", "--repeats", "1", "--malloc", "tuned", "--wait", "0", "--out", str(out)])
        (row,) = table(out.with_suffix(".csv"))
        assert (row["contestant"], row["malloc"], row["batch"]) == ("ours", "tuned", "2")
        assert row["command"].startswith("python benchmarks/peers.py --toy")
        assert "| ours | tuned |" in out.read_text()
        assert "round 1 vit_s16 forward ours tuned" in capsys.readouterr().out

    def test_failing_process_is_reported(self):
        with pytest.raises(RuntimeError, match=r"contestant='nobody'.*exited with 1"):
            peers.run_process(toy_job(contestant="nobody"))

    def test_turns(self):
        options = peers.parse(["--models", "vit_s16", "resnet50", "--tasks", "train"])
        jobs = [(job.model, job.malloc, job.contestant) for job in peers.plan(options)]
        assert jobs[:3] == [("vit_s16", "default", name) for name in ("ours", "flax", "equinox")]
        assert ("vit_s16", "tuned", "ours_dots") in jobs
        assert ("resnet50", "tuned", "ours_dots") not in jobs
        assert ("vit_s16", "tuned", "torch_channels_last") not in jobs
        assert ("resnet50", "tuned", "torch_channels_last") in jobs

    def test_unequal_networks_are_refused(self):
        results = {toy_job(): [result([1.0])], toy_job(contestant="flax"): [result([1.0], parameters=2)]}
        with pytest.raises(RuntimeError, match=r"vit_s16: .*\{'ours': 1, 'flax': 2\}"):
            peers.check_parameters(results)

    def test_no_number_no_time(self):
        with pytest.raises(RuntimeError, match="flax vit_s16 forward: the result is nan"):
            peers.require_finite(math.nan, toy_job(contestant="flax"))


class TestReport:
    def test_each_contestant_at_its_best(self):
        results = {
            toy_job(malloc="default"): [result([2.0, 2.0, 2.0])],
            toy_job(malloc="tuned"): [result([1.0, 1.0, 1.0])],
            toy_job(contestant="flax", malloc="default"): [result([3.0, 3.0, 3.0])],
            toy_job(contestant="flax", malloc="tuned"): [result([4.0, 4.0, 4.0])],
        }
        lines = peer_report.markdown(peer_report.rows(results)).splitlines()
        assert lines[2] == "| ours | tuned | 1.00 | 2.00 | 1.0000 ± 0.0000 | 3 | 4 | 1.00 | 1.00 |"
        assert lines[3] == "| flax | default | 1.00 | 2.00 | 3.0000 ± 0.0000 | 3 | 4 | 3.00 | 1.00 |"

    def test_disturbed_runs_are_left_out(self):
        runs = [result([1.0, 9.0, 1.2], [0.0, 0.5, 0.05]), result([1.1, 9.0, 9.0], [0.0, 0.3, 0.9])]
        row = peer_report.row(toy_job(), runs)
        assert (row.run_s, row.samples) == (1.1, 3)

    def test_all_disturbed_runs_are_kept(self):
        row = peer_report.row(toy_job(), [result([1.0, 2.0, 3.0], [0.5, 0.5, 0.5])])
        assert (row.run_s, row.samples, row.others_share) == (2.0, 3, 0.5)
        assert "| 2.0000 ± 0.5000 (disturbed) |" in peer_report.markdown([row])


def multiply_adds(model, spec):
    size = (spec.image_size, spec.image_size)
    images = jnp.zeros((1, 3, *size) if model.channels_first else (1, *size, 3))
    return count(model.evaluate, model.params, model.state, images).macs


@pytest.mark.parity
class TestPeers:
    @pytest.mark.parametrize("task", peers.TASKS)
    @pytest.mark.parametrize("model", list(TOY_SPECS))
    @pytest.mark.parametrize("contestant", [*JAX_PEERS, *TORCH_PEERS])
    def test_measured(self, model, task, contestant):
        job = toy_job(model, task, contestant)
        if not peers.applies(contestant, job.spec):
            pytest.skip("channels-last is a question for convolutions")
        measured = peers.measure(job)
        assert min(measured.wall) > 0
        ours = peers.ours(model, job.spec, "ours", jax.random.key(0))
        assert measured.parameters == sum(leaf.size for leaf in jax.tree.leaves(ours.params))

    @pytest.mark.parametrize("model", list(TOY_SPECS))
    @pytest.mark.parametrize("contestant", JAX_PEERS)
    def test_same_multiply_adds(self, model, contestant):
        spec = TOY_SPECS[model]
        expected = multiply_adds(peers.ours(model, spec, "ours", jax.random.key(0)), spec)
        assert multiply_adds(peers.jax_model(contestant, model, spec), spec) == expected

    @pytest.mark.parametrize("name", list(SPECS))
    @pytest.mark.parametrize("contestant", JAX_PEERS)
    def test_published_parameters(self, name, contestant):
        shapes = jax.eval_shape(lambda: peers.jax_model(contestant, name, SPECS[name]).params)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]

    @pytest.mark.parametrize("name", list(SPECS))
    def test_published_parameters_in_torch(self, name):
        import torch

        from benchmarks.peer_models import pytorch

        with torch.device("meta"):
            network = pytorch.network(SPECS[name])
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
