"""Design `unsync`."""
from shadowcore.engine.state cimport sc_mmu

cdef void unsync_design(sc_mmu *mmu) noexcept nogil
