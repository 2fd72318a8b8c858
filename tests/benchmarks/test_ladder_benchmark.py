"""The count of multiply-adds, against counts by hand and those of Zhang and Ma 2022, arXiv 2206.00227."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax import lax

from benchmarks.ladder import forward_macs, macs
from benchmarks.steps import load_config

IMAGENET = dict(num_examples=1_281_167, num_classes=1000, image_shape=(256, 256, 3))


def test_count_by_hand():
    def f(x, k, w):
        y = lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.jit(jnp.matmul)(y, w)
        return lax.scan(lambda c, _: (c @ jnp.ones((7, 7)), None), y, None, length=3)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 9, 9, 3), (3, 3, 3, 5), (5, 7))]
    rows = 2 * 4 * 4
    assert macs(jax.make_jaxpr(f)(*shapes).jaxpr) == rows * (27 * 5 + 5 * 7 + 3 * 7 * 7)


@pytest.mark.slow
def test_the_ladder_on_a_resnet50():
    """2.44 times the two-view pass of 8.17 GMAC, plus about 0.13 GMAC for each of six adapters."""
    counts = {}
    for mode in ("two_view", "addone"):
        recipe = dataclasses.replace(
            tiny.recipe(load_config("hierarchical", f"imagenet,{mode},unlabelled"), **IMAGENET), batch_size=1
        )
        model = dataclasses.replace(recipe.model, head=dataclasses.replace(recipe.model.head, features=0))
        model = dataclasses.replace(
            model, branches=tuple((i, a, dataclasses.replace(h, features=0)) for i, a, h in model.branches)
        )
        counts[mode] = forward_macs(dataclasses.replace(recipe, model=model, heads={}, batch_size=1), heads=False) / 1e9
    assert counts["two_view"] == pytest.approx(8.17, rel=0.01)
    assert counts["addone"] == pytest.approx(19.9 + 6 * 0.13, rel=0.01)
