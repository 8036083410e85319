"""Losses between a student and its teacher, one value per example, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def logit_distillation(
    student: Float[Array, "b k"], teacher: Float[Array, "b k"], *, temperature: float = 1.0
) -> Float[Array, " b"]:
    """Kullback-Leibler divergence of softened outputs in nats, times the temperature squared (Hinton et al. 2015).

    The square keeps the gradient's size independent of the temperature. No gradient reaches the teacher.
    Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    teacher = jax.lax.stop_gradient(teacher)
    log_student, log_teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student, teacher))
    return temperature**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)


def token_distillation(student: Float[Array, "b h w d"], teacher: Float[Array, "b h2 w2 d2"]) -> Float[Array, " b"]:
    """Mean over tokens of the squared distance of normalised tokens, ``2 - 2 cos``, in [0, 4].

    No gradient reaches the teacher. Raises ValueError where the two grids or widths differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"token distillation needs equal grids and widths; the student gives {student.shape[1:]} (height, width, "
            f"channels) and the teacher {teacher.shape[1:]}. Use --distill.kind logit, or another teacher"
        )
    cosine = jnp.sum(_unit(student) * _unit(jax.lax.stop_gradient(teacher)), axis=-1)
    return jnp.mean(2 - 2 * cosine, axis=(1, 2))


def _unit(x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
