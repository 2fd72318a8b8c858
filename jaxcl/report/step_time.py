"""Where the time of an update goes, as a table with bars."""

import html
from collections.abc import Mapping
from typing import Any

SMALL = 0.005  # scopes that take less than this share of an update are summed up in one row

TITLE = "Where the time of an update goes"


def section(measured: Mapping[str, Any]) -> str:
    """The HTML section of a step_time.json (`jaxcl.train.profile`)."""
    whole, scopes = measured["seconds"], dict(measured["parts"])
    small = {name: s for name, s in scopes.items() if s < SMALL * whole}
    rows = {name: s for name, s in scopes.items() if name not in small}
    if small:
        rows[f"{len(small)} smaller scopes: {'; '.join(small)}"] = sum(small.values())
    rows |= {"waiting for data": measured["data"], "the rest: nothing ran": measured["rest"]}
    cells = "".join(_row(name, seconds, whole) for name, seconds in rows.items())
    cells += f"<tr><th scope=row>an update</th><td class=value>{_ms(whole)}</td><td></td></tr>"
    return (
        f'<section id="step_time"><h2>{TITLE}</h2><p>{html.escape(_caption(measured))}</p>'
        f"<div class=wide><table class=steps>{cells}</table></div></section>"
    )


def _caption(measured: Mapping[str, Any]) -> str:
    first, last = measured["updates"]
    share = 100 * sum(measured["parts"].values()) / measured["seconds"]
    return (
        f"Measured from a trace of updates {first} to {last} of this run on {measured['device']}: the time of all "
        "operations, summed up by the scope of the update that they belong to. A fused operation counts for the "
        "scope of its last part, and operations that run at the same time share it. Backward is the backward pass of "
        "a scope. Waiting for data is time in which the device was idle because the next batch was not ready. The "
        f"operations add up to {share:.1f}% of the update by the host's clock; tracing slows small operations down a "
        "little."
    )


def _row(name: str, seconds: float, whole: float) -> str:
    share = max(0.0, seconds / whole)
    return (
        f"<tr><th scope=row>{html.escape(name)}</th><td class=value>{_ms(seconds)}</td>"
        f'<td class=share><i style="width:{min(100.0, 100 * share):.1f}%"></i>{100 * share:.1f}%</td></tr>'
    )


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f} ms" if abs(ms) >= 100 else f"{ms:.1f} ms" if abs(ms) >= 1 else f"{ms:.2f} ms"
