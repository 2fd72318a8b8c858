"""Where a step's time goes: which updates are traced, and what is made of their trace."""

import time

import jax
import jax.numpy as jnp
import pytest

from jaxcl.errors import UserError
from jaxcl.method.scopes import scope, scope_of, scopes_of
from jaxcl.train import profile
from jaxcl.train.profile import OTHER, UNNAMED, _Op, _overlap, _shares


def test_what_is_too_long_for_the_run():
    profile.check(7, 10)
    with pytest.raises(UserError, match="--profile is 8, .* 10 updates, .* at most 7$"):
        profile.check(8, 10)
    with pytest.raises(UserError, match="--profile is 1, .* 3 updates"):
        profile.check(1, 3)


def test_the_updates_that_are_traced():
    def window(first, total, count, kinds=(), pauses=()):
        return profile.window(first, total, count, lambda s: sum(s >= k for k in kinds), lambda s: s in pauses)

    assert window(0, 10, 7) == 3 and window(0, 10, 8) is None
    assert window(4, 10, 3) == 7 and window(4, 10, 4) is None  # resumed
    assert window(0, 100, 5, kinds=(6,)) == 8  # after the new program has run twice
    assert window(0, 100, 5, kinds=(3,)) == 5
    assert window(0, 100, 5, pauses=(6,)) == 6  # an evaluation after six updates
    assert window(0, 100, 5, pauses=(8,)) == 3  # after the last of them
    assert window(0, 12, 5, pauses=range(0, 12, 4)) == 3  # nothing is better


def test_scope_names_are_those_of_this_config(tmp_path):
    """The compilation cache would return the program with the scope names of the first config that compiled it."""
    before = jax.config.jax_compilation_cache_include_metadata_in_key
    for begin, during in ((3, True), (None, before)):
        trace = profile.Profile(tmp_path, 2, begin)
        assert jax.config.jax_compilation_cache_include_metadata_in_key == during
        trace.close()
        assert jax.config.jax_compilation_cache_include_metadata_in_key == before


def test_moments_are_shared_and_counted_once():
    ops = [
        _Op(0, 10, "a", True),  # a loop
        _Op(2, 4, "b", False),
        _Op(3, 6, "c", False),  # beside b for a while
        _Op(12, 14, "b", False),
        _Op(14, 14, "c", False),
    ]
    shares, idle = _shares(ops)
    assert dict(shares) == {"a": 6.0, "b": 3.5, "c": 2.5} and idle == [(10, 12)]
    assert _shares([]) == ({}, [])
    assert _overlap([(0, 2), (5, 9)], [(8, 10), (1, 6)]) == 1 + 1 + 1


@pytest.mark.parametrize(
    "op_name, want",
    [
        ("jit(update)/jvp(scope:encode a + b)/dot_general", "encode a + b"),
        ("jit(update)/transpose(jvp(scope:encode a + b))/dot_general", "encode a + b, backward"),
        ("jit(update)/transpose(jvp())/shard_map/scope:term t/mul", "term t, backward"),
        ("jit(update)/scope:saliency view1/transpose(jvp(scope:term t))/mul", "saliency view1"),  # the outermost
        ("jit(update)/add", ""),
    ],
)
def test_scopes_in_the_metadata(op_name, want):
    assert scope_of(op_name) == want


def test_a_trace_of_a_program_with_known_scopes(tmp_path):
    def update(w, x):
        with scope("made/of (x)"):
            x = jax.lax.fori_loop(0, 30, lambda i, y: jnp.tanh(y @ y), x)

        def objective(w):
            with scope("encode"):
                y = x @ w
            with scope("loss"):
                return jnp.sum(jax.nn.logsumexp(y, axis=1))

        grads = jax.grad(objective)(w)
        with scope("optimizer"):
            return w - 0.1 * grads

    update, other = jax.jit(update), jax.jit(lambda x: jnp.sin(x) @ x)
    w = x = jnp.eye(256)
    program = update.lower(w, x).compile()
    scopes = scopes_of(program.as_text())
    assert scopes.module == "jit_update" and scopes.around
    assert {"made.of .x.", "encode", "encode, backward", "optimizer"} <= set(scopes.of.values())

    w, y = update(w, x), other(x)
    jax.block_until_ready((w, y))
    jax.profiler.start_trace(tmp_path)
    begun = time.perf_counter()
    for _ in range(4):
        with jax.profiler.TraceAnnotation(profile._WAIT):
            time.sleep(0.02)
        w = jax.block_until_ready(update(w, x))
    jax.block_until_ready(other(x))
    seconds = (time.perf_counter() - begun) / 4
    jax.profiler.stop_trace()
    found = profile.step_time(profile._newest(tmp_path), scopes, 4, seconds)
    assert sum(found["parts"].values()) + found["data"] + found["rest"] == pytest.approx(seconds)
    assert next(n for n in found["parts"] if n not in (OTHER, UNNAMED)) == "made.of .x."  # the loop: thirty products
    assert {"encode", "encode, backward", "optimizer", OTHER} <= found["parts"].keys()
    assert 0.015 * 3 / 4 < found["data"] <= 0.8 * seconds  # nothing ran yet in the first of the four waits
    assert found["rest"] > 0
