"""The commands `workloads` and `calibration` of `shadowcore`."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap

import click
from click.core import ParameterSource

from .options import JSON, Count, command


@command()
@click.argument("name", required=False, metavar="[NAME]")
@JSON
def workloads(name: str | None, as_json: bool) -> None:
    """List the workloads, or, with NAME, the parameters of one.

    \b
    Example:
      shadowcore workloads hackbench
    """
    from ..workload import WORKLOADS, find

    chosen = [find(name)] if name else list(WORKLOADS.values())
    if as_json:
        plain = {
            w.name: {
                "summary": w.summary,
                "memory": w.memory,
                "parameters": {
                    key: {"default": p.default, "low": p.low, "high": p.high, "help": p.help}
                    for key, p in w.parameters.items()
                },
            }
            for w in chosen
        }
        click.echo(json.dumps(plain))
        return
    if name:
        click.echo(f"{chosen[0].name}: {chosen[0].summary}. Memory: {chosen[0].memory}.")
        width = max(map(len, chosen[0].parameters), default=0)
        for key, p in chosen[0].parameters.items():
            click.echo(f"  {key:{width}}  {p.help}; {p.low} to {p.high}  [default: {p.default}]")
        return
    width = max(len(w.name) for w in chosen) + 2
    columns = shutil.get_terminal_size((1 << 12, 0)).columns if sys.stdout.isatty() else 1 << 12
    for w in chosen:
        click.echo(textwrap.fill(f"{w.name:{width}}{w.summary}", max(columns, 40), subsequent_indent=" " * width))


@command()
@click.argument("recordings", nargs=-1, metavar="[RECORDING]...")
@click.option(
    "--spaces",
    type=Count(1, 1 << 20),
    default=120,
    show_default=True,
    metavar="N",
    help="Address spaces that the model makes, at most.",
)
@click.option("--seed", type=Count(0), default=1, show_default=True, metavar="N", help="Of the model.")
@click.option(
    "--live",
    is_flag=True,
    help="Beside counters that KVM 6.1 and 6.12 had under a live guest, by pipeline; so it is without a RECORDING.  "
    "[default: off]",
)
@JSON
def calibration(recordings: tuple[str, ...], spaces: int, seed: int, live: bool, as_json: bool) -> None:
    """Print rates of Linux guests beside those of the guest kernel.

    RECORDING is of a guest that forks and execs. Counted are page table stores, faults, CR3 loads and INVLPGs for each
    address space made, and for each million instructions. Without one: what Linux's own shadow MMU, of 6.1 and of
    6.12, counted under a live guest, and what it counts here.

    \b
    Example:
      shadowcore calibration guest.screc
    """
    if live or not recordings:
        if click.get_current_context().get_parameter_source("spaces") is not ParameterSource.DEFAULT:
            raise click.UsageError("--spaces: without a RECORDING, pipelines are counted")
        _live(recordings, seed, as_json)
        return
    from .. import workload
    from ..recording.format import INCOMPLETE

    rows = workload.calibration(recordings, spaces, seed)
    if as_json:
        fields = ("recording", "rate", "per", "linux", "model", "recording_complete")
        plain = [dict(zip(fields, row, strict=True)) for row in rows]
        click.echo(json.dumps(plain))
        return
    click.echo(f"{'':64}{'Linux':>10}{'model':>10}{'ratio':>8}")
    head = ""
    for row in rows:
        title = f"{row.recording}, per {row.per}"
        if title != head:
            click.echo(title)
            if not row.recording_complete:
                click.echo(f"{INCOMPLETE}.")
            head = title
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        click.echo(f"  {row.rate:62}{row.linux:10.2f}{row.model:10.2f}{ratio:>8}")


def _live(recordings: tuple[str, ...], seed: int, as_json: bool) -> None:
    """The comparison with a live guest."""
    from ..workload import live

    if recordings:
        raise click.UsageError("--live: a live guest is no recording")
    found = {release: live.rows(release, seed=seed) for release in live.MEASURED}
    if as_json:
        click.echo(json.dumps({release: [row._asdict() for row in rows] for release, rows in found.items()}))
        return
    click.echo(f"{'':64}{'Linux':>10}{'model':>10}{'ratio':>8}")
    for release, rows in found.items():
        click.echo(f"live guest under Linux {release}, per pipeline")
        for row in rows:
            told = f"{row.ratio:.2f}" if row.linux > 0.5 else ""
            click.echo(f"  {row.counter + ': ' + row.what:62}{row.linux:10.2f}{row.model:10.2f}{told:>8}")


COMMANDS = (workloads, calibration)
"""What the group of commands adds."""
