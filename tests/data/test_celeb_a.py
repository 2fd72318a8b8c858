"""celeb_a:PATH on a few synthetic faces, in every form of its folder."""

import numpy as np
import pytest
from PIL import Image

from jaxcl import config as configs
from jaxcl.data import make_source, source_of
from jaxcl.errors import UserError

ATTRIBUTES = ("Bald", "Blond_Hair", "Male")


def attributes(i):
    return i % 5 == 0, i % 2 == 1, i % 4 >= 2


def write(root, form, count=12):
    """Faces 000001.jpg and so on; training, validation and test in turn; the middle 178 rows identify the face."""
    images, anno, part, ending = {
        "published": ("Img/img_align_celeba", "Anno", "Eval", "txt"),
        "flat": ("img_align_celeba", ".", ".", "txt"),
        "tables": ("img_align_celeba/img_align_celeba", ".", ".", "csv"),
    }[form]
    for folder in (images, anno, part):
        (root / folder).mkdir(parents=True, exist_ok=True)
    sep = "," if ending == "csv" else " "
    rows, parts = [], []
    for i in range(count):
        face = np.full((218, 178, 3), 255, np.uint8)
        face[20:198] = 20 * i
        name = f"{i + 1:06d}.jpg"
        Image.fromarray(face).save(root / images / name, quality=95)
        rows.append(sep.join([name, *(f"{'1' if v else '-1':>2}".strip() for v in attributes(i))]))
        parts.append(f"{name}{sep}{i % 3}")
    names = sep.join(ATTRIBUTES)
    head = [f"image_id,{names}"] if ending == "csv" else [str(count), names]
    (root / anno / f"list_attr_celeba.{ending}").write_text("\n".join([*head, *rows, ""]))
    head = ["image_id,partition"] if ending == "csv" else []
    (root / part / f"list_eval_partition.{ending}").write_text("\n".join([*head, *parts, ""]))
    return f"celeb_a:{root}"


def face_numbers(source):
    return np.rint(source.images[:, 1:-1, 5:-5].mean((1, 2, 3)) / 20).astype(int)


@pytest.mark.parametrize("form", ["published", "flat", "tables"])
def test_groups_and_published_splits(tmp_path, form):
    spec = write(tmp_path, form)
    for split, part in (("train", 0), ("validation", 1), ("test", 2)):
        source = make_source(spec, split=split, image_size=32)
        i = face_numbers(source)
        assert i.tolist() == list(range(part, 12, 3)) and source.image_shape == (32, 32, 3)
        assert source.images[0].max() < 230 or part == 2  # nothing of the white above and below
        assert (source.labels == i % 2).all() and source.class_names == ("not Blond_Hair", "Blond_Hair")
        assert (source.extras["group"] == 2 * (i % 2) + (i % 4 >= 2)).all()
    assert source.group_names == (
        "not Blond_Hair, not Male", "not Blond_Hair, Male", "Blond_Hair, not Male", "Blond_Hair, Male",
    )  # fmt: skip


def test_other_attributes_from_the_config(tmp_path):
    config = configs.default()
    config.data.source = write(tmp_path, "flat")
    config.data.celeb_a.target, config.data.celeb_a.group = "Bald", "Blond_Hair"
    source = source_of(config, "train")
    assert source.image_shape == (178, 178, 3)
    i = face_numbers(source)
    assert (source.labels == (i % 5 == 0)).all() and source.class_names == ("not Bald", "Bald")
    assert (source.extras["group"] == 2 * (i % 5 == 0) + i % 2).all()


@pytest.mark.parametrize("form", ["flat", "tables"])
def test_mistakes(tmp_path, form):
    spec = write(tmp_path, form)

    def fails(match, **options):
        with pytest.raises(UserError, match=match) as caught:
            make_source(spec, **options)
        assert "\n" not in str(caught.value)

    fails("list_attr_celeba.... has no column 'Blond'; it has", target="Blond")
    fails("'targt'; did you mean 'target'", targt="Male")
    ending = "csv" if form == "tables" else "txt"
    table = tmp_path / f"list_attr_celeba.{ending}"
    whole = table.read_text()
    table.write_text(whole.replace("-1", "7"))
    fails("Blond_Hair of image 1 is '7'; expected 0 or 1")
    table.write_text(whole.rstrip()[:-3] + "\n")
    fails("has 1 columns; expected 3|has 3 columns, the header 4")
    table.write_text(whole)
    parts = tmp_path / f"list_eval_partition.{ending}"
    parts.write_text("\n".join(parts.read_text().splitlines()[:-1]))
    fails("list_eval_partition lacks 000012.jpg")
    parts.unlink()
    fails("lacks list_eval_partition.txt .or .csv.; expected the published folder")
    table.unlink()
    fails("lacks list_attr_celeba.txt")


def test_no_images(tmp_path):
    spec = write(tmp_path, "flat")
    (tmp_path / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 12 images cannot be read: 000003.jpg \(no such file or directory\)"):
        make_source(spec)
    (tmp_path / "img_align_celeba").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lacks the folder img_align_celeba"):
        make_source(spec)
