"""Linear probe: multinomial logistic regression on frozen features, fitted on the device.

Letters: N rows, D features, C classes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxcl.errors import UserError
from jaxcl.evaluate.rows import check_finite
from jaxcl.losses import cross_entropy
from jaxcl.losses.labels import as_array, class_numbers

# Standard deviation, in roundings of the largest value, below which a feature is constant, with weight 0.
MIN_ROUNDINGS = 10


class LinearFit(NamedTuple):
    """A fitted linear classifier: logits = features @ weights + bias. Any standardisation is part of the weights."""

    weights: jax.Array  # [D, C]
    bias: jax.Array  # [C]


def fit_linear_probe(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    num_classes: int,
    l2: float = 1e-3,
    max_steps: int = 300,
    tolerance: float = 1e-4,
    standardize: bool = True,
) -> LinearFit:
    """Minimises mean cross-entropy + l2 / 2 * |weights|^2 by L-BFGS from zero.

    The fit is deterministic and has no learning rate. The penalty acts on the weights of the standardised features,
    not on the bias; the optimum is that of scikit-learn's LogisticRegression with C = 1 / (l2 * N).

    Args:
      features: [N, D], any float type; the fit runs in float32 at least.
      labels: [N] int in [0, num_classes); negative rows (unlabelled, padded) are ignored.
      num_classes: C.
      l2: >= 0. At 0 a separable set has no optimum, and the fit ends at max_steps.
      max_steps: the most L-BFGS steps.
      tolerance: the fit ends when no entry of the gradient is larger.
      standardize: first scale each feature to mean 0 and standard deviation 1 over the labelled rows.

    Returns:
      LinearFit, for features that are not standardised.

    Raises:
      UserError: shapes that do not match, a label that is no class, or a labelled row that is not finite. Of traced
        arrays: the weights are NaN.
    """
    features, labels = jnp.asarray(features), as_array(labels)
    if features.ndim != 2 or labels.shape != (len(features),):
        raise UserError(
            f"linear probe: features of shape {features.shape} and labels of shape {labels.shape}, "
            "expected [rows, features] and [rows]"
        )
    labels = class_numbers("linear probe", labels, num_classes)
    check_finite("linear probe: features", features, labels >= 0)
    return _fit(
        features,
        labels,
        l2,
        tolerance,
        num_classes=num_classes,
        max_steps=max_steps,
        standardize=standardize,
    )


def probe_logits(probe: LinearFit, features: ArrayLike) -> jax.Array:
    """Logits [..., C] of features [..., D], in the probe's precision."""
    features = jnp.asarray(features, probe.weights.dtype)
    return jnp.matmul(features, probe.weights, precision=lax.Precision.HIGHEST) + probe.bias


@functools.partial(jax.jit, static_argnames=("num_classes", "max_steps", "standardize"))
def _fit(features, labels, l2, tolerance, *, num_classes, max_steps, standardize):
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    valid = labels >= 0
    x_NxD = jnp.where(valid[:, None], features.astype(dtype), 0)
    mean_D, std_D, scale_D = jnp.zeros(x_NxD.shape[1], dtype), *jnp.ones((2, x_NxD.shape[1]), dtype)
    if standardize:
        x_NxD, scale_D = rescaled_columns(x_NxD)
        mean_D, std_D = moments(x_NxD, valid)
        x_NxD = (x_NxD - mean_D) / std_D

    def objective(probe):
        penalty = 0.5 * l2 * jnp.sum(probe.weights**2)
        return cross_entropy(probe_logits(probe, x_NxD), labels) + penalty

    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        probe, state, _ = carry
        value, grad = value_and_grad(probe, state=state)
        updates, state = solver.update(grad, state, probe, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(probe, updates), state, optax.tree.get(state, "grad")

    def unfinished(carry):
        _, state, grad = carry
        steps = optax.tree.get(state, "count")
        largest = jnp.maximum(jnp.max(jnp.abs(grad.weights)), jnp.max(jnp.abs(grad.bias)))
        return (steps == 0) | ((steps < max_steps) & (largest > tolerance))

    start = LinearFit(jnp.zeros((x_NxD.shape[1], num_classes), dtype), jnp.zeros(num_classes, dtype))
    probe, _, _ = lax.while_loop(unfinished, step, (start, solver.init(start), start))
    bad = jnp.any(labels >= num_classes) | ~jnp.all(jnp.isfinite(x_NxD))  # L-BFGS would stop where it started
    weights = jnp.where(bad, jnp.nan, probe.weights / std_D[:, None])
    return LinearFit(weights / scale_D[:, None], probe.bias - mean_D @ weights)


def rescaled_columns(x_NxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> (x with features divided by powers of 2 to at most 2, these powers [D]); features of zeros keep 1."""
    exponent_D = jnp.frexp(jnp.max(jnp.abs(x_NxD), axis=0, initial=0))[1]
    limits = jnp.finfo(x_NxD.dtype)
    exponent_D = jnp.clip(exponent_D, limits.minexp + 1, limits.maxexp - 1)  # 2**128 is no float32
    scale_D = jnp.ldexp(jnp.ones((), x_NxD.dtype), exponent_D)
    return x_NxD / scale_D, scale_D


def moments(x_NxD: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation [D] of the valid rows of `rescaled_columns`; inf for a constant feature, which becomes 0."""
    count = jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1)
    mean_D = jnp.sum(x_NxD, axis=0) / count
    apart_NxD = jnp.where(valid[:, None], x_NxD - mean_D, 0)
    # The rounding of the mean is taken off: for a constant feature it would be all that is left.
    variance_D = jnp.sum(apart_NxD**2, axis=0) / count - (jnp.sum(apart_NxD, axis=0) / count) ** 2
    constant_D = variance_D <= (MIN_ROUNDINGS * jnp.finfo(x_NxD.dtype).eps) ** 2
    return mean_D, jnp.where(constant_D, jnp.inf, jnp.sqrt(jnp.where(constant_D, 1, variance_D)))
