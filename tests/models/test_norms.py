"""Sets of batch norms: each with the shared convolutions a network of its own, and the authors' two in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from model_options import refused

from jaxcl.errors import UserError
from jaxcl.losses import nt_xent
from jaxcl.method import grad_cache, sharding
from jaxcl.models import ResNetOptions, make_model
from jaxcl.models.norms import replace, statistics_of

BASIC = ResNetOptions(stage_sizes=(2, 1), stage_widths=(8, 16), stem="cifar", head_features=12)
DUAL = dataclasses.replace(BASIC, norm_sets=("adv",))
NORMS = ("stem_bn", "bn1", "bn2", "bn3", "shortcut_bn")


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def shapes(options, side=8):
    model = make_model(options)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), (side, side, 3)))


def paths(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def one_set(tree, chosen, norm_sets=("adv",)):
    """The variables of a network without sets: the shared ones, and the norms of one set under the clean names."""
    out = {}
    for k, v in tree.items():
        clean = [n for n in NORMS if k == n or k in [f"{n}_{s}" for s in norm_sets]]
        if not clean:
            out[k] = one_set(v, chosen, norm_sets) if isinstance(v, dict) else v
        elif k == (f"{clean[0]}_{chosen}" if chosen else clean[0]):
            out[clean[0]] = v
    return out


def scrambled(tree, chosen):
    """Other values in all norms of one set."""

    def value(path, x):
        names = [str(p.key) for p in path]
        mine = any(n == (f"{b}_{chosen}" if chosen else b) for n in names for b in NORMS)
        return x + np.float32(3) if mine else x

    return jax.tree_util.tree_map_with_path(value, tree)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def at_momentum(momentum, before, after):
    """Statistics after a batch, had they kept so much; in a network without sets they kept 0.9."""
    return jax.tree.map(lambda old, new: old + (new - old) * (1 - momentum) / 0.1, before, after)


# ---- variables


@pytest.mark.parametrize(
    "stem, sets, encoder",
    [("cifar", (), 11_168_832), ("cifar", ("adv",), 11_178_432), ("imagenet", ("adv",), 11_186_112)],
)
def test_published_parameter_counts(stem, sets, encoder):
    params, stats = shapes(ResNetOptions(stem=stem, norm_sets=sets, head_features=64), side=32)
    assert (count(params["encoder"]), count(params["head"])) == (encoder, 295_488)
    assert count(stats) == (1 + len(sets)) * 9_600
    linear, _ = shapes(ResNetOptions(stem=stem, norm_sets=sets, head_hidden_layers=0), side=32)
    assert count(linear) == encoder + 65_664


@pytest.mark.parametrize("depth, block", [(18, {"bn1", "bn2"}), (50, {"bn1", "bn2", "bn3"})])
def test_every_norm_stands_beside_the_clean_one(depth, block):
    """Stem and shortcuts too; what is without sets is there unchanged."""
    plain, dual = (shapes(dataclasses.replace(o, depth=depth)) for o in (BASIC, DUAL))
    for old, new in zip(plain, dual, strict=True):
        old, new = paths(old), paths(new)
        assert old.items() <= new.items()
        further = {p.replace("_adv", ""): x for p, x in new.items() if p not in old}
        assert further == {p: x for p, x in old.items() if "bn" in p}
    names = {k for v in dual[1].values() for k in v if k not in ("mean", "var")}
    assert {n + s for n in block | {"shortcut_bn"} for s in ("", "_adv")} == names
    assert {"stem_bn", "stem_bn_adv"} <= dual[1].keys()


def test_initial_values():
    """A further set is fresh; what is shared is drawn as without it."""
    init = lambda o: jax.jit(lambda key: make_model(o).init(key, (8, 8, 3)))(jax.random.key(3))  # noqa: E731
    (params, stats), plain = init(DUAL), init(BASIC)
    for tree, old in zip((params, stats), plain, strict=True):
        tree, old = paths(tree), paths(old)
        for path, x in tree.items():
            if path in old:
                np.testing.assert_array_equal(x, old[path])
            else:
                np.testing.assert_array_equal(x, np.full(x.shape, float("scale" in path or "var" in path)))


# ---- passes


@functools.cache
def networks(depth):
    """One with two sets, one without any, and variables of the first."""
    dual, plain = (make_model(dataclasses.replace(o, depth=depth)) for o in (DUAL, BASIC))
    where = np.array([True, True, False, True, True, False])
    return dual, plain, *tiny.model_variables(dual, side=8), tiny.normal(6, 8, 8, 3) + 0.2, where


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def nets(request):
    return networks(50 if request.param == "bottleneck" else 18)


@pytest.mark.parametrize("norm_set, momentum", [("", 0.9), ("adv", 0.99)])
def test_a_set_is_a_network_of_its_own(nets, norm_set, momentum):
    """Values, gradients and statistics in every mode, against one without sets that holds this set's norms."""
    dual, plain, params, stats, images, where = nets

    def run(model, params, stats, **named):
        def objective(params):
            h, new = model.encode(params, stats, images, train=True, where=where, **named)
            return jnp.sum(jnp.sin(h)), (h, new)

        grads, (h, new) = jax.grad(objective, has_aux=True)(params)
        a, tail, _ = model.split_at(params, stats, images, "stage1", train=True, **named)
        frozen, same = model.encode(params, stats, images, train=False, **named)
        halves = model.split_at(params, stats, images, "stage1", train=False, **named)[1](a)[0]
        own = model.batch_statistics(params, stats, images, where=where, **named)
        moved = model.move_statistics(stats, own, **({} if model is plain else named))
        return dict(h=(h, a, frozen, halves), cut=tail(a), new=new, same=same, grads=grads, own=own, moved=moved)

    alone_params, alone_stats = one_set(params, norm_set), one_set(stats, norm_set)

    @jax.jit
    def both(params, stats, alone_params, alone_stats):
        return run(dual, params, stats, norm_set=norm_set), run(plain, alone_params, alone_stats)

    got, want = jax.device_get(both(params, stats, alone_params, alone_stats))
    assert_close(got["h"], want["h"])
    assert_close(got["cut"][0], want["cut"][0])
    assert_close(one_set(got["grads"], norm_set), want["grads"], 1e-4)
    assert_close(one_set(got["own"], norm_set), want["own"])
    assert_equal(got["same"], stats)

    for after, wanted in ((got["new"], want["new"]), (got["moved"], want["new"]), (got["cut"][1], want["cut"][1])):
        assert jax.tree.structure(after) == jax.tree.structure(stats)
        assert_close(one_set(after, norm_set), at_momentum(momentum, alone_stats, wanted))
        other = "" if norm_set else "adv"
        assert_equal(one_set(after, other), one_set(stats, other))
        changed = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), one_set(after, norm_set), alone_stats)
        assert min(jax.tree.leaves(changed)) > 1e-6


@pytest.mark.parametrize("norm_set, other", [("", "adv"), ("adv", "")])
def test_a_set_knows_nothing_of_another(nets, norm_set, other):
    dual, _, params, stats, images, _ = nets

    @jax.jit
    def run(params, stats):
        def objective(params):
            h, new = dual.encode(params, stats, images, train=True, norm_set=norm_set)
            return jnp.sum(jnp.sin(h)), (h, new)

        grads, (h, new) = jax.grad(objective, has_aux=True)(params)
        frozen, _ = dual.encode(params, stats, images, train=False, norm_set=norm_set)
        return h, frozen, one_set(grads, norm_set), one_set(new, norm_set), one_set(grads, other)

    reference = run(params, stats)
    assert_equal(reference, run(scrambled(params, other), scrambled(stats, other)))
    for changed, same in (((scrambled(params, norm_set), stats), ()), ((params, scrambled(stats, norm_set)), (0,))):
        for i, (h, new) in enumerate(zip(reference[:2], run(*changed)[:2], strict=True)):
            assert (float(np.abs(h - new).max()) > 1e-2) == (i not in same)
    for path, g in paths(reference[4]["encoder"]).items():
        assert ("bn" in path) == (not np.any(g)), path


@pytest.mark.parametrize("norm_set, momentum, devices", [("", 0.9, 1), ("adv", 0.99, 2)])
def test_micro_batches_of_a_set(norm_set, momentum, devices):
    """GradCache with statistics of a first pass, again against a network of its own; the other set stays as it is."""
    dual, plain, params, stats, images, where = networks(18)
    mesh = sharding.make_mesh(devices) if devices > 1 else None

    def run(model, params, stats, **named):
        def objective(params):
            parts = dict(where=where, chunks=3, groups=6) | named
            h, new = grad_cache.encode(model, params, stats, jnp.asarray(images), **parts)
            return jnp.sum(jnp.sin(h)), (h, new)

        grads, (h, new) = jax.grad(objective, has_aux=True)(params)
        return h, new, grads

    @jax.jit
    def both(params, stats, alone_params, alone_stats):
        return run(dual, params, stats, norm_set=norm_set, mesh=mesh), run(plain, alone_params, alone_stats)

    other = "" if norm_set else "adv"
    alone = one_set(params, norm_set), one_set(stats, norm_set)
    (h, new, grads), (h_alone, new_alone, grads_alone) = jax.device_get(both(params, stats, *alone))
    assert_close(h, h_alone)
    assert_close(one_set(grads, norm_set), grads_alone, 1e-4)
    assert_close(one_set(new, norm_set), at_momentum(momentum, alone[1], new_alone))
    assert_equal(one_set(new, other), one_set(stats, other))
    for path, g in paths(grads["encoder"]).items():
        assert np.any(g) == ("bn" not in path or ("_adv" in path) == bool(norm_set)), path


def test_more_sets_and_a_momentum():
    images, m = networks(18)[4], 0.5
    model = make_model(dataclasses.replace(BASIC, norm_sets=("adv", "crop"), norm_set_momentum=m))
    params, stats = tiny.model_variables(model, side=8)
    new, own = jax.jit(
        lambda: (
            model.encode(params, stats, images, train=True, norm_set="crop")[1],
            model.batch_statistics(params, stats, images, norm_set="crop"),
        )
    )()
    sets = ("adv", "crop")
    for other in ("", "adv"):
        assert_equal(one_set(new, other, sets), one_set(stats, other, sets))
    wanted = jax.tree.map(lambda a, b: m * a + (1 - m) * b, one_set(stats, "crop", sets), one_set(own, "crop", sets))
    assert_close(one_set(new, "crop", sets), wanted)


def test_a_set_may_be_called_like_a_norm():
    _, stats = shapes(dataclasses.replace(BASIC, norm_sets=("bn", "bn1")))
    for name in ("", "bn", "bn1"):
        part = statistics_of(stats, name, ("bn", "bn1"))
        assert count(part) == count(stats) / 3
        assert part.keys() - {"stages_0_0", "stages_0_1", "stages_1_0"} == {f"stem_bn_{name}" if name else "stem_bn"}


def test_replace():
    tree = {"a": {"x": 1, "y": 2}, "b": 3, "c": {}}
    assert replace(tree, {"a": {"y": 5}}, lambda old, new: 10 * old + new) == {"a": {"x": 1, "y": 25}, "b": 3, "c": {}}


# ---- the authors' step

LAYERS = {"conv1": "stem_conv", "bn1": "stem_bn", "bn1_adv": "stem_bn_adv", "block1": "stages_0_0"}
LAYERS |= {"block2": "stages_1_0", "dense1": "hidden0", "dense2": "out"}


def golden_tree(d, prefix):
    """-> (encoder, head) from the arrays under a prefix."""
    encoder, head = {}, {}
    for key in d:
        if key.startswith(prefix + "/"):
            layer, *rest = key.removeprefix(prefix + "/").split("/")
            dense = layer.startswith("dense")
            node = head if dense else encoder
            path = [LAYERS[layer], *(["dense"] if dense else []), *rest]
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = d[key]
    return encoder, head


def test_golden_dual_norms(golden):
    """Losses of a clean and an adversarial pass, gradients of both sets, both running statistics, and evaluation."""
    d = golden("clae", "clae_step_simclr")
    options = ResNetOptions(stage_sizes=(1, 1), stage_widths=(4, 8), head_features=6, norm_sets=("adv",))
    model = make_model(options)
    with jax.enable_x64(True):
        encoder, head = model.encoder.clone(dtype=jnp.float64), model.head.clone(dtype=jnp.float64)
        model = dataclasses.replace(model, encoder=encoder, head=head)
        params = dict(zip(("encoder", "head"), golden_tree(d, "param_before"), strict=True))
        after = dict(zip(("encoder", "head"), golden_tree(d, "param_after_1"), strict=True))
        view1, view2, adversarial = (jnp.asarray(d[k][0]) for k in ("view_1", "view_2", "x_adv"))
        temperature, alpha = float(d["temperature"]), float(d["alpha"])

        @jax.jit
        def step(params, stats):
            def encode(stats, images, norm_set=""):
                h, stats = model.encode(params, stats, images, train=True, norm_set=norm_set)
                return model.project(params, {}, h), stats

            # The released attack moves the statistics of its set twice.
            for _ in range(2):
                _, stats = encode(stats, view1, "adv")

            def objective(p):
                z = []
                s = stats
                for images, norm_set in ((view1, ""), (view2, ""), (adversarial, "adv")):
                    h, s = model.encode(p, s, images, train=True, norm_set=norm_set)
                    z.append(model.project(p, {}, h))
                clean = nt_xent(z[0], z[1], temperature=temperature)
                attacked = nt_xent(z[0], z[2], temperature=temperature)
                return clean + alpha * attacked, (clean, attacked, s)

            grads, (clean, attacked, stats) = jax.grad(objective, has_aux=True)(params)
            return grads, clean, attacked, stats

        grads, clean, attacked, stats = step(params, golden_tree(d, "stats_before")[0])
        h, _ = jax.jit(lambda p, s, x: model.encode(p, s, x, train=False))(
            after, golden_tree(d, "stats_after_1")[0], view1
        )
        z = model.project(after, {}, h)
        z = np.asarray(z / jnp.linalg.norm(z, axis=1, keepdims=True))

    np.testing.assert_allclose([clean, attacked], [d["loss_clean"][0], d["loss_adv"][0]], rtol=1e-9)
    wanted = golden_tree(d, "grad_0"), golden_tree(d, "stats_biased_after_0")[0]
    for got, want in zip(((grads["encoder"], grads["head"]), stats), wanted, strict=True):
        got, want = paths(got), paths(want)
        assert got.keys() == want.keys()
        for path, w in want.items():
            np.testing.assert_allclose(got[path], w, rtol=1e-8, atol=1e-9 * np.abs(w).max(), err_msg=path)
    np.testing.assert_allclose(h, d["eval_hidden"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(z, d["eval_features"], rtol=1e-9, atol=1e-12)


# ---- mistakes


@pytest.mark.parametrize(
    "key, options",
    [
        ("norm_sets", dict(norm="group", norm_sets=("adv",))),
        ("norm_sets", dict(norm_sets="adv")),
        ("norm_sets", dict(norm_sets=("",))),
        ("norm_sets", dict(norm_sets=("a_b",))),
        ("norm_sets", dict(norm_sets=(3,))),
        ("norm_sets", dict(norm_sets=("adv", "adv"))),
        ("norm_set_momentum", dict(norm_set_momentum=1.0)),
        ("norm_set_momentum", dict(norm_set_momentum=-0.1)),
    ],
)
def test_impossible_sets_are_refused_by_key(key, options):
    refused(key, "resnet", **options)


def test_unknown_set():
    dual, plain, params, stats, images, _ = networks(18)
    for call in (
        lambda: dual.check_norm_set("norm_set", "advers"),
        lambda: dual.encode(params, stats, images, train=True, norm_set="advers"),
        lambda: dual.batch_statistics(params, stats, images, norm_set="advers"),
        lambda: dual.split_at(params, stats, images, "stage1", train=False, norm_set="advers"),
        lambda: grad_cache.encode(dual, params, stats, images, norm_set="advers", chunks=3, groups=6),
    ):
        with pytest.raises(UserError, match=r"^norm_set is 'advers'; expected one of '', 'adv'; [^\n]*$"):
            call()
    with pytest.raises(UserError, match=r"^passes\[2\].norm_set is 'adv'; expected one of ''; model.norm_sets adds"):
        plain.check_norm_set("passes[2].norm_set", "adv")
    assert dual.check_norm_set("", "adv") is dual.check_norm_set("", "") is None
