"""k nearest neighbours on frozen features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eqvision.evaluators.checks import check_features, check_finite, check_pair
from eqvision.evaluators.console import progress_bar
from eqvision.evaluators.linear_probe import accuracy

K, TEMPERATURE = 20, 0.07  # of DINO (Caron et al. 2021); Wu et al. 2018 take k = 200


def knn(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m e"],
    test_labels: Int[np.ndarray, " m"],
    *,
    num_classes: int,
    k: int = K,
    temperature: float | None = TEMPERATURE,
    block: int = 1024,
) -> float:
    """Accuracy, in [0, 1], of the vote of the ``k`` most similar training examples; see ``knn_votes``."""
    check_features(test_features, test_labels, num_classes, "test")
    votes = knn_votes(
        train_features,
        train_labels,
        test_features,
        num_classes=num_classes,
        k=k,
        temperature=temperature,
        block=block,
    )
    return accuracy(votes, test_labels)


def knn_votes(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m e"],
    *,
    num_classes: int,
    k: int = K,
    temperature: float | None = TEMPERATURE,
    block: int = 1024,
) -> Float[np.ndarray, "m c"]:
    """The votes for each class: of a neighbour at cosine similarity s, exp(s / temperature) (Wu et al. 2018,
    section 3.4) over that of the nearest one; 1 where ``temperature`` is None.

    Similarities are float32, and exist for ``block`` x ``block`` pairs at a time. Of equally similar training
    examples the earlier is the nearer. Raises ValueError for ``k`` outside 1..n, for a temperature that is not
    positive, and for features and labels that do not fit together.
    """
    check_pair(train_features, test_features)
    check_features(train_features, train_labels, num_classes, "training")
    check_finite(test_features, "test")
    _check_options(len(train_features), k, temperature, block)
    train, num_train = jnp.asarray(_blocks(_unit(train_features), block)), jnp.int32(len(train_features))
    found = []
    with progress_bar(len(test_features), "k nearest neighbours", "image") as bar:
        for rows in _blocks(_unit(test_features), block):
            found.append(jax.device_get(_nearest(jnp.asarray(rows), train, num_train, k)))
            bar.update(block)
    similarities, neighbours = (np.concatenate(column)[: len(test_features)] for column in zip(*found, strict=True))
    return _votes(similarities, train_labels[neighbours], num_classes, temperature)


def _check_options(num_train: int, k: int, temperature: float | None, block: int) -> None:
    if not 1 <= k <= num_train:
        raise ValueError(f"k={k}; expected 1 to {num_train}, the number of training examples")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a positive number, or None for equal votes")
    if block < 1:
        raise ValueError(f"block={block}; expected a positive number of examples")


def _unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1; a row of zeros stays as it is, and is similar to nothing."""
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return (features / np.where(norms > 0, norms, 1)).astype(np.float32)


def _blocks(rows: Float[np.ndarray, "n d"], block: int) -> Float[np.ndarray, "t b d"]:
    """Equal blocks of rows; the last is filled with zeros, so that one compiled program serves all."""
    padded = np.pad(rows, ((0, -len(rows) % block), (0, 0)))
    return padded.reshape(-1, block, rows.shape[1])


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    rows: Float[Array, "b d"], train: Float[Array, "t b d"], num_train: Int[Array, ""], k: int
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Similarity and position of the ``k`` nearest of the first ``num_train`` training rows, nearest first."""
    block = train.shape[1]

    def merge(best: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        number, features = item
        positions = number * block + jnp.arange(block)
        similarities = jnp.matmul(rows, features.T, precision=jax.lax.Precision.HIGHEST)
        similarities = jnp.where(positions < num_train, similarities, -jnp.inf)
        # top_k takes the first of equals, and earlier blocks stand first.
        candidates = jnp.concatenate([best[0], similarities], axis=1)
        where = jnp.concatenate([best[1], jnp.broadcast_to(positions, similarities.shape)], axis=1)
        values, chosen = jax.lax.top_k(candidates, k)
        return (values, jnp.take_along_axis(where, chosen, axis=1)), None

    start = jnp.full((len(rows), k), -jnp.inf), jnp.zeros((len(rows), k), jnp.int32)
    return jax.lax.scan(merge, start, (jnp.arange(len(train)), train))[0]


def _votes(
    similarities: Float[np.ndarray, "m k"], labels: Int[np.ndarray, "m k"], num_classes: int, temperature: float | None
) -> Float[np.ndarray, "m c"]:
    nearest = similarities[:, :1].astype(np.float64)
    weights = np.ones(labels.shape) if temperature is None else np.exp((similarities - nearest) / temperature)
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes
