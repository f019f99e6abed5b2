"""Design `native`: the processor walks the guest's tables, and nothing is trapped.

A store to a table changes translations without an exit, so what the memos know is kept apart from what stores reach:
frames are marked, and a store to a marked table starts a new epoch.
"""
from shadowcore.engine.memory cimport mem_frame, mem_mark_dirty
from shadowcore.engine.state cimport memo_drop, sc_mmu
from shadowcore.engine.types cimport u64

# What the memos of an epoch know of a frame.
cdef enum:
    MARK_TABLE = 1                  # their translations were made of entries in it
    MARK_STORED = 2                 # they let stores reach it

cdef inline bint marked_table(const sc_mmu *mmu, u64 frame) noexcept nogil:
    """A store to the frame may change what the memos know."""
    return (mmu.marked_epoch == mmu.memo_epoch and mmu.marks[frame] >> 2 == mmu.memo_epoch
            and mmu.marks[frame] & MARK_TABLE)

cdef inline void store_seen(sc_mmu *mmu, u64 gpa) noexcept nogil:
    """The guest stores to RAM, within one page."""
    mem_mark_dirty(mmu.mem, gpa >> 12)
    if marked_table(mmu, mem_frame(mmu.mem, gpa >> 12)):
        memo_drop(mmu)

cdef void native_design(sc_mmu *mmu) noexcept nogil
