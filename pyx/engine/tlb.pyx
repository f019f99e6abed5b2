"""The TLB: lookup, fill, and the flushes of register loads, INVLPG and page faults.

`lost`, in the flush functions, is for tests alone: the flush becomes due and does not happen.
"""
from shadowcore.engine.tlb cimport (
    INVPCID_ADDRESS, INVPCID_ALL, INVPCID_CONTEXT, TLB_ANY_PCID, TLB_NOT_GLOBAL, TLB_PAGES, sc_tlb, sc_tlb_entry,
    tlb_valid,
)
from shadowcore.engine.types cimport SC_NONE, u16, u32, u64


cdef inline int _class(int shift) noexcept nogil:
    return 0 if shift == 12 else 1 if shift < 30 else 2


cdef inline sc_tlb_entry *_set(const sc_tlb *t, int size, u64 va, int shift) noexcept nogil:
    return t.entry[size] + ((va >> shift) % t.sets[size]) * t.ways[size]


cdef sc_tlb_entry *_probe(sc_tlb *t, u64 va, int shift, u16 pcid, u64 mmu_epoch) noexcept nogil:
    cdef int size = _class(shift)
    cdef sc_tlb_entry *e
    if t.ways[size] == 0:
        return NULL
    e = _set(t, size, va, shift)
    for _ in range(t.ways[size]):
        if (e.page == ((va >> shift) << shift | 1) and e.shift == shift and tlb_valid(t, e, mmu_epoch)
                and (e.is_global or e.pcid == pcid)):
            return e
        e += 1
    return NULL


cdef sc_tlb_entry *tlb_find(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch) noexcept nogil:
    """The valid entry that translates `va` under `pcid`, or NULL."""
    cdef sc_tlb_entry *e = _probe(t, va, 12, pcid, mmu_epoch)
    if e == NULL:
        e = _probe(t, va, 21, pcid, mmu_epoch)
    if e == NULL:
        e = _probe(t, va, 22, pcid, mmu_epoch)
    if e == NULL:
        e = _probe(t, va, 30, pcid, mmu_epoch)
    return e


cdef void tlb_enter(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                    bint dirty, bint is_global, u64 mmu_epoch, u32 root) noexcept nogil:
    """Enter the translation of the page of `va`, over one of the same page, else an invalid one, else the oldest."""
    cdef int size = _class(shift)
    cdef u64 page = (va >> shift) << shift | 1
    cdef sc_tlb_entry *e
    cdef sc_tlb_entry *victim = NULL
    if t.ways[size] == 0:
        return
    e = _set(t, size, va, shift)
    for _ in range(t.ways[size]):
        if e.page == page and e.shift == shift and (e.pcid == pcid or e.is_global or is_global):
            victim = e
            break
        if victim == NULL or not tlb_valid(t, e, mmu_epoch) or (
                tlb_valid(t, victim, mmu_epoch) and e.used < victim.used):
            victim = e
        e += 1
    t.clock += 1
    victim.page = page
    victim.gpa = (gpa >> shift) << shift
    victim.mmu_epoch = mmu_epoch
    victim.epoch = t.epoch
    victim.filled = victim.used = t.clock
    victim.pcid = pcid
    victim.pcid_epoch = t.pcid_epoch[pcid]
    victim.access = access
    victim.pkey = pkey
    victim.dirty = dirty
    victim.is_global = is_global
    victim.shift = shift
    victim.guest_shift = guest_shift
    victim.root = root
    t.fragments += guest_shift > shift


cdef void tlb_fill(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                   bint dirty, bint is_global, u64 mmu_epoch) noexcept nogil:
    """tlb_enter, of a translation that was made of no shadow."""
    tlb_enter(t, va, gpa, shift, guest_shift, pcid, access, pkey, dirty, is_global, mmu_epoch, SC_NONE)


cdef void tlb_flush_all(sc_tlb *t, bint lost) noexcept nogil:
    """Every entry goes: loads of CR0, CR4 and EFER that change paging (SDM 4.10.4.1)."""
    t.clock += 1
    t.due_all = t.clock
    if not lost:
        t.epoch += 1


cdef void tlb_flush_pcid(sc_tlb *t, u16 pcid, bint lost) noexcept nogil:
    """The entries of `pcid` go that are not global: a CR3 load without bit 63."""
    t.clock += 1
    t.due_pcid[pcid] = t.clock
    if not lost:
        t.pcid_epoch[pcid] += 1


cdef inline bint _is_of(const sc_tlb_entry *e, u16 pcid) noexcept nogil:
    """A flush of one page under `pcid`, or TLB_ANY_PCID, is for the entry as well. Global ones serve every PCID, and go
    unless `pcid` has TLB_NOT_GLOBAL."""
    if pcid == TLB_ANY_PCID:
        return True
    if e.is_global:
        return not pcid & TLB_NOT_GLOBAL
    return e.pcid == pcid & (TLB_NOT_GLOBAL - 1)


cdef void _forget(sc_tlb *t, u64 va, int shift, u16 pcid) noexcept nogil:
    cdef int size = _class(shift)
    cdef sc_tlb_entry *e
    if t.ways[size] == 0:
        return
    e = _set(t, size, va, shift)
    for _ in range(t.ways[size]):
        if e.shift == shift and e.page == ((va >> shift) << shift | 1) and _is_of(e, pcid):
            e.page = 0
        e += 1


cdef void _flush_page(sc_tlb *t, u64 va, u16 pcid, bint lost) noexcept nogil:
    """Every entry for the page goes, of whatever size, that is of `pcid`: see _is_of."""
    cdef sc_tlb_entry *e
    cdef u32 i
    t.clock += 1
    t.due_page[t.due_next] = va
    t.due_page_at[t.due_next] = t.clock
    t.due_page_pcid[t.due_next] = pcid
    t.due_next = (t.due_next + 1) % TLB_PAGES
    if lost:
        return
    _forget(t, va, 12, pcid)
    _forget(t, va, 21, pcid)
    _forget(t, va, 22, pcid)
    _forget(t, va, 30, pcid)
    if t.fragments:
        # What the guest has as one large page may be here in many small ones, which go together (SDM 4.10.2.3).
        for i in range(t.sets[0] * t.ways[0]):
            e = &t.entry[0][i]
            if (e.guest_shift > e.shift and e.page >> (e.guest_shift & 63) == va >> (e.guest_shift & 63)
                    and _is_of(e, pcid)):
                e.page = 0


cdef void tlb_flush_page(sc_tlb *t, u64 va, bint lost) noexcept nogil:
    """INVLPG: the page's entries under every PCID. (The manual asks that of the current one and of global entries.)"""
    _flush_page(t, va, TLB_ANY_PCID, lost)


cdef void tlb_flush_fault(sc_tlb *t, u64 va, u16 pcid, bint lost) noexcept nogil:
    """A page fault at `va`: the page's entries under the current PCID, and global ones (SDM 4.10.4.1). What was read of
    tables that have changed since cannot fault again, nor be used."""
    _flush_page(t, va, pcid, lost)


cdef void tlb_flush_invpcid(sc_tlb *t, u32 kind, u16 pcid, u64 va, bint lost) noexcept nogil:
    """INVPCID of a type that there is: what it has to drop, and nothing else (SDM 4.10.4.1)."""
    cdef u32 each
    if kind == INVPCID_ADDRESS:
        _flush_page(t, va, pcid | TLB_NOT_GLOBAL, lost)
    elif kind == INVPCID_CONTEXT:
        tlb_flush_pcid(t, pcid, lost)
    elif kind == INVPCID_ALL:
        tlb_flush_all(t, lost)
    else:
        for each in range(4096):
            tlb_flush_pcid(t, <u16>each, lost)


cdef bint tlb_overdue(const sc_tlb *t, const sc_tlb_entry *e) noexcept nogil:
    """A flush that covers the entry fell due after it was filled."""
    cdef int i
    if t.due_all > e.filled or (not e.is_global and t.due_pcid[e.pcid & 4095] > e.filled):
        return True
    for i in range(TLB_PAGES):
        if (t.due_page_at[i] > e.filled and t.due_page[i] >> (e.guest_shift & 63) == e.page >> (e.guest_shift & 63)
                and _is_of(e, t.due_page_pcid[i])):
            return True
    return False
