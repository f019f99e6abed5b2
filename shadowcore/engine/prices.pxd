"""What counters come to in cycles; see costs.Costs, whose sums these are."""
from libc.stdint cimport uint32_t

from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.types cimport u64

cdef extern from "shadowcore.h" nogil:
    ctypedef struct sc_prices:
        uint32_t struct_size, reserved
        double tlb_miss, upper_reference, leaf_reference
        double exit_fault, exit_register, exit_invlpg, dispatch
        double fill, rights, inject, mmio, emulate, load, flush_page
        double guest_reference, page_new, page_zap, entry
        double violation, violation_table, first_touch, first_touch_large, outer_touch

# Cycles of the processor's walks: `references` entries read at `misses` misses, one of each the last of its walk.
cdef inline double prices_translation(const sc_prices *p, u64 misses, u64 references) noexcept nogil:
    cdef u64 leaves = misses if misses < references else references
    return misses * p.tlb_miss + (references - leaves) * p.upper_reference + leaves * p.leaf_reference

cdef bint prices_are_sane(const sc_prices *p) noexcept nogil
# Cycles of what happened between two states of the counters of a VM; before NULL: of all that `after` counts.
cdef double prices_cycles(const sc_prices *p, const sc_stats *before, const sc_stats *after) noexcept nogil
# The prices of a costs.Costs.
cdef int prices_of(object costs, sc_prices *p) except -1
