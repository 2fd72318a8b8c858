"""Train the papers' methods and their baselines under one protocol, and test the papers' claims.

    jaxcl claims --seeds=3                          all methods on garments; an hour or two on two cores
    jaxcl claims --methods=supcon,excon --seeds=5   two of them
    jaxcl claims --smoke                            a test of the command itself; its numbers mean nothing
    jaxcl claims --source=cifar10 --set=data.source=npz:cifar10.npz --methods=supcon,excon

All methods and baselines have the same budget: the same data, epochs and encoder. Views, loss and optimiser are those
of the shipped config, and the last state is measured on the test split. Nothing is tuned or selected here. A method has
up to three runs for each seed: on the fine classes; on the coarse classes (not for encoders that see no labels); and on
coarse classes whose background follows the fine class, for the worst group and the shape bias.
jaxcl/commands/claims/methods.py says which of these a method has.

The runs are those of `jaxcl sweep`, in folders below --out, and the same command resumes. After every run the command
rewrites claims.json (every number with its run folder and its path in results.json), claims.md, index.html, and the
table.md and table.json of the sweep.

The rule, stated before any run. A claim is a difference, method minus baseline, in one measure, taken seed by seed. The
two-sided 90 % interval of its mean by Student's t decides: "seen" if it lies wholly on the claimed side of 0,
"opposite" if it lies wholly on the other side, "not seen" if it contains 0, "not measured" with fewer than two pairs.
About one in twenty claims that are not true will be seen by chance.

The claims (method > or < baseline: measure; CLAIMS in methods.py has their texts):

    excon > supcon: linear (ExCon, abstract)
    excon < supcon: drop (ExCon, abstract)
    excon > supcon: increase (ExCon, abstract)
    excon > supcon: iou (ExCon, abstract)
    excon > supcon: fgsm (ExCon, abstract)
    excon < supcon: ece_shifted (ExCon, abstract)
    excon < supcon: ece_fgsm (ExCon, abstract)
    simclr_clae > simclr: linear (CLAE, abstract)
    simclr_clae > simclr: knn (CLAE, abstract)
    plain_clae > plain: linear (CLAE, abstract)
    plain_clae > plain: knn (CLAE, abstract)
    uel_clae > uel: linear (CLAE, abstract)
    uel_clae > uel: knn (CLAE, abstract)
    l_spread > attract: coarse_to_fine (Thanos, README)
    attract_auto > attract: coarse_to_fine (Thanos, README)
    thanos > attract: coarse_to_fine (Thanos, abstract)
    thanos > l_spread: coarse_to_fine (Thanos, README)
    thanos > attract_auto: coarse_to_fine (Thanos, README)
    l_spread > attract: worst_group_dro (Thanos, The Details Matter, abstract)
    thanos > attract: worst_group_dro (Thanos, abstract)
    thanos > ce: groups (Thanos, a summary page)
    moco_patches > moco: linear (NS, README, main table)
    moco_patches > moco: shifted (NS, README, main table)
    moco_patches > moco: shape_bias (NS, README, main table)
    simclr_patches > simclr: linear (NS, README, main table)
    simclr_patches > simclr: shifted (NS, README, main table)
    simclr_patches > simclr: shape_bias (NS, README, main table)
    byol_patches > byol: linear (NS, README, main table)
    byol_patches > byol: shifted (NS, README, main table)
    byol_patches > byol: shape_bias (NS, README, main table)
    simsiam_ladder > simsiam: linear (Hierarchical, abstract)
    simsiam_ladder > simsiam: tint (Hierarchical, section 5.2)
    barlow_ladder > barlow: linear (Hierarchical, abstract)
    barlow_ladder > barlow: tint (Hierarchical, section 5.2)
"""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from jaxcl.commands.claims import table as claims_table
from jaxcl.commands.claims.methods import (
    BATCH,
    CLAIMS,
    COMMON,
    ESTIMATE,
    EXAMPLES,
    MEASURES,
    METHODS,
    SETTINGS,
    SOURCES,
)
from jaxcl.commands.claims.page import write_claims
from jaxcl.commands.claims.table import Result
from jaxcl.commands.sweep import main as sweep
from jaxcl.commands.sweep.runs import Run, plan
from jaxcl.errors import UserError
from jaxcl.report.metrics import read_metrics
from jaxcl.report.progress import duration
from jaxcl.runtime import storage
from jaxcl.runtime.durations import to_steps
from jaxcl.runtime.flags import Flags
from jaxcl.runtime.options import suggestion
from jaxcl.train import run_folder

FLAGS = Flags(__doc__)
FLAGS.text("methods", "", "Methods, separated by commas; their baselines are added. Default: all.")
FLAGS.number("seeds", 5, "Number of seeds, from 0.")
FLAGS.choice("source", "garments", SOURCES, "The data.")
FLAGS.text("budget", "2 epochs", "Length of every run, any duration.")
FLAGS.number("jobs", 2, "Runs at a time, which share the cores.")
FLAGS.texts("set", "KEY=VALUE for every run, as for jaxcl sweep; may be given several times.")
FLAGS.path("out", "", "A folder; default runs/claims, or runs/claims-smoke.")
FLAGS.switch("smoke", "Two methods, two seeds, a few updates of a tiny encoder.")

# What --smoke changes, so that everything runs although nothing is learned.
SMOKE_METHODS = ("attract", "l_spread")
SMOKE_SETTINGS = ("coarse",)
SMOKE = dict(
    [
        ("data.limit", "64"),
        ("batch_size", "16"),
        ("log_every", "2 steps"),
        ("model.stage_widths", "(4, 4, 8, 8)"),
        ("eval.knn_k", "20"),
    ]
)
SMOKE_BUDGET = "8 steps"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of the sweep, with its method and data setting."""

    run: Run
    method: str
    setting: str


def main(argv: list[str]) -> int:
    """Train, measure and judge; -> exit code. Raises: UserError before anything starts, or from a run; Preempted."""
    given = FLAGS.parse(argv)
    smoke, source = given.smoke, given.source
    chosen = _chosen(given.methods or (",".join(SMOKE_METHODS) if smoke else ""))
    seeds = 2 if smoke else given.seeds
    if seeds < 1 or given.jobs < 1:
        raise UserError(f"--seeds is {seeds} and --jobs {given.jobs}; expected 1 or more of each")
    out = pathlib.Path(given.out or ("runs/claims-smoke" if smoke else "runs/claims"))
    budget = SMOKE_BUDGET if smoke else given.budget
    sets = [f"{k}={v}" for k, v in SMOKE.items()] if smoke else []
    planned = plan_runs(
        chosen, source=source, seeds=seeds, budget=budget, sets=[*sets, *given.set], out=out, smoke=smoke
    )
    if smoke:  # most of its time is compilation
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    else:
        log_plan(planned, source, budget, given.jobs)
    # All seeds share the compiled programs.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").resolve()))
    about = dict(methods=chosen, source=source, budget=budget, smoke=smoke)
    judged = Claims(planned, out, about, command=shlex.join(["python", "-m", "jaxcl", "claims", *argv[1:]]))
    try:
        judged.run(given.jobs)
    finally:
        if any(e.state != "waiting" for e in judged.entries.values()):
            judged.write_table()
            sweep.logger.info("%s\n%s", claims_table.counts(judged.content()), out / "index.html")
    return 1 if any(e.state == "failed" for e in judged.entries.values()) else 0


def _chosen(text: str) -> list[str]:
    """The methods, their baselines and the baselines of their claims, in the order of METHODS."""
    words = [w.strip() for w in text.split(",") if w.strip()] or list(METHODS)
    for word in words:
        if word not in METHODS:
            raise UserError(f"--methods names {word!r}{suggestion(word, METHODS)}")
    wanted = {*words, *(METHODS[w].baseline for w in words), *(c.baseline for c in CLAIMS if c.method in words)}
    return [name for name in METHODS if name in wanted]


def plan_runs(
    methods: Sequence[str],
    *,
    source: str,
    seeds: int,
    budget: str,
    sets: Sequence[str],
    out: pathlib.Path,
    smoke: bool = False,
) -> list[Planned]:
    """Every run: all runs of one seed, then those of the next. Raises: UserError, as `sweep.runs.plan` does."""
    found = []
    given = {text.partition("=")[0] for text in sets}
    for name in methods:
        method = METHODS[name]
        for key in method.settings:
            setting = SETTINGS[key]
            if source not in setting.sources or (smoke and key not in SMOKE_SETTINGS):
                continue
            final = f"eval.final={setting.final!r}"
            own = [s for s in (f"duration={budget}", final, *COMMON, *method.sets) if s.partition("=")[0] not in given]
            runs = plan([method.argument(source)], grids=setting.grid, sets=[*own, *sets], seeds=range(seeds), out=out)
            found += [Planned(r, name, key) for r in runs]
    return sorted(found, key=lambda p: p.run.seed)


def log_plan(planned: Sequence[Planned], source: str, budget: str, jobs: int) -> None:
    """Log the number of runs and an estimate of their time."""
    seconds = estimate(planned, source, budget) / jobs
    time = f"about {duration(seconds)}, {jobs} at a time" if source == "garments" else "no estimate of the time"
    sweep.logger.info("%d runs of %s: %s", len(planned), budget, time)


def estimate(planned: Sequence[Planned], source: str, budget: str) -> float:
    """Seconds of one core for all runs, from the costs in `methods`."""
    per_epoch = EXAMPLES[source] // BATCH
    steps = to_steps(budget, name="--budget", steps_per_epoch=per_epoch, batch_size=BATCH)
    return sum(
        ESTIMATE["start"] + METHODS[p.method].cost * steps * ESTIMATE["update"] + ESTIMATE["evaluate"][p.setting]
        for p in planned
    )


class Claims(sweep.Sweep):
    """A sweep that is judged by `table` whenever its table is written."""

    def __init__(self, planned: Sequence[Planned], out: pathlib.Path, about: dict[str, Any], command: str):
        self.planned, self.about = planned, about
        paths = {claims_table.place(p.method, m) for p in planned for m in MEASURES}
        measures = dict.fromkeys(path for m in MEASURES.values() for path in (m.path,) if (m.setting, path) in paths)
        super().__init__([p.run for p in planned], out, list(measures), command)

    def results(self) -> list[Result]:
        """Every run with its results."""
        found = []
        for p in self.planned:
            entry, results = self.entries[p.run], None
            if entry.results is not None:
                results = claims_table.with_cost(entry.results, p.run.config["batch_size"], read_metrics(p.run.workdir))
            found.append(Result(p.method, p.setting, p.run.seed, entry.run, entry.state, results))
        return found

    def content(self) -> dict[str, Any]:
        """The content of claims.json."""
        judged = claims_table.table(self.results(), self.about["methods"], self.about["source"])
        return {
            "command": self.command,
            **self.origin(),
            "budget": self.about["budget"],
            "smoke": self.about["smoke"],
            **judged,
        }

    def write_table(self) -> str:
        """Also write claims.json, claims.md and index.html; -> the table of the sweep in Markdown."""
        table = super().write_table()
        content = self.content()
        run_folder.write_json(self.out / "claims.json", content)
        storage.write_whole(self.out / "claims.md", claims_table.markdown(content))
        write_claims(self.out, content)
        return table
