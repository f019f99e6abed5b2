"""Design `adaptive`."""
from shadowcore.engine.state cimport sc_mmu

cdef void adaptive_design(sc_mmu *mmu) noexcept nogil
