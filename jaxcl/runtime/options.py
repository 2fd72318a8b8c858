"""The one typed layer of options: what a config may set, of which type and in which range, and parts made of it.

An option is a field of a frozen dataclass (or a keyword of a factory function) with a default and a type:

    @dataclasses.dataclass(frozen=True)
    class Queue(MemoryPart):
        length: Annotated[int, Range(1)] = 16384
        order: Literal["before", "after"] = "before"

The base keys of a config (jaxcl/config.py) and the options of every part are declared and checked in this way, once.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl.errors import UserError


class Range(NamedTuple):
    """Bounds of a number, or of each number of a tuple, as metadata of `typing.Annotated`."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        if self.at_least > -math.inf and self.at_most < math.inf:
            return f"from {self.at_least:g} to {self.at_most:g}"
        low = f"of at least {self.at_least:g}" if self.at_least > -math.inf else ""
        low = low or (f"above {self.above:g}" if self.above > -math.inf else "")
        high = f"at most {self.at_most:g}" if self.at_most < math.inf else ""
        high = high or (f"below {self.below:g}" if self.below < math.inf else "")
        return ", ".join(filter(None, (low, high)))


POSITIVE = Range(above=0)
SHARE = Range(0, 1)


class Option(NamedTuple):
    """One option: its default and its type, as written in the annotation."""

    default: Any
    type: Any


class OptionError(UserError):
    """An option with an impossible value; `construct` puts the path of its part before it."""

    def __init__(self, option: str, reason: str):
        super().__init__(f"{option} {reason}")
        self.option, self.reason = option, reason


class Options:
    """Base of frozen dataclasses whose fields are options: every value is checked when an object is made.

    Errors: OptionError for a value of another type or out of range. A subclass with rules of its own extends
    `__post_init__` and raises the same error.
    """

    def __post_init__(self) -> None:
        for name, option in options_of(type(self)).items():
            check(name, getattr(self, name), option)


@functools.cache
def options_of(part: Callable) -> dict[str, Option]:
    """The options of a part, in order: fields of a dataclass or parameters of a function that have a default."""
    hints = typing.get_type_hints(part, include_extras=True)
    return {
        name: Option(_default(part, name, p.default), hints.get(name, Any))
        for name, p in inspect.signature(part).parameters.items()
        if p.default is not inspect.Parameter.empty
    }


def _default(part: Callable, name: str, default: Any) -> Any:
    # Of a field with a factory the signature shows a placeholder.
    field = part.__dataclass_fields__[name] if dataclasses.is_dataclass(part) else None
    return default if field is None or field.default_factory is dataclasses.MISSING else field.default_factory()


def defaults(part: Callable) -> dict[str, Any]:
    """{option: default}"""
    return {name: option.default for name, option in options_of(part).items()}


def check(name: str, value: Any, option: Option) -> None:
    """Errors: OptionError unless the value is of the option's type and in its range."""
    if not _fits(value, option.type, option.default):
        raise OptionError(name, f"is {quoted(value)}; expected {expected(option)}")


def _fits(value: Any, kind: Any, default: Any = None) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        ranges = [r for r in args[1:] if isinstance(r, Range)]
        values = value if isinstance(value, (tuple, list)) else (value,)
        return _fits(value, args[0], default) and all(r.holds(v) for r in ranges for v in values)
    if origin is typing.Literal:
        return any(value == known and isinstance(value, type(known)) for known in args)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin in (tuple, list, Sequence) or kind in (tuple, list, Sequence):
        if not isinstance(value, (tuple, list)):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(_fits, value, args))
        return not args or all(_fits(v, args[0]) for v in value)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is str:
        # A number too: a duration of 0 and one of "0" are the same.
        return isinstance(value, (str, int)) and not isinstance(value, bool)
    if kind is type(None):
        return value is None
    return True


def expected(option: Option) -> str:
    """What an option takes, in words, with its default as an example."""
    kind, ranges = option.type, ()
    if typing.get_origin(kind) is typing.Annotated:
        kind, *ranges = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    if kind in words:
        what = words[kind]
    else:
        args = [a for a in typing.get_args(kind) if a is not Ellipsis]
        if args and typing.get_origin(args[0]) is typing.Annotated:
            inner, *ranges = typing.get_args(args[0])
        else:
            inner = args[0] if args else Any
        of = {int: "whole numbers", float: "numbers", str: "texts"}.get(inner, "values")
        what = f"a tuple of {of}"
    bounds = ", ".join(str(r) for r in ranges if isinstance(r, Range))
    return f"{what} {bounds}".rstrip() + f", such as {option.default!r}"


def construct(name: str, part: Callable, values: Mapping[str, Any], **supplied: Any) -> Any:
    """Call `part` with these options, checked; `name` is its path in the config.

    Errors: UserError, one line that begins with the config key: an unknown option, a value of another type or out of
    range, or whatever the part itself refuses.
    """
    known = options_of(part)
    for key in values:
        if key not in known:
            raise UserError(f"{name} has no option {key!r}{suggestion(key, known)}")
    given = {k: _tuples(v) for k, v in values.items()}
    try:
        if not (isinstance(part, type) and issubclass(part, Options)):  # those check themselves
            for key, value in given.items():
                check(key, value, known[key])
        return part(**supplied, **given)
    except OptionError as error:
        raise UserError(f"{name}.{error.option} {error.reason}") from None
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be made of these options: {quoted(error)}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


# What other libraries call our options; the last part of a key.
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "base_lr", "max_lr"), "lr"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "steps", "num_steps", "max_steps"), "duration"),
    **dict.fromkeys(("bs", "batch", "batchsize"), "batch_size"),
    **dict.fromkeys(("tau", "temp"), "temperature"),
    **dict.fromkeys(("arch", "architecture", "backbone", "name"), "kind"),
    **dict.fromkeys(("pretrained", "checkpoint", "init"), "weights"),
}


def suggestion(word: Any, known: Iterable[str]) -> str:
    """'; did you mean ...?', or the list of what is known."""
    known = list(known)
    if SYNONYMS.get(str(word)) in known:
        return f"; did you mean {SYNONYMS[str(word)]!r}?"
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known) or 'none'}"


def quoted(value: Any) -> str:
    """A value as code, in one printable line of at most 200 characters."""
    text = " ".join(repr(value).split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 200 else f"{text[:200]}..."
