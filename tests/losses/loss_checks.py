"""Helpers that the tests of several losses share: values with gradients, fake devices, and user errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcl.errors import UserError

# All implementations must give the same number; without a mesh axis there are two.
ENGINES = ("dense", "tiled")
# (implementation, numbers of devices); "ring" needs a mesh axis.
SHARDED_ENGINES = (("dense", (2,)), ("tiled", (2, 8)), ("ring", (1, 2, 8)))


def mesh_of(devices):
    """A mesh with one axis, "data", over the first fake devices."""
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@functools.partial(jax.jit, static_argnames=("loss", "static"))
def compiled_value_and_grads(loss, arrays, options, static):
    return jax.value_and_grad(lambda a: loss(*a, **options, **dict(static)))(arrays)


def value_and_grads(loss, *arrays, **options):
    """Value and gradients with respect to all arrays. Equal shapes and equal string options share one program."""
    static = {k: options.pop(k) for k in list(options) if isinstance(options[k], str)}
    return compiled_value_and_grads(loss, tuple(map(jnp.asarray, arrays)), options, tuple(sorted(static.items())))


def on_devices(devices, loss, arrays, *, inside=False, in_specs=None):
    """Value and gradients of loss(*arrays) with the rows split over fake devices.

    inside: differentiates inside the shard_map instead of outside.
    """
    argnums = tuple(range(len(arrays)))
    in_specs = in_specs or (P("data"),) * len(arrays)
    sharded = jax.shard_map(
        jax.value_and_grad(loss, argnums) if inside else loss,
        mesh=mesh_of(devices),
        in_specs=in_specs,
        out_specs=(P(), in_specs) if inside else P(),
    )
    call = sharded if inside else jax.value_and_grad(sharded, argnums)
    return jax.jit(call)(*map(jnp.asarray, arrays))


def assert_close(got, want, rtol):
    """Compares with a tolerance relative to the largest entry of `want`."""
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def assert_user_error(call, *words):
    """`call` raises a UserError of one line that holds all words: the loss, the argument, the suggestion."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    for word in words:
        assert word in message, (word, message)
