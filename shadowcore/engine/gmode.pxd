"""How a walk is made: the paging mode and what the place that asks wants of it, as small constants passed by value, so
that one body is compiled for each combination that is used.

`in_mode` is the one place that chooses by the mode: whatever is compiled for each of them is called through it.
"""
from shadowcore.engine.types cimport MODE_32, MODE_64, MODE_LA57, MODE_OFF, MODE_PAE, u64

# What a walk is for.
cdef enum:
    WALK = 0                        # the processor's: sets A and D, fills an sc_walk
    PROBE = 1                       # fills an sc_walk, changes nothing
    GLANCE = 2                      # says where it leads and changes nothing; given up where WALK would have more to do

# Whose tables are walked.
cdef enum:
    TABLES_GUEST = 0                # the guest's, at gpas
    TABLES_SHADOW = 1               # the shadow's, at hpas
    TABLES_NESTED = 2               # the guest's, each address translated by the host's (nested paging)

cdef struct sc_gmode:
    int mode                        # MODE_*
    int top                         # level of the first table that is read (PAE: 2, below the cached root entries)
    int pte_size                    # bytes of an entry: 4 or 8
    bint pae_root                   # the walk starts from four cached root entries
    bint host                       # tables are at host physical addresses (the shadow), not guest ones
    bint nested                     # tables are at gpas, which the host's tables translate
    bint sets                       # A and D are set
    bint reports                    # an sc_walk is filled, beside gpa and references
    bint strict                     # given up where A or D is clear

cdef inline sc_gmode _gmode(int mode, int tables, int what) noexcept nogil:
    return sc_gmode(mode, 2 if mode == MODE_PAE else mode, 4 if mode == MODE_32 else 8, mode == MODE_PAE,
                    tables == TABLES_SHADOW, tables == TABLES_NESTED, what == WALK, what != GLANCE, what == GLANCE)

# What is done in each mode: `asked` is a struct of the caller's. MODE_OFF has no tables.
ctypedef u64 (*sc_in_mode)(void *asked, sc_gmode g) noexcept nogil

cdef inline u64 in_mode(int mode, int tables, int what, sc_in_mode body, void *asked) noexcept nogil:
    """body(asked, g) for tables of `mode`. body is the name of an inline function, tables (TABLES_*) and what are
    constants: so the compiler makes a copy of the body for each mode, in which all of g is known. Shadow tables have
    entries of 8 bytes."""
    if mode == MODE_64:
        return body(asked, _gmode(MODE_64, tables, what))
    if mode == MODE_PAE:
        return body(asked, _gmode(MODE_PAE, tables, what))
    if mode == MODE_LA57:
        return body(asked, _gmode(MODE_LA57, tables, what))
    if tables != TABLES_SHADOW and mode == MODE_32:
        return body(asked, _gmode(MODE_32, tables, what))
    return body(asked, _gmode(MODE_OFF, tables, what))
