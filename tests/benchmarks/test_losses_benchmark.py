"""The benchmark of losses at toy sizes: it runs, reports, resumes, and refuses results that do not agree."""

import json
import mmap

import numpy as np
import pytest

from benchmarks import _contestants, _measure, _report, losses
from jaxcl.losses import limits

ONLY = "matmuls,plain,supcon_tiled,supcon_auto,nt_xent_tiled,optax_ntxent"


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is measured in one process per contestant, which takes seconds each; here it is invented."""
    asked = []

    def memory_of(contestant, options, cache):
        asked.append(contestant.key)
        failed = "exit code 1: killed" if contestant.key == "optax_ntxent" else ""
        return {"resident": {"64": 2**20} | ({} if failed else {"128": 2**22}), "failed": failed}

    monkeypatch.setattr(losses, "memory_of", memory_of)
    return asked


def test_whole_command(tmp_path, capsys, monkeypatch, no_processes):
    monkeypatch.setattr(_contestants, "RATE_SIZE", 128)
    monkeypatch.setattr(losses, "release", lambda: None)  # later tests keep their compiled programs
    saved, figure, page = tmp_path / "losses.json", tmp_path / "losses.svg", tmp_path / "losses.md"
    # With the usual limits, "auto" would not tile such a small batch.
    arguments = ["--sizes=64,128", "--dim=16", "--rounds=2", "--peers=optax", f"--only={ONLY}"]
    with limits(dense_logits=0):
        losses.main([*arguments, f"--save={saved}", f"--out={figure}"])
    out = capsys.readouterr().out

    state = json.loads(saved.read_text())
    assert set(state["sizes"]) == {"64", "128"}
    for rows, measured in state["sizes"].items():
        # matmuls are not a loss; supcon has three contestants, nt_xent has two if both ran
        assert set(measured["agreement"]) == ({"supcon", "nt_xent"} if rows == "64" else {"supcon"})
        assert max(measured["agreement"].values()) <= losses.TOLERANCE
        assert measured["entries"]["supcon_auto"]["same_as"] == "supcon_tiled"
        assert len(measured["entries"]["plain"]["seconds"]) == len(measured["rate"]) == 2
    assert "failed above 64 rows: exit code 1: killed" in out
    assert "supcon_auto" not in no_processes
    assert "| 64 | jaxcl supcon, tiled |" in out and "4.00 MiB / " in out
    assert figure.read_text().startswith("<?xml")

    # A second call measures nothing and prints the same tables.
    no_processes.clear()
    monkeypatch.setattr(losses, "measure_times", None)
    losses.main([*arguments, f"--save={saved}"])
    again = capsys.readouterr().out
    assert no_processes == [] and again.split("**Time**")[1] == out.split("**Time**")[1]
    with pytest.raises(SystemExit, match="losses.json"):
        losses.main([*arguments, "--rounds=3", f"--save={saved}"])

    names = {c.key: c.name for c in _contestants.CONTESTANTS if c.key in state["settings"]["contestants"]}
    page.write_text(f"before\n{_report.BEGIN}\nold\n{_report.END}\nafter\n")
    _report.write_docs(state, names, page)
    _report.write_docs(state, names, page, figure)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("**Memory**") == 1 and "](losses.svg)" in text


def test_contestants_that_do_not_agree_end_the_run():
    one = (1.0, np.ones((4, 2), np.float32))
    groups = {"a": "supcon", "b": "supcon", "c": "nt_xent"}
    worst = losses.check_agreement(4, {"a": one, "b": (1.00001, one[1]), "c": (7.0, one[1])}, groups)
    assert worst == {"supcon": pytest.approx(1e-5, rel=1e-3)}
    for other in ((1.001, one[1]), (1.0, one[1] * 1.001), (float("nan"), one[1])):
        with pytest.raises(SystemExit, match="N=4: b and a "):
            losses.check_agreement(4, {"a": one, "b": other, "c": one}, groups)


def test_too_large_is_predicted_and_too_slow_is_remembered():
    options = losses.parse(["--sizes=64", "--slowest=1"])
    plain = next(c for c in _contestants.CONTESTANTS if c.key == "plain")
    measured = losses.measure_times(64, [plain], losses.parse(["--memory_budget=1KiB", "--rounds=1"]), {})
    assert measured["entries"]["plain"]["skipped"].startswith("would need ")
    assert measured["entries"]["plain"]["seconds"] == {}

    sizes = {"64": {"entries": {"a": {"seconds": {"0": 0.5}}, "b": {"seconds": {"0": 1.5}}, "c": {"seconds": {}}}}}
    assert losses.too_slow(sizes, options) == {"b": "over 1 s at 64 rows"}
    pml = next(c for c in _contestants.CONTESTANTS if c.key == "pml_ntxent")
    assert pml.prepare(_contestants.make_data(1024, 8), 2**33).run is None  # without importing torch


def test_options():
    assert losses.parse_sizes("256..2048") == [256, 512, 1024, 2048]
    assert losses.parse([]).sizes[-1] == 65536 and losses.parse([]).memory_budget == 2**33
    assert losses.parse(["--peers=none"]).peers == []
    assert _measure.parse_bytes("1.5MiB") == 1.5 * 2**20
    for bad in (["--sizes=3"], ["--memory_budget=8XB"], ["--peers=keras"], ["--only=sinkhorn"]):
        with pytest.raises(SystemExit):
            losses.parse(bad)


def test_ratios_are_taken_round_by_round():
    entries = {
        "a": {"seconds": {"0": 2.0, "1": 30.0, "2": 2.0}, "same_as": None},
        "b": {"seconds": {"0": 1.0, "1": 10.0}, "same_as": None},
        "c": {"seconds": {}, "same_as": "a"},
    }
    assert _report.ratio(entries, "a", entries["b"]["seconds"]) == pytest.approx(2.5)
    assert _report.ratio(entries, "c", entries["b"]["seconds"]) == pytest.approx(2.5)
    assert _report.ratio(entries, "a", {}) is None


def test_peak_counts_what_is_freed_again():
    def run():
        with mmap.mmap(-1, 2**24) as block:
            block.write(b"x" * 2**24)

    # Not exact, because the kernel may reclaim pages meanwhile.
    assert 0.8 * 2**24 <= _measure.peak_increase(run) < 3 * 2**24
