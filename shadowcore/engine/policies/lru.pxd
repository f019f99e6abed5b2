"""Policy `lru`: the page that was used least recently is recycled first."""
from shadowcore.engine.state cimport sc_mmu

cdef void lru_policy(sc_mmu *mmu) noexcept nogil
