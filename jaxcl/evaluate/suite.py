"""The suites of evaluators a config names, run on a frozen encoder, and the pictures they leave for the report.

The encoder runs in inference mode (running batch statistics), on views without augmentation. N images, S side,
D features, K classes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl.augment import standard_view
from jaxcl.data import Source, batches, has_own_validation
from jaxcl.errors import UserError
from jaxcl.evaluate.base import Metrics, NotApplicable
from jaxcl.evaluate.evaluators import CHECKS, EVALUATORS
from jaxcl.evaluate.linear_probe import LinearProbe as LinearFit
from jaxcl.evaluate.linear_probe import fit_linear_probe, probe_logits
from jaxcl.evaluate.neighbours import thumbnail
from jaxcl.losses.common import unit
from jaxcl.method import sharding
from jaxcl.method.memory import LinearProbe
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.state import TrainState
from jaxcl.method.update import make_views, represent, run_stages, to_pixels
from jaxcl.method.views import view_keys

logger = logging.getLogger("jaxcl")

Array = jax.Array
FEATURES = {"h": "pooled features", "z": "the embedding, scaled to unit length"}
SHOWN = 10  # columns of the picture grids


def check_names(where: str, names: Iterable[str]) -> None:
    """UserError for a name that no evaluator has."""
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"{where} names {name!r}; expected one of {', '.join(EVALUATORS)}")


def check_split(where: str, split: str, config: ConfigDict) -> None:
    """UserError for a split that figures cannot be measured on."""
    if split not in ("test", "validation"):
        raise UserError(f"{where} is {split!r}; expected 'test' or 'validation'")
    if split == "validation" and not (config.data.validation or has_own_validation(config.data.source)):
        raise UserError(f"{where} is 'validation', but nothing is held out; set data.validation, for example to 0.1")


class Evaluation:
    """Runs the suites a config names; compiles once, however often it is called."""

    def __init__(self, config: ConfigDict, recipe: Recipe, *, train: Source, make_source: Callable[[str], Source]):
        self.config, self.options, self.recipe, self._pictures = config, config.eval, recipe, config.report
        check_names("eval", (*config.eval.quick, *config.eval.final))
        check_split("eval.split", config.eval.split, config)
        for key, words in (("features", tuple(FEATURES)), ("knn_features", ("", *FEATURES))):
            if config.eval[key] not in words:
                expected = " or ".join(f"{k!r} ({v})" for k, v in FEATURES.items())
                raise UserError(f"eval.{key} is {config.eval[key]!r}; expected {expected}")
        recipe.model.check_tap(config.eval.tap)
        self.view = standard_view(recipe.image_shape[0], recipe.mean, recipe.std)
        self.classifier = next((n for n, part in recipe.memory.items() if isinstance(part, LinearProbe)), None)
        self.training, self._make_source = train, make_source  # batches of `training` are those of the update
        self.selects_on = "validation" if config.data.validation else "test"
        self._sources: dict[str, Source | None] = {"train": train.plain}
        if config.eval.split == "validation" and not config.data.validation:
            self.source("validation")  # now, as only reading the data tells whether there is one
        self._compiled: dict[Any, Callable] = {}
        self._said: set[str] = set()

    def quick(self, state: TrainState, mesh: jax.sharding.Mesh, split: str | None = None) -> Metrics:
        """{"eval/knn_accuracy": ...} on the validation split, or the test split where nothing is held out."""
        frozen = EvalContext(self, state, mesh, split or self.selects_on)
        results, _ = self._run(self.options.quick, frozen)
        return {
            f"eval/{n}_{k}": v for n, figures in results.items() for k, v in figures.items() if isinstance(v, float)
        }

    def final(self, state: TrainState, mesh: jax.sharding.Mesh) -> tuple[dict[str, Metrics], dict[str, Any]]:
        """-> (results by evaluator, on the split that the config says; panels for the report)."""
        frozen = EvalContext(self, state, mesh, self.options.split)
        results, panels = self._run(self.options.final, frozen)
        if not self._pictures:
            return results, {}
        panels["views"] = frozen.training_views(self.training)
        if len(frozen.test) and ((frozen.test.labels >= 0).any() or "map" not in panels):
            n = min(len(frozen.test), 1500)
            panels["embedding"] = {
                "features": frozen.features("test")[:n],
                "labels": frozen.test.labels[:n],
                "class_names": frozen.test.class_names,
            }
        return results, panels

    def check_options(self, names: Iterable[str] | None = None) -> None:
        """UserError for options (and files they name) that these evaluators, or those of the config, cannot use."""
        for name in (*self.options.quick, *self.options.final) if names is None else names:
            if name in CHECKS:
                CHECKS[name](self)

    def evaluate(self, names: tuple[str, ...], frozen: "EvalContext") -> dict[str, Metrics]:
        """Results of some evaluators by name. Errors: UserError for one that nobody knows, or its options."""
        check_names("the suite", names)
        self.check_options(names)
        return self._run(names, frozen)[0]

    def _run(self, names: tuple[str, ...], frozen: "EvalContext") -> tuple[dict[str, Metrics], dict[str, Any]]:
        """-> (figures by evaluator, panels); what cannot be evaluated is left out, with one line a reason."""
        results, panels, left_out = {}, {}, {}
        for name in names:
            try:
                figures, pictures = EVALUATORS[name](frozen)
            except NotApplicable as reason:
                left_out.setdefault(str(reason), []).append(name)
                continue
            if figures:
                results[name] = figures
            for panel, parts in pictures.items():  # several evaluators may have a part in one
                panels[panel] = panels.get(panel, {}) | parts
        for reason, without in left_out.items():
            line = f"evaluation: {reason}, so there is no {', '.join(without)}"
            if line not in self._said:
                logger.info(line)
                self._said.add(line)
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


class EvalContext:
    """One state to be evaluated: features and logits of whole sources, batch by batch, over the mesh."""

    def __init__(self, evaluation: Evaluation, state: TrainState, mesh: jax.sharding.Mesh, split: str):
        self.evaluation, self.recipe, self.options = evaluation, evaluation.recipe, evaluation.options
        self.state, self.mesh = state, mesh
        self.test = evaluation.source(split)
        self._split = split
        # Constant shapes that divide over the mesh, whatever the user's number.
        self.batch_size = -(-self.options.batch_size // mesh.size) * mesh.size
        self._features: dict[tuple[str, str], np.ndarray] = {}
        self._probe: LinearFit | None = None

    @property
    def held_out(self) -> str | None:
        """The split to choose settings by, where there is one and it is not the one that is evaluated."""
        split = self.evaluation.selects_on
        return split if split == "validation" and self._split != split else None

    def source(self, split: str) -> Source | None:
        return self.test if split == "test" else self.evaluation.source(split)

    def logits_fn(self, state: TrainState) -> Callable[[Array], Array]:
        """Normalised images -> logits of the online classifier."""
        name = self.evaluation.classifier

        def logits(image: Array) -> Array:
            h, _ = represent(self.recipe, state.params, state.batch_stats, image)
            return self.recipe.memory[name].logits(state.memory[name], h)

        return logits

    def fitted_probe(self) -> LinearFit:
        """The linear probe on the training features, fitted once."""
        if self._probe is None:
            labels = self.source("train").labels
            self._probe = fit_linear_probe(self.features("train"), labels, num_classes=self.recipe.num_classes)
        return self._probe

    def probe_fn(self, state: TrainState, probe: LinearFit) -> Callable[[Array], Array]:
        """Normalised images -> logits of a fitted linear probe."""

        def logits(image: Array) -> Array:
            return probe_logits(probe, self._encode(state, image)[self.options.features]())

        return logits

    def _encode(self, state: TrainState, image: Array) -> dict[str, Callable[[], Array]]:
        """Normalised images -> their features by kind, each made when asked for."""
        h, z = represent(self.recipe, state.params, state.batch_stats, image)
        return {"h": lambda: h, "z": lambda: unit(z)}

    def normalize(self, pixels: Array) -> Array:
        # The standard view draws nothing; its keys only carry the batch size.
        return self.evaluation.view(jax.random.split(jax.random.key(0), pixels.shape[0]), pixels)[0]

    def run(
        self, source: Source, name: str, fn: Callable, *args: Any, **extra: Any
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """fn(state, batch, *args) on every batch -> (host result, rows that are real); `extra` joins the batch as rows.

        What differs between states is an argument: the program is compiled once, by its name.
        """
        replicated, rows = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        shardings = (replicated, rows, *(replicated for _ in args))
        jitted = self.evaluation.compiled(name, lambda: jax.jit(fn, in_shardings=shardings, out_shardings=replicated))
        for batch in batches(source, self.batch_size):
            batch |= {k: np.full(self.batch_size, v) for k, v in extra.items()}
            yield jax.device_get(jitted(self.state, sharding.device_put(batch, rows), *args)), batch["where"]

    def collect(self, source: Source, name: str, fn: Callable, *args: Any, **extra: Any) -> Any:
        """`run`, padding cut off, concatenated over the batches."""
        outs = self.run(source, name, fn, *args, **extra)
        parts = [jax.tree.map(lambda x, w=where: x[w], out) for out, where in outs]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    def features(self, split: str, kind: str = "") -> np.ndarray:
        """float32 [N,D]: pooled features "h", unit embeddings "z" or [N,P] "thumbnail"; "": what the config says."""
        kind = kind or self.options.features
        if (split, kind) not in self._features:
            # In one pass over the images; h, which the classifier reads, comes along with z.
            kinds = ("h", "z") if "z" in (kind, self.options.features, self.options.knn_features) else ("h",)
            if kind == "thumbnail" or (split in ("train", "test") and "neighbours" in self.options.final):
                kinds += ("thumbnail",)
            out = self._encoded(self.source(split), kinds)
            self._features |= {(split, k): v for k, v in out.items()}
        return self._features[split, kind]

    def features_of(self, source: Source) -> np.ndarray:
        """float32 [N,D] of a source that is no split of the data, such as images made anew; of the config's kind."""
        kind = self.options.features
        return self._encoded(source, ("h", "z") if "z" in (kind, self.options.knn_features) else ("h",))[kind]

    def stream(self, source: Source, kind: str) -> Iterator[np.ndarray]:
        """The same of kind "h" or "z", float32 [n,D] batch by batch, for more images than memory holds."""
        return (part[kind] for part in self._stream(source, (kind,)))

    def _encoded(self, source: Source, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
        parts = list(self._stream(source, kinds))
        return {k: np.concatenate([part[k] for part in parts]) for k in kinds}

    def _stream(self, source: Source, kinds: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        def encode(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
            pixels = to_pixels(batch["image"])
            made = self._encode(state, self.normalize(pixels)) | {"thumbnail": lambda: thumbnail(pixels)}
            return {k: made[k]() for k in kinds}

        for out, where in self.run(source, f"features {kinds}", encode):
            yield {k: v[where] for k, v in out.items()}

    def augmented_features(self, split: str, draw: int) -> np.ndarray:
        """float32 [N,D]: features of one training view of each image (the recipe's first), another for each draw."""
        name, kind = self.recipe.whole_view_names(Phase("encoder"))[0], self.options.features

        def encode(state: TrainState, batch: dict[str, Array], draw: Array) -> Array:
            keys = view_keys(state.key, draw, batch["index"], f"{name} to evaluate")
            image, _ = self.recipe.views[name](keys, to_pixels(batch["image"]))
            return self._encode(state, image)[kind]()

        return self.collect(self.source(split), f"augmented {kind}", encode, np.int32(draw))

    def probabilities(self, split: str) -> np.ndarray:
        """float32 [N,K] of the online classifier."""
        name = self.evaluation.classifier
        logits = self.recipe.memory[name].logits(jax.device_get(self.state.memory[name]), self.features(split, "h"))
        return np.asarray(jax.nn.softmax(logits))

    def training_views(self, source: Source) -> dict[str, Any]:
        """What the encoder sees of the first training images at the end of the run, stages included."""
        recipe, last = self.recipe, Phase("encoder", tuple(range(len(self.recipe.stages))))
        names = recipe.view_names(last)

        def show(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
            views, _, _ = run_stages(recipe, last, state, batch, make_views(recipe, state, batch, names), self.mesh)
            shown = {
                n: jnp.clip(v.image * jnp.asarray(recipe.std) + jnp.asarray(recipe.mean), 0, 1)
                for n, v in views.items()
            }
            return shown | {f"{n}.where": v.where for n, v in views.items() if v.where is not None}

        count = min(len(source), recipe.batch_size) // self.mesh.size * self.mesh.size
        batch = sharding.device_put(source.batch(np.arange(count)), sharding.batch_sharding(self.mesh))
        jitted = self.evaluation.compiled("views", lambda: jax.jit(show, out_shardings=sharding.replicated(self.mesh)))
        out = jax.device_get(jitted(self.state, batch))
        images = {"image": source.images[:SHOWN] / np.float32(255)} if source.in_memory else {}
        made = (n for n in out if n not in recipe.views and not n.endswith(".where"))
        for name in (*names, *made):
            where = out.get(f"{name}.where")
            if where is not None and len(out[name]) == count:
                # A padded row does not exist: show it as empty, not as an image the encoder saw.
                out[name] = np.where(where[:, None, None, None], out[name], 1.0)
            of_each = max(1, len(out[name]) // count)  # of several an image, the first
            images[name] = out[name][::of_each][:SHOWN]
        labels = [source.class_names[i] if i >= 0 else "" for i in source.batch(np.arange(min(SHOWN, count)))["label"]]
        return {"images": {k: v[: len(labels)] for k, v in images.items()}, "labels": labels}
