"""What an evaluator receives: one state of the encoder, in inference mode, with its features and logits.

Images pass through the standard view: no augmentation. N images, S side, H W of an image as stored, C channels, B rows
of a batch, D features, K classes, P values of a thumbnail.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.augment import standard_view, to_float
from jaxcl.data import Source, batches
from jaxcl.errors import UserError
from jaxcl.evaluate.linear_probe import LinearFit, fit_linear_probe, probe_logits
from jaxcl.evaluate.rows import check_images
from jaxcl.evaluate.structure import thumbnail
from jaxcl.losses.common import unit
from jaxcl.method import sharding
from jaxcl.method.forward import represent
from jaxcl.method.recipe import Phase, Recipe
from jaxcl.method.state import TrainState
from jaxcl.method.views import view_keys

Array = jax.Array
FEATURES = {"h": "pooled features", "z": "the embedding, scaled to unit length"}
THUMBNAIL = "thumbnail"  # small pictures, for evaluators that compare pixels; uint8, as of `structure.thumbnail`
KINDS = (*FEATURES, THUMBNAIL)


class EvalSetup:
    """What all contexts of a run share: its config, data sources and compiled programs.

    Attributes:
      config, options: the whole config, and its `eval` node.
      recipe: the method, with the mean, std, image shape and number of classes of training. The data that is evaluated
        may have another number of classes: `EvalContext.num_classes`.
      training: the source whose batches the update sees. With texture negatives from files, batches hold these too.
        None of data without training images, of which only features are read.
      selects_on: the split that checkpoints and settings are chosen on: "validation", or "test" without one.
      view: the standard view, [B,H,W,C] in [0,1] -> normalised [B,S,S,C].
      classifier: name of the memory part that classifies; None where the config has none.
      first: makes the parameters and batch statistics that the run began with; None: unknown. It may raise UserError.
      kinds: kinds of features that evaluators of the config ask for, beside the config's own choice.
    """

    def __init__(
        self,
        config: ConfigDict,
        recipe: Recipe,
        *,
        train: Source | None,
        make_source: Callable[[str], Source],
        class_names: Sequence[str] | None = None,
    ):
        self.config, self.options, self.recipe = config, config.eval, recipe
        self.training, self._make_source = train, make_source
        self.selects_on = "validation" if config.data.validation else "test"
        how = recipe.model.input_interpolation  # bilinear, unless the model's weights were trained with another one
        self.view = standard_view(recipe.eval_size, recipe.mean, recipe.std, interpolation=how)
        self.classifier = next((name for name, part in recipe.memory.items() if part.classifies), None)
        self.first: Callable[[], tuple[Any, Any]] | None = None
        self._first_features: dict[int, np.ndarray] = {}  # by source
        self.kinds: frozenset[str] = frozenset()
        self._class_names = None if class_names is None else tuple(class_names)
        self._sources: dict[str, Source | None] = {"train": None if train is None else train.plain}
        self._compiled: dict[Any, Callable] = {}

    def source(self, split: str) -> Source | None:
        """A split of the data, read once; None where the source has no such split.

        Raises:
          UserError: the split is "test" or "validation" and cannot be read.
        """
        if split not in self._sources:
            try:
                self._sources[split] = self._make_source(split)
            except UserError:
                if split in ("test", "validation"):
                    raise
                self._sources[split] = None
        return self._sources[split]

    def has_trained_classes(self, source: Source) -> bool:
        """Whether the classes of a source are the first ones of training, so that the classifier knows its labels."""
        names, trained = source.class_names, self._class_names
        if trained is None:  # the data of training itself, or a run of a version that saved no names
            return source.num_classes <= self.recipe.num_classes
        return tuple(names) == trained[: len(names)]

    def compiled(self, name: str, make: Callable[[], Callable]) -> Callable:
        """The function of that name; `make` is called once."""
        if name not in self._compiled:
            self._compiled[name] = make()
        return self._compiled[name]


class EvalContext:
    """One state to evaluate: features and logits of whole sources, batch by batch, over the mesh.

    Attributes:
      setup: what the contexts of a run share.
      recipe, options: as in `setup`.
      state, mesh: the state, replicated over the mesh.
      split, test: the name of the split that results are measured on, and its source.
      batch_size: rows of a batch; a multiple of the number of devices.
    """

    def __init__(self, setup: EvalSetup, state: TrainState, mesh: Mesh, split: str):
        self.setup, self.options = setup, setup.options
        self.recipe = setup.recipe.for_one_device() if mesh.size == 1 else setup.recipe
        self.state, self.mesh = state, mesh
        self.test = setup.source(split)
        self.split = split
        # All batches have one shape, and it divides over the mesh, whatever number the config gives.
        self.batch_size = -(-self.options.batch_size // mesh.size) * mesh.size
        self._features: dict[tuple[str, str], np.ndarray] = {}
        self._finite: set[tuple[str, str]] = set()  # features that were looked at
        self._probe: LinearFit | None = None
        self._others: dict[str, EvalContext] = {}

    # ---- data

    @property
    def held_out(self) -> str | None:
        """The split to choose settings on: "validation"; None without one, or where results are measured on it."""
        split = self.setup.selects_on
        return split if split == "validation" and self.split != split else None

    def source(self, split: str) -> Source | None:
        """A split of the data; "test" is the split that results are measured on."""
        return self.test if split == "test" else self.setup.source(split)

    @property
    def num_classes(self) -> int:
        """Number of classes of the data that is evaluated; another one than the recipe's on data of another set."""
        return max(source.num_classes for source in (self.source("train"), self.test) if source is not None)

    def normalize(self, pixels: Array) -> Array:
        """Pixels [B,H,W,C] in [0,1] -> images [B,S,S,C] as the encoder reads them."""
        # The standard view draws nothing; its keys only carry the batch size.
        return self.setup.view(jax.random.split(jax.random.key(0), pixels.shape[0]), pixels)[0]

    # ---- the encoder, inside jit

    def encode(self, state: TrainState, image: Array) -> tuple[Array, Array]:
        """Normalised images [B,S,S,C] -> (pooled features h [B,D], embeddings z, not scaled)."""
        return represent(self.recipe, state.params, state.batch_stats, image)

    def logits_fn(self, state: TrainState) -> Callable[[Array], Array]:
        """Normalised images -> logits [B,K] of the online classifier."""
        name = self.setup.classifier

        def logits(image: Array) -> Array:
            h, _ = self.encode(state, image)
            return self.recipe.memory[name].logits(state.memory[name], h)

        return logits

    def probe_fn(self, state: TrainState, probe: LinearFit) -> Callable[[Array], Array]:
        """Normalised images -> logits [B,K] of a fitted linear probe."""

        def logits(image: Array) -> Array:
            return probe_logits(probe, self._kinds_of(state, image)[self.options.features]())

        return logits

    def _kinds_of(self, state: TrainState, image: Array) -> dict[str, Callable[[], Array]]:
        """The features of normalised images by kind; a function each, called for the kinds that are wanted."""
        h, z = self.encode(state, image)
        return {"h": lambda: h, "z": lambda: unit(z)}

    # ---- passes over a source

    def run(
        self, source: Source, name: str, fn: Callable, *args: Any, **extra: Any
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields (fn(state, batch, *args) on the host, bool [B] of the rows that exist) for every batch.

        Args:
          source: its batches hold "image", "label", "index" and "where".
          name: of the program; it is compiled once for each name, so what differs between states must be an argument.
          fn: a pure function; it is jitted over the mesh.
          args: replicated arrays.
          extra: numbers that join the batch, one copy a row, so that all their values share one program.
        """
        replicated, rows = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        shardings = (replicated, rows, *(replicated for _ in args))
        jitted = self.setup.compiled(name, lambda: jax.jit(fn, in_shardings=shardings, out_shardings=replicated))
        for batch in batches(source, self.batch_size):
            batch |= {k: np.full(self.batch_size, v) for k, v in extra.items()}
            yield jax.device_get(jitted(self.state, sharding.device_put(batch, rows), *args)), batch["where"]

    def collect(self, source: Source, name: str, fn: Callable, *args: Any, **extra: Any) -> Any:
        """The results of `run` without padded rows, all batches joined."""
        outs = self.run(source, name, fn, *args, **extra)
        return _joined([jax.tree.map(lambda x, w=where: x[w], out) for out, where in outs])

    def first(self, source: Source, count: int, name: str, fn: Callable) -> Any:
        """As `collect`, for the first `count` images only."""
        outs, have = [], 0
        for out, where in self.run(source, name, fn):
            outs.append(jax.tree.map(lambda x, w=where: x[w], out))
            have += int(where.sum())
            if have >= count:
                break
        return jax.tree.map(lambda x: x[:count], _joined(outs))

    # ---- features

    def features(self, split: str, kind: str = "") -> np.ndarray:
        """Features of a split, computed once.

        Args:
          split: "train", "test", "validation" or another one of the source.
          kind: "h", pooled features; "z", embeddings at unit length; "thumbnail" [N,P]; "": as in `eval.features`.

        Returns:
          float32 [N,D]; uint8 of thumbnails.

        Raises:
          NotFinite: by the name of the image; `EvalSetup.final` then leaves the evaluator out, with one line.
        """
        kind = kind or self.options.features
        if (split, kind) not in self._features:
            # One pass over the images gives all kinds that will be asked for; the classifier reads h.
            wanted = {"h", kind, self.options.features, self.options.knn_features}
            wanted |= self.setup.kinds if split in ("train", "test") else set()
            out = self._encoded(self.source(split), tuple(k for k in KINDS if k in wanted))
            self._features |= {(split, k): v for k, v in out.items()}
        if (split, kind) not in self._finite:
            check_images(self._features[split, kind], self.source(split), "training" if split == "train" else split)
            self._finite.add((split, kind))
        return self._features[split, kind]

    def features_of(self, source: Source, kind: str = "") -> np.ndarray:
        """float32 [N,D]: features of any other source, such as changed images; kind: "" for that in `eval.features`."""
        kind = kind or self.options.features
        found = self._encoded(source, ("h", "z") if "z" in (kind, self.options.knn_features) else ("h",))[kind]
        check_images(found, source, "changed")
        return found

    def first_features(self, split: str) -> np.ndarray:
        """float32 [N,D]: pooled features of a split by the state that the run began with, computed once in a run.

        Raises:
          UserError: it is unknown, or its weights cannot be read.
        """
        source, known = self.source(split), self.setup._first_features
        if id(source) not in known:
            known[id(source)] = self.at_first().features(split, "h")
        return known[id(source)]

    def at_first(self) -> "EvalContext":
        """The context of the same images and of the encoder that the run began with.

        Raises:
          UserError: it is unknown, or its weights cannot be read.
        """
        if self.setup.first is None:
            raise UserError("the weights that the run began with are unknown")
        return self.of_other("first", self.setup.first)

    def of_other(self, name: str, make: Callable[[], tuple[Any, Any]]) -> "EvalContext":
        """The context of the same images and of other parameters and batch statistics, made once for each name."""
        if name not in self._others:
            params, stats = sharding.device_put(make(), sharding.replicated(self.mesh))
            state = self.state.replace(params=params, batch_stats=stats)
            self._others[name] = EvalContext(self.setup, state, self.mesh, self.split)
        return self._others[name]

    def stream(self, source: Source, kind: str) -> Iterator[np.ndarray]:
        """Yields features of kind "h" or "z", float32 [n,D], batch by batch: for more images than memory holds."""
        return (out[kind] for out in self._stream(source, (kind,)))

    def _encoded(self, source: Source, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
        outs = list(self._stream(source, kinds))
        return {k: np.concatenate([out[k] for out in outs]) for k in kinds}

    def _stream(self, source: Source, kinds: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        def encode(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
            pixels = to_float(batch["image"])
            made = self._kinds_of(state, self.normalize(pixels)) | {THUMBNAIL: lambda: thumbnail(pixels)}
            return {k: made[k]() for k in kinds}

        for out, where in self.run(source, f"features {kinds}", encode):
            yield {k: v[where] for k, v in out.items()}

    def augmented_features(self, split: str, draw: int) -> np.ndarray:
        """float32 [N,D]: features of one training view of each image (the recipe's first); each `draw` is another."""
        name, kind = self.recipe.whole_view_names(Phase("encoder"))[0], self.options.features

        def encode(state: TrainState, batch: dict[str, Array], draw: Array) -> Array:
            keys = view_keys(state.key, draw, batch["index"], f"{name} to evaluate")
            image, _ = self.recipe.views[name](keys, to_float(batch["image"]))
            return self._kinds_of(state, image)[kind]()

        return self.collect(self.source(split), f"augmented {kind}", encode, np.int32(draw))

    # ---- classifiers

    def probabilities(self, split: str) -> np.ndarray:
        """float32 [N,K]: class probabilities by the online classifier."""
        name = self.setup.classifier
        logits = self.recipe.memory[name].logits(jax.device_get(self.state.memory[name]), self.features(split, "h"))
        return np.asarray(jax.nn.softmax(logits))

    def fitted_probe(self) -> LinearFit:
        """The linear probe on the training features, fitted once."""
        if self._probe is None:
            labels = self.source("train").labels
            self._probe = fit_linear_probe(self.features("train"), labels, num_classes=self.num_classes)
        return self._probe


def _joined(outs: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *outs)
