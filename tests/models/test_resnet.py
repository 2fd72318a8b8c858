"""ResNets: the published sizes, the authors' blocks in float64, plain convolutions, and rows that do not exist."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax import lax
from model_options import refused

from jaxcl.errors import UserError
from jaxcl.method.memory import InitContext, LinearProbe
from jaxcl.models import ProjectionHead, ResNetOptions, make_model
from jaxcl.models.layers import MatmulConv, conv
from jaxcl.models.norms import norm_groups
from jaxcl.models.resnet import ResNet
from jaxcl.models.resnet_blocks import BasicBlock, Bottleneck

TINY = ResNetOptions(stage_sizes=(2, 1), stage_widths=(8, 16), stem="cifar", head_features=12)


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


# ---- sizes


@pytest.mark.parametrize(
    "depth, features, encoder, head",
    [
        (18, 512, 11_168_832, 328_320),
        (34, 512, 21_276_992, 328_320),
        (50, 2048, 23_500_352, 4_458_624),
        (101, 2048, 42_492_480, 4_458_624),
    ],
)
def test_published_parameter_counts(depth, features, encoder, head):
    model = make_model(ResNetOptions(depth=depth))
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), (32, 32, 3)))
    assert (count(params["encoder"]), count(params["head"])) == (encoder, head)
    assert model.features == features
    # A mean and a variance for each scale and bias of the batch norms.
    norms = [x for path, x in jax.tree_util.tree_leaves_with_path(params["encoder"]) if "bn" in str(path)]
    assert count(stats) == sum(x.size for x in norms)


@pytest.mark.parametrize(
    "features, classes, parameters",
    [(512, 100, 51_300), (2048, 100, 204_900), (512, 200, 102_600), (2048, 200, 409_800)],
)
def test_published_classifier_counts(features, classes, parameters):
    probe = jax.eval_shape(
        lambda: LinearProbe().init(jax.random.key(0), InitContext(features, classes, None, None, optax.sgd(0.1)))
    )
    assert count(probe["params"]) == parameters


def test_single_dense_head_and_pooled_shapes():
    head = jax.eval_shape(lambda: ProjectionHead(128, 0).init(jax.random.key(0), jnp.zeros((1, 512))))
    assert count(head["params"]) == 512 * 128 + 128


@pytest.mark.parametrize(
    "depth, tap, shape",  # ExCon (arXiv 2111.14271): the layers that GradCAM explains on 32- and 64-pixel images
    [
        (50, "stage2", (16, 16, 512)),
        (18, "stage2", (16, 16, 128)),
        (50, "stage4", (8, 8, 2048)),
        (18, "stage4", (8, 8, 512)),
    ],
)
def test_taps_are_the_layers_of_the_paper(depth, tap, shape):
    model, side = make_model(ResNetOptions(depth=depth)), 32 if tap == "stage2" else 64

    def activations():
        params, stats = model.init(jax.random.key(0), (side, side, 3))
        return model.split_at(params, stats, jnp.zeros((2, side, side, 3)), tap, train=False)[0]

    assert jax.eval_shape(activations).shape == (2, *shape)


@pytest.mark.parametrize("stem, side", [("cifar", 32), ("imagenet", 8), ("patch2", 16), ("patch4", 8), ("patch8", 4)])
def test_stems_reduce_the_image(stem, side):
    encoder = ResNetOptions(stem=stem, stage_sizes=(1,), stage_widths=(8,)).make(jnp.float32)

    def tap():
        variables = encoder.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        return encoder.apply(variables, jnp.zeros((1, 32, 32, 3)), "stage1", method="to_tap")[0]

    assert jax.eval_shape(tap).shape == (1, side, side, 8)


def test_initial_values():
    """Kaiming fan-out with the gain of ReLU, batch norms at 1 and 0 (the last of a branch as well), torch's Linear."""
    model = make_model(ResNetOptions(stage_sizes=(1,), stage_widths=(64,)))
    params, stats = jax.jit(lambda: model.init(jax.random.key(3), (8, 8, 3)))()
    block = params["encoder"]["stages_0_0"]
    kernel = np.asarray(block["conv1"]["kernel"])
    assert kernel.shape == (3, 3, 64, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    stem = np.asarray(params["encoder"]["stem_conv"]["kernel"])
    np.testing.assert_allclose(stem.std(), np.sqrt(2 / (9 * 64)), rtol=0.1)  # fan-out: 3 inputs do not matter
    for bn in ("bn1", "bn2"):
        np.testing.assert_array_equal(block[bn]["scale"], np.ones(64))
        np.testing.assert_array_equal(block[bn]["bias"], np.zeros(64))
    dense = params["head"]["hidden0"]["dense"]
    for values in (dense["kernel"], dense["bias"]):
        values = np.asarray(values)
        assert np.abs(values).max() <= 1 / np.sqrt(64) and np.abs(values).max() > 0.9 / np.sqrt(64)
        assert abs(values.mean()) < 0.03
    np.testing.assert_array_equal(stats["stem_bn"]["var"], np.ones(64))


# ---- the authors' blocks


def block_variables(d):
    params, stats = {}, {}
    for name in ("conv1", "conv2", "conv3", "shortcut_conv"):
        if f"{name}_kernel" in d:
            params[name] = {"kernel": jnp.asarray(d[f"{name}_kernel"])}
    for name in ("bn1", "bn2", "bn3", "shortcut_bn"):
        if f"{name}_scale" in d:
            params[name] = {k: jnp.asarray(d[f"{name}_{k}"]) for k in ("scale", "bias")}
            stats[name] = {k: jnp.asarray(d[f"{name}_{k}"]) for k in ("mean", "var")}
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("name", ["resnet_basicblock_stride2", "resnet_bottleneck_stride1"])
def test_golden_blocks(golden, name):
    d = golden("excon", name)
    make = {"basic": BasicBlock, "bottleneck": Bottleneck}[str(d["kind"])]
    with jax.enable_x64(True):
        block = make(d["input"].shape[-1], int(d["planes"]), int(d["stride"]), dtype=jnp.float64)
        variables, x = block_variables(d), jnp.asarray(d["input"])

        @jax.jit
        def both(variables, x):
            frozen = block.apply(variables, x, dict(use_running_average=True, where=None))
            train = dict(use_running_average=False, where=None)
            return frozen, *block.apply(variables, x, train, mutable=["batch_stats"])

        frozen, trained, new = both(variables, x)
    assert frozen.dtype == np.float64
    np.testing.assert_allclose(frozen, d["output_eval"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(trained, d["output_train"], rtol=1e-9, atol=1e-12)
    N, H, W, _ = d["input"].shape
    for bn, stats in new["batch_stats"].items():
        np.testing.assert_allclose(stats["mean"], d[f"{bn}_mean_after"], rtol=1e-9, atol=1e-12)
        # torch keeps the unbiased variance in its running one (n - 1), Flax the biased (n).
        stride = 1 if bn == "bn1" and d["kind"] == "bottleneck" else int(d["stride"])
        n = N * (H // stride) * (W // stride)
        moved = np.asarray(stats["var"]) - 0.9 * d[f"{bn}_var"]
        wanted = d[f"{bn}_var_after"] - 0.9 * d[f"{bn}_var"]
        np.testing.assert_allclose(moved * n / (n - 1), wanted, rtol=1e-9, atol=1e-12)
        assert np.abs(moved - wanted).max() > 1e-4  # the factor is there


# ---- convolutions


def reference_conv(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_matmul_conv_is_a_convolution():
    """1x1 at strides 1 and 2, patches on images they tile and on images that leave a border; values and gradients."""
    cases = [(1, 1, 6), (1, 2, 6), (1, 2, 7), (2, 2, 6), (4, 4, 8), (4, 4, 10), (8, 8, 17)]
    inputs = {
        case: (tiny.normal(3, case[2], case[2], 4, seed=i), tiny.normal(case[0], case[0], 4, 5, seed=10 + i))
        for i, case in enumerate(cases)
    }

    def ours(case, x, k):
        return MatmulConv(5, case[0], case[1]).apply({"params": {"kernel": k}}, x)

    def theirs(case, x, k):
        return reference_conv(x, k, case[1], 0)

    @jax.jit
    def everything(inputs):
        def one(f, case, x, k):
            y, pull = jax.vjp(lambda x, k: f(case, x, k), x, k)
            return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        return {case: [one(f, case, *args) for f in (ours, theirs)] for case, args in inputs.items()}

    for case, (got, want) in everything(inputs).items():
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape, case
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=str(case))


def test_padding_is_symmetric_not_same():
    """At stride 2 "SAME" pads one side only; the authors' layers pad both."""
    x, kernel = tiny.normal(2, 8, 8, 3), tiny.normal(3, 3, 3, 4, seed=1)

    @jax.jit
    def three(x, kernel):
        same = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        ours = conv(4, 3, 2, jnp.float32).apply({"params": {"kernel": kernel}}, x)
        return ours, reference_conv(x, kernel, 2, 1), same

    got, want, same = three(x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert got.shape == same.shape and np.abs(got - same).max() > 0.1


@pytest.mark.parametrize("side", [17, 16])
def test_imagenet_stem_is_seven_by_seven_and_a_padded_max_pool(side):
    """On an odd side of the pool's input "SAME" would pad alike, on an even one not; cases F."""
    encoder = ResNetOptions(stem="imagenet", stage_sizes=(1,), stage_widths=(4,)).make(jnp.float32)
    x = tiny.normal(2, side, side, 3)
    variables = tiny.fill(jax.eval_shape(lambda: encoder.init(jax.random.key(1), x)))
    stem, norm = variables["params"]["stem_conv"]["kernel"], variables["params"]["stem_bn"]
    running = variables["batch_stats"]["stem_bn"]
    assert stem.shape == (7, 7, 3, 4)

    @jax.jit
    def both(variables):
        return encoder.apply(variables, x, "stage1", method="to_tap")[1], reference_conv(x, stem, 2, 3)

    block_input, y = (np.asarray(a) for a in both(variables))
    y = (y - running["mean"]) / np.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
    padded = np.pad(np.maximum(y, 0), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    last = padded.shape[1] - 2  # of the corners of windows, one beyond
    windows = [padded[:, i : i + last : 2, j : j + last : 2] for i in range(3) for j in range(3)]
    np.testing.assert_allclose(block_input, np.max(windows, axis=0), rtol=1e-4, atol=1e-4)


def window_sums(x, kernel, stride):
    """A convolution [N,H,W,C] by its definition, in float64, with (side - 1) / 2 zeros all around."""
    side = kernel.shape[0]
    margin = (side - 1) // 2
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    h, w = (-(-(n - side + 1) // stride) for n in x.shape[1:3])
    out = np.zeros((len(x), h, w, kernel.shape[-1]))
    for i in range(side):
        for j in range(side):
            cut = x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
            out += cut @ kernel[i, j]
    return out


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_where_a_block_strides(make, stride, side):
    """A basic block on its first 3x3, a bottleneck on its 3x3, and the shortcut on its 1x1; cases F."""
    block, x = make(3, 4, stride), tiny.normal(2, side, side, 3)
    frozen = dict(use_running_average=True, where=None)
    variables = tiny.fill(jax.eval_shape(lambda: block.init(jax.random.key(0), x, frozen)))
    params, stats = variables["params"], variables["batch_stats"]

    def layer(x, name, norm, stride=1):
        y, p, s = window_sums(x, params[name]["kernel"], stride), params[norm], stats[norm]
        return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    strides = {BasicBlock: (stride, 1), Bottleneck: (1, stride, 1)}[make]
    y = x
    for i, own in enumerate(strides, 1):
        y = layer(y if i == 1 else np.maximum(y, 0), f"conv{i}", f"bn{i}", own)
    shortcut = x if "shortcut_conv" not in params else layer(x, "shortcut_conv", "shortcut_bn", stride)
    got = jax.jit(lambda v, x: block.apply(v, x, frozen))(variables, x)
    np.testing.assert_allclose(got, np.maximum(y + shortcut, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [18, 50])
def test_only_the_first_block_of_a_stage_strides(depth):
    """And only from the second stage on; cases F."""
    encoder = ResNetOptions(depth=depth).make(jnp.float32).bind({})
    strides = [[block.stride for block in blocks] for blocks in encoder.stages]
    assert [s[0] for s in strides] == [1, 2, 2, 2] and {n for s in strides for n in s[1:]} == {1}


# ---- the cut at a tap


@pytest.fixture(scope="module", params=["basic", "bottleneck", "basic, group norm"])
def cut(request):
    depth, norm = {"bottleneck": 50}.get(request.param, 18), "group" if "group" in request.param else "batch"
    options = dict(stage_sizes=(2, 1), stage_widths=(8, 16), head_features=12)
    model = make_model(ResNetOptions(depth=depth, norm=norm, **options))
    return model, *tiny.model_variables(model, side=8), tiny.normal(6, 8, 8, 3)


@pytest.mark.parametrize("train", [True, False])
def test_the_two_halves_are_the_whole(cut, train):
    model, params, stats, images = cut

    @jax.jit
    def all_of_it(images):
        halves = {}
        for tap in ("stage1", "stage2"):
            a, tail, _ = model.split_at(params, stats, images, tap, train=train)
            halves[tap] = a, *tail(a)
        return halves, model.encode(params, stats, images, train=train)

    halves, (whole, whole_after) = all_of_it(images)
    for a, h, after in halves.values():
        np.testing.assert_allclose(h, whole, rtol=1e-4, atol=1e-5)
        assert jax.tree.structure(after) == jax.tree.structure(whole_after) == jax.tree.structure(stats)
        moved = 0
        for new, want, old in zip(*map(jax.tree.leaves, (after, whole_after, stats)), strict=True):
            np.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-5)
            moved += float(np.abs(np.asarray(new) - np.asarray(old)).max()) > 1e-6
        assert moved == (len(jax.tree.leaves(stats)) if train else 0)  # every layer, once; or none
        assert float(a.min()) < 0  # before batch norm and ReLU


@pytest.mark.parametrize("tap, block", [("stage1", "stages_0_1"), ("stage2", "stages_1_0")])
def test_gradient_at_the_tap_is_that_of_the_network(cut, tap, block):
    """The raw output of the last convolution is linear in its kernel, so <dL/da, conv(., dK)> = <dL/dK, dK>."""
    model, params, stats, images = cut
    conv = "conv3" if "conv3" in params["encoder"][block] else "conv2"
    direction = tiny.normal(*params["encoder"][block][conv]["kernel"].shape, seed=7)
    weight = tiny.normal(6, model.features, seed=8)

    def with_kernel(kernel):
        blocks = {**params["encoder"], block: {**params["encoder"][block], conv: {"kernel": kernel}}}
        return {**params, "encoder": blocks}

    @jax.jit
    def slopes(kernel):
        a, tail, _ = model.split_at(params, stats, images, tap, train=True)
        towards, _, _ = model.split_at(with_kernel(direction), stats, images, tap, train=True)
        at_tap = jax.grad(lambda a: (tail(a)[0] * weight).sum())(a)
        whole = jax.grad(lambda k: (model.encode(with_kernel(k), stats, images, train=True)[0] * weight).sum())(kernel)
        return jnp.vdot(at_tap, towards), jnp.vdot(whole, direction)

    at_tap, whole = slopes(params["encoder"][block][conv]["kernel"])
    assert abs(whole) > 0.05
    np.testing.assert_allclose(at_tap, whole, rtol=1e-3, atol=1e-4)


# ---- group norm


@pytest.mark.parametrize(
    "channels, groups",
    [(1, 1), (2, 1), (3, 1), (8, 4), (12, 6), (16, 8), (32, 16), (48, 24), (64, 32), (100, 25), (256, 32), (2048, 32)],
)
def test_norm_groups(channels, groups):
    assert norm_groups(channels) == groups


def group_norm(x, scale, bias):
    """Written out: mean and variance of each image over space and the channels of a group."""
    N, H, W, C = x.shape
    g = x.reshape(N, H, W, norm_groups(C), -1)
    g = (g - g.mean((1, 2, 4), keepdims=True)) / np.sqrt(g.var((1, 2, 4), keepdims=True) + 1e-5)
    return g.reshape(x.shape) * scale + bias


@pytest.fixture(scope="module")
def group_net():
    model = make_model(dataclasses.replace(TINY, norm="group"))
    return model, *tiny.model_variables(model, side=8)


def test_group_norm_has_the_parameters_of_batch_norm_and_no_statistics(group_net):
    model, params, stats = group_net
    batch, batch_stats = tiny.model_variables(make_model(TINY), side=8)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(params) == shapes(batch) and stats == {} and batch_stats
    assert not model.batch_norm and make_model(TINY).batch_norm


def test_group_norm_is_that_of_the_paper(group_net):
    model, params, _ = group_net
    x = tiny.normal(3, 8, 8, 3)
    encoder = params["encoder"]
    y = np.asarray(reference_conv(x, encoder["stem_conv"]["kernel"], 1, 1))
    y = np.maximum(group_norm(y, **encoder["stem_bn"]), 0)
    got = jax.jit(
        lambda x: model.encoder.apply({"params": encoder}, x, {}, method=lambda m, x, mode: m._stem(x, mode))
    )(x)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)


def test_with_group_norm_each_image_is_by_itself(group_net):
    """No matter which mode, who else is there, and whether they exist."""
    model, params, stats = group_net
    x, rubbish = tiny.normal(4, 8, 8, 3), 50 * tiny.normal(4, 8, 8, 3, seed=2)
    where = np.array([True, False, True, True])

    @jax.jit
    def all_of_it(x, other, where):
        a = model.encode(params, stats, x, train=True)
        b = model.encode(params, stats, x, train=False)
        c = model.encode(params, stats, jnp.concatenate([x[:1], other[1:]]), train=True, where=where)
        return a, b, c

    (a, new), (b, _), (c, _) = all_of_it(x, rubbish, where)
    assert new == {}
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[0], c[0], rtol=1e-5, atol=1e-6)
    assert np.isfinite(c).all()


# ---- statistics of one batch


def test_batch_statistics_are_those_a_running_mean_would_move_by(padded_inputs):
    model, params, stats, images, where = padded_inputs

    @jax.jit
    def both(images, where):
        _, moved = model.encode(params, stats, images, train=True, where=where)
        own = model.batch_statistics(params, stats, images, where=where)
        return moved, own, model.move_statistics(stats, own)

    moved, own, again = both(images, where)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    stem = np.asarray(reference_conv(images[where], params["encoder"]["stem_conv"]["kernel"], 1, 1))
    np.testing.assert_allclose(own["stem_bn"]["mean"], stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own["stem_bn"]["var"], stem.var((0, 1, 2)), rtol=1e-4)


@pytest.fixture(scope="module")
def padded_inputs():
    model = make_model(TINY)
    where = np.array([True, True, False, True, False, True])
    return model, *tiny.model_variables(model, side=8), tiny.normal(6, 8, 8, 3, seed=4) + 0.3, where


# ---- compute dtype


def test_bfloat16_computes_in_bfloat16_and_hands_out_float32():
    images, outs = tiny.normal(6, 8, 8, 3), {}
    for dtype in ("float32", "bfloat16"):
        model = make_model(ResNetOptions(stage_sizes=(1, 1), stage_widths=(8, 16), head_features=12, dtype=dtype))
        params, stats = tiny.model_variables(model, side=8)

        @jax.jit
        def run(params, images, model=model, stats=stats):
            h, new = model.encode(params, stats, images, train=True)
            return h, model.project(params, {}, h), new

        lowered = run.lower(params, images)
        h, z, new = lowered.compile()(params, images)
        for leaf in (h, z, *jax.tree.leaves(new)):
            assert leaf.dtype == jnp.float32
        outs[dtype] = np.asarray(h)
        assert ("bf16" in lowered.as_text()) == (dtype == "bfloat16")
    np.testing.assert_allclose(outs["bfloat16"], outs["float32"], rtol=0.1, atol=0.1)
    assert np.abs(outs["bfloat16"] - outs["float32"]).max() > 0


# ---- rows that do not exist


@pytest.fixture(scope="module")
def padded():
    """The same six images, alone and among four rows of rubbish."""
    model = make_model(TINY)
    params, stats = tiny.model_variables(model, side=8)
    real, rubbish = tiny.normal(6, 8, 8, 3, seed=1), 50 + 20 * tiny.normal(4, 8, 8, 3, seed=2)
    place = np.array([0, 2, 3, 5, 6, 8])
    where = np.zeros(10, bool)
    where[place] = True
    images = np.zeros((10, 8, 8, 3), np.float32)
    images[where], images[~where] = real, rubbish
    weight = tiny.normal(6, model.features, seed=3)

    def run(images, where, rows):
        def objective(params):
            h, new = model.encode(params, stats, images, train=True, where=where)
            return (h[rows] * weight).sum(), (h[rows], new)

        (loss, (h, new)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return {"h": h, "loss": loss, "statistics": new, "gradients": grads}

    @jax.jit
    def all_three(real, images, where):
        return run(real, None, np.arange(6)), run(images, where, place), run(images, None, place)

    return all_three(real, images, where)


@pytest.mark.parametrize("what", ["h", "statistics", "gradients"])
def test_padded_rows_change_nothing(padded, what):
    alone, among, unmasked = padded
    worst = 0.0
    for a, b, c in zip(*(jax.tree.leaves(x[what]) for x in (alone, among, unmasked)), strict=True):
        scale = float(np.abs(a).max()) + 1e-6
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * scale)
        worst = max(worst, float(np.abs(np.asarray(c) - np.asarray(a)).max()) / scale)
    assert worst > 0.1  # without the mask they would


def test_pooled_rows_that_do_not_exist_are_zero_and_so_is_their_gradient():
    """The norms rely on both; cases F."""
    where, maps = np.array([True, False, True]), tiny.normal(3, 2, 2, 4)
    pooled, pull = jax.vjp(lambda x: ResNet._pool(x, dict(where=where)), maps)
    (slope,) = pull(np.ones((3, 4), np.float32))
    np.testing.assert_allclose(pooled, maps.mean((1, 2)) * where[:, None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, np.broadcast_to(where[:, None, None, None] / 4, maps.shape))


# ---- mistakes


@pytest.mark.parametrize(
    "key, options",
    [
        ("depth", dict(depth=19)),
        ("norm", dict(norm="layer")),
        ("stem", dict(stem="cifr")),
        ("width", dict(width=0.0)),
        ("stage_sizes", dict(stage_sizes=(1, 1), stage_widths=(8,))),
        ("stage_sizes", dict(stage_sizes=(1, 1), stage_widths=(8, 16), strides=(1, 2, 2))),
        ("stage_sizes", dict(stage_sizes=(1, 0), stage_widths=(8, 16))),
        ("stage_widths", dict(stage_sizes=(1, 1), stage_widths=(8, 0))),
        ("strides", dict(stage_sizes=(1, 1), stage_widths=(8, 16), strides=(1, 0))),
        ("dtype", dict(dtype="float16")),
        ("stem_padding", dict(stem="patch4", stem_padding=1)),
        ("head_features", dict(head_features=-1)),
        ("head_hidden_layers", dict(head_hidden_layers=-1)),
        ("head_norm", dict(head_norm="group")),
        ("head_out_norm", dict(head_out_norm="layer")),
    ],
)
def test_impossible_options_are_refused_by_key(key, options):
    refused(key, "resnet", **options)


@pytest.mark.parametrize("tap", ["stage3", "stage0", "stage", "2", ""])
def test_unknown_tap(tap):
    with pytest.raises(UserError, match="expected one of stage1, stage2$"):
        make_model(TINY).check_tap(tap)


def test_width_scales_every_stage():
    encoder = ResNetOptions(depth=18, width=0.25).make(jnp.float32)
    assert tuple(encoder.widths) == (16, 32, 64, 128) and encoder.features == 128


# ---- what presets of other repositories need


@pytest.mark.parametrize("depth, last", [(18, "bn2"), (50, "bn3")])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_last_norm_of_a_block_can_start_at_zero(depth, last, norm):
    """cases E.5."""
    sets = ("adv",) if norm == "batch" else ()
    options = dataclasses.replace(TINY, depth=depth, norm=norm, norm_sets=sets)
    shape, key = (8, 8, 3), jax.random.key(0)
    usual, zero = (
        make_model(dataclasses.replace(options, zero_init_residual=z)).init(key, shape)[0] for z in (False, True)
    )
    for path, x in jax.tree_util.tree_leaves_with_path(zero["encoder"]):
        name = jax.tree_util.keystr(path)
        ends = "'scale'" in name and f"'{last}" in name
        before = dict(jax.tree_util.tree_leaves_with_path(usual["encoder"]))[path]
        np.testing.assert_array_equal(x, np.zeros_like(x) if ends else before, err_msg=name)
    kept = [k for k, _ in jax.tree_util.tree_leaves_with_path(zero["encoder"]) if f"'{last}" in jax.tree_util.keystr(k)]
    assert len(kept) == (12 if sets else 6)  # scale and bias, of three blocks, of each set


@pytest.mark.parametrize("stem, padding, sides", [("cifar", 2, (10, 5)), ("cifar", 0, (8, 4)), ("imagenet", 2, (2, 1))])
def test_padding_of_the_stem(stem, padding, sides):
    """cases E, ResNet-18 presets: two pixels around the image in front of a 3x3 stem."""
    model = make_model(dataclasses.replace(TINY, stem=stem, stem_padding=padding))
    params, stats = model.init(jax.random.key(0), (8, 8, 3))
    maps = model.maps(params, stats, jnp.ones((1, 8, 8, 3)))
    assert tuple(m.shape[1] for m in maps) == sides


def test_a_head_on_features_of_unit_length():
    """cases E.2: the embedding does not depend on the length of the features."""
    model = make_model(dataclasses.replace(TINY, head_unit_input=True, head_hidden_layers=0))
    params, stats = model.init(jax.random.key(0), (8, 8, 3))
    h = jax.random.normal(jax.random.key(1), (4, model.features))
    z = model.project(params, stats, h)
    np.testing.assert_allclose(model.project(params, stats, 9 * h), z, rtol=1e-5)
    dense = params["head"]["out"]["dense"]
    rows = h / np.linalg.norm(h, axis=1, keepdims=True)
    np.testing.assert_allclose(z, rows @ dense["kernel"] + dense["bias"], rtol=1e-4, atol=1e-6)


def test_a_last_batch_norm_with_a_scale_and_no_bias():
    """cases E.9: SimCLR's projection head ends so."""
    model = make_model(dataclasses.replace(TINY, head_norm="batch", head_out_norm="scale"))
    params, _ = jax.eval_shape(lambda: model.init(jax.random.key(0), (8, 8, 3)))
    assert set(params["head"]["out_bn"]) == {"scale"} and set(params["head"]["out"]["dense"]) == {"kernel"}
    assert set(params["head"]["bn0"]) == {"scale", "bias"}
