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
    u64 used                        # sc_tlb.clock when it was last hit; plru: in the first way, the tree of the set
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
    u32 sets
    u32 ways
    u32 sizes                       # of pages that it holds, a bit each
    u32 kinds                       # TLB_*: what looks in it; 0: it is of guest physical addresses
    u32 level                       # 1 or 2
    bint plru                       # replaced by a tree of bits, else the least recently used

cdef struct sc_tlb:
    sc_tlb_bank bank[TLB_BANKS]     # those of the first level come first
    u32 banks                       # how many there are
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

cdef sc_tlb_entry *tlb_find(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch) noexcept nogil
cdef void tlb_fill(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                   bint dirty, bint is_global, u64 mmu_epoch) noexcept nogil
cdef void tlb_enter(sc_tlb *t, u64 va, u64 gpa, int shift, int guest_shift, u16 pcid, u32 access, u32 pkey,
                    bint dirty, bint is_global, u64 mmu_epoch, u32 root) noexcept nogil
# For an access of a kind (TLB_*). bank: where it was found; who takes it says so by tlb_take.
cdef sc_tlb_entry *tlb_lookup(sc_tlb *t, u64 va, u16 pcid, u64 mmu_epoch, u32 kind, u32 *bank) noexcept nogil
cdef void tlb_take(sc_tlb *t, u32 bank, sc_tlb_entry *e, u64 va, u16 pcid, u64 mmu_epoch, u32 kind) noexcept nogil
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
