"""MoCo, BYOL and SimSiam against golden numbers, written-out loops, and themselves on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from loss_checks import assert_close, assert_user_error, on_devices, value_and_grads

from jaxcl.losses.momentum import byol, moco, simsiam


def moco_all(q, k, queue, negatives, **options):
    return moco(q, k, queue, negatives=negatives, **options)


def byol_all(p1, p2, z1, z2, n1, n2, **options):
    return byol(p1, p2, z1, z2, negatives=(n1, n2), **options)


# ---- golden numbers


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["basic", "multi_ns", "no_ns", "hard_ns"])
def test_golden_moco(golden, name, wide):
    d = golden("non_semantic_negatives", f"moco_loss_{name}")
    options = dict(alpha=float(d["alpha"]), temperature=float(d["temperature"]))
    with jax.enable_x64(wide):
        arrays = [jnp.asarray(d[k], jnp.float64 if wide else jnp.float32) for k in ("q_raw", "k_raw", "queue", "n_raw")]
        value, grads = value_and_grads(moco_all, *arrays, **options)
    assert value.dtype == grads[0].dtype == arrays[0].dtype
    assert_close(value, d["loss"], 1e-9 if wide else 2e-6)
    assert_close(grads[0], d["grad_q_raw"], 1e-9 if wide else 1e-5)
    assert not any(np.any(g) for g in grads[1:])


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_golden_byol(golden, wide):
    d = golden("non_semantic_negatives", "byol_loss")
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        p1, p2, z1, z2, n1, n2 = arrays = [jnp.asarray(d[k], dtype) for k in ("p1", "p2", "z1", "z2", "n1", "n2")]
        value, grads = value_and_grads(byol_all, *arrays, alpha=float(d["alpha"]))
        rtol = 1e-9 if wide else 2e-6
        assert value.dtype == dtype
        assert_close(value, d["loss"], rtol)
        assert_close(grads[0], d["grad_p1"], 1e-9 if wide else 1e-5)
        assert_close(grads[1], d["grad_p2"], 1e-9 if wide else 1e-5)
        assert not any(np.any(g) for g in grads[2:])
        assert_close(byol(p1, p2, z1, z2), d["loss_plain_byol"], rtol)
        # Only one direction: the other view predicts its target exactly and has no negative.
        one_sided = lambda p: byol(p, z1, z1, z2, negatives=(n1, None), alpha=float(d["alpha"]))  # noqa: E731
        value, grad = jax.jit(jax.value_and_grad(one_sided))(p1)
        assert_close(value, d["loss_one_sided"], rtol)
        assert_close(grad, d["grad_p1_one_sided"], 1e-9 if wide else 1e-5)


# ---- the definitions, row by row


def cos(x, y):
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def slow_moco(q, k, queue, negatives, *, alpha=2.0, temperature=0.2, where=None):
    losses = []
    for i in range(len(q)):
        if where is None or where[i]:
            unit_q = q[i] / np.linalg.norm(q[i])
            logits = [
                cos(q[i], k[i]),
                *(unit_q @ key for key in queue.T),
                *(alpha * cos(q[i], n) for n in negatives[i]),
            ]
            weights = np.exp(np.array(logits) / temperature)
            losses.append(-np.log(weights[0] / weights.sum()))
    return np.mean(losses)


def slow_byol(p1, p2, z1, z2, n1=None, n2=None, *, alpha=0.2, where=None):
    def d(x, y):
        return np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2)

    losses = []
    for i in range(len(p1)):
        if where is None or where[i]:
            near = d(p1[i], z2[i]) + d(p2[i], z1[i])
            far = sum(d(p[i], n) for p, ns in ((p1, n1), (p2, n2)) if ns is not None for n in ns[i])
            losses.append(near - alpha * far)
    return np.mean(losses)


def slow_simsiam(p1, p2, z1, z2, *, where=None):
    rows = [i for i in range(len(p1)) if where is None or where[i]]
    return np.mean([-cos(p1[i], z2[i]) / 2 - cos(p2[i], z1[i]) / 2 for i in rows])


def make(loss, seed=0, n=6, d=5, m=2, keys=7):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))  # noqa: E731
    if loss is moco_all:
        queue = draw(keys, d)
        return [draw(n, d), draw(n, d), (queue / np.linalg.norm(queue, axis=1, keepdims=True)).T, draw(n, m, d)]
    rows = [draw(n, d) for _ in range(4)]
    return rows + ([draw(n, m, d), draw(n, m, d)] if loss is byol_all else [])


LOSSES = [(moco_all, slow_moco, 1), (byol_all, slow_byol, 2), (simsiam, slow_simsiam, 2)]
IDS = ["moco", "byol", "simsiam"]


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
def test_written_out_loop_and_finite_differences(wide, loss, slow, trained):
    arrays = make(loss)
    where = np.arange(6) != 4
    value, grads = value_and_grads(loss, *arrays, where=where)
    np.testing.assert_allclose(value, slow(*arrays, where=where), rtol=1e-12)
    np.testing.assert_allclose(loss(*arrays), slow(*arrays), rtol=1e-12)
    for which in range(trained):
        for index in list(np.ndindex(*arrays[which].shape))[::3]:
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arrays]
                moved[which][index] += step
                ends.append(slow(*moved, where=where))
            np.testing.assert_allclose(grads[which][index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)
    assert not any(np.any(g) for g in grads[trained:])


@pytest.mark.parametrize("m", [0, 1, 3])
def test_any_number_of_negatives(wide, m):
    for loss, slow in ((moco_all, slow_moco), (byol_all, slow_byol)):
        arrays = make(loss, m=m)
        np.testing.assert_allclose(loss(*arrays, alpha=1.3), slow(*arrays, alpha=1.3), rtol=1e-12)


# ---- properties


def test_no_negatives_and_alpha_zero(wide):
    q, k, queue, n = make(moco_all)
    plain = moco(q, k, queue)
    assert moco(q, k, queue, negatives=n[:, :0]) == plain
    # Each negative is a constant logit of 0, which is not plain MoCo.
    zero = moco(q, k, queue, negatives=n, alpha=0.0)
    np.testing.assert_allclose(zero, moco(q, k, np.concatenate([queue, np.zeros((5, 2))], axis=1)), rtol=1e-13)
    assert zero > plain
    values = [moco(q, k, queue, negatives=q[:, None] * 3, alpha=a) for a in (0.0, 1.0, 2.0, 3.0)]
    assert np.all(np.diff(values) > 0)
    assert moco(q, k, queue[:, :0]) == 0  # an empty queue: nothing to contrast
    *rows, n1, n2 = make(byol_all)
    np.testing.assert_allclose(byol(*rows, negatives=(n1, n2), alpha=0.0), byol(*rows), rtol=1e-14)


def test_descent_takes_a_query_away_from_its_own_negative(wide):
    """It moves further with alpha than without negatives, and still approaches its key."""
    q, k, queue, n = make(moco_all, m=1)
    n[:, 0] = q + 0.3 * n[:, 0]  # hard negatives

    def cosine(a, b):
        return float(((a / np.linalg.norm(a, axis=1)[:, None]) * b / np.linalg.norm(b, axis=1)[:, None]).sum(1).mean())

    def learned(alpha):
        loss = functools.partial(moco, negatives=n if alpha else None, alpha=alpha)
        descend = jax.jit(lambda x: x - 0.5 * jax.grad(loss)(x, k, queue))
        x = q
        for _ in range(30):
            x = np.asarray(descend(x))
        return cosine(x, n[:, 0]), cosine(x, k)

    plain, weak, strong = (learned(a) for a in (0.0, 1.0, 3.0))
    assert cosine(q, n[:, 0]) > plain[0] > weak[0] > strong[0]
    assert strong[1] > cosine(q, k)


def test_byol_forms_of_negatives(wide):
    *rows, n1, n2 = make(byol_all, m=1)
    want = byol(*rows, negatives=(n1, n2))
    np.testing.assert_allclose(byol(*rows, negatives=[n1[:, 0], n2[:, 0]]), want, rtol=1e-14)
    np.testing.assert_allclose(byol(*rows, negatives=n1), byol(*rows, negatives=(n1, n1)), rtol=1e-14)
    sides = [byol(*rows, negatives=side) for side in ((n1, None), (None, n2))]
    np.testing.assert_allclose(sum(sides) - byol(*rows), want, rtol=1e-13)


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
def test_lengths_do_not_matter(wide, loss, slow, trained):
    arrays = make(loss)
    longer = [a if loss is moco_all and i == 2 else a * (2.0 + i) for i, a in enumerate(arrays)]
    np.testing.assert_allclose(loss(*longer), loss(*arrays), rtol=1e-12)


def test_bounds():
    x, y = make(simsiam)[:2]
    for value, want in ((simsiam(x, y, y, x), -1), (simsiam(x, y, -y, -x), 1), (byol(x, y, y, x), 0)):
        np.testing.assert_allclose(value, want, atol=1e-6)
    np.testing.assert_allclose(byol(x, y, -y, -x), 8, rtol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    alike = np.repeat(unit[:1].T, 9, axis=1)  # one positive among ten equal keys
    np.testing.assert_allclose(moco(x[:1], x[:1], alike), np.log(10), rtol=1e-6)


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
@pytest.mark.parametrize("filler", [0.0, 1e30, np.nan])
def test_padding_changes_nothing(wide, loss, slow, trained, filler):
    arrays = make(loss)
    value, grads = value_and_grads(loss, *arrays)

    def padded(i, a):
        return a if loss is moco_all and i == 2 else np.concatenate([a, np.full((2, *a.shape[1:]), filler)])

    got, got_grads = value_and_grads(loss, *(padded(i, a) for i, a in enumerate(arrays)), where=np.arange(8) < 6)
    np.testing.assert_allclose(got, value, rtol=1e-13)
    for which in range(trained):
        np.testing.assert_allclose(got_grads[which][:6], grads[which], atol=1e-14)
        np.testing.assert_array_equal(got_grads[which][6:], 0)


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
def test_vmap(wide, loss, slow, trained):
    seeds = [make(loss, seed=s) for s in range(3)]
    got = jax.vmap(loss)(*(np.stack(a) for a in zip(*seeds, strict=True)))
    np.testing.assert_allclose(got, [slow(*arrays) for arrays in seeds], rtol=1e-12)


def test_traced_scalars(wide):
    arrays = make(moco_all)
    got = jax.jit(lambda t, a: moco_all(*arrays, temperature=t, alpha=a))(0.3, 1)
    np.testing.assert_allclose(got, slow_moco(*arrays, temperature=0.3, alpha=1), rtol=1e-12)
    arrays = make(byol_all)
    got = jax.jit(lambda a: byol_all(*arrays, alpha=a))(0.4)
    np.testing.assert_allclose(got, slow_byol(*arrays, alpha=0.4), rtol=1e-12)


# ---- numbers at the edge


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
@pytest.mark.parametrize("case", ["zero", "large", "duplicates", "one_row", "none_exists"])
def test_odd_cases_are_finite(case, loss, slow, trained):
    arrays = [a.astype(np.float32) for a in make(loss)]
    rows = [a for i, a in enumerate(arrays) if loss is not moco_all or i != 2]
    options = dict(where=np.ones(6, bool))
    if case == "zero":
        for a in rows:
            a[2] = 0
        rows[0][3] = 0
    elif case == "large":
        for a in rows:
            a *= 1e15
    elif case == "duplicates":
        for a in rows:
            a[:] = a[:1]
    elif case == "one_row":
        arrays = [a if loss is moco_all and i == 2 else a[:1] for i, a in enumerate(arrays)]
        options = {}
    elif case == "none_exists":
        options["where"][:] = False
    if loss is moco_all:
        options |= dict(alpha=10.0, temperature=0.01)  # logits up to 1,000
    value, grads = value_and_grads(loss, *arrays, **options)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    if case == "zero":
        assert not np.any(grads[0][2:4]) and np.any(grads[0][1])
    if case == "none_exists":
        assert value == 0 and not any(np.any(g) for g in grads)


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
def test_half_precision_inputs_are_widened_first(loss, slow, trained):
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in make(loss)]
    value, grads = value_and_grads(loss, *arrays)
    assert value.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, loss(*(a.astype(jnp.float32) for a in arrays)), rtol=1e-6)


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
def test_divergence_shows(loss, slow, trained):
    arrays = make(loss)
    arrays[0][1, 2] = np.nan
    assert np.isnan(loss(*arrays))


# ---- several devices


@pytest.mark.parametrize("loss,slow,trained", LOSSES, ids=IDS)
def test_same_on_1_2_and_8_devices(wide, loss, slow, trained):
    arrays = make(loss, n=16)
    where = np.arange(16) % 5 != 1  # the devices hold different numbers of rows
    want, want_grads = value_and_grads(loss, *arrays, where=where)
    specs = tuple(P() if loss is moco_all and i == 2 else P("data") for i in range(len(arrays)))
    counted = functools.partial(split_where, loss)
    for devices, inside in ((1, False), (2, False), (8, True)):
        # `where` is passed as floats, so that every argument can be differentiated.
        value, grads = on_devices(
            devices, counted, [*arrays, where.astype(float)], in_specs=(*specs, P("data")), inside=inside
        )
        np.testing.assert_allclose(value, want, rtol=1e-12)
        for got, expected in zip(grads, want_grads, strict=False):
            np.testing.assert_allclose(got, expected, atol=1e-13)


def split_where(loss, *arrays):
    return loss(*arrays[:-1], where=arrays[-1] != 0, axis_name="data")


# ---- mistakes


ROWS = np.ones((6, 5), np.float32)


@pytest.mark.parametrize(
    "loss,key,call",
    [
        ("moco", "k", lambda: moco(ROWS, ROWS[:5], ROWS.T)),
        ("moco", "q", lambda: moco(ROWS.astype(int), ROWS, ROWS.T)),
        ("moco", "queue", lambda: moco(ROWS, ROWS, ROWS)),
        ("moco", "queue", lambda: moco(ROWS, ROWS, ROWS.T.astype(int))),
        ("moco", "queue", lambda: moco(ROWS, ROWS, ROWS.T[0])),
        ("moco", "negatives", lambda: moco(ROWS, ROWS, ROWS.T, negatives=ROWS)),
        ("moco", "negatives", lambda: moco(ROWS, ROWS, ROWS.T, negatives=ROWS[:5, None])),
        ("moco", "negatives", lambda: moco(ROWS, ROWS, ROWS.T, negatives=ROWS[:, None].astype(int))),
        ("moco", "temperature", lambda: moco(ROWS, ROWS, ROWS.T, temperature=0)),
        ("moco", "where", lambda: moco(ROWS, ROWS, ROWS.T, where=np.ones(5, bool))),
        ("moco", "q", lambda: moco(ROWS[0], ROWS[0], ROWS.T)),
        ("byol", "z2", lambda: byol(ROWS, ROWS, ROWS, ROWS[:, :4])),
        ("byol", "z2", lambda: byol(ROWS, ROWS, ROWS, ROWS.astype(int))),
        ("byol", "negatives", lambda: byol(ROWS, ROWS, ROWS, ROWS, negatives=ROWS[:5])),
        ("byol", "negatives", lambda: byol(ROWS, ROWS, ROWS, ROWS, negatives=(ROWS, ROWS, ROWS))),
        ("byol", "where", lambda: byol(ROWS, ROWS, ROWS, ROWS, where=np.ones((6, 1), bool))),
        ("simsiam", "z2", lambda: simsiam(ROWS, ROWS, ROWS, ROWS[:5])),
        ("simsiam", "p1", lambda: simsiam(ROWS[None], ROWS[None], ROWS[None], ROWS[None])),
    ],
)
def test_mistakes_are_one_line(loss, key, call):
    assert_user_error(call, f"{loss}: {key}")
