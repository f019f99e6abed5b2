"""The command `costs` of `shadowcore`: prices with their sources, and what lies below a guest."""

from __future__ import annotations

import json

import click

from .options import JSON, command


@command()
@click.argument("name", required=False, metavar="[NAME]")
@JSON
def costs(name: str | None, as_json: bool) -> None:
    """List the prices there are (`--costs NAME`), or, with NAME, each price of one with its source.

    A list is a source, a year and a processor; `modern`, `pvm`, `nested` are names of the best of their kind. Below the
    list are the levels that `--set levels=NAME` knows: what an exit takes where hypervisors lie one on the other.

    \b
    Examples:
      shadowcore costs
      shadowcore costs pvm
    """
    from ..engine.costs import Costs
    from ..engine.levels import LEVELS
    from ..engine.presets import ALIASES, PRESETS, find_preset

    if as_json:
        chosen = [find_preset(name).name] if name else list(PRESETS)
        plain = {one: {"machine": PRESETS[one].machine} | Costs.preset(one).as_dict() for one in chosen}
        click.echo(json.dumps(plain if name else {"costs": plain, "aliases": ALIASES}))
        return
    from ..report import terminal as report

    if name:
        report.print_prices(find_preset(name), Costs.preset(name))
    else:
        report.print_price_lists(PRESETS, ALIASES, LEVELS)


COMMANDS = (costs,)
