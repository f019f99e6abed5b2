"""One shadow entry: how its value is made, and how it comes and goes with the books kept right."""
from shadowcore.engine.bits cimport PTE_A, PTE_P, PTE_PS, PTE_U, PTE_W, SPTE_GUEST_U, SPTE_GUEST_W, pte_nx
from shadowcore.engine.memory cimport mem_guest_frame, mem_pool_hpa, mem_pool_page
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.rmap cimport list_add, list_remove, rmap_add, rmap_remove
from shadowcore.engine.role cimport ROLE_QUADRANT, role_field, role_level, role_pte_size
from shadowcore.engine.state cimport memo_drop, sc_mmu
from shadowcore.engine.types cimport ACC_U, ACC_W, ACC_X, u8, u32, u64

cdef inline u64 nonleaf_spte(u32 child) noexcept nogil:
    """Upper entries grant everything; rights are in the leaves alone."""
    return mem_pool_hpa(child) | PTE_P | PTE_W | PTE_U | PTE_A

cdef inline u64 leaf_spte(u64 hpa, u32 guest, u32 granted, u64 kept) noexcept nogil:
    """Leaf for `hpa`: rights `guest` that the guest's tables give, `granted` now; `kept`: bits copied as they are."""
    # ACC_W and ACC_U are the bits of an entry; SPTE_GUEST_W and SPTE_GUEST_U lie 9 above them.
    return (hpa | kept | PTE_P | (granted & (ACC_W | ACC_U)) | <u64>(guest & (ACC_W | ACC_U)) << 9
            | (~<u64>granted & ACC_X) << 63)

cdef inline const u8 *leaf_gtable(const sc_mmu *mmu, u32 page) noexcept nogil:
    """The guest's entries that a page of level 1, not direct, shadows; NULL where there is no RAM."""
    cdef u32 role = mmu.pages[page].role
    cdef const u8 *table = mem_guest_frame(mmu.mem, mmu.pages[page].gfn << 12)
    if table != NULL and role_pte_size(role) == 4:
        table += 2048 * role_field(role, ROLE_QUADRANT, 1)
    return table

cdef inline u64 leaf_gpte(const sc_mmu *mmu, const u8 *table, u32 spte) noexcept nogil:
    """The guest's entry behind one of a page of level 1; table: leaf_gtable of the page, not NULL."""
    if role_pte_size(mmu.pages[spte >> 9].role) == 8:
        return (<const u64 *>table)[spte & 511]
    return (<const u32 *>table)[spte & 511]

cdef inline u32 leaf_guest_rights(u64 spte) noexcept nogil:
    """Rights that the guest's tables gave when the leaf was made."""
    return ((ACC_W if spte & SPTE_GUEST_W else 0) | (ACC_U if spte & SPTE_GUEST_U else 0)
            | (0 if spte & pte_nx() else ACC_X))

cdef inline void spte_put(sc_mmu *mmu, u32 spte, u64 value) noexcept nogil:
    """Fill an entry that was 0."""
    cdef sc_page *page = &mmu.pages[spte >> 9]
    mmu.table[spte] = value
    page.used[(spte & 511) >> 6] |= <u64>1 << (spte & 63)
    page.present += 1
    if value & PTE_P:
        mmu.stats.spte_installed += 1

cdef inline void spte_wipe(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Make an entry 0 that is on no list any more."""
    cdef sc_page *page = &mmu.pages[spte >> 9]
    if mmu.table[spte] & PTE_P:
        mmu.stats.spte_removed += 1
        memo_drop(mmu)
    mmu.table[spte] = 0
    page.used[(spte & 511) >> 6] &= ~(<u64>1 << (spte & 63))
    page.present -= 1

cdef inline bint spte_maps(u64 value, int level) noexcept nogil:
    """An entry of a page of `level` maps memory; above level 3 none does (I4)."""
    return value & PTE_P and (level == 1 or (value & PTE_PS and level <= 3))

cdef inline bint spte_is_writable(u64 value) noexcept nogil:
    return value & (PTE_P | PTE_W) == (PTE_P | PTE_W)

cdef inline bint leaf_is_listed(const sc_mmu *mmu, u64 value) noexcept nogil:
    """A leaf of this value is in the reverse map: if it is writable, or (unsync) if it is there at all."""
    return spte_is_writable(value) or (mmu.lists_all and value & PTE_P)

cdef inline void spte_unlink(sc_mmu *mmu, u32 spte, int level) noexcept nogil:
    """Take an entry of a page of `level` off the list it is on; its value stays."""
    cdef u64 value = mmu.table[spte]
    if level == 1:
        if leaf_is_listed(mmu, value):
            rmap_remove(mmu, spte)
    elif value & PTE_P:
        list_remove(mmu, &mmu.pages[mem_pool_page(value)].parents, spte)

cdef inline void spte_drop(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Remove an entry that is not 0, with its record in the reverse map or among the child's parents."""
    spte_unlink(mmu, spte, role_level(mmu.pages[spte >> 9].role))
    spte_wipe(mmu, spte)

cdef inline void spte_link(sc_mmu *mmu, u32 spte, u32 child) noexcept nogil:
    """Make the empty entry `spte` point to page `child`."""
    spte_put(mmu, spte, nonleaf_spte(child))
    list_add(mmu, &mmu.pages[child].parents, spte)
