"""TLB flushes: why one is needed, and the request of one."""
from shadowcore.engine.hooks cimport EVENT_FLUSH, event
from shadowcore.engine.quirks cimport QUIRK_EXIT_FLUSHES
from shadowcore.engine.state cimport REQUEST_FLUSH, sc_mmu, vcpu_request
from shadowcore.engine.types cimport SC_NONE, u32, u64

# Why a TLB has to be flushed, in the order of mmu.FLUSHES.
cdef enum:
    FLUSH_PROTECT = 0               # a frame became a guest table: its writable sptes lost W
    FLUSH_ZAP = 1                   # a leaf table was zapped
    FLUSH_ZAP_UPPER = 2             # a table above the leaves was zapped
    FLUSH_STORE = 3                 # an emulated store dropped a present entry
    FLUSH_WITHHELD = 4              # W was withheld from a new leaf
    FLUSH_LEAF = 5                  # a present leaf lost W or got another frame
    FLUSH_LINK = 6                  # an upper entry was turned to another page
    FLUSH_LOG = 7                   # a dirty log was started or cleared
    FLUSH_CR3 = 8                   # the guest loaded CR3
    FLUSH_CONTEXT = 9               # the guest loaded CR0, CR4 or EFER
    FLUSH_INVLPG = 10               # the guest's INVLPG
    FLUSH_FAULT = 11                # a page fault of the guest
    FLUSH_SLOTS = 12                # memory slots changed
    FLUSH_HOST = 13                 # the host took frames away
    FLUSH_COUNT = 14

cdef inline bint flush_lost(const sc_mmu *mmu, int why) noexcept nogil:
    return mmu.lost_flushes >> why & 1

cdef inline void exit_flush(sc_mmu *mmu) noexcept nogil:
    """An exit: with the quirk EXIT_FLUSHES (no VPID) it is a flush of its own, and not counted."""
    if mmu.quirks & QUIRK_EXIT_FLUSHES:
        mmu.flush_epoch += 1

cdef inline void untold_flush(sc_mmu *mmu, int why) noexcept nogil:
    """request_flush, of which the caller tells."""
    cdef u32 i
    if mmu.deferred:
        mmu.stats.remote_tlb_flush_requests += 1
        for i in range(mmu.n_vcpus):
            vcpu_request(mmu.vcpus[i], REQUEST_FLUSH)
    else:
        mmu.stats.tlb_flush += 1
        if mmu.n_vcpus > 1:
            mmu.stats.remote_tlb_flush += 1
    if not flush_lost(mmu, why):
        mmu.flush_epoch += 1

cdef inline void request_flush(sc_mmu *mmu, int why) noexcept nogil:
    """The shadow MMU withdrew something that a TLB may hold: no entry of any vcpu outlives this. Who is told is told
    that it may be anything."""
    untold_flush(mmu, why)
    event(mmu, EVENT_FLUSH, why, SC_NONE, 0)

cdef inline void entry_flush(sc_mmu *mmu, int why) noexcept nogil:
    """request_flush for an entry that was dropped; with the quirk EXIT_FLUSHES the flush that the exit is anyway."""
    if mmu.quirks & QUIRK_EXIT_FLUSHES:
        exit_flush(mmu)
    else:
        request_flush(mmu, why)

cdef void request_flush_of(sc_mmu *mmu, int why, u64 gfn, u64 frames) noexcept nogil
