"""EfficientNet-Lites and ConvNeXts: taps, layers, padding, what is dropped, precision, memory, and whole updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from model_options import model_of, refused

from jaxcl import config as base
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update
from jaxcl.models import layers
from jaxcl.models.efficientnet_blocks import sizes_of

SIDE = 16
SIZES = {
    "efficientnet": dict(stage_sizes=(1, 2, 1), stage_widths=(8, 16, 24), stem_width=8, head_width=20),
    "convnext": dict(stage_sizes=(1, 2), stage_widths=(8, 12), patch=2, layer_scale=0.5),
}
FORMS = {
    "efficientnet": ("efficientnet", dict()),
    "convnext": ("convnext", dict()),
    "convnext v2": ("convnext", dict(layer_scale=0.0, response_norm=True)),
}
every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize("kind", SIZES)


@functools.cache
def net(form, **more):
    kind, options = FORMS[form]
    model = model_of(kind, **(SIZES[kind] | options | {"head_features": 12} | more))
    return model, *tiny.model_variables(model, side=SIDE)


def close(a, b, tolerance=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1e-2, float(np.abs(y).max())))


# ---- parts


@pytest.mark.parametrize("kernel, stride, side", [(3, 2, 8), (3, 2, 9), (5, 2, 7), (5, 1, 6), (2, 3, 7)])
def test_padding_as_in_tensorflow(kernel, stride, side):
    x = tiny.normal(1, side, side + 1, 2)
    pads = layers.pads(x.shape, kernel, stride, "same")
    assert pads == tuple(lax.padtype_to_pads(x.shape[1:3], (kernel, kernel), (stride, stride), "SAME"))


def test_relu6():
    x = jnp.array([-1.0, 0.0, 3.0, 6.0, 7.0, jnp.nan])
    y, slope = layers.relu6(x), jax.vmap(jax.grad(layers.relu6))(x)
    assert y[:5].tolist() == [0, 0, 3, 6, 6] and jnp.isnan(y[5])
    assert slope[:5].tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "variant, blocks, widths",
    [
        ("lite0", (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
        ("lite1", (1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
        ("lite2", (1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
    ],
)
def test_sizes_of_the_variants(variant, blocks, widths):
    """As the networks of timm have them."""
    assert sizes_of(variant) == (blocks, widths)


# ---- the cut at a tap


@every_form
@pytest.mark.parametrize("train", [True, False])
def test_the_two_halves_are_the_whole(form, train):
    model, params, stats = net(form)
    images = tiny.normal(4, SIDE, SIDE, 3)

    @jax.jit
    def all_of_it(images):
        halves = {}
        for tap in model.encoder.taps:
            a, tail, _ = model.split_at(params, stats, images, tap, train=train)
            slope = jax.grad(lambda a, tail=tail: (tail(a)[0] ** 2).sum())(a)
            halves[tap] = a, *tail(a), slope
        return halves, model.encode(params, stats, images, train=train)

    halves, (whole, after) = all_of_it(images)
    assert len(halves) == model.num_stages + (form == "efficientnet")
    for a, h, new, slope in halves.values():
        assert a.ndim == 4 and float(jnp.abs(slope).max()) > 0
        close((h, new), (whole, after))
    moved = [
        float(np.abs(np.asarray(a) - b).max()) > 0
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True)
    ]
    assert all(moved) if train else not any(moved)


# ---- layers


@every_form
def test_each_parameter_has_its_layer(form):
    """Counted by hand: blocks 1 to L in order; what reduces a map lies with the block after it."""
    model, params, _ = net(form)
    layer_of = model.encoder.layer_of
    found = {
        path[0].key: layer_of([p.key for p in path])
        for path, _ in jax.tree_util.tree_leaves_with_path(params["encoder"])
    }
    if form == "efficientnet":
        want = {"stages_0_0": 1, "stages_1_0": 2, "stages_1_1": 3, "stages_2_0": 4}
        want |= {"stem_conv": 0, "stem_bn": 0, "head_conv": 5, "head_bn": 5}
    else:
        want = {"stages_0_0": 1, "stages_1_0": 2, "stages_1_1": 3, "downsample_1": 2}
        want |= {"stem_conv": 0, "stem_norm": 0, "final_norm": 4}
    assert found == want
    stages = [model.encoder.layer_of_stage(i) for i in range(1, model.num_stages + 1)]
    assert stages == ([1, 3, 4] if form == "efficientnet" else [1, 3]) and stages[-1] == model.encoder.num_layers


# ---- rows that do not exist, and a few at once


@every_form
def test_padded_rows_change_nothing(form):
    model, params, stats = net(form, **(dict(norm_sets=("adv",)) if form == "efficientnet" else {}))
    real, rubbish = tiny.normal(4, SIDE, SIDE, 3), 50 + 9 * tiny.normal(3, SIDE, SIDE, 3, seed=1)
    where = np.array([True, False, True, True, False, True, False])
    images = np.zeros((7, SIDE, SIDE, 3), np.float32)
    images[where], images[~where] = real, rubbish
    norm_set = "adv" if form == "efficientnet" else ""

    def run(images, where, rows):
        def objective(params):
            h, new = model.encode(params, stats, images, train=True, where=where, norm_set=norm_set)
            return (h[rows] ** 2).sum(), (h[rows], new)

        return jax.value_and_grad(objective, has_aux=True)(params)

    alone, among = jax.jit(lambda a, b, w: (run(a, None, np.arange(4)), run(b, w, np.flatnonzero(where))))(
        real, images, where
    )
    close(among, alone, 1e-3)


@every_form
@pytest.mark.parametrize("count", [6, 7])
def test_a_few_at_once_are_the_same(form, count):
    """In inference only; the batch falls into equal parts, of one image if its size has no other divisor."""
    model, params, stats = net(form)
    few = model.for_one_device()
    assert few.few_at_once and not model.few_at_once
    assert model.encoder.pixels_at_once == 2 * 224**2
    images = tiny.normal(count, 224, 112, 3)

    def run(model, train):
        return jax.jit(lambda x: model.encode(params, stats, x, train=train)[0])

    close(run(few, False)(images), run(model, False)(images))
    loops = [str(jax.make_jaxpr(run(few, train))(images)).count("scan[") for train in (False, True)]
    assert loops == [1, 0]
    assert f"f32[{count // 3 if count == 6 else 7},{3 if count == 6 else 1},224,112,3]" in str(
        jax.make_jaxpr(run(few, False))(images)
    )


@every_form
def test_gradients_of_a_few_at_once(form):
    model, params, stats = net(form)
    images, few = tiny.normal(3, 224, 224, 3)[:, :64], model.for_one_device()

    def slope(model):
        def loss(p, x):
            return (model.encode(p, stats, x, train=False)[0] ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(params, images)

    close(slope(few), slope(model), 1e-3)


# ---- what is dropped


@every_form
def test_a_key_drops_in_training_only(form):
    model, params, stats = net(form, drop_path=0.6)
    assert model.encoder.takes_key and not net(form)[0].encoder.takes_key
    images = tiny.normal(6, SIDE, SIDE, 3)

    @functools.partial(jax.jit, static_argnums=2)
    def run(images, key, train):
        # Statistics of the batch would mix what is dropped into all images.
        return model.encode(params, stats, images, train=train, key=key)[0]

    keys = jax.random.key(0), jax.random.key(1)
    a, b = (run(images, key, True) for key in keys)
    assert (np.asarray(a) != np.asarray(b)).any()
    close(run(images, keys[0], True), a, 1e-6)
    assert (np.asarray(run(images, keys[0], False)) == np.asarray(run(images, keys[1], False))).all()
    close(run(images, keys[0], False), net(form)[0].encode(params, stats, images, train=False)[0])


def test_drop_path_of_an_image():
    x = tiny.normal(3, 2, 2, 1)
    y = np.asarray(layers.drop_path(x, 0.25, np.array([True, False, True])))
    np.testing.assert_allclose(y[[0, 2]], x[[0, 2]] / 0.75, rtol=1e-6)
    assert not y[1].any()
    kept = layers.kept_paths(jax.random.key(0), (0.0, 0.5, 0.9), 4000)
    assert kept[0] is None and [round(float(k.mean()), 1) for k in kept[1:]] == [0.5, 0.1]
    assert layers.kept_paths(None, (0.5,), 4) == layers.kept_paths(jax.random.key(0), (0.0,), 4) == [None]


# ---- memory and precision


@every_form
def test_remat_has_the_same_gradient(form):
    images, key = tiny.normal(6, SIDE, SIDE, 3), jax.random.key(3)

    def gradient(remat):
        model, params, stats = net(form, remat=remat, drop_path=0.3)

        def loss(params):
            h, new = model.encode(params, stats, images, train=True, key=key)
            return (h**2).mean(), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    close(gradient(True), gradient(False), 1e-3)


@every_form
def test_bfloat16_hands_out_float32(form):
    outs = {}
    for dtype in ("float32", "bfloat16"):
        model, params, stats = net(form, dtype=dtype)
        run = jax.jit(lambda x, m=model, p=params, s=stats: (m.encode(p, s, x, train=True), m.maps(p, s, x)))
        (h, new), maps = run(tiny.normal(4, SIDE, SIDE, 3))
        assert {x.dtype for x in (h, *jax.tree.leaves(new))} == {jnp.dtype("float32")}
        assert {x.dtype for x in maps} == {jnp.dtype(dtype)}
        outs[dtype] = np.asarray(h)
    np.testing.assert_allclose(outs["bfloat16"], outs["float32"], rtol=0.1, atol=0.1)


# ---- options


@pytest.mark.parametrize(
    "kind, key, options",
    [
        ("efficientnet", "stage_sizes", dict(stage_sizes=(1, 2))),
        ("efficientnet", "stage_sizes", dict(stage_sizes=(1,) * 8, stage_widths=(8,) * 8)),
        ("efficientnet", "norm_sets", dict(norm="group", norm_sets=("adv",))),
        ("efficientnet", "branches", dict(branches=(3,))),
        ("efficientnet", "variant", dict(variant="lite7")),
        ("efficientnet", "drop_path", dict(drop_path=1.0)),
        ("convnext", "stage_sizes", dict(stage_sizes=(1, 2, 3))),
        ("convnext", "kernel", dict(kernel=4)),
        ("convnext", "branch_embeds", dict(branch_embeds=(1,))),
    ],
)
def test_impossible_options_are_refused_by_key(kind, key, options):
    refused(key, kind, **(SIZES[kind] | options))


# ---- updates


def config(kind, *, tap="", attack=False):
    c = base.default()
    c.batch_size, c.duration, c.size = tiny.BATCH, "4 epochs", tiny.SIDE
    sets = ("adv",) if attack and kind == "efficientnet" else ()
    own = {"norm_sets": sets} if sets else {}
    c.model = base.model(kind, **SIZES[kind], head_features=12, drop_path=0.2, **own)
    c.views.view1 = base.view("random", jitter_p=0.0, grayscale=0.0)
    c.views.view2 = base.view("random", jitter_p=0.0, grayscale=0.0)
    c.passes = (base.encode("view1", "view2"),)
    c.terms.clean = base.term("nt_xent", views=("view1", "view2"))
    if tap:
        c.views.standard = base.view("standard")
        c.memory.probe = base.memory("linear_probe", optimizer=dict(lr=0.1, weight_decay=0.0))
        c.stages = (base.stage("saliency", tap=tap),)
    if attack:
        c.stages = (base.stage("adversary", norm_set=sets[0] if sets else ""),)
        c.passes += (base.encode("adversarial", norm_set=sets[0] if sets else ""),)
        c.terms.adversarial = base.term("nt_xent", views=("view1", "adversarial"))
    return c


@every_kind
@pytest.mark.parametrize("options", [dict(tap="stage2"), dict(attack=True)], ids=["excon", "clae"])
def test_an_update(kind, options):
    """ExCon's GradCAM and CLAE's attack: everything moves and stays finite."""
    recipe = tiny.recipe(config(kind, **options), num_devices=1)
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)), 0)
    zero = functools.partial(jax.tree.map, np.zeros_like)
    memory = {k: {**m, "opt_state": zero(m["opt_state"])} for k, m in state.memory.items()}
    state = state.replace(key=jax.random.key(0), step=np.int32(0), opt_state=zero(state.opt_state), memory=memory)
    mesh = sharding.make_mesh(1)
    first = Phase("encoder", (0,)) if options.get("tap") else Phase("encoder")
    update = compile_update(recipe, first, sharding.replicated(mesh), sharding.batch_sharding(mesh))
    before = jax.tree.map(np.array, state.params["encoder"])
    after, metrics = update(jax.device_put(state), tiny.batch())
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(metrics))
    for path, x in jax.tree_util.tree_leaves_with_path(after.params["encoder"]):
        old = functools.reduce(lambda tree, p: tree[p.key], path, before)
        assert np.isfinite(x).all() and (np.asarray(x) != old).any(), path


@every_kind
def test_a_branch_reaches_the_features(kind):
    model = model_of(kind, **SIZES[kind], head_features=12, branches=(1,))
    params, stats = tiny.model_variables(model, side=SIDE)
    images = tiny.normal(4, SIDE, SIDE, 3)
    h, _ = jax.jit(lambda x: model.encode(params, stats, x, train=True, depth=1))(images)
    assert h.shape == (4, model.features) and np.isfinite(h).all()
