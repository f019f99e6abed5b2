"""The commands `compare`, `report`, `run` and `programs` of `shadowcore`: studies of workloads and recordings."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..config import DEFAULT_DESIGNS
from ..errors import ConfigError
from ..guest.options import MODES
from .options import (
    COSTS,
    JSON,
    OPERATIONS,
    POOL,
    SEED,
    SET,
    SOURCES,
    WARM_UP,
    Count,
    Name,
    Output,
    Series,
    apart,
    command,
    mmu,
    together,
)
from .outputs import to_file, writable, writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..studies.results import Study, Swept

_COMPARED = (
    POOL,
    SET,
    click.option(
        "--over",
        "overs",
        type=Series(),
        multiple=True,
        metavar="NAME=VALUE,...",
        help="Sweep a setting (or seed, operations, warm_up): all designs with each of these values, or of a range "
        "such as 16..4096 x2. May be repeated: then with each combination.  [default: none]",
    ),
    click.option(
        "--base",
        metavar="VALUE",
        help="Of a swept setting of the guest kernel (isolation, mode, ...) the value whose native run every slow-down "
        "is against.  [default: the first]",
    ),
    OPERATIONS,
    WARM_UP,
    SEED,
    COSTS,
    click.option(
        "--skip-boot",
        is_flag=True,
        help="Begin at a guest's first user-mode access, with its tables as they are there and a new shadow.  "
        "[default: begin at the first record]",
    ),
    click.option(
        "--windows",
        type=Count(0),
        metavar="N",
        help="Operations (records) in a window of reports and timelines.  [default: a 200th of all]",
    ),
    click.option(
        "--exits", "reasons", is_flag=True, help="Print what the exits of each reason cost.  [default: `run` alone]"
    ),
    click.option(
        "--all", "every", is_flag=True, help="Print what is 0 under every design, too.  [default: leave it out]"
    ),
    click.option(
        "--csv", "csv_file", type=Output(), metavar="FILE", help="Write one row a design to FILE.  [default: no file]"
    ),
    click.option(
        "--timeline", type=Output(), metavar="FILE", help="Write a trace for Perfetto to FILE.  [default: no file]"
    ),
    click.option(
        "--exits-log",
        type=Output(),
        metavar="FILE",
        help="Write a row for each exit to FILE, as .csv or .parquet: operation, vcpu, reason, address, frame, error "
        "code, and what was made and zapped. Such runs take longer.  [default: no file]",
    ),
)
_HTML = click.option(
    "--html", type=Output(), metavar="FILE", help="Write a report, one page, to FILE.  [default: no file]"
)


def _compared(function: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(_COMPARED):
        function = decorate(function)
    return function


@command()
@SOURCES
@mmu(DEFAULT_DESIGNS)
@_compared
@_HTML
@JSON
def compare(**options: Any) -> None:
    """Run a workload or a recording under several designs and print one table of what each costs.

    WORKLOAD is a name (`shadowcore workloads` lists them), RECORDING a file of what a guest did, of operations, or of
    what a program did (several programs run side by side); without either, the recording that comes with the package:
    a Linux 6.1 guest that boots and runs 60 shell pipelines.

    Ctrl-C ends it; designs that were done by then are printed.

    \b
    Examples:
      shadowcore compare hackbench --set groups=3 --over pool=64,256,1024
      shadowcore compare guest.screc --warm-up boot --html guest.html
      shadowcore compare webserver --over isolation=false,true
    """
    _compare(**options)


@command()
@SOURCES
@mmu(DEFAULT_DESIGNS)
@_compared
@click.option("--html", type=Output(), required=True, metavar="FILE", help="The page to write.")
@JSON
def report(**options: Any) -> None:
    """Write a report of a comparison: the same as `compare ... --html FILE`.

    \b
    Example:
      shadowcore report fork-storm --html fork-storm.html
    """
    _compare(**options)


@command()
@SOURCES
@mmu(("cached",))
@_compared
@_HTML
@JSON
def run(**options: Any) -> None:
    """Run a workload or a recording and print what its guest did and what the engine did about it, every counter that
    is not 0.

    WORKLOAD and RECORDING are as for `shadowcore compare`. Ctrl-C ends it; designs that were done by then are printed.

    \b
    Example:
      shadowcore run pingpong --set pages=64 --mmu unsync
    """
    _compare(default=("cached",), detailed=True, **options)


@command()
@click.argument("sources", nargs=-1, required=True, metavar="RECORDING...")
@mmu(DEFAULT_DESIGNS)
@click.option(
    "--mode", type=Name(MODES), metavar="NAME", help=f"Paging mode of the guest: {', '.join(MODES)}.  [default: 64]"
)
@click.option("--memory", metavar="SIZE", help="RAM of the guest, as 64MiB.  [default: enough]")
@click.option(
    "--turn",
    type=Count(1),
    metavar="N",
    help="Accesses that a process makes before the next, where the recordings do not say who ran when.  "
    "[default: 100000]",
)
@click.option("--fold", is_flag=True, help="Pack addresses that the mode lacks below its end.  [default: error]")
@click.option("--isolation", is_flag=True, help="Page-table isolation.  [default: off]")
@click.option("--pcid", is_flag=True, help="PCIDs.  [default: off]")
@_compared
@_HTML
@JSON
def programs(sets: tuple[tuple[str, Any], ...], **options: Any) -> None:
    """The same as `compare`, for recorded programs, with settings of the guest kernel as options of their own.

    RECORDING is a program recording, as `shadowcore record` and `import` make it; several run side by side.

    \b
    Example:
      shadowcore programs ls.screc --mode pae --fold
    """
    given = {name: options.pop(name) for name in ("mode", "memory", "turn", "fold", "isolation", "pcid")}
    more = tuple((name, value) for name, value in given.items() if value not in (None, False))
    _compare(sets=(*sets, *more), **options)


def _compare(
    sources: tuple[str, ...],
    designs: tuple[str, ...],
    pool: int | None,
    sets: tuple[tuple[str, Any], ...],
    overs: tuple[tuple[str, tuple[Any, ...]], ...],
    base: str | None,
    html: str | None,
    timeline: str | None,
    csv_file: str | None,
    exits_log: str | None,
    windows: int | None,
    as_json: bool,
    reasons: bool,
    every: bool,
    default: tuple[str, ...] = DEFAULT_DESIGNS,
    detailed: bool = False,
    **rest: Any,
) -> None:
    from .. import columns
    from ..studies import settings
    from ..studies import study as studies
    from ..studies.results import Swept
    from ..studies.source import find

    over: dict[str, tuple[Any, ...]] = {}
    for name, values in overs:
        if name in over:
            raise ConfigError(f"--over: {name} is given twice, one is allowed")
        over[name] = values
    pages = _pages(html, timeline, bool(over))
    writers = [(writer(name, module), file) for name, module, file in pages]
    outputs = (("--html", html), ("--timeline", timeline), ("--csv", csv_file), ("--exits-log", exits_log))
    for _, file in outputs:
        if file is not None:
            writable(file)
    if not (timeline if over else writers):  # the page of a sweep has none
        if windows:
            raise ConfigError("--windows: a report or a timeline, which shows them, is needed: --html or --timeline")
        windows = 0
    if exits_log is not None:
        if over:
            raise ConfigError("--exits-log: it is of one study, and --over makes several")
        columns.check(exits_log, "--exits-log")
    wanted = tuple(dict.fromkeys(designs or default))
    opened = find(list(sources) or None)
    apart(outputs, opened.files)
    options = rest | {"windows": windows, "settings": together(sets, pool)}
    if exits_log is not None:
        options["log_exits"] = True
    swept = {"over": over or None, "base": None if base is None else settings.parse(base)}
    interrupted = False
    made: Study | Swept
    try:
        made = studies.compare(opened, wanted, progress=_bar(opened.unit), **swept, **options)
    except studies.StudyInterrupted as stop:
        made, interrupted = stop.study, True
        if not isinstance(made, Swept) and not made.designs:
            raise KeyboardInterrupt from None
    _show(made, as_json, detailed, every, reasons)
    if csv_file is not None:
        to_file(csv_file, made.to_csv)
    if exits_log is not None and not isinstance(made, Swept):
        to_file(exits_log, made.write_exits)
    if interrupted:
        raise KeyboardInterrupt
    for write, file in writers:
        to_file(file, partial(write, made))
    if not as_json:
        for _, file in outputs:
            if file is not None:
                click.echo(f"written: {file}", err=True)


def _show(made: Study | Swept, as_json: bool, detailed: bool, every: bool, reasons: bool) -> None:
    from ..report import terminal as report
    from ..studies.results import Swept

    swept = made if isinstance(made, Swept) else None
    studies = [made] if not isinstance(made, Swept) else [study for _, study in made.points]
    if as_json:
        plain = made.as_dict()
        for study, found in zip(studies, plain["studies"] if swept else [plain], strict=True) if detailed else ():
            for name, design in study.designs.items():
                found["designs"][name]["counters"] = design.counters
        click.echo(json.dumps(plain))
    elif detailed:
        for study in studies:
            report.print_run(study, every)
    elif swept:
        report.print_sweep(swept, every, reasons)
    else:
        report.print_comparison(studies[0], every, reasons)


def _pages(html: str | None, timeline: str | None, several: bool) -> list[tuple[str, str, str]]:
    asked = (("--html", "sweep" if several else "page", html), ("--timeline", "timeline", timeline))
    return [(option, module, file) for option, module, file in asked if file is not None]


def _bar(unit: str) -> Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]:
    from .progress import progress

    return lambda design: progress(design, unit)


COMMANDS = (compare, report, run, programs)
