"""``eqvision train RECIPE``: train a recipe, or resume it."""

import os
import sys
from pathlib import Path

from eqvision.commands.arguments import parse_recipe
from eqvision.distributed import is_main_process, runs_alone

# Under glibc's defaults XLA on the CPU gives its buffers back and faults them in anew in every step. Huge pages make
# those faults few: training steps take a fifth to a quarter less time, at the same memory. Other settings that keep
# freed memory gain no more and can double what larger models hold. It acts only if set before the process starts, and
# needs glibc 2.35 and transparent huge pages set to madvise or always.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run(arguments: list[str]) -> None:
    config = parse_recipe(arguments, "eqvision train")
    if config is None:
        return
    if runs_alone(config.mesh):  # finding out what devices there are would come too early
        tune_allocator()
    from eqvision.train import train

    result = train(config)
    if not is_main_process():
        return
    if result.num_skipped:
        print(f"skipped {result.num_skipped} corrupt images; their paths are in the log above", file=sys.stderr)
    for metric, value in result.metrics.items():
        print(f"test/{metric} {value:.4f}")
    print(f"run folder: {result.folder}")


def tune_allocator() -> None:
    """Start this process again with the allocator set for XLA on the CPU; on other devices do nothing.

    EQVISION_ALLOCATOR=default keeps glibc's own settings.
    """
    import jax

    command = Path(sys.argv[0]).stem in ("eqvision", "cli", "train")  # and not a notebook that called main([...])
    if not command or os.environ.get("EQVISION_ALLOCATOR") or sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    print(
        "CPU run: starting again with memory allocation tuned (EQVISION_ALLOCATOR=default turns it off)",
        file=sys.stderr,
    )
    os.execve(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ALLOCATOR, **os.environ, "EQVISION_ALLOCATOR": "tuned"}
    )
