"""What a terminal shows: the table of a comparison, and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .trace import Recording, RecordingFile, ReplayResult

WIDTH = 100
"""Columns of a table that does not go to a terminal."""

_EXITS = {
    "fill": "page fault: shadow entry missing",
    "write": "page fault: more rights for a leaf",
    "emulate": "page fault: store to a guest table",
    "guest": "page fault: the guest's own",
    "mmio": "page fault: device access",
    "cr3": "CR3 load",
    "cr0": "CR0 load",
    "cr4": "CR4 load",
    "efer": "EFER load",
    "invlpg": "INVLPG",
}


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def comparison(recording: Recording | RecordingFile, results: Sequence[ReplayResult]) -> Table:
    """Metrics down, designs across."""
    title = escape(f"{recording.name}: {recording.operations:,} records")
    table = Table(title=title, caption=_caption(results), title_style="bold", caption_justify="left")
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(result.design, justify="right", no_wrap=True)

    def row(name: str, values: Iterable[float], style: str = "", digits: int = 0) -> None:
        table.add_row(name, *(f"{value:,.{digits}f}" for value in values), style=style)

    def counter(name: str, key: str) -> None:
        row(name, [result.whole.counters[key] for result in results])

    for reason, name in _EXITS.items():
        row(name, [result.whole.exits[reason] for result in results])
    row("VM exits, all", [result.whole.exits_total for result in results], "bold")
    row("  per million guest instructions", [r.whole.exits_per_million for r in results], "bold", 2)
    for part in ("boot", "workload"):
        phases = [phase for result in results if (phase := getattr(result, part))]
        if phases:
            row(f"  in the {part}", [phase.exits_total for phase in phases])
            row(f"  in the {part}, per million", [phase.exits_per_million for phase in phases], digits=2)
    table.add_section()
    counter("emulated stores", "pf_emulate")
    counter("shadow pages zapped", "mmu_shadow_zapped")
    counter("  by floods of stores, or misaligned ones", "mmu_flooded")
    counter("  recycled for room in the pool", "mmu_recycled")
    row("shadow pages in use, mean", [result.pages_mean for result in results], digits=1)
    row("shadow pages in use, most", [result.pages_max for result in results])
    table.add_section()
    counter("entries read by the processor's walks", "walk_references")
    counter("guest entries read at exits", "guest_walk_references")
    table.add_section()
    row("accesses that reached another gpa", [result.gpa_mismatches for result in results])
    row("guest faults", [result.faults for result in results])
    row("seconds", [result.seconds for result in results], digits=3)
    return table


def _caption(results: Sequence[ReplayResult]) -> str:
    first = results[0]
    millions = first.whole.instructions / 1e6
    text = (
        f"{first.whole.records:,} records replayed, {millions:,.0f} million guest instructions: "
        f"{first.accesses:,} accesses, {first.table_stores:,} stores to tables ({first.physical_stores:,} by "
        f"mappings that are not known), {first.snapshot_words:,} words of new tables."
    )
    if first.boot and first.workload:
        text += f" Boot ends at record {first.boot.records:,}, the first user-mode access."
    return text


def print_comparison(recording: Recording | RecordingFile, results: Sequence[ReplayResult]) -> None:
    _console().print(comparison(recording, results))


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error while that is a terminal, fed by calls of (done, total); else None."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} records"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
