"""Images per second from JPEG files to training batches: eqvision's streams beside PyTorch's DataLoader.

    python benchmarks/input_pipeline.py --rounds 5

Generates photo-like JPEGs (500 px, about 55 KB), then measures decode, random resized crop to 224, flip and batching.
Every measurement is its own process, one at a time, and the contestants take turns in every round so that drift of
the machine meets all of them. Then one process trains a stand-in for a model whose step takes 1.5 times as long as
the stream needs for a batch, and measures how long that step waits for data. Writes Markdown and CSV.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks import input_report, timing  # noqa: E402

CLASSES = 4
STEP_OVER_STREAM = 1.5  # how much longer the stand-in's step takes than the stream alone needs for its batch


class Job(NamedTuple):
    """One measurement: whose loader, which decoder, and what reads (``workers`` 0: that many threads)."""

    loader: str
    decoder: str
    threads: int
    workers: int

    @property
    def name(self) -> str:
        readers = f"{self.workers} workers" if self.workers else f"{self.threads} threads"
        return f"{self.loader} {self.decoder}, {readers}"


OURS = tuple(Job("eqvision", d, t, w) for d in ("pillow", "fast") for t, w in ((1, 0), (2, 0), (4, 0), (0, 2)))
THEIRS = (Job("torch", "pillow", 0, 0), Job("torch", "pillow", 0, 2))
JOBS = (*OURS, *THEIRS)
WAIT = Job("eqvision", "pillow", 1, 0)  # one thread: the stand-in's step needs the other core


class Result(NamedTuple):
    """Of one process: seconds to the first batch; of each window images/s, processor seconds per image over all
    threads and workers, and others' share of the machine."""

    start_s: float
    images_per_s: list[float]
    cpu_s: list[float]
    others: list[float]


class Wait(NamedTuple):
    """The stream alone and the step alone (seconds per batch), and the share of the run spent waiting for data."""

    stream_s: float
    step_s: float
    wait_share: float
    steps: int


# The images


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft colours, discs with sharp edges, and fine texture: a JPEG of quality 90 has the size of a photograph's."""
    from PIL import Image

    def smooth(cell: int, low: int, high: int) -> np.ndarray:
        grid = rng.integers(low, high, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC), np.float32)

    pixels = smooth(50, 0, 256) + 0.4 * (smooth(3, 40, 216) - 128)
    rows, columns = np.ogrid[:height, :width]
    for _ in range(8):
        y, x, radius = rng.integers(height), rng.integers(width), rng.integers(20, 120)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        pixels[inside] = 0.3 * pixels[inside] + 0.7 * rng.integers(0, 256, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_images(folder: Path, count: int, long_side: int) -> float:
    """``count`` JPEGs in class folders, upright and flat ones; returns their mean size in bytes."""
    from PIL import Image

    rng, sizes = np.random.default_rng(0), []
    for number in range(count):
        shape = (long_side * 3 // 4, long_side) if number % 4 else (long_side, long_side * 3 // 4)
        file = folder / f"class{number % CLASSES}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(rng, *shape)).save(file, quality=90)
        sizes.append(file.stat().st_size)
    return float(np.mean(sizes))


# The contestants


def our_batches(job: Job, options: argparse.Namespace) -> Iterator:
    """eqvision's training stream."""
    from eqvision.data import ImageFolder, encoded_train_transform, train_stream

    return train_stream(
        ImageFolder(options.data),
        batch_size=options.batch,
        seed=0,
        transform=encoded_train_transform("imagenet", options.image_size, decoder=job.decoder),
        num_threads=job.threads,
        num_workers=job.workers,
    )


class TorchFolder:
    """The same files and operations as PyTorch users write them, with torchvision's parameters for the crop."""

    def __init__(self, folder: Path, size: int):
        self.files = sorted(folder.glob("*/*.jpg"))
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch
        from PIL import Image

        with Image.open(self.files[index]) as opened:
            image = opened.convert("RGB")
        left, top, width, height = torch_region(image.width, image.height)
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(crop)), int(self.files[index].parent.name[-1])


def torch_region(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random region: 8 to 100 % of the area, ratio 3/4 to 4/3, ten tries."""
    import torch

    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.08, 1.0).item()
        ratio = math.exp(torch.empty(1).uniform_(low, high).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = torch.randint(0, width - w + 1, (1,)).item(), torch.randint(0, height - h + 1, (1,)).item()
            return int(left), int(top), w, h
    return 0, 0, width, height


def torch_batches(job: Job, options: argparse.Namespace) -> Iterator:
    """PyTorch's DataLoader, epoch after epoch, its workers kept."""
    from torch.utils.data import DataLoader

    folder: Any = TorchFolder(options.data, options.image_size)
    loader = DataLoader(
        folder, options.batch, shuffle=True, drop_last=True, num_workers=job.workers, persistent_workers=job.workers > 0
    )
    while True:
        yield from loader


# Measuring


def measure(job: Job, options: argparse.Namespace) -> Result:
    """Windows of ``options.batches`` batches from one stream; the first window is not counted."""
    start = time.perf_counter()
    batches = (torch_batches if job.loader == "torch" else our_batches)(job, options)
    check_batch(next(batches), options)
    result = Result(time.perf_counter() - start, [], [], [])
    for window in range(options.repeats + 1):
        wall, cpu, busy = time.perf_counter(), own_cpu_s(), timing.busy_s()
        for _ in range(options.batches):
            next(batches)
        wall, cpu, busy = time.perf_counter() - wall, own_cpu_s() - cpu, timing.busy_s() - busy
        if window:
            result.images_per_s.append(options.batches * options.batch / wall)
            result.cpu_s.append(cpu / (options.batches * options.batch))
            result.others.append(max(0.0, busy - cpu) / (wall * (os.cpu_count() or 1)))
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return result


def check_batch(batch: Any, options: argparse.Namespace) -> None:
    """RuntimeError unless the loader gives what all of them should give."""
    images = batch[0]
    shape, kind = tuple(images.shape), str(images.dtype).rpartition(".")[2]
    wanted = (options.batch, options.image_size, options.image_size, 3)
    if shape != wanted or kind != "uint8":
        raise RuntimeError(f"a batch of images has shape {shape} and type {kind}; expected {wanted} and uint8")


def own_cpu_s() -> float:
    """Processor seconds of this process and of the workers it has started."""
    ticks = os.sysconf("SC_CLK_TCK")
    stats = [Path(f"/proc/{child.pid}/stat") for child in multiprocessing.active_children()]
    fields = [stat.read_text().rpartition(")")[2].split() for stat in stats if stat.exists()]
    return time.process_time() + sum(int(f[11]) + int(f[12]) for f in fields) / ticks


def measure_wait(options: argparse.Namespace) -> Wait:
    """Run the stand-in's steps on the batches of a stream, which the device feed prepares meanwhile."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from eqvision.data import device_feed

    alone = measure(WAIT, options)
    stream_s = options.batch / timing.summarise(alone.images_per_s).median
    step, step_s = stand_in(STEP_OVER_STREAM * stream_s, options)
    steps = options.batches * options.repeats
    with device_feed(our_batches(WAIT, options), SingleDeviceSharding(jax.devices()[0])) as feed:
        start, waited = 0.0, 0.0
        for number in range(-options.batches, steps):  # a first window fills the queues
            if number == 0:
                start, waited = time.perf_counter(), feed.wait_seconds
            # Not before the step has ended is the next batch asked for: what ``next`` waits then, the device waits.
            step(next(feed).images).block_until_ready()
        wall, waited = time.perf_counter() - start, feed.wait_seconds - waited
    return Wait(stream_s, step_s, waited / wall, steps)


def stand_in(seconds: float, options: argparse.Namespace):
    """A compiled function of a batch that takes about so long, and the seconds it takes: products of matrices."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def step(images, rounds):
        x = jnp.full((256, 256), images.mean() / 255)
        return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), x)

    images = np.zeros((options.batch, options.image_size, options.image_size, 3), np.uint8)

    def timed(rounds: int) -> float:
        runs = timing.time_runs(lambda: step(images, rounds).block_until_ready(), 3, warmup=1)
        return timing.summarise(runs.wall).median

    rounds = 100
    for _ in range(3):  # what a call costs beside its rounds is small, so the proportion closes in at once
        rounds = max(1, round(rounds * seconds / timed(rounds)))
    return lambda images: step(images, rounds), timed(rounds)


def run_process(job: Job | None, options: argparse.Namespace, data: Path) -> Any:
    """One measurement in a process of its own; RuntimeError with the end of its error output where it fails."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"  # leaves a core to the stream
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    sizes = ["--batch", options.batch, "--batches", options.batches, "--repeats", options.repeats]
    sizes += ["--image-size", options.image_size, "--data", data, "--worker", json.dumps(job)]
    command = [sys.executable, __file__, *map(str, sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    values = json.loads(done.stdout.splitlines()[-1])
    return Wait(*values) if job is None else Result(*values)


def run_round(results: dict[Job, list[Result]], waits: list[Wait], options: argparse.Namespace, data: Path) -> None:
    """Every contestant once, one process at a time, and the wait for data."""
    for job, so_far in results.items():
        timing.wait_until_quiet(options.wait)
        so_far.append(run_process(job, options, data))
        speed, cpu, others = (timing.summarise(values).median for values in so_far[-1][1:])
        print(f"{job.name}: {speed:.0f} images/s, {1000 * cpu:.2f} ms each (others {others:.0%})", flush=True)
    if options.wait_share:
        timing.wait_until_quiet(options.wait)
        waits.append(run_process(None, options, data))
        print(f"wait for data: {waits[-1].wait_share:.1%}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="JPEGs to generate")
    parser.add_argument("--long-side", type=int, default=500, help="of the JPEGs, in pixels")
    parser.add_argument("--image-size", type=int, default=224, help="of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="in each timed window")
    parser.add_argument("--repeats", type=int, default=4, help="timed windows per process")
    parser.add_argument("--rounds", type=int, default=5, help="processes per measurement")
    parser.add_argument("--only", nargs="+", default=[""], help="contestants whose names begin so")
    parser.add_argument("--wait", type=float, default=30, help="seconds to wait at most for a quiet machine, each time")
    parser.add_argument("--wait-share", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/input_pipeline.md", help="FILE.md; FILE.csv beside it"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Worker: one measurement, one JSON line. Otherwise: all rounds, with the tables written anew after each."""
    options = parse(arguments)
    if options.worker:
        job = json.loads(options.worker)
        print(json.dumps(measure_wait(options) if job is None else measure(Job(*job), options)))
        return
    before = os.getloadavg()
    results: dict[Job, list[Result]] = {j: [] for j in JOBS if j.name.startswith(tuple(options.only))}
    waits: list[Wait] = []
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), options.images, options.long_side)
        for _ in range(options.rounds):
            run_round(results, waits, options, Path(folder))
            head = input_report.header(before, arguments, options, size)
            input_report.write(options.out, head, results, waits)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
