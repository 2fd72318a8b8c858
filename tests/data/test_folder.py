"""folder:PATH: images, classes and splits for every form of a folder."""

import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import csv_file, folder, make_source
from jaxcl.errors import UserError


def fill(root, *names):
    """Writes files; those with the ending of an image are images."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"some text")
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif"):
            Image.new("RGB", (8, 8)).save(path)
    return root


def listed(root):
    """-> ({name: (split, class or "")}, notes)"""
    listing = folder.listing_of(str(root))
    names = [*listing.class_names, ""]
    found = zip(listing.names, listing.splits, listing.columns[0], strict=True)
    return {name: (str(part), names[label]) for name, part, label in found}, listing.notes


def test_one_folder_a_class_in_the_order_of_names(tmp_path):
    fill(tmp_path, "b/2.png", "b/1.JPG", "a/x.jpeg", "B/x.png", "a/deeper/still/y.png")
    found, notes = listed(tmp_path)
    assert found == {
        "B/x.png": ("train", "B"),
        "a/deeper/still/y.png": ("train", "a"),
        "a/x.jpeg": ("train", "a"),
        "b/1.JPG": ("train", "b"),
        "b/2.png": ("train", "b"),
    }
    assert list(found) == sorted(found) and not notes
    assert listed(f"{tmp_path}/") == listed(f"{tmp_path}//") == (found, notes)
    assert folder.listing_of(str(tmp_path)).class_names == ("B", "a", "b")


def test_all_in_one_folder_has_no_labels(tmp_path):
    source = make_source(f"folder:{fill(tmp_path, *(f'{i}.png' for i in range(10)))}")
    assert not source.labelled and source.num_classes == 0 and (source.labels == -1).all() and len(source) == 9
    other = fill(tmp_path / "other", *(f"photos/{i}.png" for i in range(3)))
    assert listed(other)[1] == ("one folder of images, photos, gives no labels",)
    assert set(listed(other)[0].values()) == {("train", "")}


def test_images_beside_class_folders_have_no_label(tmp_path):
    found, notes = listed(fill(tmp_path, "a/1.png", "b/1.png", "0.png"))
    assert found["0.png"] == ("train", "") and "1 images lie in no class folder and have no label" in notes


@pytest.mark.parametrize("test", ["test", "val", "Valid", "validation", "testing"])
def test_splits(tmp_path, test):
    fill(tmp_path, "train/a/1.png", "train/b/2.png", f"{test}/a/3.png", "preview.png", "devkit/readme.txt")
    found, notes = listed(tmp_path)
    part = "validation" if test.lower().startswith("val") else "test"
    assert found == {
        "train/a/1.png": ("train", "a"),
        "train/b/2.png": ("train", "b"),
        f"{test}/a/3.png": (part, "a"),
    }
    assert f"1 images beside {', '.join(sorted(('train', test)))} are ignored" in notes


def test_splits_without_classes(tmp_path):
    found, _ = listed(fill(tmp_path, "train/1.png", "train/2.png", "test/3.png"))
    assert set(found.values()) == {("train", ""), ("test", "")}


def test_train_may_be_a_class(tmp_path):
    fill(tmp_path, "car/1.png", "plane/2.png", "train/3.png")
    assert folder.listing_of(str(tmp_path)).class_names == ("car", "plane", "train")
    fill(tmp_path, "test/4.png")
    with pytest.raises(UserError, match="holds test and train beside car, which is no split of a set"):
        folder.listing_of(str(tmp_path))


def test_what_is_ignored(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png", "b/notes.txt", "a/raw.heic", "a/none", "a/.hidden.png", "a/._1.png")
    fill(tmp_path, ".git/3.png", "__MACOSX/a/4.png", "b/@eaDir/5.png", "a/.ipynb_checkpoints/6.png", "c/only.txt")
    (tmp_path / "d").mkdir()
    found, notes = listed(tmp_path)
    assert list(found) == ["a/1.png", "b/2.png"]
    assert notes[0].startswith("4 other files are ignored (.txt, ") and ".heic" in notes[0]
    assert notes[1] == "no image in c, d, which is left out as a class"
    with pytest.raises(UserError, match="holds no images; 1 other files are ignored .*txt"):
        make_source(f"folder:{tmp_path / 'c'}")


def test_notes_are_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxcl")
    fill(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(5)), "a/x.txt")
    for split in ("train", "test"):
        make_source(f"folder:{tmp_path}", split=split)
    line = f"folder:{tmp_path}: 10 images, 2 classes, each 8x8; 1 other files are ignored (.txt)"
    assert caplog.messages == [line]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 only")
def test_odd_names(tmp_path):
    fill(tmp_path, "猫/ü ñ'\".png", "a:b, c/%20#.png", "-x/--y.png", "new\nline/x.png")
    odd = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(odd)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    os.rename(tmp_path / "one.png", os.path.join(odd, b"\xff.png"))
    source = make_source(f"folder:{tmp_path}")
    assert set(source.class_names) == {"猫", "a:b, c", "-x", r"new\nline", r"caf\xe9"}
    assert len(source) + len(make_source(f"folder:{tmp_path}", split="test")) == 5
    "".join(source.class_names).encode()  # the report is written as UTF-8


def test_links_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "set/b/3.png")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b" / "4.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set" / "b" / "round").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    found, _ = listed(tmp_path / "set")
    assert list(found) == ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert listed(tmp_path / "link")[0] == found


def test_no_folder(tmp_path, monkeypatch):
    fill(tmp_path, "a.png")
    for path, match in (("nowhere", "is not there; expected a folder"), ("a.png", "is a file; expected a folder")):
        with pytest.raises(UserError, match=match):
            make_source(f"folder:{tmp_path / path}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(folder.listing_of("~").paths) == 1
    monkeypatch.setattr(
        os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path))
    )
    with pytest.raises(UserError, match=r"cannot be read \(permission denied\)"):
        make_source(f"folder:{tmp_path}")


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    fill(tmp_path, *(f"{c}/{i}.png" for c in "ba" for i in range(12)))
    expected, walk = listed(tmp_path)[0], os.walk
    shuffled = np.random.default_rng(0)

    def disordered(*args, **options):
        for where, folders, names in walk(*args, **options):
            shuffled.shuffle(folders)
            shuffled.shuffle(names)
            yield where, folders, names

    monkeypatch.setattr(os, "walk", disordered)
    assert list(listed(tmp_path)[0].items()) == list(expected.items())


def tiny_imagenet(root):
    """The layout as published -> the lines of its annotations."""
    fill(root, "wnids.txt", *(f"test/images/test_{i}.JPEG" for i in range(3)))
    for k, wnid in enumerate(("n01", "n02", "n03")):
        fill(root, *(f"train/{wnid}/images/{wnid}_{i}.JPEG" for i in range(4)), f"train/{wnid}/{wnid}_boxes.txt")
        fill(root, f"val/images/val_{k}.JPEG", f"val/images/val_{k + 3}.JPEG")
    rows = [f"val_{i}.JPEG\tn0{i % 3 + 1}\t0\t32\t44\t62\n" for i in range(6)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))


def test_tiny_imagenet_as_published(tmp_path):
    """Cases B.5: validation images have the classes of their list; they are the test part, as test has no labels."""
    tiny_imagenet(tmp_path)
    found, _ = listed(tmp_path)
    assert folder.listing_of(str(tmp_path)).class_names == ("n01", "n02", "n03")
    assert [found[f"val/images/val_{i}.JPEG"] for i in range(6)] == [("validation", f"n0{i % 3 + 1}") for i in range(6)]
    assert found["train/n02/images/n02_3.JPEG"] == ("train", "n02") and found["test/images/test_0.JPEG"][1] == ""
    test = make_source(f"folder:{tmp_path}", split="test")
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2] and test.num_classes == 3
    (tmp_path / "val" / "val_annotations.txt").unlink()
    found, notes = listed(tmp_path)
    assert {found[f"val/images/val_{i}.JPEG"] for i in range(6)} == {("validation", "")}
    assert folder.listing_of(str(tmp_path)).class_names == ("n01", "n02", "n03")


@pytest.mark.parametrize(
    "train, other, part",
    [
        ("train", "eval", "validation"),
        ("Train", "Evaluation", "validation"),
        ("train2017", "val2017", "validation"),
        ("train_images", "test_images", "test"),
        ("trainset", "testset", "test"),
        ("seg_train", "seg_test", "test"),
        ("training_set", "test_set", "test"),
        ("train", "dev", "validation"),
    ],
)
def test_names_of_parts(train, other, part, tmp_path):
    """Cases B.5: train/ beside eval/ are parts of a set, not its classes; longer names too."""
    fill(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{other}/a/3.png")
    assert set(listed(tmp_path)[0].values()) == {("train", "a"), ("train", "b"), (part, "a")}


def test_a_part_of_an_unknown_name(tmp_path):
    """Cases B.5: beside train a folder with the same classes is no class; it is refused in one line."""
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "held_back/a/3.png")
    with pytest.raises(UserError, match="held_back") as error:
        folder.listing_of(str(tmp_path))
    assert "\n" not in str(error.value)
    for names in (("dev", "a"), ("train_station", "train"), ("test drive", "train"), ("eval",), ("images", "data")):
        root = fill(tmp_path / "-".join(names), *(f"{name}/{i}.png" for name in names for i in range(2)))
        assert folder.listing_of(str(root)).class_names == (tuple(sorted(names)) if len(names) > 1 else ())


def test_a_class_without_training_images_is_named(tmp_path):
    """Cases B.5: a class only in the test part is said, for folders and tables."""
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png", "test/zebra/4.png", "val/b/1.png")
    (note,) = (note for note in listed(tmp_path)[1] if "zebra" in note)
    assert "test" in note
    (tmp_path / "list.csv").write_text("path,label,split\ntrain/a/1.png,a,train\ntest/zebra/4.png,zebra,test\n")
    assert any("zebra" in note for note in csv_file.listing_of(str(tmp_path / "list.csv")).notes)


@pytest.mark.parametrize("name", ["lost+found", ".Trash-0", "System Volume Information", "$RECYCLE.BIN"])
def test_folders_of_the_system_are_not_opened(name, tmp_path, monkeypatch):
    """Cases B.5: lost+found of a volume can be read by root only; nobody looks into it."""
    fill(tmp_path, "a/1.png", "b/2.png", f"{name}/3.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found, notes = listed(tmp_path)
    assert list(found) == ["a/1.png", "b/2.png"] and not notes


def test_folders_that_link_to_each_other(tmp_path):
    """Cases C.10: each image once, in no time, whether the links stay inside or lead out and back."""
    for where in ("set", "away"):
        for i in range(9):
            fill(tmp_path, f"{where}/c{i}/{where}{i}.png")
            for j in set(range(9)) - {i}:
                (tmp_path / where / f"c{i}" / f"to{j}").symlink_to(tmp_path / where / f"c{j}")
    begun = time.monotonic()
    assert len(folder.listing_of(str(tmp_path / "set")).names) == 9
    (tmp_path / "set" / "out").symlink_to(tmp_path / "away")
    (tmp_path / "set" / "too").symlink_to(tmp_path / "away")
    names = folder.listing_of(str(tmp_path / "set")).names
    assert len(names) == 27 and len(set(names)) == 27
    assert time.monotonic() - begun < 5


def test_links_to_a_hidden_store(tmp_path):
    """Cases C.10: folders that are only reached by a link are followed."""
    for c in "ab":
        fill(tmp_path, f".store/{c}/1.png")
        (tmp_path / f"class_{c}").symlink_to(tmp_path / ".store" / c)
    assert folder.listing_of(str(tmp_path)).names == ["class_a/1.png", "class_b/1.png"]


def test_deeply_nested_folders(tmp_path):
    """Cases C.10: the time grows with the number of folders, not with its square."""
    fill(tmp_path, "a/1.png", "b/1.png")
    here = os.open(tmp_path / "a", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        here, before = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(before)
    os.close(here)
    begun = time.monotonic()
    try:
        assert folder.listing_of(str(tmp_path)).names == ["a/1.png", "b/1.png"]
        assert time.monotonic() - begun < 10
    finally:  # pytest removes folders recursively, and Python's recursion is limited
        subprocess.run(["rm", "-rf", str(tmp_path / "a" / "d")], check=True)
