"""Draws the pictures of docs/tutorial.md from runs of the scenarios: python docs/make_tutorial.py

Each is a state of a run: the guest's tables above, the shadow's below, by level from left to right; what the step
changed has a mark.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from shadowcore import steps

PICTURES = {
    "tutorial-guest": ("demand-paging", "cached", 0),
    "tutorial-fill": ("demand-paging", "cached", 1),
    "tutorial-dirty": ("demand-paging", "cached", 3),
    "tutorial-emulate": ("demand-paging", "cached", 6),
    "tutorial-switch": ("switch", "cached", 5),
    "tutorial-unsync": ("unsync", "unsync", 7),
}
"""By name: scenario, design, and after how many steps."""

BOX, GAP, ROW = 196, 34, 18
STYLE = """
text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; fill: #222; }
.title { font-size: 14px; font-weight: 600; } .head { font-weight: 600; } .soft { fill: #555; }
.guest { fill: #e8f1fa; stroke: #0072b2; } .shadow { fill: #fdf0e2; stroke: #d55e00; }
.changed { fill: #ffe08a; } .arrow { fill: none; stroke: #555; stroke-width: 1.1; marker-end: url(#head); }
"""


def _tables(run: steps.Steps, state: dict[str, str], kind: str) -> dict[str, tuple[int, str, dict[int, str]]]:
    """Tables of a kind, by what entries call them: level, title, and the entries that some step meets."""
    met = {key for step in run.steps for key in (*step.read, *(change[0] for change in step.changes))}
    found: dict[str, tuple[int, str, dict[int, str]]] = {}
    for key, value in state.items():
        if key[0] != kind or key.count(":") != 1:
            continue
        name = key[2:]
        level, title = int(value.split("|")[0]), f"table at gfn 0x{name}"
        called = f"table 0x{name}"
        if kind == "s":
            words = value.split("|")
            called, title = f"shadow page {name}", f"page {name}, of gfn {words[1]}"
            title += ", unsync" if "unsync" in words[2] else ""
            title += ", root" if "root count" in words[2] else ""
        entries = {
            int(k.split(":")[2]): v
            for k, v in state.items()
            if k.startswith(f"{key}:") and (kind == "s" or k in met or level > 1)
        }
        found[called] = level, title, dict(sorted(entries.items()))
    return {called: found[called] for called in _from_the_top(found)}


def _from_the_top(found: dict[str, tuple[int, str, dict[int, str]]]) -> list[str]:
    """Names of tables in the order in which walks meet them, so that arrows do not cross."""
    order: dict[str, None] = {}

    def visit(called: str) -> None:
        if called in found and called not in order:
            order[called] = None
            for value in found[called][2].values():
                visit(value.split("|")[2])

    for called in sorted(found, key=lambda called: -found[called][0]):
        visit(called)
    return list(order)


def _said(kind: str, value: str) -> str:
    """An entry in a box: where it leads, and its rights."""
    _, bits, leads = value.split("|")
    if kind == "g" or not bits or leads.startswith("shadow page"):
        return f"{leads}  {bits if kind == 'g' else ''}".strip() or "not present"
    rights = "writable" if bits.startswith("writable") else "read only"
    return f"{leads}  {rights}"


def picture(scenario: str, design: str, number: int) -> str:
    """The SVG of one state."""
    run = steps.show(scenario, design)
    state = run.state(number)
    changed = {change[0] for change in run.steps[number - 1].changes} if number else set()
    lines, top = [], 30
    step = run.steps[number - 1] if number else None
    title = f"{design}, before the first step" if step is None else f"{design}, step {number}: {step.title}"
    lines.append(f'<text class="title" x="10" y="20">{escape(title)}</text>')
    for kind, style, label in (("g", "guest", "the guest's tables"), ("s", "shadow", "the shadow tables")):
        tables = _tables(run, state, kind)
        lines.append(f'<text class="soft" x="10" y="{top + 16}">{label}{"" if tables else ": none yet"}</text>')
        top += 24
        places: dict[str, tuple[float, float]] = {}
        bottoms = dict.fromkeys((4, 3, 2, 1), top)
        for called, (level, head, entries) in tables.items():
            x, y = 10 + (4 - level) * (BOX + GAP), bottoms[level]
            places[called] = x, y
            height = ROW * (len(entries) + 1) + 6
            lines.append(f'<rect class="{style}" x="{x}" y="{y}" width="{BOX}" height="{height}" rx="4"/>')
            lines.append(f'<text class="head" x="{x + 7}" y="{y + 15}">{escape(head)}</text>')
            for place, (index, value) in enumerate(entries.items(), 1):
                key = f"{kind}:{called.rpartition('0x' if kind == 'g' else ' ')[2]}:{index}"
                line = y + ROW * place + 3
                if key in changed:
                    lines.append(f'<rect class="changed" x="{x + 2}" y="{line}" width="{BOX - 4}" height="{ROW}"/>')
                text = f"{index}: {_said(kind, value)}"
                lines.append(f'<text x="{x + 7}" y="{line + 13}">{escape(text)}</text>')
            bottoms[level] = y + height + 10
        for called, (_, _, entries) in tables.items():
            for place, value in enumerate(entries.values(), 1):
                leads = value.split("|")[2]
                if leads in places:
                    (x, y), (to_x, to_y) = places[called], places[leads]
                    start = y + ROW * place + 12
                    lines.append(
                        f'<path class="arrow" d="M{x + BOX} {start} C{x + BOX + 20} {start} {to_x - 20} {to_y + 10} '
                        f'{to_x - 2} {to_y + 10}"/>'
                    )
        top = max(bottoms.values()) + 8
    width = 4 * BOX + 3 * GAP + 20
    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker>'
    )
    label = re.sub(r"\s+", " ", f"Guest and shadow tables of the scenario {scenario}, {title}")
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" role="img"',
            f'aria-label="{escape(label)}">',
            f"<defs>{marker}</defs><style>{STYLE}</style>",
            f'<rect width="{width}" height="{top}" fill="#fff"/>',
            *lines,
            "</svg>\n",
        )
    )


def main() -> None:
    images = Path(__file__).parent / "images"
    for name, what in PICTURES.items():
        (images / f"{name}.svg").write_text(picture(*what), encoding="utf-8")


if __name__ == "__main__":
    main()
