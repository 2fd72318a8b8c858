"""L_spread on 1, 2 and 8 devices: the values and the gradients of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from spread_checks import VARIANTS, make, stacked, values_and_grads

# One gradient of a mixture of total, A and R instead of three gradients: an error in any of them shows.
MIXTURE = np.array([0.3, 1.0, -0.7])


def sharded_values_and_grad(axes, views, arrays, *, inside=False, **options):
    """Values [3] and the gradient of their mixture, with the samples split over the devices of `axes`."""
    shape, kinds = tuple(axes.values()), (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(shape, tuple(axes), axis_types=kinds, devices=jax.devices()[: np.prod(shape)])
    names = tuple(axes) if len(axes) > 1 else next(iter(axes))
    keys = sorted(arrays)

    def mixed(views, *rest):
        values = stacked(views, **dict(zip(keys, rest, strict=True)), axis_name=names, **options)
        return MIXTURE @ values, values

    body = jax.value_and_grad(mixed, has_aux=True) if inside else mixed
    sharded = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(None, names), *(P(names) for _ in keys)),
        out_specs=((P(), P()), P(None, names)) if inside else (P(), P()),
    )
    call = sharded if inside else jax.value_and_grad(sharded, has_aux=True)
    (_, values), grad = jax.jit(call)(jnp.asarray(views), *(arrays[k] for k in keys))
    return values, grad


def check_on_devices(axes, variant, names, implementation, inside=False):
    data = make(b=16)
    views, arrays = data["views"], {k: data[k] for k in names}
    want, want_grads = values_and_grads(views, **arrays, **variant, implementation="dense")
    got, grad = sharded_values_and_grad(axes, views, arrays, implementation=implementation, inside=inside, **variant)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert np.abs(want_grads[1]).max() > 1e-3
    np.testing.assert_allclose(grad, np.tensordot(MIXTURE, want_grads, 1), atol=1e-13)


@pytest.mark.parametrize("implementation", ["dense", "tiled", "ring"])
@pytest.mark.parametrize(
    "devices,variant,names",
    [
        (1, VARIANTS[0], ()),
        (2, VARIANTS[1], ("labels", "where")),
        (8, VARIANTS[1], ("labels", "where")),
        (8, VARIANTS[2], ("labels", "where")),
    ],
    ids=str,
)
def test_same_on_1_2_and_8_devices(wide, devices, variant, names, implementation):
    check_on_devices({"data": devices}, variant, names, implementation)


@pytest.mark.parametrize("implementation", ["dense", "ring"])
def test_gradient_inside_shard_map_is_that_of_the_global_loss(wide, implementation):
    check_on_devices({"data": 8}, VARIANTS[0], ("labels",), implementation, inside=True)


@pytest.mark.parametrize("implementation", ["ring"])
def test_two_mesh_axes(wide, implementation):
    check_on_devices({"a": 2, "b": 4}, VARIANTS[0], ("labels", "where"), implementation)
