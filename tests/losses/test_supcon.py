"""SupCon against the authors' numbers, a written-out loop, and finite differences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from loss_checks import assert_user_error, mesh_of
from supcon_checks import make, slow_supcon, value_and_grad

from jaxcl.losses import supcon, supcon_rows

GOLDEN_FILES = (
    "supcon_all_2view",
    "supcon_all_2view_tempratio",
    "supcon_one_2view",
    "supcon_simclr_2view",
    "supcon_all_3view",
    "supcon_explicit_mask",
    "excon_no_background",
    "excon_background_anchor",
    "exconb_background_negative",
    "exconb_zero_backgrounds",
)


# ---- against the authors' code


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden(golden, name, wide):
    d = golden("excon", name)
    loss = functools.partial(
        supcon,
        labels=d["labels"] if d["has_labels"] else None,
        mask=d["mask"] if d["has_mask"] else None,
        background=None if d["background_anchor"] else np.arange(len(d["features"])) >= d["actual_bsz"],
        temperature=float(d["temperature"]),
        base_temperature=float(d["base_temperature"]),
        anchors={"all": "all", "one": "first"}[str(d["contrast_mode"])],
        normalize=False,
    )
    forms = ("dense", "tiled") if wide else ("tiled",)
    engines = [jax.value_and_grad(functools.partial(loss, implementation=i)) for i in forms]
    with jax.enable_x64(wide):
        features = jnp.asarray(d["features"], jnp.float64 if wide else jnp.float32)
        results = jax.jit(lambda f: [engine(f) for engine in engines])(features)
    rtol, atol = (1e-7, 1e-12) if wide else (1e-4, 1e-5)
    for value, grad in results:
        assert value.dtype == grad.dtype == features.dtype
        for got, want in ((value, d["expected_loss"]), (grad, d["expected_grad"])):
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * max(1, np.abs(want).max()))


# ---- against the definition, element by element


@pytest.mark.parametrize("extras", [0, 1, 2, 3])
@pytest.mark.parametrize("positives", ["labels", "mask", "simclr"])
def test_written_out_loop(positives, extras):
    data = make(seed=extras, v=(2, 3, 1, 2)[extras])
    options = dict(temperature=0.3)
    if positives != "simclr":
        options[positives] = data[positives]
    if extras >= 1:
        options |= dict(background=data["background"], base_temperature=0.07)
    if extras >= 2:
        options |= dict(where=data["where"], normalize=False)
    if extras >= 3:
        options |= dict(negatives=data["negatives"], negatives_where=data["negatives_where"], negatives_count=2.0)
    # Each kind of positives gets all four pairs, and for the same extras no two kinds get the same pair.
    turn = (extras + len(positives)) % 4
    options |= dict(anchors=("all", "first")[turn % 2], anchor_mean=("all", "positive")[turn // 2])
    want = slow_supcon(data["features"], **options)
    for how in ("dense", "tiled"):
        got = supcon(data["features"], implementation=how, **options)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
@pytest.mark.parametrize("positives", ["labels", "mask"])
def test_gradient_by_finite_differences(positives, implementation):
    data = make()
    del data["mask" if positives == "labels" else "labels"]
    features, negatives = data.pop("features"), data.pop("negatives")
    options = data | dict(temperature=0.4, negatives_count=2)
    with jax.enable_x64(True):
        loss = lambda f, n: supcon(f, negatives=n, implementation=implementation, **options)  # noqa: E731
        grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(features, negatives)
    for which, (array, grad) in enumerate(zip((features, negatives), grads, strict=True)):
        for index in itertools.islice(np.ndindex(*array.shape), 0, None, 3):
            step = np.zeros_like(array)
            step[index] = 1e-6
            ends = [
                slow_supcon(
                    features + sign * step * (which == 0) if which == 0 else features,
                    negatives=negatives + sign * step if which == 1 else negatives,
                    **options,
                )
                for sign in (1, -1)
            ]
            np.testing.assert_allclose(grad[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n,tile_entries", [(11, 1), (12, 100), (13, 2**22)])
def test_tiles_that_do_not_divide_the_rows(monkeypatch, wide, n, tile_entries):
    monkeypatch.setattr(supcon_rows, "TILE_ENTRIES", tile_entries)
    data = make(n=n)
    del data["labels"]
    dense, tiled = (value_and_grad(**data, implementation=how) for how in ("dense", "tiled"))
    np.testing.assert_allclose(tiled[0], dense[0], rtol=1e-12)
    np.testing.assert_allclose(tiled[1], dense[1], atol=1e-12)


# ---- properties


def test_permutation_of_rows_and_views(wide):
    data = make()
    features, labels, background = data["features"], data["labels"], data["background"]
    value, grad = value_and_grad(features, labels, background=background)
    order, views = np.random.default_rng(1).permutation(len(features)), [1, 0]
    permuted = value_and_grad(
        features[order][:, views], labels[order], background=background[order], implementation="tiled"
    )
    np.testing.assert_allclose(permuted[0], value, rtol=1e-12)
    np.testing.assert_allclose(permuted[1], grad[order][:, np.array(views)], atol=1e-12)


def test_backgrounds_never_lower_the_loss_and_none_change_nothing(wide):
    data = make(n=6)
    plain = supcon(data["features"], data["labels"])
    assert supcon(data["features"], data["labels"], background=np.zeros(6, bool)) == plain
    features = np.concatenate([data["features"], np.random.default_rng(3).normal(size=(4, 2, 5))])
    labels = np.append(data["labels"], [0, 1, 0, 7])  # the labels of background rows must not matter
    values = [
        supcon(features, labels, background=np.arange(10) >= 6, where=np.arange(10) < 6 + extra) for extra in range(5)
    ]
    np.testing.assert_allclose(values[0], plain, rtol=1e-13)
    assert np.all(np.diff(values) > 0)


def test_background_rows_equal_negatives_counted_twice(wide):
    data = make(n=6, m=3)
    rows = np.repeat(data["negatives"][:, None], 2, axis=1)
    everything = np.concatenate([data["features"], rows])
    labels = np.append(data["labels"], [0, 1, 99])
    value, grad = value_and_grad(everything, labels, background=np.arange(9) >= 6, temperature=0.2)

    def with_negatives(features, negatives):
        return supcon(features, data["labels"], negatives=negatives, negatives_count=2, temperature=0.2)

    compiled = jax.jit(jax.value_and_grad(with_negatives, argnums=(0, 1)))
    got, (grad_f, grad_n) = compiled(data["features"], data["negatives"])
    np.testing.assert_allclose(got, value, rtol=1e-13)
    np.testing.assert_allclose(grad_f, grad[:6], atol=1e-14)
    np.testing.assert_allclose(grad_n, grad[6:].sum(1), atol=1e-14)
    once = supcon(data["features"], data["labels"], negatives=data["negatives"], temperature=0.2)
    assert once < value


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
@pytest.mark.parametrize("filler", [0.0, 1e30, np.nan])
def test_padding_changes_nothing(wide, filler, implementation):
    data = make()
    positives = data["mask"]
    options = dict(background=data["background"], implementation=implementation)
    value, grad = value_and_grad(data["features"], mask=positives, negatives=data["negatives"], **options)
    padded = np.concatenate([data["features"], np.full((3, 2, 5), filler)])
    mask = np.ones((9, 9))
    mask[:6, :6] = positives
    options["background"] = np.append(data["background"], [True, False, False])
    got, got_grad = value_and_grad(
        padded,
        mask=mask,
        where=np.arange(9) < 6,
        negatives=np.concatenate([data["negatives"], np.full((2, 5), filler)]),
        negatives_where=np.arange(5) < 3,
        **options,
    )
    np.testing.assert_allclose(got, value, rtol=1e-13)
    np.testing.assert_allclose(got_grad[:6], grad, atol=1e-14)
    np.testing.assert_array_equal(got_grad[6:], 0)


@pytest.mark.parametrize("n,v", [(128, 2), (5, 3), (4, 1)])
def test_identical_features(n, v):
    options = dict(temperature=0.1, base_temperature=0.07)
    got = supcon(jnp.ones((n, v, 8)), jnp.zeros(n, jnp.int32), **options)
    np.testing.assert_allclose(got, 0.1 / 0.07 * np.log(n * v - 1), rtol=1e-6)


def test_trailing_axes_are_flattened():
    data = make(d=6)
    flat = supcon(data["features"], data["labels"])
    assert supcon(data["features"].reshape(6, 2, 3, 2), data["labels"]) == flat


def test_normalize_divides_by_the_norm(wide):
    data = make()
    unit = data["features"] / np.linalg.norm(data["features"], axis=-1, keepdims=True)
    a = supcon(data["features"] * 37, data["labels"])
    np.testing.assert_allclose(a, supcon(unit, data["labels"], normalize=False), rtol=1e-12)
    assert abs(a - supcon(data["features"], data["labels"], normalize=False)) > 0.1


def test_jit_vmap_and_auto_agree(wide):
    data = make()
    batch = np.stack([make(seed=s)["features"] for s in range(3)])
    loss = functools.partial(supcon, labels=data["labels"], background=data["background"])
    want = [loss(f) for f in batch]
    np.testing.assert_allclose(jax.vmap(loss)(batch), want, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(loss)(batch[0]), want[0], rtol=1e-12)
    tiled = jax.vmap(functools.partial(loss, implementation="tiled"))
    np.testing.assert_allclose(tiled(batch), want, rtol=1e-12)
    traced = jax.jit(lambda t: supcon(batch[0], temperature=t, base_temperature=t / 2))(0.3)
    np.testing.assert_allclose(traced, 2 * supcon(batch[0], temperature=0.3), rtol=1e-12)


# ---- numbers at the edge


@pytest.mark.parametrize("temperature", [5e-4, 0.1, 100.0])
@pytest.mark.parametrize(
    "case",
    ["lone", "single", "empty", "zero", "large", "duplicates", "one_class", "all_background", "no_rows"],
)
def test_odd_cases_are_finite(case, temperature):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 2, 16)).astype(np.float32)
    labels = np.array([0, 0, 1, 1, 2, 3])
    options = dict(background=np.zeros(6, bool), where=np.ones(6, bool), normalize=True)
    if case == "lone":  # no positive at all
        features, labels = features[:, :1], np.arange(6)
    elif case == "single":  # A(i) is empty
        features, labels, options = features[:1, :1], labels[:1], {}
    elif case == "empty":
        options["where"][:] = False
    elif case == "zero":
        features[2], features[4, 1] = 0, 0
    elif case == "large":
        features, options["normalize"] = (
            features * 64 / np.linalg.norm(features, axis=-1, keepdims=True),
            False,
        )
    elif case == "duplicates":
        features[:] = features[:1, :1]
    elif case == "one_class":
        labels = np.zeros(6, int)
    elif case == "all_background":
        options["background"][:] = True
    elif case == "no_rows":
        options["negatives"] = np.zeros((0, 16), np.float32)
    for how in ("dense", "tiled"):
        value, grad = value_and_grad(features, labels, temperature=temperature, implementation=how, **options)
        assert np.isfinite(value) and value >= -1e-5
        assert np.isfinite(grad).all()
        if case in ("lone", "single", "empty", "all_background"):
            assert value == 0 and not np.any(grad)
        if case == "zero":
            assert not np.any(grad[2])
            assert temperature < 0.1 or np.any(grad[3])


def test_small_temperature_is_exact(wide):
    """The stabilising maximum excludes the self term; the authors' code underflows to NaN here."""
    features, labels = make(n=6, d=16)["features"], np.array([0, 0, 1, 1, 2, 2])
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    s = unit.reshape(12, 16) @ unit.reshape(12, 16).T / 5e-4
    want = []
    for i in range(12):
        others = np.delete(np.arange(12), i)
        top = s[i, others].max()
        lse = top + np.log(np.exp(s[i, others] - top).sum())
        want.append(lse - np.mean([s[i, j] for j in others if labels[j // 2] == labels[i // 2]]))
    np.testing.assert_allclose(supcon(features, labels, temperature=5e-4), np.mean(want), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float32_out_at_least(dtype):
    data = make(n=16)
    features = jnp.asarray(data["features"], dtype)
    value, grad = value_and_grad(features, data["labels"])
    assert value.dtype == jnp.float32 and grad.dtype == features.dtype
    # Exactly the loss of the rounded features: nothing inside is computed in half precision.
    np.testing.assert_allclose(value, supcon(features.astype(jnp.float32), data["labels"]), rtol=1e-6)


# ---- memory


def test_tiled_memory_does_not_grow_with_the_square():
    n = 2**13  # 16,384 elements: the logits alone are 1 GiB
    args = (jax.ShapeDtypeStruct((n, 2, 32), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32))
    compiled = jax.jit(jax.value_and_grad(supcon)).lower(*args).compile()  # "auto" must choose tiles
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 2**20


# ---- mistakes


@pytest.mark.parametrize(
    "options",
    [
        dict(labels=np.zeros(6), mask=np.eye(6)),
        dict(features=np.ones((6, 5), np.float32)),
        dict(features=np.ones((6, 2, 5), np.int32)),
        dict(labels=np.zeros(5)),
        dict(labels=np.zeros((6, 2))),
        dict(mask=np.ones((6, 12))),
        dict(background=np.zeros(7, bool)),
        dict(where=np.zeros((6, 1), bool)),
        dict(negatives=np.ones((3, 4), np.float32)),
        dict(negatives=np.ones(5, np.float32)),
        dict(negatives_where=np.ones(3, bool)),
        dict(negatives=np.ones((3, 5), np.float32), negatives_where=np.ones(2, bool)),
        dict(negatives_count=0),
        dict(temperature=0.0),
        dict(temperature=float("nan")),
        dict(base_temperature=-1),
        dict(anchors="one"),
        dict(anchor_mean="sum"),
        dict(implementation="fast"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options):
    options = dict(options)
    key = list(options)[-1]
    features = options.pop("features", np.ones((6, 2, 5), np.float32))
    assert_user_error(lambda: supcon(features, **options), "supcon: ", key)


def test_views_first_is_refused_with_a_hint():
    """[V, N, D] is the layout of L_spread."""
    views = np.ones((2, 6, 5), np.float32)
    assert_user_error(lambda: supcon(views, np.zeros(6, int)), "supcon: ", "labels", "moveaxis")


def test_a_mask_has_no_ring():
    features, mask = np.ones((4, 2, 5), np.float32), np.ones((4, 4))
    local = lambda f, m: supcon(f, mask=m, axis_name="data", implementation="ring")  # noqa: E731
    sharded = jax.shard_map(local, mesh=mesh_of(2), in_specs=P("data"), out_specs=P())
    assert_user_error(lambda: sharded(features, mask), "supcon: ", "mask", "implementation")
