"""The variables of a ResNet by the names and in the shapes of torchvision's, and back.

    flax                                          torch
    params.stem_conv.kernel                       conv1.weight
    *.stem_bn.{scale,bias,mean,var}               bn1.{weight,bias,running_mean,running_var}
    params.stages_I_J.convK.kernel                layer{I+1}.J.convK.weight
    *.stages_I_J.bnK...                           layer{I+1}.J.bnK...
    *.stages_I_J.shortcut_conv, .shortcut_bn      layer{I+1}.J.downsample.0, .1

Kernels are [h,w,in,out] in flax and [out,in,h,w] in torch. The networks are the same function: padding is symmetric, a
bottleneck has its stride on the 3x3 (torchvision's "v1.5"), both norms have epsilon 1e-5. In training, torch's running
variance is that of a sample (n - 1), here it is that of the batch (n).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.preprocessing import IMAGENET, Preprocessing
from jaxcl.models.resnet_blocks import DEPTHS, STEMS
from jaxcl.models.torch_layout import TorchLayout, Variables

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_FLAX = re.compile(
    r"(?:params|batch_stats)\.(?:(stem)_(conv|bn)|stages_(\d+)_(\d+)\.(?:(conv|bn)(\d)|shortcut_(conv|bn)))"
)
_TORCH = re.compile(r"(?:(conv|bn)1|layer([1-9]\d*)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01])))\.(\w+)")
# A classifier, and counters of torch's batch norms.
_IGNORED = re.compile(r"fc\.(weight|bias)|classifier\.1\.(weight|bias)|.*\.num_batches_tracked")
# The same network by the names of transformers, with "resnet." before them where a classifier is beside it.
_HUB = re.compile(
    r"(?:resnet\.)?(?:embedder\.embedder|encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|(shortcut)))"
    r"\.(convolution|normalization)\.(\w+)"
)


def _torchvision(name: str) -> str:
    """A name of transformers -> torchvision's; other names stay as they are."""
    found = _HUB.fullmatch(name)
    if not found:
        return name
    stage, block, number, shortcut, kind, leaf = found.groups()
    conv = kind == "convolution"
    if stage is None:
        return f"{'conv1' if conv else 'bn1'}.{leaf}"
    inner = f"downsample.{int(not conv)}" if shortcut else f"{'conv' if conv else 'bn'}{int(number) + 1}"
    return f"layer{int(stage) + 1}.{block}.{inner}.{leaf}"


class ResNetLayout(TorchLayout):
    """Between a ResNet's variables and the state dict of torchvision's."""

    network: ClassVar[str] = "a ResNet by torchvision's names (conv1.weight, bn1.weight, layer1.0.conv1.weight, ...)"
    usual_preprocessing: ClassVar[Preprocessing | None] = IMAGENET

    def recognises(self, names: Iterable[str]) -> bool:
        return {"conv1.weight", "bn1.weight"} <= set(map(_torchvision, names))

    def ignores(self, name: str) -> bool:
        return bool(_IGNORED.fullmatch(name))

    def to_torch(self, variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = {}
        for name, value in variables.items():
            module, _, leaf = name.rpartition(".")
            found = _FLAX.fullmatch(module)
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

    def from_torch(self, state: Mapping[str, np.ndarray]) -> Variables:
        out, leaf_of = {}, {theirs: ours for ours, theirs in _NORM.items()}
        for name, value in state.items():
            if self.ignores(name):
                continue
            found = _TORCH.fullmatch(_torchvision(name))
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

    def architecture(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The stem is recognised by its kernel: 7 pixels "imagenet", 3 "cifar", 2, 4 and 8 patches."""
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
            raise UserError(f"it has no blocks of a ResNet; expected {self.network}")
        widths = tuple(variables[name].shape[-1] // expansion for name in names)
        side = variables["params.stem_conv.kernel"].shape[0]
        stem = {7: "imagenet", 3: "cifar"}.get(side, f"patch{side}")
        if stem not in STEMS:
            raise UserError(f"its first kernel is of {side} pixels; expected 7, 3, or a patch of 2, 4 or 8")
        depth = next((d for d, known in DEPTHS.items() if known == (block, tuple(sizes))), None)
        options = {"depth": depth or (50 if block == "bottleneck" else 18), "stem": stem}
        options |= {} if depth else {"stage_sizes": tuple(sizes)}
        usual = tuple(64 * 2**i for i in range(len(sizes)))
        # A shortcut that changes no width is there for a stride.
        shortcut = variables.get("params.stages_0_0.shortcut_conv.kernel")
        if shortcut is not None and shortcut.shape[2] == shortcut.shape[3]:
            options |= {"strides": (2,) * len(sizes)}
        return options | ({} if widths == usual else {"stage_widths": widths})

    def architecture_from_config(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What tensors do not tell, in transformers' config.json: where the strides are."""
        if config.get("model_type") != "resnet" or not isinstance(config.get("depths"), list):
            return None
        if config.get("downsample_in_bottleneck"):
            raise UserError("it has the strides of bottlenecks on their first convolutions; expected them on the 3x3")
        if config.get("hidden_act", "relu") != "relu":
            raise UserError(f"its activation is {config['hidden_act']}; expected relu")
        return {"strides": (2,) * len(config["depths"])} if config.get("downsample_in_first_stage") else {}

    def check(self, encoder: Any) -> None:
        if encoder.norm != "batch":
            raise UserError(f"torchvision's ResNets have batch norms, this one norm={encoder.norm}; use layout jaxcl")
        if encoder.norm_sets:
            raise UserError("torchvision's ResNets have one set of batch norms; give the clean one alone")
        usual = (1,) + (2,) * (len(encoder.strides) - 1)
        if tuple(encoder.strides) != usual:
            raise UserError(
                f"torchvision's ResNets have strides {usual}, this one {tuple(encoder.strides)}; use layout jaxcl"
            )

    def changes(self, encoder: Any) -> dict[str, Any]:
        """-> {"conv1": the options of the stem's convolution, "maxpool": whether the network keeps its max-pool}."""
        if encoder.stem == "imagenet":
            kernel, stride, padding = 7, 2, 3
        elif encoder.stem == "cifar":
            kernel, stride, padding = 3, 1, 1
        else:
            kernel = stride = int(encoder.stem.removeprefix("patch"))
            padding = 0
        conv1 = {"kernel_size": kernel, "stride": stride, "padding": padding}
        return {"conv1": conv1, "maxpool": encoder.stem == "imagenet"}
