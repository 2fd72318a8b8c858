"""What a stage sees: statistics moved by stages before it, encoders by name, what was drawn, and which rows exist."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl.method.inputs import run_stages
from jaxcl.method.recipe import Phase
from jaxcl.method.stages.base import StageOutput
from jaxcl.method.views import View

B = 4
EXISTS = np.arange(B) > 0


class Recorder:
    """A model that writes down its parameters, its statistics and how it is asked."""

    def __init__(self, calls):
        self.calls = calls

    def encode(self, params, stats, image, **mode):
        self.calls.append(("encode", params["encoder"], stats["encoder"], mode))
        return image, stats

    def embed(self, params, stats, h, *, aug_params, **mode):
        self.calls.append(("embed", params["encoder"], stats["encoder"], mode, aug_params))
        return -h, stats


@pytest.fixture
def seen():
    """-> run(stages) -> (views, statistics, metrics, the model's calls); a main encoder, another one and a target."""
    c = tiny.config(stage=False)
    c.encoders.auto = c.model.copy_and_resolve_references()
    c.memory.target = base.memory("ema")
    c.passes = (base.encode("view1", "view2"), base.encode("view1", encoder="auto"))
    recipe, calls = tiny.recipe(c), []

    def run(*stages):
        models = dict(model=Recorder(calls), encoders={"auto": Recorder(calls)})
        kinds = dict(stages=stages, stage_kinds=("any",) * len(stages), stage_starts=(0,) * len(stages))
        state = types.SimpleNamespace(
            step=jnp.int32(0),
            key=None,
            params={"encoder": "main", "encoders": {"auto": {"encoder": "auto"}}},
            batch_stats={"encoder": 0.0, "encoders": {"auto": {"encoder": 10.0}}},
            memory={"target": {"params": {"encoder": "target"}, "batch_stats": {"encoder": 20.0}}},
        )
        batch = {"image": np.zeros((B, 2, 2, 3), np.uint8), "label": np.arange(B), "index": np.arange(B)}
        views = {"view1": View(jnp.ones((B, 2)), {"flip": jnp.arange(B)}, EXISTS)}
        phase = Phase("encoder", tuple(range(len(stages))))
        changed = dataclasses.replace(recipe, **models, **kinds)
        return *run_stages(changed, phase, state, batch, views), calls

    return run


class Asks:
    """A stage that embeds one view by one encoder, adds a view and moves the statistics of the main encoder."""

    classifier, writes = "", ("new",)

    def __init__(self, encoder, norm_set="", moves=True):
        self.encoder, self.norm_set, self.moves = encoder, norm_set, moves

    def __call__(self, context, views):
        self.given = views
        e = context.embed(self.encoder, views["view1"], self.norm_set)
        assert (np.asarray(e.z) == -1).all() and (np.asarray(e.h) == 1).all() and e.where is views["view1"].where
        own = {**context.batch_stats, "encoder": context.batch_stats["encoder"] + 1}
        views = {"new": View(views.get("new", views["view1"]).image + 1, {})}
        return StageOutput(views, own if self.moves else None, {"asked": jnp.float32(1)})


@pytest.mark.parametrize(
    "encoder, params, stats", [("", "main", 0.0), ("auto", "auto", 10.0), ("target", "target", 20.0)]
)
def test_an_embedding_is_by_the_encoder_that_is_named(seen, encoder, params, stats):
    """In training mode, of the rows that exist, and its head is told what was drawn; cases F."""
    *_, calls = seen(Asks(encoder, "adv"))
    mode = dict(train=True, norm_set="adv")
    (_, p, s, given), (_, p_of_head, _, given_of_head, told) = calls
    assert (p, p_of_head, s) == (params, params, stats)
    for options in (given, given_of_head):
        np.testing.assert_array_equal(options.pop("where"), EXISTS)
        assert options == mode
    np.testing.assert_array_equal(told["flip"], np.arange(B))


@pytest.mark.parametrize("moves", [True, False])
def test_a_stage_sees_what_the_ones_before_it_did(seen, moves):
    """Their views, and the statistics that they moved if they did; cases F."""
    stages = [Asks("", moves=moves) for _ in range(3)]
    views, stats, metrics, calls = seen(*stages)
    assert [c[2] for c in calls if c[0] == "encode"] == ([0.0, 1.0, 2.0] if moves else [0.0] * 3)
    assert stats["encoder"] == (3.0 if moves else 0.0) and stats["encoders"]["auto"]["encoder"] == 10.0
    assert [set(s.given) for s in stages] == [{"view1"}, {"view1", "new"}, {"view1", "new"}]
    assert (np.asarray(views["new"].image) == 4).all() and set(metrics) == {"asked"}
