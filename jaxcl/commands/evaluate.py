"""Evaluate runs again.

    python -m jaxcl.evaluate --workdir=RUN [--workdir=RUN ...] [--suite=knn,linear] [--source=...]
    python -m jaxcl.evaluate --workdir=RUN --suite=ood --set="ood=('sketch=folder:PATH',)" --set="severities=(3,)"

Several run folders are one encoder, their features side by side. Results are printed as JSON, and written to --out.
"""

import json
import pathlib

from absl import flags

from jaxcl.errors import UserError
from jaxcl.runtime import compile_cache
from jaxcl.runtime import flags as command_line
from jaxcl.train import run_folder

_FLAGS = flags.FlagValues()
_own = dict(flag_values=_FLAGS)
_WORKDIR = flags.DEFINE_multi_string("workdir", [], "A run folder; several: their features side by side.", **_own)
_SUITE = flags.DEFINE_string("suite", "", "Evaluators, comma-separated; default: the config's eval.final.", **_own)
_SOURCE = flags.DEFINE_string("source", "", "A data source as in a config; default: the run's own.", **_own)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.", **_own)
_SPLIT = flags.DEFINE_string("split", "", "test or validation; default: the first run's eval.split.", **_own)
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE: a key of config.eval, for this evaluation.", **_own)
_OUT = flags.DEFINE_string("out", "", "A JSON file for the results.", **_own)


def run(argv: list[str]) -> int:
    """Evaluate; -> exit code."""
    _FLAGS.unparse_flags()
    command_line.parse(argv, _FLAGS)
    if not _WORKDIR.value:
        raise UserError("no --workdir; give the folder of a run")
    from jaxcl.train import runs  # after the flags are known to be right

    compile_cache.turn_on()
    opened = [runs.load_run(w, source=_SOURCE.value, step=_STEP.value, options=_SET.value) for w in _WORKDIR.value]
    suite = tuple(s.strip() for s in _SUITE.value.split(",") if s.strip())
    found = runs.summary(opened, runs.evaluate_runs(opened, suite, split=_SPLIT.value))
    print(json.dumps(found["results"], indent=2, default=run_folder.number))
    if _OUT.value:
        run_folder.write_json(pathlib.Path(_OUT.value), found)
    return 0


def cli() -> None:
    """Exit codes as those of jaxcl.main."""
    command_line.leave(run)


if __name__ == "__main__":
    cli()
