"""Out of domain: sets matched by name against a written-out loop, files, images made anew, the whole evaluator."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxcl import config as base
from jaxcl.data import ArraySource, batches
from jaxcl.errors import UserError
from jaxcl.evaluate import corruptions
from jaxcl.evaluate.base import NotApplicable
from jaxcl.evaluate.linear_probe import LinearFit
from jaxcl.evaluate.ood import Changed, OutOfDomain, shuffle_patches, texture_only

S, NAMES = tiny.SIDE, ("red", "green", "blue", "yellow")


def source(n, *, seed=0, names=NAMES, side=S, **options):
    part = tiny.batch(n, seed=seed, side=side)
    fields = dict(images=part["image"], labels=part["label"], class_names=names, mean=tiny.MEAN, std=tiny.STD)
    return ArraySource(**fields | options)


def pixels(of):
    """Features of a source without a network: the colour of the middle, and a corner."""
    image = np.concatenate([b["image"][b["where"]] for b in batches(of, 7)]).astype(np.float32) / 255
    quarter = image.shape[1] // 4
    return np.concatenate([image[:, quarter:-quarter, quarter:-quarter].mean((1, 2)), image[:, 0, 0]], -1)


PROBE = LinearFit(np.random.default_rng(5).normal(size=(6, 4)).astype(np.float32), np.zeros(4, np.float32))
GOOD = LinearFit(
    np.concatenate([9 * np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2], [1, 1, -2]]).T, np.zeros((3, 4))]).astype(
        np.float32
    ),
    np.zeros(4, np.float32),
)


@pytest.fixture
def context():
    def make(probe=PROBE, shifted=None, **options):
        c = tiny.config(stage=False)
        c.eval.update(dict(severities=(), shuffle_grids=()) | options)
        sources = {"train": source(40, seed=1), "test": source(30, seed=2), "test_shifted": shifted}
        setup = SimpleNamespace(
            config=c, options=c.eval, recipe=SimpleNamespace(image_shape=(S, S, 3), eval_size=S), source=sources.get
        )
        return SimpleNamespace(
            setup=setup,
            options=c.eval,
            recipe=setup.recipe,
            num_classes=4,
            source=sources.get,
            test=sources["test"],
            batch_size=8,
            features=lambda split: pixels(sources[split]),
            features_of=pixels,
            fitted_probe=lambda: probe,
        )

    return make


def right(probe, of, labels=None):
    logits = pixels(of) @ probe.weights + probe.bias
    return float(np.mean(logits.argmax(-1) == (of.labels if labels is None else labels)))


def npz(path, part, names):
    np.savez(path, images=part["image"], labels=part["label"], class_names=list(names))
    return f"npz:{path}"


# ---- sets of their own


def test_masked_and_unmasked_logits(context, tmp_path):
    """Of a set's classes two are the probe's, by other numbers; a loop over its images says what is right."""
    part = tiny.batch(50, seed=3)
    names = ("Blue", "cyan", "RED ", "pink")
    f = context(ood=(f"sketch={npz(tmp_path / 'a.npz', part, names)}",))
    to_own = {0: 2, 2: 0}
    unmasked, masked, count = 0, 0, 0
    for image, label in zip(part["image"], part["label"], strict=True):
        if label not in to_own:
            continue
        logits = (pixels(dataclasses.replace(f.test, images=image[None], labels=label[None])) @ PROBE.weights)[0]
        own = to_own[label]
        unmasked += max(range(4), key=lambda k: logits[k]) == own
        masked += max((0, 2), key=lambda k: logits[k]) == own
        count += 1
    OutOfDomain().check(f.setup)
    metrics, panels = OutOfDomain()(f)
    found = metrics["sets"]["sketch"]
    assert found["images"] == count and found["classes"] == 2  # all images, also those the set would train on
    assert found["accuracy"] == pytest.approx(unmasked / count)
    assert found["masked_accuracy"] == pytest.approx(masked / count)
    assert found["masked_accuracy"] > found["accuracy"]  # otherwise the numbers above say little
    assert panels["ood"]["sketch"] == {"value": found["accuracy"]}


def test_one_split_of_a_set(context, tmp_path):
    tiny.colours(tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as arrays:
        np.savez(tmp_path / "b.npz", **arrays, class_names=list(NAMES))
    f = context(ood=(f"one@test=npz:{tmp_path}/b.npz", f"all=npz:{tmp_path}/b.npz"))
    metrics, _ = OutOfDomain()(f)
    assert [metrics["sets"][k]["images"] for k in ("one", "all")] == [16, 80]


def test_image_files_in_class_folders(context, tmp_path):
    """Files of another size and form than the training images; a class that the probe lacks does not count."""
    colours = {"red": (220, 40, 40), "yellow": (200, 200, 40), "violet": (90, 0, 90)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20 + i, 31), colour).save(tmp_path / name / f"{i}.png")
    f = context(GOOD, ood=(f"rendition=folder:{tmp_path}",))
    OutOfDomain().check(f.setup)
    found = OutOfDomain()(f)[0]["sets"]["rendition"]
    assert (found["images"], found["classes"]) == (6, 2)
    assert found["accuracy"] == found["masked_accuracy"] == 1


def test_names_that_two_classes_share_mean_neither(context, tmp_path):
    f = context(ood=(f"set={npz(tmp_path / 'a.npz', tiny.batch(50), NAMES)}",))
    train = source(40, names=("red", "Red", "blue", "yellow"))
    f.setup.source = f.source = {"train": train, "test": f.test}.get
    assert OutOfDomain()(f)[0]["sets"]["set"]["classes"] == 2


# ---- corrupted sets


def test_corruptions_are_computed(context):
    f = context(corruptions=("contrast", "pixelate"), severities=(2, 5))
    metrics, panels = OutOfDomain()(f)
    everything = []
    for name in ("contrast", "pixelate"):
        of_name = []
        for severity in (2, 5):
            images = corruptions.corrupt(f.test.images, name, severity, np.arange(30))
            of_name.append(right(PROBE, dataclasses.replace(f.test, images=images)))
            assert metrics["corruption"][name][str(severity)] == {"accuracy": pytest.approx(of_name[-1])}
        assert metrics["corruption"][name]["accuracy"] == pytest.approx(np.mean(of_name))
        everything += of_name
    assert metrics["corruption"]["accuracy"] == pytest.approx(np.mean(everything)) and len(set(everything)) > 1
    assert panels["ood"]["Corrupted, mean"] == {"value": metrics["corruption"]["accuracy"]}
    assert OutOfDomain()(f)[0] == metrics


def test_corrupted_sets_from_numpy_files(context, tmp_path):
    parts = [tiny.batch(12, seed=i) for i in range(5)]
    np.save(tmp_path / "frost.npy", np.concatenate([p["image"] for p in parts]))
    np.save(tmp_path / "labels.npy", np.concatenate([p["label"] for p in parts]).astype(np.uint8))
    f = context(corruptions=("frost",), severities=(1, 4), corrupted=str(tmp_path))
    OutOfDomain().check(f.setup)
    found = OutOfDomain()(f)[0]["corruption"]["frost"]
    for severity in (1, 4):
        part = parts[severity - 1]
        expected = right(PROBE, dataclasses.replace(f.test, images=part["image"], labels=part["label"]))
        assert found[str(severity)] == {"accuracy": pytest.approx(expected)}
    (tmp_path / "frost.npy").unlink()
    with pytest.raises(UserError, match="no file at .*frost.npy"):
        OutOfDomain().check(f.setup)
    with pytest.raises(NotApplicable, match="no file at .*frost.npy"):  # after training: not the end of the run
        OutOfDomain()(f)
    np.save(tmp_path / "frost.npy", np.zeros((7, S, S, 3), np.uint8))
    with pytest.raises(UserError, match=r"expected uint8 \[5N,H,W,3\]"):
        OutOfDomain().check(f.setup)


def test_corrupted_sets_by_the_name_of_a_source(context, tmp_path):
    part = tiny.batch(20, seed=8)
    for severity in (1, 3):
        npz(tmp_path / f"fog-{severity}.npz", part | {"image": part["image"] // severity}, NAMES)
    f = context(corruptions=("fog",), severities=(1, 3), corrupted=f"npz:{tmp_path}/{{corruption}}-{{severity}}.npz")
    OutOfDomain().check(f.setup)
    found = OutOfDomain()(f)[0]["corruption"]["fog"]
    for severity in (1, 3):
        images = part["image"] // severity
        # An npz file without a test part holds back a tenth: all images are counted, in another order.
        expected = right(PROBE, dataclasses.replace(f.test, images=images, labels=part["label"]))
        assert found[str(severity)] == {"accuracy": pytest.approx(expected)}


# ---- images made anew


def test_shuffled_patches_are_the_tiles_of_the_image():
    images = np.random.default_rng(6).integers(0, 256, (5, S, S, 3)).astype(np.uint8)
    index = np.array([3, 1, 4, 1, 5])
    out = np.asarray(shuffle_patches(images, index, grid=4))
    size = S // 4
    for before, after in zip(images, out, strict=True):
        cut = lambda x: [x[a : a + size, b : b + size].tobytes() for a in range(0, S, size) for b in range(0, S, size)]  # noqa: E731
        assert sorted(cut(before)) == sorted(cut(after)) and cut(before) != cut(after)
    order = np.array([4, 2, 0, 3, 1])
    np.testing.assert_array_equal(shuffle_patches(images[order], index[order], grid=4), out[order])
    # The order is the index's: the same for two images of one index, another for another.
    same = np.asarray(shuffle_patches(images[[0] * 5], index, grid=4))
    assert (same[1] == same[3]).all() and (same[0] != same[1]).any()
    odd = np.asarray(shuffle_patches(images, index, grid=3))  # tiles of 6 pixels, the last ones overlapping
    windows = {images[0, a : a + 6, b : b + 6].tobytes() for a in (0, 6, 10) for b in (0, 6, 10)}
    assert odd[0, :6, :6].tobytes() in windows and odd[0, 6:12, :6].tobytes() in windows


def test_texture_is_copied_from_the_image():
    images = np.random.default_rng(7).integers(0, 256, (3, S, S, 3)).astype(np.uint8)
    out = np.asarray(texture_only(images, np.array([0, 1, 2])))
    np.testing.assert_array_equal(texture_only(images[::-1], np.array([2, 1, 0]))[::-1], out)
    for before, after in zip(images, out, strict=True):
        assert {tuple(p) for p in after.reshape(-1, 3)} <= {tuple(p) for p in before.reshape(-1, 3)}
        assert (before != after).any()


def test_changed_images_come_in_one_shape_and_at_the_side_of_the_encoder():
    seen = []

    def change(images, index):
        seen.append((images.shape, index.shape))
        return 255 - images

    large = source(10, side=2 * S)
    changed = Changed(large, S, change, 4)
    out = np.concatenate([b["image"][b["where"]] for b in batches(changed, 4)])
    assert set(seen) == {((4, S, S, 3), (4,))} and len(changed) == 10 and out.shape == (10, S, S, 3)
    halved = large.images.reshape(10, S, 2, S, 2, 3).mean((2, 4))
    assert np.abs(halved[:, 1:-1, 1:-1] - (255.0 - out)[:, 1:-1, 1:-1]).mean() < 12  # antialiased, so a little smoother
    np.testing.assert_array_equal(Changed(source(3), S, change, 4).batch(np.arange(3))["image"], 255 - source(3).images)


# ---- the whole


def test_all_metrics(context):
    shifted = source(24, seed=4)
    shifted = dataclasses.replace(shifted, images=255 - shifted.images)
    f = context(GOOD, shifted, shuffle_grids=(2, 4))
    metrics, panels = OutOfDomain()(f)
    assert metrics["accuracy"] == right(GOOD, f.test) > 0.9
    assert metrics["shifted"]["accuracy"] == right(GOOD, shifted) < 0.5
    for grid in (2, 4):
        images = np.asarray(shuffle_patches(f.test.images, np.arange(30), grid=grid))
        expected = right(GOOD, dataclasses.replace(f.test, images=images))
        assert metrics["shuffled"][str(grid)]["accuracy"] == pytest.approx(expected)
    texture = np.asarray(texture_only(f.test.images, np.arange(30)))
    assert metrics["texture"]["accuracy"] == pytest.approx(right(GOOD, dataclasses.replace(f.test, images=texture)))
    assert set(metrics) == {"accuracy", "shifted", "shuffled", "texture"}
    assert list(panels["ood"]) == ["In domain", "Shifted", "Shuffled, 2 x 2", "Shuffled, 4 x 4", "Texture only"]
    assert panels["ood"]["Texture only"] == {"value": metrics["texture"]["accuracy"], "chance": 0.25, "lower": True}


def test_unlabelled_data_is_left_out(context):
    f = context()
    unlabelled = dataclasses.replace(f.test, labels=np.full(30, -1, np.int32))
    f.source = {"train": unlabelled, "test": f.test}.get
    f.setup.classifier = None
    with pytest.raises(NotApplicable, match="no training image has a label"):
        OutOfDomain().check_needs(f)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(corruptions=("gausian_noise",)), "eval.corruptions has 'gausian_noise'; did you mean 'gaussian_noise'?"),
        (dict(corruptions=("frost",), severities=(1,)), "eval.corruptions has 'frost'"),
        (dict(severities=(0,)), "eval.severities has 0"),
        (dict(shuffle_grids=(1,)), "eval.shuffle_grids has 1"),
        (dict(shuffle_grids=(2.5,)), "eval.shuffle_grids has 2.5"),
        (dict(ood=("npz:a",)), "eval.ood has 'npz:a'"),
        (dict(ood=("a b=npz:a",)), "eval.ood has 'a b=npz:a'"),
        (dict(ood=("a=npz:{good}", "a=npz:{good}")), "eval.ood has 'a=npz:"),
        (dict(ood=("a=npz:{tmp}/none.npz",)), "no file at"),
        (dict(ood=("a=sketches:x",)), "unknown data source"),
        (dict(ood=("a=npz:{bad}",)), "eval.ood: a has no class"),
        (dict(severities=(1,), corrupted="{tmp}"), "no file at {tmp}/gaussian_noise.npy"),
    ],
)
def test_mistakes_are_known_before_training(context, tmp_path, options, words):
    paths = dict(tmp=str(tmp_path), good=str(tmp_path / "good.npz"), bad=str(tmp_path / "bad.npz"))
    npz(paths["good"], tiny.batch(20), NAMES)
    npz(paths["bad"], tiny.batch(20), "1234")
    fill = lambda v: v.format(**paths) if isinstance(v, str) else v  # noqa: E731
    options = {k: tuple(map(fill, v)) if isinstance(v, tuple) else fill(v) for k, v in options.items()}
    with pytest.raises(UserError) as error:
        OutOfDomain().check(context(**options).setup)
    assert words.format(**paths) in str(error.value) and "\n" not in str(error.value)


def test_defaults():
    options = base.default().eval
    assert not {"ood", "shape_bias"} & set(options.final)  # a minute on a laptop: for the asking
    assert options.severities == (1, 2, 3, 4, 5) and not options.corruptions
