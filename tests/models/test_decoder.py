"""The decoder: the authors' ResNet-18 mirrored in float64, its narrow variants, and sizes that do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl.errors import UserError
from jaxcl.models.decoder import Decoder, DecoderBlock

NARROW = dict(widths=(8, 4, 4), blocks=1)  # doubles once


def variables_of(decoder, features=6, seed=0):
    return tiny.fill(jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros((1, features)))), seed)


# ---- against the authors' code


def value_by_rule(k, name, shape):
    """golden/thanos/README.md, section 3: the weights of the golden decoder."""
    size = int(np.prod(shape))
    x = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64((k + 1) * 0xBF58476D1CE4E5B9 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    u = 2 * ((x >> np.uint64(11)).astype(np.float64) / 2**53) - 1
    if len(shape) > 1:
        return (u * np.sqrt(6 / (size / shape[0]))).reshape(shape)
    return 1 + 0.1 * u if name.endswith("weight") else 0.1 * u


def ours(torch):
    """Torch's names and layouts -> our parameters, and running statistics of mean 0 and variance 1."""
    first = len(torch["decoder.linear.bias"]) // 16
    kernel = torch["decoder.linear.weight"].T  # [D, M 4 4]: channels first
    params = {
        "dense": {
            "dense": {
                "kernel": kernel.reshape(-1, first, 4, 4).transpose(0, 2, 3, 1).reshape(len(kernel), -1),
                "bias": torch["decoder.linear.bias"].reshape(first, 4, 4).transpose(1, 2, 0).ravel(),
            }
        },
        "out_conv": {"kernel": torch["decoder.conv1.weight"].transpose(2, 3, 1, 0)},
    }
    parts = {"conv1": "conv1", "conv2": "conv2", "conv2.1": "conv2", "bn1": "bn1", "bn2": "bn2"}
    parts |= {"upsample.0.1": "shortcut_conv", "upsample.1": "shortcut_bn"}
    for name, value in torch.items():
        _, layer, *rest, kind = name.split(".")
        if not layer.startswith("layer"):
            continue
        part = parts[".".join(rest[1:])]
        block = params.setdefault(f"stage{layer[5:]}_block{int(rest[0]) + 1}", {})
        if value.ndim > 1:
            block[part] = {"kernel": value.transpose(2, 3, 1, 0)}
        else:
            block.setdefault(part, {})["scale" if kind == "weight" else "bias"] = value
    stats = {
        b: {n: {"mean": 0 * p["bias"], "var": 0 * p["bias"] + 1} for n, p in parts.items() if "bias" in p}
        for b, parts in params.items()
        if b.startswith("stage")
    }
    return {"params": params, "batch_stats": stats}


def test_golden_decoder(golden):
    """Images, error and its gradient to the latent, by running statistics and by those of the batch."""
    d = golden("thanos", "decoder_resnet18")
    torch = {}
    for k, (name, shape) in enumerate(zip(d["param_names"], d["param_shapes"], strict=True)):
        torch[str(name)] = value = value_by_rule(k, str(name), tuple(int(n) for n in str(shape)[1:-1].split(",")))
        np.testing.assert_allclose([value.flat[0], value.flat[-1], value.sum()], d["param_probe"][k], rtol=1e-9)
    target = d["target"].transpose(0, 2, 3, 1)

    with jax.enable_x64(True):
        decoder = Decoder(size=int(d["input_height"]), dtype=jnp.float64)
        variables = ours(torch)
        made = jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros(d["latent"].shape)))
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, made)

        @jax.jit
        def both(variables, latent):
            def error(latent, train):
                out = decoder.apply(variables, latent, train, mutable=["batch_stats"] if train else False)
                image = out[0] if train else out
                return ((image - target) ** 2).mean(), image

            return {
                name: jax.value_and_grad(error, has_aux=True)(latent, name == "train") for name in ("eval", "train")
            }

        out = jax.device_get(both(variables, d["latent"]))
    for name, ((mse, image), grad) in out.items():
        want = d[f"recon_{name}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(image, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())
        np.testing.assert_allclose(mse, d[f"mse_{name}"], rtol=1e-9)
        want = d[f"grad_latent_{name}"]
        np.testing.assert_allclose(grad, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())


def test_published_parameter_count():
    variables = jax.eval_shape(lambda: Decoder(size=32).init(jax.random.key(0), jnp.zeros((1, 256))))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 8_625_600


# ---- sizes


@pytest.mark.parametrize(
    "size, channels, options, grid",
    [
        (32, 3, {}, 4),
        (64, 3, {}, 8),
        (28, 1, {}, 3),
        (8, 3, {}, 1),
        (16, 3, NARROW, 8),
        (9, 2, NARROW, 4),
        (7, 3, dict(widths=(4, 4)), 7),
        (32, 3, dict(widths=(6, 4, 4), patch=4), 4),
        (14, 1, dict(widths=(4, 4), patch=3), 4),
    ],
)
def test_sizes(size, channels, options, grid):
    decoder = Decoder(size=size, channels=channels, **options)
    assert decoder.size // decoder.growth == grid
    out, _ = jax.eval_shape(lambda: decoder.init_with_output(jax.random.key(0), jnp.zeros((2, 5))))
    assert out.shape == (2, size, size, channels) and out.dtype == jnp.float32


def test_a_single_channel_is_a_mean_resized():
    """MNIST's way, at 9 pixels: 4, doubled to 8, and then between pixels."""
    latent = tiny.normal(2, 6)
    gray, colour = (Decoder(size=s, channels=c, **NARROW) for s, c in ((9, 1), (8, 3)))
    variables = variables_of(colour)
    got, small = jax.jit(lambda v: (gray.apply(v, latent), colour.apply(v, latent)))(variables)
    # Pixel i of 9 lies at (i + 1/2) 8/9 - 1/2 of 8, no further out than the border.
    at = np.clip((np.arange(9) + 0.5) * 8 / 9 - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    weight = np.zeros((9, 8))
    weight[np.arange(9), low], weight[np.arange(9), low + 1] = 1 - (at - low), at - low
    want = np.einsum("iy,jx,nyx->nij", weight, weight, np.asarray(small).mean(-1))[..., None]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_first_map_is_resized_as_in_torch():
    """3 rows of 4 are rows 0, 1, 2 (floor), not 0, 2, 3; 8 of 4 are each twice."""
    latent, convolved = tiny.normal(2, 6), dict(widths=(3, 3), blocks=1)
    decoders = {side: Decoder(size=side, **convolved) for side in (3, 8)}
    variables = variables_of(decoders[3])
    dense = variables["params"]["dense"]["dense"]
    start = (latent @ dense["kernel"] + dense["bias"]).reshape(2, 4, 4, 3)

    @jax.jit
    def seen(variables):
        out = {}
        for side, decoder in decoders.items():
            _, made = decoder.apply(variables, latent, capture_intermediates=True, mutable=["intermediates"])
            out[side] = made["intermediates"]["stage1_block1"]["conv1"]["__call__"][0]
        return out

    kernel = variables["params"]["stage1_block1"]["conv1"]["kernel"]
    rows = {3: [0, 1, 2], 8: [0, 0, 1, 1, 2, 2, 3, 3]}
    for side, got in seen(variables).items():
        x = np.pad(start[:, rows[side]][:, :, rows[side]], ((0, 0), (1, 1), (1, 1), (0, 0)))
        want = sum(x[:, i : i + side, j : j + side] @ kernel[i, j] for i in range(3) for j in range(3))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_shortcut_before_or_after_the_upsampling():
    """The cheaper order gives the values, the batch statistics and the gradients of the original one."""
    block = DecoderBlock(planes=5, factor=2)
    x, mode = tiny.normal(3, 4, 4, 3), dict(use_running_average=False, where=None)
    variables = tiny.fill(jax.eval_shape(lambda: block.init(jax.random.key(0), x, mode)))
    bn = variables["params"]["shortcut_bn"]

    def original(x):
        y = x.repeat(2, 1).repeat(2, 2) @ variables["params"]["shortcut_conv"]["kernel"][0, 0]
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        return (y - mean) / jnp.sqrt(var + 1e-5) * bn["scale"] + bn["bias"], 0.1 * mean, 0.1 * var

    def of_block(x):
        out, made = block.apply(
            variables, x, mode, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
        )
        old, new = variables["batch_stats"]["shortcut_bn"], made["batch_stats"]["shortcut_bn"]
        y = made["intermediates"]["shortcut_bn"]["__call__"][0].repeat(2, 1).repeat(2, 2)
        branch = made["intermediates"]["bn2"]["__call__"][0]
        return out - jax.nn.relu(branch + y), y, *(new[k] - 0.9 * old[k] for k in ("mean", "var"))

    @jax.jit
    def both(x):
        direction = jnp.cos(jnp.arange(3 * 8 * 8 * 5, dtype=jnp.float32)).reshape(3, 8, 8, 5)
        slopes = [jax.grad(lambda x, f=f: (f(x)[-3] * direction).sum())(x) for f in (of_block, original)]
        return of_block(x), original(x), slopes

    (rest, *got), want, slopes = both(x)
    np.testing.assert_allclose(rest, 0, atol=1e-5)
    for a, b in (*zip(got, want, strict=True), slopes):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


# ---- rows that do not exist, loops, dtypes


def test_padded_rows_change_nothing():
    decoder = Decoder(size=8, **NARROW)
    variables, latent = variables_of(decoder), tiny.normal(6, 6)
    where = np.array([True, False, True, True, False, True])
    other = np.where(where[:, None], latent, 50 * tiny.normal(6, 6, seed=3))

    @jax.jit
    def run(latent, where):
        return decoder.apply(variables, latent, train=True, where=where, mutable=["batch_stats"])

    (a, a_stats), (b, b_stats), (c, _) = run(latent, where), run(other, where), run(other, ~(where & False))
    np.testing.assert_allclose(a[where], b[where], rtol=1e-4, atol=1e-4)
    for x, y in zip(jax.tree.leaves(a_stats), jax.tree.leaves(b_stats), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert np.abs(a - c)[where].max() > 0.1  # without the mask they would
    # And as if they had not been there (cases F).
    alone, alone_stats = run(latent[where], None)
    np.testing.assert_allclose(a[where], alone, rtol=1e-4, atol=1e-4)
    for x, y in zip(jax.tree.leaves(a_stats), jax.tree.leaves(alone_stats), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_half_precision_hands_out_float32():
    latent, outs = tiny.normal(4, 6), {}
    variables = variables_of(Decoder(size=8, **NARROW))
    for dtype in ("float32", "bfloat16"):
        decoder = Decoder(size=8, **NARROW, dtype=jnp.dtype(dtype))

        def error(variables, decoder=decoder):
            out, _ = decoder.apply(variables, latent, train=True, mutable=["batch_stats"])
            return (out**2).mean(), out

        (_, out), grads = jax.jit(jax.value_and_grad(error, has_aux=True))(variables)
        outs[dtype] = jax.device_get((out, grads["params"]))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(outs))
    assert 0 < np.abs(outs["float32"][0] - outs["bfloat16"][0]).max() < 0.3


def test_patches_are_laid_out_as_a_patch_stem_reads_them():
    """Cutting the images into squares, in (row, column, channel) order, gives back what the last layer said of each."""
    decoder = Decoder(size=8, widths=(4, 3), blocks=1, patch=2)
    variables, latent = variables_of(decoder), tiny.normal(3, 6)
    images, made = decoder.apply(variables, latent, capture_intermediates=True, mutable=["intermediates"])
    said = made["intermediates"]["out_patch"]["__call__"][0]
    assert said.shape == (3, 4, 4, 12)
    for row in range(4):
        for column in range(4):
            square = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(square.reshape(3, 12), said[:, row, column])


# ---- mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(size=7), "4 stages make images of at least 8 pixels, but these have 7; give fewer widths"),
        (dict(size=0, widths=(4, 4)), "at least 1 pixels"),
        (dict(size=7, widths=(4, 4), patch=8), "1 stages of patches of 8 make images of at least 8 pixels"),
        (dict(size=32, patch=0), "decoder: patch is 0; expected at least 1"),
        (dict(size=32, widths=(64,)), "decoder: widths is (64,); expected the channels before, between and after"),
        (dict(size=32, widths=(64, 0)), "decoder: widths is (64, 0)"),
        (dict(size=32, blocks=0), "decoder: blocks is 0; expected at least 1"),
        (dict(size=32, channels=0), "decoder: channels is 0; expected at least 1"),
    ],
)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(UserError) as error:
        Decoder(**options)
    assert words in str(error.value) and "\n" not in str(error.value)
