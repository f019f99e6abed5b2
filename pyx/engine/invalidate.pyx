"""What the guest's INVLPG and page faults drop of a linear address (SDM vol. 3, 4.10.4.1).

Besides the modelled TLB, that concerns the shadow of design `flush`, whose leaves belong to linear addresses and lag
behind the guest's tables as a TLB does.
"""
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_G, PTE_P, PTE_W, SPTE_MARK, level_index, level_mask, pte_addr, pte_pkey,
)
from shadowcore.engine.flushes cimport FLUSH_FAULT, FLUSH_INVLPG, flush_lost, request_flush
from shadowcore.engine.memory cimport mem_frame, mem_frame_hpa, mem_pool_page, sc_no_frame
from shadowcore.engine.pool cimport pool_zap
from shadowcore.engine.role cimport role_level
from shadowcore.engine.spte cimport leaf_remembers, spte_drop
from shadowcore.engine.state cimport linear_exists, sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport TLB_ANY_PCID, tlb_flush_fault
from shadowcore.engine.types cimport MODE_32, MODE_64, MODE_OFF, PF_P, PF_RSVD, RC_OK, SC_NONE, u16, u32, u64
from shadowcore.engine.walker cimport probe_walk, sc_walk


cdef bint _is_stale(sc_mmu *mmu, const sc_vcpu *v, u64 leaf, u64 va) noexcept nogil:
    """The leaf for `va` lets an access do what one that walks the guest's tables now would not do, or would do and set
    A or D."""
    cdef sc_walk w
    cdef u64 entry, frame
    cdef int level
    if not leaf & PTE_P:
        return False                # a device: each access exits, and the tables are walked
    if (probe_walk(mmu.mem, &v.guest, va, 0, &w) != RC_OK and w.error_code & (PF_P | PF_RSVD) != PF_P):
        return True                 # the tables lead nowhere
    entry = w.entry[w.level]
    frame = mem_frame(mmu.mem, w.gpa >> 12)
    if (frame == sc_no_frame() or leaf & pte_addr() != mem_frame_hpa(mmu.mem, frame)
            or leaf_remembers(leaf) != w.access or (leaf ^ entry) & PTE_G
            or (v.guest.mode >= MODE_64 and pte_pkey(leaf) != w.pkey)):
        return True
    if leaf & (PTE_W | PTE_D) and not entry & PTE_D:
        return True
    if leaf & PTE_A:
        for level in range(w.level, w.top + 1):
            if not w.entry[level] & PTE_A:
                return True
    return False


cdef bint _any_stale(sc_mmu *mmu, const sc_vcpu *v, u32 page, u64 va) noexcept nogil:
    """A leaf is stale in a page that serves `va`, or below it."""
    cdef int level = role_level(mmu.pages[page].role)
    cdef u32 index
    cdef u64 value
    va &= ~level_mask(level + 1)
    for index in range(512):
        value = mmu.table[page * 512 + index]
        if not value & PTE_P:
            continue
        if (_is_stale(mmu, v, value, va | <u64>index << 12) if level == 1
                else _any_stale(mmu, v, mem_pool_page(value), va | <u64>index << (9 * level + 3))):
            return True
    return False


cdef void _zap_subtree(sc_mmu *mmu, u32 page) noexcept nogil:
    """Zap a page of design `flush` and all below it: its pages belong to addresses and must not outlive a link."""
    cdef u32 spte
    if role_level(mmu.pages[page].role) > 1:
        for spte in range(page * 512, page * 512 + 512):
            if mmu.table[spte] & PTE_P:
                _zap_subtree(mmu, mem_pool_page(mmu.table[spte]))
    pool_zap(mmu, page)


cdef bint _drop_large(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 va, bint stale) noexcept nogil:
    """Zap what the upper entry `spte` leads to if that stands for a large page of the guest, or for half of one of
    4 MiB, and, if only what is `stale` is to go, a leaf of it is."""
    if not mmu.table[spte] & SPTE_MARK or (stale and not _any_stale(mmu, v, mem_pool_page(mmu.table[spte]), va)):
        return False
    _zap_subtree(mmu, mem_pool_page(mmu.table[spte]))
    return True


cdef bint _drop_leaves(sc_mmu *mmu, const sc_vcpu *v, u64 va, bint stale, int why) noexcept nogil:
    """Design `flush`: drop the leaf for `va`, or all leaves of its large page; if only what is `stale`, no page of
    which nothing is. True if something went."""
    cdef int level = v.hw.mode if v.hw.mode >= MODE_64 else 2
    cdef u32 page, spte
    cdef bint dropped = False
    if not linear_exists(v, va):
        return False
    page = v.roots[0 if level > 2 else <int>(va >> 30) & 3]
    while page != SC_NONE:
        spte = page * 512 + level_index(va, level)
        if level == 1:
            if mmu.table[spte] and not (stale and not _is_stale(mmu, v, mmu.table[spte], va)):
                spte_drop(mmu, spte)
                dropped = True
            break
        if v.guest.mode == MODE_32 and level == 2 and _drop_large(mmu, v, spte ^ 1, va ^ (level_mask(2) + 1), stale):
            dropped = True          # the other half
        if _drop_large(mmu, v, spte, va, stale):
            dropped = True
        if dropped:
            request_flush(mmu, why)
        if not mmu.table[spte]:
            break
        page = mem_pool_page(mmu.table[spte])
        level -= 1
    return dropped


cdef void invalidate_leaves(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """INVLPG in design `flush`: the leaf goes, or all leaves of the large page."""
    _drop_leaves(mmu, v, va, False, FLUSH_INVLPG)


cdef void invalidate_fault(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """A page fault of the guest at `va`: nothing that is cached for the page, and is not what the guest's tables say
    now, serves another access.

    Leaves of `flush` that say what the tables say stay, as in the original: their loss would show in exits alone. (The
    original kept the others, too.) Of tables above the leaves no design caches what the guest's say.
    """
    cdef u16 pcid = vcpu_pcid(v)
    if mmu.shadow and not mmu.keep and v.guest.mode != MODE_OFF and _drop_leaves(mmu, v, va, True, FLUSH_FAULT):
        pcid = TLB_ANY_PCID         # no entry may outlive the leaf that it was made of
    if v.tlb != NULL:
        tlb_flush_fault(v.tlb, va, pcid, flush_lost(mmu, FLUSH_FAULT))
