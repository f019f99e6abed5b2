"""Page tables of the guest's processes: every edit is a store by the guest's processor, of the width that Linux uses.

64-bit kernels store an entry at once; with 8-byte entries below 64-bit mode it takes two stores of 4 bytes, the half
with P last when an entry is made, and first when it is cleared. W goes by a locked AND, A by a locked bit clear, a
leaf in use by XCHG: the processor may set A and D in between.
"""
from shadowcore.engine.access cimport OP_AND, OP_READ, OP_WRITE, OP_XCHG, sc_result
from shadowcore.engine.bits cimport PTE_A, PTE_D, PTE_P, PTE_U, PTE_W, pte_nx
from shadowcore.engine.types cimport MODE_32, MODE_PAE, RC_OK, u32, u64
from shadowcore.guest.cpu cimport cpu_access, cpu_enter, cpu_flush_all, cpu_go, cpu_invlpg, cpu_string
from shadowcore.guest.frames cimport frame_known, frame_put, frame_zeroed
from shadowcore.guest.state cimport (
    FRAME_DYING, FRAME_TABLE, RC_PANIC, guest_index, guest_shift, history_add, sc_gproc, sc_guest,
)
from shadowcore.guest.tables cimport entry_frame, entry_read


cdef int _store(sc_guest *g, u32 op, u32 size, u64 gpa, u64 value, sc_result *r) noexcept nogil:
    """A store to a table. What goes into the history leaves out A and D: when the processor sets them is its own."""
    cdef int rc = cpu_access(g, op, size, g.direct_map + gpa, value, r)
    if rc != RC_OK:
        return rc
    if r.gpa != gpa:
        return RC_PANIC
    g.n.table_stores += 1
    history_add(g, gpa, value & ~<u64>(PTE_A | PTE_D))
    return RC_OK


cdef int entry_set(sc_guest *g, u64 table, u32 index, u64 value) noexcept nogil:
    cdef sc_result r
    cdef u64 gpa = table + <u64>index * g.pte_size
    cdef int first = 0 if value == 0 else 4
    cdef int rc
    if g.mode != MODE_PAE:
        return _store(g, OP_WRITE, g.pte_size, gpa, value, &r)
    rc = _store(g, OP_WRITE, 4, gpa + first, value >> 8 * first & 0xFFFFFFFFU, &r)
    if rc != RC_OK:
        return rc
    return _store(g, OP_WRITE, 4, gpa + (4 - first), value >> 8 * (4 - first) & 0xFFFFFFFFU, &r)


cdef int entry_take(sc_guest *g, u64 table, u32 index, u64 *old) noexcept nogil:
    """Clear a leaf entry that the processor may be using, and say what was there."""
    cdef sc_result r
    cdef u64 gpa = table + <u64>index * g.pte_size
    cdef int rc = _store(g, OP_XCHG, 4 if g.mode == MODE_PAE else g.pte_size, gpa, 0, &r)
    old[0] = r.value[0]
    g.n.leaf_clears += 1
    if rc != RC_OK or g.mode != MODE_PAE:
        return rc
    rc = cpu_access(g, OP_READ, 4, g.direct_map + gpa + 4, 0, &r)
    if rc != RC_OK:
        return rc
    old[0] |= r.value[0] << 32
    return _store(g, OP_WRITE, 4, gpa + 4, 0, &r)


cdef int entry_protect(sc_guest *g, u64 table, u32 index) noexcept nogil:
    """Take W away."""
    cdef sc_result r
    cdef u32 size = min(g.atomic_bytes, <u32>(4 if g.mode <= MODE_PAE else 8))
    cdef u64 mask = ~<u64>PTE_W
    if size < 8:
        mask &= (<u64>1 << 8 * size) - 1
    g.n.write_protects += 1
    return _store(g, OP_AND, size, table + <u64>index * g.pte_size, mask, &r)


cdef int entry_age(sc_guest *g, u64 table, u32 index, bint *young) noexcept nogil:
    """Clear A, and say whether it was set."""
    cdef sc_result r
    cdef u32 size = 4 if g.mode <= MODE_PAE else 8
    cdef u64 mask = ~<u64>PTE_A if size == 8 else 0xFFFFFFFFU & ~<u64>PTE_A
    cdef int rc = _store(g, OP_AND, size, table + <u64>index * g.pte_size, mask, &r)
    young[0] = r.value[0] & PTE_A != 0
    return rc


cdef int table_look(sc_guest *g, u64 table) noexcept nogil:
    """The kernel's load from a table that it is about to look through, by the direct map."""
    cdef sc_result r
    cdef int rc = cpu_access(g, OP_READ, 8, g.direct_map + table, 0, &r)
    return RC_PANIC if rc == RC_OK and r.gpa != table else rc


cdef inline bint _is_table(const sc_guest *g, u64 entry) noexcept nogil:
    """A present entry above the leaves names a table that the kernel made: memory is the guest's, and may be broken."""
    return frame_known(g, entry_frame(entry)) and g.kind[entry_frame(entry)] == FRAME_TABLE


cdef int _link(sc_guest *g, u32 p, int level, u64 table, u32 index, u64 value) noexcept nogil:
    """Set an entry above the leaves; of the top table, in the user's root as well (isolation)."""
    cdef sc_gproc *process = &g.procs[p]
    cdef int rc
    if level == g.levels and process.user_root != process.root:
        rc = entry_set(g, process.user_root, index, value)
        if rc != RC_OK:
            return rc
        # In the kernel's own root nothing of the user half can be executed: it never runs user code.
        if value and g.nx and g.mode != MODE_PAE:
            value |= pte_nx()
    return entry_set(g, table, index, value)


cdef int _new_table(sc_guest *g, u32 p, u64 *table) noexcept nogil:
    cdef u64 frame
    cdef int rc = frame_zeroed(g, FRAME_TABLE, &frame)
    if rc != RC_OK:
        return rc
    g.n.tables_made += 1
    g.procs[p].tables += 1
    table[0] = frame << 12
    return RC_OK


cdef int table_find(sc_guest *g, u32 p, u64 va, int leaf, bint make, u64 *table) noexcept nogil:
    """gpa of the table of level `leaf` for `va`; 0 where there is none and none is to be made."""
    cdef u64 at = g.procs[p].root
    cdef u64 entry, made
    cdef u32 index
    cdef int level = g.levels
    cdef int rc
    table[0] = 0
    while level > leaf:
        index = guest_index(g, va, level)
        entry = entry_read(g, at, index)
        if not entry & PTE_P:
            if not make:
                return RC_OK
            rc = _new_table(g, p, &made)
            if rc != RC_OK:
                return rc
            entry = made | PTE_P | PTE_W | PTE_U | PTE_A
            rc = _link(g, p, level, at, index, entry)
            if rc != RC_OK:
                return rc
        elif not _is_table(g, entry):
            return RC_PANIC
        at = entry_frame(entry) << 12
        level -= 1
    table[0] = at
    return table_look(g, at)


cdef int _free_table(sc_guest *g, u32 p, u64 table) noexcept nogil:
    if g.procs[p].tables == 0 or g.kind[table >> 12] != FRAME_TABLE:
        return RC_PANIC             # more tables than were made, or one twice: a loop in broken ones ends here
    g.kind[table >> 12] = FRAME_DYING
    g.n.tables_freed += 1
    g.procs[p].tables -= 1
    return flush_free(g, p, table >> 12, False)


cdef int _trim(sc_guest *g, u32 p, int level, u64 table, u64 start, u64 end, u64 low, u64 high) noexcept nogil:
    """Free the tables below `table`, of `level`, that lie between `low` and `high` and touch [start, end)."""
    cdef int shift = guest_shift(g, level)
    cdef u64 span = <u64>1 << shift
    cdef u64 va = start & ~(span - 1)
    cdef u64 entry
    cdef u32 index
    cdef int rc
    while va < end:
        index = guest_index(g, va, level)
        entry = entry_read(g, table, index)
        if entry & PTE_P:
            if not _is_table(g, entry):
                return RC_PANIC
            if level > 2:
                rc = _trim(g, p, level - 1, entry_frame(entry) << 12, max(va, start), min(va + span, end), low, high)
                if rc != RC_OK:
                    return rc
            # The root entries of PAE are made with the root and stay: the processor reads them at CR3 loads only.
            if va >= low and va + span <= high and not (g.mode == MODE_PAE and level == 3):
                rc = _link(g, p, level, table, index, 0)
                if rc != RC_OK:
                    return rc
                flush_page(g, start)    # any INVLPG drops what the processor caches of the upper entries
                rc = _free_table(g, p, entry_frame(entry) << 12)
                if rc == RC_OK and g.meanwhile != NULL:
                    rc = g.meanwhile(g)
                if rc != RC_OK:
                    return rc
        va += span
    return RC_OK


cdef int tables_trim(sc_guest *g, u32 p, u64 start, u64 end, u64 low, u64 high) noexcept nogil:
    """[start, end) was unmapped, and nothing else is mapped between `low` and `high`: free its tables (free_pgtables).

    They are freed after the flush that the caller makes.
    """
    return _trim(g, p, g.levels, g.procs[p].root, start, end, low, high)


cdef int _pae_links(sc_guest *g, u32 p) noexcept nogil:
    """The root entries of PAE: all three of the user half at once, before the root is loaded."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u64 table
    cdef u32 index
    cdef int rc
    for index in range(3):
        rc = _new_table(g, p, &table)
        if rc == RC_OK:
            rc = _link(g, p, 3, process.root, index, table | PTE_P)
        if rc != RC_OK:
            return rc
    rc = entry_set(g, process.root, 3, entry_read(g, g.kernel_root, 3))
    if rc == RC_OK and process.user_root != process.root:
        rc = entry_set(g, process.user_root, 3, g.entry_link)
    return rc


cdef int root_make(sc_guest *g, u32 p) noexcept nogil:
    """The top table of a process, with the kernel half in it; with isolation a second one for user code."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u64 half = 2048
    cdef int rc
    process.root = process.user_root = 0
    rc = _new_table(g, p, &process.root)
    if rc != RC_OK:
        return rc
    g.n.roots_made += 1
    process.user_root = process.root
    if g.isolation:
        rc = _new_table(g, p, &process.user_root)
        if rc != RC_OK:
            process.user_root = process.root
            return rc
    if g.mode == MODE_PAE:
        return _pae_links(g, p)
    if g.mode == MODE_32:
        half = 3072
    rc = cpu_string(g, process.root + half, g.ram + g.kernel_root + half, <u32>(4096 - half))
    if rc == RC_OK and g.isolation:
        rc = entry_set(g, process.user_root, g.entry_index, g.entry_link)
    return rc


cdef void root_free(sc_guest *g, u32 p) noexcept nogil:
    """Free the roots of a process; they are loaded nowhere, and no table hangs on their user half."""
    cdef sc_gproc *process = &g.procs[p]
    if process.user_root != process.root:
        frame_put(g, process.user_root >> 12)
        g.n.tables_freed += 1
        process.tables -= 1
    if process.root:
        frame_put(g, process.root >> 12)
        g.n.tables_freed += 1
        process.tables -= 1
    process.root = process.user_root = 0


cdef int root_trim(sc_guest *g, u32 p) noexcept nogil:
    """Free what hangs on a root that is about to be freed itself: the tables of PAE's root entries."""
    cdef u64 entry
    cdef u32 index
    if g.mode != MODE_PAE or not g.procs[p].root:
        return RC_OK
    for index in range(3):
        entry = entry_read(g, g.procs[p].root, index)
        if entry & PTE_P:
            if not _is_table(g, entry):
                return RC_PANIC
            frame_put(g, entry_frame(entry))
            g.n.tables_freed += 1
            g.procs[p].tables -= 1
    return RC_OK


cdef void flush_begin(sc_guest *g) noexcept nogil:
    g.flush_start = ~<u64>0
    g.flush_end = 0
    g.flush_wanted = False


cdef void flush_page(sc_guest *g, u64 va) noexcept nogil:
    """The translation of `va` was changed or taken away."""
    g.flush_start = min(g.flush_start, va)
    g.flush_end = max(g.flush_end, va + 4096)
    g.flush_wanted = True


cdef int _flush_here(sc_guest *g, u64 start, u64 end) noexcept nogil:
    """On the processor that is at work, whose current process it is: page by page if they are few, else everything."""
    cdef u64 va = start
    cdef int rc
    if (end - start) >> 12 > g.flush_ceiling:
        return cpu_flush_all(g)
    while va < end:
        rc = cpu_invlpg(g, va)
        if rc != RC_OK:
            return rc
        va += 4096
    g.asids[g.asid].changed = g.procs[g.current].changed
    g.asids[g.asid].flush_user = True
    return RC_OK


cdef int flush_everywhere(sc_guest *g, u32 p, u64 start, u64 end) noexcept nogil:
    """Flush [start, end) of process `p` on every processor that has its root loaded (native_flush_tlb_multi). Where it
    is not loaded, that is heard when the process is switched to."""
    cdef u32 here = g.cpu
    cdef u32 i
    cdef int rc = RC_OK
    g.procs[p].changed += 1
    if g.current == p:
        rc = _flush_here(g, start, end)
    for i in range(g.n_cpus):
        if rc == RC_OK and i != here and g.cpus[i].current == p:
            cpu_go(g, i)
            g.n.shootdowns += 1
            rc = cpu_enter(g)
            if rc == RC_OK:
                rc = _flush_here(g, start, end)
            cpu_go(g, here)
    return rc


cdef int _flush(sc_guest *g, u32 p) noexcept nogil:
    """Flush the range that has built up."""
    cdef u64 start = g.flush_start
    cdef u64 end = g.flush_end
    if not g.flush_wanted:
        return RC_OK
    flush_begin(g)
    return flush_everywhere(g, p, start, end)


cdef void _release(sc_guest *g) noexcept nogil:
    cdef u32 i
    for i in range(g.gather_first, g.n_gather):
        frame_put(g, g.gather[i])
    g.n_gather = g.gather_first


cdef void flush_aside(sc_guest *g, sc_flush *waiting) noexcept nogil:
    """Put aside what waits for the flush of this processor: another one goes on, with flushes of its own."""
    waiting.start, waiting.end, waiting.wanted = g.flush_start, g.flush_end, g.flush_wanted
    waiting.first = g.gather_first
    g.gather_first = g.n_gather
    flush_begin(g)


cdef void flush_resume(sc_guest *g, const sc_flush *waiting) noexcept nogil:
    g.flush_start, g.flush_end, g.flush_wanted = waiting.start, waiting.end, waiting.wanted
    g.gather_first = waiting.first


cdef int flush_end(sc_guest *g, u32 p, bint forgotten) noexcept nogil:
    """Flush what was gathered, then free the frames. forgotten: a sloppy kernel frees them without."""
    cdef int rc = RC_OK
    if forgotten:
        flush_begin(g)
    else:
        rc = _flush(g, p)
    _release(g)
    return rc


cdef int flush_free(sc_guest *g, u32 p, u64 frame, bint forgotten) noexcept nogil:
    """Give up a reference to `frame` after the next flush."""
    g.gather[g.n_gather] = frame
    g.n_gather += 1
    if g.n_gather == g.gather_room:
        return flush_end(g, p, forgotten)
    return RC_OK
