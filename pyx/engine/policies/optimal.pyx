"""Policy `optimal` (Belady, 1966): the page whose next use is furthest in the future, as an earlier run of the same
operations has shown it. A page that the guest itself has zapped before its next use is not used any more."""
from shadowcore.engine.policies.common cimport ordered_victim
from shadowcore.engine.policies.queues cimport order_add, order_change, order_remove, queues_key, sc_queues
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64


cdef u64 _next(const sc_queues *q, u64 key) noexcept nogil:
    """The number of the next use of a page, or all ones."""
    cdef u64 low = 0
    cdef u64 high = q.n_future
    cdef u64 middle, use
    while low < high:
        middle = (low + high) // 2
        use = q.by_key[middle]
        if q.futures[use] < key or (q.futures[use] == key and use < q.floor):
            low = middle + 1
        else:
            high = middle
    return q.by_key[low] if low < q.n_future and q.futures[q.by_key[low]] == key else ~<u64>0


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    """Whoever asked for it need not have used it: a fault can end otherwise."""
    cdef sc_queues *q = mmu.policy.queues
    order_add(q, page, ~_next(q, queues_key(q.pages[page].gfn, q.pages[page].role)))


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    """The order has what is used last first."""
    cdef sc_queues *q = mmu.policy.queues
    cdef u64 now = q.floor
    cdef u64 next_ = ~<u64>0
    q.floor = now + 1
    if now < q.n_future:
        q.strayed += q.futures[now] != queues_key(q.pages[page].gfn, q.pages[page].role)
        next_ = q.future[now]
    order_change(q, page, ~next_)


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    order_remove(mmu.policy.queues, page)


cdef void optimal_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = ordered_victim
    mmu.policy.new_too = True
