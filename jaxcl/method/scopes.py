"""Scopes of an update by name, from the code that traces them to the operations of the compiled program.

`scope` marks what is traced under it. XLA keeps the mark in the metadata of its operations, on every platform. Marks
change neither the program nor its key in the compilation cache (except for `jaxcl.train.profile`, which asks for it).
"""

import collections
import re
from typing import NamedTuple

import jax

MARK = "scope:"
_MARKED = re.compile(MARK + r"([^/()\"]+)")
# Operations that only contain others.
_AROUND = re.compile(r"\s(while|conditional|call)\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([^,}]+(?:, ?%[^,}]+)*)")
BACKWARD = ", backward"


def scope(name: str):
    """A context manager: operations traced within belong to this scope. Of nested scopes the outermost counts."""
    return jax.named_scope(MARK + re.sub(r"[/()\"]", ".", name))


def scope_of(op_name: str) -> str:
    """The scope in an operation's name such as jit(update)/transpose(jvp(scope:encode x))/dot; "" without one."""
    found = _MARKED.search(op_name)
    if not found:
        return ""
    # The transpose outside the mark is the update's gradient; one inside it is the scope's own.
    return found[1] + (BACKWARD if "transpose(" in op_name[: found.start()] else "")


class Scopes(NamedTuple):
    """Scopes of one compiled program.

    module: the program's name. of: {operation: scope, "" if unknown}. around: operations that only contain others.
    """

    module: str
    of: dict[str, str]
    around: frozenset[str]


def scopes_of(program: str) -> Scopes:
    """Read the scopes from the text of a compiled program (`jax.stages.Compiled.as_text`)."""
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
        """The operation's scope; for a fusion whose last operation has none, the commonest one inside."""
        inside = sum((within[c] for c in called[name]), collections.Counter())
        return own[name] or (inside.most_common(1)[0][0] if inside else "")

    module = re.match(r"HloModule ([^\s,]+)", program)
    return Scopes(module[1] if module else "", {n: scope_named(n) for n in own}, frozenset(around))
