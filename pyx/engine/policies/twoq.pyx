"""Policy `2q` (Johnson and Shasha, VLDB 1994, the full version): new pages stand in a queue of a quarter of the pool,
by creation. Who is recycled there is remembered, up to half as many as the pool has; who comes back from there was
used twice, and stands in the other queue, by last use."""
from shadowcore.engine.policies.queues cimport (
    ghost_find, ghost_forget, ghost_make, queue_oldest, queue_push, queue_remove, queue_renew, sc_queues,
)
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32

cdef enum:
    NEW = 0                         # in the order of creation
    KEPT = 1                        # in the order of use
    GHOSTS = 2                      # of NEW


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 ghost = ghost_find(q, q.pages[page].gfn, q.pages[page].role)
    if ghost != SC_NONE:
        ghost_forget(q, ghost)
    queue_push(q, NEW if ghost == SC_NONE else KEPT, page, 0)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    if mmu.policy.queues.member[page].queue[0] == KEPT:
        queue_renew(mmu.policy.queues, page, 0)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef bint remembered = q.named == page and q.member[page].queue[0] == NEW and q.n_pages >= 2
    cdef u32 ghost
    queue_remove(q, page, 0)
    if not remembered:
        return
    while q.size[GHOSTS] >= q.n_pages // 2:
        ghost_forget(q, q.tail[GHOSTS])
    ghost = ghost_make(q, q.pages[page].gfn, q.pages[page].role)
    queue_push(q, GHOSTS, ghost, 0)


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef int first = NEW if q.size[NEW] > q.n_pages // 4 or q.size[KEPT] == 0 else KEPT
    cdef u32 page = queue_oldest(q, first, 0)
    return page if page != SC_NONE else queue_oldest(q, NEW + KEPT - first, 0)


cdef void twoq_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
