"""`import jaxcl.losses` needs jax, numpy and `jaxcl.errors` only."""

import json
import subprocess
import sys

LIBRARY = ("jaxcl", "jaxcl.errors", "jaxcl.losses")
# Installed with jaxcl, but no loss needs them.
OTHERS = ("absl", "chex", "flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "PIL", "tqdm")


def modules_after(code):
    code += "; import json, sys; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout))


def test_the_losses_import_jax_and_numpy_only():
    with_losses = modules_after("import jaxcl.losses")
    ours = {m for m in with_losses if m.split(".")[0] == "jaxcl"}
    assert {m for m in ours if m not in LIBRARY and not m.startswith("jaxcl.losses.")} == set()
    assert with_losses.isdisjoint(OTHERS)
    # Everything else comes with jax.
    more = {m.split(".")[0] for m in with_losses - modules_after("import jax, jax.numpy")}
    assert more - set(sys.stdlib_module_names) <= {"jax", "jaxlib", "jaxcl", "numpy"}
