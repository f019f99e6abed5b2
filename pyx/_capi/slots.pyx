"""Memory slots of the C interface, and what the host has under guest RAM. Python's work: it takes the GIL."""
from libc.string cimport memcpy, memset

from shadowcore._capi.handles cimport enter, fail, fail_python, fail_struct, leave, refused, sc_place, with_python
from shadowcore._capi.header cimport SC_E_ARGUMENT, SC_E_NULL, SC_E_PYTHON, sc_new_slot, sc_vm
from shadowcore.engine.types cimport RC_OK, u32, u64

from shadowcore.config import MemorySlot
from shadowcore.errors import ConfigError

cdef enum:
    ADD = 0
    REMOVE = 1
    MOVE = 2
    UNMAP = 3
    TOUCH = 4
    COLLAPSE = 5

cdef struct sc_change:              # what is asked for
    int what                        # ADD, ...
    const sc_new_slot *slot
    u32 *number                     # of the slot that was added
    u64 first                       # number of the slot, or gfn
    u64 second                      # gpa, or frames
    u32 flag

cdef tuple _BACKINGS = (None, "cold", "warm", "thp")


cdef object _slot(const sc_new_slot *s):
    if s.backing >= len(_BACKINGS):
        raise ConfigError(f"backing: {s.backing} is not 0 to {len(_BACKINGS) - 1}")
    for name, value in (("dirty_log", s.dirty_log), ("read_only", s.read_only)):
        if value > 1:
            raise ConfigError(f"{name}: {value} is not 0 or 1")
    return MemorySlot(s.gpa, s.size, bool(s.dirty_log), s.host_page_size or 4096,
                      None if s.offset == ~<u64>0 else s.offset, bool(s.read_only), _BACKINGS[s.backing])


cdef int _do(vm, const sc_change *c) except -1:
    if c.what == ADD:
        c.number[0] = vm.add_slot(_slot(c.slot), slot=None if c.slot.number == ~<u32>0 else c.slot.number)
    elif c.what == REMOVE:
        vm.remove_slot(c.first)
    elif c.what == MOVE:
        vm.set_slot(c.first, gpa=c.second)
    elif c.what == UNMAP:
        vm.host_unmap(c.first, c.second, discard=bool(c.flag))
    elif c.what == TOUCH:
        vm.host_touch(c.first, c.second, write=bool(c.flag))
    else:
        vm.host_collapse(c.first, c.second)
    return 0


cdef int _with_gil(sc_vm vm, const sc_change *c) noexcept with gil:
    cdef sc_place *p = enter(vm)
    if p == NULL:
        return refused(vm)
    try:
        # The lock keeps others out who come by handles, the GIL those who come by way of Python.
        p.mmu.mem.busy = False
        _do(<object>p.owner, c)
        return RC_OK
    except BaseException as error:
        return fail_python(error)
    finally:
        leave(p)


cdef int _change(sc_vm vm, int what, u64 first, u64 second, u32 flag) noexcept nogil:
    cdef sc_change c
    memset(&c, 0, sizeof(c))
    c.what, c.first, c.second, c.flag = what, first, second, flag
    return _with_gil(vm, &c) if with_python() == RC_OK else SC_E_PYTHON


cdef int api_slot_add(sc_vm vm, const sc_new_slot *given, u32 *number) noexcept nogil:
    cdef sc_new_slot slot
    cdef sc_change c
    cdef u32 i
    if given == NULL or number == NULL:
        return fail(SC_E_NULL, "slot or number is NULL")
    if given.struct_size != sizeof(sc_new_slot):
        return fail_struct("sc_new_slot", given.struct_size, sizeof(sc_new_slot))
    memcpy(&slot, given, sizeof(slot))      # what is checked is what is used
    for i in range(<u32>sizeof(slot.reserved)):
        if slot.reserved[i]:
            return fail(SC_E_ARGUMENT, "slot->reserved is not 0")
    memset(&c, 0, sizeof(c))
    c.what, c.slot, c.number = ADD, &slot, number
    return _with_gil(vm, &c) if with_python() == RC_OK else SC_E_PYTHON


cdef int api_slot_remove(sc_vm vm, u32 number) noexcept nogil:
    return _change(vm, REMOVE, number, 0, 0)


cdef int api_slot_move(sc_vm vm, u32 number, u64 gpa) noexcept nogil:
    return _change(vm, MOVE, number, gpa, 0)


cdef int api_host_unmap(sc_vm vm, u64 gfn, u64 n, u32 discard) noexcept nogil:
    return _change(vm, UNMAP, gfn, n, discard)


cdef int api_host_touch(sc_vm vm, u64 gfn, u64 n, u32 write) noexcept nogil:
    return _change(vm, TOUCH, gfn, n, write)


cdef int api_host_collapse(sc_vm vm, u64 gfn, u64 n) noexcept nogil:
    return _change(vm, COLLAPSE, gfn, n, 0)
