"""Batches of m images per class: counts, evenness, determinism over steps, hosts and threads."""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from jaxcl import config as base
from jaxcl.data import ArraySource, Loader, order_of
from jaxcl.data.per_class import PerClass
from jaxcl.errors import UserError
from jaxcl.train import config_diff

SIZES = (5, 7, 9, 20, 30, 3, 44, 100, 4, 6)


def labels_of(sizes, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def visits(order, labels, epochs):
    """How often each image occurs; checks every batch."""
    seen = np.zeros(len(labels), int)
    for step in range(epochs * order.steps_per_epoch):
        rows = order(step)
        assert len(set(rows.tolist())) == len(rows)
        _, counts = np.unique(labels[rows], return_counts=True)
        assert (counts == order.per_class).all() and counts.sum() == len(rows)
        seen[rows] += 1
    return seen


@pytest.mark.parametrize(
    "sizes, batch_size, per_class",
    [((50,) * 10, 40, 8), ((16,) * 4, 16, 4), ((13,) * 30, 24, 3), ((9, 10, 11, 12), 8, 4), ((7,) * 6, 6, 1)],
)
def test_every_image_occurs_equally_often(sizes, batch_size, per_class):
    labels = labels_of(sizes)
    order = PerClass(labels, batch_size=batch_size, per_class=per_class, seed=1)
    assert order.steps_per_epoch == len(labels) // batch_size
    epochs = 40
    seen = visits(order, labels, epochs)
    # One unfinished pass, one image left out in turn, and one draw more or less of the class.
    assert seen.max() - seen.min() <= 3
    expected = epochs * order.steps_per_epoch * batch_size / len(labels)
    assert abs(seen - expected).max() <= 2.5


def test_classes_that_are_too_large_are_in_every_batch():
    """Draws of an epoch against exact shares as fractions; a class of 3 images among dozens is not lost."""
    labels, B, M, epochs = labels_of(SIZES), 12, 3, 60
    order = PerClass(labels, batch_size=B, per_class=M, seed=0)
    steps, P = len(labels) // B, B // M
    full = set()
    while True:
        rest = sum(n for c, n in enumerate(SIZES) if c not in full)
        share = [Fraction(steps * (P - len(full)) * n, rest) for n in SIZES]
        more = {c for c in range(len(SIZES)) if c not in full and share[c] > steps}
        if not more:
            break
        full |= more
    share = [Fraction(steps) if c in full else share[c] for c in range(len(SIZES))]
    assert full == {6, 7} and sum(share) == steps * P
    seen = visits(order, labels, epochs)
    for c in range(len(SIZES)):
        of_class = seen[labels == c]
        assert abs(of_class.sum() / M - epochs * share[c]) < 2  # close to its share at any time
        assert of_class.max() - of_class.min() <= 2


def test_long_after_the_beginning():
    """Draws before an epoch are the sum over all earlier ones, also beyond the cycle in which the rests repeat."""
    order = PerClass(labels_of((5, 7, 8, 9)), batch_size=8, per_class=4, seed=2)
    total = np.zeros(4, int)
    for epoch in range(3 * order._size):
        np.testing.assert_array_equal(order._draws_before(epoch), total)
        total += order._base + order._extra(np.array([epoch]))[0]


def test_steps_in_any_order_and_seeds():
    labels = labels_of(SIZES)
    make = lambda seed=0: PerClass(labels, batch_size=12, per_class=3, seed=seed)  # noqa: E731
    once, again = make(), make()
    far = 1_000_003
    expected = {step: once(step) for step in (0, 1, 18, 19, 20, 200, far, far + 1)}
    for step in reversed(expected):
        np.testing.assert_array_equal(again(step), expected[step])
    assert (expected[0] != expected[19]).any() and (make(1)(0) != expected[0]).any()
    with ThreadPoolExecutor(4) as pool:  # as for a source on disk
        for step, rows in enumerate(pool.map(make(), range(60))):
            np.testing.assert_array_equal(rows, once(step))


def test_classes_meet_at_random():
    """With 3 of 12 classes in a batch, pairs meet as often as expected by chance, in varying places."""
    order = PerClass(labels_of((60,) * 12), batch_size=12, per_class=4, seed=0)
    labels, meet, first = labels_of((60,) * 12), np.zeros((12, 12), int), set()
    for step in range(10 * order.steps_per_epoch):
        rows = order(step)
        found = np.unique(labels[rows])
        meet[np.ix_(found, found)] += 1
        first.add(labels[rows[0]])
    pairs = meet[np.triu_indices(12, 1)]
    mean = 600 * 3 / 66
    assert abs(pairs.mean() - mean) < 1e-9 and pairs.min() > mean / 2 and pairs.max() < 2 * mean
    assert len(first) == 12  # places in a batch do not depend on the class


def source(labels):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    names = tuple(map(str, range(labels.max() + 1)))
    return ArraySource(
        images=images, labels=labels.astype(np.int32), class_names=names, mean=(0.5,) * 3, std=(0.5,) * 3
    )


def test_any_number_of_processes_and_a_later_start():
    labels = labels_of(SIZES)
    order = PerClass(labels, batch_size=12, per_class=3, seed=0)

    def taken(count, **options):
        with Loader(source(labels), batch_size=12, seed=0, order=order, **options) as loader:
            return [next(loader)["index"] for _ in range(count)]

    alone = taken(25)
    for step, rows in enumerate(alone):
        np.testing.assert_array_equal(rows, order(step))
    parts = [taken(25, process_index=i, process_count=3) for i in range(3)]
    for rows, *shares in zip(alone, *parts, strict=True):
        assert all(len(share) == 4 for share in shares)
        np.testing.assert_array_equal(np.concatenate(shares), rows)
    np.testing.assert_array_equal(np.concatenate(taken(3, start_step=22)), np.concatenate(alone[22:]))


def test_by_the_config(caplog):
    c = base.default()
    labels = labels_of(SIZES)
    assert order_of(c, source(labels)) is None
    c.batch_size, c.data.per_class = 16, 4
    with caplog.at_level("INFO", "jaxcl"):
        order = order_of(c, source(labels))
    assert "data.per_class=4: 1 classes have fewer images" in caplog.text
    assert all(5 not in labels[order(step)] for step in range(40))
    assert config_diff.differences(base.to_dict(base.default()), base.to_dict(c))[1] == "data.per_class: 0 -> 4"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(per_class=5), "data.per_class=5 does not divide batch_size 12"),
        (dict(per_class=-1), "use a divisor of it, or 0"),
        (dict(labels=np.full(40, -1)), "40 of 40 have none"),
        (dict(labels=np.array([0, 1, -1] * 10)), "10 of 30 have none"),
        (
            dict(labels=labels_of((20, 20, 20, 2))),
            "batches of 4 classes (batch_size 12), but only 3",
        ),
    ],
)
def test_what_cannot_be(change, words):
    options = dict(labels=labels_of(SIZES), batch_size=12, per_class=3, seed=0) | change
    with pytest.raises(UserError) as error:
        PerClass(options.pop("labels"), **options)
    assert words in str(error.value) and "\n" not in str(error.value)
