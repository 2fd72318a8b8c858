"""Download a TFDS set and write it in ArrayRecord form, so that `tfds:NAME` reads it without TensorFlow.

    jaxcl prepare cifar10 --data_dir=~/tensorflow_datasets

The command itself needs TensorFlow: pip install 'jaxcl[prepare]'.
"""

import importlib.util
import os

from jaxcl.errors import UserError
from jaxcl.runtime.flags import Flags

FLAGS = Flags(__doc__, positional="name")
FLAGS.path("data_dir", "", "A folder for prepared sets; default: $TFDS_DATA_DIR, or TFDS's own default.")


def main(argv: list[str]) -> int:
    """Prepare a set; -> exit code."""
    given = FLAGS.parse(argv)
    if not given.name:
        raise UserError("no set; give its name in TFDS, for example: jaxcl prepare cifar10")
    missing = [m for m in ("tensorflow", "tensorflow_datasets") if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(f"preparing {given.name} needs {' and '.join(missing)}: pip install 'jaxcl[prepare]'")
    import tensorflow_datasets as tfds

    data_dir = given.data_dir or os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(
            given.name, data_dir=os.path.expanduser(data_dir) if data_dir else None, file_format="array_record"
        )
    except ValueError as error:  # unknown name, config or version
        raise UserError(str(error).strip().splitlines()[0]) from None
    builder.download_and_prepare()
    print(f"{given.name} is ready in {builder.data_path}")
    return 0
