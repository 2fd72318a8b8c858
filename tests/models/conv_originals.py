"""Tiny convolutional networks of timm, torchvision and transformers with random weights; needs the three, and torch.

`FAMILIES` names them; `make(name)` builds one; `Original` runs it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Height and width of the images, even and odd: padding is where networks differ.
SIDES = {"efficientnet": ((14, 14), (13, 19)), "convnext": ((32, 32), (33, 38))}
SIZES, WIDTHS = (1, 2, 1, 1), (4, 6, 8, 10)  # of ConvNeXts; that of timm has four stages
STEM, HEAD = 10, 20


class Original(NamedTuple):
    """A network in torch, and what comes with its file."""

    net: Any
    stages: list[Any]
    features: Callable  # images of torch -> [N,D]
    config: dict[str, Any]  # config.json; {} without one
    given: dict[str, Any]  # options that neither tensors nor config tell

    @property
    def state(self) -> dict[str, np.ndarray]:
        return {k: v.numpy() for k, v in self.net.state_dict().items() if v.ndim}

    def run(self, images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Images [N,H,W,C] -> (the map [N,h,w,M] after each stage, features [N,D])."""
        import torch

        maps, hooks = [], []
        for stage in self.stages:
            hooks.append(stage.register_forward_hook(lambda _, __, y: maps.append(y.numpy().transpose(0, 2, 3, 1))))
        with torch.no_grad():
            features = self.features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        for hook in hooks:
            hook.remove()
        return maps, features


def _efficientnet(pad_type: str, epsilon: float) -> tuple[Any, list[Any], Callable]:
    import torch
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = ("ds_r1_k3_s1_e1_c8", "ir_r2_k3_s2_e6_c16", "ir_r1_k5_s2_e6_c24")
    net = EfficientNet(
        decode_arch_def([[b] for b in blocks]),
        stem_size=STEM,
        num_features=HEAD,
        fix_stem=True,
        round_chs_fn=int,
        act_layer=torch.nn.ReLU6,
        norm_layer=functools.partial(torch.nn.BatchNorm2d, eps=epsilon),
        pad_type=pad_type,
        num_classes=3,
    )
    return net, list(net.blocks), lambda x: net.forward_head(net.forward_features(x), pre_logits=True)


def _convnext_timm(**options: Any) -> tuple[Any, list[Any], Callable]:
    from timm.models.convnext import ConvNeXt

    net = ConvNeXt(depths=SIZES, dims=WIDTHS, num_classes=3, **options)
    return net, list(net.stages), lambda x: net.forward_head(net.forward_features(x), pre_logits=True)


def _convnext_torchvision() -> tuple[Any, list[Any], Callable]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    ends = (*WIDTHS[1:], None)
    net = ConvNeXt([CNBlockConfig(*given) for given in zip(WIDTHS, ends, SIZES, strict=True)], num_classes=3)
    stages = [net.features[2 * i + 1] for i in range(len(SIZES))]
    return net, stages, lambda x: net.classifier[:2](net.avgpool(net.features(x)))


def _convnext_hf(kind: str) -> tuple[Any, list[Any], Callable]:
    import transformers

    cls = getattr(transformers, kind)
    net = cls(cls.config_class(depths=SIZES, hidden_sizes=WIDTHS, num_stages=len(SIZES)))
    inner = getattr(net, "convnextv2", net)
    return net, list(inner.encoder.stages), lambda x: inner(x).pooler_output


V2 = dict(use_grn=True, ls_init_value=None)
# name -> (makes it, its config.json, options that are given)
FAMILIES: dict[str, tuple[Callable, dict[str, Any], dict[str, Any]]] = {
    "efficientnet_same": (functools.partial(_efficientnet, "same", 1e-3), {}, {}),
    "efficientnet_symmetric": (
        functools.partial(_efficientnet, "", 1e-5),
        {"architecture": "efficientnet_lite0"},
        {},
    ),
    "convnext_timm": (functools.partial(_convnext_timm, conv_mlp=True), {}, {}),
    "convnext_dense_timm": (_convnext_timm, {"architecture": "convnext_tiny.in12k"}, {}),
    "convnext_v2_timm": (functools.partial(_convnext_timm, conv_mlp=True, **V2), {}, {}),
    "convnext_torchvision": (_convnext_torchvision, {}, {}),
    "convnext_hf": (functools.partial(_convnext_hf, "ConvNextModel"), {"model_type": "convnext"}, {}),
    "convnext_v2_hf": (
        functools.partial(_convnext_hf, "ConvNextV2ForImageClassification"),
        {"model_type": "convnextv2", "layer_norm_eps": 1e-12},
        {},
    ),
}


def make(name: str, seed: int = 0) -> Original:
    import torch

    build, config, given = FAMILIES[name]
    net, stages, features = build()
    rng = np.random.default_rng(seed)
    for key, value in net.state_dict().items():
        if not value.ndim:
            continue
        noise = rng.standard_normal(value.shape)
        if max(value.shape) < value.numel():  # a kernel, not a vector with axes of 1 beside it
            noise *= np.prod(value.shape[1:]) ** -0.5
        elif key.endswith("running_var"):
            noise = 0.5 + noise**2
        else:
            noise = 0.3 * noise + key.endswith(("weight", "gamma", "layer_scale", "layer_scale_parameter"))
        # float16 holds the values, so that small files hold them exactly.
        value.copy_(torch.from_numpy(np.asarray(noise, np.float16).astype(np.float32)))
    return Original(net.eval(), stages, features, config, given)
