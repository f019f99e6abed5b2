"""Settings: frozen, checked where they are made, with the series' values as defaults."""

from __future__ import annotations

import difflib
import operator
import re
import sys
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, IntFlag
from functools import partial
from typing import Any, ClassVar, TypeVar

from .errors import ConfigError
from .plugins import Decisions, Policy
from .plugins import names as plugins

PAGE_SIZE = 4096
T = TypeVar("T")
HOST_PAGES = (PAGE_SIZE, 1 << 21, 1 << 30)
"""Sizes of a host's page, by level."""
BACKINGS = ("warm", "cold", "thp")
"""What `MemorySlot.backing` can be."""
RELEASES = ("6.1", "6.12", "2.6.28")
"""Releases of Linux whose ways `Shadow.release` can name."""
VENDORS = ("intel", "amd")
"""What `Features.vendor` can be."""
MARKERS = ("never", "page", "synced", "walk")
"""When `Shadow.notpresent_marker` marks an entry."""
POLICIES = ("fifo", "lru", "clock", "2q", "arc", "lirs", "sieve", "s3-fifo", "random", "cost", "optimal")
"""What `Shadow.policy` can be."""
WAYS_BACK = ("scan", "reset", "never")
"""What `Shadow.nested_back` can be."""
USES = ("fault", "link", "cr3", "accessed", "walk")
"""What `Shadow.uses` can name."""
RULES = ("emulate", "zap", "invlpg", "freed", "hysteresis")
"""What `Shadow.rules` can name."""
POOL_MAX = (1 << 22) - 1
"""Pages of a shadow pool at most: the number of an spte, plus one, has 31 bits, as lists of sptes need it."""
_UNITS = {"": 1, "b": 1} | {f"{k}{s}": 1 << 10 * i for i, k in enumerate("kmgt", 1) for s in ("", "b", "ib")}
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9](?:_?[0-9])*)(?:\.([0-9]{1,18}))?(?:[eE]\+?([0-9]{1,2})|\s*([kKmMgGtT]))?")


class Op(IntEnum):
    """Codes of the `op` field of OP_DTYPE.

    >>> ops = np.zeros(2, sc.OP_DTYPE)
    >>> ops["op"] = sc.Op.READ, sc.Op.INVLPG
    >>> sc.Op(int(ops["op"][1])).name
    'INVLPG'
    """

    READ = 0
    WRITE = 1
    FETCH = 2
    CR3 = 3
    CR0 = 4
    CR4 = 5
    EFER = 6
    INVLPG = 7
    PKRU = 8
    """Load PKRU with the low 32 bits of `value`."""
    AC = 9
    """Set EFLAGS.AC to bit 0 of `value` (SMAP). It does not count for those with `implicit` (SDM volume 3, 4.6.1)."""
    CMPXCHG = 10
    """Store `value` if `expected` is there; the result's value is what was there."""
    XCHG = 11
    ADD = 12
    AND = 13
    OR = 14
    XOR = 15
    INVPCID = 16
    """INVPCID of the type in `size` (0 an address, 1 a PCID, 2 all, 3 all that is not global): `value` and `addr` are
    the descriptor's words, the PCID and the linear address. #UD, #GP: SDM volume 2."""


class Quirk(IntFlag):
    """Defects and costs of KVM's code, of January 2007 and of Linux 6.1, each to be switched on by itself.

    The names say what is done wrongly; the docstrings name the commit that mended it.

    >>> sc.Shadow.kvm_2007().quirks == sc.Quirk.KVM_2007
    True
    >>> sc.Shadow.kvm_2007(quirks=sc.Quirk.NONE).quirks
    <Quirk.NONE: 0>
    """

    NONE = 0
    TWO_EXITS = 1 << 0
    """A rights violation through a missing leaf fills the leaf first and is injected at a second exit
    (mended by 7993ba43db1c, 2.6.20)."""
    ACCESSED_EARLY = 1 << 1
    """The walk sets the accessed bit of each present entry before rights are checked (7993ba43db1c, 2.6.20)."""
    DIRTY_LOST = 1 << 2
    """The dirty bit of the entry that maps a guest table is not set when the store is emulated
    (760db773fbd0, 2.6.20-rc4)."""
    ROLE_WITHOUT_ACCESS = 1 << 3
    """A table is found again whatever rights the entries above give now (d28c6cfbbc5e, 2.6.22; b1bd5cba3306, 2021)."""
    ROLE_WITHOUT_MODE = 1 << 4
    """CR0.WP, EFER.NXE and CR4.PSE are not in the role (3dbe141595fa, 2.6.35)."""
    PDE_WRITE = 1 << 5
    """A store to a table of 4-byte entries clears one entry at twice the byte offset, at every level and in every
    quadrant (ac1b714e78c8, 2.6.21; fce0657ff9f1, 2.6.23)."""
    NO_REFILL_AT_CR3 = 1 << 6
    """The pool is not refilled when roots are loaded (7f7417d67ea6, 2.6.20-rc4)."""
    RMAP_LEAK = 1 << 7
    """A leaf that gives up W again (CR0.WP=0) leaves its record in the reverse map (63b1ad24d269, 2.6.23)."""
    PAGING_OFF_UNPROTECTED = 1 << 8
    """With paging off, leaves are writable even where the frame is a shadowed guest table."""
    ABSENT_PDPTES = 1 << 9
    """PAE root entries that are not present get a shadow page as well (417726a3fbec, 2.6.22)."""
    ROOT_EMPTIED = 1 << 10
    """Recycling empties a root in use when it is the oldest page, and keeps it (22d95b128281, 2.6.23)."""
    NX_LEAF_ONLY = 1 << 11
    """No-execute is taken from the leaf alone (d55e2cb20123, 2.6.23)."""
    PROCESSOR_CODE = 1 << 12
    """A fault is injected with the error code of the processor's walk of the shadow: P says whether a shadow entry
    was there (7993ba43db1c, 2.6.20)."""
    EXIT_FLUSHES = 1 << 13
    """An entry dropped by an emulated store, or with a zapped upper table, asks for no TLB flush: without VPID every
    exit flushes anyway, and so it does here."""
    GLOBAL_WITHOUT_PGE = 1 << 14
    """Design `flush`: tables of leaves with G survive CR3 loads although CR4.PGE is off (2.6.20-rc3)."""
    IGNORED_BITS_REFUSED = 1 << 15
    """Loads of CR0 and CR3 that set bits which processors ignore are #GP: bits 6 to 15, 17 and 19 to 28 of CR0, bits
    11:5 of CR3 in 4- and 5-level paging without PCIDs, bits 2:0 elsewhere. The series' own checks did so; KVM has long
    given them up. `Native` takes this quirk as well: it is the guest's processor that is different."""
    KVM_2007 = (1 << 16) - 1
    """All of those above: the series as it was. The others are of design `unsync`."""
    ROLE_WITHOUT_NXE = 1 << 16
    """Design `unsync`: EFER.NXE, CR4.PSE, and whether entries of 8 bytes are PAE's, are not in the role, so that a page
    made under other rules is found again: an entry with bit 63 set is served while EFER.NXE is off (Linux 6.1)."""
    WP0_HIDES_USER = 1 << 17
    """Design `unsync`: with CR0.WP off a leaf that grants a supervisor's store hides from SMAP that the page is a
    user's (Linux 6.1); else such stores are emulated where SMAP or protection keys are on."""
    FAULT_KEEPS_LEAF = 1 << 18
    """Design `unsync`: after a page fault whose error code has P clear, or RSVD set, a leaf that lags serves on; by SDM
    volume 3, 4.10.4.1, each page fault drops what translates its address (Linux 6.1)."""
    TAGGED_CR3_LAGS = 1 << 19
    """Design `unsync`: a load of CR3 with bit 63 set brings nothing in line, so that leaves which were made and lag
    under one PCID serve another that never was in use meanwhile (Linux 6.1)."""
    DEVICE_UNASKED = 1 << 20
    """Design `unsync`: an access to a device whose page is remembered asks for no protection key, and with CR0.WP off
    not whether the guest's entry is dirty; nor does a sync ask whether there is RAM by now (Linux 6.1)."""
    STORE_ROUNDED = 1 << 21
    """Design `unsync`: with CR4.PAE on, an emulated store of 4 bytes is taken for one to the entry that its first byte
    is in, also where it reaches into the next, whose shadow stays (Linux 6.1)."""
    KVM_6_1 = ROLE_WITHOUT_NXE | WP0_HIDES_USER | FAULT_KEEPS_LEAF | TAGGED_CR3_LAGS | DEVICE_UNASKED | STORE_ROUNDED
    """Those of Linux 6.1."""


@dataclass(frozen=True)
class Features:
    """What the virtual processor has.

    maxphyaddr: physical address bits, 32 to 52. The others are CPUID features; loading a register bit of an absent
    feature is #GP, and INVPCID #UD.
    vendor: whose rules hold where manuals differ. "amd": bit 8 of entries at levels 4 and 5 must be 0 (APM volume 2,
    5.3.3; ignored by Intel's: SDM volume 3, table 4-15); a load of EFER has to leave LMA as it is (APM volume 2, 3.1.7;
    Intel's ignore what is written to it), and may set FFXSR and TCE; with TCE INVLPG leaves paging-structure caches of
    other addresses alone (APM volume 2, 3.1.7). What else is built here is the same for both.

    >>> vm = sc.VM("16MiB", features=sc.Features(pcid=False))
    >>> vm.vcpus[0].cr4 = 1 << 17  # CR4.PCIDE
    Traceback (most recent call last):
        ...
    shadowcore.errors.GeneralProtection: #GP, error code 0x0
    """

    maxphyaddr: int = 46
    nx: bool = True
    gbpages: bool = True
    la57: bool = True
    pse36: bool = True
    smep: bool = True
    smap: bool = True
    pku: bool = True
    pcid: bool = True
    umip: bool = True
    fsgsbase: bool = True
    xsave: bool = True
    invpcid: bool = True
    vendor: str = "intel"

    def __post_init__(self) -> None:
        _put(self, maxphyaddr=check_int("features.maxphyaddr", self.maxphyaddr, 32, 52))
        for name in FEATURES:
            _put(self, **{name: check_bool(f"features.{name}", getattr(self, name))})
        if _check_text("features.vendor", self.vendor) not in VENDORS:
            raise ConfigError(f"features.vendor: {self.vendor!r} is not one of {', '.join(VENDORS)}")


FEATURES = tuple(each.name for each in fields(Features) if each.name not in ("maxphyaddr", "vendor"))
"""Names of the features. Their bits, in the engine and in shadowcore.h, are numbered in this order."""


@dataclass(frozen=True)
class MemorySlot:
    """`size` bytes of guest RAM at guest physical address `gpa` (both multiples of 4096).

    dirty_log: log the frames written from the start.
    host_page_size: bytes of the host's pages under it: 4096, 2 MiB or 1 GiB. Design `unsync` makes large leaves where
        the guest's page is as large, and both lie alike.
    offset: the byte of guest RAM (`vm.memory.bytes`) at which its frames begin, a multiple of 4096. None: after those
        of the slot before it; of a slot that is added later, the first free place.
    read_only: loads read RAM, stores are the embedder's, as those to a device are (KVM_MEM_READONLY). The processor's
        walks set no bits in tables there.
    backing: what the host has of it at first. "warm": all of it. "cold": nothing, in pages of 4 KiB. "thp": nothing,
        and a first touch makes 2 MiB where nothing else is mapped in the aligned block of guest RAM. What a caller's
        array holds comes back at its first touch. None: as the VM says; of a slot that is added later, as its frames
        are.

    >>> vm = sc.VM([sc.MemorySlot(0, "1MiB"), sc.MemorySlot(1 << 32, "1MiB", dirty_log=True)])
    >>> vm.write_physical(1 << 32, b"7")
    >>> vm.memory.dirty_log(1)[:2].tolist()
    [True, False]
    """

    gpa: int
    size: int | str
    dirty_log: bool = False
    host_page_size: int | str = PAGE_SIZE
    offset: int | None = None
    read_only: bool = False
    backing: str | None = None

    def __post_init__(self) -> None:
        _put(
            self,
            gpa=check_int("slot.gpa", self.gpa, 0, 1 << 52),
            size=parse_size(self.size, "slot.size"),
            dirty_log=check_bool("slot.dirty_log", self.dirty_log),
            offset=None if self.offset is None else check_int("slot.offset", self.offset, 0, 1 << 52),
            read_only=check_bool("slot.read_only", self.read_only),
            backing=None if self.backing is None else check_backing("slot.backing", self.backing),
        )
        for name in ("gpa", "offset"):
            if (getattr(self, name) or 0) % PAGE_SIZE:
                raise ConfigError(f"slot.{name}: {getattr(self, name):#x} is not a multiple of 4096")
        host = parse_size(self.host_page_size, "slot.host_page_size")
        if host not in HOST_PAGES:
            raise ConfigError(f"slot.host_page_size: {host} is not 4 KiB, 2 MiB or 1 GiB")
        if host > int(self.size):
            raise ConfigError(f"slot.host_page_size: {host} bytes, and the slot has {self.size}")
        _put(self, host_page_size=host)


@dataclass(frozen=True)
class TLB:
    """A hardware TLB for each vcpu: set-associative with least-recently-used replacement, split by page size.

    entries, ways: for 4 KiB pages (`small`), 2 and 4 MiB pages (`large`), 1 GiB pages (`huge`); entries is a multiple
    of ways, the number of sets need not be a power of two; 0 entries: pages of that size are not kept.

    >>> vm = sc.VM("16MiB", tlb=sc.TLB(small_entries=64, small_ways=4))
    >>> vm.tlb.small_entries
    64
    """

    small_entries: int = 64
    small_ways: int = 4
    large_entries: int = 32
    large_ways: int = 4
    huge_entries: int = 4
    huge_ways: int = 4

    def __post_init__(self) -> None:
        for size in ("small", "large", "huge"):
            entries = check_int(f"tlb.{size}_entries", getattr(self, f"{size}_entries"), 0, 1 << 20)
            ways = check_int(f"tlb.{size}_ways", getattr(self, f"{size}_ways"), 1, 1 << 20)
            _put(self, **{f"{size}_entries": entries, f"{size}_ways": ways})
            if entries % ways:
                raise ConfigError(f"tlb.{size}_entries: {entries} is not a multiple of {ways} ways")

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """(entries, ways) of the three sizes; (0, 0) for one that is not kept."""
        pairs = (
            (self.small_entries, self.small_ways),
            (self.large_entries, self.large_ways),
            (self.huge_entries, self.huge_ways),
        )
        return tuple(pair if pair[0] else (0, 0) for pair in pairs)


@dataclass(frozen=True)
class Native:
    """No virtualization: the processor walks the guest's own tables.

    quirks: NONE, or IGNORED_BITS_REFUSED; the others are of a shadow MMU.

    >>> sc.VM("16MiB", sc.Native()).mmu.design.name
    'native'
    """

    name: str = field(default="native", init=False)
    quirks: Quirk = Quirk.NONE

    engine: ClassVar[str] = "native"
    """The file of engine/designs in which it is made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "quirks", _quirks(self.quirks, Quirk.IGNORED_BITS_REFUSED))


@dataclass(frozen=True)
class Shadow:
    """Shadow paging; use the constructors `cached`, `flush`, `kvm_2007`.

    name: what reports call this design.
    keep: shadow tables belong to guest tables and survive loads of CR3 (`cached`), or belong to linear addresses and
        are thrown away at CR3 loads unless global (`flush`).
    pool_pages: shadow pages in the pool (KVM_NUM_MMU_PAGES = 256). None, for lagging tables: a fiftieth of the guest's
        frames, at least 64 (the kernel's rule).
    min_free: the pool is refilled when fewer pages than this are free (KVM_MIN_FREE_MMU_PAGES = 5).
    refill: recycling goes on until this many are free (KVM_REFILL_PAGES = 25).
    flood_threshold: consecutive emulated stores to one frame that zap its shadow pages (3); None: never.
    flood_pages: each shadow page has a count of its own, of the emulated stores to its table since a fault last came
        through it, as in Linux 6.1: a table that is in use is in no flood, and stores to several tables in
        turn are one in each. At most 255. Lagging tables always count so, those above the leaves alone, as leaf tables
        run out of sync instead; otherwise leaf tables count as well.
    flood_forget: where pages have counts, emulated stores to other tables after which a page's count is forgotten;
        None: never.
    flood_reset: start counting anew at a fault that is no store to a guest table, as since a25f7e1f8c1f (2.6.23), so
        that demand paging is not taken for a flood. The series counted on.
    notpresent_marker: mark entries of leaf tables that the guest's tables do not have either, so that the processor
        delivers the fault without an exit (bypass_guest_pf, c7addb902054, 2.6.25). "never" (False). "page" (True):
        where the shadow MMU looks at the guest's entry, which is when a page is made or synced, at an emulated store,
        and at a walk; only in pages in sync. "synced": at a walk alone, in pages in sync. "walk" (lagging): at a walk
        alone, in unsync pages too, so that the guest's entry is looked at again before a marker serves.
    update_in_place: after an emulated store to an entry of a leaf table its leaf is made at once, if the entry is
        present and accessed (KVM's update_pte, until c5e2184d1544, 2021); else a fault makes it.
    prefetch: entries of the aligned group that a fault fills: 0, or a power of two up to 32 (PTE_PREFETCH_NUM = 8), as
        far as the guest's entries are present and accessed. None: 8 for lagging tables, else 0.
    lagging: leaf tables of the guest may run out of sync (`unsync`).
    prev_roots: of lagging tables: roots of earlier CR3s that each vcpu keeps, 0 to 16 (KVM_MMU_NUM_PREV_ROOTS = 3);
        4- and 5-level paging.
    release: of lagging tables. "6.1": INVLPG drops a leaf and makes it again at once, and a sync rewrites every leaf.
        "6.12": both change what is there, where the guest's entry asks for it. "2.6.28": INVLPG drops a leaf of any
        page and makes none; a table is out of sync only while it has one shadow page, and in sync again when a page of
        it is looked up.
    quirks: defects to reproduce: those of KVM_2007, or of KVM_6_1 where tables are `lagging`.
    policy: which page is recycled when pages run short. "fifo": the one that was made first (patch 17; KVM to this
        day). "lru", "clock", "2q", "arc", "lirs", "sieve", "s3-fifo": as their papers have it. "random". "cost": what
        is cheapest to make again, and was not used for long. "optimal": what is not needed for longest, where a VM is
        told what is to come (`VM(future=...)`; a study does that by itself).
    uses: what is a use of a shadow page, to policies that ask. "fault": the walk at a page-fault exit came through it.
        "link": an entry above was made to point to it. "cr3": it was put in place as a root. "accessed": when it is
        about to be recycled, A is found set in an entry that points to it. "walk": any walk of the processor came
        through it, which no real one tells; runs that ask for it take no fast path.
    recycle_children: with a page that is recycled go the pages below it to which nothing else leads. Otherwise they
        stay, to be found again (patch 15).
    policy_seed: of what is random in a policy.
    decides: a class of Decisions, by its name, that says what becomes of stores to guest tables; "": the design does.
    switching: guest tables that are stored to often are not shadowed: the processor walks them itself, through the
        host's tables, below entries of the shadow that are marked (`agile`).
    nested_writes: with that, emulated stores to a table in one interval with which it, and what is below it, is no
        more shadowed, 1 to 255 (the paper's rule: 2).
    nested_interval: length of an interval, in emulated stores and walks that went on below a mark, taken together.
    nested_back: how such a table comes to be shadowed again. "scan": at the end of an interval, if no entry that maps
        it came to be dirty in it. "reset": at the end of any interval. "never": only if it becomes a root, or its page
        is recycled.
    adapts: of lagging tables: each leaf table is kept in the way that its history says costs least (`adaptive`).
    rules: of `adaptive`, those that are on. "emulate": a table can have its stores emulated. "zap": one can be zapped
        at stores. "invlpg": INVLPG exits only while a table is out of sync. "freed": a table that is empty and linked
        nowhere is one no more. "hysteresis": the way changes when the difference has grown past a threshold.
    prices: of `adaptive`: the prices by which it decides, a name that `Costs.preset` knows.

    >>> sc.Shadow.cached(flood_threshold=1).flood_threshold
    1
    >>> sc.VM("16MiB", sc.Shadow.unsync()).mmu.design.name
    'unsync'
    """

    name: str = "cached"
    keep: bool = True
    pool_pages: int | None = 256
    min_free: int = 5
    refill: int = 25
    flood_threshold: int | None = 3
    flood_pages: bool = False
    flood_forget: int | None = None
    flood_reset: bool = False
    notpresent_marker: str = "never"
    update_in_place: bool = False
    prefetch: int | None = None
    lagging: bool = False
    prev_roots: int = 3
    release: str = "6.1"
    quirks: Quirk = Quirk.NONE
    policy: str = "fifo"
    uses: tuple[str, ...] = ("fault", "link", "cr3")
    recycle_children: bool = False
    policy_seed: int = 0
    decides: str = ""
    switching: bool = False
    nested_writes: int = 2
    nested_interval: int = 1 << 20
    nested_back: str = "scan"
    adapts: bool = False
    rules: tuple[str, ...] = RULES
    prices: str = "modern"

    def __post_init__(self) -> None:
        min_free, threshold = check_int("min_free", self.min_free, 0, POOL_MAX), self.flood_threshold
        lagging, forget, prefetch = check_bool("lagging", self.lagging), self.flood_forget, self.prefetch
        if prefetch is None:
            prefetch = 8 if lagging else 0
        _put(
            self,
            name=_check_text("name", self.name),
            keep=check_bool("keep", self.keep),
            pool_pages=None if self.pool_pages is None else check_int("pool_pages", self.pool_pages, 4, POOL_MAX),
            min_free=min_free,
            refill=check_int("refill", self.refill, min_free, POOL_MAX),
            flood_threshold=None if threshold is None else check_int("flood_threshold", threshold, 1, 1 << 31),
            flood_reset=check_bool("flood_reset", self.flood_reset),
            notpresent_marker=_check_marker(self.notpresent_marker),
            flood_pages=check_bool("flood_pages", self.flood_pages),
            flood_forget=None if forget is None else check_int("flood_forget", forget, 1, 1 << 31),
            update_in_place=check_bool("update_in_place", self.update_in_place),
            prefetch=check_int("prefetch", prefetch, 0, 32),
            lagging=lagging,
            prev_roots=check_int("prev_roots", self.prev_roots, 0, 16),
            release=_check_text("release", self.release),
            quirks=_quirks(self.quirks, Quirk.KVM_6_1 if self.lagging else Quirk.KVM_2007),
            policy=_check_policy(self.policy),
            uses=_check_names("uses", self.uses, USES),
            recycle_children=check_bool("recycle_children", self.recycle_children),
            policy_seed=check_int("policy_seed", self.policy_seed, 0, (1 << 64) - 1),
            decides="" if self.decides == "" else _check_plugin("decides", self.decides, plugins(Decisions)),
            switching=check_bool("switching", self.switching),
            nested_writes=check_int("nested_writes", self.nested_writes, 1, 255),
            nested_interval=check_int("nested_interval", self.nested_interval, 1, (1 << 63) - 1),
            nested_back=_check_way_back(self.nested_back),
            adapts=check_bool("adapts", self.adapts),
            rules=_check_names("rules", self.rules, RULES),
            prices=_check_text("prices", self.prices),
        )
        if self.adapts and (not self.lagging or self.decides):
            raise ConfigError("adapts: tables have to be lagging, and nobody else decides (decides)")
        if self.policy == "optimal":
            _put(self, uses=("walk",))
        if self.recycle_children and self.policy == "fifo" and self.quirks & Quirk.ROOT_EMPTIED:
            raise ConfigError("recycle_children: the quirk ROOT_EMPTIED has policy 'fifo' empty roots in use instead")
        if not self.keep and (self.policy != "fifo" or self.recycle_children):
            raise ConfigError(
                "policy, recycle_children: guest tables have to be shadowed (keep); `flush` recycles nothing"
            )
        if prefetch & (prefetch - 1):
            raise ConfigError(f"prefetch: {prefetch} is not 0, 1, 2, 4, 8, 16 or 32")
        self._check_following()
        if self.pool_pages is None and not self.lagging:
            raise ConfigError("pool_pages: a number is needed; None is for lagging tables")
        if self.release not in RELEASES:
            raise ConfigError(f"release: {self.release!r} is not one of {', '.join(RELEASES)}")
        if self.notpresent_marker != "never" and not self.keep:
            raise ConfigError("notpresent_marker: guest tables have to be write-protected (keep), or all markers lag")
        if self.notpresent_marker == "walk" and not self.lagging:
            raise ConfigError("notpresent_marker: 'walk' is for lagging tables; others have no page out of sync")
        if self.lagging and not self.keep:
            raise ConfigError("lagging: shadow tables have to belong to guest tables (keep)")
        if self.lagging and (self.flood_reset or self.flood_pages or (self.flood_threshold or 0) > 255):
            raise ConfigError(
                "flood_reset, flood_pages, flood_threshold: lagging tables count floods page by page, to 255 at most"
            )

    def _check_following(self) -> None:
        """Settings of all designs whose tables belong to guest tables."""
        asked = self.update_in_place or self.prefetch or self.flood_pages or self.flood_forget or self.decides
        if not self.keep and asked:
            raise ConfigError(
                "update_in_place, prefetch, flood_pages, flood_forget, decides: guest tables have to be shadowed (keep)"
            )
        roles = Quirk.ROLE_WITHOUT_ACCESS | Quirk.ROLE_WITHOUT_MODE
        if (self.update_in_place or (self.prefetch and not self.lagging)) and self.quirks & roles:
            raise ConfigError(
                "update_in_place, prefetch: leaves are made without a walk, by the role of their page, and with the "
                "quirks ROLE_WITHOUT_ACCESS and ROLE_WITHOUT_MODE it does not say which rights there are"
            )
        if self.flood_pages and self.flood_reset:
            raise ConfigError("flood_pages, flood_reset: a page's own count starts anew at each fault through it")
        if self.flood_pages and (self.flood_threshold or 0) > 255:
            raise ConfigError(f"flood_threshold: {self.flood_threshold}, and flood_pages counts to 255 at most")
        if self.switching:
            self._check_switching()
        if self.flood_forget is not None and not (self.flood_pages or self.lagging):
            raise ConfigError("flood_forget: pages have to have counts of their own (flood_pages, or lagging tables)")

    def _check_switching(self) -> None:
        if self.lagging or not self.keep:
            raise ConfigError("switching: shadow tables have to belong to guest tables (keep), none of which lags")
        if self.prefetch or self.flood_pages or self.update_in_place:
            raise ConfigError(
                "prefetch, flood_pages, update_in_place: not with tables that switch (`agile`); those that are stored "
                "to often have no shadow that these could be of"
            )
        if self.quirks & ~Quirk.IGNORED_BITS_REFUSED:
            raise ConfigError(f"quirks: of {self.quirks!r} a design whose tables switch has only IGNORED_BITS_REFUSED")

    def of_memory(self, frames: int) -> Shadow:
        """The same, with the pool that it has in a guest of so many frames."""
        return self if self.pool_pages is not None else replace(self, pool_pages=max(64, frames // 50))

    @property
    def engine(self) -> str:
        """The file of engine/designs in which it is made."""
        if self.switching:
            return "agile"
        if self.lagging:
            return "adaptive" if self.adapts else "unsync"
        return "cached" if self.keep else "flush"

    @classmethod
    def cached(cls, **settings: Any) -> Shadow:
        """The series: shadow tables survive CR3 loads, guest tables are write-protected, stores to them emulated."""
        return cls(**{"name": "cached", "keep": True, **settings})

    @classmethod
    def flush(cls, **settings: Any) -> Shadow:
        """Before the series (2.6.20-rc3): a CR3 load throws away every table with a non-global leaf.

        The baseline is measured as it was: a rights violation takes two exits, accessed bits are set early, and G
        counts without CR4.PGE. Pass quirks=Quirk.NONE for the same design without these.
        """
        quirks = Quirk.TWO_EXITS | Quirk.ACCESSED_EARLY | Quirk.GLOBAL_WITHOUT_PGE
        return cls(**{"name": "flush", "keep": False, "quirks": quirks, **settings})

    @classmethod
    def kvm_2007(cls, **settings: Any) -> Shadow:
        """`cached` with every quirk: exits, stores, zaps and structure of the real code of January 2007."""
        return cls(**{"name": "kvm-2007", "keep": True, "quirks": Quirk.KVM_2007, **settings})

    @classmethod
    def unsync(cls, **settings: Any) -> Shadow:
        """The shadow MMU of today: leaf tables of the guest run out of sync until it flushes, roots are kept,
        neighbours prefetched, leaves large where they can be. Defaults: Linux 6.1's, without its defects."""
        return cls(**{"name": "unsync", "lagging": True, "pool_pages": None, **settings})

    @classmethod
    def agile(cls, **settings: Any) -> Shadow:
        """`cached`, of whose guest tables those that are stored to often are walked by the processor itself, through
        the host's tables: Gandhi, Hill, Swift, "Agile Paging" (ISCA 2016). No processor does that so far."""
        return cls(**{"name": "agile", "switching": True, **settings})

    @classmethod
    def adaptive(cls, **settings: Any) -> Shadow:
        """`unsync`, in which each leaf table runs out of sync, has its stores emulated, or is zapped at a store, as its
        history says costs least; `Mmu.explain` says why."""
        return cls.unsync(**{"name": "adaptive", "adapts": True, "update_in_place": True, "prefetch": 16, **settings})

    @classmethod
    def kvm_6_1(cls, **settings: Any) -> Shadow:
        """`unsync` with the quirks of Linux 6.1: exits, stores, zaps and structure of its KVM."""
        return cls.unsync(**{"name": "kvm-6.1", "quirks": Quirk.KVM_6_1, **settings})

    @classmethod
    def kvm_6_12(cls, **settings: Any) -> Shadow:
        """The same of Linux 6.12, in which INVLPG makes no leaf."""
        return cls.kvm_6_1(**{"name": "kvm-6.12", "release": "6.12", **settings})


@dataclass(frozen=True)
class Nested:
    """Nested paging: the processor walks the guest's tables through the host's (EPT, NPT), which its own exits fill.

    name: what reports call this design.
    mmu: how the hypervisor keeps the host's tables. "tdp": KVM's TDP MMU, the default since 5.14: a fault maps one
        page, a dirty log splits large leaves at once. "direct": its older direct MMU: a fault maps what is there of the
        aligned group of 8 pages (PTE_PREFETCH_NUM), tables are shadow pages and recycled, a dirty log takes W from
        large leaves.
    levels: of the host's tables, 4 or 5. Four translate 48 bits of guest physical addresses.
    host_page_size: bytes that a leaf of the host's tables maps at most: 4096, 2 MiB or 1 GiB. A leaf is as large as
        that, the slot and the host's own pages under it allow.
    prefetch: entries of the aligned group that a fault fills: 0, or a power of two up to 32. None: as `mmu` does.
    pool_pages: tables at most. None: "tdp": what all of RAM takes in pages of 4 KiB, and 128 for devices; "direct": a
        fiftieth of the guest's frames, at least 64 (the kernel's rule). Where they run out "direct" recycles the
        oldest, "tdp" begins anew.
    min_free, refill: of "direct": as Shadow's.
    quirks: NONE, or of these: ACCESSED_EARLY, a processor that sets accessed bits on the way down, as real ones may do;
        IGNORED_BITS_REFUSED.

    >>> sc.VM("16MiB", sc.Nested(host_page_size="2MiB")).mmu.design.host_page_size
    2097152
    """

    name: str = "nested"
    mmu: str = "tdp"
    levels: int = 4
    host_page_size: int | str = 1 << 30
    prefetch: int | None = None
    pool_pages: int | None = None
    min_free: int = 5
    refill: int = 25
    quirks: Quirk = Quirk.NONE

    engine: ClassVar[str] = "nested"
    """The file of engine/designs in which it is made."""

    def __post_init__(self) -> None:
        min_free = check_int("min_free", self.min_free, 0, POOL_MAX)
        if not isinstance(self.mmu, str) or self.mmu not in HOST_MMUS:
            raise ConfigError(f"mmu: {self.mmu!r:.60} is not one of {', '.join(HOST_MMUS)}")
        prefetch = self.prefetch
        if prefetch is None:
            prefetch = 8 if self.mmu == "direct" else 0
        host = parse_size(self.host_page_size, "host_page_size")
        _put(
            self,
            name=_check_text("name", self.name),
            mmu=str.__str__(self.mmu),
            levels=check_int("levels", self.levels, 4, 5),
            host_page_size=host,
            prefetch=check_int("prefetch", prefetch, 0, 32),
            pool_pages=None if self.pool_pages is None else check_int("pool_pages", self.pool_pages, 8, POOL_MAX),
            min_free=min_free,
            refill=check_int("refill", self.refill, min_free, POOL_MAX),
            quirks=_quirks(self.quirks, Quirk.ACCESSED_EARLY | Quirk.IGNORED_BITS_REFUSED),
        )
        if host not in HOST_PAGES:
            raise ConfigError(f"host_page_size: {host} is not 4 KiB, 2 MiB or 1 GiB")
        if prefetch & (prefetch - 1):
            raise ConfigError(f"prefetch: {prefetch} is not 0, 1, 2, 4, 8, 16 or 32")
        if prefetch and self.mmu == "tdp":
            raise ConfigError("prefetch: the TDP MMU maps one page a fault; mmu='direct' has the setting")

    def of_memory(self, frames: int) -> Nested:
        """The same, with the pool that it has in a guest of so many frames."""
        if self.pool_pages is not None:
            return self
        return replace(self, pool_pages=max(64, frames // 50) if self.mmu == "direct" else frames // 511 + 128)

    @classmethod
    def kvm_6_1(cls, mmu: str = "tdp", **settings: Any) -> Nested:
        """Linux 6.1 with its TDP MMU ("tdp"), or with its older direct MMU ("direct", tdp_mmu=N): each exit, mapping,
        event and dirty log of its KVM. `Nested` itself does the same: there is nothing to correct."""
        return cls(**{"name": f"kvm-6.1-{mmu}", "mmu": mmu, **settings})


Design = Native | Shadow | Nested
"""Settings of any design."""
HOST_MMUS = ("tdp", "direct")
"""What `Nested.mmu` can be."""
DESIGNS: dict[str, Any] = {
    "native": Native,
    "flush": Shadow.flush,
    "cached": Shadow.cached,
    "unsync": Shadow.unsync,
    "adaptive": Shadow.adaptive,
    "kvm-2007": Shadow.kvm_2007,
    "kvm-6.1": Shadow.kvm_6_1,
    "kvm-6.12": Shadow.kvm_6_12,
    "nested": Nested,
    "kvm-6.1-tdp": Nested.kvm_6_1,
    "kvm-6.1-direct": partial(Nested.kvm_6_1, "direct"),
    "agile": Shadow.agile,
}
DEFAULT_DESIGNS = ("native", "flush", "cached", "unsync")
"""What is compared where nothing else is said: no hypervisor, and shadow paging before 2007, in 2007 and today."""


def design(mmu: str | Design, **settings: Any) -> Design:
    """The design by its name, or the given one; settings apply to names only."""
    if isinstance(mmu, Native):
        return taken(Native, mmu, "mmu")
    if isinstance(mmu, Nested):
        return taken(Nested, mmu, "mmu")
    if isinstance(mmu, Shadow):
        return taken(Shadow, mmu, "mmu")
    if not isinstance(mmu, str) or mmu not in DESIGNS:
        raise ConfigError(f"mmu: {mmu!r} is not one of {', '.join(DESIGNS)}, or a Native, Shadow or Nested object")
    made: Design = DESIGNS[mmu](**settings)
    return made


def _quirks(quirks: object, allowed: Quirk) -> Quirk:
    bits = operator.index(quirks) if isinstance(quirks, int) else -1
    if bits & ~int(Quirk.KVM_2007 | Quirk.KVM_6_1):
        raise ConfigError(f"quirks: {quirks!r} is not a combination of members of shadowcore.Quirk")
    if bits & ~int(allowed):
        raise ConfigError(f"quirks: of these {Quirk(bits)!r} the design has only {allowed!r}")
    return Quirk(bits)


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int within [low, high], or ConfigError that names the field.

    The result is a plain int, read once: whatever methods of its own `value` has, this is what was checked.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name}: an integer is needed, not {value!r}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise ConfigError(f"{name}: {value!r} is not {_limits(low, high)}")
    return number


def _limits(low: int, high: int) -> str:
    """What a number has to be, in words: a limit that nobody reaches says nothing to people."""
    if low == 0 and high >= (1 << 32) - 1 and high & (high + 1) == 0:
        return f"within {high.bit_length()} bits"
    return f"{low} or more" if high >= 1 << 48 else f"within {low} to {high}"


def taken(kind: type[T], given: object, name: str) -> T:
    """A settings object of exactly the class `kind`, of the fields of `given`, each read once and checked again;
    ConfigError if it is none. A subclass, or a frozen object that was changed after all, has no other way in."""
    if not isinstance(given, kind):
        raise ConfigError(f"{name}: a {kind.__name__} object is needed, not {given!r:.60}")
    made: dict[str, Any] = {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.init:
            made[each.name] = getattr(given, each.name)
    return kind(**made)


def _put(settings: object, **values: object) -> None:
    """Put checked values in the place of those that a frozen object was made of."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def check_bool(name: str, value: object) -> bool:
    """A bool of a bool, of numpy's, or of 0 or 1."""
    if isinstance(value, int) and operator.index(value) in (0, 1):
        return bool(operator.index(value))
    numpy = sys.modules.get("numpy")  # whoever has a bool of numpy's has imported it
    if numpy is not None and isinstance(value, numpy.bool_):
        return bool(value)
    raise ConfigError(f"{name}: True or False is needed, not {value!r:.60}")


def _check_policy(value: object) -> str:
    """One of POLICIES, or of another package."""
    if isinstance(value, str) and value in POLICIES:
        return str.__str__(value)
    return _check_plugin("policy", value, [*POLICIES, *plugins(Policy)])


def _check_plugin(name: str, value: object, known: list[str]) -> str:
    if isinstance(value, str) and value in known:
        return str.__str__(value)
    near = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known) or 'none'}"
    raise ConfigError(f"{name}: there is no {value!r:.60}{hint}")


def _check_names(field: str, value: object, known: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the known names, in their order; as a text they are joined by +, and "none" is none of them."""
    names = value.split("+") if isinstance(value, str) else value
    if names is None or names == ["none"]:
        names = ()
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{field}: some of {', '.join(known)} are needed, not {value!r:.60}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise ConfigError(f"{field}: there is no {name!r:.60}{hint}")
    return tuple(name for name in known if name in names)


def _check_way_back(value: object) -> str:
    if not isinstance(value, str) or value not in WAYS_BACK:
        raise ConfigError(f"nested_back: {value!r:.60} is not one of {', '.join(WAYS_BACK)}")
    return str.__str__(value)


def _check_marker(value: object) -> str:
    """One of MARKERS, by its name or by a bool."""
    if not isinstance(value, str):
        return MARKERS[check_bool("notpresent_marker", value)]
    if value not in MARKERS:
        raise ConfigError(f"notpresent_marker: {value!r} is not true, false, {', '.join(MARKERS)}")
    return str.__str__(value)


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: a text is needed, not {value!r:.60}")
    return str.__str__(value)


def check_backing(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in BACKINGS:
        raise ConfigError(f"{name}: {value!r:.60} is not one of {', '.join(BACKINGS)}")
    return BACKINGS[BACKINGS.index(value)]


def check_ints(name: str, values: object, count: int, high: int) -> list[int]:
    """`values`, a list or tuple, as `count` ints within [0, high], or ConfigError that names the field."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ConfigError(f"{name}: a list of {count} numbers is needed, not {values!r:.60}")
    return [check_int(name, value, 0, high) for value in values]


def parse_count(text: str) -> int | None:
    """A count from a text: digits, `_` between them, 1e6, 2.5M; K, M, G and T are thousands. None if it is none, or has
    parts of one."""
    match = _COUNT.fullmatch(text.strip())
    if match is None or len(match[1]) > 40:
        return None
    whole, part, power, letter = match.groups("")
    digits = whole.replace("_", "") + part
    scaled = int(digits) * 10 ** int(power or 0) * _THOUSANDS[letter.lower()]
    number, rest = divmod(scaled, 10 ** len(part))
    return None if rest else number


def parse_size(size: object, name: str = "memory") -> int:
    """Bytes from an int or a text such as "64MiB", "64M" or "64MB", which are the same; a positive multiple of 4096."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]{1,19})\s*([A-Za-z]*)\s*", size)
        unit = None if match is None else _UNITS.get(match[2].lower())
        if match is None or unit is None:
            raise ConfigError(f"{name}: {size!r} is not a size such as 67108864, '64MiB' or '4G'")
        size = int(match[1]) * unit
    number = check_int(name, size, PAGE_SIZE, 1 << 52)
    if number % PAGE_SIZE:
        raise ConfigError(f"{name}: {number} bytes is not a multiple of 4096")
    return number
