"""The picture of docs/evolution.md: VM exits of each release on each workload, one SVG that fetches nothing."""

from __future__ import annotations

from html import escape

from ..studies.evolution import REASONS, RELEASES, Evolution

COLOURS = {
    "fill": "#0072b2",
    "write": "#56b4e9",
    "emulate": "#d55e00",
    "guest": "#999999",
    "loads": "#009e73",
    "invlpg": "#cc79a7",
}
STYLE = """text { font: 11px system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; fill: #222; }
.title { font-size: 13px; font-weight: 600; } .number { fill: #444; font-size: 10px; } .part { fill: #777; }"""
COLUMNS, GAP, LABELS, BAR, NUMBERS = 3, 22, 82, 150, 54
LINE, HEAD, LEGEND = 14, 24, 54
WIDE = LABELS + BAR + NUMBERS


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{of} text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'


def _panel(found: Evolution, source: str, left: float, top: float) -> list[str]:
    most = max(found.total(source, each.name) for each in RELEASES) or 1
    made = [_text(left, top + 14, source, "title")]
    for place, each in enumerate(RELEASES):
        y = top + HEAD + place * LINE
        made.append(_text(left + LABELS - 6, y + 10, each.name, "" if each.real else "part", "end"))
        x = left + LABELS
        for reason, count in found.exits(source, each.name).items():
            width = BAR * count / most
            if width >= 0.05:
                made.append(_box(x, y, width, LINE - 3, COLOURS[reason]))
            x += width
        made.append(_text(x + 4, y + 10, found.shown(source, each.name), "number"))
    return made


def svg(found: Evolution) -> str:
    """A panel for each source, a bar for each release, on a scale of its own."""
    sources = list(found.studies)
    rows = -(-len(sources) // COLUMNS)
    tall = HEAD + len(RELEASES) * LINE + GAP
    width, height = COLUMNS * (WIDE + GAP) + GAP, LEGEND + rows * tall + GAP
    made = [
        _box(0, 0, width, height, "#ffffff"),
        _text(GAP, 22, "VM exits by release; each panel on its own scale", "title"),
    ]
    x = float(GAP)
    for reason, name in REASONS.items():
        made += [_box(x, 32, 11, 11, COLOURS[reason]), _text(x + 15, 42, name)]
        x += 36 + 6.2 * len(name)
    for place, source in enumerate(sources):
        left = GAP + place % COLUMNS * (WIDE + GAP)
        made += _panel(found, source, left, LEGEND + place // COLUMNS * tall)
    label = f"VM exits of {len(RELEASES)} releases on {len(sources)} workloads; the tables of the page have the numbers"
    body = "\n".join(made)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n'
        f"<style>\n{STYLE}\n</style>\n{body}\n</svg>\n"
    )
