"""Not a policy to run with: `lru`, which writes down what it is told. What the guest does, and so what its pages are
used for, does not depend on the policy: what one run writes down is the future of the next."""
from libc.stdlib cimport free, realloc

from shadowcore.engine.policies.queues cimport (
    queue_oldest, queue_push, queue_remove, queue_renew, queues_key,
)
from shadowcore.engine.policies.recorder cimport sc_references
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64


cdef bint _write(sc_references *r, u64 **array, u64 n, u64 value) noexcept nogil:
    """Append to an array of n numbers, which has room for as many as the next power of two. False: there is no memory,
    and the record is given up."""
    cdef void *more
    if n & (n - 1) == 0:
        more = realloc(array[0], max(2 * n, 1) * sizeof(u64))
        if more == NULL:
            r.failed = True
            return False
        array[0] = <u64 *>more
    array[0][n] = value
    return True


cdef void _made(sc_mmu *mmu, u32 page) noexcept nogil:
    queue_push(mmu.policy.queues, 0, page, 0)


cdef void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_references *r = <sc_references *>mmu.policy.own
    queue_renew(mmu.policy.queues, page, 0)
    if not r.failed:
        r.n += _write(r, &r.use, r.n, queues_key(mmu.pages[page].gfn, mmu.pages[page].role))


cdef void _gone(sc_mmu *mmu, u32 page) noexcept nogil:
    cdef sc_references *r = <sc_references *>mmu.policy.own
    queue_remove(mmu.policy.queues, page, 0)
    if mmu.policy.queues.named == page or r.failed:
        return
    if _write(r, &r.death_at, r.deaths, r.n):
        r.deaths += _write(r, &r.death, r.deaths, queues_key(mmu.pages[page].gfn, mmu.pages[page].role))


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    return queue_oldest(mmu.policy.queues, 0, 0)


cdef void recorder_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy. sc_policy.own is where it writes."""
    mmu.policy.made = _made
    mmu.policy.used = _used
    mmu.policy.gone = _gone
    mmu.policy.victim = _victim
    mmu.policy.new_too = True


cdef void references_free(sc_references *r) noexcept nogil:
    free(r.use)
    free(r.death)
    free(r.death_at)
