"""The options layer: every type and range, by its edges."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest

from jaxcl.errors import UserError
from jaxcl.runtime.options import OptionError, Options, Range, construct, defaults


@dataclasses.dataclass(frozen=True)
class Part(Options):
    flag: bool = False
    count: Annotated[int, Range(1)] = 3
    share: Annotated[float, Range(above=0, at_most=1)] = 0.5
    word: Literal["a", "b", 3] = "a"
    text: str = ""
    pair: tuple[float, float] = (0.1, 1.0)
    names: tuple[str, ...] = ()
    whole: Annotated[Sequence[int], Range(0, below=10)] = (1, 2)
    maybe: int | None = None
    anything: Any = None
    many: dict = dataclasses.field(default_factory=dict)


GOOD = [
    dict(flag=True),
    dict(count=1),
    dict(count=2**62),
    dict(share=1),
    dict(share=1e-30),
    dict(word="b"),
    dict(word=3),
    dict(text="x"),
    dict(text=0),
    dict(pair=(0, 1)),
    dict(pair=[0.5, 0.5]),
    dict(names=("a", "b")),
    dict(whole=()),
    dict(whole=(0, 9)),
    dict(maybe=4),
    dict(maybe=None),
    dict(anything=len),
    dict(many={"a": 1}),
]
BAD = [
    dict(flag=1),
    dict(flag="True"),
    dict(count=0),
    dict(count=1.0),
    dict(count=True),
    dict(count=2**63),
    dict(count="3"),
    dict(share=0),
    dict(share=1.0001),
    dict(share=math.nan),
    dict(share=math.inf),
    dict(share=None),
    dict(word="c"),
    dict(word=None),
    dict(text=1.5),
    dict(text=None),
    dict(text=True),
    dict(pair=(0.1,)),
    dict(pair=(0.1, 1.0, 2.0)),
    dict(pair=(0.1, "1")),
    dict(pair="ab"),
    dict(names="ab"),
    dict(names=(1.5,)),
    dict(whole=(10,)),
    dict(whole=(-1,)),
    dict(whole=(1.5,)),
    dict(maybe=1.5),
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_values_that_fit(values):
    ((name, value),) = values.items()
    made = construct("parts.p", Part, values)
    assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("values", BAD, ids=str)
def test_values_that_do_not(values):
    ((name, _),) = values.items()
    with pytest.raises(UserError) as error:
        construct("parts.p", Part, values)
    assert str(error.value).startswith(f"parts.p.{name} is ") and "\n" not in str(error.value)
    with pytest.raises(OptionError) as direct:  # made by hand, it is checked as well
        Part(**values)
    assert direct.value.option == name


def test_unknown_options_and_errors_of_the_part():
    with pytest.raises(UserError, match="parts.p has no option 'cuont'; did you mean 'count'?"):
        construct("parts.p", Part, {"cuont": 3})

    def factory(size: int, *, width: Annotated[int, Range(1)] = 2):
        return size // (width - 2)

    assert defaults(factory) == {"width": 2} and construct("f", factory, {"width": 4}, size=6) == 3
    for options, words in (({"width": 0}, "f.width is 0"), ({"width": 2}, "f cannot be made"), ({"size": 3}, "size")):
        with pytest.raises(UserError, match=words):
            construct("f", factory, options, size=6)


def test_messages_are_one_line_however_long_the_value():
    with pytest.raises(UserError) as error:
        construct("parts.p", Part, {"names": ("\n\x00" * 1000, 1.5)})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
