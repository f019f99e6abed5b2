"""What the policy is told of as uses of shadow pages.

Who follows uses stands before hooks of the design: faults, and loads of registers. A design whose policy does not
follow any runs without a trace of this; and a hit costs nothing under either. That a page is made is no use of it.
"""
from shadowcore.engine.bits cimport PTE_A, level_index
from shadowcore.engine.fault cimport page_fault_usual
from shadowcore.engine.path cimport MAX_LEVELS, path_find, sc_path
from shadowcore.engine.policies.queues cimport queues_key, sc_queues
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport (
    FAST_EMULATE, USE_ACCESSED, USE_FAULT, USE_LINK, USE_ROOT, USE_WALK, sc_loaded, sc_mmu, sc_vcpu,
)
from shadowcore.engine.types cimport RC_OK, SC_NONE, u32, u64
from shadowcore.engine.walker cimport sc_walk

cdef inline void _used(sc_mmu *mmu, u32 page) noexcept nogil:
    if mmu.pages[page].active and mmu.policy.queues.member[page].born != <u32>mmu.policy.queues.clock:
        mmu.policy.used(mmu, page)


cdef inline void _begin(sc_mmu *mmu) noexcept nogil:
    """An event begins: pages that it makes are of its number."""
    mmu.policy.queues.clock += 1


cdef void _came_through(sc_mmu *mmu, const sc_path *path) noexcept nogil:
    cdef int i
    if mmu.policy.uses & USE_FAULT:
        for i in range(path.n):
            _used(mmu, path.page[i])


cdef void _linked(sc_mmu *mmu, const sc_vcpu *v, u64 va, const sc_path *before) noexcept nogil:
    """What the fault has linked."""
    cdef sc_path path
    cdef int i
    path_find(mmu, v, va, &path)
    for i in range(path.n):
        if mmu.policy.uses & USE_LINK and i and (i >= before.n or path.page[i] != before.page[i]):
            _used(mmu, path.page[i])


cdef void _accessed(sc_mmu *mmu, const sc_vcpu *v, u64 va) noexcept nogil:
    """The walk that is left out after a fault would have set A in the entries above the leaf."""
    cdef sc_path path
    cdef int i
    if not mmu.policy.uses & USE_ACCESSED:
        return
    path_find(mmu, v, va, &path)
    for i in range(path.n - 1):
        mmu.table[path.page[i] * 512 + level_index(va, role_level(mmu.pages[path.page[i]].role))] |= PTE_A


cdef u64 _fast_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    """Where a table is missing the general way is taken, on which the walk's uses are told before the table is made.
    Else nothing is made or recycled, and they can be told afterwards."""
    cdef sc_path before
    cdef u64 exits = mmu.stats.pf_taken
    cdef u64 gpa
    cdef u32 last, present, then
    path_find(mmu, v, va, &before)
    if before.n == 0 or role_level(mmu.pages[before.page[before.n - 1]].role) > 1:
        return ~<u64>0
    last = before.page[before.n - 1]
    then = mmu.pages[last].present
    _begin(mmu)
    gpa = mmu.policy.below.fast_fault(mmu, v, va, access, told)
    if mmu.stats.pf_taken == exits:
        mmu.policy.queues.clock -= 1        # no exit, no event
    else:
        present = mmu.pages[last].present
        mmu.pages[last].present = then      # as it was when the walk came through: `cost` asks
        _came_through(mmu, &before)
        mmu.pages[last].present = present
        _linked(mmu, v, va, &before)
    if gpa != ~<u64>0 and told[0] != FAST_EMULATE:
        _accessed(mmu, v, va)
    return gpa


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    """What the walk came through was used before room is made."""
    cdef sc_path before
    cdef u64 va = hw.va
    cdef int rc
    path_find(mmu, v, va, &before)
    _begin(mmu)
    _came_through(mmu, &before)
    if mmu.policy.below.page_fault != NULL:
        rc = mmu.policy.below.page_fault(mmu, v, access, hw, w)
    else:
        rc = page_fault_usual(mmu, v, access, hw, w)
    if rc >= 0:
        _linked(mmu, v, va, &before)
    if rc == RC_OK:
        _accessed(mmu, v, va)
    return rc


cdef void _roots_used(sc_mmu *mmu, const sc_vcpu *v) noexcept nogil:
    cdef int i
    if mmu.policy.uses & USE_ROOT:
        for i in range(4):
            if v.roots[i] != SC_NONE:
                _used(mmu, v.roots[i])


cdef void _new_cr3(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    _begin(mmu)
    mmu.policy.below.new_cr3(mmu, v, before)
    _roots_used(mmu, v)


cdef void _reset(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil:
    _begin(mmu)
    mmu.policy.below.reset(mmu, v, before)
    if mmu.pages != NULL:
        _roots_used(mmu, v)


cdef void _walked(sc_mmu *mmu, const sc_vcpu *v, u64 va) noexcept nogil:
    """A walk that comes through the same pages as the last one tells nothing new. They are compared by what they stand
    for: which pages they are depends on the policy."""
    cdef sc_queues *q = mmu.policy.queues
    cdef sc_path path
    cdef u64 key
    cdef int i
    cdef bint same = True
    path_find(mmu, v, va, &path)
    for i in range(MAX_LEVELS):
        key = 0
        if i < path.n:
            key = queues_key(mmu.pages[path.page[i]].gfn, mmu.pages[path.page[i]].role)
        same = same and q.path[i] == key
        q.path[i] = key
    if same:
        return
    for i in range(path.n):
        if mmu.policy.new_too:
            mmu.policy.used(mmu, path.page[i])
        else:
            _used(mmu, path.page[i])
    _begin(mmu)


cdef void uses_follow(sc_mmu *mmu) noexcept nogil:
    """From now on the policy of `mmu` is told of what its `uses` says."""
    mmu.policy.below = mmu.design
    if mmu.policy.uses & USE_WALK:
        mmu.policy.walked = _walked
    if mmu.policy.uses & (USE_FAULT | USE_LINK | USE_ACCESSED):
        mmu.design.fast_fault = _fast_fault
        mmu.design.page_fault = _page_fault
    if mmu.policy.uses & USE_ROOT:
        mmu.design.new_cr3 = _new_cr3
        mmu.design.reset = _reset
