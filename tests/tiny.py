"""The smallest things that can still go wrong: a two-stage network, sixteen small images, and configs around them.

Numbers come from NumPy and every model is filled rather than initialised: jax's generators compile slowly on a CPU.
"""

import os

import jax
import numpy as np
from etils.epath import backend

from jaxcl import config as base
from jaxcl.data import source_of
from jaxcl.method.build import build_recipe, data_facts
from jaxcl.method.init_state import init_state
from jaxcl.train import run_folder
from jaxcl.train.checkpoint import Checkpoints

SIDE, BATCH, CLASSES = 16, 16, 4
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)


def fill(shapes, seed=0):
    """Values for a tree of shapes: kernels by fan-in, scales and variances about 1, all else about 0."""
    rng = np.random.default_rng(seed)

    def value(path, x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        name = str(getattr(path[-1], "key", path[-1]))
        noise = rng.standard_normal(x.shape)
        if len(x.shape) > 1:
            out = noise * (2 / np.prod(x.shape[:-1])) ** 0.5
        elif name in ("scale", "var"):
            out = 1 + 0.2 * np.abs(noise)
        else:
            out = 0.1 * noise
        if any(getattr(key, "name", "") == "nu" for key in path):  # Adam's means of squares
            out = np.abs(out)
        return np.asarray(out, x.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def model_variables(model, side=SIDE, seed=0):
    """-> (params, batch statistics), as NumPy arrays."""
    return fill(jax.eval_shape(lambda: model.init(jax.random.key(0), (side, side, 3))), seed)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tiny_model(c):
    c.model.stem = "patch4"
    c.model.stage_sizes = (1, 1)
    c.model.stage_widths = (8, 16)
    c.model.head_features = 12
    return c


def config(*, background=True, stage=True, schedule="online", epochs=4, **saliency):
    """ExConB (or what is left of it) on the tiny network."""
    c = tiny_model(base.default())
    c.batch_size, c.duration, c.size = BATCH, f"{epochs} epochs", SIDE
    for name in ("view1", "view2"):
        c.views[name] = base.view("random", jitter_p=0.0, grayscale=0.0)  # colour compiles slowly, and elsewhere
    views = ["view1", "view2"]
    if stage:
        c.views.standard = base.view("standard")
        if background:
            saliency.setdefault("rejected", "background")
            views.append("background")
        c.stages = (base.stage("saliency", **saliency),)
    c.passes = (base.encode(*views),)
    c.terms.supcon = base.term("supcon", background="background" if "background" in views else "")
    c.memory.probe = base.memory("linear_probe", schedule=schedule, optimizer=dict(lr=0.1, weight_decay=0.0))
    if schedule != "online":
        c.views.classifier = base.view("classifier")
    return c


def recipe(c, **facts):
    facts = (
        dict(
            num_examples=64,
            image_shape=(SIDE, SIDE, 3),
            mean=MEAN,
            std=STD,
            num_classes=CLASSES,
            labelled=True,
        )
        | facts
    )
    return build_recipe(c, **facts)


def batch(n=BATCH, *, side=SIDE, seed=0):
    """Colourful blobs, one colour a class."""
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % CLASSES).astype(np.int32)
    colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])[label]
    image = rng.integers(0, 90, (n, side, side, 3))
    quarter = side // 4
    image[:, quarter:-quarter, quarter:-quarter] += (colour // 2)[:, None, None]
    index = rng.permutation(1000)[:n].astype(np.int32)
    return {"image": image.astype(np.uint8), "label": label, "index": index}


def colours(path, seed=0):
    """Writes 64 + 16 images of 16 pixels in four colours as a data source -> `path`."""
    train_part, test_part = batch(64, seed=2 * seed + 1), batch(16, seed=2 * seed + 2)
    np.savez(
        path,
        train_images=train_part["image"],
        train_labels=train_part["label"],
        test_images=test_part["image"],
        test_labels=test_part["label"],
    )
    return path


def saved_run(folder, c, seed=0, **facts):
    """A run folder with a checkpoint, at step 3, of a network that was never trained -> its state."""
    known = data_facts(source_of(c, "train"))
    run_folder.claim(folder, base.to_dict(c), known | facts, True).close()
    recipe = build_recipe(c, **{k: facts.get(k, v) for k, v in known.items()})
    state = fill(jax.eval_shape(lambda: init_state(recipe)), seed)
    state = state.replace(step=np.asarray(3, state.step.dtype))
    state = state.replace(key=jax.random.key(seed, impl="threefry2x32"))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, jax.device_put(state))
    return state


class _Bucket:
    """A bucket's file system in a local folder."""

    def __init__(self, root):
        self.root = str(root)

    def _local(self, path):
        return str(path).replace("gs://bucket", self.root)

    def open(self, path, mode):
        os.makedirs(os.path.dirname(self._local(path)), exist_ok=True)
        return open(self._local(path), mode)

    def exists(self, path):
        return os.path.exists(self._local(path))

    def makedirs(self, path, exist_ok=False):
        pass  # buckets have no folders


def bucket(folder, monkeypatch):
    """From now on gs://bucket lies in a local folder."""
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: _Bucket(folder))
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
