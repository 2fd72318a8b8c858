"""Labels and flags that JAX would narrow: each is compared before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import assert_user_error

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.evaluate.collapse import collapse_metrics

ids = np.array([0, 1, 0, 2, 1, 3])
FEATURES = np.random.default_rng(0).normal(size=(6, 2, 8)).astype(np.float32)
VIEWS = np.moveaxis(FEATURES, 1, 0)
WIDE = {
    "int64": ids * 2**32 + 7,
    "int64 below zero": (ids - 9) * 2**32 - 5,
    "uint64": ids.astype(np.uint64) * 2**32 + 2**63,
    "uint32": (np.uint32(2**32 - 1) - ids).astype(np.uint32),
    "beyond 64 bits": [int(i) * 2**32 + 2**70 for i in ids],
    "with both signs": [int(i) * 2**32 + 2**63 if i else -7 for i in ids],
}
LOSSES = {
    "supcon": lambda y: losses.supcon(FEATURES, y),
    "supcon, dense": lambda y: losses.supcon(FEATURES, y, implementation="dense"),
    "spread": lambda y: losses.spread(VIEWS, y)[0],
    "attract": lambda y: losses.attract(VIEWS, y),
    "class_conditional_infonce": lambda y: losses.class_conditional_infonce(VIEWS, y),
}


@pytest.mark.parametrize("labels", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_wide_labels_stay_apart(loss, labels):
    """cases A.1"""
    assert loss(labels) == loss(ids)


@pytest.mark.parametrize("labels", [ids + 2.0**40, ids * 1e-60, ids.astype(np.float16)], ids=["large", "small", "half"])
def test_floating_labels_stay_apart(labels):
    """cases A.1"""
    assert losses.supcon(FEATURES, labels) == losses.supcon(FEATURES, ids)


def test_wide_labels_in_metrics():
    """cases A.1"""
    labels = np.where(ids == 3, -1, ids)
    want = collapse_metrics(FEATURES, labels)
    for wide in (np.where(ids == 3, -(2**40), ids * 2**32), np.where(ids == 3, -(2**32) + 1, ids)):
        got = collapse_metrics(FEATURES, wide)
        assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in want.items()}


def test_minus_one_alone_is_unlabelled():
    """cases A.1"""
    labels = np.array([-1, -1, 2**40, 2**40, -(2**40), -(2**40)])
    assert losses.spread(VIEWS, labels)[0] == losses.spread(VIEWS, np.array([-1, -1, 0, 0, 1, 1]))[0]
    without = np.where(labels == -1, -9, labels)
    assert losses.spread(VIEWS, without)[0] == losses.spread(VIEWS, np.array([2, 2, 0, 0, 1, 1]))[0]


def test_wide_labels_under_x64():
    """cases A.1"""
    with jax.enable_x64(True):
        for labels in (jnp.asarray(ids * 2**32), jnp.asarray(ids, jnp.uint64) + 2**32):
            assert losses.spread(VIEWS, labels)[0] == losses.spread(VIEWS, ids)[0]


@pytest.mark.parametrize("labels", [np.array([0, 1, np.nan, 0, 1, 2]), list("abcabc")], ids=["nan", "text"])
def test_labels_that_cannot_be_compared(labels):
    """cases A.1"""
    assert_user_error(lambda: losses.supcon(FEATURES, labels), "labels")


@pytest.mark.parametrize("true", [2**32, 1e-60], ids=["int64", "float64"])
def test_flags_are_not_narrowed(true):
    """cases A.1"""
    same = ids[:, None] == ids
    where = np.array([1, 1, 0, 1, 1, 1], bool)
    x = FEATURES[:, 0]
    calls = {
        "mask": lambda w: losses.supcon(FEATURES, mask=np.where(same, w, 0)),
        "supcon": lambda w: losses.supcon(FEATURES, ids, where=where * w),
        "background": lambda w: losses.supcon(FEATURES, ids, background=where * w),
        "spread": lambda w: losses.spread(VIEWS, ids, where=where * w)[0],
        "simsiam": lambda w: losses.simsiam(x, x[::-1], x, x, where=where * w),
        "reconstruction": lambda w: losses.reconstruction(x, x[::-1], where=where * w),
        "cross_entropy": lambda w: losses.cross_entropy(x, ids, where=where * w),
        "collapse": lambda w: collapse_metrics(FEATURES, ids, where=where * w)["uniformity"],
    }
    for name, call in calls.items():
        assert call(true) == call(1), name


# ---- numbers of classes


def test_a_label_that_is_no_class():
    """cases A.2"""
    logits = jnp.zeros((4, 3))
    for bad in (np.array([0, 1, 3, -1]), [0, 1, 2**32, 0], jnp.array([0, 1, 7, 2])):
        assert_user_error(lambda bad=bad: losses.cross_entropy(logits, bad), "labels", "row 2")
    # Padded rows hold anything, and no label below 0 becomes a class.
    assert losses.cross_entropy(logits, [0, 1, 9, 2], where=[True, True, False, True]) > 0
    assert losses.cross_entropy(logits, np.array([0, 1, 1 - 2**32, 2])) == losses.cross_entropy(logits, [0, 1, -1, 2])


def test_a_traced_label_that_is_no_class():
    """cases A.2"""
    logits = jnp.ones((3, 4))
    value, grad = jax.jit(lambda y: jax.value_and_grad(lambda x: losses.cross_entropy(x, y))(logits))(
        jnp.array([0, 4, -1])
    )
    assert np.isnan(value) and np.isnan(grad[1]).all() and np.isfinite(grad[::2]).all()


# ---- options


@pytest.mark.parametrize("zero", [np.float32(0), np.float64(-1), np.int64(0), jnp.float32(0), np.zeros(())], ids=repr)
def test_numbers_of_any_type_are_checked(zero):
    """cases A.14"""
    x = FEATURES[:, 0]
    calls = [
        functools.partial(losses.supcon, FEATURES, ids, temperature=zero),
        functools.partial(losses.supcon, FEATURES, ids, base_temperature=zero),
        functools.partial(losses.spread, VIEWS, ids, temperature=zero),
        functools.partial(losses.nt_xent, x, x, temperature=zero),
        functools.partial(losses.one_way_infonce, x, x, temperature=zero),
        functools.partial(losses.instance_spread, x, temperature=zero),
        functools.partial(losses.instance_spread, x, negative_multiplier=zero),
        functools.partial(losses.moco, x, x, x.T, temperature=zero),
        functools.partial(losses.attract, VIEWS, ids, positives_in_denominator=True, positive_weight=zero),
    ]
    for call in calls:
        with pytest.raises(UserError, match="0|-1"):
            call()
    assert_user_error(lambda: losses.spread(VIEWS, ids, a_lc=np.float32(-1)), "a_lc")
    assert_user_error(lambda: losses.cross_entropy(x, ids, label_smoothing=np.float32(1.5)), "label_smoothing")
