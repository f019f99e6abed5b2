"""Host physical space: guest RAM and the shadow pool, each one flat array, and the slots that map gfns to frames."""
from shadowcore.engine.backing cimport host_level, host_touch, host_writable, sc_backing
from shadowcore.engine.bits cimport pte_addr
from shadowcore.engine.types cimport PF_W, u8, u32, u64

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
    u64 npages                      # frames in the slot; 0: no slot has this number
    u64 frame                       # index, in guest RAM, of the slot's first frame
    int host_level                  # level of the host's pages under it: 1, 2 or 3
    u64 *dirty                      # dirty log: one bit a frame, or NULL while the slot is not logged
    bint read_only                  # stores are the embedder's, as those to a device are; loads are RAM's

cdef struct sc_mem:
    u8 *ram                         # guest RAM, 4096 bytes a frame
    u64 nframes                     # frames of guest RAM
    u64 low_frames                  # frames from gfn 0 on that are also frame 0, 1, ... of RAM: slot 0's, or none
    u64 ram_hfn                     # host frame number of RAM frame 0
    u64 *pool                       # shadow pool, 512 entries a frame; NULL without a shadow MMU
    u64 pool_pages                  # frames of the pool
    bint logging                    # some slot has a dirty log
    u32 lent                        # buffers alive through which the shadow tables can be written by hand
    int busy                        # not 0: SC_RUNNING, SC_WRITTEN; nobody else may touch the VM
    int nslots                      # the highest number of a slot, plus one
    sc_slot slots[SC_MAX_SLOTS]     # by number; no two share a gfn or a frame
    sc_backing *host                # what the host has of guest RAM; NULL: all of it, for good
    bint special                    # some slot is read-only, or `host` is there: RAM is not just there

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
    """The gfn that maps to RAM frame `frame`, or sc_no_frame() for one in no slot: it belongs to one at most."""
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

cdef inline bint mem_is_rom(const sc_mem *m, u64 gfn) noexcept nogil:
    """Frame `gfn` is in a read-only slot."""
    cdef int slot
    if not m.special:
        return False
    slot = mem_slot(m, gfn)
    return m.slots[slot].read_only and gfn - m.slots[slot].base_gfn < m.slots[slot].npages

cdef inline bint mem_is_device(const sc_mem *m, u64 gfn, u32 access) noexcept nogil:
    """An access (PF_*) to frame `gfn` is the embedder's: there is no RAM, or it is a store to a read-only slot."""
    return mem_frame(m, gfn) == sc_no_frame() or (access & PF_W and mem_is_rom(m, gfn))

cdef inline void mem_touch(sc_mem *m, u64 gfn, bint write) noexcept nogil:
    """The frame of `gfn`, if it is RAM, is accessed: the host makes what it lacks."""
    cdef u64 frame
    if m.host != NULL:
        frame = mem_frame(m, gfn)
        if frame != sc_no_frame():
            host_touch(m.host, frame, write)

cdef inline bint mem_may_write(const sc_mem *m, u64 gfn, u64 frame) noexcept nogil:
    """As far as the slot and the host go, a leaf may let stores reach frame `frame` of RAM, that of `gfn`."""
    return not m.special or (not mem_is_rom(m, gfn) and (m.host == NULL or host_writable(m.host, frame)))

cdef inline int mem_host_level(const sc_mem *m, int slot, u64 frame) noexcept nogil:
    """Level of the host's page under a frame of a slot."""
    return m.slots[slot].host_level if m.host == NULL else host_level(m.host, frame)

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
    cdef public object on_slots     # called with (what, slot) before and after slots change, see Mmu.slots_changed
    cdef public object on_backing   # called when `backing` came to be
    cdef sc_backing backing         # behind mem.host
    cdef tuple _backed              # the arrays that it points into
    cdef object _outer              # ... and that of the outer host, or None

    cdef int _place(self, int number, slot, u64 frame) except -1
    cdef int _settled(self, int number, slot) except -1
    cdef int _back_outer(self, has, bint huge) except -1
    cdef int _fill(self, u64 first, u64 n, kind, int level, bint given) except -1
    cdef int _log(self, int index, initially_set) except -1
    cdef bint _has(self, int number)
    cdef int _slot(self, slot) except -1
    cdef int _free_number(self) except -1
    cdef list _used(self)
