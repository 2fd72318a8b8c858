"""The vision transformer: the authors' joint step in float64, published sizes, taps, and what dropout drops."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model_options import refused

from jaxcl import losses
from jaxcl.errors import UserError
from jaxcl.models import ResNetOptions, ViTOptions, make_model
from jaxcl.models.vit import Block, Embedding, _kept

STILL = dict(dropout=0.0, block_dropout=0.0, attention_dropout=0.0, query_dropout=0.0, drop_path=0.0)
TINY = ViTOptions(patch=4, width=16, depth=3, heads=2, mlp_width=24, head_features=12)
SIDE = 8


# ---- against the authors' code


def ours(torch, depth):
    """Torch's names and layouts -> (parameters of `Model`, those of the classifier)."""

    def dense(name):
        out = {"kernel": torch[f"{name}.weight"].T}
        return {"dense": out | ({"bias": torch[f"{name}.bias"]} if f"{name}.bias" in torch else {})}

    def norm(name):
        return {"scale": torch[f"{name}.weight"], "bias": torch[f"{name}.bias"]}

    encoder = {
        "embedding": {
            "patch": dense("patch.emb.0"),
            "norm": norm("patch.emb.1"),
            "positions": torch["encoder.pe"],
            "class_token": torch["encoder.cls_token"][0, 0],
        },
        "final_norm": norm(f"encoder.f.{depth}"),
    }
    for i in range(depth):
        attention, mlp = f"encoder.f.{i}.mha.f", f"encoder.f.{i}.ffn.f"
        encoder[f"blocks_{i}"] = {
            "attention_norm": norm(f"{attention}.norm"),
            "qkv": dense(f"{attention}.f.qkv")["dense"],
            "mlp_norm": norm(f"{mlp}.norm"),
            "mlp_hidden": dense(f"{mlp}.f.f.0"),
            "mlp_out": dense(f"{mlp}.f.f.3"),
        }
    return {"encoder": encoder}, dense("classifier.classification_layer")["dense"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden_joint_step(golden, dtype):
    """Cross-entropy and L_spread on one encoder: tokens, features, losses and the gradient of every parameter."""
    d = golden("thanos", "joint_step_vit")
    depth, settings = int(d["n_layers"]), json.loads(str(d["settings"]))
    torch = {k: {n: d[f"{k}/{n}"].astype(dtype) for n in d["param_order"]} for k in ("param", "grad")}
    params, classifier = ours(torch["param"], depth)
    B, V = d["images"].shape[:2]
    images = d["images"].reshape(B * V, *d["images"].shape[2:]).transpose(0, 2, 3, 1).astype(dtype)
    width = params["encoder"]["final_norm"]["bias"].size
    options = dict(patch=int(d["patch_size"]), width=width, depth=depth, heads=int(d["n_heads"]), mlp_width=2 * width)
    model = make_model(ViTOptions(**options))  # without a key nothing is dropped, whatever the rates
    model = dataclasses.replace(model, encoder=model.encoder.clone(dtype=jnp.dtype(dtype)))
    assert settings["mode"] == "l_spread" and settings["norm"] == "unit" and not settings["clamp"]
    assert not settings["pos_in_denom"] and settings["use_labels"]

    def step(params, classifier):
        h, _ = model.encode(params, {}, images, train=True)
        logits = h @ classifier["kernel"] + classifier["bias"]
        ce = losses.cross_entropy(logits, np.repeat(d["labels"], V))
        views = h.reshape(B, V, -1).swapaxes(0, 1)
        weights = dict(temperature=settings["temp"], a_lc=settings["a_lc"], a_spread=settings["a_spread"])
        contrastive, _ = losses.spread(views, d["labels"], **weights)
        embedding = Embedding(options["patch"], width, dtype=jnp.dtype(dtype))
        tokens = embedding.apply({"params": params["encoder"]["embedding"]}, images, None)[:, 1:]
        tokens -= params["encoder"]["embedding"]["positions"][1 : 1 + tokens.shape[1]]
        out = dict(tokens=tokens, embedding=h, logits=logits, ce=ce, contrastive=contrastive, total=ce + contrastive)
        return out["total"], out

    with jax.enable_x64(dtype == "float64"):
        grad = jax.jit(jax.grad(step, argnums=(0, 1), has_aux=True))
        (grads, classifier_grads), out = jax.device_get(grad(params, classifier))
    value, slope = (1e-9, 1e-7) if dtype == "float64" else (2e-4, 1e-3)
    for name, got in out.items():
        assert got.dtype == dtype
        np.testing.assert_allclose(got, d[name], rtol=value, atol=value * np.abs(d[name]).max(), err_msg=name)
    accuracy = (out["logits"].argmax(1) == np.repeat(d["labels"], V)).mean()
    np.testing.assert_allclose(accuracy, d["accuracy"])
    wanted, wanted_of_classifier = ours(torch["grad"], depth)
    for got, want in ((grads["encoder"], wanted["encoder"]), (classifier_grads, wanted_of_classifier)):
        leaves = jax.tree_util.tree_leaves_with_path(want)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for (path, w), g in zip(leaves, jax.tree.leaves(got), strict=True):
            scale = np.abs(w).max()
            assert scale > 0
            np.testing.assert_allclose(g, w, rtol=slope, atol=slope / 10 * scale, err_msg=str(path))


# ---- sizes


@pytest.mark.parametrize("side, channels, patches", [(32, 3, 64), (28, 1, 49), (64, 3, 256)])
def test_published_sizes(side, channels, patches):
    model = make_model(ViTOptions())
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), (side, side, channels)))
    encoder = params["encoder"]
    assert encoder["embedding"]["positions"].shape == (patches + 3, 256)
    assert encoder["embedding"]["patch"]["dense"]["kernel"].shape == (16 * channels, 256)
    if side == 32:
        assert sum(x.size for x in jax.tree.leaves(encoder)) == 3_254_784
    assert stats == {} and model.features == 256 and not model.batch_norm


def test_initial_values():
    """Tokens are clipped normals times 0.1, dense layers uniform to 1/sqrt(fan in), norms the identity."""
    model = make_model(dataclasses.replace(TINY, depth=1, width=64))
    params, _ = jax.jit(lambda: model.init(jax.random.key(3), (SIDE, SIDE, 3)))()
    embedding, block = params["encoder"]["embedding"], params["encoder"]["blocks_0"]
    positions = np.abs(embedding["positions"])
    np.testing.assert_allclose(positions.max(), 0.1, rtol=1e-6)
    assert 0.2 < (positions > 0.0999).mean() < 0.45  # a normal is beyond 1 with probability 0.317
    assert 0.04 < np.abs(embedding["class_token"]).mean() < 0.08
    for kernel, fan_in in ((embedding["patch"]["dense"]["kernel"], 48), (block["qkv"]["kernel"], 64)):
        assert 0.95 < np.abs(kernel).max() * fan_in**0.5 <= 1
    assert "bias" not in block["qkv"] and (block["mlp_norm"]["scale"] == 1).all()


# ---- the interface of `Model`


@pytest.fixture(scope="module")
def net():
    model = make_model(TINY)
    return model, *tiny.model_variables(model, side=SIDE), tiny.normal(6, SIDE, SIDE, 3)


def test_the_two_halves_are_the_whole(net):
    model, params, stats, images = net
    assert stats == {}

    @jax.jit
    def all_of_it(images):
        halves = {}
        for tap in ("block1", "block2"):
            a, tail, _ = model.split_at(params, stats, images, tap, train=True)
            h, after = tail(a)
            halves[tap] = a, h, jax.grad(lambda a, tail=tail: tail(a)[0].sum())(a), tail(-a)[0], after
        return halves, model.encode(params, stats, images, train=False)

    halves, (whole, after) = all_of_it(images)
    assert after == {} and whole.shape == (6, 16) and whole.dtype == np.float32
    for a, h, slope, other, after in halves.values():
        assert a.shape == (6, 2, 2, 16) and after == {}
        np.testing.assert_allclose(h, whole, rtol=1e-4, atol=1e-5)
        assert np.abs(slope).max() > 1e-4 and np.abs(other - h).max() > 1e-3


def test_patches_lie_as_in_the_image(net):
    """What changes in one corner changes the tokens of that corner, as long as nothing has mixed them."""
    model, params, _, images = net
    changed = images.copy()
    changed[:, :4, 4:] += 1
    embedding = jax.jit(lambda x: Embedding(4, 16).apply({"params": params["encoder"]["embedding"]}, x, None))
    moved = np.abs(embedding(changed) - embedding(images)).max(-1) > 1e-6
    assert (moved == [False, False, True, False, False]).all()


def test_a_padded_row_and_a_clean_set_change_nothing(net):
    model, params, stats, images = net
    where = np.array([True, False, True, True, True, False])
    encode = jax.jit(lambda x, w: model.encode(params, stats, x, train=True, where=w, norm_set="")[0])
    np.testing.assert_array_equal(encode(images, where), encode(images, ~where))
    assert model.batch_statistics(params, stats, images) == {}
    assert model.move_statistics(stats, {}) == {} and model.statistics_of(stats) == {}
    assert model.for_loops() is model


def test_bfloat16_computes_in_bfloat16_and_hands_out_float32(net):
    _, params, stats, images = net
    outs = {}
    for dtype in ("float32", "bfloat16"):
        model = make_model(dataclasses.replace(TINY, dtype=dtype))
        run = jax.jit(lambda x, k, model=model: model.encode(params, stats, x, train=True, key=k)[0])
        lowered = run.lower(images, jax.random.key(0))
        assert ("bf16" in lowered.as_text()) == (dtype == "bfloat16")
        outs[dtype] = np.asarray(lowered.compile()(images, jax.random.key(0)))
        assert outs[dtype].dtype == np.float32
    np.testing.assert_allclose(outs["bfloat16"], outs["float32"], rtol=0.1, atol=0.1)
    assert np.abs(outs["bfloat16"] - outs["float32"]).max() > 0


# ---- what is dropped


@functools.cache
def compiled_encode(model, train=True):
    return jax.jit(lambda params, images, key: model.encode(params, {}, images, train=train, key=key)[0])


def test_a_key_drops_in_training_only(net):
    model, params, _, images = net
    train, test = compiled_encode(model), compiled_encode(model, train=False)
    a, b = (np.asarray(train(params, images, jax.random.key(i))) for i in (0, 1))
    still = np.asarray(train(params, images, None))
    np.testing.assert_array_equal(a, train(params, images, jax.random.key(0)))
    assert all(np.abs(x - y).max(1).min() > 1e-3 for x, y in ((a, b), (a, still)))
    for key in (None, jax.random.key(0)):
        np.testing.assert_allclose(test(params, images, key), still, rtol=1e-5, atol=1e-6)


def test_without_rates_a_key_changes_nothing(net):
    _, params, _, images = net
    model = make_model(dataclasses.replace(TINY, **STILL))
    encode = compiled_encode(model)
    np.testing.assert_allclose(
        encode(params, images, jax.random.key(0)), encode(params, images, None), rtol=1e-6, atol=1e-7
    )


RATE = 0.3


def block_outputs(rates, *, N=400, mlp=False):
    """One block whose MLP (or attention) branch is 0, with and without dropping -> branches [N,T,D], still [N,T,D]."""
    block = Block(width=8, heads=2, mlp_width=6, **rates)
    x = tiny.normal(1, 5, 8, seed=2)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, None))
    params = tiny.fill(shapes, seed=4)["params"]
    off = params["qkv"] if mlp else params["mlp_out"]["dense"]
    off["kernel"] *= 0
    if not mlp:
        off["bias"] *= 0
    many = np.repeat(x, N, 0)

    @jax.jit
    def both(key):
        return tuple(block.apply({"params": params}, many, k) - many for k in (key, None))

    branch, still = (np.asarray(y) for y in both(jax.random.key(5)))
    return branch, still, params, x


def share(dropped, rate, sigmas=4.5):
    """The share of what is dropped is what the rate says."""
    assert abs(dropped.mean() - rate) < sigmas * (rate * (1 - rate) / dropped.size) ** 0.5


@pytest.mark.parametrize("mlp", [False, True])
def test_drop_path_takes_a_branch_of_an_image(mlp):
    branch, still, _, _ = block_outputs(dict(drop_path=RATE), mlp=mlp)
    dropped = (branch == 0).all((1, 2))
    share(dropped, RATE)
    np.testing.assert_allclose(branch[~dropped], still[~dropped] / (1 - RATE), rtol=1e-3, atol=1e-5)


def test_block_dropout_of_the_attention_takes_single_features():
    branch, still, _, _ = block_outputs(dict(block_dropout=RATE))
    dropped = branch == 0
    share(dropped, RATE)
    np.testing.assert_allclose(branch[~dropped], still[~dropped] / (1 - RATE), rtol=1e-3, atol=1e-5)


def test_block_dropout_of_the_mlp_acts_after_either_layer():
    branch, still, params, x = block_outputs(dict(block_dropout=RATE), mlp=True, N=4000)
    dropped = branch == 0
    share(dropped, RATE)
    kept = np.where(dropped, np.nan, branch * (1 - RATE))
    # Behind the second layer all is divided alike; before it, features of the hidden layer are missing at random.
    assert (np.nanstd(kept, 0) > 1e-3).all()
    error = np.abs(np.nanmean(kept, 0) - still[0]) / (np.nanstd(kept, 0) / (4000 * (1 - RATE)) ** 0.5)
    assert error.max() < 4.5  # unbiased


def attention_written_out(params, x):
    """-> (probabilities [A,T,T], values [A,T,d]) of one image, in float64."""
    x = x[0].astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["attention_norm"]["scale"] + params["attention_norm"]["bias"]
    q, k, v = ((x @ w).reshape(5, 2, 4).swapaxes(0, 1) for w in np.split(params["qkv"]["kernel"].astype(float), 3, 1))
    s = q @ k.swapaxes(1, 2) / 2
    e = np.exp(s - s.max(-1, keepdims=True))
    return s, e / e.sum(-1, keepdims=True), v


def test_query_dropout_takes_a_query_in_all_heads():
    branch, still, params, x = block_outputs(dict(query_dropout=RATE))
    s, p, v = attention_written_out(params, x)
    np.testing.assert_allclose(still[0], (p @ v).swapaxes(0, 1).reshape(5, 8), rtol=1e-4, atol=1e-5)
    uniform = np.broadcast_to(v.mean(1).reshape(8), (5, 8))
    e = np.exp((s - s.max(-1, keepdims=True)) / (1 - RATE))
    sharper = (e / e.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(5, 8)
    dropped = np.abs(branch - uniform).max(-1) < 1e-5  # [N,T]
    share(dropped, RATE)
    assert np.abs(sharper - uniform).max(-1).min() > 1e-3
    wanted = np.where(dropped[..., None], uniform, sharper)
    np.testing.assert_allclose(branch, wanted, rtol=1e-3, atol=1e-5)


def test_attention_dropout_takes_single_probabilities():
    """Each output is one of the 2^T sums of the values over the tokens that are kept, head by head."""
    branch, _, params, x = block_outputs(dict(attention_dropout=RATE))
    _, p, v = attention_written_out(params, x)
    masks = (np.arange(32)[:, None] >> np.arange(5)) & 1  # [32,T]
    sums = np.einsum("mk,aqk,akd->qamd", masks / (1 - RATE), p, v)  # [T,A,32,d]
    far = np.abs(branch.reshape(-1, 5, 2, 1, 4) - sums).max(-1)  # [N,T,A,32]
    assert far.min(-1).max() < 1e-4
    share(masks[far.argmin(-1)] == 0, RATE)


def independent(kept, rate=0.5):
    """Columns of coins: the right share of each, and no two of them alike or opposite."""
    kept = np.asarray(kept, float)
    share(1 - kept, rate)
    correlation = np.corrcoef(kept, rowvar=False) - np.eye(kept.shape[1])
    assert np.abs(correlation).max() < 5 / len(kept) ** 0.5


def test_everything_that_is_dropped_is_drawn_by_itself():
    """Names of one shape, images and places of the same draw, and two keys; cases F."""
    rates = {name: (0.5, (4,)) for name in ("one", "two", "three")}
    draws = [_kept(jax.random.key(i), 2000, rates) for i in (0, 1)]
    independent(np.concatenate([kept for draw in draws for kept in draw.values()], axis=1))
    assert _kept(None, 5, rates) == {} and set(_kept(jax.random.key(0), 5, rates | {"off": (0.0, (4,))})) == set(rates)


@pytest.mark.parametrize("remat", [False, True])
def test_every_block_drops_for_itself(remat):
    """Blocks add 1, 2 and 4 to a feature of the class token where they are kept: the sum tells which; cases F."""
    N, rate = 2000, 0.5
    options = dict.fromkeys(STILL, 0.0) | dict(block_dropout=rate, remat=remat)
    model = make_model(dataclasses.replace(TINY, **options))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (SIDE, SIDE, 3)))[0]
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    encoder = params["encoder"]
    encoder["final_norm"]["scale"] += 1
    encoder["embedding"]["class_token"][1] = 16  # to undo the norm by
    for i in range(3):
        encoder[f"blocks_{i}"]["mlp_out"]["dense"]["bias"][0] = 2**i * (1 - rate)
    h = np.asarray(compiled_encode(model)(params, np.zeros((N, SIDE, SIDE, 3), np.float32), jax.random.key(0)))
    total = 16 * (h[:, 0] - h[:, 2]) / (h[:, 1] - h[:, 2])
    np.testing.assert_allclose(total, np.round(total), atol=0.01)
    independent(np.round(total).astype(int)[:, None] >> np.arange(3) & 1)


def test_both_branches_of_a_block_are_dropped_by_themselves():
    """Attention adds to one feature and the MLP to another, so it shows which was kept; cases F."""
    block, x = Block(width=4, heads=1, mlp_width=4, drop_path=0.5), np.zeros((2000, 3, 4), np.float32)
    params = jax.tree.map(
        lambda a: np.zeros(a.shape, np.float32), jax.eval_shape(lambda: block.init(jax.random.key(0), x, None))
    )
    params["params"]["attention_norm"]["bias"][0] = 1  # every token's value is then the first row of the kernel
    params["params"]["qkv"]["kernel"][0, 8] = 1
    params["params"]["mlp_out"]["dense"]["bias"][1] = 1
    independent(jax.jit(block.apply)(params, x, jax.random.key(0))[:, 0, :2] > 0)


def test_patch_dropout_spares_the_class_token_and_the_positions():
    embedding = Embedding(4, 16, RATE)
    images = tiny.normal(40, SIDE, SIDE, 3)
    params = tiny.fill(jax.eval_shape(lambda: embedding.init(jax.random.key(0), images[:1], None)))["params"]

    @jax.jit
    def both(key):
        return tuple(embedding.apply({"params": params}, images, k) for k in (key, None))

    got, still = (np.asarray(y) for y in both(jax.random.key(1)))
    np.testing.assert_array_equal(got[:, 0], still[:, 0])
    got, still = (y[:, 1:] - params["positions"][1:5] for y in (got, still))
    dropped = np.abs(got) < 1e-7
    share(dropped, RATE)
    np.testing.assert_allclose(got[~dropped], still[~dropped] / (1 - RATE), rtol=1e-3, atol=1e-5)


def test_drop_path_grows_with_depth():
    model = make_model(dataclasses.replace(TINY, drop_path=0.06, depth=4))
    bound = model.encoder.bind({})
    np.testing.assert_allclose([b.drop_path for b in bound.blocks], [0, 0.02, 0.04, 0.06])


@pytest.fixture(scope="module")
def short():
    """One block that drops much."""
    rates = dict.fromkeys(STILL, 0.3) | dict(drop_path=0.0)
    model = make_model(dataclasses.replace(TINY, depth=1, **rates))
    return model, tiny.model_variables(model, side=SIDE)[0]


def test_dropout_does_not_depend_on_the_devices(short):
    model, params = short
    images, seen = tiny.normal(16, SIDE, SIDE, 3), {}
    for devices in (1, 8):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

        def step(params, images, key):
            h, _ = model.encode(params, {}, images, train=True, key=key)
            return (h * jnp.arange(16)).sum(), h

        shardings = dict(in_shardings=(whole, rows, whole), out_shardings=((whole, rows), whole))
        jitted = jax.jit(jax.value_and_grad(step, has_aux=True), **shardings)
        arguments = params, jax.device_put(images, rows), jax.device_put(jax.random.key(7), whole)
        compiled = jitted.lower(*arguments).compile()
        # Nobody draws for another: with one block, the only global reductions are those of the gradients.
        assert "all-gather" not in compiled.as_text()
        (_, h), grads = compiled(*arguments)
        assert len(h.sharding.device_set) == devices
        seen[devices] = jax.device_get((h, grads["encoder"]))
    for a, b in zip(*map(jax.tree.leaves, seen.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_dropout_is_the_same_when_recomputed_in_a_scan(short):
    """Micro-batches under `jax.checkpoint`: the backward pass drops what the forward pass dropped."""
    model, params = short
    images = tiny.normal(6, SIDE, SIDE, 3)
    weight, keys = tiny.normal(16, seed=3), jax.random.split(jax.random.key(2), 2)

    def one(params, images, key):
        return (model.encode(params, {}, images, train=True, key=key)[0] * weight).sum()

    @jax.jit
    def both(params):
        def scanned(params):
            again = jax.checkpoint(one, prevent_cse=False)
            parts = images.reshape(2, 3, *images.shape[1:]), keys
            return jax.lax.scan(lambda total, of: (total + again(params, *of), None), 0.0, parts)[0]

        def plain(params):
            return one(params, images[:3], keys[0]) + one(params, images[3:], keys[1])

        return jax.value_and_grad(scanned)(params), jax.value_and_grad(plain)(params)

    for a, b in zip(*map(jax.tree.leaves, both(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- mistakes


@pytest.mark.parametrize(
    "key, options",
    [
        ("width", dict(width=16, heads=3)),
        ("depth", dict(depth=0)),
        ("patch", dict(patch=0)),
        ("query_dropout", dict(query_dropout=1.0)),
        ("drop_path", dict(drop_path=-0.1)),
        ("dtype", dict(dtype="float16")),
        ("head_hidden_layers", dict(head_hidden_layers=-1)),
    ],
)
def test_impossible_options_are_refused_by_key(key, options):
    refused(key, "vit", **options)


def test_images_that_do_not_fit(net):
    model, params, stats, _ = net
    with pytest.raises(UserError, match="model.patch is 4, but images have 8x10 pixels"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), (8, 10, 3)))
    with pytest.raises(UserError, match="positions for 4 patches, but images of 12x12 pixels have 9"):
        jax.eval_shape(lambda x: model.encode(params, stats, x, train=False), np.zeros((1, 12, 12, 3)))


def test_what_a_vit_has_not(net):
    model = net[0]
    with pytest.raises(UserError, match="norm_set is 'adv'; expected ''"):
        model.check_norm_set("norm_set", "adv")
    for tap in ("block3", "block0", "stage1", ""):
        with pytest.raises(UserError, match="expected one of block1, block2$"):
            model.check_tap(tap)
    model.check_tap("block2")
    with pytest.raises(UserError, match="expected none"):
        make_model(dataclasses.replace(TINY, depth=1)).check_tap("block1")


def test_taps_of_a_resnet_are_checked_alike():
    model = make_model(ResNetOptions(stage_sizes=(1, 1), stage_widths=(4, 8)))
    model.check_tap("stage2")
    with pytest.raises(UserError, match="tap 'block1' is not in this encoder; expected one of stage1, stage2$"):
        model.check_tap("block1")
