"""A study as one HTML file: tables, pictures, settings, and all of it as JSON. Nothing is fetched from anywhere.

The tables and pictures are in the file as it stands; a script adds the values under the pointer.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..engine.costs import left_out
from ..engine.reported import UNSYNC
from ..errors import ConfigError
from ..files import replace
from ..guest.options import KernelOptions
from ..recording.format import INCOMPLETE
from ..recording.guest import Recording, RecordingFile
from ..studies.heat import heat, of_workload
from ..workload import find
from . import plots
from .document import EXITS, WINDOWS, document, edges

__all__ = ["LARGEST", "heat", "of_workload", "write"]

LARGEST = 5_000_000
"""Bytes that a file has at most."""

_COUNTERS = (
    ("exits_total", "VM exits, all", "strong"),
    *((f"exits_{reason}", label, "part") for reason, label in EXITS.items()),
    ("pf_emulate", "emulated stores", ""),
    ("mmu_shadow_zapped", "shadow pages zapped", ""),
    ("mmu_flooded", "by floods of stores, or misaligned ones", "part"),
    ("mmu_recycled", "recycled for room in the pool", "part"),
    *((name, label, "part") for name, label in UNSYNC.items()),
    ("mmu_cache_hit", "shadow pages found when a table was linked", ""),
    ("mmu_cache_miss", "shadow pages made", ""),
    ("spte_installed", "shadow entries installed", ""),
    ("spte_removed", "shadow entries removed", ""),
    ("walk_references", "entries read by the processor's walks", ""),
    ("guest_walk_references", "guest entries read at exits", ""),
    ("tlb_hits", "TLB hits", "part"),
    ("tlb_misses", "TLB misses", "part"),
)
_RATES = {
    "tlb": ("TLB hits", "share of lookups", "Of all translations, the share that the modelled TLB had."),
    "hits": (
        "Accesses without an exit",
        "share of accesses",
        "Of all accesses, the share that the processor completed by itself.",
    ),
    "found": (
        "Shadow pages found rather than made",
        "share of lookups",
        "Of all lookups of a shadow page, the share that found one in the pool: what caching shadow tables is about.",
    ),
    "refaults": (
        "Refaults, upper bound",
        "for 1,000 accesses",
        "Exits for a missing shadow entry, but no more than entries had been removed by then (each is filled again "
        "once): the first faults on entries that never were are left out as far as the counters tell.",
    ),
}


def write(study: Any, path: str | os.PathLike[str], heat: Mapping[str, Any] | None = None) -> None:
    """Write a study to `path` as one HTML file that needs no network; an older file is replaced when all is done.

    heat: what `heat` found, for maps of address spaces and frames, where a study has neither them nor its `recording`.

    ConfigError: there is no matplotlib, or the study is too large for 5 MB. OSError: the file cannot be written.
    """
    plots.check()
    if heat is None and not getattr(study, "frames", None):
        heat = _of_recording(study) or _of_workload(study)
    limit = max(20, min(WINDOWS, 4800 // max(len(study.designs), 1)))
    while True:
        plain = document(study, limit, heat)
        embedded = _embedded(plain)
        # Nothing is drawn for a page whose figures alone are too many.
        text = (_page(plain, embedded) if limit <= 20 or len(embedded) < LARGEST else embedded).encode("utf-8")
        if len(text) < LARGEST:
            break
        if limit <= 20:
            raise ConfigError(
                f"html: {len(study.designs)} designs come to {len(text):,} bytes, {LARGEST:,} are allowed"
            )
        limit //= 2
    replace(path, text)


def _of_recording(study: Any) -> Mapping[str, Any] | None:
    """The heat of the recording that a study is of, if it has one, in the part that was replayed."""
    recording = getattr(study, "recording", None)
    if not isinstance(recording, (Recording, RecordingFile)):
        return None
    designs = [getattr(result, "design", name) for name, result in study.designs.items()]
    start = int(study.settings.get("start", 0))
    count = int(study.settings.get("operations", recording.operations - start))
    stop = min(start + count, recording.operations)
    return heat(recording, designs, start=start, stop=stop, warm_up=int(getattr(study, "warm_up", 0)))


_MACHINE = ("vcpus", "host_page_size", "backing", "outer_backing", "warm_up", "levels", "host_levels")
"""Settings of a machine that maps of heat do not know."""


def _of_workload(study: Any) -> Mapping[str, Any] | None:
    """The same of a workload, which is run once more for it; none of a machine that `of_workload` does not make."""
    settings = dict(study.settings)
    if getattr(study, "kind", None) != "workload" or not study.complete or any(settings.get(k) for k in _MACHINE):
        return None
    known = {name: settings.pop(name) for name in ("operations", "seed", "memory") if name in settings}
    names = {field.name for field in fields(KernelOptions)} & set(settings)
    options = KernelOptions(**{name: settings[name] for name in names}) if names else None
    own = {name: settings[name] for name in find(study.workload).parameters if name in settings}
    designs = [getattr(result, "design", name) for name, result in study.designs.items()]
    return of_workload(study.workload, designs, options=options, **known, **own)


def _embedded(plain: dict[str, Any]) -> str:
    embedded = json.dumps(plain, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # none of these can end the element, or the string
        embedded = embedded.replace(character, f"\\u{ord(character):04x}")
    return embedded


def _page(plain: dict[str, Any], embedded: str) -> str:
    asset = files(__package__) / "data"
    title = html.escape(f"{plain['workload']}: shadow paging under {len(plain['designs'])} designs")
    sections = (
        _verdict,
        _summary,
        _exits,
        _pages_in_use,
        _rates_section,
        _costs,
        _prices,
        _processes,
        _frames,
        _settings,
    )
    body = "\n".join(filter(None, (section(plain) for section in sections)))
    body = re.sub(r"<h2>(.*?)</h2>", _heading, body)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="shadowcore {__version__}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{(asset / "report.css").read_text("utf-8")}</style>
</head>
<body>
<main>
<h1>{html.escape(plain["workload"])}</h1>
<p>{_counted(plain)} under {html.escape(_listed(plain["designs"]))}, by shadowcore {__version__}.
<span class="script" hidden>Pictures show their values under the pointer, or by the arrow keys.</span></p>
{"" if plain["complete"] else "<p><strong>Incomplete: it was interrupted.</strong></p>"}
{"" if plain["recording_complete"] else f"<p><strong>{INCOMPLETE}.</strong></p>"}
{body}
</main>
<script type="application/json" id="study">{embedded}</script>
<script>
{(asset / "tables.js").read_text("utf-8")}{(asset / "report.js").read_text("utf-8")}</script>
</body>
</html>
"""


def _heading(found: re.Match[str]) -> str:
    """A heading that a link can lead to, as it does itself."""
    key = "section-" + re.sub(r"\W+", "-", found[1].lower()).strip("-")
    return f'<h2 id="{key}"><a href="#{key}">{found[1]}</a></h2>'


def _counted(plain: dict[str, Any]) -> str:
    counted = f", counted from {plain['warm_up']:,} on," if plain["warm_up"] else ""
    return f"{plain['operations']:,} {plain['unit']}{counted}"


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


_ROW = 'th scope="row"'


def _cell(text: str, name: str = "td") -> str:
    """A cell, with its value where that is a number, by which a table is sorted."""
    digits = text.replace(",", "")
    value = f' data-value="{digits}"' if re.fullmatch(r"\d+(\.\d+)?", digits) else ""
    return f"<{name}{value}>{html.escape(text)}</{name.split()[0]}>"


def _table(
    key: str,
    head: Sequence[str],
    rows: Iterable[tuple[str, str, Sequence[str]]],
    style: str = "",
    caption: str = "",
    sortable: bool = False,
) -> str:
    """rows: label, class, cells. Header cells name the columns, and the first cell of a row names it."""
    style += ' class="sortable"' if sortable else ""
    lines = [f'<div class="scroll"><table id="{key}"{style}>']
    if caption:
        lines.append(f"<caption>{html.escape(caption)}</caption>")
    lines.append(
        "<thead><tr>" + "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head) + "</tr></thead>"
    )
    lines.append("<tbody>")
    for label, kind, cells in rows:
        of = f' class="{kind}"' if kind else ""
        if sortable:
            lines.append(f"<tr{of}>{_cell(label, _ROW)}{''.join(map(_cell, cells))}</tr>")
            continue
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{of}><th scope="row">{html.escape(label)}</th>{values}</tr>')
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _figure(plot: plots.Plot, caption: str, label: str, values: dict[str, Any] | None) -> str:
    picture, axes = plot.svg(label)
    hover = f' data-axes="{plots.data(axes)}" data-values="{plots.data(values)}"' if values else ""
    return f'<figure><figcaption>{html.escape(caption)}</figcaption><div class="plot"{hover}>{picture}</div></figure>'


def _boxes(entries: Iterable[tuple[str, str]]) -> str:
    """A legend of (variable, label)."""
    items = (
        f'<li><span class="box" style="background: var(--{variable})"></span>{html.escape(label)}</li>'
        for variable, label in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _strokes(plain: dict[str, Any], names: Sequence[str]) -> str:
    """A legend of lines, for those designs that have one."""
    items = []
    for place, name in enumerate(plain["designs"]):
        if name not in names:
            continue
        dash = plots.DASHES[place % len(plots.DASHES)]
        pattern = "" if dash == "solid" else f' stroke-dasharray="{" ".join(f"{1.4 * n:g}" for n in dash[1])}"'
        line = f'<line x1="0" x2="30" y1="6" y2="6" stroke="var(--design-{place % 8})" stroke-width="2.2"{pattern}/>'
        items.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{line}</svg>{html.escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _windowed(plain: dict[str, Any]) -> dict[str, Any]:
    """The designs that have windows."""
    return {name: result for name, result in plain["designs"].items() if result["windows"]}


def _verdict(plain: dict[str, Any]) -> str:
    return f'<p class="verdict">{html.escape(plain["verdict"])}</p>' if plain["verdict"] else ""


def _summary(plain: dict[str, Any]) -> str:
    designs = plain["designs"]
    rows = []
    for key, label, kind in _COUNTERS:
        values = [result["counters"].get(key) for result in designs.values()]
        if any(value is not None for value in values) and (any(values) or kind != "part"):
            rows.append((label, kind, [number(value) for value in values]))

    def row(label: str, value: Callable[[dict[str, Any]], float | None], digits: int = 0, kind: str = "") -> None:
        values = [value(result) for result in designs.values()]
        if any(each is not None for each in values):
            rows.append((label, kind, [number(each, digits) for each in values]))

    own = ((plain["compare"] or {}).get("designs") or {}).items()
    for part in ("boot", "workload"):
        phases = [each.get(part) or {} for _, each in own]
        if any(phases):
            place = next(n for n, (label, _, _) in enumerate(rows) if label == "VM exits, all") + 1
            of = [number(phase.get("exits_total")) for phase in phases]
            rate = [number(phase.get("exits_per_million"), 2) for phase in phases]
            place += 2 * (part == "workload")
            rows[place:place] = [
                (f"in the {part}", "part", of),
                (f"in the {part}, per million instructions", "part", rate),
            ]
    row("shadow pages in use, mean", lambda result: result["pages_mean"], 1)
    row("shadow pages in use, most", lambda result: result["pages_max"])
    row("cycles, estimated", lambda result: (result["cost"] or {}).get("total"), kind="strong")
    row("slow-down against native, estimated", lambda result: (result["cost"] or {}).get("slow_down"), 3, "strong")
    row("microseconds, estimated", lambda result: (result["cost"] or {}).get("microseconds"), 1)
    row("seconds that the engine took", lambda result: result["seconds"], 3)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in plain["notes"] if note != f"{INCOMPLETE}.")
    return f"<h2>Summary</h2>\n{_table('summary', ['', *designs], rows)}{notes}"


def _exits(plain: dict[str, Any]) -> str:
    designs, unit = _windowed(plain), plain["unit"]
    if not designs:
        return '<h2>Over time</h2>\n<p class="note">The study has no windows: nothing is known of when it happened.</p>'
    shown = [r for r in EXITS if any(any(each["windows"].get(f"exits_{r}", ())) for each in designs.values())]
    scaled: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, result in designs.items():
        windows = result["windows"]
        lengths = np.maximum(np.diff(edges(np.array(windows["operation"]))), 1)
        zero = np.zeros(len(lengths))
        scaled[name] = {r: 1000 * np.array(windows.get(f"exits_{r}", zero)) / lengths for r in shown}
    heights = {name: np.sum(list(layers.values()), axis=0) for name, layers in scaled.items() if layers}
    busy = [name for name, height in heights.items() if height.any()]
    if not busy:
        return '<h2>VM exits over time</h2>\n<p class="note">There were none.</p>'
    quiet = [name for name in designs if name not in busy]
    top = max(float(heights[name].max()) for name in busy)
    usual = max(float(np.percentile(heights[name], 90)) for name in busy)

    def figures(suffix: str, cut: float) -> str:
        made = []
        for name in busy:
            operation = np.array(designs[name]["windows"]["operation"])
            series = [[EXITS[r], ["designs", name, "windows", f"exits_{r}"]] for r in reversed(shown)]
            values = {"operation": ["designs", name, "windows", "operation"], "series": series, "per": 1000}
            key = f"exits{suffix}-{places[name]}"
            plot = plots.stacked(key, operation, scaled[name], f"for 1,000 {unit}", cut, unit)
            plot.mark(plain["phases"])
            total = number(designs[name]["counters"].get("exits_total"))
            label = f"VM exits by kind over time, {name}: {total} in all; the table below has the numbers"
            made.append(_figure(plot, name, label, values))
        return f'<div class="plots">{"".join(made)}</div>'

    places = {name: place for place, name in enumerate(designs)}
    tables = []
    for name in busy:
        windows = designs[name]["windows"]
        none_of = [0] * len(windows["operation"])
        columns = [windows["operation"], *(windows.get(f"exits_{r}", none_of) for r in shown)]
        rows = ((number(row[0]), "", [number(value) for value in row[1:]]) for row in zip(*columns, strict=True))
        table = _table(f"windows-{places[name]}", [f"{unit} to", *(EXITS[r] for r in shown)], rows, sortable=True)
        tables.append(f"<details><summary>{html.escape(name)}: exits by window, as a table</summary>{table}</details>")
    none = f" {_listed(quiet)} had none." if quiet else ""
    parts = [
        "<h2>VM exits over time</h2>",
        f"<p>Exits for 1,000 {unit}, by kind, one on the other; the scale is the same for all designs."
        f"{html.escape(none)}</p>",
        _boxes((r, EXITS[r]) for r in shown),
        figures("", 1.04 * top),
    ]
    if usual and top > 4 * usual:
        # A few peaks, such as those of booting, leave little height to all the rest.
        cut = 1.5 * usual
        parts += [f'<p class="lead">The same, cut off at {cut:,.1f}:</p>', figures("-cut", cut)]
    return "\n".join((*parts, *tables))


def _lines(
    plain: dict[str, Any], names: Sequence[str], name: str, path: Sequence[str], caption: str, y: str, top: float | None
) -> str:
    """A picture with a line for each of `names`; the others keep their colours. path: of the values in a design."""
    designs = plain["designs"]
    series, values = [], []
    for design, result in designs.items():
        found: Any = result
        for key in path:
            found = found.get(key, {})
        wanted = design in names and bool(result["windows"]) and len(found) > 0
        ends = result["windows"]["operation"] if wanted else ()
        series.append((np.array(ends), np.array(found if wanted else (), dtype=np.float64)))
        if wanted:
            values.append([design, ["designs", design, *path]])
    if not values:
        return ""
    plot = plots.lines(name, series, y, top, plain["unit"])
    plot.mark(plain["phases"])
    operation = ["designs", values[0][0], "windows", "operation"]
    label = f"{caption}, over time, under {_listed([each for each, _ in values])}"
    return _figure(plot, caption, label, {"operation": operation, "series": values})


def _pages_in_use(plain: dict[str, Any]) -> str:
    names = [name for name, result in _windowed(plain).items() if any(result["windows"].get("pages_max", ()))]
    if not names:
        return ""
    figures = (
        _lines(plain, names, "pages-mean", ("windows", "pages_mean"), "Mean of the window", "shadow pages", None),
        _lines(plain, names, "pages-max", ("windows", "pages_max"), "Most in the window", "shadow pages", None),
    )
    return "\n".join(
        (
            "<h2>Shadow pages in use over time</h2>",
            _strokes(plain, names),
            f'<div class="plots">{"".join(figures)}</div>',
        )
    )


def _rates_section(plain: dict[str, Any]) -> str:
    designs = _windowed(plain)
    if not designs:
        return ""
    figures, notes = [], []
    for name, (caption, y, note) in _RATES.items():
        # Where there is no TLB, or no shadow page, there is no rate either: no line is truer than one at 0.
        needed = {"hits": "accesses", "tlb": "tlb_misses"}.get(name, "spte_installed")
        having = [design for design, result in designs.items() if any(result["windows"].get(needed, ()))]
        picture = _lines(
            plain, having, f"rate-{name}", ("rates", name), caption, y, None if name == "refaults" else 1.0
        )
        if picture:
            figures.append(picture)
            notes.append(f"<b>{html.escape(caption)}:</b> {html.escape(note)}")
    return "\n".join(
        (
            "<h2>Hits and refaults over time</h2>",
            _strokes(plain, list(designs)),
            f'<div class="plots">{"".join(figures)}</div>',
            f'<p class="note">{"<br>".join(notes)}</p>',
        )
    )


def _costs(plain: dict[str, Any]) -> str:
    costs = {name: result["cost"] for name, result in plain["designs"].items() if result["cost"]}
    if not costs:
        return ""
    parts = list(dict.fromkeys(part for cost in costs.values() for part in cost["cycles"]))
    parts = [part for part in parts if any(cost["cycles"].get(part) for cost in costs.values())]
    coloured, rest = parts[:10], parts[10:]
    drawn = {
        f"part-{place}": np.array([cost["cycles"].get(part, 0) for cost in costs.values()], dtype=np.float64)
        for place, part in enumerate(coloured)
    }
    legend = [(f"part-{place}", part.replace("_", " ")) for place, part in enumerate(coloured)]
    if rest:
        drawn["soft"] = np.array([sum(cost["cycles"].get(part, 0) for part in rest) for cost in costs.values()])
        legend.append(("soft", "others: " + ", ".join(part.replace("_", " ") for part in rest)))
    label = "Cycles, estimated, by component: " + "; ".join(
        f"{name} {number(cost['total'])}" for name, cost in costs.items()
    )
    picture = _figure(
        plots.bars("cost", list(costs), drawn, "cycles, estimated", dict(legend)),
        "Cycles by component, estimated",
        label,
        None,
    )
    rows = [
        (part.replace("_", " "), "part", [number(cost["cycles"].get(part, 0)) for cost in costs.values()])
        for part in parts
    ]
    listed = ((plain["compare"] or {}).get("costs") or {}).get("name")
    prices = f", those of {html.escape(str(listed))}, which are listed below" if listed else ""
    note = left_out({name: cost["unpriced"] for name, cost in costs.items()})
    rows.append(("cycles, all", "strong", [number(cost["total"]) for cost in costs.values()]))
    return "\n".join(
        (
            "<h2>Cost, estimated</h2>",
            f"<p>Counts times prices{prices}. Nothing here was measured on a machine.</p>",
            _boxes(legend),
            f'<div class="plots wide">{picture}</div>',
            _table("cost", ["cycles, estimated", *costs], rows),
            f'<p class="note">{html.escape(note)}</p>' if note else "",
        )
    )


def _prices(plain: dict[str, Any]) -> str:
    """Each price with its source."""
    costs = (plain["compare"] or {}).get("costs")
    if not costs:
        return ""
    rows = []
    for name, value in costs.items():
        if name in ("name", "tlb", "levels", "sources"):
            continue
        shown = " ".join(f"{part:g}" for part in value) if isinstance(value, list) else f"{value:,g}"
        source = html.escape(str(costs["sources"].get(name, "")))
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th><td>{shown}</td><td class="text">{source}</td></tr>')
    return (
        f"<details><summary>Prices: {html.escape(costs['name'])}, in cycles but for clock_ghz and shares</summary>"
        '<div class="scroll"><table id="prices"><thead><tr><th scope="col">price</th><th scope="col">value</th>'
        f'<th scope="col">source</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _scale(high: float) -> str:
    label = f"from 1 to {high:,.0f}"
    return (
        f'<p>1 <span class="scale" role="img" aria-label="colours {label}"></span> {high:,.0f} in a cell, '
        "logarithmic; cells without any are empty.</p>"
    )


def _processes(plain: dict[str, Any]) -> str:
    heated = plain["processes"]
    if not heated:
        return ""
    names, operation = heated["names"], np.array(heated["operation"])
    matrices = {"accesses": heated["counts"]} | {f"VM exits, {name}": m for name, m in heated["exits"].items()}
    figures = []
    arrays = {name: np.array(m) for name, m in matrices.items()}
    for place, (name, counts) in enumerate(arrays.items()):
        path = ["processes", "counts"] if not place else ["processes", "exits", name.removeprefix("VM exits, ")]
        values = {"operation": ["processes", "operation"], "rows": names, "counts": path, "unit": name}
        plot = plots.matrix(f"processes-{place}", operation, counts, names, heated["axis"], "")
        label = f"Heat map of {name} by address space and time; the table below has the sums"
        figures.append(_figure(plot, name[0].upper() + name[1:], label, values))
    rows = [(name, "", [number(int(counts[i].sum())) for counts in arrays.values()]) for i, name in enumerate(names)]
    return "\n".join(
        (
            "<h2>By process</h2>",
            "<p>Accesses, and exits under each design, while an address space was loaded. Each picture has its own "
            "scale, logarithmic, from dark (1) to bright (the most in a cell); cells without any are empty.</p>",
            f'<div class="plots">{"".join(figures)}</div>',
            _table("processes", ["address space", *matrices], rows, sortable=True),
        )
    )


def _frames(plain: dict[str, Any]) -> str:
    heated = plain["frames"]
    if not heated:
        return ""
    counts, names = np.array(heated["counts"]), heated["names"]
    values = {"operation": ["frames", "operation"], "rows": names, "counts": ["frames", "counts"], "unit": "accesses"}
    per = heated.get("frames_per_row", 1)
    operation = np.array(heated["operation"])
    plot = plots.matrix("frames", operation, counts, None, heated["axis"], "guest memory, frames")
    if "frames_per_row" in heated:
        plot.axes.set_yticks(*_gfn_ticks(len(counts), per))
    label = "Heat map of accesses by region of guest memory and time; the table below has the sums"
    picture = _figure(plot, f"Accesses, by region of {per:,} frames of 4 KiB", label, values)
    rows = [(name, "", [number(int(row.sum()))]) for name, row in zip(names, counts, strict=True) if row.any()]
    return "\n".join(
        (
            "<h2>By frame</h2>",
            _scale(float(counts.max())),
            f'<div class="plots wide">{picture}</div>',
            "<details><summary>Accesses by region, as a table</summary>",
            _table("frames", ["region", "accesses"], rows, sortable=True),
            "</details>",
        )
    )


def _gfn_ticks(rows: int, per: int) -> tuple[list[float], list[str]]:
    """Eight marks at most, with gfns."""
    step = -(-rows // 8)
    marks = list(range(0, rows, step))
    return [float(mark) for mark in marks], [f"{mark * per:#x}" for mark in marks]


def _settings(plain: dict[str, Any]) -> str:
    lines = []
    for name, value in _flat(plain["settings"]):
        text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th><td class="text">{html.escape(text)}</td></tr>')
    table = (
        '<div class="scroll"><table id="settings"><thead><tr><th scope="col">setting</th>'
        '<th scope="col">value</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    return "\n".join(
        (
            "<h2>Settings</h2>",
            table if lines else '<p class="note">None.</p>',
            "<h2>To repeat it</h2>",
            f'<pre id="command">{html.escape(plain["command"])}</pre>',
            '<p class="note">All numbers of this page are in it as JSON: the element with the identifier "study".</p>',
        )
    )


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value
