"""How a walk is made: the paging mode and what the place that asks wants of it, as small constants passed by value, so
that one body is compiled for each combination that is used."""

# What a walk is for.
cdef enum:
    WALK = 0                        # the processor's: sets A and D, fills an sc_walk
    PROBE = 1                       # fills an sc_walk, changes nothing
    GLANCE = 2                      # says where it leads and changes nothing; given up where WALK would have more to do

cdef struct sc_gmode:
    int top                         # level of the first table that is read (PAE: 2, below the cached root entries)
    int pte_size                    # bytes of an entry: 4 or 8
    bint pae_root                   # the walk starts from four cached root entries
    bint host                       # tables are at host physical addresses (the shadow), not guest ones
    bint sets                       # A and D are set
    bint reports                    # an sc_walk is filled, beside gpa and references
    bint strict                     # given up where A or D is clear

cdef inline sc_gmode _gmode(int top, int pte_size, bint pae_root, bint host, int what) noexcept nogil:
    return sc_gmode(top, pte_size, pae_root, host, what == WALK, what != GLANCE, what == GLANCE)

cdef inline sc_gmode gmode_32(bint host, int what) noexcept nogil:
    return _gmode(2, 4, False, host, what)

cdef inline sc_gmode gmode_pae(bint host, int what) noexcept nogil:
    return _gmode(2, 8, True, host, what)

cdef inline sc_gmode gmode_64(bint host, int what) noexcept nogil:
    return _gmode(4, 8, False, host, what)

cdef inline sc_gmode gmode_la57(bint host, int what) noexcept nogil:
    return _gmode(5, 8, False, host, what)
