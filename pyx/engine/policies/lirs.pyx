"""Policy `lirs` (Jiang and Zhang, SIGMETRICS 2002): pages that come again soon are *hot*, all but a hundredth of the
pool. A stack has hot pages, and what was met since the oldest of them, recycled pages included; a queue has the
others that are there. Who is met while in the stack becomes hot, and the hot page at the bottom is hot no more."""
from shadowcore.engine.policies.queues cimport (
    ghost_find, ghost_forget, ghost_make, in_queue, is_loose, queue_oldest, queue_push, queue_remove, queue_renew,
    sc_queues,
)
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32

cdef enum:
    STACK = 0                       # by the first links
    QUEUE = 1                       # by the second: pages that are not hot
    GHOSTS = 2                      # by the second: recycled pages in STACK, by when they were recycled


cdef inline u32 _cold_room(const sc_queues *q) noexcept nogil:
    return max(q.n_pages // 100, 1)


cdef inline u32 _hot(const sc_queues *q) noexcept nogil:
    """Hot pages: those in no queue by their second links."""
    return q.size[STACK] - q.size[GHOSTS] - q.full


cdef void _prune(sc_queues *q) noexcept nogil:
    """The bottom of the stack is a hot page."""
    cdef u32 at = q.tail[STACK]
    while at != SC_NONE and at != q.head[STACK] and not q.member[at].hot:
        if at >= q.n_pages:
            ghost_forget(q, at)
        else:
            queue_remove(q, at, 0)
            q.full -= 1
        at = q.tail[STACK]


cdef void _cool(sc_queues *q) noexcept nogil:
    """The hot page at the bottom is hot no more."""
    cdef u32 at = q.tail[STACK]
    while at != SC_NONE and not q.member[at].hot:
        at = q.member[at].prev[0]
    if at == SC_NONE:
        return
    q.member[at].hot = 0
    queue_remove(q, at, 0)
    queue_push(q, QUEUE, at, 1)
    _prune(q)


cdef inline bint _hot_are_full(const sc_queues *q) noexcept nogil:
    return _hot(q) + 1 > q.n_pages - _cold_room(q)


cdef inline void _limit(sc_queues *q) noexcept nogil:
    """The stack has room for twice the pool; who was recycled first is forgotten first."""
    while q.size[STACK] > 2 * q.n_pages and q.size[GHOSTS]:
        ghost_forget(q, q.tail[GHOSTS])


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 ghost = ghost_find(q, q.pages[page].gfn, q.pages[page].role)
    q.member[page].hot = 0
    if ghost != SC_NONE:
        ghost_forget(q, ghost)
        while _hot_are_full(q) and _hot(q):
            _cool(q)
    if ghost != SC_NONE or not _hot_are_full(q):
        q.member[page].hot = 1
        queue_push(q, STACK, page, 0)
        _prune(q)
    else:
        queue_push(q, STACK, page, 0)
        queue_push(q, QUEUE, page, 1)
        q.full += 1
    _limit(q)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    if q.member[page].hot:
        queue_renew(q, page, 0)
        _prune(q)
    elif in_queue(q, page, 0):
        queue_renew(q, page, 0)
        queue_remove(q, page, 1)
        q.full -= 1
        while _hot(q) > q.n_pages - _cold_room(q):
            _cool(q)
        q.member[page].hot = 1
        _prune(q)
    else:
        queue_push(q, STACK, page, 0)
        q.full += 1
        queue_renew(q, page, 1)
        _limit(q)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    """A page that is recycled leaves a ghost in its place of the stack."""
    cdef sc_queues *q = mmu.policy.queues
    cdef bint remembered = q.named == page and not q.member[page].hot and in_queue(q, page, 0)
    cdef u32 above, ghost
    if in_queue(q, page, 1):
        queue_remove(q, page, 1)
        if in_queue(q, page, 0):
            q.full -= 1
    if in_queue(q, page, 0):
        above = q.member[page].prev[0]
        queue_remove(q, page, 0)
        if remembered:
            ghost = ghost_make(q, q.pages[page].gfn, q.pages[page].role)
            if ghost == SC_NONE and q.size[GHOSTS]:
                if q.tail[GHOSTS] == above:
                    above = q.member[above].prev[0]
                ghost_forget(q, q.tail[GHOSTS])
                ghost = ghost_make(q, q.pages[page].gfn, q.pages[page].role)
            if ghost != SC_NONE:
                _below(q, above, ghost)
                queue_push(q, GHOSTS, ghost, 1)
    q.member[page].hot = 0
    _prune(q)


cdef void _below(sc_queues *q, u32 above, u32 ghost) noexcept nogil:
    """The ghost enters the stack below `above` (SC_NONE: on top)."""
    cdef u32 under
    if above == SC_NONE:
        queue_push(q, STACK, ghost, 0)
        return
    under = q.member[above].next[0]
    q.member[ghost].queue[0] = STACK
    q.member[ghost].prev[0] = above
    q.member[ghost].next[0] = under
    q.member[above].next[0] = ghost
    if under != SC_NONE:
        q.member[under].prev[0] = ghost
    else:
        q.tail[STACK] = ghost
    q.size[STACK] += 1


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    """The oldest page that is not hot; else the hot one that was met longest ago."""
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 at = queue_oldest(q, QUEUE, 1)
    if at != SC_NONE:
        return at
    at = q.tail[STACK]
    while at != SC_NONE and (at >= q.n_pages or not is_loose(q, at)):
        at = q.member[at].prev[0]
    return at


cdef void lirs_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
