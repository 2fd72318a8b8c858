"""Flags for the compiler: the platform's own, never over the user's, and none that this jaxlib does not know."""

import os
import subprocess
import sys

import pytest

from jaxcl.runtime import xla_flags


@pytest.mark.parametrize(
    "environ, want",
    [
        ({"JAX_PLATFORMS": "cpu"}, "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "gpu"),
        ({"JAX_PLATFORMS": "tpu"}, "tpu"),
        ({"JAX_PLATFORM_NAME": "gpu"}, "gpu"),
    ],
)
def test_the_platform_is_what_jax_is_told(environ, want):
    assert xla_flags.platform(environ) == want


def test_the_users_flags_stand():
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=here"
    environ = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": mine}
    assert xla_flags.set_flags(environ) == {"XLA_FLAGS": []} and environ["XLA_FLAGS"] == mine
    mine = "--xla_tpu_enable_async_collective_fusion=false"
    environ = {"JAX_PLATFORMS": "tpu", "LIBTPU_INIT_ARGS": mine}
    xla_flags._add(environ, "LIBTPU_INIT_ARGS", xla_flags.TPU)
    flags = environ["LIBTPU_INIT_ARGS"].split()
    assert flags[-1] == mine and "--xla_tpu_enable_async_collective_fusion=true" not in flags
    assert len(flags) == len(xla_flags.TPU) > 1
    assert xla_flags._add(environ, "LIBTPU_INIT_ARGS", xla_flags.TPU) == []  # a second time adds nothing


def test_nothing_is_set_where_nothing_is_known(monkeypatch):
    for environ in ({"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "cuda", "JAXCL_XLA_FLAGS": "off"}):
        assert xla_flags.set_flags(dict(environ)) == {}
    versions = {"jaxlib": "0.13.0", "libtpu": "0.0.53"}
    monkeypatch.setattr(xla_flags.importlib.metadata, "version", versions.__getitem__)
    for name in ("cuda", "tpu"):
        assert xla_flags.set_flags({"JAX_PLATFORMS": name}) == {}
    versions.update(jaxlib="0.12.1", libtpu="0.0.42.1")
    for name, variable in (("cuda", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")):
        environ = {"JAX_PLATFORMS": name}
        assert list(xla_flags.set_flags(environ)) == [variable] and environ[variable].startswith("--xla_")


def test_this_jaxlib_knows_the_flags_of_gpus():
    """One that it did not know would end the process; jaxlib reads those of all its platforms everywhere."""
    flags = " ".join(f"--{k}={v}" for k, v in xla_flags.GPU.items())
    program = "import jax; jax.devices(); print('started')"
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    good = subprocess.run(
        [sys.executable, "-c", program], env=environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300
    )
    assert good.stdout.strip() == "started", good.stderr
