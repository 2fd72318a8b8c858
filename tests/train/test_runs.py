"""Run folders opened again: the same numbers as the run's own, several joined, other data, and ways to be wrong."""

import json

import numpy as np
import pytest
import tiny

from jaxcl.commands import evaluate as command
from jaxcl.data import source_of
from jaxcl.errors import UserError
from jaxcl.evaluate import fit_linear_probe, probe_logits
from jaxcl.method.build import data_facts
from jaxcl.train import run_folder
from jaxcl.train.runs import Joined, evaluate_runs, load_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [tiny.colours(folder / f"{name}.npz", seed=seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Two run folders with a checkpoint each of a network that was never trained; their seeds differ."""
    folders = []
    for seed in range(2):
        c = tiny.config(stage=False, background=False)
        with c.ignore_type():
            c.data.source = f"npz:{data[0]}"
        c.seed, c.eval.batch_size, c.eval.knn_k, c.eval.tap = seed, 16, 5, "stage1"
        c.eval.final = ("knn", "linear", "classifier")
        folder = tmp_path_factory.mktemp("run")
        tiny.saved_run(folder, c, seed)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def opened(runs):
    return [load_run(folder) for folder in runs]


def test_a_run_and_several_joined(opened):
    alone = [evaluate_runs([run]) for run in opened]
    assert [set(r) for r in alone] == [{"knn", "linear", "classifier"}] * 2
    assert all(run.step == 3 for run in opened)

    joined = evaluate_runs(opened)
    assert set(joined) == {"knn", "linear"}  # a classifier has one encoder
    features = {}
    for split in ("train", "test"):
        parts = [run.context().features(split) for run in opened]
        assert not np.allclose(*parts)
        features[split] = np.concatenate(parts, -1)
    train, test = (opened[0].context().source(s).labels for s in ("train", "test"))
    probe = fit_linear_probe(features["train"], train, num_classes=tiny.CLASSES)
    right = np.argmax(probe_logits(probe, features["test"]), -1) == test
    assert joined["linear"]["accuracy"] == pytest.approx(right.mean())


def test_an_evaluator_of_a_package_on_joined_runs(opened, tmp_path, monkeypatch):
    (tmp_path / "joined_measures.py").write_text(
        "from jaxcl.evaluate import Evaluator\n"
        "class Width(Evaluator):\n"
        "    features_only = True\n"
        "    def __call__(self, context):\n"
        "        return {'features': context.features('test').shape[1]}, {}\n"
        "class Depth(Width):\n"
        "    features_only = False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    alone = evaluate_runs(opened[:1], ("joined_measures:Width", "joined_measures:Depth"))
    joined = evaluate_runs(opened, ("joined_measures:Width",))
    assert joined["Width"]["features"] == 2 * alone["Width"]["features"] == 2 * alone["Depth"]["features"]
    with pytest.raises(UserError, match="suite has 'joined_measures:Depth'"):
        evaluate_runs(opened, ("joined_measures:Depth",))


def test_augmented_features_are_another_view_for_each_draw(opened):
    """Those of joined runs lie side by side; without a draw of its own, a run gives the same ones again."""
    parts = [run.context().augmented_features("train", 0) for run in opened]
    joined = Joined(opened).augmented_features("train", 0)
    np.testing.assert_array_equal(joined, np.concatenate(parts, -1))
    again, other = (opened[0].context().augmented_features("train", draw) for draw in (0, 1))
    np.testing.assert_array_equal(parts[0], again)
    plain = opened[0].context().features("train")
    assert not np.allclose(again, other) and not np.allclose(again, plain) and again.shape == plain.shape


def test_images_made_anew_of_joined_runs(opened):
    """Features of a source of its own lie side by side, too: in domain the figure is that of the linear probe."""
    f = Joined(opened)
    np.testing.assert_array_equal(f.features_of(f.test), f.features("test"))
    for run in opened:
        run.evaluation.options.severities = ()
    found = evaluate_runs(opened, ("linear", "ood"))
    assert found["ood"]["accuracy"] == found["linear"]["accuracy"] and len(found["ood"]["shuffled"]) == 3


def test_options_of_an_evaluation(runs):
    run = load_run(runs[0], options=("knn_k=3", "eval.severities=(2, 4)", "corrupted=some/folder", "knn_temperature=1"))
    options = run.config.eval
    assert options.knn_k == 3 and options.severities == (2, 4) and options.corrupted == "some/folder"
    assert isinstance(options.knn_temperature, float)
    for text, words in (
        ("knn_kk=3", "did you mean 'knn_k'"),
        ("knn_k", "expected KEY=VALUE"),
        ("knn_k=many", "eval.knn_k is 'many'"),
        ("knn_k=0", "eval.knn_k is 0"),
        ("features='y'", "eval.features is 'y'"),
        ("severities=2", "eval.severities is 2"),
    ):
        with pytest.raises(UserError) as error:
            load_run(runs[0], options=(text,))
        assert words in str(error.value) and "\n" not in str(error.value)


def test_the_split(opened, runs):
    with pytest.raises(UserError, match="nothing is held out; set data.validation"):
        evaluate_runs(opened, split="validation")
    with pytest.raises(UserError, match="split is 'train'"):
        evaluate_runs(opened, split="train")
    assert opened[0].context().held_out is None


def test_the_command(runs, data, capsys, monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    argv = ["evaluate", f"--workdir={runs[0]}", "--suite=linear", f"--source=npz:{data[1]}", f"--out={out}"]
    assert command.main(argv) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert written["results"] == printed and set(printed) == {"linear"}
    assert written["source"] == f"npz:{data[1]}" and written["runs"][0]["step"] == 3


def test_images_are_normalised_as_in_training(opened, runs, data):
    other = load_run(runs[0], source=f"npz:{data[1]}")
    assert other.recipe.mean == opened[0].recipe.mean
    assert source_of(other.config, "train").mean != opened[0].recipe.mean


def test_mistakes(runs, data, tmp_path, opened):
    def says(text, f, *args, **options):
        with pytest.raises(UserError) as error:
            f(*args, **options)
        assert text in str(error.value) and "\n" not in str(error.value)

    says("is not a run folder", load_run, tmp_path)
    empty = tmp_path / "empty"
    run_folder.claim(
        empty, json.loads((runs[0] / "config.json").read_text()), data_facts(opened[0].context().test), True
    )
    says("has no checkpoint yet", load_run, empty)
    says("suite is 'knnn'; did you mean 'knn'?", evaluate_runs, opened[:1], ("knnn",))
    says("suite is 'knnn'; did you mean 'knn'?", evaluate_runs, opened, ("knnn",))
    says("suite has 'classifier'", evaluate_runs, opened, ("classifier",))
    other = load_run(runs[1], source=f"npz:{data[1]}")
    says("were trained on different data", evaluate_runs, [opened[0], other])
    says("no --workdir", command.main, ["evaluate"])
    says("has no checkpoint of step 7", load_run, runs[0], step=7)


def five_classes(path):
    """64 + 20 images of five colours, one a class, as a data source."""
    colours = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40], [120, 10, 120]])
    arrays = {}
    for part, count in (("train", 64), ("test", 20)):
        labels = np.arange(count) % 5
        noise = np.random.default_rng(count).integers(0, 30, (count, tiny.SIDE, tiny.SIDE, 3))
        arrays |= {f"{part}_images": (colours[labels][:, None, None] + noise).astype(np.uint8)}
        arrays |= {f"{part}_labels": labels}
    np.savez(path, class_names=list("vwxyz"), **arrays)
    return f"npz:{path}"


CLASSIFIERS = ("knn", "linear", "logistic", "linear_sgd", "raw_pixels", "ood")


@pytest.mark.parametrize("labelled", [True, False])
def test_data_of_other_classes(labelled, runs, tmp_path):
    """Cases B.1: classes are those of the data evaluated, for a run on four classes and for one without labels."""
    folder = runs[0]
    if not labelled:
        part = tiny.batch(64)
        np.savez(tmp_path / "unlabelled.npz", images=part["image"])
        c = tiny.config(stage=False, background=False)
        del c.memory.probe
        c.terms.supcon.labels, c.eval.batch_size, c.eval.knn_k = False, 16, 5
        with c.ignore_type():
            c.data.source = f"npz:{tmp_path}/unlabelled.npz"
        folder = tmp_path / "run"
        tiny.saved_run(folder, c, 0)
    options = ("logistic_epochs=3", "sgd_epochs=1", "severities=()", "shuffle_grids=()", "fgsm=(4,)")
    run = load_run(folder, source=five_classes(tmp_path / "five.npz"), options=options)
    context = run.context()
    assert run.recipe.num_classes == (4 if labelled else 0) and context.num_classes == 5
    found = evaluate_runs([run], (*CLASSIFIERS, "classifier", "fgsm", "linear_fgsm", "calibration", "adversary"))
    # The classifier of training knows other classes; a label means another class to it.
    assert set(found) == {*CLASSIFIERS, "linear_fgsm"}
    train, test = context.source("train"), context.test
    x, y = context.features("train"), context.features("test")
    probe = fit_linear_probe(x, train.labels, num_classes=5)
    right = np.argmax(probe_logits(probe, y), -1) == test.labels
    assert found["linear"]["accuracy"] == found["ood"]["accuracy"] == pytest.approx(right.mean()) and right.all()
    assert found["knn"]["accuracy"] == found["raw_pixels"]["accuracy"] == 1


def test_the_classifier_on_data_of_the_same_classes(data, tmp_path):
    """Cases B.1: on another set the classifier of training counts where a number means the same class."""
    c = tiny.config(stage=False, background=False)
    with c.ignore_type():
        c.data.source = f"npz:{data[0]}"
    tiny.saved_run(tmp_path / "run", c, 0, class_names=[f"class {i}" for i in range(4)])
    part = tiny.batch(32, seed=9)
    sources = {}
    for names in ("class 0,class 1,class 2,class 3", "b,c,d,e"):
        sources[names] = f"npz:{tmp_path}/{names[:1]}.npz"
        np.savez(sources[names][4:], images=part["image"], labels=part["label"], class_names=names.split(","))
    few = part["label"] < 2
    sources["two"] = f"npz:{tmp_path}/two.npz"
    np.savez(sources["two"][4:], images=part["image"][few], labels=part["label"][few])
    results = [evaluate_runs([load_run(tmp_path / "run", source=s)], ("classifier",)) for s in sources.values()]
    assert [set(r) for r in results] == [{"classifier"}, set(), {"classifier"}]


def test_coarse_labels_and_another_source(tmp_path):
    """Cases B.1: a run on coarse labels is evaluated on a source that has none."""
    part = tiny.batch(64)
    np.savez(tmp_path / "d.npz", images=part["image"], labels=part["label"], coarse_labels=part["label"] // 2)
    c = tiny.config(stage=False, background=False)
    with c.ignore_type():
        c.data.source, c.data.labels = f"npz:{tmp_path}/d.npz", "coarse"
    tiny.saved_run(tmp_path / "run", c, 0)
    assert load_run(tmp_path / "run", source=f"npz:{tmp_path}/d.npz").context().num_classes == 2
    assert load_run(tmp_path / "run", source=five_classes(tmp_path / "five.npz")).context().num_classes == 5
