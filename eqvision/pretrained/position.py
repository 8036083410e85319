"""Position embeddings as files hold them: one row per token, prefix tokens first."""

import math

import numpy as np

from eqvision.pretrained.rules import Arrays, Op, ShapeError


def square_table(prefix: int) -> Op:
    """(1, prefix + h * w, d) of a square grid <-> ``prefix`` leaves (d,), and then the grid (h, w, d)."""

    def load(theirs: Arrays) -> Arrays:
        (whole,) = theirs
        rows, width = whole.shape[-2:]
        side = math.isqrt(rows - prefix)
        if side * side != rows - prefix:
            raise ShapeError(whole.shape, (1, prefix + side * side, width))
        table = whole.reshape(rows, width)
        return (*table[:prefix], table[prefix:].reshape(side, side, width))

    def save(ours: Arrays) -> Arrays:
        tokens, grid = ours[:-1], ours[-1]
        return (np.concatenate([*(token[None] for token in tokens), grid.reshape(-1, grid.shape[-1])])[None],)

    return Op(load, save)
