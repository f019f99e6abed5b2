"""The host's pages under guest RAM: touched, taken away, put together."""
from libc.string cimport memset

from shadowcore.engine.backing cimport (
    BLOCK_HUGE, BLOCK_LARGE, BLOCK_MAP, BLOCK_NOTHING, BLOCK_TABLE, HOST_ABSENT, HOST_AWAY, HOST_OWN, HOST_ZERO,
    sc_backing,
)
from shadowcore.engine.types cimport u8, u64


cdef inline void _map(sc_backing *h, u64 block, u8 how) noexcept nogil:
    h.block[block] = (h.block[block] & BLOCK_HUGE) | how


cdef void _outer_touch(sc_backing *h, u64 first, u64 n) noexcept nogil:
    """The host clears n frames from `first` on, or reads them in: where it is a guest, the outer host finds what it
    lacks. What the host takes from its guest later, it keeps: the outer host hears nothing of it."""
    cdef u64 frame, block
    if h.outer == NULL:
        return
    for frame in range(first, first + n):
        if h.outer[frame]:
            continue
        h.outer_faults[0] += 1
        block = frame & ~<u64>511
        if h.outer_huge and block + 512 <= h.nframes:
            h.outer_large[0] += 1
            memset(h.outer + block, 1, 512)
        else:
            h.outer[frame] = 1


cdef void _split(sc_backing *h, u64 block) noexcept nogil:
    """A large entry becomes small ones: those of the huge zero page are zero pages."""
    h.withdrawn(h.context, block << 9, 512)
    _map(h, block, BLOCK_TABLE)


cdef void host_touch(sc_backing *h, u64 frame, bint write) noexcept nogil:
    """An access, by the host's kernel or a program: what is missing is made."""
    cdef u64 block = frame >> 9
    if h.frame[frame] == HOST_OWN or (h.frame[frame] == HOST_ZERO and not write):
        return
    h.faults[0] += 1
    if h.block[block] == BLOCK_HUGE | BLOCK_NOTHING:
        _map(h, block, BLOCK_LARGE)
        h.faults_large[0] += 1
        memset(h.frame + (block << 9), HOST_OWN if write else HOST_ZERO, 512)
        if write:
            _outer_touch(h, block << 9, 512)
        return
    if h.block[block] & BLOCK_MAP == BLOCK_LARGE:
        _split(h, block)
    if h.frame[frame] == HOST_ZERO:
        h.withdrawn(h.context, frame, 1)
    _map(h, block, BLOCK_TABLE)
    h.frame[frame] = HOST_OWN if write or h.frame[frame] == HOST_AWAY else HOST_ZERO
    if h.frame[frame] == HOST_OWN:
        _outer_touch(h, frame, 1)


cdef void host_unmap(sc_backing *h, u64 first, u64 n, bint keep) noexcept nogil:
    """The host takes n frames back. A table of small entries stays one; a large page that goes in part is split first,
    and so is one that is kept elsewhere. keep: what is in them comes back at their next touch; else it is gone."""
    cdef u64 block, frame
    h.withdrawn(h.context, first, n)
    for block in range(first >> 9, ((first + n - 1) >> 9) + 1):
        if h.block[block] & BLOCK_MAP == BLOCK_LARGE:
            if not keep and first <= block << 9 and (block + 1) << 9 <= first + n:
                _map(h, block, BLOCK_NOTHING)
            else:
                _split(h, block)
        elif keep and h.block[block] & BLOCK_MAP != BLOCK_NOTHING:
            _map(h, block, BLOCK_TABLE)
    for frame in range(first, first + n):
        if not keep or h.frame[frame] == HOST_ZERO:
            h.frame[frame] = HOST_ABSENT
        elif h.frame[frame] == HOST_OWN:
            h.frame[frame] = HOST_AWAY


cdef void host_collapse(sc_backing *h, u64 first, u64 n) noexcept nogil:
    """Blocks, all of n frames from `first` on: those of small entries become large pages, and from now on all may be
    made so at once."""
    cdef u64 block
    for block in range(first >> 9, (first + n) >> 9):
        if h.block[block] & BLOCK_MAP == BLOCK_TABLE:
            h.withdrawn(h.context, block << 9, 512)
            _map(h, block, BLOCK_LARGE)
            memset(h.frame + (block << 9), HOST_OWN, 512)
        h.block[block] |= BLOCK_HUGE


cdef bint host_is_sound(const sc_backing *h) noexcept nogil:
    """Each number is one that there is; a large entry is of a whole block, all of whose frames are alike and there; no
    block without a page table has frames."""
    cdef u64 block, frame
    cdef u8 how
    for block in range((h.nframes + 511) >> 9):
        how = h.block[block] & BLOCK_MAP
        if h.block[block] > BLOCK_HUGE | BLOCK_LARGE or how > BLOCK_LARGE:
            return False
        if h.block[block] & ~BLOCK_TABLE and (block + 1) << 9 > h.nframes:
            return False
        for frame in range(block << 9, min((block + 1) << 9, h.nframes)):
            if h.frame[frame] > HOST_OWN or (how == BLOCK_NOTHING and h.frame[frame] != HOST_ABSENT):
                return False
            if how == BLOCK_LARGE and (h.frame[frame] < HOST_ZERO or h.frame[frame] != h.frame[block << 9]):
                return False
    return True
