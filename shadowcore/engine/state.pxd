"""The structures of the shadow MMU. Indices, not pointers, link them, so that they can be printed and saved.

An spte is named by its number: pool page * 512 + index in the page. In lists it is stored as number + 1, so that
zeroed memory means "none".
"""
from shadowcore.engine.bits cimport CR4_PCIDE, is_canonical
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.history cimport sc_histories
from shadowcore.engine.memo cimport sc_memo
from shadowcore.engine.memory cimport SC_POOL_HFN, sc_mem
from shadowcore.engine.tlb cimport sc_tlb
from shadowcore.engine.page cimport sc_frame, sc_link, sc_page
from shadowcore.engine.policies.queues cimport sc_queues
from shadowcore.engine.role cimport role_invalid, role_nested
from shadowcore.engine.types cimport MODE_64, MODE_LA57, SC_NONE, u8, u16, u32, u64
from shadowcore.engine.walker cimport sc_paging, sc_walk
from shadowcore.engine.watch cimport sc_watch

cdef enum:
    SC_MAX_VCPUS = 64

    SC_MAX_PREV = 16                # roots of earlier CR3s that a vcpu can keep

# What a vcpu has to do before the guest goes on (unsync), in this order.
cdef enum:
    REQUEST_OBSOLETE = 1            # let go of roots that were zapped
    REQUEST_SYNC = 2                # sync what the roots reach
    REQUEST_FLUSH = 4               # flush the TLB: the shadow MMU withdrew something
    REQUEST_CURRENT = 8             # flush the TLB for the guest's sake
    REQUEST_GUEST = 16              # ... and sync what the roots reach, earlier ones too
    REQUEST_ROOTS = 32              # put roots in place

# How guest tables that the processor walks itself come to be shadowed again (agile), in the order of config.WAYS_BACK.
cdef enum:
    BACK_SCAN = 0                   # at the end of an interval: those that nothing stored to in it
    BACK_RESET = 1                  # ... all of them
    BACK_NEVER = 2                  # not before their pages are recycled, or the table becomes a root

# What becomes of a memory slot.
cdef enum:
    SLOT_ADDED = 0
    SLOT_REMOVED = 1
    SLOT_MOVED = 2

cdef struct sc_prev:                # a root of an earlier CR3
    u64 cr3                         # that it is for
    u32 page                        # its shadow page, or SC_NONE
    u32 pad

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
    # Of design unsync.
    u32 requests                    # bit per REQUEST_*; while there are any, hw.root and hw.pdpte lead nowhere
    bint restarts                   # an access that had an exit is not made: the caller begins its instruction anew
    u64 root_cr3                    # CR3 that the root is for
    sc_prev prev[SC_MAX_PREV]       # roots of earlier CR3s, latest first
    bint odd_stores                 # by instructions that page tables are not written with, the caller says
    u64 rip                         # of the instruction that makes the accesses, as far as the caller says
    bint retried                    # a store was run again natively, and is remembered:
    u64 retried_rip                 # its rip
    u64 retried_va                  # ... and its linear address
    u64 device_va                   # page of linear addresses at which a device was met last, or 0
    u64 device_gfn                  # ... and its gfn
    u32 device_rights               # ... and the rights there: ACC_W, ACC_U
    u64 device_generation           # ... and sc_mmu.generation
    sc_tlb *tlb                     # NULL: no TLB is modelled
    sc_memo *memo                   # NULL: no fast path is open (a TLB is modelled, walks are told of, or Mmu.general)

# Can the store of nbytes at gva, gpa be emulated? 1 yes, 0 no (an embedder's instruction emulator may not know it), -1
# the callback failed and the access is to be given up.
ctypedef int (*sc_can_emulate)(void *hook, u64 gva, u64 gpa, u32 nbytes) noexcept nogil
# What becomes of a leaf table when a leaf that maps it is about to get W.
cdef enum:
    LET_EMULATE = 0                 # W is withheld, and stores to it are emulated
    LET_UNSYNC = 1                  # it runs out of sync
    LET_ZAP = 2                     # what shadows it is zapped: it is no table until it is used as one

ctypedef int (*sc_may_unsync)(void *decider, u64 gfn) noexcept nogil

# An event by its number in EVENTS (unsync): gfn or gpa, role or entry, what else there is to say.
cdef struct sc_event:
    u64 a
    u64 b
    u32 kind
    u32 c

# Of what is recorded of the MMU: rows that there is room for, and that there were. Those beyond `size` are lost, and
# whoever asks for the rows is told.
cdef struct sc_room:
    u64 size
    u64 count

cdef struct sc_event_ring:
    sc_event *event
    sc_room room

# Of which tables an entry is that a walk reads, in the order of references.DIMENSIONS.
cdef enum:
    REFERENCE_GUEST = 0             # the guest's
    REFERENCE_HOST = 1              # the host's, that translate the guest's addresses (nested)
    REFERENCE_SHADOW = 2            # the shadow's

# A reference to memory that a walk of a processor makes.
cdef struct sc_reference:
    u64 hpa                         # of the entry
    u64 gva                         # linear address that is translated
    u32 walk                        # number of the walk
    u8 vcpu
    u8 level                        # of the entry, in its tables
    u8 dimension                    # REFERENCE_*
    u8 size                         # bytes of the entry

ctypedef void (*sc_reference_hook)(void *context, const sc_reference *reference, u32 n) noexcept nogil

cdef struct sc_walk_log:
    sc_reference *reference
    sc_room room
    u32 walks                       # so far: the number of the next one
    sc_reference_hook hook          # told of each walk, or NULL
    void *context                   # for it

cdef struct sc_mmu                  # for the callback
ctypedef void (*sc_audit_hook)(sc_mmu *mmu, u32 point) noexcept nogil

ctypedef void (*sc_event_hook)(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil

# What a register load replaced.
cdef struct sc_loaded:
    u64 cr0
    u64 cr3
    u64 cr4
    u64 efer
    bint tagged                     # CR3: bit 63 asked for what the TLB holds to stay
    bint pdptes                     # PAE root entries were read, and other ones came

# What a fast fault came to.
cdef enum:
    FAST_MENDED = 0                 # an exit, after which the access succeeds
    FAST_EMULATE = 1                # an exit, and the store is to be emulated
    FAST_UPDATED = 2                # no exit: A or D was set in the shadow
    FAST_REFLECTED = 4              # an exit, and the guest's own fault: it leads nowhere, and all is done
    FAST_CODE = 8                   # ... its error code is shifted left by this

# What a design does at events that are rare beside accesses. Each design fills it in, with sc_mmu.shadow and by_table,
# in a file of its own in engine/designs; nothing else asks which design it is. NULL, where it may be: nothing is done.
cdef struct sc_design:
    u32 exits                       # bit per EXIT_*: the guest's register loads and INVLPG that leave the guest
    u32 invariants                  # bit per number: those that hold, beside I8 and I9, which always do
    # Accesses are about to be made for which memos of earlier ones serve. May be NULL.
    void (*begin)(sc_mmu *mmu) noexcept nogil
    # CR3 was loaded; CR0, CR4 or EFER was, or the vcpu made. May be NULL.
    void (*new_cr3)(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil
    void (*reset)(sc_mmu *mmu, sc_vcpu *v, const sc_loaded *before) noexcept nogil
    # The guest's INVLPG of a linear address. May be NULL.
    void (*invlpg)(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil
    # A page fault of the guest at va, with that error code: what is cached of the page goes. True: leaves went. May be
    # NULL.
    bint (*guest_fault)(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 code) noexcept nogil
    # Before a fault at va changes anything: False if there are not the pages that it can need. May be NULL.
    bint (*make_room)(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil
    # The access `access` (PF_W, PF_U, PF_I) at the canonical address va, if it takes a fault of the common kind and
    # then succeeds, or is a store to be emulated: where it leads, and told: FAST_*. Else all ones, and nothing has
    # changed unless told is FAST_REFLECTED. NULL without a shadow MMU.
    u64 (*fast_fault)(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, u32 *told) noexcept nogil
    # The gfn of what root number `slot` stands for, by the registers; direct: it is no guest table. False: for nothing.
    bint (*root_of)(const sc_mmu *mmu, const sc_vcpu *v, int slot, u64 *gfn, bint *direct) noexcept nogil
    # The page of `level` on the way to va, by the complete guest walk w, or SC_NONE when none is free. linked: the page
    # that the entry above points to now, or SC_NONE. A linked page with a guest table is right, and is not asked about.
    u32 (*child)(sc_mmu *mmu, const sc_vcpu *v, u64 va, int level, const sc_walk *w, u32 linked) noexcept nogil
    # The level, in shadow tables, of the guest's page that the complete walk w of the shadow leads into.
    int (*guest_level)(const sc_mmu *mmu, const sc_walk *w) noexcept nogil
    # A page-fault exit that is not the usual one: fault.page_fault says what it returns. NULL: it is.
    int (*page_fault)(sc_mmu *mmu, sc_vcpu *v, u32 access, const sc_walk *hw, sc_walk *w) noexcept nogil
    # Nested paging: an exit, for the host's tables refused the walk w of an access to va. As page_fault; RC_OK: done by
    # the emulator, at w.gpa, which is RAM. NULL without it.
    int (*host_fault)(sc_mmu *mmu, sc_vcpu *v, u64 va, u32 access, sc_walk *w) noexcept nogil
    # The bytes of an emulated store of v, or of a device's (v NULL), have changed. NULL: table_written came before.
    void (*stored)(sc_mmu *mmu, sc_vcpu *v, u64 gpa, u32 nbytes) noexcept nogil
    # A store to a table by an instruction that is none to write tables with: True if what shadows it was zapped, so
    # that it can be run again natively. May be NULL.
    bint (*run_again)(sc_mmu *mmu, sc_vcpu *v, u64 va, u64 gpa) noexcept nogil
    # Zap the shadow pages of the guest table at gfn (True if there were any); zap every page.
    bint (*unprotect)(sc_mmu *mmu, u64 gfn) noexcept nogil
    void (*zap_all)(sc_mmu *mmu) noexcept nogil
    # Take W from every leaf that maps a frame of the memory slot, for its dirty log.
    void (*protect_slot)(sc_mmu *mmu, int slot) noexcept nogil
    # The dirty log of a slot is about to be cleared, for n frames from the first on: as protect_slot, for those that it
    # shows. It has been given up; may be NULL.
    void (*log_cleared)(sc_mmu *mmu, int slot, u64 first, u64 n) noexcept nogil
    void (*log_stopped)(sc_mmu *mmu, int slot) noexcept nogil
    # v has requests: before the guest goes on. NULL: it never has.
    void (*enter)(sc_mmu *mmu, sc_vcpu *v) noexcept nogil
    # Check those of the invariants `which` (a bit each) that I4 to I9 are not. found: sc_audit, to which it adds. NULL:
    # invariants.pyx does it.
    void (*audit)(sc_mmu *mmu, void *found, u32 which) noexcept nogil
    # What v.hw has other than vcpu_apply makes it of the registers. May be NULL.
    void (*processor)(sc_vcpu *v) noexcept nogil
    # Role of the page that root number `slot` has to be, by the registers. NULL: roots.pyx makes it.
    u32 (*root_role)(const sc_mmu *mmu, const sc_vcpu *v, int slot) noexcept nogil
    # A memory slot is about to be added, removed or moved: SLOT_*, and n frames from `gfn` on where there is memory
    # then; and it has been. May be NULL.
    void (*slot_changes)(sc_mmu *mmu, int what, u64 gfn, u64 n) noexcept nogil
    void (*slot_changed)(sc_mmu *mmu) noexcept nogil
    # The host takes n frames of RAM from `frame` on away: leaves that map one go. True if there were any. May be NULL.
    bint (*withdraw)(sc_mmu *mmu, u64 frame, u64 n) noexcept nogil
    # The guest's INVPCID of a type (INVPCID_*) and with operands that there are. May be NULL.
    void (*invpcid)(sc_mmu *mmu, sc_vcpu *v, u32 kind, u16 pcid, u64 va) noexcept nogil

# What is a use of a shadow page: bits of sc_policy.uses, in the order of config.USES.
cdef enum:
    USE_FAULT = 1                   # the walk at a page-fault exit came through it
    USE_LINK = 2                    # an entry above was made to point to it
    USE_ROOT = 4                    # it was put in place as a root
    USE_ACCESSED = 8                # when it is about to be recycled, A is found set in an entry that points to it
    USE_WALK = 16                   # any walk of the processor came through it: no real one tells

# Which page is recycled when pages run short. New pages enter the active list at its young end; else its order is the
# policy's. A policy that keeps books (queues) fills in made, gone and used as well; NULL: it is not told.
cdef struct sc_policy:
    # The active page that goes next; SC_NONE: there is none but roots in use, which policies with books pass over.
    u32 (*victim)(sc_mmu *mmu) noexcept nogil
    # It is a root in use and stays: the next victim is another one, while there is one. NULL: policies with books.
    void (*spared)(sc_mmu *mmu, u32 page) noexcept nogil
    # A page is in use, for (gfn, role) of its header, or is so no more; it was used, by what `uses` says is a use.
    void (*made)(sc_mmu *mmu, u32 page) noexcept nogil
    void (*gone)(sc_mmu *mmu, u32 page) noexcept nogil
    void (*used)(sc_mmu *mmu, u32 page) noexcept nogil
    # No page of this key is in use and one is about to be made, after room for it. May be NULL: made says so in time.
    void (*missed)(sc_mmu *mmu, u64 gfn, u32 role) noexcept nogil
    # pool.pool_recycle, where it is more than to zap the oldest page. pool.pool_recycles sets it.
    void (*recycle)(sc_mmu *mmu, u32 target) noexcept nogil
    # USE_WALK alone: the processor's walk for va, from the roots of v, came to its end. Else NULL.
    void (*walked)(sc_mmu *mmu, const sc_vcpu *v, u64 va) noexcept nogil
    sc_queues *queues               # its books, or NULL
    u32 uses                        # USE_*
    bint new_too                    # with USE_WALK: the walk for which a page was made is a use of it as well
    bint children                   # pages below the victim, to which nothing else leads, are recycled with it
    sc_design below                 # the design's own hooks, where those of policies/uses.pyx stand before them
    void *own                       # a policy's of another package

# What the MMU did at an exit, by counters: in the order of exits.CHANGES.
cdef enum:
    CHANGE_MADE = 0                 # shadow pages made
    CHANGE_FOUND = 1                # ... found again
    CHANGE_ZAPPED = 2               # ... zapped
    CHANGE_FLOODED = 3              # of these, by a flood of stores
    CHANGE_RECYCLED = 4             # ... to refill the pool
    CHANGE_SYNCED = 5               # unsync pages brought back in sync
    CHANGE_INSTALLED = 6            # shadow entries that became present
    CHANGE_REMOVED = 7              # ... that ceased to be
    CHANGES = 8

cdef struct sc_exit:                # an exit, as the log of exits has it; in the order of exits.EXIT_DTYPE
    u64 operation                   # number of the operation that was under way
    u64 gva                         # linear address, or the value of the register that is loaded
    u64 gfn                         # frame that the access leads to, or all ones
    u64 error_code                  # of a page fault: the processor's, or the guest's own, if that is injected
    u32 change[CHANGES]
    u8 vcpu
    u8 reason                       # EXIT_*
    u8 pad[6]

# From the moment it leaves the guest until its vcpu enters again, or something else begins, what the MMU does belongs
# to an exit.
cdef struct sc_exit_log:
    sc_exit *exit
    sc_room room
    void (*grow)(void *owner) noexcept nogil    # makes room for more; NULL: there is not to be more
    void *owner                     # its argument
    u64 operation                   # number of the operation under way; modulo 2**64, and with counts: without these
    const u64 *counts[4]            # of operations begun, that a guest kernel keeps while it works; or NULL
    u64 seen[CHANGES]               # the counters, as far as they are accounted for
    bint open                       # the last exit goes on
    bint inside                     # of a page-fault exit, the beginning of which was seen
    u64 last[SC_MAX_VCPUS]          # number of each vcpu's last exit among the rows, or all ones
    sc_design below                 # the hooks that those of exits.pyx stand before

cdef struct sc_mmu:
    sc_mem *mem
    sc_stats *stats
    bint shadow                     # the processor walks shadow tables, else the guest's
    u32 prefetch                    # entries of the aligned group that a fault fills, a power of two; 0: none
    bint by_table                   # a shadow page belongs to a guest table (or large page), else to linear addresses
    bint nested                     # the processor walks the guest's tables through the host's, which are in the pool
    u32 quirks                      # QUIRK_*
    u32 pool_pages
    u32 min_free                    # refill below this
    u32 refill                      # until this many are free
    u32 flood_threshold             # 0: never
    bint flood_reset                # a fault that is no store to a guest table starts the count anew
    bint flood_pages                # each page has a count of its own, which a fault that comes through it ends
    u32 flood_forget                # emulated stores to other tables after which a page's count is forgotten; 0: never
    u32 store_clock                 # emulated stores so far, where a page has a count of its own
    bint in_place                   # after an emulated store the leaf is made at once, if the guest's entry serves
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
    u32 absent                      # MARK_*: when entries are marked that the guest's tables do not have either
    u64 marked_epoch                # memo_epoch in which a frame was last marked
    u64 *marks                      # native, per frame of guest RAM: memo_epoch << 2 | MARK_*, of that epoch
    u32 *hash                       # first page of each bucket, or SC_NONE
    sc_vcpu *vcpus[SC_MAX_VCPUS]
    sc_can_emulate can_emulate      # asked before a store is emulated; NULL: the answer is yes
    void *hook                      # its first argument
    sc_may_unsync may_unsync        # LET_*, asked before a leaf table is left unsync for an access; NULL: LET_UNSYNC
    void *decider                   # its first argument
    u32 audit_points                # bit per POINT_*: audit there
    # POINT_* + 1 of the first audit that found something, or HOOK_RAISED, until it is reported.
    u32 audit_found
    sc_audit_hook audit             # the audit; NULL only if audit_points is 0
    void *audit_report              # where it puts what it finds
    # Of design unsync.
    bint lists_all                  # the reverse map lists every leaf, not only the writable ones
    bint deferred                   # flushes are requests to the vcpus, done before each next lets its guest go on
    # INVLPG drops a leaf and makes it again, a sync rewrites every leaf (6.1); else (6.12) what is right stays.
    bint rewrites
    # As 2.6.28: INVLPG drops a leaf and makes none; a table is unsync only while it has one shadow page.
    bint one_role
    u32 prev_roots                  # roots of earlier CR3s that a vcpu keeps, 0 to SC_MAX_PREV
    u32 host_level                  # level of the host's pages under guest RAM: 1, 2 or 3
    # Of design nested.
    bint tdp                        # host tables come and go with their parents (KVM's TDP MMU), else as shadow pages
    u32 host_levels                 # of the host's tables: 4 or 5
    u32 largest                     # level of the largest leaf there: 1, 2 or 3
    u64 generation                  # of the memory slots: device entries of another one are stale
    u32 valid_gen                   # 0 or 1: turns when a change of the slots has zapped all pages
    u32 n_dying                     # pages that were zapped and are roots still
    u32 synced                      # vcpu whose roots are, or were last, brought back in sync
    u32 zapped                      # pages zapped and not yet free, linked by next, or SC_NONE
    u64 *below                      # per pool page: 512 bits, of entries below which a page is unsync
    u16 *mapped                     # per frame of RAM: leaves that map it
    u32 *large_rmap[2]              # per block of 2 MiB, of 1 GiB of RAM: large leaves that map it, a list
    u32 *no_large[2]                # per block: how many reasons there are against a large leaf
    sc_event_ring *ring             # where events are recorded; NULL: nowhere
    u32 exhausted                   # vcpu for which there were not enough pages, when RC_EXHAUSTED was returned
    u32 fail_after                  # for tests: pages that can still be taken from the pool
    u32 fail_for                    # ... and attempts that fail then
    u32 events                      # bit per EVENT_*: tell of them
    sc_event_hook event             # whom; NULL only if events is 0
    void *event_context             # for it
    u64 event_frames                # EVENT_FLUSH, while it is told: of so many guest frames from the gfn on; 0: of all
    sc_watch *watch                 # what takes long looks for signals; NULL: it does not
    sc_design design                # what the design does where little depends on its speed
    sc_policy policy                # which page is recycled
    # Of design agile.
    u32 nested_writes               # emulated stores to a table in one interval with which it is no more shadowed
    u32 nested_back                 # BACK_*: how it comes to be shadowed again
    u64 nested_interval             # length of an interval: emulated stores, and walks that went on below a mark
    u64 nested_clock                # of these so far
    u64 nested_since                # nested_clock where the interval began
    u32 nested_number               # of the interval, 24 bits
    u32 *written                    # per frame of RAM: nested_number << 8 | emulated stores in it, 255 at most
    sc_walk_log *walks              # where references of walks are told; NULL: nowhere
    sc_design alone                 # the design's own hooks, where others stand before them (neighbours, adaptive)
    sc_exit_log *exits              # where exits are logged; NULL: nowhere
    u32 told_events                 # what the embedder asks for: `events`, but for what the log of exits needs
    sc_event_hook told              # whom; `event`, where no exits are logged
    sc_histories *histories         # of design adaptive: what it remembers of guest tables

cdef inline void memo_drop(sc_mmu *mmu) noexcept nogil:
    """Something was withdrawn, or changed, that a translation may have been made of."""
    mmu.memo_epoch += 1

cdef inline bint is_shadowed(const sc_mmu *mmu, u64 frame) noexcept nogil:
    """The frame of RAM is a guest table that has a shadow: stores to it are emulated."""
    return mmu.shadow and mmu.frames[frame].shadowed != 0

cdef inline bint page_is_dying(const sc_page *page) noexcept nogil:
    """The page was zapped and is a root still (unsync): it is in its bucket, empty, and on no list of pages."""
    return not page.active and page.root_count and role_invalid(page.role)

cdef inline u32 walk_mark(const sc_mmu *mmu, const sc_walk *hw) noexcept nogil:
    """The page that stands for a guest table at which the walk hw of the shadow ended, or SC_NONE: it goes on there, in
    the guest's own tables (agile). The entry above is the mark; no processor reads an entry of the page."""
    cdef u64 page
    if not mmu.stats.nested_tables or hw.level > hw.top:
        return SC_NONE
    page = hw.table[hw.level] - SC_POOL_HFN
    if page >= mmu.pool_pages or not role_nested(mmu.pages[page].role) or not mmu.pages[page].active:
        return SC_NONE
    return <u32>page

cdef inline u64 linear_address(const sc_vcpu *v, u64 va) noexcept nogil:
    """`va` as the processor takes it: below 4-level paging its low 32 bits count."""
    return va if v.guest.mode >= MODE_64 else va & 0xFFFFFFFFULL

cdef inline bint linear_exists(const sc_vcpu *v, u64 va) noexcept nogil:
    """`va` is canonical, where that is asked for."""
    return v.guest.mode < MODE_64 or is_canonical(va, 57 if v.guest.mode == MODE_LA57 else 48)

cdef inline u16 vcpu_pcid(const sc_vcpu *v) noexcept nogil:
    """The PCID that tags translations: 0 unless CR4.PCIDE is on."""
    return <u16>(v.cr3 & 0xFFF) if v.cr4 & CR4_PCIDE else 0

cdef inline void vcpu_request(sc_vcpu *v, u32 request) noexcept nogil:
    """v has something to do before its guest goes on: no walk succeeds before that."""
    v.requests |= request
    v.hw.root = v.guest.host_root = 0
    v.hw.pdpte[0] = v.hw.pdpte[1] = v.hw.pdpte[2] = v.hw.pdpte[3] = 0
