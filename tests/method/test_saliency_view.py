"""The saliency-masked view: the authors' view lists, room for backgrounds, and every switch."""

import dataclasses
from typing import Any

import golden_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl import saliency
from jaxcl.errors import UserError
from jaxcl.method.inputs import run_stages
from jaxcl.method.memory import InitContext as Start
from jaxcl.method.recipe import Phase
from jaxcl.method.stages.base import StageContext as Context
from jaxcl.method.stages.saliency import SaliencyMask, _drawn
from jaxcl.method.state import TrainState
from jaxcl.method.views import View


@dataclasses.dataclass(frozen=True)
class GoldenModel:
    """The golden network as a Model: its features are its logits. The statistics count what was normalised."""

    d: dict[str, Any]

    def split_at(self, params, stats, image, tap, *, train):
        def tail(a):
            return golden_net.tail(self.d, a, train=train), {k: v + train for k, v in stats.items()}

        return golden_net.head(self.d, image), tail, {**stats, "heads": stats["heads"] + train}

    def encode(self, params, stats, image, *, train, where=None):
        stats = {k: v + train for k, v in stats.items()}
        return golden_net.logits(self.d, image, train=train), stats


def context(d, *, bias=0.0, **changes):
    """`bias` on every image's own class: +100 makes the classifier always right, -100 always wrong; the maps stay."""
    label = jnp.asarray(d["labels"], jnp.int32)
    return Context(
        model=GoldenModel(d),
        params={},
        batch_stats={"heads": jnp.zeros((), int), "tails": jnp.zeros((), int)},
        memory={},
        pixels=jnp.asarray(d["images"], jnp.float32) * 0.25 + 0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        label=label,
        classifier=lambda memory, h: h + bias * jax.nn.one_hot(label, h.shape[-1]),
        augment=None,
        loss=None,
        reads=None,
        embed=None,
        keys=None,
    )._replace(**changes)


def views(d):
    f32 = {k: jnp.asarray(d[k], jnp.float32) for k in ("images", "random_crop_backup", "random_crop_view2")}
    drawn = {"flip": jnp.arange(len(d["images"])) % 2 == 0}
    return {
        "standard": View(f32["images"], {}),
        "view1": View(f32["random_crop_backup"], drawn),
        "view2": View(f32["random_crop_view2"], drawn),
    }


NAMES = ("gradcam_cifar_eval_bn", "gradcam_cifar_train_bn")
B = 8
# name -> (options of the stage, bias of the classifier)
VARIANTS = {
    "excon": (dict(), 0),
    "exconb": (dict(rejected="background"), 0),
    "all accepted": (dict(rejected="background"), 100),
    "none accepted": (dict(rejected="background"), -100),
    "room for 3": (dict(rejected="background", background_capacity=0.375), 0),
    "room for 7": (dict(rejected="background", background_capacity=0.875), 0),
    "room for 7, all accepted": (dict(rejected="background", background_capacity=0.875), 100),
    "relu": (dict(rejected="background", relu=True), -100),
    "other bn": (dict(rejected="background"), -100),
    "predicted": (dict(rejected="background", target="predicted"), -100),
    "input_gradient": (dict(rejected="background", method="input_gradient"), -100),
    "integrated_gradients": (dict(rejected="background", method="integrated_gradients"), -100),
    "input_gradient of the predicted": (dict(rejected="background", method="input_gradient", target="predicted"), -100),
    "integrated_gradients of the predicted": (
        dict(rejected="background", method="integrated_gradients", target="predicted"),
        -100,
    ),
    "input_gradient, other bn": (dict(rejected="background", method="input_gradient"), -100),
    "committed": (dict(commit_updates=True), 0),
    "committed, input_gradient": (dict(commit_updates=True, method="input_gradient"), 0),
    "threshold 1": (dict(rejected="background", threshold=1.0), -100),
    "threshold 0": (dict(rejected="background", threshold=0.0), -100),
}


@pytest.fixture(scope="module", params=NAMES)
def ran(request, golden):
    """-> (golden arrays, what every variant gave), all variants in one program."""
    d = golden("excon", request.param)
    own = "batch" if d["bn_train_mode"] else "running"
    other = {"batch": "running", "running": "batch"}[own]

    @jax.jit
    def run(views):
        outs = {}
        for name, (options, bias) in VARIANTS.items():
            bn = other if "other bn" in name else "batch" if "committed" in name else own
            outs[name] = SaliencyMask(bn=bn, **options)(context(d, bias=bias), views)._asdict()
        return outs

    return d, jax.device_get(run(views(d)))


def same_images(got, want):
    """Equal to float32, and removed in the same pixels."""
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got == 0, np.float32(want) == 0)


def masked_by(d, keep):
    return np.where(np.asarray(keep)[..., None], d["images"], 0)


# ---- the authors' lists


def test_excon_replaces_what_is_accepted(ran):
    d, outs = ran
    out = outs["excon"]
    assert set(out["views"]) == {"view1"} and out["batch_stats"] is None
    same_images(out["views"]["view1"].image, d["neg0_view1"])
    # What is masked was not flipped, whatever was drawn for the view that it replaces.
    flips = (np.arange(B) % 2 == 0) & ~np.asarray(d["accepted"], bool)
    np.testing.assert_array_equal(out["views"]["view1"].params["flip"], flips)
    assert out["views"]["view1"].where is None
    np.testing.assert_allclose(out["metrics"]["saliency/accepted"], d["accepted"].mean())
    np.testing.assert_allclose(out["metrics"]["saliency/kept_area"], d["keep_mask"].mean(), rtol=1e-6)
    assert 0 < d["accepted"].sum() < B


def test_exconb_appends_what_is_rejected(ran):
    """To both views, in index order, with a label of its own: here one view of padded rows."""
    d, outs = ran
    out = outs["exconb"]
    assert set(out["views"]) == {"view1", "background"}
    background = out["views"]["background"]
    np.testing.assert_array_equal(background.where, ~d["accepted"])
    rows = background.image[background.where]
    for view, key in ((out["views"]["view1"].image, "neg1_view1"), (d["random_crop_view2"], "neg1_view2")):
        same_images(np.concatenate([view, rows]), d[key])
    K = int((~d["accepted"]).sum())
    assert out["metrics"]["saliency/backgrounds"] == K and out["metrics"]["saliency/backgrounds_dropped"] == 0
    assert (d["neg1_labels"] == d["background_label"]).sum() == K


def test_all_accepted(ran):
    d, outs = ran
    out = outs["all accepted"]
    same_images(out["views"]["view1"].image, d["masked_images"])
    assert not out["views"]["background"].where.any()
    assert out["metrics"]["saliency/accepted"] == 1 and out["metrics"]["saliency/backgrounds"] == 0


def test_none_accepted(ran):
    d, outs = ran
    out = outs["none accepted"]
    same_images(out["views"]["view1"].image, d["random_crop_backup"])
    assert out["views"]["background"].where.all()
    same_images(out["views"]["background"].image, d["masked_images"])
    assert out["metrics"]["saliency/accepted"] == 0 and out["metrics"]["saliency/backgrounds"] == B


# ---- room for backgrounds


def test_little_room_keeps_the_first_and_counts_the_rest(ran):
    d, outs = ran
    out, rejected = outs["room for 3"], np.flatnonzero(~d["accepted"])
    assert len(rejected) > 3
    background = out["views"]["background"]
    assert background.where.all()
    same_images(background.image, d["masked_images"][rejected[:3]])
    assert out["metrics"]["saliency/backgrounds"] == 3
    assert out["metrics"]["saliency/backgrounds_dropped"] == len(rejected) - 3


def test_some_room_is_padded(ran):
    d, outs = ran
    out, rejected = outs["room for 7"], np.flatnonzero(~d["accepted"])
    background = out["views"]["background"]
    assert background.image.shape[0] == 7 and len(rejected) < 7
    np.testing.assert_array_equal(background.where, np.arange(7) < len(rejected))
    same_images(background.image[: len(rejected)], d["masked_images"][rejected])
    assert out["metrics"]["saliency/backgrounds_dropped"] == 0
    assert not outs["room for 7, all accepted"]["views"]["background"].where.any()


# ---- switches


def chain(d, *, train, relu=False, target=None):
    """The same maps from the parts, without the stage."""
    images = jnp.asarray(d["images"], jnp.float32)

    @jax.jit
    def keep(images):
        a = golden_net.head(d, images)
        targets = d["labels"] if target is None else target
        cam = saliency.grad_cam(lambda a: golden_net.tail(d, a, train=train), a, targets, relu=relu)
        return saliency.keep_mask(saliency.normalize_map(cam, images.shape[1]), 0.5)

    return keep(images)


def test_relu(ran):
    d, outs = ran
    same_images(outs["relu"]["views"]["background"].image, masked_by(d, d["keep_mask_relu"]))
    assert (d["keep_mask"] != d["keep_mask_relu"]).any()


def test_bn_switch(ran):
    d, outs = ran
    keep = chain(d, train=not d["bn_train_mode"])
    same_images(outs["other bn"]["views"]["background"].image, masked_by(d, keep))
    assert (np.asarray(keep) != d["keep_mask"]).any()


def test_target_switch(ran):
    """The classifier that is wrong about every image explains the best class that is not the true one."""
    d, outs = ran
    wrong = d["logits"].copy()
    wrong[np.arange(B), d["labels"]] = -np.inf
    keep = chain(d, train=bool(d["bn_train_mode"]), target=wrong.argmax(-1))
    same_images(outs["predicted"]["views"]["background"].image, masked_by(d, keep))
    assert (np.asarray(keep) != d["keep_mask"]).any()


@pytest.mark.parametrize(
    "name",
    [
        "input_gradient",
        "integrated_gradients",
        "input_gradient of the predicted",
        "integrated_gradients of the predicted",
        "input_gradient, other bn",
    ],
)
def test_other_explainers(ran, name):
    """Of the true class, and of the best other one for a classifier that is always wrong; by either statistics.

    cases F.
    """
    d, outs = ran
    train = bool(d["bn_train_mode"]) != ("other bn" in name)

    @jax.jit
    def keep(images):
        logits = lambda x: golden_net.logits(d, x, train=train)  # noqa: E731
        predicted = (logits(images) - 100 * jax.nn.one_hot(d["labels"], d["logits"].shape[1])).argmax(-1)
        target = predicted if "predicted" in name else d["labels"]
        maps = getattr(saliency, name.split()[0].strip(","))(logits, images, target)
        return saliency.keep_mask(saliency.normalize_map(maps), 0.5)

    want = np.asarray(keep(jnp.asarray(d["images"], jnp.float32)))
    got = np.any(outs[name]["views"]["background"].image != 0, axis=-1)
    assert 0 < want.mean() < 1
    assert (got != want).mean() < 1e-3  # a pixel at the threshold may fall either way in float32
    assert (want != d["keep_mask"]).any()
    of_label = outs[name.split()[0].strip(",")]["views"]["background"].image
    assert " " not in name or (outs[name]["views"]["background"].image != of_label).any()


def test_thresholds_at_the_ends(ran):
    d, outs = ran
    assert not outs["threshold 1"]["views"]["background"].image.any()
    kept = np.any(outs["threshold 0"]["views"]["background"].image != 0, axis=-1)
    clear = (d["cam_normalised"] == 0) | (d["cam_normalised"] > 1e-6)  # float32 may round the rest either way
    np.testing.assert_array_equal(kept[clear], d["cam_normalised"][clear] > 0)
    assert clear.mean() > 0.99 and kept.mean() > 0.9


def test_updates_of_the_statistics(ran):
    _, outs = ran
    # One forward to explain and one to test, every layer of each once.
    assert outs["committed"]["batch_stats"] == {"heads": 2, "tails": 2}
    assert outs["committed, input_gradient"]["batch_stats"] == {"heads": 2, "tails": 2}
    assert all(outs[name]["batch_stats"] is None for name in VARIANTS if "committed" not in name)


def test_running_statistics_are_never_moved(golden):
    d = golden("excon", NAMES[0])
    out = SaliencyMask(bn="running", commit_updates=True)(context(d), views(d))
    assert out.batch_stats is None


def test_augmented_masks(golden):
    """Accepted images pass once more through the view's own pipeline, as pixels, under a name of their own."""
    d = golden("excon", NAMES[1])
    calls = []

    def augment(pipeline, name, pixels):
        calls.append((pipeline, name, pixels))
        return View(pixels + 7, {})

    out = SaliencyMask(augment=True)(context(d, augment=augment), views(d))
    ((pipeline, name, pixels),) = calls
    assert (pipeline, name) == ("view1", "view1/masked")
    keep = d["keep_mask"][..., None]
    want = np.where(keep, d["images"] * 0.25 + 0.5, 0.5)
    np.testing.assert_allclose(pixels, want, rtol=1e-6, atol=1e-6)
    accepted = d["accepted"][:, None, None, None]
    want = np.where(accepted, want + 7, d["random_crop_backup"])
    np.testing.assert_allclose(out.views["view1"].image, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="augment=True needs views of the images' own size"):
        small = context(d, pixels=jnp.zeros((B, 16, 16, 3)), augment=augment)
        SaliencyMask(augment=True)(small, views(d))


# ---- inside the update


def test_no_gradient_passes_the_stage():
    """Map, mask and acceptance are constants of the update: the gradient is zero, not small."""
    recipe = tiny.recipe(tiny.config())
    params, stats = tiny.model_variables(recipe.model)
    part, tx = recipe.memory["probe"], recipe.memory_tx["probe"]
    start = Start(recipe.model.features, tiny.CLASSES, None, None, tx)
    probe = tiny.fill(jax.eval_shape(lambda: part.init(jax.random.key(0), start)))
    batch = {k: jnp.asarray(v) for k, v in tiny.batch().items()}
    image = jnp.asarray(tiny.normal(16, 16, 16, 3))
    drawn = {n: View(image + i, {}) for i, n in enumerate(("standard", "view1", "view2"))}

    def total(params, probe):
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key(0),
            params=params,
            batch_stats=stats,
            opt_state=(),
            memory={"probe": probe},
        )
        views, _, _ = run_stages(recipe, Phase("encoder", (0,)), state, batch, drawn)
        return sum((v.image**2).sum() for v in views.values())

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), allow_int=True))(params, probe)
    assert value > 0
    for g in jax.tree.leaves(grads):
        assert g.dtype == jax.dtypes.float0 or not np.asarray(g).any()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(method="shap"), "method is 'shap'; expected one of grad_cam, input_gradient, integrated_gradients"),
        (dict(threshold=-0.1), "threshold is -0.1; expected a number from 0 to 1"),
        (dict(background_capacity=1.1), "background_capacity is 1.1; expected a number above 0, at most 1"),
        (dict(target="both"), "target is 'both'; expected one of label, predicted"),
        (dict(bn="frozen"), "bn is 'frozen'; expected one of batch, running"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError) as error:
        SaliencyMask(**options)
    assert str(error.value).startswith(words)


def test_an_accepted_row_was_not_drawn_like_the_view_it_replaces():
    """Heads may be told what was drawn: of a masked standard view, nothing was, or what its own pipeline drew."""
    accepted = jnp.array([True, False])
    backup = {"jitter": jnp.full((2, 4), 0.7), "flip": jnp.array([True, True]), "tilt": jnp.array([3.0, 4.0])}
    drawn = _drawn(accepted, {"jitter": jnp.full((2, 4), 0.9)}, backup)
    np.testing.assert_array_equal(drawn["jitter"], np.float32([[0.9] * 4, [0.7] * 4]))
    np.testing.assert_array_equal(drawn["flip"], [False, True])
    np.testing.assert_array_equal(_drawn(accepted, {}, backup)["jitter"], np.float32([[1, 1, 1, 0], [0.7] * 4]))
    assert drawn["flip"].dtype == bool and drawn["tilt"] is backup["tilt"]  # which no head is told
