"""The pictures of the curves, drawn from their figures. They have neither dates nor random names in them: the same
figures give the same file."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
"""Told apart by the colour-blind (Okabe and Ito)."""
MARKERS = "osD^vP"
YARDSTICK = {"color": "#666666", "linestyle": "--", "marker": None, "linewidth": 1.4}
STYLE = {
    "svg.hashsalt": "shadowcore",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}


def short(number: float, _: Any = None) -> str:
    """1024 as it is, 16,384 with a comma."""
    return f"{number:,.0f}" if number >= 10_000 else f"{number:g}"


def apart(levels: list[float], least: float) -> list[float]:
    """The same positions (of labels, ascending), each at least so far above the one before."""
    moved: list[float] = []
    for level in levels:
        moved.append(level if not moved else max(level, moved[-1] + least))
    # What was pushed up is moved half-way back, as long as that leaves the order.
    shift = max((new - old for new, old in zip(moved, levels, strict=True)), default=0.0) / 2
    return [level - shift for level in moved] if shift else moved


def draw(source: Path) -> Path:
    """Draw the figures in a file NAME.json into NAME.svg beside it."""
    data = json.loads(source.read_text("utf-8"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.0, 4.2), layout="constrained")
        _lines(axes, data)
        axes.set_title(data["title"])
        axes.set_xlabel(data["label"])
        axes.set_ylabel("ns an operation")
        target = source.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # matplotlib ends lines of paths with blanks.
    text = "\n".join(line.rstrip() for line in target.read_text("utf-8").splitlines())
    target.write_text(text + "\n", "utf-8")
    return target


def _lines(axes: Any, data: dict[str, Any]) -> None:
    x = data["x"]
    axes.set_xscale("log", base=2 if x[-1] & (x[-1] - 1) == 0 else 10)
    ends, colour = [], 0
    for name, costs in data["ns"].items():
        style: dict[str, Any] = YARDSTICK
        if not name.endswith(" in C"):
            style = {"color": COLOURS[colour % 6], "marker": MARKERS[colour % 6], "markersize": 4.5, "linewidth": 1.8}
            colour += 1
        axes.plot(x, costs, **style)
        ends.append((costs[-1], name, style["color"]))
    top = max(max(costs) for costs in data["ns"].values())
    least = min(min(costs) for costs in data["ns"].values())
    log = top > 40 * max(least, 0.1)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(short))
    else:
        axes.set_ylim(0, top * 1.08)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(FixedLocator(x))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    _labels(axes, sorted(ends))


def _labels(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """The name of each line beside its end, in its colour, none over another."""
    to_axes = axes.transAxes.inverted()
    levels = [float(to_axes.transform(axes.transData.transform((1, cost)))[1]) for cost, _, _ in ends]
    for (_, name, colour), level in zip(ends, apart(levels, 0.065), strict=True):
        axes.annotate(
            name,
            (1.02, level),
            xycoords="axes fraction",
            color=colour,
            va="center",
            ha="left",
            annotation_clip=False,
        )
