"""How runs survive: killed at random, asked to stop, damaged on disk, out of disk, running for long.

``python benchmarks/reliability.py kills|stop|damage|disk|soak`` runs one experiment in child processes, prints what it
saw, and writes it to benchmarks/results/reliability_NAME.md. Each exits with 1 where the promise does not hold.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402
from eqvision.checkpoint import CheckpointError, Checkpoints, digests  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("jax", "equinox", "optax", "orbax-checkpoint", "grain")


def write_data(folder: Path, *, train: int = 256, size: int = 16) -> Path:
    """Noise with a bright band whose place tells the class, as an archive for the recipe ``arrays``."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", 64)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 120, (count, size, size, 3), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[label * size // 4 : (label + 1) * size // 4] += 100
        arrays |= {f"images_{split}": images, f"labels_{split}": labels}
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def command(data: Path, out: Path, *extra: str, epochs: float = 8.0) -> list[str]:
    """A tiny ViT with all that draws random numbers or carries state: dropout, drop-path, mixup, average, two parts."""
    options = {
        "data.path": data,
        "out": out,
        "model.name": "vit_ti4",
        "model.image-size": 16,
        "model.dropout": 0.1,
        "model.drop-path": 0.2,
        "augment.mixup": 0.2,
        "augment.cutmix": 1.0,
        "augment.random-erasing": 0.25,
        "optimizer.name": "adamw",
        "optimizer.learning-rate": 1e-3,
        "optimizer.clip-norm": 1.0,
        "optimizer.ema": 0.99,
        "loop.batch-size": 32,
        "loop.accumulate": 2,
        "loop.eval-batch-size": 64,
        "loop.epochs": epochs,
        "loop.log-every": 5,
        "loop.eval-every": 16,
        "checkpoint.every": 4,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "eqvision.train", "arrays", *flags, *extra]


def environment(cache: Path) -> dict[str, str]:
    """A compilation cache shared by all starts, one CPU device, no restart for the allocator."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "EQVISION_ALLOCATOR": "default",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return {**{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}, **own}


def start(arguments: list[str], cache: Path, log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(arguments, env=environment(cache), stdout=file, stderr=file, cwd=ROOT)


def outcome(run: Path) -> dict[str, str]:
    """What two equal runs share: the digests of the last checkpoint and the metrics, byte for byte."""
    checkpoints = Checkpoints(run / "checkpoints")
    step = checkpoints.latest_step()
    if step is None:
        raise RuntimeError(f"{run} has no checkpoint")
    files = {name: (run / name).read_text() for name in ("metrics.csv", "metrics.jsonl", "result.json")}
    return {**checkpoints.record(step).digests, **files, "step": str(step)}


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise RuntimeError(f"a run ended with code {process.returncode}:\n{log.read_text()[-3000:]}")


def kills(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """R1 and R2: SIGKILL at random moments; threads and worker processes differ at every start."""
    rng = random.Random(options.seed)
    data, cache, log = write_data(folder), folder / "cache", folder / "log.txt"
    finish(start(command(data, folder / "warm"), cache, log), log)  # fills the compilation cache
    begin = time.perf_counter()
    finish(start(command(data, folder / "whole"), cache, log), log)
    seconds, wanted = time.perf_counter() - begin, outcome(folder / "whole")
    moments: list[int] = []
    results: list[bool] = []
    while len(moments) < options.count:
        out = folder / f"broken{len(results)}"
        while killed(command(data, out, *other_reading(rng)), cache, log, rng.uniform(0.2, seconds)):
            moments.append(Checkpoints(out / "checkpoints").latest_step() or 0)
            print(f"kill {len(moments)}; newest checkpoint {moments[-1]}", flush=True)
            if len(moments) == options.count:
                finish(start(command(data, out, *other_reading(rng)), cache, log), log)
                break
        results.append(outcome(out) == wanted)
        print(f"run {len(results)}: {'equal' if results[-1] else 'DIFFERS'}", flush=True)
    return [
        f"{len(moments)} kills by SIGKILL at random moments over {len(results)} runs of {wanted['step']} steps "
        f"({seconds:.1f} s each when left alone), 0 to 4 threads and 0 or 2 worker processes drawn at each start; "
        f"newest checkpoint at each kill: {', '.join(map(str, moments))}.",
        "Runs whose final parameters, optimizer state and average (by digest) and metrics files (by bytes) equal the "
        f"uninterrupted run's: {sum(results)} of {len(results)}.",
    ], all(results)


def other_reading(rng: random.Random) -> list[str]:
    """What must not change anything: how many threads and processes read the data."""
    threads, workers = rng.choice([0, 1, 2, 4]), rng.choice([0, 0, 2])
    return ["--data.num-threads", str(threads), "--data.num-workers", str(workers)]


def killed(arguments: list[str], cache: Path, log: Path, moment: float) -> bool:
    """Start a run and kill it after so many seconds; False where it ended before."""
    process = start(arguments, cache, log)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    finish(process, log)
    return False


def stop(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """R5: SIGTERM in the middle of training ViT-B; seconds until the process has saved its state and ended."""
    data, log = write_data(folder, train=64, size=32), folder / "log.txt"
    extra = [
        "--model.name",
        "vit_b16",
        "--model.image-size",
        "32",
        "--loop.batch-size",
        "8",
        "--checkpoint.every",
        "1000",
    ]
    extra += ["--loop.eval-every", "1000", "--loop.log-every", "1"]
    process = start(command(data, folder / "run", *extra, epochs=1000.0), folder / "cache", log)
    while "step 3/" not in log.read_text():
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-3000:])
        time.sleep(0.1)
    begin = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code, seconds = process.wait(), time.perf_counter() - begin
    step = Checkpoints(folder / "run/checkpoints").latest_step()
    size = sum(path.stat().st_size for path in (folder / "run/checkpoints").rglob("*") if path.is_file())
    lines = [
        f"ViT-B/16 (AdamW and average): {seconds:.1f} s from SIGTERM to the end of the process; exit code {code}; "
        f"checkpoint of step {step}, {size / 2**30:.2f} GiB."
    ]
    return lines, code == 75 and step is not None and seconds < 10


def damage(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """R6: a bit flip, a truncation or a deletion somewhere in the newest checkpoint, many times."""
    from eqvision.run_folder import RunFolder
    from eqvision.state import abstract_state
    from eqvision.train import set_up

    rng, data, log = random.Random(options.seed), write_data(folder), folder / "log.txt"
    finish(start(command(data, folder / "run", epochs=1.0), folder / "cache", log), log)
    config = RunFolder(folder / "run").config()
    setup = set_up(config)
    like = abstract_state(setup.problem.build, config, setup.optimizer, setup.mesh)
    steps = Checkpoints(folder / "run/checkpoints").steps()
    wanted = {step: Checkpoints(folder / "run/checkpoints").record(step).digests for step in steps}
    newest, files = steps[-1], sorted(p for p in (folder / f"run/checkpoints/{steps[-1]}").rglob("*") if p.is_file())
    seen, silent = Counter(), 0
    for number in range(options.count):
        copy = folder / "copy"
        shutil.copytree(folder / "run/checkpoints", copy)
        kind, file = rng.choice(["flip", "truncation", "deletion"]), rng.choice(files)
        break_file(copy / file.relative_to(folder / "run/checkpoints"), kind, rng)
        try:
            restored = Checkpoints(copy).restore_newest(like)
            step = restored.record.step if restored else None
            right = restored is not None and digests(restored.state) == wanted[step]
        except CheckpointError:
            step, right = None, True
        silent += not right
        seen[kind, "newest, unharmed" if step == newest else "previous" if right else "WRONG"] += 1
        shutil.rmtree(copy)
        if number % 20 == 19:
            print(f"{number + 1} of {options.count}: {dict(seen)}", flush=True)
    rows = [f"| {kind} | {what} | {count} |" for (kind, what), count in sorted(seen.items())]
    return [
        f"{options.count} random damages to the files of the newest checkpoint; wrong states restored: {silent}.",
        "\n".join(["| damage | restored step | cases |", "|---|---|---|", *rows]),
        "Unharmed: the damaged file holds nothing that the state depends on; every leaf had its digest.",
    ], silent == 0


def break_file(path: Path, kind: str, rng: random.Random) -> None:
    """One bit flipped, the end cut off, or the file gone."""
    content = bytearray(path.read_bytes())
    if kind == "deletion" or not content:
        path.unlink()
    elif kind == "truncation":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def disk(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """R7: a small file system fills up; needs the right to mount a tmpfs."""
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(small)], check=True)
    try:
        data, log = write_data(folder), folder / "log.txt"
        filler = small / "filler"
        process = start(command(data, small / "run", "--checkpoint.every", "4"), folder / "cache", log)
        while not Checkpoints(small / "run/checkpoints").steps():
            time.sleep(0.05)
        filler.write_bytes(b"0" * max(0, shutil.disk_usage(small).free - 20 * 2**20))
        code = process.wait()
        message = log.read_text().strip().splitlines()[-1]
        kept = Checkpoints(small / "run/checkpoints").steps()
        filler.unlink()
        finish(start(command(data, small / "run", "--checkpoint.every", "4"), folder / "cache", log), log)
        stale = [path.name for path in (small / "run/checkpoints").iterdir() if not path.name.isdigit()]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    return [
        f"A 600 MiB file system was filled while the run trained. Exit code {code}; checkpoints that stayed: {kept}. "
        f"When space was freed, the run went on to its end; left-over temporary folders: {stale}.",
        f"Message: `{message.replace(str(folder), 'FOLDER')}`",
    ], code == 2 and bool(kept) and not stale


def soak(options: argparse.Namespace, folder: Path) -> tuple[list[str], bool]:
    """R14: minutes of training; memory of the host and number of compilations."""
    data, log = write_data(folder), folder / "log.txt"
    arguments = command(data, folder / "run", epochs=1e6)
    process = subprocess.Popen(
        arguments,
        env={**environment(folder / "cache"), "JAX_LOG_COMPILES": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    samples, begin = [], time.perf_counter()
    while (passed := time.perf_counter() - begin) < 60 * options.minutes:
        time.sleep(5)
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-3000:])
        samples.append((passed / 60, resident(process.pid), compilations(log)))
    process.send_signal(signal.SIGTERM)
    process.wait()
    late = [sample for sample in samples if sample[0] > min(3.0, options.minutes / 3)]
    slope = float(np.polyfit([s[0] for s in late], [s[1] / 2**20 for s in late], 1)[0])
    compiled = late[-1][2][len(late[0][2]) :]
    step = Checkpoints(folder / "run/checkpoints").latest_step()
    lines = [
        f"{options.minutes:g} minutes, {step} steps with evaluations and checkpoints: resident memory "
        f"{late[0][1] / 2**20:.0f} MiB at minute {late[0][0]:.1f}, {late[-1][1] / 2**20:.0f} MiB at the end, slope "
        f"{slope:+.2f} MiB/min; compilations after the first minutes: {', '.join(compiled) or 'none'}."
    ]
    return lines, slope < 1 and not compiled


def compilations(log: Path) -> list[str]:
    """Names of the programs compiled so far, in order."""
    return re.findall(r"Finished XLA compilation of (\S+)", log.read_text())


def resident(pid: int) -> int:
    """Bytes of resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"process {pid} has no resident memory")


def device() -> str:
    return f"Device: {timing.processor_name()}."


EXPERIMENTS = {"kills": kills, "stop": stop, "damage": damage, "disk": disk, "soak": soak}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--count", type=int, help="kills (20) or damages (200)")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.count = options.count or (200 if options.experiment == "damage" else 20)
    with tempfile.TemporaryDirectory() as folder:
        lines, holds = EXPERIMENTS[options.experiment](options, Path(folder))
    shown = " ".join([options.experiment, *(sys.argv[2:] if arguments is None else arguments[1:])])
    title = f"# Reliability: {options.experiment}"
    text = "\n\n".join([title, device(), f"Versions: {timing.versions(PACKAGES)}.", *lines])
    text += f"\n\nCommand: `python benchmarks/reliability.py {shown}`\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"reliability_{options.experiment}.md").write_text(text)
    print(text)
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
