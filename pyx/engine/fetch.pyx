"""From a guest walk to a shadow leaf: the pages of each level, their links, and then what leaf.pxd decides."""
from shadowcore.engine.absent cimport is_marker, marker_stays
from shadowcore.engine.bits cimport level_index
from shadowcore.engine.flushes cimport FLUSH_LINK, FLUSH_WITHHELD, request_flush
from shadowcore.engine.leaf cimport fault_decide, leaf_commit, leaf_decide, sc_fault
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_pool_page
from shadowcore.engine.roots cimport root_load
from shadowcore.engine.spte cimport spte_drop, spte_link
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport MODE_64, RC_EXHAUSTED, RC_OK, SC_NONE, u32
from shadowcore.engine.walker cimport sc_walk


cdef int _link_path(sc_mmu *mmu, sc_vcpu *v, const sc_walk *hw, const sc_walk *w, sc_fault *f) noexcept nogil:
    """Link every level down to the leaf table, and find the leaf. Where the failed walk hw came by is linked. A link to
    the shadow of a guest table is right: a store to the guest's entry would have cut it."""
    cdef int level = v.guest.mode if v.guest.mode >= MODE_64 else 2
    cdef int slot = 0 if level > 2 else <int>(f.va >> 30) & 3
    cdef u32 page = v.roots[slot]
    cdef u32 spte, child, linked
    if page == SC_NONE:
        page = root_load(mmu, v, slot)
        if page == SC_NONE:
            return RC_EXHAUSTED
        f.linked = True
    elif hw != NULL and hw.level <= level and hw.level >= f.level:
        level = hw.level
        page = <u32>(hw.table[level] - SC_POOL_HFN)
    while level > 1:
        spte = page * 512 + level_index(f.va, level)
        linked = mem_pool_page(mmu.table[spte]) if mmu.table[spte] else SC_NONE
        child = linked
        if linked == SC_NONE or level <= f.level:
            child = mmu.design.child(mmu, v, f.va, level - 1, w, linked)
        if child == SC_NONE:
            return RC_EXHAUSTED
        if child != linked:
            if linked != SC_NONE:
                spte_drop(mmu, spte)
                request_flush(mmu, FLUSH_LINK)
            spte_link(mmu, spte, child)
            f.linked = True
        if level == f.level:
            f.large = spte
        page = child
        level -= 1
    f.spte = page * 512 + level_index(f.va, 1)
    if is_marker(mmu.table[f.spte]):
        marker_stays(mmu, f.spte, f.gpte)
    f.old = mmu.table[f.spte]
    return RC_OK


cdef void _decide(const sc_mmu *mmu, const sc_vcpu *v, sc_fault *f) noexcept nogil:
    leaf_decide(mmu, v, f)


cdef int fetch(sc_mmu *mmu, sc_vcpu *v, const sc_walk *hw, const sc_walk *w, sc_fault *f) noexcept nogil:
    """Bring the shadow in line with the complete guest walk `w`, which f tells of, for f.access.

    hw: the failed walk of the shadow, whose path still stands, or NULL.
    RC_OK with what the exit is in f, or RC_EXHAUSTED. A gpa in no slot leaves a marked entry that is not present.
    """
    f.large = SC_NONE
    f.linked = f.unprotected = False
    if _link_path(mmu, v, hw, w, f) != RC_OK:
        return RC_EXHAUSTED
    # Not before: a table that was linked just now may have made the access's own frame a shadowed one.
    _decide(mmu, v, f)
    if f.withheld:
        request_flush(mmu, FLUSH_WITHHELD)
    if f.unprotect:
        mmu.design.unprotect(mmu, f.gpa >> 12)
        if _link_path(mmu, v, NULL, w, f) != RC_OK:
            return RC_EXHAUSTED
        f.unprotected = True
        _decide(mmu, v, f)
    fault_decide(mmu, v, f)
    leaf_commit(mmu, v, f)
    return RC_OK
