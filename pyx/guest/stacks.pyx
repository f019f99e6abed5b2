"""Kernel stacks of processes.

Either a stack is a frame, used through the direct map. Or it is four frames that need not lie together, mapped by
4096-byte pages in an area of the kernel's own (vmalloc), as in Linux since 4.9 (CONFIG_VMAP_STACK; kernel/fork.c,
mm/vmalloc.c):

- Stacks are 16 KiB, aligned so, with a page behind each that is never mapped: 32 KiB apart.
- The area's top entry is made at boot, and copied into each root; the tables below are shared, made when they are
  needed, and stay.
- Two stacks of dead processes are kept on each processor, mapped, and cleared when they serve again. Others are
  unmapped, and their frames freed, at once; not their addresses, which a TLB may still know: those are lost until so
  many are that one flush of everything, global translations too, is due for them all (lazy_max_pages).

Linux waits for a grace period of RCU before it unmaps a stack, and in that time may find room among those that it
keeps. Time is not modelled: here it is unmapped when its process is left.
"""
from shadowcore.engine.access cimport OP_READ, OP_WRITE, sc_result
from shadowcore.engine.bits cimport PTE_A, PTE_P, PTE_W
from shadowcore.engine.types cimport RC_OK, u32, u64
from shadowcore.guest.cpu cimport cpu_access, cpu_flush_global, cpu_string_at
from shadowcore.guest.frames cimport frame_filled, frame_put, frame_take
from shadowcore.guest.state cimport (
    FRAME_KERNEL, FRAME_TABLE, RC_NOMEM, RC_NOROOM, RC_PANIC, SPARE_STACKS, STACK_FREE, STACK_LOST,
    STACK_USED, guest_index, sc_gproc, sc_guest,
)
from shadowcore.guest.tables cimport entry_frame, entry_read, entry_set, entry_take, table_look

cdef enum:
    PAGES = 4                       # of a stack (THREAD_SIZE)
    REACH = 8                       # pages of addresses: its own, one that is none, and what aligns the next
    LOST_PAGES = 8192               # pages of lost addresses, for each bit of the number of processors
    FRAME_OF_USER = 168             # bytes at the top: the registers of user code (struct pt_regs)
    MAGIC = 0x57AC6E9D              # in the lowest word (STACK_END_MAGIC)


cdef int _table(sc_guest *g, u64 va, bint make, u64 *table) noexcept nogil:
    """The leaf table for `va` in the kernel's area; made, with those above it but the top one, where it is missing."""
    cdef u64 at = g.kernel_root
    cdef u64 entry, frame
    cdef u32 index
    cdef int level = g.levels
    cdef int rc
    while level > 1:
        index = guest_index(g, va, level)
        entry = entry_read(g, at, index)
        if not entry & PTE_P:
            if not make or level == g.levels:
                return RC_PANIC
            rc = frame_filled(g, FRAME_TABLE, NULL, &frame)
            if rc != RC_OK:
                return rc
            g.kind[frame] = FRAME_KERNEL    # for good, and no process's
            entry = frame << 12 | PTE_P | PTE_W | PTE_A
            rc = entry_set(g, at, index, entry)
            if rc != RC_OK:
                return rc
        at = entry_frame(entry) << 12
        if at >> 12 >= g.nframes:
            return RC_PANIC
        level -= 1
    table[0] = at
    return table_look(g, at)


cdef inline u64 _address(const sc_guest *g, u64 number) noexcept nogil:
    return g.stack_area + number * REACH * 4096


cdef inline u64 _number(const sc_guest *g, u64 address) noexcept nogil:
    return (address - g.stack_area) // (REACH * 4096)


cdef u64 _lost_most(const sc_guest *g) noexcept nogil:
    """How many stacks' addresses may be lost at most."""
    cdef u64 pages = 0
    cdef u32 processors = g.n_cpus
    while processors:
        pages += LOST_PAGES
        processors >>= 1
    return pages // (PAGES + 1)


cdef u64 stack_places(const sc_guest *g) noexcept nogil:
    """Places for stacks: of all processes, those that are kept, and those that are lost at most."""
    return g.max_procs + 1 + <u64>SPARE_STACKS * g.n_cpus + _lost_most(g) + 1


cdef int _place(sc_guest *g, u64 *address) noexcept nogil:
    """The lowest addresses that are free."""
    while g.stack_next < g.stack_places and g.stack_state[g.stack_next] != STACK_FREE:
        g.stack_next += 1
    if g.stack_next == g.stack_places:
        return RC_NOROOM
    address[0] = _address(g, g.stack_next)
    return RC_OK


cdef int _map(sc_guest *g, u64 address) noexcept nogil:
    """Four frames, cleared, are mapped at `address`."""
    cdef u64 frames[PAGES]
    cdef u64 table = 0
    cdef u32 i
    cdef u32 taken = 0
    cdef int rc = _table(g, address, True, &table)
    while rc == RC_OK and taken < <u32>PAGES:
        rc = frame_filled(g, FRAME_KERNEL, NULL, &frames[taken])
        taken += rc == RC_OK
    for i in range(taken):
        if rc == RC_OK:
            rc = entry_set(g, table, guest_index(g, address, 1) + i, frames[i] << 12 | g.stack_bits)
        elif rc == RC_NOMEM:
            frame_put(g, frames[i])
    if rc == RC_OK:
        g.stack_state[_number(g, address)] = STACK_USED
        g.n.stacks_mapped += 1
    return rc


cdef int _frame(sc_guest *g, u64 address, u32 page, u64 *frame) noexcept nogil:
    cdef u64 table = 0
    cdef u64 entry
    cdef int rc = _table(g, address, False, &table)
    if rc != RC_OK:
        return rc
    entry = entry_read(g, table, guest_index(g, address, 1) + page)
    frame[0] = entry_frame(entry)
    return RC_OK if entry & PTE_P and frame[0] < g.nframes and g.kind[frame[0]] == FRAME_KERNEL else RC_PANIC


cdef int _store(sc_guest *g, u64 va, u64 frame, u64 value) noexcept nogil:
    cdef sc_result r
    cdef int rc = cpu_access(g, OP_WRITE, 8, va, value, &r)
    return RC_PANIC if rc == RC_OK and r.gpa != (frame << 12) + (va & 4095) else rc


cdef int stack_take(sc_guest *g, u32 p) noexcept nogil:
    """A stack for process `p`: one that is kept, or a new one."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u64 address = 0
    cdef u64 frame
    cdef u32 i
    cdef int rc = RC_OK
    if not g.vmap_stacks:
        process.stack = frame_take(g, FRAME_KERNEL)
        process.stack_at = g.direct_map + (process.stack << 12)
        return RC_OK if process.stack else RC_NOMEM
    for i in range(<u32>SPARE_STACKS):
        if g.spare_stacks[i]:
            address, g.spare_stacks[i] = g.spare_stacks[i], 0
            break
    if address:
        process.stack_at = address + (PAGES - 1) * 4096     # from here on it is the process's, whatever happens
        for i in range(<u32>PAGES):
            rc = _frame(g, address, i, &frame)
            if rc == RC_OK:
                rc = cpu_string_at(g, address + 4096 * i, frame << 12, NULL, 4096)
            if rc != RC_OK:
                return rc
    else:
        rc = _place(g, &address)
        if rc == RC_OK:
            rc = _map(g, address)
        if rc != RC_OK:
            return rc
        process.stack_at = address + (PAGES - 1) * 4096
    rc = _frame(g, address, PAGES - 1, &process.stack)
    if rc == RC_OK:
        rc = _frame(g, address, 0, &frame)
    if rc == RC_OK:
        rc = _store(g, address, frame, MAGIC)
    if rc == RC_OK:
        rc = _store(g, process.stack_at + 4096 - FRAME_OF_USER, process.stack, g.sequence)
    return rc


cdef int _purge(sc_guest *g) noexcept nogil:
    """Lost addresses are free again, after a flush of everything on every processor."""
    cdef u64 i
    for i in range(g.stack_places):
        if g.stack_state[i] == STACK_LOST:
            g.stack_state[i] = STACK_FREE
    g.stack_next = g.stacks_lost = 0
    return cpu_flush_global(g)


cdef int _unmap(sc_guest *g, u64 address) noexcept nogil:
    cdef u64 table = 0
    cdef u64 old, frame
    cdef u32 i
    cdef int rc = _table(g, address, False, &table)
    for i in range(<u32>PAGES):
        if rc == RC_OK:
            rc = _frame(g, address, i, &frame)
        if rc == RC_OK:
            rc = entry_take(g, table, guest_index(g, address, 1) + i, &old)
        if rc != RC_OK:
            return rc
        g.n.leaf_clears -= 1        # those of processes are counted
        frame_put(g, frame)
    g.stack_state[_number(g, address)] = STACK_LOST
    g.stacks_lost += 1
    g.n.stacks_unmapped += 1
    return _purge(g) if g.stacks_lost > _lost_most(g) else RC_OK


cdef int stack_give(sc_guest *g, u32 p) noexcept nogil:
    """Process `p`, which runs no more, gives up its stack, if it has one."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u64 address = process.stack_at
    cdef u64 frame = process.stack
    cdef u32 i
    process.stack = process.stack_at = 0
    if not g.vmap_stacks:
        if frame:
            frame_put(g, frame)
        return RC_OK
    if address == 0:
        return RC_OK
    address -= (PAGES - 1) * 4096
    for i in range(<u32>SPARE_STACKS):
        if g.spare_stacks[i] == 0:
            g.spare_stacks[i] = address
            return RC_OK
    return _unmap(g, address)


cdef int stack_check(sc_guest *g, u32 p) noexcept nogil:
    """The scheduler looks at the lowest word of the stack that it leaves (CONFIG_SCHED_STACK_END_CHECK)."""
    cdef sc_result r
    cdef int rc
    if not g.vmap_stacks:
        return RC_OK
    rc = cpu_access(g, OP_READ, 8, g.procs[p].stack_at - (PAGES - 1) * 4096, 0, &r)
    return RC_PANIC if rc == RC_OK and r.value[0] != MAGIC else rc
