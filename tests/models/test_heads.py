"""Projection heads that are conditioned on augmentation parameters, against the same head by hand."""

import numpy as np
import pytest
import tiny
from model_options import refused

from jaxcl.models import ResNetOptions, make_model

SMALL = dict(stem="cifar", stage_sizes=(1, 1, 1), stage_widths=(4, 6, 8), head_features=5, branches=(1, 2))


def test_a_conditioned_head():
    """A head beside the same head by hand; flags and numbers of any shape; the identity where nothing was drawn."""
    names = ("jitter", "grayscale")
    model = make_model(ResNetOptions(**SMALL, head_embeds=names, head_embed_features=3, branch_embeds=(2,)))
    params, stats = tiny.model_variables(model, side=6)
    h = tiny.normal(8, 8)
    drawn = {"jitter": tiny.normal(8, 4, seed=1), "grayscale": np.arange(8) % 2 == 0, "flip": np.ones(8, bool)}

    def by_hand(p, h, drawn):
        inputs = [h]
        for name in names:
            a = np.asarray(drawn[name], np.float32).reshape(8, -1) @ p[f"embed_{name}"]["dense"]["kernel"]
            bn = p[f"embed_{name}_bn"]
            inputs.append(np.maximum((a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5) * bn["scale"] + bn["bias"], 0))
        x = np.concatenate(inputs, 1)
        hidden, out = p["hidden0"]["dense"], p["out"]["dense"]
        assert hidden["kernel"].shape == (8 + 2 * 3, 8)  # as wide as the features, conditioned or not
        return np.maximum(x @ hidden["kernel"] + hidden["bias"], 0) @ out["kernel"] + out["bias"]

    for depth, p in ((0, params["head"]), (2, params["branches"]["stage2"]["head"])):
        z, _ = model.embed(params, stats, h, train=True, aug_params=drawn, depth=depth)
        np.testing.assert_allclose(z, by_hand(p, h, drawn), rtol=1e-4, atol=1e-5)
    nothing = {"jitter": np.tile([1.0, 1, 1, 0], (8, 1)), "grayscale": np.zeros(8)}
    np.testing.assert_allclose(
        model.project(params, stats, h), model.embed(params, stats, h, train=False, aug_params=nothing)[0]
    )
    first = [model.embed(params, stats, h, train=True, aug_params=d, depth=1)[0] for d in (drawn, None)]
    np.testing.assert_array_equal(*first)  # this one is not conditioned


@pytest.mark.parametrize(
    "options",
    [
        dict(head_embeds=("hue",)),
        dict(head_embeds=("jitter", "jitter")),
        dict(head_embeds=("jitter",), head_features=0),
    ],
)
def test_impossible_embeds_are_refused_by_key(options):
    refused("head_embeds", "resnet", **options)
