"""The TLB: lookup, fill, and the flushes of register loads, INVLPG and page faults.

Paging-structure caches tell how many references of a walk are left, and nothing else: the tables are read anew, which
a processor may do at any time, for it may forget what it has cached. So no stale entry is ever used.

`lost`, in the flush functions, is for tests alone: the flush becomes due and does not happen.
"""
from shadowcore.engine.tlb cimport (
    INVPCID_ADDRESS, INVPCID_ALL, INVPCID_CONTEXT, TLB_ANY_PCID, TLB_CACHES, TLB_EVERY, TLB_NOT_GLOBAL, TLB_PAGES,
    sc_tlb, sc_tlb_bank, sc_tlb_entry, tlb_valid,
)
from shadowcore.engine.types cimport SC_NONE, u16, u32, u64

# log2 of the sizes of pages that there are, of 4 KiB first.
cdef int _shift[4]
_shift[0], _shift[1], _shift[2], _shift[3] = 12, 21, 22, 30


cdef inline int _class(int shift) noexcept nogil:
    return 0 if shift == 12 else 1 if shift < 30 else 2


cdef inline sc_tlb_entry *_set(const sc_tlb_bank *b, u64 va, int shift) noexcept nogil:
    if b.sets & (b.sets - 1) == 0:
        return b.entry + ((va >> shift) & (b.sets - 1)) * b.ways
    return b.entry + ((va >> shift) % b.sets) * b.ways


# Replacement. A tree has a bit for each inner node of a heap over the ways; it leads to the way that goes next.

cdef inline void _touch(sc_tlb_entry *set_, u32 ways, u32 way, bint plru, u64 clock) noexcept nogil:
    """The way was used."""
    cdef u64 tree
    cdef u32 node = 1
    cdef u32 half = ways >> 1
    if not plru:
        set_[way].used = clock
        return
    tree = set_[0].used
    while half:
        if way & half:
            tree &= ~(<u64>1 << node)           # to the left next
        else:
            tree |= <u64>1 << node
        node = 2 * node + (way & half != 0)
        half >>= 1
    set_[0].used = tree


cdef inline u32 _next_by_tree(const sc_tlb_entry *set_, u32 ways) noexcept nogil:
    cdef u64 tree = set_[0].used
    cdef u32 node = 1
    while node < ways:
        node = 2 * node + <u32>(tree >> node & 1)
    return node - ways


# Lookup and fill

cdef inline sc_tlb_entry *_probe(const sc_tlb *t, const sc_tlb_bank *b, u64 va, int shift, u16 pcid,
                                 u64 mmu_epoch) noexcept nogil:
    cdef sc_tlb_entry *e = _set(b, va, shift)
    cdef u64 page = (va >> shift) << shift | 1
    for _ in range(b.ways):
        if e.page == page and e.shift == shift and tlb_valid(t, e, mmu_epoch) and (e.is_global or e.pcid == pcid):
            return e
        e += 1
    return NULL


cdef sc_tlb_entry *tlb_lookup(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, u32 kind, u32 *bank) noexcept nogil:
    cdef sc_tlb_bank *b
    cdef sc_tlb_entry *e
    cdef u32 i
    cdef int k
    for i in range(t.banks):
        b = &t.bank[i]
        if not b.kinds & kind:
            continue
        for k in range(4):
            if t.shifts >> _shift[k] & 1 and b.sizes >> _class(_shift[k]) & 1:
                e = _probe(t, b, va, _shift[k], pcid, mmu_epoch)
                if e != NULL:
                    bank[0] = i
                    return e
    return NULL


cdef sc_tlb_entry *tlb_find(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch) noexcept nogil:
    """The valid entry that translates `va` under `pcid`, or NULL."""
    cdef u32 bank
    return tlb_lookup(t, va, pcid, mmu_epoch, TLB_EVERY, &bank)


cdef sc_tlb_entry *_place(sc_tlb *t, u32 level, u64 page, int shift, u16 pcid, bint is_global, u64 mmu_epoch, u32 kind,
                          sc_tlb_bank **bank) noexcept nogil:
    """Where an entry for the page goes in this level: over one of the same page, else to a free place, else to that of
    the least recently used, or to the one that the tree of a bank names, banks taking turns. NULL: nowhere."""
    cdef sc_tlb_bank *b
    cdef sc_tlb_entry *e
    cdef sc_tlb_entry *set_
    cdef sc_tlb_entry *victim = NULL
    cdef bint empty = False         # the victim is no valid entry
    cdef u32 i, way
    cdef u32 trees = 0
    cdef u32 chosen
    for i in range(t.banks):
        b = &t.bank[i]
        if b.level != level or not b.kinds & kind or not b.sizes >> _class(shift) & 1:
            continue
        set_ = _set(b, page, shift)
        trees += b.plru
        for way in range(b.ways):
            e = set_ + way
            if e.page == page and e.shift == shift and (e.pcid == pcid or e.is_global or is_global):
                bank[0] = b
                return e
            if empty:
                continue
            if not tlb_valid(t, e, mmu_epoch):
                victim = e
                bank[0] = b
                empty = True
            elif not b.plru and (victim == NULL or e.used < victim.used):
                victim = e
                bank[0] = b
    if empty or not trees:
        return victim
    chosen = <u32>(t.turn % trees)
    t.turn += trees > 1
    for i in range(t.banks):
        b = &t.bank[i]
        if b.level != level or not b.kinds & kind or not b.sizes >> _class(shift) & 1:
            continue
        if chosen == 0:
            bank[0] = b
            set_ = _set(b, page, shift)
            return set_ + _next_by_tree(set_, b.ways)
        chosen -= 1
    return NULL


cdef inline void _put(sc_tlb *t, sc_tlb_bank *b, sc_tlb_entry *to, const sc_tlb_entry *made) noexcept nogil:
    """An entry, in a place of its set: what the place has of its own is when it was used."""
    cdef sc_tlb_entry *set_ = _set(b, made.page, made.shift)
    cdef u64 used = to.used
    to[0] = made[0]
    to.used = used
    _touch(set_, b.ways, <u32>(to - set_), b.plru, t.clock)


cdef void _fill_level(sc_tlb *t, u32 level, const sc_tlb_entry *made, u64 mmu_epoch, u32 kind) noexcept nogil:
    cdef sc_tlb_bank *b = NULL
    cdef sc_tlb_entry *to = _place(t, level, made.page, made.shift, made.pcid, made.is_global, mmu_epoch, kind, &b)
    if to != NULL:
        _put(t, b, to, made)
        t.fragments += made.guest_shift > made.shift


cdef void tlb_take(sc_tlb *t, u32 bank, sc_tlb_entry *e, u64 va, u16 pcid, u64 mmu_epoch, u32 kind) noexcept nogil:
    """The entry, of that bank, is used. Of the second level it is copied to the first."""
    cdef sc_tlb_bank *b = &t.bank[bank]
    cdef sc_tlb_entry *set_ = _set(b, va, e.shift)
    t.clock += 1
    _touch(set_, b.ways, <u32>(e - set_), b.plru, t.clock)
    if b.level > 1:
        _fill_level(t, 1, e, mmu_epoch, kind)


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
    made.used = 0
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
    _fill_level(t, 1, &made, mmu_epoch, kind)
    _fill_level(t, 2, &made, mmu_epoch, kind)


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
    cdef sc_tlb_entry *set_ = _set(b, va, shift)
    cdef sc_tlb_entry *e
    cdef bint valid
    cdef bint empty = False
    cdef u32 way
    victim[0] = set_ + (_next_by_tree(set_, b.ways) if b.plru else 0)
    for way in range(b.ways):
        e = set_ + way
        valid = e.page & 1 and e.mmu_epoch == mmu_epoch and (
            not b.kinds or (e.epoch == t.epoch and e.pcid_epoch == t.cache_epoch[e.pcid & 4095]))
        if valid and e.page == ((va >> shift) << shift | 1) and e.shift == shift and e.pcid == pcid:
            return e
        if not valid and not empty:
            victim[0] = e
            empty = True
        elif not empty and not b.plru and e.used < victim[0].used:
            victim[0] = e
    return NULL


cdef inline void _used(sc_tlb *t, sc_tlb_bank *b, sc_tlb_entry *e, u64 va, int shift) noexcept nogil:
    cdef sc_tlb_entry *set_ = _set(b, va, shift)
    _touch(set_, b.ways, <u32>(e - set_), b.plru, t.clock)


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
            _used(t, &cache[level - 2], e, va, _covers(level, width))
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
    _used(t, b, to, va, shift)
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
        if not t.nested.sizes >> _class(shift) & 1:
            continue
        e = _cached(t, &t.nested, gpa, shift, 0, mmu_epoch, &victim)
        if e != NULL and (e.dirty or not store):
            t.clock += 1
            _used(t, &t.nested, e, gpa, shift)
            return True
    return False


cdef void nested_tlb_filled(sc_tlb *t, u64 gpa, u64 hpa, int shift, bint dirty, u64 mmu_epoch, u32 root) noexcept nogil:
    cdef sc_tlb_entry *e
    if not t.nested.sizes >> _class(shift) & 1:
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
    t.due_all = t.clock
    if not lost:
        t.epoch += 1


cdef void tlb_flush_pcid(sc_tlb *t, u16 pcid, bint lost) noexcept nogil:
    """The entries of `pcid` go that are not global: a CR3 load without bit 63."""
    t.clock += 1
    t.due_pcid[pcid] = t.clock
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
    cdef sc_tlb_entry *e = _set(b, va, shift)
    for _ in range(b.ways):
        if e.shift == shift and e.page == ((va >> shift) << shift | 1) and _is_of(e, pcid):
            e.page = 0
        e += 1


cdef void _flush_page(sc_tlb *t, u64 va, u16 pcid, bint lost) noexcept nogil:
    """Every entry for the page goes, of whatever size, that is of `pcid`: see _is_of."""
    cdef sc_tlb_bank *b
    cdef sc_tlb_entry *e
    cdef u32 i, n
    cdef int k
    t.clock += 1
    t.due_page[t.due_next] = va
    t.due_page_at[t.due_next] = t.clock
    t.due_page_pcid[t.due_next] = pcid
    t.due_next = (t.due_next + 1) % TLB_PAGES
    if lost:
        return
    for n in range(t.banks):
        b = &t.bank[n]
        for k in range(4):
            if t.shifts >> _shift[k] & 1 and b.sizes >> _class(_shift[k]) & 1:
                _forget(b, va, _shift[k], pcid)
        if not t.fragments:
            continue
        # What the guest has as one large page may be here in many small ones, which go together (SDM 4.10.2.3).
        for i in range(b.sets * b.ways):
            e = &b.entry[i]
            if (e.guest_shift > e.shift and e.page >> (e.guest_shift & 63) == va >> (e.guest_shift & 63)
                    and _is_of(e, pcid)):
                e.page = 0


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
