"""The contract of an encoder, with two that only this file knows: the smallest one, and one with everything."""

import dataclasses
from typing import Annotated

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from model_options import model_of, refused

import jaxcl
from jaxcl import config as configs
from jaxcl.commands.export import export
from jaxcl.errors import UserError
from jaxcl.models import Encoder, EncoderOptions, Model, make_model, weights
from jaxcl.models.cpu import loop_conv
from jaxcl.models.layers import conv, relu
from jaxcl.models.norms import add_norms, apply_norm
from jaxcl.models.torch_layout import TorchLayout
from jaxcl.runtime.options import OptionError, Range
from jaxcl.train.runs import open_run


class Pixels(Encoder):
    """Only what is required."""

    features: int = 8

    @nn.compact
    def __call__(self, x, train=False, where=None, norm_set=""):
        return nn.Dense(self.features)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class PixelsOptions(EncoderOptions):
    width: Annotated[int, Range(1)] = 8

    def make(self, dtype):
        return Pixels(self.width)


class Layout(TorchLayout):
    """A prefix, and kernels the other way round."""

    network = "the network of these tests (net.conv0.kernel, ...)"

    def recognises(self, names):
        return any(name.startswith("net.") for name in names)

    def ignores(self, name):
        return name == "net.counter"

    def to_torch(self, variables):
        return {f"net.{k}": v.T for k, v in variables.items()}

    def from_torch(self, state):
        return {k.removeprefix("net."): v.T for k, v in state.items()}

    def architecture(self, variables):
        return {"width": variables["params.conv0.kernel"].shape[-1]}


class Convs(Encoder):
    """Two stages with batch norms in sets, a tap after the first, dropout, and a convolution that can be replaced."""

    width: int = 8
    norm_sets: tuple = ()
    momentum: float = 0.9
    norm_set_momentum: float = 0.99
    dtype: object = jnp.float32
    convolution: object = None
    norm = "batch"
    takes_key = True
    num_stages = 2
    taps = ("stage1",)

    @property
    def features(self):
        return 2 * self.width

    def setup(self):
        for i in range(2):
            setattr(self, f"conv{i}", conv(2**i * self.width, 3, 2, self.dtype, self.convolution))
            add_norms(self, f"bn{i}", 2**i * self.width)

    def _stage(self, i, x, train, where, norm_set):
        mode = dict(use_running_average=not train, where=where if train else None, norm_set=norm_set)
        return relu(apply_norm(self, f"bn{i}", getattr(self, f"conv{i}")(x), mode))

    def maps(self, x, train=False, where=None, norm_set="", depth=0):
        maps = []
        for i in range(depth or 2):
            x = self._stage(i, x, train, where, norm_set)
            maps.append(x)
        return maps

    def __call__(self, x, train=False, where=None, norm_set="", key=None):
        h = self.maps(x, train, where, norm_set)[-1].mean((1, 2))
        return h if key is None or not train else h * jax.random.bernoulli(key, 0.5, h.shape)

    def to_tap(self, x, tap, train=False, where=None, norm_set=""):
        return self._stage(0, x, train, where, norm_set), None

    def from_tap(self, a, rest, tap, train=False, where=None, norm_set=""):
        return self._stage(1, a, train, where, norm_set).mean((1, 2))

    @nn.nowrap
    def adapter(self, stage):
        return Mean(self.features)

    @nn.nowrap
    def with_convolution(self, convolution):
        return self.clone(convolution=convolution)


class Mean(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train=False, where=None, norm_set=""):
        return nn.Dense(self.features)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class ConvsOptions(EncoderOptions):
    torch_layout = Layout()

    width: Annotated[int, Range(1)] = 8
    norm_sets: tuple[str, ...] = ()
    branches: tuple[int, ...] = ()
    head_embeds: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.width % 2:
            raise OptionError("width", f"is {self.width}; expected an even number")

    def make(self, dtype):
        return Convs(self.width, norm_sets=tuple(self.norm_sets), dtype=dtype)


PIXELS, CONVS = f"{__name__}:PixelsOptions", f"{__name__}:ConvsOptions"
IMAGES = tiny.normal(4, tiny.SIDE, tiny.SIDE, 3)


def test_the_smallest_encoder_goes_through_the_model():
    model = model_of(PIXELS, width=6, head_features=5)
    params, stats = model.init(jax.random.key(0), (tiny.SIDE, tiny.SIDE, 3))
    assert stats == {} and (model.features, model.embedding_features, model.num_stages) == (6, 5, 0)
    for train in (True, False):
        h, new = model.encode(params, stats, IMAGES, train=train, key=jax.random.key(1))  # it takes none
        z, new = model.embed(params, new, h, train=train)
        chex.assert_shape((h, z), [(4, 6), (4, 5)])
        assert new == {}
    assert model.batch_statistics(params, stats, IMAGES) == {} and model.move_statistics(stats, {}) == {}
    assert not model.batch_norm and model.for_loops() is model
    for call, words in (
        (lambda: model.check_tap("stage1"), "expected none"),
        (lambda: model.check_norm_set("norm_set", "adv"), "norm_set is 'adv'; expected ''"),
        (lambda: model.check_depth("depth", 1), "depth is 1; expected one of 0"),
        (lambda: model.maps(params, stats, IMAGES), "no stages"),
    ):
        with pytest.raises(UserError, match=words):
            call()


@pytest.mark.parametrize("norm_set", ["", "adv"])
def test_an_encoder_with_everything_goes_through_the_model(norm_set):
    model = model_of(CONVS, norm_sets=("adv",), branches=(1,), head_embeds=("jitter",), head_features=5)
    params, stats = tiny.model_variables(model)
    where = np.array([True, True, True, False])

    @jax.jit
    def run(params, stats):
        named = dict(train=True, norm_set=norm_set)
        h, new = model.encode(params, stats, IMAGES, **named)
        a, tail, _ = model.split_at(params, stats, IMAGES, "stage1", **named)
        own = model.batch_statistics(params, stats, IMAGES, norm_set=norm_set)
        dropped, _ = model.encode(params, stats, IMAGES, key=jax.random.key(0), **named)
        shallow, _ = model.encode(params, stats, IMAGES, depth=1, **named)
        z, _ = model.embed(params, new, shallow, depth=1, aug_params={"jitter": jnp.ones((4, 4))}, **named)
        padded, _ = model.encode(params, stats, IMAGES, where=where, **named)
        looped, _ = model.for_loops().encode(params, stats, IMAGES, **named)
        moved = model.move_statistics(stats, own, norm_set)
        return (h, new), tail(a), moved, dropped, z, padded, looped

    (h, new), halves, moved, dropped, z, padded, looped = run(params, stats)
    chex.assert_trees_all_close((h, new), halves, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new, moved | {k: v for k, v in new.items() if k not in moved}, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(h, looped, rtol=1e-5, atol=1e-6)
    chex.assert_shape((h, z), [(4, 16), (4, 5)])
    assert np.isclose(np.asarray(dropped), 0).mean() > 0.2 and np.abs(padded - h)[:3].max() > 1e-4
    assert model.for_loops().encoder.convolution is loop_conv
    assert {k: np.abs(new[k]["mean"] - stats[k]["mean"]).max() > 0 for k in ("bn1", "bn1_adv")} == {
        "bn1": not norm_set,
        "bn1_adv": bool(norm_set),
    }
    assert [m.shape for m in model.maps(params, stats, IMAGES)] == [(4, 8, 8, 8), (4, 4, 4, 16)]


@pytest.mark.parametrize("kind, layout", [(PIXELS, "jaxcl"), (CONVS, "jaxcl"), (CONVS, "torch")])
def test_a_run_of_a_foreign_encoder_is_exported_and_loaded(kind, layout, tmp_path):
    c = tiny.config(stage=False, background=False)
    c.model = configs.model(kind, width=6, head_features=12)
    c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
    state = tiny.saved_run(tmp_path / "run", c)
    path = export(open_run(tmp_path / "run"), tmp_path / "out", layout=layout)
    backbone = jaxcl.load_backbone(path)
    saved = weights.flat(state.params["encoder"], {})
    found = weights.flat(backbone.variables["params"], {})
    chex.assert_trees_all_equal(found, saved)
    chex.assert_shape(backbone(np.zeros((2, 16, 16, 3), np.uint8)), (2, backbone.features))
    text = repr(backbone)
    assert kind in text and "\n" not in text and len(text) < 200


def test_published_weights_in_a_torch_layout(tmp_path):
    """A file without a description: the kind that the config names recognises it."""
    model = model_of(CONVS, width=6, head_features=0)
    params, stats = tiny.model_variables(model)
    ours = weights.flat(params["encoder"], stats)
    state = {k: np.ascontiguousarray(v) for k, v in Layout().to_torch(ours).items()}
    file = tmp_path / "published.safetensors"
    safetensors.numpy.save_file(state | {"net.counter": np.zeros(1, np.int64)}, file)
    found = weights.read(file, kind=CONVS)
    assert weights.architecture(found) == {"kind": CONVS, "width": 6} and not found.about
    chex.assert_trees_all_equal(weights.fit("it", found.variables, model, (16, 16, 3)), (params["encoder"], stats))
    with pytest.raises(UserError, match="expected an export of jaxcl"):
        weights.read(file)  # no built-in encoder knows these names


def test_layouts_by_kind():
    assert isinstance(weights.torch_layout(CONVS), Layout)
    for kind in (PIXELS, "vit"):
        with pytest.raises(UserError, match="no torch layout"):
            weights.torch_layout(kind)


@pytest.mark.parametrize(
    "key, options",
    [
        ("width", dict(width=3)),
        ("width", dict(width=0)),
        ("head_features", dict(head_features=-1)),
        ("head_norm", dict(head_norm="layer")),
        ("dtype", dict(dtype="float16")),
    ],
)
def test_impossible_options_are_refused_by_key(key, options):
    refused(key, CONVS, **options)


def test_an_option_that_a_kind_lacks_is_refused():
    for kind in (PIXELS, "vit"):
        with pytest.raises(UserError, match="^model has no option 'branches'"):
            model_of(kind, branches=(1,))


@pytest.mark.parametrize(
    "base, name, meant",
    [
        (Encoder, "takes_keys", "takes_key"),
        (Encoder, "to_tab", "to_tap"),
        (Encoder, "num_stage", "num_stages"),
        (EncoderOptions, "torch_layouts", "torch_layout"),
        (TorchLayout, "recognizes", "recognises"),
    ],
)
def test_a_misspelt_attribute_is_refused(base, name, meant):
    with pytest.raises(UserError, match=f"'{name}'; did you mean '{meant}'"):
        type("Other", (base,), {name: None})


def test_batch_norms_must_be_declared():
    class Undeclared(Encoder):
        features = 3

        @nn.compact
        def __call__(self, x, train=False, where=None, norm_set=""):
            return nn.BatchNorm(use_running_average=not train)(x).mean((1, 2))

    model = Model(Undeclared(), make_model(PixelsOptions()).head)
    with pytest.raises(UserError, match="Undeclared .*'batch'"):
        model.init(jax.random.key(0), (8, 8, 3))


def test_features_must_be_declared():
    class Featureless(Encoder):
        pass

    @dataclasses.dataclass(frozen=True)
    class FeaturelessOptions(EncoderOptions):
        def make(self, dtype):
            return Featureless()

    with pytest.raises(UserError, match="Featureless.features"):
        make_model(FeaturelessOptions())


@pytest.mark.parametrize("kind", ["resnet", "vit", PIXELS, CONVS])
def test_the_defaults_are_those_of_a_config(kind):
    assert model_of(**configs.model(kind)) == model_of(kind)
