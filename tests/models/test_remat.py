"""Blocks that are computed once more in the backward pass: the same numbers from less memory; and half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl.models import ResNetOptions, ViTOptions, make_model

RESNET = dict(stem="patch4", stage_sizes=(2, 2), stage_widths=(8, 16), strides=(1, 2), head_features=12)
VIT = dict(patch=4, width=16, depth=3, heads=2, mlp_width=32, head_features=12)


def make(kind, **options):
    return make_model(ResNetOptions(**RESNET, **options) if kind == "resnet" else ViTOptions(**VIT, **options))


def gradient(model, params, stats, where=None, key=None):
    images = tiny.normal(8, tiny.SIDE, tiny.SIDE, 3)

    def loss(params):
        h, new = model.encode(params, stats, images, train=True, where=where, key=key)
        return (h * jnp.arange(h.shape[-1])).mean() + (h**2).mean(), new

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_same_gradient(kind):
    where = np.arange(8) < 6 if kind == "resnet" else None
    key = jax.random.key(0) if kind == "vit" else None
    plain, again = make(kind), make(kind, remat=True)
    params, stats = tiny.model_variables(plain)
    assert jax.tree.structure(tiny.model_variables(again)) == jax.tree.structure((params, stats))
    want = gradient(plain, params, stats, where, key)(params)
    got = gradient(again, params, stats, where, key)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-2, float(np.abs(b).max())))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_less_is_kept(kind):
    """What a backward pass needs beside parameters and images, by JAX's own account."""
    kept = []
    for remat in (False, True):
        model = make(kind, remat=remat)
        params, stats = tiny.model_variables(model)

        def residuals(p, m=model, s=stats):
            return jax.vjp(lambda p: m.encode(p, s, tiny.normal(8, 16, 16, 3), train=True)[0], p)[1]

        shapes = jax.tree.leaves(jax.eval_shape(residuals, params))
        kept.append(sum(x.size for x in shapes if x.ndim and x.shape[0] == 8))
    assert kept[1] < 0.5 * kept[0]


def test_half_precision_is_of_activations_only():
    """Parameters, features, statistics and gradients are float32; convolutions and what lies between them bfloat16."""
    model = make("resnet", dtype="bfloat16")
    params, stats = tiny.model_variables(model)
    (_, new), grads = jax.eval_shape(gradient(model, params, stats), params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((params, new, grads)))
    images = jnp.asarray(tiny.normal(8, 16, 16, 3))
    jaxpr = jax.make_jaxpr(lambda p: model.encode(p, stats, images, train=True))(params)
    text = str(jaxpr)
    products = [line for line in text.splitlines() if "conv_general_dilated[" in line or "dot_general[" in line]
    assert products and all(":bf16[" in line for line in products)
    sums = [line for line in text.splitlines() if "reduce_sum[" in line]
    assert sums and not any(":bf16[" in line for line in sums)  # statistics of norms, and the pool
    h, _ = model.encode(params, stats, images, train=True)
    z = model.project(params, stats, h)
    assert h.dtype == z.dtype == jnp.float32
