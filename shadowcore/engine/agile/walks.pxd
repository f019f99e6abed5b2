"""Walks that begin in the shadow's tables and go on, below a mark, in the guest's own."""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32
from shadowcore.engine.walker cimport sc_walk

cdef int walk_on(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w, u32 page) noexcept nogil
cdef int mark_path(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil
