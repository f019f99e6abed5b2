"""What a terminal shows: the tables of studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..engine.costs import COMPONENTS, Costs, left_out
from ..engine.levels import Levels
from ..engine.presets import Preset
from ..engine.reported import UNSYNC
from ..engine.windows import NAMES as ENGINE
from ..studies.choice import Choice
from ..studies.collect import Sweep
from ..studies.difference import Change, Difference
from ..studies.evolution import RELEASES, Evolution
from ..studies.host import EVENTS, GROUPS, HostTrace, counted
from ..studies.pools import PoolStudy
from ..studies.reproduction import Reproduction
from ..studies.results import Study, StudyDesign, Swept
from ..studies.settings import effective, written
from ..studies.validity import SOURCES, Validity
from . import validity
from .document import EXITS
from .exits import exits
from .fit import Fitting
from .fit import console as _console


def _made(title: str, caption: str) -> Table:
    """A table of figures without rows."""
    return Table(title=escape(title), caption=escape(caption), title_style="bold")


def comparison(study: Study, every: bool = False, seconds: bool = True) -> Table:
    """Metrics down, designs across. every: also those that are 0 under each design. seconds: of the engine, too."""
    designs = list(study.designs.values())
    told = (study.caption, left_out({design.name: design.cost.unpriced for design in designs}), *study.notes)
    table = _made(study.title, "\n".join(filter(None, told)))
    table.add_column("")
    for design in designs:
        table.add_column(escape(design.name), justify="right", no_wrap=True)

    def row(name: str, values: Iterable[float], style: str = "", digits: int = 0) -> None:
        values = list(values)
        if every or style or any(values):
            table.add_row(name, *(f"{value:,.{digits}f}" for value in values), style=style)

    def counter(name: str, key: str) -> None:
        row(name, [design.counters[key] for design in designs])

    for reason, name in EXITS.items():
        row(name, [design.exits[reason] for design in designs])
    row("VM exits, all", [design.exits_total for design in designs], "bold")
    row(f"  per million {study.per}", [design.exits_per_million for design in designs], "bold", 2)
    for part in ("boot", "workload"):
        phases = [phase for design in designs if (phase := design.details.get(part))]
        if phases:
            row(f"  in the {part}", [phase["exits_total"] for phase in phases])
            row(f"  in the {part}, per million", [phase["exits_per_million"] for phase in phases], digits=2)
    table.add_section()
    counter("emulated stores", "pf_emulate")
    counter("shadow pages zapped", "mmu_shadow_zapped")
    counter("  by floods of stores, or misaligned ones", "mmu_flooded")
    counter("  recycled for room in the pool", "mmu_recycled")
    for key, label in UNSYNC.items() if every else study.unsync_rows().items():
        counter(label, key)
    row("shadow pages in use, mean", [design.pages_mean for design in designs], digits=1)
    row("shadow pages in use, most", [design.pages_max for design in designs])
    table.add_section()
    counter("entries read by the processor's walks", "walk_references")
    counter("guest entries read at exits", "guest_walk_references")
    counter("TLB misses", "tlb_misses")
    table.add_section()
    row(f"cycles, estimated ({escape(study.costs.name)}), millions", [d.cost.total / 1e6 for d in designs], digits=1)
    slow = ["" if d.cost.slow_down is None else f"{d.cost.slow_down:,.2f}" for d in designs]
    table.add_row("slow-down against native, estimated", *slow, style="bold")
    table.add_section()
    if any(design.history is None for design in designs):
        row("accesses that reached another gpa", [design.gpa_mismatches or 0 for design in designs])
        same = [not design.gpa_mismatches for design in designs]
    else:
        same = [bool(design.history_equal) for design in designs]
    table.add_row("the guest did the same", *("yes" if each else "no" for each in same))
    counter("guest faults", "guest_faults")
    if seconds:
        row("seconds", [design.seconds for design in designs], digits=3)
    return table


def print_comparison(study: Study, every: bool = False, reasons: bool = False) -> None:
    """Print it, and the verdict. reasons: and what the exits of each reason cost."""
    console = _console()
    console.print(comparison(study, every))
    _end(console, study, every, reasons)


def _end(console: Fitting, study: Study, every: bool, reasons: bool) -> None:
    table = exits(study, every) if reasons else None
    if table is not None:
        console.print()
        console.print(table)
    _verdict(console, study.verdict)


def _verdict(console: Fitting, text: str) -> None:
    if text:
        console.print()
        console.print(escape(text), style="bold")


Column = tuple[str, Callable[[StudyDesign], str]]
_COUNTS: tuple[Column, ...] = (
    ("VM exits", lambda d: f"{d.exits_total:,}"),
    ("emulated", lambda d: f"{d.counters['pf_emulate']:,}"),
    ("zapped", lambda d: f"{d.counters['mmu_shadow_zapped']:,}"),
    ("recycled", lambda d: f"{d.counters['mmu_recycled']:,}"),
    ("shadow pages", lambda d: f"{d.pages_mean:,.1f}"),
)
_SLOW_DOWN: Column = ("slow-down", lambda d: "" if d.cost.slow_down is None else f"{d.cost.slow_down:,.2f}")
_SWEPT: tuple[Column, ...] = (*_COUNTS, ("Mcycles", lambda d: f"{d.cost.total / 1e6:,.1f}"), _SLOW_DOWN)
_REBASED: tuple[Column, ...] = (("cycles", lambda d: f"{d.cost.total / (d.work or 1):,.1f}"), _SLOW_DOWN, *_COUNTS)
"""Where another guest does the same work, what the work costs comes first; counts are of unequal work."""


def sweep(swept: Swept, every: bool = False) -> Table:
    """A row for each design and value of the settings that it has. every: also figures that are 0 in each row."""
    first = swept.points[0][1]
    prices = first.costs.name
    if swept.base is None:
        columns = _SWEPT
        caption = f"Shadow pages in use, mean. Cycles are estimated, by prices of {prices}."
    else:
        columns = _REBASED
        caption = (
            f"cycles: for each access of user code, estimated, by prices of {prices}. slow-down: of the same work, "
            f"against native with {swept.base}. Shadow pages in use, mean."
        )
    designs = [design for _, study in swept.points for design in study.designs.values()]
    columns = tuple(c for c in columns if every or any(c[1](each).strip("0.") for each in designs))
    table = _made(f"{first.title}, over {' and '.join(swept.names)}", "\n".join([caption, *swept.notes]))
    table.add_column("design", no_wrap=True)
    for name in swept.names:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for design in dict.fromkeys(name for _, study in swept.points for name in study.designs):
        table.add_section()
        told_of = set()
        for value, study in swept.points:
            if design in study.designs:
                labels = effective(swept.labels(value), study.designs[design].design)
                texts = tuple("" if name not in labels else escape(written(labels[name])) for name in swept.names)
                if texts not in told_of:  # a setting that the design has not makes no row of its own
                    told_of.add(texts)
                    table.add_row(design, *texts, *(show(study.designs[design]) for _, show in columns))
    return table


def print_sweep(swept: Swept, every: bool = False, reasons: bool = False) -> None:
    """Print it, and the verdict. reasons: and what the exits of each reason cost, for each study."""
    console = _console()
    console.print(sweep(swept, every), labels=1 + len(swept.names))
    for value, study in swept.points if reasons else ():
        labels = ", ".join(f"{name}={written(of)}" for name, of in swept.labels(value).items())
        table = exits(study, every)
        if table is not None:
            table.title = f"{escape(labels)}: {table.title}"
            console.print()
            console.print(table)
    _verdict(console, swept.verdict)


_POINT: tuple[tuple[str, str, float, int], ...] = (
    ("VM exits", "exits_total", 1, 0),
    ("emulated", "emulated", 1, 0),
    ("zapped", "zapped", 1, 0),
    ("recycled", "recycled", 1, 0),
    ("shadow pages", "pages_mean", 1, 1),
    ("Mcycles", "cycles", 1e6, 1),
    ("slow-down", "slow_down", 1, 2),
)
_SHOWN = 60
"""Points that a terminal shows."""


def points(found: Sweep) -> Table:
    """A row a point, with what it is told apart by."""
    rows = found.rows()
    caption = "Shadow pages in use, mean. Cycles and slow-down are estimated."
    if len(rows) > _SHOWN:
        caption = f"The first {_SHOWN} of {len(rows):,} points; --csv and --html have all. " + caption
    table = _made(found.name, caption)
    named = list(dict.fromkeys(("design", *found.axes)))
    numbers = [name for name in named if all(isinstance(row.get(name), (int, type(None))) for row in rows)]
    for name in named:
        table.add_column(escape(name), justify="right" if name in numbers else "left", no_wrap=True)
    shown = [column for column in _POINT if any(row[column[1]] for row in rows)]
    for title, *_ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows[:_SHOWN]:
        labels = ["" if row.get(name) is None else escape(written(row[name])) for name in named]
        if row["status"] == "done":
            cells = ["" if row[key] is None else f"{row[key] / by:,.{digits}f}" for _, key, by, digits in shown]
        else:
            cells = [row["status"]] + [""] * (len(shown) - 1)
        table.add_row(*labels, *cells[: len(shown)], style="" if row["status"] == "done" else "red")
    return table


def print_points(found: Sweep) -> None:
    """Print it."""
    _console().print(points(found), labels=len(dict.fromkeys(("design", *found.axes))))


_CHANGES = 100
"""Changes that a terminal shows."""


def print_difference(found: Difference, too_much: Sequence[Change]) -> None:
    """What changed, what did not, and what is too much."""
    console = _console()
    for name, first, second in found.settings:
        console.print(escape(f"{name}: {first} was, {second} is"), soft_wrap=True)
    if found.changes:
        table = Table()
        for title in ("case", "figure"):
            table.add_column(title, no_wrap=True)
        for title in ("was", "is", "change"):
            table.add_column(title, justify="right", no_wrap=True)
        for change in found.changes[:_CHANGES]:
            share = "" if change.share is None else f"{100 * change.share:+,.2f} %"
            shown = (_figure(change.first), _figure(change.second), share)
            style = "bold red" if change in too_much else ""
            table.add_row(escape(change.case), escape(change.figure), *shown, style=style)
        console.print(table, labels=2)
        if len(found.changes) > _CHANGES:
            console.print(f"The first {_CHANGES} of {len(found.changes):,} changes; --json has all.")
    equal = found.figures - len(found.changes)
    text = f"{found.cases:,} cases, {found.figures:,} figures: {equal:,} equal, {len(found.changes):,} changed."
    for title, cases in (("first", found.first_only), ("second", found.second_only)):
        if cases:
            listed = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
            text += f" Only in the {title}: {len(cases):,} ({listed})."
    if too_much:
        text += f" Too much: {len(too_much):,}."
    console.print(escape(text), soft_wrap=True)


def _figure(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else escape(str(value))


def print_pools(found: PoolStudy) -> None:
    """How many shadow pages a guest needs."""
    table = _made(
        f"{found.workload} under {found.design}: exits over shadow pages",
        f"The curve bends at {found.bend:,} pages. "
        + " ".join(
            f"{pages:,} pages take at most {share:.0%} more exits than an endless pool."
            for share, pages in found.within.items()
        ),
    )
    for name in ("pages", "exits", "of endless", "made", "recycled", "lru misses"):
        table.add_column(name, justify="right", no_wrap=True)
    for pages in found.exhausted:
        table.add_row(f"{pages:,}", "no room", "", "", "", "")
    for point in found.points:
        table.add_row(
            f"{point.pages:,}",
            f"{point.exits:,}",
            f"{point.exits / max(1, found.endless.exits):.3f}",
            f"{point.made:,}",
            f"{point.recycled:,}",
            f"{found.misses(point.pages):,}",
        )
    table.add_section()
    table.add_row("endless", f"{found.endless.exits:,}", "1.000", f"{found.endless.made:,}", "0", "")
    _console().print(table)


def print_run(study: Study, every: bool = False) -> None:
    """What a guest did, and what each design did about it: every counter that is not 0, or `every` one, and what the
    exits of each reason cost."""
    designs = list(study.designs.values())
    chosen = ", ".join(f"{name} {value}" for name, value in study.settings.items())
    table = _made(study.title, "\n".join([f"{chosen}. {study.command}", *study.notes]))
    table.add_column("")
    for design in designs:
        table.add_column(design.name, justify="right", no_wrap=True)

    def section(name: str, rows: Iterable[tuple[str, list[float]]], digits: int = 0) -> None:
        shown = [(label, values) for label, values in rows if every or any(values)]
        if shown:
            table.add_section()
            table.add_row(name, style="bold")
            for label, values in shown:
                table.add_row(f"  {escape(label)}", *(f"{value:,.{digits}f}" for value in values))

    did = dict.fromkeys(name for design in designs for name in design.guest)
    section("the guest", [(key, [d.guest.get(key, 0) for d in designs]) for key in did])
    section("the engine", [(key, [d.counters[key] for d in designs]) for key in (*ENGINE, "exits_total")])
    section(
        "shadow pages in use", [("mean", [d.pages_mean for d in designs]), ("most", [d.pages_max for d in designs])]
    )
    parts = [(what, [d.cost.components[key] / 1e6 for d in designs]) for key, what in COMPONENTS.items()]
    section(f"cycles, estimated ({study.costs.name}), millions", parts, 2)
    table.add_section()
    slow = ["" if d.cost.slow_down is None else f"{d.cost.slow_down:,.3f}" for d in designs]
    table.add_row("slow-down against native, estimated", *slow)
    table.add_row(
        f"{study.unit} a second, millions", *(f"{d.operations / 1e6 / max(d.seconds, 1e-9):,.1f}" for d in designs)
    )
    if any(d.history is not None for d in designs):
        table.add_row("history", *("" if d.history is None else f"{d.history:016x}" for d in designs))
    console = _console()
    console.print(table)
    _end(console, study, every, True)


def print_evolution(found: Evolution) -> None:
    """Workloads down, releases across."""
    table = Table(
        title="VM exits of KVM's shadow MMU, by release of Linux",
        caption="docs/evolution.md says what changed.",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for release in RELEASES:
        table.add_column(release.name.replace("-", " "), justify="right")
    for source in found.studies:
        table.add_row(source, *(found.shown(source, release.name) for release in RELEASES))
    _console().print(table)


def print_reproduction(found: Reproduction) -> None:
    """Predicted against published figures."""
    caption = (
        f"Calibrated: {found.costs.access:.2f} cycles for an operation, {found.costs.dispatch:,.1f} for an exit beyond "
        "the processor's part. Given native: on top of the published native figure. Exits for each switch or message."
    )
    first = found.figures[0].test
    table = Table(title="The figures of January 2007", caption=caption, title_style="bold")
    for name in ("test", "column", "published", "predicted", "error", "given native", "error", "exits"):
        table.add_column(name, justify="left" if name in ("test", "column") else "right")
    for f in found.figures:
        if f.column == "native":
            table.add_section()
        error = "calibrated" if f.calibrated else f"{f.error(f.predicted, f.published):+.0f} %"
        given = [f"{f.given_native:.2f}", f"{f.error(f.given_native, f.published):+.0f} %"]
        shown = given if f.column != "native" and f.test != first else ["", ""]
        cells = (f"{f.published:g}", f"{f.predicted:.2f}", error, *shown, f"{f.exits:.2f}")
        table.add_row(f.test, f.column, *cells)
    _console().print(table, labels=2)
    table = Table(title="hackbench with caching, given native, by shadow pages in the pool", title_style="bold")
    table.add_column("test")
    for pool in next(iter(found.pools.values())):
        table.add_column(f"{pool}, s", justify="right")
        table.add_column("recycled per 1000 messages", justify="right")
    for test, by_pool in found.pools.items():
        table.add_row(test, *(cell for s, n in by_pool.values() for cell in (f"{s:.2f}", f"{n:,.0f}")))
    _console().print(table)


def print_validity(found: Validity) -> None:
    """Published, predicted, error, and what was counted."""
    predicted = found.predicted
    told = f"{validity.within(predicted, 20)} of {len(predicted)} predictions are within 20 percent."
    why = dict.fromkeys(f"{row.test}, {row.column} ({validity.error(row)}): {row.why}." for row in predicted if row.far)
    table = Table(
        title=escape(f"{found.source}: {SOURCES[found.source]}"),
        caption=escape("\n".join([told, *(f"Missed: {line}" for line in why)])),
        title_style="bold",
    )
    for name in ("", "", "published", "predicted", "error", "counted"):
        table.add_column(name, justify="right" if name in ("published", "predicted", "error") else "left")
    for group in dict.fromkeys(row.table for row in found.rows):
        table.add_section()
        table.add_row(group, style="bold")
        for row in found.rows:
            if row.table == group:
                cells = (validity.published(row), validity.number(row.predicted), validity.error(row))
                style = "" if row.kind == "predicted" else "dim"
                table.add_row(escape(row.test), row.column, *cells, validity.counted(row), style=style)
    _console().print(table, labels=2)


def print_choice(found: Choice) -> None:
    """Slow-downs, a table for each preset, the best of each source bold."""
    for preset, by_source in found.slow.items():
        table = Table(
            title=f"Slow-down against native, estimated, at the prices of {preset}",
            title_style="bold",
        )
        table.add_column("", no_wrap=True)
        for name in found.designs:
            table.add_column(name, justify="right", no_wrap=True)
        for source, by in by_source.items():
            best = found.best(preset, source)
            cells = (f"[bold]{slow:.2f}[/]" if name in best else f"{slow:.2f}" for name, slow in by.items())
            table.add_row(escape(source), *cells)
        _console().print(table)
    _console().print("Bold: the best, and what is within 2 percent of it.")


def print_price_lists(presets: Mapping[str, Preset], aliases: Mapping[str, str], levels: Mapping[str, Levels]) -> None:
    """Lists of prices, and the levels by which exits are counted."""
    names = {name: ", ".join(alias for alias, of in aliases.items() if of == name) for name in presets}
    table = Table(title="Prices", title_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("also", no_wrap=True)
    table.add_column("levels", no_wrap=True)
    table.add_column("measured")
    for name, preset in presets.items():
        table.add_row(name, names[name], preset.levels, preset.machine)
    _console().print(table)
    table = Table(
        title="Levels: changes of world, and exits to an outer hypervisor among them, of",
        title_style="bold",
    )
    table.add_column("name", no_wrap=True)
    for what in ("an exit", "an EPT violation", "each table of it"):
        table.add_column(what, justify="right")
    for made in levels.values():
        ept = made.paging == "ept"
        table.add_row(
            made.name,
            f"{made.exit_switches}, {made.exit_outer}",
            f"{made.violation_switches}, {made.violation_outer}" if ept else "",
            f"{made.table_switches}, {made.table_outer}" if ept else "",
        )
    _console().print(table)


def print_prices(preset: Preset, costs: Costs) -> None:
    """Each price, in cycles and nanoseconds, with its source."""
    table = Table(
        title=escape(f"{preset.name}: {preset.machine}"),
        caption=f"levels {costs.levels.name}. What each is the price of: the reference of sc.Costs.",
        title_style="bold",
    )
    table.add_column("price", no_wrap=True)
    table.add_column("cycles", justify="right", no_wrap=True)
    table.add_column("ns", justify="right", no_wrap=True)
    table.add_column("source")
    for name, (value, source) in preset.prices.items():
        if isinstance(value, tuple):
            table.add_row(name, " ".join(f"{part:g}" for part in value), "", escape(source))
        elif name == "clock_ghz":
            table.add_row(name, f"{value:g}", "", escape(source))
        else:
            table.add_row(name, f"{value:,g}", f"{value / costs.clock_ghz:,.0f}", escape(source))
    _console().print(table)


def check(hosts: Sequence[HostTrace], study: Study) -> Table:
    """Exits and events of hosts, and of designs beside them."""
    made = counted(study)["designs"]
    title = f"{', '.join(host.file for host in hosts)} beside {study.title}"
    caption = "\n".join([*(note for host in hosts for note in host.notes()), *study.notes])
    table = _made(title, caption)
    table.add_column("")
    for name in [*(host.kind for host in hosts), *made]:
        table.add_column(name, justify="right", no_wrap=True)

    def cells(values: Iterable[int | None], totals: Iterable[int]) -> list[str]:
        """Counts, with their share of the exits."""
        return [
            "not told" if value is None else f"{value:,}" + (f" {100 * value / total:5.1f} %" if total else "")
            for value, total in zip(values, totals, strict=True)
        ]

    all_of = [*hosts, *made.values()]
    parts = [vars(each) | {"exits_total": each.exits_total} if isinstance(each, HostTrace) else each for each in all_of]
    totals = [part["exits_total"] for part in parts]
    for group, reasons in GROUPS.items():
        table.add_row(f"exits: {group}", *cells([part["groups"][group] for part in parts], totals), style="bold")
        for reason in reasons if len(reasons) > 1 else ():
            label = EXITS[reason].removeprefix("page fault: ")
            table.add_row(f"  {label}", *cells([part["exits"][reason] for part in parts], totals))
    table.add_row("exits for the MMU's sake", *(f"{total:,}" for total in totals), style="bold")
    table.add_section()
    nothing = [0] * len(parts)
    for event, (_, label) in EVENTS.items():
        values = [part["events"].get(event, 0 if part["events"] else None) for part in parts]
        table.add_row(f"{label} ({event})", *cells(values, nothing))
    others = [name for host in hosts for name in host.events if name not in EVENTS]
    exits = [name for host in hosts for name in host.other]
    for names, key, label in ((others, "events", "{}"), (exits, "other", "other exits: {}")):
        if names:
            table.add_section()
        for name in dict.fromkeys(names):
            values = [getattr(host, key).get(name) for host in hosts]
            shown = ["" if not value else f"{value:,}" for value in values]
            if any(shown):
                table.add_row(escape(label.format(name)), *shown, *[""] * len(made))
    return table


def print_check(hosts: Sequence[HostTrace], study: Study) -> None:
    """Print it."""
    _console().print(check(hosts, study))
