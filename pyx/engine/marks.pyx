"""Marks up the parents of unsync pages."""
from shadowcore.engine.bits cimport PTE_P, PTE_PS, sc_ctz64
from shadowcore.engine.marks cimport MARKS_BATCH, sc_step, sc_unsync, sc_unsync_at
from shadowcore.engine.memory cimport mem_pool_page
from shadowcore.engine.rmap cimport list_first, list_next
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64


cdef void marks_set(sc_mmu *mmu, u32 spte) noexcept nogil:
    """The entry leads to a page that is unsync, or has marks."""
    cdef u32 page = spte >> 9
    cdef u64 *word = &mmu.below[page * 8 + ((spte & 511) >> 6)]
    cdef u64 bit = <u64>1 << (spte & 63)
    if word[0] & bit:
        return
    word[0] |= bit
    mmu.pages[page].unsync_children += 1
    if mmu.pages[page].unsync_children == 1:
        marks_set_above(mmu, page)


cdef void marks_set_above(sc_mmu *mmu, u32 page) noexcept nogil:
    """The page is unsync, or has marks: whatever leads to it says so."""
    cdef u32 head = mmu.pages[page].parents
    cdef u32 member = list_first(head)
    while member:
        marks_set(mmu, member - 1)
        member = list_next(mmu, head, member)


cdef inline void _clear(sc_mmu *mmu, u32 page, u32 index) noexcept nogil:
    mmu.pages[page].unsync_children -= 1
    mmu.below[page * 8 + (index >> 6)] &= ~(<u64>1 << (index & 63))


cdef inline bint _note(const sc_mmu *mmu, sc_unsync *found, u32 page, u32 index) noexcept nogil:
    """Take note of a step; True if there is no room for another. An unsync page is noted once."""
    cdef int i
    if mmu.pages[page].unsync:
        for i in range(found.n):
            if found.step[i].page == page:
                return False
    found.step[found.n] = sc_step(page, index)
    found.n += 1
    return found.n == MARKS_BATCH


cdef int _walk(sc_mmu *mmu, u32 page, sc_unsync *found) noexcept nogil:
    """Unsync pages met below `page`, or -1 when there is no room for more."""
    cdef int met = 0
    cdef int below
    cdef u32 word, index, child
    cdef u64 bits, value
    for word in range(8):
        bits = mmu.below[page * 8 + word]
        while bits:
            index = word * 64 + sc_ctz64(bits)
            bits &= bits - 1
            value = mmu.table[page * 512 + index]
            if not value & PTE_P or value & PTE_PS:
                _clear(mmu, page, index)
                continue
            child = mem_pool_page(value)
            if mmu.pages[child].unsync_children:
                if _note(mmu, found, child, index):
                    return -1
                below = _walk(mmu, child, found)
                if below < 0:
                    return -1
                if below == 0:
                    _clear(mmu, page, index)
                met += below
            elif mmu.pages[child].unsync:
                met += 1
                if _note(mmu, found, child, index):
                    return -1
            else:
                _clear(mmu, page, index)
    return met


cdef int marks_walk(sc_mmu *mmu, u32 page, sc_unsync *found) noexcept nogil:
    """Find unsync pages below `page`, as many as there is room for: 0 if there are none. Marks with nothing below them
    are cleared on the way."""
    found.n = 0
    if not mmu.pages[page].unsync_children:
        return 0
    _note(mmu, found, page, 0)
    return _walk(mmu, page, found)


cdef void marks_first(const sc_mmu *mmu, const sc_unsync *found, sc_unsync_at *at) noexcept nogil:
    """Before the first leaf."""
    cdef int level
    at.i = 0
    for level in range(6):
        at.parent[level] = SC_NONE
    if found.n:
        at.parent[role_level(mmu.pages[found.step[0].page].role) - 2] = found.step[0].page


cdef bint marks_next(const sc_mmu *mmu, const sc_unsync *found, sc_unsync_at *at) noexcept nogil:
    """On to the next leaf; False if there is none."""
    cdef int level
    while True:
        at.i += 1
        if at.i >= found.n:
            return False
        at.page = found.step[at.i].page
        level = role_level(mmu.pages[at.page].role)
        at.index[level - 1] = found.step[at.i].index
        if level == 1:
            return True
        at.parent[level - 2] = at.page


cdef void marks_clear(sc_mmu *mmu, const sc_unsync_at *at) noexcept nogil:
    """The leaf is no longer unsync, or is gone: its mark goes, and those above that have nothing left below them."""
    cdef int level = 0
    cdef u32 page
    while True:
        page = at.parent[level]
        if page == SC_NONE:
            return
        _clear(mmu, page, at.index[level])
        level += 1
        if mmu.pages[page].unsync_children:
            return
