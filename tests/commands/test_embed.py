"""Features of runs in files: the rows of the evaluation, streamed, in whole files or none."""

import json
import os

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxcl.commands import embed as command
from jaxcl.commands import feature_files
from jaxcl.commands.embed import embed
from jaxcl.data.disk import DiskSource
from jaxcl.errors import UserError
from jaxcl.train.runs import Joined, load_run


def says(text, f, *args, **options):
    with pytest.raises(UserError) as error:
        f(*args, **options)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data):
    """Two runs, whose evaluations' batches differ in size."""
    folders = []
    for seed in range(2):
        c = tiny.config(stage=False, background=False)
        with c.ignore_type():
            c.data.source = f"npz:{data}"
        c.eval.batch_size, c.eval.tap = (24, 10)[seed], "stage1"
        folders.append(tmp_path_factory.mktemp("run"))
        tiny.saved_run(folders[-1], c, seed)
    return folders


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, and images of all sizes; none is in a part of its own."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 18, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def opened(folders):
    return [load_run(f) for f in folders]


def test_the_rows_of_the_evaluation(opened, tmp_path, data):
    about = embed(opened[:1], tmp_path / "new" / "f.npz")
    with np.load(tmp_path / "new" / "f.npz", allow_pickle=False) as file:
        found = dict(file)
    assert set(found) == {"features", "splits", "index", "labels", "class_names", "about"}
    context = opened[0].context()
    for split, n in (("train", 64), ("test", 16)):
        rows = found["splits"] == split
        np.testing.assert_array_equal(found["features"][rows], context.features(split))
        np.testing.assert_array_equal(found["labels"][rows], context.source(split).labels)
        np.testing.assert_array_equal(found["index"][rows], np.arange(n))
    assert found["features"].dtype == np.float32 and tuple(found["class_names"]) == context.test.class_names
    assert json.loads(str(found["about"])) == json.loads(json.dumps(about))
    assert about["runs"][0]["step"] == 3 and about["source"] == f"npz:{data}" and about["layer"] == "h"
    assert os.listdir(tmp_path / "new") == ["f.npz"]


def test_the_embedding_of_one_part_of_two_runs(opened, tmp_path):
    embed(opened, tmp_path / "z.npz", split="test", layer="z")
    with np.load(tmp_path / "z.npz") as file:
        found = file["features"]
    wanted = [run.context().features("test", "z") for run in opened]
    np.testing.assert_allclose(found, np.concatenate(wanted, -1), rtol=1e-5, atol=1e-6)
    assert found.shape == (16, 24)
    joined = Joined(opened)
    np.testing.assert_array_equal(np.concatenate(list(joined.stream(joined.test, "h"))), joined.features("test", "h"))


def test_the_command_on_a_folder(folders, photos, tmp_path, monkeypatch):
    """Classes, files, all parts; decoded at the size of training; and RUN+RUN."""
    argv = ["embed", f"--workdir={folders[0]}+{folders[1]}", f"--source=folder:{photos}", f"--out={tmp_path / 'f.npz'}"]
    assert command.main(argv) == 0
    with np.load(tmp_path / "f.npz") as file:
        found = dict(file)
    assert sorted(found["paths"]) == sorted(str(p) for p in photos.glob("*/*.png")) and len(found["features"]) == 20
    names = [found["class_names"][label] for label in found["labels"]]
    assert names == [os.path.basename(os.path.dirname(p)) for p in found["paths"]]
    assert set(found["splits"]) == {"train", "test"} and found["features"].shape == (20, 32)
    run = load_run(folders[0], source=f"folder:{photos}")
    assert run.evaluation.source("test").image_shape == (tiny.SIDE, tiny.SIDE, 3)
    assert load_run(folders[0]).config.data.files.image_size == 0

    # The same where the set stays on disk.
    monkeypatch.setattr("jaxcl.data.files._latest", None)
    monkeypatch.setattr("jaxcl.data.disk.IN_MEMORY_BYTES", 0)
    run = load_run(folders[0], source=f"folder:{photos}")
    assert isinstance(run.evaluation.source("train"), DiskSource)
    embed([run], tmp_path / "disk.npz")
    with np.load(tmp_path / "disk.npz") as file:
        np.testing.assert_array_equal(file["features"], found["features"][:, :16])
        np.testing.assert_array_equal(file["paths"], found["paths"])


def test_without_labels(opened, folders, photos, tmp_path):
    embed([load_run(folders[0], source=f"folder:{photos / 'cat'}")], tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as file:
        assert set(file) == {"features", "splits", "index", "paths", "class_names", "about"}
        assert len(file["class_names"]) == 0 and len(file["paths"]) == 10


def one_part(name, folder):
    """-> a source that has only that, and the number of its images by split."""
    kind, _, part = name.partition(" ")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    count, split = (1, "train") if part == "one" else (6, "test")  # validation images without others are for tests
    folder.mkdir(exist_ok=True)
    if kind == "npz":
        np.savez(folder / "a.npz", **{"images" if part == "one" else "test_images": pixels[:count]})
        return f"npz:{folder}/a.npz", {split: count}
    inside = {"test": "test/", "val": "val/cat/"}.get(part, "") if kind == "folder" else ""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(pixels[i]).save(folder / inside / f"{i}.png")
    if kind == "folder":
        return f"folder:{folder}", {split: count}
    (folder / "list.csv").write_text("path,split\n" + "".join(f"{i}.png,{part}\n" for i in range(count)))
    return f"csv:{folder}/list.csv", {split: count}


PARTS = ["folder one", "folder test", "folder val", "csv test", "csv val", "npz one", "npz test"]


@pytest.mark.parametrize("name", PARTS)
def test_sets_of_one_part_or_one_image(name, folders, tmp_path):
    """Cases B.9: features need no other part; to evaluate without training images is refused in one line."""
    source, counts = one_part(name, tmp_path / "set")
    assert command.main(["embed", f"--workdir={folders[0]}", f"--source={source}", f"--out={tmp_path / 'f.npz'}"]) == 0
    with np.load(tmp_path / "f.npz") as file:
        splits = file["splits"].tolist()
        assert {split: splits.count(split) for split in splits} == counts
        assert file["features"].shape == (sum(counts.values()), 16) and np.isfinite(file["features"]).all()
    if "train" not in counts:
        with pytest.raises(UserError) as error:
            load_run(folders[0], source=source)
        assert "\n" not in str(error.value)


def test_a_run_whose_validation_split_another_set_lacks(folders, data, tmp_path):
    """Cases B.9: the run was measured on validation images; the set to embed has none. A missing set is still said."""
    c = tiny.config(stage=False, background=False)
    with c.ignore_type():
        c.data.source = f"npz:{data}"
    c.data.validation, c.eval.split = 0.25, "validation"
    tiny.saved_run(tmp_path / "run", c, 0)
    source, _ = one_part("folder one", tmp_path / "photos")
    argv = ["embed", f"--workdir={tmp_path}/run", f"--source={source}", f"--out={tmp_path / 'f.npz'}"]
    assert command.main(argv) == 0
    says("is not there", load_run, folders[0], source=f"folder:{tmp_path}/missing", any_part=True)


def test_parquet(opened, folders, photos, tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(feature_files, "ROW_GROUP", 20)
    run = load_run(folders[0], source=f"folder:{photos}")
    embed([run], tmp_path / "f.parquet")
    embed([run], tmp_path / "f.npz")
    table = pq.read_table(tmp_path / "f.parquet")
    with np.load(tmp_path / "f.npz") as file:
        features = np.stack(table["features"].to_numpy())
        np.testing.assert_array_equal(features, file["features"])
        for column, name in (("split", "splits"), ("index", "index"), ("label", "labels"), ("path", "paths")):
            assert table[column].to_pylist() == file[name].tolist()
        assert table["class"].to_pylist() == [file["class_names"][i] for i in file["labels"]]
    about = json.loads(table.schema.metadata[b"jaxcl"])
    assert about["rows"] == 20 and about["class_names"] == ["cat", "dog"]


def test_labels_that_are_not_known(opened, tmp_path):
    """-1 in an npz file; nothing in a parquet file."""
    pq = pytest.importorskip("pyarrow.parquet")
    run = load_run(opened[0].workdir)
    run.evaluation.source("test").labels[:3] = -1
    embed([run], tmp_path / "f.parquet", split="test")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["label"].to_pylist()[:4] == [None, None, None, 3] and table["class"].to_pylist()[2:4] == [
        None,
        "class 3",
    ]


def test_nothing_half_written(opened, tmp_path, monkeypatch):
    out = tmp_path / "f.npz"
    out.write_bytes(b"as it was")

    def broken(source, kind):
        yield np.zeros((24, 16), np.float32)
        raise UserError("an image cannot be read")

    context = opened[0].context()
    monkeypatch.setattr(context, "stream", broken, raising=False)
    monkeypatch.setattr(type(opened[0]), "context", lambda self, split: context)
    says("an image cannot be read", embed, opened[:1], out)
    assert os.listdir(tmp_path) == ["f.npz"] and out.read_bytes() == b"as it was"


def test_a_bucket(opened, tmp_path, monkeypatch):
    tiny.bucket(tmp_path, monkeypatch)
    embed(opened[:1], "gs://bucket/some/f.npz", split="test")
    with np.load(tmp_path / "some" / "f.npz") as file:
        np.testing.assert_array_equal(file["features"], opened[0].context().features("test"))
    context = opened[0].context()
    monkeypatch.setattr(context, "stream", lambda source, kind: (1 / 0 for _ in range(2)), raising=False)
    monkeypatch.setattr(type(opened[0]), "context", lambda self, split: context)
    with pytest.raises(ZeroDivisionError):
        embed(opened[:1], "gs://bucket/some/other.npz", split="test")
    assert os.listdir(tmp_path / "some") == ["f.npz"]


def test_mistakes(opened, folders, tmp_path, monkeypatch):
    says("--out is 'f.csv'; expected a name that ends in .npz or .parquet", embed, opened, "f.csv")
    says("--layer is 'y'; expected 'h' (pooled", embed, opened[:1], tmp_path / "f.npz", layer="y")
    says("--split is 'middle', which npz:", embed, opened[:1], tmp_path / "f.npz", split="middle")
    says("set validation, for example", embed, opened[:1], tmp_path / "f.npz", split="validation")
    says("no --workdir", command.main, ["embed", "--out=f.npz"])
    says("no --out", command.main, ["embed", f"--workdir={folders[0]}"])
    says("is not a run folder", command.main, ["embed", f"--workdir={tmp_path}", "--out=f.npz"])
    (tmp_path / "file").write_text("")
    says("cannot write", embed, opened[:1], tmp_path / "file" / "f.npz")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    says("parquet files need pyarrow", embed, opened, "f.parquet")
    assert os.listdir(tmp_path) == ["file"]
