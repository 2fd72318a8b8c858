"""The variables of our ResNets by the names and in the shapes of torchvision's, and back.

    ours (flax)                                   torch
    params.stem_conv.kernel                       conv1.weight
    *.stem_bn.{scale,bias,mean,var}               bn1.{weight,bias,running_mean,running_var}
    params.stages_I_J.convK.kernel                layer{I+1}.J.convK.weight
    *.stages_I_J.bnK...                           layer{I+1}.J.bnK...
    *.stages_I_J.shortcut_conv, .shortcut_bn      layer{I+1}.J.downsample.0, .1

Kernels are [h,w,in,out] here and [out,in,h,w] there. The networks are the same function: padding is symmetric, a
bottleneck's stride is on its 3x3 (torchvision's "v1.5"), both norms have epsilon 1e-5. While training, torch's running
variance is that of a sample (n - 1), ours of the batch (n). A variable's name is its path in the tree, joined by dots.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.resnet import DEPTHS, STEMS, ResNet

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_OURS = re.compile(
    r"(?:params|batch_stats)\.(?:(stem)_(conv|bn)|stages_(\d+)_(\d+)\.(?:(conv|bn)(\d)|shortcut_(conv|bn)))"
)
_THEIRS = re.compile(r"(?:(conv|bn)1|layer([1-9]\d*)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01])))\.(\w+)")
# Of a classifier on top, and counters that nothing of ours corresponds to.
_IGNORED = re.compile(r"fc\.(weight|bias)|.*\.num_batches_tracked")


def check_encoder(encoder: nn.Module) -> None:
    """UserError for a network that torch's layout has no names for, or whose names would mean another network."""
    if not isinstance(encoder, ResNet):
        raise UserError("the torch layout is that of ResNets, and this encoder is none; use the layout of jaxcl")
    if encoder.norm != "batch":
        raise UserError(f"the torch layout has batch norms, and this encoder norm={encoder.norm}; use that of jaxcl")
    if encoder.norm_sets:
        raise UserError("the torch layout has one set of batch norms; give the clean one alone")
    usual = (1,) + (2,) * (len(encoder.strides) - 1)
    if tuple(encoder.strides) != usual:
        raise UserError(f"the torch layout has strides {usual}, this encoder {tuple(encoder.strides)}; use jaxcl's")


def to_torch(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Variables of a ResNet by our names, as a state dict by torchvision's. Errors: KeyError for other names."""
    out = {}
    for name, value in variables.items():
        module, _, leaf = name.rpartition(".")
        found = _OURS.fullmatch(module)
        if not found:
            raise KeyError(name)
        stem, stem_kind, stage, block, kind, number, shortcut = found.groups()
        if stem:
            module = f"{stem_kind}1"
        else:
            inner = f"{kind}{number}" if kind else f"downsample.{int(shortcut == 'bn')}"
            module = f"layer{int(stage) + 1}.{block}.{inner}"
        if leaf == "kernel":
            out[f"{module}.weight"] = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
        else:
            out[f"{module}.{_NORM[leaf]}"] = value
    return out


def ignored(name: str) -> bool:
    """Whether a tensor of torch's is one that we have no use for."""
    return bool(_IGNORED.fullmatch(name))


def is_torch(names: Iterable[str]) -> bool:
    """Whether these are names of a torchvision ResNet, or near enough to be told what is odd about them."""
    return {"conv1.weight", "bn1.weight"} <= set(names)


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`; what is `ignored` is left out, and names of nothing of ours stay as they are."""
    out, leaf_of = {}, {theirs: ours for ours, theirs in _NORM.items()}
    for name, value in state.items():
        if ignored(name):
            continue
        found = _THEIRS.fullmatch(name)
        if not found:
            out[name] = value
            continue
        stem, stage, block, kind, number, shortcut, leaf = found.groups()
        kind = stem or kind or ("bn" if shortcut == "1" else "conv")
        if stem:
            module = f"stem_{kind}"
        else:
            module = f"stages_{int(stage) - 1}_{block}." + (f"{kind}{number}" if number else f"shortcut_{kind}")
        if kind == "conv" and leaf == "weight" and value.ndim == 4:
            out[f"params.{module}.kernel"] = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
        elif kind == "bn" and leaf in leaf_of:
            tree = "batch_stats" if leaf.startswith("running") else "params"
            out[f"{tree}.{module}.{leaf_of[leaf]}"] = value
        else:
            out[name] = value
    return out


def architecture_of(variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The options of the ResNet that has these variables, by our names, if there is one: `models.ModelOptions`.

    The stem is told by its kernel: 7 pixels "imagenet", 3 "cifar", 2, 4 and 8 patches.
    """
    sizes: list[int] = []
    while any(name.startswith(f"params.stages_{len(sizes)}_0.") for name in variables):
        stage, size = len(sizes), 1
        while any(name.startswith(f"params.stages_{stage}_{size}.") for name in variables):
            size += 1
        sizes.append(size)
    block = "bottleneck" if "params.stages_0_0.conv3.kernel" in variables else "basic"
    last = "conv3" if block == "bottleneck" else "conv2"
    expansion = 4 if block == "bottleneck" else 1
    names = [f"params.stages_{i}_0.{last}.kernel" for i in range(len(sizes))]
    if not sizes or not all(name in variables for name in names):
        raise UserError("it has no blocks of a ResNet; expected torchvision's names: layer1.0.conv1.weight, ...")
    widths = tuple(variables[name].shape[-1] // expansion for name in names)
    side = variables["params.stem_conv.kernel"].shape[0]
    stem = {7: "imagenet", 3: "cifar"}.get(side, f"patch{side}")
    if stem not in STEMS:
        raise UserError(f"its first kernel is of {side} pixels; expected 7, 3, or a patch of 2, 4 or 8")
    depth = next((d for d, known in DEPTHS.items() if known == (block, tuple(sizes))), None)
    options = {"kind": "resnet", "depth": depth or (50 if block == "bottleneck" else 18), "stem": stem}
    options |= {} if depth else {"stage_sizes": tuple(sizes)}
    usual = tuple(64 * 2**i for i in range(len(sizes)))
    return options | ({} if widths == usual else {"stage_widths": widths})


def stem_in_torch(encoder: ResNet) -> dict[str, Any]:
    """How torchvision's network is to be changed for our stem: options of its conv1, and whether it keeps maxpool."""
    if encoder.stem == "imagenet":
        kernel, stride, padding = 7, 2, 3
    elif encoder.stem == "cifar":
        kernel, stride, padding = 3, 1, 1
    else:
        kernel = stride = int(encoder.stem.removeprefix("patch"))
        padding = 0
    conv1 = {"kernel_size": kernel, "stride": stride, "padding": padding}
    return {"conv1": conv1, "maxpool": encoder.stem == "imagenet"}
