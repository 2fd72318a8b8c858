"""The variables of a ConvNeXt by the names and in the shapes of timm's, and from those of others.

    flax, below "params."               timm                               torchvision          transformers
    stem_conv, stem_norm                stem.0, .1                         features.0.0, .1     embeddings.*
    downsample_I.norm, .conv            stages.I.downsample.0, .1          features.{2I}.0, .1  ...downsampling_layer.*
    stages_I_J.depthwise_conv, .norm    stages.I.blocks.J.conv_dw, .norm   ...block.0, .2       ...dwconv, .layernorm
    stages_I_J.expand, .project         ....mlp.fc1, .fc2                  ...block.3, .5       ...pwconv1, .pwconv2
    stages_I_J.response                 ....mlp.grn                                             ...grn
    stages_I_J.scale                    ....gamma                          ...layer_scale       ...layer_scale_parameter
    final_norm                          head.norm                          classifier.0         layernorm

The files of the authors are read too. Kernels are [h,w,in,out] in flax and [out,in,h,w] or [out,in] in torch. timm has
1x1 convolutions in its narrow networks and dense layers in the others; so has what is written.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxcl.errors import UserError
from jaxcl.models.torch_layout import TorchLayout, Variables

_NARROW = ((2, 2, 6, 2), (2, 2, 8, 2))
_DEEP = (3, 3, 27, 3)
# variant: (blocks, channels) of each stage
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": (_NARROW[0], (40, 80, 160, 320)),
    "femto": (_NARROW[0], (48, 96, 192, 384)),
    "pico": (_NARROW[0], (64, 128, 256, 512)),
    "nano": (_NARROW[1], (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": (_DEEP, (96, 192, 384, 768)),
    "base": (_DEEP, (128, 256, 512, 1024)),
    "large": (_DEEP, (192, 384, 768, 1536)),
    "xlarge": (_DEEP, (256, 512, 1024, 2048)),
    "huge": (_DEEP, (352, 704, 1408, 2816)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}
_CONV_MLP = 80  # the width of the first stage up to which timm writes 1x1 convolutions in the MLPs

_LEAF = r"\.(weight|bias)"
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "timm": (
        (rf"stem\.0{_LEAF}", r"stem_conv.\1"),
        (rf"stem\.1{_LEAF}", r"stem_norm.\1"),
        (rf"stages\.(\d+)\.downsample\.0{_LEAF}", r"downsample_\1.norm.\2"),
        (rf"stages\.(\d+)\.downsample\.1{_LEAF}", r"downsample_\1.conv.\2"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.conv_dw{_LEAF}", r"stages_\1_\2.depthwise_conv.\3"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.norm{_LEAF}", r"stages_\1_\2.norm.\3"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc1{_LEAF}", r"stages_\1_\2.expand.\3"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc2{_LEAF}", r"stages_\1_\2.project.\3"),
        (rf"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn{_LEAF}", r"stages_\1_\2.response.\3"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.gamma", r"stages_\1_\2.scale"),
        (rf"head\.norm{_LEAF}", r"final_norm.\1"),
    ),
    "authors": (
        (rf"downsample_layers\.0\.0{_LEAF}", r"stem_conv.\1"),
        (rf"downsample_layers\.0\.1{_LEAF}", r"stem_norm.\1"),
        (rf"downsample_layers\.([1-9])\.0{_LEAF}", r"downsample_\1.norm.\2"),
        (rf"downsample_layers\.([1-9])\.1{_LEAF}", r"downsample_\1.conv.\2"),
        (rf"stages\.(\d+)\.(\d+)\.dwconv{_LEAF}", r"stages_\1_\2.depthwise_conv.\3"),
        (rf"stages\.(\d+)\.(\d+)\.norm{_LEAF}", r"stages_\1_\2.norm.\3"),
        (rf"stages\.(\d+)\.(\d+)\.pwconv1{_LEAF}", r"stages_\1_\2.expand.\3"),
        (rf"stages\.(\d+)\.(\d+)\.pwconv2{_LEAF}", r"stages_\1_\2.project.\3"),
        (r"stages\.(\d+)\.(\d+)\.grn\.gamma", r"stages_\1_\2.response.weight"),
        (r"stages\.(\d+)\.(\d+)\.grn\.beta", r"stages_\1_\2.response.bias"),
        (r"stages\.(\d+)\.(\d+)\.gamma", r"stages_\1_\2.scale"),
        (rf"norm{_LEAF}", r"final_norm.\1"),
    ),
    "transformers": (
        (rf"embeddings\.patch_embeddings{_LEAF}", r"stem_conv.\1"),
        (rf"embeddings\.layernorm{_LEAF}", r"stem_norm.\1"),
        (rf"encoder\.stages\.(\d+)\.downsampling_layer\.0{_LEAF}", r"downsample_\1.norm.\2"),
        (rf"encoder\.stages\.(\d+)\.downsampling_layer\.1{_LEAF}", r"downsample_\1.conv.\2"),
        (rf"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv{_LEAF}", r"stages_\1_\2.depthwise_conv.\3"),
        (rf"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm{_LEAF}", r"stages_\1_\2.norm.\3"),
        (rf"encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv1{_LEAF}", r"stages_\1_\2.expand.\3"),
        (rf"encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv2{_LEAF}", r"stages_\1_\2.project.\3"),
        (rf"encoder\.stages\.(\d+)\.layers\.(\d+)\.grn{_LEAF}", r"stages_\1_\2.response.\3"),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter", r"stages_\1_\2.scale"),
        (rf"layernorm{_LEAF}", r"final_norm.\1"),
    ),
    "torchvision": (
        (rf"features\.0\.0{_LEAF}", r"stem_conv.\1"),
        (rf"features\.0\.1{_LEAF}", r"stem_norm.\1"),
        (rf"features\.(\d*[02468])\.0{_LEAF}", r"downsample_{\1}.norm.\2"),
        (rf"features\.(\d*[02468])\.1{_LEAF}", r"downsample_{\1}.conv.\2"),
        (rf"features\.(\d*[13579])\.(\d+)\.block\.0{_LEAF}", r"stages_{\1}_\2.depthwise_conv.\3"),
        (rf"features\.(\d*[13579])\.(\d+)\.block\.2{_LEAF}", r"stages_{\1}_\2.norm.\3"),
        (rf"features\.(\d*[13579])\.(\d+)\.block\.3{_LEAF}", r"stages_{\1}_\2.expand.\3"),
        (rf"features\.(\d*[13579])\.(\d+)\.block\.5{_LEAF}", r"stages_{\1}_\2.project.\3"),
        (r"features\.(\d*[13579])\.(\d+)\.layer_scale", r"stages_{\1}_\2.scale"),
        (rf"classifier\.0{_LEAF}", r"final_norm.\1"),
    ),
}
_COMPILED = {who: tuple((re.compile(theirs), ours) for theirs, ours in rules) for who, rules in _RULES.items()}
_PREFIX = re.compile(r"convnext(?:v2)?\.")  # of transformers, where a classifier is beside the network
_IGNORED = re.compile(r"head\.fc\.\w+|head\.pre_logits\..*|head\.(weight|bias)|classifier\.(2\.)?(weight|bias)")
_TIMM = {
    "depthwise_conv": "conv_dw",
    "norm": "norm",
    "expand": "mlp.fc1",
    "project": "mlp.fc2",
    "response": "mlp.grn",
}


def _renamed(name: str, who: str) -> str | None:
    """A name of one of the libraries -> flax's, with torch's leaf; None for an unknown one."""
    for pattern, ours in _COMPILED[who]:
        if found := pattern.fullmatch(name):
            # torchvision counts stages and what is between them together: {3} is 1, of both.
            return re.sub(r"\{(\d+)\}", lambda m: str(int(m[1]) // 2), found.expand(ours))
    return None


def _source(names: Iterable[str]) -> str | None:
    """The library that has these names; None: it is another network."""
    names = {_PREFIX.sub("", name, count=1) for name in names}
    for who in _RULES:
        found = {_renamed(name, who) for name in names}
        if {"stem_conv.weight", "stages_0_0.depthwise_conv.weight", "stages_0_0.expand.weight"} <= found:
            blocks = [name for name in names if name.startswith(("stages.", "encoder.stages.", "features."))]
            return who if all(_renamed(name, who) for name in blocks) else None
    return None


class ConvNeXtLayout(TorchLayout):
    """Between a ConvNeXt's variables and timm's; those of torchvision, transformers and the authors are read."""

    network: ClassVar[str] = (
        "a ConvNeXt of timm (stages.0.blocks.0.conv_dw.weight), torchvision (features.1.0.block.0.weight) or "
        "transformers"
    )

    def recognises(self, names: Iterable[str]) -> bool:
        return _source(names) is not None

    def ignores(self, name: str) -> bool:
        return bool(_IGNORED.fullmatch(name))

    def from_torch(self, state: Mapping[str, np.ndarray]) -> Variables:
        who, out = _source(state), {}
        for name, value in state.items():
            if self.ignores(name):
                continue
            ours = _renamed(_PREFIX.sub("", name, count=1), who) if who else None
            module, _, leaf = (ours or "").rpartition(".")
            if not ours:
                out[name] = value
            elif leaf == "scale" or leaf == "bias" or module.endswith(("norm", "response")):
                out[f"params.{module}.{'bias' if leaf == 'bias' else 'scale'}"] = value.reshape(-1)
            elif value.ndim == 2:
                out[f"params.{module}.kernel"] = np.ascontiguousarray(value.T)[None, None]
            elif value.ndim == 4:
                out[f"params.{module}.kernel"] = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
            else:
                out[name] = value
        return out

    def to_torch(self, variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = {}
        stem = variables.get("params.stem_conv.kernel")
        conv_mlp = stem is not None and stem.shape[-1] <= _CONV_MLP
        for name, value in variables.items():
            path, leaf = name.removeprefix("params.").rsplit(".", 1)
            theirs = "bias" if leaf == "bias" else "weight"
            block = re.fullmatch(r"stages_(\d+)_(\d+)(?:\.(\w+))?", path)
            if block and block[3] in _TIMM:
                module = f"stages.{block[1]}.blocks.{block[2]}.{_TIMM[block[3]]}.{theirs}"
            elif block and not block[3] and leaf == "scale":
                module = f"stages.{block[1]}.blocks.{block[2]}.gamma"
            elif found := re.fullmatch(r"downsample_(\d+)\.(norm|conv)", path):
                module = f"stages.{found[1]}.downsample.{int(found[2] == 'conv')}.{theirs}"
            elif path in ("stem_conv", "stem_norm", "final_norm"):
                module = {"stem_conv": "stem.0", "stem_norm": "stem.1", "final_norm": "head.norm"}[path]
                module += f".{theirs}"
            else:
                raise KeyError(name)
            if leaf == "kernel":
                dense = block and block[3] in ("expand", "project") and not conv_mlp
                value = np.ascontiguousarray(value[0, 0].T if dense else value.transpose(3, 2, 0, 1))
            out[module] = value
        return out

    def architecture(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        sizes: list[int] = []
        while f"params.stages_{len(sizes)}_0.project.kernel" in variables:
            stage, size = len(sizes), 1
            while f"params.stages_{stage}_{size}.project.kernel" in variables:
                size += 1
            sizes.append(size)
        stem, kernel = (variables.get(f"params.{name}.kernel") for name in ("stem_conv", "stages_0_0.depthwise_conv"))
        if not sizes or stem is None or kernel is None or stem.ndim != 4 or kernel.ndim != 4:
            raise UserError(f"it has no blocks of a ConvNeXt; expected {self.network}")
        widths = tuple(variables[f"params.stages_{i}_0.project.kernel"].shape[-1] for i in range(len(sizes)))
        variant = next((v for v, known in SIZES.items() if known == (tuple(sizes), widths)), None)
        options = {"variant": variant} if variant else dict(stage_sizes=tuple(sizes), stage_widths=widths)
        return options | {
            "patch": stem.shape[0],
            "kernel": kernel.shape[0],
            # The value only matters to new parameters.
            "layer_scale": 1e-6 if "params.stages_0_0.scale" in variables else 0.0,
            "response_norm": "params.stages_0_0.response.scale" in variables,
        }

    def architecture_from_config(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What tensors do not tell, in the config.json of timm or transformers: epsilons, and networks that differ."""
        if config.get("model_type") in ("convnext", "convnextv2"):
            if config.get("hidden_act", "gelu") != "gelu":
                raise UserError(f"hidden_act is {config['hidden_act']}; expected gelu")
            return {"norm_epsilon": 1e-6, "final_norm_epsilon": float(config.get("layer_norm_eps", 1e-12))}
        name = str(config.get("architecture", "")).partition(".")[0]
        if not re.fullmatch(r"convnext(v2)?_\w+", name):
            return None
        if other := re.search(r"_(ols|rms|hnf)(_|$)", name):
            raise UserError(f"architecture is {name}, which differs from this encoder ({other[1]}); expected another")
        epsilon = 1e-5 if name == "convnext_xxlarge" else 1e-6
        epsilon = float((config.get("model_args") or {}).get("norm_eps") or epsilon)
        return {"norm_epsilon": epsilon, "final_norm_epsilon": epsilon}

    def changes(self, encoder: Any) -> dict[str, Any]:
        """-> the arguments of timm's ConvNeXt, without a classifier; "head_norm_eps" where that of the head differs."""
        other = {"head_norm_eps": encoder.final_norm_epsilon}
        return dict(
            depths=tuple(encoder.stage_sizes),
            dims=tuple(encoder.widths),
            patch_size=encoder.patch,
            kernel_sizes=encoder.kernel,
            ls_init_value=encoder.layer_scale or None,
            use_grn=encoder.response_norm,
            conv_mlp=encoder.widths[0] <= _CONV_MLP,
            norm_eps=encoder.norm_epsilon,
            num_classes=0,
            **(other if encoder.final_norm_epsilon != encoder.norm_epsilon else {}),
        )
