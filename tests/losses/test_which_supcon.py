"""Five losses with the name SupCon on one batch: which of them `supcon` computes, and which it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.losses import supcon

TEMPERATURE = 0.1
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3])  # the last is alone in its class


@pytest.fixture(scope="module")
def z():
    z = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def by_hand(z):
    """(exponentials of the logits without the diagonal, positives, negatives), each [N, N], in float64."""
    z = z.astype(np.float64)
    other = ~np.eye(len(z), dtype=bool)
    same = LABELS[:, None] == LABELS[None]
    return np.exp(z @ z.T / TEMPERATURE) * other, same & other, ~same


@functools.partial(jax.jit, static_argnames=("anchor_mean", "implementation"))
def ours(z, base_temperature, anchor_mean, implementation):
    return supcon(
        z[:, None],
        jnp.asarray(LABELS),
        temperature=TEMPERATURE,
        base_temperature=base_temperature,
        anchor_mean=anchor_mean,
        implementation=implementation,
    )


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
@pytest.mark.parametrize(
    ("base_temperature", "anchor_mean", "expected"),
    [
        (TEMPERATURE, "all", 4.769),  # the paper's L_out, an anchor without a positive counts 0
        (0.07, "all", 6.813),  # the authors' code: times temperature / 0.07
        (TEMPERATURE, "positive", 5.450),  # metric-learning libraries: mean over the anchors that have a positive
    ],
)
def test_options_give_three_of_them(z, base_temperature, anchor_mean, implementation, expected):
    exponential, positive, _ = by_hand(z)
    losses = []
    for i in range(len(z)):
        terms = [-np.log(exponential[i, p] / exponential[i].sum()) for p in np.flatnonzero(positive[i])]
        losses.append(np.mean(terms) if terms else 0.0)
    count = len(z) if anchor_mean == "all" else int(positive.any(1).sum())
    written = TEMPERATURE / base_temperature * sum(losses) / count

    loss = float(ours(z, base_temperature, anchor_mean, implementation))
    assert written == pytest.approx(expected, abs=6e-4)
    assert loss == pytest.approx(written, rel=1e-5)


def test_logarithm_outside_the_sum_is_another_number(z):
    """L_in: a SimCLR function given class ids sums its positives inside the logarithm."""
    exponential, positive, _ = by_hand(z)
    share = (exponential * positive).sum(1) / exponential.sum(1)
    some = positive.any(1)
    l_in = -np.log(share[some]).mean()

    assert share[~some].tolist() == [0.0]  # its loss would be infinite
    assert l_in == pytest.approx(4.507, abs=6e-4)
    assert float(ours(z, TEMPERATURE, "positive", "dense")) > l_in + 0.5  # Jensen: never below


def test_other_positives_left_out_is_another_number(z):
    """optax: the denominator of a pair holds itself and the negatives, and pairs are averaged, not anchors."""
    exponential, positive, negative = by_hand(z)
    negatives = (exponential * negative).sum(1)
    terms = [-np.log(exponential[i, p] / (exponential[i, p] + negatives[i])) for i, p in np.argwhere(positive)]
    theirs = float(optax.losses.ntxent(jnp.asarray(z), jnp.asarray(LABELS), TEMPERATURE))

    assert np.mean(terms) == pytest.approx(5.547, abs=6e-4)
    assert theirs == pytest.approx(np.mean(terms), rel=1e-5)
    for anchor_mean in ("all", "positive"):
        assert abs(float(ours(z, TEMPERATURE, anchor_mean, "dense")) - theirs) > 0.05


def test_with_pairs_only_the_factor_is_left(z):
    """With two rows in each class, L_out, L_in and the loss of optax are equal."""
    labels = jnp.arange(8) // 2
    expected = float(optax.losses.ntxent(jnp.asarray(z), labels, TEMPERATURE))
    assert float(supcon(z[:, None], labels, temperature=TEMPERATURE)) == pytest.approx(expected, rel=1e-5)
    doubled = supcon(z[:, None], labels, temperature=TEMPERATURE, base_temperature=TEMPERATURE / 2)
    assert float(doubled) == pytest.approx(2 * expected, rel=1e-5)
