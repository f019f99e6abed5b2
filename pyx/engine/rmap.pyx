"""The reverse map at work: write protection of a frame."""
from shadowcore.engine.bits cimport PTE_W
from shadowcore.engine.flushes cimport FLUSH_PROTECT, request_flush
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


cdef void rmap_write_protect(sc_mmu *mmu, u64 frame) noexcept nogil:
    """No spte maps RAM frame `frame` writable any more; one TLB flush for each that did (patches 10, 31).

    With the quirk RMAP_LEAK the original dies on a record left behind; here such records are dropped.
    """
    cdef u32 spte
    mmu.frames[frame].stale = 0
    while mmu.frames[frame].rmap:
        spte = list_first(mmu.frames[frame].rmap) - 1
        rmap_remove(mmu, spte)
        mmu.table[spte] &= ~<u64>PTE_W
        mmu.stats.rmap_protected += 1
        memo_drop(mmu)
        event(mmu, EVENT_PROTECT, spte, SC_NONE, mem_gfn(mmu.mem, frame))
        request_flush(mmu, FLUSH_PROTECT)
