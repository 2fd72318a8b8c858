"""Writes tests/golden/encoders/NAME.npz: tiny convolutional networks of timm and others, and what they give.

    PYTHONPATH=. python tests/golden/make_encoders_conv.py     # needs torch, timm, torchvision and transformers

Each file holds, for one network of tests/models/conv_originals.py (random weights):

    state              float16 [S], the tensors of the network one after the other; it holds their values exactly
    shapes             JSON: the shape of each tensor by its name, in the same order
    config, given      JSON: config.json ({} without one), and the options that are given with it
    images0, images1   float16 [1,H,W,3], of an even and of an odd height
    mapI_0, mapI_1     float32 [1,h,w,M], the map after stage I
    features0, ...     float32 [1,D], the features
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "models")]

import conv_originals as originals  # noqa: E402


def main() -> None:
    rng = np.random.default_rng(7)
    for name in originals.FAMILIES:
        original = originals.make(name)
        flat = np.concatenate([v.astype(np.float64).ravel() for v in original.state.values()])
        out = {"state": flat.astype(np.float16)}
        assert (out["state"] == flat).all()
        for i, side in enumerate(originals.SIDES[name.partition("_")[0]]):
            images = rng.standard_normal((1, *side, 3)).astype(np.float16)
            maps, features = original.run(images.astype(np.float32))
            out |= {f"images{i}": images, f"features{i}": features}
            out |= {f"map{stage}_{i}": map_ for stage, map_ in enumerate(maps)}
        out["shapes"] = json.dumps({k: v.shape for k, v in original.state.items()})
        out |= {"config": json.dumps(original.config), "given": json.dumps(original.given)}
        np.savez_compressed(HERE / "encoders" / f"{name}.npz", **out)


if __name__ == "__main__":
    main()
