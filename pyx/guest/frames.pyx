"""The guest kernel's frame allocator.

Free frames form a stack, as a processor's own list does in a real kernel: a table that was freed soon serves as data,
and the stores that clear it go to a frame that a shadow MMU may still take for a table.

If frames are grouped, those that cannot be moved (tables, kernel stacks, pipe buffers) come from blocks of their own,
of the size of a large page, and have a stack of their own. When one of the two kinds has run out it takes from the
other.
"""
from shadowcore.engine.access cimport OP_READ, OP_WRITE, sc_result
from shadowcore.engine.types cimport RC_OK, u8, u32, u64
from shadowcore.guest.cpu cimport cpu_access, cpu_string
from shadowcore.guest.state cimport (
    FRAME_ANON, FRAME_DYING, FRAME_FREE, FRAME_KERNEL, FRAME_LARGE, FRAME_TABLE, FRAME_WAS_TABLE, RC_NOMEM, guest_span,
    sc_guest,
)


cdef u64 _movable(sc_guest *g) noexcept nogil:
    """A free frame; if frames are grouped, of a block for what can be moved."""
    cdef u64 frame = g.free_head
    if frame:
        g.free_head = g.next_free[frame]
    elif g.fresh < g.fresh_end:
        frame = g.fresh
        g.fresh += 1
    return frame


cdef u64 _fixed(sc_guest *g) noexcept nogil:
    """A free frame of a block for what cannot be moved. Blocks are taken from the end of memory downwards."""
    cdef u64 frame = g.fixed_head
    cdef u64 block
    if frame:
        g.fixed_head = g.next_free[frame]
        return frame
    if g.fixed == g.fixed_end and g.fresh < g.fresh_end:
        block = (g.fresh_end - 1) & ~((guest_span(g, 2) >> 12) - 1)
        if block >= g.fresh:
            g.fixed = block
            g.fixed_end = g.fresh_end
            g.fresh_end = block
    if g.fixed == g.fixed_end:
        return 0
    g.fixed += 1
    return g.fixed - 1


cdef u64 frame_take(sc_guest *g, u8 kind) noexcept nogil:
    """A frame with one reference, its contents as the last user left them; 0 if there is none."""
    cdef bint fixed = g.grouped and (kind == FRAME_TABLE or kind == FRAME_KERNEL)
    cdef u64 frame = _fixed(g) if fixed else _movable(g)
    if frame == 0 and g.grouped:
        frame = _movable(g) if fixed else _fixed(g)
    if frame == 0:
        return 0
    if g.kind[frame] & FRAME_WAS_TABLE and kind != FRAME_TABLE:
        g.n.tables_reused += 1
    g.kind[frame] = kind
    g.count[frame] = 1
    g.n_free -= 1
    return frame


cdef void frame_put(sc_guest *g, u64 frame) noexcept nogil:
    """Give up one reference; the last one frees the frame."""
    cdef u8 was = g.kind[frame]
    g.count[frame] -= 1
    if g.count[frame]:
        return
    if g.kind[frame] == FRAME_LARGE:
        g.next_free[frame] = <u32>g.large_head
        g.large_head = frame
        g.n_large += 1
        g.kind[frame] = FRAME_FREE
        return
    g.kind[frame] = FRAME_FREE | (FRAME_WAS_TABLE if was == FRAME_TABLE or was == FRAME_DYING else 0)
    g.n_free += 1
    if frame >= g.fresh_end:
        g.next_free[frame] = <u32>g.fixed_head
        g.fixed_head = frame
    else:
        g.next_free[frame] = <u32>g.free_head
        g.free_head = frame


cdef int frame_filled(sc_guest *g, u8 kind, const u8 *source, u64 *frame) noexcept nogil:
    """A frame with the 4096 bytes at `source` (of the host; NULL: zeros), stored through the direct map."""
    cdef sc_result r
    cdef int rc = RC_OK
    frame[0] = frame_take(g, kind)
    if frame[0] == 0:
        return RC_NOMEM
    if g.regions:                   # its struct, which counts its users
        rc = cpu_access(g, OP_WRITE, 8, g.page_structs + 64 * frame[0], g.count[frame[0]], &r)
    if rc == RC_OK:
        rc = cpu_string(g, frame[0] << 12, source, 4096)
    if rc != RC_OK:
        frame_put(g, frame[0])
    return rc


cdef int frame_zeroed(sc_guest *g, u8 kind, u64 *frame) noexcept nogil:
    g.n.pages_zeroed += 1
    return frame_filled(g, kind, NULL, frame)


cdef int frame_large(sc_guest *g, u64 *frame) noexcept nogil:
    """A large page, cleared; its first frame stands for all of it."""
    cdef u64 n
    cdef int rc = RC_OK
    frame[0] = g.large_head
    if frame[0] == 0:
        return RC_NOMEM
    g.large_head = g.next_free[frame[0]]
    g.n_large -= 1
    g.kind[frame[0]] = FRAME_LARGE
    g.count[frame[0]] = 1
    for n in range(guest_span(g, 2) >> 12):
        g.n.pages_zeroed += 1
        rc = cpu_string(g, (frame[0] + n) << 12, NULL, 4096)
        if rc != RC_OK:
            break
    return rc


cdef int frame_copied(sc_guest *g, u64 source, u64 *frame) noexcept nogil:
    """An anonymous frame with what is in frame `source`, read and stored through the direct map."""
    cdef sc_result r
    cdef int rc = cpu_access(g, OP_READ, 8, g.direct_map + (source << 12), 0, &r)
    if rc != RC_OK:
        return rc
    g.n.pages_copied += 1
    return frame_filled(g, FRAME_ANON, g.ram + (source << 12), frame)
