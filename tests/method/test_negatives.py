"""The stages of non-semantic negatives: patches and textures of a view, and what they refuse."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl.augment import patch_negatives, quilting
from jaxcl.errors import UserError
from jaxcl.method.grad_cache import GradCache
from jaxcl.method.init_state import init_state
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase
from jaxcl.method.stages.negatives import PatchNegatives, TextureNegatives
from jaxcl.method.views import View

# ---- patches


def test_patches_of_a_view():
    view = View(jnp.asarray(tiny.normal(4, 32, 32, 3)), {"flip": jnp.zeros(4)}, jnp.array([True, True, False, True]))
    keys, asked = jax.random.split(jax.random.key(5), 4), []
    context = types.SimpleNamespace(keys=lambda name: (asked.append(name), keys)[1])
    stage = PatchNegatives(into="cut", count=2)
    out = stage(context, {"view1": view})
    want = patch_negatives(keys, view.image, min_patch=2, max_patch=10, count=2)
    assert stage.reads == ("view1",) and stage.writes == stage.creates == ("cut",) and asked == ["cut/patches"]
    assert list(out.views) == ["cut"] and out.batch_stats is None
    np.testing.assert_array_equal(out.views["cut"].image, np.asarray(want).reshape(8, 32, 32, 3))
    assert out.views["cut"].where.tolist() == [True, True, True, True, False, False, True, True]


def test_patches_are_checked():
    recipe = types.SimpleNamespace(image_shape=(32, 32, 3), batch_size=8, grad_cache=GradCache())
    PatchNegatives().check("stages[0]", recipe, 1)
    with pytest.raises(UserError, match=r"stages\[0\].*max_patch is 40"):
        PatchNegatives(max_patch=40).check("stages[0]", recipe, 1)
    with pytest.raises(UserError, match="min_patch is 20 and max_patch 10"):
        PatchNegatives(min_patch=20).check("stages[0]", recipe, 1)
    with pytest.raises(UserError, match="count"):
        PatchNegatives(count=0)


# ---- textures


@functools.cache
def update_parts():
    """-> recipe, state and batch of the tiny network, whose views crop and flip; a third view does not flip."""
    c = tiny.config(stage=False)
    c.views.unflipped = c.views.view1.copy_and_resolve_references()
    c.views.unflipped.flip = 0.0
    recipe = tiny.recipe(c)
    state = tiny.fill(jax.eval_shape(lambda: init_state(recipe, 0)))
    return recipe, state, tiny.batch()


def run(stage, **more):
    recipe, state, batch = update_parts()
    batch = batch | more
    recipe = dataclasses.replace(recipe, stages=(stage,), stage_kinds=("texture_negatives",), stage_starts=(0,))

    def views(state, batch):
        made = make_views(recipe, state, batch, ("view1", "view2"))
        return run_stages(recipe, Phase("encoder", (0,)), state, batch, made)[0]

    return jax.jit(views)(state, batch)


@functools.cache
def of_view2():
    return run(TextureNegatives(of="view2", into="texture"))


def test_texture_repeats_the_draws_of_its_view():
    views = of_view2()
    query, texture = views["view2"], views["texture"]
    assert set(texture.params) == set(query.params) and "crop" in query.params
    for name, drawn in query.params.items():
        np.testing.assert_array_equal(texture.params[name], drawn)
    assert (np.asarray(views["view1"].params["crop"]) != np.asarray(texture.params["crop"])).any()
    assert texture.image.shape == query.image.shape and (np.abs(texture.image - query.image) > 0.1).any((1, 2, 3)).all()


def test_texture_is_the_query_where_the_texture_is_the_image(monkeypatch):
    monkeypatch.setattr(quilting, "quilt", lambda keys, pixels, *rest: pixels)
    views = run(TextureNegatives())
    np.testing.assert_array_equal(views["negatives"].image, views["view1"].image)
    other = run(TextureNegatives(pipeline="unflipped"))  # the same crop, as draws go by the operation's name
    np.testing.assert_array_equal(other["negatives"].params["crop"], views["view1"].params["crop"])
    flipped = np.asarray(views["view1"].params["flip"])[:, None, None, None]
    want = jnp.where(flipped, views["view1"].image[:, :, ::-1], views["view1"].image)
    np.testing.assert_allclose(other["negatives"].image, want, atol=1e-6)


def test_texture_makes_several_an_image():
    """All of them different (cases F)."""
    views, one = run(TextureNegatives(of="view2", into="texture", count=3)), of_view2()
    images = np.asarray(views["texture"].image).reshape(16, 3, 16, 16, 3)
    np.testing.assert_allclose(images[:, 0], one["texture"].image, atol=1e-6)  # the first whatever their number
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(images[:, i] - images[:, j]) > 0.1).any((1, 2, 3)).all()
    crops = np.asarray(views["texture"].params["crop"])
    np.testing.assert_array_equal(crops, np.repeat(views["view2"].params["crop"], 3, axis=0))


@pytest.mark.parametrize("stage", [PatchNegatives(count=2), TextureNegatives(count=2)], ids=["patches", "textures"])
def test_negatives_of_rows_that_do_not_exist_do_not_exist(stage, monkeypatch):
    """cases F."""
    monkeypatch.setattr(quilting, "quilt", lambda keys, pixels, *rest: pixels)
    recipe, state, batch = update_parts()
    where = np.arange(16) % 3 > 0
    recipe = dataclasses.replace(recipe, stages=(stage,), stage_kinds=("negatives",), stage_starts=(0,))

    def wheres(state, batch):
        made = make_views(recipe, state, batch, ("view1",))
        made["view1"] = made["view1"]._replace(where=where)
        views = run_stages(recipe, Phase("encoder", (0,)), state, batch, made)[0]
        assert views["negatives"].where.shape == views["negatives"].image.shape[:1]
        return views["negatives"].where

    np.testing.assert_array_equal(jax.jit(wheres)(state, batch), np.repeat(where, 2))


def test_texture_takes_the_textures_that_come_with_the_images():
    """Those of the batch itself, so that the view must be the query; in other rows, they must follow."""
    _, _, batch = update_parts()
    views = run(TextureNegatives(), texture=batch["image"])
    np.testing.assert_array_equal(views["negatives"].image, views["view1"].image)
    rolled = run(TextureNegatives(), texture=np.roll(batch["image"], 1, axis=0))
    assert (np.abs(rolled["negatives"].image - views["view1"].image) > 0.1).any((1, 2, 3)).all()


def test_textures_are_checked():
    recipe = types.SimpleNamespace(views={"view1": None})
    TextureNegatives().check("stages[0]", recipe, 1)
    with pytest.raises(UserError, match=r"stages\[0\].of is 'view3'"):
        TextureNegatives(of="view3").check("stages[0]", recipe, 1)
    with pytest.raises(UserError, match=r"stages\[0\].pipeline is 'x'"):
        TextureNegatives(pipeline="x").check("stages[0]", recipe, 1)
    with pytest.raises(UserError, match="candidates is 0"):
        TextureNegatives(candidates=0)
    with pytest.raises(UserError, match="count is 0"):
        TextureNegatives(count=0)
    context = types.SimpleNamespace(pixels=np.zeros((2, 16, 16, 3)), textures=None)
    with pytest.raises(UserError, match="exemplar is 20"):
        TextureNegatives(exemplar=20)(context, {})
    context.textures = context.pixels
    with pytest.raises(UserError, match="count is 2"):
        TextureNegatives(count=2)(context, {})
    stage = TextureNegatives(of="view2", into="t")
    assert stage.reads == ("view2",) and stage.writes == stage.creates == ("t",)
