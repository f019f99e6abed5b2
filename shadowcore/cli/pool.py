"""The command `pool` of `shadowcore`: how many shadow pages a guest needs."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from ..errors import ConfigError
from .options import JSON, OPERATIONS, SEED, SET, Output, Source, apart, command, mmu, together


@command()
@click.argument("source", required=False, metavar="[WORKLOAD|RECORDING]", type=Source())
@mmu(("cached",))
@click.option(
    "--sizes",
    metavar="N,N,...",
    help="Pools of the curve, in shadow pages.  [default: powers of 2 from 16 to 8192, as far as the guest uses more]",
)
@SET
@OPERATIONS
@SEED
@click.option("--csv", "csv_file", type=Output(), metavar="FILE", help="Write the curve to FILE.  [default: no file]")
@click.option("--svg", "svg_file", type=Output(), metavar="FILE", help="Draw the curve to FILE.  [default: no file]")
@JSON
def pool(
    source: str | None,
    designs: tuple[str, ...],
    sizes: str | None,
    sets: tuple[tuple[str, Any], ...],
    csv_file: str | None,
    svg_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say how many shadow pages a guest needs: exits over sizes of the pool, where the curve bends, and the smallest
    pools that take 5 % and 1 % more exits than an endless one.

    WORKLOAD is a name (`shadowcore workloads` lists them), RECORDING a file of what a guest did; without either, the
    recording that comes with the package. Each size is a run of its own. The column `lru` comes of one run alone, by
    the distances at which shadow pages are used again: pages that a policy would miss which sees every use.

    \b
    Example:
      shadowcore pool demand --operations 20000
    """
    from ..report import terminal
    from ..studies.pools import pool_study
    from ..studies.source import find

    if len(set(designs)) > 1:
        raise ConfigError("--mmu: it is given twice, one is allowed")
    try:
        wanted = None if sizes is None else [int(size) for size in sizes.split(",")]
    except ValueError:
        raise ConfigError(f"--sizes: {sizes!r} is not numbers with commas between them") from None
    opened = find(source)
    outputs = (("--csv", csv_file), ("--svg", svg_file))
    apart(outputs, opened.files)
    if svg_file is not None:
        _drawing()

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{what:<20}", nl=False, err=True)

    options = {name: value for name, value in options.items() if value is not None}
    found = pool_study(
        opened,
        designs[0] if designs else "cached",
        sizes=wanted,
        settings=together(sets, None),
        progress=tell,
        **options,
    )
    tell("")
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        terminal.print_pools(found)
    if csv_file is not None:
        from ..studies.results import write_csv

        _to_file(csv_file, lambda file: write_csv(file, found.as_dict()["points"]))
    if svg_file is not None:
        from ..report.curves import draw_pools

        _to_file(svg_file, lambda file: draw_pools(found, file))


def _drawing() -> None:
    """Said before the work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--svg: it needs the package 'matplotlib': pip install matplotlib") from None


def _to_file(file: str, write: Any) -> None:
    try:
        write(file)
    except OSError as error:
        raise ConfigError(f"{file}: it cannot be written: {error.strerror or error}") from None


COMMANDS = (pool,)
