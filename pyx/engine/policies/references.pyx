"""A policy by itself: a string of references, a pool, and how often what is asked for is not there."""
import numpy as np

from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.pool cimport pool_find, pool_recycle, pool_take
from shadowcore.engine.role cimport ROLE_DIRECT, ROLE_LEVEL
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport SC_NONE, u32, u64

from shadowcore.config import Shadow, check_int
from shadowcore.engine.future import Future
from shadowcore.engine.memory import Memory
from shadowcore.errors import ConfigError

cdef enum:
    ROLE = 1 << ROLE_DIRECT | 1 << ROLE_LEVEL       # of no guest table: nothing is to be protected


cdef u64 _run(sc_mmu *mmu, const u64 *keys, u64 n) noexcept nogil:
    cdef u64 misses = 0
    cdef u64 i
    cdef u32 page
    for i in range(n):
        page = pool_find(mmu, keys[i], ROLE)
        if page == SC_NONE:
            misses += 1
            if mmu.n_free == 0:
                if mmu.policy.missed != NULL:
                    mmu.policy.missed(mmu, keys[i], ROLE)
                pool_recycle(mmu, 1)
            page = pool_take(mmu, keys[i], ROLE)
            if mmu.policy.new_too:
                mmu.policy.used(mmu, page)
        elif mmu.policy.used != NULL:
            mmu.policy.used(mmu, page)
    return misses


def misses(policy, pages, references, seed=0) -> int:
    """How many of the references, numbers below 2**52, find their page missing in a pool of so many `pages` that
    begins empty, under `policy`. When the pool is full one page is recycled for each that is made: so do papers count,
    and other simulators. `optimal` knows what is to come. seed: of what is random in the policy. ConfigError.

    A pool of shadow pages is not used so: pages are recycled in batches, roots stay, the guest zaps pages, and most
    uses nobody sees.
    """
    cdef u64 n
    cdef const u64[::1] keys
    cdef u64 found = 0
    array = np.ascontiguousarray(references)
    if array.ndim != 1 or array.dtype.kind not in "ui" or (
            len(array) and not 0 <= int(array.min()) <= int(array.max()) < 1 << 52):
        raise ConfigError("references: an array of numbers within 0 to 2**52 - 1 is needed")
    array = array.astype(np.uint64)
    check_int("pages", pages, 4, (1 << 22) - 1)
    design = Shadow.cached(policy=policy, pool_pages=pages, policy_seed=seed, min_free=0, refill=0)
    future = None
    if design.policy == "optimal":
        future = Future(array * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(ROLE * 0xC2B2AE3D27D4EB4F & (1 << 64) - 1))
    cdef Mmu mmu = Mmu(Memory(1 << 16, None, None, "warm"), design, future)
    keys = array
    n = len(array)
    if n:
        with nogil:
            found = _run(mmu.c, &keys[0], n)
    if mmu.books.strayed:
        raise AssertionError("the future came otherwise")
    return found


cdef void _distances(const u64 *ids, u64 n, u64 *last, u64 *tree, u64 *hits) noexcept nogil:
    """hits[d]: references with d other keys, less one, since the last one of their own. tree: of positions from 1 on,
    which are the last so far of their key (Fenwick, 1994). last: by key, 0 for none."""
    cdef u64 kinds = 0
    cdef u64 position, at, above
    for position in range(1, n + 1):
        at = last[ids[position - 1]]
        if at:
            above = kinds
            while at:
                above -= tree[at]
                at &= at - 1
            hits[above + 1] += 1
            at = last[ids[position - 1]]
            while at <= n:
                tree[at] -= 1
                at += at & (~at + 1)
        else:
            kinds += 1
        at = position
        while at <= n:
            tree[at] += 1
            at += at & (~at + 1)
        last[ids[position - 1]] = position


def stack_distances(references):
    """Misses of `lru` in pools of 0, 1, 2, ... pages (uint64, up to as many as there are different references), from
    one pass over a string of references (Mattson and others, 1970): one misses wherever the pool has no more pages than
    were referred to since the last time, itself included."""
    _, ids = np.unique(np.ascontiguousarray(references), return_inverse=True)
    cdef u64 n = len(ids)
    kinds = int(ids.max()) + 1 if n else 0
    cdef const u64[::1] view = np.ascontiguousarray(ids, dtype=np.uint64)
    found = np.zeros(kinds + 2, dtype=np.uint64)
    cdef u64[::1] hits = found
    cdef u64[::1] last = np.zeros(kinds + 1, dtype=np.uint64)
    cdef u64[::1] tree = np.zeros(n + 1, dtype=np.uint64)
    if n:
        with nogil:
            _distances(&view[0], n, &last[0], &tree[0], &hits[0])
    return (np.uint64(n) - np.cumsum(found))[:kinds + 1]
