"""Processes of the guest: spawn, fork with copy-on-write, exec, exit, the scheduler, ageing, swapping out."""
from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport OP_READ, sc_result
from shadowcore.engine.bits cimport PTE_A, PTE_D, PTE_P, PTE_W
from shadowcore.engine.types cimport MODE_64, RC_OK, u32, u64
from shadowcore.guest.cpu cimport cpu_access, cpu_enter, cpu_go, cpu_load_cr3, cpu_load_root, cpu_work
from shadowcore.guest.fault cimport leaf_install
from shadowcore.guest.frames cimport frame_is_page, frame_known, frame_zeroed
from shadowcore.guest.mappings cimport leaf_bits, memory_map, memory_next, memory_zap
from shadowcore.guest.stacks cimport stack_check, stack_give, stack_take
from shadowcore.guest.state cimport (
    ASIDS, FRAME_ANON, FRAME_CACHE, MAP_ANON, MAP_GROWS, MAP_LARGE, MAP_SHARED, NO_PROCESS, PROCESS_ALIVE,
    PROCESS_ENDED, PROCESS_NONE, PROT_EXEC, PROT_READ, PROT_WRITE, RC_NOMEM, RC_NOROOM, RC_PANIC, SLOPPY_AGE,
    SLOPPY_FORK, SLOPPY_SWAP, guest_index, guest_span, sc_gproc, sc_gprogram, sc_guest, sc_gvma, vmas_of,
)
from shadowcore.guest.tables cimport (
    entry_age, entry_frame, entry_has_frame, entry_protect, entry_read, entry_set, entry_take, flush_begin, flush_end,
    flush_everywhere, flush_free, flush_page, root_free, root_make, root_trim, table_find, table_spent, tables_trim,
)

cdef enum:
    STACK_PAGES = 33                # of a new program's stack (128 KiB and a page)


cdef int _begin(sc_guest *g, u32 p) noexcept nogil:
    """An empty address space in slot `p`: roots, nothing mapped."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u32 generation = process.generation
    memset(process, 0, sizeof(sc_gproc))
    process.generation = generation
    process.mm = g.mm_next
    process.state = PROCESS_ALIVE
    g.mm_next += 1
    process.brk_start = process.brk = 0x1000000 if g.mode >= MODE_64 else 0xA000000
    return root_make(g, p)


cdef int _empty(sc_guest *g, u32 p) noexcept nogil:
    """Unmap all of an address space; its roots stay."""
    cdef u32 i
    cdef int rc = RC_OK
    cdef int done
    flush_begin(g)
    for i in range(g.procs[p].nvmas):
        rc = memory_zap(g, p, &vmas_of(g, p)[i], True, False)
        if rc != RC_OK:
            return rc
    if g.procs[p].root:
        rc = tables_trim(g, p, 0, g.task_size, 0, ~<u64>0)
    done = flush_end(g, p, False)
    g.procs[p].nvmas = 0
    return rc if rc != RC_OK else done


cdef int _free_roots(sc_guest *g, u32 p) noexcept nogil:
    """The roots of `p` are loaded nowhere: they go."""
    cdef int rc = root_trim(g, p)
    if rc == RC_OK:
        root_free(g, p)
    return rc


cdef int _gone(sc_guest *g, u32 p) noexcept nogil:
    """`p` has ended, and no processor is on its stack or its roots any more."""
    cdef int rc = _free_roots(g, p)
    g.procs[p].state = PROCESS_NONE
    return stack_give(g, p) if rc == RC_OK else rc


cdef int _undo(sc_guest *g, u32 p, int why) noexcept nogil:
    """A process that was being made, and never ran, goes; `why` is what came in between."""
    cdef int rc
    if why != RC_NOMEM and why != RC_NOROOM:
        return why                  # the guest kernel stops here
    rc = _empty(g, p)
    if rc == RC_OK:
        rc = _free_roots(g, p)
    if rc == RC_OK:
        rc = stack_give(g, p)
    g.procs[p].state = PROCESS_NONE
    return rc if rc != RC_OK else why


cdef int _map_file(sc_guest *g, u32 p, u64 start, u64 pages, u32 prot, u32 file, u64 page, u64 *where) noexcept nogil:
    if pages == 0:
        return RC_OK
    return memory_map(g, p, start, pages << 12, prot, 0, file, page, where)


cdef int _load(sc_guest *g, u32 p, u32 number, bint bare, u64 heap) noexcept nogil:
    """Map a program (NO_PROCESS: none, a stack alone) and put its arguments on the stack. bare: not even a stack; the
    heap begins at `heap`, unless that is 0."""
    cdef sc_gprogram *program
    cdef u64 at = 0x400000 if g.mode >= MODE_64 else 0x8048000
    cdef u64 where = 0
    cdef u64 table, frame
    cdef sc_gvma *m
    cdef int rc = RC_OK
    if bare:
        if heap:
            g.procs[p].brk_start = g.procs[p].brk = heap
        return RC_OK
    if number != NO_PROCESS:
        program = &g.programs[number]
        rc = _map_file(g, p, at, program.text_pages, PROT_READ | PROT_EXEC, program.text, 0, &where)
        at += program.text_pages << 12
        if rc == RC_OK:
            rc = _map_file(g, p, at, program.data_pages, PROT_READ | PROT_WRITE, program.text, program.text_pages,
                           &where)
        at += program.data_pages << 12
        if rc == RC_OK and program.bss_pages:
            rc = memory_map(g, p, at, program.bss_pages << 12, PROT_READ | PROT_WRITE, 0, 0, 0, &where)
        at += program.bss_pages << 12
        g.procs[p].brk_start = g.procs[p].brk = at + 0x1000 + (g.heap_gap << 12)
        if rc == RC_OK and program.library:
            # One piece of the address space, its second part writable.
            rc = _map_file(g, p, 0, program.library_pages + program.library_data, PROT_READ | PROT_EXEC,
                           program.library, 0, &where)
            if rc == RC_OK and program.library_data:
                m = memory_next(g, p, where)
                m.end = where + (program.library_pages << 12)
                rc = _map_file(g, p, m.end, program.library_data, PROT_READ | PROT_WRITE, program.library,
                               program.library_pages, &where)
    if rc == RC_OK:
        rc = memory_map(g, p, g.stack_top - STACK_PAGES * 4096, STACK_PAGES * 4096, PROT_READ | PROT_WRITE,
                        MAP_GROWS | MAP_ANON, 0, 0, &where)
    if rc == RC_OK:
        rc = table_find(g, p, g.stack_top - 4096, 1, True, &table)
    if rc == RC_OK:
        rc = frame_zeroed(g, FRAME_ANON, &frame)
    if rc != RC_OK:
        return rc
    m = memory_next(g, p, g.stack_top - 4096)
    return leaf_install(g, p, table, guest_index(g, g.stack_top - 4096, 1), frame << 12 | leaf_bits(g, m, True) | PTE_D)


cdef int _leave_elsewhere(sc_guest *g, u32 p) noexcept nogil:
    """The address space of `p` is about to go: other processors leave its root, as their threads end first."""
    cdef u32 here = g.cpu
    cdef u32 i
    cdef int rc = RC_OK
    for i in range(g.n_cpus):
        if rc == RC_OK and i != here and g.cpus[i].current == p:
            cpu_go(g, i)
            g.current = NO_PROCESS
            g.in_user = False
            rc = cpu_load_cr3(g, g.kernel_root)
            cpu_go(g, here)
    return rc


cdef int process_reap(sc_guest *g) noexcept nogil:
    """On every processor: leave the root of a process that has ended, and free it."""
    cdef u32 here = g.cpu
    cdef u32 i
    cdef int rc = RC_OK
    for i in range(g.n_cpus):
        if rc == RC_OK:
            cpu_go(g, i)
            rc = _reap(g)
    cpu_go(g, here)
    return rc


cdef int _reap(sc_guest *g) noexcept nogil:
    cdef u32 p = g.current
    cdef int rc
    if p == NO_PROCESS or g.procs[p].state != PROCESS_ENDED:
        return RC_OK
    g.current = NO_PROCESS
    g.in_user = False
    rc = cpu_load_cr3(g, g.kernel_root)
    if rc == RC_OK:
        rc = _gone(g, p)
    return rc


cdef int process_spawn(sc_guest *g, u32 p, u32 program, bint bare, u64 heap) noexcept nogil:
    """A new process in the free slot `p`, made by the kernel."""
    cdef int rc = cpu_enter(g)
    if rc != RC_OK:
        return rc
    rc = _begin(g, p)
    g.procs[p].generation += 1
    if rc == RC_OK:
        rc = stack_take(g, p)
    if rc == RC_OK:
        rc = _load(g, p, program, bare, heap)
    if rc != RC_OK:
        return _undo(g, p, rc)
    g.n_alive += 1
    return RC_OK


cdef int process_switch(sc_guest *g, u32 p) noexcept nogil:
    """Schedule process `p`. With PCIDs its translations are kept where nothing changed since it last ran."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u32 before = g.current
    cdef bint keep = False
    cdef u32 i
    cdef int rc
    g.idle = False
    if before == p:
        return RC_OK
    rc = cpu_enter(g)
    if rc == RC_OK and before != NO_PROCESS and g.procs[before].state == PROCESS_ALIVE:
        rc = cpu_work(g, before, g.kernel_work // 2)
    if rc == RC_OK and before != NO_PROCESS:
        rc = stack_check(g, before)
    if rc != RC_OK:
        return rc
    g.n.switches += 1
    if g.pcid:
        for i in range(<u32>ASIDS):
            if g.asids[i].mm == process.mm:
                keep = g.asids[i].changed == process.changed
                g.asid = i
                break
        else:
            g.asid = g.asid_next
            g.asid_next = (g.asid_next + 1) % ASIDS
            g.asids[g.asid].mm = process.mm
    rc = cpu_load_root(g, p, keep)
    if rc == RC_OK and before != NO_PROCESS and g.procs[before].state == PROCESS_ENDED:
        rc = _gone(g, before)
    return cpu_work(g, p, g.kernel_work // 2) if rc == RC_OK else rc


cdef int process_idle(sc_guest *g) noexcept nogil:
    """A timer tick with nothing to run: kernel threads use whatever root is loaded (lazy TLB)."""
    cdef int rc = cpu_enter(g)
    g.idle = True
    return cpu_work(g, NO_PROCESS, g.kernel_work) if rc == RC_OK else rc


cdef int _copy_entry(sc_guest *g, u32 p, u32 child, const sc_gvma *m, u64 table, u64 into, u32 index, u64 entry,
                     bint *protected) noexcept nogil:
    """One leaf entry of a fork (copy_present_pte, copy_nonpresent_pte): private pages lose W on both sides."""
    cdef u64 frame = entry_frame(entry)
    if not entry_has_frame(entry):
        if frame == 0 or frame > g.swap_pages or g.swap_count[frame - 1] == 0:
            return RC_PANIC
        g.swap_count[frame - 1] += 1
        g.procs[child].swapped += 1
        return entry_set(g, into, index, entry)
    if frame != g.zero_frame:
        if not frame_known(g, frame) or not frame_is_page(g, frame):
            return RC_PANIC
        g.count[frame] += 1
    if entry & PTE_W and not m.flags & MAP_SHARED:
        rc = entry_protect(g, table, index)
        if rc != RC_OK:
            return rc
        protected[0] = True
        entry &= ~<u64>PTE_W
    return leaf_install(g, child, into, index, entry & ~<u64>PTE_A)


cdef int _copy_mapping(sc_guest *g, u32 p, u32 child, const sc_gvma *m, bint *protected) noexcept nogil:
    cdef u64 span = guest_span(g, 2)
    cdef u64 va = m.start
    cdef u64 stop, table, into, entry
    cdef u64 left = g.procs[p].tables
    cdef u32 index
    cdef int rc
    while va < m.end:
        stop = min((va & ~(span - 1)) + span, m.end)
        into = 0
        rc = table_find(g, p, va, 1, False, &table)
        if rc == RC_OK and table:
            rc = table_spent(&left)
        while rc == RC_OK and table and va < stop:
            index = guest_index(g, va, 1)
            entry = entry_read(g, table, index)
            if entry:
                if into == 0:
                    rc = table_find(g, child, va, 1, True, &into)
                if rc == RC_OK:
                    rc = _copy_entry(g, p, child, m, table, into, index, entry, protected)
            va += 4096
        if rc != RC_OK:
            return rc
        va = stop
    return RC_OK


cdef int process_fork(sc_guest *g, u32 p, u32 child) noexcept nogil:
    """fork by the current process `p`. Mappings that never had an anonymous page are not copied: faults fill them."""
    cdef sc_gvma *m = vmas_of(g, p)
    cdef bint protected = False
    cdef u32 i
    cdef int done
    cdef int rc = _begin(g, child)
    g.procs[child].generation += 1
    if rc == RC_OK:
        rc = stack_take(g, child)
    g.procs[child].brk_start = g.procs[p].brk_start
    g.procs[child].brk = g.procs[p].brk
    memcpy(vmas_of(g, child), m, g.procs[p].nvmas * sizeof(sc_gvma))
    g.procs[child].nvmas = g.procs[p].nvmas
    for i in range(g.procs[p].nvmas):
        if rc == RC_OK and m[i].flags & MAP_ANON and not m[i].flags & MAP_SHARED:
            rc = _copy_mapping(g, p, child, &m[i], &protected)
    if protected and not g.sloppy & SLOPPY_FORK:
        done = flush_everywhere(g, p, 0, ~<u64>0)
        if done != RC_OK:
            return done
    if rc != RC_OK:
        return _undo(g, child, rc)
    g.n.forks += 1
    g.n_alive += 1
    return RC_OK


cdef int process_exec(sc_guest *g, u32 p, u32 program, bint bare, u64 heap) noexcept nogil:
    """exec by the current process: a new address space is made beside the old one, loaded, and the old one goes."""
    cdef u32 spare = g.max_procs
    cdef sc_gproc *old = &g.procs[spare]
    cdef sc_gproc *process = &g.procs[p]
    cdef sc_gproc new
    cdef sc_gvma swapped
    cdef u32 i
    cdef int rc = _leave_elsewhere(g, p)
    if rc != RC_OK:
        return rc
    rc = _begin(g, spare)
    if rc == RC_OK:
        rc = _load(g, spare, program, bare, heap)
    if rc != RC_OK:
        return _undo(g, spare, rc)
    new = old[0]
    old[0] = process[0]
    process[0] = new
    process.generation = old.generation
    process.stack, process.stack_at = old.stack, old.stack_at
    old.stack = old.stack_at = 0
    for i in range(max(process.nvmas, old.nvmas)):
        swapped = vmas_of(g, p)[i]
        vmas_of(g, p)[i] = vmas_of(g, spare)[i]
        vmas_of(g, spare)[i] = swapped
    g.n.execs += 1
    if g.pcid:
        g.asid = g.asid_next
        g.asid_next = (g.asid_next + 1) % ASIDS
        g.asids[g.asid].mm = process.mm
    rc = cpu_load_root(g, p, False)
    if rc == RC_OK:
        rc = _empty(g, spare)
    if rc == RC_OK:
        rc = _free_roots(g, spare)
    old.state = PROCESS_NONE
    return rc


cdef int process_exit(sc_guest *g, u32 p) noexcept nogil:
    """exit by the current process. Its root goes when another one is loaded: at the next switch, or, if it was the
    last, now."""
    cdef int rc = _leave_elsewhere(g, p)
    if rc == RC_OK:
        rc = _empty(g, p)
    if rc != RC_OK:
        return rc
    if not g.vmap_stacks:
        rc = stack_give(g, p)       # that of a process which is left later is a stack of the kernel's area
        if rc != RC_OK:
            return rc
    g.procs[p].generation += 1
    g.procs[p].state = PROCESS_ENDED
    g.n.exits += 1
    g.n_alive -= 1
    return process_reap(g) if g.n_alive == 0 else RC_OK


cdef int _swap_entry(sc_guest *g, u32 p, u64 table, u32 index, u64 va, u64 entry, u64 *done) noexcept nogil:
    """Take the page of a leaf entry whose A is clear: an anonymous one goes to a swap slot, one of a file stays cached.

    Anonymous pages that several address spaces share stay where they are.
    """
    cdef sc_result r
    cdef u64 frame = entry_frame(entry)
    cdef u64 slot = 0
    cdef int rc
    if frame == g.zero_frame:
        return RC_OK
    if not frame_known(g, frame):
        return RC_PANIC
    if g.kind[frame] == FRAME_ANON:
        if g.count[frame] != 1 or g.swap_free == 0:
            return RC_OK
        slot = g.swap_free
        rc = cpu_access(g, OP_READ, 8, g.direct_map + (frame << 12), 0, &r)
        if rc != RC_OK:
            return rc
    elif g.kind[frame] != FRAME_CACHE:
        return RC_PANIC
    rc = entry_take(g, table, index, &entry)
    if rc != RC_OK:
        return rc
    flush_page(g, va)
    if slot:
        g.swap_free = g.swap_next[slot - 1]
        g.swap_count[slot - 1] = 1
        memcpy(g.swap + ((slot - 1) << 12), g.ram + (frame << 12), 4096)
        rc = entry_set(g, table, index, slot << 12)
        if rc != RC_OK:
            return rc
        g.n.swapped_out += 1
        g.procs[p].swapped += 1
    g.procs[p].resident -= 1
    done[0] += 1
    return flush_free(g, p, frame, g.sloppy & SLOPPY_SWAP != 0)


cdef int _scan(sc_guest *g, u32 p, u64 *hand, u64 pages, bint swapping, u64 *done) noexcept nogil:
    """Look at the next `pages` present leaf entries from `hand` on, round and round but each at most once."""
    cdef u64 span = guest_span(g, 2)
    cdef u64 first = hand[0]
    cdef u64 va = first
    cdef u64 stop, table, entry
    cdef u32 index
    cdef sc_gvma *m
    cdef bint wrapped = False
    cdef bint young
    cdef int rc
    while pages:
        m = memory_next(g, p, va)
        if m == NULL or (wrapped and max(va, m.start) >= first):
            if wrapped:
                break
            wrapped = True
            va = 0
            continue
        va = max(va, m.start)
        stop = min((va & ~(span - 1)) + span, m.end)
        if wrapped:
            stop = min(stop, first)
        if m.flags & MAP_LARGE:     # never swapped
            va = m.end
            continue
        rc = table_find(g, p, va, 1, False, &table)
        if rc != RC_OK:
            return rc
        if table == 0:
            va = stop
        while pages and va < stop:
            index = guest_index(g, va, 1)
            entry = entry_read(g, table, index)
            if entry & PTE_P:
                pages -= 1
                g.n.age_scanned += 1
                if entry & PTE_A:
                    rc = entry_age(g, table, index, &young)
                    g.n.age_young += young
                    if not swapping:
                        done[0] += young
                    if g.age_flush:
                        flush_page(g, va)
                elif swapping:
                    rc = _swap_entry(g, p, table, index, va, entry, done)
                if rc != RC_OK:
                    return rc
            va += 4096
    hand[0] = va
    return RC_OK


cdef int process_age(sc_guest *g, u32 p, u64 pages, u64 *young) noexcept nogil:
    """Look at the accessed bits of `pages` pages and clear those that are set; young: how many were."""
    cdef int rc, done
    flush_begin(g)
    rc = _scan(g, p, &g.procs[p].hand, pages, False, young)
    done = flush_end(g, p, g.sloppy & SLOPPY_AGE != 0)
    return rc if rc != RC_OK else done


cdef int process_swap_out(sc_guest *g, u32 p, u64 pages, u64 *done) noexcept nogil:
    """Look at `pages` pages: clear A where it is set, take the page where it is not (second chance)."""
    cdef int rc, flushed
    flush_begin(g)
    rc = _scan(g, p, &g.procs[p].swap_hand, pages, True, done)
    flushed = flush_end(g, p, g.sloppy & SLOPPY_SWAP != 0)
    return rc if rc != RC_OK else flushed
