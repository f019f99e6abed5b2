"""What several policies do alike: hooks of sc_policy."""
from shadowcore.engine.policies.queues cimport order_least, queue_oldest, queue_push, queue_remove
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32


cdef void queued_made(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_push(mmu.policy.queues, 0, page, 0)


cdef void queued_gone(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_remove(mmu.policy.queues, page, 0)


cdef u32 queued_victim(sc_mmu *mmu) noexcept nogil:
    return queue_oldest(mmu.policy.queues, 0, 0)


cdef void marked_made(sc_mmu *mmu, u32 page) noexcept nogil:
    mmu.policy.queues.member[page].uses = 0
    queue_push(mmu.policy.queues, 0, page, 0)


cdef void marked_used(sc_mmu *mmu, u32 page) noexcept nogil:
    mmu.policy.queues.member[page].uses = 1


cdef u32 ordered_victim(sc_mmu *mmu) noexcept nogil:
    return order_least(mmu.policy.queues)
