"""Kinds of sources: the built-in ones against the config, a kind of another package, and specs that name none."""

import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from source_checks import fails

from jaxcl import config as base
from jaxcl.data import Loader, has_own_validation, keeps_size, make_source, source_of
from jaxcl.data.registry import SOURCES
from jaxcl.errors import UserError
from jaxcl.runtime.options import defaults

FOREIGN = '''
import dataclasses
from typing import Annotated, ClassVar

import numpy as np

from jaxcl.data import ArraySource, Source, SourceKind
from jaxcl.runtime.options import Range


@dataclasses.dataclass(frozen=True)
class Ramp(SourceKind):
    extra_splits = ("test_dark",)

    count: Annotated[int, Range(2)] = 12
    first: float = 0.0

    def load(self, argument, *, split, base_split, select):
        labels = np.arange(self.count, dtype=np.int32) % 2
        rows = select(labels)
        level = (rows + (0 if base_split == "train" else 100)).astype(np.uint8)
        images = np.broadcast_to(level[:, None, None, None], (len(rows), 2, 2, 3))
        about = dict(mean=(0.5,) * 3, std=(0.5,) * 3, name="ramp", split=split)
        return ArraySource(images=images, labels=labels[rows], class_names=("even", "odd"), **about)


class Levels(Source):
    """A source with nothing more than the contract asks for."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def batch(self, indices):
        level = self._rows[indices]
        images = np.broadcast_to(level[:, None, None, None], (len(level), 2, 2, 3)).astype(np.uint8)
        return {"image": images, "label": (level % 2).astype(np.int32), "index": np.asarray(indices, np.int32)}


@dataclasses.dataclass(frozen=True)
class FromFile(SourceKind):
    argument: ClassVar[str] = "PATH"
    own_validation = True
    word: str = "levels"

    def load(self, argument, *, split, base_split, select):
        with open(argument) as file:
            levels = np.array([int(line.split()[1]) for line in file if line.split()[0] == base_split])
        return Levels(levels[select(levels % 2)])


def factory() -> SourceKind:
    return Ramp()
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "foreign_sets").mkdir()
    (tmp_path / "foreign_sets" / "__init__.py").write_text("")
    (tmp_path / "foreign_sets" / "kinds.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "foreign_sets"]:
        del sys.modules[name]


def test_the_options_of_every_kind_are_keys_of_the_config():
    data = base.default().data
    for name in SOURCES:
        kind, found = SOURCES.resolve(name), {}
        for key in kind.config_keys:
            found |= dict(data[key]) if isinstance(data[key], ConfigDict) else {key: data[key]}
        assert found == defaults(kind), name
    assert [n for n in SOURCES if SOURCES.resolve(n).own_validation] == [
        "tfds", "folder", "csv", "waterbirds", "celeb_a",
    ]  # fmt: skip


def test_a_kind_of_another_package(package):
    spec = "foreign_sets.kinds:Ramp"
    train, held = (make_source(spec, split=s, validation=0.5, count=8) for s in ("train", "validation"))
    assert sorted([*train.images[:, 0, 0, 0], *held.images[:, 0, 0, 0]]) == list(range(8))
    assert make_source(spec, split="test").images.min() == 100
    assert make_source(spec, split="test_dark", limit=3).split == "test_dark"
    with Loader(train, batch_size=2, seed=0) as loader:
        assert (next(loader)["label"] < 2).all() and loader.steps_per_epoch == 2
    assert not has_own_validation(spec) and not keeps_size(spec)
    fails("count is 1; .*at least 2", spec, count=1)
    fails("no option 'cuont'; did you mean 'count'", spec, cuont=3)
    fails("unknown split 'test_shifted'.*test_dark", spec, split="test_shifted")
    fails("set validation", spec, split="validation")


def test_a_kind_with_an_argument_and_the_least_of_sources(package):
    splits = {"train": range(20), "validation": range(30, 34), "test": range(40, 45)}
    (package / "levels.txt").write_text("\n".join(f"{s} {i}" for s, levels in splits.items() for i in levels))
    spec = f"foreign_sets.kinds:FromFile:{package}/levels.txt"
    for split, levels in splits.items():
        source = make_source(spec, split=split)
        assert source.batch(np.arange(len(source)))["image"][:, 0, 0, 0].tolist() == list(levels)
    source = make_source(spec)
    with Loader(source, batch_size=8, seed=0) as loader:
        for _ in range(4):
            batch = next(loader)
            assert (batch["image"][:, 1, 1, 2] == batch["index"]).all()
    assert has_own_validation(spec) and len(make_source(spec, split="validation", validation=0.2)) == 4
    fails("must be written foreign_sets.kinds:FromFile:PATH", "foreign_sets.kinds:FromFile")
    fails("must be written foreign_sets.kinds:Ramp", "foreign_sets.kinds:Ramp:x")
    fails("cannot be labelled with its coarse classes|has no second level", spec, labels="coarse")


def test_its_options_in_a_config(package):
    c = base.default()
    c.data.source = "foreign_sets.kinds:Ramp"
    c.data.options = ConfigDict({"count": 6})
    base.check(c)
    assert len(source_of(c, "train")) == 6
    c.data.options = ConfigDict({"count": 0})
    with pytest.raises(UserError, match="^data.options.count is 0"):
        source_of(c, "train")
    c.data.options = ConfigDict({"conut": 3})
    with pytest.raises(UserError, match="^data.options has no option 'conut'; did you mean 'count'"):
        source_of(c, "train")
    c.data.source = "foreign_sets.kinds:Rampe"
    with pytest.raises(UserError, match="^data.source is .*has no Rampe"):
        source_of(c, "train")
    # Options of one kind do not reach another.
    c.data.source = "fashion_mnist"
    assert len(source_of(c, "test")) == 2000


def test_what_is_no_kind(package):
    fails("no kind of source.*SourceKind", "foreign_sets.kinds:Levels")
    fails("no kind of source.*SourceKind", "json:dumps")
    fails("a function", "foreign_sets.kinds:factory")
    fails("there is no module", "nowhere.kinds:Ramp")
    fails("unknown data source.*did you mean 'tfds'.*known: ", "tdfs:cifar10")
    fails("unknown data source.*known: ", "unheard_of:x")


def test_a_misspelt_attribute_is_refused_where_the_kind_is_defined(package):
    with pytest.raises(UserError, match="'own_validaton'; did you mean 'own_validation'"):
        type("Kind", (SOURCES.contract,), {"own_validaton": True})
    (package / "foreign_sets" / "kinds.py").write_text(FOREIGN.replace("extra_splits", "extra_spilts"))
    fails("'extra_spilts'; did you mean 'extra_splits'", "foreign_sets.kinds:Ramp")


def test_a_path_without_its_kind(tmp_path):
    fails(f"folder:{tmp_path}$", str(tmp_path))
    for name, kind in (("a.npz", "npz"), ("a.csv", "csv")):
        (tmp_path / name).write_bytes(b"")
        fails(f"{kind}:{tmp_path}/{name}$", f"{tmp_path}/{name}")
    (tmp_path / "notes.txt").write_bytes(b"")
    fails("known|one of garments", f"{tmp_path}/notes.txt")
    fails("does not exist", f"{tmp_path}/nowhere")
    fails("folder:gs://bucket/set$", "gs://bucket/set")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "t10k-labels.idx1-ubyte"])
def test_idx_files_are_to_be_converted(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0\0\x08\x03")
    fails("idx.*npz:PATH", f"folder:{tmp_path}")
    fails("npz:PATH.*idx", str(tmp_path))
