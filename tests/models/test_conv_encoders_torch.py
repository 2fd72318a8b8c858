"""EfficientNet-Lites and ConvNeXts against timm, torchvision and transformers: every stage and the features."""

import json
import math
import pathlib

import conv_originals as originals
import jax
import numpy as np
import pytest
import tiny

from jaxcl.errors import UserError
from jaxcl.models import make_model, weights
from jaxcl.models.convnext_torch import SIZES
from jaxcl.models.efficientnet_blocks import FACTORS
from jaxcl.models.registry import MODELS

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "encoders"
LAYOUTS = {kind: weights.torch_layout(kind) for kind in ("efficientnet", "convnext")}


def kind_of(name):
    return name.partition("_")[0]


def variables_of(kind, state):
    layout = LAYOUTS[kind]
    return layout.from_torch({k: v.astype(np.float32) for k, v in state.items() if not layout.ignores(k)})


def ours(name, state, config, given):
    """A state dict and what comes with it -> (model, params, statistics)."""
    kind = kind_of(name)
    variables = variables_of(kind, state)
    told = (LAYOUTS[kind].architecture_from_config(config) or {}) if config else {}
    options = LAYOUTS[kind].architecture(variables) | told | given
    model = make_model(MODELS.resolve(kind)(**options, head_features=0))
    return model, *weights.fit("it", variables, model, (*originals.SIDES[kind][0], 3))


def check(model, params, stats, images, maps, features):
    @jax.jit
    def run(images):
        own = {"encoder": params}
        return model.maps(own, stats, images), model.encode(own, stats, images, train=False)[0]

    got, h = run(images)
    assert len(got) == len(maps) == model.num_stages
    for a, b in zip((*got, h), (*maps, features), strict=True):
        assert a.shape == b.shape
        difference = np.abs(np.asarray(a) - b).max() / max(1, np.abs(b).max())
        assert difference < 1e-5, difference


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_the_same_maps_and_features(name):
    for module in ("torch", "timm", "torchvision", "transformers"):
        pytest.importorskip(module)
    original = originals.make(name)
    found = ours(name, original.state, original.config, original.given)
    for side in originals.SIDES[kind_of(name)]:
        images = tiny.normal(2, *side, 3, seed=5)
        check(*found, images, *original.run(images))


def stored(name):
    """-> (state dict, config, given options, [(images, maps, features), ...]); tests/golden/make_encoders_conv.py"""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as d:
        shapes = json.loads(str(d["shapes"]))
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        parts = np.split(d["state"].astype(np.float32), ends[:-1])
        state = {k: part.reshape(shape) for (k, shape), part in zip(shapes.items(), parts, strict=True)}
        runs = []
        for i in range(2):
            count = sum(key.startswith("map") and key.endswith(f"_{i}") for key in d)
            maps = [d[f"map{stage}_{i}"] for stage in range(count)]
            runs.append((d[f"images{i}"].astype(np.float32), maps, d[f"features{i}"]))
        return state, json.loads(str(d["config"])), json.loads(str(d["given"])), runs


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_stored_maps_and_features(name):
    state, config, given, runs = stored(name)
    assert [kind for kind, layout in LAYOUTS.items() if layout.recognises(state)] == [kind_of(name)]
    found = ours(name, state, config, given)
    for run in runs:
        check(*found, *run)


def test_every_family_has_its_file():
    assert {p.stem for k in LAYOUTS for p in GOLDEN.glob(f"{k}_*.npz")} == set(originals.FAMILIES)


# ---- names


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_timms_names_are_written(name):
    """What is written is read back to the same; for networks of timm it is their own file without the classifier."""
    state, *_ = stored(name)
    layout, variables = LAYOUTS[kind_of(name)], variables_of(kind_of(name), state)
    written = layout.to_torch(variables)
    same(layout.from_torch(written), variables)
    if name.startswith("efficientnet") or name in ("convnext_timm", "convnext_v2_timm"):
        same(written, {k: v for k, v in state.items() if not layout.ignores(k)})
    with pytest.raises(KeyError):
        layout.to_torch({"params.odd.kernel": np.zeros((2, 2))})
    odd = next(iter(state)) + ".odd"
    assert odd in layout.from_torch(state | {odd: np.zeros(3)})  # so that fitting it names it


def test_names_of_efficientnet_lite_pytorch():
    """Blocks are counted through there, and each norm of a block has its number, also where the first is missing."""
    state, *_ = stored("efficientnet_same")
    blocks = ["0.0", "1.0", "1.1", "2.0"]
    inside = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    inside |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    theirs = {}
    for name, value in state.items():
        module, leaf = name.rsplit(".", 1)
        if module in top:
            theirs[f"{top[module]}.{leaf}"] = value
        else:
            _, stage, block, inner = module.split(".")
            names = first if stage == "0" else inside
            theirs[f"_blocks.{blocks.index(f'{stage}.{block}')}.{names[inner]}.{leaf}"] = value
    assert len(theirs) == len(state)
    theirs |= {"_bn0.num_batches_tracked": np.zeros((), np.int64)}
    assert LAYOUTS["efficientnet"].recognises(theirs)
    same(variables_of("efficientnet", theirs), variables_of("efficientnet", state))


def test_names_of_the_authors_of_convnext():
    state, *_ = stored("convnext_v2_hf")
    rules = [("convnextv2.", ""), ("embeddings.patch_embeddings", "downsample_layers.0.0")]
    rules += [("embeddings.layernorm", "downsample_layers.0.1"), ("encoder.", ""), (".layers.", ".")]
    rules += [("grn.weight", "grn.gamma"), ("grn.bias", "grn.beta"), ("layernorm", "norm"), ("classifier", "head")]
    theirs = {}
    for name, value in state.items():
        for a, b in rules:
            name = name.replace(a, b)
        parts = name.split(".")
        if "downsampling_layer" in parts:
            name = ".".join(["downsample_layers", parts[1], *parts[3:]])
        theirs[name] = value
    assert LAYOUTS["convnext"].recognises(theirs)
    same(variables_of("convnext", theirs), variables_of("convnext", state))


def full(kind, **options):
    model = make_model(MODELS.resolve(kind)(**options, head_features=0))
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), (64, 64, 3)))
    shapes = weights.flat(params["encoder"], stats)
    return {k: np.broadcast_to(np.float32(0), v.shape) for k, v in shapes.items()}


@pytest.mark.parametrize(
    "kind, options, tensors, parameters, some",
    [
        # Counted in the published files, without classifiers and counters.
        ("efficientnet", dict(variant="lite0"), 245, 3_413_024, {"blocks.6.0.conv_pwl.weight": (320, 1152, 1, 1)}),
        ("convnext", dict(variant="tiny"), 180, 27_820_128, {"stages.3.blocks.2.mlp.fc1.weight": (3072, 768)}),
    ],
)
def test_published_names_and_shapes(kind, options, tensors, parameters, some):
    ours = full(kind, **options)
    state = LAYOUTS[kind].to_torch(ours)
    assert (len(state), sum(v.size for v in state.values())) == (tensors, parameters)
    assert some.items() <= {k: v.shape for k, v in state.items()}.items()
    found = LAYOUTS[kind].architecture(ours)
    assert options.items() <= found.items() and not {"stage_sizes", "stage_widths"} & set(found)


PUBLISHED = [("efficientnet", v, f"tf_efficientnet_{v}") for v in FACTORS]
PUBLISHED += [("convnext", v, f"convnext_{v}") for v in SIZES if v != "huge"]
PUBLISHED += [("convnext", v, f"convnextv2_{v}") for v in SIZES if not v.startswith("x")]
QUICK = {"tf_efficientnet_lite2", "convnext_atto", "convnextv2_tiny"}
PUBLISHED = [p if p[-1] in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in PUBLISHED]


@pytest.mark.parametrize("kind, variant, name", PUBLISHED)
def test_timm_has_the_same_tensors(kind, variant, name):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    v2 = dict(layer_scale=0.0, response_norm=True) if "v2" in name else {}
    ours = full(kind, variant=variant, **v2)
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    theirs = {k: tuple(v.shape) for k, v in net.state_dict().items() if v.ndim}
    assert {k: v.shape for k, v in LAYOUTS[kind].to_torch(ours).items()} == theirs
    assert LAYOUTS[kind].recognises(theirs)
    assert LAYOUTS[kind].architecture(ours).items() >= {"variant": variant, **v2}.items()
    told = LAYOUTS[kind].architecture_from_config({"architecture": f"{name}.some_tag", "num_features": 1})
    norms = [m for m in net.modules() if type(m).__name__.startswith(("BatchNorm", "LayerNorm"))]
    assert {m.eps for m in norms} == {told["norm_epsilon"]}


@pytest.mark.parametrize("kind, options", [("efficientnet", {}), ("convnext", {})])
def test_timm_loads_what_is_written(kind, options):
    """Strictly, and with the same features."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    name = {"efficientnet": "efficientnet_same", "convnext": "convnext_hf"}[kind]
    state, config, given, runs = stored(name)
    model, params, stats = ours(name, state, config, given)
    written = LAYOUTS[kind].to_torch(weights.flat(params, stats))
    if kind == "efficientnet":
        assert LAYOUTS[kind].changes(model.encoder) == {"pad_type": "same", "norm_epsilon": 1e-3}
        net = originals.make(name, seed=1).net
        net.reset_classifier(0)
    else:
        from timm.models.convnext import ConvNeXt

        changes = LAYOUTS[kind].changes(model.encoder)
        epsilon = changes.pop("head_norm_eps")
        net = ConvNeXt(**changes).eval()
        net.head.norm.eps = epsilon
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in written.items()}
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    images, _, features = runs[0]
    with torch.no_grad():
        got = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(got, features, atol=1e-5)


# ---- what is not ours


@pytest.mark.parametrize(
    "names",
    [
        ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"],
        # An EfficientNet with squeeze-and-excite, in two libraries.
        ["conv_stem.weight", "bn1.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.conv_pw.weight", "bn2.running_mean"]
        + ["blocks.1.0.conv_pwl.weight", "conv_head.weight", "blocks.0.0.se.conv_reduce.weight"],
        ["_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_blocks.0._se_reduce.weight"],
        # EdgeNeXt has the blocks of a ConvNeXt and others.
        ["stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight"]
        + ["stages.1.blocks.2.xca.temperature"],
        [],
    ],
)
def test_others_are_not_recognised(names):
    assert not any(layout.recognises(names) for layout in LAYOUTS.values())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_tensors_without_blocks_are_refused(kind):
    with pytest.raises(UserError):
        LAYOUTS[kind].architecture({"params.odd.kernel": np.zeros((2, 2))})


@pytest.mark.parametrize(
    "kind, config, told",
    [
        ("efficientnet", {"architecture": "tf_efficientnet_lite0"}, {"padding": "same", "norm_epsilon": 1e-3}),
        ("efficientnet", {"architecture": "efficientnet_lite0"}, {"padding": "symmetric", "norm_epsilon": 1e-5}),
        ("efficientnet", {"architecture": "efficientnet_b0"}, None),
        ("efficientnet", {"model_type": "convnext"}, None),
        ("convnext", {"model_type": "convnext"}, {"norm_epsilon": 1e-6, "final_norm_epsilon": 1e-12}),
        ("convnext", {"architecture": "convnext_xxlarge"}, {"norm_epsilon": 1e-5, "final_norm_epsilon": 1e-5}),
        ("convnext", {"architecture": "resnet50"}, None),
        ("convnext", {}, None),
    ],
)
def test_what_configs_tell(kind, config, told):
    assert LAYOUTS[kind].architecture_from_config(config) == told


@pytest.mark.parametrize(
    "key, config",
    [
        ("hidden_act", {"model_type": "convnextv2", "hidden_act": "relu"}),
        ("architecture", {"architecture": "convnext_tiny_hnf.a2h_in1k"}),
        ("architecture", {"architecture": "convnext_atto_ols"}),
    ],
)
def test_configs_that_cannot_be_are_refused(key, config):
    with pytest.raises(UserError, match=f"^{key}"):
        LAYOUTS["convnext"].architecture_from_config(config)


def test_encoders_that_torch_cannot_be():
    for options in (dict(norm="group"), dict(norm_sets=("adv",))):
        with pytest.raises(UserError):
            LAYOUTS["efficientnet"].check(make_model(MODELS.resolve("efficientnet")(**options)).encoder)
