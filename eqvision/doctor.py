"""What a bug report needs, and what is wrong with this machine: system, versions, devices, decoders, disk.

Devices are looked at in another process: a wrong XLA flag or a broken driver ends the process that touches them.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MIB = 2**20
WRITTEN = 64 * MIB  # bytes of the file by which the disk's speed is measured
SHARED_PER_WORKER = 64 * MIB  # grain's worker processes hand over batches in /dev/shm; Docker gives it 64 MiB
LEAST_DISK = 2**30
TIMEOUT = 300.0  # seconds for the devices to answer
PYTHON = (3, 11)

# What pyproject.toml asks for, package and least version; a test compares the two.
REQUIRED = {
    "jax": "0.10",
    "jaxlib": "0.10",
    "equinox": "0.13.8",
    "optax": "0.2.8",
    "jaxtyping": "0.3.11",
    "beartype": "0.22",
    "grain": "0.2.18",
    "orbax-checkpoint": "0.12.8",
    "numpy": "2.0",
    "pillow": "11",
    "pyyaml": "6",
    "safetensors": "0.6",
    "tyro": "1.0",
    "tqdm": "4.67",
    "cloudpickle": "3",
    "ml_dtypes": "0.5",
    "msgpack": "1.1",
}
# Package, what it serves, and how it is installed.
OPTIONAL = [
    ("scikit-learn", "the embedded digits", "eqvision[demo]"),
    ("matplotlib", "plots and pictures", "eqvision[plots]"),
    ("tokenizers", "texts", "eqvision[text]"),
    ("faster-coco-eval", "AP and AR of detectors", "eqvision[coco]"),
    ("tensorboardX", "TensorBoard events", "eqvision[logging]"),
    ("wandb", "Weights & Biases", "eqvision[wandb]"),
    ("simplejpeg", "fast JPEG decoding", "eqvision[fast]"),
    ("opencv-python-headless", "fast image decoding", "eqvision[fast]"),
    ("flatbuffers", "StableHLO export", "eqvision[export]"),
    ("array-record", "ArrayRecord data", "array-record"),
    ("tensorflow-datasets", "TFDS data", "tensorflow-datasets"),
    ("datasets", "Hugging Face data", "datasets"),
    ("huggingface_hub", "weights by hf:organisation/repository", "eqvision[hub]"),
]
VARIABLES = re.compile(
    r"(JAX|XLA|EQVISION|TF_GPU|NCCL|LIBTPU|TPU|OMP|MALLOC)_\w+|GLIBC_TUNABLES|LD_PRELOAD|CUDA_VISIBLE\w+"
)


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    section: str
    name: str
    value: str
    problem: str = ""
    """What to do; empty where all is well."""
    note: str = ""
    """What is worth knowing and no problem."""


def examine(folder: Path | None = None, *, workers: int = 0) -> list[Finding]:
    """All findings; ``folder`` is where runs will be written, ``workers`` the processes that will read data.

    Writes a file of 64 MB into the folder and removes it, and starts a process that runs a training step.
    """
    folder = Path.cwd() if folder is None else folder
    local = [*system(), *packages(), *decoders(), *disk(folder, workers=workers), *environment()]
    return [*local, *devices()]


# System


def system() -> list[Finding]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    old = f"eqvision needs Python {PYTHON[0]}.{PYTHON[1]} or newer" if sys.version_info < PYTHON else ""
    return [
        Finding("system", "OS", platform.platform()),
        Finding("system", "Python", f"{platform.python_version()} ({sys.executable})", old),
        Finding("system", "CPU", f"{os.cpu_count()} cores, {threads} for this process, {platform.machine()}"),
        Finding("system", "RAM", _memory()),
        *_huge_pages(),
    ]


def _memory(root: Path = Path("/")) -> str:
    """Total and available; a container's own limit where it has one."""
    file = root / "proc/meminfo"
    if not file.exists():
        return "unknown"
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file.read_text().splitlines()}
    text = f"{_gib(values['MemTotal'])}, {_gib(values['MemAvailable'])} available"
    limit = root / "sys/fs/cgroup/memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        text += f", this container may use {_gib(int(limit.read_text()))}"
    return text


def _huge_pages(root: Path = Path("/")) -> list[Finding]:
    file = root / "sys/kernel/mm/transparent_hugepage/enabled"
    if not file.exists():
        return []
    chosen = re.search(r"\[(\w+)\]", file.read_text())
    value = chosen.group(1) if chosen else "unknown"
    note = "training on the CPU is faster with madvise or always" if value == "never" else ""
    return [Finding("system", "transparent huge pages", value, note=note)]


# Packages


def packages() -> list[Finding]:
    """Required ones with a least version, then optional ones with the line that installs them."""
    required = [_required(name, least) for name, least in REQUIRED.items()]
    return [Finding("packages", "eqvision", _eqvision()), *required, *(_optional(*row) for row in OPTIONAL)]


def _eqvision() -> str:
    from eqvision import __version__
    from eqvision.run_folder import git_commit

    return f"{__version__}, commit {commit}" if (commit := git_commit()) else __version__


def _required(name: str, least: str) -> Finding:
    found = _version(name)
    if found is not None and _numbers(found) >= _numbers(least):
        return Finding("packages", name, found)
    state = "not installed" if found is None else found
    return Finding("packages", name, state, f"needs {least} or newer: pip install -U '{name}>={least}'")


def _optional(name: str, purpose: str, install: str) -> Finding:
    found = _version(name)
    if found is None and name == "opencv-python-headless":
        found = _version("opencv-python")
    return Finding("packages", name, found or f"not installed; {purpose}: pip install '{install}'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``0.10.2.dev3`` as (0, 10, 2)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


# Decoders


def decoders() -> list[Finding]:
    return [
        _decoder("Pillow", _pillow),
        _decoder("simplejpeg", _simplejpeg, optional="simplejpeg"),
        _decoder("OpenCV", _opencv, optional="cv2"),
    ]


def _decoder(name: str, look: Callable[[], str], optional: str = "") -> Finding:
    """An optional one that is there and cannot be imported is a problem; one that is not there is none."""
    try:
        return Finding("decoders", name, look())
    except ModuleNotFoundError as error:
        if optional and error.name == optional:
            return Finding("decoders", name, "not installed")
        return Finding("decoders", name, f"broken: {error}", f"install {name} anew")
    except Exception as error:  # such as a missing system library, of which each package has its own error
        return Finding("decoders", name, f"broken: {error}", f"install {name} anew, or what it misses")


def _pillow() -> str:
    import PIL
    from PIL import features

    if not features.check("jpg"):
        raise ImportError("Pillow was built without JPEG")
    turbo = features.version("libjpeg_turbo") if features.check("libjpeg_turbo") else None
    jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}, not turbo: slower"
    rest = [kind for kind in ("webp", "avif") if features.check(kind)]
    return ", ".join([PIL.__version__, jpeg, *rest])


def _simplejpeg() -> str:
    import simplejpeg

    return str(simplejpeg.__version__)


def _opencv() -> str:
    import cv2

    jpeg = re.search(r"^\s*JPEG:\s*(.+)$", cv2.getBuildInformation(), re.MULTILINE)
    return f"{cv2.__version__}, {jpeg.group(1).strip() if jpeg else 'without JPEG'}"


# Disk


def disk(folder: Path, *, workers: int = 0, shared: Path = Path("/dev/shm")) -> list[Finding]:
    return [*_shared_memory(shared, workers), _space(folder), _write_speed(folder), _cache()]


def _shared_memory(shared: Path, workers: int) -> list[Finding]:
    if not shared.is_dir():
        return []
    usage, needed = shutil.disk_usage(shared), SHARED_PER_WORKER * max(workers, 1)
    value = f"{_size(usage.total)}, {_size(usage.free)} free"
    if usage.free >= needed:
        return [Finding("disk", str(shared), value)]
    advice = (
        f"worker processes need about {_size(needed)} of it for {max(workers, 1)}: docker run --shm-size=8g, "
        "or --data.num-workers 0"
    )
    return [Finding("disk", str(shared), value, advice if workers else "", "" if workers else advice)]


def _space(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    low = f"checkpoints need room: free some, or choose another --out than {folder}" if usage.free < LEAST_DISK else ""
    return Finding("disk", "current folder", f"{folder}: {_size(usage.free)} of {_size(usage.total)} free", low)


def _write_speed(folder: Path) -> Finding:
    """The file has no name in the folder where the system allows that, so that a kill leaves nothing."""
    block = os.urandom(4 * MIB)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        return Finding("disk", "write speed", f"cannot write to {folder}: {error.strerror}", "choose another --out")
    return Finding("disk", "write speed", f"{WRITTEN / 1e6 / seconds:.0f} MB/s (64 MB, on the disk when counted)")


def _cache() -> Finding:
    from eqvision.data.cache import cache_folder

    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Finding("disk", "cache folder", str(folder))
    except OSError as error:
        value = f"{folder} cannot be written: {error.strerror}"
        return Finding("disk", "cache folder", value, "set EQVISION_CACHE to a writable folder")


def environment() -> list[Finding]:
    """Variables that change what JAX, XLA, the allocator or eqvision do."""
    chosen = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
    chosen.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it itself where there is no TPU
    return [Finding("environment", name, value) for name, value in sorted(chosen.items())]


# Devices


def devices() -> list[Finding]:
    """Each kind of device, and the seconds of a training step on it; from another process."""
    command = [sys.executable, "-c", "from eqvision.doctor import report_devices; report_devices()"]
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "PYTHONPATH": paths}
    try:
        answer = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        advice = "another process may hold the device, or its driver hangs; try JAX_PLATFORMS=cpu"
        return [Finding("devices", "JAX", f"no answer in {TIMEOUT:.0f} s", advice)]
    if answer.returncode:
        return [_broken(answer)]
    found = [Finding("devices", **row) for row in json.loads(answer.stdout.splitlines()[-1])]
    return [*found, *_unused_gpu(found)]


def _broken(answer: subprocess.CompletedProcess) -> Finding:
    lines = [line for line in answer.stderr.strip().splitlines() if line.strip()] or ["no message"]
    said = next((line for line in lines if "Unknown flag" in line), lines[-1])[:300]
    asked = os.environ.get("JAX_PLATFORMS")
    advice = f"JAX_PLATFORMS={asked} does not work here; unset it" if asked else "try JAX_PLATFORMS=cpu"
    advice = "mend XLA_FLAGS" if "Unknown flag" in said else advice
    return Finding("devices", "JAX", f"does not start (exit code {answer.returncode}): {said}", advice)


def _unused_gpu(found: list[Finding], driver: Path = Path("/dev/nvidiactl")) -> list[Finding]:
    if not driver.exists() or any(row.name.startswith(("gpu", "cuda")) for row in found):
        return []
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return [Finding("devices", "NVIDIA driver", "present", note="JAX_PLATFORMS hides the GPU from JAX")]
    advice = 'pip install -U "jax[cuda13]" (or jax[cuda12] for older drivers)'
    return [Finding("devices", "NVIDIA driver", "present, but JAX sees no GPU", advice)]


def report_devices() -> None:
    """The rows of all platforms as one line of JSON on standard output; what ``devices`` runs."""
    print(json.dumps([row for name in ("cpu", "gpu", "tpu") for row in _platform(name)]))


def _platform(name: str) -> list[dict[str, str]]:
    import jax

    try:
        found = jax.devices(name)
    except RuntimeError:  # JAX has no such platform here
        return []
    stats = found[0].memory_stats() or {}
    memory = f", {_gib(stats['bytes_limit'])} each" if "bytes_limit" in stats else ""
    rows = [{"name": name, "value": f"{len(found)} x {found[0].device_kind}{memory}"}]
    return [*rows, {"name": f"{name} training step", **_step_row(found[0])}]


def _step_row(device: Any) -> dict[str, str]:
    start = time.perf_counter()
    try:
        before, after = training_step(device)
    except Exception as error:  # a driver, a compiler or memory may fail in any way; the table shows it
        return {"value": f"failed: {str(error).splitlines()[0][:300]}", "problem": "the device cannot train; see above"}
    if not after < before:
        return {"value": f"loss {before:.4f} -> {after:.4f}", "problem": "the device computes wrong numbers"}
    return {
        "value": f"finished in {time.perf_counter() - start:.1f} s with compilation; loss {before:.3f} -> {after:.3f}"
    }


def training_step(device: Any) -> tuple[float, float]:
    """The loss of a small network on eight random images before and after one step of gradient descent."""
    import jax
    import jax.numpy as jnp
    import optax

    from eqvision.zoo import create

    def loss(model, state, images, labels):
        logits, state = model(images, state, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    @jax.jit
    def step(model, state, images, labels):
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(model, state, images, labels)
        return jax.tree.map(lambda p, g: p - 0.01 * g, model, grads), state, value

    with jax.default_device(device):
        key = jax.random.key(0)
        model, state = create("small_cnn", num_classes=4, image_size=8, key=key)
        batch = jax.random.normal(key, (8, 8, 8, 3)), jnp.arange(8) % 4
        model, state, before = step(model, state, *batch)
        return float(before), float(step(model, state, *batch)[2])


def table(findings: list[Finding]) -> str:
    """Sections with aligned names; a line with ``!`` is a problem, and what to do about each follows at the end."""
    width = max(len(finding.name) for finding in findings)
    lines, section = [], ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        note = f"  ({finding.note})" if finding.note else ""
        lines.append(f"{'!' if finding.problem else ' '} {finding.name:<{width}}  {finding.value}{note}")
    wrong = [finding for finding in findings if finding.problem]
    lines.append(f"{len(wrong)} problem{'s' * (len(wrong) != 1)}{':' if wrong else ''}")
    return "\n".join([*lines, *(f"  {finding.name}: {finding.problem}" for finding in wrong)])


def as_json(findings: list[Finding]) -> str:
    """The same as JSON: the number of problems, and the findings in order."""
    problems = sum(bool(finding.problem) for finding in findings)
    return json.dumps({"problems": problems, "findings": [asdict(finding) for finding in findings]}, indent=2)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _size(size: int) -> str:
    return _gib(size) if size >= 2**30 else f"{size / MIB:.0f} MiB"
