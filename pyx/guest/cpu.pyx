"""The guest kernel's processors: supervisor accesses through the direct map, string instructions, CR3 loads, INVLPG.

A supervisor access that faults is a panic: the kernel made the tables that it uses.
"""
from libc.stdlib cimport realloc
from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport (
    OP_CR3, OP_CR4, OP_FETCH, OP_INVLPG, OP_READ, OP_WRITE, access_do, sc_op, sc_result, vcpu_op,
)
from shadowcore.engine.bits cimport CR4_PGE
from shadowcore.engine.types cimport RC_OK, u8, u32, u64
from shadowcore.guest.state cimport (
    NO_PROCESS, RC_NOLOG, RC_PANIC, USER_PCID, guest_mix, history_add, sc_gcpu, sc_glog, sc_guest,
)


cdef int cpu_log(sc_guest *g, u32 op, bint user, u32 size, u64 addr, u64 value) noexcept nogil:
    """Write an operation down, before it is made."""
    cdef sc_glog *grown
    cdef u64 room
    if g.log_length == g.log_room:
        room = max(g.log_room * 2, <u64>1 << 14)
        grown = <sc_glog *>realloc(g.log, room * sizeof(sc_glog))
        if grown == NULL:
            return RC_NOLOG
        g.log = grown
        g.log_room = room
    g.log[g.log_length].op = <u8>op
    g.log[g.log_length].user = user
    g.log[g.log_length].size = <u8>size
    g.log[g.log_length].addr = addr
    g.log[g.log_length].value = value
    g.log_length += 1
    return RC_OK


cdef void cpu_go(sc_guest *g, u32 number) noexcept nogil:
    """From here on processor `number` is at work; the one before stops where it is."""
    cdef sc_gcpu *cpu = &g.cpus[g.cpu]
    if g.v != NULL:
        cpu.current, cpu.idle, cpu.in_user = g.current, g.idle, g.in_user
        cpu.asid, cpu.asid_next = g.asid, g.asid_next
        memcpy(cpu.asids, g.asids, sizeof(g.asids))
        memcpy(cpu.spare_stacks, g.spare_stacks, sizeof(g.spare_stacks))
    g.cpu = number
    cpu = &g.cpus[number]
    g.v = cpu.v
    g.current, g.idle, g.in_user = cpu.current, cpu.idle, cpu.in_user
    g.asid, g.asid_next = cpu.asid, cpu.asid_next
    memcpy(g.asids, cpu.asids, sizeof(g.asids))
    memcpy(g.spare_stacks, cpu.spare_stacks, sizeof(g.spare_stacks))


cdef int cpu_access(sc_guest *g, u32 op, u32 size, u64 va, u64 value, sc_result *r) noexcept nogil:
    """A supervisor access at linear address `va`."""
    cdef sc_op o
    cdef int rc
    if g.recording:
        rc = cpu_log(g, op, False, size, va, value)
        if rc != RC_OK:
            return rc
    memset(&o, 0, sizeof(o))
    o.op = <u8>op
    o.size = <u8>size
    o.addr = va
    o.value[0] = value
    g.n.kernel_accesses += 1
    rc = access_do(g.mmu, g.v, &o, True, r)
    return RC_PANIC if rc > 0 else rc


cdef int _load(sc_guest *g, u32 op, u64 value) noexcept nogil:
    """The kernel's load of a control register."""
    cdef sc_op o
    cdef sc_result r
    cdef int rc
    if g.recording:
        rc = cpu_log(g, op, False, 8, 0, value)
        if rc != RC_OK:
            return rc
    memset(&o, 0, sizeof(o))
    o.op = <u8>op
    o.value[0] = value
    rc = vcpu_op(g.mmu, g.v, &o, True, &r)
    return RC_PANIC if rc > 0 else rc


cdef int cpu_load_cr3(sc_guest *g, u64 value) noexcept nogil:
    cdef int rc = _load(g, OP_CR3, value)
    if rc != RC_NOLOG:              # what could not be written down was not made
        g.n.cr3_loads += 1
    return rc


cdef int cpu_invlpg(sc_guest *g, u64 va) noexcept nogil:
    cdef sc_op o
    cdef sc_result r
    cdef int rc
    if g.recording:
        rc = cpu_log(g, OP_INVLPG, False, 8, va, 0)
        if rc != RC_OK:
            return rc
    memset(&o, 0, sizeof(o))
    o.op = OP_INVLPG
    o.addr = va
    g.n.invlpg += 1
    return vcpu_op(g.mmu, g.v, &o, True, &r)


cdef int cpu_string(sc_guest *g, u64 gpa, const u8 *source, u32 nbytes) noexcept nogil:
    """REP STOSQ (source NULL: zeros) or REP MOVSQ to [gpa, gpa + nbytes), through the direct map."""
    return cpu_string_at(g, g.direct_map + gpa, gpa, source, nbytes)


cdef int cpu_string_at(sc_guest *g, u64 va, u64 gpa, const u8 *source, u32 nbytes) noexcept nogil:
    """The same at linear address `va`, which leads to `gpa`; within a frame, multiples of 8.

    Stores are made one by one while the emulator does them: a frame that is shadowed as the table of an earlier life
    meets a write flood here, under a design that does not ask by which instructions tables are written. Once a store
    was made by the processor itself, nothing can come between the rest of them, which translate as that one did, and
    they are made in one piece; but one by one while recording.
    """
    cdef sc_result r
    cdef u64 word
    cdef u64 before = g.n.kernel_accesses
    cdef u32 at = 0
    cdef int rc
    if (gpa + nbytes - 1) >> 12 >= g.all_frames:
        return RC_PANIC             # where a broken table of a process led
    while at < nbytes:
        word = 0
        if source != NULL:
            memcpy(&word, source + at, 8)
        g.v.odd_stores = True
        g.n.kernel_accesses = before        # one instruction, into however many stores a design cuts it
        rc = cpu_access(g, OP_WRITE, 8, va + at, word, &r)
        g.v.odd_stores = False
        if rc != RC_OK:
            return rc
        at += 8
        if r.gpa != gpa + at - 8:
            return RC_PANIC
        if not r.emulated and not g.recording:
            break
    if at < nbytes:
        if source == NULL:
            memset(g.ram + gpa + at, 0, nbytes - at)
        else:
            memcpy(g.ram + gpa + at, source + at, nbytes - at)
    history_add(g, gpa, nbytes)
    return RC_OK


cdef u64 _cr3(const sc_guest *g, u32 p, bint user) noexcept nogil:
    cdef u64 value = g.procs[p].user_root if user else g.procs[p].root
    if g.pcid:
        value |= g.asid + 1 + (USER_PCID if user else 0)
    return value


cdef int cpu_load_root(sc_guest *g, u32 p, bint keep) noexcept nogil:
    """Load the kernel's root of process `p`, which becomes the current one. keep: PCID: without a flush."""
    g.current = p
    g.in_user = False
    if not keep and g.pcid:
        g.asids[g.asid].changed = g.procs[p].changed
        g.asids[g.asid].flush_user = True
    return cpu_load_cr3(g, _cr3(g, p, False) | (<u64>1 << 63 if keep and g.pcid else 0))


cdef int cpu_flush_all(sc_guest *g) noexcept nogil:
    """Flush every translation of the current process that is not global."""
    g.n.full_flushes += 1
    if g.current == NO_PROCESS:
        return cpu_load_cr3(g, g.kernel_root)
    return cpu_load_root(g, g.current, False)


cdef int cpu_flush_global(sc_guest *g) noexcept nogil:
    """Flush every translation on every processor, global ones too: CR4.PGE changes and changes back."""
    cdef u32 here = g.cpu
    cdef u32 i
    cdef int rc = RC_OK
    for i in range(g.n_cpus):
        if rc == RC_OK:
            cpu_go(g, i)
            g.n.full_flushes += 1
            g.n.shootdowns += i != here
            rc = _load(g, OP_CR4, g.v.cr4 ^ CR4_PGE)
        if rc == RC_OK:
            rc = _load(g, OP_CR4, g.v.cr4 ^ CR4_PGE)
    cpu_go(g, here)
    return rc


cdef int cpu_enter(sc_guest *g) noexcept nogil:
    """From user code into the kernel. With isolation: push the frame on the entry page, then load the kernel's root."""
    cdef sc_result r
    cdef int rc
    if not g.in_user:
        return RC_OK
    g.in_user = False
    if not g.isolation:
        return RC_OK
    rc = cpu_access(g, OP_WRITE, 8, g.entry_va + 8 * (g.sequence & 255), g.sequence, &r)
    if rc != RC_OK:
        return rc
    return cpu_load_cr3(g, _cr3(g, g.current, False) | (<u64>1 << 63 if g.pcid else 0))


cdef int cpu_leave(sc_guest *g) noexcept nogil:
    """From the kernel to user code of the current process."""
    cdef bint keep
    if g.in_user:
        return RC_OK
    g.in_user = True
    if not g.isolation:
        return RC_OK
    keep = g.pcid and not g.asids[g.asid].flush_user
    if g.pcid:
        g.asids[g.asid].flush_user = False
    return cpu_load_cr3(g, _cr3(g, g.current, True) | (<u64>1 << 63 if keep else 0))


cdef int _by_gate(sc_guest *g) noexcept nogil:
    """An interrupt or exception as the processor takes it: the gate is read and a frame pushed, both in the entry area,
    and the handler is in the kernel's text."""
    cdef sc_result r
    cdef int rc = cpu_access(g, OP_READ, 8, g.idt + 16 * (g.sequence & 255), 0, &r)
    if rc == RC_OK:
        rc = cpu_access(g, OP_WRITE, 8, g.entry_va + 8 * (g.sequence & 255), g.sequence, &r)
    if rc == RC_OK:
        rc = cpu_access(g, OP_FETCH, 1, g.text + (g.sequence & 0xFFF), 0, &r)
    return rc


cdef int cpu_work(sc_guest *g, u32 p, u32 accesses) noexcept nogil:
    """The kernel's own loads and stores at an entry: its stack, for half of them, and its data."""
    cdef sc_result r
    cdef u64 gpa
    cdef u32 i
    cdef int rc
    if g.regions:
        rc = _by_gate(g)
        if rc != RC_OK:
            return rc
    for i in range(accesses):
        g.sequence += 1
        if i & 1 or p == NO_PROCESS:
            gpa = (guest_mix(g.sequence) % g.data_frames << 12) + (g.sequence * 8 & 0xFF8)
            rc = cpu_access(g, OP_READ if i & 2 else OP_WRITE, 8, g.image + gpa, g.sequence, &r)
            gpa += g.data_first << 12
        else:
            gpa = 0xFF8 - 8 * i & 0xFF8
            rc = cpu_access(g, OP_WRITE, 8, g.procs[p].stack_at + gpa, g.sequence, &r)
            gpa += g.procs[p].stack << 12
        if rc != RC_OK:
            return rc
        if r.gpa != gpa:
            return RC_PANIC
        history_add(g, gpa, r.value[0])
    return RC_OK
