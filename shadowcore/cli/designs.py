"""The command `designs` of `shadowcore`: which design when."""

from __future__ import annotations

import json

import click

from ..files import replace
from .options import JSON, Output, command


@command()
@click.argument("sources", nargs=-1, metavar="[WORKLOAD|RECORDING]...")
@click.option("--write", type=Output(), metavar="FILE", help="Write the page (Markdown) to FILE.  [default: no file]")
@click.option(
    "--operations",
    type=click.IntRange(1, 1 << 62),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Operations of each workload; recordings are replayed from end to end.",
)
@JSON
def designs(sources: tuple[str, ...], write: str | None, operations: int, as_json: bool) -> None:
    """Run every design over workloads and recordings (all, and the recording of the package, where none is named), and
    print what each is slowed down to, at the prices of three presets. docs/designs.md is such a page.

    \b
    Example:
      shadowcore designs fork-storm webserver
    """
    from ..report import terminal as report
    from ..studies import choice
    from .progress import progress

    with progress("designs", "sources") as bar:
        found = choice.choice(sources or None, operations, bar)
    if write is not None:
        words = ("shadowcore designs", *sources, f"--write {write}")
        replace(write, choice.page(found, " ".join(words)).encode("utf-8"))
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        report.print_choice(found)


COMMANDS = (designs,)
