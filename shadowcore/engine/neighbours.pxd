from shadowcore.engine.state cimport sc_mmu

cdef void neighbours_follow(sc_mmu *mmu) noexcept nogil
