"""Batch norm against flax's module, a float64 written-out form of it, and itself without the rows that do not count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl.models import ResNetOptions
from jaxcl.models.adapter import Adapter
from jaxcl.models.batch_norm import BatchNorm, normalize, zero_rows
from jaxcl.models.heads import ProjectionHead

EPSILON = 1e-5


def written_out(x, scale, bias, g):
    """y, its mean and variance, and the gradients of sum(g * y), channel by channel in float64."""
    x, scale, bias, g = (np.asarray(a, np.float64) for a in (x, scale, bias, g))
    y, dx, dscale = np.zeros_like(x), np.zeros_like(x), np.zeros_like(scale)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    for c in range(x.shape[-1]):
        x_c, g_c = x[..., c], g[..., c]
        std = np.sqrt(var[c] + EPSILON)
        unit = (x_c - mean[c]) / std
        y[..., c] = unit * scale[c] + bias[c]
        dscale[c] = (g_c * unit).sum()
        own = g_c * scale[c]
        dx[..., c] = (own - own.mean() - unit * (own * unit).mean()) / std
    return y, mean, var, dx, dscale, g.sum((0, 1, 2))


def inputs(rows=6, channels=5, shift=0.3, seed=0):
    x = tiny.normal(rows, 3, 4, channels, seed=seed) * np.linspace(0.1, 4, channels, dtype=np.float32) + shift
    return x, 1 + 0.2 * tiny.normal(channels, seed=1), tiny.normal(channels, seed=2), tiny.normal(*x.shape, seed=3)


def value_and_gradients(x, scale, bias, g, where=None):
    def total(x, scale, bias):
        y, mean, var = normalize(x, scale, bias, where, EPSILON)
        return (y * g).sum(), (y, mean, var)

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
    return *out, *gradients


def close(got, want, tolerance=2e-5):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_values_and_gradients_written_out():
    given = inputs()
    close(jax.jit(value_and_gradients)(*given), written_out(*given))


def test_only_rows_that_count():
    where = np.array([True, False, True, True, False, True])
    x, scale, bias, g = inputs()
    x, g = x * where[:, None, None, None], g * where[:, None, None, None]
    y, mean, var, dx, *rest = jax.jit(value_and_gradients)(x, scale, bias, g, where)
    close((y[where], mean, var, dx[where], *rest), written_out(x[where], scale, bias, g[where]))
    assert not np.any(y[~where]) and not np.any(dx[~where])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_flax(dtype):
    """Values, gradients, running statistics; in bfloat16 as near as its three digits."""
    x, scale, bias, g = inputs()
    x, variables = x.astype(dtype), {"params": {"scale": scale, "bias": bias}}
    variables["batch_stats"] = {"mean": tiny.normal(5, seed=4), "var": 1 + tiny.normal(5, seed=5) ** 2}
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2

    def run(module, x, params, stats):
        def total(x, params):
            y, new = module.apply({"params": params, "batch_stats": stats}, x, False, mutable=["batch_stats"])
            return (y.astype(jnp.float32) * g).sum(), (y, new)

        gradients, out = jax.grad(total, argnums=(0, 1), has_aux=True)(x, params)
        return gradients, out, module.apply({"params": params, "batch_stats": stats}, x, True)

    options = dict(momentum=0.8, epsilon=EPSILON, dtype=dtype)
    ours, flaxs = (
        jax.jit(lambda *args, m=module: run(m(**options), *args))(x, *variables.values())
        for module in (BatchNorm, nn.BatchNorm)
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), flaxs)
    as_f32 = [[np.asarray(a, np.float32) for a in jax.tree.leaves(tree)] for tree in (ours, flaxs)]
    close(*as_f32, tolerance)
    if dtype == jnp.float32:  # initialised alike, and not moved by it
        key, zeros = jax.random.key(0), jnp.ones((2, 3, 3, 5))
        alike = [module(**options).init(key, zeros, False) for module in (BatchNorm, nn.BatchNorm)]
        jax.tree.map(np.testing.assert_array_equal, *alike)


def test_far_from_zero_and_constant():
    """A mean of 30 deviations loses two digits, as flax's does; a channel that does not vary gives its bias."""
    x, scale, bias, g = inputs()
    x = x / np.linspace(0.1, 4, 5, dtype=np.float32) + 30
    close(jax.jit(value_and_gradients)(x, scale, bias, g), written_out(x, scale, bias, g), 5e-3)
    flat = np.full_like(x, 0.25)
    y, _, var, dx, *_ = jax.jit(value_and_gradients)(flat, scale, bias, g)
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=1e-5)
    assert np.all(np.isfinite(dx)) and not np.any(var)


def test_no_rows_at_all():
    x, scale, bias, g = inputs()
    for a in jax.jit(value_and_gradients)(0 * x, scale, bias, 0 * g, np.zeros(6, bool)):
        assert not np.any(a)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_over_devices(devices):
    """Statistics of all rows, wherever they lie, and the gradients of that."""
    where = np.arange(16) % 5 > 0
    x, scale, bias, g = inputs(16)
    x, g = x * where[:, None, None, None], g * where[:, None, None, None]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    run = jax.jit(value_and_gradients, in_shardings=(rows, whole, whole, rows, rows))
    y, mean, var, dx, *rest = run(x, scale, bias, g, where)
    close((y[where], mean, var, dx[where], *rest), written_out(x[where], scale, bias, g[where]))


def test_each_part_of_a_vmap_by_itself():
    x, scale, bias, g = inputs(8)
    each = jax.jit(jax.vmap(value_and_gradients, (0, None, None, 0)))(
        x.reshape(2, 4, *x.shape[1:]), scale, bias, g.reshape(2, 4, *g.shape[1:])
    )
    for i, rows in enumerate((slice(4), slice(4, 8))):
        close([a[i] for a in each], written_out(x[rows], scale, bias, g[rows]))


def test_gradient_of_a_gradient():
    """As of flax's, whose gradient JAX derives."""
    x, scale, bias, g = inputs()

    def twice(module):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": bias, "var": scale}}

        def total(x):
            y, _ = module(epsilon=EPSILON).apply(variables, x, False, mutable=["batch_stats"])
            return (jnp.sin(y) * g).sum()

        return jax.jit(jax.grad(lambda x: jnp.square(jax.grad(total)(x)).sum()))(x)

    close([twice(BatchNorm)], [twice(nn.BatchNorm)], 1e-3)


# ---- networks with norms: rubbish in rows that do not count changes nothing of the others


@pytest.mark.parametrize(
    "network, shape",
    [
        (ProjectionHead(4, 1, 7, "batch", "batch"), (6,)),
        (ProjectionHead(4, 2, 7, "none", "plain"), (6,)),  # a layer with a bias before the norm
        (Adapter((4, 6), (2,), 10), (6, 6, 8)),
    ],
    ids=["head", "head with biases", "adapter"],
)
def test_rubbish_in_rows_that_do_not_count(network, shape):
    where = np.array([True, False, True, True, True, False])
    x, rubbish = tiny.normal(6, *shape), 1e3 * tiny.normal(6, *shape, seed=9)
    rubbish[1] = np.inf
    padded = np.where(where.reshape(-1, *(1,) * len(shape)), x, rubbish)
    variables = tiny.fill(jax.eval_shape(lambda: network.init(jax.random.key(0), x)))
    g = tiny.normal(6, network.features, seed=2)

    @jax.jit
    def run(x, g, where):
        def total(params, x):
            given = {**variables, "params": params}
            y, new = network.apply(given, x, train=True, where=where, mutable=["batch_stats"])
            return jnp.where(True if where is None else where[:, None], y * g, 0).sum(), (y, new)

        (params, of_x), (y, new) = jax.grad(total, argnums=(0, 1), has_aux=True)(variables["params"], x)
        return params, of_x, y, new

    params, of_x, y, new = run(padded, g, where)
    wanted = run(x[where], g[where], None)
    got, want = (jax.tree.leaves(t) for t in ((params, of_x[where], y[where], new), wanted))
    close(got, want, 2e-3)
    assert not np.any(of_x[~where])


@pytest.mark.parametrize(
    "network, shape",
    [
        (ResNetOptions(stage_sizes=(1, 1), stage_widths=(4, 6), depth=18).make(jnp.float32), (6, 6, 3)),
        (ResNetOptions(stage_sizes=(1,), stage_widths=(4,), depth=50).make(jnp.float32), (6, 6, 3)),
        (Adapter((4, 6), (2,), 10), (6, 6, 8)),
    ],
    ids=["resnet", "bottleneck", "adapter"],
)
def test_no_gradient_comes_from_rows_that_do_not_count(network, shape):
    """A loss that reads them all has the gradient of one that reads the rows that count; cases F."""
    where = np.array([True, False, True, True, True, False])
    x = tiny.normal(6, *shape)
    variables = tiny.fill(jax.eval_shape(lambda: network.init(jax.random.key(0), x)))
    g = tiny.normal(6, network.features, seed=2)

    @jax.jit
    def run(x, g):
        def total(params):
            given = {**variables, "params": params}
            y, new = network.apply(given, x, train=True, where=where, mutable=["batch_stats"])
            return (y * g).sum(), (y, new)

        return jax.grad(total, has_aux=True)(variables["params"])

    grads, (y, new) = run(x, g)
    assert not np.any(y[~where])
    wanted, (_, same) = run(x, g * where[:, None])
    close(*(jax.tree.leaves(t) for t in ((grads, new), (wanted, same))), 1e-5)


def test_zero_rows():
    x = np.array([[1.0, np.nan], [2.0, 3.0]])
    np.testing.assert_array_equal(zero_rows(x, np.array([False, True])), [[0, 0], [2, 3]])
    assert zero_rows(x, None) is x


@pytest.mark.parametrize("where", [None, np.array([True, False, True, True, False, True])], ids=["all", "some"])
@pytest.mark.parametrize("far", [0, 1, 30, 1000, 10_000])
def test_the_variance_keeps_its_digits(far, where):
    """cases A.13: mean squares minus the squared mean loses all of them at 10,000 deviations."""
    x, scale, bias, _ = inputs()
    x = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2)) + far * np.array([1, 0, -1, 1, 0.01], np.float32)
    x = x.astype(np.float32) if where is None else np.float32(x * where[:, None, None, None])
    rows = x.astype(np.float64) if where is None else x[where].astype(np.float64)
    want = (rows - rows.mean((0, 1, 2))) / np.sqrt(rows.var((0, 1, 2)) + EPSILON) * scale + bias
    y, _, var = jax.jit(normalize, static_argnums=4)(x, scale, bias, where, EPSILON)
    np.testing.assert_allclose(y if where is None else y[where], want, atol=max(1e-5, far * 5e-7))
    np.testing.assert_allclose(var, rows.var((0, 1, 2)), rtol=max(1e-4, far * 1e-6))
