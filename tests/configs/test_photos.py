"""configs/photos.py: from published weights or from random ones, by a word or by what is installed."""

import pytest
from train_checks import config_module

from jaxcl.commands.config_file import read_config
from jaxcl.errors import UserError
from jaxcl.models import pretrained

FILE = "configs/photos.py"


def photos(tmp_path, words="", *overrides):
    (tmp_path / "photos").mkdir(exist_ok=True)
    return read_config(FILE + words, [f"--config.data.source=folder:{tmp_path}/photos", *overrides])


@pytest.mark.parametrize("there", [True, False])
def test_it_starts_from_what_is_installed(there, monkeypatch, caplog):
    caplog.set_level("INFO", "jaxcl")
    monkeypatch.setattr(pretrained, "installed", lambda word: there)
    c = config_module("photos").get_config()
    assert bool(c.model.weights) == there and c.data.source.startswith("folder:")
    assert ("jaxcl[pretrained]" in caplog.text) == (not there)


def test_words(monkeypatch, caplog):
    caplog.set_level("INFO", "jaxcl")
    monkeypatch.setattr(pretrained, "installed", lambda word: False)
    get_config = config_module("photos").get_config
    assert get_config("pretrained").model.weights in pretrained.WORDS
    scratch, usual = get_config("scratch"), config_module("simclr").get_config("unlabelled")
    for c in (scratch, usual):
        del c.name, c.data
    assert scratch.to_dict() == usual.to_dict() and not caplog.text
    with pytest.raises(UserError):
        get_config("pretraind")


def test_what_the_weights_decide(tmp_path):
    c = photos(tmp_path, ":pretrained")
    assert (c.model.kind, c.model.input_size) == ("efficientnet", 0)
    assert (c.size, c.eval.size, c.data.files.image_size) == (112, 224, 224)
    other = photos(tmp_path, ":pretrained", "--config.size=64", "--config.eval.size=128")
    assert (other.size, other.eval.size, other.data.files.image_size) == (64, 128, 128)
