"""Replay of a recorded guest: each record becomes what a processor did, on the design under study.

Record kinds are those of shadowcore.trace. A table store goes through the guest's own mapping, so that write
protection is met as in life: through the address of the access that carried it where that was recorded, else through
the direct map. Where the guest's tables do not (yet) map the direct map, the store is made at its gpa, with the exit
and the emulation that a write-protected frame costs.
"""
import numpy as np

from libc.string cimport memcpy, memset

from shadowcore.access cimport OP_INVLPG, OP_READ, OP_WRITE, access_shortest, op_is_access, sc_op, sc_result, vcpu_op
from shadowcore.bits cimport cr0_kept
from shadowcore.emulate cimport emulate_store
from shadowcore.events cimport EXIT_EMULATE
from shadowcore.memory cimport mem_frame, mem_guest_frame, mem_mark_dirty, sc_no_frame
from shadowcore.registers cimport load_cr0, load_cr3, load_cr4
from shadowcore.state cimport count_exit, sc_mmu, sc_vcpu
from shadowcore.types cimport PF_W, RC_AUDIT, RC_BAD_OP, RC_GP, RC_OK, RC_PF, u8, u16, u32, u64
from shadowcore.vcpu cimport VCpu
from shadowcore.walker cimport probe_walk, sc_walk

cdef enum:
    LOAD_CR3 = 1
    LOAD_CR = 2
    STORE = 3
    TABLE = 4
    INVLPG = 5
    ACCESS = 6
    SNAPSHOT = 1 << 7               # flag of a STORE: a word of a table as it was when it began to serve
    ACCESS_WRITE = 1                # flags of an ACCESS
    ACCESS_USER = 2
    KEPT_MISMATCHES = 16

cdef struct sc_replay:
    const u8 *kind
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


cdef inline bint _is_store_of(const sc_replay *t, u64 access, u64 store) noexcept nogil:
    """Record `access` is the recorded form of the very store in record `store`."""
    return (store < t.length and t.kind[store] == STORE and not t.flags[store] & SNAPSHOT
            and t.kind[access] == ACCESS and t.flags[access] & (ACCESS_WRITE | ACCESS_USER) == ACCESS_WRITE
            and t.value[access] >> 3 == t.addr[store] >> 3)


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
        return access_shortest(mmu, v, &o, data, r)
    return vcpu_op(mmu, v, &o, data, r)


cdef void _store_at_gpa(sc_mmu *mmu, sc_vcpu *v, u64 gpa, const u8 *data, u32 nbytes) noexcept nogil:
    """The guest's store to `gpa` by a mapping that is not known: as seen by the MMU."""
    if mmu.shadow and mmu.frames[mem_frame(mmu.mem, gpa >> 12)].shadowed:
        mmu.stats.pf_taken += 1
        mmu.stats.pf_fixed += 1
        count_exit(mmu, v.number, EXIT_EMULATE, gpa)
        emulate_store(mmu, v, gpa, data, nbytes)
        return
    memcpy(mem_guest_frame(mmu.mem, gpa) + (gpa & 4095), data, nbytes)
    mem_mark_dirty(mmu.mem, gpa >> 12)


cdef int _store(sc_mmu *mmu, sc_vcpu *v, sc_replay *t, u64 i, sc_result *r) noexcept nogil:
    cdef sc_walk w
    cdef u64 gpa = t.addr[i]
    cdef u64 va = t.direct_map + gpa
    cdef u64 data = t.value[i] >> (8 * (gpa & 7))
    cdef u32 size = (t.flags[i] >> 4) & 7
    cdef int rc
    if size == 0:
        size = 8
    t.table_stores += 1
    if i and _is_store_of(t, i - 1, i):
        va = t.addr[i - 1] + (gpa - t.value[i - 1])
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


cdef void _table_begins(sc_mmu *mmu, sc_vcpu *v, sc_replay *t, u64 i) noexcept nogil:
    """A frame begins to serve as a table: put its contents in place, or where it is still shadowed as the table of
    an earlier life, store each word that differs."""
    cdef u64 words[512]
    cdef u64 gpa = t.addr[i]
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    cdef int n
    memset(words, 0, sizeof(words))
    i += 1
    while i < t.length and t.kind[i] == STORE and t.flags[i] & SNAPSHOT and t.addr[i] >> 12 == gpa >> 12:
        words[(t.addr[i] & 4095) >> 3] = t.value[i]
        t.snapshot_words += 1
        i += 1
    if not (mmu.shadow and mmu.frames[frame].shadowed):
        memcpy(mem_guest_frame(mmu.mem, gpa), words, sizeof(words))
        mem_mark_dirty(mmu.mem, gpa >> 12)
        return
    for n in range(512):
        _place_word(mmu, v, gpa + 8 * n, words[n])


cdef int _record(sc_mmu *mmu, sc_vcpu *v, sc_replay *t, u64 i) noexcept nogil:
    cdef sc_result r
    cdef u8 kind = t.kind[i]
    cdef u64 addr = t.addr[i]
    cdef int rc = RC_OK
    if (kind == STORE or kind == TABLE) and mem_frame(mmu.mem, addr >> 12) == sc_no_frame():
        return RC_BAD_OP            # recordings are checked when they are read; arrays may come from elsewhere
    if kind == ACCESS:
        if t.flags[i] & ACCESS_WRITE and _is_store_of(t, i, i + 1):
            return RC_OK            # done by the store itself, the next record
        t.accesses += 1
        rc = _access(mmu, v, OP_WRITE if t.flags[i] & ACCESS_WRITE else OP_READ, addr,
                     t.flags[i] & ACCESS_USER != 0, 1, 0, False, &r)
        if rc >= 0 and r.gpa != t.value[i]:
            _mismatch(t, i)
        if rc == RC_PF or rc == RC_GP:
            t.faults += 1
    elif kind == STORE:
        if t.flags[i] & SNAPSHOT:
            _place_word(mmu, v, addr, t.value[i])   # already there if the table's beginning brought it
        else:
            rc = _store(mmu, v, t, i, &r)
    elif kind == TABLE:
        _table_begins(mmu, v, t, i)
    elif kind == LOAD_CR3:
        rc = load_cr3(mmu, v, addr)
    elif kind == LOAD_CR:
        if v.cr0 != cr0_kept(addr):
            rc = load_cr0(mmu, v, addr)
        if rc == RC_OK and v.cr4 != t.value[i]:
            rc = load_cr4(mmu, v, t.value[i])
    elif kind == INVLPG:
        rc = _access(mmu, v, OP_INVLPG, addr, False, 0, 0, False, &r)
    if rc == RC_GP and kind < STORE:
        t.faults += 1
    return min(rc, RC_OK)


cdef const void *_data(dict arrays, name, dtype) except NULL:
    array = np.asarray(arrays[name])
    if (array is not arrays[name] or array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous
            or len(array) != len(arrays["kind"])):
        raise ValueError(f"{name}: a contiguous array of {dtype}, of the length of 'kind', is needed")
    return <const void *><size_t>array.ctypes.data


def replay(vm, dict arrays, start, stop, direct_map=0xFFFF888000000000):
    """Replay records [start, stop) of `arrays` (kind, flags, addr, value) on vm.vcpus[0], without the GIL.

    direct_map: linear address at which the guest maps all of its memory. Returns counts of this stretch; the
    counters of vm.stats have the rest.
    """
    cdef VCpu cpu = vm.vcpus[0]
    cdef sc_mmu *mmu = &cpu.mmu.c
    cdef sc_replay t
    cdef u64 i = start
    cdef u64 end = stop
    cdef int rc = 0
    memset(&t, 0, sizeof(t))
    t.kind = <const u8 *>_data(arrays, "kind", "u1")
    t.flags = <const u16 *>_data(arrays, "flags", "<u2")
    t.addr = <const u64 *>_data(arrays, "addr", "<u8")
    t.value = <const u64 *>_data(arrays, "value", "<u8")
    t.length = len(arrays["kind"])
    t.direct_map = direct_map
    if not i <= end <= t.length:
        raise ValueError(f"records {start} to {stop} of {t.length}")
    cpu.mmu.idle()
    cpu.mmu.c.mem.busy = True
    try:
        with nogil:
            while i < end:
                rc = _record(mmu, &cpu.c, &t, i)
                if mmu.audit_found:
                    rc = RC_AUDIT
                if rc < 0:
                    break
                t.pages_sum += mmu.n_active
                if mmu.n_active > t.pages_max:
                    t.pages_max = mmu.n_active
                i += 1
    finally:
        cpu.mmu.c.mem.busy = False
    if rc == RC_BAD_OP:
        raise ValueError(f"record {i}: gpa {t.addr[i]:#x} is in no memory slot")
    if rc < 0:
        error = cpu.mmu.failure(rc)
        error.record = i
        raise error
    return {
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
