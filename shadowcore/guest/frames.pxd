"""Frames of guest memory: given, counted, freed; the last one freed is given first."""
from shadowcore.engine.types cimport u8, u64
from shadowcore.guest.state cimport FRAME_ANON, FRAME_CACHE, FRAME_LARGE, sc_guest

cdef inline bint frame_known(const sc_guest *g, u64 frame) noexcept nogil:
    """A frame that the kernel has given away: what an entry in guest memory may name."""
    return (frame >= g.boot_end and (frame < g.fresh or frame >= g.fresh_end) and frame < g.all_frames
            and g.count[frame] != 0)

cdef inline bint frame_is_page(const sc_guest *g, u64 frame) noexcept nogil:
    """A known frame that a leaf may name: no table, nothing of the kernel's own."""
    return g.kind[frame] == FRAME_ANON or g.kind[frame] == FRAME_CACHE or g.kind[frame] == FRAME_LARGE

cdef u64 frame_take(sc_guest *g, u8 kind) noexcept nogil
cdef void frame_put(sc_guest *g, u64 frame) noexcept nogil
cdef int frame_zeroed(sc_guest *g, u8 kind, u64 *frame) noexcept nogil
cdef int frame_filled(sc_guest *g, u8 kind, const u8 *source, u64 *frame) noexcept nogil
cdef int frame_large(sc_guest *g, u64 *frame) noexcept nogil
cdef int frame_copied(sc_guest *g, u64 source, u64 *frame) noexcept nogil
