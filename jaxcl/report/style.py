"""The style of all figures: a light page, few lines, colours that colour-blind readers can tell apart."""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar

import matplotlib
import matplotlib.figure
import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxcl.runtime import storage

# Inches and dots per inch: a figure is 1620 dots wide and shown at 900, so 1 point of type is 1.4 pixels on screen.
WIDTH = 9.0
DPI = 180

INK, MUTED, FAINT = "#1c2733", "#66717d", "#dfe3e8"
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
)
LINES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
# Ten hues for classes: those of Okabe and Ito without black, and three that differ from them.
CLASSES = (*LINES[:4], "#7a3e9d", SKY, "#c24d8a", "#8a9a00", "#6b6b6b", "#7f4a1e")
GOOD, BAD = BLUE, VERMILLION

_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b6bec7",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
    "text.color": INK,
    # A class may be called "$5 note": do not read names as formulas.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}

P, F = ParamSpec("P"), TypeVar("F")


class Titled(NamedTuple):
    """A figure and its tooltips: (left, top, width, height, text), as shares of the figure's size."""

    figure: matplotlib.figure.Figure
    titles: list[tuple[float, float, float, float, str]]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the style, without warnings about letters that the bundled font lacks (they show as boxes)."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # ignore the style of a notebook
        matplotlib.rcParams.update(_RC)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def styled(draw: Callable[P, F]) -> Callable[P, F]:
    """Decorate a function to draw under `style`, whatever the caller's settings are."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> F:
        with style():
            return draw(*args, **kwargs)

    return wrapped


def new_figure(height: float, *, width: float = WIDTH, layout: str | None = "constrained"):
    """A figure on its own Agg canvas: no pyplot, no window, nothing to close."""
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: matplotlib.figure.Figure, path: str | os.PathLike) -> epath.Path:
    """Write a figure as PNG, in the style."""
    path, png = epath.Path(path), io.BytesIO()
    with style():
        figure.savefig(png, dpi=DPI, format="png", metadata={"Software": None})
    storage.write_whole(path, png.getvalue())
    return path


def message(text: str) -> matplotlib.figure.Figure:
    """A small figure with a text instead of a plot."""
    figure = new_figure(1.0, layout=None)
    figure.text(0.02, 0.5, text, va="center", color=MUTED)
    return figure


def short(name: object, length: int = 18) -> str:
    """A name on one line, cut to `length` letters."""
    name = " ".join(str(name).split())
    return name if len(name) <= length else name[: length - 1] + "…"


def as_rgb(images: np.ndarray) -> np.ndarray:
    """[..., H, W, 1 or 3] or [..., H, W], uint8 or float in [0,1] -> float32 [..., H, W, 3] in [0,1]."""
    images = np.asarray(images)
    if images.ndim == 2 or images.shape[-1] not in (1, 3):
        images = images[..., None]
    if images.dtype == np.uint8:
        images = images * np.float32(1 / 255)
    else:
        images = np.clip(np.nan_to_num(images.astype(np.float32)), 0.0, 1.0)
    return np.broadcast_to(images, (*images.shape[:-1], 3))


class Sheet:
    """A sheet of small images, placed to the dot, so each pixel is a square of the same size.

    Positions are in dots from the top left corner; font sizes are in points.
    """

    def __init__(self, width: int, height: int):
        self.figure = new_figure(height / DPI, width=width / DPI, layout=None)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.set_aspect("auto")
        self._titles: list[tuple[float, float, float, float, str]] = []

    def titled(self) -> Titled:
        """The figure with the tooltips of its images."""
        return Titled(self.figure, self._titles)

    def image(self, pixels: np.ndarray, x: int, y: int, size: tuple[int, int], *, title: str = "") -> None:
        """Draw [H,W,3] in [0,1] at (x, y), `size` = (width, height) in dots; title: its tooltip."""
        w, h = size
        if title:
            width, height = self.figure.bbox.width, self.figure.bbox.height
            self._titles.append((x / width, y / height, w / width, h / height, title))
        self.axes.imshow(pixels, extent=(x, x + w, y + h, y), interpolation="nearest", aspect="auto", vmin=0, vmax=1)
        self.axes.set_xlim(0, self.figure.bbox.width)
        self.axes.set_ylim(self.figure.bbox.height, 0)

    def text(self, x: float, y: float, text: str, **options) -> None:
        self.axes.text(x, y, text, **{"va": "center", "ha": "left", **options})

    def frame(self, x: float, y: float, size: tuple[int, int], color: str, width: float = 1.6) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), *size, fill=False, edgecolor=color, linewidth=width, joinstyle="miter"))

    def outline(self, mask: np.ndarray, x: int, y: int, size: tuple[int, int], color: str, width: float) -> None:
        """Draw the border of a boolean mask [H,W], along the edges of its pixels."""
        from matplotlib.collections import LineCollection

        mask = np.pad(np.asarray(mask, bool), 1)
        sx, sy = size[0] / (mask.shape[1] - 2), size[1] / (mask.shape[0] - 2)
        rows, cols = np.nonzero(mask[:, 1:] != mask[:, :-1])  # vertical edges
        lines = [((x + c * sx, y + (r - 1) * sy), (x + c * sx, y + r * sy)) for r, c in zip(rows, cols, strict=True)]
        rows, cols = np.nonzero(mask[1:] != mask[:-1])  # horizontal edges
        lines += [((x + (c - 1) * sx, y + r * sy), (x + c * sx, y + r * sy)) for r, c in zip(rows, cols, strict=True)]
        self.axes.add_collection(
            LineCollection(lines, colors=color, linewidths=width, capstyle="projecting"), autolim=False
        )


def cell_size(shape: tuple[int, int], room: int, limit: int = 200) -> tuple[int, int]:
    """(width, height) in dots of an image [H,W] in `room` dots: a whole number of dots per pixel."""
    h, w = shape
    scale = min(room, limit) / w
    scale = float(int(scale)) if scale >= 1 else scale
    return int(round(w * scale)), int(round(h * scale))
