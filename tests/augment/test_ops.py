"""Crops, flips, blur and the other operations, against Pillow or their definition in NumPy; distributions of draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample_images import BYTE, keys, ks, photo, unit

from jaxcl import augment
from jaxcl.augment import color, ops
from jaxcl.errors import UserError

# ---- crop, resize


@pytest.mark.parametrize("size", [8, 20, 33])
def test_resized_crop_is_pillows_crop_then_resize(size):
    image = pytest.importorskip("PIL.Image")
    images = photo(6)
    boxes = np.array([[0, 0, 24, 20], [3, 5, 10, 7], [0, 0, 1, 1], [23, 19, 1, 1], [2, 0, 20, 20], [10, 1, 3, 18]])
    got = np.asarray(jax.jit(ops.resized_crop, static_argnums=2)(unit(images), jnp.asarray(boxes), size))
    assert got.shape == (6, size, size, 3)
    for one, (top, left, h, w), out in zip(images, boxes, got, strict=True):
        crop = image.fromarray(one).crop((left, top, left + w, top + h))
        want = np.asarray(crop.resize((size, size), image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(out, want, atol=1.01 * BYTE)  # Pillow rounds to bytes twice


def plain_bilinear(image, box, size):
    """Reference, pixel by pixel: two taps per axis at (i + 1/2) scale - 1/2, with repeated edges."""
    top, left, h, w = box
    crop = image[top : top + h, left : left + w].astype(np.float64)
    out = np.empty((size, size, image.shape[2]))
    for i, j in itertools.product(range(size), range(size)):
        y, x = max((i + 0.5) * h / size - 0.5, 0), max((j + 0.5) * w / size - 0.5, 0)
        y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        fy, fx = y - y0, x - x0
        upper = crop[y0, x0] * (1 - fx) + crop[y0, x1] * fx
        lower = crop[y1, x0] * (1 - fx) + crop[y1, x1] * fx
        out[i, j] = upper * (1 - fy) + lower * fy
    return out


def test_resized_crop_without_antialias_is_plain_bilinear():
    images = photo(3) / 255
    boxes = np.array([[0, 0, 24, 20], [5, 2, 9, 13], [20, 3, 4, 2]])
    got = ops.resized_crop(jnp.asarray(images, jnp.float32), jnp.asarray(boxes), 7, antialias=False)
    for one, box, out in zip(images, boxes, np.asarray(got), strict=True):
        np.testing.assert_allclose(out, plain_bilinear(one, box, 7), atol=2e-6)


def test_antialias_matters_only_when_shrinking():
    images = unit(photo(2))
    small, large = jnp.array([[2, 3, 5, 5]] * 2), jnp.array([[0, 0, 24, 20]] * 2)
    crop = jax.jit(ops.resized_crop, static_argnums=2, static_argnames="antialias")
    same = [crop(images, small, 9, antialias=a) for a in (True, False)]
    np.testing.assert_allclose(*same, atol=1e-6)
    apart = [crop(images, large, 5, antialias=a) for a in (True, False)]
    assert np.abs(apart[0] - apart[1]).max() > 0.1


def test_box_through_fractions_and_back_is_the_same_crop():
    images = unit(photo(3))
    boxes = np.float32([[5, 3, 7, 11], [1, 9, 17, 10], [11, 2, 13, 3]])
    moved = boxes + np.float32([1e-6, -1e-6, -1e-6, 1e-6])
    assert (moved != boxes).any(axis=1).all()
    np.testing.assert_allclose(*(ops.resized_crop(images, jnp.asarray(b), 9) for b in (boxes, moved)), atol=1e-5)


def test_fractional_box_of_a_ramp_reads_the_ramp():
    ramp = jnp.broadcast_to((jnp.arange(32) + 0.5)[None, None, :, None], (1, 32, 32, 1))
    out = ops.resized_crop(ramp, jnp.array([[4.0, 6.25, 16.0, 12.5]]), 4)
    # Away from the box's edges a linear function is reproduced: sample i sits at left + (i + 1/2) w / 4.
    np.testing.assert_allclose(out[0, 0, 1:3, 0], 6.25 + (np.arange(1, 3) + 0.5) * 12.5 / 4, rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_channels_of_any_number_are_cropped_each_by_itself(channels):
    images = jax.random.uniform(jax.random.key(0), (3, 9, 11, channels))
    boxes = jnp.array([[0, 1, 5, 6], [2, 0, 7, 11], [4, 4, 3, 3.0]])
    out = ops.resized_crop(images, boxes, 6)
    assert out.shape == (3, 6, 6, channels)
    for c in range(channels):
        np.testing.assert_array_equal(out[..., c], ops.resized_crop(images[..., c : c + 1], boxes, 6)[..., 0])


def test_whole_box_at_the_same_size_changes_nothing():
    images = unit(photo(3, 16, 16))
    out = ops.resized_crop(images, jnp.array([[0, 0, 16, 16]] * 3), 16)
    np.testing.assert_allclose(out, images, atol=1e-7)


def test_resize_is_pillows_resize_and_free_at_its_own_size():
    image = pytest.importorskip("PIL.Image")
    images = photo(2)
    got = np.asarray(jax.jit(ops.resize, static_argnums=1)(unit(images), 11))
    for one, out in zip(images, got, strict=True):
        want = np.asarray(image.fromarray(one).resize((11, 11), image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(out, want, atol=1.01 * BYTE)
    square = unit(photo(1, 12, 12))
    assert ops.resize(square, 12) is square


def test_flip():
    images = unit(photo(2))
    out = ops.flip(images, jnp.array([True, False]))
    np.testing.assert_array_equal(out[0], images[0][:, ::-1])
    np.testing.assert_array_equal(out[1], images[1])


# ---- draws of crops


def test_drawn_boxes_are_whole_and_inside():
    for height, width in ((32, 32), (17, 40), (5, 3)):
        boxes = np.asarray(ops.draw_resized_crop(keys(4000), height, width, area=(0.05, 1.0)))
        np.testing.assert_array_equal(boxes, np.round(boxes))
        top, left, h, w = boxes.T
        assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
        assert (top + h <= height).all() and (left + w <= width).all()


def test_drawn_area_is_uniform_and_ratio_log_uniform():
    # Large, so that rounding to pixels is invisible; area small enough that every first try fits.
    side, area, ratio = 4000, (0.1, 0.5), (3 / 4, 4 / 3)
    boxes = np.asarray(ops.draw_resized_crop(keys(20000), side, side, area=area, ratio=ratio), np.float64)
    top, left, h, w = boxes.T
    log = math.log(ratio[1])
    assert ks(h * w / side**2, lambda v: np.clip((v - 0.1) / 0.4, 0, 1)) < 1
    assert ks(np.log(w / h), lambda v: np.clip((v + log) / (2 * log), 0, 1)) < 1
    assert ks((top + 0.5) / (side - h + 1), lambda v: np.clip(v, 0, 1)) < 1
    assert ks((left + 0.5) / (side - w + 1), lambda v: np.clip(v, 0, 1)) < 1
    for pair in ((h * w, w / h), (top / (side - h), left / (side - w)), (h * w, top / (side - h))):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.03  # 4 / sqrt(20000)


def sequential_box(rng, height, width, area, ratio):
    """Reference: torchvision's rule, try after try."""
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return None


def test_rejected_tries_are_redrawn_as_in_the_sequential_rule():
    rng = np.random.default_rng(0)
    want = np.array([sequential_box(rng, 16, 12, (0.2, 1.0), (3 / 4, 4 / 3)) or (0,) * 4 for _ in range(20000)])
    got = np.asarray(ops.draw_resized_crop(keys(20000), 16, 12))
    for column in range(4):
        counts = [np.bincount(v[:, column].astype(int), minlength=17) for v in (want, got)]
        # Two samples of the same discrete law: chi-square per cell about 1.
        seen = (counts[0] + counts[1]) > 20
        chi = ((counts[0] - counts[1]) ** 2)[seen] / (counts[0] + counts[1])[seen]
        assert chi.mean() < 2.0, (column, chi)


@pytest.mark.parametrize(
    "height, width, ratio, box",
    [
        (10, 100, (3 / 4, 4 / 3), (0, 43, 10, 13)),  # too wide: all rows, the widest ratio allowed
        (100, 10, (3 / 4, 4 / 3), (43, 0, 13, 10)),
        (1000, 1100, (0.5, 2.0), (0, 0, 1000, 1100)),  # the image's own ratio is allowed: the whole image
    ],
)
def test_fallback_is_the_largest_centred_box(height, width, ratio, box):
    boxes = ops.draw_resized_crop(keys(50), height, width, area=(1.0, 1.0), ratio=ratio)
    np.testing.assert_array_equal(boxes, np.tile(box, (50, 1)))


# ---- blur, solarize


@pytest.mark.parametrize("taps", [3, 9])
def test_blur_against_the_written_out_sum(taps):
    images = photo(3, 12, 10) / 255
    sigma = np.array([0.1, 0.8, 2.0])
    got = np.asarray(
        jax.jit(ops.gaussian_blur, static_argnames="kernel_size")(
            jnp.asarray(images, jnp.float32), jnp.asarray(sigma, jnp.float32), kernel_size=taps
        )
    )
    r = taps // 2
    for one, s, out in zip(images, sigma, got, strict=True):
        kernel = np.exp(-0.5 * (np.arange(-r, r + 1) / s) ** 2)
        kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
        padded = np.pad(one, ((r, r), (r, r), (0, 0)), mode="reflect")
        want = np.zeros_like(one)
        for i, j in itertools.product(range(12), range(10)):
            want[i, j] = np.tensordot(kernel, padded[i : i + taps, j : j + taps], 2)
        np.testing.assert_allclose(out, want, atol=2e-6)


def test_blur_of_sigma_zero_changes_no_bit():
    images = unit(photo(2))
    out = ops.gaussian_blur(images, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(out[0], images[0])
    assert np.abs(out[1] - images[1]).max() > 0.05


def test_blur_kernel():
    assert [ops.blur_kernel_size(s) for s in (8, 32, 64, 96, 224)] == [3, 3, 7, 9, 23]
    for taps in (4, 0, -3, 41):
        with pytest.raises(UserError):
            ops.gaussian_blur(jnp.zeros((1, 20, 20, 3)), jnp.ones(1), kernel_size=taps)


def test_blur_draws():
    sigma = np.asarray(ops.draw_blur_sigma(keys(20000), sigma=(0.1, 2.0), p=0.3))
    on = sigma > 0
    assert abs(on.mean() - 0.3) < 4 * math.sqrt(0.21 / 20000)
    assert ks(sigma[on], lambda v: np.clip((v - 0.1) / 1.9, 0, 1)) < 1


def test_solarize_against_pillow():
    image = pytest.importorskip("PIL.Image")
    from PIL import ImageOps

    images = photo(2)
    out = np.asarray(ops.solarize(unit(images), jnp.array([True, False])))
    np.testing.assert_allclose(out[0], np.asarray(ImageOps.solarize(image.fromarray(images[0]), 128)) / 255, atol=1e-6)
    np.testing.assert_array_equal(out[1], unit(images)[1])


def test_masks_have_their_probability():
    for p in (0.0, 0.2, 1.0):
        mask = np.asarray(ops.draw_mask(keys(20000), p=p))
        assert abs(mask.mean() - p) <= 4 * math.sqrt(p * (1 - p) / 20000)


def test_operations_vmap():
    images = unit(photo(6)).reshape(2, 3, 24, 20, 3)
    factors, order, _ = color.draw_color_jitter(keys(6), strength=(0.4, 0.4, 0.4, 0.1))
    boxes = ops.draw_resized_crop(keys(6), 24, 20)

    def both(images, boxes, factors, order):
        return color.color_jitter(ops.resized_crop(images, boxes, 10), factors, order)

    flat = jax.jit(both)(images.reshape(6, 24, 20, 3), boxes, factors, order)
    nested = jax.jit(jax.vmap(both))(images, *(v.reshape(2, 3, 4) for v in (boxes, factors, order)))
    np.testing.assert_allclose(nested.reshape(flat.shape), flat, atol=1e-6)


@pytest.mark.parametrize("height, width, ratio", [(64, 3, (8, 16)), (3, 64, (1 / 16, 1 / 8)), (1, 1, (3, 4))])
def test_a_crop_has_a_pixel_at_least(height, width, ratio):
    """cases A.12: no try fits, and the largest box inside the ratios rounds to nothing."""
    boxes = np.asarray(ops.draw_resized_crop(keys(50), height, width, ratio=ratio))
    top, left, h, w = boxes.T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    image = np.random.default_rng(0).uniform(size=(50, height, width, 3)).astype(np.float32)
    out = ops.resized_crop(jnp.asarray(image), jnp.asarray(boxes), 8)
    assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("size", [8, 32])
def test_cubic_crop_is_pillows_bicubic(size):
    """cases E, ResNet-18 presets. Grey levels are in the middle, since Pillow also clips between its two passes."""
    image = pytest.importorskip("PIL.Image")
    images = (96 + photo(4) // 4).astype(np.uint8)
    boxes = np.array([[0, 0, 24, 20], [3, 5, 10, 7], [10, 1, 3, 18], [2, 0, 20, 20]])
    crop = jax.jit(functools.partial(ops.resized_crop, cubic=True), static_argnums=2)
    got = np.asarray(crop(unit(images), jnp.asarray(boxes), size))
    for one, (top, left, h, w), out in zip(images, boxes, got, strict=True):
        cut = image.fromarray(one).crop((left, top, left + w, top + h))
        want = np.asarray(cut.resize((size, size), image.Resampling.BICUBIC)) / 255
        np.testing.assert_allclose(out, want, atol=1.2 * BYTE)  # Pillow rounds to bytes twice
    mirrored = crop(unit(images), jnp.asarray(boxes), size, flipped=jnp.ones(4, bool))
    np.testing.assert_allclose(mirrored[:, :, ::-1], got, atol=1e-6)


def test_a_cubic_view_stays_in_its_range():
    """cases E: bicubic weights overshoot at edges."""
    images = jnp.asarray(np.kron(np.indices((6, 6)).sum(0) % 2, np.ones((4, 4)))[None, ..., None] * np.ones(3))
    pipeline = augment.random_view(24, (0.0,) * 3, (1.0,) * 3, interpolation="bicubic", jitter_p=0.0, grayscale=0.0)
    out, _ = pipeline(keys(1), images.astype(jnp.float32))
    assert out.min() == 0 and out.max() == 1
    with pytest.raises(UserError):
        augment.random_view(24, (0.0,) * 3, (1.0,) * 3, interpolation="nearest")
