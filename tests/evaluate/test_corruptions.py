"""Corruptions against loops that write the published definitions out, and what holds of all of them."""

import colorsys
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import ndimage, stats

from jaxcl.errors import UserError
from jaxcl.evaluate import corruptions
from jaxcl.evaluate.corruptions import corrupt
from jaxcl.evaluate.severities import CONSTANTS, SIDES

S = tiny.SIDE
IMAGES = np.concatenate([tiny.batch(3)["image"], np.zeros((1, S, S, 3), np.uint8)])
IMAGES[3] = np.random.default_rng(0).integers(0, 256, (S, S, 3))
INDEX = np.array([4, 7, 11, 2])


def made(name, severity=5):
    return corrupt(IMAGES, name, severity, INDEX)


def down(pixels):
    return np.floor(np.clip(pixels, 0, 1) * 255 + 1e-3)


def near(name, expected, severity=5):
    """Rounding of floats may move a value over the edge of a level."""
    difference = np.abs(made(name, severity).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("name", corruptions.COMPUTED)
def test_an_image_depends_on_its_index_and_pixels_only(name):
    out = made(name)
    assert out.dtype == np.uint8 and out.shape == IMAGES.shape and (out != IMAGES).any((1, 2, 3)).all()
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(corrupt(IMAGES[order], name, 5, INDEX[order]), out[order])
    other = corrupt(IMAGES, name, 5, INDEX + 1)
    random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (other != out).any((1, 2, 3)).all() == random
    weaker = np.abs(made(name, 1).astype(int) - IMAGES).mean()
    # An elastic deformation moves less, but by finer steps, the more severe it is.
    assert name == "elastic_transform" or weaker < np.abs(out.astype(int) - IMAGES).mean()


def test_the_fifteen_names_and_the_constants_of_those_that_are_computed():
    assert len(corruptions.NAMES) == 15 and set(corruptions.NAMES) - set(corruptions.COMPUTED) == {"frost"}
    assert list(CONSTANTS) == [n for n in corruptions.NAMES if n != "frost"]
    assert all(len(table) == 5 for tables in CONSTANTS.values() for table in tables)
    assert all(len(tables) == len(SIDES) for tables in CONSTANTS.values())


@pytest.mark.parametrize("side, table", [(16, 0), (45, 0), (46, 1), (96, 1), (119, 1), (120, 2), (299, 2)])
def test_the_nearest_set_gives_the_severities(side, table):
    grey = np.full((1, side, side, 3), 100, np.uint8)
    grey[:, 0] = 200
    pixels = grey / 255
    mean = pixels.mean((1, 2), keepdims=True)
    expected = down((pixels - mean) * CONSTANTS["contrast"][table][4] + mean)
    assert np.abs(corrupt(grey, "contrast", 5, np.arange(1)) - expected).max() <= 1


def test_every_severity_and_every_corruption_draws_for_itself(monkeypatch):
    """The keys of a corruption differ by its name, the severity and the image, and by nothing else; cases F."""

    def draws(name, severity):
        monkeypatch.setitem(corruptions._KINDS, name, corruptions._Kind(lambda keys, x: (given.append(keys), x)[1]))
        given = []
        corruptions._corrupt.__wrapped__(name, IMAGES, np.uint32(severity), INDEX, ())
        return [tuple(map(int, k)) for k in np.asarray(jax.random.key_data(given[0]))]

    seen = [
        key for name in corruptions.COMPUTED for severity in corruptions.SEVERITIES for key in draws(name, severity)
    ]
    assert len(set(seen)) == len(seen) == 14 * 5 * len(INDEX)
    assert draws("fog", 3) == draws("fog", 3)


def test_the_noise_of_one_severity_is_not_that_of_another():
    """Nor that of another image or corruption: the same grey image, and no correlation; cases F."""
    grey = np.full((2, 32, 32, 3), 128, np.uint8)
    noise = [corrupt(grey, "gaussian_noise", s, np.arange(2)).reshape(2, -1) for s in (1, 3, 5)]
    noise.append(corrupt(grey, "shot_noise", 5, np.arange(2)).reshape(2, -1))
    correlation = np.corrcoef(np.concatenate(noise)) - np.eye(8)
    assert np.abs(correlation).max() < 5 / (32 * 32 * 3) ** 0.5


# ---- noise


def test_noise_has_the_moments_it_should():
    grey = np.full((2, 32, 32, 3), 100, np.uint8)
    noise = corrupt(grey, "gaussian_noise", 5, np.arange(2)) / 255 - 100 / 255
    assert noise.std() == pytest.approx(0.1, rel=0.05) and abs(noise.mean() + 0.5 / 255) < 0.004
    shots = corrupt(grey, "shot_noise", 5, np.arange(2)) / 255 * 50
    assert shots.mean() == pytest.approx(100 / 255 * 50, rel=0.02) and shots.var() == pytest.approx(
        100 / 255 * 50, rel=0.1
    )
    hit = corrupt(grey, "impulse_noise", 5, np.arange(2))
    assert set(np.unique(hit)) == {0, 100, 255}
    assert (hit != 100).mean() == pytest.approx(0.07, rel=0.1) and (hit == 255).mean() == pytest.approx(0.035, rel=0.2)


@pytest.mark.parametrize("table", [0, 2])
def test_counts_of_photons_are_quantiles_of_the_poisson_distribution(table, monkeypatch):
    rng = np.random.default_rng(1)
    levels, u = rng.integers(0, 256, (2, 4, 4, 3)), rng.random((2, 4, 4, 3)).astype(np.float32)
    monkeypatch.setattr(corruptions, "_draws", lambda *_: u)
    photons = CONSTANTS["shot_noise"][table][0]
    below, _ = corruptions._photons(32, table, photons)
    counts = np.asarray(corruptions._shot_noise(None, levels / 255, jnp.asarray(below, jnp.float32), 1.0))
    np.testing.assert_array_equal(counts, stats.poisson.ppf(u, levels / 255 * photons))


# ---- blur


def test_defocus_blur_is_a_mean_over_a_soft_disk():
    line = range(-8, 9)
    disk = np.array([[float(x * x + y * y <= 1.5**2) for x in line] for y in line])
    disk /= disk.sum()
    soft = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 0.1**2))
    soft = np.outer(soft, soft) / soft.sum() ** 2
    disk = ndimage.correlate(disk, soft, mode="mirror")
    blurred = np.stack([ndimage.correlate(IMAGES / 255, disk[None, :, :, None], mode="mirror")])[0]
    near("defocus_blur", down(blurred))


def test_zoom_blur_is_the_mean_of_the_image_and_its_zooms():
    total, factors = IMAGES / 255, np.arange(1, 1.26, 0.01)
    for factor in factors:
        crop = int(np.ceil(S / factor))
        top = (S - crop) // 2
        zoomed = ndimage.zoom(IMAGES[:, top : top + crop, top : top + crop] / 255, (1, factor, factor, 1), order=1)
        trim = (zoomed.shape[1] - S) // 2
        total = total + zoomed[:, trim : trim + S, trim : trim + S]
    near("zoom_blur", down(total / (len(factors) + 1)))


def test_motion_blur_goes_along_a_line():
    angle, taps = np.array([30.0, -45, 10, 90], np.float32), np.array([0.5, 0.3, 0.2], np.float32)
    x = IMAGES.astype(np.float32)
    expected = np.zeros_like(x)
    for b in range(4):
        for i, tap in enumerate(taps):
            down = int(np.ceil(i * np.sin(np.deg2rad(angle[b])) - 0.5))
            right = int(np.ceil(i * np.cos(np.deg2rad(angle[b])) - 0.5))
            for row in range(S):
                for col in range(S):
                    expected[b, row, col] += tap * x[b, min(max(row + down, 0), S - 1), min(max(col + right, 0), S - 1)]
    np.testing.assert_allclose(corruptions._along(x, angle, taps), expected, rtol=1e-5)
    assert corruptions._taps(0, 6, 1.0).sum() == pytest.approx(1) and len(corruptions._taps(2, 20, 15.0)) == 41


def test_glass_blur_copies_near_pixels_one_after_the_other():
    keys = jax.random.split(jax.random.key(3), 2)
    x = IMAGES[:2] / np.float32(255)
    blur, reach, rounds = corruptions._glass(S, 0, 0.4, 2, 2)
    out = corruptions._glass_blur(keys, x, *(np.asarray(v, np.float32) for v in (blur, reach, rounds)))
    smooth = lambda y: ndimage.gaussian_filter(y, (0, 0.4, 0.4, 0), mode="nearest")  # noqa: E731
    expected = down(smooth(x))
    for b in range(2):
        n = 0
        for _ in range(2):
            for h in range(S - 2, 2, -1):
                for w in range(S - 2, 2, -1):
                    right, below = np.asarray(jax.random.randint(jax.random.fold_in(keys[b], n), (2,), -2, 2))
                    expected[b, h, w] = expected[b, h + below, w + right]
                    n += 1
    np.testing.assert_allclose(out, smooth(expected / 255), atol=2e-3)


@pytest.mark.parametrize("name, low, high", [("motion_blur", -45, 45), ("snow", -135, -45)])
def test_angles_are_uniform_over_the_published_range(name, low, high, monkeypatch):
    """Eighths of the range hold an eighth of the angles each; cases F."""
    angles = []
    monkeypatch.setattr(corruptions, "_along", lambda x, angle, taps: (angles.append(angle), x)[1])
    kind, side, images = corruptions._KINDS[name], 4, np.zeros((4000, 4, 4, 3), np.float32)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), len(images))
    values = kind.prepare(side, 0, *CONSTANTS[name][0][4])
    kind.apply(keys, images, *(np.asarray(v, np.float32) for v in values))
    (angle,) = angles
    share = np.histogram(angle, bins=8, range=(low, high))[0] / len(images)
    np.testing.assert_allclose(share, 1 / 8, atol=0.02)


# ---- weather


@pytest.mark.parametrize("severity", [1, 5])
def test_snow_written_out(severity, monkeypatch):
    """Flakes enlarged, cut off, blurred along an angle, and their half turn, on a paler image; cases F."""
    mean, spread, zoom, threshold, radius, sigma, kept = CONSTANTS["snow"][0][severity - 1]
    rng = np.random.default_rng(3)
    noise, angle = rng.normal(size=(4, S, S, 1)), np.array([-130.0, -100, -80, -50], np.float32)
    monkeypatch.setattr(
        corruptions,
        "_draws",
        lambda draw, keys, shape, **_: angle if draw is jax.random.uniform else noise.astype(np.float32),
    )
    kind = corruptions._KINDS["snow"]
    x = (IMAGES / 255).astype(np.float32)
    values = [np.asarray(v, np.float32) for v in kind.prepare(S, 0, *CONSTANTS["snow"][0][severity - 1])]
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4)
    got = kind.apply(keys, x, *values)

    flakes = mean + spread * noise[..., 0]
    crop = int(np.ceil(S / zoom))
    top = (S - crop) // 2
    flakes = ndimage.zoom(flakes[:, top : top + crop, top : top + crop], (1, zoom, zoom), order=1)
    trim = (flakes.shape[1] - S) // 2
    flakes = flakes[:, trim : trim + S, trim : trim + S]
    flakes = np.where(flakes < threshold, 0, flakes)
    flakes = np.floor(np.clip(flakes, 0, 1) * 255 + 1e-3) / 255
    blurred, taps = np.zeros_like(flakes), np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for b in range(4):
        for i, tap in enumerate(taps):
            down, right = (int(np.ceil(i * f(np.deg2rad(angle[b])) - 0.5)) for f in (np.sin, np.cos))
            rows, cols = (np.clip(np.arange(S) + move, 0, S - 1) for move in (down, right))
            blurred[b] += tap * flakes[b][rows][:, cols]
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    want = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    want = want + blurred[..., None] + blurred[:, ::-1, ::-1, None]
    np.testing.assert_allclose(got, want, atol=2e-3)  # a level of a flake may be rounded the other way
    assert (np.abs(np.asarray(got) - want) > 1e-4).mean() < 0.05
    assert np.abs(blurred - blurred[:, ::-1, ::-1]).max() > 0.05


def test_fog_written_out(monkeypatch):
    """Clouds added to the image, and the sum scaled so that its lightest value stays; cases F."""
    noise = np.random.default_rng(4).uniform(-1, 1, (4, S, S)).astype(np.float32)
    monkeypatch.setattr(corruptions, "_draws", lambda *_, **__: noise)
    strength, decay = CONSTANTS["fog"][0][4]
    x = (IMAGES / 255).astype(np.float32)
    got = np.asarray(corruptions._fog(None, x, strength, decay))
    haze = np.asarray(corruptions._plasma(noise, decay))
    for b in range(4):
        lightest = x[b].max()
        want = (x[b] + strength * haze[b][..., None]) * lightest / (lightest + strength)
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_clouds_are_diamonds_and_squares():
    M, decay = 8, 1.75
    noise = np.random.default_rng(2).uniform(-1, 1, (M, M))
    clouds, step, wobble = np.zeros((M, M)), M, 100.0
    while step >= 2:
        half = step // 2
        at = lambda y, x: clouds[y % M, x % M]  # noqa: E731
        for y in range(half, M, step):
            for x in range(half, M, step):
                around = sum(at(y + dy, x + dx) for dy in (-half, half) for dx in (-half, half))
                clouds[y, x] = around / 4 + wobble**2 * noise[y, x]
        for y in range(0, M, half):
            for x in range(half if y % step == 0 else 0, M, step):
                around = at(y - half, x) + at(y + half, x) + at(y, x - half) + at(y, x + half)
                clouds[y, x] = around / 4 + wobble**2 * noise[y, x]
        step, wobble = half, wobble / decay
    expected = (clouds - clouds.min()) / np.ptp(clouds)
    np.testing.assert_allclose(corruptions._plasma(noise[None].astype(np.float32), decay)[0], expected, atol=1e-5)


def test_brightness_is_more_value():
    expected = np.empty(IMAGES.shape)
    for where in np.ndindex(IMAGES.shape[:3]):
        h, s, v = colorsys.rgb_to_hsv(*(IMAGES[where] / 255))
        expected[where] = colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1))
    near("brightness", down(expected))
    black = np.zeros((1, S, S, 3), np.uint8)
    assert (corrupt(np.repeat(black, 4, 0), "brightness", 5, INDEX) == int(0.3 * 255)).all()


# ---- digital


@pytest.mark.parametrize("severity", [1, 5])
def test_contrast_is_about_the_mean_of_each_channel(severity):
    """Of colourful images, whose channels have means of their own; cases F."""
    pixels, share = IMAGES / 255, CONSTANTS["contrast"][0][severity - 1]
    mean = np.stack([[image[..., c].mean() for c in range(3)] for image in pixels])[:, None, None]
    near("contrast", down((pixels - mean) * share + mean), severity)
    assert np.ptp(mean[0]) > 0.05


def test_impulses_are_salt_and_pepper_where_they_hit(monkeypatch):
    """cases F."""
    u = np.random.default_rng(5).random((2, *IMAGES.shape)).astype(np.float32)
    given = iter(u)
    monkeypatch.setattr(corruptions, "_draws", lambda *_: next(given))
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4)
    got = np.asarray(corruptions._impulse_noise(keys, IMAGES / np.float32(255), 0.3))
    want = np.where(u[0] < 0.3, np.where(u[1] < 0.5, 1.0, 0.0), IMAGES / np.float32(255))
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_an_elastic_image_written_out(monkeypatch):
    """Three corners move, and the image with them, then each pixel by its own field; cases F."""
    strength, smoothness, shift = 1.5, 1.2, 0.9
    rng = np.random.default_rng(6)
    corner_draws, field_draws = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((1, 3, 2), (1, S, S, 2)))
    given = iter([corner_draws, field_draws])
    monkeypatch.setattr(corruptions, "_draws", lambda *_, **__: next(given))
    smooth = corruptions._gaussian(S, smoothness, "reflect", 3)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 1)
    x = (IMAGES[:1] / 255).astype(np.float32)
    got = np.asarray(corruptions._elastic_transform(keys, x, strength, smooth.astype(np.float32), shift))[0]

    middle, half = S // 2, S // 3
    corners = np.array([[middle + half] * 2, [middle + half, middle - half], [middle - half] * 2], float)
    forth = np.linalg.solve(np.c_[corners, np.ones(3)], corners + shift * corner_draws[0])  # (x, y, 1) -> moved
    to = np.r_[forth.T, [[0, 0, 1]]]
    back = np.linalg.inv(to)
    y, across = np.mgrid[:S, :S].astype(float)
    source = np.einsum("ij,jhw->ihw", back, np.stack([across, y, np.ones_like(y)]))
    moved = np.stack(
        [ndimage.map_coordinates(x[0, ..., c], [source[1], source[0]], order=1, mode="mirror") for c in range(3)], -1
    )
    field = [
        strength * ndimage.gaussian_filter(field_draws[0, ..., i], smoothness, mode="reflect", truncate=3)
        for i in range(2)
    ]
    places = [y + field[1], across + field[0]]
    want = np.stack([ndimage.map_coordinates(moved[..., c], places, order=1, mode="reflect") for c in range(3)], -1)
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize("mode", ["mirror", "reflect"])
def test_looking_up_between_pixels(mode):
    rng = np.random.default_rng(4)
    image, (y, x) = rng.random((S, S, 3)), rng.uniform(-20, 36, (2, 5, 6))
    inside = {
        "mirror": lambda i: S - 1 - abs(S - 1 - i % (2 * S - 2)),
        "reflect": lambda i: np.minimum(i % (2 * S), 2 * S - 1 - i % (2 * S)),
    }[mode]
    expected = np.stack([ndimage.map_coordinates(image[..., c], [y, x], order=1, mode=mode) for c in range(3)], -1)
    np.testing.assert_allclose(corruptions._look_up(image, y, x, inside), expected, atol=1e-5)


def test_an_elastic_image_without_strength_or_shift_is_the_image(monkeypatch):
    x = (IMAGES[:2] / 255).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    same = corruptions._elastic_transform(keys, x, 0.0, np.eye(S, dtype=np.float32), 0.0)
    np.testing.assert_allclose(same, x, atol=1e-4)
    # A whole pixel to the right and below, everywhere: corners move alike, and so does the field.
    monkeypatch.setattr(corruptions, "_draws", lambda draw, keys, shape, **_: np.ones((2, *shape), np.float32))
    moved = np.asarray(corruptions._elastic_transform(keys, x, 0.0, np.eye(S, dtype=np.float32), 1.0))
    np.testing.assert_allclose(moved[:, 1:, 1:], x[:, :-1, :-1], atol=1e-4)
    moved = np.asarray(corruptions._elastic_transform(keys, x, 2.0, np.eye(S, dtype=np.float32), 0.0))
    np.testing.assert_allclose(moved[:, :-2, :-2], x[:, 2:, 2:], atol=1e-4)


def test_pillow_does_the_rest():
    out, jpeg = made("pixelate"), made("jpeg_compression")
    for i, image in enumerate(map(Image.fromarray, IMAGES)):
        small = image.resize((int(S * 0.65),) * 2, Image.Resampling.BOX)
        np.testing.assert_array_equal(out[i], np.asarray(small.resize((S, S), Image.Resampling.BOX)))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=40)
        np.testing.assert_array_equal(jpeg[i], np.asarray(Image.open(file)))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((IMAGES, "frost", 1), "name is 'frost'"),
        ((IMAGES, "rain", 1), "name is 'rain'"),
        ((IMAGES, "fog", 6), "severity is 6"),
        ((IMAGES / 255, "fog", 1), "takes uint8 images"),
        ((IMAGES[:, :8], "fog", 1), "takes uint8 images"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(UserError) as error:
        corrupt(*arguments, INDEX)
    assert words in str(error.value) and "\n" not in str(error.value)
