"""Tiny vision transformers of timm and transformers with random weights, for comparison; needs both, and torch.

`FAMILIES` names them; `make(name)` builds one; `Original` runs it.
"""

import json
import tempfile
from typing import Any, NamedTuple

import numpy as np

SIDE, PATCH = 8, 2  # the positions are for SIDE x SIDE
OTHER = (6, 10)  # height and width of the second images
SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_channels=3)
HF = SIZES | dict(image_size=SIDE, patch_size=PATCH)
ROPE = HF | dict(hidden_size=16, num_register_tokens=2)
TIMM = dict(img_size=SIDE, patch_size=PATCH, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=0)
TIMM |= dict(dynamic_img_size=True)
GIVEN = dict(heads=2, norm_epsilon=1e-6, activation="gelu")  # what timm's tensors do not tell

# name -> (class of transformers or name of timm, its arguments, options that are given because tensors do not tell)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit_hf": ("ViTModel", HF, {}),
    "vit_classifier_hf": ("ViTForImageClassification", HF | dict(qkv_bias=False), {}),
    "deit_hf": ("DeiTModel", HF, {}),
    "mae_hf": ("ViTMAEModel", HF | dict(mask_ratio=0.0), {}),
    "dinov2_hf": ("Dinov2Model", HF | dict(mlp_ratio=2), {}),
    "dinov2_linear_hf": ("Dinov2ForImageClassification", HF | dict(mlp_ratio=2), dict(pooling="cls_mean")),
    "dinov2_giant_hf": ("Dinov2Model", HF | dict(use_swiglu_ffn=True), {}),
    "dinov2_registers_hf": ("Dinov2WithRegistersModel", HF | dict(mlp_ratio=2, num_register_tokens=3), {}),
    "dinov3_hf": ("DINOv3ViTModel", ROPE, {}),
    "dinov3_gated_hf": ("DINOv3ViTModel", ROPE | dict(use_gated_mlp=True, hidden_act="silu", rope_theta=50.0), {}),
    "siglip_hf": ("SiglipVisionModel", HF, {}),
    "siglip_headless_hf": ("SiglipVisionModel", HF | dict(vision_use_head=False), {}),
    "siglip_full_hf": ("SiglipModel", HF, {}),
    "clip_hf": ("CLIPVisionModel", HF, {}),
    "clip_projection_hf": ("CLIPVisionModelWithProjection", HF | dict(projection_dim=6), {}),
    "clip_full_hf": ("CLIPModel", HF | dict(projection_dim=6), {}),
    "vit_timm": ("vit_tiny_patch16_224", {}, {}),
    "vit_mean_timm": ("vit_tiny_patch16_224", dict(global_pool="avg", qkv_bias=False), {}),
    "deit_distilled_timm": ("deit_tiny_distilled_patch16_224", {}, {}),
    "deit3_timm": ("deit3_small_patch16_224", {}, {}),
    "dinov2_timm": ("vit_small_patch14_dinov2", {}, {}),
    "dinov2_giant_timm": ("vit_giant_patch14_reg4_dinov2", dict(mlp_ratio=3.0), dict(activation="silu")),
    "dinov3_timm": ("vit_small_patch16_dinov3", dict(embed_dim=16, global_pool="token"), dict(norm_epsilon=1e-5)),
    "dinov3_plus_timm": (
        "vit_small_plus_patch16_dinov3_qkvb",
        dict(embed_dim=16),
        dict(norm_epsilon=1e-5, activation="silu", pooling="mean"),
    ),
    "siglip_timm": ("vit_base_patch16_siglip_224", {}, {}),
    "siglip_mean_timm": ("vit_base_patch16_siglip_gap_224", {}, {}),
    "siglip2_timm": ("vit_so400m_patch16_siglip_256", {}, dict(activation="gelu_tanh")),
    "clip_timm": (
        "vit_base_patch16_clip_quickgelu_224",
        {},
        dict(norm_epsilon=1e-5, activation="quick_gelu"),
    ),
}


class Original(NamedTuple):
    """A network in torch, and what comes with its file."""

    net: Any
    saved: dict[str, np.ndarray]  # by the names of its file
    live: dict[str, np.ndarray]  # by the names of the module
    config: dict[str, Any]  # config.json; {} for timm
    given: dict[str, Any]

    def run(self, images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Images [N,H,W,C] -> (tokens [N,T,D] after each block, features [N,D])."""
        import torch

        tokens, hooks = [], []
        for block in self._blocks():
            hooks.append(block.register_forward_hook(lambda _, __, out: tokens.append(_first(out).numpy())))
        with torch.no_grad():
            features = self._features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        for hook in hooks:
            hook.remove()
        return tokens, features

    def _blocks(self):
        from torch import nn

        names = ("TransformerBlock", "Block", "EvaBlock")
        net = getattr(self.net, "vision_model", self.net)
        found = [m for m in net.modules() if type(m).__name__.endswith(("Layer", "EncoderLayer", *names))]
        return [m for m in found if isinstance(m, nn.Module)][:2]

    def _features(self, x):
        import torch

        net, kind = self.net, type(self.net).__name__
        if not self.config:
            tokens = net.forward_features(x)
            return tokens[:, 0] if "Distilled" in kind else net.forward_head(tokens, pre_logits=True)
        if kind == "ViTMAEModel":
            noise = torch.arange((x.shape[2] // PATCH) * (x.shape[3] // PATCH))[None].expand(len(x), -1).float()
            return net(x, noise=noise, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        if kind == "ViTForImageClassification":
            net = net.vit
        if kind == "Dinov2ForImageClassification":  # what its classifier gets
            tokens = net.dinov2(x).last_hidden_state
            return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        size = {} if kind.lower().startswith("dino") else dict(interpolate_pos_encoding=True)
        if kind in ("CLIPModel", "SiglipModel"):
            out = net.get_image_features(x, **size)
            return getattr(out, "pooler_output", out)
        out = net(x, **size)
        if kind == "CLIPVisionModelWithProjection":
            return out.image_embeds
        if getattr(net.config, "vision_use_head", True) is False:
            return out.last_hidden_state.mean(1)
        cls = kind.startswith(("ViT", "DeiT"))  # their pooler is a layer of its own on top
        return out.last_hidden_state[:, 0] if cls else out.pooler_output


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _randomise(net, seed):
    """Values that float16 holds, so that small files hold them exactly; scales about 1, tokens as large as patches."""
    import torch

    rng = np.random.default_rng(seed)
    for name, p in net.named_parameters():
        noise = rng.standard_normal(p.shape)
        if p.ndim > 1 and not any(word in name for word in ("token", "pos", "latent", "probe")):
            value = noise * np.prod(p.shape[1:]) ** -0.5
        elif "gamma" in name or "lambda" in name or ("norm" in name and "weight" in name):
            value = 1 + 0.3 * noise
        else:
            value = 0.4 * noise
        p.data = torch.from_numpy(np.asarray(value, np.float16).astype(np.float32))
    return net.eval()


def make(name: str, seed: int = 0) -> Original:
    kind, arguments, given = FAMILIES[name]
    if name.endswith("_timm"):
        import timm

        net = _randomise(timm.create_model(kind, **(TIMM | arguments)), seed)
        state = {k: v.numpy() for k, v in net.state_dict().items()}
        return Original(net, state, state, {}, GIVEN | given)
    import transformers
    from safetensors.numpy import load_file

    cls = getattr(transformers, kind)
    config_cls = cls.config_class
    if kind in ("SiglipModel", "CLIPModel"):
        text = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        text |= dict(vocab_size=9, max_position_embeddings=4)
        own = {k: v for k, v in arguments.items() if k == "projection_dim"}
        config = config_cls(text_config=text, vision_config=arguments, **own)
    else:
        config = config_cls(**arguments)
    net = _randomise(cls(config), seed)
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        saved = load_file(f"{folder}/model.safetensors")
        with open(f"{folder}/config.json") as file:
            written = json.load(file)
    live = {k: v.numpy() for k, v in net.state_dict().items()}
    return Original(net, saved, live, written, given)
