"""Eight virtual CPU devices, a compilation cache on disk, and the comparison that the numerical tests share.

Nothing of eqvision is imported while this file loads: the jaxtyping hook that checks every shape is installed
after it, and would miss modules that are imported already.
"""

import os
import resource
import zlib
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

CACHE = os.environ.get("EQVISION_TEST_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_compile_cache"))

jax.config.update("jax_num_cpu_devices", 8)
# "raise" is out of the question: layers add (c,) parameters to (b, h, w, c) activations on purpose.
jax.config.update("jax_numpy_rank_promotion", "allow")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


SLOW = frozenset(
    line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if line and not line.startswith("#")
)


def pytest_addoption(parser):
    parser.addoption(
        "--turn", type=int, help="a share of the slow tests alone; another with each number (see _in_turn)"
    )


def pytest_collection_modifyitems(config, items):
    """Mark the tests of ``slow.txt`` and leave out those of other turns; ``-m`` is applied afterwards."""
    turn = config.getoption("--turn")
    kept, left = [], []
    for item in items:
        if item.nodeid.removeprefix("tests/") in SLOW:
            item.add_marker(pytest.mark.slow)
        (kept if turn is None or _in_turn(item, turn) else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _in_turn(item, turn):
    """A third of the variants in ``slow.txt``, half of the other slow and parity tests, and all that is neither."""
    name = item.nodeid.removeprefix("tests/")
    slow = any(item.get_closest_marker(mark) for mark in ("slow", "parity"))
    turns = 3 if name in SLOW else 2 if slow else 1
    return zlib.crc32(name.encode()) % turns == turn % turns


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """JAX keeps every program that it has compiled: 8 GiB in each of two workers after a thousand slow tests."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 4 * 2**20:  # KiB
        jax.clear_caches()


def _assert_leaf_close(path, actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    name = jax.tree_util.keystr(path) or "value"
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    error = np.max(np.abs(actual - expected), initial=0.0) / scale
    # Written so that NaN fails.
    assert error <= tolerance, f"{name}: error {error:.3g} of the scale {scale:.3g}, allowed {tolerance:.3g}"


def _assert_close(actual, expected, tolerance):
    jax.tree.map_with_path(lambda path, a, e: _assert_leaf_close(path, a, e, tolerance), actual, expected)


@pytest.fixture(scope="session")
def assert_close():
    """``assert_close(actual, expected, tolerance)`` for trees; each leaf's largest error over its largest value."""
    return _assert_close


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def getkey():
    """A function that gives another key at every call."""
    keys = (jax.random.fold_in(jax.random.key(0), number) for number in range(1_000_000))
    return lambda: next(keys)


@pytest.fixture
def mesh():
    """Eight devices in one row, axis ``data``."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture
def unchecked():
    """Switch the shape and type checks off, to reach the error that users without them see."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache of listings."""
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_runtest_setup(item):
    """timm and transformers import torchvision, which needs help beside a CPU build of PyTorch. One thread each: small
    tensors gain nothing by two, and workers of pytest-xdist would wait for each other's."""
    if item.get_closest_marker("parity") is not None:
        import torch

        from benchmarks.peer_models.torchvision_operators import usable_torchvision

        torch.set_num_threads(1)
        usable_torchvision()
