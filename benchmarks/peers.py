"""The same networks built five ways and timed side by side: eqvision, Flax Linen, stock ``eqx.nn``, PyTorch.

    python benchmarks/peers.py --models vit_s16 resnet50 --rounds 3 --repeats 5

Every measurement is its own process, one at a time, and the contestants take turns in every round so that
drift of the machine meets all of them. Each runs under several settings of the C library's allocator, and
the table takes each contestant's best. Writes Markdown and CSV under ``benchmarks/results``.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peer_report, timing  # noqa: E402
from benchmarks.peer_models.specs import SPECS, TOY_SPECS, JaxModel, ResNetSpec, Spec, ViTSpec  # noqa: E402
from benchmarks.timing import MALLOC_SETTINGS  # noqa: E402

OURS = ("ours", "ours_unrolled", "ours_dots", "ours_full")
TORCH = ("torch", "torch_compile", "torch_channels_last", "torch_compile_channels_last")
CONTESTANTS = ("ours", "flax", "equinox", "torch", "torch_compile", *OURS[1:], *TORCH[2:])
RESNET_ONLY, VIT_ONLY = TORCH[2:], OURS[1:]
TASKS = ("forward", "train")


class Job(NamedTuple):
    """One measurement: what one process does."""

    model: str
    task: str
    contestant: str
    malloc: str
    batch: int
    image_size: int
    repeats: int
    warmup: int
    toy: bool

    @property
    def spec(self) -> Spec:
        return (TOY_SPECS if self.toy else SPECS)[self.model]._replace(image_size=self.image_size)


class Result(NamedTuple):
    """What a process reports; ``nan`` where a number does not exist (PyTorch has no temporaries to ask for)."""

    parameters: int
    trace_s: float
    compile_s: float
    temp_bytes: float
    peak_rss_bytes: int
    wall: list[float]
    cpu: list[float]
    others: list[float]


def ours(name: str, spec: Spec, variant: str, key) -> JaxModel:
    """eqvision's own contestant; ``variant`` is one of OURS: scanned, unrolled, or rematerialised."""
    import equinox as eqx

    import eqvision

    if name in eqvision.MODELS and spec == SPECS[name]._replace(image_size=spec.image_size):
        options = our_options(spec, variant) if isinstance(spec, ViTSpec) else {}
        model, state = eqvision.create(name, image_size=spec.image_size, **options, key=key)
    else:
        model, state = eqx.nn.make_with_state(our_network)(spec, variant, key)

    def evaluate(params, state, images):
        return params(images, state)[0]

    def train(params, state, images):
        return params(images, state, train=True)

    return JaxModel(model, state, evaluate, train)


def our_options(spec: ViTSpec, variant: str) -> dict[str, int | str]:
    """What a variant changes in a transformer."""
    options = {"ours": {}, "ours_unrolled": {"unroll": spec.depth}, "ours_dots": {"remat": "dots"}}
    return (options | {"ours_full": {"remat": "full"}})[variant]


def our_network(spec: Spec, variant: str, key):
    """A network that no zoo name has: the toys and the deep transformer, from the classes the zoo uses."""
    import jax

    from eqvision.backbones.resnet import ConvNorm, ResidualBlock, ResNet
    from eqvision.backbones.vit import VisionTransformer, ViTSize
    from eqvision.classifiers import Classifier
    from eqvision.heads import MapHead, TokenHead

    keys = jax.random.split(key, 3)
    if isinstance(spec, ViTSpec):
        size = ViTSize(spec.width, spec.depth, spec.heads, spec.mlp_dim)
        options = our_options(spec, variant)
        backbone = VisionTransformer(size, spec.patch, image_size=spec.image_size, **options, key=keys[0])
        return Classifier(backbone, None, TokenHead(spec.width, spec.num_classes, key=keys[1]))
    stages, channels = [], spec.width
    for stage, depth in enumerate(spec.depths):
        width, blocks = spec.width * 2**stage, []
        for index in range(depth):
            strides = (1, 2 if stage > 0 and index == 0 else 1, 1)
            shape = (channels, (width, width, 4 * width), (1, 3, 1), strides)
            blocks.append(ResidualBlock(*shape, shortcut="projection", zero_scale=True, key=keys[0]))
            channels = 4 * width
        stages.append(tuple(blocks))
    stem = ConvNorm(3, spec.width, 7, stride=2, key=keys[1])
    backbone = ResNet(stem, tuple(stages), pool_stem=True, in_channels=3)
    return Classifier(backbone, None, MapHead(channels, spec.num_classes, key=keys[2]))


def jax_model(contestant: str, name: str, spec: Spec) -> JaxModel:
    """The JAX contestant of that name."""
    import jax

    key = jax.random.key(0)
    if contestant in OURS:
        return ours(name, spec, contestant, key)
    if contestant not in CONTESTANTS:
        raise ValueError(f"contestant {contestant!r} does not exist; choose from {', '.join(CONTESTANTS)}")
    if contestant == "flax":
        from benchmarks.peer_models import flax_models

        return flax_models.build(spec, key)
    from benchmarks.peer_models import stock_equinox

    return stock_equinox.build(spec, key)


def measure_jax(job: Job) -> Result:
    """Trace, compile and time one task of a JAX contestant."""
    import jax

    spec, model = job.spec, jax_model(job.contestant, job.model, job.spec)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    size = (spec.image_size, spec.image_size)
    shape = (job.batch, 3, *size) if model.channels_first else (job.batch, *size, 3)
    images = jax.random.normal(jax.random.key(1), shape)
    if job.task == "forward":
        arguments = (model.params, model.state, images)
        compiled = timing.compile_ahead(model.evaluate, arguments)

        def call():
            return jax.block_until_ready(compiled.call(*arguments))
    else:
        init, step = timing.adamw_step(model.train, spec.num_classes)
        carry = init(model.params, model.state)
        compiled = timing.compile_ahead(step, (carry, images), donate=(0,))
        call = timing.repeated_step(compiled.call, carry, images)
        del model, carry  # donated
    runs = timing.time_runs(call, job.repeats, job.warmup)
    require_finite(float(call().sum()), job)
    return Result(parameters, *compiled[1:4], timing.peak_rss_bytes(), *runs)


def measure_torch(job: Job) -> Result:
    """Time one task of a PyTorch contestant; what its first call takes beyond a later one is its compile time."""
    from benchmarks.peer_models import pytorch

    compiled = "compile" in job.contestant
    model = pytorch.build(job.spec, job.batch, compiled, channels_last="channels_last" in job.contestant)
    call = model.forward if job.task == "forward" else model.train_step
    first = timing.time_runs(call, 1, warmup=0).wall[0]
    runs = timing.time_runs(call, job.repeats, job.warmup)
    require_finite(float(call().sum()), job)
    compile_s = first - timing.summarise(runs.wall).median if compiled else math.nan
    return Result(model.num_params, math.nan, compile_s, math.nan, timing.peak_rss_bytes(), *runs)


def require_finite(value: float, job: Job) -> None:
    """RuntimeError where the timed program produced no number: its time would mean nothing."""
    if not math.isfinite(value):
        raise RuntimeError(f"{job.contestant} {job.model} {job.task}: the result is {value}")


def measure(job: Job) -> Result:
    """Run one job in this process."""
    return measure_torch(job) if job.contestant in TORCH else measure_jax(job)


def run_process(job: Job) -> Result:
    """Run one job in a process of its own; RuntimeError with the end of its error output where it fails."""
    with tempfile.TemporaryDirectory() as cache:  # a warm inductor cache would hide torch.compile's cost
        environment = (
            os.environ | MALLOC_SETTINGS[job.malloc] | {"JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_CACHE_DIR": cache}
        )
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return Result(*json.loads(done.stdout.splitlines()[-1]))


def plan(options: argparse.Namespace) -> list[Job]:
    """The jobs of one round, contestants next to each other within each model and task."""
    return [
        Job(
            model,
            task,
            contestant,
            malloc,
            options.batch,
            options.image_size,
            options.repeats,
            options.warmup,
            options.toy,
        )
        for model in options.models
        for task in options.tasks
        for malloc in options.malloc
        for contestant in options.contestants
        if applies(contestant, (TOY_SPECS if options.toy else SPECS)[model])
    ]


def applies(contestant: str, spec: Spec) -> bool:
    """Channels-last is a question for convolutions, scanning and rematerialisation for transformers."""
    return contestant not in (VIT_ONLY if isinstance(spec, ResNetSpec) else RESNET_ONLY)


def check_parameters(results: dict[Job, list[Result]]) -> None:
    """RuntimeError where two contestants built networks of different size."""
    for model in dict.fromkeys(job.model for job in results):
        counts = {job.contestant: runs[0].parameters for job, runs in results.items() if job.model == model}
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"{model}: the contestants' parameter counts differ: {counts}")


def run_round(results: dict[Job, list[Result]], name: str, wait: float, attempts: int) -> None:
    """Every job once, one process at a time; its result joins its list.

    A job that other processes disturbed runs again, up to ``attempts`` times in all. Whether it does depends on
    what they took and never on the time measured.
    """
    for job, so_far in results.items():
        for _ in range(attempts):
            timing.wait_until_quiet(wait)
            result = run_process(job)
            so_far.append(result)
            run, others = timing.summarise(result.wall), timing.summarise(result.others).median
            times = f"{run.median:.4f} s (min {run.minimum:.4f}, others {others:.0%})"
            print(f"{name} {job.model} {job.task} {job.contestant} {job.malloc}: {times}", flush=True)
            if timing.is_quiet(others):
                break
    check_parameters(results)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``--toy`` brings its own models, batch and image size unless these are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SPECS, help="default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--malloc", nargs="+", choices=MALLOC_SETTINGS, default=["default", "tuned"])
    parser.add_argument("--rounds", type=int, default=3, help="processes per measurement")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per process")
    parser.add_argument("--warmup", type=int, default=2, help="calls before the timed ones")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait at most for a quiet machine, each time")
    parser.add_argument("--attempts", type=int, default=3, help="processes at most until one ran undisturbed")
    parser.add_argument("--batch", type=int, help="images per call (8)")
    parser.add_argument("--image-size", type=int, help="pixels (224)")
    parser.add_argument("--toy", action="store_true", help="two layers, 32 px, batch 2: to try the program")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/peers.md", help="FILE.md; FILE.csv beside it"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.models = options.models or list(TOY_SPECS if options.toy else SPECS)
    options.batch = options.batch or (2 if options.toy else 8)
    options.image_size = options.image_size or (32 if options.toy else 224)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Worker: one job, one JSON line. Otherwise: all rounds, with the tables written anew after each."""
    options = parse(arguments)
    if options.worker:
        print(json.dumps(measure(Job(*json.loads(options.worker)))))
        return
    before = os.getloadavg()
    results: dict[Job, list[Result]] = {job: [] for job in plan(options)}
    for number in range(1, options.rounds + 1):
        run_round(results, f"round {number}", options.wait, options.attempts)
        peer_report.write(options.out, peer_report.header(before, arguments), peer_report.rows(results))
    print(options.out.read_text())


if __name__ == "__main__":
    main()
