"""Sampled textures: every pixel is a copy of an exemplar, the search equals a loop, and images are independent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.augment import sampling
from jaxcl.augment.quilting import pack
from jaxcl.augment.sampling import Search, choose, make_search, sample_texture
from jaxcl.errors import UserError
from jaxcl.method import sharding

SMALL = dict(exemplar=6, radius=1, randoms=3, passes=1)


def colours(n, height=12, width=14, seed=0):
    """Images with a different colour at every pixel."""
    index = np.random.default_rng(seed).permutation(height * width * n).reshape(n, height, width)
    return np.stack([index % 256, index // 256, 90 + index % 7], -1).astype(np.uint8)


def stripes(n=3, side=24):
    x, y = np.mgrid[:side, :side]
    wave = np.stack([128 + 100 * np.sign(np.sin((x + k * y) / 2)) for k in range(n)])
    noise = np.random.default_rng(0).integers(-8, 9, (n, side, side, 3))
    return np.clip(wave[..., None] + noise, 0, 255).astype(np.uint8)


@functools.cache
def small():
    images, keys = colours(3), jax.random.split(jax.random.key(3), 3)
    return images, keys, np.asarray(sample_texture(keys, images, **SMALL))


def test_published_sizes():
    assert make_search("", (224, 224, 3)) == (96, 3, 16, 2)
    got = {side: make_search("", (side, side, 3)).spacings for side in (224, 96, 64, 32)}
    assert got == {224: (16, 8, 4, 2, 1), 96: (8, 4, 2, 1), 64: (4, 2, 1), 32: (2, 1)}
    assert len(make_search("", (224, 224, 3)).neighbours) == 48


def test_every_pixel_is_a_copy_of_an_exemplar_pixel():
    images, _, textures = small()
    assert textures.shape == images.shape and textures.dtype == np.uint8
    outside = []
    for image, texture in zip(images, textures, strict=True):
        place = {tuple(pixel): divmod(i, 14) for i, pixel in enumerate(image.reshape(-1, 3).tolist())}
        used = np.array(sorted({place[tuple(pixel)] for pixel in texture.reshape(-1, 3).tolist()}))
        centre = ((used >= (3, 4)) & (used < (9, 10))).all(1)  # in the exemplar at the centre
        other = used[~centre]
        assert centre.sum() > 3 and (not len(other) or (np.ptp(other, axis=0) < 6).all())
        outside.append(len(other))
    assert max(outside) > 3


def slow_choose(source, picks, top, left, colour, h, search):
    """Reference, point by point. colour: [2, E, E, C] integers."""
    E, s, r = search.exemplar, search.step, search.radius
    rows, columns = source.shape
    near = [(a, b) for a in range(-r, r + 1) for b in range(-r, r + 1) if a or b]
    mean = np.mean([a * a + b * b for a, b in near])
    new, n = source.copy(), 0
    for y in range(top, top + s * -(-rows // s), s):
        for x in range(left, left + s * -(-columns // s), s):
            candidates = list(picks[:, n])
            n += 1
            if y >= rows or x >= columns:
                continue
            coherent = []
            for a, b in [(0, 0), *((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)]:
                if 0 <= y + a < rows and 0 <= x + b < columns:
                    which, row, column = np.unravel_index(source[y + a, x + b], (2, E, E))
                    row, column = row - h * a, column - h * b
                    if 0 <= row < E and 0 <= column < E:
                        coherent.append((which * E + row) * E + column)
            best = np.inf
            for candidate in coherent + candidates:
                which, row, column = np.unravel_index(candidate, (2, E, E))
                cost = 0.0
                for a, b in near:
                    if not (0 <= y + a < rows and 0 <= x + b < columns):
                        continue
                    there = colour[np.unravel_index(source[y + a, x + b], (2, E, E))]
                    inside = 0 <= row + h * a < E and 0 <= column + h * b < E
                    own = colour[which, row + h * a, column + h * b] if inside else np.zeros_like(there)
                    cost += np.exp(-(a * a + b * b) / mean) * np.log1p(((there - own) / 255.0) ** 2).sum()
                if cost < best - 1e-7:
                    best, new[y, x] = cost, candidate
    return new


@pytest.mark.parametrize("h, radius", [(1, 2), (2, 1)])
def test_the_search_against_the_loop(h, radius):
    rng = np.random.default_rng(h)
    search = Search(exemplar=7, radius=radius, randoms=4, passes=1)
    colour = rng.integers(0, 256, (2, 7, 7, 3))
    source = rng.integers(0, 98, (8, 9)).astype(np.int32)
    table = pack(jnp.asarray(colour.reshape(14, 7, 3), jnp.uint8))
    run = jax.jit(lambda s, p, top, left: choose(s, p, top, left, table, h, search))
    changed = 0
    for n in range(search.step**2):
        top, left = divmod(n, search.step)
        picks = rng.integers(0, 98, (4, -(-8 // search.step) * -(-9 // search.step))).astype(np.int32)
        want = slow_choose(source, picks, top, left, colour, h, search)
        got = np.asarray(run(source, picks, top, left))
        np.testing.assert_array_equal(got, want)
        changed += (got != source).sum()
        source = got
    assert changed > 20


def test_points_of_a_sub_lattice_do_not_see_each_other():
    for radius in (1, 2, 3):
        search = Search(14, radius, 1, 1)
        assert np.abs(search.neighbours).max() < search.step


def test_neighbourhoods_look_like_the_exemplars():
    """Distances of 3 x 3 windows to their nearest window in the image: far below those of shuffled pixels."""
    images = stripes()
    textures = np.asarray(sample_texture(jax.random.key(0), images))
    shuffled = np.stack([np.random.default_rng(1).permutation(t.reshape(-1, 3)).reshape(t.shape) for t in textures])

    def windows(x):
        return np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1)).reshape(-1, 27).astype(np.float32)

    for image, texture, chance in zip(images, textures, shuffled, strict=True):
        near = [((windows(t)[:, None] - windows(image)) ** 2).sum(-1).min(1).mean() for t in (texture, chance)]
        assert near[0] < 0.2 * near[1]
        assert (texture != image).any((0, 1)).all()


def test_an_image_depends_on_its_own_key_only():
    images, keys, want = small()
    np.testing.assert_array_equal(sample_texture(jax.random.key(3), images, **SMALL), want)
    same = np.asarray(sample_texture(keys, images[[1, 1, 1]], **SMALL))
    np.testing.assert_array_equal(same[1], want[1])
    assert (same[0] != same[1]).any() and (same[1] != same[2]).any()


def test_every_level_draws_for_itself(monkeypatch):
    """cases F."""
    given = []
    monkeypatch.setattr(sampling, "_level", lambda key, source, *_: (given.append(jax.random.key_data(key)), source)[1])
    search = make_search("", (32, 32, 3))
    sampling._sampled(jax.random.key(0), jnp.asarray(colours(1, 32, 32)[0]), search)
    assert len(given) == len(search.spacings) == 2 and (given[0] != given[1]).any()


def test_sharded_over_devices():
    images, keys = colours(8, 8, 8), jax.random.split(jax.random.key(1), 8)
    make = functools.partial(sample_texture, exemplar=4, radius=2, randoms=2, passes=1)
    rows = sharding.batch_sharding(sharding.make_mesh(8))
    compiled = jax.jit(make, out_shardings=rows).lower(*jax.device_put((keys, images), rows)).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "all-reduce", "permute"))
    np.testing.assert_array_equal(compiled(*jax.device_put((keys, images), rows)), make(keys, images))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(exemplar=13), "exemplar is 13"),
        (dict(exemplar=6, radius=4), "radius is 4"),
        (dict(passes=0), "passes 0"),
        (dict(images=np.zeros((1, 12, 12, 3), np.float32)), "float32"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), "(3,)"),
    ],
)
def test_errors(options, words):
    options = dict(key=jax.random.key(0), images=np.zeros((1, 12, 14, 3), np.uint8)) | options
    with pytest.raises(UserError) as error:
        sample_texture(options.pop("key"), options.pop("images"), **options)
    assert words in str(error.value) and "\n" not in str(error.value)
