"""What counters come to in cycles, for the C interface: costs.Costs, but for what the guest's own instructions take."""
from libc.math cimport isfinite
from libc.string cimport memset

from shadowcore.engine.counters cimport (
    EXIT_CR0, EXIT_CR3, EXIT_CR4, EXIT_EFER, EXIT_FAULTS, EXIT_FILL, EXIT_GUEST, EXIT_INVLPG, EXIT_MMIO, EXIT_WRITE,
    sc_stats,
)
from shadowcore.engine.types cimport u64

cdef enum:
    PRICES = 23                     # of sc_prices


cdef bint prices_are_sane(const sc_prices *p) noexcept nogil:
    """Each price is a number, and not negative."""
    cdef const double *price = &p.tlb_miss
    cdef int i
    for i in range(PRICES):
        if not isfinite(price[i]) or price[i] < 0:
            return False
    return True


assert sizeof(sc_prices) == 8 + PRICES * sizeof(double)


cdef inline double _found(const sc_prices *p, u64 pages, u64 large) noexcept nogil:
    """Pages that a host found; large: of these, those of 2 MiB."""
    large = min(large, pages)
    return (pages - large) * p.first_touch + large * p.first_touch_large


cdef double prices_cycles(const sc_prices *p, const sc_stats *before, const sc_stats *after) noexcept nogil:
    cdef sc_stats n = after[0]
    cdef const u64 *old = <const u64 *>before
    cdef u64 *new = <u64 *>&n
    cdef u64 misses, faults, loads, fills, writes
    cdef double backing
    cdef size_t i
    if before != NULL:
        for i in range(sizeof(sc_stats) // sizeof(u64)):
            new[i] -= old[i]
    misses = n.tlb_misses if n.tlb_hits or n.tlb_misses else n.accesses
    faults = 0
    for i in range(EXIT_FAULTS):
        faults += n.exits[i]
    fills = n.exits[EXIT_FILL]
    writes = n.exits[EXIT_WRITE]
    if p.violation and n.npf_violation:
        # They are among the page faults, by their reasons, and have prices of their own.
        faults -= n.npf_violation
        fills = writes = 0
    backing = (_found(p, n.host_faults, n.host_faults_large) + _found(p, n.outer_faults, n.outer_faults_large)
               + n.outer_faults * p.outer_touch)
    loads = n.exits[EXIT_CR0] + n.exits[EXIT_CR3] + n.exits[EXIT_CR4] + n.exits[EXIT_EFER]
    return (prices_translation(p, misses, n.walk_references)
            + faults * p.exit_fault + loads * p.exit_register + n.exits[EXIT_INVLPG] * p.exit_invlpg
            + (faults + loads + n.exits[EXIT_INVLPG]) * p.dispatch
            + fills * p.fill + writes * p.rights + n.exits[EXIT_GUEST] * p.inject
            + n.exits[EXIT_MMIO] * p.mmio + n.pf_emulate * p.emulate
            + loads * p.load + n.exits[EXIT_INVLPG] * p.flush_page + n.guest_walk_references * p.guest_reference
            + n.mmu_cache_miss * p.page_new + n.mmu_shadow_zapped * p.page_zap
            + (n.spte_installed + n.spte_removed) * p.entry + backing
            + n.npf_violation * p.violation + n.mmu_cache_miss * p.violation_table)


cdef int prices_of(object costs, sc_prices *p) except -1:
    memset(p, 0, sizeof(sc_prices))
    p.struct_size = sizeof(sc_prices)
    p.tlb_miss = costs.tlb_miss
    p.upper_reference = costs.upper_reference
    p.leaf_reference = costs.leaf_reference
    p.exit_fault = costs.exit_fault * costs.switches
    p.exit_register = costs.exit_register * costs.switches
    p.exit_invlpg = costs.exit_invlpg * costs.switches
    p.dispatch = costs.dispatch + costs.carried     # of all hypervisors below
    p.fill = costs.fill
    p.rights = costs.rights
    p.inject = costs.inject
    p.mmio = costs.mmio
    p.emulate = costs.emulate
    p.load = costs.register         # a load of a control register
    p.flush_page = costs.flush_page
    p.guest_reference = costs.guest_reference
    p.page_new = costs.page_new
    p.page_zap = costs.page_zap
    p.entry = costs.entry
    p.first_touch = costs.first_touch
    p.first_touch_large = costs.first_touch_large
    p.outer_touch = costs.backed
    if costs.levels.paging == "ept":
        p.violation = sum(costs.violations(1).values())
        p.violation_table = sum(costs.violations(0, 1).values())
    return 0
