"""What stages are invariant to, on images whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from evaluations import evaluation, source

from jaxcl.evaluate import invariance as module
from jaxcl.evaluate.invariance import OTHER, cosines
from jaxcl.report.invariance import invariance as figure


def test_cosines():
    a, b, centre = tiny.normal(5, 3), tiny.normal(5, 3, seed=1), np.array([0.5, -1, 2])
    want = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a - centre, b - centre, strict=True)]
    np.testing.assert_allclose(cosines(a, b, centre), want, rtol=1e-5)
    np.testing.assert_allclose(cosines(a, a, centre), 1, rtol=1e-6)
    assert cosines(a[:1], a[:1], a[0]) == 0


def mirrored_and_grey(split, labelled):
    s = source(split, labelled)
    images = np.repeat(s.images.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    return dataclasses.replace(s, images=np.concatenate([images[:, :, :8], images[:, :, 7::-1]], axis=2))


def test_invariance(monkeypatch):
    """Mirrored grey images are their own mirrored and grey copies; a quarter turn is one by hand; so is another."""
    e, state, mesh = evaluation(final=("invariance",), report=True, sources=mirrored_and_grey)
    # The jitter, which compiles slowly, has tests of its own.
    kept = {k: v for k, v in module.transformations(tiny.SIDE, True).items() if k != "jitter"}
    monkeypatch.setattr(module, "transformations", lambda size, colour: kept)
    results, panels = e.final(state, mesh)
    tables, panel = results["invariance"], panels["invariance"]
    names = ["crop", "grayscale", "blur", "flip", "rotation", OTHER]
    assert panel["transformations"] == names and panel["stages"] == ["stage1", "stage2"] == list(tables["cosine"])

    own, mean, std = jax.device_get(state), jnp.asarray(tiny.MEAN), jnp.asarray(tiny.STD)
    images = mirrored_and_grey("test", True).images / np.float32(255)

    @jax.jit
    def pooled(x):
        return [m.mean((1, 2)) for m in e.recipe.model.maps(own.params, own.batch_stats, (x - mean) / std)]

    plain, turned = (jax.device_get(pooled(x)) for x in (images, np.rot90(images, axes=(1, 2))))
    for k, stage in enumerate(panel["stages"]):
        for kind, centre in (("cosine", 0.0), ("centred", np.mean(plain[k], 0))):
            row = tables[kind][stage]
            assert row["flip"] == pytest.approx(1, abs=1e-4) and row["grayscale"] == pytest.approx(1, abs=1e-4)
            for name, copies in (("rotation", turned[k]), (OTHER, np.roll(plain[k], 1, 0))):
                assert row[name] == pytest.approx(cosines(plain[k], copies, centre).mean(), abs=1e-4)
            assert row["crop"] < 0.9999 and row["blur"] < 0.9999
            np.testing.assert_allclose(panel[kind][k], list(row.values()))
        assert abs(tables["centred"][stage][OTHER]) < 0.3 < tables["cosine"][stage][OTHER]

    drawn = figure(panel)
    texts = [t.get_text() for ax in drawn.axes for t in ax.texts]
    assert len(drawn.axes) == 2 and texts.count("1.00") >= 8 and len(texts) == 24


def test_figure_with_nothing_and_with_holes():
    assert not figure({"stages": [], "transformations": []}).axes  # says so instead
    table = np.array([[0.2, np.nan], [-0.001, 1.0]])
    drawn = figure({"stages": ["a", "b"], "transformations": ["$5", "another"], "centred": table})
    assert [t.get_text() for t in drawn.axes[0].texts] == ["0.20", "–", "0.00", "1.00"]
