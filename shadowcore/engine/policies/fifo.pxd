"""Policy `fifo`: the page that was made first is recycled first."""
from shadowcore.engine.state cimport sc_mmu

cdef void fifo_policy(sc_mmu *mmu) noexcept nogil
