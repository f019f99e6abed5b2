"""Options and types of arguments that several commands of `shadowcore` share."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click
from click.shell_completion import CompletionItem

from ..config import DESIGNS, POOL_MAX, parse_count
from ..errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


if TYPE_CHECKING:
    _Int: TypeAlias = click.ParamType[int]
    _Text: TypeAlias = click.ParamType[str]
    _Pair: TypeAlias = click.ParamType[tuple[str, Any]]
    _Values: TypeAlias = click.ParamType[tuple[str, tuple[Any, ...]]]
else:  # generic from click 8.4 on
    _Int = _Text = _Pair = _Values = click.ParamType


class Command_(click.Command):
    """A command whose options of one value are given once: the last of several would win over the others unsaid."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return ["-h", "--help"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            single = [p for p in order if isinstance(p, click.Option) and not (p.multiple or p.is_flag or p.count)]
            for number, option in enumerate(single):
                if option in single[:number]:
                    raise click.UsageError(f"{option.opts[0]}: it is given twice, one is allowed", ctx)
        return super().parse_args(ctx, args)


command = partial(click.command, cls=Command_)
"""Makes a command of `shadowcore`."""


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


class Count(_Int):
    """How many, within a range: 4096, 1e6, 16M. K, M, G and T are thousands, as of operations and pages."""

    name = "count"

    def __init__(self, low: int, high: int = 1 << 62) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = value if isinstance(value, int) else parse_count(str(value))
        if number is None:
            self.fail(f"{value!r} is not a count such as 4096, 1e6 or 16M", param, ctx)
        if not self.low <= number <= self.high:
            limit = f"at least {self.low:,}" if number < self.low else f"at most {self.high:,}"
            self.fail(f"{number:,} is not {limit}", param, ctx)
        return number


class Name(_Text):
    """One of some names, which completion knows."""

    name = "name"

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names:
            near = difflib.get_close_matches(str(value), self.names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.fail(f"{value!r} is not one of {', '.join(self.names)}{hint}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


class Nearest(Name):
    """The same, where the nearest is told for a name that there is not. what: it is."""

    def __init__(self, what: str, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.names:
            near = difflib.get_close_matches(str(value), self.names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(self.names)}"
            raise ConfigError(f"{self.what}: there is no {value!r}{hint}")
        return str(value)


class Prices(Name):
    """The name of a list of prices; the nearest is told for one that there is not."""

    def __init__(self) -> None:
        """The names are looked up where they are asked for, not each time that a command prints its help."""

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        from ..engine.presets import ALIASES, PRESETS

        return (*ALIASES, *PRESETS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..engine.presets import find_preset

        find_preset(value)
        return str(value)


class Source(_Text):
    """The name of a workload, or a file; checked where it is opened."""

    name = "workload"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from ..workload import WORKLOADS

        names = [CompletionItem(name) for name in WORKLOADS if name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="file")]


class WarmUp(_Text):
    """A count, or the name of a phase, which is known where the recording is."""

    name = "count or phase"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value[:1].isdigit():
            return Count(0).convert(value, param, ctx)
        return value


class Output(_Text):
    """A file that is written. "-" is none: standard output has what the command prints."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in ("", "-"):
            self.fail(f"{value!r} is not the name of a file; what is printed goes to standard output", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def apart(written: Iterable[tuple[str, str | None]], read: Iterable[str | None] = ()) -> None:
    """ConfigError where two outputs, (option, file) each, are one file, or where one is a file that is read."""
    known = [("what is read", file) for file in read if file is not None]
    for option, file in written:
        if file is None:
            continue
        for other, name in known:
            if _same(file, name):
                raise ConfigError(f"{option}: another file than {file} is needed, which is that of {other}")
        known.append((option, file))


def _same(one: str, other: str) -> bool:
    if any(os.path.exists(name) and not Path(name).is_file() for name in (one, other)):
        return False  # a device or a pipe takes what it gets
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _settings(ctx: click.Context, incomplete: str, more: Iterable[str] = ()) -> list[CompletionItem]:
    """Names of settings, and values of one whose name is there, as far as they are names. more: beside settings."""
    from ..studies import settings
    from ..workload import WORKLOADS

    name, equals, start = incomplete.partition("=")
    known = WORKLOADS[source] if (source := (*(ctx.params.get("sources") or ctx.args), "")[0]) in WORKLOADS else None
    if not equals:
        names = dict.fromkeys((*(known.parameters if known else ()), *settings.DESIGN, *settings.MACHINE))
        names |= dict.fromkeys((*settings.GUEST, *more))
        return [CompletionItem(f"{each}=") for each in names if each.startswith(name)]
    before, comma, start = start.rpartition(",")
    head = f"{name}={before}{comma}"
    return [CompletionItem(head + each) for each in settings.values(name) if each.startswith(start)]


class Assignment(_Pair):
    """NAME=VALUE."""

    name = "name=value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _settings(ctx, incomplete)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        from ..studies import settings

        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name or not text:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name.strip().replace("-", "_"), settings.parse(text)


class Series(_Values):
    """NAME=VALUE,VALUE... or NAME=FIRST..LAST, as studies.series has them."""

    name = "name=value,value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _settings(ctx, incomplete, ("seed", "operations", "warm_up"))

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[Any, ...]]:
        from ..studies import series

        if isinstance(value, tuple):
            return value
        name, _, text = str(value).partition("=")
        values = text.split(",")
        if not name.strip() or not all(part.strip() for part in values):
            self.fail(f"{value!r} is not NAME=VALUE,VALUE", param, ctx)
        name = name.strip().replace("-", "_")
        try:
            return name, series.values(text, name)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def together(sets: tuple[tuple[str, Any], ...], pool: int | None) -> dict[str, Any]:
    """What --set and --pool say; ConfigError where one is said twice."""
    found = {} if pool is None else {"pool": pool}
    for name, value in sets:
        if name in found:
            raise ConfigError(f"{name}: it is set twice")
        found[name] = value
    return found


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.  [default: text]")
SOURCES = click.argument("sources", nargs=-1, metavar="[WORKLOAD|RECORDING]...", type=Source())
POOL = click.option(
    "--pool",
    type=Count(4, POOL_MAX),
    metavar="N",
    help="Shadow pages in the pool, 4096 bytes each; native has none.  [default: 256; unsync: a fiftieth of the "
    "guest's frames, at least 64]",
)
SET = click.option(
    "--set",
    "sets",
    type=Assignment(),
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting: of shadow MMUs (pool, min_free, refill, flood_threshold, flood_reset, notpresent_marker; of "
    "unsync prev_roots, prefetch, release), tlb (a processor, entries, or none), levels (what lies below: `shadowcore "
    "costs`); of workloads and programs memory, those of the guest kernel (mode, pcid, isolation, ...), of workloads "
    "vcpus, host_page_size, backing, outer_backing, their parameters (`shadowcore workloads NAME`), of programs turn "
    "and fold. May be repeated.  [default: as each has it]",
)
OPERATIONS = click.option(
    "--operations",
    type=Count(1),
    metavar="N",
    help="Operations of a workload's processor, or of a recording, at most: a guest's records, a program's accesses.  "
    "[default: 1000000 after the warm-up; all of a recording]",
)
SEED = click.option(
    "--seed",
    type=Count(0, (1 << 64) - 1),
    metavar="N",
    help="Of everything random in a workload, or in the kernel that programs run on.  [default: 0]",
)
WARM_UP = click.option(
    "--warm-up",
    type=WarmUp(),
    default=0,
    metavar="N|PHASE",
    help="Operations that come first and are not counted: all figures are from there on, in the state to which they "
    "have brought guest and shadow. Or a phase that the recording marks, which begins there; boot ends there.  "
    "[default: 0]",
)
COSTS = click.option(
    "--costs",
    type=Prices(),
    default="modern",
    metavar="NAME",
    help="Prices, in cycles, by which runs are costed; `shadowcore costs` lists them with their sources.  "
    "[default: modern]",
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
