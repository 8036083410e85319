"""The devices of a run."""

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(num_devices: int | None = None) -> Mesh:
    """All devices (or the first ``num_devices``) along one axis ``data``, over which batches are split.

    The axis is of type Auto: under Explicit axes, which ``jax.make_mesh`` defaults to, convolutions of sharded
    parameters need an output sharding each.
    """
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(option: str, batch_size: int, mesh: Mesh) -> None:
    """Raise a ValueError that names the option unless the devices share the batch equally."""
    if batch_size < 1 or batch_size % mesh.size:
        lower = max(1, batch_size // mesh.size) * mesh.size
        raise ValueError(
            f"--{option.replace('_', '-')} {batch_size} cannot be shared by {mesh.size} devices; "
            f"use a positive multiple of {mesh.size}, such as {lower}"
        )
