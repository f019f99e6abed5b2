"""Handles of VMs: the places they lead to, the lock of each, and what a call that fails leaves behind."""
from cpython.ref cimport PyObject

from shadowcore._capi.header cimport sc_event_function, sc_prices, sc_reference_function, sc_vm
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u32, u64

cdef enum:
    MAX_VMS = 1 << 12
    INDEX_BITS = 16                 # of a handle: the place + 1; above, how many VMs the place has had

cdef struct sc_place:
    u64 handle                      # of the VM that is there, or 0
    int lock                        # 1: a call by handle is under way
    u64 generation                  # VMs that the place has had
    sc_mmu *mmu                     # of the VM that is there, or of the last that was
    PyObject *owner                 # the VM, which lives as long as it has a handle; NULL: the place is free
    const sc_prices *prices         # what accesses cost; NULL: they do not say
    sc_event_function function      # told of events, or NULL
    void *context                   # and what it is given
    sc_reference_function listener  # told of walks, or NULL
    void *listening                 # and what it is given

cdef sc_place places[MAX_VMS]

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #include <intrin.h>
    #define sc_take(p) (_InterlockedExchange((volatile long *)(p), 1) == 0)
    #define sc_release(p) ((void)_InterlockedExchange((volatile long *)(p), 0))
    #define sc_peek(p) (*(volatile unsigned long long *)(p))
    #else
    #define sc_take(p) (__atomic_exchange_n((int *)(p), 1, __ATOMIC_ACQUIRE) == 0)
    #define sc_release(p) __atomic_store_n((int *)(p), 0, __ATOMIC_RELEASE)
    #define sc_peek(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #endif
    #if defined(__GNUC__)
    #define sc_unlikely(x) __builtin_expect(!!(x), 0)
    #define sc_hold(p) __asm__("" : "+r"(p))
    #else
    #define sc_unlikely(x) (x)
    #define sc_hold(p) ((void)0)
    #endif
    """
    bint sc_take(int *lock) noexcept nogil
    void sc_release(int *lock) noexcept nogil
    u64 sc_peek(const u64 *p) noexcept nogil
    bint sc_unlikely(bint x) noexcept nogil
    void sc_hold(sc_place *p) noexcept nogil

# Each is a code of shadowcore.h, and the text that last_error gives this thread.
cdef int fail(int code, const char *text) noexcept nogil
cdef int fail_struct(const char *name, u32 size, size_t wanted) noexcept nogil
cdef int fail_element(u64 index) noexcept nogil
cdef int fail_rc(const sc_mmu *mmu, int rc) noexcept nogil
cdef int fail_python(object error) noexcept
cdef int refused(sc_vm vm) noexcept nogil
cdef int with_python() noexcept nogil
cdef sc_vcpu *vcpu_of(const sc_mmu *mmu, u32 number) noexcept nogil
cdef const char *api_last_error() noexcept nogil

# Enter a VM to fill in what the caller gave: its struct_size, with which it begins, has to be `size`. NULL: it was not,
# and rc[0] is what the call returns.
cdef sc_place *open_struct(sc_vm vm, const void *given, size_t size, const char *name, int *rc) noexcept nogil

cdef int handle_new(object vm, sc_vm *handle) except -1
cdef bint settled(sc_mmu *mmu) noexcept nogil

cdef inline sc_place *enter(sc_vm vm) noexcept nogil:
    """The place of the VM, locked until leave; NULL where that cannot be, and `refused` says why."""
    cdef u64 index = (vm & ((1 << INDEX_BITS) - 1)) - 1
    cdef sc_place *p
    if sc_unlikely(index >= MAX_VMS):
        return NULL
    p = &places[index]
    sc_hold(p)                      # or GCC makes it anew from `places` at each use: 12 instructions an access
    # Judged once before the lock is touched, which may be another VM's, and once under it.
    if sc_unlikely(sc_peek(&p.handle) != vm or not sc_take(&p.lock)):
        return NULL
    if sc_unlikely(sc_peek(&p.handle) != vm or (p.mmu.mem.busy and not settled(p.mmu))):
        sc_release(&p.lock)
        return NULL
    p.mmu.mem.busy = True           # for who comes by way of Python
    return p

cdef inline void leave(sc_place *p) noexcept nogil:
    p.mmu.mem.busy = False
    sc_release(&p.lock)
