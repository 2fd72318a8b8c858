"""Forms for CPUs: the values and gradients of JAX's own operations; and which form each backend gets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax

from jaxcl.commands.plan.program_costs import cost
from jaxcl.errors import UserError
from jaxcl.models import ResNetOptions, cpu, layers, make_model
from jaxcl.models.cpu import LAYOUT, MAX_CHUNKS, MIN_ROWS, chunked_conv, loop_conv, rows_of_a_chunk
from jaxcl.models.layers import DepthwiseConv, relu

# kernel, strides, padding, side: all that a ResNet has, sides that strides do not divide, unequal padding.
CASES = [
    (3, (1, 1), ((1, 1), (1, 1)), 8),
    (3, (2, 2), ((1, 1), (1, 1)), 8),
    (3, (2, 2), ((1, 1), (1, 1)), 7),
    (7, (2, 2), ((3, 3), (3, 3)), 15),
    (1, (1, 1), ((0, 0), (0, 0)), 5),
    (4, (3, 2), ((0, 2), (1, 0)), 11),
]


@pytest.mark.parametrize("conv, batch", [(loop_conv, 2), (chunked_conv, 2), (chunked_conv, 3 * MIN_ROWS)])
def test_values_and_gradients_are_those_of_lax(conv, batch):
    inputs = [
        (tiny.normal(batch, side, side, 3, seed=i), tiny.normal(k, k, 3, 4, seed=9))
        for i, (k, _, _, side) in enumerate(CASES)
    ]

    def value_and_grads(conv, case, x, kernel):
        y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, case[1], case[2]), x, kernel)
        return y, *pull(jnp.sin(y))

    def reference(x, kernel, strides, padding):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)

    with jax.enable_x64(True):
        wide = [(x.astype(np.float64), k.astype(np.float64)) for x, k in inputs]
        run = jax.jit(
            lambda inputs: [
                [value_and_grads(f, c, *i) for c, i in zip(CASES, inputs, strict=True)] for f in (conv, reference)
            ]
        )
        ours, theirs = run(wide)
    for case, a, b in zip(CASES, ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape and x.dtype == np.float64, case
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10, err_msg=str(case))


def test_its_gradients_are_in_the_one_layout_that_is_fast():
    """Images NHWC, kernels HWIO, whatever is differentiated: XLA's CPU has no fast code for another inside a loop."""
    x, kernel = tiny.normal(2, 6, 6, 3), tiny.normal(3, 3, 3, 4)
    pads = ((1, 1), (1, 1))

    def layouts(conv):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, (2, 2), pads)))

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel).as_text()
        return [
            line.split("dim_numbers = ")[1].split(", window")[0] for line in text.splitlines() if "dim_numbers" in line
        ]

    ours = layouts(loop_conv)
    assert len(ours) == 3 and set(ours) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert len(set(layouts(lambda *a: lax.conv_general_dilated(*a, dimension_numbers=LAYOUT)))) > 1


@pytest.mark.parametrize(
    "batch, rows", [(1, 1), (MIN_ROWS - 1, MIN_ROWS - 1), (128, 16), (384, 24), (4096, 256), (40, 20), (97, 97), (0, 0)]
)
def test_a_batch_falls_into_equal_chunks_or_is_one(batch, rows):
    assert rows_of_a_chunk(batch) == rows
    assert not rows or (batch % rows == 0 and batch // rows <= MAX_CHUNKS)


def test_a_gradient_in_chunks_can_be_differentiated_and_vmapped():
    x, kernel = (a.astype(np.float64) for a in (tiny.normal(2 * MIN_ROWS, 5, 5, 2), tiny.normal(3, 3, 2, 3)))

    def reference(x, kernel, strides, padding):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)

    def slope(conv, x, kernel):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, (2, 2), ((1, 1), (1, 1)))))

        return jnp.sum(jnp.cos(jax.grad(loss, argnums=1)(x, kernel)))

    def both(conv):
        kernels = jnp.stack([kernel, 2 * kernel])
        return jax.vmap(jax.grad(lambda k, x: slope(conv, x, k), argnums=(0, 1)), (0, None))(kernels, x)

    with jax.enable_x64(True):
        for ours, theirs in zip(*jax.jit(lambda: (both(chunked_conv), both(reference)))(), strict=True):
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_chunks_need_no_more_products_than_the_whole():
    """Counted before compiling: a convolution that is only there to be transposed would be in it twice."""
    x, kernel = tiny.normal(4 * MIN_ROWS, 6, 6, 2), tiny.normal(3, 3, 2, 5)

    def flops(conv):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), ((1, 1), (1, 1)))))

        return cost(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel)).flops

    assert flops(chunked_conv) == flops(lambda *a: lax.conv_general_dilated(*a, dimension_numbers=LAYOUT)) > 0


@pytest.mark.parametrize("conv", [loop_conv, chunked_conv])
@pytest.mark.parametrize("options", [dict(rhs_dilation=(2, 2)), dict(lhs_dilation=(1, 2)), dict(feature_group_count=3)])
def test_what_it_does_not_know_is_refused(conv, options):
    with pytest.raises(UserError, match="no dilation and no groups"):
        conv(tiny.normal(1, 4, 4, 3), tiny.normal(3, 3, 3, 3), (1, 1), ((1, 1), (1, 1)), **options)


@pytest.mark.parametrize("name, conv", [("for_loops", loop_conv), ("for_one_device", chunked_conv)])
def test_a_changed_model_is_the_same_function_of_the_same_parameters(name, conv):
    model = make_model(ResNetOptions(stage_sizes=(1, 1), stage_widths=(8, 16), head_features=12))
    params, stats = tiny.model_variables(model, side=8)
    changed = getattr(model, name)()
    assert changed.encoder.convolution is conv and model.encoder.convolution is None

    def loss(m, params):
        return jnp.sum(m.encode(params, stats, tiny.normal(32, 8, 8, 3), train=True)[0] ** 2)

    a, b = jax.jit(lambda p: [jax.grad(loss, argnums=1)(m, p) for m in (changed, model)])(params)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * max(1e-2, float(np.abs(y).max())))


# ---- the rectifier


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_jax(dtype):
    """At zeros of both signs, infinities and subnormal numbers too."""
    odd = [0.0, -0.0, jnp.inf, -jnp.inf, 1e-40, -1e-40, 1e30, -1e30]
    x = jnp.concatenate([jnp.array(odd), jax.random.normal(jax.random.key(0), (1000,))]).astype(dtype)
    g = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    for f in (lambda f: jax.vjp(f, x), lambda f: jax.vjp(jax.jit(f), x)):
        (y, back), (expected, back_expected) = f(relu), f(jax.nn.relu)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y.astype("float32"), expected.astype("float32"))
        np.testing.assert_array_equal(back(g)[0].astype("float32"), back_expected(g)[0].astype("float32"))


def test_a_nan_is_not_hidden():
    assert jnp.isnan(jax.jit(relu)(jnp.array([jnp.nan, -1.0]))).tolist() == [True, False]


# ---- the choice


@pytest.mark.parametrize("stride, side", [(1, 5), (2, 5), (2, 6)])
def test_depthwise_convolution(stride, side, monkeypatch):
    """The sum of products on a CPU, the grouped convolution elsewhere, and a loop: values and gradients."""
    x, kernel = tiny.normal(2, side, side, 3), tiny.normal(3, 3, 1, 3, seed=1)
    module = DepthwiseConv(stride)

    def value(x, kernel):
        y = module.apply({"params": {"kernel": kernel}}, x)
        return (y**2).sum(), y

    grad = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    (_, here), here_grads = jax.jit(grad)(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (_, there), there_grads = jax.jit(grad)(x, kernel)
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5)
    for a, b in zip(here_grads, there_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    padded, out = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros(here.shape)
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
            out[:, i, j] = (window * kernel[:, :, 0]).sum((1, 2))
    np.testing.assert_allclose(here, out, rtol=1e-5, atol=1e-5)


DEPTHWISE = [
    # kernel, stride, padding, height and width
    (3, 1, ((1, 1), (1, 1)), (5, 6)),
    (5, 2, ((1, 2), (2, 2)), (8, 7)),
    (3, 2, ((0, 1), (1, 1)), (8, 7)),
    (7, 1, ((3, 3), (3, 3)), (4, 9)),
    (2, 3, ((0, 1), (0, 0)), (7, 8)),
    (5, 3, ((2, 2), (0, 0)), (6, 12)),
]


def test_depthwise_of_large_maps():
    """Values and gradients of the grouped convolution, for any kernel, stride and padding; in float64."""
    inputs = [
        (tiny.normal(2, *side, 3, seed=i), tiny.normal(k, k, 1, 3)) for i, (k, _, _, side) in enumerate(DEPTHWISE)
    ]

    def value_and_grads(conv, case, x, kernel):
        y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, case[1], case[2]), x, kernel)
        return y, *pull(jnp.sin(y))

    def reference(x, kernel, stride, padding):
        options = dict(dimension_numbers=LAYOUT, feature_group_count=x.shape[-1])
        return lax.conv_general_dilated(x, kernel, (stride, stride), padding, **options)

    with jax.enable_x64(True):
        wide = [(x.astype(np.float64), k.astype(np.float64)) for x, k in inputs]
        ours, theirs = jax.jit(
            lambda wide: [
                [value_and_grads(f, c, *i) for c, i in zip(DEPTHWISE, wide, strict=True)]
                for f in (cpu.depthwise_rows, reference)
            ]
        )(wide)
    for case, a, b in zip(DEPTHWISE, ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape and x.dtype == np.float64, case
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10, err_msg=str(case))


@pytest.mark.parametrize("backend, form", [("cpu", "cpu"), ("gpu", "usual"), ("tpu", "usual")])
def test_the_form_is_chosen_by_backend(backend, form, monkeypatch):
    chosen = cpu.choose(lambda: "cpu", elsewhere=lambda: "usual")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert chosen() == form
    model = make_model(ResNetOptions(stage_sizes=(1,), stage_widths=(4,)))
    assert (model.for_loops() is model) == (model.for_one_device() is model) == (form == "usual")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 3, 4)])
def test_matmul_in_either_form(shape, monkeypatch):
    x, kernel, g = tiny.normal(*shape), tiny.normal(4, 5, seed=1), tiny.normal(*shape[:-1], 5, seed=2)

    def value_and_grads():
        y, pull = jax.vjp(layers.matmul, x, kernel)
        return y, *pull(g)

    here = value_and_grads()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chex.assert_trees_all_close(here, value_and_grads(), rtol=1e-5, atol=1e-5)
