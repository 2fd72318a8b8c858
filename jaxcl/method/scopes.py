"""The parts of an update by name, from the code that traces them to the operations of the compiled program.

`part` marks what is traced under it; XLA carries the mark along in the metadata of its operations, on every platform.
Nothing of the program changes, nor (but for `jaxcl.train.profile`, which asks for it) its place in the cache of compiled
programs.
"""

import collections
import re
from typing import NamedTuple

import jax

_MARK = "scope:"
_MARKED = re.compile(_MARK + r"([^/()\"]+)")
# Operations that are only a place where others run.
_AROUND = re.compile(r"\s(while|conditional|call)\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([^,}]+(?:, ?%[^,}]+)*)")
BACKWARD = ", backward"


def scope(name: str):
    """Everything traced within counts for this part of the update; of parts within parts the outermost counts."""
    return jax.named_scope(_MARK + re.sub(r"[/()\"]", ".", name))


def scope_of(op_name: str) -> str:
    """The part in the metadata of an operation such as jit(update)/transpose(jvp(scope:encode x))/dot; "" without."""
    found = _MARKED.search(op_name)
    if not found:
        return ""
    # What a gradient runs back through. Scopes that are nobody's gradient may take one of their own within.
    return found[1] + (BACKWARD if "transpose(" in op_name[: found.start()] else "")


class Scopes(NamedTuple):
    """module: the program's name. of: operation -> part, "" where the program does not tell. around: operations that
    only hold others."""

    module: str
    of: dict[str, str]
    around: frozenset[str]


def scopes_of(program: str) -> Scopes:
    """From the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    own: dict[str, str] = {}
    called: dict[str, list[str]] = {}
    within: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    around, computation = set(), ""
    for line in program.splitlines():
        if found := _OPERATION.match(line):
            name, op_name = found[1], re.search(r'op_name="([^"]*)"', line)
            own[name] = scope_of(op_name[1]) if op_name else ""
            called[name] = [c.strip().lstrip("%") for m in _CALLED.finditer(line) for c in m[1].split(",")]
            if own[name]:
                within[computation][own[name]] += 1
            if _AROUND.search(line.partition("metadata=")[0]):
                around.add(name)
        elif found := _COMPUTATION.match(line):
            computation = found[1]

    def scope_named(name: str) -> str:
        """Its own; of a fusion whose last operation has none, that of most of the others."""
        inside = sum((within[c] for c in called[name]), collections.Counter())
        return own[name] or (inside.most_common(1)[0][0] if inside else "")

    module = re.match(r"HloModule ([^\s,]+)", program)
    return Scopes(module[1] if module else "", {n: scope_named(n) for n in own}, frozenset(around))
