"""jaxcl and its peers in one table and one figure.

    python -m benchmarks.run                         # everything; needs pip install -e '.[bench]'
    python -m benchmarks.run --only=losses,augment   # some sections
    python -m benchmarks.run --store --write_docs    # stores the numbers of this version and writes docs/benchmarks.md
    python -m benchmarks.run --quick                 # toy sizes, to check that it works

Every contestant is a separate process with the same number of cores, which sleeps while the others run. A round asks
each of them in turn, so a machine that slows down slows all of them. Ratios are taken round by round, and their median
is printed. The table names peers that are not installed. It compares with the last release (benchmarks/releases):
speeds on the same machine, and ratios to peers on another machine. It runs on the CPU unless JAX_PLATFORMS names
another platform. Tables go to stdout.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jaxcl
from benchmarks import _measure, _table, _table_figure

# In the order of the table. A module that does not exist, or has no rows, is left out.
SECTIONS = {
    "losses": "benchmarks.losses",
    "augment": "benchmarks.augment",
    "explain": "benchmarks.explain",
    "steps": "benchmarks.torch_steps",
    "input": "benchmarks.loader",
    "knn": "benchmarks.knn",
    "startup": "benchmarks.startup",
}
PACKAGES = (
    *("jaxcl", "jax", "jaxlib", "numpy", "grain", "pillow", "optax", "torch", "torchvision", "pytorch-metric-learning"),
    *("kornia", "albumentations", "opencv-python-headless", "augmax", "dm-pix", "captum", "foolbox", "torchattacks"),
    *("scikit-learn", "tensorflow-datasets", "array-record"),
)
PAGE = _measure.ROOT / "docs" / "benchmarks.md"
FIGURE = _measure.ROOT / "docs" / "figures" / "benchmarks.png"
BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}; none: measure nothing")
    parser.add_argument("--rounds", type=int, help="default: 5, 2 with --quick")
    parser.add_argument("--seconds", type=float, help="least duration of a measurement; default: 0.5")
    parser.add_argument("--quick", action="store_true", help="toy sizes, for a check; the numbers have no meaning")
    parser.add_argument("--out", type=pathlib.Path, help="figure, .png or .svg")
    parser.add_argument("--store", action="store_true", help="store the numbers for this version")
    parser.add_argument("--write_docs", action="store_true", help="write the stored numbers into docs/benchmarks.md")
    options = parser.parse_args(argv)
    there = [name for name, module in SECTIONS.items() if _has_rows(module)]
    asked = there if options.only is None else [] if options.only == "none" else options.only.split(",")
    if unknown := set(asked) - set(there):
        parser.error(f"--only: {', '.join(sorted(unknown))}, expected some of {', '.join(there)}, or none")
    if options.quick and (options.store or options.write_docs):
        parser.error("--quick measures toy sizes; expected it without --store and --write_docs")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds={options.rounds}, expected at least 1")
    options.only = [name for name in there if name in asked]
    return options


def _has_rows(module: str) -> bool:
    # Reads the file instead of importing it, so that --help does not start JAX and torch.
    spec = importlib.util.find_spec(module)
    return spec is not None and "\ndef rows(" in pathlib.Path(spec.origin).read_text()


def measure(name: str, settings: _table.Settings) -> dict[str, Any]:
    """One section, with the date, commit and load of the measurement."""
    module = importlib.import_module(SECTIONS[name])
    load, date, at = os.getloadavg()[0], time.strftime("%Y-%m-%d"), commit()
    rows = module.rows(settings)
    return _table.section_of(
        rows,
        title=module.TITLE,
        note=module.NOTE,
        date=date,
        commit=at,
        rounds=settings.rounds,
        load=[load, os.getloadavg()[0]],
    )


def commit() -> str:
    """The present commit, with a plus if files have changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=_measure.ROOT
    )
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, str]:
    return _measure.machine(PACKAGES)


def described(words: Mapping[str, str]) -> str:
    return ", ".join(v if k == "processor" else f"{k} {v}" for k, v in words.items()) + "."


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    settings = _table.Settings(
        rounds=options.rounds or (2 if options.quick else 5),
        seconds=options.seconds or (0.01 if options.quick else 0.5),
        quick=options.quick,
        note=note,
    )
    here, release = machine(), _table.RELEASES / f"{jaxcl.__version__}.json"
    last = None if options.quick else _table.last_release()
    then = json.loads(last.read_text()) if last else None
    same = bool(then) and all(then["machine"].get(k) == here[k] for k in ("processor", "memory"))
    if options.store:
        _table.store(release, here, {})  # refuses another machine before anything is measured
    measured = {}
    for name in options.only:
        note(f"section {name}")
        measured[name] = measure(name, settings)
        if options.store:  # after each section, so that nothing is lost
            _table.store(release, here, {name: measured[name]})
    if measured:
        print(described(here) + "\n\n" + _table.text(measured, then and then["parts"], same))
    if then and measured:
        print(f"\nThe last release is {then['version']}: " + (_SAME if same else _OTHER))
    if options.out and measured:
        _table_figure.draw(measured, options.out)
    if options.write_docs:
        write_docs(release, PAGE, FIGURE)


_SAME = "measured on a machine like this one. The last column is the speed of each row now over its speed then."
_OTHER = (
    "measured on another machine, so speeds are not compared. The last column, in the rows of peers, is the ratio of "
    "jaxcl's speed to the peer's now over that ratio then."
)


def write_docs(release: pathlib.Path, page: pathlib.Path, figure: pathlib.Path) -> None:
    """Writes the table and the figure of a release between the two markers of the page. Errors: SystemExit."""
    if not release.exists():
        raise SystemExit(f"{release.name} is not stored; measure it with --store first")
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page}: expected one {BEGIN} and one {END} after it")
    stored = json.loads(release.read_text())
    parts = {name: stored["parts"][name] for name in SECTIONS if name in stored["parts"]}
    _table_figure.draw(parts, figure)
    link = pathlib.Path(os.path.relpath(figure, page.parent)).as_posix()
    body = f"![Speed of jaxcl relative to each peer]({link})\n\nVersion {stored['version']}. "
    body += described(stored["machine"]) + "\n\n" + _table.text(parts, None, True)
    page.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n\n{body}\n\n{END}{text.split(END)[1]}")


if __name__ == "__main__":
    main()
