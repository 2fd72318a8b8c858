"""Vision transformers against timm and transformers: every block's tokens and the features, at two image sizes."""

import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import vit_originals as originals

from jaxcl.errors import UserError
from jaxcl.models import make_model, weights
from jaxcl.models import vision_transformer_timm as timm_names
from jaxcl.models.vision_transformer import VisionTransformerOptions
from jaxcl.models.vision_transformer_parts import TransformerBlock

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "encoders"
layout = weights.torch_layout("vision_transformer")


def ours(state, config, given):
    """A state dict and what comes with it -> (encoder, variables of it)."""
    variables = layout.from_torch({k: v.astype(np.float32) for k, v in state.items() if not layout.ignores(k)})
    told = layout.architecture_from_config(config) if config else {}
    options = layout.architecture(variables) | told | given
    model = make_model(VisionTransformerOptions(**options, head_features=0))
    grid = options["position_grid"] if options["position"] == "learned" else (2, 2)
    params, _ = weights.fit("it", variables, model, (*(n * options["patch"] for n in grid), 3))
    return model.encoder, params


def run(encoder, params, images):
    """-> (tokens [N,T,D] after each block, features [N,D])"""

    def blocks(module, _):
        return isinstance(module, TransformerBlock)

    h, kept = jax.jit(lambda p, x: encoder.apply({"params": p}, x, capture_intermediates=blocks))(params, images)
    kept = kept["intermediates"]
    return [kept[f"blocks_{i}"]["__call__"][0] for i in range(encoder.depth)], h


def close(got, want, atol=1e-5):
    assert got.shape == want.shape
    difference = np.abs(np.asarray(got) - want).max()
    assert difference < atol * max(1, np.abs(want).max()), difference


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_the_same_tokens_and_features(name):
    for module in ("torch", "timm", "transformers"):
        pytest.importorskip(module)
    original = originals.make(name)
    for state in (original.saved, original.live):
        assert layout.recognises(state)
        encoder, params = ours(state, original.config, original.given)
        for side in ((originals.SIDE, originals.SIDE), originals.OTHER):
            images = tiny.normal(2, *side, 3, seed=5)
            tokens, features = run(encoder, params, images)
            want, wanted = original.run(images)
            assert len(tokens) == len(want) == 2
            for a, b in zip((*tokens, features), (*want, wanted), strict=True):
                close(a, b)


# ---- the same without torch


def stored(name):
    """-> (state dict, config, given options, [(images, tokens, features), ...]); tests/golden/make_encoders_vit.py"""
    with np.load(GOLDEN / f"vision_transformer_{name}.npz", allow_pickle=False) as d:
        shapes = json.loads(str(d["shapes"]))
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        parts = np.split(d["state"].astype(np.float32), ends[:-1])
        state = {k: part.reshape(shape) for (k, shape), part in zip(shapes.items(), parts, strict=True)}
        runs = [(d[f"images{i}"].astype(np.float32), d[f"tokens{i}"], d[f"features{i}"]) for i in range(2)]
        return state, json.loads(str(d["config"])), json.loads(str(d["given"])), runs


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_stored_tokens_and_features(name):
    state, config, given, runs = stored(name)
    assert layout.recognises(state)
    encoder, params = ours(state, config, given)
    for images, want, wanted in runs:
        tokens, features = run(encoder, params, images)
        close(np.concatenate(tokens), want)
        close(features, wanted)


def test_every_family_has_its_file():
    names = {path.stem.removeprefix("vision_transformer_") for path in GOLDEN.glob("vision_transformer_*.npz")}
    assert names == set(originals.FAMILIES)


# ---- names


def variables_of(state):
    return layout.from_torch({k: v for k, v in state.items() if not layout.ignores(k)})


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


CLIP_NAMES = (
    ("patch_embed.proj", "conv1"),
    ("pos_embed", "positional_embedding"),
    ("cls_token", "class_embedding"),
    ("blocks.", "transformer.resblocks."),
    ("norm_pre", "ln_pre"),
    ("norm1", "ln_1"),
    ("norm2", "ln_2"),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def renamed(state, rules, prefix=""):
    out = {}
    for name, value in state.items():
        for ours, theirs in rules:
            name = name.replace(ours, theirs)
        out[prefix + name] = value
    return out


def test_names_of_open_clip():
    state, *_ = stored("clip_timm")
    theirs = renamed(state, (*CLIP_NAMES, ("norm.", "ln_post.")), "visual.")
    theirs["visual.class_embedding"] = theirs["visual.class_embedding"].reshape(-1)
    theirs["visual.positional_embedding"] = theirs["visual.positional_embedding"][0]
    theirs |= {"positional_embedding": np.zeros((4, 8)), "token_embedding.weight": np.zeros((9, 8))}
    theirs |= {"logit_scale": np.zeros(()), "transformer.resblocks.0.ln_1.weight": np.zeros(8)}
    assert layout.recognises(theirs) and layout.ignores("token_embedding.weight")
    same(variables_of(theirs), variables_of(state))
    project = tiny.normal(8, 5)
    found = variables_of(theirs | {"visual.proj": project})
    np.testing.assert_array_equal(found["params.project.kernel"], project)
    assert layout.architecture(found)["projection"] == 5


def test_names_of_the_released_dinos():
    state, *_ = stored("dinov2_giant_timm")
    theirs = renamed(state, (("reg_token", "register_tokens"), ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")))
    token, positions = theirs["cls_token"], theirs["pos_embed"]
    theirs |= {"pos_embed": np.concatenate([0 * token, positions], 1), "mask_token": 0 * token}
    same(variables_of(theirs), variables_of(state))

    state, *_ = stored("dinov3_plus_timm")
    rules = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    theirs = renamed(state, (*rules, ("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3")))
    for i in range(2):
        q, v = (theirs.pop(f"blocks.{i}.attn.{name}_bias") for name in "qv")
        theirs[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([q, 0 * q, v])
        theirs[f"blocks.{i}.attn.qkv.bias_mask"] = np.concatenate([0 * q + 1, 0 * q, 0 * v + 1])
    theirs |= {"rope_embed.periods": np.ones(2), "mask_token": np.zeros((1, 16))}
    same(variables_of(theirs), variables_of(state))


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_timms_names_are_written(name):
    """What is written is read back to the same; for networks of timm with registers or none it is their own file."""
    state, *_ = stored(name)
    variables = variables_of(state)
    written = layout.to_torch(variables)
    head = {k for k in written if k.startswith("head.")}
    again = variables_of({k: v for k, v in written.items() if k not in head})
    same(again, {k: v for k, v in variables.items() if "project" not in k})
    assert bool(head) == ("params.project.kernel" in variables)
    if name.endswith("_timm") and "distilled" not in name:
        assert {k: v.shape for k, v in written.items()} | {"pos_embed": 0} == (
            {k: v.shape for k, v in state.items()} | {"pos_embed": 0}
        )
    with pytest.raises(KeyError):
        layout.to_torch({"params.odd.kernel": np.zeros((2, 2))})


@pytest.mark.parametrize("name", originals.FAMILIES)
def test_timm_loads_what_is_written(name):
    """A network made by the arguments that an export tells takes all of its tensors, and gives the same features."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    state, config, given, runs = stored(name)
    encoder, params = ours(state, config, given)
    if encoder.pooling == "cls_mean":
        with pytest.raises(UserError):
            layout.check(encoder)
        return
    layout.check(encoder)
    told = json.loads(json.dumps(layout.changes(encoder)))
    make = {"Eva": timm.models.eva.Eva, "VisionTransformer": timm.models.vision_transformer.VisionTransformer}
    norm = functools.partial(torch.nn.LayerNorm, eps=told["norm_epsilon"])
    mlp = {"mlp_layer": getattr(timm.layers, told["mlp_layer"])} if told["mlp_layer"] else {}
    arguments = {"img_size": originals.SIDE} | told["arguments"]
    net = make[told["class"]](norm_layer=norm, **mlp, **arguments).eval()
    variables = weights.flat(jax.tree.map(np.asarray, params), {})
    written = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in layout.to_torch(variables).items()}
    assert not any(net.load_state_dict(written, strict=True))
    images, _, features = runs[0]
    with torch.no_grad():
        close(net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy(), features)


@pytest.mark.parametrize(
    "options",
    [
        dict(position="none"),
        dict(pooling="cls_mean"),
        dict(patch_bias=False),
        dict(position="rope", qkv_bias="all"),
        dict(position="rope", qkv_bias="none", activation="quick_gelu"),
        dict(position="rope", qkv_bias="none", pooling="attention"),
    ],
)
def test_what_timm_cannot_express_is_refused(options):
    encoder = VisionTransformerOptions(**(dict(patch=4, width=16, depth=1, heads=2) | options)).make(np.float32)
    with pytest.raises(UserError):
        layout.check(encoder)


def test_others_are_not_recognised():
    for names in (
        ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight"],
        ["visual.conv1.weight", "visual.bn1.weight"],
        ["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "layers.0.blocks.0.attn.qkv.weight"],
        ["embeddings.patch_embeddings.projection.weight", "encoder.layers.0.blocks.0.layernorm_before.weight"],
        [],
    ):
        assert not layout.recognises(names)
    state, *_ = stored("vit_timm")
    odd = variables_of(state | {"blocks.0.attn.q_norm.weight": np.ones(4)})
    assert "blocks.0.attn.q_norm.weight" in odd  # so that fitting it names it
    with pytest.raises(UserError):
        layout.architecture({"params.odd.kernel": np.zeros((2, 2))})


def test_a_pooling_head_and_a_projection_may_be_left_out():
    state, config, given, runs = stored("siglip_hf")
    encoder, params = ours(state, config, given | {"pooling": "mean"})
    tokens, features = run(encoder, params, runs[0][0])
    assert "pool" not in params and features.shape == (1, 8)
    state, config, given, runs = stored("clip_projection_hf")
    encoder, params = ours(state, config, given | {"projection": 0})
    assert "project" not in params and run(encoder, params, runs[0][0])[1].shape == (1, 8)


# ---- config.json


def test_without_a_config_the_rest_is_as_usual(tmp_path, caplog):
    """A file alone: heads of 64 features, and a line says so."""
    model = make_model(VisionTransformerOptions(patch=4, width=128, depth=1, heads=2, head_features=0))
    params, _ = tiny.model_variables(model, side=8)
    variables = weights.flat(params["encoder"], {})
    weights.write(tmp_path / "out.safetensors", variables, {}, torch=layout)
    state = {k: np.ascontiguousarray(v) for k, v in layout.to_torch(variables).items()}
    safetensors.numpy.save_file(state, tmp_path / "alone.safetensors")
    read = weights.read(tmp_path / "alone.safetensors")
    assert read.kind == "vision_transformer"
    with caplog.at_level("INFO", "jaxcl"):
        options = weights.architecture(read)
    assert options["heads"] == 2 and options["position_grid"] == (2, 2) and options["patch"] == 4
    assert any("heads 2" in record.getMessage() for record in caplog.records)
    same(read.variables, variables)


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model"])
def test_naflex_is_refused(kind):
    with pytest.raises(UserError, match="^model_type"):
        layout.architecture_from_config({"model_type": kind})


@pytest.mark.parametrize(
    "key, config",
    [
        ("hidden_act", dict(model_type="vit", hidden_act="relu")),
        ("patch_size", dict(model_type="vit", patch_size=[16, 8])),
        ("image_size", dict(model_type="vit", image_size="large")),
        ("the attention's", dict(model_type="dinov3_vit", query_bias=False)),
    ],
)
def test_configs_that_cannot_be_are_refused(key, config):
    with pytest.raises(UserError, match=f"^{key}"):
        layout.architecture_from_config(config)


def test_configs_as_the_hub_has_them():
    """What the repositories' files say; silent keys have the defaults of transformers."""
    told = layout.architecture_from_config
    assert told({"model_type": "resnet"}) is None and told({"architecture": "resnet50"}) is None
    siglip = told({"model_type": "siglip", "vision_config": {"image_size": 384, "model_type": "siglip_vision_model"}})
    assert (siglip["position_grid"], siglip["pooling"], siglip["activation"]) == ((24, 24), "attention", "gelu_tanh")
    clip = told({"model_type": "clip", "projection_dim": 768, "vision_config": {"hidden_size": 1024, "patch_size": 14}})
    assert (clip["projection"], clip["patch"], clip["activation"]) == (768, 14, "quick_gelu")
    giant = dict(hidden_size=1536, num_attention_heads=24, use_swiglu_ffn=True, image_size=518)
    giant = told({"model_type": "dinov2", **giant})
    assert (giant["mlp_width"], giant["gated"], giant["position_grid"]) == (4096, True, (37, 37))
    assert "projection" not in told({"model_type": "clip_vision_model", "projection_dim": 512})
    dinov2 = told(
        {
            "architecture": "vit_small_patch14_reg4_dinov2",
            "num_features": 384,
            "global_pool": "token",
            "pretrained_cfg": {"input_size": [3, 518, 518]},
        }
    )
    assert (dinov2["heads"], dinov2["position_grid"], dinov2["pooling"]) == (6, (37, 37), "cls")


def test_timms_configs_tell_what_its_networks_are():
    """Heads, epsilon, activation, pooling, positions of each of timm's networks that is not refused, by its name."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    acts = {"GELU": "gelu", "SiLU": "silu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}
    poolings = {"token": "cls", "avg": "mean", "map": "attention"}
    count = 0
    for name in timm.list_models(["vit_*_patch*", "deit*"]):
        config = {"architecture": name}
        try:
            layout.architecture_from_config(config)
        except UserError:
            continue
        with torch.device("meta"):
            net = timm.create_model(name, depth=1, num_classes=0)
        state = net.state_dict()
        assert layout.recognises(state), name
        assert all(timm_names.renamed(k) for k in state if not layout.ignores(k)), name
        options = layout.architecture_from_config(
            config | {"num_features": net.num_features, "global_pool": net.global_pool}
        )
        block, rope = net.blocks[0], type(getattr(net, "rope", None)).__name__
        got = [options[k] for k in ("heads", "norm_epsilon", "activation", "patch", "pooling")]
        want = [block.attn.num_heads, block.norm1.eps, acts[type(block.mlp.act).__name__]]
        assert got == [*want, net.patch_embed.patch_size[0], poolings[net.global_pool]], name
        assert type(block.norm1).__name__ == "LayerNorm", name
        assert rope == ("RotaryEmbeddingDinoV3" if options.get("position") == "rope" else "NoneType"), name
        count += 1
    assert count > 140


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_rope_224", "vit_pe_core_base_patch16_224", "naflexvit_base_patch16_siglip"]
)
def test_others_of_timm_are_refused(name):
    with pytest.raises(UserError, match="^architecture"):
        layout.architecture_from_config({"architecture": name})
