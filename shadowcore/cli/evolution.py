"""The command `evolution` of `shadowcore`: one mechanism over the years."""

from __future__ import annotations

import json

import click

from ..files import replace
from .options import JSON, Count, Output, apart, command


@command()
@click.option("--write", type=Output(), metavar="FILE", help="Write the page (Markdown) to FILE.  [default: no file]")
@click.option("--svg", type=Output(), metavar="FILE", help="Write its picture to FILE.  [default: no file]")
@click.option(
    "--operations",
    type=Count(1),
    default=200_000,
    show_default=True,
    metavar="N",
    help="Operations of each workload; the recording is replayed from end to end.",
)
@JSON
def evolution(write: str | None, svg: str | None, operations: int, as_json: bool) -> None:
    """Run every workload, and the recording of the package, under KVM's shadow MMU as releases of Linux had it, from
    January 2007 to 6.12, and print the VM exits of each.

    \b
    Example:
      shadowcore evolution --operations 50K --svg releases.svg
    """
    apart([("--write", write), ("--svg", svg)])
    from ..report import evolution as picture
    from ..report import terminal as report
    from ..studies import evolution as over
    from .progress import progress

    with progress("evolution", "sources") as bar:
        found = over.evolution(operations=operations, progress=bar)
    if write is not None:
        replace(write, over.page(found).encode("utf-8"))
    if svg is not None:
        replace(svg, picture.svg(found).encode("utf-8"))
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        report.print_evolution(found)


COMMANDS = (evolution,)
