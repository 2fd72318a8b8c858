"""The torch layouts of vision transformers: those of timm, transformers and CLIP are read, timm's is written.

The encoder has one layout of parameters for all: queries, keys and values apart; the position of a class or
distillation token inside the token; a distillation token as the first register. So an original's tensors are split, and
written back in an equal form.

D features, K tokens before the patches, P patches.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxcl.errors import UserError
from jaxcl.models import vision_transformer_hf as hf
from jaxcl.models import vision_transformer_timm as timm
from jaxcl.models.torch_layout import TorchLayout, Variables

# Classifiers and other heads, text towers, decoders, mask tokens, tables that a network computes.
_IGNORED = re.compile(
    r"(.*\.)?(text_model|text|transformer\.text|token_embedding|ln_final|classifier|cls_classifier|pooler|decoder|"
    r"distillation_classifier|lm_head|head_dist|rope|rope_embed|rope_embeddings|projectors)(\..*)?"
    r"|(.*\.)?(head|fc)\.(weight|bias)|(text_projection|logit_scale|logit_bias)(\..*)?"
    r"|(.*\.)?(mask_token|position_ids|periods|inv_freq|decoder_\w+|local_cls_norm\..*)"
)
_SPLIT = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
# Sizes of a head other than 64, by width, in what is published; 1280 only without rotary positions.
_HEAD_FEATURES = {1152: 72, 1280: 80, 1408: 88, 1664: 104, 4096: 128}


def _source(names: Iterable[str]) -> tuple[Any, str] | None:
    """The module (hf or timm) that knows these names, and the prefix of the network in them."""
    names = set(names)
    for module in (hf, timm):
        prefix = module.prefix_of(names)
        if prefix is None:
            continue
        known = {module.renamed(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
        needs = ("attention_norm.weight", "attention.out.weight", "mlp.out.weight")
        if all(f"blocks_0.{name}" in known for name in needs):
            return module, prefix
    return None


class VisionTransformerLayout(TorchLayout):
    """Vision transformers of timm, transformers, and of the releases of CLIP, DINOv2 and DINOv3."""

    network = "a vision transformer of timm (blocks.0.attn.qkv.weight) or transformers (embeddings.patch_embeddings)"

    def recognises(self, names: Iterable[str]) -> bool:
        return _source(names) is not None

    def ignores(self, name: str) -> bool:
        return bool(_IGNORED.fullmatch(name))

    def from_torch(self, state: Mapping[str, np.ndarray]) -> Variables:
        found = _source(state)
        if found is None:
            return dict(state)
        module, prefix = found
        out: Variables = {}
        tensors: dict[str, np.ndarray] = {}
        for name, value in state.items():
            if self.ignores(name):
                continue
            if not name.startswith((prefix, "visual_projection.")):
                continue  # of another tower
            ours = module.renamed(name.removeprefix(prefix))
            if ours:
                tensors[ours] = value
            else:
                out[name] = value
        out |= {f"params.tokens.{k}": v for k, v in _tokens(tensors, of_hf=module is hf).items()}
        for name, value in _split(tensors).items():
            out[f"params.{_leaf(name, value)}"] = _transposed(name, value)
        return out

    def architecture(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What tensors do not tell (`assumed`) is as usual for a network with these ones."""
        v = {name.removeprefix("params."): value for name, value in variables.items()}
        depth = 0
        while f"blocks_{depth}.attention_norm.scale" in v:
            depth += 1
        kernel, hidden = v.get("tokens.patch.kernel"), v.get("blocks_0.mlp.hidden.kernel")
        if not depth or kernel is None or hidden is None or kernel.ndim != 4 or hidden.ndim != 2:
            raise UserError(f"it has no blocks of a vision transformer; expected {self.network}")
        bias = tuple(f"blocks_0.attention.{name}.bias" in v for name in ("query", "key"))
        positions, grid = v.get("tokens.positions"), {}
        if positions is not None and math.isqrt(len(positions)) ** 2 == len(positions):
            grid = {"position_grid": (math.isqrt(len(positions)),) * 2}
        project = v.get("project.kernel")
        return {
            "patch": kernel.shape[0],
            "width": kernel.shape[-1],
            "depth": depth,
            "mlp_width": hidden.shape[-1],
            "gated": "blocks_0.mlp.gate.kernel" in v,
            "qkv_bias": {(True, True): "all", (True, False): "query_value"}.get(bias, "none"),
            "class_token": "tokens.class_token" in v,
            "registers": len(v.get("tokens.registers", ())),
            **grid,
            "patch_bias": "tokens.patch.bias" in v,
            "pre_norm": "tokens.pre_norm.scale" in v,
            # The value only matters to new parameters.
            "layer_scale": 1e-5 if "blocks_0.attention_scale" in v else 0.0,
            "final_norm": next((w for w, n in _LAST_NORMS.items() if f"{n}.scale" in v), "none"),
            "projection": 0 if project is None else project.shape[-1],
            **self.assumed(variables),
        }

    def assumed(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        def has(name: str) -> bool:
            return f"params.{name}" in variables

        width = variables["params.tokens.patch.kernel"].shape[-1]
        learned, clip, siglip = has("tokens.positions"), has("tokens.pre_norm.scale"), has("pool.probe")
        size = _HEAD_FEATURES.get(width, 64)
        if width == 1280 and not learned:
            size = 64
        if width == 1536 and siglip:
            size = 96
        activation = "quick_gelu" if clip else "gelu_tanh" if siglip else "gelu"
        averaged = has("pooled_norm.scale") or not has("tokens.class_token")
        return {
            **({"heads": width // size} if width % size == 0 else {}),
            "activation": "silu" if has("blocks_0.mlp.gate.kernel") else activation,
            "norm_epsilon": 1e-5 if clip or not learned else 1e-6,
            "position": "learned" if learned else "rope",
            "position_resize": "bicubic_antialias",
            "pooling": "attention" if siglip else "mean" if averaged else "cls",
        }

    def architecture_from_config(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return timm.options_of(config) if "architecture" in config else hf.options_of(config)

    # ---- timm's layout, to write

    def check(self, encoder: Any) -> None:
        rope = encoder.position == "rope"
        wrong = {
            "position=none": encoder.position == "none",
            "pooling=cls_mean": encoder.pooling == "cls_mean",
            f"patch_bias={encoder.patch_bias}, pre_norm={encoder.pre_norm}": encoder.patch_bias == encoder.pre_norm,
            "position=rope, pooling=attention": rope and encoder.pooling == "attention",
            "position=rope, qkv_bias=all": rope and encoder.qkv_bias == "all",
            f"position=rope, gated={encoder.gated}, activation={encoder.activation}": rope
            and encoder.activation != ("silu" if encoder.gated else "gelu"),
        }
        if found := [options for options, is_wrong in wrong.items() if is_wrong]:
            raise UserError(f"timm has no vision transformer with {found[0]}; use layout jaxcl")

    def changes(self, encoder: Any) -> dict[str, Any]:
        """-> the class of timm and its arguments in JSON, with those that are Python objects apart.

        {"class": VisionTransformer or Eva, "arguments": as they are, "norm_epsilon": of its norm_layer, "mlp_layer": a
        name in timm.layers, "" for the usual one}
        """
        rope = encoder.position == "rope"
        packed = encoder.gated and not rope  # one layer gives both the gate and what is gated
        # timm rounds down, so half a feature more.
        hidden = (encoder.mlp_width or 4 * encoder.width) * (2 if packed else 1) + 0.5
        out: dict[str, Any] = dict(
            patch_size=encoder.patch,
            embed_dim=encoder.width,
            depth=encoder.depth,
            num_heads=encoder.heads,
            mlp_ratio=hidden / encoder.width,
            class_token=encoder.class_token,
            init_values=encoder.layer_scale or None,
            qkv_bias=encoder.qkv_bias != "none",
            global_pool={"cls": "token", "mean": "avg", "attention": "map"}[encoder.pooling],
            num_classes=encoder.projection,
        )
        if all(encoder.position_grid):
            out["img_size"] = [n * encoder.patch for n in encoder.position_grid]
        if rope:
            out |= dict(rope_type="dinov3", rope_rotate_half=True, use_rot_pos_emb=True, use_abs_pos_emb=False)
            out |= dict(swiglu_mlp=encoder.gated, swiglu_align_to=int(encoder.gated))
            out |= dict(num_reg_tokens=encoder.registers, rope_temperature=encoder.rope_theta)
            out |= dict(use_fc_norm=encoder.final_norm == "after")
            out |= dict(use_post_transformer_norm=encoder.final_norm == "before")
        else:
            out |= dict(pre_norm=encoder.pre_norm, reg_tokens=encoder.registers, no_embed_class=encoder.registers > 0)
            out |= dict(fc_norm=encoder.final_norm == "after", final_norm=encoder.final_norm != "none")
            out |= dict(act_layer=encoder.activation)
        return {
            "class": "Eva" if rope else "VisionTransformer",
            "arguments": out,
            "norm_epsilon": encoder.norm_epsilon,
            "mlp_layer": "SwiGLUPacked" if packed else "",
        }

    def to_torch(self, variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        v = {name.removeprefix("params."): value for name, value in variables.items()}
        rope, out = "tokens.positions" not in v, {}
        for name, value in v.items():
            module, _, leaf = name.rpartition(".")
            if name in ("tokens.class_token", "tokens.registers", "pool.probe"):
                key = {"class_token": "cls_token", "registers": "reg_token", "probe": "attn_pool.latent"}[leaf]
                out[key] = value.reshape(1, -1, value.shape[-1])
            elif name == "tokens.positions":
                # timm gives the class token a position unless there are registers.
                alone = "tokens.class_token" in v and "tokens.registers" not in v
                out["pos_embed"] = np.concatenate([np.zeros((int(alone), value.shape[1]), value.dtype), value])[None]
            else:
                key = _written(module, leaf, rope, f"{module.rpartition('.')[0]}.gate.kernel" in v)
                if not key:
                    raise KeyError(name)
                out[key] = _untransposed(leaf, value)
        return _joined(out, rope)


_LAST_NORMS = {"before": "last_norm", "after": "pooled_norm"}


# ---- reading


def _tokens(tensors: dict[str, np.ndarray], of_hf: bool) -> dict[str, np.ndarray]:
    """Takes tokens and positions out of the tensors -> those of the encoder."""
    names = ("class_token", "distillation_token", "registers", "positions")
    found = {name: tensors.pop(name) for name in names if name in tensors}
    found = {name: x.reshape(-1, x.shape[-1]).astype(np.float32) for name, x in found.items()}
    extra = [found[name] for name in names[:2] if name in found]  # tokens that may have a position
    positions, registers = found.get("positions"), [found["registers"]] if "registers" in found else []
    if positions is not None:
        before = _positions_before(len(positions), len(extra), len(registers[0]) if registers else 0, of_hf)
        tokens = np.concatenate([*extra, *registers]) if extra or registers else np.zeros((0, positions.shape[1]))
        tokens = tokens + np.pad(positions[:before], ((0, len(tokens) - before), (0, 0)))
        positions = positions[before:]
    else:
        tokens = np.concatenate([*extra, *registers]) if extra or registers else None
    out = {} if positions is None else {"positions": positions}
    if tokens is not None and len(tokens):
        has_class = int("class_token" in found)
        if has_class:
            out["class_token"] = np.asarray(tokens[0], np.float32)
        if len(tokens) > has_class:
            out["registers"] = np.asarray(tokens[has_class:], np.float32)
    return out


def _positions_before(rows: int, extra: int, registers: int, of_hf: bool) -> int:
    """How many of the positions belong to tokens before the patches, of class and distillation tokens, or all."""
    if of_hf:
        return extra
    # timm has both forms; which one it is shows in the number of patches, which is a square in all that is published.
    forms = [extra, 0] if not registers else [0, extra, extra + registers]
    return next((n for n in forms if n <= rows and math.isqrt(rows - n) ** 2 == rows - n), forms[0])


def _split(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused tensors -> those of single layers."""
    out: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        head, _, leaf = name.rpartition(".")
        module, _, layer = head.rpartition(".")
        parts = _SPLIT.get(layer, ())
        if layer == "hidden" and f"{module}.gate.{leaf}" not in tensors:
            down = tensors.get(f"{module}.out.weight")
            if down is not None and down.ndim == 2 and len(value) == 2 * down.shape[1]:
                parts = ("gate", "hidden")
        if leaf == "key_bias_mask":
            continue
        if not parts or len(value) % len(parts):
            out[name] = value
            continue
        for part, own in zip(parts, np.split(value, len(parts)), strict=True):
            # DINOv3's release masks the keys' bias.
            if part == "key" and leaf == "bias" and f"{module}.key_bias_mask" in tensors:
                continue
            out[f"{module}.{part}.{leaf}"] = own
    return out


def _leaf(name: str, value: np.ndarray) -> str:
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return f"{module}.{'scale' if value.ndim == 1 else 'kernel'}"
    return name


def _transposed(name: str, value: np.ndarray) -> np.ndarray:
    if name == "pool.probe":
        return value.reshape(-1)
    if name.endswith(".weight") and value.ndim == 2:
        return np.ascontiguousarray(value.T)
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0)) if value.ndim == 4 else value


# ---- writing

_WRITTEN = {
    "tokens.patch": "patch_embed.proj",
    "tokens.pre_norm": "norm_pre",
    "last_norm": "norm",
    "pooled_norm": "fc_norm",
    "project": "head",
    "pool.attention.query": "attn_pool.q",
    "pool.attention.key": "attn_pool.kv@0",
    "pool.attention.value": "attn_pool.kv@1",
    "pool.attention.out": "attn_pool.proj",
    "pool.norm": "attn_pool.norm",
    "pool.mlp.hidden": "attn_pool.mlp.fc1",
    "pool.mlp.out": "attn_pool.mlp.fc2",
}
_WRITTEN_BLOCK = {
    "attention_norm": "norm1",
    "attention.query": "attn.qkv@0",
    "attention.key": "attn.qkv@1",
    "attention.value": "attn.qkv@2",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.hidden": "mlp.fc1",
    "mlp.out": "mlp.fc2",
}


def _written(module: str, leaf: str, rope: bool, gated: bool) -> str:
    """timm's name of a parameter, "" for none; "@K" before the leaf marks part K of a fused one."""
    theirs = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(leaf)
    block = re.fullmatch(r"blocks_(\d+)(?:\.(.+))?", module)
    if not block:
        return f"{_WRITTEN[module]}.{theirs}" if module in _WRITTEN and theirs else ""
    before, inner = f"blocks.{block[1]}", block[2]
    if inner is None:
        scale = {"attention_scale": 1, "mlp_scale": 2}.get(leaf)
        return "" if not scale else f"{before}.gamma_{scale}" if rope else f"{before}.ls{scale}.gamma"
    if gated and inner in ("mlp.gate", "mlp.hidden"):
        part = int(inner == "mlp.hidden")
        return f"{before}.mlp.fc1_{'gx'[part]}.{theirs}" if rope else f"{before}.mlp.fc1@{part}.{theirs}"
    if rope and theirs == "bias" and inner in ("attention.query", "attention.value"):
        return f"{before}.attn.{inner[10]}_bias"
    return f"{before}.{_WRITTEN_BLOCK[inner]}.{theirs}" if inner in _WRITTEN_BLOCK and theirs else ""


def _untransposed(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf != "kernel":
        return value
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)


def _joined(tensors: Mapping[str, np.ndarray], rope: bool) -> dict[str, np.ndarray]:
    """Parts "NAME@K.leaf" -> "NAME.leaf", one after the other; a missing bias of keys is 0."""
    out: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        module, at, rest = name.partition("@")
        if at:
            parts.setdefault(f"{module}.{rest[2:]}", {})[int(rest[0])] = value
        else:
            out[name] = value
    for name, own in parts.items():
        if name.endswith("attn.qkv.bias") and 1 not in own:
            own[1] = np.zeros_like(own[0])
        out[name] = np.concatenate([own[k] for k in sorted(own)])
    if "head.weight" in out:
        out["head.bias"] = np.zeros(len(out["head.weight"]), np.float32)
    return out
