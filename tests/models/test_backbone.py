"""Encoders taken out of runs and loaded again: the features of the run's own evaluation, and every way to be wrong."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

import jaxcl
from jaxcl import config as configs
from jaxcl.commands import export as command
from jaxcl.commands.export import export
from jaxcl.errors import UserError
from jaxcl.method.forward import of_encoder
from jaxcl.models import weights
from jaxcl.train.runs import load_run, open_run

ROOT = pathlib.Path(__file__).resolve().parents[2]


def config(data, side=tiny.SIDE):
    c = tiny.config(stage=False, background=False)
    with c.ignore_type():
        c.data.source = f"npz:{data}"
    c.name, c.size, c.eval.batch_size, c.eval.tap = "tiny", side, 16, "stage1"
    return c


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.colours(tmp_path_factory.mktemp("data") / "colours.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """Views of another size than the images', further batch norms, a second encoder of another kind and a target."""
    c = config(data, side=12)
    c.model.norm_sets = ("adv",)
    c.encoders.patches = configs.model("vit", patch=4, width=16, depth=2, heads=2, mlp_width=16, head_features=8)
    c.memory.target = configs.memory("ema")
    folder = tmp_path_factory.mktemp("run")
    tiny.saved_run(folder, c, class_names=("a", "b", "c", "d"))
    return folder


@pytest.fixture(scope="module")
def saved(run):
    return open_run(run)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "made" / "here"
    assert command.main(["export", f"--workdir={run}", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def backbone(exported):
    return jaxcl.load_backbone(exported)


def says(text, f, *args, **options):
    with pytest.raises(UserError) as error:
        f(*args, **options)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_the_features_of_the_evaluation(run, backbone, data):
    context = load_run(run).context()
    images = context.test.images
    features = np.asarray(backbone(images))
    assert features.shape == (16, 16) and features.dtype == np.float32 and backbone.features == 16
    np.testing.assert_allclose(features, context.features("test", "h"), rtol=1e-5, atol=1e-6)
    floats = images.astype(np.float32) / 255
    np.testing.assert_allclose(backbone(floats), features, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(backbone(jnp.asarray(floats)), backbone(floats))
    assert jax.eval_shape(backbone, floats).shape == (16, 16)  # inside of another jit, too
    # By flax alone, as somebody would who trains on.
    own = jax.jit(backbone.module.apply)(backbone.variables, backbone.normalize(images))
    np.testing.assert_allclose(own, features, rtol=1e-5, atol=1e-6)
    assert backbone.module.norm_sets == () and backbone.class_names == ("a", "b", "c", "d")


def test_stages_and_other_sizes(backbone):
    images = np.zeros((2, 20, 24, 3), np.uint8)
    maps = backbone.maps(images)
    assert {k: v.shape for k, v in maps.items()} == {"stage1": (2, 3, 3, 8), "stage2": (2, 2, 2, 16)}
    np.testing.assert_allclose(maps["stage2"].mean((1, 2)), backbone(images), rtol=1e-5, atol=1e-6)
    assert backbone.tap(images, "stage1").shape == (2, 3, 3, 8)
    grey = np.full((1, 12, 12, 1), 90, np.uint8)
    np.testing.assert_array_equal(backbone.normalize(grey), backbone.normalize(np.repeat(grey, 3, -1)))
    says("expected [N,H,W,3] (one image: image[None])", backbone, images[0])
    says("expected uint8, or floats", backbone, images.astype(np.int32))
    says("go from 0 to 255; expected 0 to 1", backbone, np.linspace(0, 255, 36, dtype=np.float32).reshape(1, 4, 3, 3))
    says("tap 'stage9' is not in this encoder", backbone.tap, images, "stage9")


def test_what_the_file_says(exported, run, data):
    about = json.loads((exported / "backbone.json").read_text())
    assert about["preprocessing"]["size"] == 12 and len(about["preprocessing"]["mean"]) == 3
    origin = about["provenance"]
    assert origin["step"] == 3 and origin["name"] == "tiny" and origin["source"] == f"npz:{data}"
    assert origin["config"]["model"]["norm_sets"] == ["adv"] and origin["jaxcl"] == jaxcl.__version__
    assert origin["commit"] == json.loads((run / "environment.json").read_text())["commit"]
    assert about["layout"] == "jaxcl" and "norm_sets" not in about["architecture"]
    content = (exported / "backbone.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["jaxcl"]) == about
    assert sorted(p.name for p in exported.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_encoders_by_name(saved, tmp_path):
    target = saved.state.memory["target"]["params"]
    for name, params in (("patches", of_encoder(saved.state.params, "patches")), ("target", target)):
        found = jaxcl.load_backbone(export(saved, tmp_path / f"{name}.safetensors", encoder=name))
        wanted = weights.flat(params["encoder"], {})
        got = weights.flat(found.variables["params"], {})
        assert got.keys() == {k for k in wanted if "_adv" not in k}
        assert all((np.asarray(got[k]) == np.asarray(wanted[k])).all() for k in got)
    patches = jaxcl.load_backbone(tmp_path / "patches.safetensors")
    assert patches(np.zeros((1, 12, 12, 3), np.uint8)).shape == (1, 16)
    assert patches.tap(np.zeros((1, 12, 12, 3), np.uint8), "block1").shape[0] == 1
    says("has no stages", patches.maps, np.zeros((1, 12, 12, 3), np.uint8))
    says("--encoder is 'other'; expected one of '', 'patches', 'target'", export, saved, tmp_path, encoder="other")
    says("vit has no torch layout", export, saved, tmp_path, encoder="patches", layout="torch")
    says("--format is 'onnx'; expected jaxcl or torch", export, saved, tmp_path, layout="onnx")


def test_the_torch_layout(saved, backbone, tmp_path):
    """The same backbone by torchvision's names: with what jaxcl adds, and as a stranger's file without a word."""
    export(saved, tmp_path / "torch.safetensors", layout="torch")
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    found = jaxcl.load_backbone(tmp_path / "torch.safetensors")
    np.testing.assert_array_equal(found(images), backbone(images))
    about = json.loads((tmp_path / "torch.json").read_text())
    assert about["torch"] == {"conv1": {"kernel_size": 4, "stride": 4, "padding": 0}, "maxpool": False}
    state = safetensors.numpy.load_file(tmp_path / "torch.safetensors")
    assert state["layer2.0.downsample.0.weight"].shape == (16, 8, 1, 1)
    safetensors.numpy.save_file(state | {"fc.bias": np.zeros(3, np.float32)}, tmp_path / "plain.safetensors")
    says("give size=, mean= and std=", jaxcl.load_backbone, tmp_path / "plain.safetensors")
    given = dict(size=12, mean=backbone.mean, std=backbone.std)
    plain = jaxcl.load_backbone(tmp_path / "plain.safetensors", **given)
    np.testing.assert_array_equal(plain(images), backbone(images))


def test_files_that_are_no_backbone(tmp_path, exported):
    says("cannot be read (no such file", jaxcl.load_backbone, tmp_path)
    bad = tmp_path / "bad.safetensors"
    whole = (exported / "backbone.safetensors").read_bytes()
    for content, words in (
        (b"", "is no safetensors file, or damaged"),
        (whole[: len(whole) // 2], "is no safetensors file, or damaged"),
        (b"PK\x03\x04 and so on", "is no file of torch.save, or damaged"),
        (safetensors.numpy.save({"w": np.zeros(2)}), "holds w, ...; expected an export of jaxcl"),
        (
            safetensors.numpy.save({"conv1.weight": np.zeros(3, np.int32), "bn1.weight": np.zeros(3, np.float32)}),
            "conv1.weight is I32; expected",
        ),
    ):
        bad.write_bytes(content)
        says(words, jaxcl.load_backbone, bad)
    tensors = safetensors.numpy.load(whole)

    def changed(**other):
        about = json.loads((exported / "backbone.json").read_text()) | other
        bad.write_bytes(safetensors.numpy.save(tensors, {"jaxcl": json.dumps(about)}))

    changed(architecture={"kind": "mixer"})
    says("is no backbone of this version of jaxcl: architecture.kind is 'mixer'", jaxcl.load_backbone, bad)
    tensors.pop("params.stem_bn.scale")
    changed()
    says("params.stem_bn.scale is absent there and (8,) here", jaxcl.load_backbone, bad)


def test_a_run_whose_data_is_gone(tmp_path, caplog):
    data = tiny.colours(tmp_path / "gone.npz")
    tiny.saved_run(tmp_path / "run", config(data))
    data.unlink()
    with caplog.at_level("INFO", "jaxcl"):
        found = jaxcl.load_backbone(export(open_run(tmp_path / "run"), tmp_path / "out"))
    assert found.class_names == () and "without class names" in caplog.text
    says("is not a run folder", command.main, ["export", f"--workdir={tmp_path}", f"--out={tmp_path}"])
    says("no --out", command.main, ["export", f"--workdir={tmp_path}"])


def test_a_file_that_cannot_be_written(saved, tmp_path):
    (tmp_path / "file").write_text("")
    says("cannot write", export, saved, tmp_path / "file" / "out")


def test_losses_alone_stay_light():
    code = (
        "import sys; from jaxcl import losses; print([m for m in sys.modules if m.split('.')[0] in ('flax', 'grain')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'load_backbones'"):
        _ = jaxcl.load_backbones


def test_a_bucket(saved, backbone, tmp_path, monkeypatch):
    tiny.bucket(tmp_path, monkeypatch)
    export(saved, "gs://bucket/some/place")
    assert sorted(p.name for p in (tmp_path / "some" / "place").iterdir()) == ["backbone.json", "backbone.safetensors"]
    images = np.zeros((1, 12, 12, 3), np.uint8)
    np.testing.assert_array_equal(jaxcl.load_backbone("gs://bucket/some/place")(images), backbone(images))
    says("cannot be read", jaxcl.load_backbone, "gs://bucket/other")
