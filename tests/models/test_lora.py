"""Low-rank factors: the equation, their gradients, what they begin with, and that they are merged where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from model_options import model_of, refused

import jaxcl
from jaxcl import config as configs
from jaxcl.commands.export import export
from jaxcl.errors import UserError
from jaxcl.method.init_state import init_state
from jaxcl.method.recipe import Phase
from jaxcl.method.update import make_update
from jaxcl.models.registry import MODELS
from jaxcl.train.runs import open_run

VIT = dict(patch=4, width=16, heads=2, depth=3, mlp_width=24, head_features=12)
VIT |= dict.fromkeys(("dropout", "block_dropout", "attention_dropout", "query_dropout", "drop_path"), 0.0)
IMAGES = tiny.normal(4, tiny.SIDE, tiny.SIDE, 3)


def variables(model, seed=0):
    return tiny.model_variables(model, seed=seed)


@pytest.mark.parametrize("targets, count", [(("qkv",), 3), (("mlp",), 6), (("qkv", "mlp"), 9)])
def test_the_first_features_are_those_of_the_weights(targets, count):
    plain, model = model_of("vit", **VIT), model_of("vit", **VIT, lora_rank=2, lora_targets=targets)
    key = jax.random.key(3)
    (params, _), (own, _) = plain.init(key, IMAGES.shape[1:]), model.init(key, IMAGES.shape[1:])
    factors = own.pop("lora")
    assert jax.tree.structure(params) == jax.tree.structure(own)
    pairs = [(k, v) for k, v in jax.tree.leaves_with_path(factors) if k[-1].key == "a"]
    assert len(pairs) == count and all(np.abs(a).max() <= len(a) ** -0.5 and np.std(a) > 0 for _, a in pairs)
    assert all(not np.any(v) for k, v in jax.tree.leaves_with_path(factors) if k[-1].key == "b")
    before, _ = plain.encode(params, {}, IMAGES, train=False)
    after, _ = model.encode({**own, "lora": factors}, {}, IMAGES, train=False)
    np.testing.assert_array_equal(before, after)


def test_the_equation_and_its_gradients():
    """W + (alpha / r) A B; dA = (alpha / r) dW B', dB = (alpha / r) A' dW, with dW as of the kernel alone."""
    model = model_of("vit", **VIT, lora_rank=2, lora_alpha=6.0, lora_targets=("qkv",))
    params, _ = variables(model)
    plain, weight = model_of("vit", **VIT), tiny.normal(16)

    def loss(model, params):
        return jnp.sum(model.encode(params, {}, IMAGES, train=True)[0] @ weight)

    factors = params["lora"]["blocks_1"]["qkv"]
    merged = jax.tree.map(np.array, {k: v for k, v in params.items() if k != "lora"})
    for name, node in params["lora"].items():
        merged["encoder"][name]["qkv"]["kernel"] += 3.0 * np.asarray(node["qkv"]["a"]) @ np.asarray(node["qkv"]["b"])
    value, gradient = jax.value_and_grad(lambda p: loss(model, p))(params)
    expected, of_kernels = jax.value_and_grad(lambda p: loss(plain, p))(merged)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    dW = np.asarray(of_kernels["encoder"]["blocks_1"]["qkv"]["kernel"])
    found = gradient["lora"]["blocks_1"]["qkv"]
    for name, written in (("a", 3.0 * dW @ np.asarray(factors["b"]).T), ("b", 3.0 * np.asarray(factors["a"]).T @ dW)):
        np.testing.assert_allclose(found[name], written, rtol=1e-3, atol=1e-4 * np.abs(written).max())


def config():
    c = tiny.config(stage=False, background=False)
    c.model = configs.model("vit", **VIT, lora_rank=2)
    c.optimizer = configs.options(configs.OptimizerOptions, kind="adamw", lr=0.01, schedule="constant", freeze="layer1")
    return c


def test_an_update_trains_the_factors_and_the_head(tmp_path):
    c = config()
    c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
    recipe = tiny.recipe(c)
    shapes = jax.eval_shape(lambda: init_state(recipe))
    state = tiny.fill(shapes).replace(opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state))
    new, _ = jax.jit(make_update(recipe, Phase("encoder")))(state, tiny.batch())
    for (path, a), b in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(new.params), strict=True):
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.array_equal(a, b) == (at.startswith("encoder/") or at.startswith("lora/blocks_0")), at
    held = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(new.opt_state)
    }
    assert any("/lora/" in path for path in held) and not any("/encoder/" in path for path in held)


@pytest.mark.parametrize("encoder", ["", "target"])
def test_the_exported_encoder_has_them_merged(encoder, tmp_path):
    c = config()
    c.memory.target = configs.memory("ema")
    c.passes += (configs.encode("view1", encoder="target"),)
    c.data.source = f"npz:{tiny.colours(tmp_path / 'colours.npz')}"
    state = tiny.saved_run(tmp_path / "run", c)
    saved = open_run(tmp_path / "run")
    backbone = jaxcl.load_backbone(export(saved, tmp_path / "out", encoder=encoder))
    params = state.memory["target"]["params"] if encoder else state.params
    images = tiny.batch()["image"]
    h, _ = saved.recipe.model.encode(params, {}, backbone.normalize(images), train=False)
    np.testing.assert_allclose(backbone(images), h, rtol=1e-5, atol=1e-5)
    plain, _ = model_of("vit", **VIT).encode(params, {}, backbone.normalize(images), train=False)
    assert np.abs(plain - h).max() > 1e-3
    assert not any(k.startswith("lora") for k in backbone.about["architecture"])


def test_what_is_refused():
    refused("lora_rank", "vit", lora_rank=-1, **VIT)
    for kind, options in (("resnet", {}), ("vit", {"lora_targets": ("query",)}), ("vit", {"lora_targets": ()})):
        with pytest.raises(UserError, match="lora_"):
            model_of(kind, lora_rank=2, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_of_every_kind(kind):
    """Every parameter has a layer, without a gap, and the layers lie in the order in which images pass them."""
    model = model_of(kind)
    encoder, n = model.encoder, model.encoder.num_layers
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x), image)["params"]
    layers = {}
    for path, _ in jax.tree.leaves_with_path(shapes):
        path = tuple(p.key for p in path)
        layers.setdefault(encoder.layer_of(path), set()).add(path[0])
    assert set(range(n + 1)) <= layers.keys() <= set(range(n + 2)) and n > 0
    parts = [name for layer in sorted(layers) for name in layers[layer]]
    assert len(parts) == len(set(parts))  # no module is split
    last = [encoder.layer_of_stage(i + 1) for i in range(encoder.num_stages)]
    assert last == sorted(set(last)) and last[-1:] in ([], [n])
    assert 0 < encoder.layer_decay <= 1
