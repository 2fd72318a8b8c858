"""`SourceKind`, the contract of a kind of source: how the image set that a spec names is read."""

import dataclasses
from typing import Annotated, ClassVar

from jaxcl.data.selection import Select
from jaxcl.data.source import Source
from jaxcl.runtime.options import Options, Range
from jaxcl.runtime.registry import Contract

Pixels = Annotated[int, Range(1)]
Size = Annotated[int, Range(0)]  # 0: the kind's default


@dataclasses.dataclass(frozen=True)
class SourceKind(Options, Contract):
    """A kind of source: a frozen dataclass of its options.

    A kind of your own is written "package.module:Name", or "package.module:Name:ARGUMENT", in data.source; its options
    are data.options:

        @dataclasses.dataclass(frozen=True)
        class Numbers(SourceKind):
            argument = "PATH"
            count: Annotated[int, Range(1)] = 100

            def load(self, argument, *, split, base_split, select):
                images, labels = read(argument, base_split, self.count)
                rows = select(labels)
                return ArraySource(images=images[rows], labels=labels[rows], class_names=..., mean=..., std=...)

    Attributes:
      argument: what follows the kind in a spec, such as "PATH" in "folder:PATH"; "": the spec is the kind alone.
      own_validation: whether a set of this kind may have its own validation split.
      extra_splits: splits besides train, test and validation.
      config_keys: keys of `data` in a config that hold the options: a group (its keys are options) or a single option.
      keeps_size: whether images keep the size of their files where no image_size is given.
    """

    argument: ClassVar[str] = ""
    own_validation: ClassVar[bool] = False
    extra_splits: ClassVar[tuple[str, ...]] = ()
    config_keys: ClassVar[tuple[str, ...]] = ("options",)
    keeps_size: ClassVar[bool] = False

    def load(self, argument: str, *, split: str, base_split: str, select: Select) -> Source:
        """Read the rows of a split.

        Args:
          argument: what follows the kind in the spec.
          split: the split to read, which the source is named after.
          base_split: the split of the set whose rows `select` chooses from: "train" for a hold-out, otherwise `split`.
          select: labels [N] of the base split, -1 where unknown -> its rows to keep, ascending. Call it once.

        Raises:
          UserError: data that cannot be read, or a split that the set does not have.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `load`")
