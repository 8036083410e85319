"""Vectors of images and texts by a model of both, as its evaluators compare them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt8

from eqvision.data import device_feed, normalize
from eqvision.evaluate import StoppedEvaluation
from eqvision.mesh import BATCH
from eqvision.multimodal import Clip
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import ClassificationBatch, PairsBatch, TextTokens


class ImageVectors(NamedTuple):
    """One row per image, and its place in the source. Images that could not be decoded are left out."""

    values: Float[np.ndarray, "n d"]
    indices: Int[np.ndarray, " n"]


class Embedder:
    """Images and texts of any number to vectors of length one, in float32; compiled once for each shape of batch.

    Images are normalised by ``mean`` and ``std``; both towers compute in ``dtype``. Every host gets all rows.
    """

    def __init__(self, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...], dtype: str):
        self._layout = NamedSharding(mesh, BATCH)

        def of_images(model: Clip, images: UInt8[Array, "b h w c"], stats: eqx.nn.State) -> Float[Array, "b d"]:
            return model.encode_images(jnp.asarray(normalize(images, mean, std), jnp.dtype(dtype)), stats)[0]

        def of_texts(model: Clip, text: TextTokens) -> Float[Array, "b d"]:
            return model.encode_text(text, dtype=jnp.dtype(dtype))

        self._images = _on(mesh, of_images)
        self._texts = _on(mesh, of_texts)

    def images(
        self,
        model: Clip,
        stats: eqx.nn.State,
        batches: Iterator[PairsBatch] | Iterator[ClassificationBatch],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> ImageVectors:
        """Of an evaluation stream, which is closed. Raises StoppedEvaluation as soon as ``stop()`` says so."""
        rows = []
        with device_feed(batches, self._layout) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                vectors = self._images(model, batch.images, stats)
                rows.append(_everywhere(vectors, batch.indices, batch.weights))
        values, indices, weights = (np.concatenate(column) for column in zip(*rows, strict=True))
        return ImageVectors(values[weights > 0], indices[weights > 0])

    def texts(
        self, model: Clip, text: TextTokens, batch_size: int, *, stop: Callable[[], bool] = lambda: False
    ) -> Float[np.ndarray, "m d"]:
        """Of tokens in numpy, the same on every host, ``batch_size`` (over all devices) at a time."""
        rows = []
        with device_feed(_local_batches(text, batch_size), self._layout) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                rows.append(_everywhere(self._texts(model, batch))[0])
        return np.concatenate(rows)[: len(text.ids)]


def _on(mesh: Mesh, function: Callable[..., Array]) -> Callable[..., Array]:
    @jax.jit
    def step(model: Any, rows: Any, *replicated: Any) -> Array:
        return sharded_call(function, mesh, parameter_specs(model, mesh), BATCH)(model, rows, *replicated)

    return step


def _local_batches(text: TextTokens, batch_size: int) -> Iterator[TextTokens]:
    """This host's rows; behind the last text, the first is repeated."""
    count, host, hosts = len(text.ids), jax.process_index(), jax.process_count()
    mine = batch_size // hosts
    for first in range(0, count, batch_size):
        rows = np.arange(first + host * mine, first + (host + 1) * mine)
        yield jax.tree.map(functools.partial(np.take, indices=np.where(rows < count, rows, 0), axis=0), text)


def _everywhere(*arrays: Array) -> list[np.ndarray]:
    """The rows of all hosts, in numpy."""
    if all(array.is_fully_addressable for array in arrays):
        return [np.asarray(array) for array in arrays]
    from jax.experimental.multihost_utils import process_allgather

    return [np.asarray(process_allgather(array, tiled=True)) for array in arrays]
