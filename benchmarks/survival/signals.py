"""Requests to end, once and twice, while a run starts, compiles, trains, saves, evaluates and writes its report."""

from collections.abc import Iterator

from benchmarks.survival.lab import Lab, steps_of, told, training
from benchmarks.survival.registry import BADLY, LOST, WELL, Trial, fault

NAMES = ("TERM", "INT", "HUP")
# Before a run looks out for signals, they end it as they end any process, and Ctrl-C in one line.
RAW = {"TERM": 143, "INT": 130, "HUP": 129}
PHASES = {
    "the start": ("import", r"^jaxcl\.train\.loop$"),
    "the claim of the folder": ("open", r"/config\.json\..*tmp$"),
    "the compilation": ("import", r"^jax\._src\.compiler$|^tensorboardX\.event_file_writer$"),
    "training": ("open", r"/checkpoints/8/manifest\.json\..*tmp$"),
    "a save": ("os.mkdir", r"/checkpoints/12\b"),
    "the last save": ("os.mkdir", r"/checkpoints/24\b"),
    "the evaluation": ("open", r"/checkpoints/24/manifest\.json\..*tmp$"),
    "results.json": ("open", r"/results\.json\..*tmp$"),
}


def ask(lab: Lab, phase: str, names: str, *more: str) -> Trial:
    """Send signals in a phase, then continue the run."""
    event, name = PHASES[phase]
    what, work = f"{names} during {phase}", lab.place("signal")
    ended = lab.run(training(work, *more), at={"event": event, "name": name, "do": names})
    first = names.split()[0]
    codes = [75]
    if not work.exists() or phase == "the start":
        codes.append(RAW[first])
    if phase in ("the evaluation", "results.json", "the last save"):
        codes.append(0)  # it came too late
    raw = ended.code == RAW[first] and first != "INT"
    wrong = (f"a traceback: {ended.error[-200:]}" if "Traceback" in ended.error else "") if raw else told(ended, *codes)
    if raw and RAW[first] not in codes:
        wrong = f"exit code {ended.code}"
    if phase in ("training", "a save") and " " not in names and not steps_of(work):
        return Trial(what, LOST, "nothing was saved")
    lost = lab.nothing_lost(work, lab.done)
    return Trial(what, LOST if lost else BADLY if wrong else WELL, lost or wrong)


def _register(phase: str) -> None:
    @fault(f"signal:{phase}", f"TERM, INT and HUP, once and twice, during {phase}")
    def tries(lab: Lab, rounds: int) -> Iterator[Trial]:
        for name in NAMES:
            yield ask(lab, phase, name)
        for names in ("TERM TERM", "INT INT"):
            yield ask(lab, phase, names)


for _phase in PHASES:
    _register(_phase)


@fault("signal:report", "TERM, INT and HUP while the report is written")
def report(lab: Lab, rounds: int) -> Iterator[Trial]:
    for names in (*NAMES, "TERM TERM"):
        work = lab.place("signal")
        command = training(work, "--config.report=True")
        ended = lab.run(command, at={"event": "os.mkdir", "name": r"/report$", "do": names})
        wrong = told(ended, 75)
        ended = lab.quick(command)
        lost = f"exit code {ended.code}: {ended.error[-200:]}" if ended.code else lab.same_end(work)
        if not lost and not (work / "report" / "index.html").is_file():
            lost = "no page"
        yield Trial(f"{names} during the report", LOST if lost else BADLY if wrong else WELL, lost or wrong)
