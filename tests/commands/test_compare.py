"""Comparing runs: a real one on a network that was never trained, sweeps made up, and one line for every mistake."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from matplotlib.image import imread
from processes import cli, one_line

from jaxcl import config as configs
from jaxcl.commands.compare import main as compare
from jaxcl.commands.compare import runs as compared
from jaxcl.commands.compare import sweeps
from jaxcl.data import source_of
from jaxcl.errors import UserError
from jaxcl.method.build import build_recipe, data_facts
from jaxcl.method.init_state import init_state
from jaxcl.report import figures, transfer
from jaxcl.train import run_folder
from jaxcl.train.checkpoint import Checkpoints

RESULTS = {"linear": {"accuracy": 0.5}, "transfer": {"accuracy": 0.0}, "knn": 0.25, "fgsm": {"4": {"accuracy": 0.1}}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of two networks that were never trained, on two coarse classes of two fine ones each."""
    path = tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")
    with np.load(path) as arrays:
        arrays = dict(arrays)
    for part in ("train", "test"):
        arrays[f"{part}_coarse_labels"] = arrays[f"{part}_labels"] // 2
    np.savez(path, **arrays, class_names=list("abcd"), coarse_names=["low", "high"])
    folders = []
    for seed in range(2):
        c = tiny.config(stage=False, background=False)
        with c.ignore_type():
            c.data.source = f"npz:{path}"
        c.name, c.seed, c.data.labels, c.eval.batch_size, c.eval.tap = "tiny", seed, "coarse", 16, "stage1"
        facts = data_facts(source_of(c, "train"))
        folder = tmp_path_factory.mktemp("run")
        run_folder.claim(folder, configs.to_dict(c), facts, True)
        state = tiny.fill(jax.eval_shape(lambda c=c, facts=facts: init_state(build_recipe(c, **facts))), seed)
        state = state.replace(key=jax.random.key(seed, impl="threefry2x32"))
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(3, jax.device_put(state))
        folders.append(folder)
    run_folder.write_json(folders[0] / "results.json", RESULTS)
    return folders


def test_runs_and_joined_runs(runs, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "tsne", lambda features, seed: features[:, :2])
    real = transfer.fine_embedding
    monkeypatch.setattr(transfer, "fine_embedding", lambda panels: drawn.update(panels) or real(panels))
    one, two = runs
    out = tmp_path / "new" / "folder"
    assert compare.main(["compare", f"--workdir={one}", f"--workdir={one}+{two}", f"--out={out}"]) == 0
    assert list(drawn) == ["tiny", "tiny + tiny"]
    single, joined = drawn.values()
    assert joined["features"].shape[1] == 2 * single["features"].shape[1] == 2 * 16
    np.testing.assert_array_equal(joined["features"][:, :16], single["features"])
    assert tuple(single["class_names"]) == tuple("abcd") and tuple(single["coarse_names"]) == ("low", "high")
    np.testing.assert_array_equal(single["coarse"], single["labels"] // 2)
    assert imread(out / "fine_embedding.png")[..., :3].std() > 0.02
    assert sorted(p.name for p in out.iterdir()) == ["fine_embedding.png", "table.md"]
    words = (out / "table.md").read_text()
    assert capsys.readouterr().out == words
    head, rule, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in words.splitlines()]
    assert head == ["run", "transfer.accuracy", "linear.accuracy"]  # "knn" of the results is no dict
    assert set("".join(rule)) == {"-", ":"}
    measured = [panel["note"].removeprefix("fine classes ").removesuffix("%") for panel in (single, joined)]
    assert rows == [["tiny", measured[0], "50.0"], ["tiny + tiny", measured[1], "–"]]
    assert float(measured[0]) > 25  # measured here, not read from results.json


def test_one_level_of_labels(runs, tmp_path):
    flat = tiny.colours(tmp_path / "flat.npz")
    config = json.loads((runs[0] / "config.json").read_text())
    config["data"]["labels"] = "fine"
    shutil.copytree(runs[0], tmp_path / "run")
    run_folder.write_json(tmp_path / "run" / "config.json", config)
    with pytest.raises(UserError, match="one level of labels; a comparison needs fine classes") as error:
        compare.main(["compare", f"--workdir={tmp_path}/run", f"--source=npz:{flat}", f"--out={tmp_path}/out"])
    assert "\n" not in str(error.value)


def test_a_table_escapes_bars():
    table = compared.table({"a|b": {"knn": {"accuracy": 0.5}}, "c": {}})
    rows = ["| run  | knn.accuracy |", "| ---- | -----------: |", "| a\\|b |         50.0 |", "| c    |            – |"]
    assert table.splitlines() == rows


# ---- sweeps


@pytest.fixture
def sweep(tmp_path):
    """`sweep(rows, measure)` -> the folder of a sweep; a row is (config, grid, term or None, {seed: cosine})."""

    def make(rows, measure="collapse.z_within_class_cosine", facts=True, batch_size=128):
        content = []
        for i, (config, grid, term, cosines) in enumerate(rows):
            values = []
            for seed, cosine in cosines.items():
                name = f"{i}/seed-{seed}"
                folder = tmp_path / name
                folder.mkdir(parents=True)
                usual = {"weight": 1.0, "temperature": 0.5, "norm": "unit"}
                terms = {"ce": {"kind": "cross_entropy", "weight": 1.0}}
                terms |= {"contrast": usual | term} if term else {}
                own = {"terms": terms, "batch_size": batch_size, "seed": seed}
                run_folder.write_json(folder / "config.json", own)
                run_folder.write_json(folder / "results.json", {"collapse": {"h_within_class_cosine": cosine}})
                if facts:
                    run_folder.write_json(folder / "data.json", {"num_classes": 2})
                values.append({"seed": seed, "run": name, "value": cosine})
            content.append({"config": config, "grid": grid, "measures": {measure: {"values": values}}})
        run_folder.write_json(tmp_path / "table.json", {"rows": content, "measures": [measure]})
        return tmp_path

    return make


def spread(a_lc, a_spread, **options):
    return {"kind": "spread", "labels": True, "a_lc": a_lc, "a_spread": a_spread} | options


def test_a_sweep_over_the_weights(sweep, tmp_path, caplog):
    folder = sweep(
        [
            ("l_spread", {"a_spread": "1.0"}, spread(1, 1), {0: 0.9, 1: 0.8}),
            ("l_spread", {"a_spread": "3.0"}, spread(1, 3), {0: 0.5}),
            ("l_spread", {"a_spread": "3.0"}, spread(2, 6), {0: 0.6}),
            ("l_spread:supcon", {"a_spread": "3.0"}, {"kind": "attract", "labels": True}, {0: 1.0}),
            ("l_spread:infonce", {"a_spread": "3.0"}, {"kind": "attract", "labels": False}, {0: 0.1}),
            ("l_spread:ce", {"a_spread": "3.0"}, None, {0: 0.2}),
        ]
    )
    with caplog.at_level("INFO", logger="jaxcl"):
        points, settings = sweeps.read_collapse(folder)
    assert points == {"l_spread": {0.5: [0.9, 0.8], 0.25: [0.5, 0.6]}, "l_spread:supcon": {1.0: [1.0]}}
    assert set(settings.values()) == {transfer.Setting(2, 64, 0.5)}
    assert caplog.text.count("left out") == 2
    assert compare.main(["compare", f"--sweep={folder}", f"--out={folder}/out"]) == 0
    assert [p.name for p in (folder / "out").iterdir()] == ["collapse_curve.png"]
    assert imread(folder / "out" / "collapse_curve.png")[..., :3].std() > 0.02


def test_other_keys_of_the_grid_are_lines_and_other_losses_have_no_theory(sweep):
    grid = {"contrast.a_spread": "1.0", "temperature": "0.2"}
    rows = [
        ("l_spread", grid, spread(1, 1, temperature=0.2), {0: 0.5}),
        ("l_spread", grid | {"temperature": "0.5"}, spread(1, 0), {0: 0.7}),
        ("l_spread", grid | {"temperature": "x"}, spread(0, 1, clip_positive=1.0), {0: 0.6}),
    ]
    points, settings = sweeps.read_collapse(sweep(rows, measure="knn.accuracy"))  # from the runs' own results
    names = [f"l_spread temperature={t}" for t in ("0.2", "0.5", "x")]
    assert points == dict(zip(names, ({0.5: [0.5]}, {1.0: [0.7]}, {0.0: [0.6]}), strict=True))
    assert [settings[n] for n in names] == [transfer.Setting(2, 64, 0.2), transfer.Setting(2, 64, 0.5), None]


@pytest.mark.parametrize("how", [dict(facts=False), dict(batch_size=2)])
def test_theory_needs_the_number_of_classes_and_two_images_of_each(sweep, how):
    assert sweeps.read_collapse(sweep([("c", {}, spread(1, 1), {0: 0.5})], **how))[1] == {"c": None}


def negatives(alpha, **options):
    return {"kind": "moco", "negatives": "target/negatives", "alpha": alpha} | options


def test_a_sweep_over_the_weight_of_negatives(sweep, caplog):
    """Fixture values are the cosine, which here stands for the accuracy in domain; the others are read from results."""
    folder = sweep(
        [
            ("nonsemantic", {"alpha": "1", "lr": "0.1"}, negatives(1), {0: 0.5, 1: 0.6}),
            ("nonsemantic", {"alpha": "2", "lr": "0.1"}, negatives(2), {0: 0.55}),
            ("nonsemantic", {"alpha": "2", "lr": "0.2"}, negatives(2.0), {0: 0.45}),
            ("nonsemantic:none", {"alpha": "1", "lr": "0.1"}, negatives(1, negatives=""), {0: 0.7, 1: 0.8}),
            ("nonsemantic:none", {"alpha": "2", "lr": "0.1"}, negatives(2, negatives=""), {0: 0.7, 1: 0.8}),
            ("ce", {"alpha": "1", "lr": "0.1"}, None, {0: 0.9}),
        ],
        measure="linear.accuracy",
    )
    ood = {"shifted": {"accuracy": 0.25}, "texture": {"accuracy": 0.125}}
    run_folder.write_json(folder / "0" / "seed-1" / "results.json", {"ood": ood, "shape_bias": {"shape_bias": None}})
    panels = sweeps.read_alphas(folder)
    assert panels == {
        "In domain": {
            "nonsemantic lr=0.1": {1.0: [0.5, 0.6], 2.0: [0.55]},
            "nonsemantic lr=0.2": {2.0: [0.45]},
            "nonsemantic:none lr=0.1": {None: [0.7, 0.8]},  # once, though the grid ran it twice
            "ce lr=0.1": {None: [0.9]},
        },
        "Shifted test": {"nonsemantic lr=0.1": {1.0: [0.25]}},
        "Texture only": {"nonsemantic lr=0.1": {1.0: [0.125]}},
    }
    assert compare.main(["compare", f"--sweep={folder}", f"--out={folder}/out"]) == 0
    assert [p.name for p in (folder / "out").iterdir()] == ["alpha_curves.png"]
    assert imread(folder / "out" / "alpha_curves.png")[..., :3].std() > 0.02


def test_one_alpha_is_no_curve(sweep):
    folder = sweep(
        [("a", {"lr": "1"}, negatives(2), {0: 0.5}), ("a", {"lr": "2"}, negatives(2), {0: 0.6})], "knn.accuracy"
    )
    with pytest.raises(UserError, match="no two runs in .* alpha") as error:
        compare.main(["compare", f"--sweep={folder}", f"--out={folder}/out"])
    assert "spread term" in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_that_measured_its_stages(sweep):
    folder = sweep([("a", {"lr": "1"}, None, {0: 0.1, 1: 0.3}), ("b", {}, None, {0: 0.5})], "knn.accuracy")
    for run, value in (("0/seed-0", 0.2), ("0/seed-1", 0.4), ("1/seed-0", 0.6)):
        centred = {s: {"crop": value + i / 10, "another image": 0.0} for i, s in enumerate(("stage1", "stage2"))}
        run_folder.write_json(folder / run / "results.json", {"invariance": {"centred": centred}})
    tables = sweeps.read_invariance(folder)
    assert list(tables) == ["a lr=1", "b"]
    assert tables["a lr=1"]["stages"] == ["stage1", "stage2"] and tables["b"]["transformations"][0] == "crop"
    np.testing.assert_allclose(tables["a lr=1"]["centred"], [[0.3, 0], [0.4, 0]])
    np.testing.assert_allclose(tables["b"]["centred"], [[0.6, 0], [0.7, 0]])
    compare.main(["compare", f"--sweep={folder}", f"--out={folder}/out"])
    assert imread(folder / "out" / "invariance.png")[..., :3].std() > 0.02


# ---- mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to compare"),
        (["--workdir={run}"], "no --out"),
        (["--workdir={run}", "--name=a", "--name=b", "--out={tmp}/o"], "2 --name for 1 --workdir"),
        (["--workdir={run}", "--workdir={run}", "--name=a", "--name=a", "--out={tmp}/o"], "--name=a is given twice"),
        (["--workdir={tmp}", "--out={tmp}/o"], "is not a run folder"),
        (["--workdir={run}+{tmp}/none", "--out={tmp}/o"], "none is not a run folder"),
        (["--sweep={tmp}", "--out={tmp}/o"], "is not the folder of a sweep"),
        (["--workdir={run}", "--out={tmp}/file/o"], "cannot make --out"),
        (["--workdirs={run}", "--out={tmp}/o"], "--workdirs"),
    ],
)
def test_mistakes(runs, tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        compare.main(["compare", *(a.format(run=runs[0], tmp=tmp_path) for a in arguments)])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o" / "fine_embedding.png").exists()


def test_a_sweep_without_the_cosine(sweep):
    folder = sweep([("l_spread:ce", {}, None, {0: 0.2})])
    with pytest.raises(UserError, match="no run in .* has both"):
        sweeps.read_collapse(folder)


def test_exit_code(monkeypatch, capsys):
    code, _, err = cli(["compare"], monkeypatch, capsys)
    assert code == 2 and "--workdir" in one_line(err) and "--sweep" in err


def test_a_folder_may_have_a_plus(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert compared.folders(f"{tmp_path}/a+b") == [tmp_path / "a+b"]
    assert compared.folders("a+c") == [*map(type(tmp_path), ("a", "c"))]


def test_equal_names_get_their_folders(tmp_path):
    for name, config in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": config}))
    one, two, three = (tmp_path / n for n in ("one", "two", "three"))
    assert compared.default_names([[one], [two], [one, three]]) == [f"same ({one})", f"same ({two})", "same + other"]
