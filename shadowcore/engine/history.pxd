"""What design `adaptive` remembers of guest tables, by gfn: beside the shadow, so that it outlives a zap.

The table is bounded. Nothing in it is an index, or is followed: whatever stands there, the guest sees the same.
"""
from shadowcore.engine.types cimport SC_NONE, u8, u16, u32, u64

# How a leaf table is kept.
cdef enum:
    KEPT_UNSYNC = 0                 # a store lets it run out of sync
    KEPT_EMULATED = 1               # stores are emulated, and leaves updated in place
    KEPT_ZAPPED = 2                 # a store zaps what shadows it; the guest stores by itself until the next use

# Why it is so, in the order of explained.REASONS.
cdef enum:
    WHY_FIRST = 0                   # nothing speaks against the beginning
    WHY_SHORT = 1                   # to emulate is cheaper than to go unsync for so few stores
    WHY_LONG = 2                    # to emulate has cost more than going unsync would have
    WHY_INVLPG = 3                  # INVLPGs of entries that nothing used have cost more than to make them again
    WHY_REFAULTS = 4                # zapping has cost more than INVLPGs had
    WHY_TRIAL = 5                   # zapped for so long that it is tried again

# Rules that are on: a bit each, in the order of config.RULES.
cdef enum:
    RULE_EMULATE = 1
    RULE_ZAP = 2
    RULE_INVLPG = 4
    RULE_FREED = 8
    RULE_HYSTERESIS = 16

cdef struct sc_history:             # of one guest table
    u64 key                         # gfn + 1; 0: free
    int balance                     # cycles that the present way has cost more than another would have
    int storm                       # cycles of INVLPGs, less what zapping would have cost
    u32 worth                       # zapped: cycles of INVLPGs that a use of the table saves
    u32 load                        # sc_histories.loads at the last store
    u32 last                        # emulated: the spte of the last store, or SC_NONE
    u32 group                       # ... and the group of entries in which one was last found to have been used
    u32 stores                      # since it is known: emulated stores,
    u32 unsyncs                     # ... times that it went unsync,
    u32 idle                        # ... after which neither fill nor INVLPG was seen,
    u32 fills                       # ... fills through it,
    u32 invlpgs                     # ... INVLPG exits for it,
    u32 zaps                        # ... and zaps
    u16 fills_now                   # of these, since it last went unsync, or was zapped
    u16 invlpgs_now
    u16 uses_now                    # INVLPGs of leaves that had been used
    u16 cycles                      # zaps since it is kept so
    u16 changes                     # of the way
    u8 kept                         # KEPT_*
    u8 why                          # WHY_*
    u8 doubts                       # how often the threshold is doubled
    u8 absent                       # the entry of the last store had no leaf
    u16 pad

cdef struct sc_histories:
    u32 shift                       # group = mixed gfn >> shift
    u32 rules                       # RULE_*
    u32 loads                       # of CR3 so far
    int write                       # prices, in cycles, of whole exits: a store that finds W missing,
    int fill                        # ... a leaf made,
    int emulate                     # ... a store emulated,
    int invlpg                      # ... INVLPG;
    int page                        # ... and, no exit, a page made and zapped
    # The fault that is being handled.
    bint faulting
    bint storing
    u32 vcpu
    u64 va
    sc_history *entry

cdef enum:
    HISTORY_GROUP = 4               # entries in which a gfn can stand

cdef inline u64 history_first(const sc_histories *h, u64 gfn) noexcept nogil:
    return ((gfn * <u64>0x9E3779B97F4A7C15ULL) >> h.shift) * HISTORY_GROUP

cdef inline sc_history *history_find(const sc_histories *h, u64 gfn) noexcept nogil:
    """What is known of the table at gfn, or NULL."""
    cdef u64 at = history_first(h, gfn)
    cdef int i
    for i in range(HISTORY_GROUP):
        if h.entry[at + i].key == gfn + 1:
            return &h.entry[at + i]
    return NULL

cdef inline sc_history *history_get(sc_histories *h, u64 gfn) noexcept nogil:
    """The same; of a table that is not known, a new entry, in place of the one that was stored to least recently."""
    cdef u64 at = history_first(h, gfn)
    cdef sc_history *found = history_find(h, gfn)
    cdef int i
    if found != NULL:
        return found
    found = &h.entry[at]
    for i in range(HISTORY_GROUP):
        if h.entry[at + i].key == 0:
            found = &h.entry[at + i]
            break
        if h.loads - h.entry[at + i].load > h.loads - found.load:
            found = &h.entry[at + i]
    found[0] = sc_history(gfn + 1, 0, 0, 0, h.loads, SC_NONE, SC_NONE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                          0, 0)
    return found
