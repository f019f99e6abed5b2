"""Policy `lirs`: by how soon pages come again."""
from shadowcore.engine.state cimport sc_mmu

cdef void lirs_policy(sc_mmu *mmu) noexcept nogil
