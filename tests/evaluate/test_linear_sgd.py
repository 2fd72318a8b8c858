"""The probe by SGD: each data set's schedule, and that it learns from frozen features without moving anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluations import evaluation

from jaxcl.evaluate import linear_sgd as module
from jaxcl.evaluate.context import EvalContext
from jaxcl.evaluate.linear_sgd import Protocol, protocol_of, schedule


@pytest.mark.parametrize(
    "name, epochs, stairs",
    [
        ("tfds:imagenet2012:5.1.0", 90, (54, 72)),
        ("imagenet100.npz", 200, (120, 160)),
        ("tfds:caltech_birds2011", 200, (120, 160)),
        ("folder:iNaturalist-2019", 200, (120, 160)),
    ],
)
def test_schedules(name, epochs, stairs):
    """Zhang and Ma 2022, arXiv 2206.00227."""
    protocol = protocol_of(name)
    assert (protocol.epochs, protocol.kind, protocol.lr, protocol.degrees) == (epochs, "sgd", 30.0, 0.0)
    rate = schedule(protocol, batch_size=128, steps_per_epoch=7)
    for epoch, factor in ((0, 1), (stairs[0] - 1, 1), (stairs[0], 0.1), (stairs[1] - 1, 0.1), (stairs[1], 0.01)):
        assert float(rate(epoch * 7 + 6)) == pytest.approx(15 * factor)
        assert float(rate(epoch * 7)) == pytest.approx(15 * factor)


def test_flowers_are_turned_and_cars_are_adams():
    assert protocol_of("tfds:oxford_flowers102").degrees == 30 and protocol_of("garments") == Protocol()
    cars = protocol_of("tfds:cars196")
    assert (cars.kind, cars.epochs) == ("adam", 200)
    np.testing.assert_allclose(schedule(cars, batch_size=256, steps_per_epoch=3)(np.array([0, 599])), 0.03)


def test_it_learns_and_moves_nothing(monkeypatch):
    def encode(self, state, images):
        h = images.mean((1, 2))  # each class has a colour
        return h, h

    monkeypatch.setattr(EvalContext, "encode", encode)
    monkeypatch.setattr(module, "protocol_of", lambda *_: Protocol(degrees=10.0))
    e, state, mesh = evaluation(final=("linear_sgd",), sgd_epochs=20)
    before = jax.tree.map(np.array, jax.device_get((state.params, state.batch_stats)))
    metrics = e.final(state, mesh)[0]["linear_sgd"]
    assert metrics["epochs"] == 20 and 1 <= metrics["best_epoch"] <= 20
    assert metrics["best_epoch_accuracy"] >= metrics["accuracy"] > 0.9
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.batch_stats)))
    assert jnp.isfinite(metrics["accuracy"])


def test_the_nonsemantic_protocol():
    """cases E.8: lr 10 in batches of 128 for 60 epochs, a tenth after 30, 40 and 50."""
    protocol = protocol_of("folder:imagenet100", "nonsemantic")
    assert (protocol.epochs, protocol.batch_size, protocol.kind, protocol.degrees) == (60, 128, "sgd", 0)
    rate = schedule(protocol, batch_size=128, steps_per_epoch=7)
    got = [float(rate(7 * e)) for e in (0, 29.9, 30, 39.9, 40, 50, 59.9)]
    np.testing.assert_allclose(got, [10, 10, 1, 1, 0.1, 0.01, 0.01], rtol=1e-5)
    assert protocol_of("folder:imagenet100", "moco").epochs == 100
    assert protocol_of("folder:imagenet100", "customary") == protocol_of("folder:imagenet100") == Protocol()


def test_every_step_draws_views_anew(monkeypatch):
    """Two epochs of six steps: each image of each step has a key of its own; cases F."""
    seen = []

    def recorded(keys, images):
        jax.debug.callback(lambda data: seen.append(np.asarray(data)), jax.random.key_data(keys))
        return images, {}

    def encode(self, state, images):
        h = images.mean((1, 2))
        return h, h

    monkeypatch.setattr(EvalContext, "encode", encode)
    monkeypatch.setattr(module, "protocol_of", lambda *_: Protocol(batch_size=8))
    monkeypatch.setattr(module, "_training_view", lambda *_: recorded)
    e, state, mesh = evaluation(final=("linear_sgd",), sgd_epochs=2)
    e.final(state, mesh)
    jax.effects_barrier()
    rows = np.concatenate(seen)
    assert len(rows) >= 2 * 48 and len(np.unique(rows, axis=0)) == 2 * 48
