"""Small runs of the project's own configs, and what they leave behind, for tests of the loop."""

import functools
import importlib.util

import jax
import numpy as np
import tiny
from processes import ROOT

from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.report import read_metrics
from jaxcl.train import log
from jaxcl.train.checkpoint import Checkpoints

STEPS = 12


def shrink(c, npz=None):
    """A real config on the tiny network and a handful of images."""
    tiny.tiny_model(c)
    c.model.depth, c.model.strides = 18, (1, 2)
    c.batch_size, c.duration, c.devices = 16, f"{STEPS} steps", 2
    c.data.limit = 64
    if npz:
        with c.ignore_type():
            c.data.source = f"npz:{npz}"
    c.optimizer.kind, c.optimizer.lr = "sgd", 0.05
    c.log_every, c.eval.every, c.checkpoint.every = "1 step", "6 steps", "4 steps"
    c.eval.quick, c.eval.final, c.eval.batch_size, c.eval.knn_k = ("classifier",), ("classifier",), 64, 5
    c.report = False
    return c


@functools.cache
def config_module(name):
    spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(name="excon", preset="", npz=None):
    c = shrink(config_module(name).get_config(preset), npz)
    for view in ("view1", "view2") if npz else ():
        c.views[view].jitter_p = c.views[view].grayscale = 0.0  # colour compiles slowly
    if c.stages:
        c.stages[0].start, c.stages[0].tap = "50%", "stage1"
    return c


def final_state(workdir, c):
    """What the run left in its newest checkpoint."""
    recipe = tiny.recipe(c, num_classes=tiny.CLASSES)
    where = sharding.replicated(sharding.make_mesh(1))
    shapes = jax.eval_shape(lambda: init_state(recipe))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(abstract)
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


def record(workdir):
    """{step: what was measured and does not depend on the clock}."""
    clock = {"time", "images_per_second", "data_wait", "step"}
    rows = read_metrics(workdir)
    out = {}
    for row in rows:
        out.setdefault(row["step"], []).append({k: v for k, v in row.items() if k not in clock})
    return out


def writer_that(action, at):
    """A MetricsWriter that calls `action` after the line of step `at`."""

    class Writer(log.MetricsWriter):
        def write(self, step, metrics, **extra):
            super().write(step, metrics, **extra)
            if step == at:
                action()

    return Writer
