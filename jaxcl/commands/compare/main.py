"""Compare runs, or draw the curves of a sweep.

    jaxcl compare --workdir=RUN --workdir=RUN1+RUN2 --name=L_spread --name=Thanos --out=DIR
    jaxcl compare --sweep=SWEEP --out=DIR

RUN1+RUN2 are two runs joined to one encoder, with their features side by side. For runs, DIR gets fine_embedding.png,
with the accuracy of a linear probe on the fine classes, which is measured here, and table.md, with more numbers from
their results.json. A sweep gives up to three figures:

    collapse_curve.png  over a_lc or a_spread of a term (jaxcl sweep --grid=terms.contrast.a_spread=..., with
                        "collapse" in eval.final): the within-class cosine and its prediction by theory
    alpha_curves.png    over alpha of non-semantic negatives, or of configs with and without them (with "linear" or
                        "ood" in eval.final): accuracy in and out of domain
    invariance.png      with "invariance" in eval.final: what each stage of each setting is invariant to, the mean of
                        its seeds
"""

import collections
import logging
import pathlib

from jaxcl.commands.compare import runs, sweeps
from jaxcl.errors import UserError
from jaxcl.report import figures, invariance, negatives, transfer
from jaxcl.runtime import storage
from jaxcl.runtime.flags import Flags

logger = logging.getLogger("jaxcl")

FLAGS = Flags(__doc__)
FLAGS.paths("workdir", "A run folder, or several with + between them, which are joined; once for each column.")
FLAGS.texts("name", "The name of each --workdir, in order; default: the name of its config.")
FLAGS.text("source", "", "A data source as in a config; default: that of each run.")
FLAGS.path("sweep", "", "The --out folder of a jaxcl sweep over a_lc, a_spread or alpha.")
FLAGS.path("out", "", "A folder for the figures and the table.")


def main(argv: list[str]) -> int:
    """Compare; -> exit code."""
    given = FLAGS.parse(argv)
    groups, names, out = [runs.folders(w) for w in given.workdir], given.name, pathlib.Path(given.out)
    if not groups and not given.sweep:
        raise UserError("nothing to compare; give run folders by --workdir, or the folder of a sweep by --sweep")
    if not given.out:
        raise UserError("no --out; give a folder for the figures")
    if names and len(names) != len(groups):
        raise UserError(f"{len(names)} --name for {len(groups)} --workdir; give one for each, or none")
    if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"--name={twice[0]} is given twice; names must differ")
    curves = sweeps.read(given.sweep) if given.sweep else sweeps.Curves(None, None, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out {out}: {error.strerror}; choose a folder you may write to") from None

    if curves.collapse is not None:
        _log(figures.save(transfer.collapse_curve(*curves.collapse), out / "collapse_curve.png"))
    if curves.alphas is not None:
        _log(figures.save(negatives.alpha_curves(curves.alphas), out / "alpha_curves.png"))
    if curves.invariance is not None:
        _log(figures.save(invariance.invariances(curves.invariance), out / "invariance.png"))
    if groups:
        panels, results = {}, {}
        for name, group in zip(names or runs.default_names(groups), groups, strict=True):
            panels[name], results[name] = runs.evaluate(group, given.source)
        _log(figures.save(transfer.fine_embedding(panels), out / "fine_embedding.png"))
        text = runs.table(results)
        _write(out / "table.md", text)
        print(text, end="")
    return 0


def _write(path: pathlib.Path, text: str) -> None:
    storage.write_whole(path, text)
    _log(path)


def _log(path: pathlib.Path) -> None:
    logger.info("%s", path)
