"""VMs of the C interface: made, adopted, saved, loaded, given back. All of it is Python's work, and takes the GIL."""
import numpy as np

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.ref cimport Py_DECREF
from libc.string cimport memcpy, memset

from shadowcore._capi.handles cimport (
    enter, fail, fail_python, fail_struct, handle_new, leave, refused, sc_place, with_python,
)
from shadowcore._capi.header cimport (
    SC_ADAPTIVE, SC_AGILE, SC_AMD, SC_CACHED, SC_E_ALIGNMENT, SC_E_ARGUMENT, SC_E_FILE, SC_E_NULL, SC_E_PYTHON,
    SC_NESTED, SC_SETTING_ZERO, SC_UNSYNC, sc_config, sc_vm,
)
from shadowcore.engine.exits cimport events_tell
from shadowcore.engine.mmu cimport mmu_listen
from shadowcore.engine.types cimport RC_OK, u32, u64

from shadowcore.config import FEATURES as _FEATURES, POLICIES, TLB, USES, VENDORS as _VENDORS
from shadowcore.config import Features, MemorySlot, Quirk
from shadowcore.config import design as named_design
from shadowcore.engine.machine import VM
from shadowcore.errors import ConfigError


cdef object _caller_memory(void *memory, u64 size):
    if size > <u64>1 << 52:
        raise ConfigError(f"memory_size: {size} bytes is more than 52 address bits have")
    return np.frombuffer(PyMemoryView_FromMemory(<char *>memory, <Py_ssize_t>size, PyBUF_WRITE), dtype=np.uint8)


cdef object _setting(u32 value, none=0):
    return none if value == <u32>SC_SETTING_ZERO else value


cdef object _policy(const sc_config *c, dict settings):
    cdef u32 i
    if c.policy >= len(POLICIES) - 1:
        raise ConfigError(f"policy: {c.policy} is not 0 to {len(POLICIES) - 2}")
    if c.uses >> len(USES):
        raise ConfigError(f"uses: {c.uses:#x} has bits that are no SC_USE_*")
    if c.recycle_children > 1:
        raise ConfigError(f"recycle_children: {c.recycle_children} is not 0 or 1")
    if c.policy:
        settings["policy"] = POLICIES[c.policy]
    if c.uses:
        settings["uses"] = tuple(USES[i] for i in range(len(USES)) if c.uses >> i & 1)
    if c.recycle_children:
        settings["recycle_children"] = True
    if c.policy_seed:
        settings["policy_seed"] = c.policy_seed


cdef object _make(const sc_config *c):
    cdef u32 i
    cdef list names = ["native", "flush", "cached", "kvm-2007", "unsync", "kvm-6.1", "kvm-6.12", "nested",
                       "kvm-6.1-tdp", "kvm-6.1-direct", "agile", "adaptive"]
    cdef bint caching = SC_CACHED <= c.design < SC_NESTED or c.design == SC_ADAPTIVE
    if c.design >= len(names):
        raise ConfigError(f"design: {c.design} is not 0 to {len(names) - 1}")
    settings = {}
    for name, value in (("pool_pages", c.pool_pages), ("min_free", c.min_free), ("refill", c.refill)):
        if value:
            settings[name] = _setting(value)
    for name, value in (("prev_roots", c.prev_roots), ("prefetch", c.prefetch)):
        if value:
            if (c.design < SC_CACHED if name == "prefetch" else c.design < SC_UNSYNC or not caching):
                raise ConfigError(f"{name}: the design {names[c.design]!r} has no such setting")
            settings[name] = _setting(value)
    for name, value in (("update_in_place", c.update_in_place), ("flood_pages", c.flood_pages),
                        ("flood_forget", c.flood_forget)):
        if value:
            if not caching:
                raise ConfigError(f"{name}: the design {names[c.design]!r} has no such setting")
            if name != "flood_forget" and value > 1:
                raise ConfigError(f"{name}: {value} is not 0 or 1")
            settings[name] = value if name == "flood_forget" else True
    if c.flood_threshold and SC_NESTED <= c.design < SC_AGILE:
        raise ConfigError(f"flood_threshold: the design {names[c.design]!r} has no such setting")
    if c.flood_threshold:
        settings["flood_threshold"] = _setting(c.flood_threshold, None)
    _policy(c, settings)
    if c.quirks:
        bits = _setting(c.quirks)
        if bits & ~int(Quirk.KVM_2007 | Quirk.KVM_6_1):
            raise ConfigError(f"quirks: {bits:#x} is not a combination of members of Quirk")
        settings["quirks"] = Quirk(bits)
    if "min_free" in settings and "refill" not in settings:
        settings["refill"] = max(25, settings["min_free"])
    has = _setting(c.features) if c.features else (1 << len(_FEATURES)) - 1
    if has >> len(_FEATURES):
        raise ConfigError(f"features: {has:#x} has bits that are no SC_FEATURE_*")
    if c.vendor > SC_AMD:
        raise ConfigError(f"vendor: {c.vendor} is not SC_INTEL or SC_AMD")
    made = Features(maxphyaddr=c.maxphyaddr or 46, vendor=_VENDORS[c.vendor],
                    **{name: bool(has >> bit & 1) for bit, name in enumerate(_FEATURES)})
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
    return VM(memory, named_design(names[c.design], **settings), c.vcpus or 1, tlb, features=made, slots=slots,
              host_page_size=c.host_page_size or None)


cdef int _create_with_gil(const sc_config *config, sc_vm *vm) noexcept with gil:
    try:
        return handle_new(_make(config), vm)
    except BaseException as error:
        return fail_python(error)


cdef int api_vm_create(const sc_config *given, sc_vm *vm) noexcept nogil:
    cdef sc_config copy
    cdef const sc_config *config = &copy
    if vm == NULL:
        return fail(SC_E_NULL, "vm is NULL")
    vm[0] = 0
    if given == NULL or (given.slots == NULL and given.n_slots):
        return fail(SC_E_NULL, "config, or config->slots, is NULL")
    if given.struct_size not in (sizeof(sc_config), <size_t>&copy.prev_roots - <size_t>&copy,
                                 <size_t>&copy.vendor - <size_t>&copy, <size_t>&copy.policy - <size_t>&copy,
                                 <size_t>&copy.update_in_place - <size_t>&copy):
        return fail_struct("sc_config", given.struct_size, sizeof(sc_config))
    memset(&copy, 0, sizeof(copy))  # what an earlier caller does not know stays 0
    memcpy(&copy, given, given.struct_size)     # what is checked is what is used
    if config.reserved or config.reserved_2 or config.reserved_3 or config.reserved_4:
        return fail(SC_E_ARGUMENT, "config->reserved is not 0")
    if <size_t>config.memory & 4095:
        return fail(SC_E_ALIGNMENT, "config->memory does not begin at a multiple of 4096")
    if with_python() != RC_OK:
        return SC_E_PYTHON
    return _create_with_gil(config, vm)


cdef int _destroy_with_gil(sc_vm vm) noexcept with gil:
    cdef sc_place *p = enter(vm)
    cdef object owner
    if p == NULL:
        return refused(vm)
    owner = <object>p.owner
    if p.function != NULL:
        events_tell(p.mmu, 0, NULL, NULL)
    if p.listener != NULL:
        p.mmu.mem.busy = False      # as slots.pyx
        mmu_listen(owner.mmu, NULL, NULL)
        p.listener = NULL
    p.handle = 0
    p.owner = NULL
    leave(p)
    Py_DECREF(owner)
    return RC_OK


cdef int api_vm_destroy(sc_vm vm) noexcept nogil:
    if with_python() != RC_OK:
        return SC_E_PYTHON
    return _destroy_with_gil(vm)


cdef int _adopt_with_gil(void *object_, sc_vm *vm) noexcept with gil:
    try:
        if not isinstance(<object>object_, VM):
            raise ConfigError(f"a shadowcore.VM is needed, not {type(<object>object_).__name__}")
        return handle_new(<object>object_, vm)
    except BaseException as error:
        return fail_python(error)


cdef int api_vm_adopt(void *object_, sc_vm *vm) noexcept nogil:
    if vm == NULL or object_ == NULL:
        return fail(SC_E_NULL, "object or vm is NULL")
    vm[0] = 0
    if with_python() != RC_OK:
        return SC_E_PYTHON
    return _adopt_with_gil(object_, vm)


cdef int _save_with_gil(sc_vm vm, const char *path) noexcept with gil:
    cdef sc_place *p = enter(vm)
    if p == NULL:
        return refused(vm)
    try:
        # The lock keeps others out who come by handles, the GIL those who come by way of Python.
        p.mmu.mem.busy = False
        (<object>p.owner).save((<bytes>path).decode())
        return RC_OK
    except BaseException as error:
        return fail_python(error)
    finally:
        leave(p)


cdef int api_save(sc_vm vm, const char *path) noexcept nogil:
    if path == NULL:
        return fail(SC_E_NULL, "path is NULL")
    if with_python() != RC_OK:
        return SC_E_PYTHON
    return _save_with_gil(vm, path)


cdef int _load_with_gil(const char *path, void *memory, u64 size, sc_vm *vm) noexcept with gil:
    try:
        return handle_new(VM.load((<bytes>path).decode(), None if memory == NULL else _caller_memory(memory, size)), vm)
    except ConfigError as error:
        fail_python(error)
        return SC_E_FILE            # of a machine with another size of memory
    except BaseException as error:
        return fail_python(error)


cdef int api_vm_load(const char *path, void *memory, u64 size, sc_vm *vm) noexcept nogil:
    if vm == NULL:
        return fail(SC_E_NULL, "vm is NULL")
    vm[0] = 0
    if path == NULL:
        return fail(SC_E_NULL, "path is NULL")
    if <size_t>memory & 4095:
        return fail(SC_E_ALIGNMENT, "memory does not begin at a multiple of 4096")
    if with_python() != RC_OK:
        return SC_E_PYTHON
    return _load_with_gil(path, memory, size, vm)
