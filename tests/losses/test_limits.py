"""The choice of an implementation: its limits, their validation, and their effect on jit caches and threads."""

import functools
import threading

import chex
import jax
import numpy as np
import pytest
from loss_checks import assert_user_error

from jaxcl import losses
from jaxcl.losses import limits, plan, supcon


def implementation(rows, columns, axis_name=None):
    return plan.choose_plan("loss", "auto", rows, columns, axis_name).implementation


def test_auto_depends_on_the_logits_of_a_device():
    edge = plan.Limits().dense_logits
    assert implementation(edge // 64, 64) == "dense"
    assert implementation(edge // 64 + 1, 64) == "tiled"
    assert implementation(edge // 64 + 1, 64, "data") == "ring"


def test_limits_hold_within_the_block_only():
    before = plan.current_limits()
    with limits(dense_logits=0, tile=99) as now:
        assert now == plan.current_limits() == plan.Limits(0, 99)
        assert implementation(1, 1) == "tiled"
        assert plan.choose_plan("loss", "tiled", 1, 1, None) == plan.Plan("tiled", 99)
        with limits(tile=7) as inner:
            assert inner == plan.Limits(0, 7)
        assert plan.current_limits() == now
    assert plan.current_limits() == before
    with pytest.raises(KeyError), limits(tile=3):
        raise KeyError
    assert plan.current_limits() == before
    assert implementation(1, 1) == "dense"


@pytest.mark.parametrize("options", [dict(tiles=3), dict(tile=0), dict(dense_logits=-1), dict(tile=1.5)], ids=str)
def test_limits_are_checked(options):
    assert_user_error(lambda: limits(**options).__enter__(), "limits: ", next(iter(options)))


def test_other_limits_trace_a_jitted_function_again():
    z = np.random.default_rng(0).normal(size=(12, 2, 5)).astype(np.float32)
    traced = []
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def loss(z):
        traced.append(plan.current_limits())
        return supcon(z)

    with limits(dense_logits=0, tile=8):
        want = loss(z)
        loss(z + 1)
    with limits(dense_logits=0, tile=3):
        np.testing.assert_allclose(loss(z), want, rtol=1e-6)
    with limits(dense_logits=0, tile=8):  # the first program again
        assert loss(z) == want
    assert traced == [plan.Limits(0, 8), plan.Limits(0, 3)]


def test_threads_do_not_see_each_others_limits():
    """Both threads are inside their block while each traces the same jitted function."""
    z = np.random.default_rng(0).normal(size=(12, 2, 5)).astype(np.float32)
    together, seen, traced = threading.Barrier(2, timeout=60), {}, {}

    @jax.jit
    def loss(z):
        traced[threading.current_thread().name] = plan.current_limits()
        return supcon(z)

    def work(tile):
        with limits(dense_logits=0, tile=tile):
            together.wait()
            loss(z)
            together.wait()
            seen[tile] = plan.current_limits().tile

    before = plan.current_limits()
    threads = [threading.Thread(target=work, args=(tile,), name=str(tile)) for tile in (3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {3: 3, 8: 8}
    assert traced == {"3": plan.Limits(0, 3), "8": plan.Limits(0, 8)}
    assert plan.current_limits() == before


def test_a_new_thread_has_the_defaults():
    found = []
    with limits(tile=3):
        thread = threading.Thread(target=lambda: found.append(plan.current_limits()))
        thread.start()
        thread.join()
    assert found == [plan.Limits()]


def test_when_logits_are_bounded():
    """Of unit vectors down to the temperature of the largest safe logit, if it is known; cases F."""
    edge = 1 / plan.SAFE_LOGIT
    for temperature in (edge, 0.1, 1.0, 1, np.float32(0.5)):
        assert plan.is_bounded(True, temperature)
        assert not plan.is_bounded(False, temperature)
    for temperature in (0.99 * edge, 0.01, 1e-6, np.float32(0.01)):
        assert not plan.is_bounded(True, temperature)
    seen = []
    jax.eval_shape(lambda t: (seen.append(plan.is_bounded(True, t)), t)[1], 0.5)
    assert seen == [False]
    assert np.exp(np.float32(plan.SAFE_LOGIT)) < np.finfo(np.float32).max / 2**24  # a sum of many still fits


@pytest.mark.parametrize("temperature", [0.01, 0.005, 0.5])
@pytest.mark.parametrize("name", ["nt_xent", "one_way_infonce", "supcon", "spread"])
def test_small_temperatures_that_are_known(name, temperature):
    """Logits up to 200, whose exponentials overflow: values in float32 are those in float64; cases F."""
    rng = np.random.default_rng(0)
    z = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 12, 6))]
    z[1] = 0.7 * z[0] + 0.3 * z[1]
    z[0][6:] = -z[0][:6]  # opposite vectors as well
    loss = {
        "nt_xent": losses.nt_xent,
        "one_way_infonce": losses.one_way_infonce,
        "supcon": lambda a, b, **o: losses.supcon(jax.numpy.stack([a, b], 1), np.arange(12) % 3, **o),
        "spread": lambda a, b, **o: losses.spread(jax.numpy.stack([a, b]), np.arange(12) % 3, **o)[0],
    }[name]
    for how in ("dense", "tiled"):
        f = functools.partial(loss, temperature=temperature, implementation=how)
        with limits(tile=5):
            got, slope = jax.value_and_grad(f)(*(x.astype(np.float32) for x in z))
            with jax.enable_x64(True):
                want, wanted = jax.value_and_grad(f)(*z)
        assert got.dtype == np.float32 and want.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(slope, wanted, rtol=5e-3, atol=5e-4 * np.abs(wanted).max())
