"""Presets of MoCo and BYOL: the authors' settings, and parts that fit together."""

import jax
import numpy as np
import pytest
import tiny
from test_configs import config

from jaxcl.method.init_state import init_state

IMAGENET = dict(num_examples=126_689, num_classes=100, image_shape=(224, 224, 3))


@pytest.mark.parametrize(
    "preset, lr, batch, decay, length",
    [("imagenet100", 0.03, 128, 0.999, 16384), ("imagenet100,ifm", 0.8, 512, 0.99, 65536)],
)
def test_moco_at_the_authors_scale(preset, lr, batch, decay, length):
    c = config("moco", preset)
    recipe = tiny.recipe(c, **IMAGENET)
    assert (recipe.batch_size, recipe.encoder_steps) == (batch, 200 * (IMAGENET["num_examples"] // batch))
    assert recipe.terms["moco"].temperature == 0.2 and recipe.image_shape == (224, 224, 3)
    assert recipe.memory["target"].decay == decay and recipe.memory["queue"].length == length
    rates = [float(recipe.schedule(int(share * recipe.encoder_steps))) for share in (0, 0.5, 0.999)]
    np.testing.assert_allclose(rates, [lr, lr / 2, 0], atol=lr * 1e-2)
    assert (c.optimizer.kind, c.optimizer.weight_decay) == ("sgd", 1e-4)
    params, _ = jax.eval_shape(lambda: recipe.model.init(jax.random.key(0), recipe.image_shape))
    shapes = [params["head"][k]["dense"]["kernel"].shape for k in ("hidden0", "out")]
    assert shapes == [(2048, 2048), (2048, 128)]
    for view in ("view1", "view2"):
        v = c.views[view]
        assert (v.crop_area, v.jitter, v.jitter_p, v.grayscale, v.blur) == (
            (0.2, 1.0),
            (0.4, 0.4, 0.4, 0.1),
            0.8,
            0.2,
            0.5,
        )


def test_moco_on_a_cpu_with_and_without_labels():
    for labels in ("labelled", "unlabelled"):
        recipe = tiny.recipe(
            config("moco", labels), num_examples=10_000, image_shape=(32, 32, 3), labelled=labels == "labelled"
        )
        assert ("probe" in recipe.memory) == (labels == "labelled")
        query, key = recipe.passes
        assert (query.shuffle, key.shuffle, key.encoder) == (False, True, "target")


@pytest.mark.parametrize("dataset, side", [("cifar10", 32), ("tiny_imagenet", 64), ("stl10", 96), ("imagenet100", 224)])
def test_byol_at_the_authors_scale(dataset, side):
    """cases E.4: the authors' settings for 300 epochs, the nearest to 200 with those for 100."""
    c = config("byol", dataset)
    recipe = tiny.recipe(c, **IMAGENET | dict(image_shape=(side, side, 3)))
    steps, warm = recipe.encoder_steps, 10 * recipe.steps_per_epoch
    assert (recipe.batch_size, steps) == (512, 200 * recipe.steps_per_epoch) and recipe.image_shape[0] == side
    assert (c.optimizer.kind, c.optimizer.weight_decay, c.optimizer.momentum) == ("lars", 1e-6, 0.9)
    rates = [float(recipe.schedule(s)) for s in (0, warm // 2, warm, (steps + warm) // 2, steps)]
    np.testing.assert_allclose(rates, [0, 0.3, 0.6, 0.3, 0], atol=1e-3)
    target = recipe.memory["target"]
    assert (target.decay, target.decay_schedule, target.order) == (0.99, "cosine", "after")
    params = jax.eval_shape(lambda: init_state(recipe, 0).params)
    shapes = [params["head"][k]["dense"]["kernel"].shape for k in ("hidden0", "out")]
    shapes += [params["heads"]["predictor"][k]["dense"]["kernel"].shape for k in ("hidden0", "out")]
    assert shapes == [(2048, 4096), (4096, 256), (256, 4096), (4096, 256)]
    assert "bn0" in params["head"] and "bn0" in params["heads"]["predictor"]
    one, two = c.views.view1, c.views.view2
    assert [(v.crop_area, v.jitter, v.grayscale) for v in (one, two)] == [((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.2)] * 2
    assert (one.solarize, two.solarize) == (0.0, 0.2)
    assert (one.blur, two.blur) == ((1.0, 0.1) if side > 64 else (0.0, 0.0))


def test_byol_on_a_cpu_with_and_without_labels():
    for labels in ("labelled", "unlabelled"):
        recipe = tiny.recipe(
            config("byol", labels), num_examples=10_000, image_shape=(32, 32, 3), labelled=labels == "labelled"
        )
        assert ("probe" in recipe.memory) == (labels == "labelled")
        # Each view is normalised by itself, by both encoders.
        assert [p.embeddings for p in recipe.passes] == [("view1",), ("view2",), ("target/view1",), ("target/view2",)]
