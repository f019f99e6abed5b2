"""TLB flushes of which it is known where what they withdraw led."""


cdef void request_flush_of(sc_mmu *mmu, int why, u64 gfn, u64 frames) noexcept nogil:
    """request_flush, for what led to `frames` guest frames from `gfn` on (0: to any), and who is told is told so."""
    untold_flush(mmu, why)
    mmu.event_frames = frames
    event(mmu, EVENT_FLUSH, why, SC_NONE, gfn)
    mmu.event_frames = 0
