"""Page faults of the guest: demand zero, files, copy-on-write, swap, large pages, growth of the stack."""
from shadowcore.engine.bits cimport PTE_D, PTE_P, PTE_PS, PTE_W
from shadowcore.engine.types cimport PF_I, PF_W, RC_OK, u8, u32, u64
from shadowcore.guest.frames cimport frame_copied, frame_filled, frame_known, frame_large, frame_zeroed
from shadowcore.guest.mappings cimport leaf_bits, memory_find, memory_next, swap_put
from shadowcore.guest.state cimport (
    FILE_ZERO, FRAME_ANON, FRAME_CACHE, MAP_ANON, MAP_GROWS, MAP_LARGE, MAP_SHARED, PROT_EXEC, PROT_WRITE, PTE_NONE,
    RC_NOMEM, RC_PANIC, RC_SEGV, SLOPPY_COW, guest_index, guest_mix, guest_span, sc_guest, sc_gvma, vmas_of,
)
from shadowcore.guest.tables cimport (
    entry_frame, entry_read, entry_set, entry_take, flush_begin, flush_end, flush_free, flush_page, table_find,
)


cdef int leaf_install(sc_guest *g, u32 p, u64 table, u32 index, u64 entry) noexcept nogil:
    g.procs[p].resident += 1
    g.n.leaf_installs += 1
    return entry_set(g, table, index, entry)


cdef int _cached(sc_guest *g, u32 file, u64 page, u64 *frame) noexcept nogil:
    """The frame of a file's page in the page cache; read in if it is not there.

    Word i of page n of file number f, from 0, is guest_mix((f + 1) << 40 | n << 9 | i): what "the disk" holds.
    """
    cdef u64 words[512]
    cdef u64 at = g.file_first[file] + page
    cdef u32 i
    cdef int rc
    frame[0] = g.cache[at]
    if frame[0]:
        return RC_OK
    if g.file_kind[file] == FILE_ZERO:
        rc = frame_zeroed(g, FRAME_CACHE, frame)
    else:
        for i in range(512):
            words[i] = guest_mix(<u64>(file + 1) << 40 | page << 9 | i)
        rc = frame_filled(g, FRAME_CACHE, <u8 *>words, frame)
    if rc == RC_OK:
        g.cache[at] = <u32>frame[0]
    return rc


cdef int _fault_file(sc_guest *g, u32 p, const sc_gvma *m, u64 table, u64 va, bint write) noexcept nogil:
    """A page of a file for the first time in this address space.

    A private store gets a copy. Otherwise the page is mapped, and, for a load, those around it that lie in the same
    mapping, table and window of fault_around pages (do_fault_around); what of the window is not cached is read ahead.
    """
    cdef u64 window = <u64>g.fault_around << 12
    cdef u64 span = guest_span(g, 2)
    cdef u32 file = m.file - 1
    cdef u64 page = m.page + ((va - m.start) >> 12)
    cdef u64 at, stop, frame, source
    cdef u64 bits = leaf_bits(g, m, m.flags & MAP_SHARED)
    cdef u32 index
    cdef int rc
    if page >= g.file_pages[file]:
        return RC_SEGV              # beyond the end of the file (SIGBUS)
    rc = _cached(g, file, page, &source)
    if rc != RC_OK:
        return rc
    g.n.faults_file += 1
    if write and not m.flags & MAP_SHARED:
        rc = frame_copied(g, source, &frame)
        if rc != RC_OK:
            return rc
        return leaf_install(g, p, table, guest_index(g, va, 1), frame << 12 | leaf_bits(g, m, True) | PTE_D)
    at = va
    stop = va + 4096
    if not write:
        at = max(max(va & ~(window - 1), m.start), va & ~(span - 1))
        stop = min(min((va & ~(window - 1)) + window, m.end), (va & ~(span - 1)) + span)
    while at < stop:
        page = m.page + ((at - m.start) >> 12)
        index = guest_index(g, at, 1)
        if page < g.file_pages[file] and entry_read(g, table, index) == 0:
            rc = _cached(g, file, page, &frame)
            if rc != RC_OK:
                # No memory to read ahead with is no reason to refuse the page itself, which is in the cache.
                if rc != RC_NOMEM:
                    return rc
                at += 4096
                continue
            g.count[frame] += 1
            g.n.faults_around += at != va
            rc = leaf_install(g, p, table, index, frame << 12 | bits | (PTE_D if write else 0))
            if rc != RC_OK:
                return rc
        at += 4096
    return RC_OK


cdef int _fault_anonymous(sc_guest *g, u32 p, sc_gvma *m, u64 table, u32 index, bint write) noexcept nogil:
    """Demand zero: a load gets the page of zeros, a store a frame of its own."""
    cdef u64 frame
    cdef int rc
    m.flags |= MAP_ANON
    if not write and not m.flags & MAP_SHARED:
        g.n.faults_zero_page += 1
        return leaf_install(g, p, table, index, g.zero_frame << 12 | leaf_bits(g, m, False))
    rc = frame_zeroed(g, FRAME_ANON, &frame)
    if rc != RC_OK:
        return rc
    g.n.faults_zero += 1
    return leaf_install(g, p, table, index, frame << 12 | leaf_bits(g, m, True) | PTE_D)


cdef int _fault_swap(sc_guest *g, u32 p, const sc_gvma *m, u64 table, u32 index, u64 entry, bint write) noexcept nogil:
    """Swap in. Each process that shared the slot reads its own copy."""
    cdef u64 slot = entry_frame(entry) - 1
    cdef u64 frame
    cdef int rc
    if slot >= g.swap_pages or g.swap_count[slot] == 0:
        return RC_PANIC
    rc = frame_filled(g, FRAME_ANON, g.swap + (slot << 12), &frame)
    if rc != RC_OK:
        return rc
    g.n.faults_swap += 1
    g.n.swapped_in += 1
    g.procs[p].swapped -= 1
    rc = leaf_install(g, p, table, index, frame << 12 | leaf_bits(g, m, write) | PTE_D)
    swap_put(g, <u32>slot)
    return rc


cdef int _fault_write(sc_guest *g, u32 p, sc_gvma *m, u64 table, u64 va, u64 entry) noexcept nogil:
    """A store to a present page without W (do_wp_page)."""
    cdef u32 index = guest_index(g, va, 1)
    cdef u64 old = entry_frame(entry)
    cdef u64 frame
    cdef int rc
    if old != g.zero_frame and not frame_known(g, old):
        return RC_PANIC
    if m.flags & MAP_SHARED or (g.kind[old] == FRAME_ANON and g.count[old] == 1):
        g.n.faults_reused += 1
        return entry_set(g, table, index, old << 12 | leaf_bits(g, m, True) | PTE_D)
    m.flags |= MAP_ANON
    rc = frame_zeroed(g, FRAME_ANON, &frame) if old == g.zero_frame else frame_copied(g, old, &frame)
    if rc != RC_OK:
        return rc
    g.n.faults_copied += 1
    flush_begin(g)
    rc = entry_take(g, table, index, &entry)
    if rc != RC_OK:
        return rc
    flush_page(g, va)
    if old != g.zero_frame:
        rc = flush_free(g, p, old, g.sloppy & SLOPPY_COW != 0)
    if rc == RC_OK:
        rc = flush_end(g, p, g.sloppy & SLOPPY_COW != 0)
    if rc != RC_OK:
        return rc
    g.procs[p].resident -= 1
    return leaf_install(g, p, table, index, frame << 12 | leaf_bits(g, m, True) | PTE_D)


cdef int _fault_large(sc_guest *g, u32 p, const sc_gvma *m, u64 va) noexcept nogil:
    """A large page of shared memory."""
    cdef u64 table, frame
    cdef u64 page = (m.page + ((va - m.start) >> 12)) & ~((guest_span(g, 2) >> 12) - 1)
    cdef u32 file = m.file - 1
    cdef u32 index = guest_index(g, va, 2)
    cdef int rc = table_find(g, p, va, 2, True, &table)
    if rc != RC_OK:
        return rc
    if entry_read(g, table, index) & PTE_P:
        g.n.faults_spurious += 1
        return RC_OK
    if page >= g.file_pages[file]:
        return RC_SEGV
    frame = g.cache[g.file_first[file] + page]
    if frame == 0:
        rc = frame_large(g, &frame)
        if rc != RC_OK:
            return rc
        g.cache[g.file_first[file] + page] = <u32>frame
    g.count[frame] += 1
    g.n.faults_large += 1
    return leaf_install(g, p, table, index, frame << 12 | leaf_bits(g, m, True) | PTE_PS | PTE_D)


cdef sc_gvma *_grown(sc_guest *g, u32 p, u64 va) noexcept nogil:
    """A stack that may grow down to `va` does. One page stays free below it (the guard)."""
    cdef sc_gvma *m = memory_next(g, p, va)
    cdef u64 start = va & ~<u64>4095
    if m == NULL or not m.flags & MAP_GROWS or m.end - start > g.stack_limit:
        return NULL
    if m != vmas_of(g, p) and (m - 1).end + 4096 > start:
        return NULL
    g.n.stack_growth += (m.start - start) >> 12
    m.start = start
    return m


cdef int fault_service(sc_guest *g, u32 p, u64 va, u32 code) noexcept nogil:
    """Service the page fault of process `p` at `va`. RC_SEGV: it may not do that."""
    cdef sc_gvma *m
    cdef u64 table, entry
    cdef u32 index
    cdef bint write = code & PF_W != 0
    cdef int rc
    g.n.faults += 1
    if va >= g.task_size:
        return RC_SEGV
    m = memory_find(g, p, va)
    if m == NULL:
        m = _grown(g, p, va)
    if m == NULL or m.prot == 0 or (write and not m.prot & PROT_WRITE) or (code & PF_I and not m.prot & PROT_EXEC):
        return RC_SEGV
    if m.flags & MAP_LARGE:
        return _fault_large(g, p, m, va)
    va &= ~<u64>4095
    rc = table_find(g, p, va, 1, True, &table)
    if rc != RC_OK:
        return rc
    index = guest_index(g, va, 1)
    entry = entry_read(g, table, index)
    if entry & PTE_P:
        if write and not entry & PTE_W:
            return _fault_write(g, p, m, table, va, entry)
        g.n.faults_spurious += 1    # the processor knew an older entry; it looks again
        return RC_OK
    if entry & PTE_NONE:
        return RC_PANIC             # mprotect gives such entries back their P
    if entry:
        return _fault_swap(g, p, m, table, index, entry, write)
    if m.file:
        if write and not m.flags & MAP_SHARED:
            m.flags |= MAP_ANON
        return _fault_file(g, p, m, table, va, write)
    return _fault_anonymous(g, p, m, table, index, write)
