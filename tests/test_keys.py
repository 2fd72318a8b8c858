"""No random key is used twice: JAX's own check on the programs that draw, and what it cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl import adversarial, augment
from jaxcl.augment import patches, quilting, sampling
from jaxcl.evaluate import corruptions, group_dro, logistic, transfer
from jaxcl.models import ViTOptions, make_model

BYTES = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
PIXELS = BYTES.astype(np.float32) / 255
FEATURES, LABELS = tiny.normal(40, 3), np.arange(40) % 2


def keys():
    return jax.random.split(jax.random.key(0), len(BYTES))


def squares(v):
    return jnp.sum(v**2, axis=(1, 2, 3))


def view():
    drawn = augment.random_view(8, (0.5,) * 3, (0.5,) * 3, blur=0.5, solarize=0.5, rotation=0.5)
    # Colour, and resizing by a turn, compile slowly; each draws from the key that it is given, as the others do.
    pipeline = augment.Pipeline((augment.RandomTilt(), *(op for op in drawn.ops if op.name != "jitter")))
    return jax.jit(pipeline)(keys(), PIXELS)


def attack(norm):
    run = jax.jit(lambda key: adversarial.pgd(squares, PIXELS, epsilon=0.1, key=key, restarts=2, norm=norm))
    return run(jax.random.key(0))


def vit():
    model = make_model(ViTOptions(patch=4, width=8, depth=2, heads=2, mlp_width=8, head_features=0))
    params, stats = tiny.model_variables(model, side=12)
    return jax.jit(lambda key: model.encode(params, stats, PIXELS, train=True, key=key))(jax.random.key(0))


DRAW = {
    "sample_texture": lambda: sampling.sample_texture(keys(), BYTES, exemplar=6, radius=1, randoms=3, passes=1),
    "patch_negatives": lambda: patches.patch_negatives(
        keys(), PIXELS, min_patch=2, max_patch=4, count=2, dihedral=True
    ),
    "quilt_texture": lambda: quilting.quilt_texture(keys(), BYTES),
    "pgd linf": lambda: attack("linf"),
    "pgd l2": lambda: attack("l2"),
    "vit": vit,
    "view": view,
    "group_dro": lambda: group_dro(FEATURES, LABELS, LABELS, num_classes=2, steps=5),
    "logistic": lambda: logistic._fit(
        FEATURES, LABELS, FEATURES, LABELS, 0.1, 0, num_classes=2, epochs=2, batch_size=8
    ),
    "transfer": lambda: transfer._start(3, 2, 0),
    "glass_blur": lambda: corruptions.corrupt(BYTES, "glass_blur", 5, np.arange(2)),
}


@pytest.mark.parametrize("name", DRAW)
def test_no_key_is_used_twice(name):
    """cases F."""
    with jax.debug_key_reuse(True):
        DRAW[name]()


@pytest.mark.parametrize("name", ["impulse_noise", "snow", "elastic_transform"])
def test_corruptions_that_draw_twice_have_two_keys(name, monkeypatch):
    """JAX's check does not follow keys [2, B] that are taken apart; cases F."""
    used = []

    class Both(Exception):
        """The rest of the corruption draws nothing."""

    def recorded(draw, keys_B, shape, **options):
        used.append(np.asarray(jax.random.key_data(keys_B)))
        if len(used) == 2:
            raise Both
        return jnp.zeros((len(keys_B), *shape))

    monkeypatch.setattr(corruptions, "_draws", recorded)
    prepared = corruptions._KINDS[name].prepare
    values = prepared(12, 0, *corruptions.CONSTANTS[name][0][4]) if prepared else (0.1,)
    with pytest.raises(Both):
        corruptions._corrupt.__wrapped__(name, BYTES, np.uint32(5), np.arange(2), values)
    assert len(np.unique(np.concatenate(used), axis=0)) == 4
