"""eval.size: images are evaluated at another side than that of the views."""

import numpy as np
import pytest
import tiny
from evaluations import encoded, evaluation

from jaxcl import augment
from jaxcl import config as configs
from jaxcl.errors import UserError
from jaxcl.evaluate.context import EvalContext


def test_features_are_of_that_size():
    e, state, mesh = evaluation(final=("knn",), size=2 * tiny.SIDE)
    resize = augment.Resize(size=2 * tiny.SIDE)

    def enlarged(images):
        return np.asarray(resize(None, images.astype(np.float32))[0])

    features = EvalContext(e, state, mesh, "test").features("test", "h")
    np.testing.assert_allclose(features, encoded(e, state, "test", enlarged)[0], rtol=1e-4, atol=1e-5)
    assert e.recipe.image_shape[0] == tiny.SIDE and e.recipe.eval_size == 2 * tiny.SIDE


def test_an_encoder_for_one_size_refuses_others():
    c = tiny.config(stage=False)
    c.eval.size = 2 * tiny.SIDE
    configs.with_kind(c, "model", "vit")
    c.model.update(width=8, heads=2, depth=1, mlp_width=8, patch=4)
    with pytest.raises(UserError, match="eval.size"):
        tiny.recipe(c)
