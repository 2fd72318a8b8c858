"""Eight fake CPU devices, a compilation cache, and the golden vectors of the authors' code."""

import os
import pathlib

# Before jax is imported anywhere: the suite runs on CPU with eight devices, whatever the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation, and its arrays are small: a third of the time without LLVM's optimisations.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def golden():
    """`golden(paper, name)` -> dict of arrays; skips where the vectors are not at hand (a user's clone)."""

    def load(paper: str, name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / paper / f"{name}.npz"
        if not path.exists():
            if os.environ.get("JAXCL_REQUIRE_GOLDEN"):
                pytest.fail(f"golden vectors required but absent: {path}")
            pytest.skip(f"golden vectors not found at {path.parent}; tests/data_sample holds a small sample")
        with np.load(path, allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}

    return load
