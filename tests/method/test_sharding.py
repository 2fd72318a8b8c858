"""How state and rows lie on the mesh changes nothing of what is learned, and nothing travels that need not."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiled_updates import config, program

from jaxcl import config as base
from jaxcl.commands.plan.collectives import collectives, totals
from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state, replicate_params, state_shardings
from jaxcl.report import read_metrics
from jaxcl.train import loop as train

slow = pytest.mark.slow
SIDE = 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 64)  # or nothing of the tiny network would be split


def three_steps(method, kind, mesh):
    recipe, over, placed, update = program(method, kind, mesh)
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    zero = functools.partial(jax.tree.map, np.zeros_like)
    memory = {n: {**m, "pointer": np.int32(0)} if "pointer" in m else m for n, m in state.memory.items()}
    memory = {n: {**m, "opt_state": zero(m["opt_state"])} if "opt_state" in m else m for n, m in memory.items()}
    state = state.replace(step=np.int32(0), opt_state=zero(state.opt_state), memory=memory, key=jax.random.key(0))
    state, losses = jax.device_put(state, placed), []
    for seed in range(3):
        state, metrics = update(state, sharding.device_put(tiny.batch(seed=seed), sharding.batch_sharding(over)))
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    return losses, jax.device_get((state.params, state.opt_state, state.batch_stats))


@pytest.mark.parametrize(
    "method, kind, mesh",
    [
        ("supcon", "zero1", "2"),
        ("supcon", "fsdp", "8"),
        ("byol", "fsdp", "2 x 4"),
        ("vision_transformer", "fsdp", "2"),
        pytest.param("vision_transformer", "data", "8", marks=slow),
        pytest.param("vision_transformer", "zero1", "2 x 4", marks=slow),
        pytest.param("vision_transformer", "fsdp", "8", marks=slow),
        pytest.param("supcon", "data", "8", marks=slow),
        pytest.param("supcon", "fsdp", "2 x 4", marks=slow),
        pytest.param("byol", "data", "2 x 4", marks=slow),
        pytest.param("byol", "zero1", "2", marks=slow),
        pytest.param("moco", "zero1", "8", marks=slow),
        pytest.param("moco", "fsdp", "2 x 4", marks=slow),
    ],
)
def test_a_split_state_learns_the_same(method, kind, mesh):
    losses, state = three_steps(method, kind, mesh)
    want, expected = three_steps(method, "data", "1")
    # Sums over devices in another order; three steps widen that a little.
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-2, np.abs(b).max()))


def test_what_is_split():
    recipe, over, placed, _ = program("byol", "fsdp", "2 x 4")
    shapes = jax.eval_shape(lambda: init_state(recipe))
    split = state_shardings(dataclasses.replace(recipe, sharding="zero1"), over)
    assert split.opt_state == placed.opt_state and split.memory == placed.memory
    assert all(s.is_fully_replicated for s in jax.tree.leaves(split.params))
    share = {"params": 0, "opt_state": 0, "target": 0}
    for name, tree, lies in (
        ("params", shapes.params, placed.params),
        ("opt_state", shapes.opt_state, placed.opt_state),
        ("target", shapes.memory["target"]["params"], placed.memory["target"]["params"]),
    ):
        pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(lies), strict=True))
        held = sum(np.prod(s.shard_shape(x.shape)) for x, s in pairs)
        share[name] = held / sum(np.prod(x.shape) for x, _ in pairs)
    assert all(0.25 <= s < 0.35 for s in share.values()), share  # of four devices, less what is small
    assert placed.step.is_fully_replicated and all(s.is_fully_replicated for s in jax.tree.leaves(placed.batch_stats))


def test_the_rows_of_a_mesh():
    assert dict(sharding.make_mesh(8, 2).shape) == {"host": 2, "device": 4}
    assert dict(sharding.make_mesh(4).shape) == {"host": 1, "device": 4}  # one process
    with pytest.raises(UserError, match=r"hosts is 3, which does not divide 8 devices"):
        sharding.make_mesh(8, 3)
    with pytest.raises(UserError, match=r"sharding is 'zero3'; expected one of data, zero1, fsdp"):
        base.check(config(sharding="zero3"))


def test_the_state_is_updated_in_place():
    """Donated: of the arguments, all but the batch is where the results are written."""
    for method, kind, mesh in (("supcon", "data", "8"), ("byol", "fsdp", "2 x 4")):
        recipe, _, placed, update = program(method, kind, mesh)
        shapes = jax.tree.leaves(jax.eval_shape(lambda r=recipe: init_state(r)))
        lies = jax.tree.leaves(placed)
        plain = [(x, s) for x, s in zip(shapes, lies, strict=True) if x.dtype == jnp.float32]
        held = sum(4 * int(np.prod(s.shard_shape(x.shape))) for x, s in plain)
        assert update.memory_analysis().alias_size_in_bytes >= held


# ---- what travels


def sizes(recipe):
    state = jax.eval_shape(lambda: init_state(recipe))
    of = lambda tree: sum(4 * int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
    return of(state.params), of(state.batch_stats)


@pytest.mark.parametrize(
    "method, kind, mesh",
    [
        ("supcon", "data", "8"),
        ("supcon", "fsdp", "8"),
        ("byol", "fsdp", "2 x 4"),
        ("moco", "data", "8"),
        pytest.param("byol", "data", "8", marks=slow),
        pytest.param("moco", "fsdp", "8", marks=slow),
        pytest.param("supcon", "zero1", "2", marks=slow),
    ],
)
def test_what_a_step_sends(method, kind, mesh):
    """Gradients once, statistics of norms, embeddings of the loss, and parameters where they are split; no more."""
    recipe, _, _, update = program(method, kind, mesh)
    found = collectives(update.as_text())
    params, stats = sizes(recipe)
    encoders = 1 + len(recipe.targets)
    rows = 2 * recipe.batch_size * 12 * 4  # both views' embeddings
    smallest_map = recipe.batch_size * 2 * 2 * 16 * 4  # of one view, after the last stage
    slack = 1024  # scalars, figures, labels
    total = totals(found, "size")
    # A norm has two sums forward and two backward. Over two axes some gradients are summed over one after the other.
    again = 1.3 if mesh == "2 x 4" else 1
    reduced = again * params + 2 * encoders * stats + rows + slack
    assert total.pop("all-reduce") + total.pop("reduce-scatter", 0) <= reduced
    split = {"data": 0, "zero1": params, "fsdp": encoders * params}[kind]
    assert rows + slack < smallest_map  # or one more gather could hide
    assert total.pop("all-gather", 0) <= split + rows + slack
    assert total.pop("collective-permute", 0) + total.pop("all-to-all", 0) <= rows and not total
    assert all(c.group in (2, 4, 8) for c in found)


def test_an_accidental_gather_is_seen():
    """The test above is not blind: the same count of a program that gathers its images."""
    mesh = sharding.make_mesh(8)
    rows, x = sharding.batch_sharding(mesh), jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.float32)

    def f(x):
        return jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))[::-1].sum((1, 2, 3))

    found = collectives(jax.jit(f, in_shardings=rows).lower(x).compile().as_text())
    assert sum(c.size for c in found if c.kind == "all-gather") >= x.size * 4


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = sharding.make_mesh(8)

    def f(x):
        def hop(_, x):
            return jax.lax.ppermute(x, sharding.AXIS, [(i, (i + 1) % 8) for i in range(8)]) + 1

        return jax.lax.psum(jax.lax.fori_loop(0, 5, hop, x).sum(), sharding.AXIS)

    spread = jax.shard_map(f, mesh=mesh, in_specs=jax.P(sharding.AXIS), out_specs=jax.P())
    found = collectives(jax.jit(spread).lower(jax.ShapeDtypeStruct((64, 128), jnp.float32)).compile().as_text())
    assert totals(found, "size") == {"collective-permute": 5 * 8 * 128 * 4, "all-reduce": 4}
    assert totals(found)["all-reduce"] == 2 * 7 / 8 * 4


@pytest.mark.parametrize("kind", ["data", "fsdp"])
def test_memory_of_a_device_does_not_grow_with_their_number(kind):
    """At 2 images a device, by XLA's account of the compiled program."""
    one = program("supcon", "data", "1", per_device=2)[3].memory_analysis()
    eight = program("supcon", kind, "8")[3].memory_analysis()
    for field in ("temp_size_in_bytes", "argument_size_in_bytes"):
        assert getattr(eight, field) <= 1.1 * getattr(one, field) + 16384, field
    if kind == "fsdp":
        assert eight.argument_size_in_bytes < 0.5 * one.argument_size_in_bytes


def test_a_gathered_state_is_whole():
    recipe, over, placed, _ = program("byol", "fsdp", "2 x 4")
    state = jax.device_put(tiny.fill(jax.eval_shape(lambda: init_state(recipe))), placed)
    seen = jax.jit(lambda s: replicate_params(recipe, over, s))(state)
    for tree in (seen.params, seen.memory["target"]["params"]):
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_run_stops_split_and_goes_on_whole(tmp_path):
    """The trainer: checkpoints and evaluation of a split state, and another placement of it afterwards."""
    losses = {}
    for name, kinds in (("data", ("data", "data")), ("fsdp", ("fsdp", "zero1"))):
        c = config(sharding=kinds[0])
        c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
        c.duration, c.log_every, c.checkpoint.every, c.report = "4 steps", "1 step", "2 steps", False
        c.eval.every, c.eval.quick, c.eval.final = "2 steps", ("knn",), ("knn", "classifier")
        c.devices, c.hosts = 8, 2
        results = train.run(c, tmp_path / name)
        losses[name] = [x["loss"] for x in read_metrics(tmp_path / name) if "loss" in x] + [results["knn"]["accuracy"]]
        # Again from step 2, elsewhere on the mesh.
        (tmp_path / name / "results.json").unlink()
        shutil.rmtree(tmp_path / name / "checkpoints" / "4")
        c.sharding, c.hosts = kinds[1], 1
        again = train.run(c, tmp_path / name)
        assert again["knn"] == results["knn"]
    np.testing.assert_allclose(losses["fsdp"], losses["data"], rtol=1e-5)
