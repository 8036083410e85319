"""The devices of a run, and how the batch is split over them."""

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from eqvision.ops.collectives import DATA_AXES
from eqvision.recipes.config import MeshConfig

AXES = ("data", "fsdp", "model")
BATCH = P(DATA_AXES)  # the leading axis of a batch, over all devices that hold different examples


def make_mesh(config: MeshConfig | None = None, num_devices: int | None = None) -> Mesh:
    """All devices of all processes (or the first ``num_devices``) along the axes ``data``, ``fsdp`` and ``model``.

    ``config.fsdp`` and ``config.model`` devices form the last two, what remains is ``data``; neighbours in
    ``jax.devices()``, which have the fastest connections, share ``model`` first, then ``fsdp``. All three axes
    always exist. They are of type Auto: under Explicit axes, which ``jax.make_mesh`` defaults to, convolutions of
    sharded parameters need an output sharding each. Raises ValueError where the devices cannot be shared so.
    """
    config = MeshConfig() if config is None else config
    devices = jax.devices() if num_devices is None else _first(num_devices)
    for option, value in (("fsdp", config.fsdp), ("model", config.model)):
        if value < 1:
            raise ValueError(f"--mesh.{option} {value} is not a number of devices; expected 1 (off) or more")
    together = config.fsdp * config.model
    if len(devices) % together:
        raise ValueError(
            f"--mesh.fsdp {config.fsdp} times --mesh.model {config.model} is {together}, which does not divide the "
            f"{len(devices)} devices of this run; use factors of {len(devices)}"
        )
    shape = (len(devices) // together, config.fsdp, config.model)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _first(num_devices: int) -> list:
    devices = jax.devices()
    if not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices={num_devices}; this run has {len(devices)} devices")
    return devices[:num_devices]


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split: devices along ``model`` work on the same examples."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(option: str, batch_size: int, mesh: Mesh) -> None:
    """Raise a ValueError that names the option unless the devices share the batch equally."""
    shards = batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        lower = max(1, batch_size // shards) * shards
        raise ValueError(
            f"--{option.replace('_', '-')} {batch_size} cannot be shared by {shards} devices; "
            f"use a positive multiple of {shards}, such as {lower}"
        )
