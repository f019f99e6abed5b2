"""Policy `optimal`: the page that is not needed for longest, by what is known of the future."""
from shadowcore.engine.state cimport sc_mmu

cdef void optimal_policy(sc_mmu *mmu) noexcept nogil
