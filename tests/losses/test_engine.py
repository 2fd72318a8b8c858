"""The engine: its memory, rings of any size, and the properties that all losses on it share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loss_checks import mesh_of

from jaxcl.losses import instance_spread, limits, nt_xent, one_way_infonce, spread, supcon
from jaxcl.losses.engine import reduce_rows
from jaxcl.losses.plan import Plan
from jaxcl.losses.reduction import Operand, Reduction

MIB = 2**20


# ---- the engine itself


def entries(s, own, other, is_self):
    """Two log-sum-exps and a sum, which use labels, a value of the row and a value of the column."""
    (label, bias), (other_label, other_bias) = own, other
    same = label == other_label
    a = jnp.where(same, s + bias * other_bias, -jnp.inf)
    b = jnp.where(same, -jnp.inf, s)
    c = jnp.sin(s) * bias + other_bias
    if is_self is not None:
        a, b, c = jnp.where(is_self, -jnp.inf, a), b, jnp.where(is_self, 0, c)
    return a, b, c


KINDS = ("lse", "lse", "sum")


def written_out(z, y, label, bias, other_label, other_bias, valid, symmetric):
    s = z @ y.T
    counts = valid[None] & ~(symmetric & np.eye(len(z), len(y), dtype=bool))
    same = label[:, None] == other_label[None]

    def lse(x, mask):
        return jnp.log(jnp.sum(jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0), axis=1))

    return (
        lse(s + bias[:, None] * other_bias[None], same & counts),
        lse(s, ~same & counts),
        jnp.sum(jnp.where(counts, jnp.sin(s) * bias[:, None] + other_bias[None], 0), axis=1),
    )


def weighted(sums, label):
    """A scalar with a different weight for every statistic of every row. Empty statistics are left out."""
    return sum(
        jnp.sum(jnp.where(x == -jnp.inf, 0, jnp.where(x == -jnp.inf, 0, x) * jnp.cos(k + jnp.arange(len(x)) + label)))
        for k, x in enumerate(sums)
    )


def problem(n, m, seed=0):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    return dict(
        z=z, y=y, label=rng.integers(0, 3, n), other_label=rng.integers(0, 3, m),
        bias=rng.normal(size=n), other_bias=rng.normal(size=m), valid=rng.random(m) < 0.8,
    )  # fmt: skip


@pytest.mark.parametrize("devices,bounded", [(1, False), (2, True), (3, False), (8, True)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["itself", "others"])
def test_rings_of_any_size(wide, symmetric, bounded, devices):
    p = problem(4 * devices, 4 * devices if symmetric else 7 * devices)
    if symmetric:
        p |= dict(y=p["z"], other_label=p["label"], other_bias=p["bias"])
    args = {k: jnp.asarray(v) for k, v in p.items()}
    reduction = Reduction(entries, KINDS, bounded)

    def local(z, y, label, bias, other_label, other_bias, valid):
        ring = dict(plan=Plan("ring" if devices > 1 else "tiled", 3), axis_name="data")
        if symmetric:
            out = reduce_rows(reduction, Operand(z, label, bias, valid), **ring)
        else:
            out = reduce_rows(reduction, Operand(z, label, bias), Operand(y, other_label, other_bias, valid), **ring)
        return out

    sharded = jax.shard_map(local, mesh=mesh_of(devices), in_specs=P("data"), out_specs=P("data"))
    names = ("z", "y", "label", "bias", "other_label", "other_bias", "valid")

    def scalar(f, z, y, bias, other_bias):
        a = args | dict(z=z, y=y, bias=bias, other_bias=other_bias)
        return weighted(f(*[a[k] for k in names]), args["label"])

    floats = [args[k] for k in ("z", "y", "bias", "other_bias")]
    dense = functools.partial(written_out, symmetric=symmetric)
    if symmetric:  # both roles of a vector are one argument
        floats[1], floats[3] = floats[0], floats[2]
        call = lambda f: lambda z, bias: scalar(f, z, z, bias, bias)  # noqa: E731
        floats = [floats[0], floats[2]]
    else:
        call = lambda f: functools.partial(scalar, f)  # noqa: E731
    which = tuple(range(len(floats)))
    got, got_grads = jax.jit(jax.value_and_grad(call(sharded), which))(*floats)
    want, want_grads = jax.jit(jax.value_and_grad(call(lambda *a: dense(*a[:6], valid=a[6])), which))(*floats)
    np.testing.assert_allclose(got, want, rtol=1e-11)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert np.abs(w).max() > 1e-3
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("plan", [Plan("dense", 3, explicit=False), Plan("dense", 3), Plan("tiled", 3)], ids=str)
def test_rows_against_themselves_with_every_plan(wide, plan, bounded):
    p = {k: jnp.asarray(v) for k, v in problem(11, 11).items()}

    def ours(z, bias):
        rows = Operand(z, p["label"], bias, p["valid"])
        return weighted(reduce_rows(Reduction(entries, KINDS, bounded), rows, plan=plan), 0)

    def theirs(z, bias):
        same = p["label"], bias
        return weighted(written_out(z, z, *same, *same, p["valid"], symmetric=True), 0)

    (got, got_grads), (want, want_grads) = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(p["z"], p["bias"]) for f in (ours, theirs)
    )
    np.testing.assert_allclose(got, want, rtol=1e-11)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert np.abs(w).max() > 1e-3
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


def test_dense_by_name_is_differentiated_twice_and_forwards(wide):
    z = np.random.default_rng(0).normal(size=(2, 4, 3))
    loss = functools.partial(nt_xent, implementation="dense")
    forward = jax.jacfwd(jax.grad(loss))(*z)
    assert np.abs(forward).max() > 1e-3
    np.testing.assert_allclose(forward, jax.jacrev(jax.grad(loss))(*z), rtol=1e-9, atol=1e-12)


def test_nan_is_not_taken_for_an_empty_row(wide):
    z = np.random.default_rng(0).normal(size=(12, 2, 5))
    z[3, 1, 2] = np.nan
    for how in ("dense", "tiled", "auto"):
        assert np.isnan(supcon(z, np.arange(12) % 3, implementation=how))
        assert np.isnan(supcon(z, implementation=how))


# ---- dense, tiled and ring in float32


NAMES = ("supcon", "nt_xent", "spread")


def losses_only(z_NxVxD, labels, axis_name=None, implementation="dense"):
    how = dict(axis_name=axis_name, implementation=implementation)
    a, b = z_NxVxD[:, 0], z_NxVxD[:, 1]
    values = {
        "supcon": supcon(z_NxVxD, labels, **how),
        "nt_xent": nt_xent(a, b, **how),
        "spread": spread(jnp.stack([a, b]), labels, **how)[0],
    }
    return jnp.stack([values[k] for k in NAMES])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 64)
    centres = rng.normal(size=(10, 128))
    return (centres[labels, None] + rng.normal(size=(64, 2, 128))).astype(np.float32), labels


@pytest.mark.parametrize("devices,implementation", [(1, "tiled"), (2, "ring"), (8, "ring")])
def test_float32_agrees_to_1e_5(batch, devices, implementation):
    z, labels = batch
    want, want_grads = jax.jit(losses_only)(z, labels), jax.jit(jax.jacrev(losses_only))(z, labels)
    local = functools.partial(losses_only, axis_name="data", implementation=implementation)
    sharded = jax.shard_map(local, mesh=mesh_of(devices), in_specs=P("data"), out_specs=P())
    got, got_grads = jax.jit(sharded)(z, labels), jax.jit(jax.jacrev(sharded))(z, labels)
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(got[i], want[i], rtol=1e-5, err_msg=name)
        scale = np.abs(want_grads[i]).max()
        np.testing.assert_allclose(got_grads[i], want_grads[i], atol=1e-5 * scale, err_msg=name)


# ---- memory


def temp_bytes(loss, *arrays, devices=1):
    """Temporary memory of value and gradient, of one device."""
    if devices > 1:
        mesh = mesh_of(devices)
        loss = jax.shard_map(functools.partial(loss, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P())
        rows = NamedSharding(mesh, P("data"))
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for a in arrays]
    return jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def batch_of(rows, views=2, dim=128):
    samples = rows // views
    return (
        jax.ShapeDtypeStruct((samples, views, dim), jnp.float32),
        jax.ShapeDtypeStruct((samples,), jnp.int32),
    )


def test_memory_of_supcon_is_linear_and_small():
    """The bound: 64 MiB for 32,768 rows on one device, and for 131,072 rows on each of 8 devices."""
    with limits(tile=512):
        one = [temp_bytes(supcon, *batch_of(n)) for n in (8192, 32768)]
        ring = [temp_bytes(supcon, *batch_of(n), devices=8) for n in (32768, 131072)]
        alone = temp_bytes(lambda f, **how: supcon(f, **how), batch_of(131072)[0], devices=8)
    assert one[1] <= 64 * MIB and ring[1] <= 64 * MIB and alone <= 64 * MIB
    # Four times the rows need at most four times the memory; the few tiles keep their size.
    assert one[1] <= 4.1 * one[0] and ring[1] <= 4.1 * ring[0]


@pytest.mark.parametrize(
    "loss,limit",
    [
        (lambda f, labels: nt_xent(f[:, 0], f[:, 1]), 96),
        (lambda f, labels: spread(jnp.swapaxes(f, 0, 1), labels)[0], 96),
        (lambda f, labels: instance_spread(f.reshape(-1, 128)), 96),
        (lambda f, labels: one_way_infonce(f[:, 0], f[:, 1]), 96),
        (lambda f, labels: supcon(f, labels, anchors="first"), 64),
        (lambda f, labels: supcon(f, labels, negatives=f[:1000, 0]), 64),
    ],
    ids=["nt_xent", "spread", "instance_spread", "one_way_infonce", "first", "negatives"],
)
def test_memory_of_the_others(loss, limit):
    with limits(tile=512):  # 32,768 rows: one matrix of logits would be 4 GiB, or 1 GiB between the views
        assert temp_bytes(loss, *batch_of(32768)) <= limit * MIB
