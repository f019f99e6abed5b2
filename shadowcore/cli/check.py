"""The command `check` of `shadowcore`: a model beside a real host."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from .options import JSON, OPERATIONS, POOL, SEED, SET, SOURCES, WARM_UP, command, mmu, together

if TYPE_CHECKING:
    from collections.abc import Callable


@command()
@SOURCES
@click.option(
    "--trace",
    "traces",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Trace events of a host's KVM (`trace-cmd report` of kvm and kvmmmu), or a table of `perf kvm stat report`; "
    "may be repeated.",
)
@mmu(("unsync",))
@POOL
@SET
@OPERATIONS
@WARM_UP
@SEED
@JSON
def check(
    sources: tuple[str, ...],
    traces: tuple[str, ...],
    designs: tuple[str, ...],
    pool: int | None,
    sets: tuple[tuple[str, Any], ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Count what a real host's KVM did, exits by kind and events, beside what designs do on WORKLOAD or RECORDING.

    Nothing is replayed: such traces have no accesses. WORKLOAD or RECORDING is the model of what ran on the host;
    without it, the recording that comes with the package. Where lengths differ, compare shares of the exits.

    \b
    Example:
      shadowcore check shell --trace host.txt --mmu unsync --mmu kvm-6.12
    """
    from ..report import terminal
    from ..studies import host
    from ..studies.study import study
    from .progress import progress

    found = [host.read(path) for path in traces]

    def bar(design: str) -> AbstractContextManager[Callable[[int, int], None] | None]:
        return progress(design, "operations")

    wanted = tuple(dict.fromkeys(designs or ("unsync",)))
    made = study(list(sources) or None, wanted, settings=together(sets, pool), windows=0, progress=bar, **options)
    if as_json:
        click.echo(json.dumps({"hosts": [each.as_dict() for each in found]} | host.counted(made)))
    else:
        terminal.print_check(found, made)


COMMANDS = (check,)
