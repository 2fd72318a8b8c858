"""Files as `torch.save` writes them, made without torch."""

import io
import struct
import zipfile

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def _text(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _row(values):
    return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"


def save(tensors):
    """{name: array} -> the zip archive of a state dict."""
    out, pickled = io.BytesIO(), b"\x80\x02ccollections\nOrderedDict\n)R("
    with zipfile.ZipFile(out, "w") as archive:
        for i, (name, value) in enumerate(tensors.items()):
            value = np.ascontiguousarray(value)
            storage = b"ctorch\n" + _STORAGES[str(value.dtype)].encode() + b"\n" + _text(str(i)) + _text("cpu")
            storage = b"(" + _text("storage") + storage + b"J" + struct.pack("<i", value.size) + b"tQ"
            strides = [step // value.itemsize for step in value.strides]
            arguments = b"(" + storage + b"K\x00" + _row(value.shape) + _row(strides) + b"\x89}t"
            pickled += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
            archive.writestr(f"archive/data/{i}", value.tobytes())
        archive.writestr("archive/data.pkl", pickled + b"u.")
    return out.getvalue()
