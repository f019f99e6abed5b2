"""The log of exits: one row each, with what the MMU did about it."""
from shadowcore.engine.state cimport sc_event_hook, sc_exit_log, sc_mmu
from shadowcore.engine.types cimport u32, u64

# From now on exits of `mmu` are logged, and every access takes the general way, as far as the design is asked. Not
# while they are. The operation that comes next has number `first`.
cdef void exits_follow(sc_mmu *mmu, sc_exit_log *log, u64 first) noexcept nogil
# No more.
cdef void exits_leave(sc_mmu *mmu) noexcept nogil
# What the host does now belongs to no exit.
cdef void exits_close(sc_mmu *mmu) noexcept nogil
# The rows have been handed out.
cdef void exits_taken(sc_mmu *mmu) noexcept nogil
# A guest kernel begins to work, which counts the operations that it begins in these four, or, NULL, has stopped.
cdef void exits_counted(sc_mmu *mmu, const u64 *accesses, const u64 *kernel_accesses, const u64 *cr3_loads,
                        const u64 *invlpg) noexcept nogil
# Events (a bit per EVENT_*) are told to `told`; 0: none are.
cdef void events_tell(sc_mmu *mmu, u32 events, sc_event_hook told, void *context) noexcept nogil

cdef inline void exits_next(sc_mmu *mmu) noexcept nogil:
    """An operation is over, be exits logged or not."""
    if mmu.exits != NULL:
        exits_close(mmu)
        mmu.exits.operation += 1
