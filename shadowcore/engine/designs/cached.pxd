"""Design `cached`: a shadow page belongs to a guest table, and follows every store to it (the series, 2007)."""
from shadowcore.engine.state cimport sc_mmu

cdef void cached_design(sc_mmu *mmu) noexcept nogil
