"""Marks: which entries of a shadow page lead to pages that are unsync, and how those are found from above.

An entry's bit in sc_mmu.below says that the page it leads to is unsync or has marks itself; sc_page.unsync_children
counts the bits. Marks are set as soon as a page becomes unsync or is linked, and cleared by the walk that finds nothing
below them any more.
"""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32

cdef enum:
    MARKS_BATCH = 16                # steps that one walk takes note of

cdef struct sc_step:
    u32 page
    u32 index                       # entry of the page above that led here

# What a walk came by, from the top down: a page, then what its entries lead to; unsync pages are the leaves.
cdef struct sc_unsync:
    int n
    sc_step step[MARKS_BATCH]

# Where an iteration over the leaves is.
cdef struct sc_unsync_at:
    int i                           # step
    u32 page                        # unsync page
    u32 parent[6]                   # by level - 2: the page of that level above it; SC_NONE beyond the top
    u32 index[6]                    # by level - 1: the entry that leads to the page of that level

cdef void marks_set(sc_mmu *mmu, u32 spte) noexcept nogil
cdef void marks_set_above(sc_mmu *mmu, u32 page) noexcept nogil
cdef int marks_walk(sc_mmu *mmu, u32 page, sc_unsync *found) noexcept nogil
cdef void marks_first(const sc_mmu *mmu, const sc_unsync *found, sc_unsync_at *at) noexcept nogil
cdef bint marks_next(const sc_mmu *mmu, const sc_unsync *found, sc_unsync_at *at) noexcept nogil
cdef void marks_clear(sc_mmu *mmu, const sc_unsync_at *at) noexcept nogil
