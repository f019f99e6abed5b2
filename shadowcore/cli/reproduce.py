"""The command `reproduce` of `shadowcore`: the figures of January 2007."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import ConfigError
from ..files import replace
from .options import JSON, Output, apart, command


@command()
@click.option("--write", type=Output(), metavar="FILE", help="Write the page (Markdown) to FILE.  [default: no file]")
@click.option("--check", metavar="FILE", help="Is the page in FILE current? Exit status 2 if not.  [default: no file]")
@JSON
def reproduce(write: str | None, check: str | None, as_json: bool) -> None:
    """Predict the benchmark figures of January 2007 (KVM with and without cached shadow page tables), and compare.

    Two of nine figures calibrate prices, the others are predicted. Times are in microseconds for a context switch, in
    seconds for hackbench.
    """
    apart([("--check", check)], [write])
    from ..studies import reproduction
    from .progress import progress

    with progress("reproduce", "steps") as bar:
        found = reproduction.reproduce(bar)
    text = reproduction.page(found)
    try:
        if write is not None:
            replace(write, text.encode("utf-8"))
        if check is not None and Path(check).read_text("utf-8") != text:
            raise ConfigError(f"{check}: it is not what `shadowcore reproduce --write {check}` makes today")
    except OSError as error:
        raise ConfigError(f"{write or check}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{check}: it is not a text in UTF-8") from None
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    from ..report import terminal as report

    report.print_reproduction(found)


COMMANDS = (reproduce,)
