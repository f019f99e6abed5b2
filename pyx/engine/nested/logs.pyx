"""Dirty logs under design nested.

The TDP MMU splits large leaves before it takes W from small ones; the direct MMU takes W from large leaves as they are,
and the first store to one makes a small leaf. A log that begins with every frame in it changes nothing until it is
cleared: then large leaves are met here.
"""
from shadowcore.engine.bits cimport PTE_P, PTE_PS, PTE_W, SPTE_MMU_W, sc_ctz64
from shadowcore.engine.flushes cimport FLUSH_LOG, FLUSH_ZAP, request_flush, request_flush_of
from shadowcore.engine.memory cimport mem_frame, mem_pool_page, sc_slot
from shadowcore.engine.nested.tables cimport host_role, leaf_protect, leaf_split, tree_zap
from shadowcore.engine.pool cimport pool_find
from shadowcore.engine.record cimport record_removed
from shadowcore.engine.rmap cimport list_first
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport memo_drop, sc_mmu
from shadowcore.engine.sync cimport direct_page_gfn, leaf_level
from shadowcore.engine.types cimport SC_NONE, u32, u64
from shadowcore.engine.unsync.logs cimport (
    log_cleared as _direct_cleared, log_stopped as _direct_stopped, slot_protect as _direct_protect,
)


cdef void _split(sc_mmu *mmu, u64 first, u64 n) noexcept nogil:
    """The large leaves that map some of n frames of RAM become tables. One for which there is no page stays."""
    cdef u64 at = first
    while at < first + n:
        if at == first or not at & 0x3FFFF:
            if mmu.large_rmap[1][at >> 18]:
                leaf_split(mmu, list_first(mmu.large_rmap[1][at >> 18]) - 1)
        if mmu.large_rmap[0][at >> 9]:
            leaf_split(mmu, list_first(mmu.large_rmap[0][at >> 9]) - 1)
        at = (at | 511) + 1


cdef void slot_protect(sc_mmu *mmu, int slot) noexcept nogil:
    """Stores to the slot are to be seen by its dirty log."""
    cdef u64 first = mmu.mem.slots[slot].frame
    cdef u64 n = mmu.mem.slots[slot].npages
    cdef u64 at
    if not mmu.tdp:
        _direct_protect(mmu, slot)
        return
    _split(mmu, first, n)
    for at in range(first, first + n):
        if (at == first or not at & 511) and mmu.large_rmap[0][at >> 9]:
            leaf_protect(mmu, list_first(mmu.large_rmap[0][at >> 9]) - 1)
        if mmu.frames[at].rmap:
            leaf_protect(mmu, list_first(mmu.frames[at].rmap) - 1)
    request_flush_of(mmu, FLUSH_LOG, mmu.mem.slots[slot].base_gfn, n)


cdef void _protect_large(sc_mmu *mmu, u64 frame) noexcept nogil:
    """Take W from the large leaf that maps a frame, for good: its store is no mere matter of the log."""
    cdef u64 protected = PTE_W | SPTE_MMU_W
    cdef u32 head, i
    for i in range(2):
        head = mmu.large_rmap[i][frame >> 9 * (i + 1)]
        if head and mmu.table[list_first(head) - 1] & protected:
            if mmu.tdp:
                leaf_protect(mmu, list_first(head) - 1)
            mmu.table[list_first(head) - 1] &= ~protected
            memo_drop(mmu)


cdef void log_cleared(sc_mmu *mmu, int slot, u64 first, u64 n) noexcept nogil:
    """The log of n frames from the first on is about to be cleared: those that it shows are to be seen again. KVM goes
    about it 64 frames at a time."""
    cdef const sc_slot *s = &mmu.mem.slots[slot]
    cdef u64 at, word, bits, low, high
    cdef bint any_ = False
    for word in range(first >> 6, ((first + n - 1) >> 6) + 1):
        bits = s.dirty[word]
        if word == first >> 6:
            bits &= ~<u64>0 << (first & 63)
        if word == (first + n - 1) >> 6:
            bits &= ~<u64>0 >> (63 - ((first + n - 1) & 63))
        if bits == 0:
            continue
        any_ = True
        low = word * 64 + sc_ctz64(bits)
        high = low
        at = bits
        while at:
            high = word * 64 + sc_ctz64(at)
            at &= at - 1
        if mmu.tdp and high > low:
            _split(mmu, s.frame + low, high - low)
        _protect_large(mmu, s.frame + low)
        _protect_large(mmu, s.frame + high)
        if mmu.tdp:
            while bits:
                at = s.frame + word * 64 + sc_ctz64(bits)
                bits &= bits - 1
                if mmu.frames[at].rmap:
                    leaf_protect(mmu, list_first(mmu.frames[at].rmap) - 1)
    if not mmu.tdp:
        _direct_cleared(mmu, slot, first, n)
    elif any_:
        request_flush(mmu, FLUSH_LOG)


cdef void _collapse(sc_mmu *mmu, u32 page, const sc_slot *slot) noexcept nogil:
    """Below `page`, a table goes where a large leaf can take its place."""
    cdef int level = role_level(mmu.pages[page].role)
    cdef u64 span = <u64>1 << 9 * (level - 1)
    cdef u64 end = slot.base_gfn + slot.npages
    cdef u64 value, gfn
    cdef u32 spte
    for spte in range(page * 512, page * 512 + 512):
        value = mmu.table[spte]
        gfn = direct_page_gfn(mmu, spte)
        if not value & PTE_P or value & PTE_PS or gfn + span <= slot.base_gfn or gfn >= end:
            continue
        if gfn >= slot.base_gfn and level <= 3 and (
                leaf_level(mmu, gfn, mem_frame(mmu.mem, gfn), mmu.largest) >= level):
            tree_zap(mmu, spte, record_removed())
            request_flush(mmu, FLUSH_ZAP)
        elif level > 2:
            _collapse(mmu, mem_pool_page(value), slot)


cdef void log_stopped(sc_mmu *mmu, int slot) noexcept nogil:
    """Small leaves go where a large one can be again; others stay as they are."""
    cdef u32 root
    if not mmu.tdp:
        _direct_stopped(mmu, slot)
        return
    root = pool_find(mmu, 0, host_role(mmu.host_levels))
    if root != SC_NONE:
        _collapse(mmu, root, &mmu.mem.slots[slot])
