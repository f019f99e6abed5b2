"""Address spaces of the guest's processes: mappings, and the calls that change them."""
from shadowcore.engine.types cimport u32, u64
from shadowcore.guest.state cimport sc_guest, sc_gvma

cdef sc_gvma *memory_find(const sc_guest *g, u32 p, u64 va) noexcept nogil
cdef sc_gvma *memory_next(const sc_guest *g, u32 p, u64 va) noexcept nogil
cdef u64 leaf_bits(const sc_guest *g, const sc_gvma *m, bint writable) noexcept nogil
cdef void swap_put(sc_guest *g, u32 slot) noexcept nogil
cdef int memory_map(sc_guest *g, u32 p, u64 start, u64 length, u32 prot, u32 flags, u32 file, u64 page,
                    u64 *where) noexcept nogil
cdef int memory_unmap(sc_guest *g, u32 p, u64 start, u64 length) noexcept nogil
cdef int memory_protect(sc_guest *g, u32 p, u64 start, u64 length, u32 prot) noexcept nogil
cdef int memory_drop(sc_guest *g, u32 p, u64 start, u64 length) noexcept nogil
cdef int memory_move(sc_guest *g, u32 p, u64 start, u64 length, u64 to) noexcept nogil
cdef int memory_brk(sc_guest *g, u32 p, u64 end) noexcept nogil
cdef int memory_zap(sc_guest *g, u32 p, const sc_gvma *m, bint whole, bint forgotten) noexcept nogil
