"""The command `record-guest` of `shadowcore`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import ConfigError
from .options import JSON, Assignment, Count, Output, command
from .progress import progress as _progress
from .recording import go_on, written


@command("record-guest", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- qemu-system-x86_64 [ARGUMENT]..."
)
@click.option(
    "-o",
    "--output",
    "out",
    type=Output(),
    default="guest.screc",
    show_default=True,
    metavar="OUT",
    help="The recording.",
)
@click.option(
    "--filter",
    "filter_pages",
    type=Count(8),
    default=512,
    show_default=True,
    metavar="PAGES",
    help="Pages in the filter, a power of two: an access to one that is in it is not recorded.",
)
@click.option(
    "--seconds", type=click.FloatRange(0, 1e6, min_open=True), help="End the guest after this time.  [default: no]"
)
@click.option("--instructions", type=Count(1), help="End it after so many of its instructions.  [default: no]")
@click.option("--name", metavar="NAME", help="What reports call the recording.  [default: as OUT]")
@click.option(
    "--mark",
    "marks",
    type=Assignment(),
    multiple=True,
    metavar="NUMBER=NAME",
    help="The name of the phase that the guest's mark NUMBER begins; may be repeated.  [default: mark-NUMBER]",
)
@JSON
def record_guest(
    command: tuple[str, ...],
    out: str,
    filter_pages: int,
    seconds: float | None,
    instructions: int | None,
    name: str | None,
    marks: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Run a whole guest under QEMU and record what its processors do to their page tables.

    This needs QEMU 7.2, or 10.0 or later, and a C compiler, which builds the recorder's plug-in at first use. The guest
    runs by emulation, two to three times as slowly as without the plug-in. The recording begins when paging is first
    turned on, and ends with the guest, or as --seconds or --instructions say. Ctrl-C ends it; what was recorded by then
    is kept, marked as incomplete.

    \b
    Example:
      shadowcore record-guest -- qemu-system-x86_64 -m 256 -nographic -kernel vmlinuz -append console=ttyS0
    """
    from ..recording import emulated

    shown = not {"-nographic", "-curses"} & set(command) and not any("stdio" in word for word in command)
    label = Path(command[0]).name
    with _progress(label, "instructions", shown) as bar:
        writer = emulated.record(
            command,
            out,
            filter_pages=filter_pages,
            seconds=seconds,
            instructions=instructions,
            name=name,
            marks=_numbers(marks),
            progress=bar and (lambda records, passed: bar(passed, 0, f"{label}: {records:,} records")),
        )
    written(writer, as_json, err=not as_json)
    if not as_json:
        if not writer.complete:
            click.echo("shadowcore: the recording is incomplete: the emulator ended before its time", err=True)
        go_on(writer)
    if not writer.complete:
        sys.exit(1)


def _numbers(marks: tuple[tuple[str, str], ...]) -> dict[int, str]:
    for number, _ in marks:
        if not number.isdecimal():
            raise ConfigError(f"--mark: {number!r} is not the number of a mark")
    return {int(number): str(phase) for number, phase in marks}


COMMANDS = (record_guest,)
