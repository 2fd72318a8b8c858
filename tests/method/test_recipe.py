"""Configs become parts: every refusal in one line, the order of the phases, and every config file of the project."""

import importlib.util
import itertools
import pathlib

import pytest
import tiny

from jaxcl import config as base
from jaxcl.errors import UserError
from jaxcl.method.recipe import Phase
from jaxcl.train import config_diff

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def refusal(c, **facts):
    with pytest.raises(UserError) as error:
        tiny.recipe(c, **facts)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


# ---- refusals


def set_(path, value):
    """A change to a config: set_("stages.0.tap", "stage9")."""

    def change(c):
        *parents, key = path.split(".")
        for p in parents:
            c = c[int(p)] if p.isdigit() else c[p]
        with c.ignore_type():  # as in a config file that builds its own parts
            c[key] = value

    return change


def drop(path):
    def change(c):
        *parents, key = path.split(".")
        for p in parents:
            c = c[p]
        del c[key]

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        # Misspelt options, slot by slot.
        (set_("views.view1.crop_aera", (0.2, 1.0)), "views.view1 has no option 'crop_aera'; did you mean 'crop_area'?"),
        (set_("stages.0.treshold", 0.5), "stages[0] has no option 'treshold'; did you mean 'threshold'?"),
        (set_("passes.0.view", ("view1",)), "passes[0] has no option 'view'; did you mean 'views'?"),
        (set_("terms.supcon.temprature", 0.1), "terms.supcon has no option 'temprature'; did you mean 'temperature'?"),
        (set_("memory.probe.shedule", "online"), "memory.probe has no option 'shedule'; did you mean 'schedule'?"),
        (set_("memory.probe.optimizer.momentun", 0.1), "memory.probe.optimizer has no option 'momentun'"),
        (set_("model.dept", 18), "model has no option 'dept'; did you mean 'depth'?"),
        (set_("optimizer.zzz", 1), "optimizer has no option 'zzz'; expected one of kind, lr, momentum"),
        # Kinds that do not exist.
        (set_("views.view1.kind", "randon"), "views.view1.kind is 'randon'; did you mean 'random'?"),
        (set_("stages.0.kind", "x"), "stages[0].kind is 'x'; expected one of saliency"),
        (set_("terms.supcon.kind", "x"), "terms.supcon.kind is 'x'; expected one of supcon"),
        (set_("memory.probe.kind", "x"), "memory.probe.kind is 'x'; expected one of linear_probe"),
        # Values of another kind.
        (
            set_("terms.supcon.views", "view1"),
            "terms.supcon.views is 'view1'",
        ),
        (set_("model.stage_sizes", 2), "model.stage_sizes is 2"),
        # Views that nothing makes.
        (set_("passes.0.views", ("view1", "view3")), "passes[0] names view 'view3'"),
        (set_("passes.0.views", ("view1", "view2", "view1")), "passes[0] encodes view 'view1' a second time"),
        (set_("stages.0.of", "plain"), "stages[0] names view 'plain'"),
        (set_("stages.0.into", "view9"), "stages[0] names view 'view9'"),
        (
            set_("stages.0.rejected", "backgrounds"),
            "passes[0] names view 'background'",
        ),
        (set_("stages.0.rejected", "view2"), "stages[0] makes view 'view2', which is a view already"),
        (set_("terms.supcon.views", ("view1", "standard")), "terms.supcon names view 'standard'"),
        (set_("terms.supcon.views", ()), "terms.supcon.views is empty"),
        (set_("terms.supcon.background", "bg"), "terms.supcon names view 'bg'"),
        (set_("memory.probe.views", ("standard",)), "memory.probe names view 'standard'"),
        (set_("memory.probe.views", ("background",)), "memory.probe names view 'background'"),
        (set_("memory.probe.schedule", "alternating"), "memory.probe names view 'classifier'"),
        (set_("passes", ()), "a recipe needs at least one pass and one term"),
        (drop("terms.supcon"), "a recipe needs at least one pass and one term"),
        (drop("memory.probe"), "stages[0] needs memory.probe (a linear_probe), which the config lacks"),
        (set_("stages.0.classifier", "prob"), "stages[0] needs memory.prob "),
        # Values out of range.
        (set_("stages.0.tap", "stage3"), "tap 'stage3' is not in this encoder; expected one of stage1, stage2"),
        (set_("stages.0.threshold", 1.5), "stages[0].threshold is 1.5"),
        (set_("stages.0.method", "lime"), "stages[0].method is 'lime'; expected one of grad_cam"),
        (set_("stages.0.target", "true"), "stages[0].target is 'true'; expected one of label, predicted"),
        (set_("stages.0.bn", "none"), "stages[0].bn is 'none'; expected one of batch, running"),
        (set_("stages.0.background_capacity", 0.0), "stages[0].background_capacity is 0.0"),
        (set_("memory.probe.schedule", "sometimes"), "memory.probe.schedule is 'sometimes'; expected one of online"),
        (set_("terms.supcon.temperature", 0.0), "terms.supcon.temperature is 0.0; expected a number above 0"),
        (set_("terms.supcon.anchors", "one"), "terms.supcon.anchors is 'one'; expected one of all, first"),
        (set_("terms.supcon.anchor_mean", "x"), "terms.supcon.anchor_mean is 'x'; expected one of all, positive"),
        (set_("model.depth", 20), "model.depth is 20; expected one of 18"),
        (set_("optimizer.lr", -0.1), "optimizer.lr is -0.1"),
        (set_("memory.probe.optimizer.schedule", "x"), "memory.probe.optimizer.schedule is 'x'; expected one of"),
        (set_("memory.probe.optimizer.kind", "x"), "memory.probe.optimizer.kind is 'x'; expected one of sgd"),
        (set_("views.view1.crop_area", (0.5, 0.2)), "low above high"),
        (set_("views.view1.flip", 2.0), "views.view1.flip is 2.0"),
        (set_("size", -1), "-1"),
        # Durations.
        (set_("duration", "4 epoches"), "duration is '4 epoches'; expected a duration"),
        (set_("duration", "50%"), "duration is '50%', but percent"),
        (set_("duration", "1 example"), "duration '1 example' is less than one step"),
        (set_("stages.0.start", "some"), "stages[0].start is 'some'; expected a duration"),
        (set_("stages.0.start", "120%"), "stages[0].start is '120%'; expected at most 100%"),
        (set_("optimizer.warmup", "1 week"), "optimizer.warmup is '1 week'; expected a duration"),
        (set_("batch_size", 0), "batch_size 0"),
    ],
)
def test_refusals(change, words):
    c = tiny.config()
    change(c)
    assert words in refusal(c)


def test_refusals_by_the_words_of_a_config():
    with pytest.raises(UserError, match="SaliencyMask has no option 'treshold'; did you mean 'threshold'?"):
        base.stage("saliency", treshold=0.5)
    with pytest.raises(UserError, match="'salience'; did you mean 'saliency'?"):
        base.stage("salience")
    with pytest.raises(UserError, match="no option 'learning_rate'"):
        base.memory("linear_probe", optimizer=dict(learning_rate=1.0))


@pytest.mark.parametrize("value", ["high", None, (1, 2)])
def test_a_value_of_another_type(value):
    c = tiny.config()
    with c.stages[0].ignore_type():
        c.stages[0].threshold = value
    assert f"stages[0].threshold is {value!r}; expected a number" in refusal(c)


def test_refusals_by_the_facts_of_the_data_and_the_machine():
    assert refusal(tiny.config(), num_devices=3) == "batch_size 16 does not divide over 3 devices; use a multiple of 3"
    text = refusal(tiny.config(), num_examples=15)
    assert text == "batch_size 16 is larger than the training set (15 images); use a smaller one"
    assert refusal(tiny.config(), labelled=False).startswith("terms.supcon needs a label on every training image")
    c = tiny.config(stage=False)
    c.terms.supcon.labels = False
    assert refusal(c, labelled=False).startswith("memory.probe needs a label")
    del c.memory.probe
    tiny.recipe(c, labelled=False)  # SimCLR without a probe needs none
    c = tiny.config(background_capacity=0.4)
    assert "background_capacity gives 6 rows, which do not divide over 4 devices" in refusal(c, num_devices=4)
    tiny.recipe(c, num_devices=2)


# ---- phases


def runs(recipe):
    """[(phase, how many updates in a row)] of the whole run."""
    phases = [recipe.phase(step) for step in range(recipe.total_steps)]
    return [(phase, len(list(group))) for phase, group in itertools.groupby(phases)]


def test_online_phases():
    recipe = tiny.recipe(tiny.config(epochs=4, start="25%"))
    assert (recipe.steps_per_epoch, recipe.encoder_steps, recipe.total_steps) == (4, 16, 16)
    assert runs(recipe) == [(Phase("encoder"), 4), (Phase("encoder", (0,)), 12)]
    assert runs(tiny.recipe(tiny.config(start="0"))) == [(Phase("encoder", (0,)), 16)]
    assert runs(tiny.recipe(tiny.config(start="100%"))) == [(Phase("encoder"), 16)]
    assert runs(tiny.recipe(tiny.config(stage=False))) == [(Phase("encoder"), 16)]


def test_alternating_phases_are_the_authors():
    """An epoch of the encoder, an epoch of the probe; exp_epochs = 3: two plain epochs, then explained ones."""
    recipe = tiny.recipe(tiny.config(schedule="alternating", epochs=4, start="2 epochs"))
    plain, explained, probe = Phase("encoder"), Phase("encoder", (0,)), Phase("probe")
    assert recipe.total_steps == 32
    assert runs(recipe) == [(p, 4) for p in (plain, probe, plain, probe, explained, probe, explained, probe)]
    done = 0
    for step in range(recipe.total_steps):
        assert recipe.encoder_step(step) == done
        done += recipe.phase(step).learns == "encoder"
    assert done == recipe.encoder_steps == recipe.encoder_step(recipe.total_steps)


def test_sequential_phases():
    recipe = tiny.recipe(tiny.config(schedule="sequential", epochs=2, stage=False))
    assert runs(recipe) == [(Phase("encoder"), 8), (Phase("probe"), 8)]
    text = refusal(tiny.config(schedule="sequential"))  # an explainer that has learnt nothing
    assert "memory.probe" in text and "'sequential'" in text


@pytest.mark.parametrize("schedule", ["alternating", "sequential"])
@pytest.mark.parametrize("steps", [1, 3, 4, 6, 9])
def test_a_part_of_an_epoch(schedule, steps):
    """Whatever the length, the encoder and the probe get the same number of updates."""
    c = tiny.config(schedule=schedule, stage=False)
    c.duration = f"{steps} steps"
    recipe = tiny.recipe(c)
    learns = [recipe.phase(s).learns for s in range(recipe.total_steps)]
    assert learns.count("encoder") == learns.count("probe") == steps
    assert learns[0] == "encoder" and learns[-1] == "probe"


def test_views_that_run():
    recipe = tiny.recipe(tiny.config(schedule="alternating"))
    assert set(recipe.views) == {"view1", "view2", "standard", "classifier"}
    assert recipe.view_names(Phase("encoder")) == ("view1", "view2")
    assert recipe.view_names(Phase("encoder", (0,))) == ("standard", "view1", "view2")


def test_durations_and_sizes():
    c = tiny.config()
    c.size = 0
    recipe = tiny.recipe(c, num_examples=79, image_shape=(24, 24, 3))
    assert recipe.steps_per_epoch == 4  # the last partial batch is dropped
    assert recipe.image_shape == (24, 24, 3)
    assert recipe.stages[0].capacity(16) == 16


# ---- the project's own configs


class _Axes(Exception):
    pass


def presets(path, monkeypatch):
    """Every preset of a config file, by asking what its `choose` offers."""
    module = load(path)
    axes = []

    def record(argument, *offered):
        axes.extend(offered)
        raise _Axes

    with monkeypatch.context() as m:
        m.setattr(base, "choose", record)
        try:
            module.get_config()
        except _Axes:
            pass
    return module, [",".join(words) for words in itertools.product(*axes)]


def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FACTS = {
    "garments": dict(num_examples=12_000, num_classes=10),
    "cifar10": dict(num_examples=50_000, num_classes=10),
    "cifar100": dict(num_examples=50_000, num_classes=100),
    "tiny_imagenet": dict(num_examples=100_000, num_classes=200, image_shape=(64, 64, 3)),
    "stl10": dict(num_examples=100_000, num_classes=10, image_shape=(96, 96, 3)),
    "imagenet100": dict(num_examples=126_689, num_classes=100, image_shape=(224, 224, 3)),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_preset_of_every_config_builds(path, monkeypatch):
    module, words = presets(path, monkeypatch)
    assert words
    if len(words) > 300:  # every seventh, by which the words of each axis are all met
        words = words[::7]
    names, refused = set(), set()
    for preset in words:
        try:
            c = module.get_config(preset)
        except UserError as error:  # words that do not go together
            assert any(
                reason in str(error)
                for reason in ("leaves nothing to learn", "needs labels", "resnet18 is a recipe of")
            ), preset
            refused.add(preset)
            continue
        facts = next((f for name, f in FACTS.items() if name in preset), FACTS["garments"])
        facts = dict(image_shape=(32, 32, 3), labelled=True) | facts
        if "sequential" in preset and c.stages:  # refused, and not silently explained by a classifier not yet trained
            assert "'sequential'" in refusal(c, **facts)
            continue
        recipe = tiny.recipe(c, **facts)
        assert recipe.total_steps >= 1 and recipe.num_classes == facts["num_classes"]
        assert recipe.phase(recipe.total_steps - 1)
        names.add(c.name)
        flat = config_diff.flatten(base.to_dict(c))
        assert flat["batch_size"] == recipe.batch_size
        same = base.to_dict(module.get_config(preset))
        assert config_diff.fingerprint(base.to_dict(c)) == config_diff.fingerprint(same)
    assert len(refused) < len(words) / 2
    words = [w for w in words if w not in refused]
    kept = [w for w in words if "sequential" not in w or not module.get_config(w).stages]
    assert len(names) == len(kept)  # two runs are told apart by their names
    with pytest.raises(UserError, match="unknown preset 'garmnets'"):
        module.get_config("garmnets")


# ---- presets and small words


def test_choose():
    axes = ("garments", "cifar10"), ("exconb", "excon")
    assert base.choose("", *axes) == ("garments", "exconb")
    assert base.choose(None, *axes) == ("garments", "exconb")
    assert base.choose("excon, cifar10", *axes) == ("cifar10", "excon")
    with pytest.raises(UserError, match="names both 'garments' and 'cifar10'; choose one"):
        base.choose("garments,cifar10", *axes)
    with pytest.raises(UserError, match="unknown preset 'cifr10'; did you mean 'cifar10'?"):
        base.choose("cifr10", *axes)


def test_own_moments_of_the_data():
    """cases E.6: data.mean and data.std normalise the views in place of what the source has."""
    c = tiny.config()
    c.data.mean, c.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    recipe = tiny.recipe(c)
    assert (recipe.mean, recipe.std) == (c.data.mean, c.data.std)
    normalize = recipe.views["view2"].ops[-1]
    assert (normalize.mean, normalize.std) == (c.data.mean, c.data.std)
    for key, value in (("mean", ()), ("std", ()), ("std", (0.5,)), ("mean", (0.1, 0.2))):
        broken = tiny.config()
        broken.data.mean, broken.data.std = c.data.mean, c.data.std
        broken.data[key] = value
        with pytest.raises(UserError, match=rf"^data\.{key} "):
            tiny.recipe(broken)
    broken.data.mean, broken.data.std = c.data.mean, (0.5, 0.0, 0.5)
    with pytest.raises(UserError, match=r"^data\.std "):
        base.check(broken)
