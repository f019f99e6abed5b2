"""Policy `random`: any page. The sequence is that of its seed."""
from shadowcore.engine.policies.queues cimport is_loose, queues_random, sc_queues
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    q.member[page].slot = q.ordered
    q.order[q.ordered] = page
    q.ordered += 1


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    pass


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 slot = q.member[page].slot
    q.ordered -= 1
    q.order[slot] = q.order[q.ordered]
    q.member[q.order[slot]].slot = slot
    q.member[page].slot = SC_NONE


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    """From a random place on, the first page that is no root in use."""
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 slot
    if q.ordered == 0:
        return SC_NONE
    slot = queues_random(q, q.ordered)
    for _ in range(q.ordered):
        if is_loose(q, q.order[slot]):
            return q.order[slot]
        slot = slot + 1 if slot + 1 < q.ordered else 0
    return SC_NONE


cdef void random_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
