"""The reverse map at work: write protection of a frame."""
from shadowcore.engine.bits cimport PTE_W, SPTE_MMU_W
from shadowcore.engine.flushes cimport FLUSH_PROTECT, request_flush_of
from shadowcore.engine.hooks cimport EVENT_PROTECT, event
from shadowcore.engine.memory cimport mem_gfn
from shadowcore.engine.rmap cimport list_first, list_next, rmap_remove
from shadowcore.engine.state cimport memo_drop, sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64


cdef u32 list_length(const sc_mmu *mmu, u32 head) noexcept nogil:
    cdef u32 n = 0
    cdef u32 member = list_first(head)
    while member:
        n += 1
        member = list_next(mmu, head, member)
    return n


cdef bint _protect_listed(sc_mmu *mmu, u32 head, u64 frame) noexcept nogil:
    """Take W from every leaf of a list that has others too; True if one had it."""
    cdef u64 protected = PTE_W | SPTE_MMU_W
    cdef u32 member = list_first(head)
    cdef bint flush = False
    cdef u64 value
    while member:
        value = mmu.table[member - 1]
        if value & protected:
            flush |= value & SPTE_MMU_W != 0
            mmu.table[member - 1] = value & ~protected
            mmu.stats.rmap_protected += 1
            memo_drop(mmu)
            event(mmu, EVENT_PROTECT, member - 1, SC_NONE, mem_gfn(mmu.mem, frame))
        member = list_next(mmu, head, member)
    return flush


cdef bint rmap_log(sc_mmu *mmu, u32 head) noexcept nogil:
    """Take W from every leaf of a list, for a dirty log; True if one had it."""
    cdef u32 member = list_first(head)
    cdef bint flush = False
    while member:
        if mmu.table[member - 1] & PTE_W:
            flush = True
            mmu.table[member - 1] &= ~<u64>PTE_W
            memo_drop(mmu)
        member = list_next(mmu, head, member)
    return flush


cdef bint rmap_write_protect(sc_mmu *mmu, u64 frame) noexcept nogil:
    """No spte maps RAM frame `frame` writable any more; one TLB flush for each that did (patches 10, 31). Where the
    reverse map lists all leaves, the caller has to flush, if True is returned.

    With the quirk RMAP_LEAK the original dies on a record left behind; here such records are dropped.
    """
    cdef u32 spte
    cdef bint flush
    if mmu.lists_all:
        flush = _protect_listed(mmu, mmu.frames[frame].rmap, frame)
        if mmu.host_level > 1:
            flush |= _protect_listed(mmu, mmu.large_rmap[0][frame >> 9], frame)
            flush |= _protect_listed(mmu, mmu.large_rmap[1][frame >> 18], frame)
        return flush
    mmu.frames[frame].stale = 0
    while mmu.frames[frame].rmap:
        spte = list_first(mmu.frames[frame].rmap) - 1
        rmap_remove(mmu, spte)
        mmu.table[spte] &= ~<u64>PTE_W
        mmu.stats.rmap_protected += 1
        memo_drop(mmu)
        event(mmu, EVENT_PROTECT, spte, SC_NONE, mem_gfn(mmu.mem, frame))
        request_flush_of(mmu, FLUSH_PROTECT, mem_gfn(mmu.mem, frame), 1)
    return False
