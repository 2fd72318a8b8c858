"""Shape bias: the golden file, a loop, the sixteen categories, stimuli from a folder, and the evaluator on both."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxcl.data import ArraySource, make_source
from jaxcl.errors import UserError
from jaxcl.evaluate import shape_bias
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.categories import CATEGORIES, category_of
from jaxcl.evaluate.linear_probe import LinearFit
from jaxcl.evaluate.shape_bias import ShapeBias, coarse_probabilities, read_stimuli


def test_golden(golden):
    d = golden("non_semantic_negatives", "shape_bias")
    out = shape_bias(d["probs"], d["fine_to_coarse"], d["shape_label"], d["texture_label"])
    assert out["shape_bias"] == pytest.approx(float(d["shape_bias"]), abs=1e-12)
    assert (out["conflicts"], out["shape"], out["texture"]) == tuple(
        int(d[k]) for k in ("n_conflict", "n_shape", "n_texture")
    )
    coarse = coarse_probabilities(d["probs"], d["fine_to_coarse"])
    np.testing.assert_allclose(coarse, d["coarse_probs"], rtol=1e-12)
    np.testing.assert_array_equal(coarse.argmax(-1), d["decision"])


def test_a_loop_over_images():
    rng = np.random.default_rng(0)
    N, K, C = 300, 12, 5
    probs = rng.dirichlet(np.ones(K) / 2, N)
    to_coarse = rng.permutation(np.array([0, 0, 0, 1, 1, 2, 4, 4, 4, -1, -1, -1]))  # no class is in category 3
    shape, texture = rng.integers(-1, C, (2, N))
    counted = by_shape = by_texture = 0
    for i in range(N):
        if shape[i] == texture[i] or shape[i] < 0 or texture[i] < 0:
            continue
        mean = {c: np.mean([probs[i, k] for k in range(K) if to_coarse[k] == c]) for c in (0, 1, 2, 4)}
        decision = max(mean, key=mean.get)
        counted, by_shape, by_texture = (
            counted + 1, by_shape + (decision == shape[i]), by_texture + (decision == texture[i])
        )  # fmt: skip
    assert 0 < by_shape and 0 < by_texture and by_shape + by_texture < counted < N
    assert shape_bias(probs, to_coarse, shape, texture) == {
        "shape_bias": pytest.approx(by_shape / (by_shape + by_texture)),
        "texture_bias": pytest.approx(by_texture / (by_shape + by_texture)),
        "shape_accuracy": pytest.approx(by_shape / counted),
        "texture_accuracy": pytest.approx(by_texture / counted),
        "cue_share": pytest.approx((by_shape + by_texture) / counted),
        "conflicts": counted,
        "shape": by_shape,
        "texture": by_texture,
    }


def test_without_a_decision_there_is_no_bias():
    out = shape_bias(np.eye(3)[[2, 2]], np.arange(3), [0, 1], [1, 0])
    assert np.isnan(out["shape_bias"]) and out["cue_share"] == 0 and out["conflicts"] == 2
    out = shape_bias(np.eye(3), np.arange(3), [0, 1, -1], [0, 1, 2])
    assert np.isnan(out["shape_accuracy"]) and out["conflicts"] == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((np.ones((2, 3)), np.arange(2), [0, 1], [1, 0]), r"shapes \(2, 3\), \(2,\)"),
        ((np.ones((2, 3)), np.arange(3), [0], [1, 0]), "expected .images,classes"),
        ((np.ones((2, 3)), [-1] * 3, [0, 1], [1, 0]), "no class belongs to a category"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(UserError, match=words):
        shape_bias(*arguments)


def test_categories():
    assert len(CATEGORIES) == 16 and list(CATEGORIES) == sorted(CATEGORIES)
    names = [
        "n02690373",
        "automobile",
        "Tabby, tabby cat",
        "mountain_bike",
        "tench",
        "polar bear",
        "n02113978",
        "ship",
        "frog",
    ]
    found = [CATEGORIES[i] if i >= 0 else "" for i in category_of(names)]
    assert found == ["airplane", "car", "cat", "bicycle", "", "bear", "dog", "boat", ""]
    from jaxcl.evaluate import categories

    ids = [i for words in categories._IDS.values() for i in words.split()]
    assert len(ids) == len(set(ids)) == 207 and all(len(i) == 8 and i.isdigit() for i in ids)
    assert len(categories._IDS["dog"].split()) == 109 and len(categories._IDS["bird"].split()) == 49


# ---- the evaluator


def context(sources, probe, features_of, *, stimuli="", side=4):
    test = sources["test"]
    return SimpleNamespace(
        options=SimpleNamespace(cue_conflict=stimuli),
        recipe=SimpleNamespace(image_shape=(side, side, 3), eval_size=side),
        num_classes=test.num_classes,
        source=sources.get,
        test=test,
        features_of=features_of,
        fitted_probe=lambda: probe,
    )


def source(labels, names, **extras):
    n = len(labels)
    images = np.zeros((n, 4, 4, 3), np.uint8)
    options = dict(mean=(0.5,) * 3, std=(0.5,) * 3, extras=extras)
    return ArraySource(images=images, labels=np.asarray(labels, np.int32), class_names=names, **options)


def test_on_the_data_itself():
    """A probe that reads the answer from the features: shape twice, texture once, neither once; no conflict once."""
    shape, texture = np.array([0, 1, 2, 0, 1]), np.array([1, 2, 0, 2, 1])
    answer = np.array([0, 1, 0, 1, 1])
    own = source(shape, tuple("abc"), shape=shape, texture=texture)
    sources = {"train": source([0, 1], tuple("abc")), "test": own, "cue_conflict": own}
    probe = LinearFit(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    f = context(sources, probe, lambda s: np.eye(3, dtype=np.float32)[answer])
    metrics, panels = ShapeBias()(f)
    assert metrics["shape_bias"] == pytest.approx(2 / 3) and metrics["conflicts"] == 4
    assert metrics["texture_taught"] is False and list(panels["ood"]) == ["Shape bias (textures not taught)"]
    sources["train"] = source([0, 1], tuple("abc"), cue=np.array([0, -1]))
    metrics, panels = ShapeBias()(f)
    assert metrics["texture_taught"] is True
    assert panels["ood"] == {"Shape bias": {"value": metrics["shape_bias"], "chance": 0.5}}


def test_on_coarse_labels():
    """Garments' cues are fine classes; two of one coarse class are no conflict for a classifier of coarse ones."""
    own = make_source("garments", split="cue_conflict", limit=60, labels="coarse", spurious=0.5)
    train = make_source("garments", split="train", limit=20, labels="coarse", spurious=0.5)
    of_fine = make_source("garments", split="test", limit=200, labels="coarse")
    table = dict(zip(of_fine.extras["fine"].tolist(), of_fine.labels.tolist(), strict=True))
    shape, texture = (np.array([table[c] for c in own.extras[k].tolist()]) for k in ("shape", "texture"))
    np.testing.assert_array_equal(shape, own.labels)
    probe = LinearFit(np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    f = context({"train": train, "test": of_fine, "cue_conflict": own}, probe, lambda s: np.eye(4)[texture])
    metrics, _ = ShapeBias()(f)
    assert metrics["conflicts"] == (shape != texture).sum() < 60
    assert metrics["shape_bias"] == 0 and metrics["texture_accuracy"] == 1 and metrics["texture_taught"]


@pytest.fixture
def stimuli(tmp_path):
    """Two cats and a boat, in one colour each: what a probe on the mean colour takes them for is known."""
    for name, colour in (
        ("cat/cat1-boat2.png", (255, 0, 0)),
        ("cat/cat2-dog1.png", (255, 0, 0)),
        ("boat/boat7-cat1.png", (255, 0, 0)),
        ("boat/boat7-boat1.png", (0, 255, 0)),
        ("cat/notes-cat.txt.png", (0, 0, 0)),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), colour).save(path)
    (tmp_path / "cat" / "readme.txt").write_text("")
    return tmp_path


def test_stimuli_from_a_folder(stimuli):
    read = read_stimuli(str(stimuli), 4)
    shown = [(CATEGORIES[a], CATEGORIES[b]) for a, b in zip(read.extras["shape"], read.extras["texture"], strict=True)]
    assert shown == [("boat", "boat"), ("boat", "cat"), ("cat", "boat"), ("cat", "dog")]
    assert read.image_shape == (4, 4, 3) and (read.images[1] == (255, 0, 0)).all()

    names = ("ship", "cat", "frog")  # no dog: the second cat does not count
    probe = LinearFit(np.array([[0, 9, 0], [9, 0, 0], [0, 0, 9.0]], np.float32), np.zeros(3, np.float32))
    sources = {"train": source([0, 1, 2], names), "test": source([0], names)}
    f = context(sources, probe, lambda s: s.images.mean((1, 2)) / 255, stimuli=str(stimuli))
    metrics, panels = ShapeBias()(f)
    found = metrics["stimuli"]
    assert (found["conflicts"], found["shape"], found["texture"]) == (2, 1, 1) and found["categories"] == "boat, cat"
    assert panels["ood"]["Shape bias, stimuli"]["value"] == 0.5
    ShapeBias().check(SimpleNamespace(options=f.options, source=sources.get))


def test_what_is_missing(stimuli, tmp_path):
    names = tuple("ab")
    f = context({"train": source([0], names), "test": source([0], names)}, None, None)
    with pytest.raises(NotApplicable, match="no cue-conflict images"):
        ShapeBias()(f)
    unlabelled = source([-1], names)
    with pytest.raises(NotApplicable, match="no training image has a label"):
        ShapeBias().check_needs(context({"train": unlabelled, "test": unlabelled}, None, None))
    for folder, words in (
        (tmp_path / "none", "eval.cue_conflict is '.*none'"),
        (stimuli / "cat", "eval.cue_conflict: .*cat holds no images"),
        (stimuli, "eval.cue_conflict: no image of .* has two categories"),
    ):
        options = SimpleNamespace(cue_conflict=str(folder))
        with pytest.raises(UserError, match=words) as error:
            ShapeBias().check(SimpleNamespace(options=options, source=lambda split: source([0], names)))
        assert "\n" not in str(error.value)
    ShapeBias().check(SimpleNamespace(options=SimpleNamespace(cue_conflict=""), source=None))
    (stimuli / "cat" / "cat3-boat1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="cat3-boat1.png cannot be read as an image"):
        read_stimuli(str(stimuli), 4)
