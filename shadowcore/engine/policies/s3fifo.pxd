"""Policy `s3-fifo`: three queues in the order of creation."""
from shadowcore.engine.state cimport sc_mmu

cdef void s3fifo_policy(sc_mmu *mmu) noexcept nogil
