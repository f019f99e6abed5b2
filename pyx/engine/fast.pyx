"""The fast path of a fault: the processor's failed walk, the guest's, the leaf, the repeated walk, all in one go.

KVM's fast_page_fault has the name, not the extent: that mends present sptes without the MMU's lock. This one does
what fault.page_fault does, by the same text (leaf.pxd), for the faults that most faults are: a leaf is missing,
or lacks W, or its table is missing; a guest table is stored to. Guards find that the case is another one. Up to the
last of them the MMU and the vcpu are const, so that nothing has changed when the general way is taken instead.

It is compiled twice for each mode, without and with a dirty log. Where the guest's walk ends, what is without parts
again: leaves of 4 KiB, and those of large pages.
"""
from shadowcore.engine.bits cimport (
    PTE_A, PTE_D, PTE_P, PTE_PS, PTE_U, PTE_W, level_index, pte_addr, pte_pkey, pte_rights,
)
from shadowcore.engine.counters cimport EXIT_EMULATE, EXIT_FILL, EXIT_GUEST
from shadowcore.engine.flushes cimport FLUSH_WITHHELD, request_flush
from shadowcore.engine.gmode cimport GLANCE, TABLES_GUEST, in_mode, sc_gmode
from shadowcore.engine.hooks cimport count_exit
from shadowcore.engine.leaf cimport (
    direct_gfn, direct_role, dirty_after, fault_count, fault_decide, leaf_commit, leaf_decide, sc_fault,
)
from shadowcore.engine.memory cimport (
    SC_POOL_HFN, mem_frame, mem_gfn, mem_guest_frame, mem_leaf_frame, mem_pool_page, sc_mem, sc_no_frame,
)
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.pool cimport pool_find, pool_take
from shadowcore.engine.quirks cimport QUIRK_NX_LEAF_ONLY, QUIRK_PROCESSOR_CODE, QUIRK_ROLE_WITHOUT_ACCESS
from shadowcore.engine.role cimport ROLE_LEVEL
from shadowcore.engine.roots cimport make_role
from shadowcore.engine.spte cimport spte_link
from shadowcore.engine.state cimport FAST_CODE, FAST_MENDED, FAST_REFLECTED, FAST_UPDATED, sc_mmu, sc_vcpu
from shadowcore.engine.sync cimport leaf_bits, leaf_fill, leaf_writable, prefetch_around
from shadowcore.engine.types cimport ACC_W, PF_W, SC_NONE, u8, u32, u64
from shadowcore.engine.walker cimport (
    STEP_DOWN, STEP_FAULT, access_code, leaf_address, rights_fault, sc_paging, table_index, walk_step,
)

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define sc_apart(x) __asm__("" : "+r"(x))
    #define sc_seldom(x) __builtin_expect(!!(x), 0)
    #else
    #define sc_apart(x) ((void)0)
    #define sc_seldom(x) (x)
    #endif
    """
    void sc_apart(...) noexcept nogil
    bint sc_seldom(bint x) noexcept nogil

cdef enum:
    # Quirks by which other things are looked at than the guest's tables as they are.
    EXCLUDED = QUIRK_ROLE_WITHOUT_ACCESS | QUIRK_NX_LEAF_ONLY | QUIRK_PROCESSOR_CODE

# Where a fault goes.
cdef enum:
    GENERAL = 0                     # the general way
    FOUND = 1                       # on
    OTHER = 2                       # to _fast_logged

cdef struct sc_leaf:                # what the guest's walk comes to
    u64 table                       # gpa of the table that the leaf is in
    u64 entry                       # the leaf
    u64 all_                        # AND of the entries down to it, bit 63 inverted
    u32 read                        # entries read, if the walk came to none

cdef struct sc_tables:              # what a fault needs to know of tables
    u64 gpa                         # of the guest's table that holds the leaf
    u64 above                       # AND of the entries above that table, bit 63 inverted, if it is one of level 1
    const u64 *at2                  # the shadow's entry at level 2
    const u64 *at3                  # ... and at level 3
    u32 page                        # the leaf table that is to be linked, if the pool has it, or SC_NONE
    u64 gfn                         # its key: gfn
    u32 role                        # ... and role


cdef inline int _can_be_fast(const sc_mmu *mmu, const sc_vcpu *v, u32 below, bint logged,
                             bint lagging) noexcept nogil:
    """Does the machine as it is let faults be fast? below: tables below the root."""
    cdef u32 odd = mmu.quirks & EXCLUDED
    odd |= mmu.audit_points         # before and after a fault
    odd |= mmu.fail_for             # a test counts the attempts to take a page
    odd |= mmu.mem.special          # the host, or a slot, may have a say
    if not logged:
        odd |= mmu.mem.logging      # stores to slots with a dirty log are looked at
    if lagging:
        odd |= mmu.ring != NULL     # each event is recorded
    if odd:
        return GENERAL if logged or lagging else OTHER
    if v.memo == NULL:
        return GENERAL              # a TLB is modelled, which the repeated walk fills; or Mmu.general
    if mmu.n_pte4 and mmu.n_pte8:
        return GENERAL              # D in an entry of one size may be an address bit in one of the other
    if mmu.by_table and (mmu.n_free < mmu.min_free or mmu.n_free < below):
        return GENERAL              # pages are recycled first
    return FOUND


cdef inline u32 _rights(u64 all_) noexcept nogil:
    """ACC_* of an AND of entries, bit 63 inverted."""
    return <u32>(all_ & (PTE_W | PTE_U)) | <u32>(all_ >> 63)


cdef inline int _ended(sc_leaf *leaf, u64 entry, int level) noexcept nogil:
    leaf.entry = entry
    return level


cdef inline int _stopped(sc_leaf *leaf, u64 entry, int read) noexcept nogil:
    leaf.entry = entry
    leaf.read = read
    return 0


cdef inline int _guest_walk(const sc_mmu *mmu, const sc_vcpu *v, sc_fault *f, sc_tables *t, sc_leaf *leaf,
                            sc_gmode g) noexcept nogil:
    """The guest's walk: level of the leaf it comes to, or 0; then leaf.entry is the entry at which it ended."""
    cdef sc_mem *m = mmu.mem        # a strict walk writes nothing
    cdef const sc_paging *p = &v.guest
    cdef u64 base
    cdef u64 all_ = ~<u64>0
    cdef u64 entry = PTE_P          # what it stays where the root is in no memory: no fault for the fast path
    cdef int step
    base = p.pdpte[(f.va >> 30) & 3] & pte_addr() if g.pae_root else p.root
    if g.pae_root and not p.pdpte[(f.va >> 30) & 3] & PTE_P:
        return _stopped(leaf, PTE_P, 0)     # the general way sees what that is
    if g.top >= 5 and walk_step(m, p, f.va, f.access, NULL, &base, &entry, &all_, NULL, 5, g) != STEP_DOWN:
        return _stopped(leaf, entry, g.top + 1 - 5)
    if g.top >= 4 and walk_step(m, p, f.va, f.access, NULL, &base, &entry, &all_, NULL, 4, g) != STEP_DOWN:
        return _stopped(leaf, entry, g.top + 1 - 4)
    if g.top >= 3:
        leaf.table = base
        step = walk_step(m, p, f.va, f.access, NULL, &base, &entry, &all_, NULL, 3, g)
        if step != STEP_DOWN:
            leaf.all_ = all_
            return _stopped(leaf, entry, g.top - 2) if step == STEP_FAULT else _ended(leaf, entry, 3)
    leaf.table = base
    step = walk_step(m, p, f.va, f.access, NULL, &base, &entry, &all_, NULL, 2, g)
    if step != STEP_DOWN:
        leaf.all_ = all_
        return _stopped(leaf, entry, g.top - 1) if step == STEP_FAULT else _ended(leaf, entry, 2)
    leaf.table = base
    t.above = all_
    # As a number, for there may be no memory: the step finds that.
    f.low = <u8 *>(<size_t>mem_guest_frame(m, base) + table_index(f.va, 1, g.pte_size) * g.pte_size)
    step = walk_step(m, p, f.va, f.access, NULL, &base, &entry, &all_, NULL, 1, g)
    leaf.all_ = all_
    return _stopped(leaf, entry, g.top) if step == STEP_FAULT else _ended(leaf, entry, 1)


cdef inline bint _shadow_walk(const sc_mmu *mmu, const sc_vcpu *v, sc_fault *f, sc_tables *t, const sc_leaf *leaf,
                              int hw_top, bint large, bint lagging, sc_gmode g) noexcept nogil:
    """The guest's walk lets the access pass, with nothing to set but D; and the processor's, to an entry of a leaf
    table."""
    cdef const sc_mem *m = mmu.mem
    cdef const u64 *spte = mmu.table
    cdef u64 base
    cdef int level
    if not leaf.all_ & PTE_A:
        return False                # A has to be set
    t.gpa = leaf.table
    f.gpte = leaf.entry
    f.rights = _rights(leaf.all_)
    f.pkey = pte_pkey(leaf.entry) if g.pte_size == 8 else 0
    if rights_fault(&v.guest, f.rights, f.pkey, f.access):
        return False                # the guest's own fault
    f.linked = False
    base = v.hw.root if hw_top > 2 else v.hw.pdpte[(f.va >> 30) & 3] & pte_addr()
    for level in range(hw_top, 0, -1):
        base -= <u64>SC_POOL_HFN << 12
        if base >= m.pool_pages << 12:
            return False            # no root is in place
        spte = <const u64 *>(<const u8 *>m.pool + base) + level_index(f.va, level)
        base = spte[0] & pte_addr()
        if level == 3 and large:
            t.at3 = spte
        if level == 2 and large:
            t.at2 = spte
        if level > 1 and not spte[0] & PTE_P:
            if level > 2 or not mmu.by_table:
                return False        # more than a leaf table is missing; or it is one of linear addresses
            t.at2 = spte
            f.linked = True
            break
    f.old = spte[0]
    f.spte = <u32>(spte - mmu.table)
    if lagging:
        f.repeats = False
    if f.old and (not f.old & PTE_P or not rights_fault(&v.hw, pte_rights(f.old), pte_pkey(f.old), f.access)):
        if not lagging:
            return False            # a device was there; or there is no fault
        # Of what was prefetched A is still to be set.
        f.repeats = f.old & PTE_P != 0
        return f.repeats
    return True


cdef inline bint _fits(const sc_mmu *mmu, const sc_fault *f, int level, u32 role, u32 page) noexcept nogil:
    """The linked page of `level`, below the guest's large page, grants what the guest's entry grants now: `role`."""
    return mmu.pages[page].gfn == direct_gfn(f.gpa, level, f.mode) and mmu.pages[page].role == role


cdef inline void _find(const sc_mmu *mmu, sc_fault *f, sc_tables *t, u64 gfn, u32 role) noexcept nogil:
    """The leaf table that is to be linked, and the leaf in it."""
    t.gfn = gfn
    t.role = role
    t.page = pool_find(mmu, gfn, role)
    f.old = 0
    if t.page != SC_NONE:
        f.spte = t.page * 512 + level_index(f.va, 1)
        f.old = mmu.table[f.spte]


cdef inline bint _decide(const sc_mmu *mmu, const sc_vcpu *v, sc_fault *f, sc_tables *t, int hw_top,
                         sc_gmode g) noexcept nogil:
    """What follows from the walks. False: a guard has found that the fault has to go the general way."""
    cdef u32 role
    f.gpa = leaf_address(f.gpte, f.va, f.level, g)
    f.read = g.top + 1 - f.level
    f.walked = hw_top - f.linked
    f.frame = mem_frame(mmu.mem, f.gpa >> 12)
    if f.frame == sc_no_frame():
        return False                # a device
    f.table = t.gpa >> 12
    if f.level > 1:                 # else the walk has set it
        f.low = mem_guest_frame(mmu.mem, t.gpa) + table_index(f.va, f.level, g.pte_size) * g.pte_size
    f.dirty = dirty_after(f.gpte, f.access)
    f.refused = f.dirtied = f.unprotected = False
    f.large = SC_NONE if f.level == 1 else <u32>((t.at2 if f.level == 2 else t.at3) - mmu.table)
    if f.level > 1 and mmu.by_table:
        # What stands for a large page has to grant what its entry grants now.
        role = direct_role(mmu, v, f.va, 1, f.rights, f.gpte | f.dirty, f.pkey)
        # Below a page of 1 GiB entries have 8 bytes, and then the level is all by which the other role differs.
        if f.level == 3 and not _fits(mmu, f, 2, role + (1 << ROLE_LEVEL), <u32>(t.at2 - mmu.table) >> 9):
            return False
        if f.linked:
            _find(mmu, f, t, direct_gfn(f.gpa, 1, f.mode), role)
        elif not _fits(mmu, f, 1, role, f.spte >> 9):
            return False
    elif f.linked and t.gfn == f.gpa >> 12:
        return False                # linking the table write-protects the very page of the access
    if f.linked and f.old and not f.old & PTE_P:
        return False                # a device was there
    leaf_decide(mmu, v, f)
    if f.unprotect:
        return False                # pages are zapped, the path is linked anew
    fault_decide(mmu, v, f)
    if f.kind == EXIT_EMULATE:
        return mmu.can_emulate == NULL and f.access & PF_W      # the embedder may say no; a load that no leaf can grant
    return f.repeats                # else the processor would fault again


cdef inline u64 _mended(sc_mmu *mmu, sc_vcpu *v, sc_fault *f, sc_tables *t, u32 *told, int hw_top,
                        sc_gmode g) noexcept nogil:
    """Do it, after the last guard: where the access leads."""
    if not _decide(mmu, v, f, t, hw_top, g):
        return ~<u64>0
    # No guard below this line.
    if f.linked:
        if t.page != SC_NONE:
            mmu.stats.mmu_cache_hit += 1
        else:
            t.page = pool_take(mmu, t.gfn, t.role)
            mmu.stats.mmu_cache_miss += 1
            f.spte = t.page * 512 + level_index(f.va, 1)
        spte_link(mmu, <u32>(t.at2 - mmu.table), t.page)
    if f.withheld:
        request_flush(mmu, FLUSH_WITHHELD)
    f.changed = True                # a leaf that is there refused the access, and does no more
    leaf_commit(mmu, v, f)
    fault_count(mmu, v, f)
    mmu.stats.accesses += 1
    told[0] = f.kind == EXIT_EMULATE       # FAST_EMULATE or FAST_MENDED
    return f.gpa


cdef inline u64 _lagging(sc_mmu *mmu, sc_vcpu *v, sc_fault *f, const sc_leaf *leaf, int hw_top,
                         sc_gmode g) noexcept nogil:
    """Design unsync: an empty entry of a leaf table that is linked, for a page that is no table; or no fault at all.
    Where it leads."""
    cdef u64 gpa = leaf_address(leaf.entry, f.va, 1, g)
    cdef u64 frame = mem_frame(mmu.mem, gpa >> 12)
    cdef u32 rights = _rights(leaf.all_)
    cdef u32 page = mem_pool_page(v.hw.root if hw_top > 2 else v.hw.pdpte[(f.va >> 30) & 3])
    cdef sc_page *pages = mmu.pages
    cdef const u64 *sptes = mmu.table
    cdef int level
    if f.repeats and not f.linked:
        # The leaf may lag: it says where.
        mmu.table[f.spte] |= PTE_A | (PTE_D if f.access & PF_W else 0)
        mmu.stats.accesses += 1
        mmu.stats.walk_references += hw_top
        return (mem_gfn(mmu.mem, mem_leaf_frame(mmu.mem, f.old)) << 12) | (f.va & 4095)
    if f.linked or f.old or frame == sc_no_frame() or mmu.frames[frame].shadowed:
        return ~<u64>0
    if not leaf.entry & PTE_D:
        rights &= ~<u32>ACC_W
    if f.access & PF_W and (not rights & ACC_W or (v.guest.pke and not v.guest.wp)):
        return ~<u64>0              # D has to be set, or CR0.WP is off
    for level in range(hw_top, 1, -1):
        pages[page].flood = 0
        page = mem_pool_page(sptes[page * 512 + level_index(f.va, level)])
    pages[page].flood = 0
    leaf_fill(mmu, f.spte, frame, leaf_bits(mmu, v, frame, rights, pte_pkey(leaf.entry) if g.pte_size == 8 else 0)
              | PTE_A | (leaf_writable() if rights & ACC_W else 0))
    prefetch_around(mmu, v, f.spte)
    mmu.stats.accesses += 1
    mmu.stats.pf_taken += 1
    mmu.stats.pf_fixed += 1
    mmu.stats.guest_walk_references += g.top
    mmu.stats.walk_references += 2 * hw_top     # the walk that failed, and the next
    count_exit(mmu, v.number, EXIT_FILL, f.va)
    return gpa


cdef inline void _reflected(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_leaf *leaf, u32 *told,
                            int hw_top) noexcept nogil:
    """Design unsync: the guest's own fault, at an entry that is not present where the shadow has none either."""
    cdef u64 base = v.hw.root if hw_top > 2 else v.hw.pdpte[(va >> 30) & 3] & pte_addr()
    cdef u64 entry = 0
    cdef u32 read = 0
    cdef int level
    if leaf.entry & PTE_P or v.device_va == va & ~<u64>4095 or mmu.absent:
        return                      # another fault; a device that is to be forgotten; or the entry is to be marked
    for level in range(hw_top, 0, -1):
        base -= <u64>SC_POOL_HFN << 12
        if base >= mmu.mem.pool_pages << 12:
            return                  # no root is in place
        entry = (<const u64 *>(<const u8 *>mmu.mem.pool + base))[level_index(va, level)]
        read += 1
        if not entry & PTE_P:
            break
        if entry & PTE_PS:
            return
        base = entry & pte_addr()
    if entry:
        return                      # a leaf that lags, or a device
    # No guard below this line.
    # inject_fault, of which nothing is left: no TLB is modelled, and where the shadow has no entry, and the guest none
    # to make one of, there is nothing that the fault makes forget.
    v.cr2 = va
    mmu.stats.pf_guest += 1
    mmu.stats.accesses += 1
    mmu.stats.pf_taken += 1
    mmu.stats.guest_walk_references += leaf.read
    mmu.stats.walk_references += read
    count_exit(mmu, v.number, EXIT_GUEST, va)
    told[0] = FAST_REFLECTED | access_code(&v.guest, access) << FAST_CODE


cdef inline u64 _onward(sc_mmu *mmu, sc_vcpu *v, sc_fault *f, sc_tables *t, const sc_leaf *leaf, u32 *told,
                        int hw_top, bint large, bint lagging, sc_gmode g) noexcept nogil:
    """From the guest's leaf on. Constants: large, it may be that of a large page; lagging, the design is unsync."""
    if not _shadow_walk(mmu, v, f, t, leaf, hw_top, large, lagging, g):
        return ~<u64>0
    if lagging:
        told[0] = FAST_UPDATED if f.repeats else FAST_MENDED
        return _lagging(mmu, v, f, leaf, hw_top, g)
    if f.linked and f.level == 1:
        _find(mmu, f, t, t.gpa >> 12, make_role(mmu, v, f.va, 1, False, _rights(t.above)))
    # Compiled for each of the common cases by itself: what is a constant there is not asked.
    if f.linked:
        f.linked = True
        if not large and f.old == 0:
            f.old = 0
            return _mended(mmu, v, f, t, told, hw_top, g)
        return _mended(mmu, v, f, t, told, hw_top, g)
    f.linked = False
    if f.old == 0:
        f.old = 0
        return _mended(mmu, v, f, t, told, hw_top, g)
    f.old |= PTE_P
    return _mended(mmu, v, f, t, told, hw_top, g)


cdef struct sc_asked:
    sc_mmu *mmu
    sc_vcpu *v
    u64 va
    u32 access
    u32 *told                       # what the caller is told: FAST_*
    bint logged                     # a slot may have a dirty log
    bint lagging                    # the design is unsync


cdef inline u64 _fast(void *asked, sc_gmode g) noexcept nogil:
    cdef const sc_asked *a = <const sc_asked *>asked
    cdef int hw_top = max(2, g.top)     # the shadow of 32-bit tables has the format of PAE
    cdef sc_fault f
    cdef sc_tables t
    cdef sc_leaf leaf
    cdef int found, level
    cdef sc_mmu *mmu
    cdef sc_vcpu *v
    if g.top == 0:
        return ~<u64>0              # paging off: no guest tables
    found = _can_be_fast(a.mmu, a.v, hw_top - 1, a.logged, a.lagging)
    if sc_seldom(found == OTHER):
        return _fast_logged(a.mmu, a.v, a.va, a.access, a.told)
    f.va = a.va
    f.access = a.access
    f.code = 0
    f.mode = g.mode
    f.quirks = a.mmu.quirks & ~<u32>EXCLUDED
    f.tlb = False
    f.logging = a.logged and a.mmu.mem.logging
    f.special = False               # _can_be_fast
    if sc_seldom(found == GENERAL):
        return ~<u64>0
    level = _guest_walk(a.mmu, a.v, &f, &t, &leaf, g)
    if sc_seldom(level == 0):
        if a.lagging:
            _reflected(a.mmu, a.v, a.va, a.access, &leaf, a.told, hw_top)
        return ~<u64>0
    f.level = level
    if a.lagging:
        if level > 1:
            return ~<u64>0
        return _onward(a.mmu, a.v, &f, &t, &leaf, a.told, hw_top, False, True, g)
    if a.logged or sc_seldom(level > 1):
        # The two ways have much in common. If the compiler knew, it would compute that before they part: more than
        # there are registers for.
        mmu = a.mmu
        v = a.v
        sc_apart(mmu)
        sc_apart(v)
        sc_apart(f.va)
        return _onward(mmu, v, &f, &t, &leaf, a.told, hw_top, True, False, g)
    f.level = 1
    return _onward(a.mmu, a.v, &f, &t, &leaf, a.told, hw_top, False, False, g)


cdef inline u64 _by_mode(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told, bint logged,
                         bint lagging) noexcept nogil:
    cdef sc_asked a
    a.mmu = mmu
    a.v = v
    a.va = va
    a.access = access
    a.told = told
    a.logged = logged
    a.lagging = lagging
    return in_mode(v.guest.mode, TABLES_GUEST, GLANCE, _fast, &a)


cdef u64 _fast_logged(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    return _by_mode(mmu, v, va, access, told, True, False)


cdef u64 fault_fast(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    """sc_design.fast_fault of designs whose leaves follow the guest's tables, or that of a TLB."""
    return _by_mode(mmu, v, va, access, told, False, False)


cdef u64 fault_fast_lagging(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil:
    """sc_design.fast_fault where leaf tables may lag (sc_mmu.lists_all)."""
    return _by_mode(mmu, v, va, access, told, False, True)
