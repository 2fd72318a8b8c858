"""The papers' claims, side by side under one protocol: `python -m jaxcl claims [--seeds=5] [--source=garments] ...`.

    python -m jaxcl claims --seeds=3                          all methods on garments; 1 h 13 min on two cores
    python -m jaxcl claims --methods=supcon,excon --seeds=5   two of them
    python -m jaxcl claims --smoke                            that it works, in half a minute; its numbers say nothing
    python -m jaxcl claims --source=cifar10 --set=data.source=npz:cifar10.npz --methods=supcon,excon

Every method and its baseline are trained under one budget (same data, epochs and encoder; views, loss and optimiser
are those of the shipped config) and the last state is measured on the test split. Nothing is tuned or selected here.
There are up to three runs of a method and a seed: on the fine classes; on the coarse ones (encoders that see no labels
need no run for that); and on coarse classes whose background follows the fine class, for the worst group and shape
bias. `claims_list` says which of them a method has.

Runs are those of `jaxcl sweep`, in folders of their own below --out: the same command goes on where it stopped.
After every run are written anew: claims.json (every number with its run folder and its path in results.json),
claims.md, index.html, and the sweep's own table.md and table.json.

The rule, stated before any run. A claim is a difference, method minus baseline, in one measure, taken seed by seed. The
two-sided 90 % interval of its mean by Student's t decides: "seen" if it lies wholly on the claimed side of 0,
"opposite" if wholly on the other, "not seen" if it holds 0, "not measured" with fewer than two pairs. Of claims that
are not true about one in twenty will be seen by chance.

The claims (method > or < baseline: measure; `claims_list.CLAIMS` has their words):

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

from absl import flags

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
from jaxcl.commands.claims.table import Result
from jaxcl.commands.sweep import main as sweep
from jaxcl.commands.sweep.runs import Run, plan
from jaxcl.errors import UserError
from jaxcl.report.metrics import read_metrics
from jaxcl.report.progress import duration
from jaxcl.runtime import flags as command_line
from jaxcl.runtime.durations import to_steps
from jaxcl.runtime.options import suggestion
from jaxcl.train import run_folder

_FLAGS = flags.FlagValues()
_own = dict(flag_values=_FLAGS)
_METHODS = flags.DEFINE_string("methods", "", "Comma-separated; their baselines come with them. Default: all.", **_own)
_SEEDS = flags.DEFINE_integer("seeds", 5, "How many, from 0.", **_own)
_SOURCE = flags.DEFINE_enum("source", "garments", SOURCES, "The data.", **_own)
_BUDGET = flags.DEFINE_string("budget", "2 epochs", "Of every run, any duration.", **_own)
_JOBS = flags.DEFINE_integer("jobs", 2, "Runs at a time; each gets its share of the cores.", **_own)
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE for every run, as of jaxcl.commands.sweep.main.", **_own)
_OUT = flags.DEFINE_string("out", "", "A folder; default runs/claims, or runs/claims-smoke.", **_own)
_SMOKE = flags.DEFINE_bool("smoke", False, "Two methods, two seeds, a few updates of a tiny encoder.", **_own)

# What --smoke changes: that all of it runs, not that anything is learned.
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
    """A run of the sweep, and what it is here."""

    run: Run
    method: str
    setting: str


def run(argv: list[str]) -> int:
    """Train, measure and judge; -> exit code. Errors: UserError before anything starts, or of a run; Preempted."""
    _FLAGS.unparse_flags()
    command_line.parse(argv, _FLAGS)
    smoke, source = _SMOKE.value, _SOURCE.value
    chosen = _chosen(_METHODS.value or (",".join(SMOKE_METHODS) if smoke else ""))
    seeds = 2 if smoke else _SEEDS.value
    if seeds < 1 or _JOBS.value < 1:
        raise UserError(f"--seeds is {seeds} and --jobs {_JOBS.value}; expected 1 or more of each")
    out = pathlib.Path(_OUT.value or ("runs/claims-smoke" if smoke else "runs/claims"))
    budget = SMOKE_BUDGET if smoke else _BUDGET.value
    sets = [f"{k}={v}" for k, v in SMOKE.items()] if smoke else []
    planned = plan_runs(
        chosen, source=source, seeds=seeds, budget=budget, sets=[*sets, *_SET.value], out=out, smoke=smoke
    )
    if smoke:  # where compiling is most of the time
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    else:
        say_plan(planned, source, budget, _JOBS.value)
    # A program compiled for one seed serves the next.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((out / "compiled").resolve()))
    about = dict(methods=chosen, source=source, budget=budget, smoke=smoke)
    judged = Claims(planned, out, about, command=shlex.join(["python", "-m", "jaxcl.commands.claims.main", *argv[1:]]))
    try:
        judged.run(_JOBS.value)
    finally:
        if any(e.state != "waiting" for e in judged.entries.values()):
            judged.write_table()
            sweep.logger.info("%s\n%s", claims_table.counts(judged.content()), out / "index.html")
    return 1 if any(e.state == "failed" for e in judged.entries.values()) else 0


def _chosen(text: str) -> list[str]:
    """Methods and their baselines, and what they are claimed to be better than, in the order of METHODS."""
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
    """Every run, all of one seed before those of the next. Errors: UserError as of `sweep_plan.plan`."""
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


def say_plan(planned: Sequence[Planned], source: str, budget: str, jobs: int) -> None:
    """How long it will take, by counting."""
    seconds = estimate(planned, source, budget) / jobs
    said = f"about {duration(seconds)} with {jobs} at a time, a quiet core each" if source == "garments" else "untimed"
    sweep.logger.info("%d runs of %s: %s", len(planned), budget, said)


def estimate(planned: Sequence[Planned], source: str, budget: str) -> float:
    """Seconds of one core for all runs, from the counts of `claims_list`."""
    per_epoch = EXAMPLES[source] // BATCH
    steps = to_steps(budget, name="--budget", steps_per_epoch=per_epoch, batch_size=BATCH)
    return sum(
        ESTIMATE["start"] + METHODS[p.method].cost * steps * ESTIMATE["update"] + ESTIMATE["evaluate"][p.setting]
        for p in planned
    )


class Claims(sweep.Sweep):
    """A sweep that is judged by `claims_table` whenever its table is written."""

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
        """What claims.json holds."""
        judged = claims_table.table(self.results(), self.about["methods"], self.about["source"])
        return {
            "command": self.command,
            **self.origin(),
            "budget": self.about["budget"],
            "smoke": self.about["smoke"],
            **judged,
        }

    def write_table(self) -> str:
        """Also claims.json, claims.md and index.html; -> the sweep's table in Markdown."""
        table = super().write_table()
        content = self.content()
        run_folder.write_json(self.out / "claims.json", content)
        temporary = self.out / "claims.md.tmp"
        temporary.write_text(claims_table.markdown(content), encoding="utf-8")
        os.replace(temporary, self.out / "claims.md")
        from jaxcl.commands.claims.page import write_claims  # matplotlib, which a sweep does without

        write_claims(self.out, content)
        return table


def cli() -> None:
    """Exit codes as those of jaxcl.commands.sweep.main."""
    command_line.leave(run)


if __name__ == "__main__":
    cli()
