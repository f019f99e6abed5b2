"""Policy `lru`: the page that was not used for longest."""
from shadowcore.engine.policies.common cimport queued_gone, queued_made, queued_victim
from shadowcore.engine.policies.queues cimport queue_renew
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_renew(mmu.policy.queues, page, 0)


cdef void lru_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = queued_made
    mmu.policy.used = _used
    mmu.policy.gone = queued_gone
    mmu.policy.victim = queued_victim
