"""Handles of VMs.

VMs are known to C by numbers. A number leads to a place in a table that is never freed, which holds the lock of the VM
and how many VMs the place has had: so a number can be judged before anything that belongs to a VM is looked at.
"""
from cpython.ref cimport Py_INCREF, PyObject

from shadowcore._capi.header cimport (
    SC_E_ARGUMENT, SC_E_BUSY, SC_E_CALLBACK, SC_E_ENGINE, SC_E_FILE, SC_E_HANDLE, SC_E_MEMORY, SC_E_NULL, SC_E_POOL,
    SC_E_PYTHON, SC_E_STRUCT,
)
from shadowcore.engine.invariants cimport mmu_settle, sc_audit
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.types cimport (
    RC_AUDIT, RC_BAD_OP, RC_EXHAUSTED, RC_HOOK, RC_OK, RC_UNGRANTED, RC_UNHANDLED, SC_NONE,
)

from shadowcore.errors import ConfigError, SnapshotError

cdef extern from *:
    """
    #if defined(_MSC_VER)
    static __declspec(thread) char sc_error[512];
    #else
    static __thread char sc_error[512];
    #endif
    """
    char sc_error[512]
    int snprintf(char *, size_t, const char *, ...) nogil
    int Py_IsInitialized() nogil


# Errors

cdef int fail(int code, const char *text) noexcept nogil:
    snprintf(sc_error, sizeof(sc_error), "%s", text)
    return code


cdef int fail_struct(const char *name, u32 size, size_t wanted) noexcept nogil:
    snprintf(sc_error, sizeof(sc_error), "%s: struct_size is %u, not %u", name, size, <u32>wanted)
    return SC_E_STRUCT


cdef int fail_element(u64 index) noexcept nogil:
    """For an element of a batch."""
    snprintf(sc_error, sizeof(sc_error), "accesses[%llu] is no load, store or fetch of 1, 2, 4 or 8 bytes",
             <unsigned long long>index)
    return SC_E_ARGUMENT


cdef int fail_rc(const sc_mmu *mmu, int rc) noexcept nogil:
    """For a negative code of the engine."""
    if rc == RC_EXHAUSTED and mmu.exhausted == SC_NONE:
        return fail(SC_E_MEMORY, "no room for the work of a batch")
    if rc == RC_EXHAUSTED:
        snprintf(sc_error, sizeof(sc_error),
                 "shadow pool exhausted: vcpu %u finds no room in a pool of %u pages, roots pin the rest",
                 mmu.exhausted, mmu.pool_pages)
        return SC_E_POOL
    if rc == RC_BAD_OP:
        return fail(SC_E_ARGUMENT, "the next is no load, store or fetch of 1, 2, 4 or 8 bytes any more: somebody "
                    "wrote to the arrays since the call began")
    if rc == RC_HOOK or rc == RC_AUDIT:
        return fail(SC_E_CALLBACK, "a callback in Python raised, or an audit at a named point found something")
    if rc == RC_UNHANDLED:
        return fail(SC_E_ENGINE, "a store cannot be emulated, and its table serves as a root in use")
    if rc == RC_UNGRANTED:
        return fail(SC_E_ENGINE, "a store cannot be emulated, and no shadow leaf can grant it (CR0.WP is clear)")
    snprintf(sc_error, sizeof(sc_error), "internal error %d: an access does not complete", rc)
    return SC_E_ENGINE


cdef int fail_python(object error) noexcept:
    """For an exception."""
    text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
    fail(0, text)
    if isinstance(error, MemoryError):
        return SC_E_MEMORY
    if isinstance(error, (SnapshotError, OSError)):
        return SC_E_FILE
    if isinstance(error, (ConfigError, UnicodeError, ValueError, TypeError)):
        return SC_E_ARGUMENT
    return SC_E_ENGINE


cdef const char *api_last_error() noexcept nogil:
    return sc_error


cdef int with_python() noexcept nogil:
    return RC_OK if Py_IsInitialized() else fail(SC_E_PYTHON, "there is no Python interpreter")


cdef sc_vcpu *vcpu_of(const sc_mmu *mmu, u32 number) noexcept nogil:
    if number >= mmu.n_vcpus:
        snprintf(sc_error, sizeof(sc_error), "vcpu: there is no number %u, the VM has %u", number, mmu.n_vcpus)
        return NULL
    return mmu.vcpus[number]


# Places

cdef int refused(sc_vm vm) noexcept nogil:
    """Why enter gave NULL."""
    cdef u64 index = (vm & ((1 << INDEX_BITS) - 1)) - 1
    if index >= MAX_VMS or sc_peek(&places[index].handle) != vm:
        return fail(SC_E_HANDLE, "no VM has this handle, or it was destroyed")
    return fail(SC_E_BUSY, "this VM is in use, by another thread or by the callback that makes this call; or its "
                "tables are being written by hand, or were and do not hold (vm.audit)")


cdef sc_place *open_struct(sc_vm vm, const void *given, size_t size, const char *name, int *rc) noexcept nogil:
    cdef sc_place *p = NULL
    if given == NULL:
        snprintf(sc_error, sizeof(sc_error), "the pointer to %s is NULL", name)
        rc[0] = SC_E_NULL
    elif (<const u32 *>given)[0] != size:
        rc[0] = fail_struct(name, (<const u32 *>given)[0], size)
    else:
        p = enter(vm)
        rc[0] = RC_OK if p != NULL else refused(vm)
    return p


cdef bint settled(sc_mmu *mmu) noexcept nogil:
    """What was written by hand into the shadow structure, by way of Python, holds: that is why the VM was not free."""
    cdef sc_audit a
    return mmu_settle(mmu, &a) == RC_OK


cdef int handle_new(object vm, sc_vm *handle) except -1:
    """Give `vm` a handle. With the GIL, which orders it with others."""
    cdef Mmu mmu = vm.mmu
    cdef sc_place *p
    cdef u64 i
    for i in range(MAX_VMS):
        p = &places[i]
        if p.owner == NULL:
            break
    else:
        raise MemoryError(f"there are {MAX_VMS} VMs with handles, and no more can have one")
    Py_INCREF(vm)
    p.owner = <PyObject *>vm
    p.mmu = mmu.c
    p.function = NULL
    p.context = NULL
    p.prices = NULL
    p.generation += 1
    handle[0] = p.generation << INDEX_BITS | (i + 1)
    p.handle = handle[0]
    return 0
