"""A hardware TLB, one for each vcpu: banks of set-associative entries in one or two levels, tagged by PCID, with global
entries; caches of the entries above the leaves; and, of nested paging, a TLB and caches of the host's tables.

An entry is valid while three things have not moved since it was filled: the MMU's flush epoch (flushes that a shadow
MMU asks for), the TLB's own epoch (loads that drop everything), and the epoch of its PCID (unless it is global). So a
flush is one increment. Rules: SDM vol. 3, 4.10.
"""
from shadowcore.engine.types cimport u8, u16, u32, u64

cdef enum:
    TLB_SIZES = 3                   # 4 KiB; 2 or 4 MiB; 1 GiB
    TLB_BANKS = 16
    TLB_CACHES = 4                  # of table entries at levels 2 to 5
    TLB_PAGES = 64                  # INVLPGs and page faults that the audit remembers
    TLB_ANY_PCID = 0xFFFF           # in the place of a PCID: each of them
    TLB_NOT_GLOBAL = 0x1000         # beside a PCID: global entries stay

# What looks in a bank, a bit each.
cdef enum:
    TLB_LOAD = 1
    TLB_STORE = 2
    TLB_FETCH = 4
    TLB_EVERY = 7

# Types of INVPCID (SDM vol. 2).
cdef enum:
    INVPCID_ADDRESS = 0
    INVPCID_CONTEXT = 1
    INVPCID_ALL = 2                 # global ones too
    INVPCID_NOT_GLOBAL = 3
    INVPCID_TYPES = 4

cdef struct sc_tlb_entry:
    u64 page                        # linear address of the page, | 1 while the entry was ever filled
    u64 gpa                         # of its first byte
    u64 mmu_epoch                   # sc_mmu.flush_epoch when it was filled
    u64 epoch                       # sc_tlb.epoch when it was filled
    u64 filled                      # sc_tlb.clock when it was filled
    u32 pcid_epoch                  # sc_tlb.pcid_epoch of its PCID when it was filled
    u16 pcid
    u8 access                       # ACC_*
    u8 pkey
    u8 dirty                        # D was set: stores need no walk
    u8 is_global                    # G was set and CR4.PGE on
    u8 shift                        # log2 of the page size
    u8 guest_shift                  # log2 of the guest's page size, of which this may be a fragment
    u32 root                        # shadow page from which the walk started; native: SC_NONE

cdef struct sc_tlb_bank:
    sc_tlb_entry *entry             # sets * ways, a set in one piece
    u64 *used                       # of each: sc_tlb.clock when it was last hit; plru: of a first way, the set's tree
    # What a search reads, for it to touch few lines of a cache. Made of the entries, and not saved.
    u64 *tag                        # of each: see tlb_tag; 0: it was never filled, or dropped by itself
    u64 *full                       # of each set: sc_tlb.clock when all of it was last seen to be valid
    u32 sets
    u32 ways
    u32 sizes                       # of pages that it holds, a bit each
    u32 kinds                       # TLB_*: what looks in it; 0: it is of guest physical addresses
    u32 level                       # 1 or 2
    bint plru                       # replaced by a tree of bits, else the least recently used

cdef struct sc_tlb:
    sc_tlb_bank bank[TLB_BANKS]     # those of the first level come first
    u32 banks                       # how many there are
    u64 stale                       # clock since which no entry became invalid
    u64 seen                        # sc_mmu.flush_epoch of then
    bint open                       # a batch may ask it before anything else (not so with Mmu.general)
    bint caching                    # there are such caches, or a nested TLB:
    sc_tlb_bank cache[TLB_CACHES]   # of table entries at level 2, 3, 4, 5; ways 0: none
    sc_tlb_bank host[TLB_CACHES]    # nested paging: the same of the host's tables
    sc_tlb_bank nested              # ... and whole translations there: page is a gpa, gpa where it leads; ways 0: none
    u64 clock                       # counts fills, hits and flushes
    u64 epoch                       # a new one drops every entry
    u64 fragments                   # fills with a part of a larger page of the guest, ever
    u64 turn                        # replacements for which several banks with trees stood to choice, ever
    u64 shifts                      # sizes of pages that were ever filled in, bit log2
    u32 cache_epoch[4096]           # a new one drops what paging-structure caches have of a PCID
    u32 pcid_epoch[4096]            # a new one drops the entries of a PCID that are not global
    # What the guest's instructions made stale, kept apart from the flushing itself, for the audit (I8).
    u64 due_all                     # clock of the last load that drops everything
    u64 due_pcid[4096]              # clock of the last CR3 load that drops a PCID
    u64 due_page[TLB_PAGES]         # addresses of the last INVLPGs and page faults, ...
    u64 due_page_at[TLB_PAGES]      # ... their clocks, ...
    u16 due_page_pcid[TLB_PAGES]    # ... and the PCID of which entries go, | TLB_NOT_GLOBAL, or TLB_ANY_PCID
    u32 due_next                    # slot of the next of them

cdef inline bint tlb_valid(const sc_tlb *t, const sc_tlb_entry *e, u64 mmu_epoch) noexcept nogil:
    return (e.page & 1 and e.mmu_epoch == mmu_epoch and e.epoch == t.epoch
            and (e.is_global or e.pcid_epoch == t.pcid_epoch[e.pcid & 4095]))

cdef inline int tlb_class(int shift) noexcept nogil:
    return 0 if shift == 12 else 1 if shift < 30 else 2

cdef inline int tlb_shift(int k) noexcept nogil:
    """log2 of the sizes of pages that there are, of 4 KiB first; k from 0 to 3."""
    return 12 if k == 0 else 21 if k == 1 else 22 if k == 2 else 30

cdef inline u64 tlb_set(const sc_tlb_bank *b, u64 va, int shift) noexcept nogil:
    """Number of the set."""
    if b.sets & (b.sets - 1) == 0:
        return (va >> shift) & (b.sets - 1)
    return (va >> shift) % b.sets

cdef inline u64 tlb_tag(u64 va, int shift, u16 pcid, bint is_global) noexcept nogil:
    """What tells the page of `va` from others: bits 12 to 56 of its address, PCID, global, size; never 0. A global one
    serves every PCID."""
    cdef u64 page = (va >> shift) << shift
    return ((page >> 12) << 19) >> 3 | (<u64>0 if is_global else <u64>pcid << 4) | <u64>is_global << 3 | (
        0 if shift == 12 else 2 if shift == 21 else 4 if shift == 22 else 6) | 1

cdef inline sc_tlb_entry *tlb_probe(const sc_tlb *t, const sc_tlb_bank *b, u64 va, int shift, u16 pcid,
                                    u64 mmu_epoch) noexcept nogil:
    cdef u64 first = tlb_set(b, va, shift) * b.ways
    cdef const u64 *tag = b.tag + first
    cdef u64 own = tlb_tag(va, shift, pcid, False)
    cdef u64 every = tlb_tag(va, shift, pcid, True)
    cdef u32 way
    for way in range(b.ways):
        if (tag[way] == own or tag[way] == every) and tlb_valid(t, b.entry + first + way, mmu_epoch):
            return b.entry + first + way
    return NULL

cdef inline sc_tlb_entry *tlb_look(const sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, u32 kind,
                                   u32 *bank) noexcept nogil:
    """The valid entry that translates `va` under `pcid` for an access of a kind (TLB_*), or NULL. bank: where it was
    found; who takes it says so by tlb_use."""
    cdef const sc_tlb_bank *b
    cdef sc_tlb_entry *e
    cdef u32 i
    cdef int k
    for i in range(t.banks):
        b = &t.bank[i]
        if not b.kinds & kind:
            continue
        for k in range(4):
            if t.shifts >> tlb_shift(k) & 1 and b.sizes >> tlb_class(tlb_shift(k)) & 1:
                e = tlb_probe(t, b, va, tlb_shift(k), pcid, mmu_epoch)
                if e != NULL:
                    bank[0] = i
                    return e
    return NULL

cdef inline void tlb_touch(const sc_tlb_bank *b, u64 number, u64 clock) noexcept nogil:
    """The entry of that number was used. A tree has a bit for each inner node of a heap over the ways; it leads to the
    way that goes next."""
    cdef u64 tree
    cdef u32 node = 1
    cdef u32 half = b.ways >> 1
    cdef u32 way
    if not b.plru:
        b.used[number] = clock
        return
    way = <u32>(number % b.ways)
    tree = b.used[number - way]
    while half:
        if way & half:
            tree &= ~(<u64>1 << node)           # to the left next
        else:
            tree |= <u64>1 << node
        node = 2 * node + (way & half != 0)
        half >>= 1
    b.used[number - way] = tree

# An entry of the second level that is used is copied to the first.
cdef void tlb_raise(sc_tlb *t, const sc_tlb_entry *e, u64 mmu_epoch, u32 kind) noexcept nogil

cdef inline void tlb_use(sc_tlb *t, u32 bank, const sc_tlb_entry *e, u64 mmu_epoch, u32 kind) noexcept nogil:
    """The entry, of that bank, is used."""
    cdef sc_tlb_bank *b = &t.bank[bank]
    t.clock += 1
    tlb_touch(b, <u64>(e - b.entry), t.clock)
    if b.level > 1:
        tlb_raise(t, e, mmu_epoch, kind)

cdef void tlb_index(sc_tlb *t) noexcept nogil         # makes the tags anew: the entries were put there
# The two above, by the names under which they were published.
cdef sc_tlb_entry *tlb_lookup(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, u32 kind, u32 *bank) noexcept nogil
cdef void tlb_take(sc_tlb *t, u32 bank, sc_tlb_entry *e, u64 va, u16 pcid, u64 mmu_epoch, u32 kind) noexcept nogil
cdef sc_tlb_entry *tlb_find(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch) noexcept nogil
cdef void tlb_fill(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                   bint dirty, bint is_global, u64 mmu_epoch) noexcept nogil
cdef void tlb_enter(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                    bint dirty, bint is_global, u64 mmu_epoch, u32 root) noexcept nogil
cdef void tlb_walked(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                     bint dirty, bint is_global, u64 mmu_epoch, u32 root, u32 kind) noexcept nogil
# The level of the lowest entry on the way to va that a paging-structure cache has, of a walk from `top` down; 0: none.
cdef int cache_lookup(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, int top, int width) noexcept nogil
# A complete walk has read the entries from `first` down to the leaf at `level`.
cdef void cache_walked(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, int first, int level, int width) noexcept nogil
# The same of the host's tables, by guest physical addresses.
cdef int host_cache_lookup(sc_tlb *t, u64 gpa, u64 mmu_epoch, int top) noexcept nogil
cdef void host_cache_walked(sc_tlb *t, u64 gpa, u64 mmu_epoch, int first, int level) noexcept nogil
# The nested TLB translates gpa, for a store or another access; it learns the page of `shift` at gpa, that is at hpa.
cdef bint nested_tlb_has(sc_tlb *t, u64 gpa, u64 mmu_epoch, bint store) noexcept nogil
cdef void nested_tlb_filled(sc_tlb *t, u64 gpa, u64 hpa, int shift, bint dirty, u64 mmu_epoch, u32 root) noexcept nogil
cdef void tlb_violated(sc_tlb *t, u64 gpa) noexcept nogil
cdef void tlb_flush_all(sc_tlb *t, bint lost) noexcept nogil
cdef void tlb_flush_pcid(sc_tlb *t, u16 pcid, bint lost) noexcept nogil
cdef void tlb_flush_page(sc_tlb *t, u64 va, bint lost) noexcept nogil
cdef void tlb_flush_fault(sc_tlb *t, u64 va, u16 pcid, bint lost) noexcept nogil
cdef void tlb_flush_invpcid(sc_tlb *t, u32 kind, u16 pcid, u64 va, bint lost) noexcept nogil
cdef void tlb_flush_caches(sc_tlb *t, u64 va, u16 pcid, bint all_) noexcept nogil
cdef bint tlb_overdue(const sc_tlb *t, const sc_tlb_entry *e) noexcept nogil
