"""Dirty logs under design nested: what a slot's log does to the host's leaves."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u64

cdef void slot_protect(sc_mmu *mmu, int slot) noexcept nogil
cdef void log_cleared(sc_mmu *mmu, int slot, u64 first, u64 n) noexcept nogil
cdef void log_stopped(sc_mmu *mmu, int slot) noexcept nogil
