"""The command `diff` of `shadowcore`: what changed between two saved studies."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from .options import JSON, command

if TYPE_CHECKING:
    _Float: TypeAlias = click.ParamType[float]
else:
    _Float = click.ParamType


class Share(_Float):
    """A percentage, or a share: 5% or 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1
        if not 0 <= share < math.inf:
            self.fail(f"{value!r} is not a percentage such as 5%, or a share such as 0.05", param, ctx)
        return share


@command()
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@click.option(
    "--fail-over",
    type=Share(),
    metavar="SHARE",
    help="End with status 1 if a figure grew by more than this, such as 5%, if the guest did something else, or a case "
    "of A is not in B.  [default: end with 0]",
)
@click.option(
    "--figure",
    "figures",
    multiple=True,
    metavar="NAME",
    help="Judge this figure; may be repeated.  [default: exits_total, cycles, slow_down]",
)
@JSON
def diff(first: str, second: str, fail_over: float | None, figures: tuple[str, ...], as_json: bool) -> None:
    """Print what changed from study A to study B.

    A and B are files of what `compare`, `sweep` or `collect` printed with --json, or folders of results. Times are left
    out: equal studies are equal to the last digit.

    \b
    Example:
      shadowcore diff last-month.json today.json --fail-over 5%
    """
    from ..report import terminal as report
    from ..studies.difference import GATED, check_figures, difference

    found = difference(first, second)
    check_figures(figures, found, first, second)
    too_much = () if fail_over is None else found.over(fail_over, figures or GATED)
    failed = bool(too_much) or (fail_over is not None and bool(found.first_only))
    if as_json:
        named = [{"case": change.case, "figure": change.figure} for change in too_much]
        click.echo(json.dumps(found.as_dict() | {"fail_over": fail_over, "over": named, "failed": failed}))
    else:
        report.print_difference(found, too_much)
    if failed:
        click.get_current_context().exit(1)


COMMANDS = (diff,)
