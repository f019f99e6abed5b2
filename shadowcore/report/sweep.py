"""A sweep as one HTML file: lines, heat maps, small multiples, a table of all. Nothing is fetched from anywhere.

Matplotlib draws, as for pages of studies (`plots` says why): what it draws stands in the page, prints sharply, and
shows without a script. A script adds zoom, series that are switched on and off, values under the pointer, tables that
sort, and saving as SVG, PNG and CSV; for that it draws the few marks of a panel anew from the numbers of the page.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from .._version import __version__
from ..errors import ConfigError
from ..files import replace
from ..studies.collect import Sweep
from ..studies.plan import LABELS
from ..studies.results import Swept
from ..studies.settings import effective
from . import plots
from .panels import METRICS, NONE, PANELS, Map, Panel, Shown, Spot

__all__ = ["check", "write"]

TABLE = 3000
"""Rows of the table, at most."""
check = plots.check


@dataclasses.dataclass(frozen=True)
class _Told:
    """What a page is made of. fixed: settings that all points have. command: that repeats it, or nothing."""

    name: str
    axes: tuple[str, ...]
    rows: list[dict[str, Any]]
    counts: dict[str, int]
    errors: list[dict[str, Any]]
    fixed: dict[str, Any]
    prices: dict[str, Any]
    command: str = ""


def _told(found: Sweep | Swept) -> _Told:
    if isinstance(found, Swept):
        return _told_of_studies(found)
    rows = []
    for row, point in zip(found.rows(), found.manifest["points"], strict=True):
        own = {name: value for name, value in point["labels"].items() if name not in LABELS and name in row}
        rows.append(row | _said(own))
    labels = dict.fromkeys(name for point in found.manifest["points"] for name in point["labels"])
    fixed = {
        name: rows[0][name]
        for name in labels
        if name in rows[0] and name not in ("status", "error") and len({repr(row[name]) for row in rows}) == 1
    }
    return _Told(found.name, found.axes, rows, found.counts(), found.errors(), fixed, found.manifest["costs"])


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a point, told apart from those that it has not."""
    return {name: NONE if value is None else value for name, value in settings.items()}


def _told_of_studies(found: Swept) -> _Told:
    """Studies over settings as rows: a setting that a design has not makes no row of its own."""
    rows: dict[str, dict[str, Any]] = {}
    first = found.points[0][1]
    for value, study in found.points:
        for name, design in study.designs.items():
            labels = dict.fromkeys(found.names) | _said(effective(found.labels(value), design.design))
            seed = study.settings.get("seed")
            row = {"source": study.workload, "design": name, "seed": seed} | labels | {"status": "done"}
            figures = {metric: getattr(design, metric, None) for metric in METRICS}
            rows.setdefault(repr(row), row | figures | {"slow_down": design.cost.slow_down})
    axes = tuple(dict.fromkeys(("design", *found.names)))
    fixed = {name: value for name, value in first.settings.items() if name not in found.names}
    title = f"{first.workload}, over {' and '.join(found.names)}"
    if found.base:
        title += f", against native with {found.base}"
    counts = {"done": len(rows), "failed": 0, "missing": 0}
    prices = {first.costs.name: first.costs.as_dict()}
    return _Told(title, axes, list(rows.values()), counts, [], fixed, prices, first.command)


def write(sweep: Sweep | Swept, path: str | os.PathLike[str]) -> None:
    """Write a sweep to `path` as one HTML file that needs no network; an older file is replaced when all is done.

    ConfigError: there is no matplotlib, or no point is done. OSError: the file cannot be written.
    """
    check()
    replace(path, page(sweep).encode("utf-8"))


def page(found: Sweep | Swept) -> str:
    """The file as a text. ConfigError."""
    sweep = _told(found)
    shown = Shown(sweep.rows, sweep.axes)
    if not shown.rows:
        raise ConfigError("html: no point of the sweep is done")
    drawn: list[dict[str, Any]] = []
    body = [_head(sweep, shown), _legend(shown)]
    for metric, (title, unit) in METRICS.items():
        panels, maps = shown.panels(metric), shown.maps(metric)
        if not any(spot.y for panel in panels for spots in panel.lines.values() for spot in spots):
            continue
        body.append(f"<h2>{html.escape(title)}</h2>")
        body.append(
            _multiples([_panel(f"{metric}-{n}", each, unit, shown, drawn) for n, each in _few(panels)], len(panels))
        )
        if maps:
            kind = "Over two settings"
            body.append(f"<h3>{kind}</h3>")
            body.append(_multiples([_map(f"{metric}-map-{n}", each, unit, drawn) for n, each in _few(maps)], len(maps)))
    body += [_table(shown), _failures(sweep), _settings(sweep)]
    asset = files(__package__) / "data"
    title = html.escape(f"{sweep.name}: a sweep of {sum(sweep.counts.values()):,} points")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
    style = (asset / "report.css").read_text("utf-8") + (asset / "sweep.css").read_text("utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="shadowcore {__version__}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{chr(10).join(filter(None, body))}
</main>
<script type="application/json" id="panels">{_embedded(drawn)}</script>
<script>
{(asset / "tables.js").read_text("utf-8")}{(asset / "sweep.js").read_text("utf-8")}</script>
</body>
</html>
"""


def _few(found: Sequence[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(found[:PANELS]))


def _embedded(plain: Any) -> str:
    text = json.dumps(plain, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _head(sweep: _Told, shown: Shown) -> str:
    counted = sweep.counts
    told = f"{sum(counted.values()):,} points, {counted['done']:,} done"
    told += "".join(f", {counted[state]:,} {state}" for state in ("failed", "missing") if counted[state])
    axes = ", ".join(sweep.axes) or "nothing"
    seeds = len({row["seed"] for row in shown.rows})
    bars = f" A mark is the mean over {seeds} seeds, its bar the standard deviation." if seeds > 1 else ""
    note = "Cycles and slow-down are estimated, by counts times prices; exits and pages are counted."
    return (
        f"<h1>{html.escape(sweep.name)}</h1>\n<p>{told}, over {html.escape(axes)}; "
        f"by shadowcore {__version__}.{bars} {note}\n"
        '<span class="script" hidden>Drag over a picture to zoom in, double-click or Escape to zoom out; arrow keys '
        "go from mark to mark; names in the legend switch lines.</span></p>"
    )


def _stroke(place: int) -> str:
    dash = plots.DASHES[place % len(plots.DASHES)]
    return "" if dash == "solid" else " ".join(f"{1.4 * n:g}" for n in dash[1])


def _legend(shown: Shown) -> str:
    items = []
    for place, name in enumerate(shown.designs):
        dash = _stroke(place)
        pattern = f' stroke-dasharray="{dash}"' if dash else ""
        line = f'<line x1="0" x2="30" y1="6" y2="6" stroke="var(--design-{place % 8})" stroke-width="2.2"{pattern}/>'
        sample = f'<svg viewBox="0 0 30 12" aria-hidden="true">{line}</svg>'
        items.append(
            f'<li><button type="button" class="series" data-series="{place}" aria-pressed="true">{sample}'
            f"{html.escape(name)}</button></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _multiples(figures: list[str], count: int) -> str:
    more = f'<p class="note">{count - len(figures):,} more are in the table.</p>' if count > len(figures) else ""
    return f'<div class="plots">{"".join(figures)}</div>{more}'


def _figure(name: str, plot: plots.Plot, title: str, label: str) -> tuple[str, list[float]]:
    picture, place = plot.svg(label)
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    saved = "".join(
        f'<button type="button" data-save="{kind}">{kind.upper()}</button>' for kind in ("svg", "png", "csv")
    )
    save = f'<div class="save script" hidden>Save: {saved}</div>'
    return f'<figure id="{name}">{caption}<div class="plot">{picture}</div>{save}</figure>', place


def _panel(name: str, panel: Panel, unit: str, shown: Shown, drawn: list[dict[str, Any]]) -> str:
    plot = plots.Plot(name, panel.axis, unit, height=3.0)
    plot.grid()
    axes = plot.axes
    ticks = sorted({spot.x for spots in panel.lines.values() for spot in spots if spot.x is not None})
    if panel.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(_none())
    low, high = (-0.5, len(panel.names) - 0.5) if panel.names else _limits(ticks, panel.log)
    axes.set_xlim(low, high)
    top = max((spot.y + spot.spread for spots in panel.lines.values() for spot in spots), default=0) * 1.06 or 1
    axes.set_ylim(0, top)
    names = list(panel.names)
    texts = names or [_tick(value, panel) for value in ticks]
    places = [float(n) for n in range(len(names))] or ticks
    axes.set_xticks(*_thinned(places, texts))
    for place, design in enumerate(shown.designs):
        _line(plot, place, panel.lines.get(design, ()), (low, high), bool(names))
    figure, where = _figure(name, plot, panel.title, _label(panel, unit))
    drawn.append(
        {
            "name": name,
            "title": panel.title,
            "axis": panel.axis,
            "unit": unit,
            "log": panel.log,
            "joined": not names,
            "place": where,
            "x": [low, high],
            "y": [0, top],
            "ticks": [list(each) for each in zip(places, texts, strict=True)],
            "series": [
                {
                    "name": design,
                    "dash": _stroke(place),
                    "spots": [
                        [s.x, s.y, s.spread, s.low, s.high, s.count, s.label] for s in panel.lines.get(design, ())
                    ],
                }
                for place, design in enumerate(shown.designs)
            ],
        }
    )
    return figure


def _line(plot: plots.Plot, place: int, spots: Sequence[Spot], limits: tuple[float, float], bars: bool) -> None:
    """One design: marks, bars of spread, a line between; a level where the setting makes no difference."""
    colour = plot.colour(f"design-{place % 8}")
    there = [(spot.x, spot) for spot in spots if spot.x is not None]
    parts: list[Any] = []
    if there:
        x, y = [at for at, _ in there], [spot.y for _, spot in there]
        style = "none" if bars else plots.DASHES[place % len(plots.DASHES)]
        parts += plot.axes.plot(x, y, color=colour, linestyle=style, linewidth=1.4, marker="o", markersize=4)
        for at, spot in there:
            if spot.spread:
                span = [spot.y - spot.spread, spot.y + spot.spread]
                parts += plot.axes.plot([at, at], span, color=colour, linewidth=1.1, marker="_", markersize=5)
    for spot in spots:
        if spot.x is None:
            style = plots.DASHES[place % len(plots.DASHES)]
            parts += plot.axes.plot(limits, [spot.y, spot.y], color=colour, linestyle=style, linewidth=1.2)
    for number, part in enumerate(parts):
        part.set_gid(f"series-{place}-{number}")


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _limits(ticks: Sequence[float], log: bool) -> tuple[float, float]:
    if not ticks:
        return 0.0, 1.0
    if log:
        room = (ticks[-1] / ticks[0]) ** 0.04
        return ticks[0] / room, ticks[-1] * room
    room = 0.04 * (ticks[-1] - ticks[0]) or 0.5
    return ticks[0] - room, ticks[-1] + room


def _tick(value: float, panel: Panel) -> str:
    for spots in panel.lines.values():
        for spot in spots:
            if spot.x == value:
                return spot.label.removeprefix(f"{panel.axis} ")
    return f"{value:g}"


def _thinned(places: list[float], texts: list[str]) -> tuple[list[float], list[str]]:
    """So many ticks that their texts do not touch."""
    longest = max(map(len, texts), default=1)
    step = max(1, -(-len(places) * (longest + 2) // 60))
    return places[::step], texts[::step]


def _label(panel: Panel, unit: str) -> str:
    names = ", ".join(name for name, spots in panel.lines.items() if spots)
    return f"{unit} over {panel.axis or 'designs'}, {panel.title}: {names}; the table has the numbers"


def _map(name: str, found: Map, unit: str, drawn: list[dict[str, Any]]) -> str:
    import matplotlib
    from matplotlib.colors import Normalize

    rows, columns = len(found.rows), len(found.columns)
    plot = plots.Plot(name, found.x_axis, found.y_axis, height=min(0.9 + 0.3 * rows, 6))
    values = np.array([[np.nan if v is None else v for v in row] for row in found.values], dtype=np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scaled = Normalize(low, high if high > low else low + 1)(values)
    colours = matplotlib.colormaps["cividis"](0.15 + 0.85 * np.nan_to_num(np.asarray(scaled, dtype=np.float64)))
    colours[..., 3] = np.isfinite(values)
    plot.axes.imshow(
        np.rint(colours * 255).astype(np.uint8), extent=(0, columns, rows, 0), aspect="auto", interpolation="none"
    )
    places = [n + 0.5 for n in range(columns)]
    plot.axes.set_xticks(*_thinned(places, list(found.columns)))
    plot.axes.set_yticks([n + 0.5 for n in range(rows)], list(found.rows))
    if columns <= 12 and rows <= 16:
        for y, row in enumerate(found.values):
            for x, value in enumerate(row):
                if value is not None:
                    dark = float(np.asarray(scaled)[y, x]) < 0.55
                    ink = "#fefefe" if dark else "#111111"
                    plot.axes.text(x + 0.5, y + 0.5, short(value), ha="center", va="center", fontsize=7.5, color=ink)
    figure, where = _figure(
        name, plot, found.title, f"{unit}, {found.title}: {found.x_axis} across, {found.y_axis} down"
    )
    drawn.append(
        {
            "name": name,
            "title": found.title,
            "unit": unit,
            "place": where,
            "x_axis": found.x_axis,
            "y_axis": found.y_axis,
            "columns": found.columns,
            "rows": found.rows,
            "values": found.values,
        }
    )
    return figure


def short(value: float | None) -> str:
    """A number in few characters."""
    if value is None:
        return ""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _table(shown: Shown) -> str:
    head, rows = shown.table()
    cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    lines = []
    for row in rows[:TABLE]:
        texts = "".join(f"<td{_sort(value)}>{html.escape(_cell(value))}</td>" for value in row)
        lines.append(f"<tr>{texts}</tr>")
    more = (
        f'<p class="note">{len(rows) - TABLE:,} more rows are left out; CSV has all.</p>' if len(rows) > TABLE else ""
    )
    note = '<p class="note script" hidden>The names of columns sort.</p>'
    return (
        f'<h2>All of it</h2>\n{note}<div class="scroll"><table id="all" class="sortable"><thead><tr>{cells}</tr>'
        "</thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{more}"
    )


def _sort(value: Any) -> str:
    number_ = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f' data-value="{value!r}"' if number_ else ' class="text"'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def _failures(sweep: _Told) -> str:
    errors = sweep.errors
    if not errors:
        return ""
    names = list(dict.fromkeys(("source", "design", *sweep.axes)))
    cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (*names, "error"))
    lines = "".join(
        "<tr>"
        + "".join(f'<td class="text">{html.escape(_cell(row[name]))}</td>' for name in (*names, "error"))
        + "</tr>"
        for row in errors[:200]
    )
    return (
        f'<h2>Failed</h2>\n<div class="scroll"><table id="failed"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody>'
        "</table></div>"
    )


def _settings(sweep: _Told) -> str:
    """What is the same in all points, and the prices."""
    lines = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="text">{html.escape(_cell(value))}</td></tr>'
        for name, value in sweep.fixed.items()
    )
    prices = html.escape(json.dumps(sweep.prices, indent=1))
    command = f"<p>The first of the studies: <code>{html.escape(sweep.command)}</code></p>" if sweep.command else ""
    return (
        f'<h2>Settings</h2>\n{command}<table id="settings"><tbody>{lines}</tbody></table>\n'
        f"<details><summary>Prices, in cycles</summary><pre>{prices}</pre></details>"
    )
