"""Write the features that a trained run has of images to a file.

    python -m jaxcl embed --workdir=RUN --out=features.npz [--source=folder:photos] [--split=test] [--layer=z]
    python -m jaxcl embed --workdir=RUN --workdir=RUN --out=gs://bucket/features.parquet

One row an image, of every part that the source has (train, validation, test) or of one: the features, the part, the
row in it, and where known the label, the class and the file. Several run folders (or RUN+RUN) are one encoder, their
features side by side. Features go to the disk batch by batch; the file is there when it is whole, and not before.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from absl import flags

from jaxcl.errors import UserError
from jaxcl.runtime import compile_cache, storage
from jaxcl.runtime import flags as command_line

if TYPE_CHECKING:
    from jaxcl.data import Source
    from jaxcl.train.runs import Run

logger = logging.getLogger("jaxcl")

_FLAGS = flags.FlagValues()
_own = dict(flag_values=_FLAGS)
_WORKDIR = flags.DEFINE_multi_string("workdir", [], "A run folder; several: their features side by side.", **_own)
_OUT = flags.DEFINE_string("out", "", "A file that ends in .npz or .parquet; local or gs://.", **_own)
_SOURCE = flags.DEFINE_string("source", "", "A data source as in a config; default: the run's own.", **_own)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.", **_own)
_SPLIT = flags.DEFINE_string("split", "", "A part such as test; default: train, validation and test.", **_own)
_LAYER = flags.DEFINE_string("layer", "", "h: pooled features; z: the embedding; default: as eval.features.", **_own)

PARQUET_ROWS = 8192  # of a row group


def embed(runs: Sequence["Run"], out: str | os.PathLike, *, split: str = "", layer: str = "") -> dict[str, Any]:
    """Write the features of runs, opened by `load_run`, to a file; -> what it says about itself.

    Args:
      runs: several are one encoder, their features side by side.
      out: a file that ends in .npz or .parquet, local or remote; one that is there is replaced.
      split: one of the source's; "": all of train, validation and test that there are.
      layer: "h" (pooled features) or "z" (the embedding at unit length); "": eval.features of the first run.

    An npz file holds `features` float32 [N,D], `splits` and `index` [N] (the row in its split), where there are any
    `labels` int32 [N] (-1: none), `class_names` [K] and `paths` [N], and `about`, JSON. A parquet file has a column for
    each (features, split, index, label, class, path) and `about` as its metadata "jaxcl". Nothing is pickled.

    Raises:
      UserError: another layer, split or kind of file, or one that cannot be written.
    """
    from jaxcl.evaluate.context import FEATURES
    from jaxcl.train.runs import Joined

    write = _writer_for(out)
    first = runs[0]
    layer = layer or first.evaluation.options.features
    if layer not in FEATURES:
        expected = " or ".join(f"{k!r} ({v})" for k, v in FEATURES.items())
        raise UserError(f"--layer is {layer!r}; expected {expected}")
    frozen = {s: Joined(runs, s) if len(runs) > 1 else first.frozen(s) for s in _splits(first, split)}
    sources = {s: f.test for s, f in frozen.items()}
    N, D = sum(map(len, sources.values())), sum(_width(run, layer) for run in runs)
    about = {
        "runs": [{"workdir": str(r.workdir), "step": r.step, "config": r.config.name} for r in runs],
        "source": first.config.data.source,
        "layer": layer,
        "rows": N,
        "features": D,
        "class_names": next(iter(sources.values())).class_names,
    }
    features = (part for s, f in frozen.items() for part in f.stream(sources[s], layer))
    try:
        with _new_file(out) as file:
            write(file, features, sources, about)
    except OSError as error:
        raise UserError(f"cannot write {out}: {storage.refusal(error) or error.strerror or error}") from error
    logger.info("%s: %s images, %s features each", out, f"{N:,}", f"{D:,}")
    return about


def _width(run: "Run", layer: str) -> int:
    recipe = run.recipe
    count = recipe.features_of if layer == "h" else recipe.embedding_features_of
    return count(recipe.representation)


def _splits(run: "Run", split: str) -> tuple[str, ...]:
    there = run.evaluation.source
    if split:
        if there(split) is None:
            raise UserError(f"--split is {split!r}, which {run.config.data.source} does not have")
        return (split,)
    found = ["train"]
    for part in ("validation", "test"):
        try:
            there(part)
        except UserError:  # the source has none: nothing is wrong
            continue
        found.append(part)
    return tuple(found)


# ---- files


def _writer_for(out: str | os.PathLike):
    kind = os.path.splitext(os.fspath(out))[1]
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    if kind not in writers:
        raise UserError(f"--out is {os.fspath(out)!r}; expected a name that ends in {' or '.join(writers)}")
    if kind == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet files need pyarrow, which is not installed: pip install 'jaxcl[parquet]', or use .npz")
    storage.need_library(out)
    return writers[kind]


@contextlib.contextmanager
def _new_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write to, that stands at its place only when all is well; otherwise nothing changes there."""
    path = storage.folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if storage.is_remote(path):
        # Written to a disk first: closing an object after an error would put half of it up.
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with path.open("wb") as remote:
                shutil.copyfileobj(file, remote, 2**24)
        return
    local = pathlib.Path(path)
    temporary = local.with_name(f".{local.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)


def _columns(sources: dict[str, "Source"]) -> dict[str, np.ndarray]:
    """What is known of the rows of all parts, one after the other."""
    parts = {
        "split": [np.full(len(source), split) for split, source in sources.items()],
        "index": [np.arange(len(source), dtype=np.int32) for source in sources.values()],
        "label": [np.asarray(source.labels, np.int32) for source in sources.values()],
    }
    paths = [source.paths for source in sources.values()]
    if all(p is not None for p in paths):
        # Names that are no UTF-8 stand escaped: neither kind of file holds bytes for text.
        text = [p.encode("utf-8", "backslashreplace").decode() for part in paths for p in part]
        parts["path"] = [np.array(text, np.str_)]
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    if (columns["label"] < 0).all():
        del columns["label"]
    return columns


def _write_npz(
    file: IO[bytes], features: Iterator[np.ndarray], sources: dict[str, "Source"], about: dict[str, Any]
) -> None:
    columns, called = _columns(sources), {"label": "labels", "path": "paths", "split": "splits"}
    arrays = {called.get(name, name): values for name, values in columns.items()}
    arrays |= {"class_names": np.array(about["class_names"], np.str_), "about": np.array(json.dumps(about))}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (about["rows"], about["features"])}
            np.lib.format.write_array_header_1_0(member, header)
            for part in features:
                member.write(np.ascontiguousarray(part, "<f4").tobytes())
        for name, values in arrays.items():
            encoded = io.BytesIO()
            np.lib.format.write_array(encoded, values, allow_pickle=False)
            archive.writestr(f"{name}.npy", encoded.getvalue())


def _write_parquet(
    file: IO[bytes], features: Iterator[np.ndarray], sources: dict[str, "Source"], about: dict[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: pa.array(values) for name, values in _columns(sources).items()}
    if "label" in columns:
        labels = np.asarray(columns["label"])
        columns["label"] = pa.array(labels, mask=labels < 0)
        names = pa.array(about["class_names"], pa.string())
        columns["class"] = pa.DictionaryArray.from_arrays(columns["label"], names)
    D, kinds = about["features"], [(name, values.type) for name, values in columns.items()]
    schema = pa.schema([*kinds, ("features", pa.list_(pa.float32(), D))], metadata={"jaxcl": json.dumps(about)})
    with pq.ParquetWriter(file, schema) as writer:
        done, waiting = 0, []

        def put() -> None:
            nonlocal done
            rows = np.concatenate(waiting)
            own = [values.slice(done, len(rows)) for values in columns.values()]
            lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
            writer.write_table(pa.table([*own, lists], schema=schema))
            done += len(rows)
            waiting.clear()

        for part in features:
            waiting.append(part)
            if sum(map(len, waiting)) >= PARQUET_ROWS:
                put()
        if waiting:
            put()


# ---- the command


def _folders(given: Sequence[str]) -> list[str]:
    """RUN+RUN is two of them, unless a folder is called so."""
    return [f for text in given for f in ([text] if storage.folder(text).exists() else text.split("+"))]


def run(argv: list[str]) -> int:
    """Embed; -> exit code."""
    _FLAGS.unparse_flags()
    command_line.parse(argv, _FLAGS)
    for name, flag in (("workdir", _WORKDIR), ("out", _OUT)):
        if not flag.value:
            raise UserError(f"no --{name}; expected --workdir=RUN --out=features.npz")
    _writer_for(_OUT.value)
    from jaxcl.train.runs import load_run  # after the flags are known to be right

    compile_cache.turn_on()
    opened = [load_run(folder, source=_SOURCE.value, step=_STEP.value) for folder in _folders(_WORKDIR.value)]
    embed(opened, _OUT.value, split=_SPLIT.value, layer=_LAYER.value)
    return 0


def cli() -> None:
    """Exit codes as those of jaxcl.main."""
    command_line.leave(run)


if __name__ == "__main__":
    cli()
