"""Design `nested`."""
from shadowcore.engine.state cimport sc_mmu

cdef void nested_design(sc_mmu *mmu) noexcept nogil
