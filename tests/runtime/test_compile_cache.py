"""The cache of compiled programs: one for each kind of CPU, and no failure of it ends a run."""

import os
import subprocess
import sys
import zlib

import pytest

from jaxcl.runtime import compile_cache

PROGRAM = """
import logging, sys
logging.basicConfig(format="%(message)s")
from jaxcl.runtime import compile_cache
print("folder", compile_cache.turn_on())
import jax, jax.numpy as jnp
from jax import monitoring
found = []
monitoring.register_event_listener(lambda name, **_: found.append(name.rpartition("/")[2]))
def program(x):
    return jnp.sin(x) @ x
print("value", float(jax.jit(program)(jnp.eye(8)).sum()))
print("hits", found.count("cache_hits"), "of", found.count("compile_requests_use_cache"))
"""


def run(home, **environ):
    """A fresh process whose caches are in `home` -> ({first word: the rest of its line}, errors)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "JAXCL_", "XDG_"))}
    environ = kept | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)} | environ
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), done.stderr


ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # however fast the machine


def test_a_second_process_compiles_nothing_and_one_cut_short_is_made_anew(tmp_path):
    first, _ = run(tmp_path, **ALL)
    folder = tmp_path / "jaxcl" / "compiled" / compile_cache.cpu()
    assert first["folder"] == str(folder) and first["hits"].startswith("0 of ")
    assert folder.parent.stat().st_mode & 0o077 == 0
    second, errors = run(tmp_path, **ALL)
    count = second["hits"].split(" of ")
    assert count[0] == count[1] != "0" and second["value"] == first["value"] and not errors.strip()

    entry = next(folder.glob("jit_program-*-cache"))
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])  # a process killed while it wrote
    third, errors = run(tmp_path, **ALL)
    assert third["value"] == first["value"]
    assert len(errors.strip().splitlines()) == 1 and "compiling instead" in errors
    assert len(entry.read_bytes()) > len(whole) // 2


def test_only_what_is_cut_short_is_forgotten(tmp_path):
    whole = zlib.compress(bytes(range(256)) * 9)
    for name, data in {"jit_a-1": whole, "jit_a-2": whole[:-9], "jit_a-3": b"", "jit_b-1": whole[:9]}.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
    compile_cache.forget(tmp_path, "jit_a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["jit_a-1-cache", "jit_b-1-cache"]
    compile_cache.forget(tmp_path, "jit_a")  # whole, and still it could not be read
    assert [p.name for p in tmp_path.iterdir()] == ["jit_b-1-cache"]


def test_a_home_that_takes_nothing_ends_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    found, errors = run(blocked, **ALL)
    assert found["folder"] == "None" and not errors.strip()
    # A folder of the user's own that fails: one line, for any number of programs.
    found, errors = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(blocked / "cache"), **ALL)
    assert found["folder"] == "None" and "value" in found
    assert len(errors.strip().splitlines()) <= 1
    assert not (tmp_path / "jaxcl").exists()


@pytest.mark.parametrize("mine", [{"JAXCL_COMPILE_CACHE": "off"}, {"JAX_COMPILATION_CACHE_DIR": ""}])
def test_it_can_be_switched_off(mine, tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)} | mine
    before = dict(environ)
    assert compile_cache.turn_on(environ) is None
    assert environ == before and not list(tmp_path.iterdir())


def test_what_was_used_least_recently_goes_first(tmp_path):
    (tmp_path / "a").mkdir()
    for name, when in {"a/old": 1.3e9, "new": 1.5e9, "a/older": 1e9, "newest": 1.6e9}.items():
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (when, when))
    assert compile_cache.prune(tmp_path, 400) == 0
    assert compile_cache.prune(tmp_path, 250) == 2
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["new", "newest"]
    assert compile_cache.prune(tmp_path / "nowhere") == 0
