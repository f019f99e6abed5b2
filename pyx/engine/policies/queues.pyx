"""Queues, ghosts and the order that policies keep of shadow pages."""
from shadowcore.engine.policies.queues cimport (
    SC_NO_QUEUE, SC_QUEUES, is_loose, queue_remove, sc_member, sc_queues,
)
from shadowcore.engine.types cimport SC_NONE, u32, u64


cdef void queues_init(sc_queues *q) noexcept nogil:
    """Nothing is in it. n_pages, n_ghosts, shift and the arrays are set."""
    cdef u32 i
    for i in range(SC_QUEUES):
        q.head[i] = q.tail[i] = SC_NONE
        q.size[i] = 0
    for i in range(q.n_pages + q.n_ghosts):
        q.member[i].queue[0] = q.member[i].queue[1] = SC_NO_QUEUE
        q.member[i].slot = SC_NONE
        q.member[i].chain = SC_NONE
    for i in range(<u32>1 << (64 - q.shift)):
        q.bucket[i] = SC_NONE
    q.ghosts = SC_NONE
    for i in range(q.n_ghosts):
        q.member[q.n_pages + q.n_ghosts - 1 - i].chain = q.ghosts
        q.ghosts = q.n_pages + q.n_ghosts - 1 - i
    q.named = q.hand = SC_NONE


cdef u32 queue_oldest(const sc_queues *q, int number, int by) noexcept nogil:
    """The oldest page of the queue that is no root in use, or SC_NONE."""
    cdef u32 member = q.tail[number]
    while member != SC_NONE and not is_loose(q, member):
        member = q.member[member].prev[by]
    return member


cdef inline u32 _bucket(const sc_queues *q, u64 gfn) noexcept nogil:
    return <u32>((gfn * <u64>0x9E3779B97F4A7C15ULL) >> q.shift)


cdef u32 ghost_find(const sc_queues *q, u64 gfn, u32 role) noexcept nogil:
    """The ghost of (gfn, role), or SC_NONE."""
    cdef u32 ghost = q.bucket[_bucket(q, gfn)]
    while ghost != SC_NONE and (q.member[ghost].gfn != gfn or q.member[ghost].role != role):
        ghost = q.member[ghost].chain
    return ghost


cdef u32 ghost_make(sc_queues *q, u64 gfn, u32 role) noexcept nogil:
    """A ghost of (gfn, role), in no queue yet; SC_NONE if there is no room."""
    cdef u32 ghost = q.ghosts
    cdef u32 *bucket = &q.bucket[_bucket(q, gfn)]
    if ghost == SC_NONE:
        return SC_NONE
    q.ghosts = q.member[ghost].chain
    q.member[ghost].gfn = gfn
    q.member[ghost].role = role
    q.member[ghost].hot = q.member[ghost].uses = 0
    q.member[ghost].chain = bucket[0]
    bucket[0] = ghost
    return ghost


cdef void ghost_forget(sc_queues *q, u32 ghost) noexcept nogil:
    """It leaves its queues and its bucket."""
    cdef u32 *link = &q.bucket[_bucket(q, q.member[ghost].gfn)]
    cdef int by
    for by in range(2):
        if q.member[ghost].queue[by] != SC_NO_QUEUE:
            queue_remove(q, ghost, by)
    while link[0] != ghost:
        link = &q.member[link[0]].chain
    link[0] = q.member[ghost].chain
    q.member[ghost].chain = q.ghosts
    q.ghosts = ghost


cdef inline void _put(sc_queues *q, u32 slot, u32 page) noexcept nogil:
    q.order[slot] = page
    q.member[page].slot = slot


cdef void _settle(sc_queues *q, u32 slot) noexcept nogil:
    """Bring the page at `slot`, whose rank is new, to its place in the heap."""
    cdef u32 page = q.order[slot]
    cdef u64 rank = q.member[page].rank
    cdef u32 other
    while slot and q.member[q.order[(slot - 1) // 2]].rank > rank:
        _put(q, slot, q.order[(slot - 1) // 2])
        slot = (slot - 1) // 2
    while True:
        other = 2 * slot + 1
        if other >= q.ordered:
            break
        if other + 1 < q.ordered and q.member[q.order[other + 1]].rank < q.member[q.order[other]].rank:
            other += 1
        if q.member[q.order[other]].rank >= rank:
            break
        _put(q, slot, q.order[other])
        slot = other
    _put(q, slot, page)


cdef void order_add(sc_queues *q, u32 page, u64 rank) noexcept nogil:
    q.member[page].rank = rank
    _put(q, q.ordered, page)
    q.ordered += 1
    _settle(q, q.ordered - 1)


cdef void order_remove(sc_queues *q, u32 page) noexcept nogil:
    cdef u32 slot = q.member[page].slot
    q.member[page].slot = SC_NONE
    q.ordered -= 1
    if slot != q.ordered:
        _put(q, slot, q.order[q.ordered])
        _settle(q, slot)


cdef void order_change(sc_queues *q, u32 page, u64 rank) noexcept nogil:
    q.member[page].rank = rank
    _settle(q, q.member[page].slot)


cdef u32 order_least(sc_queues *q) noexcept nogil:
    """The page of least rank that is no root in use, or SC_NONE. The heap is searched from its top on, and no branch
    that cannot have a lesser one."""
    cdef u32 best = SC_NONE
    cdef u32 slot = 0
    cdef u32 page
    # A walk of the heap in preorder, without a stack: up from where a branch ends.
    while slot < q.ordered:
        page = q.order[slot]
        if best == SC_NONE or q.member[page].rank < q.member[best].rank:
            if is_loose(q, page):
                best = page
            elif 2 * slot + 1 < q.ordered:
                slot = 2 * slot + 1
                continue
        while slot and (slot & 1 == 0 or slot + 1 >= q.ordered):
            slot = (slot - 1) // 2
        if slot == 0:
            break
        slot += 1
    return best


cdef u32 queues_random(sc_queues *q, u32 n) noexcept nogil:
    """A number below n, by a generator of Marsaglia's (xorshift64*, 2003)."""
    q.random ^= q.random >> 12
    q.random ^= q.random << 25
    q.random ^= q.random >> 27
    return <u32>(((q.random * <u64>0x2545F4914F6CDD1DULL) >> 32) * n >> 32)


cdef bint _queue_sound(const sc_queues *q, int number, int by) noexcept nogil:
    cdef u32 n = q.n_pages + q.n_ghosts
    cdef u32 previous = SC_NONE
    cdef u32 at = q.head[number]
    cdef u32 count = 0
    while at != SC_NONE:
        if at >= n or count >= n or q.member[at].prev[by] != previous or q.member[at].queue[by] != number:
            return False
        count += 1
        previous = at
        at = q.member[at].next[by]
    return previous == q.tail[number] and count == q.size[number]


cdef bint queues_sound(const sc_queues *q) noexcept nogil:
    """Every list of it ends, and says of each member what that says of itself. A queue is linked by those links by
    which its first member is in it."""
    cdef u32 n = q.n_pages + q.n_ghosts
    cdef u32 i, at
    cdef u32 members = 0
    cdef u32 sizes = 0
    cdef u32 ghosts = 0
    cdef u32 ordered = 0
    cdef int number, by
    cdef const sc_member *m
    for number in range(SC_QUEUES):
        if q.head[number] == SC_NONE:
            if q.tail[number] != SC_NONE or q.size[number]:
                return False
            continue
        if q.head[number] >= n:
            return False
        by = 0 if q.member[q.head[number]].queue[0] == number else 1
        if not _queue_sound(q, number, by):
            return False
        sizes += q.size[number]
    for i in range(n):
        m = &q.member[i]
        for by in range(2):
            if m.queue[by] != SC_NO_QUEUE:
                if m.queue[by] >= SC_QUEUES:
                    return False
                members += 1
        if i >= q.n_pages:
            continue
        if m.slot != SC_NONE:
            if m.slot >= q.ordered or q.ordered > q.n_pages or q.order[m.slot] != i:
                return False
            ordered += 1
        if m.queue[0] == SC_NO_QUEUE and m.queue[1] == SC_NO_QUEUE and m.slot == SC_NONE and q.pages[i].active:
            return False            # a page of which the policy does not know
        if not q.pages[i].active and (m.queue[0] != SC_NO_QUEUE or m.queue[1] != SC_NO_QUEUE or m.slot != SC_NONE):
            return False            # a page that is in use no more
    if members != sizes or ordered != q.ordered:
        return False
    for i in range(<u32>1 << (64 - q.shift)):
        at = q.bucket[i]
        while at != SC_NONE:
            if at < q.n_pages or at >= n or ghosts >= q.n_ghosts or _bucket(q, q.member[at].gfn) != i:
                return False
            if q.member[at].queue[0] == SC_NO_QUEUE and q.member[at].queue[1] == SC_NO_QUEUE:
                return False
            ghosts += 1
            at = q.member[at].chain
    at = q.ghosts
    while at != SC_NONE:
        if at < q.n_pages or at >= n or ghosts >= q.n_ghosts:
            return False
        if q.member[at].queue[0] != SC_NO_QUEUE or q.member[at].queue[1] != SC_NO_QUEUE:
            return False
        ghosts += 1
        at = q.member[at].chain
    if (q.named != SC_NONE and q.named >= q.n_pages) or (q.hand != SC_NONE and q.hand >= q.n_pages):
        return False
    return (ghosts == q.n_ghosts and (q.hand == SC_NONE or q.member[q.hand].queue[0] != SC_NO_QUEUE)
            and q.missed <= SC_QUEUES and q.random != 0)
