"""Helpers of the tests of SupCon: a loop over elements, inputs with every option, and value with gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.losses import supcon


@functools.partial(jax.jit, static_argnames="static")
def compiled_value_and_grad(features, arrays, static):
    return jax.value_and_grad(lambda f: supcon(f, **arrays, **dict(static)))(features)


def value_and_grad(features, labels=None, **options):
    """Calls with equal shapes and equal options share one program."""
    static = {k: options.pop(k) for k in list(options) if isinstance(options[k], (bool, str))}
    return compiled_value_and_grad(jnp.asarray(features), {"labels": labels, **options}, tuple(sorted(static.items())))


def slow_supcon(
    features,
    labels=None,
    *,
    mask=None,
    background=None,
    where=None,
    negatives=None,
    negatives_where=None,
    negatives_count=1,
    temperature=0.1,
    base_temperature=None,
    anchors="all",
    anchor_mean="all",
    normalize=True,
):
    n, v = features.shape[:2]
    z = np.asarray(features, np.float64).reshape(n, v, -1)
    extra = np.zeros((0, z.shape[2])) if negatives is None else np.asarray(negatives, np.float64)
    if normalize:
        z = z / np.linalg.norm(z, axis=-1, keepdims=True)
        extra = extra / np.linalg.norm(extra, axis=-1, keepdims=True)
    elements = [(a, b) for a in range(n) for b in range(v) if where is None or where[a]]

    def is_real(a):
        return background is None or not background[a]

    def is_positive(a, b):
        if mask is not None:
            return bool(mask[a, b])
        return a == b if labels is None else labels[a] == labels[b]

    losses, found = [], []
    for i in elements:
        if not is_real(i[0]) or (anchors == "first" and i[1] != 0):
            continue
        others = [j for j in elements if j != i]
        positives = [j for j in others if is_real(j[0]) and is_positive(i[0], j[0])]
        denominator = sum(np.exp(z[i] @ z[j] / temperature) for j in others)
        for m, row in enumerate(extra):
            if negatives_where is None or negatives_where[m]:
                denominator += negatives_count * np.exp(z[i] @ row / temperature)
        terms = [z[i] @ z[j] / temperature - np.log(denominator) for j in positives]
        scale = 1 if base_temperature is None else temperature / base_temperature
        losses.append(-scale * np.mean(terms) if terms else 0.0)
        found.append(bool(terms))
    if anchor_mean == "positive":
        losses = [x for x, ok in zip(losses, found, strict=True) if ok]
    return float(np.mean(losses)) if losses else 0.0


def make(seed=0, n=6, v=2, d=5, m=3):
    """Features and every optional argument: two classes, a class of one, backgrounds, padding and negatives."""
    rng = np.random.default_rng(seed)
    return dict(
        features=rng.normal(size=(n, v, d)),
        labels=np.array([0, 1, 0, 1, 7, 0, 1, 1, 2, 0, 2, 3, 3, 0, 1, 9])[:n],
        mask=(rng.random((n, n)) < 0.4).astype(np.float32),
        background=np.arange(n) % 5 == 2,
        where=np.arange(n) % 6 != 1,
        negatives=rng.normal(size=(m, d)),
        negatives_where=np.arange(m) != 1,
    )
