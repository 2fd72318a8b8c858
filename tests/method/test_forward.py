"""Forward passes and heads by themselves: rows that do not exist enter no batch norm, whichever view they are of."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jaxcl import config as base
from jaxcl.method import forward
from jaxcl.method.init_state import init_state
from jaxcl.method.terms import Embedding
from jaxcl.method.views import View

B = tiny.BATCH
EXISTS = np.arange(B) % 3 > 0


@pytest.fixture(scope="module")
def parts():
    """-> (a recipe with batch norms in the projection head and in a predictor, its params, its statistics)."""
    c = tiny.config(stage=False)
    c.model.head_norm = c.model.head_out_norm = "batch"
    c.heads.predictor = base.head("mlp", features=12, hidden=8)
    c.terms.simsiam = base.term("simsiam")
    recipe = tiny.recipe(c)
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe)))
    return recipe, state.params, state.batch_stats


def same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1e-2, float(np.abs(b).max())))


def test_a_pass_of_a_view_with_rows_that_do_not_exist(parts):
    """As if the other rows had not been there: features, embeddings, and every running statistic; cases F."""
    recipe, params, stats = parts
    one, two = (tiny.normal(B, tiny.SIDE, tiny.SIDE, 3, seed=i) for i in (1, 2))
    padded = np.where(EXISTS[:, None, None, None], two, 1e2)
    (spec,) = recipe.passes

    @jax.jit
    def both():
        views = {"view1": View(one, {}), "view2": View(padded, {}, EXISTS)}
        fewer = {"view1": View(one, {}), "view2": View(two[EXISTS], {})}
        return tuple(forward.run_pass(recipe, params, stats, v, spec) for v in (views, fewer))

    (got, new), (want, new_of_fewer) = both()
    same(new, new_of_fewer)
    np.testing.assert_array_equal(got["view2"].where, EXISTS)
    for name, rows in (("view1", slice(None)), ("view2", EXISTS)):
        same((got[name].h[rows], got[name].z[rows]), (want[name].h, want[name].z))


@pytest.mark.parametrize("together", [False, True])
def test_a_head_on_rows_that_do_not_exist(parts, together):
    """Its batch norms see the rows that exist, of each view by itself or of both together; cases F."""
    recipe, params, stats = parts
    predictor = dataclasses.replace(recipe.heads["predictor"], together=together)
    recipe = dataclasses.replace(recipe, heads={"predictor": predictor})
    one, two = tiny.normal(B, 12), tiny.normal(B, 12, seed=1)
    padded = np.where(EXISTS[:, None], two, 1e2)

    @jax.jit
    def run(e):
        return forward.run_heads(recipe, params, stats, e, {"predictor": ("view1", "view2")})

    got, new = run({"view1": Embedding(None, one), "view2": Embedding(None, padded, EXISTS)})
    want, new_of_fewer = run({"view1": Embedding(None, one), "view2": Embedding(None, two[EXISTS])})
    same(new, new_of_fewer)
    for name, rows in (("view1", slice(None)), ("view2", EXISTS)):
        same(got[name].out["predictor"][rows], want[name].out["predictor"])
