"""The terms: which rows are positives, negatives or nothing, and that each is its loss, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.registry import TERMS
from jaxcl.method.terms import Embedding, Term
from jaxcl.method.terms.heads import CrossEntropy, Reconstruction
from jaxcl.method.terms.momentum import MoCo
from jaxcl.method.terms.pairs import BarlowTwins, InstanceSpread, NTXent, OneWayInfoNCE
from jaxcl.method.terms.spread import Attract, ClassConditionalInfoNCE, Spread
from jaxcl.method.terms.supcon import SupCon
from jaxcl.runtime.options import defaults

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


# ---- terms of two views, and of classes across views

PAIRS = {
    "nt_xent": NTXent(temperature=0.3),
    "one_way_infonce": OneWayInfoNCE(temperature=0.3),
    "one_way_infonce of views swapped": OneWayInfoNCE(views=("view2", "view1"), temperature=0.3),
    "one_way_infonce of raw rows": OneWayInfoNCE(temperature=0.3, normalize=False),
    "instance_spread": InstanceSpread(temperature=0.3, negative_multiplier=2.0),
    "instance_spread of raw rows": InstanceSpread(temperature=2.0, normalize=False),
    "barlow_twins": BarlowTwins(off_diagonal_weight=0.2, scale=0.5),
}
CLASSES = {
    "attract": Attract(temperature=0.3, clip_positive=1.0),
    "attract over all positives": Attract(
        temperature=0.3, positives_in_denominator=True, positive_weight=0.5, norm="released"
    ),
    "attract without labels": Attract(labels=False),
    "class_conditional_infonce": ClassConditionalInfoNCE(temperature=0.3, norm="none"),
    "spread": Spread(temperature=0.3, a_lc=1.0, a_spread=3.0),
    "spread without its second part": Spread(a_lc=0.5, a_spread=0.0),
}


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def by_hand(name, z1, z2, label, where=None):
    """The loss a term stands for, called as its docstring says."""
    both, options = jnp.stack([z1, z2]), dict(where=where)
    match name:
        case "nt_xent":
            return losses.nt_xent(z1, z2, temperature=0.3)
        case "one_way_infonce":
            return losses.one_way_infonce(unit(z1), unit(z2), temperature=0.3)
        case "one_way_infonce of views swapped":
            return losses.one_way_infonce(unit(z2), unit(z1), temperature=0.3)
        case "one_way_infonce of raw rows":
            return losses.one_way_infonce(z1, z2, temperature=0.3)
        case "instance_spread":
            rows = unit(jnp.concatenate([z1, z2]))
            return losses.instance_spread(rows, temperature=0.3, negative_multiplier=2.0)
        case "instance_spread of raw rows":
            return losses.instance_spread(jnp.concatenate([z1, z2]), temperature=2.0)
        case "barlow_twins":
            return losses.barlow_twins(z1, z2, off_diagonal_weight=0.2, scale=0.5)
        case "attract":
            return losses.attract(both, label, temperature=0.3, clip_positive=1.0, **options)
        case "attract over all positives":
            options |= dict(positives_in_denominator=True, positive_weight=0.5, norm="released")
            return losses.attract(both, label, temperature=0.3, **options)
        case "attract without labels":
            return losses.attract(both, temperature=0.5, **options)
        case "class_conditional_infonce":
            return losses.class_conditional_infonce(both, label, temperature=0.3, norm="none", **options)
        case "spread":
            return losses.spread(both, label, temperature=0.3, a_lc=1.0, a_spread=3.0, **options)[0]
        case "spread without its second part":
            return 0.5 * losses.attract(both, label, temperature=0.5, **options)


def pair(z1, z2, where=None):
    return {n: Embedding(z, z, where) for n, z in (("view1", z1), ("view2", z2))}


@pytest.mark.parametrize("name", [*PAIRS, *CLASSES])
def test_it_is_the_loss_on_one_and_on_eight_devices(name):
    """Value and gradients, each row's once; some images unlabelled, in the class losses some that do not exist."""
    term, z = (PAIRS | CLASSES)[name], [tiny.normal(16, D, seed=i) for i in range(2)]
    label = np.concatenate([SOME_LABELS, LABEL, [-1, 0]]).astype(np.int32)
    padded = np.arange(16) % 5 != 3

    def of(axis_name):
        def loss(z1, z2, label, where):
            return term(pair(z1, z2, where if name in CLASSES else None), label, axis_name=axis_name)

        return loss

    def hand(z1, z2, label, where):
        return by_hand(name, z1, z2, label, where)

    mesh = sharding.make_mesh(8)
    over = jax.shard_map(of(sharding.AXIS), mesh=mesh, in_specs=P(sharding.AXIS), out_specs=P())
    one, eight, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*z, label, padded) for f in (of(None), over, hand)
    )
    for got in (one, eight):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(want[1][0]).max() > 1e-3
    if name in CLASSES:
        assert not np.asarray(one[1][0])[~padded].any()


def test_unlabelled_images_attract_their_own_views_only():
    label = np.array([0, -1, 0, -1, 1, -1], np.int32)
    for term in (Attract(), ClassConditionalInfoNCE(), Spread()):
        got = term(embeddings(background=None), jnp.asarray(label))
        alone = term(embeddings(background=None), jnp.array([0, 10, 0, 11, 1, 12], jnp.int32))
        together = term(embeddings(background=None), jnp.array([0, 2, 0, 2, 1, 2], jnp.int32))
        np.testing.assert_allclose(got, alone, rtol=1e-6)
        assert abs(got - together) > 1e-3


def test_half_precision_embeddings():
    """Unit rows are formed in float32."""
    z = [jnp.asarray(tiny.normal(16, D, seed=i), jnp.bfloat16) for i in range(2)]
    for name in ("one_way_infonce", "instance_spread"):
        got = PAIRS[name](pair(*z), jnp.zeros(16, jnp.int32))
        want = by_hand(name, *(x.astype(jnp.float32) for x in z), None)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_head_terms_leave_out_rows_that_do_not_exist():
    """One view whole, of the other one some rows: the mean over the rows that exist, by hand; cases F."""
    where = np.array([True, False, True, True, False, True])
    label = np.array([0, 1, 0, -1, 1, 1], np.int32)
    z1, z2 = Z1, np.where(where[:, None], Z2, 1e2).astype(np.float32)
    e = {
        "view1": Embedding(None, None, None, Z2, {"head": z1}),
        "view2": Embedding(None, None, where, Z1, {"head": z2}),
    }
    rows, labels = np.concatenate([Z1, Z2]), np.concatenate([label, label])
    exists = np.concatenate([np.ones(N, bool), where])
    known = exists & (labels >= 0)
    log_share = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    want = -log_share[known, labels[known]].mean()
    np.testing.assert_allclose(CrossEntropy(head="head")(e, jnp.asarray(label)), want, rtol=1e-5)
    want = ((rows - np.concatenate([Z2, Z1]))[exists] ** 2).mean()
    np.testing.assert_allclose(Reconstruction(head="head")(e, jnp.asarray(label)), want, rtol=1e-5)


def test_queries_that_do_not_exist_do_not_count():
    """MoCo over the queries that exist, by hand; cases F."""
    where = np.array([True, False, True, True, False, True])
    queue, query = tiny.normal(D, 7, seed=5), np.where(where[:, None], Z1, 1e2).astype(np.float32)
    e = {"q": Embedding(None, query, where), "k": Embedding(None, Z2)}
    got = MoCo(query="q", key="k", temperature=0.3)(e, jnp.asarray(LABEL), memory={"queue": queue})
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (Z1[where], Z2[where]))
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue], axis=1) / 0.3
    np.testing.assert_allclose(got, (np.log(np.exp(logits).sum(1)) - logits[:, 0]).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_pair_terms_refuse_rows_that_do_not_exist(name):
    with pytest.raises(UserError, match="padded rows") as error:
        PAIRS[name](pair(Z1, Z2, jnp.ones(N, bool)), jnp.asarray(LABEL))
    assert "\n" not in str(error.value) and "view" in str(error.value)


@pytest.mark.parametrize("kind", TERMS)
def test_every_kind_keeps_the_contract(kind):
    cls = TERMS.resolve(kind)
    names = dict(query="a", key="b") if kind == "moco" else dict(views=("a", "b"))
    term = cls(**names, weight=0.25)
    assert isinstance(term, Term)
    also = ("target/a", "target/b") if kind == "byol" else ()
    assert (term.reads, term.optional, term.weight) == (("a", "b", *also), (), 0.25)
    of_labels = ("supcon", "spread", "attract", "class_conditional_infonce", "cross_entropy")
    assert term.needs_labels == (kind in of_labels)
    assert {*names, "weight"} <= set(defaults(cls))
    assert cls() == cls(**defaults(cls)) and hash(term)
    if "labels" in defaults(cls):
        assert not cls(labels=False).needs_labels


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: NTXent(views=("a",)), "views is ('a',); expected the names of two views"),
        (lambda: BarlowTwins(views=("a", "b", "c")), "views is ('a', 'b', 'c')"),
        (lambda: OneWayInfoNCE(temperature=0.0), "temperature is 0.0"),
        (lambda: InstanceSpread(negative_multiplier=0.5), "negative_multiplier is 0.5"),
        (lambda: Spread(views=("a",)), "views is ('a',); expected the names of two or more views"),
        (lambda: Spread(a_lc=0.0, a_spread=0.0), "a_spread is 0"),
        (lambda: Spread(a_lc=-1.0), "a_lc is -1.0"),
        (lambda: Attract(temperature=-1.0), "temperature is -1.0"),
        (lambda: Attract(norm="unti"), "norm is 'unti'; expected one of unit, none, released"),
        (lambda: Attract(positive_weight=2.0), "positive_weight is 2.0"),
    ],
)
def test_what_terms_refuse(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)
