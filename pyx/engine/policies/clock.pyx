"""Policy `clock`: in the order of creation, but a page that was used since the hand came by has another round."""
from shadowcore.engine.policies.common cimport marked_made, marked_used, queued_gone
from shadowcore.engine.policies.queues cimport is_loose, queue_renew, sc_queues
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 left = 2 * q.size[0]
    cdef u32 page
    while left:
        left -= 1
        page = q.tail[0]
        if not q.member[page].uses and is_loose(q, page):
            return page
        q.member[page].uses = 0
        queue_renew(q, page, 0)
    return SC_NONE


cdef void clock_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = marked_made
    mmu.policy.used = marked_used
    mmu.policy.gone = queued_gone
    mmu.policy.victim = _victim
