"""Policy `cost`: the page goes that is cheapest to make again, and was not used for long."""
from shadowcore.engine.state cimport sc_mmu

cdef void cost_policy(sc_mmu *mmu) noexcept nogil
