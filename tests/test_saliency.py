"""GradCAM against the code of ExCon's authors, masks pixel by pixel, and attributions against closed forms."""

import functools

import chex
import golden_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxcl import saliency
from jaxcl.errors import UserError


def close(got, want, wide):
    """float64: within 1e-7 of each number. float32: within 1e-4 of the largest."""
    want = np.asarray(want)
    if wide:
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-10)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["gradcam_cifar_eval_bn", "gradcam_cifar_train_bn"])
def test_golden_chain(golden, name, wide):
    d = golden("excon", name)
    size, threshold = d["images"].shape[1], float(d["threshold"])
    tail_fn = functools.partial(golden_net.tail, d, train=bool(d["bn_train_mode"]))

    @jax.jit
    def chain(images):
        out = {"activations": golden_net.head(d, images)}
        out["logits"] = tail_fn(out["activations"])
        for relu, suffix in ((False, ""), (True, "_relu")):
            cam = saliency.grad_cam(tail_fn, out["activations"], d["labels"], relu=relu)
            out["cam" + suffix] = cam
            out[f"cam{suffix}_normalised"] = saliency.normalize_map(cam, size)
            out["keep_mask" + suffix] = saliency.keep_mask(out[f"cam{suffix}_normalised"], threshold)
        out["masked_images"] = saliency.apply_mask(images, out["keep_mask"])
        out["logits_masked"] = tail_fn(golden_net.head(d, out["masked_images"]))
        return out

    with jax.enable_x64(wide):
        out = chain(jnp.asarray(d["images"], jnp.float64 if wide else jnp.float32))
    for key in ("activations", "logits", "cam", "cam_normalised", "cam_relu", "cam_relu_normalised"):
        close(out[key], d[key], wide)
    for key in ("keep_mask", "keep_mask_relu"):
        assert out[key].dtype == bool
        np.testing.assert_array_equal(out[key], d[key])
    close(out["masked_images"], d["masked_images"], wide)
    np.testing.assert_array_equal(np.asarray(out["masked_images"]) == 0, d["masked_images"] == 0)
    close(out["logits_masked"], d["logits_masked"], wide)
    np.testing.assert_array_equal(np.argmax(out["logits_masked"], 1) == d["labels"], d["accepted"])
    np.testing.assert_array_equal(np.argmax(out["logits"], 1) == d["labels"], d["predicted_ok"])
    assert d["accepted"].any() and not d["accepted"].all()


def test_cam_of_given_gradients(golden):
    d = golden("excon", "gradcam_cifar_train_bn")
    with jax.enable_x64(True):
        got = saliency.cam(jnp.asarray(d["activations"]), jnp.asarray(d["grad_activations"]))
        close(got, d["cam"], True)
        close(np.mean(d["grad_activations"], (1, 2)), d["channel_weights"], True)
        close(saliency.cam(d["activations"], d["grad_activations"], relu=True), d["cam_relu"], True)
        close(
            jax.image.resize(got, d["cam_upsampled"].shape, "bilinear", antialias=False),
            d["cam_upsampled"],
            True,
        )


def test_batch_statistics_carry_other_images_into_the_map(golden):
    """The gradient is that of the sum of logits, not of each logit alone."""
    d = golden("excon", "gradcam_cifar_train_bn")
    activations, labels = jnp.asarray(d["activations"], jnp.float32), d["labels"]
    tail_fn = functools.partial(golden_net.tail, d, train=True)
    together = saliency.grad_cam(tail_fn, activations, labels)
    alone = saliency.grad_cam(tail_fn, activations, np.where(np.arange(len(labels)) == 0, labels, -1))
    assert np.abs(together[0] - alone[0]).max() > 1e-5
    assert np.abs(alone[1]).max() > 0  # the terms through the statistics, although its target is negative


# ---- maps and masks, by loops


def slow_resize(image, size):
    """Reference: bilinear, half-pixel centres, edges clamped."""
    h, w = image.shape
    out = np.zeros(size)
    for i, j in np.ndindex(*size):
        y, x = (i + 0.5) * h / size[0] - 0.5, (j + 0.5) * w / size[1] - 0.5
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        for dy in (0, 1):
            for dx in (0, 1):
                weight = (1 - abs(y - y0 - dy)) * (1 - abs(x - x0 - dx))
                out[i, j] += weight * image[np.clip(y0 + dy, 0, h - 1), np.clip(x0 + dx, 0, w - 1)]
    return out


@pytest.mark.parametrize("size", [None, 8, (12, 9), 2])
def test_normalize_map(size):
    maps = np.random.default_rng(0).normal(size=(3, 4, 4)) * [[[1]], [[100]], [[1e-3]]]
    got = saliency.normalize_map(maps, size)
    for one, normal in zip(maps, got, strict=True):
        if size is not None:
            one = slow_resize(one, (size, size) if isinstance(size, int) else size)
        want = (one - one.min()) / (np.ptp(one) + 1e-8)
        np.testing.assert_allclose(normal, want, atol=3e-5)
    assert got.dtype == jnp.float32 and got.min() == 0


def test_flat_map_keeps_nothing_and_is_finite():
    maps = jnp.full((2, 4, 4), 7.0)
    normal, grad = jax.value_and_grad(lambda m: saliency.normalize_map(m, 8).sum())(maps)
    assert normal == 0 and np.isfinite(grad).all()
    assert not saliency.keep_mask(saliency.normalize_map(maps, 8)).any()


def test_keep_mask_is_strict():
    np.testing.assert_array_equal(saliency.keep_mask(np.array([[[0.5, 0.5001, 0.4]]])), [[[False, True, False]]])
    assert saliency.keep_mask(np.full((1, 2, 2), 0.3), 0.2).all()


@pytest.mark.parametrize("q,kept", [(0.0, 0), (0.15, 15), (0.29, 29), (0.155, 15), (1.0, 100)])
def test_top_fraction_keeps_exactly_its_number(q, kept):
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 6, (4, 10, 10)).astype(np.float32)  # full of ties
    maps[3] = -2.5  # all equal
    got = np.asarray(saliency.top_fraction_mask(maps, q)).reshape(4, -1)
    for one, mask in zip(maps.reshape(4, -1), got, strict=True):
        first = sorted(range(100), key=lambda i: (-one[i], i))[:kept]
        np.testing.assert_array_equal(np.flatnonzero(mask), sorted(first))


def test_apply_mask():
    images = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    keep = np.random.default_rng(1).random((2, 3, 3)) < 0.5
    got = saliency.apply_mask(images, keep, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(got[keep], images[keep])
    np.testing.assert_array_equal(got[~keep], np.tile([1.0, 2.0, 3.0], ((~keep).sum(), 1)))
    assert saliency.apply_mask(jnp.asarray(images, jnp.bfloat16), keep).dtype == jnp.bfloat16
    nan = np.where(keep[..., None], images, np.nan)
    assert np.isfinite(saliency.apply_mask(nan, keep)).all()


# ---- gradients of the input


def polynomial_logits(images):
    """Two classes: the sum of x, and the sum of x^3 over the first colour."""
    return jnp.stack([images.sum((1, 2, 3)), (images[..., 0] ** 3).sum((1, 2))], axis=1)


def test_input_gradient():
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    got = saliency.input_gradient(polynomial_logits, images, np.array([0, 1, -1]))
    np.testing.assert_allclose(got[0], np.full((4, 4), 2.0), rtol=1e-6)
    np.testing.assert_allclose(got[1], 3 * images[1, ..., 0] ** 2, rtol=1e-5)
    np.testing.assert_array_equal(got[2], 0)


def test_integrated_gradients_of_a_cubic():
    """Along t * x the gradient of x^3 is 3 t^2 x^2; its integral over t, times x, is x^3."""
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    targets = np.array([0, 1, -1])
    got = saliency.integrated_gradients(polynomial_logits, images, targets, num_steps=200)
    np.testing.assert_allclose(got[0], images[0].sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], images[1, ..., 0] ** 3, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[2], 0)
    base = np.full(2, 0.5, np.float32)
    got = saliency.integrated_gradients(polynomial_logits, images, targets, baseline=base, num_steps=200)
    complete = polynomial_logits(images)[1, 1] - polynomial_logits(0.5 * jnp.ones_like(images))[1, 1]
    np.testing.assert_allclose(got[1].sum(), complete, rtol=1e-3)


def test_integrated_gradients_midpoints():
    """Two steps evaluate the gradient at one quarter and three quarters of the path."""
    images = np.random.default_rng(0).normal(size=(1, 2, 2, 1)).astype(np.float32)
    got = saliency.integrated_gradients(polynomial_logits, images, np.array([1]), num_steps=2)
    x = images[0, ..., 0]
    np.testing.assert_allclose(got[0], x * 3 * ((x / 4) ** 2 + (3 * x / 4) ** 2) / 2, rtol=1e-5)


def test_integrated_gradients_memory_does_not_grow_with_steps():
    def logits_fn(images):
        for _ in range(3):
            images = jnp.tanh(images * 1.1)
        return images.sum((1, 2))

    def memory(steps):
        f = functools.partial(saliency.integrated_gradients, logits_fn, num_steps=steps)
        shapes = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
        compiled = jax.jit(lambda x, t: f(x, t)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(64) <= memory(2) + 4096


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: saliency.cam(np.ones((2, 4, 4, 3)), np.ones((2, 4, 4, 2))), r"cam: .*\(2, 4, 4, 2\)"),
        (lambda: saliency.normalize_map(np.ones((4, 4)), 8), r"normalize_map: .*\(4, 4\)"),
        (lambda: saliency.top_fraction_mask(np.ones((1, 4, 4)), 15), "top_fraction_mask: q=15"),
        (
            lambda: saliency.integrated_gradients(
                polynomial_logits, np.ones((1, 2, 2, 1)), np.zeros(1, int), num_steps=0
            ),
            "integrated_gradients: num_steps=0",
        ),
    ],
)
def test_mistakes_are_one_line(call, text):
    with pytest.raises(UserError, match=text) as caught:
        call()
    assert "\n" not in caught.value.args[0]


class Transformations(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("cam", "normalize_map", "keep_mask", "top_fraction_mask", "apply_mask")
    def test_functions_of_arrays(self, name):
        """The same with and without jit, and image by image."""
        rng = np.random.default_rng(0)
        maps, layer = rng.random((3, 4, 4)).astype(np.float32), rng.normal(size=(3, 4, 4, 2)).astype(np.float32)
        function, arguments = {
            "cam": (saliency.cam, (layer, layer[::-1].copy())),
            "normalize_map": (lambda m: saliency.normalize_map(m, (6, 8)), (maps,)),
            "keep_mask": (saliency.keep_mask, (maps,)),
            "top_fraction_mask": (lambda m: saliency.top_fraction_mask(m, 0.3), (maps,)),
            "apply_mask": (saliency.apply_mask, (layer, maps > 0.5)),
        }[name]
        together = self.variant(function)(*arguments)
        chex.assert_axis_dimension(together, 0, 3)
        alone = [self.variant(function)(*(a[i : i + 1] for a in arguments)) for i in range(3)]
        chex.assert_trees_all_close(together, jnp.concatenate(alone), atol=1e-6)


@pytest.mark.parametrize("bad", [3, 2**32])
def test_a_target_that_is_no_class(bad):
    """cases A.2: its map would be all zeros without a word."""
    rng = np.random.default_rng(0)
    activations, weights = rng.normal(size=(3, 4, 4, 5)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    tail = lambda a: a.mean((1, 2)) @ weights  # noqa: E731
    explanations = (
        lambda t: saliency.grad_cam(tail, activations, t),
        lambda t: saliency.input_gradient(tail, activations, t),
        lambda t: saliency.integrated_gradients(tail, activations, t, num_steps=2),
    )
    for explain in explanations:
        with pytest.raises(UserError, match="targets"):
            explain(np.array([0, bad, -1]))
        if bad < 2**31:
            maps = np.asarray(jax.jit(explain)(np.array([0, bad, -1])))
            assert np.isnan(maps[1]).all() and np.isfinite(maps[0]).all() and not maps[2].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-8, 1e-6])
def test_maps_of_any_scale(scale):
    """cases A.14: the 1e-8 under the fraction would be all of a small map."""
    maps = np.random.default_rng(0).uniform(size=(2, 6, 6))
    want = (maps - maps.min((1, 2), keepdims=True)) / np.ptp(maps, (1, 2), keepdims=True)
    np.testing.assert_allclose(saliency.normalize_map((maps * scale).astype(np.float32)), want, atol=1e-5)
