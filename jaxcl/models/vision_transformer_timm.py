"""Vision transformers as timm stores them: names of tensors, and config.json of its repositories on the hub.

Read as well, since timm reads them: the released files of DINOv2 and DINOv3, and CLIP's with the names of open_clip.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError

_TIMM = re.compile(r"(.*?)patch_embed\.proj\.weight")
_CLIP = re.compile(r"(.*?)conv1\.weight")
_BLOCK = re.compile(r"(?:blocks|transformer\.resblocks)\.(\d+)\.(.+)")
_IN_BLOCK = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"attn\.qkv\.(weight|bias)", r"attention.qkv.\1"),
        (r"attn\.in_proj_(weight|bias)", r"attention.qkv.\1"),
        (r"attn\.qkv\.bias_mask", "attention.key_bias_mask"),
        (r"attn\.q_proj\.(weight|bias)", r"attention.query.\1"),
        (r"attn\.k_proj\.(weight|bias)", r"attention.key.\1"),
        (r"attn\.v_proj\.(weight|bias)", r"attention.value.\1"),
        (r"attn\.q_bias", "attention.query.bias"),
        (r"attn\.v_bias", "attention.value.bias"),
        (r"attn\.(?:out_)?proj\.(weight|bias)", r"attention.out.\1"),
        (r"(?:norm1|ln_1)\.(weight|bias)", r"attention_norm.\1"),
        (r"(?:norm2|ln_2)\.(weight|bias)", r"mlp_norm.\1"),
        (r"mlp\.(?:fc1|c_fc|w12|fc1_x|w2)\.(weight|bias)", r"mlp.hidden.\1"),
        (r"mlp\.(?:fc1_g|w1)\.(weight|bias)", r"mlp.gate.\1"),
        (r"mlp\.(?:fc2|c_proj|w3)\.(weight|bias)", r"mlp.out.\1"),
        (r"ls1\.gamma|gamma_1", "attention_scale"),
        (r"ls2\.gamma|gamma_2", "mlp_scale"),
    )
)
_TOP = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"(?:patch_embed\.proj|conv1)\.(weight|bias)", r"tokens.patch.\1"),
        (r"cls_token|class_embedding", "class_token"),
        (r"dist_token", "distillation_token"),
        (r"reg_token|register_tokens|storage_tokens", "registers"),
        (r"pos_embed|positional_embedding", "positions"),
        (r"(?:norm_pre|ln_pre)\.(weight|bias)", r"tokens.pre_norm.\1"),
        (r"(?:norm|ln_post)\.(weight|bias)", r"last_norm.\1"),
        (r"fc_norm\.(weight|bias)", r"pooled_norm.\1"),
        (r"attn_pool\.latent", "pool.probe"),
        (r"attn_pool\.q\.(weight|bias)", r"pool.attention.query.\1"),
        (r"attn_pool\.kv\.(weight|bias)", r"pool.attention.kv.\1"),
        (r"attn_pool\.proj\.(weight|bias)", r"pool.attention.out.\1"),
        (r"attn_pool\.norm\.(weight|bias)", r"pool.norm.\1"),
        (r"attn_pool\.mlp\.fc1\.(weight|bias)", r"pool.mlp.hidden.\1"),
        (r"attn_pool\.mlp\.fc2\.(weight|bias)", r"pool.mlp.out.\1"),
        (r"proj", "project.kernel"),  # of CLIP, which multiplies from the right
    )
)


def prefix_of(names: set[str]) -> str | None:
    """The prefix of the network in a state dict of timm or of CLIP; None for another one."""
    for name in sorted(names):
        if found := _TIMM.fullmatch(name):
            return found[1]
        # A ResNet has a conv1 as well.
        if (found := _CLIP.fullmatch(name)) and f"{found[1]}class_embedding" in names:
            return found[1]
    return None


def renamed(name: str) -> str | None:
    """A name without prefix -> the encoder's module and torch's leaf; None for an unknown one."""
    block = _BLOCK.fullmatch(name)
    rules, inner, before = (_IN_BLOCK, block[2], f"blocks_{block[1]}.") if block else (_TOP, name, "")
    for pattern, ours in rules:
        if found := pattern.fullmatch(inner):
            return before + found.expand(ours)
    return None


# ---- config.json

_NAME = re.compile(r"(?:vit|deit3?)_.*patch(\d+).*")
# Networks with names and tensors like these, but other positions, norms or blocks.
_OTHERS = re.compile(r"_rope_|_pe_|_lingbot|_radio|_tipsv2|_sapiens|relpos_|_xp_|_18x2_|_(?:d|p|dp)wee_|_dlittle_")
_POOLINGS = {"token": "cls", "avg": "mean", "map": "attention"}
# SigLIP's networks with the tanh form of GELU.
_TANH = re.compile(r"patch32_siglip(_gap)?_256|large_patch16_siglip(_gap)?_512|(so400m|giantopt)_patch16_siglip")
_HEAD_FEATURES = (
    (r"_7b_", 128),
    (r"_base_patch16_gap_224", 48),
    (r"_giant_.*dinov2", 64),
    (r"_giant_", 88),
    (r"_giantopt_|_gigantic_.*pe_|_pe_.*_gigantic_", 96),
    (r"_gigantic_", 104),
    (r"_huge_.*dinov3|_huge_plus_", 64),
    (r"_huge_", 80),
    (r"_so400m_", 72),
)


def options_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options that timm's config.json tells beside the tensors; None for another network, see `TorchLayout`."""
    name = str(config.get("architecture", "")).partition(".")[0]
    if name.startswith("naflexvit"):
        raise UserError(
            f"architecture is {name}, a NaFlex network for images of any aspect; expected one of a fixed size"
        )
    found = _NAME.fullmatch(name)
    if not found:
        return None
    if other := _OTHERS.search(name):
        raise UserError(
            f"architecture is {name}, which differs from this encoder ({other[0].strip('_')}); expected a plain vision "
            "transformer, DeiT, MAE, DINOv2, DINOv3, SigLIP or CLIP"
        )
    patch = int(found[1])
    given = config.get("model_args") or {}
    size = given.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size", (3, 224, 224))[1:]
    H, W = (size, size) if isinstance(size, int) else size
    options: dict[str, Any] = dict(
        patch=patch,
        norm_epsilon=1e-5 if "_clip_" in name or "dinov3" in name else 1e-6,
        activation="gelu",
        position_resize="bicubic_antialias",
    )
    if "dinov3" in name:
        options |= dict(position="rope", rope_theta=100.0)
    else:
        options["position_grid"] = (int(H) // patch, int(W) // patch)
    if "quickgelu" in name:
        options["activation"] = "quick_gelu"
    elif _TANH.search(name):
        options["activation"] = "gelu_tanh"
    elif re.search(r"_giant_.*dinov2|_plus_.*dinov3|_7b_.*dinov3", name):
        options["activation"] = "silu"
    if width := config.get("num_features"):
        options["heads"] = int(width) // next((d for pattern, d in _HEAD_FEATURES if re.search(pattern, name)), 64)
    if pooling := _POOLINGS.get(given.get("global_pool") or config.get("global_pool") or ""):
        options["pooling"] = pooling
    return options
