"""The arrays between the parts of a program: their names, their order, and what is no fault."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.method import sharding
from jaxcl.method.scopes import scope
from jaxcl.method.watch import watched


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.relu(nn.Dense(4, name=f"layer{i}")(x))
        return x


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def program(root=lambda x: x, masked=False, scan=False):
    """A network and a loss in scopes, with gradients; root: of the loss's square."""

    def loss_fn(params, x):
        with scope("encode x"):
            h = Net().apply({"params": params}, x)
        with scope("term t"):
            logits = h @ h.T
            if masked:  # an array of -inf that only the loss reads
                logits = jnp.where(jnp.eye(3, dtype=bool), -jnp.inf, logits)
                return jax.nn.logsumexp(logits, axis=1).sum()
            return root(jnp.sum(h**2))

    def run(params, x):
        if scan:
            loss, grads = jax.lax.scan(lambda c, row: (c, jax.value_and_grad(loss_fn)(params, row[None])), 0, x)[1]
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, x)
        return {"metrics": {"loss": loss}, "gradients": grads}

    return run


def faults(run, params, x=X, **options):
    """-> (outputs, [(name, backward)] of the arrays that are not finite, all names)"""
    function, found = watched(run)
    out, largest, count = jax.jit(function, **options)(params=params, x=x)
    assert len(found) == len(largest) == len(count)
    bad = [(watch.name, watch.backward) for watch, n in zip(found, count, strict=True) if n]
    return out, bad, [watch.name for watch in found], dict(zip(found, np.asarray(largest).tolist(), strict=True))


@pytest.fixture(scope="module")
def params():
    return Net().init(jax.random.key(0), X)["params"]


def test_names_in_the_order_of_the_program(params):
    run = program()
    out, bad, names, largest = faults(run, params)
    plain = jax.jit(run)(params, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, plain)
    assert bad == []
    order = [
        "params: layer0/bias",
        "x",
        "encode x: Net/layer0",
        "encode x: Net/layer1",
        "term t -> metrics: loss",
        "encode x: Net/layer1 -> gradients: layer1/kernel",
        "encode x: Net/layer0 -> gradients: layer0/kernel",
    ]
    assert sorted(order, key=names.index) == order
    kernel = next(size for watch, size in largest.items() if watch.name == "params: layer1/kernel")
    assert kernel == np.abs(params["layer1"]["kernel"]).max()


def test_an_infinity_inside_a_loss_is_no_fault(params):
    assert faults(program(masked=True), params)[1] == []


def test_forward_backward_and_inputs(params):
    dead = jax.tree.map(jnp.zeros_like, params)
    bad = faults(program(jnp.sqrt), dead)[1]  # the root's slope at 0 is infinite
    assert bad[0] == ("term t", True) and not any(name.startswith("term t ->") for name, _ in bad)
    bad = faults(program(jnp.log), dead)[1]
    assert bad[0] == ("term t -> metrics: loss", False)
    huge = {**params, "layer1": {**params["layer1"], "kernel": jnp.full((4, 4), 3e38)}}
    assert faults(program(), huge, 10 * jnp.ones((3, 4)))[1][0] == ("encode x: Net/layer1", False)
    x = X.copy()
    x[1, 2] = np.nan
    assert faults(program(), params, x)[1][0] == ("x", False)


def test_inside_a_loop_by_its_outputs(params):
    names = faults(program(scan=True), params)[2]
    assert any("gradients: layer0/kernel" in name for name in names)
    bad = faults(program(jnp.log, scan=True), jax.tree.map(jnp.zeros_like, params))[1]
    assert bad[0][0] == "term t -> metrics: loss"


def test_on_several_devices(params):
    mesh = sharding.make_mesh(2)
    rows = sharding.batch_sharding(mesh)
    where = dict(in_shardings=sharding.replicated(mesh), out_shardings=sharding.replicated(mesh))
    x = jax.device_put(np.concatenate([X, X[:1]]), rows)
    out, bad, *_ = faults(program(), jax.device_put(params, sharding.replicated(mesh)), x)
    assert bad == [] and np.isfinite(out["metrics"]["loss"]) and where
