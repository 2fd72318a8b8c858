"""The contract of a torch layout: an encoder's variables by the names and in the shapes of a network in torch.

An encoder that has one names it in its options (`EncoderOptions.torch_layout`). Then `jaxcl export --format=torch`
writes it, and weights published for torch load with `model.weights=FILE` and `jaxcl.load_backbone(FILE)`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxcl.models.preprocessing import Preprocessing
from jaxcl.runtime.registry import Contract

Variables = dict[str, np.ndarray]  # {"params.stem_conv.kernel": ...}: paths in flax's trees, joined by dots


class TorchLayout(Contract):
    """Translates between the variables of a kind of encoder and a state dict of torch.

    Attributes:
      network: the network in torch and some of its names, for messages.
      usual_preprocessing: of weights that do not tell theirs but classify ImageNet's 1,000 classes; None: it varies.
    """

    network: ClassVar[str] = ""
    usual_preprocessing: ClassVar[Preprocessing | None] = None

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether a file with tensors of these names, and no word about itself, is in this layout."""
        return False

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the state dict has no use here, such as a classifier; it is not read at all."""
        return False

    def from_torch(self, state: Mapping[str, np.ndarray]) -> Variables:
        """A state dict -> variables. Unknown names stay as they are: fitting the variables to an encoder names them."""
        raise NotImplementedError(f"{type(self).__name__} must define `from_torch`")

    def to_torch(self, variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Variables -> a state dict. Raises KeyError for a name that no encoder of this kind has."""
        raise NotImplementedError(f"{type(self).__name__} must define `to_torch`")

    def architecture(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The options of the encoder with these variables, found by names and shapes. Raises UserError for none."""
        raise NotImplementedError(f"{type(self).__name__} must define `architecture`")

    def assumed(self, variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Those of the options of `architecture` that the tensors do not tell, so that they are taken as usual."""
        return {}

    def architecture_from_config(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The options that the config.json beside published weights tells; None for a network of another kind.

        They go over those of `architecture`: {**architecture(variables), **architecture_from_config(config)}. Raises
        UserError for a network of this kind that the encoder cannot be.
        """
        return None

    def preprocessing(self, variables: Mapping[str, np.ndarray]) -> Preprocessing | None:
        """What images must be like, where the tensors tell; None: they do not."""
        return None

    def check(self, encoder: Any) -> None:
        """Raises UserError for an encoder of this kind that the network in torch cannot express."""

    def changes(self, encoder: Any) -> dict[str, Any]:
        """What has to be changed in the published network before it takes the weights of this encoder."""
        return {}
