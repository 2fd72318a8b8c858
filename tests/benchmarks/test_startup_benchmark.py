"""The start-up benchmark: its table, and a real process with pieces that add up to the total."""

import pytest
from processes import ROOT

from benchmarks import startup


def test_the_table(monkeypatch, capsys):
    asked = []

    def one(arguments, folder, name):
        asked.append((arguments, name))
        total = {"cold": 20.0, "warm": 5.0}[name] + len(asked)
        counts = {"compile_requests_use_cache": 2} | ({"cache_hits": 2} if name == "warm" else {})
        return {"total": total, "busy": 4.5, "parts": dict.fromkeys(startup.PARTS, 0.25), "counts": counts}

    monkeypatch.setattr(startup, "one", one)
    startup.main(["--config=configs/simclr.py:cifar10", "--rounds=3", "--config.batch_size=16"])
    lines = capsys.readouterr().out
    assert [n for _, n in asked] == ["cold", "warm"] * 3
    assert asked[0][0] == [f"--config={ROOT}/configs/simclr.py:cifar10", "--config.batch_size=16"]
    assert "command to first finished update                   23.00    9.00\n" in lines  # of 21, 23, 25 and 7, 9, 11
    assert "0 of 2  2 of 2" in lines and "21.00 to 25.00" in lines


@pytest.mark.slow
def test_a_real_process(tmp_path):
    tiny = ["model.stage_sizes=(1,)", "model.stage_widths=(8,)", "model.strides=(1,)", "batch_size=16", "data.limit=64"]
    arguments = [f"--config={ROOT}/configs/supcon.py", *(f"--config.{o}" for o in tiny)]
    cold, warm = (startup.one(arguments, str(tmp_path), n) for n in ("cold", "warm"))
    for found in (cold, warm):
        assert sum(found["parts"].values()) == pytest.approx(found["total"])
        assert all(v > 0 for v in found["parts"].values()), found
    assert not cold["counts"].get("cache_hits")
    assert warm["counts"]["cache_hits"] == warm["counts"]["compile_requests_use_cache"]
