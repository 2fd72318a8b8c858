"""The papers' claims: the rule and its verdicts, what is planned, what is written, and the real command in small."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT, cli, one_line
from scipy.stats import t as student

from jaxcl.commands.claims import main as claims
from jaxcl.commands.claims import table as claims_table
from jaxcl.commands.claims.methods import AUTHORS, CLAIMS, COARSE, FINE, MEASURES, METHODS, NETWORK, SETTINGS, SPURIOUS
from jaxcl.commands.claims.table import Result
from jaxcl.commands.sweep import main as sweep
from jaxcl.errors import UserError
from jaxcl.evaluate.registry import EVALUATORS


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


# ---- the rule


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).standard_normal(count) + 0.3
    mean, low, high = claims_table.interval(list(values))
    half = student.ppf(0.95, count - 1) * values.std(ddof=1) / count**0.5
    np.testing.assert_allclose([mean, low, high], [values.mean(), values.mean() - half, values.mean() + half])
    assert claims_table.interval(list(values[:1])) == (values[0], -math.inf, math.inf)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [
        low <= 1 <= high
        for _, low, high in (claims_table.interval(list(1 + rng.standard_normal(4))) for _ in range(2000))
    ]
    assert abs(np.mean(inside) - 0.9) < 0.02


@pytest.mark.parametrize(
    "differences, direction, said",
    [
        ([0.03, 0.04, 0.035], 1, "seen"),
        ([0.03, 0.04, 0.035], -1, "opposite"),
        ([-0.03, -0.04, -0.035], -1, "seen"),
        ([-0.03, -0.04, -0.035], 1, "opposite"),
        ([0.03, -0.01, 0.035], 1, "not seen"),
        ([0.03, -0.01, 0.035], -1, "not seen"),
        ([0.01, 0.03], 1, "not seen"),  # t with one degree of freedom: 6.3 standard errors
        ([0.02, 0.02], 1, "seen"),  # no spread at all
        ([0.0, 0.0, 0.0], 1, "not seen"),
        ([0.5], 1, "not measured"),
        ([], -1, "not measured"),
    ],
)
def test_verdicts(differences, direction, said):
    assert claims_table.verdict(differences, direction) == said


# ---- what there is


def test_the_list_is_whole():
    for name, method in METHODS.items():
        assert (ROOT / method.config.partition(":")[0]).is_file() and method.baseline in ("", *METHODS)
        assert method.labels or COARSE not in method.settings, name  # it would train the same encoder again
    for claim in CLAIMS:
        assert claim.direction in (1, -1) and claim.paper in AUTHORS and claim.text and claim.section
        for name in (claim.method, claim.baseline):
            assert claims_table.place(name, claim.measure)[0] in METHODS[name].settings, claim.text
        if better := MEASURES[claim.measure].better:
            assert claim.direction == better
    assert len({(c.method, c.baseline, c.measure) for c in CLAIMS}) == len(CLAIMS)
    assert {c.paper for c in CLAIMS} == set(AUTHORS)
    for measure in MEASURES.values():  # somebody measures it
        head = measure.path.partition(".")[0]
        assert measure.path == "seconds_per_update" or head in SETTINGS[measure.setting].final and head in EVALUATORS


def test_the_docstring_states_the_rule_and_every_claim():
    words = re.sub(r"\s+", " ", claims.__doc__)
    listed = [line.strip() for line in claims.__doc__.splitlines() if re.search(r"^    \w+ [<>] \w+: ", line)]
    assert listed == [c.line for c in CLAIMS]
    for said in ("90 % interval of its mean by Student's t", '"seen"', '"opposite"', '"not seen"', '"not measured"'):
        assert said in words and said in claims_table.RULE


@pytest.fixture(scope="module")
def planned():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        options = dict(source="garments", seeds=2, budget="7 epochs", sets=[], out=pathlib.Path("out"))
        return claims.plan_runs(list(METHODS), **options)


def test_every_run_has_one_budget_and_one_encoder(planned):
    assert [p.run.seed for p in planned] == sorted(p.run.seed for p in planned)
    assert len({p.run.workdir for p in planned}) == len(planned) == 2 * sum(len(m.settings) for m in METHODS.values())
    network = dict(text.removeprefix("model.").split("=") for text in NETWORK[:3])
    for p in planned:
        c = p.run.config
        assert (c["duration"], c["batch_size"], c["data"]["source"]) == ("7 epochs", 128, "garments")
        assert c["data"]["labels"] == ("fine" if p.setting == FINE else "coarse")
        assert c["data"]["garments"]["spurious"] == (0.95 if p.setting == SPURIOUS else 0)
        assert not c["data"]["validation"] and c["eval"]["split"] == "test"
        for model in (c["model"], *c["encoders"].values()):
            assert {k: str(tuple(model[k])) for k in network} == network
        taps = [s["tap"] for s in c["stages"] if s["kind"] == "saliency"]
        assert taps in ([], ["stage2"])
        for key in p.run.arguments[1:]:
            assert "lr=" not in key and "temperature" not in key  # each recipe's own


def test_the_default_run_is_planned_to_take_three_hours_at_most(planned):
    of_a_seed = claims.estimate([p for p in planned if p.run.seed == 0], "garments", claims.FLAGS.default("budget"))
    assert 1.0 < 3 * of_a_seed / 2 / 3600 < 2.75


def test_cifar10_has_what_it_can_have(at_root):
    sets = ["data.source=npz:cifar10.npz"]
    planned = claims.plan_runs(
        ["supcon", "excon", "all_in_one", "thanos", "moco_patches", "barlow_ladder"],
        source="cifar10", seeds=1, budget="1 epoch", sets=sets, out=pathlib.Path("o"),
    )  # fmt: skip
    assert {p.setting for p in planned} == {FINE, COARSE}
    assert {p.run.config["data"]["source"] for p in planned} == {"npz:cifar10.npz"}
    asked = [c for c in CLAIMS if claims_table.asked(MEASURES[c.measure], "cifar10")]
    assert asked and not any(MEASURES[c.measure].setting == SPURIOUS for c in asked)


def test_baselines_come_with_their_methods():
    assert claims._chosen("excon") == ["supcon", "excon"]
    assert claims._chosen("thanos") == ["ce", "attract", "l_spread", "attract_auto", "thanos"]
    assert claims._chosen("") == list(METHODS)
    with pytest.raises(UserError, match="--methods names 'exconn'; did you mean 'excon'"):
        claims._chosen("exconn")


def test_every_shipped_config_is_in_the_results():
    """With its numbers, or as not yet run."""
    text = (ROOT / "docs" / "results.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        assert re.search(rf"\b{path.stem}(\.py|\b)", text), path.name


# ---- figures


def nested(path, value):
    head, _, rest = path.partition(".")
    return {head: nested(rest, value) if rest else value}


def results(values, state="finished"):
    """{(method, measure): {seed: value}} -> results of runs."""
    found = []
    for (method, measure), by_seed in values.items():
        setting, path = claims_table.place(method, measure)
        for seed, value in by_seed.items():
            found.append(Result(method, setting, seed, f"{method}/{setting}/seed-{seed}", state, nested(path, value)))
    return found


def content(found, methods):
    origin = dict(command="python -m jaxcl claims <&>", machine="a machine", commits=["abc"], seeds=[0, 1, 2])
    return {**origin, "budget": "2 epochs", "smoke": False, **claims_table.table(found, methods, "garments")}


@pytest.fixture
def judged():
    found = results(
        {
            ("supcon", "linear"): {0: 0.50, 1: 0.60, 2: 0.70},
            ("excon", "linear"): {0: 0.51, 1: 0.615, 2: 0.712},
            ("supcon", "drop"): {0: 0.5, 1: 0.5},
            ("excon", "drop"): {1: 0.45, 2: 0.4},  # one pair
            ("supcon", "ece_shifted"): {0: 0.05, 1: 0.06, 2: 0.07},
            ("excon", "ece_shifted"): {0: 0.08, 1: 0.09, 2: 0.11},
        }
    )
    found.append(Result("excon", FINE, 5, "excon/fine/seed-5", "diverged"))
    return content(found, ["supcon", "excon"])


def test_differences_are_paired_by_seed(judged):
    by_measure = {c["measure"]: c for c in judged["claims"]}
    linear = by_measure["linear"]
    assert linear["verdict"] == "seen"  # though the seeds differ by ten points, the pairs differ by little
    np.testing.assert_allclose(linear["mean"], np.mean([0.01, 0.015, 0.012]))
    assert [v["seed"] for v in linear["values"]] == [0, 1, 2]
    assert linear["values"][1] | {"value": 0} == {
        "seed": 1, "value": 0, "run": "excon/fine/seed-1", "path": "linear.accuracy",
        "method_value": 0.615, "baseline_value": 0.6, "baseline_run": "supcon/fine/seed-1",
    }  # fmt: skip
    assert by_measure["drop"]["verdict"] == "not measured" and len(by_measure["drop"]["values"]) == 1
    assert by_measure["ece_shifted"]["verdict"] == "opposite" and by_measure["iou"]["verdict"] == "not measured"
    rows = {row["method"]: row for row in judged["methods"]}
    assert rows["supcon"]["differences"] == {} and rows["excon"]["differences"]["linear"]["mean"] == linear["mean"]
    assert claims_table.counts(judged) == "7 claims: 1 seen, 1 opposite, 5 not measured"


def test_an_encoder_without_labels_needs_no_coarse_run():
    assert claims_table.place("moco", "coarse_to_fine") == (FINE, "linear.accuracy")
    assert claims_table.place("thanos", "coarse_to_fine") == (COARSE, "transfer.accuracy")
    found = results({("moco", "linear"): {0: 0.3, 1: 0.4}})
    (row,) = content(found, ["moco"])["methods"]
    assert row["measures"]["coarse_to_fine"]["mean"] == pytest.approx(0.35)


def test_what_an_update_costs():
    lines = [{"images_per_second": 3.0}, {"loss": 1}, *({"images_per_second": r} for r in (64.0, 128.0, 256.0))]
    assert claims_table.cost(128, lines) == 1.0  # the first line holds the compilation
    assert claims_table.cost(128, lines[:1]) is None and claims_table.with_cost({"a": 1}, 128, []) == {"a": 1}
    assert claims_table.with_cost({}, 128, lines) == {"seconds_per_update": 1.0}


def test_the_page_and_the_table(judged, tmp_path):
    from jaxcl.commands.claims.page import write_claims

    page = write_claims(tmp_path, judged).read_text()
    text = claims_table.markdown(judged)
    assert "<script" not in page and "&lt;&amp;&gt;" in page and (tmp_path / "claims.png").stat().st_size > 1000
    for shown in (page, text):
        plain = re.sub(r"<[^>]+>", "", shown)
        assert "+1.2 ± 0.4" in plain and "-1.0" not in plain
        assert "about one in twenty will be seen by chance" in plain and "1 opposite" in plain
    # Every number leads to its folders, which are linked.
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{target}"' in page
    assert '<a href="excon/fine/seed-1/">seed 1</a>' in page and "(diverged)" in page
    # What was not seen has its paragraph: what was tried and how the authors' setting differs.
    assert page.count("<h3>") == 1 and "calibrated under distributional shift: opposite" in page
    assert "Tried: 3 pairs of runs on garments, 2 epochs each" in page and "ResNet-50 for 200 epochs" in page
    assert "unseen textures and tints" in page


def test_a_smoke_run_says_that_it_is_none(judged):
    assert "nothing here is a result" in claims_table.markdown(judged | {"smoke": True})
    assert "nothing here is a result" not in claims_table.markdown(judged)


# ---- the command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods=supcon,exconn"], ["--methods", "'exconn'", "'excon'"]),
        (["--seeds=0"], ["--seeds", "0"]),
        (["--source=imagenet"], ["source", "imagenet"]),
        (["--methods=supcon", "--budget=4 weeks"], ["4 weeks"]),
        (["--methods=supcon", "--set=optimizer.lrr=1"], ["optimizer.lrr"]),
        (["--methods=supcon", "--set=data.labels=fine"], ["data.labels", "--grid and --set"]),
    ],
)
def test_mistakes(arguments, words, at_root, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep, "PROGRAM", ("/nothing",))  # a run that starts is an error of another kind
    code, _, err = cli(["claims", f"--out={tmp_path / 'out'}", *arguments], monkeypatch, capfd)
    assert code == 2 and all(word in one_line(err) for word in words), err
    assert not (tmp_path / "out").exists()


# A stand-in for `jaxcl train` that leaves results at once; they follow from the name of the config and the seed.
STAND_IN = """
import json, pathlib, sys
of = dict(a.split("=", 1) for a in sys.argv[1:])
out = pathlib.Path(of["--workdir"])
out.mkdir(parents=True)
c = json.loads((pathlib.Path(__file__).parents[0] / "configs.json").read_text())[str(out)]
value = 0.5 + 0.1 * c["seed"] + ("excon" in c["name"]) * (0.02 + 0.001 * c["seed"])
(out / "config.json").write_text(json.dumps(c))
(out / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 128.0}\\n' * 3)
(out / "results.json").write_text(json.dumps({"linear": {"accuracy": value}, "transfer": {"accuracy": value}}))
"""


def test_a_command_that_is_broken_off_goes_on(at_root, tmp_path, monkeypatch):
    program, out = tmp_path / "stand_in.py", tmp_path / "out"
    planned = claims.plan_runs(["supcon", "excon"], source="garments", seeds=2, budget="2 epochs", sets=[], out=out)
    program.write_text(STAND_IN)
    (tmp_path / "configs.json").write_text(json.dumps({str(p.run.workdir): p.run.config for p in planned}))
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    about = dict(methods=["supcon", "excon"], source="garments", budget="2 epochs", smoke=False)
    claims.Claims(planned[:4], out, about, "the first part").run(2)
    assert json.loads((out / "claims.json").read_text())["claims"][0]["verdict"] == "not measured"
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/seed-0/results.json")}
    command = ["claims.py", "--methods=excon", "--seeds=2", f"--out={out}"]
    assert claims.main(command) == 0
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(out / "compiled")
    assert len(before) == 4 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    found = json.loads((out / "claims.json").read_text())
    linear = found["claims"][0]
    assert (linear["measure"], linear["verdict"]) == ("linear", "seen") and len(linear["values"]) == 2
    for value in linear["values"]:  # each number is where it says
        results = json.loads((out / value["run"] / "results.json").read_text())
        assert results["linear"]["accuracy"] == value["method_value"]
    assert [row["measures"]["cost"]["mean"] for row in found["methods"]] == [1.0, 1.0]
    assert (out / "index.html").exists() and (out / "table.md").exists()
    with pytest.raises(UserError, match="holds a run of another config, duration: '2 epochs' -> '3 epochs'"):
        claims.main([*command, "--budget=3 epochs"])


def test_the_smoke_command(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jaxcl", "claims", "--smoke", f"--out={tmp_path}"],
        cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "claims.json").read_text())
    assert found["smoke"] and [r["state"] for row in found["methods"] for r in row["runs"]] == ["finished"] * 4
    (spread,) = (c for c in found["claims"] if c["measure"] == "coarse_to_fine")
    assert len(spread["values"]) == 2 and (tmp_path / "index.html").exists()
