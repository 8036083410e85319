"""Several processes as one run: how they find each other, and what they must do together.

``jax.distributed`` connects them. A launcher that JAX knows (SLURM, Open MPI, Kubernetes, TPU pods on GKE) is found by
its environment variables; elsewhere ``--mesh.coordinator``, ``--mesh.num-processes`` and ``--mesh.process-id`` say it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from eqvision.meeting import MeetingError, meet
from eqvision.recipes.config import MeshConfig

TIMEOUT_SECONDS = 300  # for all processes to arrive; jax.distributed's own default
_COLLECTIVES = "jax_cpu_collectives_implementation"

T = TypeVar("T")


class Launcher(NamedTuple):
    """A program that starts processes and tells each who it is; ``method`` is its name in ``jax.distributed``
    (None: it has none there, and JAX finds it last of all).

    It is present where every variable of ``signs`` is set. ``count`` is the variable of the number of processes
    ("" where only JAX can ask for it), ``index`` that of this process, ``local`` that of its place on the host.
    """

    name: str
    method: str | None
    signs: tuple[str, ...]
    count: str
    index: str
    local: str


# The order is that in which JAX asks: mpirun inside a SLURM job is Open MPI.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        "ompi",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    Launcher(
        "SLURM",
        "slurm",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    ),
    Launcher("a TPU pod on GKE", "gketpu", ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), "", "TPU_WORKER_ID", ""),
    Launcher("Kubernetes", None, ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"), "", "JOB_COMPLETION_INDEX", ""),
)


class Explicit(NamedTuple):
    """Who this process is, as the flags say (and the launcher, where it gives what they leave out)."""

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: list[int] | None


def initialise(config: MeshConfig, *, timeout_seconds: int = TIMEOUT_SECONDS) -> None:
    """Connect this process to the others of its run; returns at once where it runs alone or is connected already.

    Must come before anything that touches a device. ``config.coordinator`` is HOST:PORT of process 0, or "" for a
    launcher found by its environment, or "auto" to let JAX ask everything it knows (TPU pods without GKE), or "none"
    to run alone whatever the environment says. Raises ValueError for flags that do not fit and for a launcher that
    lacks something; MeetingError where the processes do not find each other in time or disagree on who they are.
    """
    if jax.distributed.is_initialized():
        return
    explicit = explicit_flags(config, os.environ)
    if explicit is not None:
        return _start_explicit(explicit, timeout_seconds)
    if config.coordinator == "auto":
        return _start(initialization_timeout=timeout_seconds)
    launcher = None if config.coordinator == "none" else find_launcher(os.environ)
    if launcher is not None:
        _say(f"process {os.environ[launcher.index]} under {launcher.name}: waiting for the others")
        _start(initialization_timeout=timeout_seconds, cluster_detection_method=launcher.method)


def runs_alone(config: MeshConfig) -> bool:
    """Whether ``initialise`` will connect to no other process; asks no device. Raises ValueError as it does."""
    if config.coordinator == "auto" or explicit_flags(config, os.environ) is not None:
        return False
    return config.coordinator == "none" or find_launcher(os.environ) is None


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started several processes, of which this is one; None where this process is alone.

    Raises ValueError, naming the way out, where the launcher is there and JAX could not use it.
    """
    launcher = _present(environment)
    if launcher is None or _is_single(launcher, environment):
        return None
    if launcher.method == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise ValueError(
            "Open MPI 5 and newer do not tell where process 0 runs; add --mesh.coordinator HOST:PORT, the same on all "
            "ranks (number and id of the process are taken from Open MPI), or --mesh.coordinator none to run alone"
        )
    if launcher.name == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            "this pod belongs to an indexed Kubernetes job, but the package `kubernetes`, by which JAX finds the other "
            "pods, is not installed: pip install 'jax[k8s]', or give --mesh.coordinator, --mesh.num-processes and "
            "--mesh.process-id, or --mesh.coordinator none to run alone"
        )
    return launcher


def _present(environment: Mapping[str, str]) -> Launcher | None:
    return next((each for each in LAUNCHERS if all(sign in environment for sign in each.signs)), None)


def _is_single(launcher: Launcher, environment: Mapping[str, str]) -> bool:
    if launcher.method == "gketpu":
        slices = int(environment.get("MEGASCALE_NUM_SLICES", "1"))
        return slices == 1 and "," not in environment["TPU_WORKER_HOSTNAMES"]
    return launcher.count != "" and environment.get(launcher.count, "1") == "1"


def explicit_flags(config: MeshConfig, environment: Mapping[str, str]) -> Explicit | None:
    """What the flags say about this process, None where they leave it to the environment.

    Raises ValueError for flags of which some are missing or out of range, naming each.
    """
    if config.coordinator in ("", "auto", "none"):
        _refuse_ids_without_coordinator(config)
        return None
    _check_address(config.coordinator)
    launcher = _present(environment)
    num_processes = config.num_processes or _number(environment, launcher.count if launcher else "", 0)
    process_id = config.process_id
    if process_id < 0:
        process_id = _number(environment, launcher.index if launcher else "", -1)
    _check_ids(config, num_processes, process_id)
    local = _number(environment, launcher.local if launcher else "", -1)
    chosen = local < 0 or "JAX_LOCAL_DEVICE_IDS" in environment
    return Explicit(config.coordinator, num_processes, process_id, None if chosen else [local])


def _number(environment: Mapping[str, str], variable: str, otherwise: int) -> int:
    return int(environment.get(variable, otherwise)) if variable else otherwise


def _refuse_ids_without_coordinator(config: MeshConfig) -> None:
    given = [
        f"{option} {value}"
        for option, value, unset in (
            ("--mesh.num-processes", config.num_processes, 0),
            ("--mesh.process-id", config.process_id, -1),
        )
        if value != unset
    ]
    if given:
        raise ValueError(
            f"{' and '.join(given)} need --mesh.coordinator HOST:PORT, the address of process 0, which is "
            f"{config.coordinator or 'empty'}; give all three, or none under SLURM, Kubernetes or Open MPI"
        )


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--mesh.coordinator {address} is not HOST:PORT; expected the host of process 0 and a free port on it, "
            "such as node1:12345, or auto, or none"
        )


def _check_ids(config: MeshConfig, num_processes: int, process_id: int) -> None:
    where = f"with --mesh.coordinator {config.coordinator}"
    if num_processes < 1:
        raise ValueError(f"--mesh.num-processes {num_processes} {where}; expected the number of processes, 1 or more")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--mesh.process-id {process_id} {where}; expected 0 to {num_processes - 1}, another for each of the "
            f"{num_processes} processes (--mesh.num-processes)"
        )


def _start_explicit(who: Explicit, timeout_seconds: int) -> None:
    if who.process_id:
        _say(f"process {who.process_id} of {who.num_processes}: waiting for process 0 at {who.coordinator}")
    else:
        _say(f"process 0 of {who.num_processes}: waiting for the others at {who.coordinator}")
    meet(who.coordinator, who.num_processes, who.process_id, float(timeout_seconds))
    _start(
        coordinator_address=who.coordinator,
        num_processes=who.num_processes,
        process_id=who.process_id,
        local_device_ids=who.local_devices,
        initialization_timeout=timeout_seconds,
        cluster_detection_method="deactivate",
    )


def _start(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: list[int] | None = None,
    initialization_timeout: int,
    cluster_detection_method: str | None = None,
) -> None:
    # Without it, processes on CPU each see their own devices alone. It is JAX's default since 0.6; a build or a
    # flag may have another.
    if getattr(jax.config, _COLLECTIVES) in (None, "none"):
        jax.config.update(_COLLECTIVES, "gloo")
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method=cluster_detection_method,
        initialization_timeout=initialization_timeout,
    )


def _say(line: str) -> None:
    print(f"eqvision: {line}", file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is process 0, which alone prints and writes files (checkpoints excepted: all write their parts)."""
    return jax.process_index() == 0


def main_first(function: Callable[[], T]) -> T:
    """Run on process 0, then on the others: for what one creates and all read, such as the run folder.

    All processes must call it together. Where process 0 fails, it raises its own error and the others RuntimeError
    that quotes it, so that none waits for a process that has gone.
    """
    if not is_main_process():
        _raise_failure_of_main()
        return function()
    return _on_main(function)


def on_main(function: Callable[[], object]) -> None:
    """Run on process 0 alone while the others wait; errors as in ``main_first``."""
    if is_main_process():
        _on_main(function)
    else:
        _raise_failure_of_main()


def _on_main(function: Callable[[], T]) -> T:
    try:
        result = function()
    except BaseException as error:
        _from_main(f"{type(error).__name__}: {error}")
        raise
    _from_main("")
    return result


def _raise_failure_of_main() -> None:
    failure = _from_main("")
    if failure:
        raise RuntimeError(
            f"process 0 failed, so process {jax.process_index()} of {jax.process_count()} ends: {failure}"
        )


def _from_main(text: str) -> str:
    """Process 0's text on all processes; they wait for it."""
    if jax.process_count() == 1:
        return text
    from jax.experimental.multihost_utils import broadcast_one_to_all

    content = np.frombuffer(text.encode(), np.uint8)
    size = int(broadcast_one_to_all(np.array(len(content), np.int32)))
    padded = content if is_main_process() else np.zeros(size, np.uint8)
    return bytes(np.asarray(broadcast_one_to_all(padded))).decode() if size else ""


def check_same(what: str, value: str) -> None:
    """Raise ValueError on every process, naming those that differ from process 0, unless all pass the same ``value``.

    For what must be equal and is given to each process separately: options, the listing of the data.
    """
    if jax.process_count() == 1:
        return
    import hashlib

    from jax.experimental.multihost_utils import process_allgather

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    all_digests = np.asarray(process_allgather(digest))
    others = [int(index) for index in np.flatnonzero((all_digests != all_digests[0]).any(axis=1))]
    if others:
        raise ValueError(
            f"{what} of process {', '.join(map(str, others))} differs from that of process 0; every process must be "
            "started with the same options (but --mesh.process-id) and see the same data"
        )


__all__ = [
    "MeetingError",
    "check_same",
    "explicit_flags",
    "find_launcher",
    "initialise",
    "is_main_process",
    "main_first",
    "on_main",
    "runs_alone",
]
