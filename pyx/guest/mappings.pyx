"""Address spaces of the guest's processes: the lists of mappings, mmap, munmap, mprotect, brk."""
from libc.string cimport memmove

from shadowcore.engine.bits cimport PTE_A, PTE_D, PTE_P, PTE_PS, PTE_U, PTE_W, pte_addr, pte_nx
from shadowcore.engine.types cimport RC_OK, u32, u64
from shadowcore.guest.frames cimport frame_is_page, frame_known
from shadowcore.guest.state cimport (
    MAP_ANON, MAP_GROWS, MAP_HEAP, MAP_LARGE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE, PTE_NONE, RC_NOROOM,
    RC_PANIC, RC_SEGV, SLOPPY_MPROTECT, SLOPPY_MUNMAP, guest_index, guest_span, sc_gproc, sc_guest, sc_gvma, vmas_of,
)
from shadowcore.guest.tables cimport (
    entry_frame, entry_has_frame, entry_read, entry_set, entry_take, flush_begin, flush_end, flush_free, flush_page,
    table_find, table_spent, tables_trim,
)


cdef u32 _first_after(const sc_guest *g, u32 p, u64 va) noexcept nogil:
    """Index of the first mapping that ends above `va`; the number of mappings if none does."""
    cdef const sc_gvma *m = vmas_of(g, p)
    cdef u32 low = 0
    cdef u32 high = g.procs[p].nvmas
    cdef u32 middle
    while low < high:
        middle = (low + high) // 2
        if m[middle].end > va:
            high = middle
        else:
            low = middle + 1
    return low


cdef sc_gvma *memory_next(const sc_guest *g, u32 p, u64 va) noexcept nogil:
    """The first mapping that ends above `va`, or NULL."""
    cdef u32 i = _first_after(g, p, va)
    return &vmas_of(g, p)[i] if i < g.procs[p].nvmas else NULL


cdef sc_gvma *memory_find(const sc_guest *g, u32 p, u64 va) noexcept nogil:
    """The mapping that holds `va`, or NULL."""
    cdef u32 i = _first_after(g, p, va)
    if i < g.procs[p].nvmas and vmas_of(g, p)[i].start <= va:
        return &vmas_of(g, p)[i]
    return NULL


cdef inline bint _continues(const sc_gvma *a, const sc_gvma *b) noexcept nogil:
    """b goes on where a ends, with the same attributes: they are one mapping."""
    return (a.end == b.start and a.prot == b.prot and (a.flags ^ b.flags) & ~MAP_ANON == 0 and a.file == b.file
            and not a.flags & MAP_GROWS and (a.file == 0 or a.page + ((a.end - a.start) >> 12) == b.page))


cdef void _remove(sc_guest *g, u32 p, u32 i, u32 n) noexcept nogil:
    cdef sc_gvma *m = vmas_of(g, p)
    g.procs[p].nvmas -= n
    memmove(&m[i], &m[i + n], (g.procs[p].nvmas - i) * sizeof(sc_gvma))


cdef void _merge(sc_guest *g, u32 p, u32 i) noexcept nogil:
    """Join mapping `i` with the one after it if they are one."""
    cdef sc_gvma *m = vmas_of(g, p)
    if i + 1 < g.procs[p].nvmas and _continues(&m[i], &m[i + 1]):
        m[i].end = m[i + 1].end
        m[i].flags |= m[i + 1].flags
        _remove(g, p, i + 1, 1)


cdef void _insert(sc_guest *g, u32 p, const sc_gvma *new) noexcept nogil:
    """Room for one more was made sure of, and nothing overlaps."""
    cdef sc_gvma *m = vmas_of(g, p)
    cdef u32 i = _first_after(g, p, new.start)
    memmove(&m[i + 1], &m[i], (g.procs[p].nvmas - i) * sizeof(sc_gvma))
    m[i] = new[0]
    g.procs[p].nvmas += 1
    _merge(g, p, i)
    if i:
        _merge(g, p, i - 1)


cdef void _split(sc_guest *g, u32 p, u64 va) noexcept nogil:
    """Make `va` a boundary. Room for one more was made sure of."""
    cdef sc_gvma *m = memory_find(g, p, va)
    cdef u32 i
    if m == NULL or m.start == va:
        return
    i = <u32>(m - vmas_of(g, p))
    memmove(&m[1], &m[0], (g.procs[p].nvmas - i) * sizeof(sc_gvma))
    g.procs[p].nvmas += 1
    m[0].end = va
    m[1].start = va
    m[1].page += (va - m[0].start) >> 12
    m[0].flags &= ~MAP_GROWS        # the lower part of a stack that was cut no longer borders on its upper part


cdef bint _may_split(const sc_guest *g, u32 p, u64 va) noexcept nogil:
    """`va` is not within a large page."""
    cdef const sc_gvma *m = memory_find(g, p, va)
    return m == NULL or not m.flags & MAP_LARGE or (va - m.start) & (guest_span(g, 2) - 1) == 0


cdef int _place(const sc_guest *g, u32 p, u64 length, u64 align, u64 *where) noexcept nogil:
    """The highest gap below mmap_base that holds `length` bytes (arch_get_unmapped_area_topdown)."""
    cdef const sc_gvma *m = vmas_of(g, p)
    cdef u32 i = _first_after(g, p, g.mmap_base - 1)
    cdef u64 high = g.mmap_base
    if i < g.procs[p].nvmas:
        high = min(high, m[i].start)
    while True:
        if high < length + align + 0x10000:
            return RC_NOROOM
        if i == 0 or m[i - 1].end <= (high - length) & ~(align - 1):
            where[0] = (high - length) & ~(align - 1)
            return RC_OK
        i -= 1
        high = m[i].start


cdef int memory_map(sc_guest *g, u32 p, u64 start, u64 length, u32 prot, u32 flags, u32 file, u64 page,
                    u64 *where) noexcept nogil:
    """mmap: `length` bytes at `start`, where nothing is mapped, or, for 0, where there is room."""
    cdef sc_gvma new
    cdef u64 align = guest_span(g, 2) if flags & MAP_LARGE else 4096
    cdef u32 i
    cdef int rc
    if (start | length | page << 12) & (align - 1):
        return RC_SEGV              # a large page cannot begin there
    if g.procs[p].nvmas + 1 >= g.max_vmas:
        return RC_NOROOM
    if start == 0:
        rc = _place(g, p, length, align, &start)
        if rc != RC_OK:
            return rc
    else:
        i = _first_after(g, p, start)
        if i < g.procs[p].nvmas and vmas_of(g, p)[i].start < start + length:
            return RC_NOROOM
    new.start = start
    new.end = start + length
    new.page = page
    new.file = file
    new.prot = <unsigned short>prot
    new.flags = <unsigned short>flags
    where[0] = start
    _insert(g, p, &new)
    return RC_OK


cdef void swap_put(sc_guest *g, u32 slot) noexcept nogil:
    g.swap_count[slot] -= 1
    if g.swap_count[slot] == 0:
        g.swap_next[slot] = g.swap_free
        g.swap_free = slot + 1


cdef int _drop(sc_guest *g, u32 p, u64 va, u64 entry, bint forgotten) noexcept nogil:
    """What a leaf entry, now cleared, stood for is given up."""
    cdef u64 frame = entry_frame(entry)
    if not entry_has_frame(entry):
        if frame == 0 or frame > g.swap_pages or g.swap_count[frame - 1] == 0:
            return RC_PANIC
        g.procs[p].swapped -= 1
        swap_put(g, <u32>frame - 1)
        return RC_OK
    g.procs[p].resident -= 1
    if entry & PTE_P:
        flush_page(g, va)
    if frame == g.zero_frame:
        return RC_OK
    if not frame_known(g, frame) or not frame_is_page(g, frame):
        return RC_PANIC
    return flush_free(g, p, frame, forgotten)


cdef int _zap_large(sc_guest *g, u32 p, u64 start, u64 end, bint forgotten) noexcept nogil:
    """Clear the entries of large pages in [start, end)."""
    cdef u64 va = start
    cdef u64 table, entry
    cdef u32 index
    cdef int rc
    while va < end:
        rc = table_find(g, p, va, 2, False, &table)
        if rc != RC_OK:
            return rc
        index = guest_index(g, va, 2)
        if table and entry_read(g, table, index):
            rc = entry_take(g, table, index, &entry)
            if rc == RC_OK:
                rc = _drop(g, p, va, entry & ~<u64>PTE_PS, forgotten)
            if rc != RC_OK:
                return rc
        va += guest_span(g, 2)
    return RC_OK


cdef int memory_zap(sc_guest *g, u32 p, const sc_gvma *m, bint whole, bint forgotten) noexcept nogil:
    """Clear the leaf entries of a mapping. whole: the address space goes, its entries are cleared by plain stores."""
    cdef u64 span = guest_span(g, 2)
    cdef u64 va = m.start
    cdef u64 end = m.end
    cdef u64 stop, table, entry, old
    cdef u64 left = g.procs[p].tables
    cdef u32 index
    cdef int rc
    if m.flags & MAP_LARGE:
        return _zap_large(g, p, va, end, forgotten)
    while va < end:
        stop = min((va & ~(span - 1)) + span, end)
        rc = table_find(g, p, va, 1, False, &table)
        if rc == RC_OK and table:
            rc = table_spent(&left)
        if rc != RC_OK:
            return rc
        while table and va < stop:
            index = guest_index(g, va, 1)
            entry = entry_read(g, table, index)
            if entry:
                old = entry
                if whole or not entry & PTE_P:
                    rc = entry_set(g, table, index, 0)
                    g.n.leaf_clears += entry & PTE_P
                else:
                    rc = entry_take(g, table, index, &old)
                if rc == RC_OK:
                    rc = _drop(g, p, va, old, forgotten)
                if rc != RC_OK:
                    return rc
            va += 4096
        va = stop
    return RC_OK


cdef int memory_unmap(sc_guest *g, u32 p, u64 start, u64 length) noexcept nogil:
    """munmap of [start, start + length), whatever is mapped there."""
    cdef u64 end = start + length
    cdef u64 low = 0
    cdef u64 high = ~<u64>0         # the last table of the user half may reach beyond it
    cdef u32 i, n
    cdef bint forgotten = g.sloppy & SLOPPY_MUNMAP != 0
    cdef sc_gvma *m = vmas_of(g, p)
    cdef int rc = RC_OK
    cdef int done
    if g.procs[p].nvmas + 2 > g.max_vmas:
        return RC_NOROOM
    if not _may_split(g, p, start) or not _may_split(g, p, end):
        return RC_SEGV
    _split(g, p, start)
    _split(g, p, end)
    i = _first_after(g, p, start)
    n = 0
    flush_begin(g)
    while i + n < g.procs[p].nvmas and m[i + n].start < end:
        if rc == RC_OK:
            rc = memory_zap(g, p, &m[i + n], False, forgotten)
        n += 1
    if rc != RC_OK or n == 0:
        done = flush_end(g, p, forgotten)
        return rc if rc != RC_OK else done
    if i:
        low = m[i - 1].end
    if i + n < g.procs[p].nvmas:
        high = m[i + n].start
    start = m[i].start
    end = m[i + n - 1].end
    _remove(g, p, i, n)
    rc = tables_trim(g, p, start, end, low, high)
    done = flush_end(g, p, forgotten)
    return rc if rc != RC_OK else done


cdef u64 leaf_bits(const sc_guest *g, const sc_gvma *m, bint writable) noexcept nogil:
    """Flags of a leaf entry of mapping `m`; writable: W if the mapping allows stores."""
    cdef u64 bits = PTE_U | PTE_A | (PTE_P if m.prot else PTE_NONE)
    if writable and m.prot & PROT_WRITE:
        bits |= PTE_W
    if g.nx and not m.prot & PROT_EXEC:
        bits |= pte_nx()
    return bits


cdef int memory_protect(sc_guest *g, u32 p, u64 start, u64 length, u32 prot) noexcept nogil:
    """mprotect of [start, start + length), all of it mapped. Each entry with a frame is taken and set anew.

    Private pages come back without W: the fault at the next store decides between reuse and copy.
    """
    cdef u64 span = guest_span(g, 2)
    cdef u64 end = start + length
    cdef u64 va = start
    cdef u64 stop, table, entry, new
    cdef u64 left = g.procs[p].tables
    cdef sc_gvma *m
    cdef u32 i, index
    cdef bint changed = False
    cdef int rc
    if g.procs[p].nvmas + 2 > g.max_vmas:
        return RC_NOROOM
    while va < end:                 # first see that there is no hole: nothing has changed yet
        m = memory_find(g, p, va)
        if m == NULL or m.flags & MAP_LARGE:
            return RC_SEGV
        va = m.end
    _split(g, p, start)
    _split(g, p, end)
    flush_begin(g)
    va = start
    rc = RC_OK
    while va < end and rc == RC_OK:
        m = memory_find(g, p, va)
        changed = m.prot != prot
        m.prot = <unsigned short>prot
        if not changed:
            va = m.end
            continue
        while va < m.end and rc == RC_OK:
            stop = min((va & ~(span - 1)) + span, m.end)
            rc = table_find(g, p, va, 1, False, &table)
            if rc == RC_OK and table and va & (span - 1) == 0:
                rc = table_spent(&left)
            while rc == RC_OK and table and va < stop:
                index = guest_index(g, va, 1)
                entry = entry_read(g, table, index)
                if entry_has_frame(entry):
                    rc = entry_take(g, table, index, &entry)
                    new = entry & (pte_addr() | PTE_A | PTE_D) | leaf_bits(g, m, m.flags & MAP_SHARED) & ~<u64>PTE_A
                    if rc == RC_OK:
                        rc = entry_set(g, table, index, new)
                    g.n.leaf_installs += new & PTE_P
                    if entry & PTE_P:
                        flush_page(g, va)
                va += 4096
            va = stop
    i = _first_after(g, p, end - 1)
    while True:                     # neighbours that have become alike are one again
        _merge(g, p, i)
        if i == 0 or vmas_of(g, p)[i].end < start:
            break
        i -= 1
    if rc != RC_OK:
        return rc
    return flush_end(g, p, g.sloppy & SLOPPY_MPROTECT != 0)


cdef int memory_drop(sc_guest *g, u32 p, u64 start, u64 length) noexcept nogil:
    """madvise(MADV_DONTNEED) of [start, start + length): the pages go, the mappings and the tables stay."""
    cdef sc_gvma part
    cdef u64 end = start + length
    cdef u32 i = _first_after(g, p, start)
    cdef int rc = RC_OK
    cdef int done
    flush_begin(g)
    while rc == RC_OK and i < g.procs[p].nvmas and vmas_of(g, p)[i].start < end:
        part = vmas_of(g, p)[i]
        part.start = max(part.start, start)
        part.end = min(part.end, end)
        rc = RC_SEGV if part.flags & MAP_LARGE else memory_zap(g, p, &part, False, False)
        i += 1
    done = flush_end(g, p, False)
    return rc if rc != RC_OK else done


cdef int _move_entries(sc_guest *g, u32 p, u64 start, u64 length, u64 to, bint make) noexcept nogil:
    """make: a table wherever an entry of [start, start + length) will stand; else the entries go there."""
    cdef u64 span = guest_span(g, 2)
    cdef u64 at = 0
    cdef u64 source = 0
    cdef u64 target, entry
    cdef u64 left = g.procs[p].tables
    cdef u64 looked = ~<u64>0       # for which tables `source` and `target` are
    cdef u64 found = ~<u64>0
    cdef u32 index
    cdef int rc
    while at < length:
        if (start + at) // span != looked:
            looked = (start + at) // span
            rc = table_find(g, p, start + at, 1, False, &source)
            if rc == RC_OK and source:
                rc = table_spent(&left)
            if rc != RC_OK:
                return rc
        if source == 0:
            at = min((looked + 1) * span - start, length)
            continue
        index = guest_index(g, start + at, 1)
        entry = entry_read(g, source, index)
        if entry:
            if (to + at) // span != found:
                found = (to + at) // span
                rc = table_find(g, p, to + at, 1, True, &target)
                if rc != RC_OK:
                    return rc
            if not make:
                if entry & PTE_P:
                    rc = entry_take(g, source, index, &entry)
                    g.n.leaf_installs += 1
                    flush_page(g, start + at)
                else:
                    rc = entry_set(g, source, index, 0)
                if rc == RC_OK:
                    rc = entry_set(g, target, guest_index(g, to + at, 1), entry)
                if rc != RC_OK:
                    return rc
        at += 4096
    return RC_OK


cdef int memory_move(sc_guest *g, u32 p, u64 start, u64 length, u64 to) noexcept nogil:
    """mremap of [start, start + length), of one mapping, to `to`, where nothing is mapped: the entries move
    (move_page_tables)."""
    cdef sc_gvma *m = memory_find(g, p, start)
    cdef sc_gvma new
    cdef u64 low = 0
    cdef u64 high = ~<u64>0
    cdef u32 i
    cdef int rc, done
    if m == NULL or m.end < start + length or m.flags & MAP_LARGE:
        return RC_SEGV
    i = _first_after(g, p, to)
    if g.procs[p].nvmas + 3 > g.max_vmas or (i < g.procs[p].nvmas and vmas_of(g, p)[i].start < to + length):
        return RC_NOROOM
    rc = _move_entries(g, p, start, length, to, True)   # what may fail comes first
    if rc != RC_OK:
        return rc
    _split(g, p, start)
    _split(g, p, start + length)
    flush_begin(g)
    rc = _move_entries(g, p, start, length, to, False)
    if rc == RC_OK:
        i = _first_after(g, p, start)
        new = vmas_of(g, p)[i]
        _remove(g, p, i, 1)
        new.start = to
        new.end = to + length
        new.flags &= ~MAP_GROWS
        _insert(g, p, &new)
        i = _first_after(g, p, start)
        if i:
            low = vmas_of(g, p)[i - 1].end
        if i < g.procs[p].nvmas:
            high = vmas_of(g, p)[i].start
        rc = tables_trim(g, p, start, start + length, low, high)
    done = flush_end(g, p, False)
    return rc if rc != RC_OK else done


cdef int memory_brk(sc_guest *g, u32 p, u64 end) noexcept nogil:
    """brk: the heap ends at `end`, rounded up to a page."""
    cdef sc_gproc *process = &g.procs[p]
    cdef u64 old = process.brk
    cdef u64 where
    cdef int rc = RC_OK
    end = (end + 4095) & ~<u64>4095
    if end < process.brk_start or end >= g.mmap_base:
        return RC_NOROOM
    if end > old:
        rc = memory_map(g, p, old, end - old, PROT_READ | PROT_WRITE, MAP_HEAP, 0, 0, &where)
    elif end < old:
        rc = memory_unmap(g, p, end, old - end)
    if rc == RC_OK:
        process.brk = end
    return rc
