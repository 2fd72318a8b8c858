"""The variables of an EfficientNet-Lite by the names and in the shapes of timm's, and back.

    flax                                        timm                                efficientnet_lite_pytorch
    params.stem_conv.kernel                     conv_stem.weight                    _conv_stem.weight
    *.stem_bn.{scale,bias,mean,var}             bn1.{weight,bias,running_mean,...}  _bn0...
    params.stages_I_J.expand_conv, expand_bn    blocks.I.J.conv_pw, bn1             _blocks.K._expand_conv, _bn0
    *.stages_I_J.depthwise_conv, depthwise_bn   blocks.I.J.conv_dw, bn2             _blocks.K._depthwise_conv, _bn1
    *.stages_I_J.project_conv, project_bn       blocks.I.J.conv_pwl, bn3            _blocks.K._project_conv, _bn2
    params.head_conv, *.head_bn                 conv_head, bn2                      _conv_head, _bn1

A block that does not widen (stage 0) has in timm conv_dw, bn1, conv_pw, bn2. Both are read, timm's are written. Blocks
that are counted through, K, belong to the next stage where the width changes, as it does between all stages.

Kernels are [h,w,in,out] in flax and [out,in,h,w] in torch. The tensors do not tell padding and epsilon: they are
those of TensorFlow ("same", 1e-3) as in most that is published; timm's config.json names efficientnet_lite0, which has
those of torch.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.efficientnet_blocks import FACTORS, sizes_of
from jaxcl.models.torch_layout import TorchLayout, Variables

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_PARTS = ("expand", "depthwise", "project")
_FLAX = re.compile(r"(?:params|batch_stats)\.(?:(stem|head)|stages_(\d+)_(\d+)\.(expand|depthwise|project))_(conv|bn)")
_TIMM = re.compile(r"(?:(conv)_(stem|head)|bn([12])|blocks\.(\d+)\.(\d+)\.(?:(conv)_(pw|dw|pwl)|bn([123])))\.(\w+)")
_LITE = re.compile(
    r"(?:_(conv)_(stem|head)|_bn([01])|_blocks\.(\d+)\.(?:_(expand|depthwise|project)_(conv)|_bn([012])))\.(\w+)"
)
_IGNORED = re.compile(r"(classifier|_fc)\.(weight|bias)|.*\.num_batches_tracked")
_NAME = re.compile(r"(tf_)?efficientnet_lite(\d)")


def _count(variables: Iterable[str], prefix: str) -> int:
    """How many of prefix0, prefix1 ... begin a name."""
    names, count = list(variables), 0
    while any(name.startswith(prefix.format(count)) for name in names):
        count += 1
    return count


class EfficientNetLayout(TorchLayout):
    """Between an EfficientNet-Lite's variables and the state dicts of timm's and efficientnet_lite_pytorch's."""

    network: ClassVar[str] = "an EfficientNet-Lite by timm's names (conv_stem.weight, blocks.0.0.conv_dw.weight, ...)"

    def recognises(self, names: Iterable[str]) -> bool:
        names = set(names)
        # Squeeze-and-excite is in EfficientNets that are not "lite"; other networks share the names, not the block.
        if any("_se_" in name or ".se." in name for name in names):
            return False
        timm = {"conv_stem.weight", "bn1.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.conv_pw.weight"}
        widens = {"blocks.1.0.conv_pwl.weight", "conv_head.weight", "bn2.running_mean"}
        return timm | widens <= names or {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= names

    def ignores(self, name: str) -> bool:
        return bool(_IGNORED.fullmatch(name))

    def from_torch(self, state: Mapping[str, np.ndarray]) -> Variables:
        out, leaf_of = {}, {theirs: ours for ours, theirs in _NORM.items()}
        flat = any(name.startswith("_blocks.") for name in state)
        found = _flat_modules(state) if flat else _timm_modules(state)
        for name, value in state.items():
            if self.ignores(name):
                continue
            module, leaf = found.get(name) or ("", "")
            if module.endswith("_conv") and leaf == "weight" and value.ndim == 4:
                out[f"params.{module}.kernel"] = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
            elif module.endswith("_bn") and leaf in leaf_of:
                tree = "batch_stats" if leaf.startswith("running") else "params"
                out[f"{tree}.{module}.{leaf_of[leaf]}"] = value
            else:
                out[name] = value
        return out

    def to_torch(self, variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = {}
        for name, value in variables.items():
            module, _, leaf = name.rpartition(".")
            found = _FLAX.fullmatch(module)
            if not found:
                raise KeyError(name)
            end, stage, block, part, kind = found.groups()
            if end:
                module = f"conv_{end}" if kind == "conv" else f"bn{1 + (end == 'head')}"
            else:
                widens = f"params.stages_{stage}_{block}.expand_conv.kernel" in variables
                number = _PARTS.index(part) + int(widens)  # from 1
                conv = {"expand": "pw", "depthwise": "dw", "project": "pwl" if widens else "pw"}[part]
                module = f"blocks.{stage}.{block}." + (f"conv_{conv}" if kind == "conv" else f"bn{number}")
            if leaf == "kernel":
                out[f"{module}.weight"] = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
            else:
                out[f"{module}.{_NORM[leaf]}"] = value
        return out

    def architecture(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        sizes: list[int] = []
        for stage in range(_count(variables, "params.stages_{}_0.")):
            sizes.append(_count(variables, f"params.stages_{stage}_{{}}."))
        names = [f"params.stages_{i}_0.project_conv.kernel" for i in range(len(sizes))]
        ends = ("params.stem_conv.kernel", "params.head_conv.kernel")
        if not sizes or not all(name in variables for name in (*names, *ends)):
            raise UserError(f"it has no blocks of an EfficientNet-Lite; expected {self.network}")
        found = (tuple(sizes), tuple(variables[name].shape[-1] for name in names))
        variant = next((v for v in FACTORS if sizes_of(v) == found), None)
        options = {"variant": variant} if variant else dict(stage_sizes=found[0], stage_widths=found[1])
        widths = {key: variables[name].shape[-1] for key, name in zip(("stem_width", "head_width"), ends, strict=True)}
        usual = {"stem_width": 32, "head_width": 1280}
        return options | {k: v for k, v in widths.items() if v != usual[k]}

    def architecture_from_config(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What tensors do not tell, in timm's config.json: padding and epsilon."""
        found = _NAME.fullmatch(str(config.get("architecture", "")).partition(".")[0])
        if not found:
            return None
        return dict(padding="same", norm_epsilon=1e-3) if found[1] else dict(padding="symmetric", norm_epsilon=1e-5)

    def check(self, encoder: Any) -> None:
        if encoder.norm != "batch":
            raise UserError(f"EfficientNet-Lites in torch have batch norms, this one norm={encoder.norm}")
        if encoder.norm_sets:
            raise UserError("EfficientNet-Lites in torch have one set of batch norms; give the clean one alone")

    def changes(self, encoder: Any) -> dict[str, Any]:
        """-> what timm's network has to have: {"pad_type": "same" or "", "norm_epsilon": ...}."""
        return {"pad_type": "same" if encoder.padding == "same" else "", "norm_epsilon": encoder.norm_epsilon}


def _timm_modules(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{name in timm: (module of flax, leaf)}"""
    names, out = set(names), {}
    for name in names:
        found = _TIMM.fullmatch(name)
        if not found:
            continue
        end_conv, end, end_bn, stage, block, conv, which, bn, leaf = found.groups()
        if end_conv:
            out[name] = f"{end}_conv", leaf
        elif end_bn:
            out[name] = f"{('stem', 'head')[int(end_bn) - 1]}_bn", leaf
        else:
            widens = f"blocks.{stage}.{block}.conv_pwl.weight" in names
            at = {"pw": 0 if widens else 2, "dw": 1, "pwl": 2}[which] if conv else int(bn) - int(widens)
            if at < len(_PARTS):
                out[name] = f"stages_{stage}_{block}.{_PARTS[at]}_{'conv' if conv else 'bn'}", leaf
    return out


def _flat_modules(state: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """{name in efficientnet_lite_pytorch: (module of flax, leaf)}"""
    place, stage, block, before, K = {}, -1, 0, 0, 0
    while (kernel := state.get(f"_blocks.{K}._project_conv.weight")) is not None and kernel.ndim == 4:
        stage, block = (stage + 1, 0) if len(kernel) != before else (stage, block + 1)
        place[K], before, K = f"stages_{stage}_{block}.", len(kernel), K + 1
    out = {}
    for name in state:
        found = _LITE.fullmatch(name)
        if not found:
            continue
        end_conv, end, end_bn, number, part, _, bn, leaf = found.groups()
        if end_conv:
            out[name] = f"{end}_conv", leaf
        elif end_bn:
            out[name] = f"{('stem', 'head')[int(end_bn)]}_bn", leaf
        elif int(number) in place:
            out[name] = place[int(number)] + (f"{part}_conv" if part else f"{_PARTS[int(bn)]}_bn"), leaf
    return out
