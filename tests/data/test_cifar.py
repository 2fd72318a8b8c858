"""cifar:PATH: both sets in both versions, and malicious pickles."""

import io
import os
import pickle

import numpy as np
import pytest
import source_checks

from jaxcl.data import make_source

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)  # NHWC, the expected result
FLAT = PIXELS.transpose(0, 3, 1, 2).reshape(60, -1)
LABELS = np.arange(60) % 10
FINE, COARSE = RNG.permutation(60) + 40, np.arange(60) % 20


def python2(value):
    """Pickles as Python 2 wrote them: byte strings (opcode U) for text and for the array's raw data."""

    class Writer(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def save_text(self, text):
            raw = text.encode("latin1") if isinstance(text, str) else text
            self.write(b"T" + len(raw).to_bytes(4, "little") + raw)
            self.memoize(text)

        dispatch[str] = dispatch[bytes] = save_text

        def save_global(self, obj, name=None):
            module = "numpy.core.multiarray" if obj.__name__ == "_reconstruct" else "numpy"
            self.write(f"c{module}\n{obj.__name__}\n".encode())
            self.memoize(obj)

        for kind in (type, type(len), type(python2)):
            dispatch[kind] = save_global

    stream = io.BytesIO()
    Writer(stream, 2).dump(value)
    return stream.getvalue()


WRITERS = {"python2": python2, **{f"protocol{p}": (lambda v, p=p: pickle.dumps(v, p)) for p in (0, 2, 4, 5)}}


def write_cifar10(folder, dumps):
    for i in range(6):
        part = slice(i * 10, i * 10 + 10)
        name = "test_batch" if i == 5 else f"data_batch_{i + 1}"
        content = {
            "data": FLAT[part],
            "labels": LABELS[part].tolist(),
            "batch_label": name,
            "filenames": ["a.png"] * 10,
        }
        (folder / name).write_bytes(dumps(content))


def fails(match, folder, **options):
    source_checks.fails(match, f"cifar:{folder}", **options)


@pytest.mark.parametrize("dumps", WRITERS.values(), ids=WRITERS)
def test_cifar10_python(tmp_path, dumps):
    write_cifar10(tmp_path, dumps)
    train, test = make_source(f"cifar:{tmp_path}"), make_source(f"cifar:{tmp_path}", split="test")
    assert (train.images == PIXELS[:50]).all() and (test.images == PIXELS[50:]).all()
    assert (train.labels == LABELS[:50]).all() and train.labels.dtype == np.int32
    assert train.mean == (0.4914, 0.4822, 0.4465) and train.std == (0.2023, 0.1994, 0.2010)
    coarse = dict(zip(train.class_names, np.array(train.coarse_names)[train.extras["coarse"][:10]], strict=True))
    assert [n for n, c in coarse.items() if c == "vehicles"] == ["airplane", "automobile", "ship", "truck"]
    assert len(make_source(f"cifar:{tmp_path}", split="validation", validation=0.2)) == 10


def test_cifar10_binary_and_the_folder_above(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.concatenate([LABELS[:, None].astype(np.uint8), FLAT], 1)
    for i in range(6):
        name = "test_batch.bin" if i == 5 else f"data_batch_{i + 1}.bin"
        records[i * 10 : i * 10 + 10].tofile(folder / name)
    for path in (folder, tmp_path):
        source = make_source(f"cifar:{path}")
        assert (source.images == PIXELS[:50]).all() and (source.labels == LABELS[:50]).all()
    (folder / "data_batch_3.bin").write_bytes(records[:3].tobytes()[:-1])
    fails("data_batch_3.bin has 9218 bytes.*truncated", tmp_path)
    records[0, 0] = 10
    records[:10].tofile(folder / "data_batch_3.bin")
    fails("outside CIFAR-10", tmp_path)


@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar100(tmp_path, version):
    fine_names, coarse_names = [f"f{i}" for i in range(100)], [f"c{i}" for i in range(20)]
    for name, part in (("train", slice(0, 50)), ("test", slice(50, 60))):
        if version == "python":
            lists = {"fine_labels": FINE[part].tolist(), "coarse_labels": COARSE[part].tolist()}
            (tmp_path / name).write_bytes(python2({"data": FLAT[part], **lists}))
        else:
            records = np.concatenate([COARSE[part, None], FINE[part, None], FLAT[part]], 1).astype(np.uint8)
            records.tofile(tmp_path / f"{name}.bin")
    if version == "python":
        (tmp_path / "meta").write_bytes(python2({"fine_label_names": fine_names, "coarse_label_names": coarse_names}))
    else:
        (tmp_path / "fine_label_names.txt").write_text("\n".join(fine_names) + "\n")
        (tmp_path / "coarse_label_names.txt").write_text("\n".join(coarse_names) + "\n")
    for split, part in (("train", slice(0, 50)), ("test", slice(50, 60))):
        source = make_source(f"cifar:{tmp_path}", split=split)
        assert (source.images == PIXELS[part]).all() and (source.labels == FINE[part]).all()
        assert (source.extras["coarse"] == COARSE[part]).all()
        assert source.class_names == tuple(fine_names) and source.coarse_names == tuple(coarse_names)
        assert source.mean == (0.5071, 0.4867, 0.4408)


class Shell:
    def __reduce__(self):
        return os.system, ("touch " + Shell.target,)


class Evaluate:
    def __reduce__(self):
        return eval, (f"open({Shell.target!r}, 'w')",)


class Loads:
    """An attack through a function of NumPy."""

    def __reduce__(self):
        return np.load, (Shell.target,)


@pytest.mark.parametrize("attack", [Shell, Evaluate, Loads])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path, attack, protocol):
    Shell.target = str(tmp_path / "pwned")
    write_cifar10(tmp_path, WRITERS["protocol2"])
    content = {"data": FLAT[:10], "labels": list(range(10)), "extra": attack()}
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content, protocol))
    fails("data_batch_2 asks for .* which no CIFAR batch needs; it was not run", tmp_path)
    assert not os.path.exists(Shell.target)


def test_a_pickle_may_not_reach_into_modules(tmp_path):
    write_cifar10(tmp_path, WRITERS["protocol2"])
    for name in (
        b"cnumpy\nsave\n",
        b"cnumpy\ncore.multiarray.sys.exit\n",
        b"cbuiltins\ngetattr\n",
        b"c_codecs\ndecode\n",
    ):
        (tmp_path / "data_batch_1").write_bytes(name + b".")
        fails("was not run", tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tofile.x\x93.")
    fails("was not run", tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"Pid\n.")
    fails("cannot be read", tmp_path)


@pytest.mark.parametrize(
    "content, match",
    [
        (pickle.dumps({"data": FLAT[:10], "labels": [0] * 9}), "one integer label for each of its 10 images"),
        (pickle.dumps({"data": FLAT[:10], "labels": ["a"] * 10}), "one integer label"),
        (pickle.dumps({"data": FLAT[:10], "labels": [2**80] * 10}), "outside CIFAR-10"),
        (pickle.dumps({"data": FLAT[:10, :100], "labels": [0] * 10}), "3072"),
        (pickle.dumps({"data": FLAT[:10].astype(np.float32), "labels": [0] * 10}), "uint8"),
        (pickle.dumps({"data": np.array([{}], object), "labels": [0] * 10}, 2), "uint8"),
        (pickle.dumps([1, 2]), "no dictionary"),
        (pickle.dumps({"data": FLAT[:10], "labels": [0] * 10})[:2000], "truncated"),
        (b"", "truncated"),
        (b"\x00" * 100, "cannot be read"),
    ],
)
def test_damaged_batches(tmp_path, content, match):
    write_cifar10(tmp_path, WRITERS["protocol4"])
    (tmp_path / "data_batch_4").write_bytes(content)
    fails(match, tmp_path)


def test_missing_files(tmp_path):
    fails("no folder at", tmp_path / "nowhere")
    fails("holds no CIFAR batches", tmp_path)
    write_cifar10(tmp_path, WRITERS["protocol4"])
    (tmp_path / "data_batch_3").unlink()
    (tmp_path / "data_batch_5").unlink()
    fails("lacks data_batch_3, data_batch_5", tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")
    fails("both CIFAR-10 and CIFAR-100", tmp_path)


def test_the_writer_is_a_python2_pickle():
    """Checks `python2` above against the standard unpickler."""
    back = pickle.loads(python2({"data": FLAT[:2], "labels": [1]}), encoding="bytes")
    assert (back[b"data"] == FLAT[:2]).all() and back[b"labels"] == [1]
    assert b"numpy.core.multiarray" in python2({"data": FLAT[:2]})
