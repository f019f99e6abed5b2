"""The TLB: lookup, fill, and the flushes of register loads, INVLPG and page faults.

Paging-structure caches tell how many references of a walk are left, and nothing else: the tables are read anew, which
a processor may do at any time, for it may forget what it has cached. So no stale entry is ever used.

`lost`, in the flush functions, is for tests alone: the flush becomes due and does not happen.
"""
from libc.string cimport memset

from shadowcore.engine.tlb cimport (
    INVPCID_ADDRESS, INVPCID_ALL, INVPCID_CONTEXT, TLB_ANY_PCID, TLB_CACHES, TLB_EVERY, TLB_NOT_GLOBAL, TLB_PAGES,
    sc_tlb, sc_tlb_bank, sc_tlb_entry, tlb_class, tlb_look, tlb_set, tlb_shift, tlb_tag, tlb_touch,
    tlb_use, tlb_valid,
)
from shadowcore.engine.types cimport SC_NONE, u16, u32, u64

cdef inline u32 _next_by_tree(const sc_tlb_bank *b, u64 set_) noexcept nogil:
    """The way that the tree of the set leads to."""
    cdef u64 tree = b.used[set_ * b.ways]
    cdef u32 node = 1
    while node < b.ways:
        node = 2 * node + <u32>(tree >> node & 1)
    return node - b.ways


cdef inline void _tag(const sc_tlb_bank *b, u64 number) noexcept nogil:
    cdef const sc_tlb_entry *e = &b.entry[number]
    b.tag[number] = tlb_tag(e.page, e.shift, e.pcid, e.is_global) if e.page & 1 else 0


cdef inline void _drop(const sc_tlb_bank *b, u64 number) noexcept nogil:
    b.entry[number].page = 0
    b.tag[number] = 0


cdef void tlb_index(sc_tlb *t) noexcept nogil:
    cdef sc_tlb_bank *b
    cdef u64 i
    cdef u32 n
    t.stale = t.clock + 1           # no set was seen to be full
    for n in range(t.banks):
        b = &t.bank[n]
        memset(b.full, 0, b.sets * sizeof(u64))
        for i in range(<u64>b.sets * b.ways):
            _tag(b, i)


# Fill

cdef sc_tlb_entry *tlb_lookup(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, u32 kind, u32 *bank) noexcept nogil:
    return tlb_look(t, va, pcid, mmu_epoch, kind, bank)


cdef void tlb_take(sc_tlb *t, u32 bank, sc_tlb_entry *e, u64 va, u16 pcid, u64 mmu_epoch, u32 kind) noexcept nogil:
    tlb_use(t, bank, e, mmu_epoch, kind)


cdef sc_tlb_entry *tlb_find(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch) noexcept nogil:
    """The valid entry that translates `va` under `pcid`, or NULL."""
    cdef u32 bank
    return tlb_look(t, va, pcid, mmu_epoch, TLB_EVERY, &bank)


cdef inline bint _takes(const sc_tlb_bank *b, u32 level, int shift, u32 kind) noexcept nogil:
    return b.level == level and b.kinds & kind and b.sizes >> tlb_class(shift) & 1


cdef sc_tlb_bank *_same(sc_tlb *t, u32 level, const sc_tlb_entry *made, u32 kind, u64 *place) noexcept nogil:
    """The bank with an entry of the same page, valid or not, that the new one replaces, and its place; or NULL."""
    cdef u64 own = tlb_tag(made.page, made.shift, made.pcid, False)
    cdef u64 every = tlb_tag(made.page, made.shift, made.pcid, True)
    cdef u64 telling = ~<u64>0xFFF8 if made.is_global else ~<u64>0      # a global one replaces that of any PCID
    cdef sc_tlb_bank *b
    cdef u64 first
    cdef u32 i, way
    for i in range(t.banks):
        b = &t.bank[i]
        if not _takes(b, level, made.shift, kind):
            continue
        first = tlb_set(b, made.page, made.shift) * b.ways
        for way in range(b.ways):
            if (b.tag[first + way] ^ own) & telling == 0 or b.tag[first + way] == every:
                place[0] = first + way
                return b
    return NULL


cdef inline bint _is_full(const sc_tlb *t, const sc_tlb_bank *b, u64 set_, u64 mmu_epoch, u32 *free) noexcept nogil:
    """All entries of the set are valid; else `free` is the first way that is not. What was seen to be full stays so
    until an entry somewhere becomes invalid."""
    cdef u32 way
    if b.full[set_] >= t.stale:
        return True
    for way in range(b.ways):
        if not tlb_valid(t, &b.entry[set_ * b.ways + way], mmu_epoch):
            free[0] = way
            return False
    b.full[set_] = t.clock
    return True


cdef bint _is_new(const sc_tlb *t, u32 level, const sc_tlb_entry *made, u64 mmu_epoch, u32 kind) noexcept nogil:
    """No lookup in this level found the page. Then no entry is of it, if there is none that is not valid."""
    cdef const sc_tlb_bank *b
    cdef u32 i
    if made.is_global or t.seen != mmu_epoch:
        return False
    for i in range(t.banks):
        b = &t.bank[i]
        if _takes(b, level, made.shift, kind) and b.full[tlb_set(b, made.page, made.shift)] < t.stale:
            return False
    return True


cdef sc_tlb_bank *_place(sc_tlb *t, u32 level, const sc_tlb_entry *made, u64 mmu_epoch, u32 kind, bint sought,
                         u64 *place) noexcept nogil:
    """Where an entry goes in this level: over one of the same page, else to a free place, else to that of the least
    recently used, or to the one that the tree of a bank names, banks taking turns. NULL: nowhere. sought: a lookup of
    the same kind found none there."""
    cdef sc_tlb_bank *victim = NULL
    cdef sc_tlb_bank *b
    cdef u64 set_
    cdef u32 free = 0
    cdef u32 i, way
    cdef u32 trees = 0
    cdef u32 chosen
    if not sought or not _is_new(t, level, made, mmu_epoch, kind):
        victim = _same(t, level, made, kind, place)
    if victim != NULL:
        return victim
    if t.seen != mmu_epoch:
        t.seen = mmu_epoch
        t.stale = t.clock
    for i in range(t.banks):
        b = &t.bank[i]
        if not _takes(b, level, made.shift, kind):
            continue
        set_ = tlb_set(b, made.page, made.shift)
        if not _is_full(t, b, set_, mmu_epoch, &free):
            place[0] = set_ * b.ways + free
            return b
        trees += b.plru
        if b.plru:
            continue
        for way in range(b.ways):
            if victim == NULL or b.used[set_ * b.ways + way] < victim.used[place[0]]:
                victim = b
                place[0] = set_ * b.ways + way
    if not trees:
        return victim
    chosen = <u32>(t.turn % trees)
    t.turn += trees > 1
    for i in range(t.banks):
        b = &t.bank[i]
        if not _takes(b, level, made.shift, kind):
            continue
        if chosen == 0:
            set_ = tlb_set(b, made.page, made.shift)
            place[0] = set_ * b.ways + _next_by_tree(b, set_)
            return b
        chosen -= 1
    return NULL


cdef inline void _fill_level(sc_tlb *t, u32 level, const sc_tlb_entry *made, u64 mmu_epoch, u32 kind,
                             bint sought) noexcept nogil:
    cdef u64 place = 0
    cdef sc_tlb_bank *b = _place(t, level, made, mmu_epoch, kind, sought, &place)
    if b == NULL:
        return
    b.entry[place] = made[0]
    _tag(b, place)
    tlb_touch(b, place, t.clock)
    t.fragments += made.guest_shift > made.shift


cdef void tlb_raise(sc_tlb *t, const sc_tlb_entry *e, u64 mmu_epoch, u32 kind) noexcept nogil:
    _fill_level(t, 1, e, mmu_epoch, kind, True)


cdef void tlb_walked(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                     bint dirty, bint is_global, u64 mmu_epoch, u32 root, u32 kind) noexcept nogil:
    """Enter the translation of the page of `va` into both levels."""
    cdef sc_tlb_entry made
    t.clock += 1
    made.page = (va >> shift) << shift | 1
    made.gpa = (gpa >> shift) << shift
    made.mmu_epoch = mmu_epoch
    made.epoch = t.epoch
    made.filled = t.clock
    made.pcid = pcid
    made.pcid_epoch = t.pcid_epoch[pcid]
    made.access = access
    made.pkey = pkey
    made.dirty = dirty
    made.is_global = is_global
    made.shift = shift
    made.guest_shift = guest_shift
    made.root = root
    t.shifts |= <u64>1 << shift
    _fill_level(t, 1, &made, mmu_epoch, kind, False)
    _fill_level(t, 2, &made, mmu_epoch, kind, False)


cdef void tlb_enter(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                    bint dirty, bint is_global, u64 mmu_epoch, u32 root) noexcept nogil:
    """tlb_walked, for all kinds of accesses that look in one bank."""
    tlb_walked(t, va, gpa, shift, guest_shift, pcid, access, pkey, dirty, is_global, mmu_epoch, root, TLB_EVERY)


cdef void tlb_fill(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                   bint dirty, bint is_global, u64 mmu_epoch) noexcept nogil:
    """tlb_enter, of a translation that was made of no shadow."""
    tlb_enter(t, va, gpa, shift, guest_shift, pcid, access, pkey, dirty, is_global, mmu_epoch, SC_NONE)


# Paging-structure caches: their entries are never global, `shift` is that of what the table entry covers. Those of the
# host's tables have no PCID, and the guest's flushes do not reach them: SDM vol. 3, 28.3 (guest-physical mappings).

cdef inline int _covers(int level, int width) noexcept nogil:
    return 12 + width * (level - 1)


cdef sc_tlb_entry *_cached(sc_tlb *t, sc_tlb_bank *b, u64 va, int shift, u16 pcid, u64 mmu_epoch,
                           sc_tlb_entry **victim) noexcept nogil:
    """The valid entry, or NULL with the place that the next one takes."""
    cdef u64 set_ = tlb_set(b, va, shift)
    cdef u64 last = set_ * b.ways + (_next_by_tree(b, set_) if b.plru else 0)
    cdef sc_tlb_entry *e
    cdef bint valid
    cdef bint empty = False
    cdef u64 number
    for number in range(set_ * b.ways, (set_ + 1) * b.ways):
        e = &b.entry[number]
        valid = e.page & 1 and e.mmu_epoch == mmu_epoch and (
            not b.kinds or (e.epoch == t.epoch and e.pcid_epoch == t.cache_epoch[e.pcid & 4095]))
        if valid and e.page == ((va >> shift) << shift | 1) and e.shift == shift and e.pcid == pcid:
            return e
        if not valid and not empty:
            last = number
            empty = True
        elif not empty and not b.plru and b.used[number] < b.used[last]:
            last = number
    victim[0] = &b.entry[last]
    return NULL


cdef inline void _used(sc_tlb *t, sc_tlb_bank *b, const sc_tlb_entry *e) noexcept nogil:
    tlb_touch(b, <u64>(e - b.entry), t.clock)


cdef int _lowest(sc_tlb *t, sc_tlb_bank *cache, u64 va, u16 pcid, u64 mmu_epoch, int top, int width) noexcept nogil:
    cdef sc_tlb_entry *e
    cdef sc_tlb_entry *victim
    cdef int level
    for level in range(2, top + 1):
        if cache[level - 2].ways == 0:
            continue
        e = _cached(t, &cache[level - 2], va, _covers(level, width), pcid, mmu_epoch, &victim)
        if e != NULL:
            t.clock += 1
            _used(t, &cache[level - 2], e)
            return level
    return 0


cdef sc_tlb_entry *_learn(sc_tlb *t, sc_tlb_bank *b, u64 va, int shift, u16 pcid, u64 mmu_epoch) noexcept nogil:
    """The entry of a cache for what covers `va`, made now or anew."""
    cdef sc_tlb_entry *to
    cdef sc_tlb_entry *e = _cached(t, b, va, shift, pcid, mmu_epoch, &to)
    if e != NULL:
        to = e
    to.page = (va >> shift) << shift | 1
    to.shift = shift
    to.mmu_epoch = mmu_epoch
    to.epoch = t.epoch
    to.pcid = pcid
    to.pcid_epoch = t.cache_epoch[pcid]
    _used(t, b, to)
    return to


cdef void _walked(sc_tlb *t, sc_tlb_bank *cache, u64 va, u16 pcid, u64 mmu_epoch, int first, int level,
                  int width) noexcept nogil:
    t.clock += 1
    for level in range(level + 1, first + 1):
        if cache[level - 2].ways:
            _learn(t, &cache[level - 2], va, _covers(level, width), pcid, mmu_epoch)


cdef int cache_lookup(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, int top, int width) noexcept nogil:
    return _lowest(t, t.cache, va, pcid, mmu_epoch, top, width)


cdef void cache_walked(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, int first, int level, int width) noexcept nogil:
    _walked(t, t.cache, va, pcid, mmu_epoch, first, level, width)


cdef int host_cache_lookup(sc_tlb *t, u64 gpa, u64 mmu_epoch, int top) noexcept nogil:
    return _lowest(t, t.host, gpa, 0, mmu_epoch, top, 9)


cdef void host_cache_walked(sc_tlb *t, u64 gpa, u64 mmu_epoch, int first, int level) noexcept nogil:
    _walked(t, t.host, gpa, 0, mmu_epoch, first, level, 9)


cdef bint nested_tlb_has(sc_tlb *t, u64 gpa, u64 mmu_epoch, bint store) noexcept nogil:
    cdef sc_tlb_entry *e
    cdef sc_tlb_entry *victim
    cdef int shift
    for shift in range(12, 31, 9):
        if not t.nested.sizes >> tlb_class(shift) & 1:
            continue
        e = _cached(t, &t.nested, gpa, shift, 0, mmu_epoch, &victim)
        if e != NULL and (e.dirty or not store):
            t.clock += 1
            _used(t, &t.nested, e)
            return True
    return False


cdef void nested_tlb_filled(sc_tlb *t, u64 gpa, u64 hpa, int shift, bint dirty, u64 mmu_epoch, u32 root) noexcept nogil:
    cdef sc_tlb_entry *e
    if not t.nested.sizes >> tlb_class(shift) & 1:
        return
    t.clock += 1
    e = _learn(t, &t.nested, gpa, shift, 0, mmu_epoch)
    e.gpa = (hpa >> shift) << shift
    e.dirty = dirty
    e.root = root


cdef void tlb_violated(sc_tlb *t, u64 gpa) noexcept nogil:
    """An exit at gpa, which the host's tables refuse: what was cached of them for it goes (SDM vol. 3, 28.3.3.1)."""
    cdef sc_tlb_bank *b
    cdef u64 i
    cdef int level
    for level in range(TLB_CACHES + 1):
        b = &t.host[level] if level < TLB_CACHES else &t.nested
        for i in range(<u64>b.sets * b.ways):
            if (b.entry[i].page ^ gpa) >> (b.entry[i].shift & 63) == 0:
                b.entry[i].page = 0


# Flushes

cdef void tlb_flush_all(sc_tlb *t, bint lost) noexcept nogil:
    """Every entry goes: loads of CR0, CR4 and EFER that change paging (SDM 4.10.4.1)."""
    t.clock += 1
    t.due_all = t.stale = t.clock
    if not lost:
        t.epoch += 1


cdef void tlb_flush_pcid(sc_tlb *t, u16 pcid, bint lost) noexcept nogil:
    """The entries of `pcid` go that are not global: a CR3 load without bit 63."""
    t.clock += 1
    t.due_pcid[pcid] = t.stale = t.clock
    if not lost:
        t.pcid_epoch[pcid] += 1
        t.cache_epoch[pcid] += 1


cdef inline bint _is_of(const sc_tlb_entry *e, u16 pcid) noexcept nogil:
    """A flush of one page under `pcid`, or TLB_ANY_PCID, is for the entry as well. Global ones serve every PCID, and go
    unless `pcid` has TLB_NOT_GLOBAL."""
    if pcid == TLB_ANY_PCID:
        return True
    if e.is_global:
        return not pcid & TLB_NOT_GLOBAL
    return e.pcid == pcid & (TLB_NOT_GLOBAL - 1)


cdef void _forget(const sc_tlb_bank *b, u64 va, int shift, u16 pcid) noexcept nogil:
    cdef u64 first = tlb_set(b, va, shift) * b.ways
    cdef u64 number
    for number in range(first, first + b.ways):
        if (b.entry[number].shift == shift and b.entry[number].page == ((va >> shift) << shift | 1)
                and _is_of(&b.entry[number], pcid)):
            _drop(b, number)


cdef void _flush_page(sc_tlb *t, u64 va, u16 pcid, bint lost) noexcept nogil:
    """Every entry for the page goes, of whatever size, that is of `pcid`: see _is_of."""
    cdef sc_tlb_bank *b
    cdef sc_tlb_entry *e
    cdef u32 i, n
    cdef int k
    t.clock += 1
    t.due_page[t.due_next] = va
    t.due_page_at[t.due_next] = t.stale = t.clock
    t.due_page_pcid[t.due_next] = pcid
    t.due_next = (t.due_next + 1) % TLB_PAGES
    if lost:
        return
    for n in range(t.banks):
        b = &t.bank[n]
        for k in range(4):
            if t.shifts >> tlb_shift(k) & 1 and b.sizes >> tlb_class(tlb_shift(k)) & 1:
                _forget(b, va, tlb_shift(k), pcid)
        if not t.fragments:
            continue
        # What the guest has as one large page may be here in many small ones, which go together (SDM 4.10.2.3).
        for i in range(b.sets * b.ways):
            e = &b.entry[i]
            if (e.guest_shift > e.shift and e.page >> (e.guest_shift & 63) == va >> (e.guest_shift & 63)
                    and _is_of(e, pcid)):
                _drop(b, i)


cdef void tlb_flush_page(sc_tlb *t, u64 va, bint lost) noexcept nogil:
    """INVLPG: the page's entries under every PCID. (The manual asks that of the current one and of global entries.) The
    paging-structure caches of the current PCID are dropped by who knows that: see tlb_flush_caches."""
    _flush_page(t, va, TLB_ANY_PCID, lost)


cdef void tlb_flush_caches(sc_tlb *t, u64 va, u16 pcid, bint all_) noexcept nogil:
    """What paging-structure caches have of a PCID goes: all of it, or what leads to `va` (SDM 4.10.4.1)."""
    cdef sc_tlb_entry *e
    cdef u32 i
    cdef int level
    if all_:
        t.cache_epoch[pcid] += 1
        return
    for level in range(4):
        for i in range(t.cache[level].sets * t.cache[level].ways):
            e = &t.cache[level].entry[i]
            if e.pcid == pcid and e.page & 1 and (e.page ^ va) >> (e.shift & 63) == 0:
                e.page = 0


cdef void tlb_flush_fault(sc_tlb *t, u64 va, u16 pcid, bint lost) noexcept nogil:
    """A page fault at `va`: the page's entries under the current PCID, and global ones (SDM 4.10.4.1). What was read of
    tables that have changed since cannot fault again, nor be used."""
    _flush_page(t, va, pcid, lost)


cdef void tlb_flush_invpcid(sc_tlb *t, u32 kind, u16 pcid, u64 va, bint lost) noexcept nogil:
    """INVPCID of a type that there is: what it has to drop, and nothing else (SDM 4.10.4.1)."""
    cdef u32 each
    if kind == INVPCID_ADDRESS:
        _flush_page(t, va, pcid | TLB_NOT_GLOBAL, lost)
        tlb_flush_caches(t, va, pcid, True)
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
