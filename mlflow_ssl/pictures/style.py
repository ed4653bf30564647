"""Colours, letters and canvases that all pictures share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by colour-blind people too; without yellow, which is lost on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#333333")
RIGHT, WRONG = "#009E73", "#D55E00"
INK, PALE_INK = "#222222", "#767676"
DPI = 110


def load_libraries() -> None:
    """Import what the pictures are drawn with.

    To be called before a thread draws: a module that a thread is importing stays locked for ever in a process that is
    forked meanwhile, as loaders' workers are.
    """
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    Image.init()


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings along, ``size`` px high."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Return ``text``, or its longest beginning that fits with an ellipsis behind it.

    Example:
        >>> shorten("golden retriever", lambda text: len(text) <= 8)
        'golden …'
    """
    if fits(text):
        return text
    return next((cut for end in range(len(text), 0, -1) if fits(cut := f"{text[:end]}…")), "…")


def new_axes(width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure of ``width`` by ``height`` inches, and its axes; pyplot is for people at a terminal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def plain_text(text: str) -> str:
    r"""Return ``text`` so that matplotlib draws it as it is: it takes what stands between two ``$`` for a formula.

    Example:
        >>> plain_text("US$ to $")
        'US\\$ to \\$'
    """
    return text.replace("$", r"\$")


def draw(figure: "Figure") -> Image.Image:
    """Return the figure as RGB pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
