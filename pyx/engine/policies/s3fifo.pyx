"""Policy `s3-fifo` (Yang and others, SOSP 2023): a tenth of the pool is a queue for new pages. Who was used twice
there moves on to the main queue; the others go, and are remembered: who comes back enters the main queue. That is a
clock of two bits."""
from shadowcore.engine.policies.queues cimport (
    ghost_find, ghost_forget, ghost_make, is_loose, queue_push, queue_remove, queue_renew, sc_queues,
)
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64

cdef enum:
    SMALL = 0
    MAIN = 1
    GHOSTS = 2                      # of SMALL
    MOVES = 2                       # uses from which on a page moves from SMALL to MAIN


cdef inline u32 _small(const sc_queues *q) noexcept nogil:
    return max(q.n_pages // 10, 1)


cdef void _missed(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil:
    """Before room is made, which may have the oldest ghost forgotten."""
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 ghost = ghost_find(q, gfn, role)
    q.missed = ghost != SC_NONE
    if ghost != SC_NONE:
        ghost_forget(q, ghost)


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    """Until the pool was full once, what SMALL has no room for goes to MAIN."""
    cdef sc_queues *q = mmu.policy.queues
    cdef int queue = SMALL if q.full or q.size[SMALL] < _small(q) else MAIN
    if not q.missed:
        _missed(mmu, q.pages[page].gfn, q.pages[page].role)
    if q.missed:
        queue = MAIN
    q.missed = 0
    q.member[page].uses = 0
    queue_push(q, queue, page, 0)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    if mmu.policy.queues.member[page].uses < 3:
        mmu.policy.queues.member[page].uses += 1


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef bint remembered = q.named == page and q.member[page].queue[0] == SMALL
    cdef u32 room = <u32>(<double>q.n_pages * 0.9)
    queue_remove(q, page, 0)
    if not remembered:
        return
    while q.size[GHOSTS] >= room:
        ghost_forget(q, q.tail[GHOSTS])
    queue_push(q, GHOSTS, ghost_make(q, q.pages[page].gfn, q.pages[page].role), 0)


cdef u32 _from_small(sc_queues *q) noexcept nogil:
    """The oldest page of SMALL that does not move on."""
    cdef u32 page
    while q.size[SMALL]:
        page = q.tail[SMALL]
        if q.member[page].uses < MOVES and is_loose(q, page):
            return page
        queue_remove(q, page, 0)
        q.member[page].uses = 0
        queue_push(q, MAIN, page, 0)
    return SC_NONE


cdef u32 _from_main(sc_queues *q) noexcept nogil:
    cdef u32 left = 4 * q.size[MAIN]
    cdef u32 page
    while left:
        left -= 1
        page = q.tail[MAIN]
        if q.member[page].uses == 0 and is_loose(q, page):
            return page
        if q.member[page].uses:
            q.member[page].uses -= 1
        queue_renew(q, page, 0)
    return SC_NONE


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    cdef sc_queues *q = mmu.policy.queues
    cdef u32 page = SC_NONE
    q.full = True
    if q.size[SMALL] and q.size[MAIN] <= q.n_pages - _small(q):
        page = _from_small(q)
    if page == SC_NONE:
        page = _from_main(q)
    return page if page != SC_NONE else _from_small(q)      # MAIN has nothing but roots in use


cdef void s3fifo_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.missed = _missed
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
