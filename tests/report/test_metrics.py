"""The record of a run survives kills and resumes, and stays valid JSON; the progress line is true."""

import io
import json
import math

import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.report import MetricsWriter, Progress, read_metrics
from jaxcl.report.progress import duration


def _strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_lines_are_json_and_read_back(tmp_path):
    with MetricsWriter(tmp_path / "run", tensorboard=False) as writer:
        writer.write(1, {"loss": np.float32(0.1), "loss/supcon": np.array([2.5]), "n": 3}, epoch=0)
        writer.write(2, {"loss": math.nan, "up": math.inf, "down": -math.inf}, note=[np.float32("nan"), None])
        text = (tmp_path / "run" / "metrics.jsonl").read_text()  # flushed before close
    lines = _strict(text)
    assert lines[0]["loss"] == 0.1 and lines[0]["loss/supcon"] == 2.5 and lines[0]["epoch"] == 0
    assert lines[1]["loss"] == "nan" and lines[1]["note"] == ["nan", None]
    rows = read_metrics(tmp_path / "run")
    assert [r["step"] for r in rows] == [1, 2]
    assert math.isnan(rows[1]["loss"]) and rows[1]["up"] == math.inf and rows[1]["down"] == -math.inf
    assert rows[0]["time"] <= rows[1]["time"]


def test_float32_survives_exactly(tmp_path):
    values = np.random.default_rng(0).lognormal(0, 20, 200).astype(np.float32)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for i, v in enumerate(values):
            writer.write(i, {"v": v})
    assert np.array_equal(np.array([r["v"] for r in read_metrics(tmp_path)], np.float32), values)


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "loss": 0.', b'{"step": 9}', b"\xff\xfe\x00", b"3"])
def test_resume_drops_replayed_and_torn_lines(tmp_path, torn):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 9):
            writer.write(step, {"loss": 1.0 / step, "bad": math.nan})
    path = tmp_path / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:5]
    with open(path, "ab") as f:
        f.write(torn)
    with MetricsWriter(tmp_path, tensorboard=False, first_step=5) as writer:
        assert path.read_bytes() == b"".join(kept)
        for step in range(6, 11):
            writer.write(step, {"loss": 0.0})
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, 11))
    assert rows[4]["loss"] == 0.2 and rows[5]["loss"] == 0.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    _strict(path.read_text())


def test_torn_line_is_skipped_when_reading_and_fresh_start_forgets(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]
    MetricsWriter(tmp_path, tensorboard=False).close()
    assert read_metrics(tmp_path) == [] and read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    "odd",
    [
        b'{"name": "left-pad"}\n',
        b'{"name": "left-pad"}',
        b"\x80\xff" * 9,
        b"[" * 100_000,
        b"[1, 2]\n",
        b'{"step": "one"}\n',
    ],
)
def test_what_is_no_record_is_kept(tmp_path, odd, caplog):
    """Cases C.9: another program's file, or a damaged one, is not overwritten."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(odd)
    with caplog.at_level("WARNING", logger="jaxcl"), MetricsWriter(tmp_path, tensorboard=False, first_step=3) as writer:
        writer.write(4, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == [4]
    (kept,) = [p for p in tmp_path.iterdir() if p != path]
    assert kept.read_bytes() == odd
    (record,) = caplog.records
    assert kept.name in record.getMessage() and "\n" not in record.getMessage()


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl"):
        MetricsWriter(tmp_path, tensorboard=False, first_step=3)


def test_refuses_what_is_not_a_metric(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
        writer.write(1, {"loss": np.zeros(2)})
    with pytest.raises(ValueError, match="time"):
        writer.write(1, {"time": 1.0})
    with pytest.raises(ValueError, match="epoch"):
        writer.write(1, {"epoch": 1.0}, epoch=1)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == []  # nothing half-written


def test_tensorboard_has_names_steps_and_values(tmp_path):
    for first, steps in ((0, range(1, 5)), (2, range(3, 6))):
        with MetricsWriter(tmp_path, first_step=first) as writer:
            for step in steps:
                writer.write(step, {"saliency/accepted": step / 8, "bad": math.nan})
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert files and b"saliency/accepted" in b"".join(f.read_bytes() for f in files)
    record = [e for f in files for e in _events(f)]
    scalars = [(e.step, v.tag, v.simple_value) for e in record for v in e.summary.value]
    assert (4, "saliency/accepted", 0.5) in scalars and all(tag != "bad" for _, tag, _ in scalars)
    assert 3 in [e.step for e in record if e.HasField("session_log")]  # the resumed part purges from step 3


def _events(path):
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:  # TFRecord: length (8), its checksum (4), the event, its checksum (4)
        n = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + n])
        data = data[16 + n :]


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_are_few_and_true():
    clock, out = _Clock(), io.StringIO()
    progress = Progress(800, unit_images=128, stream=out, clock=clock)
    clock.now += 60.0  # compile
    for step in range(1, 801):
        progress.update(step, loss=3.2141, data_wait=0.004)
        clock.now += 0.125
    progress.close()
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 11  # the first, one in ten seconds, the last
    assert lines[0] == "step 1/800 0% | loss 3.21 | data wait 0.4%"
    assert lines[1] == "step 81/800 10% | loss 3.21 | 1,024 images/s | data wait 0.4% | 1 min 30 s left"
    assert lines[-1] == "step 800/800 100% | loss 3.21 | 1,024 images/s | data wait 0.4%"


def test_speed_is_recent_and_leaves_out_compile_and_pauses():
    clock = _Clock()
    progress = Progress(1000, initial=500, unit_images=10, stream=io.StringIO(), clock=clock)
    assert math.isnan(progress.images_per_second)
    clock.now += 30
    progress.update(510)
    assert math.isnan(progress.images_per_second)
    clock.now += 5
    progress.update(520)
    assert progress.images_per_second == pytest.approx(20)
    with progress.paused():
        clock.now += 1000
    clock.now += 5
    progress.update(530)
    assert progress.images_per_second == pytest.approx(20)
    assert progress.seconds_left == pytest.approx(470 / 2)
    for step in range(531, 600):  # it speeds up: half a minute later the old pace is forgotten
        clock.now += 0.5
        progress.update(step)
    assert progress.images_per_second == pytest.approx(20)
    for step in range(600, 900, 5):
        clock.now += 1.0
        progress.update(step)
    assert progress.images_per_second == pytest.approx(50)


def test_close_shows_the_update_an_interrupted_run_ended_on():
    clock, out = _Clock(), io.StringIO()
    with Progress(100, unit_images=1, stream=out, clock=clock) as progress:
        progress.update(1, loss=math.nan)
        progress.update(2, loss=12345.6)
    assert out.getvalue().splitlines()[0].endswith("loss nan")
    assert out.getvalue().splitlines()[1].startswith("step 2/100 2% | loss 12,346")


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock, out = _Clock(), Terminal()
    with Progress(4, initial=1, unit_images=8, stream=out, clock=clock) as progress:
        for step in (2, 3, 4):
            clock.now += 1
            progress.update(step, loss=1.5)
    text = out.getvalue()
    assert "4/4" in text and "loss 1.5" in text and "8 images/s" in text and "100%" in text


def test_duration():
    said = [duration(s) for s in (0, 3.14, 42, 110, 3599.6, 3600, 7384, 90000, math.nan)]
    assert said == [
        "0 s",
        "3.1 s",
        "42 s",
        "1 min 50 s",
        "1 h 0 min",
        "1 h 0 min",
        "2 h 3 min",
        "1 d 1 h",
        "unknown",
    ]
