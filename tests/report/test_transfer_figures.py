"""Pictures of classes inside classes, and the theory of spread beside what was measured."""

import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.report import curves as curves_module
from jaxcl.report import figures, transfer, verdict
from jaxcl.report.spread_theory import alpha_threshold, family, optimal_t
from jaxcl.report.style import save

COARSE_OF_FINE = np.array([0, 0, 1, 1, 1, 2])
SIDES = ("left", "center")  # of titles
FINE, COARSE = ("cat", "dog", "car", "ship", "$truck", "靴"), ("animals", "vehicles", "shoes")


def panel(n=48, spread=1.0, seed=0, **changes):
    rng = np.random.default_rng(seed)
    fine = np.arange(n) % len(COARSE_OF_FINE)
    coarse = COARSE_OF_FINE[fine]
    features = 5 * rng.normal(size=(3, 8))[coarse] + spread * rng.normal(size=(6, 8))[fine]
    features += 0.3 * rng.normal(size=(n, 8))
    content = {"features": features, "labels": fine, "coarse": coarse, "class_names": FINE, "coarse_names": COARSE}
    return content | changes


@pytest.fixture(autouse=True)
def no_tsne(monkeypatch, request):
    """t-SNE takes a second per picture; all tests but one take the first two features instead."""
    if request.function is not test_fine_classes_that_survived_are_islands:
        monkeypatch.setattr(figures, "tsne", lambda features, seed: features[:, :2].copy())


def texts(figure):
    found = [text for ax in figure.axes for text in (*(t.get_text() for t in ax.texts), *map(ax.get_title, SIDES))]
    found += [figure.get_supxlabel()] + [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    return [t for t in found if t and t not in ("●", " ")]


def groups(ax):
    """The places of the points of one picture, those of one colour together: a set of sets."""
    found = {}
    for collection in ax.collections:
        places, colors = collection.get_offsets().data, collection.get_facecolors()[:, :3]
        for place, color in zip(places, np.broadcast_to(colors, (len(places), 3)), strict=True):
            found.setdefault(tuple(color), set()).add(tuple(place))
    return {frozenset(places) for places in found.values()}


def color_at(ax, place):
    """The colour of the point at a place."""
    for collection in ax.collections:
        places = collection.get_offsets().data
        colors = np.broadcast_to(collection.get_facecolors()[:, :3], (len(places), 3))
        if (hits := (places == place).all(1)).any():
            return tuple(colors[hits][0])
    raise AssertionError(f"no point at {place}")


# ---- fine_embedding


def test_each_coarse_class_shows_its_fine_classes_over_the_others():
    content = panel()
    content["labels"] = np.where(np.arange(48) == 2, -1, content["labels"])  # a car without a fine label
    figure = transfer.fine_embedding({"": content})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["All coarse classes", "animals", "vehicles"]
    assert figure.get_supxlabel() == "Without a picture, as they have only one fine class: shoes."
    _, places = figures.to_plane(content["features"])
    all_, _, vehicles = figure.axes
    assert groups(all_) == {frozenset(map(tuple, places[content["coarse"] == c])) for c in range(3)}
    want = {frozenset(map(tuple, places[content["labels"] == 2 + i])) for i in range(3)}
    unknown, behind = places[2:3], places[content["coarse"] != 1]
    assert groups(vehicles) == want | {frozenset(map(tuple, rows)) for rows in (unknown, behind)}
    # Nearly all of its own points are inside the picture, and they fill it.
    (x0, x1), (y0, y1) = vehicles.get_xlim(), vehicles.get_ylim()
    own = places[content["coarse"] == 1]
    assert x1 - x0 == pytest.approx(y1 - y0) and ((own > (x0, y0)) & (own < (x1, y1))).mean() > 0.95
    assert np.ptp(own, axis=0).max() > 0.7 * (x1 - x0)
    assert {*FINE[:5], *COARSE} <= set(texts(figure))


def test_runs_stand_side_by_side_and_share_colours():
    other = panel(seed=1, class_names=FINE[::-1], note="fine classes 77.1%")
    other["labels"] = 5 - other["labels"]  # the same classes under other numbers
    gone = panel(features=np.ones((48, 8)))
    figure = transfer.fine_embedding({"SupCon": panel(), "L_spread": other, "gone": gone})
    words = texts(figure)
    assert [words.count(w) for w in ("SupCon", "L_spread", "gone", "fine classes 77.1%")] == [1] * 4
    assert sum("collapsed" in w for w in words) == 3
    assert len(figure.axes) == 3 * 4 and words.count("dog") == 1  # one legend a row
    by_run = [figure.axes[4 + 1 + i] for i in range(2)]  # animals
    colors = []
    for ax, content in zip(by_run, (panel(), other), strict=True):
        _, places = figures.to_plane(content["features"])
        cats, dogs = (np.arange(48) % 6 == i for i in range(2))
        assert {frozenset(map(tuple, places[rows])) for rows in (cats, dogs)} <= groups(ax)
        colors.append([color_at(ax, places[i]) for i in range(2)])
    assert colors[0] == colors[1]
    assert figure.get_size_inches()[0] > 6


def test_at_most_twelve_classes_and_it_says_so(tmp_path):
    fine = np.arange(160) % 40
    content = panel(
        160,
        features=np.random.default_rng(0).normal(size=(160, 8)),
        labels=fine,
        coarse=np.where(fine < 30, fine % 15, np.where(fine < 39, 15, 16)),  # of 2 or 9 fine classes, the last of one
        class_names=None,
        coarse_names=[f"group {i}" for i in range(20)],
    )
    figure = transfer.fine_embedding({"": content})
    assert len(figure.axes) == 13
    said = figure.get_supxlabel()
    assert said.startswith("The first 12 of 16 coarse classes.") and "group 16" in said
    words = texts(figure)
    assert "and 10 more" in words and {"class 3", "class 18"} <= set(words)
    assert len(save(figure, tmp_path / "many.png").read_bytes()) > 10_000


def test_what_cannot_be_drawn_is_said():
    assert "collapsed" in transfer.fine_embedding({"": panel(features=np.ones((48, 8)))}).texts[0].get_text()
    unknown = panel(labels=np.full(48, -1))
    assert "coarse and a fine" in transfer.fine_embedding({"a": unknown}).texts[0].get_text()
    assert "coarse and a fine" in transfer.fine_embedding({}).texts[0].get_text()
    # A run without images of a class that another has.
    animals = panel(180)
    some = {k: animals[k][animals["coarse"] == 0] for k in ("features", "labels", "coarse")}
    assert "No image of this class." in texts(transfer.fine_embedding({"a": panel(), "b": animals | some}))
    figure = transfer.fine_embedding({"": panel(labels=np.zeros(48, int), coarse=np.zeros(48, int))})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["All coarse classes", "animals"]


def test_fine_classes_that_survived_are_islands():
    """The picture does tell a collapsed class from a spread one."""

    def mixed(spread):
        content = panel(120, spread)
        _, places = figures.to_plane(content["features"])
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(120)
        return (content["labels"][apart.argmin(1)] != content["labels"]).mean()

    assert mixed(0.0) > 0.3 and mixed(2.0) < 0.05


# ---- theory


def test_family_and_threshold(golden):
    d = golden("thanos", "theory_spread_curve")
    for k, setting in enumerate(zip(d["K"], d["n"], d["temp"], strict=True)):
        a, r, within = family(d["t"], *setting)
        np.testing.assert_allclose(a, d["supcon"][k], rtol=1e-12)
        np.testing.assert_allclose(r, d["cnce"][k], rtol=1e-12)
        np.testing.assert_allclose(within, 1 - d["t"] * setting[1] / (setting[1] - 1), rtol=1e-14)
        assert alpha_threshold(*setting) == pytest.approx(d["alpha_threshold"][k], rel=1e-12)
        np.testing.assert_allclose(optimal_t(d["alpha"], *setting), d["t_star"][k], atol=2e-7)
        assert float(optimal_t(d["alpha"][7], *setting)) == pytest.approx(d["t_star"][k, 7], abs=2e-7)


def test_where_free_points_end(golden):
    d = golden("thanos", "theory_descent")
    free = ~d["clamp"]
    labels = d["labels"]
    setting = len(set(labels.tolist())), len(labels) / len(set(labels.tolist())), float(d["temp"])
    within = family(optimal_t(d["alpha"][free], *setting), *setting)[2]
    np.testing.assert_allclose(within, d["family_within"][free], atol=2e-3)
    np.testing.assert_allclose(within, d["within"][free], atol=2e-3)


def test_threshold_by_slopes_and_at_the_ends():
    rng = np.random.default_rng(0)
    near = 1e-6
    for K, n, tau in zip(rng.integers(2, 30, 20), rng.uniform(1.5, 90, 20), rng.uniform(0.2, 2, 20), strict=True):  # noqa: N806
        a, r, _ = family(np.array([0, near]), K, n, tau)
        slope_a, slope_r = (a[1] - a[0]) / near, (r[1] - r[0]) / near
        assert alpha_threshold(K, n, tau) == pytest.approx(-slope_r / (slope_a - slope_r), rel=2e-3)
        alpha = alpha_threshold(K, n, tau)
        t = optimal_t(np.array([0, 0.97 * alpha, min(1, 1.001 * alpha), 1]), K, n, tau)
        assert t[0] == pytest.approx(1) and t[1] > 0 and t[2] == 0 and t[3] == 0
    # Released settings, as often quoted.
    assert alpha_threshold(2, 64, 0.5) == pytest.approx(0.481, abs=5e-4)
    assert alpha_threshold(20, 6.4, 0.5) == pytest.approx(0.504, abs=5e-4)
    assert alpha_threshold(2, 64, 1e-3) == 1 and np.isfinite(family(0.5, 2, 64, 1e-3)).all()
    assert alpha_threshold(2, 1e12, 0.5) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: family(1.1, 2, 8, 0.5), "t is outside [0, 1]"),
        (lambda: family(0.5, 1, 8, 0.5), "K >= 2"),
        (lambda: alpha_threshold(2, 1, 0.5), "n > 1"),
        (lambda: alpha_threshold(2, 8, 0.0), "tau > 0"),
        (lambda: optimal_t(float("nan"), 2, 8, 0.5), "alpha is outside"),
    ],
)
def test_theory_mistakes(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- collapse_curve


def test_collapse_curve_draws_means_spreads_theory_and_threshold():
    setting = transfer.Setting(2, 64, 0.5)
    figure = transfer.collapse_curve({"l_spread": {0.5: [0.9, 1.0, 0.8], 0.3: [0.1, 0.2]}}, {"l_spread": setting})
    (ax,) = figure.axes
    (bars,) = ax.containers
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[0.3, 0.15], [0.5, 0.9]])
    low_high = np.array([s[:, 1] for s in bars.lines[2][0].get_segments()])
    half = np.array([0.1 / 2**0.5, 0.1])
    np.testing.assert_allclose(low_high, np.array([[0.15], [0.9]]) + half[:, None] * [-1, 1], atol=1e-12)
    theory = next(line for line in ax.lines if "theory" in line.get_label())
    alpha, within = theory.get_xydata()[600]
    assert within == 1.0 and alpha > setting.threshold
    at = family(optimal_t(0.4, 2, 64, 0.5), 2, 64, 0.5)[2]
    assert theory.get_xydata()[400] == pytest.approx((0.4, at))
    assert any(line.get_xdata()[0] == setting.threshold for line in ax.lines if len(line.get_xdata()) == 2)
    words = texts(figure)
    assert any("α* = 0.48" in w for w in words) and any("2 to 3 seeds" in w for w in words)


def test_collapse_curve_of_several_settings_and_of_none():
    settings = {"a": transfer.Setting(2, 64, 0.5), "b": transfer.Setting(2, 64, 0.2), "c": None}
    figure = transfer.collapse_curve({"a": {0.5: [1.0]}, "b": {0.5: [0.4]}, "c": {0.0: [-0.5]}, "d": {}}, settings)
    words = texts(figure)
    assert sum("α*" in w for w in words) == 2 and sum("one seed" in w for w in words) == 3
    assert figure.axes[0].get_ylim()[0] < -0.5
    assert "No run" in transfer.collapse_curve({"a": {0.5: []}}, {}).texts[0].get_text()


# ---- training curves and verdict


def test_collapse_metrics_have_two_panels_when_there_are_any():
    names = ("within_class_cosine", "between_class_cosine", "class_spread", "effective_rank", "alignment", "uniformity")
    rows = [{"step": s, "loss": 1.0} | {f"collapse/{n}": float(s) for n in names} for s in range(3)]
    found = {title: lines for title, lines, _ in curves_module.grouped(curves_module.read_series(rows))}
    first, second = "Cosines within and between classes", "All embeddings: spread and alignment"
    assert list(found) == ["Loss", first, second]
    assert list(found[first]) == ["within", "between", "class spread"]
    assert list(found[second]) == ["log eff. rank", "alignment", "uniformity"]
    np.testing.assert_allclose(found[second]["log eff. rank"][1], np.log([1, 1, 2]))
    figures.curves(rows)
    only = [{"step": 1, "loss": 1.0, "collapse/uniformity": -2.0}]
    assert [t for t, *_ in curves_module.grouped(curves_module.read_series(only))] == ["Loss", second]
    assert [t for t, *_ in curves_module.grouped(curves_module.read_series([{"step": 1, "loss": 1.0}]))] == ["Loss"]


def test_verdict_of_transfer_and_worst_group():
    results = {
        "transfer": {"accuracy": 0.771, "coarse_accuracy": 0.99},
        "worst_group": {"erm_worst": 0.2, "dro_worst": 0.35, "erm_average": 0.9, "by_group": {"x": {"erm": 0.2}}},
        "raw_pixels": {"accuracy": 0.5},
        "linear": {"accuracy": 0.6},
    }
    rows = {row.name: row for row in verdict.rows(results)}
    names = ["Linear probe", "Fine classes, from coarse labels", "Baseline: raw pixels", "Worst group"]
    assert list(rows) == names
    assert rows["Fine classes, from coarse labels"].value == "77.1%" and "10.0 points" in rows["Linear probe"].meaning
    assert rows["Worst group"].value == "35.0%" and "15.0 points above the plain one" in rows["Worst group"].meaning
    plain = verdict.rows({"worst_group": {"erm_worst": 0.2}})
    assert [(r.name, r.value) for r in plain] == [("Worst group", "20.0%")] and "points" not in plain[0].meaning
