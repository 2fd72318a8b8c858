"""Training that begins with weights: what of the state they are, what a resumed run makes of them, what is refused."""

import functools

import jax
import numpy as np
import pytest
import tiny

from jaxcl import config as configs
from jaxcl.errors import UserError
from jaxcl.method.init_state import init_state
from jaxcl.method.initial_weights import starting_weights
from jaxcl.models import make_model, weights
from jaxcl.models.registry import MODELS
from jaxcl.models.resnet_torch import ResNetLayout
from jaxcl.models.trees import encoder_stats
from jaxcl.runtime.registry import make_part
from jaxcl.train import loop as train
from jaxcl.train.checkpoint import Checkpoints
from jaxcl.train.runs import open_run


def says(text, f, *args, **options):
    with pytest.raises(UserError) as error:
        f(*args, **options)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


def variables_of(node, seed):
    model = make_model(make_part("model", node, MODELS))
    params, stats = tiny.model_variables(model, seed=seed)
    return weights.flat(params["encoder"], encoder_stats(stats))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of the tiny network: by our names and, with other values, by torchvision's."""
    folder, c = tmp_path_factory.mktemp("weights"), tiny.tiny_model(configs.default())
    about = {"provenance": {"name": "before", "step": 7}}
    ours, torch = variables_of(c.model, 5), variables_of(c.model, 6)
    weights.write(folder / "ours", ours, about)
    weights.write(folder / "torch.safetensors", torch, {}, torch=ResNetLayout())
    return {"ours": (folder / "ours", ours), "torch": (folder / "torch.safetensors", torch)}


def config(files):
    c = tiny.config(stage=False, background=False)
    c.model.norm_sets = ("adv",)
    c.model.weights = str(files["ours"][0])
    c.encoders.second = configs.model("resnet", **{k: c.model[k] for k in ("stem", "stage_sizes", "stage_widths")})
    c.encoders.second.weights = str(files["torch"][0])
    c.memory.target = configs.memory("ema")
    return c


def test_what_begins_with_them(files, caplog):
    c = config(files)
    recipe = tiny.recipe(c)
    with caplog.at_level("INFO", "jaxcl"):
        given = starting_weights(c, recipe)
    assert f"model.weights {files['ours'][0]}: " in caplog.text and "before at step 7" in caplog.text
    # On shapes alone, with what is given known: the initialisation of the rest compiles slowly.
    state = jax.eval_shape(functools.partial(init_state, recipe), 0, given)
    plain = jax.eval_shape(lambda: init_state(recipe))
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), plain)
    create = jax.jit(functools.partial(init_state, recipe), compiler_options={"xla_backend_optimization_level": 0})
    states = [create(np.uint32(seed), given) for seed in range(2)]

    def same(params, stats, wanted):
        beside = ("head", "branches", "encoders")
        found = weights.flat(params["encoder"], {k: v for k, v in stats.items() if k not in beside})
        for name, value in found.items():
            np.testing.assert_array_equal(value, wanted[name.replace("_adv.", ".")])  # further norms as the clean ones
        assert found.keys() >= wanted.keys()

    for s in states:
        same(s.params, s.batch_stats, files["ours"][1])
        same(**{k.replace("batch_", ""): v for k, v in s.memory["target"].items()}, wanted=files["ours"][1])
        same(s.params["encoders"]["second"], s.batch_stats["encoders"]["second"], files["torch"][1])
    heads = [jax.tree.leaves(s.params["head"]) for s in states]
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*heads, strict=True))  # of the seed


def test_what_does_not_fit(files, tmp_path):
    def start(**changes):
        c = config(files)
        c.model.norm_sets = ()
        for key, value in changes.items():
            c.model[key] = value
        return starting_weights(c, tiny.recipe(c))

    nowhere = str(tmp_path / "nowhere.safetensors")
    says("cannot be read (no such file or directory)", start, weights=nowhere)
    says("does not fit the encoder: batch_stats.stages_0_1.bn1.mean is absent there and", start, stage_sizes=(2, 1))
    says("params.stem_conv.kernel is (4, 4, 3, 8) there and (3, 3, 3, 8) here", start, stem="cifar")
    says("batch_stats.stages_0_0.bn1.mean is (8,) there and absent here (and", start, norm="group")
    assert set(start()) == {"", "second"} and set(start(weights="")) == {"second"}
    c = config(files)
    c.encoders.second.stage_widths = (8, 24)
    says(f"encoders.second.weights {files['torch'][0]} does not fit", starting_weights, c, tiny.recipe(c))


def test_a_run_that_begins_with_them(files, tmp_path, monkeypatch):
    """The file is read before anything compiles or is written, and no more once there is a checkpoint."""
    labels = []

    def nothing_learned(recipe, phase, *shardings):
        def update(state, batch):
            with jax.transfer_guard("allow"):
                labels.append(np.bincount(batch["label"]).tolist())
                return state.replace(step=state.step + 1), {"loss": np.float32(1)}

        return update

    monkeypatch.setattr(train, "compile_update", nothing_learned)
    c = tiny.config(stage=False, background=False, epochs=1)
    with c.ignore_type():
        c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
    c.duration, c.report, c.eval.final, c.eval.every, c.eval.tap = "1 step", False, (), "0", "stage1"
    c.batch_size, c.data.per_class, c.devices = 12, 4, 1
    c.model.weights = str(tmp_path / "nowhere")
    says("cannot be read", train.run, c, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    path = weights.write(tmp_path / "somewhere", files["ours"][1], {})
    c.model.weights = str(tmp_path / "somewhere")
    train.run(c, tmp_path / "run")
    assert [[n for n in counts if n] for counts in labels] == [[4, 4, 4]]  # batches of data.per_class
    state = open_run(tmp_path / "run").state
    found = weights.flat(state.params["encoder"], {})
    for name in found:
        np.testing.assert_array_equal(found[name], files["ours"][1][name])

    path.unlink()
    (tmp_path / "run" / "results.json").unlink()
    assert train.run(c, tmp_path / "run")["steps"] == 1  # nothing to begin with: it goes on
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest == 1
    (tmp_path / "run" / "results.json").unlink()
    c.model.weights = ""
    says("holds a run of another config, model.weights", train.run, c, tmp_path / "run")
