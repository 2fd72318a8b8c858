"""SupCon on 1, 2 and 8 devices: the same value and the same gradients as the written-out loop and one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from supcon_checks import make, slow_supcon, value_and_grad

from jaxcl.losses import supcon


def sharded_value_and_grad(devices, arrays, *, inside=False, **options):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    names = sorted(set(arrays) - {"features", "negatives"})

    def local(features, negatives, *rest):
        rest = dict(zip(names, rest, strict=True))
        return supcon(features, negatives=negatives, axis_name="data", **rest, **options)

    body = jax.value_and_grad(local, argnums=(0, 1)) if inside else local
    sharded = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=(P(), (P("data"), P("data"))) if inside else P(),
    )
    call = sharded if inside else jax.value_and_grad(sharded, argnums=(0, 1))
    value, grads = jax.jit(call)(
        jnp.asarray(arrays["features"]), jnp.asarray(arrays["negatives"]), *(arrays[k] for k in names)
    )
    return value, grads


@pytest.mark.parametrize(
    "positives,implementation,counts",
    [
        ("labels", "dense", (2,)),
        ("labels", "tiled", (8,)),
        ("labels", "ring", (1, 2, 8)),
        ("mask", "dense", (8,)),
        ("mask", "tiled", (2,)),
        ("simclr", "ring", (8,)),
    ],
)
def test_same_on_1_2_and_8_devices(wide, positives, implementation, counts):
    data = make(n=16, m=8)
    for name in {"labels", "mask"} - {positives}:
        del data[name]
    options = dict(negatives_count=2, anchor_mean="positive")
    want = slow_supcon(**data, **options)
    rest = {k: v for k, v in data.items() if k not in ("features", "negatives")}
    loss = lambda f, n: supcon(f, negatives=n, **rest, **options)  # noqa: E731
    want_grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(data["features"], data["negatives"])
    for devices in counts:
        value, grads = sharded_value_and_grad(devices, data, implementation=implementation, **options)
        np.testing.assert_allclose(value, want, rtol=1e-10)
        for got, expected in zip(grads, want_grads, strict=True):
            assert np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(got, expected, atol=1e-13)


def test_ring_of_first_views_only(wide):
    """Rows and columns differ: the first views among themselves, then against the others."""
    data = make(n=16, m=8, v=3)
    del data["mask"]
    options = dict(anchors="first", base_temperature=0.07)
    value, grads = sharded_value_and_grad(8, data, implementation="ring", **options)
    np.testing.assert_allclose(value, slow_supcon(**data, **options), rtol=1e-10)
    rest = {k: v for k, v in data.items() if k not in ("features", "negatives")}
    loss = lambda f, n: supcon(f, negatives=n, implementation="dense", **rest, **options)  # noqa: E731
    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(data["features"], data["negatives"])
    for got, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-13)


def test_gradient_inside_shard_map_is_that_of_the_global_loss(wide):
    data = make(n=16, m=8)
    del data["mask"]
    outside = sharded_value_and_grad(8, data)
    inside = sharded_value_and_grad(8, data, inside=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), inside, outside)


def test_two_mesh_axes(wide):
    data = make(n=16)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    loss = jax.shard_map(lambda f: supcon(f, axis_name=("a", "b")), mesh=mesh, in_specs=P(("a", "b")), out_specs=P())
    got = jax.jit(jax.value_and_grad(loss))(jnp.asarray(data["features"]))
    want = value_and_grad(data["features"])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-13)


def test_jit_of_a_sharded_batch_without_axis_name(wide):
    data = make(n=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    features = jax.device_put(data["features"], jax.NamedSharding(mesh, P("data")))
    for how in ("dense", "tiled"):
        loss = functools.partial(supcon, labels=data["labels"], implementation=how)
        got, want = (
            jax.jit(jax.value_and_grad(loss))(features),
            value_and_grad(data["features"], data["labels"]),
        )
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
        np.testing.assert_allclose(got[1], want[1], atol=1e-13)
