"""An encoder alone, without its run: taken out of a run, and loaded again in three lines.

    import jaxcl
    backbone = jaxcl.load_backbone("exported")
    features = backbone(images)  # uint8 [N,H,W,C], or floats in [0, 1] -> float32 [N,D]

N images, H W C height, width, channels, D features, h w M a stage's map.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcl.augment import Pipeline, standard_view
from jaxcl.errors import UserError
from jaxcl.method.build import make_part
from jaxcl.models import Model, make_model, torch_layout, weights
from jaxcl.models.registry import MODELS

Array = jax.Array
Tree = Any

_OF_TRAINING = ("branches", "branch_embeds", "norm_sets", "norm_set_momentum", "weights")  # and all of the head


def architecture(node: ConfigDict) -> dict[str, Any]:
    """The options of an encoder alone, from a config's model: no head, no branches, one set of batch norms."""
    options = dataclasses.asdict(make_part("model", node, MODELS))
    options = {k: v for k, v in options.items() if k not in _OF_TRAINING and not k.startswith("head_")}
    return {"kind": node.kind} | options


def model_of(architecture: Mapping[str, Any]) -> Model:
    """The model of such options; its head passes features on. Errors: UserError for options that no model has."""
    return make_model(make_part("architecture", ConfigDict({**architecture, "head_features": 0}), MODELS))


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen encoder with its preprocessing, in inference mode. To train on: `module`, `variables`, `normalize`.

    Attributes:
      model: the encoder behind jaxcl's functional interface; its head does nothing.
      variables: {"params", "batch_stats"} of `module`, float32.
      size: side to which images are resized.
      mean, std: per channel, in [0, 1] units, of what it was trained on.
      class_names: of its training data, if there were any.
      about: all that the file says of itself.
    """

    model: Model
    variables: dict[str, Tree]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        """uint8 [N,H,W,C], or floats in [0, 1] -> float32 [N,size,size,C] as in training, resized where need be.

        One channel becomes as many as the encoder takes. Errors: UserError for other shapes and values.
        """
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        C = len(self.mean)
        if images.ndim != 4 or images.shape[-1] not in (1, C):
            raise UserError(f"images are of shape {images.shape}; expected [N,H,W,{C}] (one image: image[None])")
        if images.dtype == np.uint8:
            pixels = jnp.asarray(images).astype(jnp.float32) / 255
        elif jnp.issubdtype(images.dtype, jnp.floating):
            known = not isinstance(images, jax.core.Tracer) and images.size
            if known and (float(images.min()) < -0.01 or float(images.max()) > 1.01):
                low, high = float(images.min()), float(images.max())
                raise UserError(f"float images go from {low:g} to {high:g}; expected 0 to 1, or uint8")
            pixels = jnp.asarray(images).astype(jnp.float32)
        else:
            raise UserError(f"images are {images.dtype}; expected uint8, or floats in [0, 1]")
        return self._resized(jnp.broadcast_to(pixels, (*pixels.shape[:-1], C)))

    @functools.cached_property
    def _resized(self):
        # The view draws nothing; its keys only carry the batch size.
        return jax.jit(lambda x: self._view(jax.random.split(jax.random.key(0), x.shape[0]), x)[0])

    @functools.cached_property
    def _encode(self):
        return jax.jit(lambda v, x: self.model.encode({"encoder": v["params"]}, v["batch_stats"], x, train=False)[0])

    @functools.cached_property
    def _maps(self):
        return jax.jit(lambda v, x: self.model.maps({"encoder": v["params"]}, v["batch_stats"], x))

    def __call__(self, images: Any) -> Array:
        """Images as of `normalize` -> float32 [N,D]; compiled once for each shape."""
        return self._encode(self.variables, self.normalize(images))

    def maps(self, images: Any) -> dict[str, Array]:
        """Images -> what each stage of a ResNet gives, {"stage1": [N,h,w,M], ...}. Errors: UserError without stages."""
        maps = self._maps(self.variables, self.normalize(images))
        return {f"stage{i + 1}": x for i, x in enumerate(maps)}

    def tap(self, images: Any, name: str) -> Array:
        """Images -> the activations that GradCAM explains, [N,h,w,M] or tokens: `Model.split_at`. Errors: UserError."""
        self.model.check_tap(name)
        params, stats = {"encoder": self.variables["params"]}, self.variables["batch_stats"]
        return self.model.split_at(params, stats, self.normalize(images), name, train=False)[0]


def load_backbone(
    path: str | os.PathLike,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """A backbone that `python -m jaxcl export` wrote, or a ResNet by torchvision's names.

    Args:
      path: the folder, or the .safetensors file; local or remote ("gs://...").
      size, mean, std: instead of those of the file; of a file that says nothing of itself all three are needed.

    Raises:
      UserError: no such file, a damaged one, one that is no backbone, or preprocessing that is not known.
    """
    variables, about = weights.read(path)
    file = weights.file_of(path)
    known = about.get("preprocessing", {})
    size, mean, std = (
        given if given is not None else known.get(key) for key, given in (("size", size), ("mean", mean), ("std", std))
    )
    if size is None or mean is None or std is None:
        raise UserError(
            f"{file} does not say what its images were; give size=, mean= and std= (ImageNet's, where torchvision's "
            "weights are of it: size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
        )
    try:
        model = model_of(about["architecture"] if about else torch_layout.architecture_of(variables))
    except (UserError, KeyError) as error:
        reason = str(error) if isinstance(error, UserError) else "it names no architecture"
        raise UserError(f"{file} is no backbone of this version of jaxcl: {reason}") from error
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    params, stats = weights.fit(str(file), variables, model, (size, size, len(mean)))
    variables = jax.device_put({"params": params, "batch_stats": stats})
    return Backbone(model, variables, size, mean, std, tuple(about.get("class_names", ())), about)
