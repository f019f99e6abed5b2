from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

EXIT_REASONS: Final[tuple[str, ...]]
PF_REASONS: Final[tuple[str, ...]]
COUNTERS: Final[tuple[str, ...]]
GAUGES: Final[tuple[str, ...]]

@disjoint_base
class Stats:
    def __new__(cls, owner: Any = None) -> Self: ...

    # The names of EXIT_REASONS and of COUNTERS. Final: they count, but they cannot be assigned.
    exits_fill: Final[int]
    exits_write: Final[int]
    exits_emulate: Final[int]
    exits_guest: Final[int]
    exits_mmio: Final[int]
    exits_cr0: Final[int]
    exits_cr3: Final[int]
    exits_cr4: Final[int]
    exits_efer: Final[int]
    exits_invlpg: Final[int]
    pf_taken: Final[int]
    pf_fixed: Final[int]
    pf_guest: Final[int]
    pf_emulate: Final[int]
    pf_mmio: Final[int]
    pf_spurious: Final[int]
    tlb_flush: Final[int]
    remote_tlb_flush: Final[int]
    invlpg: Final[int]
    mmu_shadow_zapped: Final[int]
    mmu_pte_write: Final[int]
    mmu_pde_zapped: Final[int]
    mmu_flooded: Final[int]
    mmu_recycled: Final[int]
    mmu_cache_miss: Final[int]
    mmu_cache_hit: Final[int]
    mmu_unprotect: Final[int]
    page_frees: Final[int]
    spte_installed: Final[int]
    spte_removed: Final[int]
    rmap_protected: Final[int]
    root_loads: Final[int]
    gp_guest: Final[int]
    accesses: Final[int]
    walk_references: Final[int]
    guest_walk_references: Final[int]
    tlb_hits: Final[int]
    tlb_misses: Final[int]
    mmu_unsync: Final[int]
    unsync_made: Final[int]
    synced: Final[int]
    prefetched: Final[int]
    prev_root_hits: Final[int]
    insn_emulation: Final[int]
    pf_mmio_spte_created: Final[int]
    pages_4k: Final[int]
    pages_2m: Final[int]
    pages_1g: Final[int]
    remote_tlb_flush_requests: Final[int]
    max_mmu_rmap_size: Final[int]
    pf_mmio_spte_hit: Final[int]
    host_faults: Final[int]
    host_unmaps: Final[int]
    markers_made: Final[int]
    marker_hits: Final[int]
    markers_stale: Final[int]
    host_faults_large: Final[int]
    outer_faults: Final[int]
    outer_faults_large: Final[int]
    invpcid: Final[int]
    npf_violation: Final[int]
    npf_misconfig: Final[int]
    pf_fast: Final[int]
    tlb_load_hits: Final[int]
    tlb_store_hits: Final[int]
    tlb_fetch_hits: Final[int]
    tlb_load_second: Final[int]
    tlb_store_second: Final[int]
    tlb_fetch_second: Final[int]
    tlb_load_misses: Final[int]
    tlb_store_misses: Final[int]
    tlb_fetch_misses: Final[int]
    walk_cache_hits: Final[int]
    walk_cache_references: Final[int]
    nested_tlb_hits: Final[int]
    nested_tlb_misses: Final[int]
    host_cache_hits: Final[int]
    nested_tables: Final[int]
    to_nested: Final[int]
    to_shadow: Final[int]
    nested_walks: Final[int]

    @property
    def exits(self) -> dict[str, int]: ...
    @property
    def exits_total(self) -> int: ...
    def as_dict(self) -> dict[str, int]: ...
    def as_array(self) -> NDArray[np.uint64]: ...
    def reset(self) -> None: ...
    def __getitem__(self, name: str, /) -> int: ...
    def __sub__(self, other: Stats, /) -> Stats: ...
    def __rsub__(self, other: Stats, /) -> Stats: ...
    def copy(self) -> Stats: ...
    def _become(self, other: Stats) -> None: ...
    def _repr_html_(self) -> str: ...
