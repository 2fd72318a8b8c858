"""The rungs of the ladder: their types of augmentation, strengths and order."""

import itertools

import pytest

from jaxcl.augment import random_view
from jaxcl.augment.ladder import PROBABILITY, TYPES, rungs
from jaxcl.errors import UserError

TOP = dict(crop_area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5, flip=0.5)


def ops(rung, size=64):
    """{name: probability} of the operations of a rung's view."""
    made = random_view(size, (0.5,) * 3, (0.25,) * 3, **rung).ops
    return {op.name: getattr(op, "p", 1.0) for op in made if op.name != "normalize"}


def test_each_rung_has_one_type_more():
    """The operations and probabilities of the four modules of Zhang and Ma 2022, arXiv 2206.00227."""
    t1, t2, t3, t4 = map(ops, rungs(TOP))
    assert t1 == {"crop": 1, "jitter": 0.8}
    assert t2 == t1 | {"grayscale": 0.2}
    assert t3 == t2 | {"blur": 0.5}
    assert t4 == t3 | {"flip": 0.5}
    assert rungs(TOP)[-1] == TOP


@pytest.mark.parametrize("order", list(itertools.permutations(TYPES)))
def test_any_order(order):
    with_rotation = rungs(TOP | {"rotation": 0.5}, order=order)
    for i, rung in enumerate(with_rotation):
        on = {"crop", *order[: i + 1]} | ({"rotation"} if i == 3 else set())
        assert set(ops(rung)) == on
    for count in (2, 5):
        sets = [set(ops(r)) for r in rungs(TOP, order=order, count=count)]
        assert [len(s) for s in sets] == [5 - min(4, count - 1 - i) for i in range(count)]
        assert all(a < b for a, b in itertools.pairwise(sets))


def test_rotation_can_be_a_type_of_the_ladder():
    rung = rungs(TOP | {"rotation": 0.5}, order=("rotation", *TYPES[:3]))
    assert [set(ops(r)) - {"crop"} for r in rung[:2]] == [{"rotation"}, {"rotation", "jitter"}]


def test_controls():
    assert rungs(TOP, mode="uniform") == (TOP,) * 4
    assert rungs(TOP, mode="two_view") == (None, None, None, TOP)
    # From the last rung down: flip, grayscale, blur, jitter, hue, smallest crop.
    want = [
        (0.50, 0.20, 0.50, 0.40, 0.10, 0.2),
        (0.45, 0.15, 0.45, 0.38, 0.08, 0.3),
        (0.40, 0.10, 0.40, 0.36, 0.06, 0.4),
        (0.35, 0.05, 0.35, 0.34, 0.04, 0.5),
    ]
    for rung, (flip, grey, blur, jitter, hue, crop) in zip(rungs(TOP, mode="strength")[::-1], want, strict=True):
        assert rung == TOP | dict(
            flip=flip, grayscale=grey, blur=blur, jitter=(jitter,) * 3 + (hue,), crop_area=(crop, 1.0)
        )
    weakest = rungs(TOP, mode="strength", count=20)[0]
    assert weakest["flip"] == 0 and weakest["crop_area"] == (1.0, 1.0) and min(weakest["jitter"]) == 0
    ops(weakest)  # can be made


def test_small_images_are_not_blurred_unless_asked():
    rung = TOP | dict(blur_above=32)
    assert "blur" not in ops(rung, 32) and "blur" in ops(rung, 33) and "blur" in ops(TOP, 32)
    with pytest.raises(UserError, match="^blur "):
        ops(rung | dict(blur=1.5), 32)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(mode="add"), "mode is 'add'"),
        (dict(order=("jitter", "hue")), "order is"),
        (dict(order=("jitter", "jitter")), "order is"),
        (dict(count=0), "count is 0"),
    ],
)
def test_mistakes(options, text):
    with pytest.raises(UserError) as error:
        rungs(TOP, **options)
    assert text in str(error.value) and "\n" not in str(error.value) and set(TYPES) < set(PROBABILITY)
