"""Configs that name weights: what the weights decide, what contradicts them, and runs that go on without them."""

import json
import pathlib
import shutil
import sys

import hub_cache
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

import jaxcl
from jaxcl import config as configs
from jaxcl import main as program
from jaxcl.commands.config_file import read_config
from jaxcl.commands.export import export
from jaxcl.errors import UserError
from jaxcl.method.init_state import init_state
from jaxcl.method.initial_weights import starting_weights
from jaxcl.method.recipe import Phase
from jaxcl.method.update import make_update
from jaxcl.models import make_model, weights
from jaxcl.models.registry import MODELS
from jaxcl.runtime.registry import make_part
from jaxcl.train import config_diff, pretrained
from jaxcl.train import loop as train
from jaxcl.train.runs import load_run, open_run

HUB = pathlib.Path(__file__).resolve().parents[1] / "golden" / "hub_resnet"
WORD = "hf:org/resnet-tiny"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def says(text, f, *args, **options):
    with pytest.raises(UserError) as error:
        f(*args, **options)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the hub with one model, and no client."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    hub_cache.add(tmp_path / "hub", "org/resnet-tiny", {name: (HUB / name).read_bytes() for name in names})
    return tmp_path / "hub"


@pytest.fixture
def vit(tmp_path):
    """An export of jaxcl, of an encoder without batch norms, at 16 pixels."""
    node = configs.model("vit", patch=4, width=16, depth=2, heads=2, mlp_width=16)
    params, stats = tiny.model_variables(make_model(make_part("model", node, MODELS)), side=16)
    options = {k: node[k] for k in ("kind", "patch", "width", "depth", "heads", "mlp_width")}
    about = {"architecture": options, "preprocessing": {"size": 16, "mean": (0.1,) * 3, "std": (0.3,) * 3}}
    weights.write(tmp_path / "vit", weights.flat(params["encoder"], {}), about)
    return str(tmp_path / "vit")


def read(name, *overrides, word=WORD, **options):
    given = [f"--config.model.weights={word}", *(f"--config.{o}" for o in overrides)]
    return read_config(f"configs/{name}.py", given, **options)


# ---- what is decided


@pytest.mark.parametrize("name", ["simclr", "supcon", "excon", "clae"])
def test_the_word_alone(name, cache):
    """The update of each method is traced: views of the data's size, which the encoder enlarges."""
    c = read(name, "batch_size=16")
    assert c.model.kind == "resnet" and c.model.strides == (2, 2) and c.model.stem == "imagenet"
    assert (c.model.stage_sizes, c.model.stage_widths) == ((1, 2), (8, 16))
    assert (c.model.input_size, c.model.input_interpolation) == (48, "bicubic")
    assert c.data.mean == MEAN and c.data.std == STD
    assert c.model.norm_sets == (("adv",) if name == "clae" else ())
    recipe = tiny.recipe(c)
    assert recipe.image_shape == (16, 16, 3) and recipe.mean == MEAN
    given = starting_weights(c, recipe)
    state = jax.eval_shape(lambda: init_state(recipe, 0, given))
    update = make_update(recipe, Phase("encoder", tuple(range(len(recipe.stages)))))
    new, metrics = jax.eval_shape(update, state, tiny.batch())
    assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics


def test_what_is_recorded(cache):
    c = read("simclr")
    known = configs.to_dict(c)["pretrained"]["model"]
    assert known["word"] == WORD and known["weights"] == f"{WORD}@{hub_cache.HASH}"
    assert known["preprocessing"]["mean"] == list(MEAN) and known["preprocessing"]["fit"] == "crop"
    assert known["sha256"][0].split() == [known["sha256"][0].split()[0], "model.safetensors"]
    again = configs.from_dict(configs.to_dict(c))
    assert configs.to_dict(again) == configs.to_dict(c)
    shutil.rmtree(cache)
    pretrained.settle(again, pretrained.resolve(again))  # it is all there
    assert configs.to_dict(again) == configs.to_dict(c)


def test_options_of_the_user_stay(cache):
    c = read("excon", "model.input_size=64", "model.input_interpolation=bilinear", "model.head_features=7")
    assert (c.model.input_size, c.model.input_interpolation, c.model.head_features) == (64, "bilinear", 7)
    # The map of stage 2 has 4 pixels a side at 64, that of stage 1 has 8.
    assert c.eval.tap == c.stages[0].tap == "stage1"
    c = read("excon", "eval.tap=stage2", "stages[0].tap=stage2", "model.input_size=0")
    assert c.eval.tap == c.stages[0].tap == "stage2" and c.model.input_size == 0
    assert c.data.files.image_size == 0  # no files
    assert read("simclr", "data.source=folder:photos").data.files.image_size == 48
    assert read("simclr", "data.source=folder:photos", "model.input_size=96").data.files.image_size == 96
    assert read("simclr", "data.source=folder:photos", "data.files.image_size=20").data.files.image_size == 20


def test_options_that_agree(cache):
    same = ("model.kind=resnet", "model.stem=imagenet", "model.strides=(2,2)", f"data.mean={MEAN}")
    assert configs.to_dict(read("simclr", *same)) == configs.to_dict(read("simclr"))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.kind=vit", "model.kind is 'vit', but"),
        ("model.stem=cifar", "model.stem is 'cifar', but"),
        ("model.strides=(1,2)", "model.strides is (1, 2), but"),
        ("model.stage_widths=(8,32)", "model.stage_widths is (8, 32), but"),
        ("data.std=(1.0,1.0,1.0)", "data.std is (1.0, 1.0, 1.0), but"),
    ],
)
def test_contradictions(override, text, cache):
    says(text, read, "simclr", override)


def test_the_exit_code(cache, tmp_path):
    argv = ["train", "--config=configs/simclr.py", f"--workdir={tmp_path / 'run'}"]
    says("leave it out", program.main, [*argv, f"--config.model.weights={WORD}", "--config.model.depth=7"])
    says("pip install 'jaxcl[pretrained]'", program.main, [*argv, "--config.model.weights=hf:org/other"])
    assert not (tmp_path / "run").exists()


def test_an_option_of_the_kind_that_the_weights_bring(vit):
    """Nobody has to name the kind. Batch norms of the config, and passes through them, go."""
    c = read("clae", "model.patch=4", word=vit)
    assert (c.model.kind, c.model.patch, c.model.input_size) == ("vit", 4, 0)
    assert not any(p.norm_set for p in c.passes) and c.stages[0].norm_set == ""
    assert c.data.mean == (0.1,) * 3 and c.eval.tap.startswith("block")
    tiny.recipe(c.copy_and_resolve_references(), image_shape=(16, 16, 3), num_examples=256)


def test_weights_that_need_different_images(cache, vit):
    c = tiny.config(stage=False, background=False)
    c.model.weights = WORD
    c.encoders.second = configs.model("vit", weights=vit)
    says("encoders.second.weights need images normalised by", pretrained.resolve, c)
    c = tiny.config(stage=False, background=False)
    c.encoders.second = configs.model("vit", weights=vit)
    pretrained.resolve(c)
    assert c.encoders.second.width == 16 and c.data.mean == (0.1,) * 3 and set(c.pretrained) == {"encoders/second"}


def test_weights_that_tell_nothing_about_images(cache, tmp_path):
    """The moments of the data stay; those of a config's own are no contradiction."""
    tensors = safetensors.numpy.load((HUB / "model.safetensors").read_bytes())
    del tensors["classifier.1.weight"], tensors["classifier.1.bias"]
    safetensors.numpy.save_file(tensors, tmp_path / "bare.safetensors")
    c = read("simclr", word=tmp_path / "bare.safetensors")
    assert c.data.mean == () and c.model.input_size == 0
    many = tensors | {"fc.weight": np.zeros((1000, 16), np.float32)}
    safetensors.numpy.save_file(many, tmp_path / "imagenet.safetensors")
    c = read("simclr", word=tmp_path / "imagenet.safetensors")
    assert c.data.mean == (0.485, 0.456, 0.406) and c.model.input_size == 224
    c = read("simclr", "data.mean=(0.5,0.5,0.5)", "data.std=(0.5,0.5,0.5)", word=tmp_path / "imagenet.safetensors")
    assert c.data.mean == (0.5,) * 3


# ---- runs


@pytest.fixture
def nothing_learned(monkeypatch):
    def compile_update(recipe, phase, *shardings):
        def update(state, batch):
            with jax.transfer_guard("allow"):
                return state.replace(step=state.step + 1), {"loss": np.float32(1)}

        return update

    monkeypatch.setattr(train, "compile_update", compile_update)


def short(tmp_path):
    c = tiny.config(stage=False, background=False)
    with c.ignore_type():
        c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
    c.duration, c.report, c.eval.final, c.eval.every, c.eval.tap = "1 step", False, (), "0", "stage1"
    c.batch_size, c.devices, c.eval.batch_size = 16, 1, 16
    return c


def test_a_run_without_a_network(cache, tmp_path, nothing_learned):
    """Begun from a model of the hub, whose cache is then gone: it is continued, evaluated and exported."""
    c, run = short(tmp_path), tmp_path / "run"
    c.model.weights = WORD
    train.run(c, run)
    assert c.model.stem == "patch4"  # the caller's config is not changed
    known = json.loads((run / "config.json").read_text())
    assert known["model"]["weights"] == WORD and known["model"]["input_size"] == 48
    assert known["pretrained"]["model"]["weights"].endswith(hub_cache.HASH)
    shutil.rmtree(cache)
    (run / "results.json").unlink()
    assert train.run(c, run)["steps"] == 1
    assert train.run(c, run)["steps"] == 1  # finished

    # The features of the evaluation are those of the hub's own network, on images that are enlarged by Pillow's filter.
    context = load_run(run).context()
    found = context.features("test", "h")
    image = jax.numpy.asarray(context.test.images, jax.numpy.float32) / 255
    image = jax.image.resize(image, (16, 48, 48, 3), "cubic")
    tensors = weights.read(HUB)
    model = make_model(make_part("model", configs.from_dict(known).model, MODELS))
    params, stats = weights.fit("w", tensors.variables, model, (48, 48, 3))
    own = model.encoder.apply({"params": params, "batch_stats": stats}, (image - np.array(MEAN)) / np.array(STD))
    np.testing.assert_allclose(found, own, rtol=1e-3, atol=1e-4)

    about = export(open_run(run), tmp_path / "out")
    backbone = jaxcl.load_backbone(about)
    np.testing.assert_allclose(backbone(context.test.images), found, rtol=1e-4, atol=1e-5)
    assert backbone.mean == MEAN and backbone.interpolation == "bicubic"
    assert backbone.about["provenance"]["config"]["pretrained"]["model"]["word"] == WORD
    # Trained on from the export: images are enlarged as before.
    c.model.weights = str(tmp_path / "out")
    pretrained.settle(c, pretrained.resolve(c))
    assert (c.model.input_size, c.model.input_interpolation, c.data.mean) == (48, "bicubic", MEAN)
    says("another config, model.weights", train.run, c, run)


def test_the_command_line_remembers(cache, tmp_path, nothing_learned):
    c, run = short(tmp_path), tmp_path / "run"
    c.model.weights = WORD
    train.run(c, run)
    shutil.rmtree(cache)
    assert read("simclr", workdir=run).data.mean == MEAN
    says("pip install 'jaxcl[pretrained]'", read, "simclr", workdir=tmp_path / "other")


def test_a_file_that_changes_before_the_first_checkpoint(cache, tmp_path):
    shutil.copy(HUB / "model.safetensors", tmp_path / "net.safetensors")
    c = short(tmp_path)
    c.model.weights = str(tmp_path / "net.safetensors")
    pretrained.settle(c, pretrained.resolve(c))
    recipe = tiny.recipe(c)
    assert set(starting_weights(c, recipe)) == {""}
    before = configs.to_dict(c)
    tensors = safetensors.numpy.load((HUB / "model.safetensors").read_bytes())
    safetensors.numpy.save_file({k: np.asarray(v + 1) for k, v in tensors.items()}, tmp_path / "net.safetensors")
    says("is another file than when the run began", starting_weights, c, recipe)
    # Hosts of one run compare their configs, and so the hashes of their files.
    c.pretrained = {}
    pretrained.settle(c, pretrained.resolve(c))
    (odd,) = config_diff.differences(before, configs.to_dict(c))
    assert odd.startswith("pretrained.model.sha256")
