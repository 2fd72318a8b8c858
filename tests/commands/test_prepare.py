"""jaxcl prepare: what it asks of TFDS, and the errors for what is missing."""

import pytest

from jaxcl.commands import prepare
from jaxcl.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


def test_without_tensorflow_it_names_what_to_install(monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None if name == "tensorflow" else object())
    with pytest.raises(UserError, match=r"cifar10 needs tensorflow: pip install 'jaxcl\[prepare\]'"):
        prepare.main(["prepare", "cifar10", "--data_dir=/tmp/x"])
    with pytest.raises(UserError, match="no set"):
        prepare.main(["prepare"])


def test_it_writes_array_records(monkeypatch):
    asked = {}

    class Builder:
        data_path = "/data/cifar10/3.0.2"

        def download_and_prepare(self):
            asked["prepared"] = True

    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: object())
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "builder", lambda name, **options: asked.update(name=name, **options) or Builder())
        assert prepare.main(["prepare", "cifar10", "--data_dir=/data"]) == 0
    assert asked == {"name": "cifar10", "data_dir": "/data", "file_format": "array_record", "prepared": True}
    with pytest.raises(UserError) as error:
        prepare.main(["prepare", "cifarr10"])
    assert "cifarr10" in str(error.value) and "\n" not in str(error.value)
