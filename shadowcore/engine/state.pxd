"""The structures of the shadow MMU. Indices, not pointers, link them, so that they can be printed and saved.

An spte is named by its number: pool page * 512 + index in the page. In lists it is stored as number + 1, so that
zeroed memory means "none".
"""
from shadowcore.engine.bits cimport CR4_PCIDE, is_canonical
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.memo cimport sc_memo
from shadowcore.engine.memory cimport sc_mem
from shadowcore.engine.tlb cimport sc_tlb
from shadowcore.engine.types cimport MODE_64, MODE_LA57, SC_NONE, u8, u16, u32, u64
from shadowcore.engine.walker cimport sc_paging
from shadowcore.engine.watch cimport sc_watch

cdef enum:
    SC_MAX_VCPUS = 64

# Role: what, besides the gfn, identifies a shadow page. Packed into 32 bits.
cdef enum:
    ROLE_GLEVELS = 0                # bits 0-3: guest paging levels, MODE_*
    ROLE_LEVEL = 4                  # bits 4-7: level of the page, 1 to 5
    ROLE_QUADRANT = 8               # bits 8-9: which part of a table of 4-byte entries
    ROLE_DIRECT = 10                # bit 10: no guest table behind the page (2007: metaphysical)
    ROLE_ACCESS = 11                # bits 11-13: ACC_* that the levels above allow (direct: that every leaf grants)
    ROLE_NXE = 14                   # bit 14: EFER.NXE, with which bit 63 means no-execute
    ROLE_PSE = 15                   # bit 15: CR4.PSE, with which 32-bit directories hold 4 MiB leaves
    ROLE_WP0 = 16                   # bit 16: supervisor stores ignore W by leaves that are W and not U
    ROLE_GLOBAL = 17                # bit 17: direct: G of every leaf
    ROLE_PKEY = 18                  # bits 18-21: direct: protection key of every leaf
    ROLE_DIRTY = 22                 # bit 22: direct, wp0, leaves not writable for the guest: its entry is dirty

cdef struct sc_page:                # header of one shadow page, beside its frame in the pool
    u64 gfn                         # guest frame of the table it shadows; direct: first frame it maps
    u32 role                        # ROLE_*
    u32 root_count                  # vcpus' root slots that hold it
    u32 hash_next                   # next page of the bucket, or SC_NONE
    u32 prev                        # neighbour towards the young end of the active list, or SC_NONE
    u32 next                        # neighbour towards the old end; in the free list: next free page
    u32 parents                     # sptes that point to it: a list (see rmap)
    u32 present                     # entries that are not 0
    u8 active                       # in use
    u8 nonglobal                    # a leaf without G was installed: goes at a CR3 load (flush)
    u16 pad
    u64 slots                       # bit per memslot of which it maps a frame
    u64 used[8]                     # bit per entry that is not 0

cdef struct sc_frame:               # per frame of guest RAM
    u32 rmap                        # writable sptes that map it: a list (see rmap)
    u16 shadowed                    # shadow pages, not direct, of its gfn
    u16 stale                       # quirk RMAP_LEAK: records left behind

cdef struct sc_link:                # neighbours of an spte in its list; only lists of two or more use it
    u32 prev                        # spte + 1, or 0
    u32 next                        # spte + 1, or 0

cdef struct sc_vcpu:
    sc_paging guest                 # what the guest set
    sc_paging hw                    # what the processor walks with under a shadow MMU
    u64 cr0
    u64 cr2
    u64 cr3
    u64 cr4
    u64 efer
    u32 number                      # index in sc_mmu.vcpus
    u32 cpl                         # privilege level of scalar accesses without user=
    u32 roots[4]                    # shadow pages that serve as roots (one, or four in PAE format), or SC_NONE
    bint loaded                     # roots are in place
    u64 flood_gfn                   # frame of the last emulated store
    u32 flood_count                 # consecutive emulated stores to it
    u32 features                    # FEAT_*
    int maxphyaddr
    sc_tlb *tlb                     # NULL: no TLB is modelled
    sc_memo *memo                   # NULL: a TLB is

# Can the store of nbytes at gva, gpa be emulated? 1 yes, 0 no (an embedder's instruction emulator may not know it), -1
# the callback failed and the access is to be given up.
ctypedef int (*sc_can_emulate)(void *hook, u64 gva, u64 gpa, u32 nbytes) noexcept nogil

# Named points at which audits can run, in the order of audit.POINTS.
cdef enum:
    POINT_PRE_FAULT = 0             # a page-fault exit, before anything is done
    POINT_POST_FAULT = 1            # ... and after it
    POINT_PRE_WRITE = 2             # an emulated or device store, before it
    POINT_POST_WRITE = 3            # ... and after it
    POINT_POST_CR3 = 4              # after a load of CR3
    POINT_COUNT = 5

cdef struct sc_mmu                  # for the callback
ctypedef void (*sc_audit_hook)(sc_mmu *mmu, u32 point) noexcept nogil

# What an embedder can be told of, where it happens.
cdef enum:
    EVENT_EXIT = 0                  # detail: EXIT_*; address: linear address, or the value of the register
    EVENT_ZAP = 1                   # a shadow page goes. detail: its number; address: its gfn
    EVENT_PROTECT = 2               # an spte lost W, its frame became a guest table. detail: spte; address: gfn
    EVENT_FLUSH = 3                 # a TLB has to be flushed. detail: FLUSH_*
    EVENT_COUNT = 4

ctypedef void (*sc_event_hook)(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil

cdef struct sc_mmu:
    sc_mem *mem
    sc_stats *stats
    bint shadow                     # a shadow MMU, else native
    bint keep                       # shadow pages belong to guest tables; else to linear addresses
    u32 quirks                      # QUIRK_*
    u32 pool_pages
    u32 min_free                    # refill below this
    u32 refill                      # until this many are free
    u32 flood_threshold             # 0: never
    bint flood_reset                # a fault that is no store to a guest table starts the count anew
    u32 n_free
    u32 n_active
    u32 free_head                   # free list, or SC_NONE
    u32 young                       # active list: newest page, or SC_NONE
    u32 old                         # active list: next victim, or SC_NONE
    u32 hash_shift                  # bucket = mixed gfn >> hash_shift
    u32 n_pte4                      # active pages that shadow tables of 4-byte entries
    u32 n_pte8                      # active pages that shadow tables of 8-byte entries
    u32 n_vcpus
    u64 flush_epoch                 # a new one drops what every TLB holds
    u64 memo_epoch                  # moves when something is withdrawn that a translation was made of
    u32 lost_flushes                # bit per FLUSH_*: flushes that do not happen; for tests alone
    u64 spte_base                   # sptes present when the counters were last set to 0
    u64 *table                      # the pool: 512 sptes a page
    sc_page *pages                  # header of each pool page
    sc_frame *frames                # per frame of guest RAM
    sc_link *links                  # per spte of the pool
    u64 marked_epoch                # memo_epoch in which a frame was last marked
    u64 *marks                      # native, per frame of guest RAM: memo_epoch << 2 | MARK_*, of that epoch
    u32 *hash                       # first page of each bucket, or SC_NONE
    sc_vcpu *vcpus[SC_MAX_VCPUS]
    sc_can_emulate can_emulate      # asked before a store is emulated; NULL: the answer is yes
    void *hook                      # its first argument
    u32 audit_points                # bit per POINT_*: audit there
    # POINT_* + 1 of the first audit that found something, POINT_COUNT + 1 if a callback raised, until it is reported.
    u32 audit_found
    sc_audit_hook audit             # the audit; NULL only if audit_points is 0
    void *audit_report              # where it puts what it finds
    u32 exhausted                   # vcpu for which there were not enough pages, when RC_EXHAUSTED was returned
    u32 fail_after                  # for tests: so many pages can still be taken from the pool,
    u32 fail_for                    # then so many attempts fail
    u32 events                      # bit per EVENT_*: tell of them
    sc_event_hook event             # whom; NULL only if events is 0
    void *event_context             # for it
    sc_watch *watch                 # what takes long looks for signals; NULL: it does not

# Native: what the memos of an epoch know of a frame.
cdef enum:
    MARK_TABLE = 1                  # their translations were made of entries in it
    MARK_STORED = 2                 # they let stores reach it

# Members of shadowcore.config.Quirk, bit by bit.
cdef enum:
    QUIRK_TWO_EXITS = 1 << 0
    QUIRK_ACCESSED_EARLY = 1 << 1
    QUIRK_DIRTY_LOST = 1 << 2
    QUIRK_ROLE_WITHOUT_ACCESS = 1 << 3
    QUIRK_ROLE_WITHOUT_MODE = 1 << 4
    QUIRK_PDE_WRITE = 1 << 5
    QUIRK_NO_REFILL_AT_CR3 = 1 << 6
    QUIRK_RMAP_LEAK = 1 << 7
    QUIRK_PAGING_OFF_UNPROTECTED = 1 << 8
    QUIRK_ABSENT_PDPTES = 1 << 9
    QUIRK_ROOT_EMPTIED = 1 << 10
    QUIRK_NX_LEAF_ONLY = 1 << 11
    QUIRK_PROCESSOR_CODE = 1 << 12
    QUIRK_EXIT_FLUSHES = 1 << 13
    QUIRK_GLOBAL_WITHOUT_PGE = 1 << 14
    QUIRK_IGNORED_BITS_REFUSED = 1 << 15

cdef enum:
    FEAT_NX = 1 << 0
    FEAT_GBPAGES = 1 << 1
    FEAT_LA57 = 1 << 2
    FEAT_PSE36 = 1 << 3
    FEAT_SMEP = 1 << 4
    FEAT_SMAP = 1 << 5
    FEAT_PKU = 1 << 6
    FEAT_PCID = 1 << 7
    FEAT_UMIP = 1 << 8
    FEAT_FSGSBASE = 1 << 9
    FEAT_XSAVE = 1 << 10

cdef inline void memo_drop(sc_mmu *mmu) noexcept nogil:
    """Something was withdrawn, or changed, that a translation may have been made of."""
    mmu.memo_epoch += 1

cdef inline bint marked_table(const sc_mmu *mmu, u64 frame) noexcept nogil:
    """Native: a store to the frame may change what the memos know."""
    return (mmu.marked_epoch == mmu.memo_epoch and mmu.marks[frame] >> 2 == mmu.memo_epoch
            and mmu.marks[frame] & MARK_TABLE)

cdef inline void audit_point(sc_mmu *mmu, u32 point) noexcept nogil:
    if mmu.audit_points >> point & 1:
        mmu.audit(mmu, point)

cdef inline void event(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil:
    if mmu.events >> kind & 1:
        mmu.event(mmu, kind, detail, vcpu, address)

cdef inline void count_exit(sc_mmu *mmu, u32 vcpu, u32 reason, u64 address) noexcept nogil:
    mmu.stats.exits[reason] += 1
    event(mmu, EVENT_EXIT, reason, vcpu, address)

cdef inline u64 linear_address(const sc_vcpu *v, u64 va) noexcept nogil:
    """`va` as the processor takes it: below 4-level paging its low 32 bits count."""
    return va if v.guest.mode >= MODE_64 else va & 0xFFFFFFFFULL

cdef inline bint linear_exists(const sc_vcpu *v, u64 va) noexcept nogil:
    """`va` is canonical, where that is asked for."""
    return v.guest.mode < MODE_64 or is_canonical(va, 57 if v.guest.mode == MODE_LA57 else 48)

cdef inline u16 vcpu_pcid(const sc_vcpu *v) noexcept nogil:
    """The PCID that tags translations: 0 unless CR4.PCIDE is on."""
    return <u16>(v.cr3 & 0xFFF) if v.cr4 & CR4_PCIDE else 0

cdef inline u32 role_field(u32 role, int at, u32 mask) noexcept nogil:
    return (role >> at) & mask

cdef inline int role_level(u32 role) noexcept nogil:
    return <int>role_field(role, ROLE_LEVEL, 15)

cdef inline bint role_direct(u32 role) noexcept nogil:
    return role_field(role, ROLE_DIRECT, 1)

cdef inline int role_pte_size(u32 role) noexcept nogil:
    """Bytes of an entry of the guest table behind a page that is not direct."""
    return 4 if role_field(role, ROLE_GLEVELS, 15) == 2 else 8

# Why a TLB has to be flushed.
cdef enum:
    FLUSH_PROTECT = 0               # a frame became a guest table: its writable sptes lost W
    FLUSH_ZAP = 1                   # a leaf table was zapped
    FLUSH_ZAP_UPPER = 2             # a table above the leaves was zapped
    FLUSH_STORE = 3                 # an emulated store dropped a present entry
    FLUSH_WITHHELD = 4              # W was withheld from a new leaf
    FLUSH_LEAF = 5                  # a present leaf lost W or got another frame
    FLUSH_LINK = 6                  # an upper entry was turned to another page
    FLUSH_LOG = 7                   # a dirty log was started or cleared
    FLUSH_CR3 = 8                   # the guest loaded CR3
    FLUSH_CONTEXT = 9               # the guest loaded CR0, CR4 or EFER
    FLUSH_INVLPG = 10               # the guest's INVLPG
    FLUSH_FAULT = 11                # a page fault of the guest

cdef inline bint flush_lost(const sc_mmu *mmu, int why) noexcept nogil:
    return mmu.lost_flushes >> why & 1

cdef inline void exit_flush(sc_mmu *mmu) noexcept nogil:
    """An exit: with the quirk EXIT_FLUSHES (no VPID) it is a flush of its own, and not counted."""
    if mmu.quirks & QUIRK_EXIT_FLUSHES:
        mmu.flush_epoch += 1

cdef inline void request_flush(sc_mmu *mmu, int why) noexcept nogil:
    """The shadow MMU withdrew something that a TLB may hold: no entry of any vcpu outlives this."""
    mmu.stats.tlb_flush += 1
    if mmu.n_vcpus > 1:
        mmu.stats.remote_tlb_flush += 1
    if not flush_lost(mmu, why):
        mmu.flush_epoch += 1
    event(mmu, EVENT_FLUSH, why, SC_NONE, 0)

cdef inline void entry_flush(sc_mmu *mmu, int why) noexcept nogil:
    """request_flush for an entry that was dropped; with the quirk EXIT_FLUSHES the flush that the exit is anyway."""
    if mmu.quirks & QUIRK_EXIT_FLUSHES:
        exit_flush(mmu)
    else:
        request_flush(mmu, why)
