"""The word finetune of every config, and the papers' stages on encoders that are frozen in part or have LoRA."""

import jax
import numpy as np
import pytest
import tiny
from processes import ROOT
from train_checks import config_module

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method.init_state import init_state
from jaxcl.method.update import make_update

NAMES = sorted({p.stem for p in (ROOT / "configs").glob("*.py")} - {"photos"})  # that one has it already


@pytest.mark.parametrize("name", NAMES)
def test_the_word_composes_with_every_config(name):
    c = config_module(name).get_config("finetune")
    base.check(c)
    recipe = tiny.recipe(c, num_examples=1000, image_shape=(32, 32, 3))
    assert recipe.encoder_steps == 200 and recipe.finetune.warmup_steps == 20
    assert recipe.finetune.layer_decay == recipe.model.encoder.layer_decay
    assert c.eval.final[-1] == "drift" and c.name.endswith("finetune")
    assert all(view.crop_area[0] >= 0.4 for view in c.views.values() if view.kind == "random")
    plain = config_module(name).get_config("")
    assert set(plain.terms) == set(c.terms) and plain.optimizer.constant_lr == c.optimizer.constant_lr


def test_with_other_words():
    c = config_module("simclr").get_config("unlabelled,finetune")
    assert "probe" not in c.memory and "neighbours" in c.eval.final and c.eval.final[-1] == "drift"
    assert base.to_dict(c) == base.to_dict(config_module("simclr").get_config("finetune,unlabelled"))
    with pytest.raises(UserError, match="unknown preset"):
        config_module("simclr").get_config("finetuned")


VIT = dict(patch=4, width=16, heads=2, depth=2, mlp_width=16, head_features=12)


def shrink(c, lora):
    if lora:
        c.model = base.model("vit", **VIT, lora_rank=2)
    else:
        tiny.tiny_model(c)
        c.model.depth, c.model.strides = 18, (1, 2)
        c.optimizer.freeze = "stage1"
    c.batch_size, c.duration, c.size, c.optimizer.head_warmup = 16, "8 steps", tiny.SIDE, "2 steps"
    c.optimizer.warmup = "0"
    for view in c.views.values():
        if view.kind == "random":
            view.jitter_p = view.grayscale = 0.0  # colour compiles slowly
    for p in c.passes:
        p.norm_set = "" if lora else p.norm_set
    for stage in c.stages:
        if "tap" in stage:
            stage.tap, stage.start = "block1" if lora else "stage1", "0"
        if "norm_set" in stage:
            stage.norm_set = "" if lora else stage.norm_set
    return c


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("name", ["excon", "clae"])
def test_stages_of_the_papers(name, lora):
    recipe = tiny.recipe(shrink(config_module(name).get_config("finetune"), lora))
    phase = recipe.phase(3)
    assert phase.stages == (0,) and not phase.warms and recipe.phase(0).warms
    shapes = jax.eval_shape(lambda: init_state(recipe))
    zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)  # noqa: E731
    state = tiny.fill(shapes)
    memory = {n: {**m, "opt_state": zeros(m["opt_state"])} for n, m in state.memory.items()}
    state = state.replace(step=np.int32(3), opt_state=zeros(shapes.opt_state), memory=memory)
    new, metrics = jax.jit(make_update(recipe, phase))(state, tiny.batch())
    assert all(np.isfinite(v) for v in metrics.values())
    frozen = {"stem_conv", "stem_bn", "stem_bn_adv", "stages_0_0"}
    for (path, a), b in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(new.params), strict=True):
        at = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        stays = at[0] == "encoder" and (lora or at[1] in frozen)
        assert np.array_equal(a, b) == stays, at
    for (path, a), b in zip(
        jax.tree.leaves_with_path(state.batch_stats), jax.tree.leaves(new.batch_stats), strict=True
    ):
        at = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        assert np.array_equal(a, b) == at[0].startswith(("stem", "stages")), at  # norm_statistics is "frozen"
