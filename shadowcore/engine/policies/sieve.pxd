"""Policy `sieve`: one queue, a hand, a bit a page."""
from shadowcore.engine.state cimport sc_mmu

cdef void sieve_policy(sc_mmu *mmu) noexcept nogil
