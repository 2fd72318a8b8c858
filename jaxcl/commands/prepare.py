"""Downloads a TFDS set and writes it in ArrayRecord form, so that `tfds:NAME` reads it without TensorFlow.

python -m jaxcl prepare cifar10 --data_dir=~/tensorflow_datasets
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 prepared, 2 a mistake of the caller, said in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxcl prepare", description="Prepare a TFDS set in ArrayRecord form."
    )
    parser.add_argument("name", help="as TFDS writes it, for example cifar10")
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR"), help="default $TFDS_DATA_DIR")
    arguments = parser.parse_args(argv)
    missing = [m for m in ("tensorflow", "tensorflow_datasets") if importlib.util.find_spec(m) is None]
    if missing:
        print(
            f"preparing {arguments.name} needs {' and '.join(missing)}: pip install 'jaxcl[prepare]'",
            file=sys.stderr,
        )
        return 2
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(arguments.data_dir) if arguments.data_dir else None
    try:
        builder = tfds.builder(arguments.name, data_dir=data_dir, file_format="array_record")
    except ValueError as error:  # unknown name, config or version
        print(str(error).strip().splitlines()[0], file=sys.stderr)
        return 2
    builder.download_and_prepare()
    print(f"{arguments.name} is ready in {builder.data_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
