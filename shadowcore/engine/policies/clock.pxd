"""Policy `clock`: the oldest page that was not used since it was looked at last."""
from shadowcore.engine.state cimport sc_mmu

cdef void clock_policy(sc_mmu *mmu) noexcept nogil
