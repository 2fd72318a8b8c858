"""Steps, epochs, examples and percent, and the words for what is none of them."""

import pytest

from jaxcl.errors import UserError
from jaxcl.runtime.durations import to_steps

UNIT = dict(name="eval.every", steps_per_epoch=46, batch_size=256)


@pytest.mark.parametrize(
    "duration, steps",
    [
        ("300 steps", 300),
        ("1 step", 1),
        ("300", 300),
        (300, 300),
        (0, 0),
        ("0", 0),
        ("8 epochs", 8 * 46),
        ("1 epoch", 46),
        ("0.5 epochs", 23),
        ("2.5epochs", 115),
        ("50000 examples", 195),  # 195.3
        ("1 example", 0),
        ("  25 % ", 230),
        ("25%", 230),
        ("12.5 percent", 115),
        ("8 epochs, at least 200 steps", 8 * 46),
        ("4 epochs, at least 200 steps", 200),
        ("1 epoch at least 25%", 230),
        ("100%", 920),
        ("0%", 0),
    ],
)
def test_values(duration, steps):
    got = to_steps(duration, total=920, **UNIT)
    assert got == steps and isinstance(got, int)


@pytest.mark.parametrize(
    "duration",
    ["", "soon", "-3 steps", "3 stepps", "3 hours", "1e3 steps", "%", "3 epochs 2 steps", "nan%", -1, 2.5, True, None],
)
def test_what_is_no_duration_is_named(duration):
    with pytest.raises(UserError) as error:
        to_steps(duration, total=920, **UNIT)
    text = str(error.value)
    assert text.startswith(f"eval.every is {duration!r}; expected a duration") and "\n" not in text


def test_percent_needs_a_whole():
    with pytest.raises(UserError, match="eval.every is '25%', but percent"):
        to_steps("25%", **UNIT)
    with pytest.raises(UserError, match="expected at most 100%"):
        to_steps("101%", total=920, **UNIT)
