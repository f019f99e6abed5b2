"""Policy `random`: any page."""
from shadowcore.engine.state cimport sc_mmu

cdef void random_policy(sc_mmu *mmu) noexcept nogil
