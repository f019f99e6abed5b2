"""Policy `sieve` (Zhang and others, NSDI 2024): in the order of creation, which use does not change; a hand takes the
first page, from the old end on, that was not used since it came by."""
from shadowcore.engine.policies.common cimport marked_made, marked_used
from shadowcore.engine.policies.queues cimport is_loose, queue_remove, sc_queues
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    if q.hand == page:
        q.hand = q.member[page].prev[0]
    queue_remove(q, page, 0)


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 left = 2 * q.size[0]
    cdef u32 page = q.tail[0] if q.hand == SC_NONE else q.hand
    while left:
        left -= 1
        if not q.member[page].uses and is_loose(q, page):
            q.hand = page           # it goes on towards the young end when the page goes
            return page
        q.member[page].uses = 0
        page = q.member[page].prev[0]
        if page == SC_NONE:
            page = q.tail[0]
    return SC_NONE


cdef void sieve_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = marked_made
    mmu.policy.used = marked_used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
