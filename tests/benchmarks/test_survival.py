"""Three of the fifty kills of `python -m benchmarks.survival`, and differences that it must find."""

import json
import shutil

import pytest

from benchmarks import survival


def test_three_kills(tmp_path):
    (leg,) = survival.survive(3, [2], tmp_path, seed=3, steps=24, moments=("step", "save"), say=lambda line: None)
    assert sum(leg.counts.values()) == 3 and leg.finished >= 1

    # A lost step, other examples, and another loss.
    for name, change in {
        "metrics.jsonl": lambda rows: rows[:-1],
        "examples.jsonl": lambda rows: [rows[0] | {"index": rows[0]["index"][::-1]}, *rows[1:]],
    }.items():
        other = shutil.copytree(tmp_path / "alone-2", tmp_path / f"other-{name}")
        rows = [json.loads(line) for line in (other / name).read_text().splitlines()]
        (other / name).write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
        with pytest.raises(survival.Unequal):
            survival.compare(other, tmp_path / "alone-2", exact=False)
    other = shutil.copytree(tmp_path / "alone-2", tmp_path / "other")
    text = (other / "metrics.jsonl").read_text()
    loss = json.loads(text.splitlines()[3])["loss"]
    (other / "metrics.jsonl").write_text(text.replace(f'"loss": {loss}', f'"loss": {loss * (1 + 1e-6)}'))
    with pytest.raises(survival.Unequal, match="1e-06"):
        survival.compare(other, tmp_path / "alone-2", exact=True)
