"""XLA flags that make collectives overlap with computation, for all platforms. They must be set before JAX starts.

An unknown flag ends the process, so the flags are set only for versions that were seen to accept them (KNOWN_JAXLIB for
GPUs, KNOWN_LIBTPU for TPUs). Their effect was not measured on either kind of hardware. Flags that the user has set in
XLA_FLAGS or LIBTPU_INIT_ARGS are never changed, and JAXCL_XLA_FLAGS=off sets nothing.

Both compilers already make collectives asynchronous by default; this module adds what they do not do by default. It
does not import JAX, because it has to run first.
"""

import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping

# Read by XLA in jaxlib on every platform; GPU flags have no effect elsewhere.
GPU = {
    # Schedules the program so that it waits for the result of a collective as late as possible. Off by default on GPUs.
    # docs.jax.dev, "GPU performance tips"; NVIDIA's own JAX images set it.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}
# Read by libtpu only. Its latency-hiding scheduler is on by default; these flags allow it to overlap more.
TPU = {
    # All-reduces of gradients, of many sizes, overlap with the rest of the backward pass.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    # All-gathers (parameters of fsdp) run inside the computations around them. MaxText's recipes set these flags.
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
KNOWN_JAXLIB, KNOWN_LIBTPU = ((0, 10), (0, 12)), ((0, 0, 42), (0, 0, 52))  # first and last version


def set_flags(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[str]]:
    """Add the flags of this machine's platform to the environment, before JAX starts; -> {variable: flags added}."""
    if environ.get("JAXCL_XLA_FLAGS", "").lower() == "off":
        return {}
    name = platform(environ)
    if name == "gpu" and _within("jaxlib", KNOWN_JAXLIB):
        return {"XLA_FLAGS": _add(environ, "XLA_FLAGS", GPU)}
    if name == "tpu" and _within("libtpu", KNOWN_LIBTPU):
        return {"LIBTPU_INIT_ARGS": _add(environ, "LIBTPU_INIT_ARGS", TPU)}
    return {}


def platform(environ: MutableMapping[str, str] = os.environ) -> str:
    """cpu, gpu or tpu: the platform that JAX will probably use. JAX_PLATFORMS decides if it is set."""
    asked = (environ.get("JAX_PLATFORMS") or environ.get("JAX_PLATFORM_NAME") or "").lower().split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    if _installed("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return "tpu"
    if any(_installed(f"jax_cuda{n}_plugin") for n in (12, 13)) and glob.glob("/dev/nvidia[0-9]*"):
        return "gpu"
    return "cpu"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _within(package: str, known: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    first, last = known
    number = tuple(int(n) for n in version.split(".")[: len(first)] if n.isdigit())
    return len(number) == len(first) and first <= number <= last


def _add(environ: MutableMapping[str, str], variable: str, flags: dict[str, str]) -> list[str]:
    present = environ.get(variable, "").split()
    named = {flag.lstrip("-").partition("=")[0] for flag in present}
    # A flag of the user may also have "no" in front of its name.
    new = [f"--{k}={v}" for k, v in flags.items() if k not in named and f"no{k}" not in named]
    environ[variable] = " ".join([*new, *present])
    return new
