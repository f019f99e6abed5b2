"""Design `agile`."""
from shadowcore.engine.state cimport sc_mmu

cdef void agile_design(sc_mmu *mmu) noexcept nogil
