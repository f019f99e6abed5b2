"""The command `audit` of `shadowcore`: a look at invariants."""

from __future__ import annotations

import json

import click

from ..config import DESIGNS
from ..engine.audit import POINTS
from ..errors import ConfigError
from .options import JSON, POOL, RECORDING, Name, command


@command()
@RECORDING
@click.option(
    "--every",
    type=click.IntRange(1),
    default=100_000,
    metavar="N",
    show_default=True,
    help="Records between two audits; there is one at the end besides.",
)
@click.option(
    "--at",
    "points",
    type=click.Choice(POINTS),
    multiple=True,
    help="Audit at this point as well, each time (slow); may be repeated.  [default: none]",
)
@click.option(
    "--mmu",
    "design",
    type=Name(tuple(DESIGNS)),
    default="cached",
    metavar="NAME",
    show_default=True,
    help=f"The design to replay under: {', '.join(DESIGNS)}.",
)
@POOL
@JSON
def audit(
    recording: str | None, every: int, points: tuple[str, ...], design: str, pool: int | None, as_json: bool
) -> None:
    """Replay RECORDING and check every invariant of the shadow structure now and then.

    RECORDING is a file of what a guest did; without it, the recording that comes with the package. The
    replay ends at the first audit that finds violations; they are printed, and the exit status is 1.
    """
    from ..recording import replay as trace
    from ..recording.format import INCOMPLETE
    from .progress import progress

    if pool is not None and design == "native":
        raise ConfigError("--pool: it is no setting of native; a design that has it is needed")
    loaded = trace.open_recording(recording)
    with progress(design, "records") as bar:
        result = trace.replay(loaded, design, audit_every=every, audit_at=points, pool=pool, progress=bar)
    if as_json:
        found = {"workload": loaded.name, "operations": loaded.operations, "design": design, "every": every}
        found["recording_complete"] = loaded.complete
        click.echo(json.dumps(found | result.as_dict()))
    else:
        for record, violation in result.violations:
            click.echo(f"after record {record:,}: {violation}")
        count = f"{len(result.violations):,} violation(s)" if result.violations else "no violations"
        click.echo(f"{design} on {loaded.name}: {result.whole.records:,} records, {result.audits:,} audits, {count}")
        if not loaded.complete:
            click.echo(f"{INCOMPLETE}.")
    if result.violations:
        click.get_current_context().exit(1)


COMMANDS = (audit,)
