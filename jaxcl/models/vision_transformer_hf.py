"""Vision transformers as transformers and the hub's repositories of it store them: names of tensors, and config.json.

Releases of transformers differ in the names inside a block; files on the hub have the older ones.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError

# What stands before it is the prefix of the network: "", "vit.", "vision_model.".
ANCHOR = re.compile(r"(.*?)embeddings\.patch_embedding(?:s|s\.projection)?\.weight")
_BLOCK = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)")
_IN_BLOCK = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"attention\.attention\.(query|key|value)\.(weight|bias)", r"attention.\1.\2"),
        (r"(?:self_attn|attention)\.q_proj\.(weight|bias)", r"attention.query.\1"),
        (r"(?:self_attn|attention)\.k_proj\.(weight|bias)", r"attention.key.\1"),
        (r"(?:self_attn|attention)\.v_proj\.(weight|bias)", r"attention.value.\1"),
        (r"(?:self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.(weight|bias)", r"attention.out.\1"),
        (r"(?:layernorm_before|layer_norm1|norm1)\.(weight|bias)", r"attention_norm.\1"),
        (r"(?:layernorm_after|layer_norm2|norm2)\.(weight|bias)", r"mlp_norm.\1"),
        (r"(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj|mlp\.weights_in)\.(weight|bias)", r"mlp.hidden.\1"),
        (r"mlp\.gate_proj\.(weight|bias)", r"mlp.gate.\1"),
        (r"(?:output\.dense|mlp\.fc2|mlp\.down_proj|mlp\.weights_out)\.(weight|bias)", r"mlp.out.\1"),
        (r"layer_scale1\.lambda1", "attention_scale"),
        (r"layer_scale2\.lambda1", "mlp_scale"),
    )
)
_TOP = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"embeddings\.patch_embedding(?:s|s\.projection)?\.(weight|bias)", r"tokens.patch.\1"),
        (r"embeddings\.(?:cls_token|class_embedding)", "class_token"),
        (r"embeddings\.distillation_token", "distillation_token"),
        (r"embeddings\.register_tokens", "registers"),
        (r"embeddings\.position_embedding(?:s|\.weight)", "positions"),
        (r"pre_layrnorm\.(weight|bias)", r"tokens.pre_norm.\1"),  # so misspelt there
        (r"(?:post_layernorm|layernorm|norm)\.(weight|bias)", r"last_norm.\1"),
        (r"head\.probe", "pool.probe"),
        (r"head\.attention\.in_proj_(weight|bias)", r"pool.attention.qkv.\1"),
        (r"head\.attention\.out_proj\.(weight|bias)", r"pool.attention.out.\1"),
        (r"head\.layernorm\.(weight|bias)", r"pool.norm.\1"),
        (r"head\.mlp\.fc1\.(weight|bias)", r"pool.mlp.hidden.\1"),
        (r"head\.mlp\.fc2\.(weight|bias)", r"pool.mlp.out.\1"),
    )
)


def prefix_of(names: set[str]) -> str | None:
    """The prefix of the network in a state dict of transformers; None for another one."""
    found = next((match for match in map(ANCHOR.fullmatch, sorted(names)) if match), None)
    return found[1] if found else None


def renamed(name: str) -> str | None:
    """A name without prefix -> the encoder's module and torch's leaf; None for an unknown one."""
    if name == "visual_projection.weight":
        return "project.weight"
    if block := _BLOCK.fullmatch(name):
        return next((f"blocks_{block[1]}.{to}" for to in _first(_IN_BLOCK, block[2])), None)
    return next(iter(_first(_TOP, name)), None)


def _first(rules: tuple, name: str) -> list[str]:
    return [found.expand(ours) for pattern, ours in rules if (found := pattern.fullmatch(name))][:1]


# ---- config.json

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
_SIZES = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224, qkv_bias=True)
_VIT = _SIZES | dict(intermediate_size=3072, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-12)
_DINO = _SIZES | dict(mlp_ratio=4, hidden_act="gelu", layer_norm_eps=1e-6, layerscale_value=1.0, use_swiglu_ffn=False)
# What a config of each model_type means where it is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "vit_mae": _VIT,
    "dinov2": _DINO | dict(patch_size=14),
    "dinov2_with_registers": _DINO | dict(patch_size=16, num_register_tokens=4),
    "dinov3_vit": dict(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        layerscale_value=1.0,
        rope_theta=100.0,
        query_bias=True,
        key_bias=False,
        value_bias=True,
        proj_bias=True,
        mlp_bias=True,
        use_gated_mlp=False,
        num_register_tokens=0,
    ),
    "siglip_vision_model": _VIT | dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True),
    "clip_vision_model": _VIT | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512),
}
_TOWERS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
MODEL_TYPES = (*_DEFAULTS, *_TOWERS)


def options_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The encoder's options by a config of transformers; None for another network, see `TorchLayout`."""
    kind = config.get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"model_type is {kind}, a NaFlex network for images of any aspect; expected a SigLIP 2 of a fixed size, "
            "which has model_type siglip"
        )
    if kind in _TOWERS:
        own = config.get("vision_config") or {}
        return options_of({"projection_dim": config.get("projection_dim", 512), **own, "model_type": _TOWERS[kind]}) | (
            {"projection": config.get("projection_dim", 512)} if kind == "clip" else {}
        )
    if kind not in _DEFAULTS:
        return None
    c = {**_DEFAULTS[kind], **config}
    if c["hidden_act"] not in _ACTIVATIONS:
        raise UserError(f"hidden_act is {c['hidden_act']!r}; expected one of {', '.join(_ACTIVATIONS)}")
    patch, (H, W) = _pair("patch_size", c["patch_size"])[0], _pair("image_size", c["image_size"])
    options = dict(
        patch=patch,
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_width=c.get("intermediate_size") or int(c["hidden_size"] * c.get("mlp_ratio", 4)),
        activation=_ACTIVATIONS[c["hidden_act"]],
        norm_epsilon=c["layer_norm_eps"],
        qkv_bias="all" if c.get("qkv_bias", True) else "none",
        position_grid=(H // patch, W // patch),
        position_resize="bicubic_antialias" if kind == "dinov2_with_registers" else "bicubic",
        registers=c.get("num_register_tokens", 0) + (kind == "deit"),
        class_token=kind != "siglip_vision_model",
        layer_scale=float(c.get("layerscale_value", 0.0)),
        pooling="cls",
    )
    if kind in ("dinov2", "dinov2_with_registers"):
        options["mlp_width"] = hidden = int(c["hidden_size"] * c["mlp_ratio"])
        if c["use_swiglu_ffn"]:
            options |= dict(gated=True, activation="silu", mlp_width=(int(hidden * 2 / 3) + 7) // 8 * 8)
    elif kind == "dinov3_vit":
        options |= _dinov3(c)
    elif kind == "siglip_vision_model":
        options["pooling"] = "attention" if c["vision_use_head"] else "mean"
    elif kind == "clip_vision_model":
        options |= dict(pre_norm=True, patch_bias=False)
        if any("Projection" in name for name in c.get("architectures") or ()):
            options["projection"] = c["projection_dim"]
    return options


def _dinov3(c: Mapping[str, Any]) -> dict[str, Any]:
    biases = tuple(bool(c[f"{name}_bias"]) for name in ("query", "key", "value"))
    forms = {(True, False, True): "query_value", (True, True, True): "all", (False, False, False): "none"}
    if biases not in forms or not c["proj_bias"] or not c["mlp_bias"]:
        raise UserError(
            "the attention's biases in config.json are of an unknown form; expected query_bias and value_bias alike, "
            "key_bias only with both, proj_bias and mlp_bias true"
        )
    return dict(
        qkv_bias=forms[biases],
        gated=bool(c["use_gated_mlp"]),
        position="rope",
        position_grid=(0, 0),
        position_resize="bicubic_antialias",
        rope_theta=float(c["rope_theta"]),
    )


def _pair(key: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value or ())
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise UserError(f"{key} in config.json is {value!r}; expected a whole number, or rows and columns")
    if key == "patch_size" and pair[0] != pair[1]:
        raise UserError(f"{key} in config.json is {value!r}; expected square patches")
    return pair
