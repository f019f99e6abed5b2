"""The commands `compare`, `report` and `run` of `shadowcore`: studies of workloads and recordings."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..config import DEFAULT_DESIGNS
from ..errors import ConfigError
from .options import COSTS, JSON, OPERATIONS, POOL, SEED, SET, Output, Series, Source, apart, command, mmu, together
from .outputs import to_file, writable, writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..studies.results import Study

_COMPARED = (
    click.argument("source", required=False, metavar="[WORKLOAD|RECORDING]", type=Source()),
    mmu(DEFAULT_DESIGNS),
    POOL,
    SET,
    click.option(
        "--over",
        type=Series(),
        metavar="NAME=VALUE,...",
        help="Sweep one setting (or seed, or operations): all designs with each of these values. One is allowed.  "
        "[default: none]",
    ),
    OPERATIONS,
    SEED,
    COSTS,
    click.option(
        "--skip-boot",
        is_flag=True,
        help="Begin at a recording's first user-mode access, with the guest's tables as they are there and a new "
        "shadow.  [default: begin at the first record]",
    ),
    click.option(
        "--windows",
        type=click.IntRange(0, 1 << 62),
        metavar="N",
        help="Operations (records) in a window of reports and timelines.  [default: a 200th of all]",
    ),
    click.option(
        "--csv", "csv_file", type=Output(), metavar="FILE", help="Write one row a design to FILE.  [default: no file]"
    ),
    click.option(
        "--timeline", type=Output(), metavar="FILE", help="Write a trace for Perfetto to FILE.  [default: no file]"
    ),
    JSON,
)


def _compared(function: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(_COMPARED):
        function = decorate(function)
    return function


@command()
@_compared
@click.option("--html", type=Output(), metavar="FILE", help="Write a report, one page, to FILE.  [default: no file]")
def compare(**options: Any) -> None:
    """Run a workload, or replay a recording, under several designs and print one table of what each costs.

    WORKLOAD is a name (`shadowcore workloads` lists them), RECORDING a file of what a guest did; without either, the
    recording that comes with the package: a Linux 6.1 guest that boots and runs 60 shell pipelines.

    Ctrl-C ends it; designs that were done by then are printed.
    """
    _compare(**options)


@command()
@_compared
@click.option("--html", type=Output(), required=True, metavar="FILE", help="The page to write.  [required]")
def report(**options: Any) -> None:
    """Write a report of a comparison: the same as `compare ... --html FILE`."""
    _compare(**options)


def _compare(
    source: str | None,
    designs: tuple[str, ...],
    pool: int | None,
    sets: tuple[tuple[str, Any], ...],
    over: tuple[str, tuple[Any, ...]] | None,
    html: str | None,
    timeline: str | None,
    csv_file: str | None,
    windows: int | None,
    as_json: bool,
    **rest: Any,
) -> None:
    from ..studies.study import Source as Opened
    from ..studies.study import StudyInterrupted, study

    pages = _pages(html, timeline)
    if over and pages:
        raise ConfigError("--over: it makes several studies; --html and --timeline show one")
    writers = [(writer(name, module), file) for name, module, file in pages]
    outputs = (("--html", html), ("--timeline", timeline), ("--csv", csv_file))
    for _, file in outputs:
        if file is not None:
            writable(file)
    fixed = together(sets, pool)
    if not writers:
        if windows:
            raise ConfigError("--windows: a report or a timeline, which shows them, is needed: --html or --timeline")
        windows = 0
    wanted = tuple(dict.fromkeys(designs or DEFAULT_DESIGNS))
    points: list[tuple[Any, dict[str, Any]]] = [(None, {})]
    if over:
        name, values = over
        if name in fixed:
            raise ConfigError(f"--over: {name} is set by --set or --pool as well")
        if name in ("seed", "operations") and rest.get(name) is not None:
            raise ConfigError(f"--over: {name} is set by --{name} as well")
        points = [(value, {name: value}) for value in values]
    opened = Opened.find(source)
    apart(outputs, [opened.argument if opened.recording is not None else None])
    done: list[tuple[Any, Study]] = []
    interrupted = False
    try:
        for value, point in points:
            label = f"{over[0]}={value} " if over else ""
            direct = {key: point.pop(key) for key in ("seed", "operations") if key in point}
            settings = fixed | point
            options = rest | direct
            done.append(
                (value, study(opened, wanted, settings=settings, windows=windows, progress=_bar(label), **options))
            )
    except KeyboardInterrupt as stop:
        interrupted = True
        if isinstance(stop, StudyInterrupted) and stop.study.designs:
            done.append((value, stop.study))
    if not done:
        raise KeyboardInterrupt
    _show(over[0] if over else None, done, as_json)
    if csv_file is not None:
        _csv(over[0] if over else None, done, csv_file)
    if interrupted:
        raise KeyboardInterrupt
    for write, file in writers:
        to_file(file, partial(write, done[0][1]))


def _show(over: str | None, done: list[tuple[Any, Study]], as_json: bool) -> None:
    from ..report import terminal as report

    if over is None:
        only = done[0][1]
        if as_json:
            click.echo(json.dumps(only.as_dict()))
        else:
            report.print_comparison(only)
        return
    if as_json:
        values = [value for value, _ in done]
        first = done[0][1]
        studies = [made.as_dict() for _, made in done]
        plain = {"workload": first.workload, "operations": first.operations, "over": over, "values": values}
        click.echo(json.dumps(plain | {"studies": studies}))
    else:
        report.print_sweep(over, done)


def _csv(over: str | None, done: list[tuple[Any, Study]], file: str) -> None:
    from ..studies.results import write_csv

    rows = [({over: value} if over else {}) | row for value, made in done for row in made.rows()]
    to_file(file, lambda path: write_csv(path, rows))


def _pages(html: str | None, timeline: str | None) -> list[tuple[str, str, str]]:
    asked = (("--html", "page", html), ("--timeline", "timeline", timeline))
    return [(option, module, file) for option, module, file in asked if file is not None]


def _bar(label: str = "") -> Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]:
    from .progress import progress

    return lambda design: progress(label + design, "operations")


@command()
@click.argument("workload", metavar="WORKLOAD", type=Source())
@mmu(("cached",))
@POOL
@SET
@OPERATIONS
@SEED
@COSTS
@JSON
def run(
    workload: str,
    designs: tuple[str, ...],
    pool: int | None,
    sets: tuple[tuple[str, Any], ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Run WORKLOAD and print what its guest did and what the engine did about it, every counter that is not 0.

    `shadowcore workloads` lists workloads, `shadowcore workloads NAME` the parameters of one. Ctrl-C ends it; designs
    that were done by then are printed.
    """
    from ..report import terminal as report
    from ..studies.study import StudyInterrupted, study
    from ..workload import find

    find(workload)
    wanted = tuple(dict.fromkeys(designs or ("cached",)))
    interrupted = False
    try:
        made = study(workload, wanted, settings=together(sets, pool), windows=0, progress=_bar(), **options)
    except StudyInterrupted as stop:
        made, interrupted = stop.study, True
    if made.designs:
        if as_json:
            plain = made.as_dict()
            for name, design in made.designs.items():
                plain["designs"][name]["counters"] = design.counters
            click.echo(json.dumps(plain))
        else:
            report.print_run(made)
    if interrupted:
        raise KeyboardInterrupt


COMMANDS = (compare, report, run)
