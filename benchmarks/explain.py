"""GradCAM compared with captum, and PGD with foolbox and torchattacks, on one network with the same weights.

    python -m benchmarks.run --only=explain

Letters: N images, S side in pixels, D features, K classes. All contestants must compute the same maps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _floor, _paired
from benchmarks._measure import cores
from benchmarks._paired import torch_threads
from benchmarks._table import Row, Settings
from benchmarks._task import Contestant, Needs, Ready
from jaxcl import models
from jaxcl.adversarial import pgd
from jaxcl.models import weights
from jaxcl.saliency import grad_cam

TITLE = "GradCAM and PGD"
NOTE = (
    "Two networks, the same weights in JAX and in torch, 32 px, 10 classes, batch norms in inference mode: ResNet-18 "
    "of a quarter of the usual width with CIFAR's stem, whose work is 3x3 convolutions, and the one of the default CPU "
    "presets, which mostly does matmuls. GradCAM explains the last convolution, and the maps agree to 1e-4. PGD takes "
    "10 steps from a random start; its unit is images x steps, each one forward and one backward pass."
)
NETWORKS = {
    "ResNet-18, width 1/4": {"depth": 18, "stem": "cifar", "stage_widths": (16, 32, 64, 128)},
    "the CPU presets' network": {
        "depth": 50,
        "stem": "patch4",
        "stage_sizes": (2, 2),
        "stage_widths": (32, 64),
        "strides": (1, 2),
    },
}
TINY = {"depth": 18, "stem": "patch4", "stage_sizes": (1, 1), "stage_widths": (4, 8), "strides": (1, 2)}
SIZE, CLASSES, STEPS, EPSILON, STEP = 32, 10, 10, 8 / 255, 2 / 255

CAM = (Contestant("jaxcl", "jaxcl", ours=True), Contestant("captum", "captum", package="captum"))
PGD = (
    Contestant("jaxcl", "jaxcl", ours=True),
    Contestant("foolbox", "foolbox", package="foolbox"),
    Contestant("torchattacks", "torchattacks", package="torchattacks"),
    Contestant("torch", "torch, written out", package="torch", differs="only a loop of autograd and sign"),
)


def rows(settings: Settings) -> list[Row]:
    """Images per second of GradCAM, images x steps per second of PGD."""
    out = []
    networks, batch = ({"tiny": TINY}, 4) if settings.quick else (NETWORKS, 64)
    for what, contestants in (("GradCAM", CAM), ("PGD", PGD)):
        for name, network in networks.items():
            task = f"{what}, {name}, batches of {batch}"
            arguments = {"what": what, "network": network, "batch": batch}
            out += _paired.rows(
                "benchmarks.explain",
                task,
                contestants,
                settings,
                arguments=arguments,
                unit="images/s" if what == "GradCAM" else "images x steps/s",
                cores=cores(),
            )
    return out


def prepare(contestant: str, *, what: str, network: Mapping[str, Any], batch: int) -> Ready:
    model, variables, kernel_DxK = make_network(network)
    rng = np.random.default_rng(1)
    images_NxSxSx3, needs = rng.random((batch, SIZE, SIZE, 3), np.float32), None
    targets_N = rng.integers(0, CLASSES, batch)
    if contestant == "jaxcl":
        params, stats = weights.nested({k: jnp.asarray(v) for k, v in variables.items()})
        given = model, {"encoder": params}, stats, jnp.asarray(kernel_DxK), images_NxSxSx3, targets_N
        run = (jaxcl_cam if what == "GradCAM" else jaxcl_pgd)(*given)
        needs = passes_of(what, *given)
    else:
        torch = torch_threads()
        net = torch_network(model.encoder, models.ResNetOptions.torch_layout.to_torch(variables), kernel_DxK)
        x = torch.from_numpy(images_NxSxSx3.transpose(0, 3, 1, 2).copy())
        run = IN_TORCH[contestant](net, x, torch.from_numpy(targets_N))
    first = np.asarray(run())
    if what == "GradCAM":
        return Ready(run, batch, first, needs)
    moved = np.abs(first.reshape(batch, -1) - _flat(images_NxSxSx3, contestant)).max()
    assert 0.5 * EPSILON < moved <= EPSILON + 1e-6, f"{contestant} moved the images by {moved}"
    return Ready(run, batch * STEPS, needs=needs)


def _flat(images: np.ndarray, contestant: str) -> np.ndarray:
    images = images if contestant == "jaxcl" else images.transpose(0, 3, 1, 2)
    return images.reshape(len(images), -1)


def make_network(options: Mapping[str, Any]) -> tuple[models.Model, dict[str, np.ndarray], np.ndarray]:
    """A model, the variables of its encoder by name, and the kernel [D,K] of a classifier; equal in all processes."""
    model = models.make_model(models.ResNetOptions(**options, head_features=0))
    params, stats = model.init(jax.random.key(0), (SIZE, SIZE, 3))
    variables = {k: np.asarray(v) for k, v in weights.flat(params["encoder"], model.statistics_of(stats)).items()}
    rng = np.random.default_rng(0)
    # Random statistics: with fresh ones, half of the arithmetic of norms would not show in the maps.
    for name, value in variables.items():
        if name.endswith((".mean", ".bias")):
            variables[name] = rng.normal(0, 0.1, value.shape).astype(value.dtype)
        elif name.endswith((".var", ".scale")):
            variables[name] = rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
    kernel_DxK = rng.normal(0, model.features**-0.5, (model.features, CLASSES)).astype(np.float32)
    return model, variables, kernel_DxK


def passes_of(what: str, model, params, stats, kernel_DxK, images, targets) -> Needs:
    """GradCAM: a forward pass, because the backward pass to the last stage has no matmul. PGD: forward and backward."""

    def score(x_NxSxSx3):
        h_NxD = model.encode(params, stats, x_NxSxSx3, train=False)[0]
        return jnp.take_along_axis(h_NxD @ kernel_DxK, targets[:, None], axis=1).sum()

    if what == "GradCAM":
        return _floor.of_program(score, images)
    once = _floor.of_program(jax.grad(score), images)
    return Needs(STEPS * once.flops, STEPS * once.bytes)


# ---- jaxcl


def jaxcl_cam(model, params, stats, kernel_DxK, images, targets) -> Callable[[], Any]:
    tap = f"stage{model.num_stages}"

    @jax.jit
    def cam(images, targets):
        activations, tail, _ = model.split_at(params, stats, images, tap, train=False)
        return grad_cam(lambda a: tail(a)[0] @ kernel_DxK, activations, targets)

    return lambda: jax.block_until_ready(cam(images, targets))


def jaxcl_pgd(model, params, stats, kernel_DxK, images, targets) -> Callable[[], Any]:
    model = model.for_loops()  # as the adversary stage does

    @jax.jit
    def attack(images, targets, key):
        def loss(x_NxSxSx3):
            logits_NxK = model.encode(params, stats, x_NxSxSx3, train=False)[0] @ kernel_DxK
            return -jnp.take_along_axis(jax.nn.log_softmax(logits_NxK), targets[:, None], axis=1)[:, 0]

        return pgd(loss, images, epsilon=EPSILON, step_size=STEP, num_steps=STEPS, key=key)

    key = jax.random.key(2)
    return lambda: jax.block_until_ready(attack(images, targets, key))


# ---- torch


def torch_network(encoder: models.ResNet, state: Mapping[str, np.ndarray], kernel_DxK: np.ndarray) -> Any:
    """The encoder and the classifier in torchvision's blocks, with these weights, in evaluation mode."""
    import torch
    from torch import nn
    from torchvision.models import resnet

    block = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[encoder.block]
    stem = models.ResNetOptions.torch_layout.changes(encoder)
    width = channels = encoder.widths[0]
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, width, bias=False, **stem["conv1"]))
    net.add_module("bn1", nn.BatchNorm2d(width))
    net.add_module("relu", nn.ReLU(inplace=True))
    if stem["maxpool"]:
        net.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
    stages = zip(encoder.stage_sizes, encoder.widths, encoder.strides, strict=True)
    for i, (blocks, planes, stride) in enumerate(stages, start=1):
        layer = nn.Sequential()
        for j in range(blocks):
            step, out = stride if j == 0 else 1, planes * block.expansion
            shortcut = None
            if step != 1 or channels != out:
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, step, bias=False), nn.BatchNorm2d(out))
            layer.append(block(channels, planes, step, shortcut))
            channels = out
        net.add_module(f"layer{i}", layer)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(channels, CLASSES, bias=False))
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    missing = net.load_state_dict({**tensors, "fc.weight": torch.from_numpy(kernel_DxK.T.copy())}, strict=False)
    assert not missing.unexpected_keys and all(k.endswith("num_batches_tracked") for k in missing.missing_keys)
    return net.eval().requires_grad_(False)


def captum_cam(net, x, targets) -> Callable[[], Any]:
    from captum.attr import LayerGradCam

    last = [module for module in net.modules() if type(module).__name__ in ("BasicBlock", "Bottleneck")][-1]
    net.requires_grad_(True)  # else the output of the layer has no gradient
    cam = LayerGradCam(net, last.conv3 if hasattr(last, "conv3") else last.conv2)
    return lambda: cam.attribute(x, targets, attr_dim_summation=True).detach()


def foolbox_pgd(net, x, targets) -> Callable[[], Any]:
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=True)
    return lambda: attack.run(model, x, foolbox.Misclassification(targets), epsilon=EPSILON)


def torchattacks_pgd(net, x, targets) -> Callable[[], Any]:
    import torchattacks

    attack = torchattacks.PGD(net, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=True)
    return lambda: attack(x, targets)


def torch_pgd(net, x, targets) -> Callable[[], Any]:
    import torch

    def run():
        moved = (x + (2 * torch.rand_like(x) - 1) * EPSILON).clamp_(0, 1)
        for _ in range(STEPS):
            moved.requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(net(moved), targets, reduction="sum")
            gradient = torch.autograd.grad(loss, moved)[0]
            moved = moved.detach() + STEP * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp_(0, 1)
        return moved

    return run


IN_TORCH = {"captum": captum_cam, "foolbox": foolbox_pgd, "torchattacks": torchattacks_pgd, "torch": torch_pgd}
