"""Paging modes as small constant descriptors, passed by value so that each walk is compiled for its mode."""

cdef struct sc_gmode:
    int top                         # level of the first table that is read (PAE: 2, below the cached root entries)
    int pte_size                    # bytes of an entry: 4 or 8
    bint pae_root                   # the walk starts from four cached root entries
    bint host                       # tables are at host physical addresses (the shadow), not guest ones
    bint silent                     # no accessed or dirty bit is set

cdef inline sc_gmode gmode_32(bint host, bint silent) noexcept nogil:
    return sc_gmode(2, 4, False, host, silent)

cdef inline sc_gmode gmode_pae(bint host, bint silent) noexcept nogil:
    return sc_gmode(2, 8, True, host, silent)

cdef inline sc_gmode gmode_64(bint host, bint silent) noexcept nogil:
    return sc_gmode(4, 8, False, host, silent)

cdef inline sc_gmode gmode_la57(bint host, bint silent) noexcept nogil:
    return sc_gmode(5, 8, False, host, silent)
