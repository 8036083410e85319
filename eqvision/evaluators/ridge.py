"""Ridge regression on one-hot targets in closed form, for many strengths of regularisation at once.

The problem is that of scikit-learn's ``Ridge``: the sum of squared errors plus ``l2`` times the squared norm of the
weights, with an intercept that is not penalised. It is solved on the host in float64. JAX computes in float32 unless
told otherwise, in which the Gram matrix of a few thousand examples loses the digits that weak regularisation needs;
and one eigendecomposition, which serves all strengths, takes seconds at the widths of vision models.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

ROWS = 4096  # examples that are float64 at a time


class RidgeSystem(NamedTuple):
    """One data set, decomposed: ``solve`` gives the solution for any ``l2`` in a product of matrices."""

    feature_mean: Float[np.ndarray, " d"]
    target_mean: Float[np.ndarray, " k"]
    eigenvalues: Float[np.ndarray, " r"]
    basis: Float[np.ndarray, "d r"]
    projected: Float[np.ndarray, "r k"]

    def solve(self, l2: float) -> tuple[Float[np.ndarray, "d k"], Float[np.ndarray, " k"]]:
        """Weights and intercepts. Raises ValueError unless ``l2`` is positive."""
        weight = self.basis @ self._shrunk(l2)
        return weight, self.target_mean - self.feature_mean @ weight

    def scores(self, features: Float[np.ndarray, "n d"], l2s: tuple[float, ...]) -> list[Float[np.ndarray, "n k"]]:
        """The predictions for each of ``l2s``; features are projected once for all."""
        coordinates = (features.astype(np.float64) - self.feature_mean) @ self.basis
        return [coordinates @ self._shrunk(l2) + self.target_mean for l2 in l2s]

    def _shrunk(self, l2: float) -> Float[np.ndarray, "r k"]:
        if not l2 > 0:
            raise ValueError(f"l2={l2}; expected a positive strength of regularisation")
        return self.projected / (self.eigenvalues + l2)[:, None]


def ridge_system(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], num_classes: int) -> RidgeSystem:
    """Decompose the d x d system, or the n x n system (the dual form) where there are fewer examples than features."""
    feature_mean = features.mean(axis=0, dtype=np.float64)
    target_mean = np.bincount(labels, minlength=num_classes) / len(labels)
    solve = _dual if len(features) < features.shape[1] else _primal
    return RidgeSystem(feature_mean, target_mean, *solve(features, labels, feature_mean, num_classes))


def _primal(features: np.ndarray, labels: np.ndarray, mean: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    width = features.shape[1]
    gram, moment = np.zeros((width, width)), np.zeros((width, num_classes))
    for start in range(0, len(features), ROWS):
        block = features[start : start + ROWS].astype(np.float64) - mean
        gram += block.T @ block
        moment += block.T @ _one_hot(labels[start : start + ROWS], num_classes)
    eigenvalues, basis = np.linalg.eigh(gram)
    return np.maximum(eigenvalues, 0), basis, basis.T @ moment


def _dual(features: np.ndarray, labels: np.ndarray, mean: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    centred = features.astype(np.float64) - mean
    targets = _one_hot(labels, num_classes)
    eigenvalues, vectors = np.linalg.eigh(centred @ centred.T)
    return np.maximum(eigenvalues, 0), centred.T @ vectors, vectors.T @ (targets - targets.mean(axis=0))


def _one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return (labels[:, None] == np.arange(num_classes)).astype(np.float64)
