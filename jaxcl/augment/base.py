"""The contract of an operation of a pipeline. N images, V views of each image, C channels."""

import dataclasses
from typing import ClassVar

import jax

from jaxcl.runtime.options import OptionError, Options
from jaxcl.runtime.registry import Contract

Array = jax.Array
Params = dict[str, Array]
Planes = tuple[Array, ...]  # one array [N,H,W] per channel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op(Options, Contract):
    """One operation of a pipeline: a frozen dataclass of its options, called with keys and images.

    A subclass needs a default for `name` and a `__call__`:

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class RandomInvert(Op):
            p: Annotated[float, SHARE] = 0.5
            name: str = "invert"

            def __call__(self, keys, images):
                mask = ops.draw_mask(keys, p=self.p)
                return jnp.where(mask[:, None, None, None], 1 - images, images), {"invert": mask}

    The other attributes let neighbouring operations share work; each changes the cost of a view but not its values.

    Attributes:
      name: labels the keys of this operation, so that its draws do not depend on the other operations.
      takes_views: as the first operation of a pipeline, `__call__` takes keys [V N] with images [N] and returns V
        results per image. Otherwise the pipeline repeats the images V times.
      is_flip: the operation only mirrors images left to right, where its method `flips` says so.
      fuses_flip: `__call__` has a keyword `flipped`, bool [N], and mirrors the result where it is set. If the next
        operation is a flip, the pipeline uses this keyword and skips the flip.
      gives_planes: `__call__` has a keyword `planar`; with True it returns `Planes` instead of one array. The pipeline
        uses it if the next operation accepts planes (see `takes_planes`).
    """

    takes_views: ClassVar[bool] = False
    is_flip: ClassVar[bool] = False
    fuses_flip: ClassVar[bool] = False
    gives_planes: ClassVar[bool] = False

    name: str

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except OptionError as error:
            raise self.bad_option(error.option, error.reason) from None

    def __call__(self, keys: Array, images: Array) -> tuple[Array, Params]:
        """Draws and applies the operation.

        Args:
          keys: [N] typed keys, one per image.
          images: float32 [N,H,W,C] in [0, 1].

        Returns:
          The images, and the drawn parameters: name -> [N,...].
        """
        raise NotImplementedError(f"{type(self).__name__} must define `__call__`")

    def flips(self, keys: Array) -> Array:
        """The draw of an operation with `is_flip`: keys [N] -> the images to mirror, bool [N]."""
        raise NotImplementedError(f"{type(self).__name__} must define `flips` if it is a flip")

    def takes_planes(self, channels: int) -> bool:
        """Whether `__call__` accepts images of this many channels as `Planes`."""
        return False

    def bad_option(self, option: str, reason: str) -> OptionError:
        """The error for an impossible option; it names the operation and the option."""
        return OptionError(f"{self.name}.{option}", reason)
