"""The mesh of a run: axes, order of devices, and messages for shapes that do not fit."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from eqvision.mesh import AXES, BATCH, batch_shards, check_batch_size, make_mesh
from eqvision.recipes import MeshConfig


def test_all_devices_are_on_the_data_axis_by_default():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("config", "num_devices", "shape"),
    [
        (MeshConfig(fsdp=8), None, (1, 8, 1)),
        (MeshConfig(fsdp=4), None, (2, 4, 1)),
        (MeshConfig(fsdp=2, model=2), None, (2, 2, 2)),
        (MeshConfig(model=2), 4, (2, 1, 2)),
        (None, 1, (1, 1, 1)),
    ],
)
def test_what_fsdp_and_model_leave_is_data(config, num_devices, shape):
    mesh = make_mesh(config, num_devices)
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert batch_shards(mesh) == shape[0] * shape[1]


def test_neighbours_share_the_inner_axes():
    ids = np.vectorize(lambda device: device.id)(make_mesh(MeshConfig(fsdp=2, model=2)).devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


def test_a_batch_is_split_over_data_and_fsdp_and_repeated_over_model():
    mesh = make_mesh(MeshConfig(fsdp=2, model=2))
    rows = jax.device_put(np.arange(8), jax.NamedSharding(mesh, BATCH))
    assert [shard.data.tolist() for shard in rows.addressable_shards] == [
        [0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        (MeshConfig(fsdp=3), None, "--mesh.fsdp 3 times --mesh.model 1 is 3, which does not divide the 8 devices"),
        (MeshConfig(fsdp=4, model=4), None, "--mesh.fsdp 4 times --mesh.model 4 is 16"),
        (MeshConfig(fsdp=0), None, "--mesh.fsdp 0 is not a number of devices"),
        (MeshConfig(model=-1), None, "--mesh.model -1 is not a number of devices"),
        (None, 9, "num_devices=9; this run has 8 devices"),
        (None, 0, "num_devices=0; this run has 8 devices"),
    ],
)
def test_a_shape_that_does_not_fit_names_the_option(config, num_devices, message):
    with pytest.raises(ValueError, match=r".*") as caught:
        make_mesh(config, num_devices)
    assert message in str(caught.value)


def test_the_batch_is_shared_by_data_and_fsdp_but_not_by_model():
    mesh = make_mesh(MeshConfig(fsdp=2, model=2))
    check_batch_size("loop.batch_size", 4, mesh)
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"--loop.batch-size {size} cannot be shared by 4 devices; .* such as 4"):
            check_batch_size("loop.batch_size", size, mesh)
