"""The command `reproduce` of `shadowcore`: figures that others published, predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError
from ..files import replace
from .options import JSON, Nearest, Output, apart, command

if TYPE_CHECKING:
    from ..studies.validity import Validity

_FIRST = "molnar-2007"
_SOURCES = (_FIRST, "pvm-2023", "shadowbox-2026", "all")


@command()
@click.option(
    "--source",
    type=Nearest("source", _SOURCES),
    default=_FIRST,
    metavar="NAME",
    help="molnar-2007: KVM with and without cached shadow page tables. pvm-2023: EPT, shadow tables and PVM, on "
    "hardware and in a VM. shadowbox-2026: PVM in Linux 7.3, counts and times. all: the last two, in one page.  "
    "[default: molnar-2007]",
)
@click.option(
    "--write",
    type=Output(),
    metavar="FILE",
    help="Write the page (Markdown) to FILE; of other sources than the first with its picture beside it (.svg).  "
    "[default: no file]",
)
@click.option("--check", metavar="FILE", help="Is the page in FILE current? Exit status 2 if not.  [default: no file]")
@JSON
def reproduce(source: str, write: str | None, check: str | None, as_json: bool) -> None:
    """Predict figures that others have measured on real hypervisors, and compare.

    A few figures of each source calibrate prices, the others are predicted from counts; what misses by more than 20
    percent is told why. docs/reproduction.md and docs/validity.md are such pages.

    \b
    Example:
      shadowcore reproduce --source pvm-2023
    """
    apart([("--check", check)], [write])
    if source == _FIRST:
        _of_2007(write, check, as_json)
        return
    from ..report import validity as report
    from ..studies.validity import SOURCES, validity
    from .progress import progress

    found = []
    for name in SOURCES if source == "all" else (source,):
        with progress(f"reproduce {name}", "runs") as bar:
            found.append(validity(name, bar))
    made = f"shadowcore reproduce --source {source} --write"
    if write is not None:
        image = Path(write).with_suffix(".svg")
        if image == Path(write):
            raise ConfigError(f"--write: {write}: its picture would have the same name; a page (.md) is needed")
        drawn = report.picture(found)
        _write(write, report.page(found, image.name, f"{made} {write}"))
        _write(str(image), drawn)
    if check is not None:
        _check(check, report.page(found, Path(check).with_suffix(".svg").name, f"{made} {check}"), f"{made} {check}")
    _show(found, as_json)


def _show(found: list[Validity], as_json: bool) -> None:
    if as_json:
        plain = [one.as_dict() for one in found]
        click.echo(json.dumps(plain[0] if len(plain) == 1 else plain))
        return
    from ..report import terminal

    for one in found:
        terminal.print_validity(one)


def _of_2007(write: str | None, check: str | None, as_json: bool) -> None:
    from ..studies import reproduction
    from .progress import progress

    with progress("reproduce", "steps") as bar:
        found = reproduction.reproduce(bar)
    text = reproduction.page(found)
    if write is not None:
        _write(write, text)
    if check is not None:
        _check(check, text, f"shadowcore reproduce --write {check}")
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    from ..report import terminal as report

    report.print_reproduction(found)


def _write(file: str, text: str) -> None:
    try:
        replace(file, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None


def _check(file: str, text: str, made: str) -> None:
    try:
        found = Path(file).read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: it is not a text in UTF-8") from None
    if found != text:
        raise ConfigError(f"{file}: it is not what `{made}` makes today")


COMMANDS = (reproduce,)
