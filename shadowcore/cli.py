"""The command `shadowcore`. Results on standard output; errors and progress on standard error.

Exit status: 0 done, 1 an audit found violations, 2 an error (one line says which), 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .cli_recording import COMMANDS
from .config import DESIGNS
from .errors import ShadowcoreError

if TYPE_CHECKING:
    from .trace import Recording, RecordingFile, ReplayResult

DEFAULT_DESIGNS = ("native", "flush", "cached")


class Commands(click.Group):
    """A group whose errors are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted", 130)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.Abort:
            _fail("interrupted", 130)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            _fail(error.format_message().rstrip(".") + hint, 2)
        except (ShadowcoreError, MemoryError) as error:
            _fail(str(error) or type(error).__name__, 2)
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    click.echo(f"shadowcore: {' '.join(message.split())}", err=True)
    sys.exit(status)


class Address(click.ParamType[int]):
    """A 64-bit number, as C writes it: 0x for hexadecimal, else decimal."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number such as 0x7f00 or 32512", param, ctx)
        if not 0 <= number < 1 << 64:
            self.fail(f"{value!r} is not within 64 bits", param, ctx)
        return number


class Design(click.ParamType[str]):
    """The name of a design."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in DESIGNS:
            self.fail(f"{value!r} is not one of {', '.join(DESIGNS)}", param, ctx)
        return str(value)


@click.group(cls=Commands, no_args_is_help=False, invoke_without_command=True)
@click.version_option(__version__, prog_name="shadowcore", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """What x86 memory virtualization costs: a shadow paging engine, run on recordings of real guests."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in COMMANDS:
    main.add_command(_command)

_RECORDING = click.argument("recording", required=False, metavar="[RECORDING]")
_POOL = click.option(
    "--pool",
    type=click.IntRange(4, 1 << 22),
    metavar="N",
    help="Shadow pages in the pool, 4096 bytes each; native has none.  [default: 256]",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.  [default: text]")


@main.command()
@_RECORDING
@click.option(
    "--mmu",
    "designs",
    type=Design(),
    multiple=True,
    metavar="NAME",
    help=f"A design to replay under: {', '.join(DESIGNS)}; may be repeated.  [default: {', '.join(DEFAULT_DESIGNS)}]",
)
@_POOL
@click.option(
    "--skip-boot",
    is_flag=True,
    help="Begin at the first user-mode access, with the guest's tables as they are there and a new "
    "shadow.  [default: begin at the first record]",
)
@_JSON
def compare(recording: str | None, designs: tuple[str, ...], pool: int | None, skip_boot: bool, as_json: bool) -> None:
    """Replay RECORDING under several designs and print one table of what each costs.

    RECORDING is a file of what a guest did; without it, the recording that comes with the package: a
    Linux 6.1 guest that boots and runs 60 shell pipelines.

    Ctrl-C ends the replay; designs that were done by then are printed.
    """
    from . import report, trace

    loaded = trace.open_recording(recording)
    start = (loaded.first_user or 0) if skip_boot else 0
    wanted = list(dict.fromkeys(designs or DEFAULT_DESIGNS))
    results = []
    try:
        for name in wanted:
            with report.progress(name) as progress:
                results.append(trace.replay(loaded, name, start=start, pool=pool, progress=progress))
    except KeyboardInterrupt:
        if results:
            _show(loaded, results, as_json)
        raise
    _show(loaded, results, as_json)


def _show(recording: Recording | RecordingFile, results: list[ReplayResult], as_json: bool) -> None:
    if as_json:
        designs = {result.design: result.as_dict() for result in results}
        plain = {"workload": recording.name, "operations": recording.operations, "designs": designs}
        click.echo(json.dumps(plain))
    else:
        from . import report

        report.print_comparison(recording, results)


@main.command()
@click.argument("image", metavar="IMAGE")
@click.argument("gva", metavar="VA", type=Address())
@click.option("--cr3", type=Address(), metavar="X", help="Root to walk from.  [default: CR3 of the image]")
@click.option("--write", is_flag=True, help="Walk for a write.  [default: for a read]")
@click.option("--fetch", is_flag=True, help="Walk for an instruction fetch.  [default: for a read]")
@click.option("--user", is_flag=True, help="Walk for a user-mode access.  [default: supervisor]")
@_JSON
def walk(image: str, gva: int, cr3: int | None, write: bool, fetch: bool, user: bool, as_json: bool) -> None:
    """Walk the page tables of IMAGE for the linear address VA and explain each level in words.

    IMAGE is an .npz dump of a guest's page tables and registers. Addresses are in bytes, hexadecimal with 0x.
    EFLAGS.AC is clear and PKRU is 0.
    """
    from . import explain

    if write and fetch:
        raise click.UsageError("--write and --fetch exclude each other")
    vm = explain.load_image(image).machine(cr3)
    explanation = explain.explain(vm, gva, "w" if write else "x" if fetch else "r", user)
    if as_json:
        click.echo(json.dumps(explanation.as_dict()))
    else:
        click.echo("\n".join(explanation.lines()))


@main.command()
@_RECORDING
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
    type=click.Choice(("pre-fault", "post-fault", "pre-write", "post-write", "post-cr3")),
    multiple=True,
    help="Audit at this point as well, each time (slow); may be repeated.  [default: none]",
)
@click.option(
    "--mmu",
    "design",
    type=Design(),
    default="cached",
    metavar="NAME",
    show_default=True,
    help=f"The design to replay under: {', '.join(DESIGNS)}.",
)
@_POOL
@_JSON
def audit(
    recording: str | None, every: int, points: tuple[str, ...], design: str, pool: int | None, as_json: bool
) -> None:
    """Replay RECORDING and check every invariant of the shadow structure now and then.

    RECORDING is a file of what a guest did; without it, the recording that comes with the package. The
    replay ends at the first audit that finds violations; they are printed, and the exit status is 1.
    """
    from . import report, trace

    loaded = trace.open_recording(recording)
    with report.progress(design) as progress:
        result = trace.replay(loaded, design, audit_every=every, audit_at=points, pool=pool, progress=progress)
    if as_json:
        found = {"workload": loaded.name, "operations": loaded.operations, "design": design, "every": every}
        click.echo(json.dumps(found | result.as_dict()))
    else:
        for record, violation in result.violations:
            click.echo(f"after record {record:,}: {violation}")
        count = f"{len(result.violations):,} violation(s)" if result.violations else "no violations"
        click.echo(f"{design} on {loaded.name}: {result.whole.records:,} records, {result.audits:,} audits, {count}")
    if result.violations:
        sys.exit(1)
