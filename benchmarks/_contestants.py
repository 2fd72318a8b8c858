"""The losses in benchmarks/losses.py: one interface to JAX programs and torch modules.

Letters: N rows (images x 2 views), B = N/2 images, D features. Rows 2i and 2i + 1 are the two views of image i.
"""

import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._measure import cores, seconds_per_call
from jaxcl import losses

TEMPERATURE = 0.1
CLASSES = 100
RATE_SIZE = 2048  # rows and columns of the matmul that measures the rate of the machine


class Data(NamedTuple):
    z_NxD: np.ndarray
    classes_B: np.ndarray
    pairs_B: np.ndarray


def make_data(rows: int, dim: int) -> Data:
    rng = np.random.default_rng(rows)
    z_NxD = rng.normal(size=(rows, dim)).astype(np.float32)
    classes = rng.integers(0, CLASSES, rows // 2, dtype=np.int32)
    return Data(z_NxD, classes, np.arange(rows // 2, dtype=np.int32))


@dataclasses.dataclass
class Ready:
    """A contestant at one size: `run` computes (value, gradient) and waits for the result."""

    run: Callable[[], tuple[Any, Any]] | None
    need: int  # bytes in addition to input and gradient: XLA's temporaries, or a count for torch
    identity: object = None  # equal for contestants that are the same program


@dataclasses.dataclass(frozen=True)
class Contestant:
    key: str
    name: str
    group: str  # contestants of one group compute the same loss; "floor": no loss
    prepare: Callable[[Data, int], Ready]  # (data, budget) -> Ready; run is None if need exceeds the budget
    package: str = "jaxcl"
    peer: str = ""  # its name in --peers


# ---- JAX


def supcon(implementation: str):
    def loss(z_NxD, classes_B):
        features_BxVxD = z_NxD.reshape(len(classes_B), 2, -1)
        return losses.supcon(
            features_BxVxD,
            classes_B,
            temperature=TEMPERATURE,
            anchor_mean="positive",
            implementation=implementation,
        )

    return loss


def nt_xent(implementation: str):
    def loss(z_NxD, _):
        return losses.nt_xent(z_NxD[0::2], z_NxD[1::2], temperature=TEMPERATURE, implementation=implementation)

    return loss


def plain_supcon(z_NxD, classes_B):
    """L_out in its usual N x N form, that of every dense SupCon."""
    labels_N = jnp.repeat(classes_B, 2)
    z_NxD = z_NxD / jnp.linalg.norm(z_NxD, axis=1, keepdims=True)
    s_NxN = z_NxD @ z_NxD.T / TEMPERATURE
    s_NxN = s_NxN - jax.lax.stop_gradient(jnp.max(s_NxN, axis=1, keepdims=True))
    others_NxN = 1 - jnp.eye(len(z_NxD), dtype=z_NxD.dtype)
    positive_NxN = (labels_N[:, None] == labels_N[None]) * others_NxN
    log_p_NxN = s_NxN - jnp.log(jnp.sum(jnp.exp(s_NxN) * others_NxN, axis=1, keepdims=True))
    return -jnp.mean(jnp.sum(positive_NxN * log_p_NxN, axis=1) / jnp.sum(positive_NxN, axis=1))


def optax_ntxent(z_NxD, pairs_B):
    import optax

    return optax.losses.ntxent(z_NxD, jnp.repeat(pairs_B, 2), TEMPERATURE)


def _prepare(function, *arguments, budget: int) -> Ready:
    lowered = jax.jit(function).lower(*arguments)
    compiled = lowered.compile()
    need = compiled.memory_analysis().temp_size_in_bytes
    if need > budget:
        return Ready(None, need)
    arguments = jax.device_put(arguments)
    return Ready(lambda: jax.block_until_ready(compiled(*arguments)), need, lowered.as_text())


def jax_loss(loss, ids: str):
    def prepare(data: Data, budget: int) -> Ready:
        return _prepare(jax.value_and_grad(loss), data.z_NxD, getattr(data, ids), budget=budget)

    return prepare


def three_matmuls(data: Data, budget: int) -> Ready:
    """The matmuls of every dense form: the logits, and the gradient through both of their factors."""

    def function(z_NxD):
        s_NxN = z_NxD @ z_NxD.T
        return s_NxN @ z_NxD, s_NxN.T @ z_NxD

    return _prepare(function, data.z_NxD, budget=budget)


def rate_matmul() -> Callable[[], float]:
    """A function that multiplies two large matrices and returns FLOP/s."""
    x = jax.random.normal(jax.random.key(0), (RATE_SIZE, RATE_SIZE))
    compiled = jax.jit(jnp.matmul).lower(x, x).compile()

    def rate() -> float:
        return 2 * RATE_SIZE**3 / seconds_per_call(lambda: jax.block_until_ready(compiled(x, x)), 1)

    rate()
    return rate


def flops_of_three_matmuls(rows: int, dim: int) -> int:
    return 3 * 2 * rows**2 * dim


# ---- torch


def torch_loss(name: str, ids: str, count: Callable[[int], float]):
    """The loss `name` of pytorch-metric-learning, forward and backward; `count`: rows -> bytes that it needs."""

    def prepare(data: Data, budget: int) -> Ready:
        rows = len(data.z_NxD)
        need = int(count(rows))
        if need > budget:
            return Ready(None, need)
        import torch
        from pytorch_metric_learning import losses as pml

        z_NxD = torch.from_numpy(data.z_NxD).requires_grad_(True)
        labels_N = torch.from_numpy(np.repeat(getattr(data, ids), 2))
        loss = getattr(pml, name)(temperature=TEMPERATURE)

        def run():
            z_NxD.grad = None
            value = loss(z_NxD, labels_N)
            value.backward()
            return value.detach(), z_NxD.grad

        threads = _best_threads(run)

        def run_with_threads():
            torch.set_num_threads(threads)
            return run()

        return Ready(run_with_threads, need)

    return prepare


def _best_threads(run: Callable[[], Any]) -> int:
    """All cores, or one if that is faster: for small arrays, or on a busy machine, torch's threads block each other."""
    import torch

    best = {}
    for threads in (cores(), 1, cores(), 1):
        torch.set_num_threads(threads)
        best[threads] = min(best.get(threads, math.inf), seconds_per_call(run, 1))
        if best[threads] > 0.5:
            break
    return min(best, key=best.get)


# Bytes at the peak, counted by hand; a little more than measured.
def pml_supcon_bytes(rows: int) -> float:
    """About twelve matrices of all pairs, among them the negative pairs as two lists of 64-bit indices."""
    return 4 * 12 * rows**2


def pml_ntxent_bytes(rows: int) -> float:
    """Every positive pair with every negative pair of the batch, before those of other anchors are masked."""
    return 4 * 4.4 * rows * rows * (rows - 2)


CONTESTANTS = (
    Contestant("matmuls", "three matmuls", "floor", three_matmuls),
    Contestant("plain", "plain dense SupCon", "supcon", jax_loss(plain_supcon, "classes_B")),
    Contestant("supcon_dense", "jaxcl supcon, dense", "supcon", jax_loss(supcon("dense"), "classes_B")),
    Contestant("supcon_tiled", "jaxcl supcon, tiled", "supcon", jax_loss(supcon("tiled"), "classes_B")),
    Contestant("supcon_auto", "jaxcl supcon, auto", "supcon", jax_loss(supcon("auto"), "classes_B")),
    Contestant(
        "pml_supcon",
        "PML SupConLoss",
        "supcon",
        torch_loss("SupConLoss", "classes_B", pml_supcon_bytes),
        "pytorch-metric-learning",
        "pml",
    ),
    Contestant("nt_xent_tiled", "jaxcl nt_xent, tiled", "nt_xent", jax_loss(nt_xent("tiled"), "pairs_B")),
    Contestant("optax_ntxent", "optax ntxent", "nt_xent", jax_loss(optax_ntxent, "pairs_B"), "optax", "optax"),
    Contestant(
        "pml_ntxent",
        "PML NTXentLoss",
        "nt_xent",
        torch_loss("NTXentLoss", "pairs_B", pml_ntxent_bytes),
        "pytorch-metric-learning",
        "pml",
    ),
)


def numbers(result: tuple[Any, Any]) -> tuple[float, np.ndarray]:
    """(value, gradient [N, D]) as NumPy arrays, from either library."""
    value, gradient = result
    return float(value), np.array(gradient, np.float32)


def distance(result: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> float:
    """The larger relative difference: of the values, or of the gradients in the 2-norm."""
    values = abs(result[0] - other[0]) / abs(other[0])
    gradients = float(np.linalg.norm(result[1] - other[1]) / np.linalg.norm(other[1]))
    worst = max(values, gradients)
    return math.inf if math.isnan(worst) else worst


def release() -> None:
    """Frees the memory and the programs of the last size."""
    gc.collect()
    jax.clear_caches()
