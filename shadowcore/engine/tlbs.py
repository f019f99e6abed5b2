"""TLBs of processors: first levels by kind of access, a second level, caches of the tables above the leaves.

`TLB` of config is one level, the same for all accesses; both say what they are made of as rows that the engine takes.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

from ..config import TLB, check_int, taken
from ..errors import ConfigError

SIZES = ("4k", "2m", "1g")
"""Sizes of pages, as `TLBBank.sizes` names them; "2m" is of 4 MiB where the guest's are."""
REPLACEMENTS = ("lru", "plru")
"""What `ProcessorTLB.replacement` can be."""
MOST_BANKS = 16
MOST_WAYS = 64
"""Of a set that is replaced by a tree."""
LOAD, STORE, FETCH = 1, 2, 4
HOST = ("host_pd", "host_pdpt", "host_pml4", "host_pml5", "nested")
"""Structures of guest physical addresses."""


class Row(NamedTuple):
    """A structure as the engine has it."""

    entries: int
    ways: int
    sizes: int  # a bit each, in the order of SIZES
    kinds: int  # LOAD, STORE, FETCH
    level: int
    plru: bool


@dataclasses.dataclass(frozen=True)
class TLBBank:
    """One structure: `entries` in sets of `ways` (None: one set, fully associative), for pages of these `sizes`, which
    share the ways. The number of sets need not be a power of two. Of a cache of tables `sizes` says nothing.

    >>> sc.TLBBank(64, 4, ("4k",)).sizes
    ('4k',)
    """

    entries: int
    ways: int | None = None
    sizes: tuple[str, ...] = SIZES

    def __post_init__(self) -> None:
        entries = check_int("bank.entries", self.entries, 1, 1 << 20)
        ways = entries if self.ways is None else check_int("bank.ways", self.ways, 1, 1 << 20)
        if entries % ways:
            raise ConfigError(f"bank.entries: {entries} is not a multiple of {ways} ways")
        sizes = self.sizes
        if not isinstance(sizes, (tuple, list)) or not sizes or not all(size in SIZES for size in sizes):
            raise ConfigError(f"bank.sizes: {sizes!r:.60} is not a tuple of some of {', '.join(SIZES)}")
        for name, value in (("entries", entries), ("ways", ways), ("sizes", tuple(sizes))):
            object.__setattr__(self, name, value)

    def row(self, kinds: int, level: int, plru: bool) -> Row:
        """As the engine has it, for accesses of these kinds (LOAD, STORE, FETCH)."""
        return Row(self.entries, self.ways or 0, sum(1 << SIZES.index(size) for size in self.sizes), kinds, level, plru)


@dataclasses.dataclass(frozen=True)
class ProcessorTLB:
    """A TLB with two levels for each vcpu, and paging-structure caches.

    load, store, fetch: banks of the first level that loads, stores and fetches look in. store: None: those of load.
        fetch: None: those of load.
    second, second_fetch: banks of the second level, those that fetches look in; None: the same, () for none.
    A page goes into one bank of each level, of those that hold its size: where it is already, else where a place of its
    set is free, else in the place of the least recently used of all candidates (with "plru": of the next bank in turn).
    A walk fills both levels, a hit of the second one the first. Neither contains the other.
    pml5, pml4, pdpt, pd: caches of entries of these levels that lead to tables (None: there is none). A walk begins
        below the lowest entry that one of them has. They count: what the tables say is read anew, as a processor may do
        at any time, so nothing that is stale is ever used. A walk that ends in a fault counts whole.
    nested: of nested paging (design "nested"): a TLB of guest physical addresses, for the sizes of pages that the host
        maps. Each address of a walk in two dimensions that it has takes no walk of the host's tables.
    host_pml5, host_pml4, host_pdpt, host_pd: caches of entries of the host's tables that lead to tables. Under "nested"
        pml5 to pd say where the guest's table below lies in the host's memory, so that what the host's tables say of
        that is left out as well (SDM vol. 3, 28.3: combined and guest-physical mappings). The guest's flushes reach the
        caches of both dimensions and the TLB, never those of the host's tables alone, which go where the hypervisor
        flushes, and where a walk was refused.
    replacement: "lru", or "plru": a tree of bits, with ways that are a power of two up to 64.
    name: what reports call it.

    >>> tlb = sc.ProcessorTLB(load=(sc.TLBBank(64, 4),), second=(sc.TLBBank(1536, 12),))
    >>> sc.VM("16MiB", tlb=tlb).tlb.second[0].entries
    1536
    """

    load: tuple[TLBBank, ...]
    store: tuple[TLBBank, ...] | None = None
    fetch: tuple[TLBBank, ...] | None = None
    second: tuple[TLBBank, ...] = ()
    second_fetch: tuple[TLBBank, ...] | None = None
    pml5: TLBBank | None = None
    pml4: TLBBank | None = None
    pdpt: TLBBank | None = None
    pd: TLBBank | None = None
    nested: TLBBank | None = None
    host_pml5: TLBBank | None = None
    host_pml4: TLBBank | None = None
    host_pdpt: TLBBank | None = None
    host_pd: TLBBank | None = None
    replacement: str = "lru"
    name: str = "own"

    def __post_init__(self) -> None:
        if self.replacement not in REPLACEMENTS:
            raise ConfigError(f"tlb.replacement: {self.replacement!r:.60} is not one of {', '.join(REPLACEMENTS)}")
        if not isinstance(self.name, str):
            raise ConfigError(f"tlb.name: a text is needed, not {self.name!r:.60}")
        for name in ("load", "store", "fetch", "second", "second_fetch"):
            banks = getattr(self, name)
            if banks is None and name not in ("load", "second"):
                continue
            if not isinstance(banks, (tuple, list)):
                raise ConfigError(f"tlb.{name}: a tuple of TLBBank objects is needed, not {banks!r:.60}")
            banks = tuple(taken(TLBBank, bank, f"tlb.{name}") for bank in banks)
            object.__setattr__(self, name, banks)
            for bank in banks:
                self._check_ways(name, bank)
            for i, size in enumerate(SIZES):
                found = [bank for bank in banks if size in bank.sizes]
                if len(found) > 2:
                    raise ConfigError(f"tlb.{name}: {len(found)} banks hold pages of size {SIZES[i]}, 2 are the most")
        for name in ("pd", "pdpt", "pml4", "pml5", *HOST):
            bank = getattr(self, name)
            if bank is not None:
                object.__setattr__(self, name, taken(TLBBank, bank, f"tlb.{name}"))
                self._check_ways(name, bank)
        if not self.load:
            raise ConfigError("tlb.load: one bank at least is needed")
        if len(self.banks) > MOST_BANKS:
            raise ConfigError(f"tlb: {len(self.banks)} banks, {MOST_BANKS} are the most")

    def _check_ways(self, name: str, bank: TLBBank) -> None:
        ways = bank.ways or 0
        if self.replacement == "plru" and (ways > MOST_WAYS or ways & (ways - 1)):
            raise ConfigError(f"tlb.{name}: a tree needs ways that are a power of two up to {MOST_WAYS}, not {ways}")

    @property
    def banks(self) -> tuple[Row, ...]:
        """The structures of both levels, the first one first."""
        kinds = ((LOAD, self.load), (STORE, self.store), (FETCH, self.fetch))
        own = LOAD | sum(kind for kind, banks in kinds if banks is None)
        plru = self.replacement == "plru"
        rows = [bank.row(own, 1, plru) for bank in self.load]
        rows += [bank.row(kind, 1, plru) for kind, banks in kinds[1:] for bank in banks or ()]
        shared = LOAD | STORE | (FETCH if self.second_fetch is None else 0)
        rows += [bank.row(shared, 2, plru) for bank in self.second]
        return (*rows, *(bank.row(FETCH, 2, plru) for bank in self.second_fetch or ()))

    @property
    def caches(self) -> tuple[Row | None, ...]:
        """Those of entries of level 2, 3, 4 and 5."""
        plru = self.replacement == "plru"
        found = (self.pd, self.pdpt, self.pml4, self.pml5)
        return tuple(None if bank is None else bank.row(LOAD | STORE | FETCH, 0, plru) for bank in found)

    @property
    def host(self) -> tuple[Row | None, ...]:
        """Those of entries of the host's tables, of level 2, 3, 4 and 5, and the nested TLB."""
        plru = self.replacement == "plru"
        found = [getattr(self, name) for name in HOST]
        return tuple(None if bank is None else bank.row(0, 0, plru) for bank in found)

    @classmethod
    def preset(cls, name: str) -> ProcessorTLB:
        """One of PRESETS, by its name; ConfigError, with the nearest, if there is none such.

        Sizes and ways are those that CPUID of real parts reports (leaf 18h of Intel's, leaves 80000005h, 80000006h and
        80000019h of AMD's, as the InstLatx64 collection has them) unless it says below that they are from memory: of
        Intel's optimization manual, AMD's guides and papers, without a source at hand.

        skylake-sp: leaf 2 (63, 03, 76, b5, c3). From memory: 12 ways of the second level. (Cascade Lake is the same.)
        icelake-sp: leaf 18h. From memory: the first level of fetches for 4 KiB, 8 ways.
        goldencove: leaf 18h; 96 entries for loads by Intel's manual and by Granite Rapids, where CPUID says 64.
        lioncove: leaf 18h of Lunar Lake; the rest as goldencove.
        zen3, zen4, zen5: CPUID. The ways of the second level of zen4 are skewed in the processor, here they are 6 for
            both sizes; 8 of zen5 and the 512 or 2048 entries for fetches, 4 and 8 ways, are the manual's.
        Paging-structure caches of all of them are from memory: Intel's PDE 32 entries, PDPTE 4, PML4E 2 (RevAnC, 2017,
        and others; PML5E as PML4E); AMD keeps PDEs in the second level, here 64 of
        their own, PDPTE and PML4E as Intel's. Of the host's tables there are as many as of the guest's, 32 PDEs
        (constants of the artifact of DMT, ASPLOS 2024, for guest and host each); AMD's nested TLB of 16 entries is
        that of its paper of 2008 (ASPLOS), from memory, and of today's unknown.
        That replacement is LRU is assumed of all.
        """
        if name in PRESETS:
            return PRESETS[name]
        near = difflib.get_close_matches(str(name), PRESETS, 1)
        more = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(PRESETS)}"
        raise ConfigError(f"tlb: there is no {name!r:.60}{more}")


def _presets() -> dict[str, ProcessorTLB]:
    def bank(entries: int, ways: int | None = None, *sizes: str) -> TLBBank:
        return TLBBank(entries, ways, sizes or SIZES)

    intel: dict[str, Any] = {"pml5": bank(2), "pml4": bank(2), "pdpt": bank(4), "pd": bank(32, 4)}
    intel |= {f"host_{name}": cache for name, cache in intel.items()}
    amd: dict[str, Any] = intel | {"pd": bank(64, 4), "nested": bank(16)}
    halves = (bank(1024, 8, "4k", "2m"), bank(1024, 8, "4k", "1g"))
    large = (bank(32, 4, "2m"), bank(8, None, "1g"))
    found = {
        "skylake-sp": ProcessorTLB(
            load=(bank(64, 4, "4k"), bank(32, 4, "2m"), bank(4, 4, "1g")),
            fetch=(bank(64, 8, "4k"), bank(8, None, "2m", "1g")),
            second=(bank(1536, 12, "4k", "2m"), bank(16, 4, "1g")),
            **intel,
        ),
        "icelake-sp": ProcessorTLB(
            load=(bank(64, 4, "4k"), *large),
            store=(bank(16),),
            fetch=(bank(64, 8, "4k"), bank(8, None, "2m", "1g")),
            second=halves,
            **intel,
        ),
        "zen3": ProcessorTLB(
            load=(bank(64),),
            fetch=(bank(64),),
            second=(bank(2048, 8, "4k", "2m"), bank(64, None, "1g")),
            second_fetch=(bank(512, 4, "4k", "2m"),),
            **amd,
        ),
        "zen4": ProcessorTLB(
            load=(bank(72),),
            fetch=(bank(64),),
            second=(bank(3072, 6, "4k", "2m"), bank(64, None, "1g")),
            second_fetch=(bank(512, 4, "4k", "2m"),),
            **amd,
        ),
        "zen5": ProcessorTLB(
            load=(bank(96),),
            fetch=(bank(64),),
            second=(bank(4096, 8, "4k", "2m"), bank(64, None, "1g")),
            second_fetch=(bank(2048, 8, "4k", "2m"),),
            **amd,
        ),
    }
    for name, loads, ways in (("goldencove", 96, 6), ("lioncove", 128, 8)):
        found[name] = ProcessorTLB(
            load=(bank(loads, ways, "4k"), *large),
            store=(bank(16),),
            fetch=(bank(256, 8, "4k"), bank(32, 8, "2m", "1g")),
            second=halves,
            **intel,
        )
    return {name: dataclasses.replace(tlb, name=name) for name, tlb in found.items()}


PRESETS = _presets()
"""TLBs of processors by name; what their numbers come from says `ProcessorTLB.preset`."""


def check_tlb(given: object, name: str = "tlb") -> TLB | ProcessorTLB | None:
    """A TLB of either class, checked again, or None."""
    if given is None:
        return None
    if isinstance(given, ProcessorTLB):
        return taken(ProcessorTLB, given, name)
    return taken(TLB, given, name)


def rows(tlb: TLB | ProcessorTLB) -> tuple[Row, ...]:
    """The structures of its levels."""
    if isinstance(tlb, ProcessorTLB):
        return tlb.banks
    every = LOAD | STORE | FETCH
    return tuple(Row(entries, ways, 1 << i, every, 1, False) for i, (entries, ways) in enumerate(tlb.geometry))


def caches(tlb: TLB | ProcessorTLB) -> tuple[Row | None, ...]:
    """Paging-structure caches of level 2 to 5."""
    return tlb.caches if isinstance(tlb, ProcessorTLB) else (None,) * 4


def host(tlb: TLB | ProcessorTLB) -> tuple[Row | None, ...]:
    """Structures of guest physical addresses: see ProcessorTLB.host."""
    return tlb.host if isinstance(tlb, ProcessorTLB) else (None,) * 5


def saved(tlb: TLB | ProcessorTLB | None) -> dict[str, Any] | None:
    """As a file keeps it."""
    if isinstance(tlb, ProcessorTLB):
        return {"levels": 2} | dataclasses.asdict(tlb)
    return None if tlb is None else dataclasses.asdict(tlb)


def restored(state: dict[str, Any]) -> ProcessorTLB:
    """The reverse, of one with "levels"; ConfigError, TypeError."""
    values: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            value = TLBBank(**value)
        elif isinstance(value, (list, tuple)):
            value = tuple(TLBBank(**bank) for bank in value)
        if key != "levels":
            values[key] = value
    return ProcessorTLB(**values)


def label(tlb: TLB | ProcessorTLB | None) -> int | str | None:
    """What a study shows: the name, or how many entries there are for pages of 4 KiB."""
    return tlb.name if isinstance(tlb, ProcessorTLB) else None if tlb is None else tlb.small_entries
