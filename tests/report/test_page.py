"""The page stands alone, says and escapes what it was given, and survives a panel that cannot be drawn."""

import base64
import csv
import html.parser
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from jaxcl.evaluate.duplicate_table import Row
from jaxcl.report import MetricsWriter, figures, read_metrics, style, verdict, write_report
from jaxcl.report import curves as curves_module
from jaxcl.report import similarities as similarities_module

EVIL = '<script>alert("x")</script>'


def _panels(n=12, classes=4):
    rng = np.random.default_rng(0)
    images = rng.random((n, 16, 16, 3)).astype(np.float32)
    labels = np.arange(n) % classes
    names = [EVIL, "$5 note", "a & b", "靴"]
    heat = rng.random((n, 16, 16))
    bins = {"count": [0, 5, 15], "accuracy": [np.nan, 0.4, 0.8], "confidence": [np.nan, 0.5, 0.9]}
    return {
        "views": {"images": {"view1": images, EVIL: (255 * images).astype(np.uint8)}, "labels": names * 3},
        "neighbours": {
            "queries": images[:2],
            "found": images[2:8].reshape(2, 3, 16, 16, 3),
            "cosine": heat[:2, 0, :3],
            "agree": None,
            "names": [EVIL, "$5 'note'"],
            "found_names": [[EVIL, "a", 'b"c']] * 2,
        },
        "map": {
            "features": {"continued": rng.normal(size=(n, 8)), EVIL: rng.normal(size=(n, 3))},
            "images": images,
            "names": [f"{EVIL}/{i}.jpg" for i in range(n)],
            "classes": names * 3,
            "groups": labels.tolist(),
        },
        "clusters": {"images": [images[:2], images[:3]], "names": [["a", EVIL], ["b"] * 3], "sizes": [9, 3], "more": 2},
        "odd": {"images": images[:3], "names": [EVIL, "b", "c"], "odd": heat[0, 0, :3]},
        "near_duplicates": {
            "images": [images[:2], images[:3]],
            "shown": [["a", EVIL], ["b", "c", "d/猫.png"]],
            "rows": [
                Row(1, "yes", "a", 30, 20, 900, 1.0, "a", ""),
                Row(1, "", EVIL, 15, 10, 0, 0.93, "a", "mirrored"),
                *(Row(2, "", name, 8, 8, 100, 0.9, "b", "") for name in ("b", "c", "d/猫.png")),
                Row(0, "", "e", 8, 8, 100, 0.8, "a", ""),
            ],
            "fit": "squash",
            "complete": True,
        },
        "saliency": {
            "image": images,
            "map": heat,
            "keep": heat > 0.5,
            "masked": images * (heat > 0.5)[..., None],
            "accepted": labels < 3,
            "true_mask": heat > 0.4,
            "names": names * 3,
        },
        "adversary": {
            "clean": images,
            "perturbation": 0.02 * (heat[..., None] - 0.5) * np.ones(3),
            "adversarial": images + 0.02,  # may leave [0, 1]
            "partner": images[::-1],
            "before": heat[:, 0, 0],
            "after": heat[:, 1, 1],
            "names": names * 3,
            "partner_names": names * 3,
        },
        "embedding": {"features": rng.normal(size=(n, 8)), "labels": labels, "class_names": names},
        "transfer": {
            "features": rng.normal(size=(n, 8)),
            "labels": labels,
            "coarse": labels // 2,
            "class_names": names,
            "coarse_names": [EVIL, "$5 more"],
        },
        "confusion": {"matrix": rng.integers(0, 9, (classes, classes)), "class_names": names},
        "reliability": {"clean": bins, EVIL: bins},
        "ood": {
            "In domain": {"value": 0.7},
            EVIL: {"value": 0.3},
            "Texture only": {"value": 0.2, "chance": 0.1, "lower": True},
            "Shape bias": {"value": float("nan"), "chance": 0.5},  # nothing was decided for either
        },
        "robustness": {
            "classifier, FGSM": {"1": {"accuracy": 0.5, "ece": 0.1}, "4": {"accuracy": 0.2, "ece": 0.3}},
            "linear probe, PGD-20": {"4": {"accuracy": 0.1, "ece": 0.4}},
        },
        "reliability_fgsm": {"FGSM 4/255": bins},
    }


_RESULTS = {
    "linear": {"accuracy": np.float32(0.75)},
    "raw_pixels": {"accuracy": 0.5},
    "knn": {"accuracy": 0.7},
    "explanation": {"average_drop": 0.25, "iou": 0.5},
    "calibration": {"clean": {"ece": 0.03}, "test_shifted": {"ece": 0.2}},
    "fgsm": {"1": {"accuracy": 0.6}, "4": {"accuracy": 0.21}},
    "linear_pgd": {"2": {"accuracy": 0.5}, "5": {"accuracy": 0.03}},
    "seconds": {"train": 60, "evaluate": 30},
    "seed": 3,
    "strange": {"note": EVIL, "list": [1, 2.5], "none": None, "long": list(range(99))},
    "command": f"python -m jaxcl.main --config={EVIL}",
}


class _Page(html.parser.HTMLParser):
    """Text and links of a page; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.titles, self.sections, self.text, self.open = [], [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sections += [value for name, value in attrs if name == "id" and tag == "section"]
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.titles += [value for name, value in attrs if name == "title"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in range(1, 60):
            writer.write(step, {"loss": 5 / step, "lr": 0.1, "probe/accuracy": 0.5, f"{EVIL}/x": 1.0})
    return write_report(
        workdir,
        config={"name": EVIL, "data": {"source": "folder:a/b"}, "lr": 0.5, "passes": (("view1", "view2"),)},
        environment={"packages": {"jax": "0.10"}, "devices": [EVIL]},
        results=_RESULTS,
        metrics=read_metrics(workdir),
        panels=_panels(),
        images={"training": 1500, "test": 80},
    )


def test_the_page_is_one_file(full):
    text = full.read_text(encoding="utf-8")
    page = _Page(text)
    assert full.name == "index.html" and full.parent.name == "report"
    assert page.tags.count("script") == 2 and "link" not in page.tags  # the map: its data, and what draws it
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest"))
    drawn = [name for name in page.sections if name != "map"]
    assert sorted(page.sections) == sorted(["curves", *_panels()])
    pictures = [f"{name}.png" for name in drawn]
    assert {p.name for p in full.parent.iterdir()} == {"index.html", "duplicates.csv", *pictures}
    for name, link in zip(pictures, page.links, strict=True):
        kind, _, content = link.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(content) == (full.parent / name).read_bytes()
    for name in pictures:
        pixels = imread(str(full.parent / name))
        assert 500 <= pixels.shape[1] <= 1640 and pixels[..., :3].std() > 0.02  # something is drawn


def test_what_the_owner_of_the_images_came_for_comes_first(tmp_path):
    panels = {k: v for k, v in _panels().items() if k in ("map", "clusters", "odd", "views", "near_duplicates")}
    panels["table"] = {"columns": ("file", "group"), "rows": [("a,b.png", 1), ('"c".png', 2)]}
    given = dict(config={}, environment={}, metrics=[], panels=panels)
    page = write_report(tmp_path, results={"neighbours": {"cosine": 0.5}}, **given)
    sections = _Page(page.read_text(encoding="utf-8")).sections
    assert sections[:4] == ["map", "clusters", "near_duplicates", "odd"] and sections[-1] == "views"
    text = page.read_text(encoding="utf-8")
    assert text.index('id="odd"') < text.index("table class=verdict") < text.index('id="views"')
    table = list(csv.reader(io.StringIO((page.parent / "images.csv").read_text())))
    assert table == [["file", "group"], ["a,b.png", "1"], ['"c".png', "2"]]
    text = write_report(tmp_path, results=_RESULTS, **given).read_text(encoding="utf-8")  # there are labels
    assert text.index("table class=verdict") < text.index('id="map"')


def test_page_escapes_everything_it_is_given(full):
    text = full.read_text(encoding="utf-8")
    assert f"<{EVIL[1:9]}alert" not in text and "alert(&quot;x&quot;)" in text
    page = _Page(text)
    for place in (f"--config={EVIL}", f"strange.note{EVIL}", f"devices{EVIL}"):
        assert place in page.text
    assert page.text.count(EVIL) >= 4
    table = list(csv.DictReader(io.StringIO((full.parent / "duplicates.csv").read_text(encoding="utf-8"))))
    assert [row["file"] for row in table] == ["a", EVIL, "b", "c", "d/猫.png", "e"]
    assert table[1] == {
        **dict(group="1", keep="", file=EVIL, width="15", height="10", bytes="", score="0.93", like="a"),
        "how": "mirrored",
    }
    assert table[5]["group"] == "" and "duplicates.csv" in page.text and "data.files.fit: squash" in page.text
    titles = page.titles
    assert EVIL in titles and f'b"c, cosine {_panels()["neighbours"]["cosine"][0, 2]:.3f}' in titles


def test_page_says_the_results(full):
    text = _Page(full.read_text(encoding="utf-8")).text
    assert "Trained on folder:a/b (1,500 training and 80 test images) with seed 3 in 1 min 30 s" in text
    assert "a linear probe reaches 75.0%" in text
    assert "25.0 points above raw pixels" in text
    assert "strange.list1, 2.5" in text and "strange.long(99 values, in results.json)" in text
    assert '"passes": [' in text and "packages.jax0.10" in text


def test_verdict_rows():
    rows = {row.name: row for row in verdict.rows(_RESULTS)}
    assert [row.name for row in verdict.rows({})] == []
    assert rows["ECE, clean"].value == "3.0%" and rows["ECE, shifted test"].value == "20.0%"
    assert rows["Average drop"].better == verdict.LOWER and rows["Mask overlap (IoU)"].better == verdict.HIGHER
    row = rows["Classifier under FGSM"]
    assert row.value == "21.0%" and "4/255" in row.meaning
    assert rows["Linear probe under PGD"].value == "3.0%"  # of the strength nearest to 4/255
    assert not {"Classifier under PGD", "Linear probe under FGSM"} & rows.keys()
    assert rows["Time"].value == "1 min 30 s" and "train 1 min 0 s" in rows["Time"].meaning
    assert "Pointing hit" not in rows
    below = verdict.rows({"linear": {"accuracy": 0.4}, "raw_pixels": {"accuracy": 0.45}})
    assert "5.0 points below raw pixels" in below[0].meaning
    both = {"linear": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}, "untrained": {"accuracy": 0.45}}
    (linear, baseline) = verdict.rows(both)
    assert linear.value == "50.0% (40.0 to 60.0)" and "5.0 points above the untrained encoder" in linear.meaning
    assert baseline.value == "45.0%"
    (tenths,) = verdict.rows({"fgsm": {"0.5": {"accuracy": 0.3}}})
    assert tenths.value == "30.0%" and "0.5/255" in tenths.meaning
    odd = {
        "knn": "lost",
        "linear": None,
        "fgsm": {"x": 1},
        "seconds": {"train": float("nan")},
        "explanation": 3,
    }
    assert verdict.rows(odd) == []


def test_the_last_lines_of_a_run_name_the_main_accuracies():
    results = {
        "linear": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]},
        "majority": {"accuracy": 0.25},
        "images": {"training": 900, "test": 80},
    }
    head, linear, majority = verdict.main_accuracies(results)
    assert "80 test images" in head
    assert linear.split()[-4:] == ["50.0%", "(40.0", "to", "60.0)"] and majority.split()[-1] == "25.0%"
    assert verdict.main_accuracies({"neighbours": {"cosine": 0.5}, "images": {"training": 3, "test": 1}}) == []


@pytest.mark.parametrize(
    "name, source, title",
    [
        ("exconb garments", "garments", "exconb on garments"),
        ("simclr garments unlabelled", "folder:my_photos", "simclr unlabelled on folder:my_photos"),
        ("supcon cifar10", "tfds:cifar10", "supcon on tfds:cifar10"),
        ("garments", "garments", "garments on garments"),
        ("mine", "", "mine"),
        ("", "garments", ""),
    ],
)
def test_the_title_names_the_data_that_was_used(name, source, title):
    assert verdict.title({"name": name, "data": {"source": source}}) == title


def test_missing_panels_and_results_leave_their_sections_out(tmp_path):
    page = write_report(tmp_path / "bare", config={}, environment={}, results={}, metrics=[], panels={"views": {}})
    parsed = _Page(page.read_text(encoding="utf-8"))
    assert parsed.links == [] and "bare" in parsed.text and "In short" not in parsed.text
    assert [p.name for p in page.parent.iterdir()] == ["index.html"]


def test_a_broken_panel_is_named_and_a_stale_picture_goes(tmp_path, caplog):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "confusion.png").write_bytes(b"old")
    page = write_report(
        tmp_path,
        config={"name": "x"},
        environment={},
        results={},
        metrics=[{"step": 1, "loss": 2.0}],
        panels={"confusion": {"matrix": "nonsense"}, "robustness": {"classifier, FGSM": {"4": 0.5}}, "unheard_of": [1]},
    )
    parsed = _Page(page.read_text(encoding="utf-8"))
    assert parsed.sections == ["curves", "confusion", "robustness"] and len(parsed.links) == 2
    assert "could not be drawn: " in parsed.text and not (tmp_path / "report" / "confusion.png").exists()
    assert "'confusion'" in caplog.text and "'unheard_of'" in caplog.text


def test_config_is_readable_json(tmp_path):
    config = {"name": "n", "deep": {"array": np.arange(2), "scalar": np.float32(0.5)}, "path": tmp_path}
    page = write_report(tmp_path, config=config, environment={}, results={}, metrics=[], panels={})
    shown = _Page(page.read_text(encoding="utf-8")).text
    parsed, _ = json.JSONDecoder().raw_decode(shown[shown.index("{\n") :])
    assert parsed["deep"] == {"array": [0, 1], "scalar": 0.5}


def test_expected_calibration_error_by_hand():
    bins = {"count": [0, 5, 15], "accuracy": [np.nan, 0.4, 0.8], "confidence": [np.nan, 0.5, 0.95]}
    assert figures.calibration_error(bins) == pytest.approx(0.25 * 0.1 + 0.75 * 0.15)
    assert figures.calibration_error({"count": [0], "accuracy": [0], "confidence": [1]}) == 0.0


def test_curves_group_what_is_there():
    rows = [{"step": s, "time": 0.0, "loss": 1.0, "loss/a": 1.0, "lr": 0.1, "extra/x": 2.0} for s in range(1, 9)]
    rows += [{"step": 4, "eval/knn_accuracy": 0.5, "note": "text", "flag": True}]
    panels = {title: set(lines) for title, lines, _ in curves_module.grouped(curves_module.read_series(rows))}
    # A single term of weight 1 is the loss itself and is not drawn twice.
    assert panels == {"Loss": {"loss"}, "Learning rate": {"lr"}, "Accuracy": {"knn"}, "Extra": {"x"}}
    rows[0]["loss/b"] = 0.5
    panels = {title: set(lines) for title, lines, _ in curves_module.grouped(curves_module.read_series(rows))}
    assert panels["Loss"] == {"total", "a", "b"}


def test_running_mean_by_loop():
    values = np.random.default_rng(0).normal(size=30)
    values[[4, 29]] = np.nan
    got = curves_module.running_mean(values, 7)
    for i in range(30):
        window = values[max(0, i - 3) : i + 4]
        want = np.nanmean(window) if np.isfinite(values[i]) else np.nan
        np.testing.assert_allclose(got[i], want, atol=1e-12)


def test_curves_say_where_a_loss_stopped_being_finite():
    rows = [{"step": s, "loss": 1.0 if s < 30 else float("nan")} for s in range(1, 60)]
    assert "not finite from step 30" in "".join(t.get_text() for t in figures.curves(rows).axes[0].texts)
    figures.curves([{"step": 1, "loss": float("inf")}])


@pytest.mark.parametrize("accepted", [np.ones(3, bool), np.zeros(3, bool), np.array([True, False, True])])
def test_saliency_grid_has_every_example_in_its_block(accepted):
    images, heat = np.full((3, 8, 8, 1), 128, np.uint8), np.zeros((3, 8, 8))
    figure = figures.saliency_grid(images, heat, heat > 0.5, images, accepted)
    texts = [t.get_text() for t in figure.axes[0].texts]
    for word, count in (("Accepted", accepted.sum()), ("Rejected", (~accepted).sum())):
        line = next(t for t in texts if t.startswith(word))
        assert ("none of these" in line) == (count == 0)
    assert sum(t.startswith("keeps ") for t in texts) == 3
    frames = [p.get_edgecolor() for p in figure.axes[0].patches]
    assert len(frames) == 3 and len(set(frames)) == len(set(accepted.tolist()))


def test_outline_follows_the_pixels():
    sheet = style.Sheet(100, 100)
    mask = np.zeros((4, 4), bool)
    mask[0, 1:3] = True
    sheet.outline(mask, 10, 20, (40, 40), "k", 1.0)
    sides = {tuple(map(tuple, np.sort(s, axis=0))) for s in sheet.axes.collections[0].get_segments()}
    want = {((20, 20), (20, 30)), ((40, 20), (40, 30))}
    want |= {((x, y), (x + 10, y)) for x in (20, 30) for y in (20, 30)}
    assert sides == want


def test_view_grid_pixels_are_exact(tmp_path):
    image = np.zeros((1, 2, 2, 3))
    image[0, 0, 0], image[0, 1, 1] = (1, 0, 0), (0, 0, 1)
    path = style.save(figures.view_grid({"v": image}), tmp_path / "v.png")
    pixels = np.round(imread(path)[..., :3], 3)
    for color in ((1, 0, 0), (0, 0, 1)):
        rows, cols = np.nonzero((pixels == color).all(-1))
        side = rows.max() - rows.min() + 1
        assert side == cols.max() - cols.min() + 1 == np.sqrt(len(rows)) > 20  # a full square, no blur


def test_confusion_lists_the_commonest_mistakes_of_many_classes():
    matrix = 50 * np.eye(30, dtype=int)
    matrix[3, 7], matrix[5, 5] = 50, 0  # half of class 3 goes to 7; class 5 has no examples
    texts = [t.get_text() for ax in figures.confusion(matrix).axes for t in ax.texts]
    assert texts == ["50%", "3 → 7"]
    few = figures.confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"])
    assert [t.get_text() for t in few.axes[0].texts] == ["75", "25"]


def test_embedding_is_reproducible_and_takes_odd_features():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)), np.arange(40) % 3 - 1
    features[3] = np.nan
    one, two = (figures.embedding(features, labels, ["a", "b"]) for _ in range(2))
    offsets = [[c.get_offsets().data for c in f.axes[0].collections] for f in (one, two)]
    assert sum(len(o) for o in offsets[0]) == 39
    assert all(np.array_equal(a, b) for a, b in zip(*offsets, strict=True))
    assert [t.get_text() for t in one.axes[0].texts] == ["a", "b"]
    assert "collapsed" in figures.embedding(np.ones((20, 4)), np.zeros(20, int)).texts[0].get_text()
    assert "too few" in figures.embedding(np.ones((2, 4)), np.zeros(2, int)).texts[0].get_text()


def test_importing_the_writers_loads_no_plotting_and_no_pyplot_ever():
    code = (
        "import sys, jaxcl.report; assert 'matplotlib' not in sys.modules and 'sklearn' not in sys.modules;"
        "import jaxcl.report.page; assert 'matplotlib.pyplot' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_similarities_over_training(tmp_path):
    """From the lines of metrics alone, whatever else is on them; a run without any has no such section."""
    rng = np.random.default_rng(0)

    def shares(mean):
        return np.histogram(rng.normal(mean, 0.1, 400).clip(-1, 1), 40, (-1, 1))[0] / 400

    name = similarities_module.PREFIX
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(10, 60, 10):
            rows = {f"{name}queue": shares(0.0).tolist(), f"{name}positive": shares(step / 80).tolist()}
            writer.write(step, {"loss": 1.0, "similarity/queue": 0.0}, **rows)
            writer.write(step + 1, {"eval/knn_accuracy": 0.5})
    metrics = read_metrics(tmp_path)
    assert len(similarities_module.rows(metrics)) == 5
    figure = similarities_module.similarities(similarities_module.rows(metrics))
    assert [ax.get_title(loc="left") for ax in figure.axes][:3] == ["positive", "queue", "at the end"]
    line = figure.axes[0].lines[0]  # the mean, in the middle of the steps that each line sums up
    np.testing.assert_allclose(line.get_xdata(), [5, 15, 25, 35, 45])
    np.testing.assert_allclose(line.get_ydata(), np.arange(10, 60, 10) / 80, atol=0.03)
    low, high = figure.axes[0].get_ylim()
    assert -0.6 < low < -0.2 and 0.7 < high <= 1
    page = write_report(tmp_path, config={}, environment={}, results={}, metrics=metrics, panels={}).read_text()
    assert 'id="similarities"' in page and (tmp_path / "report" / "similarities.png").exists()
    lines = curves_module.read_series(metrics)  # a row of numbers is no curve
    assert set(lines) == {"loss", "similarity/queue", "eval/knn_accuracy"}
    plain = [{"step": 1, "loss": 1.0}]
    page = write_report(tmp_path / "b", config={}, environment={}, results={}, metrics=plain, panels={}).read_text()
    assert 'id="similarities"' not in page


def test_where_the_time_goes(tmp_path):
    parts = {f"encode {EVIL}": 0.06, "term a, backward": 0.03, "optimizer": 0.0001, "metrics": 0.0002}
    measured = {"seconds": 0.1, "parts": parts, "data": 0.004, "rest": 0.0057, "updates": [4, 11], "device": "TPU v5"}
    page = write_report(
        tmp_path, config={}, environment={}, results={}, metrics=[], panels={"step_time": measured}
    ).read_text()
    assert EVIL not in page and "updates 4 to 11 of this run on TPU v5" in page
    assert "90.3% of the update" in page
    for row in ("60.0 ms", "60.0%", "2 smaller scopes: optimizer; metrics", "0.30 ms", "4.0 ms", "5.7 ms", "100 ms"):
        assert row in page, row
    assert (
        "Where the time"
        not in write_report(
            tmp_path, config={}, environment={}, results={}, metrics=[], panels={"step_time": None}
        ).read_text()
    )
