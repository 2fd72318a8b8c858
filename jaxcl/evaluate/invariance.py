"""What each stage of the network is invariant to, and what it has kept of colour.

N images, K stages, A transformations, D features (of a stage).
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import augment
from jaxcl.augment import ops
from jaxcl.augment.color import PROPERTIES
from jaxcl.evaluate.base import Metrics, NotApplicable, accuracy
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits
from jaxcl.method.state import TrainState
from jaxcl.method.update import represent, to_pixels
from jaxcl.method.views import view_keys

if TYPE_CHECKING:
    from jaxcl.evaluate.suite import EvalContext

Array = jax.Array
IMAGES = 2000  # of the test split, at most
OTHER = "another image"  # the copy is no copy: what a cosine means that says nothing
BINS = 10  # of a jitter factor's range
JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)  # of training, as most recipes have it
RIDGE = 1e-3


def transformations(size: int, colour: bool) -> dict[str, augment.Pipeline]:
    """Name -> what is done to an image, each alone and to every image, as strong as in most recipes."""
    made = {"crop": augment.RandomResizedCrop(size=size)}
    if colour:
        made |= {"jitter": augment.ColorJitter(**JITTER, p=1.0), "grayscale": augment.RandomGrayscale(p=1.0)}
    made |= {"blur": augment.GaussianBlur(p=1.0), "flip": augment.RandomFlip(p=1.0)}
    return {name: augment.Pipeline((augment.Resize(size=size), op)) for name, op in made.items()}


def cosines(features_NxD: np.ndarray, copies_NxD: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """Cosine of each row with its copy, [N], after the centre is taken from both; 0 for a row that equals it."""
    a, b = features_NxD - centre_D, copies_NxD - centre_D
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.where(lengths > 0, lengths, 1)


def invariance(f: "EvalContext") -> tuple[Metrics, dict]:
    """Mean cosine between the pooled features of an image and of its transformed copy, per transformation and stage.

    "cosine" is of the features as they are. They are not negative, so that any two images are much alike: "centred" is
    of what is left once the mean over the images is taken from both, and 0 says no more alike than two images are.
    Rotation is by a quarter turn, the other transformations are drawn as in training.
    """
    model, size = f.recipe.model, f.recipe.image_shape[0]
    if not model.num_stages:
        raise NotApplicable("the network has no stages")
    pipelines = transformations(size, f.recipe.image_shape[2] == 3)

    def copies(pixels: Array, index: Array) -> dict[str, Array]:
        image = ops.resize(pixels, size)
        made = {"": image, "rotation": ops.quarter_turns(image, jnp.ones(len(image), jnp.int32))}
        keys = jax.random.key(f.recipe.seed, impl="threefry2x32")
        for name, pipeline in pipelines.items():
            made[name] = pipeline(view_keys(keys, jnp.zeros((), jnp.int32), index, f"invariance/{name}"), pixels)[0]
        return made

    def pooled(state: TrainState, batch: dict[str, Array]) -> dict[str, list[Array]]:
        # One copy after the other: a loop, so that the network is compiled once.
        made = copies(to_pixels(batch["image"]), batch["index"])
        images = jax.lax.map(
            lambda x: [m.mean((1, 2)) for m in model.maps(state.params, state.batch_stats, f.normalize(x))],
            jnp.stack(list(made.values())),
        )
        return {name: [m[i] for m in images] for i, name in enumerate(made)}

    if len(f.test) < 2:
        raise NotApplicable("there are no two test images")
    out = some(f, f.test, "invariance", pooled, IMAGES)
    plain = out.pop("")
    out = {name: out[name] for name in (*pipelines, "rotation")} | {OTHER: [np.roll(x, 1, axis=0) for x in plain]}
    tables = {
        kind: np.array(
            [
                [cosines(x, copy[k], x.mean(0) if kind == "centred" else 0 * x[0]).mean() for copy in out.values()]
                for k, x in enumerate(plain)
            ]
        )
        for kind in ("centred", "cosine")
    }
    stages = [f"stage{k + 1}" for k in range(len(plain))]
    figures = {
        kind: {s: dict(zip(out, map(float, row), strict=True)) for s, row in zip(stages, table, strict=True)}
        for kind, table in tables.items()
    }
    return figures, {"invariance": tables | {"stages": stages, "transformations": list(out)}}


def some(f: "EvalContext", source: Any, name: str, fn: Any, count: int) -> Any:
    """fn(state, batch) on the first images of a source, at most `count` -> its results, one after the other."""
    parts, have = [], 0
    for out, where in f.run(source, name, fn):
        parts.append(jax.tree.map(lambda x, w=where: x[w], out))
        have += int(where.sum())
        if have >= count:
            break
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)


def color(f: "EvalContext") -> tuple[Metrics, dict]:
    """How much of an image's colour the frozen features have kept: jitter told from them, and the object's tint.

    Two copies of each image are jittered, and a linear classifier sees the features of both, side by side. It tells how
    far apart their factors are, in tenths of the factor's range: "brightness" ... "hue", and "accuracy", their mean,
    against "majority", that of always naming the commonest distance (papers/hierarchical_augmentation.md 8.3; which
    distance the authors mean is not known). "r2" is ours: the share of variance of the signed difference that a linear
    regression explains, the mean of the four. "tint", where the data knows it: a linear probe for the tint.
    """
    if f.recipe.image_shape[2] != 3:
        raise NotApplicable("the images have no colour")
    size = f.recipe.image_shape[0]
    pipeline = augment.Pipeline((augment.Resize(size=size), augment.ColorJitter(**JITTER, p=1.0)))

    def two(state: TrainState, batch: dict[str, Array]) -> dict[str, list[Array]]:
        key, out = jax.random.key(f.recipe.seed, impl="threefry2x32"), {"h": [], "jitter": []}
        for name in ("color1", "color2"):
            keys = view_keys(key, jnp.zeros((), jnp.int32), batch["index"], name)
            image, drawn = pipeline(keys, to_pixels(batch["image"]))
            out["h"].append(represent(f.recipe, state.params, state.batch_stats, f.normalize(image))[0])
            out["jitter"].append(drawn["jitter"])
        return out

    sides = {}
    for split, most in (("train", 5 * IMAGES), ("test", IMAGES)):
        if not len(f.source(split)):
            raise NotApplicable(f"there are no {'training' if split == 'train' else 'test'} images")
        out = some(f, f.source(split), "color", two, most)
        sides[split] = (np.concatenate(out["h"], axis=1), np.stack(out["jitter"]))
    (train_x, train_a), (test_x, test_a) = sides["train"], sides["test"]
    labels, test_labels = _distances(train_a), _distances(test_a)
    figures: Metrics = {}
    majority = []
    for i, part in enumerate(PROPERTIES):
        probe = fit_linear_probe(train_x, labels[:, i], num_classes=BINS, max_steps=100)
        predicted = np.asarray(probe_logits(probe, test_x)).argmax(-1)
        figures[part] = accuracy(predicted, test_labels[:, i])
        majority.append(float((test_labels[:, i] == np.bincount(labels[:, i]).argmax()).mean()))
    figures = {"accuracy": float(np.mean(list(figures.values()))), "majority": float(np.mean(majority))} | figures
    figures["r2"] = float(np.mean(_explained(train_x, train_a[0] - train_a[1], test_x, test_a[0] - test_a[1])))
    if (kept := _tint(f)) is not None:
        figures["tint"] = kept
    return figures, {}


def tint(f: "EvalContext") -> tuple[Metrics, dict]:
    """The tint of `color` by itself: a linear probe on the frozen features for the object's tint."""
    if (kept := _tint(f)) is None:
        raise NotApplicable("the data does not know the tints of its objects (garments does)")
    return {"accuracy": kept}, {}


def _tint(f: "EvalContext") -> float | None:
    tints = [f.source(split).extras.get("tint") for split in ("train", "test")]
    if any(t is None for t in tints):
        return None
    probe = fit_linear_probe(f.features("train"), tints[0], num_classes=int(max(t.max() for t in tints)) + 1)
    return accuracy(np.asarray(probe_logits(probe, f.features("test"))).argmax(-1), tints[1])


def _distances(jitter_2xNx4: np.ndarray) -> np.ndarray:
    """How many bins apart the factors of two copies are, int [N,4] in 0..BINS - 1."""
    strength = np.array([JITTER[part] for part in PROPERTIES])
    low = np.array([1, 1, 1, 0]) - strength
    bins = np.clip(((jitter_2xNx4 - low) / (2 * strength) * BINS).astype(np.int64), 0, BINS - 1)
    return np.abs(bins[0] - bins[1])


def _explained(x_NxD: np.ndarray, y_Nx4: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> np.ndarray:
    """Share of the variance [4] of each test target that ridge regression on standardised features explains."""
    mean, std = x_NxD.mean(0), np.maximum(x_NxD.std(0), 1e-6)
    x, test_x = ((v - mean).astype(np.float64) / std for v in (x_NxD, test_x))
    offset = y_Nx4.mean(0)
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (y_Nx4 - offset))
    rest = test_y - offset - test_x @ weights
    varies = test_y.var(0) > 1e-12
    return np.where(varies, 1 - (rest**2).mean(0) / np.where(varies, test_y.var(0), 1), 0.0)
