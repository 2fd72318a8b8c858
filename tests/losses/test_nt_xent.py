"""NT-Xent and one-way InfoNCE against golden numbers, a written-out loop, and themselves on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from loss_checks import ENGINES, SHARDED_ENGINES, assert_close, assert_user_error, on_devices, value_and_grads

from jaxcl.losses.nt_xent import nt_xent, one_way_infonce


def with_negatives(z1, z2, n1, n2, **options):
    return nt_xent(z1, z2, negatives=(n1, n2), **options)


def one_way_plain(anchors, keys, **options):
    return one_way_infonce(anchors, keys, **options)


# ---- golden numbers


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "loss,name,inputs",
    [
        (nt_xent, "ntxent_b8_d16_t05", ("z_i", "z_j")),
        (nt_xent, "ntxent_b16_d64_t01", ("z_i", "z_j")),
        (nt_xent, "ntxent_b64_d32_t02_unnormalised", ("z_i", "z_j")),
        (one_way_infonce, "plain_b8_d16_t01", ("f_1", "f_2")),
        (one_way_infonce, "plain_b16_d32_t05", ("f_1", "f_2")),
        (one_way_infonce, "plain_b32_d128_t01", ("f_1", "f_2")),
    ],
)
def test_golden(golden, loss, name, inputs, wide):
    d = golden("clae", name)
    with jax.enable_x64(wide):
        arrays = [jnp.asarray(d[k], jnp.float64 if wide else jnp.float32) for k in inputs]
        for how in ENGINES if wide else ("tiled",):
            value, grads = value_and_grads(loss, *arrays, temperature=float(d["temperature"]), implementation=how)
            assert value.dtype == grads[0].dtype == arrays[0].dtype
            assert_close(value, d["loss"], 1e-9 if wide else 1e-5)
            for grad, k in zip(grads, inputs, strict=True):
                assert_close(grad, d[f"grad_{k}"], 1e-9 if wide else 3e-5)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["simclr_loss", "simclr_loss_shared_ns"])
def test_golden_negatives(golden, name, wide):
    d = golden("non_semantic_negatives", name)
    shared = bool(d["shared_ns"])
    names = ("z1", "z2", "n1") if shared else ("z1", "z2", "n1", "n2")
    loss = shared_negatives if shared else with_negatives
    options = dict(alpha=float(d["alpha"]), temperature=float(d["temperature"]))
    with jax.enable_x64(wide):
        arrays = [jnp.asarray(d[k], jnp.float64 if wide else jnp.float32) for k in names]
        plain = nt_xent(*arrays[:2], temperature=options["temperature"])
        assert_close(plain, d["loss_plain_ntxent"], 1e-9 if wide else 2e-6)
        for how in ENGINES if wide else ("tiled",):
            value, grads = value_and_grads(loss, *arrays, implementation=how, **options)
            assert_close(value, d["loss"], 1e-9 if wide else 2e-6)
            for grad, k in zip(grads, names, strict=True):
                assert_close(grad, d[f"grad_{k}"], 1e-9 if wide else 1e-5)


def shared_negatives(z1, z2, n, **options):
    return nt_xent(z1, z2, negatives=n, **options)


# ---- the definition, element by element


def slow_nt_xent(z1, z2, n1=None, n2=None, *, alpha=1.0, temperature=0.5):
    rows = [np.asarray(r, np.float64) / np.linalg.norm(r) for r in (*z1, *z2)]
    own = [()] * len(rows) if n1 is None else [*n1, *n2]
    losses = []
    for a, row in enumerate(rows):
        denominator = sum(np.exp(row @ rows[b] / temperature) for b in range(len(rows)) if b != a)
        denominator += sum(np.exp(alpha * (row @ n) / np.linalg.norm(n) / temperature) for n in own[a])
        losses.append(np.log(denominator) - row @ rows[(a + len(z1)) % len(rows)] / temperature)
    return np.mean(losses)


def slow_one_way(anchors, keys, *, temperature=0.1):
    terms = [
        np.log(sum(np.exp(a @ k / temperature) for k in keys)) - a @ keys[i] / temperature
        for i, a in enumerate(anchors)
    ]
    return np.mean(terms)


def make(seed=0, b=4, m=2, d=5):
    """z1, z2, n1, n2, whose vectors do not have unit length."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(b, 1)))
    return [rng.normal(size=s) * scale.reshape(b, *[1] * (len(s) - 1)) for s in ((b, d),) * 2 + ((b, m, d),) * 2]


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize("m", [0, 1, 3])
def test_written_out_loop(wide, m, implementation):
    arrays = make(m=m)
    options = dict(alpha=1.7, temperature=0.3)
    got = with_negatives(*arrays, implementation=implementation, **options)
    np.testing.assert_allclose(got, slow_nt_xent(*arrays, **options), rtol=1e-12)
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in arrays[:2]]
    for pair in (unit, arrays[:2]):
        got = one_way_infonce(*pair, temperature=0.3, implementation=implementation)
        np.testing.assert_allclose(got, slow_one_way(*pair, temperature=0.3), rtol=1e-12)


@pytest.mark.parametrize("implementation", ENGINES)
@pytest.mark.parametrize(
    "loss,slow,count", [(with_negatives, slow_nt_xent, 4), (one_way_plain, slow_one_way, 2)], ids=["nt_xent", "one_way"]
)
def test_gradients_by_finite_differences(wide, loss, slow, count, implementation):
    arrays = make(b=3, m=2, d=3)[:count]
    scalars = dict(alpha=1.7, temperature=0.3) if count == 4 else dict(temperature=0.3)
    grads, scalar_grads = jax.jit(jax.grad(lambda a, s: loss(*a, implementation=implementation, **s), argnums=(0, 1)))(
        arrays, scalars
    )
    for which, grad in enumerate(grads):
        for index in list(np.ndindex(*grad.shape))[::2]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arrays]
                moved[which][index] += step
                ends.append(slow(*moved, **scalars))
            np.testing.assert_allclose(grad[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)
    for name, value in scalars.items():
        ends = [slow(*arrays, **(scalars | {name: value + step})) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose(scalar_grads[name], (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


# ---- properties


def test_views_images_and_lengths_do_not_matter(wide):
    z1, z2, n1, n2 = make()
    value, _ = value_and_grads(with_negatives, z1, z2, n1, n2)
    order = np.array([2, 0, 3, 1])
    for other in ((z2, z1, n2, n1), (z1[order], z2[order], n1[order], n2[order]), (3 * z1, z2 / 7, n1 * 9, n2)):
        np.testing.assert_allclose(value_and_grads(with_negatives, *other)[0], value, rtol=1e-12)
    # They do matter if an anchor gets the negatives of another, and for the one-way loss.
    assert abs(value_and_grads(with_negatives, z1, z2, n1[order], n2)[0] - value) > 1e-4
    assert abs(one_way_infonce(z1, z2) - one_way_infonce(z2, z1)) > 1e-4
    assert abs(one_way_infonce(3 * z1, z2) - one_way_infonce(z1, z2)) > 1e-4


def test_own_negatives(wide):
    z1, z2, n1, n2 = make()
    plain = nt_xent(z1, z2)
    assert nt_xent(z1, z2, negatives=(n1[:, :0], n2[:, :0])) == plain
    np.testing.assert_allclose(nt_xent(z1, z2, negatives=n1), nt_xent(z1, z2, negatives=(n1, n1)), rtol=1e-15)
    # alpha=0 is not the plain loss: each negative acts like a zero vector and adds exp(0).
    zero = nt_xent(z1, z2, negatives=(n1, n2), alpha=0.0)
    np.testing.assert_allclose(zero, nt_xent(z1, z2, negatives=(0 * n1, 0 * n2)), rtol=1e-14)
    assert zero > plain + 0.01
    # A similar negative counts more with alpha, a dissimilar one counts less.
    close = [nt_xent(z1, z2, negatives=(z1[:, None], z2[:, None]), alpha=a) for a in (0.0, 1.0, 2.0, 3.0)]
    far = [nt_xent(z1, z2, negatives=(-z1[:, None], -z2[:, None]), alpha=a) for a in (0.0, 1.0, 2.0, 3.0)]
    assert np.all(np.diff(close) > 0) and np.all(np.diff(far) < 0)


def test_identical_rows():
    z, n = jnp.ones((8, 4)), jnp.ones((8, 3, 4))
    for how in ENGINES:
        np.testing.assert_allclose(nt_xent(z, z, negatives=n, implementation=how), np.log(18), rtol=1e-6)
        np.testing.assert_allclose(one_way_infonce(z, z, implementation=how), np.log(8), rtol=1e-6)


def test_jit_vmap_and_traced_scalars(wide):
    batch = [np.stack(a) for a in zip(*(make(seed=s) for s in range(3)), strict=True)]
    want = [with_negatives(*make(seed=s)) for s in range(3)]
    for how in ENGINES:
        loss = functools.partial(with_negatives, implementation=how)
        np.testing.assert_allclose(jax.vmap(loss)(*batch), want, rtol=1e-12)
    traced = jax.jit(lambda t, a: with_negatives(*make(), temperature=t, alpha=a))(0.2, 3)
    np.testing.assert_allclose(traced, with_negatives(*make(), temperature=0.2, alpha=3), rtol=1e-13)


# ---- numbers at the edge


@pytest.mark.parametrize("temperature", [5e-4, 100.0])
@pytest.mark.parametrize("case", ["zero", "large", "duplicates", "one_image"])
def test_odd_cases_are_finite(case, temperature):
    z1, z2, n1, n2 = (a.astype(np.float32) for a in make(b=6))
    if case == "zero":
        z1[2], n2[1, 1] = 0, 0
    elif case == "large":
        z1, z2, n1, n2 = z1 * 1e4, z2 * 1e4, n1 * 1e15, n2 * 1e-9
    elif case == "duplicates":
        z1[:], z2[:], n1[:] = z1[:1], z1[:1], z1[:1]
    elif case == "one_image":
        z1, z2, n1, n2 = z1[:1], z2[:1], n1[:1], n2[:1]
    for how in ENGINES:
        value, grads = value_and_grads(with_negatives, z1, z2, n1, n2, temperature=temperature, implementation=how)
        assert np.isfinite(value) and value >= -1e-3
        assert all(np.isfinite(g).all() for g in grads)
        if case == "zero":
            assert not np.any(grads[0][2]) and np.any(grads[0][3]) and not np.any(grads[3][1, 1])
        if case != "one_image":
            value, grads = value_and_grads(one_way_infonce, z1, z2, temperature=temperature, implementation=how)
            assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("implementation", ENGINES)
def test_small_temperature_is_exact(implementation):
    """With the row's similarity to itself in the maximum, all other terms would underflow."""
    arrays = make(b=6)
    with jax.enable_x64(True):
        want, want_grads = value_and_grads(with_negatives, *arrays, temperature=5e-4, implementation=implementation)
    narrow = [a.astype(np.float32) for a in arrays]
    value, grads = value_and_grads(with_negatives, *narrow, temperature=5e-4, implementation=implementation)
    assert_close(value, want, 1e-5)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-3), grads, want_grads)


def test_half_precision_inputs_are_widened_first():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in make(b=8)]
    for loss, inputs in ((with_negatives, arrays), (one_way_infonce, arrays[:2])):
        value, grads = value_and_grads(loss, *inputs)
        assert value.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in grads)
        want = value_and_grads(loss, *(a.astype(jnp.float32) for a in inputs))[0]
        np.testing.assert_allclose(value, want, rtol=1e-6)


def test_divergence_shows():
    z1, z2, *_ = make()
    z1[1, 2] = np.nan
    assert np.isnan(nt_xent(z1, z2)) and np.isnan(one_way_infonce(z1, z2))


# ---- several devices


@pytest.mark.parametrize("implementation,counts", SHARDED_ENGINES)
def test_same_on_1_2_and_8_devices(wide, implementation, counts):
    arrays = make(b=16)
    for loss, inputs in ((with_negatives, arrays), (one_way_plain, arrays[:2])):
        want, want_grads = value_and_grads(loss, *inputs, temperature=0.3)
        for devices in counts:
            local = functools.partial(loss, temperature=0.3, implementation=implementation, axis_name="data")
            value, grads = on_devices(devices, local, inputs)
            np.testing.assert_allclose(value, want, rtol=1e-12)
            for got, expected in zip(grads, want_grads, strict=True):
                assert np.abs(expected).max() > 1e-4
                np.testing.assert_allclose(got, expected, atol=1e-13)


@pytest.mark.parametrize("implementation", ["dense", "ring"])
def test_gradient_inside_shard_map_is_that_of_the_global_loss(wide, implementation):
    arrays = make(b=8)
    loss = functools.partial(with_negatives, implementation=implementation, axis_name="data")
    want = value_and_grads(with_negatives, *arrays)
    got = on_devices(8, loss, arrays, inside=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), got, want)


@pytest.mark.parametrize("implementation", ["ring"])
def test_two_mesh_axes(wide, implementation):
    z1, z2, *_ = make(b=16)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    local = functools.partial(nt_xent, implementation=implementation, axis_name=("a", "b"))
    loss = jax.shard_map(local, mesh=mesh, in_specs=P(("a", "b")), out_specs=P())
    got = jax.jit(jax.value_and_grad(loss))(jnp.asarray(z1), jnp.asarray(z2))
    want = value_and_grads(nt_xent, z1, z2)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], want[1][0], atol=1e-13)


@pytest.mark.parametrize("implementation", ENGINES)
def test_jit_of_a_sharded_batch_without_axis_name(wide, implementation):
    arrays = make(b=16)[:2]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(arrays, jax.NamedSharding(mesh, P("data")))
    got = value_and_grads(nt_xent, *split, implementation=implementation)
    want = value_and_grads(nt_xent, *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), got, want)


# ---- mistakes


@pytest.mark.parametrize(
    "options,key",
    [
        (dict(a=np.ones((6, 5), np.int32)), "a"),
        (dict(b=np.ones((6, 4), np.float32)), "b"),
        (dict(b=np.ones((5, 5), np.float32)), "b"),
        (dict(a=np.ones(5, np.float32), b=np.ones(5, np.float32)), "a"),
        (dict(a=np.ones((0, 5), np.float32), b=np.ones((0, 5), np.float32)), "a"),
        (dict(a=np.ones((1, 5), np.float32), b=np.ones((1, 5), np.float32)), "a"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(implementation="fast"), "implementation"),
        (dict(implementation="ring"), "implementation"),
    ],
    ids=str,
)
@pytest.mark.parametrize("loss,a,b", [(nt_xent, "z1", "z2"), (one_way_infonce, "anchors", "keys")])
def test_mistakes_are_one_line(loss, a, b, options, key):
    options = dict(options)
    arrays = [options.pop(k, np.ones((6, 5), np.float32)) for k in "ab"]
    assert_user_error(lambda: loss(*arrays, **options), f"{loss.__name__}: ", {"a": a, "b": b}.get(key, key))


@pytest.mark.parametrize(
    "negatives",
    [
        np.ones((6, 5), np.float32),
        np.ones((5, 2, 5), np.float32),
        np.ones((6, 2, 4), np.float32),
        np.ones((6, 2, 5), np.int32),
        (np.ones((6, 2, 5), np.float32),) * 3,
        (np.ones((6, 2, 5), np.float32), np.ones((6, 3, 5), np.float32)),
    ],
    ids=lambda n: str(np.shape(n) if not isinstance(n, tuple) else [x.shape for x in n]),
)
def test_mistaken_negatives(negatives):
    rows = np.ones((6, 5), np.float32)
    assert_user_error(lambda: nt_xent(rows, rows, negatives=negatives), "nt_xent: ", "negatives")
