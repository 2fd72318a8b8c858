"""Vision transformers against timm and transformers: every block's tokens and the features, at two image sizes."""

import jax
import numpy as np
import pytest
import tiny
import vit_originals as originals

from jaxcl.models import make_model, weights
from jaxcl.models.vision_transformer import VisionTransformerOptions
from jaxcl.models.vision_transformer_parts import TransformerBlock

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


def close(got, want, atol=1e-4):
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
