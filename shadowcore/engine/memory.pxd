"""Host physical space: guest RAM and the shadow pool, each one flat array, and the slots that map gfns to frames."""
from shadowcore.engine.bits cimport pte_addr
from shadowcore.engine.types cimport u8, u32, u64

cdef enum:
    SC_MAX_SLOTS = 32
    SC_POOL_HFN = 256               # host frame number of the first pool frame: 1 MiB
    SC_RAM_ALIGN = 1 << 18          # guest RAM starts at the next multiple of this many frames: 1 GiB

# Of sc_mem.busy.
cdef enum:
    SC_RUNNING = 1                  # a batch runs, without the GIL
    SC_WRITTEN = 2                  # the shadow structure is, or was, written by hand, and was not checked since

cdef struct sc_slot:
    u64 base_gfn                    # first guest frame number of the slot
    u64 npages                      # frames in the slot
    u64 frame                       # index, in guest RAM, of the slot's first frame
    int host_level                  # level of the host's pages under it: 1, 2 or 3
    u64 *dirty                      # dirty log: one bit a frame, or NULL while the slot is not logged

cdef struct sc_mem:
    u8 *ram                         # guest RAM, 4096 bytes a frame
    u64 nframes                     # frames of guest RAM
    u64 low_frames                  # frames from gfn 0 on that are also frame 0, 1, ... of RAM: those of the first slot
    u64 ram_hfn                     # host frame number of RAM frame 0
    u64 *pool                       # shadow pool, 512 entries a frame; NULL without a shadow MMU
    u64 pool_pages                  # frames of the pool
    bint logging                    # some slot has a dirty log
    u32 lent                        # buffers alive through which the shadow tables can be written by hand
    int busy                        # not 0: SC_RUNNING, SC_WRITTEN; nobody else may touch the VM
    int nslots
    sc_slot slots[SC_MAX_SLOTS]     # ascending base_gfn, no two overlap

cdef inline u64 sc_no_frame() noexcept nogil:
    return <u64>-1

cdef inline u64 mem_frame(const sc_mem *m, u64 gfn) noexcept nogil:
    """Index in guest RAM of the frame behind `gfn`, or sc_no_frame() for a gfn in no slot (MMIO)."""
    cdef int i
    if gfn < m.low_frames:
        return gfn
    for i in range(m.nslots):
        if gfn - m.slots[i].base_gfn < m.slots[i].npages:
            return gfn - m.slots[i].base_gfn + m.slots[i].frame
    return sc_no_frame()

cdef inline u64 mem_gfn(const sc_mem *m, u64 frame) noexcept nogil:
    """The gfn that maps to RAM frame `frame`: each frame belongs to exactly one slot."""
    cdef int i
    if frame < m.low_frames:
        return frame
    for i in range(m.nslots):
        if frame - m.slots[i].frame < m.slots[i].npages:
            return frame - m.slots[i].frame + m.slots[i].base_gfn
    return sc_no_frame()

cdef inline int mem_slot(const sc_mem *m, u64 gfn) noexcept nogil:
    """Number of the slot that holds `gfn`, which is in one."""
    cdef int i
    if gfn < m.low_frames:
        return 0
    for i in range(m.nslots):
        if gfn - m.slots[i].base_gfn < m.slots[i].npages:
            return i
    return 0

cdef inline u8 *mem_guest_frame(const sc_mem *m, u64 gpa) noexcept nogil:
    """Host address of the frame that holds `gpa`, or NULL."""
    cdef u64 frame = mem_frame(m, gpa >> 12)
    if frame == sc_no_frame():
        return NULL
    return m.ram + (frame << 12)

cdef inline u8 *mem_host_frame(const sc_mem *m, u64 hpa) noexcept nogil:
    """Host address of the frame at host physical address `hpa`: a pool frame or a RAM frame, else NULL."""
    cdef u64 hfn = (hpa & pte_addr()) >> 12
    if hfn - SC_POOL_HFN < m.pool_pages:
        return <u8 *>m.pool + ((hfn - SC_POOL_HFN) << 12)
    if hfn - m.ram_hfn < m.nframes:
        return m.ram + ((hfn - m.ram_hfn) << 12)
    return NULL

cdef inline u64 mem_pool_hpa(u32 page) noexcept nogil:
    return (<u64>page + SC_POOL_HFN) << 12

cdef inline u32 mem_pool_page(u64 entry) noexcept nogil:
    """Pool page that a present non-leaf spte points to."""
    return <u32>(((entry & pte_addr()) >> 12) - SC_POOL_HFN)

cdef inline u64 mem_frame_hpa(const sc_mem *m, u64 frame) noexcept nogil:
    return (frame + m.ram_hfn) << 12

cdef inline u64 mem_leaf_frame(const sc_mem *m, u64 entry) noexcept nogil:
    """RAM frame that a present leaf spte maps."""
    return ((entry & pte_addr()) >> 12) - m.ram_hfn

cdef inline void mem_mark_dirty(sc_mem *m, u64 gfn) noexcept nogil:
    """Record in the slot's dirty log, if it has one, that frame `gfn` was or may be written."""
    cdef int i
    cdef u64 n
    if not m.logging:
        return
    for i in range(m.nslots):
        n = gfn - m.slots[i].base_gfn
        if n < m.slots[i].npages:
            if m.slots[i].dirty != NULL:
                m.slots[i].dirty[n >> 6] |= <u64>1 << (n & 63)
            return

cdef inline bint mem_unlogged(const sc_mem *m, u64 gfn) noexcept nogil:
    """Frame `gfn` is in a slot with a dirty log that does not show it: its next store has to be seen."""
    cdef int slot
    cdef u64 n
    if not m.logging:
        return False
    slot = mem_slot(m, gfn)
    n = gfn - m.slots[slot].base_gfn
    return m.slots[slot].dirty != NULL and not (m.slots[slot].dirty[n >> 6] >> (n & 63)) & 1

cdef class Memory:
    cdef sc_mem mem
    cdef readonly object bytes      # uint8[nframes * 4096]: guest RAM, slots one after the other
    cdef readonly object words      # uint64[nframes * 512]: the same bytes
    cdef object tables              # uint64[pool_pages, 512]: the shadow tables
    cdef readonly tuple slots       # of MemorySlot
    cdef object _views              # buffers kept alive as long as mem points into them
    cdef dict _logs                 # slot number -> uint64 array behind sc_slot.dirty
    cdef public object on_log       # called with (slot, "start", "stop" or "clear", first frame, frames)
