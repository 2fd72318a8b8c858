"""Writes the files beside it with torch.save: a small state dict in the zip format and in the one before torch 1.6.

    python tests/golden/torch_files/make.py

expected.npz holds the same tensors as NumPy arrays; those in bfloat16 as float32.
"""

import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent


def state_dict():
    """Every layout that a file can have: views, transposed, empty and shared tensors, all the types."""
    x = torch.arange(24.0).reshape(2, 3, 4) / 7
    tensors = {"conv.weight": x, "conv.transposed": x.transpose(0, 2), "conv.part": x[1:, :2], "conv.step": x[..., ::3]}
    tensors |= {"bn.running_var": torch.tensor([1.0, 2.0]), "bn.num_batches_tracked": torch.tensor(3)}
    tensors |= {"empty": torch.zeros(0, 3), "flags": x > 2}
    kinds = ("float64", "float16", "bfloat16", "int32", "int16", "int8", "uint8")
    return tensors | {kind: x.to(getattr(torch, kind)) for kind in kinds}


def main():
    tensors = state_dict()
    for name, zipped in (("zip.pth", True), ("legacy.pth", False)):
        torch.save(tensors, FOLDER / name, _use_new_zipfile_serialization=zipped)
    # As a training script writes it: parameters, through DataParallel, beside numbers.
    whole = {"epoch": 3, "lr": 0.1, "state_dict": {"module.w": torch.nn.Parameter(torch.ones(2, 2))}, "log": [1, (2,)]}
    torch.save(whole, FOLDER / "script.pth")
    arrays = {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in tensors.items()}
    np.savez_compressed(FOLDER / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
