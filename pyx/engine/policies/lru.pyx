"""Policy `lru`: the page that was not used for longest."""
from shadowcore.engine.policies.queues cimport queue_oldest, queue_push, queue_remove, queue_renew
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_push(mmu.policy.queues, 0, page, 0)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_renew(mmu.policy.queues, page, 0)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_remove(mmu.policy.queues, page, 0)


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    return queue_oldest(mmu.policy.queues, 0, 0)


cdef void lru_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
