"""Where the time of an update goes, as a table with bars."""

import html
from collections.abc import Mapping
from typing import Any

SMALL = 0.005  # parts below this share of an update are one row

TITLE = "Where the time of an update goes"


def section(figures: Mapping[str, Any]) -> str:
    """HTML of what `jaxcl.train.profile.step_time` measured, with the updates and the device it was measured on."""
    whole, parts = figures["seconds"], dict(figures["parts"])
    small = {name: s for name, s in parts.items() if s < SMALL * whole}
    rows = {name: s for name, s in parts.items() if name not in small}
    if small:
        rows[f"{len(small)} smaller parts: {'; '.join(small)}"] = sum(small.values())
    rows |= {"waiting for data": figures["data"], "the rest: nothing ran": figures["rest"]}
    cells = "".join(_row(name, seconds, whole) for name, seconds in rows.items())
    cells += f"<tr><th scope=row>an update</th><td class=value>{_ms(whole)}</td><td></td></tr>"
    return (
        f'<section id="step_time"><h2>{TITLE}</h2><p>{html.escape(_said(figures))}</p>'
        f"<div class=wide><table class=steps>{cells}</table></div></section>"
    )


def _said(figures: Mapping[str, Any]) -> str:
    first, last = figures["updates"]
    named = sum(figures["parts"].values())
    device, share = figures["device"], 100 * named / figures["seconds"]
    return (
        f"Measured from a trace of updates {first} to {last} of this run on {device}: how long each operation "
        "ran, added up by the part of the recipe it was made from. One that was fused from several counts for the part "
        "of its last, and a moment in which several ran is shared. Backward is what the gradient runs back through. "
        "Waiting for data is when the device had nothing to do and the next batch was not there. The operations add up "
        f"to {share:.1f}% of the update as the host's clock has it; a trace slows small operations a little."
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
