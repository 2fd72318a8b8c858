"""The ResNet-18 on CIFAR that papers compare by: published settings by value, and two small updates of each."""

import jax
import numpy as np
import pytest
import tiny
from test_configs import config

from jaxcl.errors import UserError
from jaxcl.method import sharding
from jaxcl.method.init_state import init_state
from jaxcl.method.update import compile_update

CIFAR = dict(num_examples=50_000, num_classes=10, image_shape=(32, 32, 3))
DATASETS = ("cifar10", "cifar100")
S, W, A = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1)
# method: optimiser, lr, decay, lr of the probe; jitter, solarise of the views; shapes of the dense layers of the head
TABLE = {
    "simclr": ("lars", 0.4, 1e-4, 0.1, S, (0, 0), [(512, 2048), (2048, 256)]),
    "moco": ("sgd", 0.3, 1e-4, 0.3, W, (0, 0), [(512, 2048), (2048, 256)]),
    "byol": ("lars", 1.0, 1e-5, 0.1, A, (0, 0.2), [(512, 4096), (4096, 256)]),
    "simsiam": ("sgd", 0.5, 1e-5, 0.1, W, (0, 0), [(512, 2048), (2048, 2048), (2048, 2048)]),
    "barlow_twins": ("lars", 0.3, 1e-4, 0.1, A, (0, 0.2), [(512, 2048), (2048, 2048), (2048, 2048)]),
    "supcon": ("sgd", 0.4, 1e-5, 0.1, S, (0, 0), [(512, 2048), (2048, 256)]),
}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", TABLE)
def test_what_all_share(method, dataset):
    """cases E: 1,000 epochs of batches of 256, padding 2, ten epochs of warm-up from 3e-5 and one cosine to 0."""
    kind, lr, decay, probe_lr, jitter, solarize, _ = TABLE[method]
    c = config(method, f"{dataset},resnet18")
    recipe = tiny.recipe(c, **CIFAR)
    assert (recipe.batch_size, recipe.encoder_steps, recipe.image_shape) == (256, 1000 * 195, (32, 32, 3))
    moments = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    assert (recipe.mean, recipe.std) == moments[dataset]
    model = c.model
    assert (model.depth, model.stem, model.stem_padding) == (18, "cifar", 2)
    assert model.zero_init_residual == (method == "simsiam")
    options = (c.optimizer, c.memory.probe.optimizer)
    assert [o.kind for o in options] == [kind] * 2
    assert [(o.lr, o.weight_decay) for o in options] == [(lr, decay), (probe_lr, 0)]
    if kind == "lars":
        assert all((o.trust_coefficient, o.clip_trust) == (0.02, True) for o in options)
    warm, total = 10 * 195, recipe.encoder_steps
    for schedule, peak in ((recipe.schedule, lr), (recipe.memory_schedule["probe"], probe_lr)):
        got = [float(schedule(s)) for s in (0, warm, (warm + total) // 2, total)]
        np.testing.assert_allclose(got, [3e-5, peak, peak / 2, 0], atol=1e-6)
    for name, sun in zip(("view1", "view2"), solarize, strict=True):
        v = c.views[name]
        assert (v.crop_area, v.interpolation, v.flip) == ((0.08, 1.0), "bicubic", 0.5)
        assert (v.jitter, v.jitter_p, v.grayscale, v.solarize) == (jitter, 0.8, 0.2, sun)
        assert (v.blur, v.blur_sigma) == (0.0 if jitter == A else 0.5, (0.1, 2.0))
        ops = {type(op).__name__: op for op in recipe.views[name].ops}
        assert ("GaussianBlur" in ops) == (jitter != A)  # also at 32 pixels
        assert jitter == A or ops["GaussianBlur"].kernel_size == 13
    passes = [(p.views, p.encoder) for p in recipe.passes]
    assert passes[:2] == [(("view1",), ""), (("view2",), "")]  # each view normalised by itself
    assert passes[2:] == ([(("view1",), "target"), (("view2",), "target")] if "target" in recipe.memory else [])


@pytest.mark.parametrize("method", TABLE)
def test_the_heads(method):
    """cases E."""
    recipe = tiny.recipe(config(method, "cifar10,resnet18"), **CIFAR)
    params = jax.eval_shape(lambda: init_state(recipe, 0).params)

    def dense(tree):
        return [tree[k]["dense"]["kernel"].shape for k in ("hidden0", "hidden1", "out") if k in tree]

    head = params["head"]
    assert dense(head) == TABLE[method][-1]
    assert ("bn0" in head) == (method in ("byol", "simsiam", "barlow_twins"))
    assert recipe.model.head.out_norm == ("plain" if method == "simsiam" else "none")
    predictor = params["heads"].get("predictor", {}) if "heads" in params else {}
    want = {"byol": [(256, 4096), (4096, 256)], "simsiam": [(2048, 512), (512, 2048)]}.get(method, [])
    assert dense(predictor) == want and ("bn0" in predictor) == bool(want)


def test_the_losses():
    """cases E."""
    simclr, moco, byol, simsiam, barlow, supcon = (config(m, "cifar10,resnet18") for m in TABLE)
    assert simclr.terms.nt_xent.temperature == 0.2
    assert (supcon.terms.supcon.temperature, supcon.terms.supcon.base_temperature) == (0.2, 0.0)
    terms = [(t.query, t.key, t.queue, t.temperature, t.weight) for t in (moco.terms.moco, moco.terms.moco2)]
    assert terms == [
        ("view1", "target/view2", "queue", 0.2, 0.5),
        ("view2", "target/view1", "queue1", 0.2, 0.5),
    ]
    queues = [(q.of, q.length) for q in (moco.memory.queue, moco.memory.queue1)]
    assert queues == [("target/view2", 32768), ("target/view1", 32768)]
    for c, end in ((moco, 0.999), (byol, 1.0)):
        t = c.memory.target
        assert (t.decay, t.decay_end, t.decay_schedule, t.order) == (0.99, end, "cosine", "after")
    assert simsiam.optimizer.constant_lr == ("heads/predictor",) and not barlow.optimizer.constant_lr
    assert (barlow.terms.barlow_twins.off_diagonal_weight, barlow.terms.barlow_twins.scale) == (0.0051, 0.1)


@pytest.mark.parametrize("preset", ["resnet18", "tiny_imagenet,resnet18", "cifar10,cpu,resnet18"])
def test_only_of_cifar(preset):
    with pytest.raises(UserError):
        config("supcon", preset)
    if "cpu" not in preset:
        with pytest.raises(UserError):
            config("simclr", preset)


@pytest.mark.parametrize("method", TABLE)
def test_two_updates(method):
    """cases E: each preset as it is but smaller; what colour does compiles slowly and is left out."""
    c = config(method, "cifar10,resnet18")
    c.model.stage_sizes, c.model.stage_widths, c.model.strides = (1, 1), (8, 16), (1, 2)
    c.model.head_hidden = c.model.head_features = 16
    if "predictor" in c.heads:
        c.heads.predictor.hidden, c.heads.predictor.features = 16, 16
    c.batch_size, c.size, c.duration, c.eval.tap = 16, 16, "4 steps", "stage2"
    for name in ("queue", "queue1"):
        if name in c.memory:
            c.memory[name].length = 32
    for o in (c.optimizer, c.memory.probe.optimizer):
        o.warmup = "1 step"
    for view in c.views.values():
        view.jitter_p = view.grayscale = view.blur = 0.0
    recipe = tiny.recipe(c)
    mesh = sharding.make_mesh(1)
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = sharding.device_put(jax.jit(lambda: init_state(recipe))(), replicated)
    before = jax.tree.map(np.array, state.params)
    update = compile_update(recipe, recipe.phase(0), replicated, rows)
    for seed in range(2):
        state, metrics = update(state, sharding.device_put(tiny.batch(side=16, seed=seed), rows))
        assert all(np.isfinite(np.asarray(v)).all() for v in metrics.values())
    moved = [
        np.abs(a - np.asarray(b)).max() > 0 for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
    ]
    assert all(moved) if method != "simsiam" else np.mean(moved) > 0.7  # a branch that starts at 0 learns later
    if "queue1" in c.memory:
        pointers = [int(state.memory[q]["pointer"]) for q in ("queue", "queue1")]
        assert pointers == [0, 0]  # 2 x 16 of 32 slots
        assert np.abs(np.asarray(state.memory["queue"]["columns"] - state.memory["queue1"]["columns"])).max() > 1e-3
