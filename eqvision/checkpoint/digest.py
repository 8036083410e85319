"""A digest of every leaf, computed on the device, equal for any number of devices and any sharding.

orbax and the formats beneath it store no checksum of the values: a flipped bit is restored without an error. The
digest is a sum of hashes of (position, bits), in integers modulo 2^32, so no order of summation changes it. It finds
damage; it is no protection against somebody who forges a checkpoint.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32

from eqvision.checkpoint.record import named_leaves


def digests(tree: PyTree[Array]) -> dict[str, str]:
    """``{name: "dtype[shape]:16 hexadecimal digits"}`` of all leaves; one that changed in any bit differs."""
    leaves = named_leaves(tree)
    # Over several devices one program at a time: programs with collectives that overlap can wait for each other, among
    # processes and, with the few threads of a CPU, within one.
    finished = jax.block_until_ready if _on_several(leaves) else lambda words: words
    finished(list(leaves.values()))
    words = jax.device_get([finished(_words(leaf)) for leaf in leaves.values()])
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}:{int(low):08x}{int(high):08x}"
        for (name, leaf), (low, high) in zip(leaves.items(), words, strict=True)
    }


def _on_several(leaves: dict[str, Array]) -> bool:
    return any(len(leaf.sharding.device_set) > 1 for leaf in leaves.values())


@jax.jit
def _words(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Two 32-bit sums. Mixing is a bijection of the bits at each position: one changed element changes the first."""
    bits = _bits(x)
    position = jnp.arange(bits.shape[0], dtype=jnp.uint32)
    hashed = _mix(bits ^ (position * jnp.uint32(0x9E3779B1)))
    second = (hashed ^ (hashed >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.stack([jnp.sum(hashed, dtype=jnp.uint32), jnp.sum(second ^ (second >> 12), dtype=jnp.uint32)])


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, " n"]:
    flat = x.reshape(-1)
    if flat.dtype == bool:
        return flat.astype(jnp.uint32)
    width = min(flat.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(flat, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    return words.reshape(-1).astype(jnp.uint32)


def _mix(x: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    """The finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
