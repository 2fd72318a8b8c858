"""Near-duplicates against loops over all pairs; copies of every kind; sets of nothing, of one image, of one picture."""

import csv
import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxcl.data import make_source
from jaxcl.data.originals import Originals, originals
from jaxcl.evaluate import duplicates as module
from jaxcl.evaluate import near_duplicates, structure
from jaxcl.evaluate.duplicate_table import Row, table
from jaxcl.evaluate.duplicates import Pair, complete_linkage
from jaxcl.report import duplicates as section


def photo(seed, size=(96, 96), detail=7):
    """A smooth random picture of any size; the seed is what it shows."""
    small = np.random.default_rng(seed).integers(0, 256, (detail, detail, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def thumbnails(images, side=64):
    squares = np.stack(
        [np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)) for image in images]
    )
    return np.asarray(structure.thumbnail(squares.astype(np.float32) / 255))


def found_in(images, **options):
    aspect = np.array([image.width / image.height for image in images])
    return near_duplicates(thumbnails(images), aspect, **options)


def slow_linkage(pairs):
    """Complete linkage by its definition: of all pairs of groups, join the most alike, until none may be joined."""
    score = {frozenset(p[:2]): p.score for p in pairs}
    groups = sorted({(i,) for p in pairs for i in p[:2]})
    while True:
        best = None
        for a, b in itertools.combinations(groups, 2):
            between = [score.get(frozenset(ij), -1) for ij in itertools.product(a, b)]
            if min(between) >= 0 and (best is None or min(between) > best[0]):
                best = (min(between), a, b)
        if best is None:
            return [list(g) for g in groups if len(g) > 1]
        groups = sorted([g for g in groups if g not in best[1:]] + [tuple(sorted(best[1] + best[2]))])


@pytest.mark.parametrize("seed", range(8))
def test_complete_linkage_by_its_definition(seed):
    rng = np.random.default_rng(seed)
    score = rng.random((12, 12)) if seed % 2 else rng.integers(1, 4, (12, 12)) / 4  # many equal ones
    pairs = [Pair(i, j, float(score[i, j])) for i, j in itertools.combinations(range(12), 2) if rng.random() < 0.6]
    groups = complete_linkage(pairs)
    assert groups == slow_linkage(pairs) and groups
    have = {p[:2] for p in pairs}
    for group in groups:
        assert set(itertools.combinations(group, 2)) <= have
    assert complete_linkage([]) == []


def test_a_chain_is_no_group():
    pairs = [Pair(0, 1, 0.9), Pair(1, 2, 0.95), Pair(2, 3, 0.8)]
    assert complete_linkage(pairs) == [[1, 2]]


def test_coarse_candidates_by_a_loop(monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", 5)
    monkeypatch.setattr(module, "_BANK", 7)
    monkeypatch.setattr(module, "CANDIDATES", 3)
    monkeypatch.setattr(module, "COARSELY_ALIKE", -1)
    x, parts = thumbnails([photo(i) for i in range(23)]), structure.windows()
    whole = structure.descriptors(x, parts[:1])[:, 0]
    looks = np.concatenate([structure.descriptors(x, parts), structure.descriptors(x, parts[:1], mirrored=True)], 1)
    alike = np.einsum("nwd,md->nwm", looks, whole).max(1)
    np.fill_diagonal(alike, -2)
    expected = {tuple(sorted((i, int(j)))) for i in range(23) for j in np.argsort(-alike[i])[:3]}
    assert set(map(tuple, module._candidates(x, np.ones(23)).tolist())) == expected


COPIES = {
    "half": lambda im: im.resize((im.width // 2, im.height // 2), Image.Resampling.BICUBIC),
    "crop": lambda im: im.crop((0, 9, round(0.85 * im.width), 9 + round(0.85 * im.height))),
    "border": lambda im: ImageOps.expand(im, 5, (200, 10, 10)),
    "mirror": ImageOps.mirror,
    "grey": lambda im: im.convert("L"),
    "hues": lambda im: Image.merge("RGB", im.split()[1:] + im.split()[:1]),
    "pale": lambda im: im.point(lambda v: 90 + v // 2),
}


@pytest.mark.parametrize("size", [(96, 96), (130, 81), (61, 97)])
def test_copies_of_every_kind_and_nothing_else(size):
    pictures = [photo(i, size) for i in range(30)]
    copies = [(i, make(pictures[i])) for i, make in enumerate(COPIES.values())]
    found = found_in(pictures + [copy for _, copy in copies])
    assert found.groups == [[i, len(pictures) + i] for i, _ in copies] and found.complete
    how = {p.first: p for p in found.pairs}
    names = list(COPIES)
    assert [names[i] for i, p in how.items() if p.mirrored] == ["mirror"]
    assert {names[i] for i, p in how.items() if p.part < 0.95} == {"crop", "border"}
    assert how[names.index("crop")].part == pytest.approx(0.85, abs=0.02)


def test_a_part_that_differs_is_another_picture():
    one = photo(0)
    other = one.copy()
    other.paste(photo(1).crop((0, 0, 30, 30)), (40, 40))
    assert not found_in([one, other]).pairs


def test_other_proportions_are_another_picture():
    one = photo(3, (120, 60))
    assert found_in([one, one.resize((60, 30))]).groups
    assert not found_in([one, one.resize((60, 60))]).groups
    assert not found_in([one, one.resize((120, 200))]).groups


@pytest.mark.parametrize("count", [0, 1, 2, 300])
@pytest.mark.parametrize("flat", [True, False])
def test_the_same_picture_throughout(count, flat):
    x = np.full((1, 2 * 32 * 32), 77, np.uint8) if flat else thumbnails([photo(0)])
    found = near_duplicates(x.repeat(count, 0))
    assert found.groups == ([list(range(count))] if count > 1 else []) and not found.pairs and found.complete


def test_images_without_structure_are_compared_with_none():
    noise = np.random.default_rng(0).integers(100, 103, (40, 32, 32, 3)).astype(np.float32) / 255
    assert near_duplicates(np.asarray(structure.thumbnail(noise)))[:2] == ([], [])


def test_a_limit_is_said(monkeypatch):
    monkeypatch.setattr(module, "CANDIDATES", 4)
    base = np.asarray(photo(0), int)
    images = [
        Image.fromarray(np.clip(base + np.random.default_rng(i).integers(-4, 5, base.shape), 0, 255).astype(np.uint8))
        for i in range(20)
    ]
    found = found_in(images)
    assert found.complete and found.groups == [list(range(20))] and len(found.pairs) == 190
    monkeypatch.setattr(module, "MOST_COMPARED", 5)
    assert not found_in(images).complete


def test_grey_images_and_small_ones():
    grey = np.random.default_rng(0).random((3, 9, 5, 1)).astype(np.float32)
    x = np.asarray(structure.thumbnail(grey))
    assert x.shape == (3, 2 * structure.SIDE**2) and x.dtype == np.uint8
    assert (x[:, : structure.SIDE**2] == x[:, structure.SIDE**2 :]).all()
    assert near_duplicates(np.concatenate([x, x[1:2]])).groups == [[1, 3]]


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
def test_files_of_every_kind(fit, tmp_path):
    """Turned by EXIF, with alpha, grey, in another format and of odd size: one group, by either whole fit."""
    pictures = [photo(i, (97, 61)) for i in range(12)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i:02d}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures[4].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=turned.tobytes(), quality=95)
    pictures[4].convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    pictures[4].convert("L").save(tmp_path / "grey.png")
    pictures[4].resize((41, 26)).save(tmp_path / "odd.bmp")
    parts = [make_source(f"folder:{tmp_path}", split=split, image_size=64, fit=fit) for split in ("train", "test")]
    files = Originals(*map(np.concatenate, zip(*map(originals, parts), strict=True)))
    names = [name for part in parts for name in part.extras["name"]]
    assert (files.size[names.index("odd.bmp")], *[c[names.index("turned.jpg")] for c in files[:2]]) == (
        (tmp_path / "odd.bmp").stat().st_size, 97, 61
    )  # fmt: skip
    x = np.concatenate([np.asarray(structure.thumbnail(part.images / np.float32(255))) for part in parts])
    aspect = files.width / files.height
    found = near_duplicates(structure.unboxed(x, aspect) if fit == "letterbox" else x, aspect)
    assert [{names[i] for i in g} for g in found.groups] == [
        {"04.png", "turned.jpg", "alpha.webp", "grey.png", "odd.bmp"}
    ]


def test_the_table_has_every_image_and_every_pair(tmp_path):
    """Two of one thumbnail, a larger one, a crop that is like only one of them, and a mirrored pair elsewhere."""
    pairs = [Pair(0, 2, 0.98), Pair(2, 4, 0.8, part=0.85), Pair(5, 6, 0.9, mirrored=True)]
    found = module.Found([[0, 1, 2], [5, 6]], pairs, True, np.array([0, 0, 2, 3, 4, 5, 6]))
    files = Originals(*np.array([[10, 10, 20, 5, 8, 9, 9], [10, 10, 20, 5, 8, 9, 9], [7, 8, 9, 1, 2, 4, 5]]))
    rows = table(found, "abcdefg".__getitem__, files)
    assert rows == [
        Row(1, "yes", "c", 20, 20, 9, 1.0, "c", ""),
        Row(1, "", "a", 10, 10, 7, 0.98, "c", ""),
        Row(1, "", "b", 10, 10, 8, 0.98, "c", ""),
        Row(2, "yes", "g", 9, 9, 5, 1.0, "g", ""),
        Row(2, "", "f", 9, 9, 4, 0.9, "g", "mirrored"),
        Row(0, "", "e", 8, 8, 2, 0.8, "c", "crop or border"),
    ]
    section.write_table(tmp_path, rows)
    read = list(csv.DictReader(io.StringIO((tmp_path / "duplicates.csv").read_text())))
    assert [row["file"] for row in read] == list("cabgfe") and read[-1]["group"] == ""


def test_sizes_of_what_is_no_file():
    source = make_source("garments", limit=20)
    files = originals(source)
    assert files.width.tolist() == [32] * 20 == files.height.tolist() and not files.size.any()
    gone = type("Gone", (), {"__len__": lambda self: 1, "paths": ("nowhere.png",), "image_shape": (4, 6, 3)})()
    assert [column.tolist() for column in originals(gone)] == [[6], [4], [0]]
