"""Average pooling to a given size, with the cells of ``torch.nn.AdaptiveAvgPool2d``."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


def adaptive_average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    """The mean of each of ``size`` x ``size`` cells; where these do not divide the map, neighbours share a row.

    Cell i is of the rows from floor(i * h / size) to ceil((i + 1) * h / size). In float32, returned in the input's
    type. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"adaptive_average_pool: size must be at least 1, got {size}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rows, columns = (_shares(side, size) for side in x.shape[1:3])
    # sums before the other axis: products with matrices of zeros and shares
    pooled = jnp.einsum("bhwc,sh,tw->bstc", wide, rows, columns, precision="highest")
    return pooled.astype(x.dtype)


def _shares(old: int, new: int) -> Float32[np.ndarray, "new old"]:
    first, cell = np.arange(new) * old // new, np.arange(old)
    last = -(-(np.arange(1, new + 1) * old) // new)
    inside = (cell >= first[:, None]) & (cell < last[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
