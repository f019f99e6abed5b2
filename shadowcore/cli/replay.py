"""The command `audit` of `shadowcore`: a look at invariants."""

from __future__ import annotations

import json
from typing import Any

import click

from ..config import DESIGNS
from ..engine.audits import POINTS
from .options import JSON, OPERATIONS, POOL, SEED, SET, SOURCES, Count, Name, command, together


@command()
@SOURCES
@click.option(
    "--mmu",
    "design",
    type=Name(tuple(DESIGNS)),
    default="cached",
    metavar="NAME",
    show_default=True,
    help=f"The design to run under: {', '.join(DESIGNS)}.",
)
@POOL
@SET
@OPERATIONS
@SEED
@click.option(
    "--every",
    type=Count(1),
    default=100_000,
    metavar="N",
    show_default=True,
    help="Operations (records) between two audits; there is one at the end besides.",
)
@click.option(
    "--at",
    "points",
    type=click.Choice(POINTS),
    multiple=True,
    help="Audit at this point as well, each time (slow); may be repeated.  [default: none]",
)
@JSON
def audit(
    sources: tuple[str, ...],
    every: int,
    points: tuple[str, ...],
    design: str,
    pool: int | None,
    sets: tuple[tuple[str, Any], ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Run a workload or a recording and check every invariant of the shadow structure on the way.

    WORKLOAD and RECORDING are as for `shadowcore compare`; without either, the recording that comes with the package.
    It ends at the first audit that finds violations; they are printed, and the exit status is 1.

    \b
    Example:
      shadowcore audit fork-storm --every 10K --mmu unsync
    """
    from ..recording.format import INCOMPLETE
    from ..studies.source import find
    from ..studies.study import audit as audited
    from .progress import progress

    opened = find(list(sources) or None)
    settings = together(sets, pool)
    found = audited(
        opened,
        design,
        every=every,
        at=points,
        settings=settings,
        progress=lambda design: progress(design, opened.unit),
        **options,
    )
    one = opened.unit.removesuffix("es" if opened.unit == "accesses" else "s")
    if as_json:
        violations = [{"record": at, "violation": str(what)} for at, what in found.violations]
        plain = (found.outcome or {}) | {"workload": found.source, "operations": found.total, "design": design}
        plain |= {"recording_complete": found.recording_complete, "every": every, "records": found.operations}
        click.echo(json.dumps(plain | {"audits": found.audits, "violations": violations}))
    else:
        for at, violation in found.violations:
            click.echo(f"after {one} {at:,}: {violation}")
        count = f"{len(found.violations):,} violation(s)" if found.violations else "no violations"
        done = f"{found.operations:,} {opened.unit}"
        click.echo(f"{design} on {found.source}: {done}, {found.audits:,} audits, {count}")
        if not found.recording_complete:
            click.echo(f"{INCOMPLETE}.")
    if found.violations:
        click.get_current_context().exit(1)


COMMANDS = (audit,)
