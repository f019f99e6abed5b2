"""Guests' page tables of the C interface, as pagetables.PageTables builds them. Python's work: it takes the GIL.

Between calls nothing is kept here: what tables there are, the guest's memory says, and the caller's sc_tables which
frames are left for more.
"""
from libc.string cimport memcpy, memset

from shadowcore._capi.handles cimport enter, fail, fail_python, fail_struct, leave, refused, sc_place, with_python
from shadowcore._capi.header cimport (
    SC_ANY_LEVEL, SC_E_ARGUMENT, SC_E_NULL, SC_E_PYTHON, sc_entry, sc_mapping, sc_tables, sc_vm,
)
from shadowcore.engine.types cimport ACC_ALL, ACC_U, ACC_W, ACC_X, RC_GP, RC_OK, u32, u64

from shadowcore.errors import ConfigError, GeneralProtection
from shadowcore.pagetables import PageTables

cdef enum:
    MAP = 0
    UNMAP = 1
    PROTECT = 2
    FIND = 3
    ACTIVATE = 4

cdef struct sc_work:                # what is asked for
    int what                        # MAP, ...
    sc_tables tables                # a copy of the caller's, which is as it is afterwards
    sc_mapping mapping
    sc_entry *entry                 # FIND: where it goes
    u32 vcpu                        # ACTIVATE

cdef dict _MODES = {2: "32", 3: "pae", 4: "64", 5: "la57"}


cdef object _opened(vm, const sc_tables *t):
    if t.mode not in _MODES:
        raise ConfigError(f"tables.mode: {t.mode} is not one of SC_TABLES_*")
    if t.frames >> 40 or t.next_gfn >> 40:
        raise ConfigError(f"tables.frames: {t.frames:#x} from gfn {t.next_gfn:#x} on are beyond 52 address bits")
    return PageTables(vm, _MODES[t.mode], allocate=range(t.next_gfn, t.next_gfn + t.frames), root=t.root or None)


cdef object _rights(const sc_mapping *m):
    if m.bits:
        if m.rights:
            raise ConfigError("mapping.rights: `bits` say all, rights must be 0")
        return m.bits
    if m.rights & ~<u32>ACC_ALL:
        raise ConfigError(f"mapping.rights: {m.rights:#x} has bits that are no SC_RIGHT_*")
    return ("r" + ("w" if m.rights & ACC_W else "") + ("x" if m.rights & ACC_X else "")
            + ("u" if m.rights & ACC_U else ""))


cdef int _do(vm, sc_work *c) except -1:
    cdef const sc_mapping *m = &c.mapping
    if c.what != MAP and not c.tables.root:
        raise ConfigError("tables.root: there are none yet, tables_map makes them")
    tables = _opened(vm, &c.tables)
    if c.what == MAP:
        for name, value in (("global", m.global_), ("accessed", m.accessed), ("dirty", m.dirty)):
            if value > 1:
                raise ConfigError(f"mapping.{name}: {value} is not 0 or 1")
        tables.map(m.gva, m.gpa, m.size, _rights(m), m.page_size or "auto", global_=bool(m.global_), pkey=m.pkey,
                   accessed=bool(m.accessed), dirty=bool(m.dirty))
    elif c.what == UNMAP:
        tables.unmap(m.gva, m.size)
    elif c.what == PROTECT:
        tables.protect(m.gva, m.size, _rights(m))
    elif c.what == FIND:
        found = tables.walk(m.gva).pop() if c.entry.level == SC_ANY_LEVEL else tables.entry(m.gva, c.entry.level)
        c.entry.level, c.entry.gpa, c.entry.value = found.level, found.gpa, found.value
    else:
        if c.vcpu >= <u32>len(vm.vcpus):
            raise ConfigError(f"vcpu: there is no number {c.vcpu}, the VM has {len(vm.vcpus)}")
        tables.activate(vm.vcpus[c.vcpu])
    c.tables.root = tables.root
    c.tables.next_gfn += len(tables.tables)
    c.tables.frames -= len(tables.tables)
    return 0


cdef int _with_gil(sc_vm vm, sc_work *c) noexcept with gil:
    cdef sc_place *p = enter(vm)
    if p == NULL:
        return refused(vm)
    try:
        # The lock keeps others out who come by handles, the GIL those who come by way of Python.
        p.mmu.mem.busy = False
        _do(<object>p.owner, c)
        return RC_OK
    except GeneralProtection:
        return RC_GP
    except BaseException as error:
        return fail_python(error)
    finally:
        leave(p)


cdef int _work(sc_vm vm, const sc_tables *tables, sc_work *c) noexcept nogil:
    """Do it, with a copy of the caller's tables: what is checked is what is used."""
    if tables == NULL:
        return fail(SC_E_NULL, "tables is NULL")
    if tables.struct_size != sizeof(sc_tables):
        return fail_struct("sc_tables", tables.struct_size, sizeof(sc_tables))
    memcpy(&c.tables, tables, sizeof(sc_tables))
    return _with_gil(vm, c) if with_python() == RC_OK else SC_E_PYTHON


cdef int _changed(sc_vm vm, sc_tables *tables, sc_work *c) noexcept nogil:
    cdef int rc = _work(vm, tables, c)
    if rc == RC_OK:
        memcpy(tables, &c.tables, sizeof(sc_tables))
    return rc


cdef int _by_mapping(sc_vm vm, sc_tables *tables, const sc_mapping *mapping, int what) noexcept nogil:
    cdef sc_work c
    cdef u32 i
    if mapping == NULL:
        return fail(SC_E_NULL, "mapping is NULL")
    if mapping.struct_size != sizeof(sc_mapping):
        return fail_struct("sc_mapping", mapping.struct_size, sizeof(sc_mapping))
    memset(&c, 0, sizeof(c))
    c.what = what
    memcpy(&c.mapping, mapping, sizeof(sc_mapping))
    for i in range(<u32>sizeof(c.mapping.reserved)):
        if c.mapping.reserved[i]:
            return fail(SC_E_ARGUMENT, "mapping->reserved is not 0")
    return _changed(vm, tables, &c)


cdef int api_tables_map(sc_vm vm, sc_tables *tables, const sc_mapping *mapping) noexcept nogil:
    return _by_mapping(vm, tables, mapping, MAP)


cdef int api_tables_protect(sc_vm vm, sc_tables *tables, const sc_mapping *mapping) noexcept nogil:
    return _by_mapping(vm, tables, mapping, PROTECT)


cdef int api_tables_unmap(sc_vm vm, sc_tables *tables, u64 gva, u64 size) noexcept nogil:
    cdef sc_work c
    memset(&c, 0, sizeof(c))
    c.what, c.mapping.gva, c.mapping.size = UNMAP, gva, size
    return _changed(vm, tables, &c)


cdef int api_tables_entry(sc_vm vm, const sc_tables *tables, u64 gva, sc_entry *entry) noexcept nogil:
    cdef sc_work c
    cdef sc_entry found
    cdef int rc
    if entry == NULL:
        return fail(SC_E_NULL, "entry is NULL")
    if entry.struct_size != sizeof(sc_entry):
        return fail_struct("sc_entry", entry.struct_size, sizeof(sc_entry))
    memcpy(&found, entry, sizeof(found))
    memset(&c, 0, sizeof(c))
    c.what, c.mapping.gva, c.entry = FIND, gva, &found
    rc = _work(vm, tables, &c)
    if rc == RC_OK:
        memcpy(entry, &found, sizeof(found))
    return rc


cdef int api_tables_activate(sc_vm vm, u32 vcpu, const sc_tables *tables) noexcept nogil:
    cdef sc_work c
    memset(&c, 0, sizeof(c))
    c.what, c.vcpu = ACTIVATE, vcpu
    return _work(vm, tables, &c)
