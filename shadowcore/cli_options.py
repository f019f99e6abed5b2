"""Options and types of arguments that several commands of `shadowcore` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from . import settings
from .config import DESIGNS, POOL_MAX
from .costs import PRESETS
from .errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


if TYPE_CHECKING:
    _Int: TypeAlias = click.ParamType[int]
    _Text: TypeAlias = click.ParamType[str]
    _Pair: TypeAlias = click.ParamType[tuple[str, Any]]
    _Values: TypeAlias = click.ParamType[tuple[str, tuple[Any, ...]]]
else:  # generic from click 8.4 on
    _Int = _Text = _Pair = _Values = click.ParamType


class Address(_Int):
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


class Name(_Text):
    """One of some names, which completion knows."""

    name = "name"

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names:
            self.fail(f"{value!r} is not one of {', '.join(self.names)}", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        item = click.shell_completion.CompletionItem
        return [item(name) for name in self.names if name.startswith(incomplete)]


class Source(_Text):
    """The name of a workload, or a file; checked where it is opened."""

    name = "workload"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from .workload import WORKLOADS

        item = click.shell_completion.CompletionItem
        names = [item(name) for name in WORKLOADS if name.startswith(incomplete)]
        return [*names, item(incomplete, type="file")]


class Assignment(_Pair):
    """NAME=VALUE."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name or not text:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name.strip().replace("-", "_"), settings.parse(text)


class Series(_Values):
    """NAME=VALUE,VALUE..."""

    name = "name=value,value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[Any, ...]]:
        if isinstance(value, tuple):
            return value
        name, _, text = str(value).partition("=")
        values = [part for part in text.split(",") if part.strip()]
        if not name or not values:
            self.fail(f"{value!r} is not NAME=VALUE,VALUE,...", param, ctx)
        parsed = tuple(dict.fromkeys(settings.parse(part) for part in values))
        return name.strip().replace("-", "_"), parsed


def together(sets: tuple[tuple[str, Any], ...], pool: int | None) -> dict[str, Any]:
    """What --set and --pool say; ConfigError where one is said twice."""
    found = {} if pool is None else {"pool": pool}
    for name, value in sets:
        if name in found:
            raise ConfigError(f"{name}: it is set twice")
        found[name] = value
    return found


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.  [default: text]")
RECORDING = click.argument("recording", required=False, metavar="[RECORDING]")
POOL = click.option(
    "--pool",
    type=click.IntRange(4, POOL_MAX),
    metavar="N",
    help="Shadow pages in the pool, 4096 bytes each; native has none.  [default: 256]",
)
SET = click.option(
    "--set",
    "sets",
    type=Assignment(),
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting: of shadow MMUs (pool, min_free, refill, flood_threshold, flood_reset; pages and stores), tlb "
    "(entries, or none), and of workloads: memory, their parameters (`shadowcore workloads NAME`), and those of the "
    "guest kernel (mode, pcid, isolation, ...). May be repeated.  [default: as each has it]",
)
OPERATIONS = click.option(
    "--operations",
    type=click.IntRange(1, 1 << 62),
    metavar="N",
    help="Operations of a workload's processor, or records of a recording.  [default: 1000000; all records]",
)
SEED = click.option(
    "--seed",
    type=click.IntRange(0, (1 << 64) - 1),
    default=0,
    metavar="N",
    help="Of everything random in a workload.  [default: 0]",
)
COSTS = click.option(
    "--costs",
    type=Name(tuple(PRESETS)),
    default="modern",
    metavar="NAME",
    help=f"Prices, in cycles, by which runs are costed: {', '.join(PRESETS)}.  [default: modern]",
)


def mmu(default: tuple[str, ...]) -> Callable[[Command], Command]:
    """The option --mmu, which may be repeated."""
    return click.option(
        "--mmu",
        "designs",
        type=Name(tuple(DESIGNS)),
        multiple=True,
        metavar="NAME",
        help=f"A design to run under: {', '.join(DESIGNS)}; may be repeated.  [default: {', '.join(default)}]",
    )
