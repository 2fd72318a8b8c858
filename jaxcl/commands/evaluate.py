"""Evaluate trained runs again.

    jaxcl evaluate --workdir=RUN [--workdir=RUN ...] [--suite=knn,linear] [--source=...]
    jaxcl evaluate --workdir=RUN --suite=ood --set="ood=('sketch=folder:PATH',)" --set="severities=(3,)"

Several run folders are evaluated as one encoder with their features side by side. The command prints the results as
JSON and also writes them to --out.
"""

import json
import pathlib

from jaxcl.errors import UserError
from jaxcl.runtime import compile_cache, storage
from jaxcl.runtime.flags import Flags
from jaxcl.train import run_folder


def _evaluators() -> str:
    from jaxcl.evaluate.registry import EVALUATORS  # late: it imports JAX

    return f"Evaluators: {', '.join(EVALUATORS)}."


FLAGS = Flags(__doc__, more=_evaluators)
FLAGS.paths("workdir", "A run folder; give the flag several times to put features side by side.")
FLAGS.text("suite", "", "Names of evaluators, separated by commas; default: eval.final of the config.")
FLAGS.text("source", "", "A data source as in a config; default: that of the run.")
FLAGS.number("step", None, "Step of the checkpoint; default: the newest, or the best with eval.state=best.")
FLAGS.text("split", "", "test or validation; default: eval.split of the first run.")
FLAGS.texts("set", "KEY=VALUE: a key of config.eval, for this evaluation; may be given several times.")
FLAGS.path("out", "", "A JSON file for the results.")


def main(argv: list[str]) -> int:
    """Evaluate; -> exit code."""
    given = FLAGS.parse(argv)
    if not given.workdir:
        raise UserError("no --workdir; give the folder of a run")
    from jaxcl.train import runs  # late, so that a mistake in the flags is reported without this import

    compile_cache.turn_on()
    opened = [runs.load_run(w, source=given.source, step=given.step, options=given.set) for w in given.workdir]
    suite = tuple(s.strip() for s in given.suite.split(",") if s.strip())
    found = runs.summary(opened, runs.evaluate_runs(opened, suite, split=given.split))
    print(json.dumps(found["results"], indent=2, default=run_folder.number))
    if given.out:
        try:
            run_folder.write_json(pathlib.Path(given.out), found)
        except OSError as error:
            raise UserError(f"cannot write {given.out}: {storage.refusal(error) or error.strerror or error}") from error
    return 0
