"""MoCo's presets: the authors' settings, and parts that fit together."""

import jax
import numpy as np
import pytest
import tiny
from test_configs import config

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
