"""Replay of a recorded guest: each record becomes what a processor did, on the design under study.

Record kinds are those of shadowcore.recording.kinds. A table store goes through the guest's own mapping, so that write
protection is met as in life: through the address of the access that carried it where that was recorded, else through
the direct map. Where the guest's tables do not (yet) map the direct map, the store is made at its gpa, with the exit
and the emulation that a write-protected frame costs.
"""
import numpy as np

from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport (
    OP_FETCH, OP_INVLPG, OP_INVPCID, OP_READ, OP_WRITE, access_do, op_is_access, sc_op, sc_result, vcpu_op,
)
from shadowcore.engine.bits cimport cr0_kept
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_WRITE
from shadowcore.engine.emulate cimport emulate_store
from shadowcore.engine.exits cimport exits_next
from shadowcore.engine.held cimport Held
from shadowcore.engine.leaf cimport fault_count, sc_fault
from shadowcore.engine.memory cimport mem_frame, mem_guest_frame, mem_mark_dirty, sc_no_frame
from shadowcore.engine.registers cimport load_cr0, load_cr3, load_cr4, load_efer
from shadowcore.engine.state cimport SC_MAX_VCPUS, is_shadowed, sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport table_let_go
from shadowcore.engine.types cimport PF_W, RC_AUDIT, RC_BAD_OP, RC_GP, RC_OK, RC_PF, u8, u16, u32, u64
from shadowcore.engine.vcpu cimport VCpu
from shadowcore.engine.walker cimport probe_walk, sc_walk
from shadowcore.engine.watch cimport watch_due, watch_error

_U1, _U2, _U8 = np.dtype("u1"), np.dtype("<u2"), np.dtype("<u8")

cdef enum:
    LOAD_CR3 = 1
    LOAD_CR = 2
    STORE = 3
    TABLE = 4
    INVLPG = 5
    ACCESS = 6
    LOAD_EFER = 8
    INVPCID = 9
    SNAPSHOT = 1 << 7               # flag of a STORE: a word of a table as it was when it began to serve
    ACCESS_WRITE = 1                # flags of an ACCESS
    ACCESS_USER = 2
    ACCESS_FETCH = 4
    ACCESS_SIZE_SHIFT = 4           # bits 4-7: log2 of its bytes, plus 1
    KEPT_MISMATCHES = 16
    SLICE = 1 << 8                  # records between two looks at the clock

cdef struct sc_record:              # of the arrays, which may change meanwhile: read once, judged, and used from here
    u64 number
    u8 kind
    u8 vcpu
    u16 flags
    u64 addr
    u64 value

cdef struct sc_replay:
    const u8 *kind
    const u8 *vcpu
    const u16 *flags
    const u64 *addr
    const u64 *value
    u64 length                      # records in the arrays
    u64 direct_map                  # linear address of gpa 0 in the guest's direct map
    u64 accesses
    u64 table_stores
    u64 snapshot_words
    u64 physical_stores
    u64 faults
    u64 gpa_mismatches
    u64 pages_sum
    u64 pages_max
    u64 mismatch[KEPT_MISMATCHES]


cdef inline sc_record _read(const sc_replay *t, u64 i) noexcept nogil:
    cdef sc_record e
    e.number = i
    e.kind = t.kind[i]
    e.vcpu = t.vcpu[i]
    e.flags = t.flags[i]
    e.addr = t.addr[i]
    e.value = t.value[i]
    return e


cdef inline bint _is_store_of(const sc_record *access, const sc_record *store) noexcept nogil:
    """Record `access` is the recorded form of the very store in record `store`."""
    return (store.kind == STORE and not store.flags & SNAPSHOT
            and access.kind == ACCESS and access.flags & (ACCESS_WRITE | ACCESS_USER) == ACCESS_WRITE
            and access.vcpu == store.vcpu and access.value >> 3 == store.addr >> 3)


cdef void _mismatch(sc_replay *t, u64 record) noexcept nogil:
    if t.gpa_mismatches < KEPT_MISMATCHES:
        t.mismatch[t.gpa_mismatches] = record
    t.gpa_mismatches += 1


cdef int _access(sc_mmu *mmu, sc_vcpu *v, u32 op, u64 va, bint user, u32 size, u64 value, bint data,
                 sc_result *r) noexcept nogil:
    cdef sc_op o
    memset(&o, 0, sizeof(o))
    o.op = op
    o.user = user
    o.size = size
    o.addr = va
    o.value[0] = value
    if op_is_access(op):
        return access_do(mmu, v, &o, data, r)
    return vcpu_op(mmu, v, &o, data, r)


cdef void _store_at_gpa(sc_mmu *mmu, sc_vcpu *v, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil:
    """The guest's store to `gpa` by a mapping that is not known: as seen by the MMU."""
    cdef sc_fault f
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    cdef u64 changed = mmu.stats.unsync_made + mmu.stats.mmu_shadow_zapped
    cdef bint shadowed = is_shadowed(mmu, frame)
    cdef bint native = shadowed and mmu.lists_all and table_let_go(mmu, gpa >> 12, frame)
    if shadowed and not (native and mmu.stats.unsync_made + mmu.stats.mmu_shadow_zapped == changed):
        memset(&f, 0, sizeof(f))
        f.va = gpa
        f.mode = v.guest.mode
        f.kind = EXIT_WRITE if native else EXIT_EMULATE
        f.changed = native
        fault_count(mmu, v, &f)
    if shadowed and not native:
        if mmu.lists_all:           # it leaves that count to the fault
            mmu.stats.pf_emulate += 1
        emulate_store(mmu, v, gpa, data, nbytes)
        return
    memcpy(mem_guest_frame(mmu.mem, gpa) + (gpa & 4095), data, nbytes)
    mem_mark_dirty(mmu.mem, gpa >> 12)


cdef int _store(sc_mmu *mmu, sc_vcpu *v, sc_replay *t, const sc_record *e, sc_result *r) noexcept nogil:
    cdef sc_walk w
    cdef sc_record before
    cdef u64 gpa = e.addr
    cdef u64 va = t.direct_map + gpa
    cdef u64 data = e.value >> (8 * (gpa & 7))
    cdef u32 size = (e.flags >> 4) & 7
    cdef int rc
    if size == 0:
        size = 8
    if (gpa & 4095) + size > 4096:
        return RC_BAD_OP
    t.table_stores += 1
    if e.number:
        before = _read(t, e.number - 1)
        if _is_store_of(&before, e):
            va = before.addr + (gpa - before.value)
    if probe_walk(mmu.mem, &v.guest, va, PF_W, &w) == RC_OK and w.gpa == gpa:
        rc = _access(mmu, v, OP_WRITE, va, False, size, data, True, r)
        if rc == RC_OK and r.gpa == gpa:
            return rc
        if rc < 0:
            return rc
    t.physical_stores += 1
    _store_at_gpa(mmu, v, gpa, <u8 *>&data, size)
    return RC_OK


cdef void _place_word(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u64 value) noexcept nogil:
    """A word that got its value by stores that were not recorded."""
    cdef u64 *at = <u64 *>(mem_guest_frame(mmu.mem, gpa) + (gpa & 4088))
    if at[0] != value:
        _store_at_gpa(mmu, v, gpa & ~<u64>7, <u8 *>&value, 8)


cdef void _table_begins(sc_mmu *mmu, sc_vcpu *v, sc_replay *t, const sc_record *e) noexcept nogil:
    """A frame begins to serve as a table: put its contents in place, or where it is still shadowed as the table of
    an earlier life, store each word that differs."""
    cdef u64 words[512]
    cdef sc_record word
    cdef u64 gpa = e.addr & ~<u64>4095
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    cdef u64 i = e.number + 1
    cdef int n
    memset(words, 0, sizeof(words))
    while i < t.length:
        word = _read(t, i)
        if word.kind != STORE or not word.flags & SNAPSHOT or word.addr >> 12 != gpa >> 12:
            break
        words[(word.addr & 4095) >> 3] = word.value
        t.snapshot_words += 1
        i += 1
    if not is_shadowed(mmu, frame):
        memcpy(mem_guest_frame(mmu.mem, gpa), words, sizeof(words))
        mem_mark_dirty(mmu.mem, gpa >> 12)
        return
    for n in range(512):
        _place_word(mmu, v, gpa + 8 * n, words[n])


cdef inline u32 _size(const sc_record *e) noexcept nogil:
    """Bytes of an access within its page, as far as one access of the engine goes."""
    cdef u32 size = 1 << min(((e.flags >> ACCESS_SIZE_SHIFT) & 15) - 1, 3) if (e.flags >> ACCESS_SIZE_SHIFT) & 15 else 1
    return size if (e.addr & 4095) + size <= 4096 else 1


cdef int _record(sc_mmu *mmu, sc_vcpu **vcpus, u64 count, sc_replay *t, u64 i) noexcept nogil:
    cdef sc_result r
    cdef sc_vcpu *v
    cdef sc_record e = _read(t, i)
    cdef sc_record store
    cdef u8 kind = e.kind
    cdef u64 addr = e.addr
    cdef int rc = RC_OK
    if e.vcpu >= count:
        return RC_BAD_OP
    v = vcpus[e.vcpu]
    if (kind == STORE or kind == TABLE) and mem_frame(mmu.mem, addr >> 12) == sc_no_frame():
        return RC_BAD_OP            # recordings are checked when they are read; arrays may come from elsewhere
    if kind == ACCESS:
        if e.flags & ACCESS_WRITE and i + 1 < t.length:
            store = _read(t, i + 1)
            if _is_store_of(&e, &store):
                return RC_OK        # done by the store itself, the next record
        t.accesses += 1
        rc = _access(mmu, v, OP_WRITE if e.flags & ACCESS_WRITE else OP_FETCH if e.flags & ACCESS_FETCH else OP_READ,
                     addr, e.flags & ACCESS_USER != 0, _size(&e), 0, False, &r)
        if rc >= 0 and r.gpa != e.value:
            _mismatch(t, i)
        if rc == RC_PF or rc == RC_GP:
            t.faults += 1
    elif kind == STORE:
        if e.flags & SNAPSHOT:
            _place_word(mmu, v, addr, e.value)      # already there if the table's beginning brought it
        else:
            rc = _store(mmu, v, t, &e, &r)
    elif kind == TABLE:
        _table_begins(mmu, v, t, &e)
    elif kind == LOAD_CR3:
        rc = load_cr3(mmu, v, addr)
    elif kind == LOAD_CR:
        if v.cr0 != cr0_kept(addr):
            rc = load_cr0(mmu, v, addr)
        if rc == RC_OK and v.cr4 != e.value:
            rc = load_cr4(mmu, v, e.value)
    elif kind == INVLPG:
        rc = _access(mmu, v, OP_INVLPG, addr, False, 0, 0, False, &r)
    elif kind == LOAD_EFER:
        rc = load_efer(mmu, v, addr)
    elif kind == INVPCID:
        rc = _access(mmu, v, OP_INVPCID, addr, False, e.flags & 3, e.value, False, &r)
    if rc == RC_GP and (kind < STORE or kind == LOAD_EFER):
        t.faults += 1
    return min(rc, RC_OK)


cdef Held _column(array, name, dtype, Py_ssize_t length):
    """The array, held; length: that it has to have, -1: any."""
    cdef Held held
    given, array = array, np.asarray(array)
    if array is not given or array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name}: a contiguous array of {dtype}, of the length of 'kind', is needed")
    held = Held.__new__(Held, array)
    if held.view.ndim != 1 or held.view.itemsize != dtype.itemsize or length not in (-1, held.view.shape[0]):
        raise ValueError(f"{name}: a contiguous array of {dtype}, of the length of 'kind', is needed")
    return held


def replay(vm, dict arrays, start, stop, direct_map=0xFFFF888000000000):
    """Replay records [start, stop) of `arrays` (kind, flags, addr, value, and vcpu where it is not 0 in all records) on
    the processors of vm, without the GIL.

    direct_map: linear address at which the guest maps all of its memory. Returns counts of this stretch; the
    counters of vm.stats have the rest. What a signal's handler raises ends it between two records: the error has
    `.record`, the next one, and `.result`, the counts; Ctrl-C is Interrupted.
    """
    cdef VCpu cpu
    cdef list cpus = list(vm.vcpus)
    cdef sc_vcpu *vcpus[SC_MAX_VCPUS]
    cdef u64 count = len(cpus)
    cdef u64 i
    cdef u64 end = stop
    cdef sc_replay t
    cdef sc_mmu *mmu
    for i in range(count):
        cpu = cpus[i]
        vcpus[i] = cpu.c
    cpu = cpus[0]
    mmu = cpu.mmu.c
    i = start
    cdef int rc = 0
    memset(&t, 0, sizeof(t))
    cdef Held kind = _column(arrays["kind"], "kind", _U1, -1)
    t.length = kind.view.shape[0]
    cdef Held flags = _column(arrays["flags"], "flags", _U2, t.length)
    cdef Held addr = _column(arrays["addr"], "addr", _U8, t.length)
    cdef Held value = _column(arrays["value"], "value", _U8, t.length)
    cdef Held vcpu = _column(arrays.get("vcpu", np.zeros(t.length, _U1)), "vcpu", _U1, t.length)
    t.kind = <const u8 *>kind.view.buf
    t.vcpu = <const u8 *>vcpu.view.buf
    t.flags = <const u16 *>flags.view.buf
    t.addr = <const u64 *>addr.view.buf
    t.value = <const u64 *>value.view.buf
    t.direct_map = direct_map
    if not i <= end <= t.length:
        raise ValueError(f"records {start} to {stop} of {t.length}")
    cpu.mmu.idle()
    error = None
    cpu.mmu.enter()
    try:
        while i < end and rc >= 0 and error is None:
            with nogil:
                while i < end:
                    rc = _record(mmu, vcpus, count, &t, i)
                    exits_next(mmu)
                    if mmu.audit_found:
                        rc = RC_AUDIT
                    if rc < 0:
                        break
                    t.pages_sum += mmu.n_active
                    if mmu.n_active > t.pages_max:
                        t.pages_max = mmu.n_active
                    i += 1
                    if i % SLICE == 0 and watch_due(mmu.watch):
                        break
            if rc >= 0 and i < end:
                error = cpu.mmu.stopped()
    finally:
        cpu.mmu.leave()
    counts = {
        "records": i - <u64>start,
        "accesses": t.accesses,
        "table_stores": t.table_stores,
        "snapshot_words": t.snapshot_words,
        "physical_stores": t.physical_stores,
        "faults": t.faults,
        "gpa_mismatches": t.gpa_mismatches,
        "mismatch_records": [t.mismatch[n] for n in range(min(t.gpa_mismatches, KEPT_MISMATCHES))],
        "pages_sum": t.pages_sum,
        "pages_max": t.pages_max,
    }
    if rc == RC_BAD_OP:
        if t.vcpu[i] >= count:
            raise ValueError(f"record {i}: there is no processor {t.vcpu[i]}")
        raise ValueError(f"record {i}: gpa {t.addr[i]:#x} is in no memory slot, or too near to the end of its page")
    if rc < 0:
        error = cpu.mmu.failure(rc)
    if error is None:
        return counts
    error = watch_error(error, counts)
    try:
        error.record = i
    except Exception:               # an exception that takes no attributes
        pass
    raise error
