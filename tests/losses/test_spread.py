"""Attract, class-conditional InfoNCE and L_spread against the authors' numbers and written-out loops."""

import functools
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import assert_user_error
from spread_checks import VARIANTS, make, stacked, values_and_grads

from jaxcl.losses.spread import attract, class_conditional_infonce, spread

# test_spread_sharded.py also tests "ring".
engines = pytest.mark.parametrize("implementation", ["dense", "tiled"])


# ---- against the authors' code


@pytest.mark.parametrize(
    "name,wide,implementation",
    [
        ("loss_core", True, "dense"),
        ("loss_released_clamp", True, "dense"),
        ("loss_norms", True, "dense"),
        ("loss_three_views", True, "dense"),
        ("loss_partly_unlabelled", True, "dense"),
        ("loss_batch128", True, "dense"),
        ("loss_norms", False, "dense"),
        # Each setting compiles a program; these two files cover all reductions.
        ("loss_core", True, "tiled"),
        ("loss_partly_unlabelled", True, "tiled"),
    ],
    ids=str,
)
def test_golden(golden, name, wide, implementation):
    d = golden("thanos", name)
    with jax.enable_x64(wide):
        views = jnp.asarray(d["views"], jnp.float64 if wide else jnp.float32)
        for k, text in enumerate(d["settings"]):
            setting = json.loads(str(text))
            values, grads = values_and_grads(
                views,
                d["labels"] if setting["use_labels"] else np.arange(views.shape[1]),
                a_lc=setting["a_lc"],
                a_spread=setting["a_spread"],
                temperature=setting["temp"],
                positives_in_denominator=setting["pos_in_denom"],
                **({"positive_weight": setting["pos_in_denom_weight"]} if setting["pos_in_denom"] else {}),
                clip_positive=1.0
                if setting["clamp"]
                else np.inf,  # always a number, so that all settings share a program
                norm=setting["norm"],
                implementation=implementation,
            )
            assert values.dtype == grads.dtype == views.dtype
            for got, want in zip(values, (d["loss"][k], d["supcon"][k], d["cnce"][k]), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-9 if wide else 2e-4, atol=1e-12 if wide else 1e-6)
            for got, want in zip(grads, (d["grad"][k], d["supcon_grad"][k], d["cnce_grad"][k]), strict=True):
                rtol, atol = (1e-7, 1e-10) if wide else (1e-3, 1e-4)
                np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * np.abs(want).max())


# ---- against the definition, term by term


def slow_terms(
    views,
    labels=None,
    *,
    where=None,
    temperature=0.5,
    positives_in_denominator=False,
    positive_weight=1.0,
    clip_positive=None,
    norm="unit",
):
    views = np.asarray(views, np.float64)
    kept = [i for i in range(views.shape[1]) if where is None or where[i]]
    length = np.linalg.norm(views, axis=-1)

    def logit(a, c, i, j):
        s = views[a, i] @ views[c, j] / temperature
        if norm == "unit":
            return s / (length[a, i] * length[c, j])
        return s / (length[a, j] * length[c, j]) if norm == "released" else s

    def same(i, j):
        return i == j or (labels is not None and labels[i] != -1 and labels[i] == labels[j])

    attracts, repels = [], []
    for a, c in itertools.combinations(range(len(views)), 2):
        a, c = c, a  # the later view is the anchor
        for i in kept:
            s = {j: logit(a, c, i, j) for j in kept}
            positives = [j for j in kept if same(i, j)]
            negatives = sum(np.exp(s[j]) for j in kept if not same(i, j))
            together = sum(np.exp(s[j]) for j in positives)
            terms = []
            for p in positives:
                top = positive_weight * together if positives_in_denominator else np.exp(s[p])
                clipped = s[p] if clip_positive is None else min(s[p], clip_positive)
                terms.append(np.log(top + negatives) - clipped)
            attracts.append(np.mean(terms))
            repels.append(np.log(together) - s[i])
    return (np.mean(attracts), np.mean(repels)) if attracts else (0.0, 0.0)


@engines
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_written_out_loop_and_its_finite_differences(wide, variant, implementation):
    data = make()
    views = data.pop("views")
    values, grads = values_and_grads(views, **data, **variant, implementation=implementation)
    np.testing.assert_allclose(values[1:], slow_terms(views, **data, **variant), rtol=1e-12)
    for index in itertools.islice(np.ndindex(*views.shape), 0, None, 3):
        step = np.zeros_like(views)
        step[index] = 1e-6
        above, below = (np.array(slow_terms(views + sign * step, **data, **variant)) for sign in (1, -1))
        np.testing.assert_allclose(grads[1:, *index], (above - below) / 2e-6, rtol=1e-5, atol=1e-8)


@engines
def test_four_views_in_float32(implementation):
    data = make(v=4)
    _, parts = spread(**data, implementation=implementation)
    np.testing.assert_allclose([parts["attract"], parts["repel"]], slow_terms(**data), rtol=1e-5)


@engines
def test_each_loss_alone_is_its_part_of_spread(wide, implementation):
    data = make()
    views = data.pop("views")
    common = dict(norm="released", temperature=0.3, implementation=implementation, **data)
    options = dict(positives_in_denominator=True, positive_weight=2.0, clip_positive=0.4) | common
    values, grads = values_and_grads(views, a_lc=0.5, a_spread=1.5, **options)
    alone = (
        jax.value_and_grad(lambda x: attract(x, **options)),
        jax.value_and_grad(lambda x: class_conditional_infonce(x, **common)),
    )
    for loss, value, grad in zip(alone, values[1:], grads[1:], strict=True):
        got, got_grad = jax.jit(loss)(views)
        np.testing.assert_allclose(got, value, rtol=1e-13)
        np.testing.assert_allclose(got_grad, grad, atol=1e-14)
    np.testing.assert_allclose(values[0], 0.25 * values[1] + 0.75 * values[2], rtol=1e-13)


# ---- weights


def test_weights():
    data = make()
    _, parts = spread(**data)
    a, r = parts["attract"], parts["repel"]
    weighted = jax.jit(lambda weights: spread(**data, a_lc=weights[0], a_spread=weights[1])[0])
    for a_lc, a_spread, want in [(3, 0, 3 * a), (0, 2, r), (1, 3, (a + 3 * r) / 4)]:
        np.testing.assert_allclose(spread(**data, a_lc=a_lc, a_spread=a_spread)[0], want, rtol=1e-6)
        np.testing.assert_allclose(weighted(jnp.array([a_lc, a_spread], jnp.float32)), want, rtol=1e-6)
    # d/da_lc of (a_lc A + a_spread R) / (a_lc + a_spread) at (1, 1)
    np.testing.assert_allclose(jax.grad(weighted)(jnp.ones(2))[0], (a - r) / 4, rtol=1e-5)
    assert np.isfinite(jax.grad(weighted)(jnp.zeros(2))).all()


# ---- properties


@engines
def test_identities(wide, implementation):
    data = make(b=8)
    views = data["views"]
    run = functools.partial(values_and_grads, implementation=implementation)
    # Every sample is its own class: InfoNCE across views, and R is 0.
    distinct, none = run(views, np.arange(8) - 1), run(views)
    z = views / np.linalg.norm(views, axis=-1, keepdims=True)
    s = z[1] @ z[0].T / 0.5
    infonce = np.mean(np.log(np.exp(s).sum(1)) - np.diag(s))
    np.testing.assert_allclose(none[0], [infonce / 2, infonce, 0], rtol=1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-14), distinct, none)
    assert none[0][2] == 0 and not np.any(none[1][2])
    # One class: A has no negatives and is 0; R is InfoNCE.
    one = run(views, np.zeros(8, int))
    np.testing.assert_allclose(one[0], [infonce / 2, 0, infonce], rtol=1e-12)
    assert not np.any(one[1][1])
    # Unit norm: no gradient along a vector. At a very high temperature the losses depend on counts only.
    grads = run(views, data["labels"])[1]
    np.testing.assert_allclose(np.sum(grads * views, -1), 0, atol=1e-13)
    flat = run(views, data["labels"], temperature=1e9)[0]
    positives = np.array([1 if x == -1 else np.sum(data["labels"] == x) for x in data["labels"]])
    np.testing.assert_allclose(flat[1:], [np.log(9 - positives).mean(), np.log(positives).mean()], atol=1e-7)


@engines
def test_symmetries(wide, implementation):
    data = make()
    views, labels = data["views"], data["labels"]
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    order = rng.permutation(8)
    run = functools.partial(values_and_grads, norm="none", implementation=implementation)
    values, grads = run(views, labels)
    rotated = run(views @ rotation, labels)
    np.testing.assert_allclose(rotated[0], values, rtol=1e-12)
    np.testing.assert_allclose(rotated[1], grads @ rotation, atol=1e-13)
    shuffled = run(views[:, order], labels[order])
    np.testing.assert_allclose(shuffled[0], values, rtol=1e-12)
    np.testing.assert_allclose(shuffled[1], grads[:, :, order], atol=1e-13)
    np.testing.assert_allclose(run(views / np.sqrt(0.5), labels, temperature=1.0)[0], values, rtol=1e-12)
    # Class ids may be any integers except -1.
    np.testing.assert_allclose(run(views, np.where(labels == -1, -1, -7 - 3 * labels))[0], values, rtol=1e-13)
    # Not symmetric in the views: the later view is the anchor.
    assert abs(run(views[::-1], labels)[0][1] - values[1]) > 1e-3


@engines
def test_released_norm_is_the_cosine_where_anchors_share_a_norm(wide, implementation):
    data = make()
    views = data["views"]
    views[1] *= 3 / np.linalg.norm(views[1], axis=-1, keepdims=True)
    unit, released = (
        values_and_grads(views, data["labels"], norm=n, implementation=implementation)[0] for n in ("unit", "released")
    )
    np.testing.assert_allclose(released, unit, rtol=1e-12)


@engines
def test_clip_of_one_class(wide, implementation):
    views = np.abs(make()["views"]) + 1.0  # every logit above 1
    run = functools.partial(values_and_grads, norm="none", implementation=implementation)
    values, grads = run(views, np.zeros(8, int), clip_positive=1.0)
    s = views[1] @ views[0].T / 0.5
    np.testing.assert_allclose(values[1], s.mean() - 1, rtol=1e-13)
    np.testing.assert_allclose(grads[1, 1], np.tile(views[0].mean(0) / 0.5 / 8, (8, 1)), rtol=1e-12)
    unclipped = run(views, np.zeros(8, int))[0]
    np.testing.assert_allclose(run(views, np.zeros(8, int), clip_positive=1e9)[0], unclipped, rtol=1e-13)


@engines
@pytest.mark.parametrize("filler", [0.0, 1e30, np.nan])
def test_padding_changes_nothing(wide, filler, implementation):
    data = make()  # the test with the loop shows that padding is ignored; this one, that it may hold any value
    views, labels, keep = data["views"], data["labels"], data["where"]
    filled = np.where(keep[None, :, None], views, filler)
    for variant in VARIANTS[1:3]:
        run = functools.partial(values_and_grads, implementation=implementation, **variant)
        values, grads = run(views, labels, where=keep)
        got, got_grads = run(filled, labels, where=keep)
        np.testing.assert_array_equal(got, values)
        np.testing.assert_array_equal(got_grads, grads)
        np.testing.assert_array_equal(grads[:, :, ~keep], 0)
        nobody, no_grads = run(filled, labels, where=np.zeros(8, bool))
        assert not np.any(nobody) and not np.any(no_grads)


@engines
def test_divergence_is_not_hidden(wide, implementation):
    for variant in VARIANTS[:3]:
        data = make()
        data["views"][1, 3] = np.nan  # an unlabelled sample, a negative of all others
        values, _ = values_and_grads(**data, **variant, implementation=implementation)
        assert np.isnan(values).all()


@engines
def test_vmap(wide, implementation):
    labels = make()["labels"]
    batch = np.stack([make(seed=s)["views"] for s in range(3)])
    mapped = jax.jit(jax.vmap(functools.partial(stacked, labels=labels, implementation=implementation)))(batch)
    want = [values_and_grads(x, labels, implementation=implementation)[0] for x in batch]
    np.testing.assert_allclose(mapped, want, rtol=1e-12)


# ---- numbers at the edge


@engines
@pytest.mark.parametrize("temperature", [5e-4, 0.5, 100.0])
@pytest.mark.parametrize(
    "case", ["singletons", "one_class", "one_sample", "zero", "large", "duplicates", "one_feature"]
)
def test_odd_cases_are_finite(case, temperature, implementation):
    rng = np.random.default_rng(0)
    views, labels, norm = rng.normal(size=(2, 8, 4)).astype(np.float32), np.array([0, 0, 1, 1, 2, 2, -1, 3]), "unit"
    where = np.ones(8, bool)
    if case == "singletons":
        labels = np.arange(8)
    elif case == "one_class":
        labels = np.zeros(8, int)
    elif case == "one_sample":
        where = np.arange(8) == 3
    elif case == "zero":
        views[0, 2], views[1, 4] = 0, 0
    elif case == "large":
        views, norm = views * 64 / np.linalg.norm(views, axis=-1, keepdims=True), "none"
    elif case == "duplicates":
        views[:] = views[:1, :1]
    elif case == "one_feature":
        views[..., 1:] = 0
    for inside, clip in ((False, None), (True, 1.0)):
        values, grads = values_and_grads(
            views,
            labels,
            where=where,
            temperature=temperature,
            norm=norm,
            positives_in_denominator=inside,
            clip_positive=clip,
            implementation=implementation,
        )
        assert np.isfinite(values).all() and np.isfinite(grads).all()
        assert values[2] >= -1e-6 * max(1, 1 / temperature)
        if case in ("singletons", "one_sample"):
            assert values[2] == 0 and not np.any(grads[2])
        if clip is None:
            assert values[1] >= 0
            if case in ("one_class", "one_sample"):
                assert values[1] == 0 and not np.any(grads[1])
            if case == "duplicates":
                others = [6, 6, 6, 6, 6, 6, 7, 7]
                np.testing.assert_allclose(values[1], np.log1p(others).mean(), rtol=1e-5)
        if case == "zero":
            assert not np.any(grads[:, 0, 2]) and not np.any(grads[:, 1, 4])
            assert temperature < 0.1 or np.any(grads[1, 1, 2])


@engines
def test_small_temperature_is_exact(wide, implementation):
    data = make()
    labels = data["labels"]
    unit = data["views"] / np.linalg.norm(data["views"], axis=-1, keepdims=True)
    s = unit[1] @ unit[0].T / 5e-4
    attracts, repels = [], []
    for i in range(8):
        same = (np.arange(8) == i) | ((labels == labels[i]) & (labels[i] != -1))
        log_other = np.logaddexp.reduce(s[i, ~same])
        attracts.append(np.mean(np.logaddexp(s[i, same], log_other) - s[i, same]))
        repels.append(np.logaddexp.reduce(s[i, same]) - s[i, i])
    values, _ = values_and_grads(data["views"], labels, temperature=5e-4, implementation=implementation)
    np.testing.assert_allclose(values[1:], [np.mean(attracts), np.mean(repels)], rtol=1e-10)


@engines
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_float32_out_at_least(dtype, implementation):
    data = make()
    views = jnp.asarray(data["views"], dtype)
    values, grads = values_and_grads(views, data["labels"], implementation=implementation)
    assert values.dtype == jnp.float32 and grads.dtype == views.dtype
    # Exactly the loss of the rounded views: nothing inside is computed in half precision.
    want, _ = values_and_grads(views.astype(jnp.float32), data["labels"], implementation=implementation)
    np.testing.assert_allclose(values, want, rtol=1e-6)


# ---- mistakes


@pytest.mark.parametrize(
    "options",
    [
        dict(views=np.ones((6, 5), np.float32)),
        dict(views=np.ones((1, 6, 5), np.float32)),
        dict(views=np.ones((2, 0, 5), np.float32)),
        dict(views=np.ones((2, 6, 5), np.int32)),
        dict(labels=np.zeros(5, int)),
        dict(labels=np.zeros((6, 1), int)),
        dict(labels=np.zeros(6)),
        dict(where=np.ones((2, 6), bool)),
        dict(temperature=0.0),
        dict(temperature=float("nan")),
        dict(norm="l2"),
        dict(implementation="fast"),
        dict(implementation="ring"),
        dict(positive_weight=2.0),
        dict(positive_weight=0.0, positives_in_denominator=True),
        dict(clip_positive=float("nan")),
        dict(a_lc=-1),
        dict(a_spread=-0.5),
        dict(a_lc=0.0, a_spread=0),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options):
    options = dict(options)
    key = next(iter(options))
    views = options.pop("views", np.ones((2, 6, 5), np.float32))
    losses = [spread]
    if not options.keys() & {"a_lc", "a_spread"}:
        losses.append(attract)
        if not options.keys() & {"positive_weight", "clip_positive"}:
            losses.append(class_conditional_infonce)
    for loss in losses:
        assert_user_error(lambda: loss(views, **options), f"{loss.__name__}: ", key)  # noqa: B023


@pytest.mark.parametrize("loss", [attract, class_conditional_infonce, spread])
def test_samples_first_is_refused_with_a_hint(loss):
    """[N, V, D], the layout of SupCon, would otherwise give a different number, and take time quadratic in N."""
    features = np.ones((64, 2, 5), np.float32)
    assert_user_error(lambda: loss(features), loss.__name__, "views", "moveaxis")
    few = features[:6]  # six views are possible, but not with six labels for two samples
    assert_user_error(lambda: loss(few, np.zeros(6, int)), loss.__name__, "labels", "moveaxis")
    assert_user_error(lambda: loss(few, where=np.ones(6, bool)), loss.__name__, "where", "moveaxis")
    chex.assert_trees_all_equal(loss(np.moveaxis(features, 1, 0)), loss(jnp.moveaxis(jnp.asarray(features), 1, 0)))
