"""Dropout and drop-path as functions; a rate is a static field of whoever uses them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class MissingKeyError(ValueError):
    """A random layer was called in training without a key."""


def require_key(key: PRNGKeyArray | None, what: str) -> PRNGKeyArray:
    if key is None:
        raise MissingKeyError(
            f"{what} is random in training and got key=None; pass key=jax.random.key(...) to the model"
        )
    return key


def fold(key: PRNGKeyArray | None, number: int | Array) -> PRNGKeyArray | None:
    """The key of sub-layer ``number``; None stays None, since a model without random layers needs no key."""
    return None if key is None else jax.random.fold_in(key, number)


def check_rate(what: str, rate: float) -> None:
    """Raise a ValueError unless the rate is a fraction below one."""
    if not 0 <= rate < 1:
        raise ValueError(f"{what} rate {rate} is not in [0, 1): it is the fraction that is dropped")


def dropout(x: Float[Array, "..."], rate: float, *, train: bool, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Srivastava et al. 2014: zero a fraction ``rate`` of the elements and scale the others by 1 / (1 - rate)."""
    check_rate("dropout", rate)
    if not train or rate == 0:
        return x
    kept = jax.random.bernoulli(require_key(key, f"dropout({rate})"), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def drop_path(
    x: Float[Array, "b ..."], rate: float | Float[Array, ""], *, train: bool, key: PRNGKeyArray | None
) -> Float[Array, "b ..."]:
    """Stochastic depth (Huang et al. 2016): drop the whole branch for a fraction ``rate`` of the examples.

    ``rate`` may be traced, because a scanned stack has another rate in every layer.
    """
    if isinstance(rate, (int, float)):
        check_rate("drop_path", rate)
    if not train or (isinstance(rate, (int, float)) and rate == 0):
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(require_key(key, "drop_path"), 1 - rate, shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class LayerScale(eqx.Module):
    """Touvron et al. 2021 (CaiT): a learned factor per channel on a residual branch."""

    scale: Float[Array, " d"]

    def __init__(self, features: int, *, initial: float = 1e-5):
        self.scale = jnp.full((features,), initial, jnp.float32)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return x * self.scale.astype(x.dtype)
