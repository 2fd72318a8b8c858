"""Randomness that must vary: with the step, the seed, the pass, the micro-batch, the group and the row."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl.losses.common import total
from jaxcl.method import forward, sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.memory import MemoryPart
from jaxcl.method.recipe import ForwardPass, Phase
from jaxcl.method.terms import Term
from jaxcl.method.update import make_update
from jaxcl.models import Model, ProjectionHead
from jaxcl.models.encoder import Encoder

ROWS, MICRO = tiny.BATCH, 4


class Noise(Encoder):
    """Features that are what the encoder drew: one number in [0, 1] for each row."""

    features: int = 1
    takes_key = True

    @nn.compact
    def __call__(self, x, train=False, where=None, norm_set="", key=None):
        scale = self.param("scale", nn.initializers.ones, (1,))
        return scale * (jnp.zeros((len(x), 1)) if key is None else jax.random.uniform(key, (len(x), 1)))


@dataclasses.dataclass(frozen=True)
class Sum(Term):
    """A term of each image by itself."""

    per_image = True

    @property
    def reads(self):
        return ("view1",)

    def __call__(self, e, label, *, memory=None, axis_name=None):
        return total(jnp.sum(e["view1"].z), axis_name)


@dataclasses.dataclass(frozen=True)
class Keep(MemoryPart):
    """Keeps what the last update's encoders drew."""

    def init(self, key, context):
        return {name: jnp.zeros((ROWS, 1)) for name in ("view1", "view2")}

    def after(self, memory, out):
        return {name: e.z for name, e in out.embeddings.items()}, {}


@functools.cache
def noisy_update(how, devices=1, together=False):
    """-> (the update of a recipe whose encoder draws only, the state before it)."""
    c = tiny.config(stage=False)
    c.model.norm = "group"
    for name in ("view1", "view2"):
        c.views[name] = base.view("standard")
    c.passes = (base.encode("view1", "view2"),) if together else (base.encode("view1"), base.encode("view2"))
    if how == "grad_cache":
        c.grad_cache.micro_batch = MICRO
    recipe = tiny.recipe(c, num_devices=devices)
    if how == "accumulate":
        recipe = dataclasses.replace(recipe, accumulate=dataclasses.replace(recipe.accumulate, micro_batch=MICRO))
    model = Model(Noise(), ProjectionHead(0))
    recipe = dataclasses.replace(recipe, model=model, terms={"sum": Sum()}, memory={"keep": Keep()}, memory_tx={})
    mesh = sharding.make_mesh(devices)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    update = jax.jit(make_update(recipe, Phase("encoder"), mesh), in_shardings=(replicated, rows))
    return update, jax.jit(lambda: init_state(recipe))()


def drawn(how, *, step=0, seed=0, devices=1, together=False):
    """-> {view: what its rows drew [B]} of one update."""
    update, state = noisy_update(how, devices, together)
    key = jax.random.key(seed, impl="threefry2x32")
    state, _ = update(state.replace(step=jnp.int32(step), key=key), tiny.batch())
    return {name: np.asarray(z)[:, 0] for name, z in state.memory["keep"].items()}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("how, devices", [("plain", 1), ("accumulate", 1), ("grad_cache", 1), ("grad_cache", 2)])
def test_every_row_of_every_update_draws_for_itself(how, devices, together):
    """Of all rows of two views, three steps and another seed, no two draw the same number; cases F."""
    runs = [
        drawn(how, step=s, seed=seed, devices=devices, together=together)
        for s, seed in ((0, 0), (1, 0), (2, 0), (0, 1))
    ]
    every = np.concatenate([np.concatenate(list(run.values())) for run in runs])
    assert every.size == 4 * 2 * ROWS and len(np.unique(every)) == every.size
    again = drawn(how, step=1, devices=devices, together=together)
    for name, values in runs[1].items():
        np.testing.assert_array_equal(again[name], values)


# ---- groups of a batch norm


def by_groups(key, *, shuffle):
    """Rows 0 to 15 in four groups -> (the group that each row was in, what each row drew)."""
    spec = ForwardPass(views=("view1",), bn_groups=4, shuffle=shuffle)

    def encode(params, stats, x, where=None, norm_set="", key=None):
        mates = jnp.broadcast_to(jnp.sort(x[:, 0])[:1], (len(x),))  # a group is known by its first row
        return jnp.stack([mates, jax.random.uniform(key, (len(x),))], 1), stats

    rows = jnp.arange(ROWS, dtype=jnp.float32)[:, None]
    h, _ = forward._by_groups(encode, spec, {}, {}, rows, where=None, norm_set="", key=key)
    return np.asarray(h)


def test_groups_are_shuffled_anew_with_every_key():
    """Two keys give two divisions into groups, and rows come back in their order; cases F."""
    seen = [by_groups(jax.random.key(i), shuffle=True)[:, 0] for i in range(3)]
    for groups in seen:
        members = {g: np.flatnonzero(groups == g) for g in set(groups.tolist())}
        assert sorted(map(len, members.values())) == [4] * 4
        assert all(m.min() == g for g, m in members.items())  # each row's mates, by its place before the shuffle
    assert all((a != b).any() for a, b in ((seen[0], seen[1]), (seen[1], seen[2])))
    plain = by_groups(jax.random.key(0), shuffle=False)[:, 0]
    np.testing.assert_array_equal(plain, np.arange(ROWS) // 4 * 4)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_group_drops_for_itself(shuffle):
    """Each group is encoded by itself, with draws of its own; cases F."""
    noise = by_groups(jax.random.key(0), shuffle=shuffle)[:, 1]
    assert len(np.unique(noise)) == ROWS


def test_passes_are_shuffled_differently():
    """The first pass and the second, of the same step: the key of a pass is folded with its name; cases F."""
    update, state = shuffling_update()
    state, _ = update(state, tiny.batch())
    first, second = (np.asarray(state.memory["keep"][name])[:, 0] for name in ("view1", "view2"))
    later, _ = update(state, tiny.batch())
    assert (first != second).any() and (first != np.asarray(later.memory["keep"]["view1"])[:, 0]).any()


class Mates(Encoder):
    """Features that say who is in the group: the mean of its rows' first pixels."""

    features: int = 1
    norm = "batch"

    @nn.compact
    def __call__(self, x, train=False, where=None, norm_set=""):
        scale = self.param("scale", nn.initializers.ones, (1,))
        return scale * jnp.broadcast_to(x[:, 0, 0, 0].mean(), (len(x), 1))


def shuffling_update():
    c = tiny.config(stage=False)
    for name in ("view1", "view2"):
        c.views[name] = base.view("standard")
    c.passes = tuple(base.encode(name, bn_groups=4, shuffle=True) for name in ("view1", "view2"))
    recipe = tiny.recipe(c)
    model = Model(Mates(), ProjectionHead(0))
    recipe = dataclasses.replace(recipe, model=model, terms={"sum": Sum()}, memory={"keep": Keep()}, memory_tx={})
    return jax.jit(make_update(recipe, Phase("encoder"))), jax.jit(lambda: init_state(recipe))()


# ---- initial values


def test_no_two_parts_start_alike():
    """Encoders, heads, branches and probes of the same sizes: no two random arrays are equal, nor those of two seeds.

    cases F.
    """
    c = tiny.config(stage=False)
    c.model.branches = (1,)
    c.model.stage_sizes, c.model.stage_widths = (2, 2), (8, 8)
    c.encoders.other = c.model.copy_and_resolve_references()
    c.passes = (base.encode("view1", "view2"), base.encode("view1", encoder="other"))
    for name in ("predictor", "second"):
        c.heads[name] = base.head("mlp", features=12, hidden=12, hidden_layers=2)
        c.terms[name] = base.term("simsiam", head=name)
    c.memory.again = base.memory("linear_probe", optimizer=dict(lr=0.1, weight_decay=0.0))
    c.memory.queue = base.memory("queue", of="view1", length=32)
    c.memory.other_queue = base.memory("queue", of="view2", length=32)
    recipe = tiny.recipe(c)

    @jax.jit
    def start(seed):
        state = init_state(recipe, seed)
        return state.params, state.memory

    random, seen = 0, {}
    for seed in (0, 1):
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(start(np.uint32(seed)))):
            if x.size < 8 or np.ptp(x) == 0:
                continue
            random += 1
            values = np.sort(x.ravel())[:8].tobytes()  # whatever the shape: an array cut from the same draws
            name = f"{seed} {jax.tree_util.keystr(path)}"
            assert values not in seen, f"{name} starts like {seen[values]}"
            seen[values] = name
    assert random > 2 * 30
