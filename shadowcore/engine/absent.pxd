"""Markers: entries of leaf tables that the guest's tables do not have either, by which the processor delivers a fault
without an exit (KVM's bypass_guest_pf, c7addb902054, 2.6.25; 6.1 has it no more).

An entry that is 0 is one of which the shadow knows nothing: a fault there exits. On hardware the two differ by the
error code, as entries that nothing is known of are made present, with a reserved bit set.
"""
from shadowcore.engine.bits cimport SPTE_ABSENT
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

# When an entry is marked (sc_mmu.absent), in the order of config.MARKERS.
cdef enum:
    MARK_NEVER = 0
    MARK_PAGE = 1                   # whenever the shadow MMU looks at the guest's entry; not in an unsync page
    MARK_SYNCED = 2                 # at a refused walk; not in an unsync page
    MARK_WALK = 3                   # at a refused walk, in any page: it may lag, and is looked at before it serves

cdef inline bint is_marker(u64 value) noexcept nogil:
    return value == SPTE_ABSENT

cdef void page_mark(sc_mmu *mmu, u32 page) noexcept nogil
cdef void page_unmark(sc_mmu *mmu, u32 page) noexcept nogil
cdef void entry_mark(sc_mmu *mmu, u32 spte) noexcept nogil
cdef void walk_mark(sc_mmu *mmu, u32 spte) noexcept nogil
cdef bint marker_stays(sc_mmu *mmu, u32 spte, u64 gpte) noexcept nogil
