"""Policy `2q`: pages that came back are kept apart from new ones."""
from shadowcore.engine.state cimport sc_mmu

cdef void twoq_policy(sc_mmu *mmu) noexcept nogil
