"""Properties that every public loss must have: a scalar of the right type, no retracing, and a readable `help`."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxcl import losses

B, D = 6, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, B, D)).astype(np.float32)
QUEUE = (X[3] / np.linalg.norm(X[3], axis=1, keepdims=True)).T
LABELS = np.array([0, 0, 1, 1, 2, -1])

# name: (loss of arrays of floats, the arrays)
CASES = {
    "attract": (lambda v: losses.attract(v, LABELS), X[:2]),
    "barlow_twins": (losses.barlow_twins, *X[:2]),
    "byol": (losses.byol, *X),
    "class_conditional_infonce": (lambda v: losses.class_conditional_infonce(v, LABELS), X[:2]),
    "cross_entropy": (lambda x: losses.cross_entropy(x, LABELS), X[0]),
    "instance_spread": (losses.instance_spread, X[:2].reshape(2 * B, D)),
    "moco": (losses.moco, *X[:2], QUEUE),
    "nt_xent": (losses.nt_xent, *X[:2]),
    "one_way_infonce": (losses.one_way_infonce, *X[:2]),
    "reconstruction": (losses.reconstruction, *X[:2]),
    "simsiam": (losses.simsiam, *X),
    "spread": (lambda v: losses.spread(v, LABELS), X[:2]),
    "supcon": (lambda f: losses.supcon(f, LABELS), np.moveaxis(X[:2], 0, 1)),
}
each_loss = pytest.mark.parametrize("name", CASES)


def test_every_public_loss_is_here():
    assert set(CASES) | {"limits"} == set(losses.__all__)


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    @parameterized.named_parameters(*((name, name) for name in CASES))
    def test_a_scalar_with_gradients_of_the_inputs_shapes(self, name):
        loss, *arrays = CASES[name]
        value = self.variant(loss)(*arrays)
        chex.assert_shape(jax.tree.leaves(value), ())
        chex.assert_type(jax.tree.leaves(value), jnp.float32)
        chex.assert_tree_all_finite(value)
        chex.assert_trees_all_close(value, jax.jit(loss)(*arrays), rtol=1e-5)

        def scalar(*arrays):
            return jax.tree.leaves(loss(*arrays))[0]

        grads = self.variant(jax.grad(scalar, tuple(range(len(arrays)))))(*arrays)
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, tuple(map(jnp.asarray, arrays)))
        chex.assert_tree_all_finite(grads)


@each_loss
def test_vmap_and_one_trace_for_equal_shapes(name):
    loss, *arrays = CASES[name]
    stacked = [np.stack([a, 2 - a]) for a in arrays]
    chex.clear_trace_counter()  # chex counts all losses of this test as one function

    @jax.jit
    @jax.vmap
    @chex.assert_max_traces(n=1)
    def mapped(*arrays):
        return loss(*arrays)

    got = mapped(*stacked)
    chex.assert_shape(jax.tree.leaves(got), (2,))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], got), loss(*arrays), rtol=1e-5)
    mapped(*(a + 1 for a in stacked))


@each_loss
def test_a_second_eager_call_traces_nothing(name):
    loss, *arrays = CASES[name]
    loss(*arrays)
    traces = []

    def listen(event, duration, **_):
        if "jaxpr_trace" in event:
            traces.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loss(*(a + 1 for a in arrays))
        assert traces == []
        jax.jit(lambda x: x + 1)(1.0)
        assert traces  # the listener works
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# If all vectors are equal, the value that the docstrings name.
NUM = 2 * B
COLLAPSED = {
    "attract": (lambda v: losses.attract(v), jnp.ones((2, B, D)), np.log(B)),
    "attract, one denominator": (
        lambda v: losses.attract(v, np.zeros(B, int), positives_in_denominator=True),
        jnp.ones((2, B, D)),
        np.log(B),
    ),
    "attract, two classes": (lambda v: losses.attract(v, np.arange(B) % 2), jnp.ones((2, B, D)), np.log(1 + B / 2)),
    "barlow_twins": (lambda z: losses.barlow_twins(z, z), jnp.ones((B, D)), D / 32),
    "byol": (lambda z: losses.byol(z, z, z, z), jnp.ones((B, D)), 0),
    "class_conditional_infonce": (
        lambda v: losses.class_conditional_infonce(v, np.arange(B) % 2),
        jnp.ones((2, B, D)),
        np.log(B / 2),
    ),
    "instance_spread": (
        losses.instance_spread,
        jnp.ones((NUM, D)),
        np.log(NUM - 1) + (NUM - 2) * np.log((NUM - 1) / (NUM - 2)),
    ),
    "moco": (lambda z: losses.moco(z, z, jnp.ones((D, 9)) / D**0.5), jnp.ones((B, D)), np.log(10)),
    "moco, negatives": (
        lambda z: losses.moco(z, z, jnp.ones((D, 9)) / D**0.5, negatives=z[:, None], alpha=1.0),
        jnp.ones((B, D)),
        np.log(11),
    ),
    "nt_xent": (lambda z: losses.nt_xent(z, z), jnp.ones((B, D)), np.log(NUM - 1)),
    "nt_xent, negatives": (
        lambda z: losses.nt_xent(z, z, negatives=jnp.ones((B, 3, D))),
        jnp.ones((B, D)),
        np.log(NUM - 1 + 3),
    ),
    "one_way_infonce": (lambda z: losses.one_way_infonce(z, z), jnp.ones((B, D)), np.log(B)),
    "simsiam": (lambda z: losses.simsiam(z, z, z, z), jnp.ones((B, D)), -1),
    "spread": (lambda v: losses.spread(v)[0], jnp.ones((2, B, D)), np.log(B) / 2),
    "supcon": (losses.supcon, jnp.ones((B, 2, D)), np.log(NUM - 1)),
    "supcon, background": (
        lambda f: losses.supcon(f, background=np.arange(B) < 2),
        jnp.ones((B, 2, D)),
        np.log(NUM - 1),
    ),
    "supcon, negatives": (
        lambda f: losses.supcon(f, negatives=jnp.ones((3, D)), negatives_count=2),
        jnp.ones((B, 2, D)),
        np.log(NUM - 1 + 6),
    ),
}


@pytest.mark.parametrize("case", COLLAPSED)
def test_value_of_a_collapsed_encoder(case):
    loss, z, want = COLLAPSED[case]
    np.testing.assert_allclose(loss(z), want, rtol=1e-5, atol=1e-6)


@each_loss
def test_help_names_every_argument_and_has_a_short_signature(name):
    loss = getattr(losses, name)
    arguments = list(inspect.signature(loss).parameters)
    text = inspect.getdoc(loss)  # Python 3.13 keeps docstrings without their indentation
    missing = [a for a in arguments if f"\n  {a}: " not in text]
    assert missing == []
    assert "ndarray" not in str(inspect.signature(loss))
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text
