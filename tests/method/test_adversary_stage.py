"""The adversarial view by itself: its units, the norms of every pass, what was drawn, and which rows exist."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcl.method.stages.adversary import Adversary
from jaxcl.method.stages.base import StageContext
from jaxcl.method.terms import Embedding
from jaxcl.method.views import View

B, S = 4, 3
MEAN, STD = np.array([0.5, 0.45, 0.4]), np.array([0.25, 0.2, 0.4])
PIXELS = np.random.default_rng(0).uniform(0.3, 0.7, (2, B, S, S, 3))  # far from the bounds
VIEWS = ((PIXELS - MEAN) / STD).astype(np.float32)
WEIGHT = tiny.normal(B, S, S, 3, seed=3)
EXISTS = np.array([True, True, False, True])


@dataclasses.dataclass
class Recorder:
    """A model whose features are the images; it writes down how it is asked."""

    calls: list

    def encode(self, params, stats, image, **mode):
        self.calls.append(("encode", mode))
        return image, {"moved": stats["moved"] + 1}

    def embed(self, params, stats, h, *, aug_params, **mode):
        self.calls.append(("embed", mode, aug_params))
        return h, stats


def run(stage, loss=None):
    """-> (what the stage returned, the model's calls, (encoder, view, norms) of each other embedding)."""
    recorder, asked = Recorder([]), []
    views = {
        name: View(jnp.asarray(image), {"flip": np.arange(B) % 2 == i}, EXISTS if i else None)
        for i, (name, image) in enumerate(zip(("view1", "view2"), VIEWS, strict=True))
    }

    def embed(encoder, view, norm_set):
        asked.append((encoder, view, norm_set))
        return Embedding(view.image, view.image, view.where)

    context = StageContext(
        model=recorder,
        params={},
        batch_stats={"moved": 0},
        memory={},
        pixels=None,
        mean=tuple(MEAN),
        std=tuple(STD),
        label=None,
        classifier=None,
        augment=None,
        loss=loss or (lambda term, e: jnp.sum(WEIGHT * e["adversarial"].z)),
        reads=lambda term: ("view1", "adversarial", "view2", "target/view2", "auto/view1"),
        embed=embed,
        keys=None,
    )
    return stage(context, views), recorder.calls, asked, views


@pytest.mark.parametrize("options, size", [({}, 1), (dict(step_size=0.5), 0.5), (dict(num_steps=2), 2)])
def test_a_step_is_in_the_units_of_normalised_images(options, size):
    """A step of a share of epsilon, in [0, 1], is that over the deviation of each channel; cases F.

    Two steps of 2.5 / 2 epsilon each end at the ball's surface.
    """
    epsilon = np.array([0.01, 0.02, 0.03])
    out, *_ = run(Adversary(epsilon=tuple(epsilon), **options))
    want = VIEWS[0] + min(size, 1) * (epsilon / STD) * np.sign(WEIGHT)
    np.testing.assert_allclose(out.views["adversarial"].image, want, rtol=1e-5, atol=1e-6)


def test_small_steps_add_up():
    """Three steps of a tenth of epsilon; cases F."""
    out, *_ = run(Adversary(epsilon=(0.05,), step_size=0.1, num_steps=3))
    want = VIEWS[0] + 0.3 * (0.05 / STD) * np.sign(WEIGHT)
    np.testing.assert_allclose(out.views["adversarial"].image, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_the_bounds_are_black_and_white(clip):
    """Of normalised images: each channel has its own; cases F."""
    out, *_ = run(Adversary(epsilon=(0.5,), clip=clip))
    pixels = np.asarray(out.views["adversarial"].image) * STD + MEAN
    want = PIXELS[0] + 0.5 * np.sign(WEIGHT)
    np.testing.assert_allclose(pixels, np.clip(want, 0, 1) if clip else want, atol=1e-5)


@pytest.mark.parametrize("norm_set", ["adv", ""])
def test_every_pass_of_the_attack_uses_the_norms_of_the_attack(norm_set):
    """The anchor's, the adversarial one's and the other views'; encoders of their own have no such set; cases F."""
    _, calls, asked, views = run(Adversary(norm_set=norm_set))
    assert {call[0] for call in calls} == {"encode", "embed"} and len(calls) >= 4
    assert all(call[1] == dict(train=True, norm_set=norm_set, where=None) for call in calls)
    assert [(encoder, norms) for encoder, _, norms in asked] == [("", norm_set), ("target", ""), ("auto", "")]
    assert [view for _, view, _ in asked] == [views["view2"], views["view2"], views["view1"]]


@pytest.mark.parametrize("attacked, of", [("same", "view1"), ("other", "view2")])
def test_what_was_drawn_for_the_attacked_view_goes_with_it(attacked, of):
    """Heads may be told what was drawn: the attack's passes are, and so are those of the new view; cases F."""
    out, calls, _, views = run(Adversary(attack_view=attacked))
    (made,) = out.views.values()
    assert made.params is views[of].params and made.where is views[of].where
    told = [call[2] for call in calls if call[0] == "embed"]
    modes = [call[1]["where"] for call in calls]  # rows that do not exist enter no batch norm
    assert modes[:2] == [None, None] and all(w is views[of].where for w in modes[2:])
    assert told[0] is views["view1"].params and all(t is views[of].params for t in told[1:]) and len(told) > 1
    moved = np.asarray(made.image) - VIEWS[int(of == "view2")]
    np.testing.assert_allclose(moved, 0.015 / STD * np.sign(WEIGHT), rtol=1e-3)


def test_the_loss_is_of_the_term_on_every_view_it_reads():
    """cases F."""
    seen = {}

    def loss(term, e):
        seen[term] = {name: np.shape(x.z) for name, x in e.items()}
        return -jnp.sum(WEIGHT * e["adversarial"].z)

    out, *_ = run(Adversary(term="hard"), loss)
    assert seen == {
        "hard": dict.fromkeys(("view1", "adversarial", "view2", "target/view2", "auto/view1"), (B, S, S, 3))
    }
    assert (np.sign(out.views["adversarial"].image - VIEWS[0]) == -np.sign(WEIGHT)).all()  # it rises


@pytest.mark.parametrize("commit", [True, False])
def test_running_statistics_move_only_if_asked(commit):
    """By the anchor's pass and by one on the attacked view: not by the attack's steps; cases F."""
    out, *_ = run(Adversary(commit_updates=commit, num_steps=3))
    assert out.batch_stats == ({"moved": 2} if commit else None)


def test_a_random_start_is_of_the_view_and_the_step():
    """The keys are asked for by the name of the new view; cases F."""
    asked = []

    def with_keys(context):
        def keys(name):
            asked.append(name)
            return jax.random.split(jax.random.key(0), B)

        return context._replace(keys=keys)

    stage = Adversary(random_start=True, num_steps=1, epsilon=(0.1,), step_size=1e-6)

    class Asking(Adversary):
        def __call__(self, context, views):
            return super().__call__(with_keys(context), views)

    out, *_ = run(Asking(**dataclasses.asdict(stage)))
    assert asked == ["adversarial/start"]
    moved = np.asarray(out.views["adversarial"].image - VIEWS[0]) * STD
    assert np.abs(moved).max() <= 0.1 + 1e-5 and len(np.unique(np.round(moved, 5))) > 0.9 * moved.size
