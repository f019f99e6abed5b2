"""Uses of shadow pages, told to the policy that follows them."""
from shadowcore.engine.state cimport sc_mmu

cdef void uses_follow(sc_mmu *mmu) noexcept nogil
