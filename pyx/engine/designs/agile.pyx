"""Design `agile`: `cached`, of whose guest tables those that are stored to often are not shadowed.

The entry above such a table is a mark, at which the processor goes on in the guest's own tables, through the host's
(Gandhi, Hill, Swift, "Agile Paging", ISCA 2016). Stores below marks do not exit. engine/agile has the rule, the walks
and the host's tables. The processor that does this has not been built.
"""
from shadowcore.engine.agile.rule cimport interval_goes_on, table_is_nested, table_stored, table_to_shadow
from shadowcore.engine.agile.walks cimport mark_path, walk_on
from shadowcore.engine.designs.cached cimport cached_design
from shadowcore.engine.emulate cimport store_followed
from shadowcore.engine.fault cimport page_fault_usual
from shadowcore.engine.state cimport sc_loaded, sc_mmu, sc_vcpu, walk_mark
from shadowcore.engine.types cimport MODE_64, RC_OK, SC_NONE, u32, u64
from shadowcore.engine.walker cimport sc_walk


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    cdef u32 page = walk_mark(mmu, hw)
    cdef int rc
    if page != SC_NONE:
        return walk_on(mmu, v, access, hw, w, page)
    if mmu.stats.nested_tables:
        rc = mark_path(mmu, v, access, hw, w)
        if rc != RC_OK:
            return rc
    return page_fault_usual(mmu, v, access, hw, w)


cdef u64 _fast_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    """There is a fast path while everything is shadowed."""
    if mmu.stats.nested_tables:
        return ~<u64>0
    return mmu.alone.fast_fault(mmu, v, va, access, told)


cdef void _stored(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil:
    if v != NULL:
        table_stored(mmu, gpa >> 12)    # before a flood can zap what shadows the table: it counts all the same
    store_followed(mmu, v, gpa, nbytes)
    if v != NULL:
        interval_goes_on(mmu)


cdef void _roots_to_shadow(sc_mmu *mmu, const sc_vcpu *v) noexcept nogil:
    """Tables that the registers ask for as roots are shadowed: nothing leads to them that could be a mark."""
    cdef u64 gfn
    cdef bint direct
    cdef int slot
    if mmu.pages == NULL or not mmu.stats.nested_tables:
        return
    for slot in range(1 if v.guest.mode >= MODE_64 else 4):
        if mmu.alone.root_of(mmu, v, slot, &gfn, &direct) and not direct and table_is_nested(mmu, gfn):
            table_to_shadow(mmu, gfn)


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    _roots_to_shadow(mmu, v)
    mmu.alone.new_cr3(mmu, v, before)


cdef void _reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    _roots_to_shadow(mmu, v)
    mmu.alone.reset(mmu, v, before)


cdef bint _make_room(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    _roots_to_shadow(mmu, v)        # of root slots that found no page so far
    return mmu.alone.make_room(mmu, v, va)


cdef void agile_design(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this design."""
    cached_design(mmu)
    mmu.alone = mmu.design          # no settings ask for hooks of neighbours.pyx
    mmu.host_levels = 4
    mmu.design.invariants |= 1 << 15
    mmu.design.new_cr3 = _new_cr3
    mmu.design.reset = _reset
    mmu.design.make_room = _make_room
    mmu.design.fast_fault = _fast_fault
    mmu.design.page_fault = _page_fault
    mmu.design.stored = _stored
