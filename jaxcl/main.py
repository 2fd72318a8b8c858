"""Train one config: `python -m jaxcl.main --config=configs/excon.py[:PRESET] [--workdir=DIR] [--config.KEY=VALUE ...]`.

The keys are in the config file and, with what they mean, in jaxcl/config.py; the file's first lines say its presets.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from jaxcl.errors import UserError
from jaxcl.runtime import compile_cache, distributed, huge_pages, xla_flags
from jaxcl.runtime import flags as command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with a preset after a colon.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Run folder; default runs/<config>[-<preset>]. The same command with the same folder resumes.",
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "off",
    "off: this process alone. auto: let JAX find the cluster. HOST:PORT,COUNT,ID: that coordinator, COUNT processes.",
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", distributed.JOIN_SECONDS, "Seconds to wait for the other processes.", lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout", distributed.HEARTBEAT_SECONDS, "Seconds after which a silent process is dead.", lower_bound=1
)
_PROFILE = flags.DEFINE_integer(
    "profile",
    None,
    "Write a trace of so many updates (10 are enough), after the first few, into WORKDIR/profile.",
    lower_bound=1,
)


def _default_workdir(argument: str) -> pathlib.Path:
    path, _, preset = argument.partition(":")
    words = [w.strip() for w in preset.split(",") if w.strip()]
    return pathlib.Path("runs") / "-".join([pathlib.Path(path).stem, *words])


def main(argv: list[str]) -> int:
    """Run one config; -> exit code."""
    xla_flags.set_flags()  # first: a config file may import JAX
    command_line.parse(argv)
    if _CONFIG.value is None:
        raise UserError("no --config; for example --config=configs/excon.py")
    if _DISTRIBUTED.value == "off":
        compile_cache.turn_on()
    distributed.join(_DISTRIBUTED.value, timeout=_JOIN_TIMEOUT.value, heartbeat=_HEARTBEAT_TIMEOUT.value)
    from jaxcl.train import loop as train  # after the flags are known to be right: a typo need not wait for the imports

    workdir = _WORKDIR.value or _default_workdir(command_line.config_argument(argv))
    try:
        train.run(_CONFIG.value, workdir, profile=_PROFILE.value or 0)
    except Exception as error:
        raise distributed.lost(error) or error from None
    return 0


def cli() -> None:
    """Exit codes: 0 done; 2 a mistake to mend; 3 the loss diverged; 75 stopped on request, or another host was lost:
    run again to go on."""
    huge_pages.ask()
    if distributed.wants_guard(sys.argv):
        sys.exit(distributed.guard())
    distributed.end_with_guard()
    command_line.leave(main)


if __name__ == "__main__":
    cli()
