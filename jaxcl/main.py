"""Train one config.

    jaxcl train --config=configs/excon.py[:PRESET] [--workdir=DIR] [--config.KEY=VALUE ...]
    jaxcl train --config=configs/simclr.py --config.model.kind=vit --config.model.depth=3 --config.batch_size=128

`python -m jaxcl.main` is the same command. A path below configs/ that is not in the current folder names one of the
configs that are installed with jaxcl. Presets are words that choose a variant of the config, such as a data set; the
first lines of the config file list them. The keys are in the config file too; jaxcl/config.py explains them. Another
kind of a part, such as --config.model.kind=vit, brings the options of that kind with it.

The same command with the same --workdir resumes a run. Exit codes: 0 finished; 2 a mistake to correct; 3 the loss
diverged; 75 stopped on request (SIGTERM, Ctrl-C, SIGHUP), or another process was lost: run the same command again.
After a loss that is not finite, the same command with --replay=STEP runs that update again and shows where it begins.
"""

import pathlib

from jaxcl.commands.config_file import read_config
from jaxcl.errors import Diverged, Preempted, UserError
from jaxcl.runtime import compile_cache, distributed, entry, together, xla_flags
from jaxcl.runtime.flags import Flags

FLAGS = Flags(__doc__, config=True)
FLAGS.path("workdir", "", "Run folder, local or gs://; default runs/<config>[-<preset>].")
FLAGS.text(
    "distributed",
    "off",
    "off: this process alone. auto: JAX finds the cluster. HOST:PORT,COUNT,ID: this is process ID of COUNT, and "
    "process 0 serves at HOST:PORT.",
)
FLAGS.number("join_timeout", distributed.JOIN_SECONDS, "Seconds to wait for the other processes.", at_least=1)
FLAGS.number(
    "heartbeat_timeout", distributed.HEARTBEAT_SECONDS, "Seconds until a silent process counts as lost.", at_least=1
)
FLAGS.number(
    "profile",
    None,
    "Trace this many updates, after the first few, into WORKDIR/profile; 10 are enough.",
    at_least=1,
)
FLAGS.number(
    "replay",
    None,
    "Train nothing: run this one update of the run again, from the nearest state that was saved before it, and show "
    "every loss term, metric, the gradient norm by layer and the first array that is not finite; also written to "
    "WORKDIR/nan/replay_STEP.json.",
    at_least=1,
)


def _default_workdir(argument: str) -> pathlib.Path:
    path, _, preset = argument.partition(":")
    words = [w.strip() for w in preset.split(",") if w.strip()]
    return pathlib.Path("runs") / "-".join([pathlib.Path(path).stem, *words])


def main(argv: list[str]) -> int:
    """Run one config; -> exit code."""
    xla_flags.set_flags()  # first: a config file may import JAX
    given = FLAGS.parse(argv)
    if given.config is None:
        raise UserError("no --config; for example --config=configs/excon.py")
    if given.replay and given.profile:
        raise UserError(
            "--profile and --replay were given; a replay trains nothing that could be traced: use one of them"
        )
    workdir = given.workdir or _default_workdir(given.config)
    config = read_config(given.config, given.overrides, workdir)
    if given.distributed == "off":
        compile_cache.turn_on()
    distributed.join(given.distributed, timeout=given.join_timeout, heartbeat=given.heartbeat_timeout)
    from jaxcl.train import loop as train  # late, so that a mistake in the flags is reported without this import
    from jaxcl.train import replay

    together.listen()
    try:
        if given.replay:
            replay.run(config, workdir, given.replay)
        else:
            train.run(config, workdir, profile=given.profile or 0)
    except Exception as error:
        if isinstance(error, (UserError, Diverged, Preempted)):
            if isinstance(error, UserError):  # the others reach all processes
                together.tell(str(error), entry.code_of(error))
            raise
        if heard := together.heard():  # it is why this process failed
            raise entry.error_of(*heard) from None
        if lost := distributed.lost(error):
            raise lost from None
        together.tell(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", entry.code_of(error))
        raise
    return 0


def cli() -> None:
    """Run `main` as this process."""
    entry.leave(main)


if __name__ == "__main__":
    cli()
