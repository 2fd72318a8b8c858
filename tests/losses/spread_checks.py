"""Helpers of the tests of attract, class-conditional InfoNCE and L_spread."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.losses.spread import spread


def stacked(views, **options):
    """Total, attract and repel as one vector."""
    value, parts = spread(views, **options)
    return jnp.stack([value, parts["attract"], parts["repel"]])


@functools.partial(jax.jit, static_argnames="static")
def compiled_values_and_grads(views, arrays, static):
    values, pullback = jax.vjp(lambda v: stacked(v, **arrays, **dict(static)), views)
    return values, jax.vmap(pullback)(jnp.eye(3, dtype=values.dtype))[0]


def values_and_grads(views, labels=None, **options):
    """(total, A, R) [3] and their gradients [3, V, B, D]; equal shapes and kinds of options share one program."""
    static = {k: options.pop(k) for k in list(options) if isinstance(options[k], (bool, str))}
    # Numbers are always arguments, so that tests share programs.
    arrays = {"labels": labels, "where": np.ones(views.shape[1], bool)}
    arrays |= {"temperature": 0.5, "a_lc": 1.0, "a_spread": 1.0} | options
    arrays = {k: float(v) if isinstance(v, int) else v for k, v in arrays.items()}
    return compiled_values_and_grads(jnp.asarray(views), arrays, tuple(sorted(static.items())))


def make(seed=0, v=2, b=8, d=4):
    """Two classes of several samples, a class of one, three unlabelled samples, and padding."""
    rng = np.random.default_rng(seed)
    return dict(
        views=rng.normal(size=(v, b, d)),
        labels=np.array([0, 1, 0, -1, 1, 7, -1, 0, 1, 1, 0, 2, 2, 0, -1, 1])[:b],
        where=np.arange(b) % 6 != 2,
    )


VARIANTS = [
    dict(),
    dict(clip_positive=0.4, norm="none"),
    dict(positives_in_denominator=True, positive_weight=2.0, norm="released"),
    dict(positives_in_denominator=True, clip_positive=0.4, temperature=0.2),
    dict(norm="released", clip_positive=-0.3, temperature=1.3),
]
