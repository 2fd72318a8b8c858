"""Texture sets: built in parts, gone on with, shared between processes, and found by the images of a training set."""

import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from processes import cli, one_line

from jaxcl import config as base
from jaxcl.commands import textures
from jaxcl.data import Loader, Source, make_source
from jaxcl.data.from_config import source_of
from jaxcl.data.texture_set import Textured, TextureSet, image_keys, is_done
from jaxcl.errors import UserError

SEARCH = dict(exemplar=4, radius=2, randoms=2, passes=1)  # one level: compiles fast


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Ten training images of 8 pixels without labels, two of them the same."""
    path = tmp_path_factory.mktemp("source") / "images.npz"
    train = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    train[7] = train[2]
    np.savez(path, train_images=train, test_images=train[:3] // 2)
    return f"npz:{path}"


def build(npz, out, **options):
    source = make_source(npz)
    options = dict(seed=1, batch_size=3, part_size=4) | options
    textures.build(source, out, search=SEARCH, stream=io.StringIO(), **options)
    return source


@pytest.fixture(scope="module")
def built(npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("textures")
    build(npz, out)
    return out


def all_of(folder, source):
    made = TextureSet(folder)
    return made[made.rows_of(source.images)]


def test_every_texture_is_of_the_pixels_of_its_image(npz, built):
    source = make_source(npz)
    made = all_of(built, source)
    assert made.shape == source.images.shape and made.dtype == np.uint8
    for image, texture in zip(source.images, made, strict=True):
        assert {tuple(p) for p in texture.reshape(-1, 3)} <= {tuple(p) for p in image.reshape(-1, 3)}
        assert (texture != image).any()


def test_goes_on_where_it_stopped(npz, built, tmp_path):
    source = build(npz, tmp_path)
    parts = [tmp_path / f"part-{i:05d}.npy" for i in range(3)]
    whole = [p.read_bytes() for p in parts]
    parts[1].unlink()  # as after a kill: its keys are there, its textures are not
    times = [p.stat().st_mtime_ns for p in (parts[0], parts[2])]
    with pytest.raises(UserError, match="holds 2 of 3 parts; run the command that began it again to continue"):
        TextureSet(tmp_path)
    build(npz, tmp_path)
    assert [p.read_bytes() for p in parts] == whole
    assert [p.stat().st_mtime_ns for p in (parts[0], parts[2])] == times and not list(tmp_path.glob("*.tmp"))
    np.testing.assert_array_equal(all_of(tmp_path, source), all_of(built, source))


def test_processes_share_the_parts_and_batches_do_not_matter(npz, built, tmp_path):
    source = build(npz, tmp_path, process_index=1, process_count=2)
    assert [is_done(tmp_path, p) for p in range(3)] == [False, True, False]
    build(npz, tmp_path, process_index=0, process_count=2, batch_size=5)
    np.testing.assert_array_equal(all_of(tmp_path, source), all_of(built, source))


def test_made_otherwise(npz, built):
    with pytest.raises(UserError, match=r"holds textures made with seed 1, not 2; use another --out"):
        build(npz, built, seed=2)
    with pytest.raises(UserError, match="process_index is 2; expected 0 to 1, of 2"):
        build(npz, built, process_index=2, process_count=2)
    with pytest.raises(UserError, match="expected at least 1"):
        build(npz, built, batch_size=0)


def test_equal_images_have_equal_keys():
    images = np.random.default_rng(1).integers(0, 2, (200, 2, 2, 1), np.uint8)
    keys = image_keys(images)
    same = (images[:, None] == images).all((2, 3, 4))
    np.testing.assert_array_equal(keys[:, None] == keys, same)


def config_of(npz, built, **data):
    c = base.default()
    c.data.source, c.data.textures = npz, str(built)
    c.data.update(ConfigDict(data))
    return c


def test_batches_bring_the_textures_of_their_images(npz, built):
    whole = all_of(built, make_source(npz))
    for data in ({}, dict(limit=6), dict(validation=0.3)):
        source = source_of(config_of(npz, built, **data), "train")
        assert isinstance(source, Textured) and len(source) == len(source.plain) == len(source.images)
        made = TextureSet(built)
        index = np.array([3, 0, len(source) - 1])
        batch = source.batch(index)
        np.testing.assert_array_equal(batch["texture"], made[made.rows_of(source.images[index])])
        assert set(source.plain.batch(index)) == {"image", "label", "index"}
    assert not isinstance(source_of(config_of(npz, built), "test"), Textured)
    with Loader(source_of(config_of(npz, built), "train"), batch_size=4, seed=0) as loader:
        batch = next(loader)
        made = TextureSet(built)
        np.testing.assert_array_equal(batch["texture"], whole[batch["index"]])


def test_a_set_on_disk_finds_them_batch_by_batch(npz, built):
    plain = make_source(npz)

    class OnDisk(Source):
        in_memory, name, split, image_shape = False, "disk", "train", plain.image_shape
        batch = staticmethod(plain.batch)

        def __len__(self):
            return len(plain)

    source = Textured(OnDisk(), TextureSet(built))
    batch = source.batch(np.array([9, 2, 7]))
    np.testing.assert_array_equal(batch["texture"], all_of(built, plain)[[9, 2, 7]])
    # The same image twice: a texture of it, whichever was drawn.
    np.testing.assert_array_equal(batch["texture"][1], batch["texture"][2])


def test_mistakes_of_a_config(npz, built, tmp_path):
    other = tmp_path / "other.npz"
    images = make_source(npz).images.copy()
    images[4:6] ^= 1
    np.savez(other, images=images)
    with pytest.raises(UserError, match=r"has no texture for [12] of 9 images of npz:.*other"):
        source_of(config_of(f"npz:{other}", built), "train")
    np.savez(other, images=np.zeros((40, 6, 6, 3), np.uint8))
    with pytest.raises(UserError, match=r"holds textures of \(8, 8, 3\), the images of npz:.* are \(6, 6, 3\)"):
        source_of(config_of(f"npz:{other}", built), "train")
    with pytest.raises(UserError, match=r"no textures at .*: there is no textures\.json; make them with python -m"):
        source_of(config_of(npz, tmp_path), "train")


def test_the_command(npz, tmp_path, monkeypatch, capsys):
    def run(*flags):
        code, _, err = cli(["textures", *flags], monkeypatch, capsys)
        return code, err

    made = [f"--source={npz}", f"--out={tmp_path / 'set'}", "--exemplar=4", "--radius=2", "--randoms=2", "--passes=1"]
    assert run(*made, "--split=test", "--batch_size=3")[0] == 0
    assert len(TextureSet(tmp_path / "set")._keys) == 3
    code, err = run("--out=x")
    assert code == 2 and "--source" in one_line(err)
    code, err = run(f"--source={npz}", "--out=x", "--option=size")
    assert code == 2 and "--option is 'size'" in one_line(err)
    assert textures._options(["image_size=96", "data_dir=there"]) == {"image_size": 96, "data_dir": "there"}
