"""What policies keep of shadow pages: queues, ghosts, an order. A policy uses what it needs of it.

A *member* stands for a page of the pool, by its number; from n_pages on, for a *ghost*: the key of a page that was
recycled, and is remembered. A member can be in two queues at once, one by each pair of links. All of it lies in arrays
beside the headers, by index, and is saved with them.
"""
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.types cimport SC_NONE, u8, u32, u64

cdef enum:
    SC_QUEUES = 4
    SC_NO_QUEUE = 255

cdef struct sc_member:
    u64 gfn                         # ghost: its key, gfn
    u64 rank                        # place in the order, by which the least goes first
    u32 role                        # ghost: its key, role
    u32 chain                       # ghost: next of its bucket, or next free one; or SC_NONE
    u32 prev[2]                     # neighbour towards the head of the queue, or SC_NONE
    u32 next[2]                     # neighbour towards the tail of the queue, or SC_NONE
    u32 slot                        # page: where it stands in sc_queues.order, or SC_NONE
    u32 born                        # page: low half of the clock when it was made
    u8 queue[2]                     # number of the queue, or SC_NO_QUEUE
    u8 uses                         # since it entered its queue, as far as the policy counts
    u8 hot                          # lirs: one of those that are used often
    u32 pad

cdef struct sc_queues:
    u32 n_pages                     # of the pool
    u32 n_ghosts                    # room for ghosts
    u32 head[SC_QUEUES]             # newest member, or SC_NONE
    u32 tail[SC_QUEUES]             # oldest member, or SC_NONE
    u32 size[SC_QUEUES]
    u32 ghosts                      # first free ghost, or SC_NONE
    u32 named                       # the victim that was named last, or SC_NONE
    u32 hand                        # sieve: where the search goes on, or SC_NONE: at the tail
    u32 target                      # unused
    u32 missed                      # arc, s3-fifo: the page made next is a ghost, of queue missed - 1; 0: it is none
    u32 full                        # s3-fifo: pages have been recycled
    u32 ordered                     # pages in the order
    u32 shift                       # bucket = mixed gfn >> shift
    u64 clock                       # events of which the policy was told
    u64 floor                       # cost: what the last victim was worth; optimal: uses so far; arc: a double
    u64 random                      # state of a generator of random numbers, not 0
    u64 path[5]                     # keys of the pages that the processor's last walk came through, as far as told
    # What follows is not saved.
    sc_member *member
    u32 *bucket                     # first ghost of each bucket, or SC_NONE
    u32 *order                      # pages, a heap by rank (random: in any order)
    const sc_page *pages            # headers
    # optimal: the uses that are to come, in their order.
    const u64 *future               # of each use, when its page is used next, or all ones; NULL: none are known
    const u64 *futures              # of each use, what page it is of (queues_key)
    const u64 *by_key               # numbers of the uses, ordered by page, then by number
    u64 n_future
    u64 strayed                     # uses that were of another page than foretold

cdef inline u64 queues_key(u64 gfn, u32 role) noexcept nogil:
    """One number for a key."""
    return (gfn * <u64>0x9E3779B97F4A7C15ULL) ^ (<u64>role * <u64>0xC2B2AE3D27D4EB4FULL)

cdef inline bint is_loose(const sc_queues *q, u32 member) noexcept nogil:
    """A page that is no root in use."""
    return q.pages[member].root_count == 0

cdef inline void queue_push(sc_queues *q, int number, u32 member, int by) noexcept nogil:
    """The member enters queue `number` at its head. by: which of its links."""
    cdef sc_member *m = &q.member[member]
    m.queue[by] = <u8>number
    m.prev[by] = SC_NONE
    m.next[by] = q.head[number]
    if q.head[number] != SC_NONE:
        q.member[q.head[number]].prev[by] = member
    else:
        q.tail[number] = member
    q.head[number] = member
    q.size[number] += 1

cdef inline void queue_remove(sc_queues *q, u32 member, int by) noexcept nogil:
    """It leaves the queue in which it is by these links."""
    cdef sc_member *m = &q.member[member]
    cdef int number = m.queue[by]
    if m.prev[by] != SC_NONE:
        q.member[m.prev[by]].next[by] = m.next[by]
    else:
        q.head[number] = m.next[by]
    if m.next[by] != SC_NONE:
        q.member[m.next[by]].prev[by] = m.prev[by]
    else:
        q.tail[number] = m.prev[by]
    q.size[number] -= 1
    m.queue[by] = SC_NO_QUEUE

cdef inline void queue_renew(sc_queues *q, u32 member, int by) noexcept nogil:
    """To the head of its queue."""
    cdef int number = q.member[member].queue[by]
    if q.head[number] != member:
        queue_remove(q, member, by)
        queue_push(q, number, member, by)

cdef inline bint in_queue(const sc_queues *q, u32 member, int by) noexcept nogil:
    return q.member[member].queue[by] != SC_NO_QUEUE

cdef void queues_init(sc_queues *q) noexcept nogil
cdef u32 queue_oldest(const sc_queues *q, int number, int by) noexcept nogil
cdef u32 ghost_find(const sc_queues *q, u64 gfn, u32 role) noexcept nogil
cdef u32 ghost_make(sc_queues *q, u64 gfn, u32 role) noexcept nogil
cdef void ghost_forget(sc_queues *q, u32 ghost) noexcept nogil
cdef void order_add(sc_queues *q, u32 page, u64 rank) noexcept nogil
cdef void order_remove(sc_queues *q, u32 page) noexcept nogil
cdef void order_change(sc_queues *q, u32 page, u64 rank) noexcept nogil
cdef u32 order_least(sc_queues *q) noexcept nogil
cdef u32 queues_random(sc_queues *q, u32 n) noexcept nogil
cdef bint queues_sound(const sc_queues *q) noexcept nogil
