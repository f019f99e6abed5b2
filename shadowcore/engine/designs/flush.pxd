"""Design `flush`: a shadow page belongs to linear addresses of a vcpu (2.6.20-rc3)."""
from shadowcore.engine.state cimport sc_mmu

cdef void flush_design(sc_mmu *mmu) noexcept nogil
