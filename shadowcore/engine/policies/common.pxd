"""What several policies do alike: hooks of sc_policy."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32

# One queue, newest first.
cdef void queued_made(sc_mmu *mmu, u32 page) noexcept nogil
cdef void queued_gone(sc_mmu *mmu, u32 page) noexcept nogil
cdef u32 queued_victim(sc_mmu *mmu) noexcept nogil

# One queue, whose pages are marked when they are used.
cdef void marked_made(sc_mmu *mmu, u32 page) noexcept nogil
cdef void marked_used(sc_mmu *mmu, u32 page) noexcept nogil

# An order, by which the least goes first.
cdef u32 ordered_victim(sc_mmu *mmu) noexcept nogil
