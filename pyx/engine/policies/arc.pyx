"""Policy `arc` (Megiddo and Modha, FAST 2003): pages used once and pages used again stand in a queue each, by last
use; who is recycled is remembered, and which of them come back moves the boundary between the two."""
from shadowcore.engine.policies.queues cimport (
    ghost_find, ghost_forget, ghost_make, queue_oldest, queue_push, queue_remove, sc_queues,
)
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64

cdef enum:
    ONCE = 0                        # T1
    AGAIN = 1                       # T2
    ONCE_GHOSTS = 2                 # B1
    AGAIN_GHOSTS = 3                # B2


cdef inline double *_target(sc_queues *q) noexcept nogil:
    """Pages that ONCE is to have: not a whole number."""
    return <double *>&q.floor


cdef void _missed(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil:
    """A page that is not there is asked for: if it is remembered, the boundary moves."""
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 ghost = ghost_find(q, gfn, role)
    cdef double *target = _target(q)
    q.missed = 0
    if ghost == SC_NONE:
        return
    q.missed = q.member[ghost].queue[0] + 1
    if q.missed == ONCE_GHOSTS + 1:
        target[0] = min(target[0] + max(<double>q.size[AGAIN_GHOSTS] / q.size[ONCE_GHOSTS], 1), q.n_pages)
    else:
        target[0] = max(target[0] - max(<double>q.size[ONCE_GHOSTS] / q.size[AGAIN_GHOSTS], 1), 0)


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 ghost = ghost_find(q, q.pages[page].gfn, q.pages[page].role)
    if q.missed == 0:               # room was made before anybody knew for what
        _missed(mmu, q.pages[page].gfn, q.pages[page].role)
    q.missed = 0
    if ghost != SC_NONE:
        ghost_forget(q, ghost)
    queue_push(q, ONCE if ghost == SC_NONE else AGAIN, page, 0)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_remove(mmu.policy.queues, page, 0)
    queue_push(mmu.policy.queues, AGAIN, page, 0)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef int queue = q.member[page].queue[0]
    cdef u32 ghost
    # One that leaves the queue of all who were used once, when nothing else is in either half of it, is forgotten.
    cdef bint remembered = q.named == page and (q.missed or queue != ONCE or q.size[ONCE] < q.n_pages)
    queue_remove(q, page, 0)
    if not remembered:
        return
    ghost = ghost_make(q, q.pages[page].gfn, q.pages[page].role)
    while ghost == SC_NONE:
        ghost_forget(q, q.tail[AGAIN_GHOSTS] if q.size[AGAIN_GHOSTS] else q.tail[ONCE_GHOSTS])
        ghost = ghost_make(q, q.pages[page].gfn, q.pages[page].role)
    queue_push(q, ONCE_GHOSTS if queue == ONCE else AGAIN_GHOSTS, ghost, 0)


cdef void _forget(sc_queues *q) noexcept nogil:
    """As many are remembered as the paper's case IV leaves: once, and once remembered, as the pool has pages; all,
    twice as many."""
    cdef u32 once = q.size[ONCE] + q.size[ONCE_GHOSTS]
    if once >= q.n_pages:
        while once >= q.n_pages and q.size[ONCE_GHOSTS]:
            ghost_forget(q, q.tail[ONCE_GHOSTS])
            once -= 1
        return
    while once + q.size[AGAIN] + q.size[AGAIN_GHOSTS] >= 2 * q.n_pages and q.size[AGAIN_GHOSTS]:
        ghost_forget(q, q.tail[AGAIN_GHOSTS])


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef int first = AGAIN
    cdef u32 page
    if q.missed == 0:
        _forget(q)
    if q.size[ONCE] and (q.size[ONCE] > _target(q)[0]
                         or (q.size[ONCE] == _target(q)[0] and q.missed == AGAIN_GHOSTS + 1)):
        first = ONCE
    page = queue_oldest(q, first, 0)
    return page if page != SC_NONE else queue_oldest(q, ONCE + AGAIN - first, 0)


cdef void arc_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.missed = _missed
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
