"""Units of images: bytes to floats and back from normalised values, and the floats that are refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample_images import photo, unit

from jaxcl.augment import denormalize, normalize, to_float
from jaxcl.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Conversions(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_bytes_and_floats_are_the_same_image(self):
        images, convert = photo(2), self.variant(to_float)
        for given in (images, unit(images), images.astype(np.float16) / 255, images.astype(np.float64) / 255):
            got = convert(given)
            chex.assert_shape(got, images.shape)
            chex.assert_type(got, jnp.float32)
            chex.assert_trees_all_close(got, unit(images), atol=1e-3 if given.dtype == np.float16 else 1e-6)
        chex.assert_trees_all_equal(convert(images), unit(images))

    @chex.variants(with_jit=True, without_jit=True)
    def test_normalize_and_back(self):
        images = unit(photo(2))
        normal = self.variant(lambda x: normalize(x, MEAN, STD))(images)
        chex.assert_trees_all_close(normal, np.float32((np.asarray(images, np.float64) - MEAN) / STD), atol=1e-6)
        back = self.variant(lambda x: denormalize(x, MEAN, STD))(normal)
        chex.assert_trees_all_close(back, images, atol=1e-6)


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    "values, text",
    [([0.0, 255.0], "255"), ([-1.0, 1.0], "-1"), (np.array([0, 1], np.int32), "int32"), ([True, False], "bool")],
)
def test_other_values_are_refused(wrap, values, text):
    with pytest.raises(UserError) as caught:
        to_float(wrap(values))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_values_under_jit_are_not_checked_and_rounding_is_forgiven():
    np.testing.assert_array_equal(jax.jit(to_float)(np.float32([0, 255])), [0, 255])
    np.testing.assert_allclose(to_float(np.float32([-0.005, 1.005])), [-0.005, 1.005])
    assert to_float(np.zeros((0, 4, 4, 3), np.float32)).shape == (0, 4, 4, 3)
