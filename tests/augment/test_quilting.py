"""Quilted textures: every pixel is a copy, and no seam costs more than a straight cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.augment import quilt_texture, quilting
from jaxcl.augment.quilting import Layout, exemplar_corners, make_layout, minimum_error_path
from jaxcl.errors import UserError
from jaxcl.method import sharding

PAPER = "non_semantic_negatives"
SMALL = dict(exemplar=9, patch=5, overlap=2, candidates=6)
LAYOUT = Layout(9, 5, 2)
H, W = 18, 22  # 6 x 7 patches cover 20 x 23, so the quilt is cropped
TOLERANCE = 0.1


def photo(n=3, height=H, width=W, seed=0):
    """Smooth colours with some noise, uint8, so that some patches fit better than others."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 5.0
    phase = rng.uniform(0, 6, (2, n, 1, 1, 3))
    waves = np.sin(y[..., None] + phase[0]) + np.cos(x[..., None] + phase[1])
    return np.clip(128 + 50 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


# ---- sizes and exemplars


def test_golden_exemplar_boxes(golden):
    d = golden(PAPER, "texture_exemplar_boxes")
    for i in range(len(d["height"])):
        u = np.array([d["u_h"][i], d["u_w"][i]])
        got = exemplar_corners(int(d["height"][i]), int(d["width"][i]), int(d["size"]), u)
        want = [[d["centre_top"][i], d["centre_left"][i]], [d["random_top"][i], d["random_left"][i]]]
        np.testing.assert_array_equal(got, want)


def test_exemplars_stay_inside():
    corners = jax.vmap(lambda u: exemplar_corners(32, 45, 14, u))(np.array([[0, 0], [1, 1 - 2**-23]], np.float32))
    assert corners[0, 1].tolist() == [0, 0] and corners[1, 1].tolist() == [18, 30]
    assert exemplar_corners(14, 14, 14, np.zeros(2)).tolist() == [[0, 0], [0, 0]]


def test_published_layouts():
    got = {side: tuple(make_layout("", (side, side, 3))) for side in (32, 96, 224, 28)}
    assert got == {32: (14, 8, 2), 96: (41, 16, 6), 224: (96, 32, 8), 28: (12, 8, 3)}
    for side, patches in ((32, 5), (96, 9), (224, 9), (28, 5)):  # these fit exactly
        layout = Layout(*got[side])
        assert layout.grid(side, side) == (patches, patches) and patches * layout.step + layout.overlap == side
    for side in range(4, 300):
        layout = make_layout("", (side, side, 3))
        assert min(layout.grid(side, side)) * layout.step + layout.overlap >= side


# ---- the cut


def slow_path(errors):
    """Reference: the path of least cost. Among equals, the leftmost in the last row, then straight, then left."""
    rows, lap = errors.shape
    total = errors.astype(np.int64)
    for r in range(1, rows):
        for c in range(lap):
            total[r, c] += total[r - 1, max(0, c - 1) : c + 2].min()
    path = [int(total[-1].argmin())]
    for r in range(rows - 2, -1, -1):
        c = path[0]
        path.insert(0, min((x for x in (c, c - 1, c + 1) if 0 <= x < lap), key=lambda x: total[r, x]))
    return np.array(path)


def cost_of(errors, path):
    return errors[np.arange(len(path)), path].sum()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("shape", [(7, 4), (5, 1), (1, 3), (12, 2)])
def test_path_of_least_error(shape, dtype):
    errors = np.random.default_rng(1).integers(0, 60, (40, *shape)).astype(dtype)
    paths = np.asarray(jax.jit(minimum_error_path)(errors))
    assert paths.shape == (40, shape[0]) and paths.dtype == np.int32
    assert paths.min() >= 0 and paths.max() < shape[1] and np.abs(np.diff(paths)).max(initial=0) <= 1
    better = 0
    for e, path in zip(errors, paths, strict=True):
        want, straight = slow_path(e), e.sum(0).min()
        np.testing.assert_array_equal(path, want)
        assert cost_of(e, path) <= straight
        better += cost_of(e, path) < straight
    assert better > 10 or min(shape) == 1


def test_path_against_all_paths():
    """Against every path of a strip of 5 x 3."""
    paths = [p for p in itertools.product(range(3), repeat=5) if np.abs(np.diff(p)).max() <= 1]
    for e in np.random.default_rng(2).integers(0, 60, (20, 5, 3)):
        assert cost_of(e, slow_path(e)) == min(cost_of(e, p) for p in paths)


def test_path_of_equal_errors_is_straight():
    assert minimum_error_path(np.zeros((6, 3), np.int32)).tolist() == [0] * 6


# ---- the quilt


def slow_quilt(image, corners, picks, layout):
    """Reference, patch by patch: (texture, linear indices, taken, seams); a seam is (cost, cost of a straight cut)."""
    E, P, L = layout
    height, width = image.shape[:2]
    index = np.arange(height * width).reshape(height, width)
    exemplars = [index[t : t + E, left : left + E] for t, left in corners]
    pixels = image.reshape(-1, image.shape[-1]).astype(np.int64)
    rows, cols = layout.grid(height, width)
    canvas = np.full((rows * layout.step + L, cols * layout.step + L), -1)
    taken, seams, places = [], [], E - P + 1
    for n in range(rows * cols):
        i, j = divmod(n, cols)
        y, x = i * layout.step, j * layout.step
        old = canvas[y : y + P, x : x + P]
        patches = []
        for pick in picks[n]:
            which, (top, left) = pick // places**2, divmod(pick % places**2, places)
            patches.append(exemplars[which][top : top + P, left : left + P])
        known = old >= 0
        errors = [np.where(known, ((pixels[new] - pixels[old]) ** 2).sum(-1), 0) for new in patches]
        costs = np.array([e.sum() for e in errors])
        k = int(np.flatnonzero(costs <= costs.min() * (1 + TOLERANCE))[0])
        taken.append(k)
        keep = np.zeros((P, P), bool)
        for there, strip, turned in ((j > 0, errors[k][:, :L], False), (i > 0, errors[k][:L].T, True)):
            if there:
                path = slow_path(strip)
                seams.append((cost_of(strip, path), strip.sum(0).min()))
                side = np.arange(P) < path[:, None]
                keep |= side.T if turned else side
        canvas[y : y + P, x : x + P] = np.where(keep & known, old, patches[k])
    source = canvas[:height, :width]
    return image.reshape(-1, image.shape[-1])[source], source, np.array(taken), np.array(seams)


@functools.cache
def small():
    """-> images, their keys, and their textures from `quilt_texture`."""
    images, keys = photo(), jax.random.split(jax.random.key(7), 3)
    return images, keys, np.asarray(quilt_texture(keys, images, tolerance=TOLERANCE, **SMALL))


def test_against_the_loop():
    images, keys, textures = small()

    @jax.jit
    @jax.vmap
    def core(key, image):
        drawn = quilting._draw(key, image.shape, LAYOUT, SMALL["candidates"])
        return *drawn, *quilting.quilt_sources(image, *drawn, layout=LAYOUT, tolerance=TOLERANCE)

    seams = []
    for image, texture, *made in zip(images, textures, *map(np.asarray, core(keys, images)), strict=True):
        corners, picks, source, taken = made
        want = slow_quilt(image, corners, picks, LAYOUT)
        np.testing.assert_array_equal(taken, want[2])
        np.testing.assert_array_equal(source, want[1])
        np.testing.assert_array_equal(texture, want[0])
        assert len(np.unique(taken)) > 3
        seams.append(want[3])
    cost, straight = np.concatenate(seams).T
    assert (cost <= straight).all() and (cost < straight).mean() > 0.3


def unique_pixels(n, height, width):
    """Images with a different colour at every pixel."""
    index = np.random.default_rng(2).permutation(height * width * n).reshape(n, height, width)
    return np.stack([index % 256, index // 256 % 256, index // 2**16], -1).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_pixel_is_a_copy_of_an_exemplar_pixel(dtype):
    images, key = unique_pixels(2, 28, 28), jax.random.key(4)
    given = images if dtype == np.uint8 else images.astype(dtype) / 255
    textures = np.asarray(quilt_texture(key, given))
    assert textures.shape == given.shape and textures.dtype == dtype
    layout = make_layout("", images.shape[1:])
    for image, texture, k in zip(given, textures, jax.random.split(key, 2), strict=True):
        corners, _ = quilting._draw(k, image.shape, layout, 32)
        E = layout.exemplar
        allowed = [{tuple(p) for p in image[t : t + E, x : x + E].reshape(-1, 3)} for t, x in np.asarray(corners)]
        used = {tuple(p) for p in texture.reshape(-1, 3)}
        assert used <= allowed[0] | allowed[1]
        assert used & (allowed[0] - allowed[1]) and used & (allowed[1] - allowed[0])  # both exemplars
    if dtype == np.float32:  # the choice depends on the 8-bit values only
        np.testing.assert_array_equal(np.rint(textures * 255), quilt_texture(key, images))


def test_an_image_depends_on_its_own_key_only():
    images, keys, want = small()
    options = SMALL | dict(tolerance=TOLERANCE)
    np.testing.assert_array_equal(quilt_texture(jax.random.key(7), images, **options), want)
    np.testing.assert_array_equal(quilt_texture(keys[1:2], images[1:2], **options), want[1:2])
    same = np.asarray(quilt_texture(keys, images[[0, 0, 0]], **options))
    assert (same[0] != same[1]).any() and (same[1] != same[2]).any()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(quilt_texture(keys, images, **options), want)


def test_tolerance_zero_takes_the_best():
    image = photo(1)[0]

    @jax.jit
    def taken(tolerance):
        drawn = quilting._draw(jax.random.key(0), image.shape, LAYOUT, 6)
        return quilting.quilt_sources(jnp.asarray(image), *drawn, layout=LAYOUT, tolerance=tolerance)[1]

    best, loose = taken(0.0), taken(1e9)
    assert loose.max() == 0 and len(np.unique(best)) > 3  # a large tolerance accepts the first candidate
    assert best[0] == 0


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(channels):
    """More than four channels do not fit a word; equal channels must give the texture of one channel."""
    gray = photo(1)[..., :1]
    images = np.repeat(gray, channels, -1)
    got = np.asarray(quilt_texture(jax.random.key(2), images, **SMALL, tolerance=0))
    np.testing.assert_array_equal(got, np.repeat(got[..., :1], channels, -1))
    np.testing.assert_array_equal(got[..., :1], quilt_texture(jax.random.key(2), gray, **SMALL, tolerance=0))


def test_sharded_over_devices():
    images = np.concatenate([photo(4), photo(4, seed=1)])
    keys = jax.random.split(jax.random.key(1), 8)
    make = functools.partial(quilt_texture, **SMALL)
    want = make(keys, images)
    rows = sharding.batch_sharding(sharding.make_mesh(8))
    compiled = jax.jit(make, out_shardings=rows).lower(*jax.device_put((keys, images), rows)).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "all-reduce", "permute"))
    np.testing.assert_array_equal(compiled(*jax.device_put((keys, images), rows)), want)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(exemplar=19), "exemplar is 19"),
        (dict(exemplar=0), "exemplar is 0"),
        (dict(exemplar=6, patch=7), "patch is 7"),
        (dict(patch=1), "patch is 1"),
        (dict(patch=5, overlap=3), "overlap is 3"),
        (dict(patch=5, overlap=0), "overlap is 0"),
        (dict(patch=5.0), "patch is 5.0"),
        (dict(candidates=0), "candidates is 0"),
        (dict(tolerance=-0.1), "tolerance -0.1"),
        (dict(images=np.zeros((2, 2, 2, 3), np.uint8)), "an exemplar of 1 pixel"),
        (dict(images=np.zeros((2, 18, 18, 3), np.int32)), "int32"),
        (dict(images=np.zeros((18, 18, 3))), "(18, 18, 3)"),
        (dict(images=np.zeros((1, 400, 400, 60), np.float32), patch=100), "patch 100"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), "(3,)"),
    ],
)
def test_errors(options, words):
    options = dict(key=jax.random.key(0), images=np.zeros((2, 18, 22, 3), np.uint8)) | options
    with pytest.raises(UserError) as error:
        quilt_texture(options.pop("key"), options.pop("images"), **options)
    assert words in str(error.value) and "\n" not in str(error.value)
