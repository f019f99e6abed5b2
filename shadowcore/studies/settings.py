"""Settings by name, as a study and the command line take them: of the design, the machine, the guest, the workload."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ..config import (
    BACKINGS,
    MARKERS,
    POLICIES,
    RELEASES,
    RULES,
    TLB,
    USES,
    Design,
    Native,
    Nested,
    Shadow,
    check_backing,
    check_int,
    design,
    parse_count,
    parse_size,
)
from ..engine.levels import LEVELS, Levels, find_levels
from ..engine.tlbs import PRESETS, ProcessorTLB
from ..errors import ConfigError
from ..guest.options import DIRECT_MAPS, MODES, KernelOptions

DESIGN = {
    "pool": "shadow pages in the pool, 4096 bytes each",
    "min_free": "the pool is refilled when fewer pages than this are free",
    "refill": "pages that are free after that",
    "flood_threshold": "consecutive stores to a guest table that zap its shadow pages; none: never",
    "flood_pages": "true: each shadow page counts them by itself, and a fault through it ends that",
    "flood_forget": "stores to other tables after which a page's count is forgotten; none: never",
    "flood_reset": "true: a fault in between makes them count anew",
    "notpresent_marker": "page, synced, walk or never: when entries that the guest has not made are marked",
    "prev_roots": "roots of earlier CR3s that a vcpu keeps (unsync)",
    "update_in_place": "true: an emulated store makes the leaf of the new entry at once",
    "prefetch": "entries of the group that a fault fills, a power of two, or 0 (not flush, kvm-6.1-tdp)",
    "policy": "which page is recycled: " + ", ".join(POLICIES),
    "uses": "what is a use of a shadow page, joined by +: " + ", ".join(USES),
    "recycle_children": "true: pages below a recycled one, to which nothing else leads, go with it",
    "policy_seed": "of what is random in a policy",
    "decides": "a plug-in that says what becomes of stores to guest tables, by its name",
    "release": "6.1, 6.12 or 2.6.28: what INVLPG and a sync do (unsync)",
    "rules": "rules that are on, joined by +, or none: " + ", ".join(RULES) + " (adaptive)",
    "prices": "by which it decides, as for --costs (adaptive)",
    "host_levels": "levels of the host's tables, 4 or 5 (nested)",
    "nested_writes": "stores to a table in one interval with which it is walked nested (agile)",
    "nested_interval": "length of an interval: emulated stores and walks below marks (agile)",
    "nested_back": "when such a table is shadowed again: scan, reset or never (agile)",
}
"""Settings of an MMU."""
FIELDS = {"pool": "pool_pages", "host_levels": "levels"}
"""What they are called in config, where it is another name."""
NESTED = ("pool", "min_free", "refill", "prefetch", "host_levels")
"""Those of nested paging; prefetch is the direct MMU's."""
UNSYNC = ("prev_roots", "release")
"""Those that only `unsync`, and what is made of it, has."""
AGILE = ("nested_writes", "nested_interval", "nested_back")
"""Those that only `agile` has."""
SHADOWED = ("update_in_place", "prefetch", "flood_pages", "flood_forget")
"""Those that it has not: they are of tables that are all shadowed."""
ADAPTIVE = ("rules", "prices")
"""Those that only `adaptive` has."""
IN_SYNC = ("flood_reset", "flood_pages")
"""Those that it has not."""
KEPT = (
    "notpresent_marker",
    "policy",
    "uses",
    "recycle_children",
    "policy_seed",
    "decides",
    "update_in_place",
    "prefetch",
    "flood_pages",
    "flood_forget",
    *ADAPTIVE,
)
"""Those that a design has only if its tables belong to guest tables."""
MACHINE = {
    "levels": "what lies below the guest, by which exits are costed: shadow, pvm, shadow-on-ept, ...",
    "tlb": "of a processor (zen4, goldencove, ...), or entries for pages of 4096 bytes; none: no TLB",
    "memory": "guest RAM, such as 64MiB (workloads and programs)",
    "vcpus": "processors of the guest (workloads only)",
    "host_page_size": "of the host's pages under guest RAM, such as 2MiB (workloads only)",
    "backing": "what the host has of guest RAM at first: warm, cold or thp (workloads only)",
    "outer_backing": "what an outer host has of that: warm, cold or thp (workloads only)",
}
GUEST = tuple(field.name for field in dataclasses.fields(KernelOptions) if field.name != "seed")
"""Settings of the guest kernel (workloads and programs)."""
_SIZES = ("memory", "host_page_size")
"""Of MACHINE those whose letters K, M, G are powers of 1024."""


SWITCHES = ("flood_reset", "flood_pages", "update_in_place", "recycle_children")
"""Of DESIGN those that are true or false."""


class Takes(Protocol):
    """What says which settings it takes: a source.Source."""

    parameters: Mapping[str, Any]
    machine: tuple[str, ...]
    guest: bool

    @property
    def called(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """Settings, sorted by what they are of."""

    design: dict[str, Any]
    machine: dict[str, Any]
    guest: dict[str, Any]
    parameters: dict[str, Any]

    def check_used(self, designs: Iterable[Design]) -> None:
        """ConfigError for a setting of shadow MMUs that none of the designs has."""
        chosen = list(designs)
        for name in self.design:
            if not any(has(which, name) for which in chosen):
                names = ", ".join(which.name for which in chosen)
                raise ConfigError(f"{name}: it is no setting of {names}; a design that has it is needed")

    def check_levels(self, levels: Levels, designs: Iterable[Design]) -> None:
        """ConfigError for a design that these levels have no place for; `native` is the yardstick of the others."""
        outer = self.machine.get("outer_backing", "warm")
        if outer != "warm" and not levels.nested:
            raise ConfigError(f"levels: {levels.name!r} has no outer hypervisor, and outer_backing is {outer!r}")
        for which in designs:
            if isinstance(which, Shadow) and levels.paging != "shadow":
                what = "no hypervisor" if levels.paging == "none" else "EPT"
                raise ConfigError(f"levels: {levels.name!r} has {what}, and {which.name} is a shadow MMU")
            if isinstance(which, Nested) and levels.paging != "ept":
                raise ConfigError(f"levels: {levels.name!r} has no EPT, and {which.name} is nested paging")

    def made(self, mmu: str | Design) -> Design:
        """The design with its settings; those of a shadow MMU leave `native` alone."""
        chosen = design(mmu)
        if isinstance(chosen, Native):
            return chosen
        wanted = {
            FIELDS.get(name, name): value
            for name, value in self.design.items()
            if has(chosen, name)
            or (isinstance(chosen, Shadow) and not chosen.keep and name not in (*KEPT, *AGILE, "host_levels"))
        }
        try:
            return dataclasses.replace(chosen, **wanted)
        except ConfigError as error:
            # By the name that was given.
            field, _, said = str(error).partition(":")
            own = {field: name for name, field in FIELDS.items()}.get(field, field)
            raise ConfigError(f"{own}:{said}") from None

    @property
    def options(self) -> KernelOptions:
        return KernelOptions(**self.guest)


def values(name: str) -> tuple[str, ...]:
    """The names that a setting takes; none where it takes numbers alone."""
    truth = ("true", "false")
    known: dict[str, Iterable[str]] = {
        "policy": POLICIES,
        "uses": USES,
        "rules": RULES,
        "notpresent_marker": MARKERS,
        "release": RELEASES,
        "levels": LEVELS,
        "tlb": ("none", "costs", *PRESETS),
        "mode": MODES,
        "direct_map": DIRECT_MAPS,
        "backing": BACKINGS,
        "outer_backing": BACKINGS,
        **dict.fromkeys(SWITCHES, truth),
        **{field.name: truth for field in dataclasses.fields(KernelOptions) if isinstance(field.default, bool)},
    }
    return tuple(known.get(name, ()))


def has(which: Design, name: str) -> bool:
    """The design has a setting of this name."""
    if isinstance(which, Nested):
        return name in NESTED and (name != "prefetch" or which.mmu == "direct")
    if not isinstance(which, Shadow) or name == "host_levels" or (not which.keep and name != "pool"):
        return False
    if name in ADAPTIVE:
        return which.adapts
    if name in AGILE or which.switching:
        return which.switching and name not in (*UNSYNC, *SHADOWED)
    return which.lagging if name in UNSYNC else not (which.lagging and name in IN_SYNC)


def effective(labels: Mapping[str, Any], which: Design) -> dict[str, Any]:
    """Settings without those of shadow MMUs that a design has not."""
    return {name: value for name, value in labels.items() if name not in DESIGN or has(which, name)}


def split(settings: Mapping[str, Any], source: Takes) -> Split:
    """Sort settings; ConfigError for one that the source does not take, with the nearest."""
    found = Split({}, {}, {}, {})
    own = source.parameters
    for name, given in settings.items():
        count = parse_count(given) if isinstance(given, str) and name not in (*_SIZES, "mode", "release") else None
        value = given if count is None else count
        if name in own:
            found.parameters[name] = value
        elif name in DESIGN:
            found.design[name] = value
        elif name in source.machine:
            found.machine[name] = value
        elif name in GUEST and source.guest:
            found.guest[name] = _guest(name, value)
        else:
            raise ConfigError(_unknown(name, source, [*own, *DESIGN, *source.machine]))
    for name in SWITCHES:
        if name in found.design and not isinstance(found.design[name], bool):
            raise ConfigError(f"{name}: true or false is needed, not {found.design[name]!r}")
    if isinstance(found.design.get("policy"), int):
        found.design["policy"] = str(found.design["policy"])
    for name, value in found.guest.items():
        if isinstance(getattr(KernelOptions(), name), bool) and not isinstance(value, bool):
            raise ConfigError(f"{name}: true or false is needed, not {value!r}")
    if "levels" in found.machine:
        find_levels(found.machine["levels"])
    for name in ("backing", "outer_backing"):
        if name in found.machine:
            check_backing(name, found.machine[name])
    for name in _SIZES:
        if name in found.machine:
            parse_size(found.machine[name], name)
    return found


def _guest(name: str, value: Any) -> Any:
    """On the command line, mode 32 is a number, and names are joined by +."""
    if name == "sloppy" and isinstance(value, str):
        return tuple(value.split("+"))
    return str(value) if name == "mode" and type(value) is int else value


def _unknown(name: str, source: Takes, known: list[str]) -> str:
    of = source.called
    found = difflib.get_close_matches(name, [*known, *(GUEST if source.guest else ())], 1)
    if found:
        return f"{of}: there is no setting {name!r}; did you mean {found[0]!r}?"
    more = f"; of its guest: {', '.join(GUEST)}" if source.guest else ""
    return f"{of}: there is no setting {name!r}; there are {', '.join(known)}{more}"


def near(name: str, known: Iterable[str]) -> str:
    """For a message about a name that there is not: the nearest that there is, or all."""
    there = list(known)
    found = difflib.get_close_matches(name, there, 1)
    return f"did you mean {found[0]!r}?" if found else f"there are {', '.join(there)}"


def tlb(value: Any, default: TLB | None) -> TLB | ProcessorTLB | None:
    """A TLB from a TLB, the name of a processor's (ProcessorTLB.preset), a number of entries for small pages (ways as
    the default has them), None, or "costs"."""
    if value == "costs":
        return default
    if value is None or isinstance(value, (TLB, ProcessorTLB)):
        return value
    if isinstance(value, str):
        return ProcessorTLB.preset(value)
    entries = check_int("tlb", value, 0, 1 << 20)
    base = default or TLB()
    ways = next(ways for ways in range(min(base.small_ways, max(entries, 1)), 0, -1) if entries % ways == 0)
    return dataclasses.replace(base, small_entries=entries, small_ways=ways)


def parse(text: str) -> Any:
    """A value as it is written on the command line: a number as C writes it, none, true, false, or a text. Of a text
    like 1M `split` makes the number that it means for a setting."""
    word = text.strip()
    if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|\d[\d_]*)", word):
        return int(word, 0) if not re.fullmatch(r"[+-]?0\d+", word) else int(word)
    return {"none": None, "true": True, "false": False}.get(word.lower(), word)


def written(value: Any) -> str:
    """The reverse of parse."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
