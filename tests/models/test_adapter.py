"""Stage adapters: the published sizes, and one against a slow form written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from model_options import refused

from jaxcl.errors import UserError
from jaxcl.models import ResNetOptions, make_model

SMALL = dict(stem="cifar", stage_sizes=(1, 1, 1), stage_widths=(4, 6, 8), head_features=5, branches=(1, 2))


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "depth, adapters", [(50, (1_347_712, 1_409_280, 1_655_296)), (18, (545_920, 570_624, 669_184))]
)
def test_published_parameter_counts(depth, adapters):
    head = dict(head_hidden_layers=2, head_hidden=2048, head_features=2048, head_norm="batch", head_out_norm="batch")
    model = make_model(
        ResNetOptions(
            depth=depth, stem="imagenet", branches=(1, 2, 3), branch_embeds=(2, 3), head_embeds=("jitter",), **head
        )
    )
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), (224, 224, 3)))
    branches = params["branches"]
    assert [count(branches[f"stage{i}"]["adapter"]) for i in (1, 2, 3)] == list(adapters)
    plain = make_model(ResNetOptions(depth=depth, stem="imagenet", **head))
    same, _ = jax.eval_shape(lambda: plain.init(jax.random.key(0), (224, 224, 3)))
    assert jax.tree.map(jnp.shape, same["encoder"]) == jax.tree.map(jnp.shape, params["encoder"])
    if depth == 50:
        # The authors' heads have biases before their batch norms, which do nothing: two of 2048, and 512 of f_aug.
        assert count(branches["stage1"]["head"]) == 12_599_296 - 2 * 2048
        conditioned = 13_647_872 + 3_584 - 2 * 2048 - 512
        assert [count(p) for p in (branches["stage2"]["head"], branches["stage3"]["head"], params["head"])] == 3 * [
            conditioned
        ]
    assert set(stats["branches"]["stage2"]["head"]) == {"bn0", "bn1", "out_bn", "embed_jitter_bn"}


def norm(x, p):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def depthwise(x, kernel, stride):
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip
    return np.asarray(y)


def sep_conv(x, p, stride):
    for i, s in ((1, stride), (2, 1)):
        x = depthwise(x, p[f"depthwise{i}"]["kernel"], s) @ p[f"pointwise{i}"]["kernel"][0, 0]
        x = np.maximum(norm(x, p[f"bn{i}"]), 0)
    return x


def test_an_adapter_written_out():
    model = make_model(ResNetOptions(**SMALL))
    params, stats = tiny.model_variables(model, side=6)
    images = tiny.normal(4, 6, 6, 3)
    h, new = model.encode(params, stats, images, train=True, depth=1)
    _, plain = model.encode(params, stats, images, train=True)
    own = params["branches"]["stage1"]["adapter"]
    maps, _ = model._apply(
        params, stats, images, train=True, where=None, norm_set="", depth=1, method="maps"
    )  # [4,6,6,4], of a tested network
    x = np.maximum(norm(np.asarray(maps[-1]) @ own["squeeze"]["kernel"][0, 0], own["squeeze_bn"]), 0)
    gate = sep_conv(x, own["gate"], 2)  # 3 x 3
    up = np.zeros_like(x)  # half-pixel centres, to twice the size: weights of 3/4 and 1/4, the border's repeated
    edge = np.pad(gate, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    for i in range(6):
        for j in range(6):
            a, b = i // 2 + 1, j // 2 + 1
            da, db = (1, 1) if i % 2 and j % 2 else (1, -1) if i % 2 else (-1, 1) if j % 2 else (-1, -1)
            up[:, i, j] = (
                0.5625 * edge[:, a, b]
                + 0.1875 * (edge[:, a + da, b] + edge[:, a, b + db])
                + 0.0625 * edge[:, a + da, b + db]
            )
    x = x / (1 + np.exp(-norm(up, own["gate_bn"])))
    x = sep_conv(sep_conv(x, own["down_0"], 2), own["down_1"], 2)
    x = np.maximum(norm(x @ own["expand"]["kernel"][0, 0], own["expand_bn"]), 0).mean((1, 2))
    np.testing.assert_allclose(h, x, rtol=2e-4, atol=2e-5)

    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), stats, new)
    assert not any(jax.tree.leaves([moved["stages_1_0"], moved["stages_2_0"], moved["branches"]["stage2"]]))
    assert all(jax.tree.leaves([moved["stages_0_0"], moved["branches"]["stage1"], moved["stem_bn"]]))
    jax.tree.map(np.testing.assert_array_equal, new["stages_0_0"], plain["stages_0_0"])
    # In inference mode the maps are those of the whole network, whose features are the last one's mean.
    maps = model.maps(params, stats, images)
    whole, same = model.encode(params, stats, images, train=False)
    assert [m.shape[1:] for m in maps] == [(6, 6, 4), (3, 3, 6), (2, 2, 8)] and same is stats
    np.testing.assert_allclose(maps[-1].mean((1, 2)), whole, rtol=1e-5)


@pytest.mark.parametrize(
    "key, options",
    [
        ("branches", dict(branches=(3,))),
        ("branch_embeds", dict(branch_embeds=(3,))),
    ],
)
def test_impossible_branches_are_refused_by_key(key, options):
    refused(key, "resnet", "1, 2", **SMALL | options)


def test_a_depth_without_a_branch():
    with pytest.raises(UserError, match=r"^passes\[0\].depth is 3; expected one of 0, 1, 2;"):
        make_model(ResNetOptions(**SMALL)).check_depth("passes[0].depth", 3)
