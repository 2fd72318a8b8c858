"""Small updates, compiled for the meshes of a test; no program is compiled twice."""

import functools

import jax
import jax.numpy as jnp
import tiny

from jaxcl import config as base
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state, state_shardings
from jaxcl.method.recipe import Phase
from jaxcl.method.update import compile_update

MESHES = {"1": (1, 1), "2": (2, 1), "8": (8, 1), "2 x 4": (8, 2)}
FIRST = Phase("encoder")


def config(method="supcon", **changes):
    c = tiny.config(stage=False)
    if method == "vision_transformer":
        sizes = dict(patch=4, width=16, depth=2, heads=2, layer_scale=0.5, registers=1, drop_path=0.3)
        c.model = base.model("vision_transformer", head_features=12, **sizes)
    if method in ("byol", "moco"):
        del c.terms.supcon, c.memory.probe
        c.memory.target = base.memory("ema", decay=0.9, order="after" if method == "byol" else "before")
        c.passes = (base.encode("view1", "view2"), base.encode("view1", "view2", encoder="target"))
    if method == "byol":
        c.heads.predictor = base.head("mlp", features=12, hidden=16, norm="none")
        c.terms.byol = base.term("byol")
    if method == "moco":
        c.memory.queue = base.memory("queue", length=32)
        c.terms.moco = base.term("moco")
    c.optimizer = base.options(base.OptimizerOptions, kind="lars", lr=0.1, schedule="constant")
    with c.unlocked():
        c.update(changes)
    return c


@functools.cache
def program(method="supcon", kind="data", mesh="8", per_device=0):
    """-> (recipe, mesh, how the state lies, compiled update)."""
    devices, hosts = MESHES[mesh]
    batch = per_device * devices or tiny.BATCH
    recipe = tiny.recipe(config(method, sharding=kind, batch_size=batch), num_devices=devices, num_examples=1024)
    over = sharding.make_mesh(devices, hosts)
    placed, rows = state_shardings(recipe, over), sharding.batch_sharding(over)
    state = jax.eval_shape(lambda: init_state(recipe))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch(batch)))
    return recipe, over, placed, compile_update(recipe, FIRST, placed, rows).lower(state, shapes).compile()
