"""The function that Unicorn calls where its TLB misses, for `shadowcore.unicorn.machine` with way "fills".

Of most misses the access is one that the guest's tables allow, to RAM, and nothing else is under way. They are served
here, without Python. All others are handed to a method of the machine, with nothing changed.
"""
from libc.string cimport memset

from shadowcore.engine.access cimport (
    OP_FETCH, OP_READ, OP_WRITE, access_glance, access_missed, sc_op, sc_result,
)
from shadowcore.engine.bits cimport CR4_SMAP
from shadowcore.engine.memory cimport mem_frame, mem_frame_hpa, mem_is_device, sc_no_frame
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.quirks cimport (
    QUIRK_NX_LEAF_ONLY, QUIRK_PROCESSOR_CODE, QUIRK_ROLE_WITHOUT_ACCESS, QUIRK_ROLE_WITHOUT_MODE, QUIRK_ROOT_EMPTIED,
)
from shadowcore.engine.state cimport linear_address, linear_exists, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport ACC_W, MODE_OFF, PF_I, PF_U, PF_W, RC_OK, u16, u32, u64
from shadowcore.engine.vcpu cimport VCpu
from shadowcore.engine.walker cimport probe_walk, sc_walk

cdef enum:
    # uc_mem_type of the hook, and UC_PROT_*, by unicorn.h.
    FILL_READ = 16
    FILL_WRITE = 17
    PROT_READ = 1
    PROT_WRITE = 2
    PROT_EXEC = 4
    FLAG_AC = 1 << 18
    # Quirks by which an access that the guest's tables allow may fail.
    UNUSUAL = (QUIRK_ROLE_WITHOUT_ACCESS | QUIRK_ROLE_WITHOUT_MODE | QUIRK_NX_LEAF_ONLY | QUIRK_PROCESSOR_CODE
               | QUIRK_ROOT_EMPTIED)

cdef struct sc_fill_entry:          # uc_tlb_entry
    u64 paddr
    u32 perms

cdef struct sc_fill_table:          # uc_x86_mmr
    u16 selector
    u64 base
    u32 limit
    u32 flags

ctypedef int (*sc_register_read)(void *uc, int register, void *value) noexcept nogil

cdef struct sc_fills:
    sc_mmu *mmu
    sc_vcpu *v
    sc_register_read read           # uc_reg_read
    int cs, flags                   # numbers of registers
    int tables[3]                   # of GDTR, LDTR, TR
    bint alone                      # nothing but fills is under way
    void *owner                     # Fills


cdef inline bint _may_store(const sc_mmu *mmu, const sc_vcpu *v, u64 va, bint user) noexcept nogil:
    """A store that the processor is allowed to make by itself: not one to a guest table, nor one that only CR0.WP = 0
    allows. Where the guest's walk fails there is no frame to go to, and the fault tells."""
    cdef sc_walk w
    cdef u64 frame
    va = linear_address(v, va)
    if not mmu.shadow or not linear_exists(v, va):
        return True
    if probe_walk(mmu.mem, &v.guest, va, PF_W | (PF_U if user else 0), &w) != RC_OK:
        return True
    frame = mem_frame(mmu.mem, w.gpa >> 12)
    return frame == sc_no_frame() or (not mmu.frames[frame].shadowed
                                      and (v.guest.mode == MODE_OFF or w.access & ACC_W))


def may_store(VCpu cpu not None, u64 gva, bint user) -> bool:
    """The processor may make a store of `cpu` to `gva` by itself. If not, the emulator has to, or may have to."""
    return _may_store(cpu.mmu.c, cpu.c, gva, user)


cdef bint _in_table(const sc_fills *f, void *uc, u64 page) noexcept nogil:
    """Some of the GDT, the LDT or the TSS lies in `page`."""
    cdef sc_fill_table table
    cdef int i
    for i in range(3):
        memset(&table, 0, sizeof(table))
        f.read(uc, f.tables[i], &table)
        if table.limit and page - (table.base & ~<u64>4095) <= table.limit + (table.base & 4095):
            return True
    return False


cdef inline bint _leads_to_ram(const sc_mmu *mmu, const sc_vcpu *v, const sc_op *o) noexcept nogil:
    """The guest's tables allow the access, and its frame is none of theirs, which may get a shadow on the way: it will
    be made as it is, whatever exits it takes."""
    cdef sc_walk w
    cdef u64 va = linear_address(v, o.addr)
    cdef u32 access = (PF_U if o.user else 0) | (PF_W if o.op == OP_WRITE else PF_I if o.op == OP_FETCH else 0)
    cdef int level
    if mmu.quirks & UNUSUAL or not linear_exists(v, va):
        return False
    if probe_walk(mmu.mem, &v.guest, va, access, &w) != RC_OK:
        return False
    if v.guest.mode != MODE_OFF:
        for level in range(w.level, w.top + 1):
            if w.table[level] == w.gpa >> 12:
                return False
    return not mem_is_device(mmu.mem, w.gpa >> 12, access)


cdef bint _serve(const sc_fills *f, void *uc, u64 page, int kind, sc_fill_entry *entry) noexcept nogil:
    cdef sc_mmu *mmu = f.mmu
    cdef sc_vcpu *v = f.v
    cdef sc_op op
    cdef sc_result r
    cdef u64 selector = 0
    cdef u64 flags = 0
    cdef u64 frame
    if mmu.events or mmu.audit_points or v.tlb != NULL:
        return False
    f.read(uc, f.cs, &selector)
    memset(&op, 0, sizeof(op))
    op.op = OP_READ if kind == FILL_READ else OP_WRITE if kind == FILL_WRITE else OP_FETCH
    op.size = 1
    op.addr = page
    op.user = (selector & 3) == 3
    if v.cr4 & CR4_SMAP:
        # For user code, too, descriptors are read as the supervisor does: SMAP alone may refuse that where user code is
        # allowed. What user code is not allowed is not served here at all.
        if op.user:
            if op.op != OP_FETCH and _in_table(f, uc, page):
                return False
        else:
            f.read(uc, f.flags, &flags)
            if ((flags & FLAG_AC) != 0) != (v.guest.ac != 0):
                return False
    if op.op == OP_WRITE and not _may_store(mmu, v, page, op.user):
        return False
    if not access_glance(mmu, v, &op, False, &r):
        # What fails here, for want of pages, fails again where it can be raised.
        if not _leads_to_ram(mmu, v, &op) or access_missed(mmu, v, &op, False, &r) != RC_OK or r.emulated:
            return False
    if mmu.shadow:
        frame = mem_frame(mmu.mem, r.gpa >> 12)
        entry.paddr = mem_frame_hpa(mmu.mem, frame)
    else:
        entry.paddr = r.gpa & ~<u64>4095
    entry.perms = PROT_READ if op.op == OP_READ else PROT_READ | PROT_WRITE if op.op == OP_WRITE else PROT_EXEC
    return True


cdef bint _flush(Fills fills) noexcept with gil:
    """The MMU asked for a flush, as it made a table's shadow: translations that Unicorn holds may allow too much, and
    the guest must not go on with them."""
    try:
        fills.flush()
        return True
    except BaseException as error:
        fills.error = error
        fills.c.alone = False
        return False


cdef bint _ask(Fills fills, u64 address, int kind, sc_fill_entry *entry) noexcept with gil:
    """All other misses: by the method, which returns (paddr, perms), or None for a miss that is not to be filled."""
    try:
        found = fills.other(address, kind)
        fills.c.alone = fills.is_alone()
        if found is None:
            return False
        entry.paddr, entry.perms = found[0], found[1]
        return True
    except BaseException as error:
        fills.error = error
        fills.c.alone = False
        return False


cdef bint _fill(void *uc, u64 address, int kind, sc_fill_entry *entry, void *data) noexcept nogil:
    cdef sc_fills *f = <sc_fills *>data
    cdef u64 flushes = f.mmu.stats.tlb_flush + f.mmu.stats.remote_tlb_flush_requests
    cdef bint served
    if f.alone and not f.mmu.mem.busy:
        f.mmu.mem.busy = True
        served = _serve(f, uc, address & ~<u64>4095, kind, entry)
        f.mmu.mem.busy = False
        if served:
            return f.mmu.stats.tlb_flush + f.mmu.stats.remote_tlb_flush_requests == flushes or _flush(<Fills>f.owner)
    return _ask(<Fills>f.owner, address, kind, entry)


cdef class Fills:
    """Serves the misses of one machine.

    cpu: whose accesses they are. read: address of uc_reg_read. registers: Unicorn's numbers of CS, EFLAGS, GDTR, LDTR
    and TR.
    other(address, kind): serves what is not served here, returns (paddr, perms) or None. is_alone(): is nothing else
    under way? flush(): has Unicorn drop all translations. error: what one of them raised, or None.
    """
    cdef sc_fills c
    cdef object cpu
    cdef object other
    cdef object is_alone
    cdef object flush
    cdef public object error

    def __init__(self, VCpu cpu not None, size_t read, tuple registers, other, is_alone, flush):
        cdef Mmu mmu = cpu.mmu
        self.cpu = cpu
        self.other, self.is_alone, self.flush = other, is_alone, flush
        self.c.mmu = mmu.c
        self.c.v = cpu.c
        self.c.read = <sc_register_read>read
        self.c.cs, self.c.flags, self.c.tables[0], self.c.tables[1], self.c.tables[2] = registers
        self.c.owner = <void *>self

    def begin(self) -> None:
        """Before each run of Unicorn: ask anew what is under way."""
        self.c.alone = self.is_alone()

    @property
    def function(self) -> int:
        """Address of the hook (uc_cb_tlbevent_t)."""
        return <size_t>&_fill

    @property
    def data(self) -> int:
        """Its user data. Good for as long as this object lives."""
        return <size_t>&self.c
