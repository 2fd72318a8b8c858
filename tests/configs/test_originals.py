"""What the authors' code does beside its table of settings, by value: norms, heads, rates, moments, protocols."""

import jax
import numpy as np
import pytest
import tiny
from test_configs import config

from jaxcl import losses

PHOTOS = dict(num_examples=1_281_167, image_shape=(256, 256, 3), num_classes=1000)


# ---- the last norm of a residual block

ZERO = [
    *[("simsiam", d) for d in ("cifar10", "cifar100", "imagenet100", "imagenet", "cifar10,resnet18")],
    *[("barlow_twins", d) for d in ("cifar10", "imagenet100", "imagenet")],
    *[("simclr", d) for d in ("stl10", "imagenet100", "imagenet")],
    *[("byol", d) for d in ("cifar10", "tiny_imagenet", "stl10", "imagenet100")],
    *[("hierarchical", f"{m},cifar10") for m in ("simsiam", "byol", "barlow_twins", "supcon")],
    *[("hierarchical", f"{m},imagenet") for m in ("simsiam", "byol", "barlow_twins", "supcon")],
    ("nonsemantic", "byol,cifar10"),
    ("nonsemantic", "simclr,imagenet100"),
    ("moco", "imagenet"),  # of MoCo-v3
    ("supcon", "imagenet"),  # of Google's code
]  # fmt: skip
ONE = [("simclr", "cifar10"), ("plain", "cifar10"), ("supcon", "cifar10"), ("moco", "imagenet100"),
       ("nonsemantic", "imagenet100"), ("l_spread", "cifar10,resnet"), ("byol", "cifar10,resnet18"),
       ("barlow_twins", "cifar10,resnet18"), ("simsiam", ""), ("byol", ""), ("simclr", "cifar10,cpu"),
       ("hierarchical", "")]  # fmt: skip


@pytest.mark.parametrize("zero, presets", [(True, ZERO), (False, ONE)])
def test_the_last_norm_of_a_block(zero, presets):
    """cases E.5."""
    for method, preset in presets:
        assert config(method, preset).model.zero_init_residual == zero, (method, preset)
    method, preset = presets[0]
    recipe = tiny.recipe(config(method, preset), num_examples=50_000, image_shape=(32, 32, 3))
    assert recipe.model.encoder.zero_init == zero


# ---- SupCon on ImageNet


def test_supcon_on_imagenet():
    """cases E.2: the loss times the temperature, a head of one layer on features of unit length, no blur."""
    c = config("supcon", "imagenet")
    recipe = tiny.recipe(c, **PHOTOS)
    term = recipe.terms["supcon"]
    assert (term.temperature, term.base_temperature) == (0.1, 1.0)
    params, _ = jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), recipe.image_shape))
    assert {k: v["dense"]["kernel"].shape for k, v in params["head"].items()} == {"out": (2048, 128)}
    assert recipe.model.head.unit_input and not any(v.blur for v in c.views.values())
    assert not any(op.name == "blur" for v in recipe.views.values() for op in v.ops)
    # The value: of equal features log(rows - 1), times the temperature.
    z = np.ones((4, 2, 8), np.float32)
    got = losses.supcon(z, np.arange(4), temperature=term.temperature, base_temperature=term.base_temperature)
    np.testing.assert_allclose(got, 0.1 * np.log(7), rtol=1e-5)
    for method in ("simclr", "moco"):  # which start from it
        assert not config(method, "imagenet").model.head_unit_input
        assert config(method, "imagenet").model.head_hidden_layers == 1


# ---- LARS


@pytest.mark.parametrize(
    "method, preset, coefficient",
    [
        *[("byol", d, 0.02) for d in ("cifar10", "cifar100", "tiny_imagenet", "stl10", "imagenet100")],
        *[("simclr", d, 0.02) for d in ("stl10", "imagenet100")],
        *[("barlow_twins", d, 0.02) for d in ("cifar10", "imagenet100")],
        *[("nonsemantic", f"{m},imagenet100", 0.02) for m in ("byol", "simclr")],
        ("hierarchical", "barlow_twins,cifar10", 0.02),
        *[(m, "imagenet", 1e-3) for m in ("simclr", "moco", "supcon", "barlow_twins")],
    ],
)
def test_lars_moves_matrices(method, preset, coefficient):
    """cases E.3: the relative step of a matrix, summed over the run, is that of a run on ImageNet, not a few units."""
    c = config(method, preset)
    assert c.optimizer.kind == "lars" and c.optimizer.trust_coefficient == coefficient
    assert c.optimizer.clip_trust == (coefficient == 0.02)
    images = {"imagenet": 1_281_167, "imagenet100": 126_689, "tiny_imagenet": 100_000}
    count = next((n for name, n in images.items() if preset.endswith(name)), 50_000)
    recipe = tiny.recipe(c, **PHOTOS | dict(num_examples=count))
    steps = recipe.encoder_steps
    mean_rate = np.mean([float(recipe.schedule(s)) for s in np.linspace(0, steps - 1, 50).astype(int)])
    # Clipping leaves out the rate: a step is then at most coefficient and at most rate / |p| * |g|.
    assert coefficient * mean_rate * steps > 70


# ---- SimCLR's head


@pytest.mark.parametrize("dataset", ["stl10", "imagenet100", "imagenet"])
def test_simclr_has_batch_norms_in_its_head(dataset):
    """cases E.9."""
    recipe = tiny.recipe(config("simclr", dataset), **PHOTOS)
    params, _ = jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), (64, 64, 3)))
    head = params["head"]
    assert set(head["bn0"]) == {"scale", "bias"} and set(head["out_bn"]) == {"scale"}
    assert [head[k]["dense"]["kernel"].shape for k in ("hidden0", "out")] == [(2048, 2048), (2048, 128)]
    assert not any("bias" in head[k]["dense"] for k in ("hidden0", "out"))


# ---- classifiers and moments


def test_the_classifier_of_plain_and_uel():
    """cases E.7."""
    for method in ("plain", "uel"):
        for dataset, epochs in (("cifar10", 1000), ("cifar100", 1000), ("tiny_imagenet", 200)):
            for c in (config(method, dataset), config("clae", f"{method},{dataset}")):
                assert (c.eval.logistic_batch_size, c.eval.logistic_epochs) == (128, epochs)
                assert "logistic" in c.eval.final
        assert config(method).eval.logistic_batch_size == 256
    for dataset in ("cifar10", "tiny_imagenet"):  # SimCLR's is another
        c = config("simclr", dataset)
        assert (c.eval.logistic_batch_size, c.eval.logistic_epochs) == (256, 1000)


CLAE, HALF, IMAGENET = (0.2023, 0.1994, 0.2010), (0.5, 0.5, 0.5), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    "method, dataset, std",
    [
        *[(m, d, CLAE) for m in ("plain", "uel") for d in ("cifar10", "cifar100")],
        *[("simclr", d, HALF) for d in ("cifar10", "cifar100")],
        *[(m, "tiny_imagenet", IMAGENET) for m in ("simclr", "plain", "uel")],
        *[(m, "imagenet100", IMAGENET) for m in ("moco", "simsiam", "byol", "barlow_twins")],
        ("supcon", "tiny_imagenet", (0.2302, 0.2265, 0.2262)),
        ("excon", "tiny_imagenet", (0.2302, 0.2265, 0.2262)),
        ("supcon", "cifar10", ()),
        ("simclr", "cifar10,cpu", ()),
        ("plain", "", ()),
    ],
)
def test_moments_of_the_authors(method, dataset, std):
    """cases E.6, others of its kind."""
    assert config(method, dataset).data.std == std
    if method in ("simclr", "plain", "uel") and std:
        assert config("clae", f"{method},{dataset}").data.std == std


def test_the_classifier_of_the_supcon_repository():
    """cases E.9: lr 5 on batches of 512 for 100 epochs, a fifth after 60, 75 and 90."""
    recipe = tiny.recipe(config("supcon", "cifar10,sequential"), num_examples=50_000, image_shape=(32, 32, 3))
    each = 50_000 // 1024
    assert (recipe.encoder_steps, recipe.total_steps) == (1000 * each, 1100 * each)
    rate = recipe.memory_schedule["probe"]
    got = [float(rate(e * 2 * each)) for e in (0, 59.9, 60, 74.9, 75, 90, 99.9)]
    np.testing.assert_allclose(got, [5, 5, 1, 1, 0.2, 0.04, 0.04], rtol=1e-5)
    other = tiny.recipe(config("supcon", "cifar100,sequential"), num_examples=50_000, image_shape=(32, 32, 3))
    assert other.total_steps == 2 * other.encoder_steps  # ExCon's


@pytest.mark.parametrize(
    "method, preset, protocol",
    [
        *[("hierarchical", f"{m},imagenet100", "customary") for m in ("simsiam", "byol", "barlow_twins", "supcon")],
        ("hierarchical", "imagenet,two_view", "customary"),
        *[("nonsemantic", f"{m},imagenet100", "nonsemantic") for m in ("moco", "simclr", "byol")],
        *[("nonsemantic", f"{m},imagenet100,none", "nonsemantic") for m in ("moco", "simclr", "byol")],
        ("nonsemantic", "stl10,unlabelled", "nonsemantic"),
        ("moco", "imagenet100", "nonsemantic"),
        ("moco", "imagenet", "moco"),
    ],
)
def test_linear_protocols_are_run(method, preset, protocol):
    """cases E.8."""
    c = config(method, preset)
    assert c.eval.final.count("linear_sgd") == 1 and c.eval.sgd_protocol == protocol
    assert "linear_sgd" not in config(method).eval.final  # garments


def test_the_queue_of_the_best_row():
    """cases E.10."""
    for preset, length in (("imagenet100,ifm", 16384), ("imagenet100,ifm,none", 65536), ("imagenet100", 16384)):
        assert config("nonsemantic", preset).memory.queue.length == length


def test_batches_of_barlow_twins():
    """cases E.10."""
    for preset, size in (("imagenet", 4096), ("imagenet100", 2048), ("cifar10", 256)):
        c = config("barlow_twins", preset)
        assert c.batch_size == size and c.optimizer.lr == pytest.approx(0.2 * size / 256)
        assert config("hierarchical", f"barlow_twins,{preset}").batch_size == size
