"""Shadow pages: found by (gfn, role), taken from the pool, zapped, recycled."""
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32, u64

cdef inline u32 hash_bucket(const sc_mmu *mmu, u64 gfn) noexcept nogil:
    """Fibonacci hashing: neighbouring gfns and gfns a power of two apart both spread over the buckets."""
    return <u32>((gfn * <u64>0x9E3779B97F4A7C15ULL) >> mmu.hash_shift)

cdef u32 pool_find(const sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil
cdef u32 pool_get(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil
cdef void pool_zap(sc_mmu *mmu, u32 number) noexcept nogil
cdef void pool_zap_all(sc_mmu *mmu) noexcept nogil
cdef u32 pool_zap_nonglobal(sc_mmu *mmu) noexcept nogil
cdef bint pool_unprotect(sc_mmu *mmu, u64 gfn) noexcept nogil
cdef void pool_recycle(sc_mmu *mmu, u32 target) noexcept nogil
cdef void pool_init(sc_mmu *mmu) noexcept nogil
cdef bint pool_has(sc_mmu *mmu, u32 need) noexcept nogil
