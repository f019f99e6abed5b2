"""Prices with their sources, by name: source and year, and the processor that was measured.

A price that no source has says "assumed", and what of. Times are published, cycles are times by the clock.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from ..config import TLB
from ..errors import ConfigError

Price = float | tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Prices of a machine: name; machine: what was measured; levels: the name of what lies below the guest; tlb: the
    one that is modelled; prices: field of Costs -> (cycles, source)."""

    name: str
    machine: str
    levels: str
    tlb: TLB
    prices: Mapping[str, tuple[Price, str]]

    def but(self, name: str, machine: str, levels: str, **prices: tuple[Price, str]) -> Preset:
        """Another one that differs in some prices."""
        return Preset(name, machine, levels, self.tlb, {**self.prices, **prices})


CORE2007_ACCESS = 72.05
CORE2007_DISPATCH = 11972.6
"""Calibrated on two figures of January 2007 (docs/reproduction.md). A test repeats the calibration."""

_KVM_2007 = "KVM's C code of 2007 run warm in user space (docs/performance.md)"
_HALF = "assumed: access / 2.5, as two in five instructions load or store"
_CORE2007 = Preset(
    "core2007",
    "Intel Core 2 (Merom), KVM of January 2007, no VPID",
    "shadow",
    # Intel's optimization manual, Core microarchitecture.
    TLB(small_entries=256, small_ways=4, large_entries=32, large_ways=4, huge_entries=0, huge_ways=1),
    {
        "clock_ghz": (
            2.66,
            "the Core 2 Duo of Adams and Agesen (ASPLOS 2006); that of the figures of 2007 is not known",
        ),
        "instruction": (CORE2007_ACCESS / 2.5, _HALF),
        "access": (CORE2007_ACCESS, "calibrated: 2-task context switch, native (Molnar, 5 January 2007)"),
        "cr3_load": (
            150,
            "assumed: of the order of instruction tables of the time; the TLB's refill is counted as misses",
        ),
        "invlpg": (150, "assumed: as cr3_load"),
        "guest_fault": (1000, "assumed: about what a page fault took natively"),
        "tlb_miss": (5, "assumed"),
        "upper_reference": (3, "assumed: L1"),
        "leaf_shares": ((0.5, 0.4, 0.0, 0.1), "assumed: tables of a small working set lie in L1 and L2"),
        "leaf_latencies": ((3, 14, 14, 200), "L1 and L2 of a Merom; there is no third level; memory is assumed"),
        "exit_fault": (1579, "Agesen et al., USENIX ATC 2012, table 1: exit and entry of a Merom"),
        "exit_register": (1579, "as exit_fault"),
        "exit_invlpg": (1579, "as exit_fault"),
        "dispatch": (
            CORE2007_DISPATCH,
            "calibrated: 2-task context switch, caching (Molnar, 5 January 2007); MSRs and FPU are saved each time",
        ),
        "fill": (90, f"{_KVM_2007}, 32-bit guest, at 3 cycles a nanosecond"),
        "rights": (55, "as fill"),
        "inject": (200, "assumed: of the order of a fill"),
        "mmio": (200, "assumed: of the order of a fill"),
        "emulate": (150, "as fill"),
        "register": (100, "as fill"),
        "flush_page": (60, "assumed: of the order of a fill"),
        "guest_reference": (4, "as fill"),
        "page_new": (150, "as fill"),
        "page_zap": (200, "as fill"),
        "entry": (6, "as fill"),
    },
)

_PVM = "PVM (Huang et al., SOSP 2023)"
_T1 = f"{_PVM}, table 1"
_T2 = f"{_PVM}, table 2"
_BOX = "shadowbox (github.com/aledbf/shadowbox, docs/TUNING-LOG.md, 2026)"
_CLOCK = 2.5
REFLECTED = (1316 + 1688) / 2
FIXED = (1472 + 1952) / 2
WALK = (100 + 200) / 2
"""Nanoseconds of the host for a fault that shadowbox passes on, for one that it fixes, and what of the former are the
guest's walk and the MMU: the middles of the ranges that the log gives."""


def _cycles(microseconds: float, clock: float = _CLOCK) -> float:
    return round(microseconds * 1000 * clock, 1)


_REFERENCE = 18
_LOOKUP = 4 * _REFERENCE
"""Of the guest's walk, which is counted apart from the handler that it is part of."""
_EXIT = _cycles(2 * 0.105)
_DISPATCH = _cycles(0.46) - _EXIT
_INJECT = _cycles(1.66 - 0.46)
_FILL = round(_INJECT * FIXED / REFLECTED)
_TOUCH = _cycles(2.93 - 0.46) - _FILL
_OUTER = (_cycles(7.43) - 2 * _EXIT - _DISPATCH) / 2
_CLEARED = (2 << 20) / 10e9 * 1e6
"""Microseconds in which 2 MiB are cleared."""
_FOURFOLD = (
    f"{_KVM_2007}, 64-bit guest, at 2.5 cycles a nanosecond; assumed: four times, for locks, notifiers, cold caches"
)
_FIRECRACKER = "Firecracker, PR 4820: 2.93 µs of the host for a first touch of anonymous memory"

_WALKED = "; less four guest_references"

_KVM_2023 = Preset(
    "kvm-2023-8269cy",
    "Xeon Platinum 8269CY, Linux 4.19, hardware exits",
    "shadow",
    # The second level of Skylake-SP: CPUID leaf 2 (InstLatx64); small and large pages apart here.
    TLB(small_entries=1536, small_ways=12, large_entries=1536, large_ways=12, huge_entries=16, huge_ways=4),
    {
        "clock_ghz": (_CLOCK, f"{_PVM}: 2.5 GHz"),
        "instruction": (0.7, "assumed: 1.4 instructions a cycle, of server workloads"),
        "access": (1.75, "assumed: 2.5 instructions"),
        "cr3_load": (_cycles(0.22 - 0.06) / 2, f"{_T2}, kvm-ept: getpid with KPTI less that without, by two"),
        "invlpg": (260, "I. Molnar, measured in 2015 (thread of Linux commit a5102476a24b)"),
        "guest_fault": (900, "assumed: of the order of lmbench's protection faults"),
        "tlb_miss": (7, "assumed"),
        "upper_reference": (1, "DMT (ASPLOS 2024), artifact: the paging-structure caches"),
        "leaf_shares": ((0.3, 0.35, 0.25, 0.1), "assumed: leaf entries are mostly in L2 or beyond"),
        "leaf_latencies": ((4, 14, 54, 200), "DMT (ASPLOS 2024), artifact: L1, L2, last cache, memory"),
        "exit_fault": (_EXIT, f"{_PVM}: two switches of 0.105 µs, single-level hardware"),
        "exit_register": (_EXIT, "as exit_fault"),
        "exit_invlpg": (_EXIT, "as exit_fault"),
        "dispatch": (_DISPATCH, f"{_T1}, kvm BM: a hypercall of 0.46 µs, less exit_fault"),
        "inject": (_INJECT - _LOOKUP, f"{_T1}, kvm BM: an exception passed on, 1.66 µs, less a hypercall{_WALKED}"),
        "fill": (_FILL - _LOOKUP, f"inject, by the ratio of fixed to reflected faults in {_BOX}: 1.14{_WALKED}"),
        "rights": (_FILL - _LOOKUP, "assumed: as fill"),
        "mmio": (_cycles(3.79 - 0.46), f"{_T1}, kvm BM: PIO to user space, less a hypercall"),
        "emulate": (_INJECT + 780, f"assumed: inject, and a store's emulation: {_FOURFOLD}"),
        "register": (_cycles((2.09 - 0.06) / 2 - 0.46), f"{_T2}, kvm-spt: two CR3 exits a getpid, less two hypercalls"),
        "flush_page": (_cycles((2.09 - 0.06) / 2 - 0.46), "assumed: as register"),
        "guest_reference": (_REFERENCE, _FOURFOLD),
        "page_new": (520, _FOURFOLD),
        "page_zap": (600, _FOURFOLD),
        "entry": (20, _FOURFOLD),
        "outer_exit": (_OUTER, f"{_T1}, kvm NST: a hypercall of 7.43 µs, less four switches and dispatch, by two"),
        "violation": (_FILL, "assumed: as fill, with its walk"),
        "first_touch": (_TOUCH, f"{_FIRECRACKER}; less a hypercall and violation"),
        "first_touch_large": (_TOUCH + _cycles(_CLEARED), "assumed: first_touch, and 2 MiB cleared at 10 GB a second"),
    },
)

_NESTED_2023 = _KVM_2023.but(
    "nested-2023-8269cy",
    "Xeon Platinum 8269CY, Linux 4.19 in a VM, hardware exits",
    "shadow-on-ept",
    inject=(
        _cycles(9.20 - 7.43) - _LOOKUP,
        f"{_T1}, kvm NST: an exception passed on, 9.20 µs, less a hypercall{_WALKED}",
    ),
    mmio=(_cycles(29.34 - 7.43), f"{_T1}, kvm NST: PIO to user space, less a hypercall"),
)

_PVM_EXIT = _cycles(2 * 0.179)
_PVM_INJECT = _cycles(1.67 - 0.54)
_PVM_FILL = round(_PVM_INJECT * FIXED / REFLECTED)
_PVM_2023 = _KVM_2023.but(
    "pvm-2023-8269cy",
    "Xeon Platinum 8269CY, Linux 4.19, guests in user mode",
    "pvm",
    exit_fault=(_PVM_EXIT, f"{_PVM}: two switches of 0.179 µs"),
    exit_register=(_PVM_EXIT, "as exit_fault"),
    exit_invlpg=(_PVM_EXIT, "as exit_fault"),
    dispatch=(_cycles(0.54) - _PVM_EXIT, f"{_T1}, pvm BM: a hypercall of 0.54 µs, less exit_fault"),
    inject=(_PVM_INJECT - _LOOKUP, f"{_T1}, pvm BM: an exception passed on, 1.67 µs, less a hypercall{_WALKED}"),
    fill=(_PVM_FILL - _LOOKUP, f"inject, by the ratio of fixed to reflected faults in {_BOX}: 1.14{_WALKED}"),
    rights=(_PVM_FILL - _LOOKUP, "assumed: as fill"),
    mmio=(_cycles(4.91 - 0.54), f"{_T1}, pvm BM: PIO to user space, less a hypercall"),
    emulate=(_PVM_INJECT + 780, f"assumed: inject, and a store's emulation: {_FOURFOLD}"),
    register=(_KVM_2023.prices["register"][0], "assumed: as in kvm-2023-8269cy, whose code it is"),
    flush_page=(_KVM_2023.prices["flush_page"][0], "assumed: as register"),
    outer_exit=(0, "no exit goes to the outer hypervisor"),
)

_FAST = 5.0


def _fast(nanoseconds: float) -> float:
    return round(nanoseconds * _FAST, 1)


_FAST_FILL = _fast(FIXED - REFLECTED + WALK)
_OF_ANOTHER = "of another machine, in nanoseconds: "
_PVM_2026 = Preset(
    "pvm-2026-13900hk",
    "Core i9-13900HK, Linux 7.3 in a VM, guests in user mode",
    "pvm-on-ept",
    # The second level of Golden Cove: CPUID leaf 18h (InstLatx64); pages of 4 KiB use both halves.
    TLB(small_entries=2048, small_ways=16, large_entries=1024, large_ways=8, huge_entries=1024, huge_ways=8),
    {
        **_KVM_2023.prices,
        "clock_ghz": (_FAST, "assumed: between nominal 2.6 and turbo 5.4; only times are published"),
        "cr3_load": (_fast((174.0 - 67.7) / 2), f"{_BOX}: getpid under KVM with pti=on less pti=off, by two"),
        "leaf_latencies": ((5, 15, 70, 296), "Golden Cove (InstLatx64, 12900K): L1, L2, last cache, memory"),
        "exit_fault": (894, f"{_PVM}: 447 cycles one way; assumed: the same cycles here"),
        "exit_register": (894, "as exit_fault"),
        "exit_invlpg": (894, "as exit_fault"),
        "dispatch": (
            _fast(REFLECTED - WALK),
            f"{_BOX}: 1316 to 1688 ns of a reflected fault, less 100 to 200 for its walk",
        ),
        "inject": (_fast(WALK) - _LOOKUP, f"{_BOX}: 100 to 200 ns are the guest's walk and the MMU{_WALKED}"),
        "fill": (_FAST_FILL - _LOOKUP, f"{_BOX}: 1472 to 1952 ns of a fixed fault, less dispatch{_WALKED}"),
        "rights": (_FAST_FILL - _LOOKUP, "assumed: as fill"),
        "mmio": (_fast(4910 - 540), _OF_ANOTHER + f"{_T1}, pvm BM: PIO to user space, less a hypercall"),
        "emulate": (_fast(WALK + 780 / 2.5), f"assumed: inject, and a store's emulation: {_FOURFOLD}"),
        "register": (_fast(WALK), "assumed: as inject"),
        "flush_page": (_fast(WALK), "assumed: as inject"),
        "outer_exit": (0, "no exit goes to the outer hypervisor"),
        "violation": (_FAST_FILL, "assumed: as fill, with its walk"),
        "first_touch": (_fast(_TOUCH / _CLOCK), _OF_ANOTHER + f"{_FIRECRACKER}; less a hypercall and violation"),
        "first_touch_large": (
            _fast(_TOUCH / _CLOCK + 1000 * _CLEARED),
            "assumed: first_touch, and 2 MiB cleared at 10 GB a second",
        ),
    },
)

_NESTED_2026 = _PVM_2026.but(
    "nested-2026-13900hk",
    "Core i9-13900HK, Linux 7.3 in a VM, hardware exits",
    "shadow-on-ept",
    exit_fault=(_fast(210), _OF_ANOTHER + f"{_PVM}: two switches of 0.105 µs"),
    exit_register=(_fast(210), "as exit_fault"),
    exit_invlpg=(_fast(210), "as exit_fault"),
    dispatch=(_fast(_DISPATCH / _CLOCK), _OF_ANOTHER + f"{_T1}, kvm BM: a hypercall, less exit_fault"),
    outer_exit=(
        _fast(_OUTER / _CLOCK),
        _OF_ANOTHER + f"{_T1}, kvm NST: a hypercall, less switches and dispatch, by two",
    ),
)

PRESETS = {made.name: made for made in (_KVM_2023, _PVM_2023, _NESTED_2023, _PVM_2026, _NESTED_2026, _CORE2007)}
"""By name."""
ALIASES = {"modern": "kvm-2023-8269cy", "pvm": "pvm-2026-13900hk", "nested": "nested-2023-8269cy"}
"""The best there is of each kind: a name that stays where better prices come."""


def find_preset(name: object) -> Preset:
    """The preset of that name or alias. ConfigError, with the nearest name, for another."""
    if isinstance(name, str):
        known = ALIASES.get(name, name)
        if known in PRESETS:
            return PRESETS[known]
        near = difflib.get_close_matches(name, [*ALIASES, *PRESETS], 1)
        if near:
            raise ConfigError(f"costs: there is no {name!r:.60}; did you mean {near[0]!r}?")
    raise ConfigError(f"costs: {name!r:.60} is not one of {', '.join([*ALIASES, *PRESETS])}, or a Costs object")
