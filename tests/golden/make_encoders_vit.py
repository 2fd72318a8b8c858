"""Writes tests/golden/encoders/vision_transformer_NAME.npz: tiny networks of timm and transformers, and what they give.

    PYTHONPATH=. python tests/golden/make_encoders_vit.py     # needs torch, timm and transformers

Each file holds, for one network of tests/models/vit_originals.py (random weights):

    state              float16 [S], the tensors of the network's file one after the other; it holds their values exactly
    shapes             JSON: the shape of each tensor by its name in the file, in the same order
    config, given      JSON: config.json of transformers ({} for timm), and the options that are given with it
    images0, images1   float16 [1,H,W,3], of the size that the positions are for, and of another one, not square
    tokens0, tokens1   float32 [L,T,D], all tokens after each block
    features0, ...     float32 [1,D], the features
"""

import json
import pathlib
import sys
import zlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "models")]

import vit_originals as originals  # noqa: E402


def main() -> None:
    for name in originals.FAMILIES:
        rng = np.random.default_rng(zlib.crc32(name.encode()))  # so that a new family leaves the other files alone
        original = originals.make(name)
        flat = np.concatenate([v.astype(np.float64).ravel() for v in original.saved.values()])
        out = {"state": flat.astype(np.float16)}
        assert (out["state"] == flat).all()
        for i, side in enumerate(((originals.SIDE, originals.SIDE), originals.OTHER)):
            images = rng.standard_normal((1, *side, 3)).astype(np.float16)
            tokens, features = original.run(images.astype(np.float32))
            out |= {f"images{i}": images, f"tokens{i}": np.concatenate(tokens), f"features{i}": features}
        out["shapes"] = json.dumps({k: v.shape for k, v in original.saved.items()})
        out |= {"config": json.dumps(original.config, default=str), "given": json.dumps(original.given)}
        np.savez_compressed(HERE / "encoders" / f"vision_transformer_{name}.npz", **out)


if __name__ == "__main__":
    main()
