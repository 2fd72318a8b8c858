"""Whole updates of SimCLR, SupCon, ExConB and CLAE, and the same in torch, including data and augmentation.

    python -m benchmarks.run --only=steps

The torch side is the usual code: torchvision v2 transforms on single images in two DataLoader workers, the same network
(torchvision's blocks with copied weights), the same losses, AdamW.

Letters: B batch, V views, N = V B rows, E embedding, K classes.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import _floor, _paired
from benchmarks._measure import cores
from benchmarks._paired import torch_threads
from benchmarks._table import Row, Settings
from benchmarks._task import Contestant, Ready
from benchmarks.explain import torch_network
from benchmarks.passes import Passes, Whole, function_of, needed, program
from benchmarks.steps import load_config
from jaxcl.data import make_source
from jaxcl.method.forward import of_encoder
from jaxcl.models import ResNetOptions, weights

TITLE = "Whole updates, with data and augmentation"
NOTE = (
    "Garments at 32 px, batches of 128, float32. Two networks: that of the default CPU presets, and ResNet-18 of a "
    "quarter of the usual width with CIFAR's stem, whose work is 3x3 convolutions. 'Two passes' is the least work of "
    "an update of SimCLR in the encoder (forward and full backward passes on the same number of images, without data); "
    "the difference is the rest of an update. In torch, torchvision v2 augments single images in two worker "
    "processes, which share the cores; jaxcl augments in the update."
)
NETWORKS = {
    "the CPU presets' network": {},
    "ResNet-18, width 1/4": dict(depth=18, stem="cifar", stage_sizes=(), stage_widths=(16, 32, 64, 128), strides=()),
}
METHODS = ("simclr", "supcon", "excon", "clae")
CONTESTANTS = (
    Contestant("jaxcl", "jaxcl", ours=True),
    Contestant("torch", "torch", package="torchvision"),
)
STEPS = {True: 1, False: 3}  # updates per call, by `quick`
QUICK = dict(stage_sizes=(1, 1), stage_widths=(4, 8), strides=(1, 2))
EPSILON = 0.015  # of [0, 1], as in configs/clae.py


def rows(settings: Settings) -> list[Row]:
    """Images per second of whole updates and of the encoder passes in them."""
    found = []
    networks = {"tiny": QUICK} if settings.quick else NETWORKS
    for title, network in networks.items():
        for method in METHODS[:1] if settings.quick else METHODS:
            for part in ("update", "passes"):
                if part == "passes" and method != "simclr":
                    continue  # those of the other methods are multiples of these
                arguments = dict(method=method, network=network, part=part, quick=settings.quick)
                found += _paired.rows(
                    "benchmarks.torch_steps",
                    f"{title}, {method if part == 'update' else 'two passes of a batch'}",
                    CONTESTANTS,
                    settings,
                    arguments=arguments,
                    unit="images/s",
                    cores=cores(),
                )
    return found


def prepare(contestant: str, *, method: str, network: dict[str, Any], part: str, quick: bool) -> Ready:
    config = load_config(method, "")
    for key, value in network.items():
        config.model[key] = tuple(value) if isinstance(value, list) else value
    for stage in config.stages:
        if "tap" in stage:
            stage.tap = "stage1"
    if quick:
        config.batch_size = 8
    source = make_source(config.data.source)
    step, B, count = Whole(config, source), config.batch_size, STEPS[quick]
    if contestant == "jaxcl":
        # The floor of an update is that of its passes; the rest could be small.
        once = _floor.total(
            [_floor.of_program(f, *given) for f, given in map(partial(function_of, step), needed(step.recipe))]
        )
        if part == "passes":
            runs = [program(step, p) for p in needed(step.recipe)]
            return Ready(lambda: [run() for run in runs], B, needs=once)
        run = step.run(count)
        return Ready(run, count * B, needs=_floor.total([once] * count))
    step.loader.close()
    if part == "passes":
        return Ready(torch_passes(step, [p for p in needed(step.recipe)]), B)
    return Ready(Torch(step, config, source, method).run(count), count * B)


# ---- torch


def _networks(step: Whole) -> tuple[Any, Any]:
    """(encoder, projection head) with the weights of the jaxcl model, in training mode."""
    from torch import nn

    recipe, model = step.recipe, step.recipe.model
    own = of_encoder(jax.device_get(step.state.params), "")
    stats = model.statistics_of(of_encoder(jax.device_get(step.state.batch_stats), ""))
    variables = {k: np.asarray(v) for k, v in weights.flat(own["encoder"], stats).items() if "_adv." not in k}
    D = model.features
    net = torch_network(model.encoder, ResNetOptions.torch_layout.to_torch(variables), np.zeros((D, 10), np.float32))
    del net.fc
    head = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, recipe.model.embedding_features))
    return net.train().requires_grad_(True), head


def torch_passes(step: Whole, passes: list[Passes]) -> Callable[[], Any]:
    torch = torch_threads()
    net, _ = _networks(step)
    images = [torch.randn(p.images, 3, *step.recipe.image_shape[:2]) for p in passes]

    def run():
        for x in images:
            net.zero_grad(set_to_none=True)
            net(x).square().mean().backward()

    return run


class Images:
    """A dataset of two views of each image, by torchvision, and the image itself."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean, std, opened):
        import torch
        from torchvision.transforms import v2

        # Workers wait while other contestants run; else they would prepare batches at no cost.
        self.opened, self.owner = opened, os.getpid()
        self.images, self.labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.plain = v2.Compose(end)
        self.view = v2.Compose(
            [
                v2.RandomResizedCrop(images.shape[1], scale=(0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                *end,
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        while not self.opened.wait(2):
            try:
                os.kill(self.owner, 0)
            except ProcessLookupError:
                os._exit(0)  # nothing reads further batches
        image = self.images[i]
        return self.view(image), self.view(image), self.plain(image), int(self.labels[i])


def endless(loader):
    while True:
        yield from loader


class Torch:
    """The update of a method in torch."""

    def __init__(self, step: Whole, config, source, method: str):
        self.torch = torch = torch_threads()
        from torch.utils.data import DataLoader

        recipe = step.recipe
        self.net, self.head = _networks(step)
        self.probe = torch.nn.Linear(recipe.model.features, recipe.num_classes)
        both = [*self.net.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(both, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
        self.probe_optimizer = torch.optim.SGD(self.probe.parameters(), lr=0.1, momentum=0.9)
        self.update = getattr(self, method)
        mean, std = recipe.mean, recipe.std
        self.low, self.high = (
            torch.tensor([(v - m) / s for m, s in zip(mean, std, strict=True)])[:, None, None] for v in (0, 1)
        )
        self.epsilon = torch.tensor([EPSILON / s for s in std])[:, None, None]
        # Not by fork, because JAX has threads; nor by a fork server, because torch's workers would outlive it.
        context = torch.multiprocessing.get_context("spawn")
        self.opened = context.Event()
        data = Images(source.images, source.labels, mean, std, self.opened)
        self.batches = endless(
            DataLoader(
                data,
                recipe.batch_size,
                shuffle=True,
                num_workers=2,
                drop_last=True,
                persistent_workers=True,
                multiprocessing_context=context,
            )
        )

    def run(self, steps: int) -> Callable[[], None]:
        def several():
            self.opened.set()
            for _ in range(steps):
                self.update(*next(self.batches))
            self.opened.clear()

        return several

    def learn(self, loss) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def classify(self, features, labels) -> None:
        """The online probe learns from frozen features."""
        self.probe_optimizer.zero_grad(set_to_none=True)
        self.torch.nn.functional.cross_entropy(self.probe(features.detach()), labels).backward()
        self.probe_optimizer.step()

    def embed(self, x):
        h = self.net(x)
        return h, self.torch.nn.functional.normalize(self.head(h), dim=1)

    def nt_xent(self, a, b, temperature: float = 0.5):
        z_NxE = self.torch.cat([a, b])
        logits_NxN = (z_NxE @ z_NxE.T / temperature).fill_diagonal_(-1e9)
        partner = self.torch.arange(len(z_NxE)).roll(len(a))
        return self.torch.nn.functional.cross_entropy(logits_NxN, partner)

    def supervised(self, z_NxE, label_N, exists_N=None, temperature: float = 0.2):
        """SupCon with the mean over positives outside the logarithm; padded rows are excluded."""
        torch = self.torch
        N = len(z_NxE)
        exists_N = torch.ones(N, dtype=torch.bool) if exists_N is None else exists_N
        logits = z_NxE @ z_NxE.T / temperature
        others = ~torch.eye(N, dtype=torch.bool) & exists_N[None]
        logits = logits.masked_fill(~others, -1e9)
        positive = (label_N[:, None] == label_N[None]) & others
        terms = logits - logits.logsumexp(1, keepdim=True)
        anchors = exists_N & positive.any(1) & (label_N >= 0)
        return -((terms * positive).sum(1) / positive.sum(1).clamp(min=1))[anchors].mean()

    def simclr(self, v1, v2, plain, label) -> None:
        (h1, z1), (_, z2) = self.embed(v1), self.embed(v2)
        self.learn(self.nt_xent(z1, z2))
        self.classify(h1, label)

    def supcon(self, v1, v2, plain, label) -> None:
        h, z = self.embed(self.torch.cat([v1, v2]))
        self.learn(self.supervised(z, label.repeat(2)))
        self.classify(h[len(v1) :], label)

    def clae(self, v1, v2, plain, label) -> None:
        torch = self.torch
        x = v1.clone().requires_grad_(True)
        _, z = self.embed(x)
        # The anchor is the same image, held fixed.
        gradient = torch.autograd.grad(self.nt_xent(z.detach(), z), x)[0]
        moved = torch.maximum(torch.minimum(v1 + self.epsilon * gradient.sign(), self.high), self.low)
        (h1, z1), (_, z2), (_, z3) = self.embed(v1), self.embed(v2), self.embed(moved)
        self.learn(self.nt_xent(z1, z2) + self.nt_xent(z1, z3))
        self.classify(h1, label)

    def excon(self, v1, v2, plain, label) -> None:
        """ExConB: GradCAM at stage 1; accepted masks replace view 1, rejected ones become further negatives."""
        torch = self.torch
        layers = dict(self.net.named_children())
        names = list(layers)
        cut = names.index("layer1") + 1
        with torch.no_grad():
            a = plain
            for name in names[:cut]:
                a = layers[name](a)
        a.requires_grad_(True)
        h = a
        for name in names[cut:]:
            h = layers[name](h)
        score = self.probe(h).gather(1, label[:, None]).sum()
        gradient = torch.autograd.grad(score, a)[0]
        with torch.no_grad():
            maps = (gradient.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True)
            maps = torch.nn.functional.interpolate(maps, plain.shape[2:], mode="bilinear")
            maps = maps - maps.amin((2, 3), keepdim=True)
            masked = plain * (maps / (maps.amax((2, 3), keepdim=True) + 1e-8) > 0.5)
            accepted = self.probe(self.net(masked)).argmax(1) == label
        first = torch.where(accepted[:, None, None, None], masked, v1)
        h1, z1 = self.embed(torch.cat([first, masked[~accepted]]))
        h2, z2 = self.embed(v2)
        B = len(v1)
        labels = torch.cat([label, torch.full((len(z1) - B,), -1), label])
        self.learn(self.supervised(torch.cat([z1, z2]), labels))
        self.classify(h2, label)
