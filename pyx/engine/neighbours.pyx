"""What is done around a fault under designs in which no page is unsync: pages that it came through are in use, so that
their floods end, and the neighbours of the leaf that it made are made as well.

It stands before hooks of the design. A design whose settings ask for none of it runs without a trace of this; `unsync`
has its own.
"""
from shadowcore.engine.bits cimport level_index
from shadowcore.engine.emulate cimport store_followed
from shadowcore.engine.fault cimport page_fault_usual
from shadowcore.engine.path cimport path_find, sc_path
from shadowcore.engine.role cimport role_level
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport prefetch_followed
from shadowcore.engine.types cimport u32, u64
from shadowcore.engine.walker cimport sc_walk


cdef void _used(sc_mmu *mmu, const sc_path *path) noexcept nogil:
    cdef int i
    for i in range(path.n):
        mmu.pages[path.page[i]].flood = 0


cdef void _mended(sc_mmu *mmu, const sc_vcpu *v, u64 va, u64 fixed) noexcept nogil:
    """An exit for va is over. fixed: pf_fixed before it; a fault that did not set a leaf fills no neighbours."""
    cdef sc_path path
    path_find(mmu, v, va, &path)
    if path.n == 0:
        return
    if mmu.flood_pages:
        _used(mmu, &path)
    if mmu.prefetch and mmu.stats.pf_fixed != fixed and role_level(mmu.pages[path.page[path.n - 1]].role) == 1:
        prefetch_followed(mmu, v, path.page[path.n - 1] * 512 + level_index(va, 1))


cdef u64 _fast_fault(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    cdef u64 exits = mmu.stats.pf_taken
    cdef u64 fixed = mmu.stats.pf_fixed
    cdef u64 gpa = mmu.alone.fast_fault(mmu, v, va, access, told)
    if mmu.stats.pf_taken != exits:
        _mended(mmu, v, va, fixed)
    return gpa


cdef int _page_fault(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil:
    cdef u64 va = hw.va
    cdef u64 fixed = mmu.stats.pf_fixed
    cdef int rc = page_fault_usual(mmu, v, access, hw, w)
    if rc >= 0:
        _mended(mmu, v, va, fixed)
    return rc


cdef void neighbours_follow(sc_mmu *mmu) noexcept nogil:
    """From now on `mmu` does what its settings prefetch, flood_pages and in_place ask for."""
    mmu.alone = mmu.design
    if mmu.prefetch or mmu.flood_pages:
        mmu.design.fast_fault = _fast_fault
        mmu.design.page_fault = _page_fault
    if mmu.flood_pages or mmu.in_place:
        mmu.design.stored = store_followed
