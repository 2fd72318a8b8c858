"""The config that a command line names: where its file is, what may be wrong with it, overrides, and other kinds."""

import pathlib

import pytest
import tiny
from processes import ROOT

from jaxcl import config as base
from jaxcl.commands import config_file
from jaxcl.commands.config_file import read_config
from jaxcl.errors import UserError
from jaxcl.method.build import build_recipe

SIMCLR, EXCON, SUPCON = (f"{ROOT}/configs/{name}.py" for name in ("simclr", "excon", "supcon"))


def refused(argument, *overrides):
    with pytest.raises(UserError) as error:
        read_config(argument, [f"--config.{o}" for o in overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


def read(argument, *overrides):
    return read_config(argument, [f"--config.{o}" for o in overrides])


# ---- the file


@pytest.mark.filterwarnings("error")
def test_a_config_is_read_without_warnings():
    """Cases D.2: ml_collections' own flags load files by what Python 3.15 no longer has."""
    assert read(SUPCON, "seed=3").seed == 3


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


START = "from jaxcl import config as base\n"


@pytest.mark.parametrize(
    "body, words",
    [
        ("def get_config(:\n", ["SyntaxError", "mine.py, line 1"]),
        ("def get_config(preset=''):\n    return 1 / 0\n", ["ZeroDivisionError", "mine.py, line 2"]),
        ("import nothing_of_that_name\n", ["ModuleNotFoundError", "nothing_of_that_name", "mine.py, line 1"]),
        (START + "def get_config():\n    c = base.default()\n    c.model.x\n", ["AttributeError", "mine.py, line 4"]),
        ("config = 3\n", ["get_config"]),
        ("get_config = 3\n", ["get_config"]),
        ("def get_config():\n    return {'a': 1}\n", ["get_config", "ConfigDict"]),
        (START + "def get_config():\n    return base.term('supconn')\n", ["supconn", "supcon"]),
    ],
)
def test_files_that_do_not_run(body, words, here):
    (here / "mine.py").write_text(body)
    message = refused("mine.py")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "body, place",
    [
        (b"a = = 1\n", "mine.py, line 1"),
        (b"a = 1\n\0\n", "mine.py"),
        (b"a = 1\nb = '\xff'\n", "mine.py, line 2"),
        (b"def f():\n  a\n b\n", "mine.py, line 3"),
        (b"a = " + b"-" * 100000 + b"1\n", "mine.py"),
        (b"a = 1\nexec('1 /')\n", "mine.py, line 2"),
        (b"import broken_module_of_mine\n", "broken_module_of_mine.py, line 2"),
    ],
)
def test_wrong_syntax_is_found_in_the_file(body, place, here, monkeypatch):
    """Cases C.11: the config or what it imports, never a file of Python's own import."""
    (here / "mine.py").write_bytes(body)
    (here / "broken_module_of_mine.py").write_text("x = 1\ny = = 2\n")
    monkeypatch.syspath_prepend(here)
    assert refused("mine.py").endswith(f"({place})")


def test_a_preset_of_a_file_without(here):
    (here / "mine.py").write_text(START + "def get_config():\n    return base.default()\n")
    assert read("mine.py").seed == 0
    assert "cifar10" in refused("mine.py:cifar10")


@pytest.mark.parametrize("path", ["configs/nothing.py", "nothing.py", "nothing", "", "configs/simclrr.py:cifar10"])
def test_no_file(path, here):
    message = refused(path)
    assert path.partition(":")[0] in message and "--config=configs/" in message
    assert ("configs/simclr.py" in message) == ("simclr" in path)


def test_presets(here):
    assert "cifr10" in refused(f"{SUPCON}:cifr10") and "cifar10" in refused(f"{SUPCON}:cifr10")
    assert "choose one" in refused(f"{SUPCON}:cifar10,cifar100")
    american, british = (base.to_dict(read(f"{SIMCLR}:{word}")) for word in ("unlabeled", "unlabelled"))
    assert american == british != base.to_dict(read(SIMCLR))


def test_the_current_folder_first_then_the_installed_configs(here):
    """`extend` finds the file beside the one that is used."""
    assert base.to_dict(read("configs/excon.py:cifar10")) == base.to_dict(read(f"{EXCON}:cifar10"))
    (here / "configs").mkdir()
    (here / "configs" / "excon.py").write_text(
        START + "def get_config(preset=''):\n    c = base.extend(__file__, 'other.py', preset)\n    return c\n"
    )
    (here / "configs" / "other.py").write_text(
        START + "def get_config(preset=''):\n    c = base.default()\n    c.name = preset or 'mine'\n    return c\n"
    )
    assert read("configs/excon.py").name == "mine" and read("configs/excon.py:x").name == "x"
    assert config_file.find("configs/supcon.py") == ROOT / "configs" / "supcon.py"


def test_where_installed_configs_are(tmp_path, monkeypatch):
    monkeypatch.setattr(config_file, "__file__", str(tmp_path / "jaxcl" / "commands" / "config_file.py"))
    assert config_file.installed() == tmp_path / "configs"  # a checkout
    (tmp_path / "jaxcl" / "configs").mkdir(parents=True)
    assert config_file.installed() == tmp_path / "jaxcl" / "configs"  # a wheel


def test_a_dataclass_in_a_config_file(here):
    (here / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom jaxcl import config as base\n"
        "@dataclasses.dataclass\nclass Sizes:\n    small: int = 3\n"
        "def get_config():\n    c = base.default()\n    c.seed = Sizes().small\n    return c\n"
    )
    assert read("mine.py").seed == 3


# ---- overrides


def test_values_take_the_type_of_their_key():
    c = read(
        EXCON, "batch_size=8", "optimizer.lr=1", "eval.every=0", "eval.fgsm=(1,2)", "stages[0].start=50%",
        "report", "model.stage_sizes=(1,)", "optimizer.kind=sgd", "seed=1", "seed=2",
    )  # fmt: skip
    assert (c.batch_size, c.optimizer.lr, c.eval.every, c.eval.fgsm) == (8, 1.0, "0", (1, 2))
    assert (c.stages[0].start, c.report, c.model.stage_sizes, c.seed) == ("50%", True, (1,), 2)
    assert c.optimizer.kind == "sgd" and c.optimizer.lr == 1.0  # an option of that name, not a part's kind
    assert read_config(EXCON, ["--noconfig.report"]).report is False
    assert read(EXCON, "eval.quick=knn", "eval.quick=linear").eval.quick == ("knn", "linear")
    with pytest.raises(AttributeError):
        c.sed = 1
    with pytest.raises(TypeError):
        c.seed = "one"


def test_options_of_a_foreign_source_are_free():
    c = read(SIMCLR, "data.options.count=3", "data.options.folder=my photos")
    assert c.data.options.to_dict() == {"count": 3, "folder": "my photos"}


@pytest.mark.parametrize(
    "override, words",
    [
        ("batchsize=3", ["batchsize", "batch_size"]),
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "optimizer.lr?"]),  # the name of other libraries
        ("epochs=3", ["epochs", "duration?"]),
        ("optimizer.nothing_like_it=1", ["optimizer.nothing_like_it", " lr,"]),  # nothing is close: all there are
        ("temperature=0.1", ["temperature", "terms.supcon.temperature"]),  # a key of that name elsewhere
        ("views.view1.crop_aera=(0.1,1.0)", ["views.view1.crop_aera", "views.view1.crop_area"]),
        ("views.view3.grayscale=0.1", ["views.view3.grayscale", "views.view2"]),
        ("stages[1].start=1", ["stages[1].start", "stages has 1"]),
        ("terms[0].weight=1", ["terms[0].weight"]),
        ("optimizer.lr.x=1", ["optimizer.lr.x", "optimizer.lr is 0.006"]),
        ("wandb.project=x", ["wandb.project", "wandb is ''"]),
        ("a..b=1", ["a..b"]),
        ("=1", ["key"]),
        ("batch_size=many", ["batch_size is 'many'", "a whole number"]),
        ("batch_size=1.5", ["batch_size is '1.5'", "a whole number"]),
        ("optimizer.lr=fast", ["optimizer.lr is 'fast'", "a number"]),
        ("report=maybe", ["report is 'maybe'", "True or False"]),
        ("batch_size", ["batch_size", "--config.batch_size=VALUE"]),
        ("eval=3", ["eval", "--config.eval."]),
    ],
)
def test_mistakes(override, words):
    message = refused(EXCON, override)
    assert all(word in message for word in words), message


# ---- other kinds


def test_a_kind_brings_its_own_options():
    c = read(SIMCLR, "model.depth=3", "model.kind=vit", "model.patch=2", "batch_size=16")  # in any order
    assert c.model.to_dict() == base.model("vit", depth=3, patch=2).to_dict()
    facts = dict(num_examples=64, image_shape=(16, 16, 3), num_classes=4, labelled=True, mean=tiny.MEAN, std=tiny.STD)
    assert build_recipe(c, **facts).model.encoder.depth == 3
    assert read(SIMCLR, "model.kind=resnet", "model.depth=18").model.stage_widths == read(SIMCLR).model.stage_widths
    simsiam = f"{ROOT}/configs/simsiam.py"
    old, new = read(simsiam).model, read(simsiam, "model.kind=vit").model
    assert old.head_hidden_layers == new.head_hidden_layers == 2 and new.width == base.model("vit").width != old.width
    message = refused(SIMCLR, "model.kind=vit", "model.stage_sizes=(1,)")
    assert "model.stage_sizes" in message and "vit" in message and "mlp_width" in message
    message = refused(SIMCLR, "model.kind=vitt")
    assert "model.kind" in message and "'vit'" in message


def test_options_of_a_common_base_keep_their_values(here):
    (here / "mine.py").write_text(
        START + "def get_config(preset=''):\n    c = base.extend('" + SUPCON + "', 'supcon.py', preset)\n"
        "    c.terms.supcon.weight, c.terms.supcon.temperature = 0.3, 0.7\n    return c\n"
    )
    old = read("mine.py").terms.supcon
    new = read("mine.py", "terms.supcon.kind=nt_xent", "terms.supcon.alpha=2.0").terms.supcon
    assert (old.weight, new.weight, new.kind, new.alpha) == (0.3, 0.3, "nt_xent", 2.0)
    assert new.temperature == base.term("nt_xent").temperature  # each kind declares its own
    assert "terms.supcon.anchors" in refused("mine.py", "terms.supcon.kind=nt_xent", "terms.supcon.anchors=all")


def test_kinds_in_every_slot(here):
    c = read(EXCON, "stages[0].kind=patch_negatives", "stages[0].into=negatives", "views.view2.kind=standard")
    assert len(c.stages) == 1 and c.stages[0].into == "negatives" and c.stages[0].kind == "patch_negatives"
    assert c.views.view2.kind == "standard" and c.views.view1.kind == "random"
    assert read(EXCON, "memory.probe.kind=linear_probe").memory.probe == read(EXCON).memory.probe
    c = read(EXCON, "memory.probe.kind=queue")
    assert c.memory.probe.kind == "queue" and "optimizer" not in c.memory.probe
    thanos = f"{pathlib.Path(EXCON).with_name('thanos.py')}"
    assert read(thanos, "encoders.auto.kind=vit").encoders.auto.kind == "vit"
    assert "memory.probee" in refused(EXCON, "memory.probee.kind=queue")
    assert "model.kind.x" in refused(EXCON, "model.kind.x=1")


def test_a_foreign_kind(here, monkeypatch):
    (here / "my_terms.py").write_text(
        "import dataclasses\nfrom jaxcl.method.terms.pairs import NTXent\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(NTXent):\n    margin: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(here)
    c = read(SIMCLR, "terms.nt_xent.temperature=0.3", "terms.nt_xent.kind=my_terms:Mine", "terms.nt_xent.margin=0.1")
    assert (c.terms.nt_xent.kind, c.terms.nt_xent.margin, c.terms.nt_xent.temperature) == ("my_terms:Mine", 0.1, 0.3)
    usual = read(SIMCLR).terms.nt_xent
    assert read(SIMCLR, "terms.nt_xent.kind=my_terms:Mine").terms.nt_xent.temperature == usual.temperature  # inherited
    assert "terms.nt_xent.kind" in refused(SIMCLR, "terms.nt_xent.kind=my_terms:Other")
