"""What counters come to in cycles: a stated, simple model, with presets whose numbers have sources.

Every term is a count times a price. What the model leaves out: overlap of a walk with other work, the caches that a
hypervisor's handlers displace, and everything that is not memory virtualization (interrupts, devices).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from .. import notebook
from ..config import TLB
from ..errors import ConfigError
from .counters import PF_REASONS
from .levels import LEVELS, Levels, find_levels
from .presets import find_preset

COMPONENTS = {
    "work": "the guest's own instructions",
    "translation": "TLB misses: the processor's walks",
    "guest": "the guest's CR3 loads, INVLPGs and faults, as without a hypervisor",
    "switches": "exits and entries, by the processor",
    "outer": "an outer hypervisor, which carries exits to the guest's own",
    "dispatch": "the hypervisor's way from an exit to its handler and back",
    "faults": "handlers of shadow page faults, and faults passed on to the guest",
    "backing": "pages that the host has to find at their first touch",
    "emulation": "stores to guest tables, decoded and carried out",
    "registers": "handlers of CR0, CR3, CR4, EFER loads and INVLPG",
    "pages": "shadow pages made and zapped, entries linked and unlinked",
}
"""Parts of a CostBreakdown."""
_OF_EXITS = tuple(COMPONENTS)[3:]
"""Those that there are because of exits."""
UNPRICED = {
    "synced": (512, "syncs of leaf tables"),
    "prefetched": (1, "reads of guest entries to prefetch"),
}
"""Counters of design `unsync` for which no price is published: entries looked at for each, and what they are called."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Prices, in cycles where nothing else is said. `Costs.preset` has those with sources (`shadowcore costs`).

    name: what reports call it. clock_ghz: cycles per nanosecond. sources: where a price comes from, by its name.

    The guest at work:

    instruction: each of its instructions; used where they were counted (recordings).
    access: each operation of its processor with the instructions around it; used elsewhere (workloads).
    cr3_load, invlpg: such an instruction, where it does not exit.
    guest_fault: a fault of the guest's own, from the instruction to its handler and back; what that does is work.

    Translation. tlb: the TLB that a study of a workload models. A miss costs tlb_miss, and for each entry read on the
    way: an entry above the last one comes from the paging-structure caches or L1 (upper_reference); the last one is
    found in L1, L2, the last cache or memory with the likelihoods leaf_shares, after leaf_latencies cycles.

    An exit. levels: what lies below the guest, a Levels or the name of one: how many changes of world an exit takes,
    and how many exits to an outer hypervisor. exit_fault, exit_register, exit_invlpg: two changes of world, out of the
    guest and back, for page faults (MMIO included), register loads, INVLPG. dispatch: the part of the guest's
    hypervisor that every exit has. outer_exit: what an outer hypervisor does at each exit to it that only carries one
    to the inner hypervisor, or back.

    Handlers. fill: a shadow entry made. rights: a leaf that gets more rights. inject: a fault passed on to the guest.
    mmio: a device access handed out. emulate: a store decoded and carried out. register: a load of a control register
    (roots looked up). flush_page: INVLPG. guest_reference: a guest entry read on the way. page_new, page_zap: a shadow
    page made (cleared), zapped. entry: a shadow entry linked or unlinked (reverse map). violation: an EPT violation,
    whose entry is made. first_touch, first_touch_large: a page of 4 KiB, of 2 MiB, that a host has to find first,
    beside the handler. Where that host is a guest, an outer one that has to find its pages takes an exit and
    `violation` more.

    Nobody has published what the steps of design `unsync` cost one by one, so they have no prices of their own. A
    leaf table goes unsync within the exit of the first store to it (`rights` or `fill`); the marks in the tables above
    it are left out. A sync costs `entry` for each shadow entry that it makes or drops; the comparison of the table with
    the guest's, of 512 entries at most, is left out. So is reading the guest's entry for one that is prefetched;
    linking it costs `entry`. A CR3 load for which a previous root serves costs `register`, as if the root were looked
    up. A spurious fault costs what any fault does. What is left out is told beside each total: CostBreakdown.unpriced.

    >>> costs = sc.Costs.preset("modern")
    >>> costs.name
    'kvm-2023-8269cy'
    >>> costs.replace(dispatch=800).of({"accesses": 1, "exits_cr3": 1}).components["dispatch"]
    800.0
    """

    name: str
    clock_ghz: float
    instruction: float
    access: float
    cr3_load: float
    invlpg: float
    guest_fault: float
    tlb_miss: float
    upper_reference: float
    leaf_shares: tuple[float, float, float, float]
    leaf_latencies: tuple[float, float, float, float]
    exit_fault: float
    exit_register: float
    exit_invlpg: float
    dispatch: float
    fill: float
    rights: float
    inject: float
    mmio: float
    emulate: float
    register: float
    flush_page: float
    guest_reference: float
    page_new: float
    page_zap: float
    entry: float
    outer_exit: float = 0.0
    violation: float = 0.0
    first_touch: float = 0.0
    first_touch_large: float = 0.0
    levels: Levels = LEVELS["shadow"]
    tlb: TLB = dataclasses.field(default_factory=TLB)
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"costs.name: a text is needed, not {self.name!r:.60}")
        if not isinstance(self.tlb, TLB):
            raise ConfigError(f"costs.tlb: a TLB object is needed, not {self.tlb!r:.60}")
        object.__setattr__(self, "levels", find_levels(self.levels))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("leaf_shares", "leaf_latencies"):
                four = tuple(value) if isinstance(value, (tuple, list)) else ()
                if len(four) != 4:
                    where = "L1, L2, last cache, memory"
                    raise ConfigError(f"costs.{field.name}: four numbers ({where}) are needed, not {value!r:.60}")
                checked = tuple(_price(f"costs.{field.name}", number) for number in four)
                object.__setattr__(self, field.name, checked)
            elif field.name not in ("name", "tlb", "levels", "sources"):
                object.__setattr__(self, field.name, _price(f"costs.{field.name}", value))
        if not 0.01 <= self.clock_ghz <= 1000:
            raise ConfigError(f"costs.clock_ghz: {self.clock_ghz!r} is not within 0.01 to 1000")
        if not math.isclose(sum(self.leaf_shares), 1, abs_tol=1e-6):
            raise ConfigError(f"costs.leaf_shares: {self.leaf_shares!r} do not add up to 1")
        object.__setattr__(self, "sources", dict(self.sources))

    @property
    def leaf_reference(self) -> float:
        """Mean cycles until the last entry of a walk is there."""
        return sum(share * wait for share, wait in zip(self.leaf_shares, self.leaf_latencies, strict=True))

    @property
    def switches(self) -> float:
        """Of an exit: pairs of changes of world, each at the price of its kind."""
        return self.levels.counts(exits=1)[0] / 2

    @property
    def carried(self) -> float:
        """Cycles of an exit that an outer hypervisor takes."""
        return self.levels.counts(exits=1)[1] * self.outer_exit

    @property
    def backed(self) -> float:
        """Cycles of an exit to an outer host for a page that it has to find, but for the page itself."""
        return self.levels.counts(backed=1)[0] / 2 * self.exit_fault + self.dispatch + self.violation

    def _found(self, pages: int, large: int) -> float:
        """Pages that a host found; large: of these, those of 2 MiB."""
        return (pages - min(large, pages)) * self.first_touch + min(large, pages) * self.first_touch_large

    def violations(self, count: int, tables: int = 0) -> dict[str, float]:
        """Cycles of so many EPT violations, for which the hypervisor made so many tables, by component.

        Of the exits to an outer hypervisor two carry the violation to the inner one and back; in the others it does
        something itself: an entry made in the tables that the processor walks, a store to a table emulated. Leaf tables
        of the inner hypervisor are out of sync, so that only the tables above them count.
        """
        made = tables if self.levels.nested else 0
        switches, outer = self.levels.counts(violations=count, tables=made)
        passed = count * (2 if self.levels.nested else 0)
        filled = outer - passed - self.levels.counts(tables=made)[1]
        own = filled * (self.dispatch + self.violation) + (outer - passed - filled) * (self.dispatch + self.emulate)
        return {
            "switches": switches / 2 * self.exit_fault,
            "outer": passed * self.outer_exit + own,
            "dispatch": count * self.dispatch,
            "faults": count * self.violation,
        }

    def replace(self, **changes: Any) -> Costs:
        """The same with some fields changed. ConfigError for one that there is not."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"costs: there is no {name!r}; there are {', '.join(known)}")
        mine = {name: "set by the caller" for name in changes if name not in ("name", "tlb", "levels", "sources")}
        return dataclasses.replace(self, **{"sources": self.sources | mine, **changes})

    def as_dict(self) -> dict[str, Any]:
        """All fields in plain types."""
        plain = dataclasses.asdict(self)
        return plain | {name: list(plain[name]) for name in ("leaf_shares", "leaf_latencies")}

    @classmethod
    def preset(cls, name: str) -> Costs:
        """The prices of that name (PRESETS, ALIASES), each with its source. ConfigError, with the nearest name, for
        another."""
        preset = find_preset(name)
        prices: dict[str, Any] = {field: value for field, (value, _) in preset.prices.items()}
        sources = {field: source for field, (_, source) in preset.prices.items()}
        return cls(name=preset.name, levels=LEVELS[preset.levels], tlb=preset.tlb, sources=sources, **prices)

    @classmethod
    def core2007(cls) -> Costs:
        """An Intel Core 2 (Merom) with KVM as of January 2007: the preset "core2007"."""
        return cls.preset("core2007")

    @classmethod
    def modern(cls) -> Costs:
        """Hardware exits, one hypervisor, shadow tables: what the alias "modern" stands for."""
        return cls.preset("modern")

    @classmethod
    def pvm(cls) -> Costs:
        """Guests in user mode, no hardware exits: what the alias "pvm" stands for."""
        return cls.preset("pvm")

    @classmethod
    def nested(cls) -> Costs:
        """Shadow tables of a hypervisor that is itself a guest: what the alias "nested" stands for."""
        return cls.preset("nested")

    def of(self, counters: Mapping[str, int], native_counters: Mapping[str, int] | None = None) -> CostBreakdown:
        """Cycles of a run by component.

        counters: of VM.stats (as a dict), and, as far as they are known, of the guest: `instructions`, `operations`,
        `guest_cr3_loads`, `guest_invlpg`, `guest_faults`. Without the latter, accesses are its work. With
        native_counters, of the same run natively, the result has a slow-down.

        Where no TLB was modelled (neither hits nor misses), every access counts as a miss: right for recordings, whose
        accesses are those that missed.
        """
        count = _checked("counters", counters)
        parts = self._parts(count)
        native = None
        if native_counters is not None:
            native = sum(self._parts(_checked("native_counters", native_counters)).values())
        unpriced = {name: count(name) * entries * self.guest_reference for name, (entries, _) in UNPRICED.items()}
        missing = {name: cycles for name, cycles in unpriced.items() if cycles}
        return CostBreakdown(self.name, self.clock_ghz, parts, native, missing, exits=self._exits(count, parts))

    def _exits(self, n: Callable[..., int], parts: Mapping[str, float]) -> dict[str, float]:
        """The components from switches on by reason of the exit: see CostBreakdown.exits."""
        violations = n("npf_violation") if self.levels.paging == "ept" else 0
        own = {
            "fill": self.fill,
            "write": self.rights,
            "emulate": self.emulate,
            "guest": self.inject,
            "mmio": self.mmio,
        }
        each = self.carried + self.dispatch
        fault = self.exit_fault * self.switches + each
        if violations:
            second = sum(self.violations(violations, n("mmu_cache_miss")).values()) / violations
            own["fill"] = own["write"] = second - fault
        found = {reason: n(f"exits_{reason}") * (fault + own[reason]) for reason in PF_REASONS}
        register = self.exit_register * self.switches + each + self.register
        found |= {reason: n(f"exits_{reason}") * register for reason in ("cr3", "cr0", "cr4", "efer")}
        found["invlpg"] = n("exits_invlpg") * (self.exit_invlpg * self.switches + each + self.flush_page)
        return found | {"rest": sum(parts[part] for part in _OF_EXITS) - sum(found.values())}

    def _parts(self, n: Callable[..., int]) -> dict[str, float]:
        instructions = n("instructions")
        work = instructions * self.instruction if instructions else n("operations", n("accesses")) * self.access
        misses = n("tlb_misses") if n("tlb_hits") or n("tlb_misses") else n("accesses")
        references = n("walk_references")
        leaves = min(misses, references)
        cr3_exits, invlpg_exits = n("exits_cr3"), n("exits_invlpg")
        registers = cr3_exits + n("exits_cr0") + n("exits_cr4") + n("exits_efer")
        page_faults = sum(n(f"exits_{reason}") for reason in PF_REASONS)
        # Exits of nested paging are among the page faults, by their reasons; with levels that have EPT they have prices
        # of their own, else those of page faults.
        ept = self.levels.paging == "ept"
        violations, devices = (n("npf_violation"), n("npf_misconfig")) if ept else (0, 0)
        fills, writes = (0, 0) if violations else (n("exits_fill"), n("exits_write"))
        page_faults = max(page_faults - violations - devices, 0)
        exits = page_faults + registers + invlpg_exits + devices
        hardware = (
            (page_faults + devices) * self.exit_fault + registers * self.exit_register + invlpg_exits * self.exit_invlpg
        )
        second = self.violations(violations, n("mmu_cache_miss") if ept else 0)
        return {
            "work": work,
            "translation": misses * self.tlb_miss
            + (references - leaves) * self.upper_reference
            + leaves * self.leaf_reference,
            "guest": max(n("guest_cr3_loads", cr3_exits) - cr3_exits, 0) * self.cr3_load
            + max(n("guest_invlpg", n("invlpg", invlpg_exits)) - invlpg_exits, 0) * self.invlpg
            + n("guest_faults", n("exits_guest")) * self.guest_fault,
            "switches": hardware * self.switches + second["switches"],
            "outer": exits * self.carried + second["outer"],
            "dispatch": exits * self.dispatch + second["dispatch"],
            "faults": fills * self.fill
            + writes * self.rights
            + n("exits_guest") * self.inject
            + max(n("exits_mmio"), devices) * self.mmio
            + second["faults"]
            + n("guest_walk_references") * self.guest_reference,
            "backing": self._found(n("host_faults"), n("host_faults_large"))
            + self._found(n("outer_faults"), n("outer_faults_large"))
            + n("outer_faults") * self.backed,
            "emulation": n("pf_emulate") * self.emulate,
            "registers": registers * self.register + invlpg_exits * self.flush_page,
            "pages": n("mmu_cache_miss") * self.page_new
            + n("mmu_shadow_zapped") * self.page_zap
            + (n("spte_installed") + n("spte_removed")) * self.entry,
        }


def left_out(unpriced: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence on what totals leave out, from CostBreakdown.unpriced by design; nothing where that is nothing."""
    told = []
    for name, cycles in unpriced.items():
        if cycles:
            parts = " and ".join(f"{cycles[key] / 1e6:,.1f} for {UNPRICED[key][1]}" for key in cycles)
            told.append(f"{name} {parts}")
    if not told:
        return ""
    return (
        "Not in the cycles, as no price is published; millions, if each entry looked at cost `guest_reference`: "
        f"{'; '.join(told)}."
    )


@dataclasses.dataclass(frozen=True)
class CostBreakdown:
    """Cycles of a run: `components` by name (COMPONENTS), `total`, `microseconds`, and `slow_down` against native (None
    where that is not known). costs, clock_ghz: of the prices. base: native of what, where not of the same guest.

    unpriced: cycles that are not in the total, by what for (UNPRICED): no price is published, and these are what it
    would come to if each entry looked at cost `guest_reference`. A sync is taken to look at all 512.

    exits: what exits cost by reason ("fill", "cr3", ...): changes of world, the way to the handler and back, and what
    the handler does at every such exit. What depends on what it finds (guest entries read, shadow pages made and
    zapped, entries linked, pages of the host, stores emulated at other exits) counters do not tell by reason: it is
    under "rest". All together are the components from `switches` on.

    >>> cost = sc.Costs.modern().of({"accesses": 1000, "exits_cr3": 2})
    >>> cost.total == sum(cost.components.values())
    True
    >>> cost.exits["cr3"]
    5075.0
    """

    costs: str
    clock_ghz: float
    components: dict[str, float]
    native_total: float | None = None
    unpriced: dict[str, float] = dataclasses.field(default_factory=dict)
    base: str | None = None
    exits: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> float:
        """Cycles."""
        return sum(self.components.values())

    @property
    def microseconds(self) -> float:
        """The total at `clock_ghz`."""
        return self.total / self.clock_ghz / 1000

    @property
    def slow_down(self) -> float | None:
        """The total by that of `native` for the same work; None where that is not known."""
        return self.total / self.native_total if self.native_total else None

    def _repr_html_(self) -> str:
        rows = [(name, f"{cycles:,.0f}") for name, cycles in self.components.items() if cycles]
        rows.append(("cycles, estimated", f"{self.total:,.0f}"))
        rows += [] if self.slow_down is None else [("slow-down against native", f"{self.slow_down:.3f}")]
        return notebook.table(f"prices {self.costs}", ("", "cycles"), rows)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        return {
            "costs": self.costs,
            "clock_ghz": self.clock_ghz,
            "cycles": self.total,
            "cycles_by_component": dict(self.components),
            "cycles_unpriced": dict(self.unpriced),
            "cycles_by_exit": dict(self.exits),
            "microseconds": self.microseconds,
            "slow_down": self.slow_down,
            "slow_down_against": None if self.slow_down is None else "native" + (f", {self.base}" if self.base else ""),
        }


def _price(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: a number is needed, not {value!r:.60}")
    if not 0 <= value <= 1e12:
        raise ConfigError(f"{name}: {value!r} is not within 0 to 1e12")
    return float(value)


def _checked(what: str, counters: Mapping[str, int]) -> Callable[..., int]:
    """A function that gives counters by name, with a default of 0, or what is given."""
    if not isinstance(counters, Mapping):
        raise ConfigError(f"{what}: a mapping of names to counts is needed, not {counters!r:.60}")
    if "accesses" not in counters and "instructions" not in counters and "operations" not in counters:
        raise ConfigError(f"{what}: 'accesses', 'operations' or 'instructions' is needed: nothing says what was done")

    def count(name: str, default: int = 0) -> int:
        value = counters.get(name, default)
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if number < 0:
            raise ConfigError(f"{what}[{name!r}]: a count is needed, not {value!r:.60}")
        return number

    return count


def find(costs: Costs | str) -> Costs:
    """The preset of that name, or the given Costs. ConfigError for another."""
    return costs if isinstance(costs, Costs) else Costs.preset(costs)
