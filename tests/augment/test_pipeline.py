"""Pipelines: what they return, what the result of an image depends on, what operations share, what is refused."""

import dataclasses
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcl import augment
from jaxcl.augment import color, ops
from jaxcl.errors import UserError
from jaxcl.runtime.options import construct

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
SIZE, COUNT = 12, 16
EVERYTHING = dict(blur=0.5, solarize=0.3)


def keys(count=COUNT, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def batch(count=COUNT, height=16, width=14, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def view():
    return jax.jit(augment.random_view(SIZE, MEAN, STD, **EVERYTHING))


@pytest.fixture(scope="module")
def result(view):
    return jax.tree.map(np.asarray, view(keys(), batch()))


@pytest.mark.parametrize("side", [16, 64])  # by matmuls, and on a CPU by gathering
def test_a_fused_flip_equals_a_crop_and_then_a_flip(side):
    images = batch(height=side, width=side)
    crop, mirror = augment.RandomResizedCrop(size=side), augment.RandomFlip(p=0.5)
    both, params = augment.Pipeline((crop, mirror))(keys(), images)
    alone, own = augment.Pipeline((crop,))(keys(), images)
    apart, _ = augment.Pipeline((crop, augment.RandomSolarize(p=0.0), mirror))(keys(), images)  # something between them
    assert 0 < params["flip"].sum() < COUNT and list(params) == ["crop", "flip"]
    np.testing.assert_array_equal(params["crop"], own["crop"])
    np.testing.assert_array_equal(both, ops.flip(alone, params["flip"]))
    np.testing.assert_array_equal(both, apart)


def test_shapes_dtypes_and_names(result):
    images, params = result
    assert images.shape == (COUNT, SIZE, SIZE, 3) and images.dtype == np.float32
    assert {name: (value.shape[1:], value.dtype.name) for name, value in params.items()} == {
        "crop": ((4,), "float32"),
        "flip": ((), "bool"),
        "jitter": ((4,), "float32"),
        "jitter_order": ((4,), "int32"),
        "jitter_applied": ((), "bool"),
        "grayscale": ((), "bool"),
        "blur_sigma": ((), "float32"),
        "solarize": ((), "bool"),
    }
    assert all(len(value) == COUNT for value in params.values())
    assert np.isfinite(images).all()


def test_params_replay_the_view(result):
    """The returned parameters, applied one by one with the deterministic functions, give the same images."""
    images, params = result

    @jax.jit
    def replay(x, params):
        x = ops.resized_crop(augment.to_float(x), params["crop"] * jnp.array([16.0, 14.0, 16.0, 14.0]), SIZE)
        x = color.color_jitter(ops.flip(x, params["flip"]), params["jitter"], params["jitter_order"])
        x = ops.gaussian_blur(color.grayscale(x, params["grayscale"]), params["blur_sigma"])
        return augment.normalize(ops.solarize(x, params["solarize"]), MEAN, STD)

    difference = np.abs(np.asarray(replay(batch(), params)) - images)
    # A value close to solarize's threshold may be rounded to either side of it.
    assert (difference > 1e-4).sum() <= 3
    skipped = ~params["jitter_applied"]
    assert skipped.any()
    np.testing.assert_array_equal(params["jitter"][skipped], np.tile([1, 1, 1, 0], (skipped.sum(), 1)))


def test_permuting_the_batch_permutes_the_result(view, result):
    order = np.random.default_rng(3).permutation(COUNT)
    got = view(keys()[order], batch()[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), got, result)


def test_result_does_not_depend_on_the_batch_around_it(view, result):
    got = view(keys()[5:8], batch()[5:8])
    images, params = result
    np.testing.assert_allclose(got[0], images[5:8], atol=2e-5)  # the matmuls may sum in another order
    for name, value in got[1].items():
        np.testing.assert_allclose(value, params[name][5:8], rtol=1e-6)


@pytest.mark.parametrize("side", [16, 64])  # by matmuls, and on a CPU by gathering
@pytest.mark.parametrize("make", [augment.random_view, augment.standard_view])
def test_several_views_of_an_image_equal_views_of_repeated_images(make, side):
    images, several = batch(5, side, side), keys(15)
    view = make(side, MEAN, STD)
    out, params = view(several, images)
    repeated, same = view(several, np.repeat(images, 3, axis=0))
    np.testing.assert_allclose(out, repeated, atol=2e-6)
    for name, value in params.items():
        np.testing.assert_array_equal(value, same[name])


def test_types_do_not_depend_on_x64():
    view = augment.random_view(SIZE, MEAN, STD, **EVERYTHING)
    want = jax.eval_shape(view, keys(), batch())
    with jax.enable_x64(True):
        assert jax.eval_shape(view, keys(), batch()) == want


def test_another_key_gives_another_view(view, result):
    other = view(keys(seed=1), batch())
    assert (np.abs(other[0] - result[0]).max(axis=(1, 2, 3)) > 0.1).all()


def test_one_and_eight_devices_agree_without_communication(view, result):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arguments = jax.device_put((keys(), batch()), sharding)
    compiled = view.lower(*arguments).compile()
    images, params = compiled(*arguments)
    assert images.sharding.is_equivalent_to(sharding, images.ndim)
    np.testing.assert_allclose(images, result[0], atol=2e-5)
    three = jax.device_put((keys(3 * COUNT), batch()), sharding)
    several = view.lower(*three).compile()
    np.testing.assert_allclose(several(*three)[0], view(keys(3 * COUNT), batch())[0], atol=2e-5)
    for name, value in params.items():
        np.testing.assert_allclose(value, result[1][name], rtol=1e-6)
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
        assert collective not in several.as_text()


def test_removing_an_operation_keeps_the_draws_of_the_others(result):
    pipeline = augment.random_view(SIZE, MEAN, STD, flip=0.0, jitter_p=0.0, **EVERYTHING)
    params = jax.jit(lambda *args: pipeline(*args)[1])(keys(), batch())
    assert "flip" not in params and "jitter" not in params
    for name, value in params.items():
        np.testing.assert_array_equal(value, result[1][name])


def test_operations_draw_independently():
    pipeline = augment.Pipeline([augment.RandomFlip(), augment.RandomGrayscale(p=0.5), augment.RandomFlip()])
    _, params = jax.jit(pipeline)(keys(4000), np.zeros((4000, 2, 2, 3), np.uint8))
    assert set(params) == {"flip", "grayscale", "flip_2"}
    coins = np.stack([np.asarray(v) for v in params.values()])
    assert np.abs(np.corrcoef(coins) - np.eye(3)).max() < 4 / np.sqrt(4000)
    assert np.abs(coins.mean(1) - 0.5).max() < 2 / np.sqrt(4000)


def test_operations_of_probability_zero_are_not_in_the_program():
    small = augment.random_view(8, MEAN, STD, flip=0, jitter_p=0, grayscale=0)
    assert [type(op).__name__ for op in small.ops] == ["RandomResizedCrop", "Normalize"]
    whole = augment.random_view(8, MEAN, STD, **EVERYTHING)
    assert [op.name for op in whole.ops] == "crop flip jitter grayscale blur solarize normalize".split()


def test_jitter_of_strength_zero_is_the_identity():
    x = np.random.default_rng(0).uniform(size=(8, 6, 6, 3)).astype(np.float32)
    op = augment.ColorJitter(brightness=0, contrast=0, saturation=0, hue=0, p=1.0)
    images, params = augment.Pipeline([op])(keys(8), x)
    np.testing.assert_array_equal(images, x)
    np.testing.assert_array_equal(params["jitter"], np.tile([1, 1, 1, 0], (8, 1)))


def test_standard_view_resizes_and_normalises():
    images = batch(4, 10, 10)
    out, params = jax.jit(augment.standard_view(10, MEAN, STD))(keys(4), images)
    assert params == {}
    np.testing.assert_allclose(out, (images / 255 - MEAN) / STD, atol=1e-5)
    resized, _ = augment.standard_view(5, MEAN, STD)(keys(4), images)
    want = augment.normalize(ops.resize(augment.to_float(images), 5), MEAN, STD)
    np.testing.assert_allclose(resized, want, atol=1e-6)


def test_classifier_view():
    pipeline = augment.classifier_view(8, MEAN, STD, crop_area=(0.5, 0.9))
    assert [op.name for op in pipeline.ops] == ["crop", "flip", "normalize"]
    params = jax.jit(lambda *args: pipeline(*args)[1])(keys(64), batch(64, 32, 32))
    area = np.prod(np.asarray(params["crop"])[:, 2:], axis=1)
    assert area.min() > 0.45 and area.max() < 0.95


def test_bytes_and_floats_are_the_same_image():
    view = jax.jit(augment.standard_view(16, MEAN, STD))
    images = batch(4, 16, 16)
    out = [view(keys(4), x)[0] for x in (images, images.astype(np.float32) / 255, images.astype(np.float64) / 255)]
    np.testing.assert_allclose(out[0], out[1], atol=1e-6)
    np.testing.assert_allclose(out[0], out[2], atol=1e-6)
    assert {x.dtype.name for x in out} == {"float32"}


def test_one_channel_needs_views_without_colour_operations():
    images = batch(4)[..., :1]
    out, _ = jax.eval_shape(augment.classifier_view(8, (0.5,), (0.5,)), keys(4), images)
    assert out.shape == (4, 8, 8, 1)
    for options in ({"grayscale": 0.0}, {"jitter_p": 0.0}):
        with pytest.raises(UserError, match=r"\(4, 8, 8, 1\)"):
            jax.eval_shape(augment.random_view(8, (0.5,), (0.5,), **options), keys(4), images)
    with pytest.raises(UserError, match="1 channel"):
        jax.eval_shape(augment.standard_view(16, MEAN, STD), keys(4), images)


def test_pipelines_are_values():
    a, b = (augment.random_view(8, list(MEAN), STD, crop_area=[0.2, 1.0]) for _ in range(2))
    assert a == b and hash(a) == hash(b)


BAD_OPTIONS = [
    dict(crop_area=(0.0, 1.0)),
    dict(crop_area=(0.2, 1.1)),
    dict(crop_area=(0.9, 0.2)),
    dict(crop_area=(0.2,)),
    dict(crop_ratio=(0.0, 1.0)),
    dict(crop_ratio=(2.0, 1.0)),
    dict(crop_ratio=(1.0, float("inf"))),
    dict(flip=1.5),
    dict(flip=True),
    dict(jitter_p=-0.1),
    dict(grayscale=float("nan")),
    dict(blur=2),
    dict(blur_sigma=(2.0, 0.1)),
    dict(blur_sigma=(0.0, 0.1)),
    dict(blur_above=32.5),
    dict(solarize=-1),
    dict(rotation="often"),
    dict(jitter=(0.4, 0.4, 0.4)),
    dict(jitter=(0.4, 0.4, 0.4, 0.6)),
    dict(jitter=(-0.4, 0.4, 0.4, 0.1)),
]


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_refused_by_their_key(options):
    """Called directly, and as a part of a config."""
    (key,) = options
    data = dict(size=8, mean=MEAN, std=STD)
    for prefix, make in (
        ("", lambda: augment.random_view(**data, **options)),
        ("views.view1.", lambda: construct("views.view1", augment.random_view, options, **data)),
    ):
        with pytest.raises(UserError, match=f"^{prefix}{key} is ") as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: augment.RandomResizedCrop(size=0), "crop.size"),
        (lambda: augment.Resize(size=32.0), "resize.size"),
        (lambda: augment.RandomResizedCrop(size=8, area=(0.9, 0.2)), "crop.area"),
        (lambda: augment.RandomFlip(p=1.5), "flip.p"),
        (lambda: augment.ColorJitter(hue=0.6), "jitter.hue"),
        (lambda: augment.GaussianBlur(sigma=(2.0, 1.0)), "blur.sigma"),
        (lambda: augment.RandomTilt(degrees=-1.0), "tilt.degrees"),
        (lambda: augment.Normalize(mean=MEAN, std=(0.2, 0.0, 0.2)), "normalize.std"),
        (lambda: augment.Normalize(mean=MEAN, std=(0.2, 0.2)), "normalize.std"),
        (lambda: augment.random_view(0, MEAN, STD), "crop.size"),
        (lambda: augment.standard_view(8, MEAN, (0.2, 0.2)), "normalize.std"),
    ],
)
def test_bad_operations_are_refused_by_name_and_option(make, key):
    with pytest.raises(UserError, match=f"^{key} is ") as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- operations of a user


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invert(augment.Op):
    """Draws nothing and needs nothing of the contract but a name and a call."""

    name: str = "invert"

    def __call__(self, keys, images):
        return 1 - images, {"invert": jnp.ones(len(images), bool)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(augment.Op):
    """A crop of a user: every second pixel. It takes part in all that the built-in crop does."""

    takes_views: ClassVar[bool] = True
    fuses_flip: ClassVar[bool] = True
    gives_planes: ClassVar[bool] = True

    asked: list = dataclasses.field(default_factory=list, compare=False)
    name: str = "shrink"

    def __call__(self, keys, images, flipped=None, planar=False):
        self.asked.append((flipped is not None, planar))
        images = jnp.repeat(images, len(keys) // len(images), axis=0)[:, ::2, ::2]
        images = images if flipped is None else ops.flip(images, flipped)
        return tuple(jnp.moveaxis(images, -1, 0)) if planar else images, {}


def test_an_operation_needs_a_name_and_a_call_only():
    images = batch(3)
    out, params = augment.Pipeline((Invert(), augment.RandomFlip(p=1.0), Invert()))(keys(6), images)
    chex.assert_trees_all_close(out, augment.to_float(np.repeat(images, 2, axis=0))[:, :, ::-1], atol=1e-6)
    assert list(params) == ["invert", "flip", "invert_2"]
    with pytest.raises(NotImplementedError):
        augment.Pipeline((augment.Op(name="nothing"),))(keys(3), images)


@pytest.mark.parametrize(
    "after, asked",
    [
        ((augment.RandomFlip(), augment.ColorJitter()), (True, True)),
        ((augment.RandomFlip(), Invert(), augment.ColorJitter()), (True, False)),
        ((augment.ColorJitter(), augment.RandomFlip()), (False, True)),
        ((Invert(), augment.RandomFlip(), augment.ColorJitter()), (False, False)),
        ((), (False, False)),
    ],
)
def test_an_operation_of_a_user_can_share_work(after, asked):
    """The values are those of a pipeline whose operations share nothing."""
    shrink, images = Shrink(), batch(4)
    apart = [op for following in after for op in (augment.RandomSolarize(p=0.0), following)]
    results = [augment.Pipeline(ops)(keys(8), images) for ops in ((shrink, *after), (shrink, *apart))]
    assert shrink.asked == [asked, (False, False)]
    (out, params), (want, same) = results
    chex.assert_trees_all_close(out, want, atol=1e-6)
    chex.assert_trees_all_equal(params, {k: v for k, v in same.items() if k in params})


def test_one_channel_is_not_split_for_a_jitter():
    shrink = Shrink()
    with pytest.raises(UserError, match=r"\(4, 8, 7, 1\)"):
        augment.Pipeline((shrink, augment.ColorJitter()))(keys(4), batch(4)[..., :1])
    assert shrink.asked == [(False, False)]


def test_what_is_no_operation_is_refused():
    with pytest.raises(UserError, match="augment"):
        augment.Pipeline((ops.flip,))
    with pytest.raises(UserError, match="fuses_flip"):

        class Misspelt(augment.Op):
            fuse_flip = True


# ---- batches


def test_a_view_is_traced_once_for_each_shape():
    chex.clear_trace_counter()
    view = jax.jit(chex.assert_max_traces(augment.classifier_view(8, MEAN, STD).__call__, n=2))
    for count, seed in ((4, 0), (4, 1), (8, 0), (4, 2)):
        images, params = view(keys(count, seed), batch(count, seed=seed))
        chex.assert_shape(images, (count, 8, 8, 3))
        chex.assert_tree_shape_prefix(params, (count,))


def test_floats_of_bytes_are_refused():
    images = batch(4).astype(np.float32)
    with pytest.raises(UserError, match="255"):
        augment.standard_view(SIZE, MEAN, STD)(keys(4), images)


def test_bad_batches_are_refused(view):
    for bad_keys, images in (
        (keys(4), batch(5)),
        (keys(7), batch(5)),
        (keys(4), batch(4)[0]),
        (jax.random.key_data(keys(4)), batch(4)),
        (jax.random.split(jax.random.key(0, impl="rbg"), 4), batch(4)),
    ):
        with pytest.raises(UserError):
            view(bad_keys, jnp.asarray(images))
