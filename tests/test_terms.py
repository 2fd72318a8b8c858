"""The SupCon term: which rows are positives, negatives or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxcl import losses, sharding
from jaxcl.errors import UserError
from jaxcl.terms import Embedding, SupCon

N, K, D = 6, 4, 5
LABEL = np.array([0, 1, 0, 2, 1, 1], np.int32)
EXISTS = np.array([True, False, True, False])
Z1, Z2, BG = (tiny.normal(n, D, seed=i) for i, n in enumerate((N, N, K)))


def embeddings(z1=Z1, z2=Z2, background=BG, where=None, background_where=EXISTS):
    h = jnp.zeros((1, 1))
    e = {"view1": Embedding(h, jnp.asarray(z1), where), "view2": Embedding(h, jnp.asarray(z2), where)}
    if background is not None:
        e["background"] = Embedding(h, jnp.asarray(background), jnp.asarray(background_where))
    return e


def value_and_grads(term, label=LABEL, **kwargs):
    def loss(z1, z2, background):
        return term(embeddings(z1, z2, background, **kwargs), jnp.asarray(label))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(Z1, Z2, BG)


def both_views(rows):
    """The rows that exist, appended to both views: how the authors feed their loss."""
    return jnp.stack([jnp.concatenate([Z1, rows]), jnp.concatenate([Z2, rows])], axis=1)


@pytest.mark.parametrize("anchors", ["all", "first"])
def test_backgrounds_are_negatives_in_both_views(anchors):
    term = SupCon(background="background", temperature=0.2, base_temperature=0.07, anchors=anchors)
    got, (g1, g2, gb) = value_and_grads(term)

    def reference(z1, z2, rows):
        features = jnp.stack([jnp.concatenate([z1, rows]), jnp.concatenate([z2, rows])], axis=1)
        return losses.supcon(
            features,
            np.concatenate([LABEL, [3, 3]]),
            background=np.arange(N + 2) >= N,
            temperature=0.2,
            base_temperature=0.07,
            anchors=anchors,
        )

    want, (w1, w2, wb) = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2)))(Z1, Z2, BG[EXISTS])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in ((g1, w1), (g2, w2), (gb[EXISTS], wb)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not np.asarray(gb[~EXISTS]).any() and np.abs(gb[EXISTS]).max() > 1e-3
    plain, _ = value_and_grads(SupCon(temperature=0.2, base_temperature=0.07, anchors=anchors))
    assert got > plain  # a background never lowers the loss


def test_background_anchors_are_one_more_class():
    scale = dict(temperature=0.2, base_temperature=0.07)
    got, (_, _, gb) = value_and_grads(SupCon(background="background", background_anchor=True, **scale))
    want = losses.supcon(both_views(BG[EXISTS]), np.concatenate([LABEL, [3, 3]]), **scale)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert not np.asarray(gb[~EXISTS]).any() and np.abs(gb[EXISTS]).max() > 1e-3
    negatives_only, _ = value_and_grads(SupCon(background="background", **scale))
    assert abs(got - negatives_only) > 1e-2


@pytest.mark.parametrize("anchor", [True, False])
def test_no_background_is_plain_supcon(anchor):
    plain = losses.supcon(jnp.stack([Z1, Z2], 1), LABEL)
    term = SupCon(background="background", background_anchor=anchor)
    none_there, _ = value_and_grads(term, background_where=np.zeros(K, bool))
    np.testing.assert_allclose(none_there, plain, rtol=1e-6)
    not_made_yet = term(embeddings(background=None), jnp.asarray(LABEL))
    np.testing.assert_array_equal(not_made_yet, plain)


def test_unlabelled_images_are_their_own_class():
    label = np.array([0, -1, 0, -1, 1, -1], np.int32)
    got, _ = value_and_grads(SupCon(), label)
    want = losses.supcon(jnp.stack([Z1, Z2], 1), np.array([0, 10, 0, 11, 1, 12]))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    together = losses.supcon(jnp.stack([Z1, Z2], 1), label)
    assert abs(got - together) > 1e-2
    # Among backgrounds as a class, too.
    term = SupCon(background="background", background_anchor=True)
    got, _ = value_and_grads(term, label)
    want = losses.supcon(both_views(BG[EXISTS]), np.array([0, 10, 0, 11, 1, 12, 20, 20]))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_without_labels_it_is_simclr():
    got, _ = value_and_grads(SupCon(labels=False))
    np.testing.assert_allclose(got, losses.supcon(jnp.stack([Z1, Z2], 1)), rtol=1e-6)
    assert SupCon().needs_labels and not SupCon(labels=False).needs_labels


@pytest.mark.parametrize("anchor", [True, False])
def test_padded_rows_do_not_count(anchor):
    where = np.array([True, False, True, True, True, False])
    term = SupCon(background="background", background_anchor=anchor)
    got, (g1, _, _) = value_and_grads(term, where=jnp.asarray(where))
    e = embeddings(Z1[where], Z2[where], BG[EXISTS], background_where=np.ones(2, bool))
    np.testing.assert_allclose(got, term(e, jnp.asarray(LABEL[where])), rtol=1e-5)
    assert not np.asarray(g1[~where]).any()


def test_views_padded_apart_count_where_all_exist():
    one, two = np.array([True] * 5 + [False]), np.array([False] + [True] * 5)
    e = embeddings()
    e["view1"], e["view2"] = e["view1"]._replace(where=jnp.asarray(one)), e["view2"]._replace(where=jnp.asarray(two))
    got = SupCon()(e, jnp.asarray(LABEL))
    want = losses.supcon(jnp.stack([Z1, Z2], 1), LABEL, where=one & two)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_three_views_count_a_background_three_times():
    e = embeddings()
    e["view3"] = Embedding(e["view1"].h, jnp.asarray(tiny.normal(N, D, seed=9)))
    got = SupCon(views=("view1", "view2", "view3"), background="background")(e, jnp.asarray(LABEL))
    features = jnp.concatenate(
        [jnp.stack([e[f"view{i}"].z for i in (1, 2, 3)], 1), jnp.repeat(jnp.asarray(BG[EXISTS])[:, None], 3, 1)]
    )
    want = losses.supcon(features, np.concatenate([LABEL, [3, 3]]), background=np.arange(N + 2) >= N)
    np.testing.assert_allclose(got, want, rtol=1e-5)


# ---- several devices

# On each of four devices the second row is unlabelled: numbered there alone, all four would be one class.
SOME_LABELS = np.array([0, -1, 0, -1, 1, -1, 1, -1], np.int32)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(labels=False),
        dict(background="background"),
        dict(background="background", background_anchor=True),
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_on_four_devices_it_is_the_loss_of_the_global_batch(options):
    mesh = sharding.make_mesh(4)
    term, z = SupCon(temperature=0.2, **options), [tiny.normal(8, D, seed=i) for i in range(3)]
    where = np.array([True] * 6 + [False, True])
    exists = np.array([True, False] * 4)

    def of(axis_name):
        def loss(z1, z2, background, where, exists, label):
            e = embeddings(z1, z2, background, where=where, background_where=exists)
            return term({n: v._replace(h=v.z) for n, v in e.items()}, label, axis_name=axis_name)

        return loss

    over = jax.shard_map(of(sharding.AXIS), mesh=mesh, in_specs=P(sharding.AXIS), out_specs=P())
    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*z, where, exists, SOME_LABELS) for f in (over, of(None))
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(want[1][0]).max() > 1e-3


def test_what_it_reads():
    term = SupCon(views=("a", "b"), background="c")
    assert (term.reads, term.optional, SupCon().optional) == (("a", "b"), ("c",), ())
    with pytest.raises(UserError, match="views is empty"):
        SupCon(views=())
