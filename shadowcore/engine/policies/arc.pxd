"""Policy `arc`: two queues whose sizes follow what comes back."""
from shadowcore.engine.state cimport sc_mmu

cdef void arc_policy(sc_mmu *mmu) noexcept nogil
