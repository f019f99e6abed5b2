"""Accesses of a guest, one or many, and of the embedder to its memory."""
from libc.string cimport memcpy, memset

from shadowcore._capi.handles cimport (
    enter, fail, fail_element, fail_rc, fail_struct, leave, refused, sc_place, sc_unlikely, vcpu_of,
)
from shadowcore._capi.header cimport (
    SC_BRIEF, SC_DATA, SC_E_ARGUMENT, SC_E_NULL, SC_IMPLICIT, sc_access, sc_accesses, sc_outcome, sc_vm,
)
from shadowcore.engine.access cimport (
    OP_CMPXCHG, OP_COUNT, OP_FETCH, OP_READ, OP_WRITE, access_do, access_implicit, op_is_access, sc_op,
    sc_result,
)
from shadowcore.engine.batch cimport columns_check, columns_run, sc_columns, sc_columns_out
from shadowcore.engine.bits cimport pte_addr
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.designs.native cimport store_seen
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.emulate cimport device_store
from shadowcore.engine.memo cimport (
    KIND_USER, memo_allows, memo_context, memo_entry, memo_is, memo_mask, memo_put, memo_spill, memo_tag, sc_memo_entry,
)
from shadowcore.engine.memory cimport mem_frame, mem_frame_hpa, mem_gfn, mem_is_device, mem_is_rom, sc_mem, sc_no_frame
from shadowcore.engine.mmu cimport mmu_resolve
from shadowcore.engine.prices cimport prices_cycles, prices_translation, sc_prices
from shadowcore.engine.state cimport linear_address, linear_exists, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport (
    ACC_ALL, ACC_U, ACC_W, ACC_X, MODE_32, MODE_OFF, PF_I, PF_U, PF_W, RC_AUDIT, RC_GP, RC_MMIO, RC_OK, RC_PF, SC_NONE,
    u8, u32, u64,
)
from shadowcore.engine.walker cimport probe_walk, sc_walk, shadow_glance

cdef enum:
    # What the memo keeps in the bits of a target that a page address and the count of entries leave free.
    NOTED = 52                      # a bit: the rest is set
    NOTED_SHIFT = 53                # 2 bits: index in _shifts
    NOTED_RIGHTS = 55               # 3 bits: ACC_*
    COPY = 4096

sc_check(ACC_ALL >> (64 - NOTED_RIGHTS) == 0)

cdef int _shifts[4]
_shifts[0], _shifts[1], _shifts[2], _shifts[3] = 12, 21, 22, 30


cdef inline u32 _access_bits(const sc_access *a) noexcept nogil:
    return ((PF_U if a.user and not a.flags & SC_IMPLICIT else 0)
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
    """Any access, by the ladder that all callers share (access_do)."""
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
    rc = (access_implicit if a.flags & SC_IMPLICIT else access_do)(mmu, v, &op, (a.flags & SC_DATA) != 0, &r)
    if rc >= 0 and mmu.audit_found:
        rc = RC_AUDIT
    if rc < 0:
        return fail_rc(mmu, rc)
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
    cdef const sc_prices *prices = p.prices
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
    """A load, store or fetch in one page under `native` without a TLB, where one walk tells all; what access._one_page
    does."""
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


cdef inline sc_memo_entry *_memo_found(const sc_vcpu *v, u64 va, u64 tag) noexcept nogil:
    """The entry of the memo that has the page of `tag`."""
    cdef sc_memo_entry *e = memo_entry(v.memo, va)
    if memo_is(e, tag):
        return e
    e = memo_spill(v.memo, va)
    return e if memo_is(e, tag) else NULL


cdef int _memo_missed(sc_mmu *mmu, sc_vcpu *v, const sc_access *a, u64 va, u32 kind, sc_outcome *o) noexcept nogil:
    """A load, store or fetch in one page, under a shadow MMU, that the memo does not have."""
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
            e = _memo_found(v, va, memo_tag(va, memo_context(v.memo, mmu.memo_epoch)))
            if e != NULL:
                e.target |= hpa
            _tell(hpa, o)
        _bytes(a, host, o)
        return RC_OK
    return _slow(mmu, v, a, o)


cdef int _bad_access(const sc_access *a, const sc_outcome *o) noexcept nogil:
    if a == NULL or o == NULL:
        return fail(SC_E_NULL, "access or outcome is NULL")
    if a.struct_size != sizeof(sc_access):
        return fail_struct("sc_access", a.struct_size, sizeof(sc_access))
    if o.struct_size != sizeof(sc_outcome):
        return fail_struct("sc_outcome", o.struct_size, sizeof(sc_outcome))
    if not op_is_access(a.kind) or a.kind >= OP_COUNT:
        return fail(SC_E_ARGUMENT, "access->kind is no kind of access")
    if a.kind != OP_FETCH and (a.size == 0 or a.size & (a.size - 1) or a.size > 16
                               or (a.size == 16 and a.kind > OP_CMPXCHG)):
        return fail(SC_E_ARGUMENT, "access->size is not 1, 2, 4 or 8 (or 16, for loads, stores and CMPXCHG)")
    if a.reserved or a.flags & ~(SC_DATA | SC_BRIEF | SC_IMPLICIT) or (a.flags & SC_IMPLICIT and a.kind == OP_FETCH):
        return fail(SC_E_ARGUMENT, "access->reserved is not 0, or flags has bits that are none, or SC_IMPLICIT for a "
                    "fetch")
    return RC_OK


cdef int _implicit(sc_vm vm, const sc_access *a, sc_outcome *o) noexcept nogil:
    cdef sc_place *p = enter(vm)
    cdef sc_vcpu *v
    cdef int rc = SC_E_ARGUMENT
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, a.vcpu)
    if v != NULL and p.prices != NULL:
        rc = _priced(p, v, a, o)
    elif v != NULL:
        _nothing_yet(o)
        rc = _slow(p.mmu, v, a, o)
    leave(p)
    return rc


cdef int api_access(sc_vm vm, const sc_access *given, sc_outcome *o) noexcept nogil:
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
        if a.flags & SC_IMPLICIT:
            return _implicit(vm, a, o)
    p = enter(vm)
    if sc_unlikely(p == NULL):
        return refused(vm)
    mmu = p.mmu
    if sc_unlikely(a.vcpu >= mmu.n_vcpus):
        vcpu_of(mmu, a.vcpu)
        leave(p)
        return SC_E_ARGUMENT
    v = mmu.vcpus[a.vcpu]
    if sc_unlikely(p.prices != NULL):
        rc = _priced(p, v, a, o)
        leave(p)
        return rc
    va = linear_address(v, a.gva)
    # Under `native` and `nested`, nobody tells of stores to tables: there is no memo from one call to the next.
    if sc_unlikely(v.memo == NULL or not mmu.shadow or a.kind > OP_FETCH
                   or (va & 4095) + a.size > 4096):
        if (v.memo != NULL and not mmu.shadow and not mmu.nested and a.kind <= OP_FETCH
                and (va & 4095) + a.size <= 4096 and linear_exists(v, va)):
            rc = _native(mmu, v, a, va, o)
        else:
            _nothing_yet(o)
            rc = _slow(mmu, v, a, o)
        leave(p)
        return rc
    kind = a.kind + (KIND_USER if a.user else 0)
    context = memo_context(v.memo, mmu.memo_epoch)
    e = memo_entry(v.memo, va)
    if not memo_allows(e, va, context, memo_mask(kind)):
        e = memo_spill(v.memo, va)
        if not memo_allows(e, va, context, memo_mask(kind)):
            rc = _memo_missed(mmu, v, a, va, kind, o)
            leave(p)
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
    leave(p)
    return RC_OK


cdef int api_translate(sc_vm vm, const sc_access *a, sc_outcome *o) noexcept nogil:
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
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, a.vcpu)
    if v == NULL:
        leave(p)
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
            rc = RC_MMIO if mem_is_device(p.mmu.mem, w.gpa >> 12, _access_bits(a)) else RC_OK
            o.gpa = w.gpa
            if rc == RC_OK:
                _place_of(p.mmu.mem, w.gpa, o)
            _tell(_noted(p.mmu, v, va, _access_bits(a)), o)
    o.outcome = <u8>rc
    leave(p)
    return rc


cdef int api_access_many(sc_vm vm, sc_accesses *given) noexcept nogil:
    cdef sc_place *p
    cdef sc_columns c
    cdef sc_columns_out out
    cdef sc_accesses copy           # what is checked is what is used, wherever `given` lies
    cdef sc_accesses *a = &copy
    cdef bint data
    cdef int rc
    if given == NULL:
        return fail(SC_E_NULL, "accesses is NULL")
    if given.struct_size != sizeof(sc_accesses):
        return fail_struct("sc_accesses", given.struct_size, sizeof(sc_accesses))
    given.done = 0
    copy = given[0]
    if a.gva == NULL and a.count:
        return fail(SC_E_NULL, "accesses->gva is NULL")
    if a.reserved or a.flags & ~<u32>SC_DATA or a.count >> 48:
        return fail(SC_E_ARGUMENT, "accesses->reserved is not 0, flags has bits that are none, or count is too large")
    data = (a.flags & SC_DATA) != 0
    memset(&c, 0, sizeof(c))
    c.gva, c.gva_step = <const u8 *>a.gva, 8
    c.value, c.value_step = <const u8 *>a.value, 8
    c.op, c.op_step, c.all_op = a.kind, 1, a.all_kind
    c.size, c.size_step, c.all_size = a.size, 1, a.all_size
    c.user, c.user_step, c.all_user = a.user, 1, a.all_user
    given.done = a.done = columns_check(&c, a.count)
    if a.done < a.count:
        return fail_element(a.done)
    given.done = a.done = 0
    out.gpa, out.value, out.error_code, out.exits = a.gpa, a.loaded, a.error_code, a.exits
    out.outcome, out.emulated = a.outcome, a.emulated
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    if vcpu_of(p.mmu, a.vcpu) == NULL:
        leave(p)
        return SC_E_ARGUMENT
    rc = columns_run(p.mmu, a.vcpu, &c, a.count, data, &out, NULL, &a.done)
    given.done = a.done
    if rc < 0:
        rc = fail_rc(p.mmu, rc)
    leave(p)
    return rc


# Guest memory

cdef int _outside(const sc_mem *m, u64 gpa, u64 size, bint store) noexcept nogil:
    """Not all of it lies in memory slots; store: in such that may be written."""
    cdef u64 gfn
    if gpa >> 52 or size > (<u64>1 << 52) - gpa:
        return fail(SC_E_ARGUMENT, "gpa, size: beyond 52 address bits")
    if size == 0:
        return RC_OK
    for gfn in range(gpa >> 12, (gpa + size - 1 >> 12) + 1):
        if mem_frame(m, gfn) == sc_no_frame():
            return fail(SC_E_ARGUMENT, "gpa, size: not all of it lies in memory slots")
        if store and mem_is_rom(m, gfn):
            return fail(SC_E_ARGUMENT, "gpa, size: not all of it lies in memory slots that may be written")
    return RC_OK


cdef int _device(sc_vm vm, u64 gpa, const u8 *data, u64 size, bint there) noexcept nogil:
    cdef sc_place *p = enter(vm)
    cdef u8 copy[COPY]
    cdef sc_outcome o
    cdef u32 part
    cdef int rc
    if p == NULL:
        return refused(vm)
    rc = _outside(p.mmu.mem, gpa, size, not there)
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
            rc = fail_rc(p.mmu, RC_AUDIT)
    leave(p)
    return rc


cdef int api_store(sc_vm vm, u64 gpa, const void *data, u64 size) noexcept nogil:
    if data == NULL and size:
        return fail(SC_E_NULL, "data is NULL")
    return _device(vm, gpa, <const u8 *>data, size, False)


cdef int api_stored(sc_vm vm, u64 gpa, u64 size) noexcept nogil:
    return _device(vm, gpa, NULL, size, True)


cdef int api_host_address(sc_vm vm, u64 gpa, void **host) noexcept nogil:
    cdef sc_place *p
    cdef sc_outcome o
    cdef int rc = RC_MMIO
    if host == NULL:
        return fail(SC_E_NULL, "host is NULL")
    host[0] = NULL
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    if mem_frame(p.mmu.mem, gpa >> 12) != sc_no_frame():
        _place_of(p.mmu.mem, gpa, &o)
        host[0] = o.host
        rc = RC_OK
    leave(p)
    return rc
