"""The commands `sweep` and `collect` of `shadowcore`: many studies at once, and what they came to."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from ..errors import ConfigError
from .options import JSON, Output, apart, command
from .outputs import to_file, writable, writer

if TYPE_CHECKING:
    from ..studies.collect import Sweep

    _Pair: TypeAlias = click.ParamType[tuple[int, int]]
else:
    _Pair = click.ParamType


class Shard(_Pair):
    """I/N."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        number, _, count = str(value).partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(f"{value!r} is not I/N, such as 1/4, with I from 1 to N", param, ctx)
        return int(number), int(count)


_WRITTEN = (
    click.option(
        "--csv", "csv_file", type=Output(), metavar="FILE", help="Write one row a point to FILE.  [default: no file]"
    ),
    click.option("--parquet", type=Output(), metavar="FILE", help="The same in Parquet.  [default: no file]"),
    click.option("--html", type=Output(), metavar="FILE", help="Write figures, one page, to FILE.  [default: no file]"),
    JSON,
)


def _written(function: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(_WRITTEN):
        function = decorate(function)
    return function


@command()
@click.argument("spec", type=click.Path(dir_okay=False), metavar="SPEC")
@click.option(
    "--store",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="The folder in which each result is kept as soon as it is there.  [default: SPEC's name, with .results]",
)
@click.option("--resume", is_flag=True, help="Go on with the sweep that is in the folder.  [default: refuse it]")
@click.option("--retry", is_flag=True, help="With --resume: run again what failed.  [default: leave it]")
@click.option(
    "--jobs",
    "-j",
    type=click.IntRange(1, 1 << 16),
    metavar="N",
    help="Processes; of an executor, tasks at a time.  [default: one for each processor]",
)
@click.option("--shard", type=Shard(), metavar="I/N", help="Run the I-th of N shares alone.  [default: all]")
@click.option(
    "--executor",
    metavar="NAME[:WHERE]",
    help="Run on dask, dask:ADDRESS, mpi, or slurm:NAME=VALUE,... (parameters of submitit; cluster=local is this "
    "machine).  [default: processes]",
)
@click.option(
    "--together",
    type=click.IntRange(1),
    metavar="N",
    help="Runs in a task.  [default: as many as last a while]",
)
@click.option("--dry-run", is_flag=True, help="Check SPEC, say how many runs it takes, and end.  [default: run them]")
@_written
def sweep(
    spec: str,
    store: str | None,
    resume: bool,
    retry: bool,
    jobs: int | None,
    shard: tuple[int, int] | None,
    executor: str | None,
    together: int | None,
    dry_run: bool,
    csv_file: str | None,
    parquet: str | None,
    html: str | None,
    as_json: bool,
) -> None:
    """Run every point of SPEC, a file in TOML, and print a table of what each came to.

    \b
    sources = ["shell", "linux.screc"]     # workloads and recordings
    designs = ["native", "cached", "unsync"]
    seed = "1..5"
    operations = 200000
    [settings]
    pool = "64..4096 x4"

    A point that fails is a result with its error, and the others go on; the exit status is then 1. Ctrl-C lets end what
    is running; a second one drops it. What is done stays in the folder.

    \b
    Example:
      shadowcore sweep pool.toml --jobs 8 --html pool.html
    """
    from ..studies.executors import named
    from ..studies.plan import planned, read_spec
    from ..studies.sweep import SweepInterrupted
    from ..studies.sweep import sweep as run
    from .progress import counted

    outputs = _outputs(csv_file, parquet, html)
    asked = read_spec(spec)
    if retry and not resume:
        raise ConfigError("--retry: it is for a sweep that goes on: --resume")
    if dry_run:
        plan = planned(asked)
        found = {"name": plan.name, "points": len(plan.points), "runs": len(plan.runs), "axes": list(plan.axes)}
        click.echo(json.dumps(found) if as_json else _planned(found))
        return
    folder = store or f"{Path(spec).stem}.results"
    interrupted = False
    with ExitStack() as stack:
        on = None if executor is None else stack.enter_context(named(executor, folder))
        bar = stack.enter_context(counted("runs"))
        try:
            made = run(
                asked,
                store=folder,
                resume=resume,
                retry=retry,
                jobs=jobs,
                executor=on,
                shard=shard,
                together=together,
                progress=bar,
            )
        except SweepInterrupted as stop:
            made, interrupted = stop.sweep, True
    _show(made, as_json, f"Results are in {folder}.")
    _write(made, outputs)
    if interrupted:
        raise KeyboardInterrupt
    if made.counts()["failed"]:
        click.get_current_context().exit(1)


@command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(file_okay=False))
@_written
def collect(
    folders: tuple[str, ...], csv_file: str | None, parquet: str | None, html: str | None, as_json: bool
) -> None:
    """Make one table of the results of a sweep, which are in DIR, or its shares in several.

    Points that were not run, or failed, are rows as well, with their status and error. With no other output the table
    is printed.

    \b
    Example:
      shadowcore collect pool.results --parquet pool.parquet
    """
    from ..studies.collect import collect as read

    outputs = _outputs(csv_file, parquet, html)
    made = read(*folders)
    if as_json or not outputs:
        _show(made, as_json)
    else:
        click.echo(_summary(made))
    _write(made, outputs)


def _outputs(csv_file: str | None, parquet: str | None, html: str | None) -> list[tuple[str, Callable[..., Any]]]:
    """(file, what writes it), all checked before anything is run."""
    named = (("--csv", csv_file), ("--parquet", parquet), ("--html", html))
    apart(named)
    for _, file in named:
        if file is not None:
            writable(file)
    found: list[tuple[str, Callable[..., Any]]] = []
    if csv_file is not None:
        found.append((csv_file, lambda made, path: made.to_csv(path)))
    if parquet is not None:
        from ..columns import pyarrow

        pyarrow()
        found.append((parquet, lambda made, path: made.to_parquet(path)))
    if html is not None:
        found.append((html, writer("--html", "sweep")))
    return found


def _write(made: Sweep, outputs: list[tuple[str, Callable[..., Any]]]) -> None:
    for file, write in outputs:
        to_file(file, partial(write, made))


def _show(made: Sweep, as_json: bool, more: str = "") -> None:
    from ..report import terminal as report

    if as_json:
        click.echo(json.dumps(made.as_dict()))
        return
    report.print_points(made)
    click.echo(" ".join(filter(None, (_summary(made), more))))


def _summary(made: Sweep) -> str:
    counted = made.counts()
    text = f"{made.name}: {sum(counted.values()):,} points: {counted['done']:,} done"
    text += "".join(f", {counted[state]:,} {state}" for state in ("failed", "missing") if counted[state])
    if made.there:
        text += f"; {made.there:,} runs were there before"
    if made.seconds:
        text += f"; {made.seconds:,.1f} s"
    text += "."
    for row in made.errors()[:3]:
        where = ", ".join(
            f"{name}={row[name]}" for name in dict.fromkeys(("design", *made.axes)) if row[name] is not None
        )
        text += f"\nFailed: {where}: {row['error']}"
    if made.damaged:
        text += f"\n{made.damaged:,} results are cut short or changed, and count as missing; --resume makes them anew."
    return text


def _planned(found: dict[str, Any]) -> str:
    axes = ", ".join(found["axes"]) or "nothing"
    return f"{found['name']}: {found['points']:,} points over {axes}; {found['runs']:,} runs."


COMMANDS = (sweep, collect)
