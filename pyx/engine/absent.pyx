"""How markers come and go."""
from shadowcore.engine.absent cimport MARK_PAGE, MARK_WALK, is_marker
from shadowcore.engine.bits cimport PTE_P, SPTE_ABSENT
from shadowcore.engine.role cimport role_direct, role_level
from shadowcore.engine.spte cimport leaf_gpte, leaf_gtable, spte_put, spte_wipe
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u8, u32, u64


cdef inline bint _is_leaf_table(const sc_mmu *mmu, u32 page) noexcept nogil:
    return role_level(mmu.pages[page].role) == 1 and not role_direct(mmu.pages[page].role)


cdef void entry_mark(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Mark an entry of a guest's leaf table, if it is 0 and the guest's is not present."""
    cdef const u8 *table = leaf_gtable(mmu, spte >> 9)
    if mmu.table[spte] == 0 and table != NULL and not leaf_gpte(mmu, table, spte) & PTE_P:
        spte_put(mmu, spte, SPTE_ABSENT)
        mmu.stats.markers_made += 1


cdef void page_mark(sc_mmu *mmu, u32 page) noexcept nogil:
    """A page was made, or is in sync again: the guest's whole table is looked at."""
    cdef u32 spte
    if mmu.absent != MARK_PAGE or not _is_leaf_table(mmu, page):
        return
    for spte in range(page * 512, page * 512 + 512):
        entry_mark(mmu, spte)


cdef void page_unmark(sc_mmu *mmu, u32 page) noexcept nogil:
    """A page leaves sync: what it says of entries that are not present need not hold any more."""
    cdef u32 spte
    if mmu.absent == MARK_WALK:
        return
    for spte in range(page * 512, page * 512 + 512):
        if is_marker(mmu.table[spte]):
            spte_wipe(mmu, spte)


cdef void walk_mark(sc_mmu *mmu, u32 spte) noexcept nogil:
    """The guest's walk ended at an entry that is not present, the processor's at `spte`."""
    cdef u32 page = spte >> 9
    if _is_leaf_table(mmu, page) and (mmu.absent == MARK_WALK or not mmu.pages[page].unsync):
        entry_mark(mmu, spte)


cdef bint marker_stays(sc_mmu *mmu, u32 spte, u64 gpte) noexcept nogil:
    """Somebody came by the marker at `spte`: if the guest's entry is present by now, it is stale, and goes."""
    if not gpte & PTE_P:
        return True
    mmu.stats.markers_stale += 1
    spte_wipe(mmu, spte)
    return False
