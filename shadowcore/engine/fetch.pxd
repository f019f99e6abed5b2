"""The general way from a guest walk to a shadow leaf: link the levels, decide, install."""
from shadowcore.engine.leaf cimport sc_fault
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.walker cimport sc_walk

cdef int fetch(sc_mmu *mmu, sc_vcpu *v, const sc_walk *hw, const sc_walk *w, sc_fault *f) noexcept nogil
