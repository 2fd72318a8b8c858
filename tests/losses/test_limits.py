"""The choice of an implementation: its limits, their validation, and their effect on jit caches and threads."""

import threading

import chex
import jax
import numpy as np
import pytest
from loss_checks import assert_user_error

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
