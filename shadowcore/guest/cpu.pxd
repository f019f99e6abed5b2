"""What the guest kernel makes its processor do: every access, CR3 load and INVLPG goes through here."""
from shadowcore.engine.access cimport sc_result
from shadowcore.engine.types cimport u8, u32, u64
from shadowcore.guest.state cimport sc_guest

cdef void cpu_go(sc_guest *g, u32 number) noexcept nogil
cdef int cpu_access(sc_guest *g, u32 op, u32 size, u64 va, u64 value, sc_result *r) noexcept nogil
cdef int cpu_load_cr3(sc_guest *g, u64 value) noexcept nogil
cdef int cpu_invlpg(sc_guest *g, u64 va) noexcept nogil
cdef int cpu_log(sc_guest *g, u32 op, bint user, u32 size, u64 addr, u64 value) noexcept nogil
cdef int cpu_string(sc_guest *g, u64 gpa, const u8 *source, u32 nbytes) noexcept nogil
cdef int cpu_string_at(sc_guest *g, u64 va, u64 gpa, const u8 *source, u32 nbytes) noexcept nogil
cdef int cpu_enter(sc_guest *g) noexcept nogil
cdef int cpu_leave(sc_guest *g) noexcept nogil
cdef int cpu_load_root(sc_guest *g, u32 p, bint keep) noexcept nogil
cdef int cpu_flush_all(sc_guest *g) noexcept nogil
cdef int cpu_flush_global(sc_guest *g) noexcept nogil
cdef int cpu_work(sc_guest *g, u32 p, u32 accesses) noexcept nogil
