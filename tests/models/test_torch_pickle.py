"""Files of torch.save read without torch: both formats to the bit, and every file that is hostile or damaged."""

import io
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.models import torch_pickle

FILES = pathlib.Path(__file__).resolve().parents[1] / "golden" / "torch_files"
MAGIC = 0x1950A86A20F9469CFC6C
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def refused(content):
    with pytest.raises(UserError) as error:
        torch_pickle.read(content, "FILE")
    assert str(error.value).startswith("FILE ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_every_tensor_of_both_formats(name):
    with np.load(FILES / "expected.npz") as file:
        expected = dict(file)
    found = torch_pickle.read((FILES / name).read_bytes(), name)
    assert found.keys() == expected.keys() and len(found) == 15
    for key, value in expected.items():
        kind = ml_dtypes.bfloat16 if key == "bfloat16" else value.dtype
        assert found[key].dtype == kind and found[key].shape == value.shape
        np.testing.assert_array_equal(found[key].astype(value.dtype), value)


def test_the_checkpoint_of_a_training_script():
    found = torch_pickle.read((FILES / "script.pth").read_bytes(), "script")
    assert found.keys() == {"w"}
    np.testing.assert_array_equal(found["w"], np.ones((2, 2)))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_the_installed_torch_writes(zipped):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream, _use_new_zipfile_serialization=zipped)
    found = torch_pickle.read(stream.getvalue(), "module")
    assert found.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(found[name], value.numpy())
    stream = io.BytesIO()
    torch.save(module, stream, _use_new_zipfile_serialization=zipped)
    assert "torch.nn" in refused(stream.getvalue())


# ---- hostile files


def zipped(pickled, data=b"", compression=zipfile.ZIP_STORED, **entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "data/0": data, **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def legacy(pickled, keys=(), data=b""):
    return b"".join(pickle.dumps(x, 2) for x in (MAGIC, 1001, MACHINE)) + pickled + pickle.dumps(list(keys), 2) + data


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor(shape=(2,), strides=(1,), offset=0, count=2, kind=b"FloatStorage", key=b"0"):
    """{"w": a tensor}, in pickle's instructions."""

    def whole(n):
        return b"J" + struct.pack("<i", n)

    def row(values):
        return b"(" + b"".join(map(whole, values)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu"
    storage += whole(count) + b"tQ"
    arguments = b"(" + storage + whole(offset) + row(shape) + row(strides) + b"\x89}t"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def test_the_files_made_here_are_what_torch_would_read():
    data = np.array([5, 7], "<f4").tobytes()
    for content in (zipped(tensor(), data), legacy(tensor(), ["0"], struct.pack("<q", 2) + data)):
        np.testing.assert_array_equal(torch_pickle.read(content, "w")["w"], [5, 7])


HOSTILE = {
    "os.system": pickle.dumps(Call(os.system, "touch PWNED"), 2),
    "eval": pickle.dumps({"w": Call(eval, "open('PWNED', 'w')")}, 2),
    "getattr": pickle.dumps({"w": Call(getattr, 1, "real")}, 2),
    "import by a stack global": pickle.dumps(Call(os.system, "touch PWNED"), 4),
    "an instance": b"\x80\x02(ios\nsystem\nX\x0b\x00\x00\x00touch PWNEDo.",
    "inst": b"(S'touch PWNED'\nios\nsystem\n.",
    "a number of the machine's registry": b"\x80\x02\x82\x01.",
    "a call of what is no function": b"\x80\x02}(tR.",
    "a storage that is called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "attributes of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "a dict of arguments": b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (zipped(HOSTILE[name]), legacy(HOSTILE[name])):
        refused(content)
    # Also where the other facts of a legacy file are.
    refused(HOSTILE[name] if HOSTILE[name].startswith(b"\x80\x02") else b"\x80\x02" + HOSTILE[name])
    assert not list(tmp_path.iterdir())


def test_the_name_that_is_asked_for_is_in_the_message():
    assert "system" in refused(zipped(HOSTILE["os.system"])) and "getattr" in refused(legacy(HOSTILE["getattr"]))


SIZES = {
    "more elements than the storage": dict(shape=(3,)),
    "beyond the storage": dict(offset=1),
    "one number seen a million million times": dict(shape=(10**6, 10**6), strides=(0, 0)),
    "a huge storage": dict(count=2**31 - 1),
    "a negative step": dict(strides=(-1,)),
    "a negative size": dict(shape=(-2,)),
    "a negative storage": dict(count=-2),
    "a negative offset": dict(offset=-1),
    "another rank of steps": dict(shape=(1, 2)),
    "a storage that is not there": dict(key=b"1"),
    "an unknown storage": dict(kind=b"QuantizedStorage"),
    "many dimensions": dict(shape=(1,) * 40, strides=(0,) * 40),
}


@pytest.mark.parametrize("name", SIZES)
def test_impossible_sizes(name):
    data = np.array([5, 7], "<f4").tobytes()
    refused(zipped(tensor(**SIZES[name]), data))
    refused(legacy(tensor(**SIZES[name]), ["0"], struct.pack("<q", SIZES[name].get("count", 2)) + data))


def test_many_tensors_of_one_storage():
    """Each is as large as the file; together they would fill the memory. Two, as of tied weights, are read."""
    data, one = np.zeros(25_000, "<f4").tobytes(), tensor((25_000,), count=25_000)
    begin, end = one.index(b"X\x01\x00\x00\x00w"), -2  # without the dict around the tensor, and the end

    def several(count):
        names = [b"X\x02\x00\x00\x00" + b"%02d" % i for i in range(count)]
        return b"\x80\x02}" + b"".join(name + one[begin + 6 : end] + b"s" for name in names) + b"."

    assert len(torch_pickle.read(zipped(several(2), data), "two")) == 2
    assert "overlap" in refused(zipped(several(60), data))


def test_huge_numbers_in_instructions_take_no_memory():
    refused(zipped(b"\x80\x02}r\xff\xff\xff\xffr\xff\xff\xff\xff."))  # places in the memo
    refused(zipped(b"\x80\x02X\xff\xff\xff\x7fabc."))  # the length of a text
    refused(zipped(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc."))
    refused(legacy(tensor(), ["0"], struct.pack("<q", 2**62)))
    nested = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    refused(zipped(nested))
    laughs = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60
    refused(zipped(laughs + b"."))
    refused(zipped(b"\x80\x02}" + laughs[2:] + b"K\x01s."))  # as a key, it would take for ever to hash


def test_archives_that_torch_does_not_write():
    data = np.array([5, 7], "<f4").tobytes()
    refused(zipped(tensor(), data, zipfile.ZIP_DEFLATED))  # may fill the memory
    assert "big-endian" in refused(zipped(tensor(), data, byteorder=b"big"))
    refused(zipped(tensor(), data, **{"more/data.pkl": tensor()}))
    refused(zipped(pickle.dumps({"w": 1}, 2)))
    refused(zipped(pickle.dumps([1], 2)))
    refused(zipped(tensor(), data[:4]))
    refused(b"PK\x05\x06" + bytes(18))


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_files_that_are_cut_or_damaged(name):
    """Damage ends in one line, or leaves a file that can be read; never in another error."""
    whole = (FILES / name).read_bytes()
    for end in range(0, len(whole), 7):
        refused(whole[:end])
    rng = np.random.default_rng(0)
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            content[place] = rng.integers(0, 256)
        try:
            torch_pickle.read(bytes(content), "FILE")
        except UserError as error:
            assert "\n" not in str(error)
