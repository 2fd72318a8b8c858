"""The map of images: what its data say, checked against loops, and its script, which Node reads where there is one."""

import base64
import io
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from jaxcl.report import explorer as module
from jaxcl.report.explorer import explorer

RNG = np.random.default_rng(0)


def data_of(html):
    return json.loads(re.search(r'id="map-data">(.*?)</script>', html, re.S)[1])


def heaps(count=60, side=12):
    features = np.repeat(np.eye(3), count // 3, 0) * 5 + RNG.normal(size=(count, 3)) * 0.1
    colours = RNG.integers(0, 256, (count, 1, 1, 3)).astype(np.uint8)
    return features, np.broadcast_to(colours, (count, side, side, 3)), colours[:, 0, 0]


def test_images_lie_where_their_features_do_with_their_nearest_ones():
    features, images, _ = heaps()
    names = [f"</script><b>{i}" for i in range(60)]
    html = explorer({"trained": features, "untrained": RNG.normal(size=(60, 5))}, images, names, total=200)
    assert html.count("</script>") == 2  # names cannot end the data early
    data = data_of(html)
    assert data["names"] == names and data["classes"] is data["groups"] is None
    assert [e["name"] for e in data["encoders"]] == ["trained", "untrained"]
    for encoder in data["encoders"]:
        points = np.array(encoder["points"])
        assert points.shape == (60, 2) and points.min() == 0 and points.max() == 1
    trained = data["encoders"][0]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i in (0, 25, 59):
        cosine = unit @ unit[i]
        cosine[i] = -2
        np.testing.assert_allclose(trained["cosine"][i], np.sort(cosine)[::-1][: module.NEAREST], atol=6e-4)
        assert i not in trained["near"][i] and {j // 20 for j in trained["near"][i]} == {i // 20}
    points = np.array(trained["points"])
    middles = np.stack([points[20 * heap : 20 * heap + 20].mean(0) for heap in range(3)])
    nearest = np.abs(points[:, None] - middles).sum(-1).argmin(1)
    np.testing.assert_array_equal(nearest, np.arange(60) // 20)
    assert "60 of 200 images" in html


@pytest.mark.parametrize("shape", [(12, 12), (40, 200), (300, 100)])
def test_every_image_has_its_place_in_the_one_picture(shape):
    colours = RNG.integers(0, 256, (30, 1, 1, 3)).astype(np.uint8)
    images = np.broadcast_to(colours, (30, *shape, 3))
    data = data_of(explorer({"x": RNG.normal(size=(30, 4))}, images, ["n"] * 30))
    kind, _, content = data["sprite"].partition(",")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)
    w, h = data["cell"]
    assert max(w, h) == min(module.CELL, max(shape)) and data["size"] == [shape[1], shape[0]]
    assert kind == ("data:image/png;base64" if max(shape) < 32 else "data:image/jpeg;base64")
    for i in range(30):
        x, y = i % data["columns"] * w, i // data["columns"] * h
        assert np.abs(sheet[y + h // 2, x + w // 2] - colours[i, 0, 0]).max() <= 6


@pytest.mark.parametrize("features", [np.zeros((20, 4)), np.ones((2, 4)), np.full((20, 4), np.nan)])
def test_a_map_of_nothing_says_why(features):
    with pytest.raises(ValueError, match="."):
        explorer({"trained": features}, heaps()[1][: len(features)], ["x"] * len(features))


def test_images_without_finite_features_and_collapsed_encoders_are_left_out():
    features, images, _ = heaps()
    features[3] = np.nan
    data = data_of(explorer({"trained": features, "untrained": np.ones((60, 2))}, images, [str(i) for i in range(60)]))
    assert data["names"] == [str(i) for i in range(60) if i != 3]
    assert [e["name"] for e in data["encoders"]] == ["trained"]
    assert np.max(data["encoders"][0]["near"]) <= 58


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_the_script_is_javascript():
    path = pathlib.Path(module.__file__).with_suffix(".js")
    subprocess.run(["node", "--check", path], check=True)
