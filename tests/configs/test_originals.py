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
