"""The memory references of a walk, one by one: where each entry lies, of whose tables it is, and which of them the
caches of the processor leave out.

A walk says how many entries it read, and where its own tables lie. What it read of the host's tables (nested paging) is
found by reading them again, in the same order, up to that number.

Caches (SDM vol. 3, 28.3): an entry of a paging-structure cache says where the table below lies. Nested, that is a host
physical address: what led there through the host's tables is left out as well. The host's tables have caches of their
own, and a nested TLB translates whole guest physical addresses: of both, entries are of the host's tables alone and no
flush of the guest's reaches them. A walk that ends in a fault counts whole, and fills none.
"""
from shadowcore.engine.bits cimport PTE_D, PTE_P, PTE_PS, PTE_W, level_index, level_mask, pte_addr
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.memory cimport SC_POOL_HFN, mem_frame, mem_frame_hpa
from shadowcore.engine.state cimport (
    REFERENCE_GUEST, REFERENCE_HOST, REFERENCE_SHADOW, SC_MAX_VCPUS, sc_mmu, sc_reference, sc_vcpu, sc_walk_log,
    vcpu_pcid, walk_mark,
)
from shadowcore.engine.tlb cimport (
    cache_lookup, cache_walked, host_cache_lookup, host_cache_walked, nested_tlb_filled, nested_tlb_has,
)
from shadowcore.engine.types cimport MODE_OFF, MODE_PAE, PF_W, SC_NONE, u8, u16, u32, u64
from shadowcore.engine.walker cimport sc_walk, walk_index

cdef enum:
    MOST = 40                       # references of a walk

sc_check(SC_MAX_VCPUS <= 256)
# Five levels of five, through five, and the last address.
sc_check(MOST >= 5 * 6 + 5)

cdef struct sc_trail:               # a walk that is gone over
    sc_reference made[MOST]
    u32 n                           # of them
    u32 seen                        # gone over: made, or left out
    u32 all_                        # entries that the walk read
    bint cached                     # caches are asked, and filled
    u64 va
    u32 vcpu


cdef inline void _reference(sc_trail *t, u64 hpa, int level, u32 dimension, int size, bint left_out) noexcept nogil:
    cdef sc_reference *r
    t.seen += 1
    if left_out:
        return
    r = &t.made[t.n]
    r.hpa = hpa
    r.gva = t.va
    r.walk = 0
    r.vcpu = <u8>t.vcpu
    r.level = <u8>level
    r.dimension = <u8>dimension
    r.size = <u8>size
    t.n += 1


cdef u64 _through_host(sc_mmu *mmu, sc_vcpu *v, sc_trail *t, u64 gpa, bint store, bint left_out) noexcept nogil:
    """The walk of the host's tables for gpa, as an access that stores or not; returns where it leads."""
    cdef u64 base = v.guest.host_root
    cdef int top = v.guest.host_top
    cdef int level = top
    cdef int first = top            # level of the first entry that is read
    cdef u64 entry = 0
    cdef u64 hpa
    if base == 0 or gpa >> (12 + 9 * top):
        return 0
    if t.cached and not left_out:
        if v.tlb.nested.ways:
            if nested_tlb_has(v.tlb, gpa, mmu.flush_epoch, store):
                mmu.stats.nested_tlb_hits += 1
                left_out = True
            else:
                mmu.stats.nested_tlb_misses += 1
        if not left_out:
            first = host_cache_lookup(v.tlb, gpa, mmu.flush_epoch, top)
            mmu.stats.host_cache_hits += first != 0
            first = first - 1 if first else top
    while t.seen < t.all_:
        hpa = base + 8 * level_index(gpa, level)
        entry = mmu.table[(hpa - (<u64>SC_POOL_HFN << 12)) >> 3]
        _reference(t, hpa, level, REFERENCE_HOST, 8, left_out or level > first)
        if not entry & PTE_P or level == 1 or (level <= 3 and entry & PTE_PS):
            break
        base = entry & pte_addr()
        level -= 1
    hpa = (entry & pte_addr() & ~level_mask(level)) | (gpa & level_mask(level))
    if t.cached and not left_out:
        host_cache_walked(v.tlb, gpa, mmu.flush_epoch, first, level)
        if v.tlb.nested.ways:
            nested_tlb_filled(v.tlb, gpa, hpa, 12 + 9 * (level - 1), entry & PTE_W and entry & PTE_D, mmu.flush_epoch,
                              v.roots[0])
    return hpa


cdef inline u64 _in_ram(const sc_mmu *mmu, u64 gpa) noexcept nogil:
    """hpa of a gpa that is in a slot."""
    return mem_frame_hpa(mmu.mem, mem_frame(mmu.mem, gpa >> 12)) | (gpa & 4095)


cdef void _guest_levels(sc_mmu *mmu, sc_vcpu *v, sc_trail *t, const sc_walk *w, int found) noexcept nogil:
    """The entries of the tables that are walked, and what led to each. found: level of the lowest that a cache has."""
    cdef u64 at
    cdef int level
    cdef int below = found if found else 7      # entries from here up are left out
    if mmu.nested and v.guest.mode == MODE_PAE:
        at = _through_host(mmu, v, t, v.guest.root + ((w.va >> 27) & 24), True, found != 0)
        if t.seen < t.all_:
            _reference(t, at, 3, REFERENCE_GUEST, 8, found != 0)
    for level in range(w.top, w.level - 1, -1):
        if t.seen >= t.all_:
            return
        at = (w.table[level] << 12) + walk_index(w, level) * w.pte_size
        if mmu.nested:
            at = _through_host(mmu, v, t, at, True, level >= below - 1)
            if t.seen >= t.all_:
                return              # the host's tables refused it
        elif not mmu.shadow:
            at = _in_ram(mmu, at)
        _reference(t, at, level, REFERENCE_SHADOW if mmu.shadow else REFERENCE_GUEST, w.pte_size, level >= below)


cdef void _tell(sc_walk_log *log, sc_trail *t) noexcept nogil:
    cdef u32 i
    cdef u64 at
    for i in range(t.n):
        t.made[i].walk = log.walks
        at = log.room.count + i
        if at < log.room.size:
            log.reference[at] = t.made[i]
    log.walks += 1
    log.room.count += t.n
    if log.hook != NULL and t.n:
        log.hook(log.context, t.made, t.n)


cdef void walk_ended(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *w, bint complete) noexcept nogil:
    cdef sc_trail t
    cdef int found = 0
    cdef int width
    cdef u16 pcid
    cdef bint pages = mmu.shadow or v.guest.mode != MODE_OFF
    if not complete and mmu.shadow and walk_mark(mmu, w) != SC_NONE:
        return                      # it goes on: walk_went_on
    t.n = t.seen = 0
    t.all_ = w.references
    t.va = va
    t.vcpu = v.number
    t.cached = complete and v.tlb != NULL and v.tlb.caching
    if t.cached and pages:
        pcid = vcpu_pcid(v)
        width = 9 if w.pte_size == 8 else 10
        found = cache_lookup(v.tlb, va, pcid, mmu.flush_epoch, w.top, width)
        if found <= w.level:
            found = 0
        mmu.stats.walk_cache_hits += found != 0
        cache_walked(v.tlb, va, pcid, mmu.flush_epoch, found - 1 if found else w.top, w.level, width)
        if found and not mmu.nested and mmu.walks == NULL:
            mmu.stats.walk_cache_references += w.top - found + 1
            mmu.stats.walk_references -= w.top - found + 1
            return                  # nobody wants to know which
    if not mmu.nested and mmu.walks == NULL:
        return
    if pages:
        _guest_levels(mmu, v, &t, w, found)
    if mmu.nested and t.seen < t.all_:
        _through_host(mmu, v, &t, w.gpa, access & PF_W != 0, False)
    mmu.stats.walk_cache_references += t.seen - t.n
    mmu.stats.walk_references -= t.seen - t.n
    if mmu.walks != NULL:
        _tell(mmu.walks, &t)


cdef void _both_tables(sc_mmu *mmu, sc_vcpu *v, sc_trail *t, const sc_walk *hw, const sc_walk *w,
                       int below) noexcept nogil:
    """The entries of the shadow's tables down to the mark, then of the guest's, with what led to each. below: entries
    from this level up are left out."""
    cdef u64 at
    cdef int level
    for level in range(hw.top, hw.level, -1):
        _reference(t, (hw.table[level] << 12) + 8 * walk_index(hw, level), level, REFERENCE_SHADOW, 8, level >= below)
    for level in range(w.top, w.level - 1, -1):
        if t.seen >= t.all_:
            return
        at = _through_host(mmu, v, t, (w.table[level] << 12) + walk_index(w, level) * w.pte_size, False,
                           level >= below - 1)
        if t.seen >= t.all_:
            return                  # the host's tables refused it
        _reference(t, at, level, REFERENCE_GUEST, w.pte_size, level >= below)


cdef void walk_went_on(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, const sc_walk *hw, const sc_walk *w,
                       bint complete) noexcept nogil:
    cdef sc_trail t
    cdef int found = 0
    cdef u16 pcid = vcpu_pcid(v)
    t.n = t.seen = 0
    t.all_ = hw.references - 1 + w.references   # of the page below the mark nothing was read
    t.va = va
    t.vcpu = v.number
    t.cached = complete and v.tlb != NULL and v.tlb.caching
    if not t.cached and mmu.walks == NULL:
        return
    if t.cached:
        found = cache_lookup(v.tlb, va, pcid, mmu.flush_epoch, hw.top, 9)
        if found <= w.level:
            found = 0
        mmu.stats.walk_cache_hits += found != 0
        cache_walked(v.tlb, va, pcid, mmu.flush_epoch, found - 1 if found else hw.top, w.level, 9)
    _both_tables(mmu, v, &t, hw, w, found if found else 7)
    if t.seen < t.all_:
        _through_host(mmu, v, &t, w.gpa, access & PF_W != 0, False)
    mmu.stats.walk_cache_references += t.seen - t.n
    mmu.stats.walk_references -= t.seen - t.n
    if mmu.walks != NULL:
        _tell(mmu.walks, &t)
