"""The presets for a pod: their settings, and two steps of each on tiny images, in bfloat16 over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_configs import config

from jaxcl.method import sharding
from jaxcl.method.init_state import init_state, state_shardings
from jaxcl.method.update import compile_update
from jaxcl.train import loop as train

METHODS = ("supcon", "simclr", "moco")
IMAGENET = dict(num_examples=1_281_167, image_shape=(256, 256, 3), num_classes=1000)


@pytest.mark.parametrize(
    "method, lr, decay, warmup, epochs",
    [("supcon", 6.4, 1e-3, 12, 350), ("simclr", 4.8, 1e-6, 10, 100), ("moco", 9.6, 1e-6, 10, 100)],
)
def test_settings(method, lr, decay, warmup, epochs):
    recipe = tiny.recipe(config(method, "imagenet"), **IMAGENET, num_devices=256)
    assert (recipe.batch_size, recipe.encoder_steps, recipe.image_shape) == (4096, epochs * 312, (224, 224, 3))
    options = config(method, "imagenet").optimizer
    assert (options.kind, options.lr, options.weight_decay) == ("lars", pytest.approx(lr), decay)
    assert float(recipe.schedule(warmup * 312)) == pytest.approx(lr)
    shapes = jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), recipe.image_shape))
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes[0]["encoder"]))
    assert size == 23_508_032  # of torchvision's ResNet-50, without its classifier
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    program = str(jax.make_jaxpr(lambda p, s, x: recipe.model.encode(p, s, x, train=True))(*shapes, images))
    convolutions = [line for line in program.splitlines() if "conv_general_dilated[" in line]
    assert convolutions and all(":bf16[" in line for line in convolutions)
    assert recipe.model.head.features == 128 and len(recipe.passes) == (2 if method == "moco" else 1)


def shrink(c):
    c.model.stage_sizes, c.model.stage_widths, c.model.strides = (1, 1), (8, 16), (1, 2)
    c.batch_size, c.size, c.duration, c.eval.tap = 16, 32, "2 steps", "stage2"
    c.optimizer.warmup = "0"
    for view in c.views.values():
        view.jitter_p = view.grayscale = view.blur = 0.0  # colour compiles slowly
    return c


@pytest.mark.parametrize("method", METHODS)
def test_two_steps(method):
    recipe = tiny.recipe(shrink(config(method, "imagenet")), image_shape=(40, 40, 3), num_devices=8)
    mesh = sharding.make_mesh(8)
    placed, rows = state_shardings(recipe, mesh), sharding.batch_sharding(mesh)
    fresh = jax.eval_shape(lambda: init_state(recipe))
    zero = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (fresh.opt_state, fresh.memory.get("queue")))
    state = tiny.fill(fresh).replace(step=np.int32(0), opt_state=zero[0], key=jax.random.key(0))
    memory = {
        k: {**m, "opt_state": jax.tree.map(np.zeros_like, m["opt_state"])} if "opt_state" in m else m
        for k, m in state.memory.items()
    }
    if zero[1]:
        memory["queue"] = {**memory["queue"], "pointer": zero[1]["pointer"]}
    state = jax.device_put(state.replace(memory=memory), placed)
    before = jax.device_get(state.params)
    update = compile_update(recipe, recipe.phase(0), placed, rows)
    for seed in range(2):
        state, metrics = update(state, sharding.device_put(tiny.batch(side=40, seed=seed), rows))
        assert all(np.isfinite(np.asarray(v)).all() for v in metrics.values())
    after = jax.tree.leaves(jax.device_get(state.params))
    assert all(x.dtype == np.float32 for x in after)
    assert all((x != y).any() for x, y in zip(jax.tree.leaves(before["encoder"]), after, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run(method, tmp_path):
    c = shrink(config(method, "imagenet"))
    c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
    c.log_every, c.report, c.eval.final = "1 step", False, ("knn", "linear", "classifier")
    c.devices = 8
    results = train.run(c, tmp_path / "run")
    assert results["steps"] == 2 and {"knn", "linear", "classifier"} <= set(results)
