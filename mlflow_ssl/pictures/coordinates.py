"""Trainings of a sweep as lines across parallel axes: one for each key, the last for what came of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_ssl.pictures.style import INK, PALE_INK, WRONG, shorten

PALETTE = "Viridis256"
NUM_TICKS = 5
LONGEST_LABEL = 22


@dataclass(frozen=True)
class Axis:
    """One axis, and where on it each line passes.

    Attributes:
        name: written above it.
        values: of each line: numbers, or words, which are spread evenly in the order in which they first come.
        log: whether numbers are spread by their ratios.
    """

    name: str
    values: Sequence[float | str]
    log: bool = False

    @property
    def heights(self) -> list[float]:
        """Where each line passes, in [0, 1].

        Example:
            >>> Axis("lr", [0.01, 0.1, 1.0], log=True).heights, Axis("backbone", ["a", "b", "a"]).heights
            ([0.0, 0.5, 1.0], [0.0, 1.0, 0.0])
        """
        if not self._numeric:
            words = list(dict.fromkeys(self.values))
            return [words.index(value) / (len(words) - 1) if len(words) > 1 else 0.5 for value in self.values]
        low, high = self._ends
        return [0.5 if low == high else (self._scaled(float(value)) - low) / (high - low) for value in self.values]

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Heights and what is written there."""
        if not self._numeric:
            marks = dict(zip(map(str, self.values), self.heights, strict=True))
            return [(height, shorten(word, lambda text: len(text) <= LONGEST_LABEL)) for word, height in marks.items()]
        low, high = self._ends
        if low == high:
            return [(0.5, f"{float(self.values[0]):.4g}")]
        shares = [number / (NUM_TICKS - 1) for number in range(NUM_TICKS)]
        return [(share, f"{self._unscaled(low + share * (high - low)):.3g}") for share in shares]

    @property
    def _numeric(self) -> bool:
        return not any(isinstance(value, str) for value in self.values)

    @property
    def _ends(self) -> tuple[float, float]:
        scaled = [self._scaled(float(value)) for value in self.values]
        return min(scaled), max(scaled)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _unscaled(self, value: float) -> float:
        return 10**value if self.log else value


def parallel_coordinates_html(
    axes: Sequence[Axis], results: Axis, *, names: Sequence[str], whole: Sequence[bool], title: str = ""
) -> str:
    """Return a page that needs nothing else: each training a line, coloured by its result, named under the mouse.

    Args:
        axes: of the keys.
        results: the last axis, of numbers.
        names: of the trainings.
        whole: whether each went to its end; the others are paler.
        title: written above.
    """
    from bokeh.embed import file_html
    from bokeh.models import HoverTool, Range1d
    from bokeh.plotting import figure
    from bokeh.resources import INLINE
    from bokeh.transform import linear_cmap

    every = [*axes, results]
    plot = figure(
        title=title,
        sizing_mode="stretch_both",
        min_height=420,
        tools="save",
        toolbar_location="above",
        x_range=Range1d(start=-0.4, end=len(every) - 0.6),
        y_range=Range1d(start=-0.08, end=1.16),
    )
    _draw_axes(plot, every)
    values = [float(value) for value in results.values]
    columns: dict[str, Any] = {
        "xs": [list(range(len(every))) for _ in names],
        "ys": [list(heights) for heights in zip(*(axis.heights for axis in every), strict=True)],
        "result": values,
        "alpha": [0.9 if each else 0.35 for each in whole],
        "name": list(names),
        **{f"value{number}": [_text(value) for value in axis.values] for number, axis in enumerate(every)},
    }
    under_mouse: dict[str, Any] = {"hover_line_color": WRONG, "hover_line_width": 5}
    lines = plot.multi_line(
        "xs",
        "ys",
        source=columns,
        line_width=2.5,
        line_alpha="alpha",
        line_color=linear_cmap("result", PALETTE, min(values), max(values)),
        **under_mouse,
    )
    tooltips = [("training", "@name"), *((axis.name, f"@value{number}") for number, axis in enumerate(every))]
    plot.add_tools(HoverTool(renderers=[lines], tooltips=tooltips, line_policy="interp"))
    _tidy(plot)
    return str(file_html(plot, INLINE, title=title or "Parallel coordinates"))


def _draw_axes(plot: Any, axes: Sequence[Axis]) -> None:
    for position, axis in enumerate(axes):
        plot.segment(x0=[position], y0=[0], x1=[position], y1=[1], line_color="#bbbbbb", line_width=1.5)
        heights, words = zip(*axis.ticks, strict=True)
        plot.text(
            x=[position] * len(heights),
            y=list(heights),
            text=list(words),
            x_offset=7,
            text_baseline="middle",
            text_color=INK,
            text_font_size="12px",
        )
        plot.text(
            x=[position],
            y=[1.09],
            text=[axis.name],
            text_align="center",
            text_color=INK,
            text_font_size="13px",
            text_font_style="bold",
        )


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _tidy(plot: Any) -> None:
    plot.axis.visible = False
    plot.grid.visible = False
    plot.outline_line_color = None
    plot.toolbar.logo = None
    plot.title.text_color = PALE_INK
    plot.title.text_font_size = "14px"
    plot.title.text_font_style = "normal"
