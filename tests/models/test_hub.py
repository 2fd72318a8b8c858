"""Models of the hub found in its cache, and what its client is asked for; with and without the client."""

import importlib.machinery
import sys
import types

import hub_cache
import pytest

from jaxcl.errors import UserError
from jaxcl.models import hub

OTHER = "f" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "hub"


@pytest.fixture
def no_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def client(monkeypatch):
    """-> the calls of a client whose answer is `client.answer`."""
    module = types.ModuleType("huggingface_hub")
    module.__spec__ = importlib.machinery.ModuleSpec("huggingface_hub", None)
    module.calls = []

    def snapshot_download(name, **options):
        module.calls.append((name, options))
        if isinstance(module.answer, Exception):
            raise module.answer
        return str(module.answer)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def says(text, word):
    with pytest.raises(UserError) as error:
        hub.find(word)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_the_cache_alone(cache, no_client):
    folder = hub_cache.add(cache, "org/net", FILES)
    hub_cache.add(cache, "org/net", FILES, revision=OTHER, branch="v2")
    for word, revision in (
        ("hf:org/net", hub_cache.HASH),
        ("hf:org/net@main", hub_cache.HASH),
        ("hf:org/net@v2", OTHER),
        (f"hf:org/net@{OTHER}", OTHER),
    ):
        found = hub.find(word)
        assert found == (f"hf:org/net@{revision}", folder / "snapshots" / revision, revision)
        assert (found.folder / "model.safetensors").read_bytes() == b"weights"
    says("pip install 'jaxcl[pretrained]'", "hf:org/other")
    says("pip install 'jaxcl[pretrained]'", f"hf:org/net@{'a' * 40}")


def test_models_without_safetensors(cache, no_client):
    hub_cache.add(cache, "org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"PK"})
    says("(there: config.json, pytorch_model.bin)", "hf:org/pickled")


def test_a_fetch_that_was_interrupted(cache, client):
    index = b'{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    files = {"model.safetensors.index.json": index, "model-1-of-2.safetensors": b"1"}
    client.answer = hub_cache.add(cache, "org/net", files) / "snapshots" / hub_cache.HASH
    says("not all of its shards", f"hf:org/net@{hub_cache.HASH}")  # asked for, and still not there
    hub_cache.add(cache, "org/net", {"model-2-of-2.safetensors": b"2"})
    assert hub.find(f"hf:org/net@{hub_cache.HASH}").folder == client.answer and len(client.calls) == 1


def test_a_file_that_was_removed_from_the_cache(cache, no_client):
    folder = hub_cache.add(cache, "org/net", FILES)
    for blob in (folder / "blobs").iterdir():
        blob.unlink()
    says("has no model.safetensors", "hf:org/net")


@pytest.mark.parametrize("word", ["hf:", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a/b@../../x", "hf:a b", "hf:a/b@/etc"])
def test_words_of_another_form(word, cache, client):
    says("is no model of the hub", word)
    assert not client.calls


def test_refs_that_lead_elsewhere(cache, no_client):
    folder = hub_cache.add(cache, "org/net", FILES)
    for content in ("../../..", "", "x" * 100_000, "\0"):
        (folder / "refs" / "main").write_text(content)
        says("not in the cache", "hf:org/net")


def test_what_the_client_is_asked_for(cache, client):
    folder = hub_cache.add(cache, "org/net", FILES)
    client.answer = folder / "snapshots" / hub_cache.HASH
    assert hub.find("hf:org/net").revision == hub_cache.HASH
    ((name, options),) = client.calls
    assert name == "org/net" and options["revision"] == "main" and options["cache_dir"] == str(cache)
    assert "model.safetensors" in options["allow_patterns"] and not any("bin" in p for p in options["allow_patterns"])
    # A commit that is in the cache is not asked for again; neither is anything when the environment forbids it.
    assert hub.find(f"hf:org/net@{hub_cache.HASH}").revision == hub_cache.HASH and len(client.calls) == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(variable, cache, client, monkeypatch):
    monkeypatch.setenv(variable, "1")
    hub_cache.add(cache, "org/net", FILES)
    assert hub.find("hf:org/net").revision == hub_cache.HASH
    says("HF_HUB_OFFLINE is set", "hf:org/other")
    assert not client.calls


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("GatedRepoError", "accept terms"),
        ("RepositoryNotFoundError", "no such model"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("ConnectError", "ConnectError: no route"),
    ],
)
def test_a_client_that_fails(kind, text, cache, client, caplog):
    """One line; a model that is in the cache is used as it is."""
    client.answer = type(kind, (Exception,), {})("no route\nto the host")
    says(text, "hf:org/net")
    hub_cache.add(cache, "org/net", FILES)
    with caplog.at_level("INFO", "jaxcl"):
        assert hub.find("hf:org/net").revision == hub_cache.HASH
    assert kind in caplog.text


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(hub.cache()) == "/x/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "~/h")
    assert hub.cache() == tmp_path / "h" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "$HOME/c")
    assert hub.cache() == tmp_path / "c"
