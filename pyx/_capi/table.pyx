"""The C interface: the functions of shadowcore.h, in a table that is published as a capsule.

VMs are known to C by numbers. A number leads to a place in a table that is never freed, which holds the lock of the VM
and how many VMs the place has had: so a number can be judged before anything that belongs to a VM is looked at.
"""
import os

import numpy as np

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport (
    OP_CR0, OP_CR3, OP_CR4, OP_EFER, OP_FETCH, OP_INVLPG, OP_OR, OP_PKRU, OP_READ, OP_WRITE, access_shortest,
    op_is_access, sc_op, sc_result, vcpu_op,
)
from shadowcore.engine.batch cimport columns_check, columns_run, sc_columns, sc_columns_out
from shadowcore.engine.bits cimport pte_addr
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.designs.native cimport store_seen
from shadowcore.engine.emulate cimport device_store
from shadowcore.engine.hooks cimport EVENT_COUNT
from shadowcore.engine.invariants cimport audit_all, mmu_settle
from shadowcore.engine.invariants cimport sc_audit as engine_audit
from shadowcore.engine.memo cimport (
    KIND_USER, memo_context, memo_entry, memo_is, memo_mask, memo_put, memo_spill, memo_tag, sc_memo_entry,
)
from shadowcore.engine.memory cimport mem_frame, mem_frame_hpa, mem_gfn, sc_mem, sc_no_frame
from shadowcore.engine.mmu cimport Mmu, mmu_resolve
from shadowcore.engine.prices cimport prices_are_sane, prices_cycles, prices_of, prices_translation, sc_prices
from shadowcore.engine.registers cimport load_ac
from shadowcore.engine.state cimport linear_address, linear_exists, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, ACC_X, MODE_32, MODE_OFF, PF_I, PF_U, PF_W, RC_AUDIT, RC_BAD_OP, RC_EXHAUSTED, RC_GP,
    RC_HOOK, RC_MMIO, RC_OK, RC_PF, RC_UNGRANTED, RC_UNHANDLED, SC_NONE, u8, u32, u64,
)
from shadowcore.engine.walker cimport probe_walk, sc_walk, shadow_glance

from shadowcore._version import __version__
from shadowcore.config import TLB, Features, MemorySlot, Quirk
from shadowcore.config import design as named_design
from shadowcore.engine.costs import find as find_costs
from shadowcore.engine.machine import VM
from shadowcore.errors import ConfigError, SnapshotError

cdef extern from "shadowcore.h" nogil:
    enum:
        SC_ABI_VERSION
        SC_E_NULL
        SC_E_STRUCT
        SC_E_HANDLE
        SC_E_BUSY
        SC_E_ARGUMENT
        SC_E_ALIGNMENT
        SC_E_MEMORY
        SC_E_POOL
        SC_E_FILE
        SC_E_PYTHON
        SC_E_CALLBACK
        SC_E_ENGINE
        SC_CR0
        SC_CR2
        SC_CR3
        SC_CR4
        SC_EFER
        SC_PKRU
        SC_AC
        SC_CPL
        SC_DATA
        SC_BRIEF
        SC_SETTING_ZERO
        SC_EXITS
    const char *SC_CAPSULE
    ctypedef uint64_t sc_vm

    ctypedef struct sc_memory_slot:
        uint64_t gpa
        uint64_t size

    ctypedef struct sc_config:
        uint32_t struct_size, design
        void *memory
        uint64_t memory_size
        const sc_memory_slot *slots
        uint32_t n_slots, vcpus, pool_pages, min_free, refill, flood_threshold, quirks, features, maxphyaddr
        uint32_t tlb_entries[3]
        uint32_t tlb_ways[3]
        uint32_t reserved

    ctypedef struct sc_access:
        uint32_t struct_size, vcpu
        uint64_t gva
        uint8_t kind, size, user, flags
        uint32_t reserved
        uint64_t value[2]
        uint64_t expected[2]

    ctypedef struct sc_outcome:
        uint32_t struct_size, error_code
        uint64_t gpa, hpa
        void *host
        uint64_t value[2]
        uint32_t exits, references, guest_references, cycles
        uint8_t outcome, emulated, page_shift, rights
        uint32_t reserved

    ctypedef struct sc_accesses:
        uint32_t struct_size, vcpu
        uint64_t count
        const uint64_t *gva
        const uint64_t *value
        const uint8_t *kind
        const uint8_t *size
        const uint8_t *user
        uint8_t all_kind, all_size, all_user, flags
        uint32_t reserved
        uint64_t *gpa
        uint64_t *loaded
        uint16_t *error_code
        uint16_t *exits
        uint8_t *outcome
        uint8_t *emulated
        uint64_t done

    ctypedef struct sc_counters:
        uint32_t struct_size, reserved
        uint64_t exits[1]

    ctypedef struct sc_event:
        uint32_t struct_size, kind, detail, vcpu
        uint64_t address
        sc_vm vm

    ctypedef void (*sc_event_function)(void *context, const sc_event *event) noexcept nogil

    ctypedef struct sc_audit_result:
        uint32_t struct_size, violations
        uint64_t sptes
        uint32_t invariant, page, index, reserved
        uint64_t gfn

    ctypedef struct sc_api:
        uint32_t abi_version, struct_size
        const char *version
        int (*vm_create)(const sc_config *, sc_vm *) noexcept nogil
        int (*vm_destroy)(sc_vm) noexcept nogil
        int (*register_read)(sc_vm, uint32_t, uint32_t, uint64_t *) noexcept nogil
        int (*register_load)(sc_vm, uint32_t, uint32_t, uint64_t) noexcept nogil
        int (*invlpg)(sc_vm, uint32_t, uint64_t) noexcept nogil
        int (*access)(sc_vm, const sc_access *, sc_outcome *) noexcept nogil
        int (*translate)(sc_vm, const sc_access *, sc_outcome *) noexcept nogil
        int (*access_many)(sc_vm, sc_accesses *) noexcept nogil
        int (*store)(sc_vm, uint64_t, const void *, uint64_t) noexcept nogil
        int (*stored)(sc_vm, uint64_t, uint64_t) noexcept nogil
        int (*host_address)(sc_vm, uint64_t, void **) noexcept nogil
        int (*counters)(sc_vm, sc_counters *) noexcept nogil
        int (*on_event)(sc_vm, uint32_t, sc_event_function, void *) noexcept nogil
        int (*audit)(sc_vm, sc_audit_result *) noexcept nogil
        int (*save)(sc_vm, const char *) noexcept nogil
        int (*vm_load)(const char *, void *, uint64_t, sc_vm *) noexcept nogil
        const char *(*last_error)() noexcept nogil
        int (*vm_adopt)(void *, sc_vm *) noexcept nogil
        int (*prices)(const char *, sc_prices *) noexcept nogil
        int (*set_prices)(sc_vm, const sc_prices *) noexcept nogil
        int (*cycles)(sc_vm, double *) noexcept nogil

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #include <intrin.h>
    static __declspec(thread) char sc_error[512];
    #define sc_take(p) (_InterlockedExchange((volatile long *)(p), 1) == 0)
    #define sc_release(p) ((void)_InterlockedExchange((volatile long *)(p), 0))
    #define sc_peek(p) (*(volatile unsigned long long *)(p))
    #else
    static __thread char sc_error[512];
    #define sc_take(p) (__atomic_exchange_n((int *)(p), 1, __ATOMIC_ACQUIRE) == 0)
    #define sc_release(p) __atomic_store_n((int *)(p), 0, __ATOMIC_RELEASE)
    #define sc_peek(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #endif
    #if defined(__GNUC__)
    #define sc_unlikely(x) __builtin_expect(!!(x), 0)
    #else
    #define sc_unlikely(x) (x)
    #endif
    """
    char sc_error[512]
    bint sc_take(int *lock) noexcept nogil
    void sc_release(int *lock) noexcept nogil
    u64 sc_peek(const u64 *p) noexcept nogil
    bint sc_unlikely(bint x) noexcept nogil
    int snprintf(char *, size_t, const char *, ...) nogil
    int Py_IsInitialized() nogil

cdef enum:
    MAX_VMS = 1 << 12
    INDEX_BITS = 16                 # of a handle: the place + 1; above, how many VMs the place has had
    # What the memo keeps in the bits of a target that a page address and the count of entries leave free.
    NOTED = 52                      # a bit: the rest is set
    NOTED_SHIFT = 53                # 2 bits: index in _shifts
    NOTED_RIGHTS = 55               # 3 bits: ACC_*
    COPY = 4096

cdef struct sc_place:
    int lock
    bint no_memo                    # see batch.columns_run
    bint priced                     # accesses say what they cost
    u64 handle                      # of the VM that is there, or 0
    u64 generation
    sc_mmu *mmu
    PyObject *owner                 # VM
    sc_event_function function
    void *context

cdef sc_place _places[MAX_VMS]
cdef sc_prices _price_lists[MAX_VMS]  # of the handle in the same place, in force if it is `priced`
cdef int _shifts[4]
_shifts[0], _shifts[1], _shifts[2], _shifts[3] = 12, 21, 22, 30


# Errors

cdef int _fail(int code, const char *text) noexcept nogil:
    snprintf(sc_error, sizeof(sc_error), "%s", text)
    return code


cdef int _fail_struct(const char *name, u32 size, size_t wanted) noexcept nogil:
    snprintf(sc_error, sizeof(sc_error), "%s: struct_size is %u, not %u", name, size, <u32>wanted)
    return SC_E_STRUCT


cdef int _fail_rc(const sc_mmu *mmu, int rc) noexcept nogil:
    """For a negative code of the engine."""
    if rc == RC_EXHAUSTED and mmu.exhausted == SC_NONE:
        return _fail(SC_E_MEMORY, "no room for the work of a batch")
    if rc == RC_EXHAUSTED:
        snprintf(sc_error, sizeof(sc_error),
                 "shadow pool exhausted: vcpu %u finds no room in a pool of %u pages, roots pin the rest",
                 mmu.exhausted, mmu.pool_pages)
        return SC_E_POOL
    if rc == RC_BAD_OP:
        return _fail(SC_E_ARGUMENT, "the next is no load, store or fetch of 1, 2, 4 or 8 bytes any more: somebody "
                     "wrote to the arrays since the call began")
    if rc == RC_HOOK or rc == RC_AUDIT:
        return _fail(SC_E_CALLBACK, "a callback in Python raised, or an audit at a named point found something")
    if rc == RC_UNHANDLED:
        return _fail(SC_E_ENGINE, "a store cannot be emulated, and its table serves as a root in use")
    if rc == RC_UNGRANTED:
        return _fail(SC_E_ENGINE, "a store cannot be emulated, and no shadow leaf can grant it (CR0.WP is clear)")
    snprintf(sc_error, sizeof(sc_error), "internal error %d: an access does not complete", rc)
    return SC_E_ENGINE


cdef int _fail_python(object error) noexcept:
    """For an exception."""
    text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
    _fail(0, text)
    if isinstance(error, MemoryError):
        return SC_E_MEMORY
    if isinstance(error, (SnapshotError, OSError)):
        return SC_E_FILE
    if isinstance(error, (ConfigError, UnicodeError, ValueError, TypeError)):
        return SC_E_ARGUMENT
    return SC_E_ENGINE


# Handles

cdef int _refused(sc_vm vm) noexcept nogil:
    """Why _enter gave NULL."""
    cdef u64 index = (vm & ((1 << INDEX_BITS) - 1)) - 1
    if index >= MAX_VMS or sc_peek(&_places[index].handle) != vm:
        return _fail(SC_E_HANDLE, "no VM has this handle, or it was destroyed")
    return _fail(SC_E_BUSY, "this VM is in use, by another thread or by the callback that makes this call; or its "
                 "tables are being written by hand, or were and do not hold (vm.audit)")


cdef bint _settled(sc_mmu *mmu) noexcept nogil:
    """What was written by hand into the shadow structure, by way of Python, holds: that is why the VM was not free."""
    cdef engine_audit a
    return mmu_settle(mmu, &a) == RC_OK


cdef inline sc_place *_enter(sc_vm vm) noexcept nogil:
    """The place of the VM, locked until _leave; NULL where that cannot be."""
    cdef u64 index = (vm & ((1 << INDEX_BITS) - 1)) - 1
    cdef sc_place *p
    if sc_unlikely(index >= MAX_VMS):
        return NULL
    p = &_places[index]
    # Judged once before the lock is touched, which may be another VM's, and once under it.
    if sc_unlikely(sc_peek(&p.handle) != vm or not sc_take(&p.lock)):
        return NULL
    if sc_unlikely(sc_peek(&p.handle) != vm or (p.mmu.mem.busy and not _settled(p.mmu))):
        sc_release(&p.lock)
        return NULL
    p.mmu.mem.busy = True           # for who comes by way of Python
    return p


cdef inline void _leave(sc_place *p) noexcept nogil:
    p.mmu.mem.busy = False
    sc_release(&p.lock)


cdef int _register(object vm, sc_vm *handle) except -1:
    """Give `vm` a handle. With the GIL, which orders it with others."""
    cdef Mmu mmu = vm.mmu
    cdef sc_place *p
    cdef u64 i
    for i in range(MAX_VMS):
        p = &_places[i]
        if p.owner == NULL:
            break
    else:
        raise MemoryError(f"there are {MAX_VMS} VMs with handles, and no more can have one")
    Py_INCREF(vm)
    p.owner = <PyObject *>vm
    p.mmu = &mmu.c
    p.function = NULL
    p.context = NULL
    p.no_memo = False
    p.priced = False
    p.generation += 1
    handle[0] = p.generation << INDEX_BITS | (i + 1)
    p.handle = handle[0]
    return 0


cdef int _with_python() noexcept nogil:
    return RC_OK if Py_IsInitialized() else _fail(SC_E_PYTHON, "there is no Python interpreter")


# Making and ending

cdef object _caller_memory(void *memory, u64 size):
    if size > <u64>1 << 52:
        raise ConfigError(f"memory_size: {size} bytes is more than 52 address bits have")
    return np.frombuffer(PyMemoryView_FromMemory(<char *>memory, <Py_ssize_t>size, PyBUF_WRITE), dtype=np.uint8)


cdef object _setting(u32 value, none=0):
    return none if value == <u32>SC_SETTING_ZERO else value


cdef object _make(const sc_config *c):
    cdef u32 i
    cdef list names = ["native", "flush", "cached", "kvm-2007"]
    cdef list features = ["nx", "gbpages", "la57", "pse36", "smep", "smap", "pku", "pcid", "umip", "fsgsbase", "xsave"]
    if c.design >= len(names):
        raise ConfigError(f"design: {c.design} is not 0 to {len(names) - 1}")
    settings = {}
    for name, value in (("pool_pages", c.pool_pages), ("min_free", c.min_free), ("refill", c.refill)):
        if value:
            settings[name] = _setting(value)
    if c.flood_threshold:
        settings["flood_threshold"] = _setting(c.flood_threshold, None)
    if c.quirks:
        bits = _setting(c.quirks)
        if bits & ~int(Quirk.KVM_2007):
            raise ConfigError(f"quirks: {bits:#x} is not a combination of members of Quirk")
        settings["quirks"] = Quirk(bits)
    if "min_free" in settings and "refill" not in settings:
        settings["refill"] = max(25, settings["min_free"])
    has = _setting(c.features) if c.features else (1 << len(features)) - 1
    if has >> len(features):
        raise ConfigError(f"features: {has:#x} has bits that are no SC_FEATURE_*")
    made = Features(maxphyaddr=c.maxphyaddr or 46, **{name: bool(has >> bit & 1) for bit, name in enumerate(features)})
    tlb = None
    if c.tlb_entries[0] or c.tlb_entries[1] or c.tlb_entries[2]:
        sizes = {}
        for i, name in enumerate(("small", "large", "huge")):
            sizes[f"{name}_entries"], sizes[f"{name}_ways"] = c.tlb_entries[i], c.tlb_ways[i] or 1
        tlb = TLB(**sizes)
    if c.n_slots > 32:
        raise ConfigError(f"n_slots: {c.n_slots} is more than 32")
    slots = [MemorySlot(c.slots[i].gpa, c.slots[i].size) for i in range(c.n_slots)] or None
    memory = c.memory_size if c.memory == NULL else _caller_memory(c.memory, c.memory_size)
    if c.memory == NULL and slots is not None:
        if sum(slot.size for slot in slots) != c.memory_size:
            raise ConfigError(f"slots: they do not hold {c.memory_size} bytes")
        memory, slots = slots, None
    if c.design == 0:
        settings = {"quirks": settings.get("quirks", Quirk.NONE) & Quirk.IGNORED_BITS_REFUSED}
    return VM(memory, named_design(names[c.design], **settings), c.vcpus or 1, tlb, features=made, slots=slots)


cdef int _create_with_gil(const sc_config *config, sc_vm *vm) noexcept with gil:
    try:
        return _register(_make(config), vm)
    except BaseException as error:
        return _fail_python(error)


cdef int _create(const sc_config *given, sc_vm *vm) noexcept nogil:
    cdef sc_config copy
    cdef const sc_config *config = &copy
    if vm == NULL:
        return _fail(SC_E_NULL, "vm is NULL")
    vm[0] = 0
    if given == NULL or (given.slots == NULL and given.n_slots):
        return _fail(SC_E_NULL, "config, or config->slots, is NULL")
    if given.struct_size != sizeof(sc_config):
        return _fail_struct("sc_config", given.struct_size, sizeof(sc_config))
    copy = given[0]                 # what is checked is what is used
    if config.reserved:
        return _fail(SC_E_ARGUMENT, "config->reserved is not 0")
    if <size_t>config.memory & 4095:
        return _fail(SC_E_ALIGNMENT, "config->memory does not begin at a multiple of 4096")
    if _with_python() != RC_OK:
        return SC_E_PYTHON
    return _create_with_gil(config, vm)


cdef int _destroy_with_gil(sc_vm vm) noexcept with gil:
    cdef sc_place *p = _enter(vm)
    cdef object owner
    if p == NULL:
        return _refused(vm)
    owner = <object>p.owner
    if p.function != NULL:
        p.mmu.events = 0
    p.handle = 0
    p.owner = NULL
    _leave(p)
    Py_DECREF(owner)
    return RC_OK


cdef int _destroy(sc_vm vm) noexcept nogil:
    if _with_python() != RC_OK:
        return SC_E_PYTHON
    return _destroy_with_gil(vm)


cdef int _adopt_with_gil(void *object_, sc_vm *vm) noexcept with gil:
    try:
        if not isinstance(<object>object_, VM):
            raise ConfigError(f"a shadowcore.VM is needed, not {type(<object>object_).__name__}")
        return _register(<object>object_, vm)
    except BaseException as error:
        return _fail_python(error)


cdef int _adopt(void *object_, sc_vm *vm) noexcept nogil:
    if vm == NULL or object_ == NULL:
        return _fail(SC_E_NULL, "object or vm is NULL")
    vm[0] = 0
    if _with_python() != RC_OK:
        return SC_E_PYTHON
    return _adopt_with_gil(object_, vm)


# Registers

cdef sc_vcpu *_vcpu(const sc_mmu *mmu, u32 number) noexcept nogil:
    if number >= mmu.n_vcpus:
        snprintf(sc_error, sizeof(sc_error), "vcpu: there is no number %u, the VM has %u", number, mmu.n_vcpus)
        return NULL
    return mmu.vcpus[number]


cdef int _register_read(sc_vm vm, u32 vcpu, u32 reg, u64 *value) noexcept nogil:
    cdef sc_place *p
    cdef sc_vcpu *v
    cdef int rc = RC_OK
    if value == NULL:
        return _fail(SC_E_NULL, "value is NULL")
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    v = _vcpu(p.mmu, vcpu)
    if v == NULL:
        rc = SC_E_ARGUMENT
    elif reg == SC_CR0:
        value[0] = v.cr0
    elif reg == SC_CR2:
        value[0] = v.cr2
    elif reg == SC_CR3:
        value[0] = v.cr3
    elif reg == SC_CR4:
        value[0] = v.cr4
    elif reg == SC_EFER:
        value[0] = v.efer
    elif reg == SC_PKRU:
        value[0] = v.guest.pkru
    elif reg == SC_AC:
        value[0] = v.guest.ac
    elif reg == SC_CPL:
        value[0] = v.cpl
    else:
        rc = _fail(SC_E_ARGUMENT, "reg is no register")
    _leave(p)
    return rc


cdef int _load(sc_mmu *mmu, sc_vcpu *v, u32 op, u64 value) noexcept nogil:
    cdef sc_op o
    cdef sc_result r
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.op = <u8>op
    o.addr = o.value[0] = value
    rc = vcpu_op(mmu, v, &o, True, &r)
    if rc >= 0 and mmu.audit_found:
        rc = RC_AUDIT
    return rc if rc >= 0 else _fail_rc(mmu, rc)


cdef int _register_load(sc_vm vm, u32 vcpu, u32 reg, u64 value) noexcept nogil:
    cdef sc_place *p = _enter(vm)
    cdef sc_vcpu *v
    cdef int rc = RC_OK
    if p == NULL:
        return _refused(vm)
    v = _vcpu(p.mmu, vcpu)
    if v == NULL:
        rc = SC_E_ARGUMENT
    elif reg == SC_CR0:
        rc = _load(p.mmu, v, OP_CR0, value)
    elif reg == SC_CR2:
        v.cr2 = value
    elif reg == SC_CR3:
        rc = _load(p.mmu, v, OP_CR3, value)
    elif reg == SC_CR4:
        rc = _load(p.mmu, v, OP_CR4, value)
    elif reg == SC_EFER:
        rc = _load(p.mmu, v, OP_EFER, value)
    elif reg == SC_PKRU and value >> 32 == 0:
        rc = _load(p.mmu, v, OP_PKRU, value)
    elif reg == SC_AC and value <= 1:
        load_ac(p.mmu, v, value != 0)
    elif reg == SC_CPL and (value == 0 or value == 3):
        v.cpl = <u32>value
    else:
        rc = _fail(SC_E_ARGUMENT, "reg is no register, or value none that it can have")
    _leave(p)
    return rc


cdef int _invlpg(sc_vm vm, u32 vcpu, u64 gva) noexcept nogil:
    cdef sc_place *p = _enter(vm)
    cdef sc_vcpu *v
    cdef int rc
    if p == NULL:
        return _refused(vm)
    v = _vcpu(p.mmu, vcpu)
    rc = SC_E_ARGUMENT if v == NULL else _load(p.mmu, v, OP_INVLPG, gva)
    _leave(p)
    return rc


# Accesses

cdef inline u32 _access_bits(const sc_access *a) noexcept nogil:
    return ((PF_U if a.user else 0)
            | (PF_I if a.kind == OP_FETCH else 0 if a.kind == OP_READ else PF_W))


cdef u64 _noted(const sc_mmu *mmu, const sc_vcpu *v, u64 va, u32 access) noexcept nogil:
    """Size and rights of the guest's page at `va`, as the bits that the memo keeps. Where the guest's tables have come
    to say something else than the shadow, which `flush` allows: those of the access, which was granted."""
    cdef sc_walk w
    cdef u64 shift = 0
    cdef u64 rights = ACC_ALL
    if v.guest.mode != MODE_OFF:
        if probe_walk(mmu.mem, &v.guest, va, access, &w) == RC_OK:
            rights = w.access
            if w.level > 1:
                shift = 2 if v.guest.mode == MODE_32 else 1 if w.level == 2 else 3
        else:
            rights = (ACC_U if access & PF_U else 0) | (ACC_W if access & PF_W else 0) | (ACC_X if access & PF_I else 0)
    return <u64>1 << NOTED | shift << NOTED_SHIFT | rights << NOTED_RIGHTS


cdef inline void _tell(u64 noted, sc_outcome *o) noexcept nogil:
    o.page_shift = <u8>_shifts[(noted >> NOTED_SHIFT) & 3]
    o.rights = (noted >> NOTED_RIGHTS) & ACC_ALL


cdef inline u8 *_place_of(const sc_mem *m, u64 gpa, sc_outcome *o) noexcept nogil:
    """gpa, hpa and host, of a gpa in RAM; returns the last."""
    cdef u64 frame = mem_frame(m, gpa >> 12)
    cdef u8 *host = m.ram + (frame << 12) + (gpa & 4095)
    o.gpa = gpa
    o.hpa = mem_frame_hpa(m, frame) | (gpa & 4095)
    o.host = host
    return host


cdef inline void _bytes(const sc_access *a, void *host, sc_outcome *o) noexcept nogil:
    """Move the bytes of an access within one page."""
    if not a.flags & SC_DATA:
        return
    if a.kind == OP_WRITE:
        memcpy(host, a.value, a.size)
    else:
        memcpy(o.value, host, a.size if a.kind == OP_READ else 1)


cdef inline void _nothing_yet(sc_outcome *o) noexcept nogil:
    memset(<u8 *>o + sizeof(u32), 0, sizeof(sc_outcome) - sizeof(u32))


cdef int _slow(sc_mmu *mmu, sc_vcpu *v, const sc_access *a, sc_outcome *o) noexcept nogil:
    """Any access, by the function that knows all cases."""
    cdef sc_op op
    cdef sc_result r
    cdef u64 references = mmu.stats.walk_references
    cdef u64 guest = mmu.stats.guest_walk_references
    cdef u64 va
    cdef int rc
    op.op = a.kind
    op.user = a.user != 0
    op.size = 1 if a.kind == OP_FETCH else a.size
    op.vcpu = <u8>a.vcpu
    op.addr = a.gva
    op.value[0], op.value[1] = a.value[0], a.value[1]
    op.expected[0], op.expected[1] = a.expected[0], a.expected[1]
    rc = access_shortest(mmu, v, &op, (a.flags & SC_DATA) != 0, &r)
    if rc >= 0 and mmu.audit_found:
        rc = RC_AUDIT
    if rc < 0:
        return _fail_rc(mmu, rc)
    o.references = <u32>(mmu.stats.walk_references - references)
    o.guest_references = <u32>(mmu.stats.guest_walk_references - guest)
    o.exits = r.exits
    o.emulated = r.emulated
    o.error_code = r.error_code
    o.outcome = r.outcome
    o.value[0], o.value[1] = r.value[0], r.value[1]
    o.gpa = r.gpa
    o.hpa = ~<u64>0
    if rc == RC_OK:
        _place_of(mmu.mem, r.gpa, o)
        if not a.flags & SC_BRIEF:
            va = linear_address(v, a.gva)
            _tell(_noted(mmu, v, va, _access_bits(a)), o)
    return rc


cdef int _priced(sc_place *p, sc_vcpu *v, const sc_access *a, sc_outcome *o) noexcept nogil:
    """An access, and what it cost."""
    cdef const sc_prices *prices = &_price_lists[p - _places]
    cdef const sc_stats *now = p.mmu.stats
    cdef sc_stats before = now[0]
    cdef double cycles = 0.5
    cdef u64 misses
    cdef int rc
    _nothing_yet(o)
    rc = _slow(p.mmu, v, a, o)
    if o.exits:
        cycles += prices_cycles(prices, &before, now)
    else:
        # Nothing but walks.
        misses = now.tlb_misses - before.tlb_misses if v.tlb != NULL else now.accesses - before.accesses
        cycles += prices_translation(prices, misses, o.references)
    o.cycles = <u32>cycles if cycles < <double>SC_NONE else SC_NONE
    return rc


cdef int _native(sc_mmu *mmu, sc_vcpu *v, const sc_access *a, u64 va, sc_outcome *o) noexcept nogil:
    """A plain access under `native` without a TLB, where one walk tells all; what access._one_page does."""
    cdef sc_walk w
    cdef u32 access = _access_bits(a)
    cdef u8 *host
    cdef int rc
    _nothing_yet(o)
    w.references = 0
    w.level = 1
    w.access = ACC_ALL
    rc = mmu_resolve(mmu, v, va, access, &w)
    o.references = w.references
    o.outcome = <u8>rc
    if rc != RC_OK:
        o.error_code = w.error_code if rc == RC_PF else 0
        o.gpa = w.gpa if rc == RC_MMIO else ~<u64>0
        o.hpa = ~<u64>0
        return rc
    host = _place_of(mmu.mem, w.gpa, o)
    if not a.flags & SC_BRIEF:
        o.page_shift = 12
        o.rights = ACC_ALL
        if v.guest.mode != MODE_OFF:
            o.page_shift = <u8>(12 + (10 if v.guest.mode == MODE_32 else 9) * (w.level - 1))
            o.rights = <u8>w.access
    _bytes(a, host, o)
    if access & PF_W:
        store_seen(mmu, w.gpa)
    return rc


cdef inline sc_memo_entry *_remembered(const sc_vcpu *v, u64 va, u64 tag) noexcept nogil:
    """The entry of the memo that has the page of `tag`."""
    cdef sc_memo_entry *e = memo_entry(v.memo, va)
    if memo_is(e, tag):
        return e
    e = memo_spill(v.memo, va)
    return e if memo_is(e, tag) else NULL


cdef int _unremembered(sc_mmu *mmu, sc_vcpu *v, const sc_access *a, u64 va, u32 kind, sc_outcome *o) noexcept nogil:
    """A plain access under a shadow MMU that the memo does not have."""
    cdef u32 access = _access_bits(a)
    cdef u64 hpa = 0
    cdef u64 gpa
    cdef u8 *host
    cdef sc_memo_entry *e
    cdef int read = -1
    _nothing_yet(o)
    if linear_exists(v, va):
        read = shadow_glance(mmu.mem, &v.hw, va, access, &hpa)
    if read >= 0 and (hpa >> 12) - mmu.mem.ram_hfn < mmu.mem.nframes:
        gpa = mem_gfn(mmu.mem, (hpa >> 12) - mmu.mem.ram_hfn) << 12
        mmu.stats.accesses += 1
        mmu.stats.walk_references += read
        memo_put(v.memo, memo_context(v.memo, mmu.memo_epoch), va, kind, gpa | <u64>read)
        host = _place_of(mmu.mem, gpa | (va & 4095), o)
        o.references = read
        if not a.flags & SC_BRIEF:
            hpa = _noted(mmu, v, va, access)
            e = _remembered(v, va, memo_tag(va, memo_context(v.memo, mmu.memo_epoch)))
            if e != NULL:
                e.target |= hpa
            _tell(hpa, o)
        _bytes(a, host, o)
        return RC_OK
    return _slow(mmu, v, a, o)


cdef int _bad_access(const sc_access *a, const sc_outcome *o) noexcept nogil:
    if a == NULL or o == NULL:
        return _fail(SC_E_NULL, "access or outcome is NULL")
    if a.struct_size != sizeof(sc_access):
        return _fail_struct("sc_access", a.struct_size, sizeof(sc_access))
    if o.struct_size != sizeof(sc_outcome):
        return _fail_struct("sc_outcome", o.struct_size, sizeof(sc_outcome))
    if not op_is_access(a.kind) or a.kind > OP_OR + 1:
        return _fail(SC_E_ARGUMENT, "access->kind is no kind of access")
    if a.kind != OP_FETCH and (a.size == 0 or a.size & (a.size - 1) or a.size > 16 or (a.size == 16 and a.kind > 10)):
        return _fail(SC_E_ARGUMENT, "access->size is not 1, 2, 4 or 8 (or 16, for loads, stores and CMPXCHG)")
    if a.reserved or a.flags & ~(SC_DATA | SC_BRIEF):
        return _fail(SC_E_ARGUMENT, "access->reserved is not 0, or flags has bits that are none")
    return RC_OK


cdef int _access(sc_vm vm, const sc_access *given, sc_outcome *o) noexcept nogil:
    cdef sc_access copy             # what is checked is what is used, wherever `given` lies
    cdef const sc_access *a = &copy
    cdef sc_place *p
    cdef sc_mmu *mmu
    cdef sc_vcpu *v
    cdef sc_memo_entry *e
    cdef u64 va, context
    cdef u8 *host
    cdef u32 kind
    cdef int rc
    if sc_unlikely(given == NULL or o == NULL):
        return _bad_access(given, o)
    copy = given[0]
    if sc_unlikely(a.struct_size != sizeof(sc_access) or o.struct_size != sizeof(sc_outcome) or a.reserved
                   or a.kind > OP_FETCH or a.size > 8 or a.size & (a.size - 1) or not a.size
                   or a.flags & ~(SC_DATA | SC_BRIEF)):
        rc = _bad_access(a, o)      # or one of the rarer kinds
        if rc != RC_OK:
            return rc
    p = _enter(vm)
    if sc_unlikely(p == NULL):
        return _refused(vm)
    mmu = p.mmu
    if sc_unlikely(a.vcpu >= mmu.n_vcpus):
        _vcpu(mmu, a.vcpu)
        _leave(p)
        return SC_E_ARGUMENT
    v = mmu.vcpus[a.vcpu]
    if sc_unlikely(p.priced):
        rc = _priced(p, v, a, o)
        _leave(p)
        return rc
    va = linear_address(v, a.gva)
    # Under `native`, nobody tells of stores to tables: there is no memo from one call to the next.
    if sc_unlikely(v.memo == NULL or not mmu.shadow or a.kind > OP_FETCH
                   or (va & 4095) + a.size > 4096):
        if (v.memo != NULL and not mmu.shadow and a.kind <= OP_FETCH and (va & 4095) + a.size <= 4096
                and linear_exists(v, va)):
            rc = _native(mmu, v, a, va, o)
        else:
            _nothing_yet(o)
            rc = _slow(mmu, v, a, o)
        _leave(p)
        return rc
    kind = a.kind + (KIND_USER if a.user else 0)
    context = memo_context(v.memo, mmu.memo_epoch)
    e = memo_entry(v.memo, va)
    if (e.tag ^ memo_tag(va, context)) & memo_mask(kind):
        e = memo_spill(v.memo, va)
        if (e.tag ^ memo_tag(va, context)) & memo_mask(kind):
            rc = _unremembered(mmu, v, a, va, kind, o)
            _leave(p)
            return rc
    _nothing_yet(o)
    mmu.stats.accesses += 1
    mmu.stats.walk_references += e.target & 15
    o.references = e.target & 15
    host = _place_of(mmu.mem, (e.target & pte_addr()) | (va & 4095), o)
    if not a.flags & SC_BRIEF:
        if sc_unlikely(not e.target >> NOTED & 1):
            e.target |= _noted(mmu, v, va, _access_bits(a))
        _tell(e.target, o)
    _bytes(a, host, o)
    _leave(p)
    return RC_OK


cdef int _translate(sc_vm vm, const sc_access *a, sc_outcome *o) noexcept nogil:
    cdef sc_place *p
    cdef sc_vcpu *v
    cdef sc_access copy
    cdef sc_walk w
    cdef u64 va
    cdef int rc
    if a != NULL:
        copy = a[0]                 # what is checked is what is used
        a = &copy
    rc = _bad_access(a, o)
    if rc != RC_OK:
        return rc
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    v = _vcpu(p.mmu, a.vcpu)
    if v == NULL:
        _leave(p)
        return SC_E_ARGUMENT
    _nothing_yet(o)
    o.gpa = o.hpa = ~<u64>0
    va = linear_address(v, a.gva)
    if not linear_exists(v, va):
        rc = RC_GP
    else:
        rc = probe_walk(p.mmu.mem, &v.guest, va, _access_bits(a), &w)
        if rc == RC_PF:
            o.error_code = w.error_code
        else:
            rc = RC_OK if mem_frame(p.mmu.mem, w.gpa >> 12) != sc_no_frame() else RC_MMIO
            o.gpa = w.gpa
            if rc == RC_OK:
                _place_of(p.mmu.mem, w.gpa, o)
            _tell(_noted(p.mmu, v, va, _access_bits(a)), o)
    o.outcome = <u8>rc
    _leave(p)
    return rc


cdef int _access_many(sc_vm vm, sc_accesses *given) noexcept nogil:
    cdef sc_place *p
    cdef sc_columns c
    cdef sc_columns_out out
    cdef sc_accesses copy           # what is checked is what is used, wherever `given` lies
    cdef sc_accesses *a = &copy
    cdef bint data
    cdef int rc
    if given == NULL:
        return _fail(SC_E_NULL, "accesses is NULL")
    if given.struct_size != sizeof(sc_accesses):
        return _fail_struct("sc_accesses", given.struct_size, sizeof(sc_accesses))
    given.done = 0
    copy = given[0]
    if a.gva == NULL and a.count:
        return _fail(SC_E_NULL, "accesses->gva is NULL")
    if a.reserved or a.flags & ~<u32>SC_DATA or a.count >> 48:
        return _fail(SC_E_ARGUMENT, "accesses->reserved is not 0, flags has bits that are none, or count is too large")
    data = (a.flags & SC_DATA) != 0
    memset(&c, 0, sizeof(c))
    c.gva, c.gva_step = <const u8 *>a.gva, 8
    c.value, c.value_step = <const u8 *>a.value, 8
    c.op, c.op_step, c.all_op = a.kind, 1, a.all_kind
    c.size, c.size_step, c.all_size = a.size, 1, a.all_size
    c.user, c.user_step, c.all_user = a.user, 1, a.all_user
    given.done = a.done = columns_check(&c, a.count)
    if a.done < a.count:
        snprintf(sc_error, sizeof(sc_error), "accesses[%llu] is no load, store or fetch of 1, 2, 4 or 8 bytes",
                 <unsigned long long>a.done)
        return SC_E_ARGUMENT
    given.done = a.done = 0
    out.gpa, out.value, out.error_code, out.exits = a.gpa, a.loaded, a.error_code, a.exits
    out.outcome, out.emulated = a.outcome, a.emulated
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    if _vcpu(p.mmu, a.vcpu) == NULL:
        _leave(p)
        return SC_E_ARGUMENT
    rc = columns_run(p.mmu, a.vcpu, &c, a.count, data, &out, &p.no_memo, &a.done)
    given.done = a.done
    if rc < 0:
        rc = _fail_rc(p.mmu, rc)
    _leave(p)
    return rc


# Guest memory

cdef int _outside(const sc_mem *m, u64 gpa, u64 size) noexcept nogil:
    """Not all of it lies in memory slots."""
    cdef u64 gfn
    if gpa >> 52 or size > (<u64>1 << 52) - gpa:
        return _fail(SC_E_ARGUMENT, "gpa, size: beyond 52 address bits")
    if size == 0:
        return RC_OK
    for gfn in range(gpa >> 12, (gpa + size - 1 >> 12) + 1):
        if mem_frame(m, gfn) == sc_no_frame():
            return _fail(SC_E_ARGUMENT, "gpa, size: not all of it lies in memory slots")
    return RC_OK


cdef int _device(sc_vm vm, u64 gpa, const u8 *data, u64 size, bint there) noexcept nogil:
    cdef sc_place *p = _enter(vm)
    cdef u8 copy[COPY]
    cdef sc_outcome o
    cdef u32 part
    cdef int rc
    if p == NULL:
        return _refused(vm)
    rc = _outside(p.mmu.mem, gpa, size)
    if rc == RC_OK:
        while size:
            part = <u32>min(size, 4096 - (gpa & 4095))
            _place_of(p.mmu.mem, gpa, &o)
            # A copy, for `data` may be guest memory itself.
            memcpy(copy, <const u8 *>o.host if there else data, part)
            device_store(p.mmu, gpa, copy, part)
            gpa += part
            size -= part
            if not there:
                data += part
        if p.mmu.audit_found:
            rc = _fail_rc(p.mmu, RC_AUDIT)
    _leave(p)
    return rc


cdef int _store(sc_vm vm, u64 gpa, const void *data, u64 size) noexcept nogil:
    if data == NULL and size:
        return _fail(SC_E_NULL, "data is NULL")
    return _device(vm, gpa, <const u8 *>data, size, False)


cdef int _stored(sc_vm vm, u64 gpa, u64 size) noexcept nogil:
    return _device(vm, gpa, NULL, size, True)


cdef int _host_address(sc_vm vm, u64 gpa, void **host) noexcept nogil:
    cdef sc_place *p
    cdef sc_outcome o
    cdef int rc = RC_MMIO
    if host == NULL:
        return _fail(SC_E_NULL, "host is NULL")
    host[0] = NULL
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    if mem_frame(p.mmu.mem, gpa >> 12) != sc_no_frame():
        _place_of(p.mmu.mem, gpa, &o)
        host[0] = o.host
        rc = RC_OK
    _leave(p)
    return rc


# Looking on

cdef int _counters(sc_vm vm, sc_counters *counters) noexcept nogil:
    cdef sc_place *p
    if counters == NULL:
        return _fail(SC_E_NULL, "counters is NULL")
    if counters.struct_size != sizeof(sc_counters):
        return _fail_struct("sc_counters", counters.struct_size, sizeof(sc_counters))
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    memcpy(counters.exits, p.mmu.stats, sizeof(sc_stats))       # the same fields in the same order: see below
    _leave(p)
    return RC_OK


assert sizeof(sc_counters) == 8 + sizeof(sc_stats)


cdef int _prices_with_gil(const char *preset, sc_prices *prices) noexcept with gil:
    try:
        return prices_of(find_costs((<bytes>preset).decode()), prices)
    except BaseException as error:
        return _fail_python(error)


cdef int _prices(const char *preset, sc_prices *prices) noexcept nogil:
    if preset == NULL or prices == NULL:
        return _fail(SC_E_NULL, "preset or prices is NULL")
    if prices.struct_size != sizeof(sc_prices):
        return _fail_struct("sc_prices", prices.struct_size, sizeof(sc_prices))
    if _with_python() != RC_OK:
        return SC_E_PYTHON
    return _prices_with_gil(preset, prices)


cdef int _set_prices(sc_vm vm, const sc_prices *prices) noexcept nogil:
    cdef sc_place *p
    cdef sc_prices copy
    if prices != NULL:
        copy = prices[0]
        prices = &copy
        if prices.struct_size != sizeof(sc_prices):
            return _fail_struct("sc_prices", prices.struct_size, sizeof(sc_prices))
        if prices.reserved or not prices_are_sane(prices):
            return _fail(SC_E_ARGUMENT, "prices->reserved is not 0, or a price is negative or no number")
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    p.priced = prices != NULL
    if prices != NULL:
        _price_lists[p - _places] = prices[0]
    _leave(p)
    return RC_OK


cdef int _cycles(sc_vm vm, double *cycles) noexcept nogil:
    cdef sc_place *p
    if cycles == NULL:
        return _fail(SC_E_NULL, "cycles is NULL")
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    cycles[0] = prices_cycles(&_price_lists[p - _places], NULL, p.mmu.stats) if p.priced else 0
    _leave(p)
    return RC_OK


cdef void _on_engine_event(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil:
    cdef sc_place *p = <sc_place *>mmu.event_context
    cdef sc_event event
    event.struct_size = sizeof(sc_event)
    event.kind = kind
    event.detail = detail
    event.vcpu = vcpu
    event.address = address
    event.vm = p.handle
    p.function(p.context, &event)


cdef int _on_event(sc_vm vm, u32 mask, sc_event_function function, void *context) noexcept nogil:
    cdef sc_place *p
    if mask >> EVENT_COUNT:
        return _fail(SC_E_ARGUMENT, "mask has bits that are no SC_EVENT_*")
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    p.function = function
    p.context = context
    p.mmu.events = mask if function != NULL else 0
    p.mmu.event = _on_engine_event
    p.mmu.event_context = p
    _leave(p)
    return RC_OK


cdef int _audit(sc_vm vm, sc_audit_result *result) noexcept nogil:
    cdef sc_place *p
    cdef engine_audit a
    if result == NULL:
        return _fail(SC_E_NULL, "result is NULL")
    if result.struct_size != sizeof(sc_audit_result):
        return _fail_struct("sc_audit_result", result.struct_size, sizeof(sc_audit_result))
    p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    audit_all(p.mmu, &a)
    memset(<u8 *>result + sizeof(u32), 0, sizeof(sc_audit_result) - sizeof(u32))
    result.violations = a.n
    result.sptes = a.sptes
    result.page = SC_NONE
    if a.n:
        result.invariant = a.found[0].invariant
        result.page = a.found[0].page
        result.index = a.found[0].index
        result.gfn = a.found[0].gfn
    _leave(p)
    return RC_OK


cdef int _save_with_gil(sc_vm vm, const char *path) noexcept with gil:
    cdef sc_place *p = _enter(vm)
    if p == NULL:
        return _refused(vm)
    try:
        # The lock keeps others out who come by handles, the GIL those who come by way of Python.
        p.mmu.mem.busy = False
        (<object>p.owner).save((<bytes>path).decode())
        return RC_OK
    except BaseException as error:
        return _fail_python(error)
    finally:
        _leave(p)


cdef int _save(sc_vm vm, const char *path) noexcept nogil:
    if path == NULL:
        return _fail(SC_E_NULL, "path is NULL")
    if _with_python() != RC_OK:
        return SC_E_PYTHON
    return _save_with_gil(vm, path)


cdef int _load_with_gil(const char *path, void *memory, u64 size, sc_vm *vm) noexcept with gil:
    try:
        return _register(VM.load((<bytes>path).decode(), None if memory == NULL else _caller_memory(memory, size)), vm)
    except ConfigError as error:
        _fail_python(error)
        return SC_E_FILE            # of a machine with another size of memory
    except BaseException as error:
        return _fail_python(error)


cdef int _load_vm(const char *path, void *memory, u64 size, sc_vm *vm) noexcept nogil:
    if vm == NULL:
        return _fail(SC_E_NULL, "vm is NULL")
    vm[0] = 0
    if path == NULL:
        return _fail(SC_E_NULL, "path is NULL")
    if <size_t>memory & 4095:
        return _fail(SC_E_ALIGNMENT, "memory does not begin at a multiple of 4096")
    if _with_python() != RC_OK:
        return SC_E_PYTHON
    return _load_with_gil(path, memory, size, vm)


cdef const char *_last_error() noexcept nogil:
    return sc_error


# The table

cdef bytes _version = __version__.encode()
cdef sc_api _api
memset(&_api, 0, sizeof(_api))
_api.abi_version = SC_ABI_VERSION
_api.struct_size = sizeof(sc_api)
_api.version = _version
_api.vm_create = _create
_api.vm_destroy = _destroy
_api.register_read = _register_read
_api.register_load = _register_load
_api.invlpg = _invlpg
_api.access = _access
_api.translate = _translate
_api.access_many = _access_many
_api.store = _store
_api.stored = _stored
_api.host_address = _host_address
_api.counters = _counters
_api.on_event = _on_event
_api.audit = _audit
_api.save = _save
_api.vm_load = _load_vm
_api.last_error = _last_error
_api.vm_adopt = _adopt
_api.prices = _prices
_api.set_prices = _set_prices
_api.cycles = _cycles
_C_API = PyCapsule_New(&_api, SC_CAPSULE, NULL)


def get_include() -> str:
    """The directory that holds shadowcore.h, for a C or C++ compiler."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "include")


def handle(vm) -> int:
    """A handle of `vm` for C code that has the table of functions; `release` gives it back."""
    cdef sc_vm number
    if not isinstance(vm, VM):
        raise ConfigError(f"vm: a VM is needed, not {type(vm).__name__}")
    _register(vm, &number)
    return number


def release(number) -> None:
    """Give a handle back; the VM lives on where Python holds it. ConfigError if there is none such, or it is in use."""
    if not isinstance(number, int) or not 0 <= number < 1 << 64 or _destroy_with_gil(number) < 0:
        raise ConfigError(f"handle: {number!r} is that of no VM, or the VM is in use")


def from_handle(number):
    """The VM of a handle. ConfigError if there is none such."""
    cdef u64 index = ((<object>number) & ((1 << INDEX_BITS) - 1)) - 1 if isinstance(number, int) and number > 0 else -1
    if index >= MAX_VMS or _places[index].handle != number:
        raise ConfigError(f"handle: {number!r} is that of no VM")
    return <object>_places[index].owner


def table_address() -> int:
    """Address of the table of functions, for a plug-in that is handed it by a foreign function interface."""
    return <size_t>&_api
