"""Dirty logs under design unsync: what a slot's log does to the leaves that map its frames."""
from shadowcore.engine.bits cimport PTE_P
from shadowcore.engine.flushes cimport FLUSH_LOG, request_flush, request_flush_of
from shadowcore.engine.memory cimport mem_frame
from shadowcore.engine.rmap cimport rmap_log
from shadowcore.engine.role cimport role_direct, role_level
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.sync cimport leaf_level
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.zap cimport leaf_drop


cdef void slot_protect(sc_mmu *mmu, int slot) noexcept nogil:
    """Stores to the slot are to be seen by its dirty log: leaves lose W, and remember that this is all they lost."""
    cdef u64 frame = mmu.mem.slots[slot].frame
    cdef u64 i
    cdef u32 level
    for i in range(frame, frame + mmu.mem.slots[slot].npages):
        rmap_log(mmu, mmu.frames[i].rmap)
    for level in range(2, 4):
        for i in range(frame >> (9 * (level - 1)), ((frame + mmu.mem.slots[slot].npages - 1) >> (9 * (level - 1))) + 1):
            rmap_log(mmu, mmu.large_rmap[level - 2][i])
    request_flush_of(mmu, FLUSH_LOG, mmu.mem.slots[slot].base_gfn, mmu.mem.slots[slot].npages)


cdef void log_cleared(sc_mmu *mmu, int slot, u64 first, u64 n) noexcept nogil:
    """The same, for the frames that the log shows: of their leaves of 4 KiB, for a logged slot has no others that are
    writable."""
    cdef const u64 *dirty = mmu.mem.slots[slot].dirty
    cdef bint any_ = False
    cdef u64 i
    for i in range(first, first + n):
        if dirty[i >> 6] >> (i & 63) & 1:
            any_ = True
            rmap_log(mmu, mmu.frames[mmu.mem.slots[slot].frame + i].rmap)
    if any_:
        request_flush_of(mmu, FLUSH_LOG, mmu.mem.slots[slot].base_gfn + first, n)


cdef void log_stopped(sc_mmu *mmu, int slot) noexcept nogil:
    """Leaves of 4 KiB in direct pages go where a large one can be again."""
    cdef u32 page, spte
    cdef u64 gfn
    cdef bint flush = False
    for page in range(mmu.pool_pages):
        gfn = mmu.pages[page].gfn
        if (not mmu.pages[page].active or not role_direct(mmu.pages[page].role)
                or role_level(mmu.pages[page].role) != 1
                or gfn - mmu.mem.slots[slot].base_gfn >= mmu.mem.slots[slot].npages
                or leaf_level(mmu, gfn, mem_frame(mmu.mem, gfn), mmu.largest) == 1):
            continue
        for spte in range(page * 512, page * 512 + 512):
            if mmu.table[spte] & PTE_P:
                leaf_drop(mmu, spte)
                flush = True
    if flush:
        request_flush(mmu, FLUSH_LOG)
