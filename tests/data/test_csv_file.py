"""csv:PATH: the columns of a table, and the errors for a wrong one."""

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import csv_file, make_source
from jaxcl.data.listing import numbered
from jaxcl.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "in").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(root / "in" / f"{i}.png")
    return root


def write(images, text, encoding="utf-8"):
    (images / "list.csv").write_bytes(text.encode(encoding))
    return f"csv:{images / 'list.csv'}"


def test_every_column(images):
    rows = [
        f"in/{i}.png,{'red car,a,b'[:3] if i % 2 else 'bus'},{i % 3},{['x', 'y'][i % 2]},{['', 'test', 'val'][i % 3]}"
        for i in range(12)
    ]
    spec = write(images, "\n".join(["path,label,coarse,group,split", *rows, "", ",,,,"]))
    for split, offset in (("train", 0), ("test", 1), ("validation", 2)):
        source = make_source(spec, split=split)
        i = source.images[:, 0, 0, 0].astype(int) // 10
        assert i.tolist() == list(range(offset, 12, 3)) and source.labelled
        assert (source.labels == i % 2).all() and source.class_names == ("bus", "red")
        assert (source.extras["coarse"] == i % 3).all() and source.coarse_names == ("0", "1", "2")
        assert (source.extras["group"] == i % 2).all() and source.group_names == ("x", "y")
    coarse = make_source(spec, labels="coarse", split="test")
    assert coarse.class_names == ("0", "1", "2") and (coarse.labels == 1).all() and coarse.fine_names == ("bus", "red")


def test_columns_in_any_order_and_paths_of_any_kind(images):
    rows = ['7,in/1.png,"a, b"', f",{images}/in/2.png,", "-1,./in/3.png,x", "8,in/../in/4.png,"]
    text = "\r\n".join(["\ufeffLabel, Path ,note", *rows, ""])
    listing = csv_file.listing_of(write(images, text)[4:])
    assert listing.columns[0].tolist() == [0, -1, -1, 1] and listing.class_names == ("7", "8")
    assert listing.notes == ("ignored columns: note",)
    source = make_source(write(images, text), split="train")
    assert not source.labelled and len(source) == 3


def test_labels_may_be_missing(images):
    source = make_source(write(images, "path\n" + "".join(f"in/{i}.png\n" for i in range(12))))
    assert not source.labelled and source.num_classes == 0 and len(source) == 11


def test_coarse_labels_of_a_table_on_disk(images, monkeypatch):
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 0)
    rows = "".join(f"in/{i}.png,{i % 4},{i % 2},g{i % 3}\n" for i in range(12))
    source = make_source(write(images, f"path,label,coarse,group\n{rows}"), labels="coarse")
    assert not source.in_memory and source.num_classes == 2 and source.fine_names == ("0", "1", "2", "3")
    assert (source.extras["fine"] % 2 == source.labels).all() and (source.labels == source.extras["coarse"]).all()
    batch = source.batch(np.arange(len(source)))
    assert (batch["label"] == source.labels).all()
    assert (batch["image"][:, 0, 0, 0].astype(int) // 10 % 3 == source.extras["group"]).all()


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "the header of .*list.csv is ''; expected path,label,coarse,group,split"),
        ("file,label\na.png,1", "is 'file,label'; expected path"),
        ("path;label\na.png;1", "is 'path;label'; expected path"),
        ("path,path\na,b", "names path twice"),
        ("path,label", "holds no images"),
        ("path,label\nin/0.png", "line 2 of .*list.csv has 1 columns, the header 2"),
        ("path,label\n\nin/0.png,a,b", "line 3 of .* has 3 columns.*comma"),
        ("path,label\n ,a", "image 1 has no path"),
        ("path,split\nin/0.png,tset", "image 1 is of split 'tset'; expected train, test or val"),
        ("path,split\nin/0.png,test", "has no training images; it has 1 of other splits"),
        ("path\nnowhere.png\nin/0.png", r"1 of 2 images cannot be read: nowhere.png \(no such file or directory\)"),
        ("path\nin\nin/0.png", r"cannot be read: in \(no regular file\)"),
        ("path\nin/0.png\x00", "list.csv|cannot be read"),
        ('path,label\n"' + "a" * 200_000, "line 2 of .*list.csv is no csv"),
    ],
)
def test_mistakes(images, text, match):
    with pytest.raises(UserError, match=match) as caught:
        make_source(write(images, text))
    assert "\n" not in str(caught.value)


def test_no_table(images):
    for make, match in (
        (lambda: f"csv:{images}/none.csv", "none.csv cannot be read .no such file"),
        (lambda: f"csv:{images}", "cannot be read .is a directory"),
        (lambda: write(images, "path,label\nin/0.png,é", "latin-1"), "is no text in UTF-8"),
    ):
        with pytest.raises(UserError, match=match):
            make_source(make())


@pytest.mark.parametrize(
    "labels, classes",
    [
        ("1_12,11_2,1_12,3", "11_2,1_12,3"),
        ("1,01,001,1", "001,01,1"),
        ("7,+7,7.0,7e0", "+7,7,7.0,7e0"),
        ("٣,3,३,3", "3,٣,३"),
        ("0x10,16,0,-0", "-0,0,0x10,16"),
        ("1.50,1.5,1.500,2", "1.5,1.50,1.500,2"),
        ("10,9,100,9", "9,10,100"),
        ("10.0,9.0,,9.0", "9,10"),
        ("0,-1,1,10", "0,1,10"),
        ("0,-1,a,10", "-1,0,10,a"),
        (f"{10**30},{10**30 + 1},2,2", f"2,{10**30},{10**30 + 1}"),
        (f"{'1' * 5000},{'1' * 4999}2,1,1", f"1,{'1' * 5000},{'1' * 4999}2"),
        ("nan,NaN,inf,1", "1,NaN,inf,nan"),
    ],
)
def test_a_label_is_its_text(labels, classes):
    """Cases B.3: texts that a parser of numbers takes for one number stay apart; whole numbers go by value."""
    words = labels.split(",")
    codes, names = numbered(words)
    assert names == tuple(classes.split(","))
    for word, code in zip(words, codes, strict=True):
        assert names[code] == word or names[code] == word.removesuffix(".0") if code >= 0 else word in ("", "-1")


def test_classes_of_a_table_stay_apart(images):
    """Cases B.3: as many classes as there are texts, in every column of labels."""
    rows = "".join(
        f"in/{i}.png,{('1_12', '11_2')[i % 2]},{('01', '1')[i % 2]},{('1.0', '1')[i % 2]}\n" for i in range(12)
    )
    source = make_source(write(images, f"path,label,coarse,group\n{rows}"))
    assert source.class_names == ("11_2", "1_12")
    assert source.coarse_names == ("01", "1") and source.group_names == ("1", "1.0")
