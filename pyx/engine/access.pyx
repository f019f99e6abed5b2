"""One operation of a vcpu, start to end: resolve every page it touches, then move the bytes.

Past 500 lines, for its ways, the short ones and the general one, are read side by side.
"""
from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport (
    OP_AC, OP_ADD, OP_AND, OP_CMPXCHG, OP_CR0, OP_CR3, OP_CR4, OP_EFER, OP_FETCH, OP_INVLPG, OP_INVPCID, OP_OR,
    OP_PKRU, OP_READ, OP_WRITE, OP_XCHG, access_bits, access_bytes, in_one_page, op_is_rmw, sc_op, sc_result,
)
from shadowcore.engine.bits cimport EFER_TCE
from shadowcore.engine.counters cimport EXIT_INVLPG
from shadowcore.engine.design cimport design_enter, design_exit, design_invlpg
from shadowcore.engine.designs.native cimport store_seen
from shadowcore.engine.emulate cimport emulate_store, walk_updated
from shadowcore.engine.flushes cimport FLUSH_INVLPG, flush_lost
from shadowcore.engine.invalidate cimport inject_fault, invalidate_pcid
from shadowcore.engine.memory cimport (
    mem_frame, mem_gfn, mem_guest_frame, mem_is_device, mem_mark_dirty, mem_touch, sc_no_frame,
)
from shadowcore.engine.references cimport walk_ended
from shadowcore.engine.registers cimport (
    ac_put, load_ac, load_cr0, load_cr3, load_cr4, load_efer, load_pkru, load_refused,
)
from shadowcore.engine.resolve cimport resolve
from shadowcore.engine.state cimport (
    FAST_CODE, FAST_MENDED, FAST_REFLECTED, FAST_UPDATED, is_shadowed, linear_address, linear_exists, sc_mmu, sc_vcpu,
    vcpu_pcid,
)
from shadowcore.engine.tlb cimport tlb_flush_caches, tlb_flush_page
from shadowcore.engine.types cimport (
    MODE_64, PF_I, PF_U, PF_W, RC_BAD_OP, RC_EMULATE, RC_GP, RC_HOOK, RC_MMIO, RC_OK, RC_PF, RC_RETRY, RC_UNGRANTED,
    RC_UNHANDLED, u8, u32, u64,
)
from shadowcore.engine.walker cimport guest_glance, guest_walk, nested_glance, probe_walk, sc_walk, shadow_glance

cdef struct sc_part:                # the bytes of an access that lie in one page
    u64 va
    u64 gpa
    u32 nbytes
    bint table                      # its frame is a shadowed guest table
    bint emulate                    # a store here has to go through the emulator: for that, or as no leaf can grant it


cdef inline void _modify(u32 op, u64 *now, const sc_op *o, u32 size) noexcept nogil:
    """What a read-modify-write puts in the place of `now` (only the low `size` bytes count)."""
    cdef u64 mask = ~<u64>0 if size >= 8 else (<u64>1 << (8 * size)) - 1
    if op == OP_CMPXCHG:
        # On a mismatch the old value is written back: the destination is always stored to (SDM vol. 2).
        if (now[0] ^ o.expected[0]) & mask == 0 and (size < 16 or now[1] == o.expected[1]):
            now[0] = o.value[0]
            now[1] = o.value[1]
    elif op == OP_XCHG:
        now[0] = o.value[0]
        now[1] = o.value[1]
    elif op == OP_ADD:
        now[0] += o.value[0]
    elif op == OP_AND:
        now[0] &= o.value[0]
    elif op == OP_OR:
        now[0] |= o.value[0]
    else:
        now[0] ^= o.value[0]


cdef inline bint _is_table(const sc_mmu *mmu, u64 gpa) noexcept nogil:
    return is_shadowed(mmu, mem_frame(mmu.mem, gpa >> 12))


cdef void _store(sc_mmu *mmu, sc_vcpu *v, const sc_part *part, const u8 *bytes, bint data, sc_result *r) noexcept nogil:
    if part.emulate:
        emulate_store(mmu, v, part.gpa, bytes, part.nbytes)
        r.emulated += 1
        return
    if data:
        memcpy(mem_guest_frame(mmu.mem, part.gpa) + (part.gpa & 4095), bytes, part.nbytes)
    if mmu.shadow:
        mem_mark_dirty(mmu.mem, part.gpa >> 12)     # a page that was a table until now had no W granted, which logs it
    else:
        store_seen(mmu, part.gpa)


cdef inline void _look_again(const sc_mmu *mmu, sc_part *part) noexcept nogil:
    """What is done for other parts of a store may make the part's frame a guest table, or end that."""
    cdef bint table = _is_table(mmu, part.gpa)
    if table != part.table:
        part.table = part.emulate = table


cdef int _said(sc_mmu *mmu, const sc_vcpu *v, u64 va, u32 access) noexcept nogil:
    """What the guest's tables say of an access, without side effect: RC_OK, RC_PF or RC_MMIO."""
    cdef sc_walk w
    if probe_walk(mmu.mem, &v.guest, va, access, &w) != RC_OK:
        return RC_PF
    return RC_MMIO if mem_is_device(mmu.mem, w.gpa >> 12, access) else RC_OK


cdef int _walk_only(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil:
    """A page of RAM beside a device: the embedder makes the store, and here the guest's tables get A and D alone. No
    leaf is granted, so that the page is in no dirty log before something was stored to it."""
    cdef int rc = guest_walk(mmu.mem, &v.guest, va, access, w)
    mmu.stats.accesses += 1
    if mmu.shadow:
        mmu.stats.guest_walk_references += w.references
        walk_updated(mmu, v, w)
    else:
        mmu.stats.walk_references += w.references
        if mmu.walks != NULL and not mmu.nested:
            walk_ended(mmu, v, va, access, w, False)
    if rc == RC_PF:
        v.cr2 = va
        mmu.stats.pf_guest += 1
    return rc


cdef int _resolve(sc_mmu *mmu, sc_vcpu *v, u32 access, sc_part *parts, int n, sc_result *r) noexcept nogil:
    """Resolve each page; RC_OK when all lead to RAM. A fault on the second comes before a device at the first."""
    cdef sc_walk w
    cdef int i, k, rc
    cdef int device = RC_OK
    cdef int first = 0
    cdef int said[2]
    said[0] = said[1] = RC_OK
    if n == 2 and access & PF_W:
        # A page that cannot be stored to comes first: the store then leaves no trace at the other (a fault), or no
        # more than A and D (a device). A TLB may know better than the tables, so each page is asked for all the same.
        said[0] = _said(mmu, v, parts[0].va, access)
        said[1] = _said(mmu, v, parts[1].va, access)
        first = said[1] == RC_PF and said[0] != RC_PF or said[1] == RC_MMIO and said[0] == RC_OK
    for k in range(n):
        i = k ^ first
        if device != RC_OK and access & PF_W and said[i] == RC_OK:
            rc = _walk_only(mmu, v, parts[i].va, access, &w)
        else:
            rc = resolve(mmu, v, parts[i].va, access, &w)
        parts[i].gpa = w.gpa
        if rc == RC_OK or rc == RC_EMULATE:
            parts[i].table = _is_table(mmu, w.gpa)
            parts[i].emulate = rc == RC_EMULATE and access & PF_W
        elif rc == RC_MMIO:
            if device == RC_OK or i == 0:
                r.gpa = w.gpa
            device = RC_MMIO
        else:
            r.error_code = w.error_code if rc == RC_PF else 0
            r.gpa = <u64>-1
            return rc
    if device == RC_OK:
        for i in range(n):
            _look_again(mmu, &parts[i])
    return device


cdef inline bint _writes_tables(const sc_vcpu *v, const sc_op *o) noexcept nogil:
    """The instruction is one by which page tables are written: MOV, XCHG, CMPXCHG, AND, OR, of at most 8 bytes; others
    show that the frame is something else by now (KVM's decoder marks the same)."""
    return not v.odd_stores and o.size <= 8 and o.op != OP_ADD and o.op != OP_XOR


cdef int _ask_embedder(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, u32 access, sc_part *parts, int n,
                       sc_result *r) noexcept nogil:
    """Ask whether each store that needs emulation can have it. Where not, unprotect the table, so that the access can
    be made natively (patch 14), and resolve anew; RC_UNHANDLED where that leads back to a protected table (a root in
    use, a table that maps itself), RC_UNGRANTED where it is no table that makes emulation necessary."""
    cdef int i, answer
    cdef int rc = RC_OK
    cdef int refusals = 0
    cdef bint again
    while rc == RC_OK:
        again = False
        for i in range(n):
            if not parts[i].emulate:
                continue
            answer = True
            if mmu.can_emulate != NULL:
                answer = mmu.can_emulate(mmu.hook, parts[i].va, parts[i].gpa, parts[i].nbytes)
            if answer < 0:
                return RC_HOOK
            if answer > 1 and parts[i].table:
                mmu.design.unprotect(mmu, parts[i].gpa >> 12)
            if (answer and mmu.design.run_again != NULL and parts[i].table and not _writes_tables(v, o)
                    and refusals < 2 * n):
                again = mmu.design.run_again(mmu, v, parts[i].va, parts[i].gpa)
            if again or answer == 0:
                break
        else:
            return RC_OK
        refusals += 1
        if again:                   # natively
            if v.restarts:
                return RC_RETRY
        else:
            if not parts[i].table:
                return RC_UNGRANTED
            mmu.design.unprotect(mmu, parts[i].gpa >> 12)
            if _is_table(mmu, parts[i].gpa) or refusals > 2 * n:
                return RC_UNHANDLED
        rc = _resolve(mmu, v, access, parts, n, r)
    return rc


cdef int _emulate_whole(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, u32 access, sc_part *parts, bint data,
                        sc_result *r) noexcept nogil:
    """A store over a page boundary of which a part hit a table: the emulator does all of it, from its first byte, page
    by page, by its own walks. A fault of the second page leaves the first part stored, as KVM's emulator does."""
    cdef sc_walk w
    cdef u64 now[2]
    cdef u32 done = 0
    cdef int i
    now[0] = o.value[0]
    now[1] = o.value[1]
    for i in range(2):
        if guest_walk(mmu.mem, &v.guest, parts[i].va, access, &w) == RC_PF:
            r.error_code = w.error_code
            inject_fault(mmu, v, parts[i].va, w.error_code)
            return RC_PF
        mmu.stats.guest_walk_references += w.references
        walk_updated(mmu, v, &w)
        parts[i].gpa = w.gpa
        if mem_is_device(mmu.mem, w.gpa >> 12, access):
            r.gpa = w.gpa
            return RC_MMIO
        mem_touch(mmu.mem, w.gpa >> 12, True)
        if not data:
            memcpy(<u8 *>now + done, mem_guest_frame(mmu.mem, w.gpa) + (w.gpa & 4095), parts[i].nbytes)
        emulate_store(mmu, v, w.gpa, <u8 *>now + done, parts[i].nbytes)
        r.emulated += 1
        done += parts[i].nbytes
    r.gpa = parts[0].gpa
    return RC_OK


cdef int _store_over_boundary(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, u32 access, sc_part *parts, bint data,
                              sc_result *r) noexcept nogil:
    """A store over a page boundary in the order of the processor and of KVM's emulator: the first page is looked up,
    then the second, and then both parts are stored."""
    cdef sc_walk w
    cdef int i, rc
    for i in range(2):
        rc = resolve(mmu, v, parts[i].va, access, &w)
        parts[i].gpa = w.gpa
        if rc == RC_EMULATE:
            if not _writes_tables(v, o) and mmu.design.run_again(mmu, v, parts[i].va, w.gpa):
                return RC_RETRY
            return _emulate_whole(mmu, v, o, access, parts, data, r)
        if rc != RC_OK:
            r.error_code = w.error_code if rc == RC_PF else 0
            r.gpa = w.gpa if rc == RC_MMIO else <u64>-1
            return rc
    r.gpa = parts[0].gpa
    if data:
        memcpy(mem_guest_frame(mmu.mem, parts[0].gpa) + (parts[0].gpa & 4095), o.value, parts[0].nbytes)
        memcpy(mem_guest_frame(mmu.mem, parts[1].gpa), <const u8 *>o.value + parts[0].nbytes, parts[1].nbytes)
    for i in range(2):
        mem_mark_dirty(mmu.mem, parts[i].gpa >> 12)
    return RC_OK


cdef int _one_page(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, u64 va, u32 access, bint data, sc_result *r) noexcept nogil:
    """vcpu_access of a load, store or fetch that lies within one page."""
    cdef sc_walk w
    cdef u64 taken = mmu.stats.pf_taken
    cdef int rc = resolve(mmu, v, va, access, &w)
    cdef u64 now[2]
    cdef u8 *at
    r.exits = <u32>(mmu.stats.pf_taken - taken)
    r.outcome = RC_OK
    r.emulated = 0
    r.error_code = 0
    r.gpa = w.gpa
    r.value[0] = r.value[1] = 0
    if rc == RC_OK or rc == RC_EMULATE:
        at = mem_guest_frame(mmu.mem, w.gpa) + (w.gpa & 4095)
        if not access & PF_W:
            if data:
                memcpy(r.value, at, o.size if o.op == OP_READ else 1)
            return RC_OK
        if rc == RC_EMULATE:
            if data:
                memcpy(now, o.value, 16)
            else:
                memcpy(now, at, o.size)
            emulate_store(mmu, v, w.gpa, <const u8 *>now, o.size)
            design_enter(mmu, v)
            r.emulated = 1
            return RC_OK
        if data:
            memcpy(at, o.value, o.size)
        if not mmu.shadow:
            store_seen(mmu, w.gpa)
        return RC_OK
    if rc != RC_MMIO:
        r.gpa = <u64>-1
        r.error_code = w.error_code if rc == RC_PF else 0
    r.outcome = <u8>rc
    return rc


cdef bint access_glance(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """Do the operation if it is a load, store or fetch in one page, allowed by the tables as they are; else nothing."""
    cdef u64 va
    cdef u64 gpa = 0
    cdef u64 frame
    cdef u32 size
    cdef u8 *at
    cdef int read
    if v.memo == NULL or not in_one_page(v, o, &va, &size):
        return False
    if mmu.shadow:
        read = shadow_glance(mmu.mem, &v.hw, va, access_bits(o), &gpa)
        frame = (gpa >> 12) - mmu.mem.ram_hfn
        if read < 0 or frame >= mmu.mem.nframes:
            return False
        gpa = (mem_gfn(mmu.mem, frame) << 12) | (va & 4095)
    else:
        if mmu.nested:
            read = nested_glance(mmu.mem, &v.guest, va, access_bits(o), &gpa)
        else:
            read = guest_glance(mmu.mem, &v.guest, va, access_bits(o), &gpa)
        frame = mem_frame(mmu.mem, gpa >> 12)
        if read < 0 or frame == sc_no_frame():
            return False
    mmu.stats.accesses += 1
    mmu.stats.walk_references += read
    memset(r, 0, sizeof(sc_result))
    r.gpa = gpa
    at = mmu.mem.ram + (frame << 12) + (va & 4095)
    access_bytes(mmu, o, gpa, at, data, size, r.value)
    return True


cdef bint access_fault(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """Under a shadow MMU: do the operation if it is a load, store or fetch in one page whose fault is a fast one; else
    False, and r is anything."""
    cdef u64 va
    cdef u64 word = 0
    cdef u32 size
    cdef u32 told = 0
    cdef u8 *at
    if not in_one_page(v, o, &va, &size):
        return False
    r.gpa = mmu.design.fast_fault(mmu, v, va, access_bits(o), &told)
    r.value[0] = r.value[1] = 0
    if r.gpa == ~<u64>0:
        r.outcome = RC_PF
        r.error_code = told >> FAST_CODE
        r.exits = 1
        r.emulated = 0
        return told & FAST_REFLECTED
    r.outcome = RC_OK
    r.error_code = 0
    r.exits = 1
    r.emulated = told
    if told != FAST_MENDED:
        if told == FAST_UPDATED:
            r.exits = r.emulated = told = 0
        elif data:
            emulate_store(mmu, v, r.gpa, <const u8 *>o.value, size)
            return True
    if not (told or data):
        return True                 # no byte moves
    at = mem_guest_frame(mmu.mem, r.gpa) + (r.gpa & 4095)
    if told:
        memcpy(&word, at, size)     # the bytes that are there
        emulate_store(mmu, v, r.gpa, <const u8 *>&word, size)
    elif o.op == OP_WRITE:
        memcpy(at, o.value, size)
    else:
        memcpy(r.value, at, size)
    return True


cdef int access_missed(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """access_do, of an access at which a glance gave up."""
    if mmu.shadow and access_fault(mmu, v, o, data, r):
        return r.outcome
    return vcpu_access(mmu, v, o, data, r)


cdef int access_do(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """vcpu_access, by the first way that will do: a glance at the tables, a fast fault, the general way. Which it
    is shows in nothing but the time."""
    if access_glance(mmu, v, o, data, r):
        return RC_OK
    return access_missed(mmu, v, o, data, r)


cdef int access_shortest(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """access_do, by the name under which it was published."""
    return access_do(mmu, v, o, data, r)


cdef int vcpu_access(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """One load, store, fetch or read-modify-write.

    data False: no bytes move, but a store to a guest table is emulated with the bytes that are there. Returns
    r.outcome, or a negative code for a host-side error.
    """
    cdef sc_part parts[2]
    cdef u32 size = 1 if o.op == OP_FETCH else o.size
    cdef bint rmw = op_is_rmw(o.op)
    cdef bint stores = o.op == OP_WRITE or rmw
    cdef u32 access = (PF_U if o.user else 0) | (PF_W if stores else PF_I if o.op == OP_FETCH else 0)
    cdef u64 taken, last
    cdef u64 first = linear_address(v, o.addr)
    cdef u64 now[2]
    cdef int n = 1
    cdef int rc = RC_OK
    if (not rmw and (first & 4095) + size <= 4096 and mmu.can_emulate == NULL
            and (size <= 8 and not v.odd_stores or mmu.design.run_again == NULL) and linear_exists(v, first)):
        return _one_page(mmu, v, o, first, access, data, r)
    last = linear_address(v, o.addr + (size - 1))
    # Below 4-level paging an access may go on at address 0; above, that leaves the canonical addresses.
    if not linear_exists(v, first) or not linear_exists(v, last) or (last < first and v.guest.mode >= MODE_64):
        rc = RC_GP
    if o.op == OP_CMPXCHG and size == 16 and o.addr & 15:
        rc = RC_GP                  # CMPXCHG16B wants its operand aligned
    memset(r, 0, sizeof(sc_result))
    r.gpa = <u64>-1
    if rc == RC_GP:
        mmu.stats.gp_guest += 1
        r.outcome = RC_GP
        return rc
    taken = mmu.stats.pf_taken
    parts[0].va = first
    parts[0].nbytes = size
    if (o.addr & 4095) + size > 4096:
        n = 2
        parts[0].nbytes = 4096 - <u32>(o.addr & 4095)
        parts[1].nbytes = size - parts[0].nbytes
        parts[1].va = last & ~<u64>4095
    if n == 2 and o.op == OP_WRITE and v.restarts and mmu.design.run_again != NULL and mmu.can_emulate == NULL:
        rc = _store_over_boundary(mmu, v, o, access, parts, data, r)
        design_enter(mmu, v)
        r.exits = <u32>(mmu.stats.pf_taken - taken)
        r.outcome = <u8>rc
        return rc
    rc = _resolve(mmu, v, access, parts, n, r)
    if rc == RC_OK and stores and (mmu.can_emulate != NULL or mmu.design.run_again != NULL):
        rc = _ask_embedder(mmu, v, o, access, parts, n, r)
    r.exits = <u32>(mmu.stats.pf_taken - taken)
    if rc != RC_OK:
        r.outcome = <u8>rc
        return rc
    r.gpa = parts[0].gpa
    now[0] = now[1] = 0
    if data and o.op != OP_WRITE or (stores and not data):
        memcpy(now, mem_guest_frame(mmu.mem, parts[0].gpa) + (parts[0].gpa & 4095), parts[0].nbytes)
        if n == 2:
            memcpy(<u8 *>now + parts[0].nbytes, mem_guest_frame(mmu.mem, parts[1].gpa), parts[1].nbytes)
    if data:
        r.value[0] = now[0]
        r.value[1] = now[1]
    if not stores:
        return RC_OK
    if data:
        if o.op == OP_WRITE:
            now[0] = o.value[0]
            now[1] = o.value[1]
        else:
            _modify(o.op, now, o, size)
    _store(mmu, v, &parts[0], <u8 *>now, data, r)
    if n == 2:
        _look_again(mmu, &parts[1])     # the first part's store may have zapped what the second had to go round
        _store(mmu, v, &parts[1], <u8 *>now + parts[0].nbytes, data, r)
    design_enter(mmu, v)
    return RC_OK


cdef int access_implicit(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """SDM 4.6.1: implicit supervisor accesses are those of supervisor code with EFLAGS.AC clear. So they are made. The
    memo stays as it is, for nothing asks it here."""
    cdef sc_op own = o[0]
    cdef bint ac = v.guest.ac
    cdef int rc
    own.user = 0
    ac_put(v, False)
    rc = vcpu_access(mmu, v, &own, data, r)
    ac_put(v, ac)
    return rc


cdef int vcpu_op(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil:
    """One operation of a batch; see vcpu_access."""
    cdef int rc = RC_OK
    cdef u64 va
    if o.op == OP_CR3:              # the most frequent one beside accesses
        memset(r, 0, sizeof(sc_result))
        r.gpa = <u64>-1
        rc = load_cr3(mmu, v, o.value[0])
        r.outcome = <u8>rc
        if rc == RC_GP:
            load_refused(mmu)
        return rc
    if o.op <= OP_FETCH or (o.op >= OP_CMPXCHG and o.op != OP_INVPCID):
        return vcpu_access(mmu, v, o, data, r)
    memset(r, 0, sizeof(sc_result))
    r.gpa = <u64>-1
    if o.op == OP_CR0:
        rc = load_cr0(mmu, v, o.value[0])
    elif o.op == OP_CR4:
        rc = load_cr4(mmu, v, o.value[0])
    elif o.op == OP_EFER:
        rc = load_efer(mmu, v, o.value[0])
    elif o.op == OP_INVLPG:
        va = linear_address(v, o.addr)
        mmu.stats.invlpg += 1
        if v.tlb != NULL:
            tlb_flush_page(v.tlb, va, flush_lost(mmu, FLUSH_INVLPG))
            tlb_flush_caches(v.tlb, va, vcpu_pcid(v), not v.efer & EFER_TCE)
        design_exit(mmu, v.number, EXIT_INVLPG, va)
        design_invlpg(mmu, v, va)
    elif o.op == OP_PKRU:
        load_pkru(mmu, v, o.value[0])
    elif o.op == OP_AC:
        load_ac(mmu, v, o.value[0] & 1)
    elif o.op == OP_INVPCID:
        rc = invalidate_pcid(mmu, v, o.size, o.value[0], o.addr, o.user != 0)
        r.outcome = <u8>rc
        return rc
    else:
        return RC_BAD_OP
    if rc == RC_GP:
        load_refused(mmu)
    r.outcome = <u8>rc
    return rc
