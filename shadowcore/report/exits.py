"""VM exits by reason, in the form of `perf kvm stat report`: count, share, cycles of each, their share."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ..studies.results import Study
from .document import EXITS

REST = "reading, making and zapping tables"


def exits(study: Study, every: bool = False) -> Table | None:
    """A row for each reason that some exit had, by cycles, under each design. every: for each reason. None where no
    design has exits."""
    table = Table(
        title=f"VM exits by reason, cycles estimated ({escape(study.costs.name)})",
        title_style="bold",
    )
    table.add_column("")
    for name in ("exits", "share", "cycles each", "Mcycles", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    some = False
    for design in study.designs.values():
        cycles = design.cost.exits
        total, count = sum(cycles.values()), design.exits_total
        if not count and not every:
            continue
        some = True
        table.add_section()
        table.add_row(
            escape(design.name), f"{count:,}", "", _each(total, count), f"{total / 1e6:,.1f}", "", style="bold"
        )
        reasons = [(reason, design.exits[reason]) for reason in EXITS if design.exits[reason] or every]
        for reason, number in sorted(reasons, key=lambda pair: -cycles[pair[0]]):
            table.add_row(
                f"  {EXITS[reason]}",
                f"{number:,}",
                _share(number, count),
                _each(cycles[reason], number),
                f"{cycles[reason] / 1e6:,.1f}",
                _share(cycles[reason], total),
            )
        rest = cycles["rest"]
        table.add_row(f"  {REST}", "", "", "", f"{rest / 1e6:,.1f}", _share(rest, total))
    return table if some else None


def _each(cycles: float, number: int) -> str:
    return f"{cycles / number:,.0f}" if number else ""


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
