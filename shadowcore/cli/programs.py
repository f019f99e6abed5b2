"""The command about recorded programs."""

from __future__ import annotations

import json

import click

from ..config import DEFAULT_DESIGNS, DESIGNS
from ..guest.options import MODES
from .options import command


@command()
@click.argument("recordings", nargs=-1, required=True, metavar="RECORDING...")
@click.option(
    "--mmu",
    "designs",
    multiple=True,
    type=click.Choice(sorted(DESIGNS)),
    help=f"Design; may be given several times.  [default: {', '.join(DEFAULT_DESIGNS)}]",
)
@click.option("--mode", type=click.Choice(MODES), default="64", show_default=True, help="Paging mode of the guest.")
@click.option("--memory", metavar="SIZE", help="RAM of the guest, as 64MiB.  [default: enough]")
@click.option(
    "--turn",
    type=click.IntRange(1),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Accesses that a process makes before the next, where the recordings do not say who ran when.",
)
@click.option("--operations", type=click.IntRange(0), metavar="N", help="Accesses to make.  [default: all]")
@click.option("--fold", is_flag=True, help="Pack addresses that the mode lacks below its end.  [default: error]")
@click.option("--isolation", is_flag=True, help="Page-table isolation.  [default: off]")
@click.option("--pcid", is_flag=True, help="PCIDs.  [default: off]")
@click.option("--audit-every", type=click.IntRange(0), default=0, metavar="N", help="Accesses.  [default: 0: never]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.  [default: text]")
def programs(
    recordings: tuple[str, ...],
    designs: tuple[str, ...],
    mode: str,
    memory: str | None,
    turn: int,
    operations: int | None,
    fold: bool,
    isolation: bool,
    pcid: bool,
    audit_every: int,
    as_json: bool,
) -> None:
    """Run recorded programs on the guest kernel, under each design, and compare what they cost.

    RECORDING is a program recording, as `shadowcore record` and `import` make it; several run side by side.
    """
    from .. import programs as runs
    from ..guest.options import KernelOptions

    results = runs.compare(
        recordings,
        designs or DEFAULT_DESIGNS,
        turn=turn,
        memory=memory,
        operations=operations,
        options=KernelOptions(mode=mode, isolation=isolation, pcid=pcid),
        fold=fold,
        audit_every=audit_every,
    )
    click.echo(json.dumps([result.as_dict() for result in results]) if as_json else runs.table(results))


COMMANDS = (programs,)
