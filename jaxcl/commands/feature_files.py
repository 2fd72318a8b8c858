"""The files that `jaxcl embed` writes: npz and parquet, streamed batch by batch, complete or not there at all.

N rows, D features.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from jaxcl.data import Source
from jaxcl.errors import UserError
from jaxcl.runtime import storage

ROW_GROUP = 8192  # rows of a parquet row group
Writer = Callable[[IO[bytes], Iterator[np.ndarray], Mapping[str, Source], Mapping[str, Any]], None]


def writer_for(out: str | os.PathLike) -> Writer:
    """The writer for a file name: write(file, batches of features, {split: source}, about).

    Raises:
      UserError: a name that ends in neither .npz nor .parquet, or a library that is not installed.
    """
    kind = os.path.splitext(os.fspath(out))[1]
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    if kind not in writers:
        raise UserError(f"--out is {os.fspath(out)!r}; expected a name that ends in {' or '.join(writers)}")
    if kind == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet files need pyarrow, which is not installed: pip install 'jaxcl[parquet]', or use .npz")
    storage.need_library(out)
    return writers[kind]


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` only if the block ends without an error."""
    path = storage.folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if storage.is_remote(path):
        # Write to a local disk first: closing a remote object after an error would upload half of it.
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with path.open("wb") as remote:
                shutil.copyfileobj(file, remote, 2**24)
        return
    with storage.replacing(path) as file:
        yield file


def _columns(sources: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """Split, index and, where known, label and path of the rows [N] of all splits, one split after the other."""
    columns = {
        "split": [np.full(len(source), split) for split, source in sources.items()],
        "index": [np.arange(len(source), dtype=np.int32) for source in sources.values()],
        "label": [np.asarray(source.labels, np.int32) for source in sources.values()],
    }
    paths = [source.paths for source in sources.values()]
    if all(p is not None for p in paths):
        # Both kinds of file hold text, so bytes that are not UTF-8 are escaped.
        text = [p.encode("utf-8", "backslashreplace").decode() for split in paths for p in split]
        columns["path"] = [np.array(text, np.str_)]
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    if (joined["label"] < 0).all():
        del joined["label"]
    return joined


def _write_npz(
    file: IO[bytes], features: Iterator[np.ndarray], sources: Mapping[str, Source], about: Mapping[str, Any]
) -> None:
    columns, plural = _columns(sources), {"label": "labels", "path": "paths", "split": "splits"}
    arrays = {plural.get(name, name): values for name, values in columns.items()}
    arrays |= {"class_names": np.array(about["class_names"], np.str_), "about": np.array(json.dumps(about))}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (about["rows"], about["features"])}
            np.lib.format.write_array_header_1_0(member, header)
            for batch in features:
                member.write(np.ascontiguousarray(batch, "<f4").tobytes())
        for name, values in arrays.items():
            encoded = io.BytesIO()
            np.lib.format.write_array(encoded, values, allow_pickle=False)
            archive.writestr(f"{name}.npy", encoded.getvalue())


def _write_parquet(
    file: IO[bytes], features: Iterator[np.ndarray], sources: Mapping[str, Source], about: Mapping[str, Any]
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

        def write_group() -> None:
            nonlocal done
            rows = np.concatenate(waiting)
            group = [values.slice(done, len(rows)) for values in columns.values()]
            lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
            writer.write_table(pa.table([*group, lists], schema=schema))
            done += len(rows)
            waiting.clear()

        for batch in features:
            waiting.append(batch)
            if sum(map(len, waiting)) >= ROW_GROUP:
                write_group()
        if waiting:
            write_group()
