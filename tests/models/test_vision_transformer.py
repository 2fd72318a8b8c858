"""Vision transformers: positions resized, taps, layers, what is dropped, precision, memory, and whole updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from model_options import refused

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update
from jaxcl.models import make_model
from jaxcl.models.vision_transformer import VisionTransformerOptions
from jaxcl.models.vision_transformer_parts import resize_matrix, rotate, rotation

KIND = "vision_transformer"
SIZES = dict(patch=4, width=16, depth=3, heads=2, mlp_width=24)
TINY = VisionTransformerOptions(**SIZES, head_features=12)
SIDE = 16
FORMS = {
    "plain": dict(),
    "mean": dict(pooling="mean", final_norm="after", class_token=False),
    "both": dict(pooling="cls_mean"),
    "attention": dict(pooling="attention", class_token=False, activation="gelu_tanh"),
    "dinov2": dict(layer_scale=0.5, registers=2, gated=True, activation="silu"),
    "dinov3": dict(layer_scale=0.5, registers=2, position="rope", qkv_bias="query_value"),
    "clip": dict(pre_norm=True, patch_bias=False, activation="quick_gelu", projection=10),
}


@functools.cache
def net(form="plain", **more):
    model = make_model(dataclasses.replace(TINY, **FORMS[form], **more))
    return model, tiny.model_variables(model, side=SIDE)[0]


def encode(model, params, images, **mode):
    return jax.jit(lambda p, x: model.encode(p, {}, x, train=True, **mode)[0])(params, images)


# ---- positions


@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (9, 2), (3, 3)])
def test_resizing_with_antialias_is_that_of_jax(old, new):
    """jax.image.resize has the same kernel, a = -0.5."""
    want = jax.image.resize(np.eye(old), (new, old), "cubic", antialias=True)
    np.testing.assert_allclose(resize_matrix(old, new, True), want, atol=1e-6)


@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (9, 2), (3, 3)])
def test_resizing_without_antialias_is_four_samples(old, new):
    """Written out: the cubic through four neighbours with a = -0.75, the border's sample repeated."""

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    want = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            want[i, min(max(j, 0), old - 1)] += kernel(at - j)
    np.testing.assert_allclose(resize_matrix(old, new, False), want, atol=1e-12)
    if old == new:
        np.testing.assert_allclose(want, np.eye(old))


@pytest.mark.parametrize("form", ["plain", "dinov3"])
@pytest.mark.parametrize("H, W", [(16, 16), (12, 24), (19, 17)])
def test_other_sizes(form, H, W):
    """The positions are for 4x4 patches; what does not fill a patch at the end changes nothing."""
    model, params = net(form)
    images = tiny.normal(2, H, W, 3)
    h = encode(model, params, images)
    assert h.shape == (2, 16) and np.isfinite(h).all()
    np.testing.assert_array_equal(h, encode(model, params, images[:, : H // 4 * 4, : W // 4 * 4]))


def test_a_grid_that_is_no_square_must_be_given():
    model = make_model(TINY)
    params = tiny.fill(jax.eval_shape(lambda: model.init(jax.random.key(0), (8, 12, 3))[0]))
    assert params["encoder"]["tokens"]["positions"].shape == (6, 16)
    with pytest.raises(UserError, match=r"^model\.position_grid"):
        encode(model, params, tiny.normal(2, 16, 16, 3))
    given = make_model(dataclasses.replace(TINY, position_grid=(2, 3)))
    assert encode(given, params, tiny.normal(2, 16, 16, 3)).shape == (2, 16)
    with pytest.raises(UserError, match=r"^model\.patch"):
        encode(given, params, tiny.normal(2, 3, 16, 3))


def test_rotations_depend_on_the_distance_only():
    """The product of a turned query and a turned key is the same wherever the two patches are, if they are as far."""
    turn = rotation((5, 5), 16, 100.0, jnp.float32)
    q, k = (np.broadcast_to(tiny.normal(1, 1, 1, 16, seed=s), (1, 25, 1, 16)) for s in (1, 2))
    products = np.einsum("qd,kd->qk", rotate(q, turn)[0, :, 0], rotate(k, turn)[0, :, 0]).reshape(5, 5, 5, 5)
    np.testing.assert_allclose(products[0, 0, 1, 2], products[3, 1, 4, 3], rtol=1e-4)
    np.testing.assert_allclose(products[2, 2, 2, 2], (q * k)[0, 0].sum(), rtol=1e-4)
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3


# ---- the interface of `Model`


@pytest.mark.parametrize("form", FORMS)
def test_the_two_halves_are_the_whole(form):
    model, params = net(form)
    images = tiny.normal(4, 12, 16, 3)
    assert model.encoder.taps == tuple(
        f"block{i + 1}" for i in range(3 if form in ("mean", "both", "attention") else 2)
    )

    @jax.jit
    def halves(params, images):
        out = {}
        for tap in model.encoder.taps:
            a, tail, _ = model.split_at(params, {}, images, tap, train=True)
            out[tap] = a, tail(a)[0], jax.grad(lambda a, tail=tail: (tail(a)[0] ** 2).sum())(a)
        return out, model.encode(params, {}, images, train=False)[0]

    out, whole = halves(params, images)
    assert whole.shape == (4, model.features) and whole.dtype == np.float32
    for a, h, slope in out.values():
        assert a.shape == (4, 3, 4, 16)
        np.testing.assert_allclose(h, whole, rtol=1e-4, atol=1e-5)
        assert np.abs(slope).max(-1).min() > 1e-6  # every patch counts


@pytest.mark.parametrize("form", FORMS)
def test_layers(form):
    model, params = net(form)
    encoder, layers = model.encoder, {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params["encoder"]):
        path = tuple(p.key for p in path)
        layers.setdefault(encoder.layer_of(path), set()).add(path[0])
    assert encoder.num_layers == 3 and sorted(layers) == [0, 1, 2, 3, 4]
    assert layers[0] == {"tokens"}
    assert all(layers[i + 1] == {f"blocks_{i}"} for i in range(3))
    assert not any(name.startswith(("tokens", "blocks")) for name in layers[4])


@pytest.mark.parametrize(
    "form, dtype",
    [
        ("attention", "float32"),
        ("dinov3", "bfloat16"),
        *(pytest.param(form, "float32", marks=pytest.mark.slow) for form in ("mean", "dinov2", "clip")),
    ],
)
def test_the_same_gradient_when_blocks_are_computed_again(form, dtype):
    images, key = tiny.normal(4, SIDE, SIDE, 3), jax.random.key(0)
    grads = {}
    for remat in (False, True):
        model, params = net(form, remat=remat, dtype=dtype, drop_path=0.3)

        def loss(p, model=model):
            h, _ = model.encode(p, {}, images, train=True, key=key)
            assert h.dtype == jnp.float32
            return (h * jnp.arange(h.shape[-1])).mean()

        grads[remat] = jax.jit(jax.grad(loss))(params)["encoder"]
    rtol = 1e-4 if dtype == "float32" else 0.1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads[False])]
    for path, a, b in zip(paths, *map(jax.tree.leaves, grads.values()), strict=True):
        assert np.isfinite(a).all() and a.dtype == np.float32
        if "['key']['bias']" in path:  # the softmax does not see it, so its gradient is rounding alone
            continue
        assert np.abs(a).max() > 0, path
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1e-2, float(np.abs(b).max())))


def test_half_precision_is_near():
    images = tiny.normal(4, SIDE, SIDE, 3)
    outs = {}
    for dtype in ("float32", "bfloat16"):
        model, params = net("dinov3", dtype=dtype)
        lowered = jax.jit(lambda p, x, m=model: m.encode(p, {}, x, train=False)[0]).lower(params, images)
        assert ("bf16" in lowered.as_text()) == (dtype == "bfloat16")
        outs[dtype] = np.asarray(lowered.compile()(params, images))
    difference = np.abs(outs["bfloat16"] - outs["float32"]).max()
    assert 0 < difference < 0.1 * np.abs(outs["float32"]).max()


def test_drop_path():
    """A branch of an image is dropped or divided by the share that is kept; never in the first block, nor in tests."""
    model, params = net("plain", drop_path=0.4)
    still, still_params = net("plain")
    images = np.repeat(tiny.normal(1, SIDE, SIDE, 3), 64, 0)
    np.testing.assert_array_equal(encode(model, params, images), encode(still, still_params, images))
    key = jax.random.key(3)
    test = jax.jit(lambda p, x: model.encode(p, {}, x, train=False, key=key)[0])(params, images)
    np.testing.assert_allclose(test, encode(model, params, images), rtol=1e-5, atol=1e-6)
    drawn = np.asarray(encode(model, params, images, key=key))
    # Rates 0, 0.2, 0.4 of three blocks with two branches each: at most 2^4 different outputs.
    kinds = np.unique(drawn.round(4), axis=0)
    assert 6 <= len(kinds) <= 16
    np.testing.assert_array_equal(drawn, encode(model, params, images, key=key))


def test_attention_written_out():
    """One head's probabilities and the whole block in float64."""
    model, params = net("dinov2")
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["encoder"])
    images = tiny.normal(1, SIDE, SIDE, 3)

    def norm(x, q):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * q["scale"] + q["bias"]

    def dense(x, q):
        return x @ q["kernel"] + q["bias"]

    t = p["tokens"]
    patches = images[0].reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 48)
    x = patches @ t["patch"]["kernel"].reshape(48, 16) + t["patch"]["bias"] + t["positions"]
    x = np.concatenate([t["class_token"][None], t["registers"], x])
    for i in range(3):
        b = p[f"blocks_{i}"]
        y = norm(x, b["attention_norm"])
        q, k, v = (dense(y, b["attention"][n]).reshape(19, 2, 8).swapaxes(0, 1) for n in ("query", "key", "value"))
        s = np.exp(q @ k.swapaxes(1, 2) / 8**0.5)
        y = (s / s.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(19, 16)
        x = x + b["attention_scale"] * dense(y, b["attention"]["out"])
        y = norm(x, b["mlp_norm"])
        gate = dense(y, b["mlp"]["gate"])
        y = gate / (1 + np.exp(-gate)) * dense(y, b["mlp"]["hidden"])
        x = x + b["mlp_scale"] * dense(y, b["mlp"]["out"])
    np.testing.assert_allclose(encode(model, params, images)[0], norm(x[0], p["last_norm"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "key, options",
    [
        ("width", dict(heads=5)),
        ("heads", dict(position="rope", heads=8)),
        ("pooling", dict(class_token=False)),
        ("final_norm", dict(pooling="cls_mean", final_norm="after")),
        ("pooling", dict(pooling="max")),
        ("position_grid", dict(position_grid=(0, 3))),
        ("activation", dict(activation="relu")),
        ("drop_path", dict(drop_path=1.0)),
        ("norm_epsilon", dict(norm_epsilon=0.0)),
    ],
)
def test_impossible_options_are_refused_by_key(key, options):
    refused(key, KIND, **(SIZES | options))


# ---- updates


def config(*, tap="", attack=False):
    c = base.default()
    c.batch_size, c.duration, c.size = tiny.BATCH, "4 epochs", tiny.SIDE
    c.model = base.model(KIND, **SIZES, head_features=12, layer_scale=0.5, registers=1, drop_path=0.2)
    c.views.view1 = base.view("random", jitter_p=0.0, grayscale=0.0)
    c.views.view2 = base.view("random", jitter_p=0.0, grayscale=0.0)
    c.passes = (base.encode("view1", "view2"),)
    c.terms.clean = base.term("nt_xent", views=("view1", "view2"))
    if tap:
        c.views.standard = base.view("standard")
        c.memory.probe = base.memory("linear_probe", optimizer=dict(lr=0.1, weight_decay=0.0))
        c.stages = (base.stage("saliency", tap=tap),)
    if attack:
        c.stages = (base.stage("adversary", norm_set=""),)
        c.passes += (base.encode("adversarial"),)
        c.terms.adversarial = base.term("nt_xent", views=("view1", "adversarial"))
    return c


@pytest.mark.parametrize("options", [{}, dict(tap="block2"), dict(attack=True)], ids=["simclr", "excon", "clae"])
def test_an_update(options):
    """SimCLR, ExCon's GradCAM and CLAE's attack: everything moves and stays finite."""
    recipe = tiny.recipe(config(**options), num_devices=1)
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
