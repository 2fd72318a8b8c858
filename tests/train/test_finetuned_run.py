"""A run that trains on from weights: stopped in the warm-up of its heads, and measured against what it began with."""

import jax
import numpy as np
import pytest
import tiny
from train_checks import config_module, final_state, record, shrink, writer_that

from jaxcl.models import weights
from jaxcl.models.trees import encoder_stats
from jaxcl.report import read_metrics
from jaxcl.train import log
from jaxcl.train import loop as train
from jaxcl.train.runs import evaluate_runs, load_run


class _Pulled(Exception):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> (config that begins with a file, the undisturbed run's folder, its results)."""
    folder = tmp_path_factory.mktemp("finetuned")
    c = shrink(config_module("simclr").get_config("unlabelled,finetune"), tiny.colours(folder / "colours.npz"))
    c.duration, c.optimizer.head_warmup, c.optimizer.warmup, c.optimizer.freeze = "6 steps", "4 steps", "0", "stem"
    c.checkpoint.every, c.eval.every, c.eval.quick, c.eval.final = "2 steps", "0", (), ("drift",)
    for view in c.views.values():
        view.jitter_p = view.grayscale = 0.0  # colour compiles slowly
    params, stats = tiny.model_variables(tiny.recipe(c).model)
    weights.write(folder / "begin", weights.flat(params["encoder"], encoder_stats(stats)), {})
    c.model.weights = str(folder / "begin")
    results = train.run(c, folder / "run")
    return c, folder / "run", results


def test_it_stops_in_the_warmup_and_goes_on(made, tmp_path, monkeypatch):
    c, reference, _ = made

    def pull():
        raise _Pulled

    with monkeypatch.context() as m:
        m.setattr(log, "MetricsWriter", writer_that(pull, 3))
        with pytest.raises(_Pulled):
            train.run(c, tmp_path)
    train.run(c, tmp_path)
    for a, b in zip(*(jax.tree.leaves(final_state(w, c)) for w in (tmp_path, reference)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert record(tmp_path) == record(reference)


def test_what_it_changed(made, monkeypatch):
    c, folder, results = made
    drift = results["drift"]
    assert drift["images"] == 16 and 0 < drift["cka"] <= 1 and drift["rank_kept"] > 0
    assert {row["step"] for row in read_metrics(folder) if "loss" in row} == set(range(1, 7))
    # The first weights lie in the run's folder: it is measured again without the file that it began with.
    file = weights.file_of(c.model.weights)
    content = file.read_bytes()
    file.unlink()
    try:
        again = evaluate_runs([load_run(folder)], ("drift",))["drift"]
    finally:
        file.write_bytes(content)
    assert again.keys() == drift.keys()
    for key in drift:
        np.testing.assert_allclose(again[key], drift[key], rtol=1e-4)
    begun = weights.read(folder / "first" / "main.safetensors").variables
    state = final_state(folder, c)
    for name, value in weights.flat(state.params["encoder"], {}).items():
        assert np.array_equal(value, begun[name]) == ("stem" in name), name
