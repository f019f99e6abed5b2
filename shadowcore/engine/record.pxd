"""What the shadow MMU does, event by event, recorded where somebody asked for it, as KVM's tracepoints tell it."""
from shadowcore.engine.state cimport sc_event, sc_mmu
from shadowcore.engine.types cimport u32, u64

# In the order of record.RECORDED. a, b, c of each:
cdef enum:
    RECORD_ACCESSED = 0             # gpa of the guest's entry in which a walk of the MMU's set A
    RECORD_DIRTY = 1                # ... D
    RECORD_MADE = 2                 # a shadow page was made: gfn, role, 2 * root_count + unsync
    RECORD_FOUND = 3                # ... found by gfn and role: the same
    RECORD_SYNCED = 4               # ... is no longer unsync: the same, as it was
    RECORD_UNSYNC = 5               # ... becomes unsync: the same, as it was
    RECORD_ZAPPED = 6               # ... is zapped: the same, as it was
    RECORD_LEAF = 7                 # a leaf was set: gfn, the entry (or record_read_only), its level
    RECORD_DEVICE = 8               # an entry remembers a device: gfn, ACC_*
    RECORD_DEVICE_HIT = 9           # ... was met: gfn, ACC_*
    RECORD_EXIT = 10                # a page-fault exit: linear address, the processor's error code
    RECORD_EMULATED = 11            # an instruction is given to the emulator: linear address of its operand
    RECORD_ALL_ZAPPED = 12          # a change of the memory slots zaps all pages: how many there are, sc_mmu.valid_gen
    RECORD_DEVICE_CHECKED = 13      # an entry that remembers a device was met: c, whether it is of these memory slots
    # Design nested. RECORD_EXIT has the gpa, and the error code with its bits 32 and 33.
    RECORD_CHANGED = 14             # an entry of the TDP MMU changed: gfn, record_flags, before and after, level
    RECORD_SPLIT = 15               # a large leaf was split into a table: gfn, the leaf, its level
    RECORD_FAST = 16                # W was tried without the lock: gpa, error code, FAST_PF_*
    RECORD_COUNT = 17

# What became of the attempt of a RECORD_FAST.
cdef enum:
    FAST_PF_NONE = 3                # nothing: the fault is handled as others are
    FAST_PF_FIXED = 4
    FAST_PF_SPURIOUS = 5            # the entry allowed it already

cdef inline u64 record_read_only() noexcept nogil:
    """Beside the entry of a RECORD_LEAF, in a bit that none has: the host's page, or its slot, may only be read."""
    return <u64>1 << 52

cdef inline void record(sc_mmu *mmu, u32 kind, u64 a, u64 b, u32 c) noexcept nogil:
    if mmu.ring == NULL:
        return
    if mmu.ring.room.count < mmu.ring.room.size:
        mmu.ring.event[mmu.ring.room.count] = sc_event(a, b, kind, c)
    mmu.ring.room.count += 1

cdef inline u32 record_flags(u64 entry) noexcept nogil:
    """What a RECORD_CHANGED tells of an entry: bits 0 to 11 as they are, NX as bit 12, the generation of one that
    remembers a device from bit 14 on."""
    return <u32>(entry & 0xFFF) | <u32>(entry >> 63) << 12 | (0 if entry & 1 else <u32>(entry >> 52 & 0x7FF) << 14)

cdef inline u32 record_removed() noexcept nogil:
    """In the place of record_flags: the entry is taken out of use."""
    return <u32>1 << 31

cdef inline void record_page(sc_mmu *mmu, u32 kind, u32 page) noexcept nogil:
    if mmu.ring != NULL:
        record(mmu, kind, mmu.pages[page].gfn, mmu.pages[page].role,
               2 * mmu.pages[page].root_count + mmu.pages[page].unsync)
