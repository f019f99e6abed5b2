"""Policy `fifo`: oldest by creation. Use does not refresh a page (patch 17)."""
from shadowcore.engine.pool cimport active_push, active_remove
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32


cdef void _spared(sc_mmu *mmu, u32 page) noexcept nogil:
    """To the young end: the next oldest comes to be the oldest."""
    active_remove(mmu, page)
    active_push(mmu, page)


cdef u32 _victim(sc_mmu *mmu) noexcept nogil:
    return mmu.old


cdef void fifo_policy(sc_mmu *mmu) noexcept nogil:
    """Make `mmu` one of this policy."""
    mmu.policy.victim = _victim
    mmu.policy.spared = _spared
