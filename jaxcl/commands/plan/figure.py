"""A plan as a figure."""

import pathlib
from typing import Any

import numpy as np

from jaxcl.commands.plan.counts import Plan
from jaxcl.report.style import BLUE, MUTED, VERMILLION, new_figure, save, styled


def draw(plan: Plan, path: pathlib.Path) -> None:
    """Save the weak-scaling table as a figure: speed and cost of the loss over devices."""
    save(_figure(plan), path)


@styled
def _figure(plan: Plan) -> Any:
    figure = new_figure(3.6)
    speed, loss = figure.subplots(1, 2)
    rows = [r for r in plan["table"] if r["known"]]
    n = np.array([r["devices"] for r in rows])
    fast, slow = (np.array([r["batch"] / r["step_seconds"][i] for r in rows]) for i in (0, 1))
    speed.plot(n, fast[0] * n / n[0], color=MUTED, linestyle=":", label="one device, scaled linearly")
    speed.fill_between(n, slow, fast, color=BLUE, alpha=0.2, linewidth=0)
    speed.plot(n, fast, color=BLUE, label="sending overlaps work")
    speed.plot(n, slow, color=VERMILLION, label="sending comes after work")
    speed.set(xscale="log", yscale="log", xlabel="devices", title="Images per second at the chip's peak rates")
    loss.plot(n, [max(r["loss_memory"], 1) / 2**20 for r in rows], color=BLUE, label="memory of the loss")
    sent = [max(r["sent"]["loss"], 1) / 2**20 for r in rows]
    loss.plot(n, sent, color=VERMILLION, label="sent for the loss")
    if plan["ring_from"]:
        loss.axvline(plan["ring_from"], color=MUTED, linestyle=":", label="ring from here on")
    loss.set(xscale="log", yscale="log", xlabel="devices", title="MiB of the loss per device")
    for ax in (speed, loss):
        ax.legend(frameon=False, fontsize=8)
    return figure
