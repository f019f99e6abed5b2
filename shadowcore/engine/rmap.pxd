"""Lists of sptes: for a frame its writable leaves (the reverse map), for a shadow page its parents.

A list of one is the spte itself in the head. From two on the head carries LIST_MANY and sc_mmu.links holds both
neighbours of each member, so that adding and removing cost the same whatever the length (patches 1 and 9 chain
small arrays, and search them).
"""
from shadowcore.engine.memory cimport mem_leaf_frame
from shadowcore.engine.page cimport sc_link
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

cdef enum:
    LIST_MANY = 0x80000000          # in a head: the members have neighbours in sc_mmu.links

cdef inline u32 list_first(u32 head) noexcept nogil:
    """First member of a list as spte + 1, or 0."""
    return head & ~<u32>LIST_MANY

cdef inline u32 list_next(const sc_mmu *mmu, u32 head, u32 member) noexcept nogil:
    """Member after `member` (spte + 1), or 0."""
    return mmu.links[member - 1].next if head & LIST_MANY else 0

cdef inline void list_add(sc_mmu *mmu, u32 *head, u32 spte) noexcept nogil:
    """Put `spte` at the front of the list."""
    cdef u32 first = head[0] & ~<u32>LIST_MANY
    if first == 0:
        head[0] = spte + 1
        return
    if not head[0] & LIST_MANY:
        mmu.links[first - 1].next = 0
    mmu.links[first - 1].prev = spte + 1
    mmu.links[spte].prev = 0
    mmu.links[spte].next = first
    head[0] = (spte + 1) | LIST_MANY

cdef inline void list_remove(sc_mmu *mmu, u32 *head, u32 spte) noexcept nogil:
    """Take `spte`, a member, out of the list."""
    cdef u32 prev, next_, first
    if not head[0] & LIST_MANY:
        head[0] = 0
        return
    prev = mmu.links[spte].prev
    next_ = mmu.links[spte].next
    if next_:
        mmu.links[next_ - 1].prev = prev
    if prev:
        mmu.links[prev - 1].next = next_
        first = head[0] & ~<u32>LIST_MANY
    else:
        first = next_
    head[0] = first | LIST_MANY if mmu.links[first - 1].next else first

cdef inline void rmap_add(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Record the leaf `spte`, present and writable, for the frame it maps (patch 1)."""
    list_add(mmu, &mmu.frames[mem_leaf_frame(mmu.mem, mmu.table[spte])].rmap, spte)

cdef inline void rmap_remove(sc_mmu *mmu, u32 spte) noexcept nogil:
    """Forget the leaf `spte`, present and writable until now."""
    list_remove(mmu, &mmu.frames[mem_leaf_frame(mmu.mem, mmu.table[spte])].rmap, spte)

cdef u32 list_length(const sc_mmu *mmu, u32 head) noexcept nogil
cdef bint rmap_log(sc_mmu *mmu, u32 head) noexcept nogil
cdef bint rmap_write_protect(sc_mmu *mmu, u64 frame) noexcept nogil
