"""Every metric that is read by name is written by an evaluator: a renamed one fails here instead of vanishing."""

import fnmatch

import pytest
import tiny

from jaxcl.commands.claims.methods import COST, MEASURES
from jaxcl.commands.compare import runs, sweeps
from jaxcl.commands.sweep import table
from jaxcl.evaluate.registry import EVALUATORS, make_evaluator
from jaxcl.report import names, verdict
from jaxcl.train.runs import evaluate_runs, load_run

STIMULI = {names.SHAPE_BIAS_STIMULI}  # needs a folder of stimuli
# Shown in the row of a main metric, and not declared by the evaluator.
DETAILS = {
    names.NEIGHBOURS_ANY_COSINE,
    names.NEIGHBOURS_ALL_COMPARED,
    names.TEXTURE_TAUGHT,
    names.WITHIN_CLASS_COSINE_H,
}
ATTACKED = {names.under_attack(attack, 4, metric) for attack in names.ATTACKS for metric in ("accuracy", "ece")}
CLAIMED = {path for m in MEASURES.values() for path in (m.path, m.unlabelled[1])} - {COST, ""}
COMPARED = {*runs.MEASURES, *sweeps.COSINES, *(name for group in sweeps.DOMAINS.values() for name in group)}
READ = {*names.ALL} | ATTACKED | CLAIMED | COMPARED | {*table.DEFAULT}


def test_declared_metrics():
    """Cheap: by what each evaluator says that it writes."""
    declared = [f"{name}.{key}" for name in EVALUATORS for key in make_evaluator(name).metrics]
    assert [name for name in sorted(READ - DETAILS) if not any(fnmatch.fnmatch(name, d) for d in declared)] == []


@pytest.mark.slow
def test_written_metrics(tmp_path):
    """By what they do write, all of them on one network that was never trained."""
    c = tiny.config(stage=False, background=False)
    c.size, c.data.limit, c.data.garments.spurious = 0, 64, 0.95  # spurious: there are groups
    c.eval.tap, c.eval.knn_k, c.eval.pgd_steps, c.eval.fgsm, c.eval.pgd = "stage1", 5, 1, (4,), (4,)
    c.eval.corruptions, c.eval.severities, c.eval.shuffle_grids = ("contrast",), (1,), (2,)
    tiny.saved_run(tmp_path, c)
    evaluators = sorted({name.partition(".")[0] for name in READ})
    results = evaluate_runs([load_run(tmp_path)], evaluators)
    assert sorted(READ - STIMULI - verdict.flatten(results).keys()) == []
    titles = [row.name for row in verdict.rows(results | {"seconds": {"train": 1.0}})]
    assert len(titles) == len(set(titles)) == 18 + 2 + 1 + 4 + 1  # fractions, neighbours, worst group, attacks, time
