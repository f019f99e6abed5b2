"""Policy `cost`, of this engine: by what it costs to make the page again, and when it was used last.

A GreedyDual (Young, 1994): a page is worth what the last victim was worth when the page was used, and beyond that what
it costs. That is an exit for each entry, for each is found missing at a fault, one for the link to the page; and for a
page above the leaves nothing for what is below, which stays in the pool and is found again."""
from shadowcore.engine.policies.common cimport ordered_victim
from shadowcore.engine.policies.queues cimport order_add, order_change, order_remove, sc_queues
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64


cdef inline u64 _worth(const sc_queues *q, u32 page) noexcept nogil:
    return q.floor + 1 + q.pages[page].present


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    order_add(mmu.policy.queues, page, _worth(mmu.policy.queues, page))


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    order_change(mmu.policy.queues, page, _worth(mmu.policy.queues, page))


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    if q.named == page:
        q.floor = q.member[page].rank
    order_remove(q, page)


cdef void cost_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = ordered_victim
