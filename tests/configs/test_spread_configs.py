"""L_spread and Thanos: what each preset learns, the authors' settings, and that the two files hold the same run."""

import jax
import numpy as np
import pytest
import tiny
from test_configs import FACTS, config, size

from jaxcl import config as base
from jaxcl.method.recipe import Phase
from jaxcl.train import config_diff

CIFAR = FACTS["cifar10"] | dict(num_classes=2)
TERMS = {
    "l_spread": {"ce", "contrast"},
    "supcon": {"ce", "contrast"},
    "clamped": {"ce", "contrast"},
    "supcon_infonce": {"ce", "contrast", "infonce"},
    "infonce": {"ce", "infonce"},
    "autoencoder": {"ce", "reconstruction"},
    "ce": {"ce"},
}


@pytest.mark.parametrize("method", TERMS)
def test_what_each_preset_learns(method):
    c = config("l_spread", method)
    assert set(c.terms) == TERMS[method] and c.data.labels == "coarse"
    recipe = tiny.recipe(c, num_examples=10_000, image_shape=(32, 32, 3))
    assert recipe.model.head.features == 0  # the losses see the features
    assert recipe.term_names(Phase("encoder")) == tuple(c.terms)
    if "contrast" in c.terms:
        contrast = recipe.terms["contrast"]
        at_scale = config("l_spread", f"{method},cifar10").terms.contrast
        assert (contrast.temperature, at_scale.temperature) == (0.1, 0.5)
        assert at_scale.clip_positive == contrast.clip_positive == (1.0 if method == "clamped" else 0.0)
        if method == "l_spread":
            assert (c.terms.contrast.kind, contrast.a_spread) == ("spread", 1.0)
        else:
            assert c.terms.contrast.kind == "attract"


def test_settings_at_the_authors_scale():
    for preset, epochs, parameters in (("cifar10", 600, 3_254_784), ("cifar10,resnet", 200, 11_176_512)):
        recipe = tiny.recipe(config("l_spread", preset), **CIFAR)
        assert (recipe.encoder_steps, recipe.batch_size) == (epochs * 390, 128)
        params, _ = jax.eval_shape(lambda r=recipe: r.model.init(jax.random.key(0), r.image_shape))
        assert size(params["encoder"]) == parameters
    # 3e-4 at the start; the released period is 100 epochs, whatever the run.
    rates = {
        word: [float(tiny.recipe(config("l_spread", f"cifar10,{word}"), **CIFAR).schedule(e * 390)) for e in epochs]
        for word, epochs in (("released", (0, 100, 200, 300)), ("cosine", (0, 300, 599)))
    }
    np.testing.assert_allclose(rates["released"], [3e-4, 0, 3e-4, 0], atol=1e-9)
    np.testing.assert_allclose(rates["cosine"], [3e-4, 1.5e-4, 0], atol=1e-8)
    for dataset, side in (("mnist", 28), ("tiny_imagenet", 64), ("cifar100u", 0)):
        c = config("l_spread", dataset)
        assert c.size == side and c.data.imbalance == ("cifar100u" if dataset == "cifar100u" else "")


def test_the_full_decoder():
    recipe = tiny.recipe(config("l_spread", "autoencoder,cifar10"), **CIFAR)
    params, _ = jax.eval_shape(lambda: recipe.heads["decoder"].init(jax.random.key(0), recipe.head_input("decoder")))
    assert size(params) == 8_625_600


@pytest.mark.parametrize("method", ["l_spread", "supcon"])
def test_thanos_is_the_run_and_an_autoencoder(method):
    alone, both = config("l_spread", method), config("thanos", method)
    assert both.model.to_dict() == alone.model.to_dict() == both.encoders.auto.to_dict()
    for name, term in alone.terms.items():
        assert both.terms[name].to_dict() == term.to_dict()
    changed = {
        line.split(":")[0].split(".")[0].split("[")[0]
        for line in config_diff.differences(*map(base.to_dict, (alone, both)))
    }
    assert changed <= {"name", "encoders", "heads", "passes", "representation", "terms"}
    auto = config("l_spread", "autoencoder")
    assert set(both.terms) - set(alone.terms) == {"auto_ce", "reconstruction"}
    assert both.heads.decoder.widths == auto.heads.decoder.widths
    recipe = tiny.recipe(both, num_examples=10_000, image_shape=(32, 32, 3))
    assert recipe.features_of(recipe.representation) == 2 * recipe.model.features


def test_thanos_with_one_encoder_or_one_classifier():
    one, joint = (
        tiny.recipe(config("thanos", p), num_examples=10_000, image_shape=(32, 32, 3)) for p in ("one", "joint")
    )
    assert not one.encoders and set(one.terms) == {"ce", "contrast", "reconstruction"}
    assert joint.heads["classifier"].encoders == ("", "auto") and "auto_ce" not in joint.terms


@pytest.mark.parametrize(
    "preset", ["cifar10", "cifar10,resnet,released", "cifar100u", "autoencoder,mnist", "tiny_imagenet"]
)
def test_the_best_state_on_held_out_images_is_kept(preset):
    """cases E.1: as the released code does, for L_spread and for Thanos, at the authors' scale only."""
    for c in (config("l_spread", preset), config("thanos", preset.removeprefix("autoencoder,"))):
        assert (c.data.validation, c.data.validation_split, c.checkpoint.keep_best) == (0.1, "released", True)
        assert (c.eval.state, c.eval.every, c.eval.quick) == ("best", "1 epoch", ("classifier",))
    for c in (config("l_spread"), config("thanos"), config("l_spread", "cifar10,cpu")):
        assert (c.data.validation, c.eval.state) == (0, "last")


@pytest.mark.parametrize(
    "dataset, std",
    [
        ("cifar10", (0.24703223, 0.24348513, 0.26158784)),
        ("cifar100", (0.26733429, 0.25643846, 0.27615047)),
        ("cifar100u", (0.26733429, 0.25643846, 0.27615047)),
        ("mnist", (0.3081, 0.3081, 0.3081)),
        ("tiny_imagenet", (0.229, 0.224, 0.225)),
    ],
)
def test_images_are_normalised_as_in_the_released_code(dataset, std):
    """cases E.6: the reconstruction is compared in these units."""
    for method in ("l_spread", "thanos"):
        recipe = tiny.recipe(config(method, dataset), **CIFAR)
        assert recipe.std == std and all(v.ops[-1].std == std for v in recipe.views.values())
