"""The contract of an encoder."""

import dataclasses

from jaxcl.runtime.options import Options


@dataclasses.dataclass(frozen=True)
class EncoderOptions(Options):
    """What a config may say of an encoder."""
