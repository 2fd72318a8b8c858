"""What a compiled program sends between devices: its collectives, read from XLA's text of the program.

All N devices run the same text. An instruction inside a loop counts once for each known iteration.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_SIZES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Collective(NamedTuple):
    """One instruction. size: bytes of the array that is reduced, gathered, scattered or passed on."""

    kind: str
    size: int
    group: int  # devices in each of its groups
    times: int  # per step
    largest: int  # bytes of its largest array; XLA combines small arrays into one instruction
    source: str  # where in the code it comes from, by JAX's name

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step, by the usual ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": float(self.group > 1)}.get(self.kind, share)
        return factor * self.size * self.times


def collectives(text: str) -> list[Collective]:
    """All collectives of a program. text: `jax.jit(f).lower(...).compile().as_text()`."""
    found: dict[str, list[Collective]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
            found[name], calls[name] = [], []
        elif name and " = " in line:
            if op := _COLLECTIVE.search(line):
                found[name].append(_collective(line, op[1], op[2], bool(op[3])))
            trips = int(m[1]) if " while(" in line and (m := _TRIPS.search(line)) else 1
            called = [*_CALLED.findall(line), *(b.strip(" %") for m in _BRANCHES.findall(line) for b in m.split(","))]
            calls[name] += [(c, trips) for c in called]

    out: list[Collective] = []

    def visit(name: str, times: int) -> None:
        out.extend(c._replace(times=c.times * times) for c in found.get(name, ()))
        for called, trips in calls.get(name, ()):
            visit(called, times * trips)

    visit(entry, 1)
    return out


def totals(found: Iterable[Collective], field: str = "sent") -> dict[str, float]:
    """Bytes per step by kind: those that a device sends, or with field="size" those of the arrays."""
    out: dict[str, float] = {}
    for c in found:
        value = c.sent if field == "sent" else getattr(c, field) * c.times
        out[c.kind] = out.get(c.kind, 0) + value
    return out


def _collective(line: str, result: str, kind: str, begun: bool) -> Collective:
    sizes = [_SIZES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in _shapes(result)]
    group = _group(line)
    if begun and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]
    if kind == "reduce-scatter":
        sizes = [n * group for n in sizes]
    source = m[1] if (m := re.search(r'op_name="([^"]*)"', line)) else ""
    return Collective(kind, sum(sizes), group, 1, max(sizes, default=0), source)


def _shapes(result: str) -> list[tuple[str, str]]:
    return re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)


def _group(line: str) -> int:
    if " collective-permute" in line:
        return 2 if re.search(r"source_target_pairs=\{\{", line) else 1
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(m[1].split(","))
    if m := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(m[1])
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        return math.prod(int(axes[a]) for a in re.findall(r"'(\w+)'", m[2]))
    return 1
