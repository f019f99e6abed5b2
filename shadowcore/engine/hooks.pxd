"""Where an audit can run and what an embedder can be told of; both cost one test of a bit where nobody asked."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

# Named points at which audits can run, in the order of audit.POINTS.
cdef enum:
    POINT_PRE_FAULT = 0             # a page-fault exit, before anything is done
    POINT_POST_FAULT = 1            # ... and after it
    POINT_PRE_WRITE = 2             # an emulated or device store, before it
    POINT_POST_WRITE = 3            # ... and after it
    POINT_POST_CR3 = 4              # after a load of CR3
    POINT_PRE_SYNC = 5              # roots of sc_mmu.synced are in place, and about to be synced (unsync)
    POINT_POST_SYNC = 6             # ... and has been
    POINT_COUNT = 7

# In sc_mmu.audit_found, beside POINT_* + 1: no audit found anything; a callback raised, or the handler of a signal.
cdef enum:
    HOOK_RAISED = POINT_COUNT + 1

# What an embedder can be told of, where it happens, in the order of embed.EVENTS.
cdef enum:
    EVENT_EXIT = 0                  # detail: EXIT_*; address: linear address, or the value of the register
    EVENT_ZAP = 1                   # a shadow page goes. detail: its number; address: its gfn
    EVENT_PROTECT = 2               # an spte lost W, its frame became a guest table. detail: spte; address: gfn
    EVENT_FLUSH = 3                 # a TLB has to be flushed. detail: FLUSH_*; address: gfn, of sc_mmu.event_frames
    EVENT_COUNT = 4

cdef inline void audit_point(sc_mmu *mmu, u32 point) noexcept nogil:
    if mmu.audit_points >> point & 1:
        mmu.audit(mmu, point)

cdef inline void event(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil:
    if mmu.events >> kind & 1:
        mmu.event(mmu, kind, detail, vcpu, address)

cdef inline void count_exit(sc_mmu *mmu, u32 vcpu, u32 reason, u64 address) noexcept nogil:
    mmu.stats.exits[reason] += 1
    event(mmu, EVENT_EXIT, reason, vcpu, address)
