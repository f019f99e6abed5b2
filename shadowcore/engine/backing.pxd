"""Host backing: which frames of guest RAM the host has pages for, and how it maps them; and where that host is a guest
itself, which of these the outer host has found pages for.

What a touch, a discard or a collapse does is what Linux 6.1 does for anonymous memory. Nothing here knows of guests.
"""
from shadowcore.engine.types cimport u8, u64

# Of a frame.
cdef enum:
    HOST_ABSENT = 0                 # there is no page, and what was there is gone: it reads as zeros
    HOST_AWAY = 1                   # the page is elsewhere, as on a swap device: its next touch brings it back
    HOST_ZERO = 2                   # the zero page, which may only be read
    HOST_OWN = 3                    # a page of its own

# Of a block of 512 frames.
cdef enum:
    BLOCK_NOTHING = 0               # the host has no page table there
    BLOCK_TABLE = 1                 # entries of 4 KiB
    BLOCK_LARGE = 2                 # one entry of 2 MiB
    BLOCK_MAP = 3                   # these bits are one of the above
    BLOCK_HUGE = 4                  # a bit beside: where nothing is mapped, 2 MiB are made at once

# The host is about to take away its mapping of n frames from `frame` on: nothing may use it any more.
ctypedef void (*sc_withdrawn)(void *context, u64 frame, u64 n) noexcept nogil

cdef struct sc_backing:
    u8 *frame                       # per frame of RAM: HOST_*
    u8 *block                       # per 512 frames: BLOCK_*
    u64 nframes                     # frames of RAM
    u64 changes                     # times that a mapping of frames in memory slots was taken away
    u64 *faults                     # counter: frames or blocks that a touch made
    u64 *faults_large               # counter: of these, blocks
    u8 *outer                       # per frame of RAM: the outer host has it (1); NULL: all of them, for good
    bint outer_huge                 # a first touch makes 2 MiB there
    u64 *outer_faults               # counter: frames or blocks that the outer host found
    u64 *outer_large                # counter: of these, blocks
    sc_withdrawn withdrawn
    void *context                   # its first argument

cdef inline int host_level(const sc_backing *h, u64 frame) noexcept nogil:
    """Level of the host's entry for the frame: 1 or 2."""
    return 2 if h.block[frame >> 9] & BLOCK_MAP == BLOCK_LARGE else 1

cdef inline bint host_writable(const sc_backing *h, u64 frame) noexcept nogil:
    """A store to the frame needs nothing of the host."""
    return h.frame[frame] == HOST_OWN

cdef inline bint host_present(const sc_backing *h, u64 frame) noexcept nogil:
    return h.frame[frame] >= HOST_ZERO

cdef void host_touch(sc_backing *h, u64 frame, bint write) noexcept nogil
cdef void host_unmap(sc_backing *h, u64 first, u64 n, bint keep) noexcept nogil
cdef void host_collapse(sc_backing *h, u64 first, u64 n) noexcept nogil
cdef bint host_is_sound(const sc_backing *h) noexcept nogil
