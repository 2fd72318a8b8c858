"""The forms for CPUs give what the forms for all devices give, and move no image to another device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.augment import cpu, ops


@pytest.mark.parametrize(
    ("height", "width", "size", "antialias"), [(64, 70, 64, True), (100, 96, 64, True), (96, 80, 20, False)]
)
def test_gathered_crops_equal_those_by_matmuls(monkeypatch, height, width, size, antialias):
    """Boxes: the whole image, one pixel in a corner, one of fractional pixels, and drawn ones."""
    images = jax.random.uniform(jax.random.key(0), (6, height, width, 3))
    drawn = ops.draw_resized_crop(jax.random.split(jax.random.key(1), 3), height, width)
    odd = jnp.array([[0, 0, height, width], [height - 1, width - 1, 1, 1], [3.25, 7.5, 20.5, 31.75]])
    boxes, flipped = jnp.concatenate([odd, drawn]), jnp.arange(6) % 2 == 0

    def both(images):
        return ops.flip(ops.resized_crop(images, boxes, size, antialias=antialias), flipped)

    def run():
        step = jax.jit(lambda x: (both(x), jax.grad(lambda x: jnp.sum(both(x) ** 2))(x)))
        return "gather" in step.lower(images).as_text(), *step(images)

    gathers, *gathered = run()
    monkeypatch.setattr(cpu, "GATHER_SIDE", 10**6)
    no_longer, *dense = run()
    assert gathers and not no_longer
    for one, other in zip(gathered, dense, strict=True):  # centres of filters are rounded to 1e-5 of a pixel
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_gathering_does_not_communicate():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    n = 2 * len(jax.devices())
    images = jax.device_put(jax.random.uniform(jax.random.key(0), (n, 64, 64, 3)), rows)
    boxes = jax.device_put(ops.draw_resized_crop(jax.random.split(jax.random.key(1), n), 64, 64), rows)
    step = jax.jit(lambda x, b: ops.flip(ops.resized_crop(x, b, 64), b[:, 0] > 3), out_shardings=rows)
    text = step.lower(images, boxes).compile().as_text()
    assert "all-gather" not in text and "all-reduce" not in text and "collective" not in text
    one_device = jax.jit(lambda x, b: ops.flip(ops.resized_crop(x, b, 64), b[:, 0] > 3))
    np.testing.assert_allclose(step(images, boxes), one_device(*map(np.asarray, (images, boxes))), atol=1e-6)
