"""Patch negatives: exactly the released tiling, and the distribution of the draws."""

import functools

import chex
import jax
import numpy as np
import pytest
import tiny

from jaxcl.augment import patch_negatives, patches, tile_patches
from jaxcl.augment.patches import scaled_range
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.views import view_keys

PAPER = "non_semantic_negatives"
S, LOW, HIGH = 12, 2, 5  # of the small images below; LOW and HIGH are the smallest and largest patch
N = S // LOW + 1


def coordinates(side):
    """[S,S,2]: the value of every pixel is its position."""
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).astype(np.int32)


def slow_tiles(image, d, top, left):
    """Reference: the n * n patches side by side, cropped."""
    n = len(top)
    square = np.zeros((n * d, n * d, *image.shape[2:]), image.dtype)
    for a in range(n):
        for b in range(n):
            y, x = top[a, b], left[a, b]
            square[a * d : (a + 1) * d, b * d : (b + 1) * d] = image[y : y + d, x : x + d]
    return square[: len(image), : len(image)]


def padded(table, n):
    return np.pad(table, (0, n - len(table)))


# ---- the core


def test_golden_tiling(golden):
    """With a traced size and more tiles than are used, as inside `patch_negatives`: one program for all sizes."""
    d = golden(PAPER, "patch_tiling")
    chex.clear_trace_counter()
    tile = jax.jit(chex.assert_max_traces(tile_patches, n=2))  # one for each shape of image
    index = np.arange(224 * 224, dtype=np.int32).reshape(224, 224, 1)
    for i in range(4):
        top, left = (padded(d[f"case{i}_{k}"], 15) for k in ("top", "left"))
        got = tile(index, int(d[f"case{i}_d"]), top, left)
        np.testing.assert_array_equal(got[..., 0], d[f"case{i}_src_index"])
    for m in range(3):
        top, left = (padded(d[f"rgb_ns{m}_{k}"], 15) for k in ("top", "left"))
        got = tile(d["rgb_image"], int(d[f"rgb_ns{m}_d"]), top, left)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, d[f"rgb_ns{m}_out"])


def test_golden_tiling_of_other_sizes(golden):
    d = golden(PAPER, "patch_tiling_other_sizes")
    for i in range(2):
        side = int(d[f"case{i}_S"])
        index = np.arange(side * side, dtype=np.int32).reshape(side, side, 1)
        got = tile_patches(index, int(d[f"case{i}_d"]), d[f"case{i}_top"], d[f"case{i}_left"])
        np.testing.assert_array_equal(got[..., 0], d[f"case{i}_src_index"])


def test_tiling_against_the_loop():
    """Every size from one pixel to the whole image."""
    rng, image = np.random.default_rng(0), coordinates(S)
    tile = jax.jit(tile_patches)
    for d in range(1, S + 1):
        top, left = rng.integers(0, S - d + 1, (2, S + 1, S + 1))
        n = S // d + 1
        np.testing.assert_array_equal(tile(image, d, top, left), slow_tiles(image, d, top[:n, :n], left[:n, :n]))


# ---- the draws


@functools.cache
def draws(include_last_offset=False, count=8_000):
    """-> sizes [count], corners [count,2,n,n], turns [count,n,n]."""
    draw = lambda k: patches._draw(k, S, N, LOW, HIGH, include_last_offset, True)  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count)))


def test_sizes_are_uniform_with_both_ends():
    sizes = draws()[0]
    values, counts = np.unique(sizes, return_counts=True)
    assert values.tolist() == list(range(LOW, HIGH + 1))
    expected = len(sizes) / len(values)
    assert np.sum((counts - expected) ** 2 / expected) < 16.3  # chi squared, 3 degrees: 1 in 1000


@pytest.mark.parametrize("include_last_offset", [False, True])
def test_corners_are_uniform_below_the_last(include_last_offset):
    sizes, corners, _ = draws(include_last_offset)
    for d in range(LOW, HIGH + 1):
        room = S - d + include_last_offset
        for axis in range(2):
            got = corners[sizes == d, axis].ravel()
            assert got.min() == 0 and got.max() == room - 1
            share = np.bincount(got) / len(got)
            np.testing.assert_allclose(share, 1 / room, rtol=0.08)
        top, left = corners[sizes == d, 0].ravel(), corners[sizes == d, 1].ravel()
        assert abs(np.corrcoef(top, left)[0, 1]) < 0.02


@functools.cache
def some(count=2, include_last_offset=False, dihedral=False):
    """-> (size, corners, turns) by name, and the negatives of four images of coordinates [4,count,S,S,2]."""
    keys = jax.random.split(jax.random.key(3), 4)
    options = dict(include_last_offset=include_last_offset, dihedral=dihedral)
    images = np.stack([coordinates(S) + 100 * b for b in range(4)])
    out = patch_negatives(keys, images, min_patch=LOW, max_patch=HIGH, count=count, **options)
    folded = jax.vmap(lambda k: jax.vmap(lambda m: jax.random.fold_in(k, m))(np.arange(count)))(keys)
    draw = lambda k: patches._draw(k, S, N, LOW, HIGH, include_last_offset, dihedral)  # noqa: E731
    drawn = jax.jit(jax.vmap(jax.vmap(draw)))(folded)
    return jax.tree.map(np.asarray, (drawn, out, images))


@pytest.mark.parametrize("include_last_offset", [False, True])
def test_negatives_against_the_loop(include_last_offset):
    (size, corners, _), out, images = some(include_last_offset=include_last_offset)
    assert out.shape == (4, 2, S, S, 2) and out.dtype == images.dtype
    for b in range(4):
        for m in range(2):
            n = S // size[b, m] + 1
            top, left = corners[b, m][:, :n, :n]
            np.testing.assert_array_equal(out[b, m], slow_tiles(images[b], size[b, m], top, left))


def test_dihedral_patches_are_turned_windows():
    (size, corners, turn), out, images = some(dihedral=True)
    seen = set()
    for b in range(4):
        for m in range(2):
            d = size[b, m]
            for a in range(S // d):
                for c in range(S // d):
                    y, x = corners[b, m][:, a, c]
                    window = images[b, y : y + d, x : x + d]
                    code = int(turn[b, m][a, c])
                    if code >> 1 & 1:
                        window = window[::-1]
                    if code >> 2 & 1:
                        window = window[:, ::-1]
                    if code & 1:
                        window = window.transpose(1, 0, 2)
                    seen.add(code)
                    np.testing.assert_array_equal(out[b, m, a * d : (a + 1) * d, c * d : (c + 1) * d], window)
    assert seen == set(range(8))


def test_an_image_depends_on_its_own_key_only():
    _, out, images = some()
    keys = jax.random.split(jax.random.key(3), 4)
    options = dict(min_patch=LOW, max_patch=HIGH)
    # The first negative does not depend on the number of negatives.
    np.testing.assert_array_equal(patch_negatives(keys, images, **options), out[:, :1])
    np.testing.assert_array_equal(patch_negatives(keys[2:3], images[2:3], **options), out[2:3, :1])
    np.testing.assert_array_equal(patch_negatives(jax.random.key(3), images, **options), out[:, :1])
    # All images and negatives differ.
    relative = (out - out // 100 * 100).reshape(8, -1)
    assert len(np.unique(relative, axis=0)) == 8
    with jax.enable_x64(True):  # the draws have fixed types
        np.testing.assert_array_equal(patch_negatives(keys, images, **options), out[:, :1])


def test_patches_change_from_step_to_step():
    """Every image has its own stream of patches, by its index and the step."""
    _, _, images = some()
    made = [
        patch_negatives(
            view_keys(jax.random.key(0), step, np.array(index), "ns"), images, min_patch=LOW, max_patch=HIGH
        )
        for step, index in ((0, [5, 6, 7, 8]), (1, [5, 6, 7, 8]), (0, [6, 5, 7, 8]))
    ]
    first, later, swapped = (np.asarray(m) for m in made)
    assert all((a != b).any() for a, b in zip(first, later, strict=True))
    np.testing.assert_array_equal(swapped[2:], first[2:])
    assert (swapped[0] != first[0]).any()


def test_sharded_over_devices():
    """The result is equal on one and on eight devices, and no image leaves its device."""
    images, keys = tiny.normal(8, S, S, 3), jax.random.split(jax.random.key(1), 8)
    make = functools.partial(patch_negatives, min_patch=LOW, max_patch=HIGH, count=2)
    want = make(keys, images)
    rows = sharding.batch_sharding(sharding.make_mesh(8))
    compiled = jax.jit(make, out_shardings=rows).lower(*jax.device_put((keys, images), rows)).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "all-reduce", "permute"))
    np.testing.assert_array_equal(compiled(*jax.device_put((keys, images), rows)), want)


def test_range_scaled_to_the_side():
    got = {side: scaled_range(side) for side in (224, 32, 64, 96, 8)}
    assert got == {224: (16, 72), 32: (2, 10), 64: (5, 21), 96: (7, 31), 8: (1, 3)}


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(min_patch=2, max_patch=12), "max_patch is 12"),
        (dict(min_patch=5, max_patch=4), "min_patch is 5"),
        (dict(min_patch=0, max_patch=4), "min_patch is 0"),
        (dict(min_patch=2.5, max_patch=4), "2.5"),
        (dict(min_patch=2, max_patch=4, count=0), "count is 0"),
        (dict(key=jax.random.key(0, impl="rbg")), "threefry"),
        (dict(key=np.zeros(2, np.uint32)), "jax.random.key"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), "(3,)"),
        (dict(images=np.zeros((2, 12, 10, 3))), "(2, 12, 10, 3)"),
    ],
)
def test_errors(options, words):
    options = dict(key=jax.random.key(0), images=np.zeros((2, S, S, 3)), min_patch=2, max_patch=4) | options
    with pytest.raises(UserError) as error:
        patch_negatives(options.pop("key"), options.pop("images"), **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shape,size,tiles,words",
    [
        ((12, 10, 3), 3, (5, 5), "12, 10, 3"),
        ((12, 12, 3), 13, (1, 1), "size is 13"),
        ((12, 12, 3), 3, (3, 3), "3 tiles"),
        ((12, 12, 3), 3, (5, 4), "5, 4"),
    ],
)
def test_errors_of_the_core(shape, size, tiles, words):
    with pytest.raises(UserError, match=words):
        tile_patches(np.zeros(shape), size, np.zeros(tiles, int), np.zeros(tiles, int))
