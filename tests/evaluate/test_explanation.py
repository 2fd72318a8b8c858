"""Drop and increase of confidence, and agreement with a true mask."""

import golden_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluations import encoded, evaluation, source

from jaxcl import saliency
from jaxcl.errors import UserError
from jaxcl.evaluate import drop_increase, mask_agreement
from jaxcl.evaluate import explanation as module
from jaxcl.models import Model

FIGURES = ("average_drop", "rate_of_drop", "average_increase", "rate_of_increase")


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_golden_formula(golden, wide):
    d = golden("excon", "explain_metrics_formula")
    with jax.enable_x64(wide):
        got = drop_increase(d["p_original"], d["p_masked"])
    assert set(got) == set(FIGURES)
    for key in FIGURES:
        np.testing.assert_allclose(got[key], d[key], rtol=1e-7 if wide else 1e-5)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_golden_network(golden, wide):
    """From the images to the four metrics: predicted class, map, top 15 %, probabilities."""
    d = golden("excon", "explain_metrics_tinynet")
    q = float(d["threshold"])

    @jax.jit
    def chain(images):
        activations = golden_net.head(d, images)
        logits = golden_net.tail(d, activations)
        predicted = jnp.argmax(logits, 1)
        cam = saliency.grad_cam(lambda a: golden_net.tail(d, a), activations, predicted)
        # Min-max does not change the order of the pixels, so the map may be normalised first.
        keep = saliency.top_fraction_mask(saliency.normalize_map(cam, images.shape[1]), q)
        masked = golden_net.logits(d, saliency.apply_mask(images, keep))
        rows = jnp.arange(len(images))
        p_original, p_masked = (jax.nn.softmax(x)[rows, predicted] for x in (logits, masked))
        metrics = drop_increase(p_original, p_masked)
        return predicted, keep, p_original, p_masked, metrics

    with jax.enable_x64(wide):
        predicted, keep, p_original, p_masked, metrics = chain(
            jnp.asarray(d["images"], jnp.float64 if wide else jnp.float32)
        )
    np.testing.assert_array_equal(predicted, d["predicted"])
    np.testing.assert_array_equal(np.sum(keep, (1, 2)), d["kept_pixels"])
    np.testing.assert_array_equal(keep, d["keep_mask"])
    rtol = 1e-7 if wide else 1e-4
    np.testing.assert_allclose(p_original, d["p_original"], rtol=rtol)
    np.testing.assert_allclose(p_masked, d["p_masked"], rtol=rtol)
    for key in FIGURES:
        np.testing.assert_allclose(metrics[key], d[key], rtol=rtol)
    np.testing.assert_allclose(d["per_image_drop"].mean(), d["average_drop"])
    np.testing.assert_allclose(d["per_image_increase"].mean(), d["average_increase"])


def test_drop_increase_leaves_padding_out():
    o, p = np.array([0.5, 0.8, 0.1, 0.4]), np.array([0.25, 0.9, 0.3, 0.4])
    got = drop_increase(np.append(o, 0.0), np.append(p, np.nan), where=np.arange(5) < 4)
    want = [0.125, 0.25, (0.125 + 2.0) / 4, 0.5]
    np.testing.assert_allclose([got[k] for k in FIGURES], want, rtol=1e-6)
    assert all(v == 0 for v in drop_increase(o, p, where=np.zeros(4, bool)).values())
    with pytest.raises(UserError, match="drop_increase: shapes"):
        drop_increase(o, p[:3])


def test_mask_agreement_by_hand():
    true = np.zeros((4, 4, 4), bool)
    true[0, :2, :2] = True  # 4 pixels
    true[1, 3, 3] = True
    true[2, 0, 0] = True
    keep = np.zeros_like(true)
    keep[0, :2, 1:3] = True  # 2 of 4 shared: IoU 2 / 6
    keep[1] = True  # IoU 1 / 16
    keep[3] = True  # no object: ignored
    maps = np.zeros((4, 4, 4))
    maps[0, 1, 1], maps[0, 3, 0] = 3.0, 1.0  # hit; three quarters inside
    maps[1, 0, 0] = 1.0  # miss
    maps[3, 0, 0] = 1.0
    maps[2] = -1.0  # no energy; the first pixel is the first maximum: a hit
    got = mask_agreement(keep, maps, true)
    np.testing.assert_allclose(got["iou"], (2 / 6 + 1 / 16 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(got["pointing_hit"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(got["energy_inside"], 0.75 / 3, rtol=1e-6)
    first = mask_agreement(keep, maps, true, where=np.arange(4) == 0)
    np.testing.assert_allclose([first[k] for k in ("iou", "pointing_hit", "energy_inside")], [1 / 3, 1, 0.75])


def test_mask_agreement_extremes():
    true = np.random.default_rng(0).random((5, 6, 6)) < 0.4
    perfect = jax.jit(mask_agreement)(true, true.astype(np.float32), true)
    assert all(v == 1 for v in perfect.values())
    opposite = mask_agreement(~true, (~true).astype(np.float32), true)
    assert all(v == 0 for v in opposite.values())
    nothing = mask_agreement(true, true.astype(np.float32), np.zeros_like(true))
    assert all(np.isnan(v) for v in nothing.values())
    with pytest.raises(UserError, match="mask_agreement: keep"):
        mask_agreement(true, true[..., :3], true)


def test_metrics_explain_the_predicted_class_and_pictures_the_true_one(monkeypatch):
    """In inference mode, both; the drop is of the class that was predicted before the mask; cases F."""
    asked, modes, maps = [], [], module._maps

    def recorded(context, state, image, target):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), target)
        return maps(context, state, image, target)

    def split_at(self, *args, **options):
        modes.append(options["train"])
        return split(self, *args, **options)

    split = Model.split_at
    monkeypatch.setattr(Model, "split_at", split_at)
    monkeypatch.setattr(module, "_maps", recorded)
    e, state, mesh = evaluation(final=("explanation",), report=True)
    results, panels = e.final(state, mesh)
    jax.effects_barrier()
    host = jax.device_get(state)
    h, _ = encoded(e, state, "test")
    logits = np.asarray(e.recipe.memory["probe"].logits(host.memory["probe"], h))
    labels = source("test").labels
    predicted = logits.argmax(-1)
    assert (predicted != labels).any() and set(modes) == {False}
    seen = {tuple(t[t >= 0]) for t in asked}  # padded rows have no label, but a prediction
    first, rest = predicted[:16], predicted[16:]
    assert tuple(first) in seen and any(t[: len(rest)] == tuple(rest) for t in seen)
    assert tuple(labels[:16]) in seen
    assert "explanation" in results and "saliency" in panels


def test_pictures_are_of_all_classes(monkeypatch):
    """Files come in the order of their classes: the first ones are of one class."""

    def in_order(split, labelled=True):
        s = source(split, labelled)
        return s if split == "train" else s.take(np.argsort(s.labels, kind="stable"))

    monkeypatch.setattr("jaxcl.evaluate.explanation.PICTURED", 8)
    e, state, mesh = evaluation(final=("explanation",), report=True, sources=in_order)
    _, panels = e.final(state, mesh)
    assert set(panels["saliency"]["names"]) == set("abcd")
    test = in_order("test")
    for image, name in zip(panels["saliency"]["image"], panels["saliency"]["names"], strict=True):
        near = np.abs(test.images / 255 - image).max((1, 2, 3)) < 1e-4
        assert test.class_names[test.labels[int(np.flatnonzero(near)[0])]] == name
