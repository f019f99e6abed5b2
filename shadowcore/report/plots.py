"""Pictures of a study as SVG text, for pages that need no network and no script to be looked at.

Why matplotlib: it draws vector graphics that stand in the page as they are, so that the file is small, prints
sharply, and shows without JavaScript. The alternatives draw in the browser: they bring a library into every file
(plotly 4.5 MB, bokeh 1 MB, vega 0.8 MB), which shows nothing without it. What they would add, values under the pointer,
takes a hundred lines.

Colours are not in the pictures but in the page's style sheet, as variables: the same picture is good on light and dark.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .document import edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Array = NDArray[Any]

DASHES: tuple[Any, ...] = ((0, (1.5, 1.5)), (0, (5, 1.5)), "solid", (0, (7, 2, 1.5, 2)), (0, (4, 1, 1, 1, 1, 1)))
"""Of lines, by the number of their design: colour is not all that tells them apart."""

_INK, _FAINT = "#010203", "#010204"


def check() -> None:
    """ConfigError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("html: needs matplotlib: pip install 'shadowcore[report]'") from None


class Plot:
    """One picture: a pair of axes over operations, and the colours that stand for variables of the style sheet.

    titles: of parts, by their gid: a browser shows them under the pointer.
    """

    def __init__(self, name: str, x_label: str, y_label: str, height: float = 2.3, wide: bool = False) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        self.name = name
        self.titles: dict[str, str] = {}
        self._colours: dict[str, str] = {_INK: "var(--ink)", _FAINT: "var(--faint)"}
        with matplotlib.rc_context({"font.size": 9}):
            self.figure: Figure = Figure(figsize=(11.0 if wide else 6.0, height), layout="constrained")
            self.axes: Axes = self.figure.add_subplot()
        axes = self.axes
        axes.set_xlabel(x_label, color=_INK, fontsize=9)
        axes.set_ylabel(y_label, color=_INK, fontsize=9)
        axes.tick_params(colors=_INK, length=3, width=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
            spine.set_linewidth(0.6)
        axes.xaxis.set_major_formatter(_short)
        axes.yaxis.set_major_formatter(_short)
        axes.margins(x=0)

    def colour(self, variable: str) -> str:
        """A colour that becomes var(--VARIABLE)."""
        value = f"var(--{variable})"
        for sentinel, known in self._colours.items():
            if known == value:
                return sentinel
        sentinel = f"#0102{len(self._colours) + 3:02x}"
        self._colours[sentinel] = value
        return sentinel

    def mark(self, marks: Mapping[str, float]) -> None:
        """Dashed lines down, with their names beside them: where phases begin."""
        for name, at in marks.items():
            self.axes.axvline(at, color=_INK, linewidth=0.6, linestyle=(0, (2, 2)))
            self.axes.annotate(
                name,
                (at, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -1),
                textcoords="offset points",
                rotation=90,
                verticalalignment="top",
                fontsize=6.5,
                color=_INK,
            )

    def grid(self) -> None:
        self.axes.grid(axis="y", color=_FAINT, linewidth=0.5)
        self.axes.set_axisbelow(True)

    def svg(self, label: str) -> tuple[str, list[float]]:
        """The picture, with `label` for those who do not see it; and where its axes are: left, right, top, bottom,
        as fractions of it."""
        import matplotlib

        out = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name, "svg.image_inline": True}):
            self.figure.savefig(out, format="svg", metadata=nothing, transparent=True)
        box = self.axes.get_position()
        place = [round(float(v), 5) for v in (box.x0, box.x1, 1 - box.y1, 1 - box.y0)]
        return self._for_page(out.getvalue(), label), place

    def _for_page(self, text: str, label: str) -> str:
        """SVG to stand in a page: identifiers of its own, no style sheet that reaches others, the page's font."""
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
        text = re.sub(r"""(<svg[^>]*?) width="[^"]*" height="[^"]*\"""", r"\1", text, count=1)
        text = re.sub(r""" id="([^"]*)\"""", rf''' id="{self.name}-\1"''', text)
        text = re.sub(r"""href="#""", f'href="#{self.name}-', text)
        text = text.replace("url(#", f"url(#{self.name}-")
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
        text = re.sub(r"#0102[0-9a-f]{2}", lambda found: self._colours[found[0]], text)
        text = re.sub(r"(\d\.\d{3})\d+", r"\1", text)  # thousandths of a point
        text = re.sub(r"\s*\n\s*", "\n", text)
        for part, title in self.titles.items():
            place = f'<g id="{self.name}-{part}">'
            text = text.replace(place, f"{place}<title>{_attribute(title)}</title>", 1)
        role = f'<svg role="img" aria-label="{_attribute(label)}"'
        return text.replace("<svg", role, 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _short(value: float, _: Any = None) -> str:
    """1,500,000 as 1.5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{suffix}"
    return f"{value:.6g}"


def stacked(
    name: str, operation: Array, layers: Mapping[str, Array], y_label: str, top: float, unit: str = "operations"
) -> Plot:
    """Layers, one on the other, constant within a window; `layers` by the variable of their colour."""
    plot = Plot(name, unit, y_label)
    plot.grid()
    base = np.zeros(len(operation))
    for variable, values in layers.items():
        high = base + values
        plot.axes.stairs(high, edges(operation), baseline=base, fill=True, color=plot.colour(variable), linewidth=0)
        base = high
    plot.axes.set_ylim(0, top or 1)
    return plot


def lines(
    name: str,
    series: Sequence[tuple[Array, Array]],
    y_label: str,
    top: float | None = None,
    unit: str = "operations",
) -> Plot:
    """Lines, constant within a window: (operation, values) of each, by the colours design-0, design-1, ..."""
    plot = Plot(name, unit, y_label)
    plot.grid()
    for number, (operation, values) in enumerate(series):
        if len(operation):
            plot.axes.stairs(
                np.asarray(values, dtype=np.float64),
                edges(operation),
                baseline=None,
                color=plot.colour(f"design-{number % 8}"),
                linestyle=DASHES[number % len(DASHES)],
                linewidth=1.4,
            )
    plot.axes.set_ylim(bottom=0)
    if top is not None:
        plot.axes.set_ylim(top=1.03 * top)
    elif plot.axes.get_ylim()[1] < 1e-9 or not any(np.any(values) for _, values in series):
        plot.axes.set_ylim(top=1)
    return plot


def bars(name: str, names: Sequence[str], parts: Mapping[str, Array], x_label: str, labels: Mapping[str, str]) -> Plot:
    """A bar for each name, of parts laid end to end; `parts` by the variable of their colour, like `labels`, what they
    are called."""
    plot = Plot(name, x_label, "", height=0.75 + 0.34 * len(names), wide=True)
    left = np.zeros(len(names))
    for variable, values in parts.items():
        drawn = plot.axes.barh(
            range(len(names)), values, left=left, height=0.68, color=plot.colour(variable), linewidth=0
        )
        for i, bar in enumerate(drawn):
            bar.set_gid(f"bar-{variable}-{i}")
            plot.titles[f"bar-{variable}-{i}"] = f"{names[i]}, {labels[variable]}: {values[i]:,.0f}"
        left = left + values
    plot.axes.set_yticks(range(len(names)), names)
    plot.axes.invert_yaxis()
    plot.axes.set_xlim(0, float(left.max()) * 1.02 if left.any() else 1)
    plot.axes.grid(axis="x", color=_FAINT, linewidth=0.5)
    plot.axes.set_axisbelow(True)
    return plot


def matrix(name: str, operation: Array, counts: Array, rows: Sequence[str] | None, x_label: str, y_label: str) -> Plot:
    """A heat map: rows down, time across, the colours of cividis by logarithm; 0 stays empty.

    Without the darkest colours, which would be lost on a dark page.
    """
    import matplotlib
    from matplotlib.colors import LogNorm

    height = 0.75 + (0.17 * len(counts) if rows is not None else 3.0)
    plot = Plot(name, x_label, y_label, height=min(height, 9), wide=rows is None)
    levels = matplotlib.colormaps["cividis"](0.15 + 0.85 * LogNorm(1, max(int(counts.max()), 2))(np.maximum(counts, 1)))
    levels[..., 3] = counts > 0
    # One pixel a cell, which the browser scales with sharp borders.
    picture = np.rint(levels * 255).astype(np.uint8)
    extent = (0.0, float(operation[-1]), float(len(counts)), 0.0)
    plot.axes.imshow(picture, extent=extent, aspect="auto", interpolation="none")
    if rows is not None:
        plot.axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        plot.axes.tick_params(axis="y", labelsize=7)
    return plot


def data(value: Any) -> str:
    """A value as the text of an HTML attribute."""
    return _attribute(json.dumps(value))
