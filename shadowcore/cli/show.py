"""The command `show` of `shadowcore`: a page to look inside a run, step by step."""

from __future__ import annotations

import json
import shlex
from typing import Any

import click

from ..config import DESIGNS
from ..errors import ConfigError
from .options import JSON, POOL, SEED, Count, Name, Output, Source, apart, command
from .outputs import writable
from .progress import progress


@command()
@click.argument("source", required=False, type=Source(), metavar="[SCENARIO|WORKLOAD|RECORDING]")
@click.option(
    "--mmu",
    "designs",
    type=Name(tuple(DESIGNS)),
    multiple=True,
    metavar="NAME",
    help=f"A design to show: {', '.join(DESIGNS)}; may be repeated.  [default: the scenario's; else cached, unsync]",
)
@POOL
@SEED
@click.option(
    "--start",
    type=Count(0),
    metavar="N",
    help="Operation, or record, to begin at.  [default: the first after a workload's setup, or of user code]",
)
@click.option(
    "--steps",
    "limit",
    type=Count(1, 5000),
    default=300,
    show_default=True,
    metavar="N",
    help="Steps to show, at most.",
)
@click.option("--exits", "exits_only", is_flag=True, help="Show only operations that exit.  [default: all]")
@click.option("--exercise", is_flag=True, help="Begin with the answers hidden.  [default: shown]")
@click.option(
    "--html", type=Output(), metavar="FILE", help="Write a page that steps through the run to FILE.  [default: no file]"
)
@JSON
def show(
    source: str | None,
    html: str | None,
    designs: tuple[str, ...],
    limit: int,
    exercise: bool,
    as_json: bool,
    seed: int | None,
    **options: Any,
) -> None:
    """Step through a run: guest tables, shadow tables, reverse map and TLB, and why each thing happens.

    Without an argument the scenarios are listed: small guests that show one thing each. A workload (`shadowcore
    workloads`) and a recording of a guest or of operations can be stepped through as well. Without --html the steps are
    printed.

    \b
    Example:
      shadowcore show demand-paging --html steps.html
    """
    from ..studies.scenarios import SCENARIOS

    if source is None:
        _list(as_json)
        return
    from ..report import steps as pages
    from ..studies import stepped

    apart([("--html", html)], [source])
    if exercise and html is None:
        raise ConfigError("--exercise: it is of the page; --html FILE is needed with it")
    if html is not None:
        writable(html)
    runs = []
    for name in designs or stepped.designs_of(source):
        with progress(name, "steps") as bar:
            runs.append(stepped.show(source, name, limit=limit, seed=seed or 0, progress=bar, **options))
    if html is not None:
        scenario = SCENARIOS.get(source)
        title, about = (scenario.title, scenario.about) if scenario else (source, "")
        words = _words(source, html, designs, limit, exercise, seed, options)
        pages.write(html, pages.page(runs, title, about, shlex.join(words), exercise))
    if as_json:
        click.echo(json.dumps([run.as_dict() for run in runs]))
        return
    if html is not None:
        click.echo(f"{html}: {sum(len(run.steps) for run in runs):,} steps, under {', '.join(r.design for r in runs)}")
        return
    for run in runs:
        click.echo("\n".join(_lines(run)))


def _list(as_json: bool) -> None:
    from ..studies.scenarios import SCENARIOS

    if as_json:
        plain = {s.name: {"title": s.title, "about": s.about, "designs": s.designs} for s in SCENARIOS.values()}
        click.echo(json.dumps(plain))
        return
    width = max(map(len, SCENARIOS))
    for scenario in SCENARIOS.values():
        click.echo(f"{scenario.name:{width}}  {scenario.title}")


def _words(
    source: str,
    html: str,
    designs: tuple[str, ...],
    limit: int,
    exercise: bool,
    seed: int | None,
    options: dict[str, Any],
) -> list[str]:
    """The command that makes the page again."""
    words = ["shadowcore", "show", source, "--html", html]
    for name in designs:
        words += ["--mmu", name]
    numbers = {"--start": options["start"], "--pool": options["pool"], "--seed": seed, "--steps": limit}
    for option, number in numbers.items():
        words += [] if number is None or (option, number) == ("--steps", 300) else [option, str(number)]
    return [*words, *["--exits"] * options["exits_only"], *["--exercise"] * exercise]


def _lines(run: Any) -> list[str]:
    """A run as text."""
    exits = sum(len(step.exits) for step in run.steps)
    lines = [f"{run.design}: {len(run.steps):,} steps, {exits:,} VM exits"]
    for number, step in enumerate(run.steps, run.first):
        lines += ["", f"{number:,}  {step.title}"]
        lines += [f"    ({step.note})"] if step.note else []
        lines += [f"    {sentence}" for sentence in step.happened]
    return [*lines, ""]


COMMANDS = (show,)
"""What the group of commands adds."""
