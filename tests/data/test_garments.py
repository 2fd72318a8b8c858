"""garments: true labels and masks, independent draws, and the effect of its options."""

import numpy as np
import pytest

from jaxcl.data import garments, make_source, moments, patterns
from jaxcl.data.fashion_mnist import photos


@pytest.fixture(scope="module")
def train():
    return make_source("garments")


@pytest.fixture(scope="module")
def test():
    return make_source("garments", split="test")


@pytest.fixture(scope="module")
def free():
    return make_source("garments", limit=1000)


def test_shape_labels_and_extras(train, test):
    assert (len(train), len(test)) == (10_000, 2_000) and train.image_shape == (32, 32, 3)
    assert np.bincount(train.labels).tolist() == [1000] * 10
    for source in (train, test):
        assert source.extras["mask"].dtype == bool and source.extras["mask"].shape == (len(source), 32, 32)
        assert source.labelled and source.num_classes == 10
    names = dict(zip(train.class_names, np.array(train.coarse_names)[garments.COARSE_OF_CLASS], strict=True))
    assert names["Shirt"] == names["Dress"] == "upper body" and names["Trouser"] == "trousers"
    assert names["Sandal"] == names["Ankle boot"] == "footwear" and names["Bag"] == "bag"
    assert (train.extras["coarse"] == garments.COARSE_OF_CLASS[train.labels]).all()
    assert np.bincount(train.extras["background"]).shape == (10,) and np.bincount(train.extras["tint"]).shape == (8,)


def test_published_moments_are_those_of_the_training_images(train):
    mean, std = moments.moments(train.images)
    np.testing.assert_allclose(train.mean, mean, atol=1e-4)
    np.testing.assert_allclose(train.std, std, atol=1e-4)


def test_an_image_follows_from_its_place_alone(train):
    few = make_source("garments", limit=40, seed=5)
    whole = {image.tobytes(): i for i, image in enumerate(train.images)}
    rows = [whole[image.tobytes()] for image in few.images]  # made in other blocks, with another seed
    for key, values in few.extras.items():
        assert (values == train.extras[key][rows]).all(), key
    assert (few.labels == train.labels[rows]).all() and np.bincount(few.labels).tolist() == [4] * 10
    assert len(whole) == len(train)


def test_mask_is_the_object(train):
    area = train.extras["mask"].mean((1, 2))
    assert 0.02 < area.min() and area.max() < 0.8 and 0.1 < area.mean() < 0.4
    # Outside the mask's neighbourhood an image is background: with a plain one, a single colour.
    source = make_source("garments", split="cue_conflict", spurious_on="fill", limit=200)
    for image, mask in zip(source.images, source.extras["mask"], strict=True):
        grown = mask.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                grown |= np.roll(grown, step, axis)
        outside = image[~grown]
        inside = image[mask].astype(int)
        assert len(outside) == 0 or np.ptp(outside, 0).max() <= 1
        assert len(outside) == 0 or (np.abs(inside - outside[0]).max(1) > 20).mean() > 0.9


def test_mask_agrees_with_the_photo(test):
    """A slow placement of one photo: the mask's area scales like the photo's."""
    shading, cover = garments._cut_out("test")
    scale = (
        0.7 + 0.3 * garments.hashing.uniforms(garments._GENERATOR, garments._PLACE, 10_000 + np.arange(200), 4)[:, 0]
    )
    expected = cover[:200].sum((1, 2)) * scale**2
    np.testing.assert_allclose(test.extras["mask"][:200].sum((1, 2)), expected, rtol=0.15, atol=12)
    assert shading.min() >= 0 and shading.max() <= 1 and not shading[~cover].any()


def test_small_holes_are_cloth_and_large_ones_are_not(monkeypatch):
    photo = np.zeros((1, 28, 28), np.uint8)
    photo[0, 4:24, 4:24] = 200
    photo[0, 6:8, 6:8] = 0  # four dark pixels: a button
    photo[0, 12:20, 10:18] = 0  # sixty-four: under a handle
    monkeypatch.setattr(garments, "photos", lambda: {"tiny_images": photo})
    _, cover = garments._cut_out.__wrapped__("tiny")
    assert cover[0, 6:8, 6:8].all() and not cover[0, 12:20, 10:18].any() and cover.sum() == 400 - 64


def test_polarity_leaves_no_class_in_the_mean_pixel(train):
    """Class means of raw pixels are nearly flat, so a linear probe on them does badly."""
    grey = train.images.mean(-1) / 255
    means = np.stack([grey[train.labels == c].mean(0) for c in range(10)])
    assert means.std(0).max() < 0.12 * grey.std(0).mean() + 0.03
    plain = photos()["train_images"] / 255
    flat = np.stack([plain[photos()["train_labels"] == c].mean(0) for c in range(10)])
    assert flat.std(0).max() > 5 * means.std(0).max()


def test_draws_are_independent_of_the_class(train, test):
    for source in (train, test):
        for key, count in (("background", 10), ("tint", 8)):
            table = np.histogram2d(source.labels, source.extras[key], (10, count))[0]
            expected = len(source) / table.size
            assert ((table - expected) ** 2 / expected).sum() < table.size + 5 * np.sqrt(2 * table.size), key
    assert 0.45 < (train.extras["fill"] == patterns.PLAIN).mean() < 0.55


@pytest.mark.parametrize("where", ["background", "fill"])
@pytest.mark.parametrize("spurious", [0.0, 0.8, 1.0])
def test_spurious_ties_texture_to_class_in_training_only(where, spurious, free):
    tied = make_source("garments", spurious=spurious, spurious_on=where, limit=1000)
    share = (tied.extras[where] == garments.TEXTURE_OF_CLASS[tied.labels]).mean()
    chance = 0.1 if where == "background" else 0.05
    assert abs(share - (spurious + (1 - spurious) * chance)) < 0.05
    own = tied.extras[where] == garments.TEXTURE_OF_CLASS[tied.labels]
    assert (tied.extras[where][~own] == free.extras[where][~own]).all()
    if spurious:  # whether a row is tied does not depend on its free draw
        moved = own & (free.extras[where] != garments.TEXTURE_OF_CLASS[free.labels])
        assert set(range(10)) <= set(free.extras[where][moved].tolist())
    assert (tied.extras["mask"] == free.extras["mask"]).all()  # the same photos in the same places
    other = "fill" if where == "background" else "background"
    assert (tied.extras[other] == free.extras[other]).all() and (tied.extras["tint"] == free.extras["tint"]).all()
    if spurious == 0:
        assert (tied.images == free.images).all()
    a = make_source("garments", split="test", spurious=spurious, spurious_on=where, limit=100)
    b = make_source("garments", split="test", limit=100)
    assert (a.images == b.images).all()


def test_shifted_split_has_the_photos_of_test_in_unseen_dress(test):
    shifted = make_source("garments", split="test_shifted")
    assert (shifted.labels == test.labels).all() and (shifted.extras["mask"] == test.extras["mask"]).all()
    names = {garments.BACKGROUNDS[b] for b in np.unique(shifted.extras["background"])}
    assert names == {"waves", "rays", "triangles", "marble"}
    assert shifted.extras["tint"].min() >= 8 and shifted.extras["tint"].max() < len(garments.TINTS)
    assert shifted.images.std() < test.images.std()
    assert shifted.mean == test.mean


@pytest.mark.parametrize("where", ["background", "fill"])
def test_cue_conflict_pairs_a_shape_with_the_texture_of_another_class(test, where):
    source = make_source("garments", split="cue_conflict", spurious_on=where)
    shape, texture = source.extras["shape"], source.extras["texture"]
    assert (shape == test.labels).all() and (source.labels == shape).all() and (shape != texture).all()
    assert (np.bincount(texture, minlength=10) > 150).all()
    assert (source.extras["fill"] == garments.TEXTURE_OF_CLASS[texture]).all()
    expected = garments.TEXTURE_OF_CLASS[texture] if where == "background" else patterns.PLAIN
    assert (source.extras["background"] == expected).all()
    assert len(set(garments.TEXTURE_OF_CLASS.tolist())) == 10  # otherwise a texture could indicate two classes


@pytest.mark.parametrize("number", range(len(patterns.ALL)))
def test_textures_fill_their_range_and_differ_by_draw(number):
    u = np.random.default_rng(0).random((64, patterns.NUMBERS), np.float32)
    field = patterns.draw(np.full(64, number), u, 32)
    assert field.shape == (64, 32, 32) and field.dtype == np.float32
    assert field.min() >= 0 and field.max() <= 1
    if number != patterns.PLAIN:
        assert field.std((1, 2)).min() > 0.05 and 0.15 < field.mean() < 0.8
        assert np.abs(field[0] - field[1]).max() > 0.3


def test_tints_keep_their_hue_family():
    rgb = garments._colour(garments.HUE_CENTRES, np.full(8, 0.9, np.float32), np.linspace(0.1, 0.8, 8))
    np.testing.assert_allclose(rgb @ [0.299, 0.587, 0.114], np.linspace(0.1, 0.8, 8), atol=1e-5)
    assert rgb.min() >= 0 and rgb.max() <= 1 + 1e-6
    red, green, blue = rgb[0], rgb[3], rgb[5]
    assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2
