"""docs/validity.md and its picture: what was published, predicted, and by how much it is missed."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..studies.validity import FAR, SOURCES, Row, Validity

_BANDS = (5.0, 10.0, FAR)


def number(value: float) -> str:
    """Four digits, without an exponent."""
    if value and abs(value) < 10:
        return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) >= 0.0005 else f"{value:.2g}"
    return f"{value:,.1f}".removesuffix(".0") if abs(value) < 1000 else f"{value:,.0f}"


def error(row: Row) -> str:
    """That of a prediction, or why it has none."""
    if row.kind != "predicted":
        return row.kind
    return f"{row.error:+.1f} points" if row.unit == "%" else f"{row.error:+.0f} %"


def published(row: Row) -> str:
    """With its unit."""
    return f"{number(row.published)} {row.unit}"


def counted(row: Row) -> str:
    """What the engine counted."""
    return ", ".join(f"{name} {number(count)}" for name, count in row.counts.items())


def within(rows: Sequence[Row], percent: float) -> int:
    """How many predictions miss by no more than that."""
    return sum(abs(row.error) <= percent for row in rows)


def summary(found: Sequence[Validity]) -> list[tuple[str, ...]]:
    """A line for each table: source, table, predictions, how many are within 5, 10 and 20 percent, the largest miss."""
    lines = []
    for one in found:
        for table in dict.fromkeys(row.table for row in one.predicted):
            rows = [row for row in one.predicted if row.table == table]
            worst = max(rows, key=lambda row: abs(row.error))
            shares = (str(within(rows, percent)) for percent in _BANDS)
            lines.append((one.source, table, str(len(rows)), *shares, f"{error(worst)}, {worst.test}"))
    return lines


def picture(found: Sequence[Validity]) -> str:
    """SVG: predicted by published, a point for each prediction. ConfigError where matplotlib is not installed."""
    from .plots import check

    check()
    import matplotlib
    from matplotlib.figure import Figure

    groups = [
        (f"{one.source}, {table}", [row for row in one.predicted if row.table == table and row.unit != "%"])
        for one in found
        for table in dict.fromkeys(row.table for row in one.predicted)
    ]
    groups = [(name, rows) for name, rows in groups if rows]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "validity", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.5, 0.6 + 0.42 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvspan(1 - FAR / 100, 1 + FAR / 100, color="#dcebf7", zorder=0)
        axes.axvline(1, color="#555555", linewidth=0.8)
        for place, (_, rows) in enumerate(groups):
            ratios = [row.predicted / row.published for row in rows]
            heights = [place + 0.24 * ((i * 7) % 11 / 10 - 0.5) for i in range(len(rows))]
            far = [row.far for row in rows]
            for shown, colour, marker in ((False, "#0072b2", "o"), (True, "#d55e00", "D")):
                x = [ratio for ratio, miss in zip(ratios, far, strict=True) if miss is shown]
                y = [height for height, miss in zip(heights, far, strict=True) if miss is shown]
                axes.scatter(x, y, s=20, c=colour, marker=marker, alpha=0.8, linewidths=0)
        axes.set_yticks(range(len(groups)), [name for name, _ in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(0, max(2.0, *(row.predicted / row.published for _, rows in groups for row in rows)) * 1.02)
        axes.set_xlabel(f"predicted by published; shaded: within {FAR:g} percent")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def page(found: Sequence[Validity], image: str, command: str) -> str:
    """The page. image: its picture, as the page refers to it; command: what made it."""
    if not found:
        raise ConfigError("source: at least one is needed")
    rows = [row for one in found for row in one.predicted]
    far = [row for row in rows if row.far]
    parts = [
        _HEAD.format(
            command=command,
            image=image,
            all=len(rows),
            five=within(rows, 5),
            ten=within(rows, 10),
            twenty=within(rows, FAR),
            far=len(far),
        ),
        _table(("source", "table", "predicted", "within 5 %", "10 %", "20 %", "the largest miss"), summary(found)),
    ]
    for one in found:
        parts.append(f"\n## {one.source}\n\n{SOURCES[one.source]}.\n")
        for table in dict.fromkeys(row.table for row in one.rows):
            cells = [
                (
                    row.test,
                    row.column,
                    f"{number(row.published)} {row.unit}",
                    number(row.predicted),
                    error(row),
                    counted(row),
                )
                for row in one.rows
                if row.table == table
            ]
            heads = ("", "", "published", "predicted", "error", "counted")
            parts.append(f"\n### {table[0].upper()}{table[1:]} of {one.source}\n\n" + _table(heads, cells))
    parts.append("\n## Misses of more than 20 percent\n\n")
    reasons: dict[str, list[Row]] = {}
    for row in far:
        reasons.setdefault(row.why, []).append(row)
    for reason, of in reasons.items():
        where = "; ".join(f"{row.test}, {row.column} ({error(row)})" for row in of)
        parts.append(textwrap.fill(f"- **{where}**: {reason}.", 120, subsequent_indent="  ") + "\n")
    parts.append(_TAIL)
    return "".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


_HEAD = """\
# Validity: what was published, predicted

<!-- Made by: {command} -->

A model of memory virtualization is worth what it predicts. This page holds the engine against figures that others have
measured on real hypervisors. It is written by `{command}`.

- **Counted**: the workload of each row runs on the guest kernel under the design of the column. What the engine counts,
  for each page, call or process, stands beside the figure.
- **Priced**: counts times prices ([studies.md](studies.md#prices-with-sources)). They are calibrated on round trips of
  exits and on getpid (rows that say "calibrates"), and on what the log of shadowbox gives for a fault inside of its
  hypervisor. No price was set by a row that is predicted.
- **Given**: what the guest's own work takes is not the engine's. A row starts from its column `kvm-ept`, less what EPT
  costs there, and adds what the column's hypervisor costs.

Of {all} predictions {five} are within 5 percent, {ten} within 10, {twenty} within 20; {far} miss by more. They are not
adjusted: [below](#misses-of-more-than-20-percent) is what the counts say of them.

![Predicted by published figures]({image})

"""
_TAIL = """
## What is not predicted

- Several processes or processors at once, where they wait for one lock (figure 10 from two processes on, table 3 with
  32, table B from two processors on): counts do not wait.
- mmap of table 4, whose file's size is not published; select on 100 files, files created and deleted: no part of it is
  memory virtualization.
- Of PVM what has no count here: direct delivery of faults, its PCIDs, a paravirtual MMU.
- The kernels that were measured are 4.19 and 7.3; the shadow MMU of these predictions is that of 6.1.
"""
