"""An encoder without its run, loaded in three lines.

    import jaxcl
    backbone = jaxcl.load_backbone("exported")
    features = backbone(images)  # uint8 [N,H,W,C], or floats in [0, 1] -> float32 [N,D]

N images, H W C height, width and channels, D features, h w M height, width and channels of a stage's map.
"""

import dataclasses
import functools
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl.augment import Pipeline, standard_view, to_float
from jaxcl.errors import UserError
from jaxcl.models import weights
from jaxcl.models.model import Model, make_model
from jaxcl.models.registry import MODELS
from jaxcl.models.trees import ENCODER
from jaxcl.runtime.registry import make_part

Array = jax.Array
Tree = Any

# Options that matter in training only. A backbone lacks them, and the head's options.
_TRAINING_OPTIONS = ("branches", "branch_embeds", "norm_sets", "norm_set_momentum", "weights", "norm_statistics")


def architecture(node: ConfigDict) -> dict[str, Any]:
    """The options of an encoder alone, from a config's model: no head, no branches, one set of batch norms."""
    options = dataclasses.asdict(make_part("model", node, MODELS))
    options = {k: v for k, v in options.items() if k not in _TRAINING_OPTIONS and not k.startswith(("head_", "lora_"))}
    return {"kind": node.kind} | options


def model_of(architecture: Mapping[str, Any]) -> Model:
    """The model with these options and no head. Raises UserError for unknown or impossible options."""
    return make_model(make_part("architecture", {**architecture, "head_features": 0}, MODELS))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Backbone:
    """A frozen encoder with its preprocessing, in inference mode. `module`, `variables` and `normalize` train it on.

    Attributes:
      model: the encoder behind jaxcl's functional interface; its head is the identity.
      variables: {"params", "batch_stats"} of `module`, float32.
      size: side in pixels to which images are resized.
      mean, std: of the training images, per channel, in [0, 1] units.
      class_names: of the training data; () for unknown.
      about: the description in the file.
    """

    model: Model
    variables: dict[str, Tree]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.variables["params"]))
        kind = self.about.get("architecture", {}).get("kind") or type(self.module).__name__
        images = f"images=[N,{self.size},{self.size},{len(self.mean)}]"
        return f"Backbone({kind}, {images}, features={self.features}, parameters={count:,})"

    @property
    def module(self) -> nn.Module:
        """The flax module: normalised images [N,size,size,C] -> features [N,D]."""
        return self.model.encoder

    @property
    def features(self) -> int:
        """D"""
        return self.model.features

    @functools.cached_property
    def _view(self) -> Pipeline:
        return standard_view(self.size, self.mean, self.std)

    def normalize(self, images: Any) -> Array:
        """uint8 [N,H,W,C], or floats in [0, 1] -> float32 [N,size,size,C], resized and normalised as in training.

        A single channel is repeated for an encoder of several. Raises UserError for other shapes and values.
        """
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        C = len(self.mean)
        if images.ndim != 4 or images.shape[-1] not in (1, C):
            raise UserError(f"images are of shape {images.shape}; expected [N,H,W,{C}] (one image: image[None])")
        pixels = to_float(images)
        return self._resized(jnp.broadcast_to(pixels, (*pixels.shape[:-1], C)))

    @functools.cached_property
    def _resized(self):
        # The view draws nothing: its keys only give the batch size.
        return jax.jit(lambda x: self._view(jax.random.split(jax.random.key(0), x.shape[0]), x)[0])

    @functools.cached_property
    def _encode(self):
        return jax.jit(lambda v, x: self.model.encode({ENCODER: v["params"]}, v["batch_stats"], x, train=False)[0])

    @functools.cached_property
    def _maps(self):
        return jax.jit(lambda v, x: self.model.maps({ENCODER: v["params"]}, v["batch_stats"], x))

    def __call__(self, images: Any) -> Array:
        """Images, as `normalize` takes them -> features, float32 [N,D]. Compiled once for each shape."""
        return self._encode(self.variables, self.normalize(images))

    def maps(self, images: Any) -> dict[str, Array]:
        """Images -> the output of each stage, {"stage1": [N,h,w,M], ...}. Raises UserError without stages."""
        maps = self._maps(self.variables, self.normalize(images))
        return {f"stage{i + 1}": x for i, x in enumerate(maps)}

    def tap(self, images: Any, name: str) -> Array:
        """Images -> the activations [N,h,w,M] at a tap (`Model.split_at`). Raises UserError for an unknown tap."""
        self.model.check_tap(name)
        params, stats = {ENCODER: self.variables["params"]}, self.variables["batch_stats"]
        return self.model.split_at(params, stats, self.normalize(images), name, train=False)[0]


def load_backbone(
    path: str | os.PathLike,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """Load a backbone that `jaxcl export` wrote, or published weights in the torch layout of an encoder.

    Args:
      path: the folder, or the .safetensors file; local or remote ("gs://...").
      size, mean, std: replace those in the file; a file without a description needs all three.

    Raises:
      UserError: the file is missing, damaged or no backbone, or its preprocessing is unknown.
    """
    found = weights.read(path)
    about, file = found.about, weights.file_of(path)
    known = about.get("preprocessing", {})
    known = known if isinstance(known, dict) else {}
    size, mean, std = (
        given if given is not None else known.get(key) for key, given in (("size", size), ("mean", mean), ("std", std))
    )
    if size is None or mean is None or std is None:
        raise UserError(
            f"{file} does not describe its preprocessing; give size=, mean= and std= (for torchvision's weights on "
            "ImageNet: size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
        )
    try:
        model = model_of(weights.architecture(found))
    except UserError as error:
        raise UserError(f"{file} is no backbone of this version of jaxcl: {error}") from error
    try:
        size, mean, std = operator.index(size), tuple(map(float, mean)), tuple(map(float, std))
        names = tuple(map(str, about.get("class_names", ())))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: size, mean or std is not a number for each channel ({error})") from error
    params, stats = weights.fit(str(file), found.variables, model, (size, size, len(mean)))
    variables = jax.device_put({"params": params, "batch_stats": stats})
    return Backbone(model, variables, size, mean, std, names, about)
