"""waterbirds:PATH on a few synthetic birds."""

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import has_own_validation, make_source
from jaxcl.errors import UserError

HEADER = "img_id,img_filename,y,split,place,place_filename"


def write(root, rows):
    lines = [f"{i},{name},{y},{split},{place},/o/ocean/{i}.jpg" for i, (name, y, split, place) in enumerate(rows)]
    (root / "metadata.csv").write_text("\n".join([HEADER, *lines]))
    return f"waterbirds:{root}"


@pytest.fixture
def birds(tmp_path):
    """Twenty-four images; grey level 10 * i, bird i % 2, place i // 2 % 2, split i // 8. -> (folder, rows)"""
    rows = []
    for i in range(24):
        folder = f"{i % 3:03d}.Some_bird"
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 24), (10 * i,) * 3).save(tmp_path / folder / f"{i}.jpg")
        rows.append((f"{folder}/{i}.jpg", i % 2, i // 8, i // 2 % 2))
    return tmp_path, rows


def test_groups_and_published_splits(birds):
    spec = write(*birds)
    assert has_own_validation(spec)
    for split, part in (("train", 0), ("validation", 1), ("test", 2)):
        source = make_source(spec, split=split, image_size=16)
        i = np.rint(source.images[:, 8, 8, 0] / 10).astype(int)
        assert i.tolist() == list(range(8 * part, 8 * part + 8)) and source.image_shape == (16, 16, 3)
        assert (source.labels == i % 2).all() and source.class_names == ("landbird", "waterbird")
        assert (source.extras["group"] == 2 * (i % 2) + i // 2 % 2).all()
    assert source.group_names == (
        "landbird on land", "landbird on water", "waterbird on land", "waterbird on water",
    )  # fmt: skip
    held = make_source(spec, split="validation", validation=0.5, image_size=16)
    assert len(held) == 4 and held.images.max() <= 75  # of the training split


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda r: r[:3] + [(r[3][0], 2, 0, 0)], "y of image 4 is '2'; expected 0 or 1"),
        (lambda r: [(r[0][0], 0, 5, 0)], "split of image 1 is '5'; expected 0 or 1 or 2"),
        (lambda r: [(r[0][0], 0, 0, "sea")], "place of image 1 is 'sea'"),
        (lambda r: [("none.jpg", 0, 0, 0), *r], r"cannot be read: none.jpg \(no such file or directory\)"),
        (lambda r: [], "holds no images"),
    ],
)
def test_mistakes(birds, change, match):
    root, rows = birds
    with pytest.raises(UserError, match=match):
        make_source(write(root, change(rows)))


def test_no_metadata(tmp_path):
    with pytest.raises(UserError, match="metadata.csv cannot be read .no such file"):
        make_source(f"waterbirds:{tmp_path}")
    (tmp_path / "metadata.csv").write_text("img_id,y\n1,1")
    with pytest.raises(UserError, match="expected img_filename,y,split,place"):
        make_source(f"waterbirds:{tmp_path}")
