"""Evaluators by name on a frozen encoder, and the pictures they leave for the report.

The encoder runs in inference mode (running batch statistics), on views without augmentation. N images, S side,
D features, K classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl import saliency, sharding
from jaxcl.augment import standard_view
from jaxcl.data import Source, batches
from jaxcl.errors import UserError
from jaxcl.evaluate.calibration import expected_calibration_error, reliability
from jaxcl.evaluate.explanation import drop_increase, mask_agreement
from jaxcl.evaluate.knn import knn_predict
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits
from jaxcl.evaluate.robustness import fgsm_examples
from jaxcl.memory import LinearProbe
from jaxcl.models import tap_stage
from jaxcl.recipe import Phase, Recipe
from jaxcl.train_state import TrainState
from jaxcl.update import make_views, run_stages, to_pixels

Array = jax.Array
Figures = dict[str, Any]
SHOWN = 10  # columns of the picture grids
PICTURED = 200  # test images from which the shown explanations are taken


class Evaluation:
    """Runs the suites a config names; compiles once, however often it is called."""

    def __init__(self, config: ConfigDict, recipe: Recipe, *, train: Source, make_source: Callable[[str], Source]):
        self.options, self.recipe, self._pictures = config.eval, recipe, config.report
        for name in (*config.eval.quick, *config.eval.final):
            if name not in EVALUATORS:
                raise UserError(f"eval names {name!r}; expected one of {', '.join(EVALUATORS)}")
        tap_stage(config.eval.tap, recipe.model.encoder.stage_sizes)
        self.view = standard_view(recipe.image_shape[0], recipe.mean, recipe.std)
        self.classifier = next((n for n, part in recipe.memory.items() if isinstance(part, LinearProbe)), None)
        self._train, self._make_source = train, make_source
        self._selects_on = "validation" if config.data.validation else "test"
        self._sources: dict[str, Source | None] = {"train": train}
        self._compiled: dict[Any, Callable] = {}

    def quick(self, state: TrainState, mesh: jax.sharding.Mesh, split: str | None = None) -> Figures:
        """{"eval/knn_accuracy": ...} on the validation split, or the test split where nothing is held out."""
        frozen = Frozen(self, state, mesh, split or self._selects_on)
        out = {}
        for name in self.options.quick:
            figures, _ = EVALUATORS[name](frozen)
            out |= {f"eval/{name}_{k}": v for k, v in figures.items() if isinstance(v, float)}
        return out

    def final(self, state: TrainState, mesh: jax.sharding.Mesh) -> tuple[dict[str, Figures], dict[str, Any]]:
        """-> (results by evaluator, on the test split; panels for the report)."""
        frozen = Frozen(self, state, mesh, "test")
        results, panels = {}, {}
        for name in self.options.final:
            figures, pictures = EVALUATORS[name](frozen)
            if figures:
                results[name] = figures
            panels |= pictures
        if not self._pictures:
            return results, {}
        panels["views"] = frozen.training_views(self._train)
        if len(frozen.test):
            n = min(len(frozen.test), 1500)
            panels["embedding"] = {
                "features": frozen.features("test")[:n],
                "labels": frozen.test.labels[:n],
                "class_names": frozen.test.class_names,
            }
        return results, panels

    def source(self, split: str) -> Source | None:
        """A split of the data, read once; None where the source has no such split."""
        if split not in self._sources:
            try:
                self._sources[split] = self._make_source(split)
            except UserError:
                if split in ("test", "validation"):
                    raise
                self._sources[split] = None
        return self._sources[split]

    def compiled(self, name: str, make: Callable[[], Callable]) -> Callable:
        if name not in self._compiled:
            self._compiled[name] = make()
        return self._compiled[name]


class Frozen:
    """One state to be evaluated: features and logits of whole sources, batch by batch, over the mesh."""

    def __init__(self, evaluation: Evaluation, state: TrainState, mesh: jax.sharding.Mesh, split: str):
        self.evaluation, self.recipe, self.options = evaluation, evaluation.recipe, evaluation.options
        self.state, self.mesh = state, mesh
        self.test = evaluation.source(split)
        self._split = split
        # Constant shapes that divide over the mesh, whatever the user's number.
        self.batch_size = -(-self.options.batch_size // mesh.size) * mesh.size
        self._features: dict[str, np.ndarray] = {}

    def source(self, split: str) -> Source | None:
        return self.test if split == "test" else self.evaluation.source(split)

    def logits_fn(self, state: TrainState) -> Callable[[Array], Array]:
        """Normalised images -> logits of the online classifier."""
        name = self.evaluation.classifier

        def logits(image: Array) -> Array:
            h, _ = self.recipe.model.encode(state.params, state.batch_stats, image, train=False)
            return self.recipe.memory[name].logits(state.memory[name], h)

        return logits

    def normalize(self, pixels: Array) -> Array:
        # The standard view draws nothing; its keys only carry the batch size.
        return self.evaluation.view(jax.random.split(jax.random.key(0), pixels.shape[0]), pixels)[0]

    def run(self, source: Source, name: str, fn: Callable, **extra: Any) -> Iterator[tuple[Any, np.ndarray]]:
        """fn(state, batch) on every batch -> (host result, rows that are real); `extra` joins the batch as rows."""
        replicated, rows = sharding.replicated(self.mesh), sharding.rows(self.mesh)
        jitted = self.evaluation.compiled(
            name, lambda: jax.jit(fn, in_shardings=(replicated, rows), out_shardings=replicated)
        )
        for batch in batches(source, self.batch_size):
            batch |= {k: np.full(self.batch_size, v) for k, v in extra.items()}
            yield jax.device_get(jitted(self.state, sharding.put(batch, rows))), batch["where"]

    def collect(self, source: Source, name: str, fn: Callable, **extra: Any) -> Any:
        """`run`, padding cut off, concatenated over the batches."""
        parts = [jax.tree.map(lambda x, w=where: x[w], out) for out, where in self.run(source, name, fn, **extra)]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def features(self, split: str) -> np.ndarray:
        """float32 [N,D]."""
        if split not in self._features:

            def encode(state: TrainState, batch: dict[str, Array]) -> Array:
                image = self.normalize(to_pixels(batch["image"]))
                return self.recipe.model.encode(state.params, state.batch_stats, image, train=False)[0]

            self._features[split] = self.collect(self.source(split), "features", encode)
        return self._features[split]

    def probabilities(self, split: str) -> np.ndarray:
        """float32 [N,K] of the online classifier."""
        name = self.evaluation.classifier
        logits = self.recipe.memory[name].logits(jax.device_get(self.state.memory[name]), self.features(split))
        return np.asarray(jax.nn.softmax(logits))

    def training_views(self, source: Source) -> dict[str, Any]:
        """What the encoder sees of the first training images at the end of the run, stages included."""
        recipe, last = self.recipe, Phase("encoder", tuple(range(len(self.recipe.stages))))
        names = recipe.view_names(last)

        def show(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
            views, _, _ = run_stages(recipe, last, state, batch, make_views(recipe, state, batch, names))
            shown = {
                n: jnp.clip(v.image * jnp.asarray(recipe.std) + jnp.asarray(recipe.mean), 0, 1)
                for n, v in views.items()
            }
            return shown | {f"{n}.where": v.where for n, v in views.items() if v.where is not None}

        count = min(len(source), recipe.batch_size) // self.mesh.size * self.mesh.size
        batch = sharding.put(source.batch(np.arange(count)), sharding.rows(self.mesh))
        jitted = self.evaluation.compiled("views", lambda: jax.jit(show, out_shardings=sharding.replicated(self.mesh)))
        out = jax.device_get(jitted(self.state, batch))
        images = {"image": source.images[:SHOWN] / np.float32(255)} if source.in_memory else {}
        made = (n for n in out if n not in recipe.views and not n.endswith(".where"))
        for name in (*names, *made):
            where = out.get(f"{name}.where")
            if where is not None and len(out[name]) == count:
                # A padded row does not exist: show it as empty, not as an image the encoder saw.
                out[name] = np.where(where[:, None, None, None], out[name], 1.0)
            images[name] = out[name][:SHOWN]
        labels = [source.class_names[i] if i >= 0 else "" for i in source.batch(np.arange(min(SHOWN, count)))["label"]]
        return {"images": {k: v[: len(labels)] for k, v in images.items()}, "labels": labels}


# ---- evaluators: Frozen -> (figures, panels)


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    known = labels >= 0
    return float((predicted[known] == labels[known]).mean()) if known.any() else float("nan")


def knn(f: Frozen) -> tuple[Figures, dict]:
    """Weighted nearest neighbours in the training features."""
    probabilities = knn_predict(
        f.features("train"),
        f.source("train").labels,
        f.features("test"),
        k=f.options.knn_k,
        temperature=f.options.knn_temperature,
        num_classes=f.recipe.num_classes,
    )
    accuracy = _accuracy(np.asarray(probabilities).argmax(-1), f.test.labels)
    return {"accuracy": accuracy, "k": f.options.knn_k}, {}


def linear(f: Frozen) -> tuple[Figures, dict]:
    """Multinomial logistic regression on frozen features, fitted to its optimum."""
    probe = fit_linear_probe(f.features("train"), f.source("train").labels, num_classes=f.recipe.num_classes)
    logits = np.asarray(probe_logits(probe, f.features("test")))
    return {"accuracy": _accuracy(logits.argmax(-1), f.test.labels)}, {}


def raw_pixels(f: Frozen) -> tuple[Figures, dict]:
    """The same regression on the pixels themselves, with a penalty that suits them: what an encoder has to beat."""
    train = f.source("train")
    if not train.in_memory:
        return {}, {}
    flat = [np.asarray(s.images, np.float32).reshape(len(s), -1) / 255 for s in (train, f.test)]
    probe = fit_linear_probe(flat[0], train.labels, num_classes=f.recipe.num_classes, l2=1.0, max_steps=60)
    return {"accuracy": _accuracy(np.asarray(probe_logits(probe, flat[1])).argmax(-1), f.test.labels)}, {}


def classifier(f: Frozen) -> tuple[Figures, dict]:
    """The classifier trained along with the encoder."""
    if f.evaluation.classifier is None:
        return {}, {}
    predicted, labels = f.probabilities("test").argmax(-1), f.test.labels
    known = labels >= 0
    matrix = np.zeros((f.recipe.num_classes,) * 2, np.int64)
    np.add.at(matrix, (labels[known], predicted[known]), 1)
    panel = {"confusion": {"matrix": matrix, "class_names": f.test.class_names}}
    return {"accuracy": _accuracy(predicted, labels)}, panel


def explanation(f: Frozen) -> tuple[Figures, dict]:
    """Drop and increase in confidence for the predicted class (papers/excon.md d.2), and the true masks where known."""
    if f.evaluation.classifier is None:
        return {}, {}
    S = f.recipe.image_shape[0]

    def explain(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        image, logits_fn = f.normalize(to_pixels(batch["image"])), f.logits_fn(state)
        probabilities = jax.nn.softmax(logits_fn(image))
        predicted = probabilities.argmax(-1)
        maps = _maps(f, state, image, predicted)
        kept = saliency.apply_mask(image, saliency.top_fraction_mask(maps, f.options.explanation_fraction))
        masked = jax.nn.softmax(logits_fn(kept))
        take = lambda p: jnp.take_along_axis(p, predicted[:, None], 1)[:, 0]  # noqa: E731
        return {"before": take(probabilities), "after": take(masked), "maps": maps}

    out = f.collect(f.test, "explanation", explain)
    figures = {k: float(v) for k, v in drop_increase(out["before"], out["after"]).items()}
    truth = f.test.extras.get("mask")
    if truth is not None and truth.shape[1:] == (S, S):
        keep = np.asarray(saliency.keep_mask(out["maps"], 0.5))
        figures |= {k: float(v) for k, v in mask_agreement(keep, out["maps"], truth).items()}
    return figures, {"saliency": _explained(f, truth)}


def _maps(f: Frozen, state: TrainState, image: Array, target: Array) -> Array:
    """GradCAM maps [N,S,S] in [0,1] of the frozen network."""
    name = f.evaluation.classifier
    activations, tail, _ = f.recipe.model.split_at(state.params, state.batch_stats, image, f.options.tap, train=False)
    cam = saliency.grad_cam(lambda a: f.recipe.memory[name].logits(state.memory[name], tail(a)[0]), activations, target)
    return saliency.normalize_map(cam, image.shape[1])


def _explained(f: Frozen, truth: np.ndarray | None) -> dict[str, Any]:
    """Some test images, their map for the true class, the masked image, and whether that still passes as its class."""

    def explain(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
        pixels = to_pixels(batch["image"])
        image = f.normalize(pixels)
        maps = _maps(f, state, image, batch["label"])
        keep = saliency.keep_mask(maps, 0.5)
        masked = saliency.apply_mask(image, keep)
        accepted = f.logits_fn(state)(masked).argmax(-1) == batch["label"]
        show = lambda x: jnp.clip(x * jnp.asarray(f.recipe.std) + jnp.asarray(f.recipe.mean), 0, 1)  # noqa: E731
        return {"image": show(image), "map": maps, "keep": keep, "masked": show(masked), "accepted": accepted}

    some = min(len(f.test), PICTURED)
    source = f.test.take(np.arange(some)) if f.test.in_memory else f.test
    parts = []
    for out, where in f.run(source, "explained", explain):
        parts.append(jax.tree.map(lambda x, w=where: x[w], out))
        if sum(len(p["map"]) for p in parts) >= some:
            break
    out = jax.tree.map(lambda *xs: np.concatenate(xs)[:some], *parts)
    chosen = np.sort(np.concatenate([np.flatnonzero(out["accepted"])[:8], np.flatnonzero(~out["accepted"])[:8]]))
    out = {k: v[chosen] for k, v in out.items()}
    out["true_mask"] = None if truth is None or truth.shape[1:] != out["map"].shape[1:] else truth[chosen]
    out["names"] = [f.test.class_names[i] if i >= 0 else "" for i in f.test.batch(chosen)["label"]]
    return out


def fgsm(f: Frozen) -> tuple[Figures, dict]:
    """Accuracy and calibration of the classifier under one-step attacks, white box, true labels (d.3)."""
    if f.evaluation.classifier is None:
        return {}, {}
    figures, bins = {}, {}
    mean, std = jnp.asarray(f.recipe.mean), jnp.asarray(f.recipe.std)
    resize = standard_view(f.recipe.image_shape[0], (0.0,) * len(mean), (1.0,) * len(mean))

    def attack(state: TrainState, batch: dict[str, Array]) -> Array:
        pixels = to_pixels(batch["image"])
        pixels = resize(jax.random.split(jax.random.key(0), pixels.shape[0]), pixels)[0]
        logits_fn = f.logits_fn(state)
        # A row's own copy of epsilon: one compiled program serves every strength.
        adversarial = fgsm_examples(
            logits_fn,
            pixels,
            batch["label"],
            epsilon=batch["epsilon"][0] / 255,
            mean=mean,
            std=std,
            where=batch["where"],
        )
        return jax.nn.softmax(logits_fn((adversarial - mean) / std))

    for epsilon in f.options.fgsm:
        probabilities = f.collect(f.test, "fgsm", attack, epsilon=np.float32(epsilon))
        bins[f"FGSM {epsilon}/255"] = _bins(probabilities, f.test.labels)
        figures[str(epsilon)] = {
            "accuracy": _accuracy(probabilities.argmax(-1), f.test.labels),
            "ece": float(expected_calibration_error(probabilities, f.test.labels)),
        }
    return figures, {"robustness": figures, "reliability_fgsm": bins}


def calibration(f: Frozen) -> tuple[Figures, dict]:
    """Expected calibration error on the test split and, where the source has one, on its shifted form."""
    if f.evaluation.classifier is None:
        return {}, {}
    figures, bins = {}, {}
    for split in ("test", "test_shifted"):
        source = f.source(split)
        if source is None:
            continue
        probabilities = f.probabilities(split)
        name = "clean" if split == "test" else split
        figures[name] = {
            "accuracy": _accuracy(probabilities.argmax(-1), source.labels),
            "ece": float(expected_calibration_error(probabilities, source.labels)),
        }
        bins[name] = _bins(probabilities, source.labels)
    return figures, {"reliability": bins}


def _bins(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in reliability(probabilities, labels).items()}


EVALUATORS: dict[str, Callable[[Frozen], tuple[Figures, dict]]] = {
    "knn": knn,
    "linear": linear,
    "raw_pixels": raw_pixels,
    "classifier": classifier,
    "explanation": explanation,
    "fgsm": fgsm,
    "calibration": calibration,
}
