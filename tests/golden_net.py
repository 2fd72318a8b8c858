"""The tiny network whose weights lie in the golden files.

conv, ReLU, conv, ReLU, conv [the explained layer] | batch norm, ReLU, global average pool, dense.
"""

import jax
import jax.numpy as jnp
from jax import lax


def head(d, images):
    """Images [N, S, S, 3] -> raw output of the third convolution [N, h, w, 5]."""

    def conv(i, x, kernel, bias=None):
        stride, pad = (int(v) for v in d["conv_stride_pad"][i])
        x = lax.conv_general_dilated(
            x,
            jnp.asarray(d[kernel], x.dtype),
            (stride, stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return x if bias is None else x + jnp.asarray(d[bias], x.dtype)

    x = jax.nn.relu(conv(0, images, "conv1_kernel", "conv1_bias"))
    x = jax.nn.relu(conv(1, x, "mid_kernel", "mid_bias"))
    return conv(2, x, "cam_kernel")


def tail(d, activations, *, train=False):
    """Explained layer's output -> logits; `train` uses the batch's own statistics."""
    a = activations
    weight = {k: jnp.asarray(v, a.dtype) for k, v in d.items() if k.startswith(("bn_", "fc_")) and v.ndim}
    mean = a.mean((0, 1, 2)) if train else weight["bn_mean"]
    var = a.var((0, 1, 2)) if train else weight["bn_var"]
    a = (a - mean) / jnp.sqrt(var + float(d["bn_eps"])) * weight["bn_scale"] + weight["bn_bias"]
    pooled = jax.nn.relu(a).mean((1, 2))
    return jnp.matmul(pooled, weight["fc_kernel"], precision=lax.Precision.HIGHEST) + weight["fc_bias"]


def logits(d, images, *, train=False):
    return tail(d, head(d, images), train=train)
