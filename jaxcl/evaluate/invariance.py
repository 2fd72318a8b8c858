"""Invariance of the features of each stage to image transformations.

N images, K stages, A transformations, D features of a stage.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import augment
from jaxcl.augment import ops, to_float
from jaxcl.evaluate.base import Evaluator, Metrics, NotApplicable, Panels
from jaxcl.evaluate.context import EvalContext
from jaxcl.method.state import TrainState
from jaxcl.method.views import view_keys

Array = jax.Array
IMAGES = 2000  # test images, at most
OTHER = "another image"  # not a transformation: the cosine of two different images, for comparison
JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)  # as in most recipes


def transformations(size: int, colour: bool) -> dict[str, augment.Pipeline]:
    """Name -> pipeline of one transformation, applied to every image, as strong as in most recipes."""
    made = {"crop": augment.RandomResizedCrop(size=size)}
    if colour:
        made |= {"jitter": augment.ColorJitter(**JITTER, p=1.0), "grayscale": augment.RandomGrayscale(p=1.0)}
    made |= {"blur": augment.GaussianBlur(p=1.0), "flip": augment.RandomFlip(p=1.0)}
    return {name: augment.Pipeline((augment.Resize(size=size), op)) for name, op in made.items()}


def cosines(features_NxD: np.ndarray, copies_NxD: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """Cosine [N] of each row with its copy, after the centre is subtracted from both; 0 for a row equal to it."""
    a, b = features_NxD - centre_D, copies_NxD - centre_D
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.where(lengths > 0, lengths, 1)


class Invariance(Evaluator):
    """Mean cosine between the pooled features of an image and of its transformed copy.

    Rotation is by a quarter turn; the other transformations are drawn as in training.

    Metrics: {"centred" or "cosine": {stage: {transformation: mean cosine}}}. "cosine" is of the features themselves;
    these are not negative, so any two images have a large cosine. For "centred" the mean over the images is subtracted
    first; 0 then means no more alike than two different images.
    """

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        model, size, seed = context.recipe.model, context.recipe.eval_size, context.recipe.seed
        if not model.num_stages:
            raise NotApplicable("the network has no stages")
        if len(context.test) < 2:
            raise NotApplicable("there are no two test images")
        pipelines = transformations(size, context.recipe.image_shape[2] == 3)

        def copies(pixels: Array, index: Array) -> dict[str, Array]:
            image = ops.resize(pixels, size)
            made = {"": image, "rotation": ops.quarter_turns(image, jnp.ones(len(image), jnp.int32))}
            keys = jax.random.key(seed, impl="threefry2x32")
            for name, pipeline in pipelines.items():
                made[name] = pipeline(view_keys(keys, jnp.zeros((), jnp.int32), index, f"invariance/{name}"), pixels)[0]
            return made

        def pooled(state: TrainState, batch: dict[str, Array]) -> dict[str, list[Array]]:
            # A loop over the copies, so that the network is compiled once.
            made = copies(to_float(batch["image"]), batch["index"])
            images = jax.lax.map(
                lambda x: [m.mean((1, 2)) for m in model.maps(state.params, state.batch_stats, context.normalize(x))],
                jnp.stack(list(made.values())),
            )
            return {name: [m[i] for m in images] for i, name in enumerate(made)}

        out = context.first(context.test, IMAGES, "invariance", pooled)
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
        metrics = {
            kind: {s: dict(zip(out, map(float, row), strict=True)) for s, row in zip(stages, table, strict=True)}
            for kind, table in tables.items()
        }
        return metrics, {"invariance": tables | {"stages": stages, "transformations": list(out)}}
