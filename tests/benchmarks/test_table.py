"""The table of benchmarks.run: ratios, floors, releases and comparisons by hand, and one section in toy sizes."""

import json
import unittest.mock

import jax.numpy as jnp
import pytest

from benchmarks import _floor, _paired, _table, run
from benchmarks._table import Row, Settings
from benchmarks._task import Contestant, NotApplicable, Ready

HERE = {"processor": "2 cores of A", "memory": "8 GiB"}


def section(*rows, title="Speed"):
    return _table.section_of(rows, title=title, note="", date="2026-01-01", commit="abc", rounds=3, load=[0.0, 1.0])


def test_ratios_are_taken_round_by_round():
    ours = Row("t", "jaxcl", "images/s", (10.0, 1.0, 10.0), ours=True)
    rate = Row("t", "peer", "images/s", (5.0, 0.1, 5.0))
    assert _table.ahead(rate, [ours, rate]) == 2  # medians of the values would give the same, means would not
    assert _table.times_as_fast(ours, rate) == [2, 10, 2]
    time_ours, time = Row("t", "jaxcl", "ms", (1.0, 2.0, 4.0), ours=True), Row("t", "peer", "ms", (3.0, 2.0, 12.0))
    assert _table.ahead(time, [time, time_ours]) == 3
    assert _table.ahead(time_ours, [time, time_ours]) is None
    absent = Row("t", "other", "ms", left_out="other is not installed")
    assert _table.ahead(absent, [time_ours, absent]) is None
    text = _table.text({"speed": section(time_ours, time, absent)}, None, True)
    assert "| t | **jaxcl** | 2.00 ms |  |  |" in text
    assert "|  | peer | 3.00 ms | 3.00 | 1.00 to 3.00 |" in text
    assert "|  | other | other is not installed |  |  |" in text


def test_floors():
    # 60 FLOPs at 10 a second are 6 s, 8 bytes at 2 a second 4 s; in the second round the other way round.
    ours = Row("t", "jaxcl", "s", (12.0, 40.0), ours=True, needs=(60, 8), peaks=((10, 2), (30, 0.4)))
    peer = Row("t", "peer", "s", (6.0, 60.0))
    assert _table.floors(ours) == (6, 20) and _table.floors(peer) == ()
    assert [_table.over_floor(row, [ours, peer]) for row in (ours, peer)] == [2, 2]  # of the rounds 1 and 3
    rate = Row("u", "jaxcl", "queries/s", (2.0,), ours=True, needs=(0, 500e3), peaks=((1, 2e6),))
    assert _table.floors(rate) == (4,) and _table.over_floor(rate, [rate]) == 2
    startup = Row("v", "jaxcl", "s", (1.0,), ours=True)
    assert _table.over_floor(startup, [startup]) is None
    entries = section(ours, peer, rate, startup)
    text = _table.text({"speed": entries}, None, True)
    assert "|  | peer | 33.0 s | 1.00 | 0.50 to 1.50 | 2.00 |" in text
    assert "| t | 60 FLOP, 8 B for a call | 20 FLOP/s, 1 B/s | memory | 13.0 s |" in text
    assert "| u | 0 FLOP, 500 kB for a query | 1 FLOP/s, 2.00 MB/s | memory | 4.00 queries/s |" in text
    assert _table.rows_of(json.loads(json.dumps(entries))) == [ours, peer, rate, startup]


def test_needs_of_a_network():
    counted = _floor.of_program(lambda a, b: jnp.tanh(a @ b) @ b, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert counted.flops == 2 * 2 * 4 * 8 * 8 and counted.bytes >= 4 * (4 * 8 * 3 + 2 * 8 * 8)
    assert _floor.total([counted, counted]).flops == 2 * counted.flops
    for kind, work in ((_floor.PRODUCTS, 2 * 16**3), (_floor.MEMORY, 8 * 64)):
        with unittest.mock.patch.multiple(_floor, SIDE=16, LENGTH=64):
            ready = _floor.prepare(kind)
            ready.run(), ready.run()
            assert ready.work == work


def test_the_last_release():
    before = [Row("t", "jaxcl", "ms", (2.0, 2.0), ours=True), Row("t", "peer", "ms", (4.0, 4.0))]
    now = [Row("t", "jaxcl", "ms", (1.0, 1.0), ours=True), Row("t", "peer", "ms", (3.0, 3.0))]
    old = {(row.task, row.contestant): row for row in before}
    assert [_table.to_last(row, now, old, True) for row in now] == [2, pytest.approx(4 / 3)]
    assert [_table.to_last(row, now, old, False) for row in now] == [None, 1.5]  # 3 times as fast, then 2
    new = Row("another", "jaxcl", "ms", (1.0,), ours=True)
    assert _table.to_last(new, [new], old, True) is None
    assert "| 3.00 ms | 3.00 | 3.00 to 3.00 | 1.33 |" in _table.text(
        {"p": section(*now)}, {"p": section(*before)}, True
    )


def test_releases_are_stored_section_by_section(tmp_path):
    row = Row("t", "jaxcl", "ms", (1.0,), ours=True)
    _table.store(tmp_path / "0.9.0.json", HERE, {"a": section(row), "b": section(row)})
    _table.store(tmp_path / "0.10.0.json", HERE, {"a": section(row)})
    _table.store(tmp_path / "0.10.0.json", HERE, {"b": section(row, row), "a": section(row, title="again")})
    assert _table.last_release(tmp_path).name == "0.10.0.json"  # not the last in alphabetical order
    stored = json.loads((tmp_path / "0.10.0.json").read_text())
    assert stored["parts"]["a"]["title"] == "again" and _table.rows_of(stored["parts"]["b"]) == [row, row]
    with pytest.raises(SystemExit, match="0.10.0.json.*memory, torch"):
        _table.store(tmp_path / "0.10.0.json", HERE | {"memory": "9 GiB", "torch": "3"}, {"a": section(row)})
    assert _table.last_release(tmp_path / "none") is None


def prepare(contestant, *, answers):
    """The work of the processes in the next test."""
    if contestant == "cannot":
        raise NotApplicable("would need 18 GiB")
    if contestant == "broken":
        raise RuntimeError("no such operator\nsecond line")
    print("a library that talks")
    total = []
    return Ready(lambda: total.append(sum(range(20_000))), 3, answers[contestant])


def test_contestants_in_processes():
    contestants = (
        Contestant("ours", "jaxcl", ours=True),
        Contestant("peer", "a peer", differs="slowly"),
        Contestant("cannot", "a large one"),
        Contestant("broken", "a broken one"),
        Contestant("absent", "an absent one", package="no-such-package"),
    )
    answers = {"ours": [1.0, 2.0], "peer": [1.0, 2.00001]}
    settings, where = Settings(rounds=3, seconds=0.005), "tests.benchmarks.test_table"
    options = dict(arguments={"answers": answers}, unit="images/s", cores=1)
    rows = _paired.rows(where, "t", contestants, settings, **options)
    assert [len(row.values) for row in rows] == [3, 3, 0, 0, 0] and min(rows[0].values) > 0
    assert [row.left_out for row in rows] == [
        *("", "", "would need 18 GiB", "failed: RuntimeError: no such operator", "no-such-package is not installed")
    ]
    assert rows[1].differs == "slowly" and rows[0].ours and not rows[1].ours
    with pytest.raises(SystemExit, match="t: peer and ours .*4.5e-06"):
        _paired.rows(where, "t", contestants[:2], settings, **options, tolerance=1e-6)
    with pytest.raises(SystemExit, match="t: jaxcl: failed"):  # our contestant must not fail
        _paired.rows(where, "t", [Contestant("broken", "jaxcl", ours=True)], settings, **options)


def test_whole_command_on_one_section(tmp_path, capsys):
    run.main(["--quick", "--only=knn", "--rounds=1", f"--out={tmp_path}/figure.png"])
    out = capsys.readouterr().out
    assert "### Nearest neighbours" in out and "| 64 queries in 500 rows of 8 | **jaxcl** |" in out
    assert "scikit-learn: KNeighborsClassifier, brute force" in out and "cores of" in out
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_page_is_written_from_what_is_stored(tmp_path):
    release, page, figure = (tmp_path / name for name in ("0.1.0.json", "page.md", "figure.png"))
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    with pytest.raises(SystemExit, match="0.1.0.json"):
        run.write_docs(release, page, figure)
    rows = Row("t", "jaxcl", "ms", (1.0, 1.5), ours=True), Row("t", "peer", "ms", (0.5, 0.5))
    _table.store(release, HERE, {"knn": section(*rows), "losses": section(*rows, title="First")})
    run.write_docs(release, page, figure)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.index("### First") < text.index("### Speed") and "](figure.png)" in text and figure.exists()


def test_options():
    assert run.parse([]).only == [name for name in run.SECTIONS if name in run.parse([]).only]
    assert {"losses", "augment", "explain", "input", "knn"} <= set(run.parse([]).only)
    assert run.parse(["--only=none"]).only == []
    for bad in (["--only=sinkhorn"], ["--quick", "--store"], ["--rounds=0"]):
        with pytest.raises(SystemExit):
            run.parse(bad)
