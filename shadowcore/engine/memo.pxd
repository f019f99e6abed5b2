"""The memo of a vcpu: where its last accesses led, so that one that repeats them needs no walk.

The first fast path, and a cache of translations: what emulators call a software TLB. KVM has none, for there the
processor's own TLB does this; the TLB that a machine models is another thing (tlb.pxd).

It is the host's, not the guest's: it changes no result and no counter, and a machine that models a TLB has none. An
entry holds as long as nothing that translations are made of was withdrawn: sc_mmu.memo_epoch moves whenever something
is, and under `native` with each batch, for between batches anybody may write to the guest's tables.

What an access needs is one bit, its kind; an entry holds the kinds that are denied or not known. So one compare
decides on page, epoch, privilege, rights, accessed and dirty bits.
"""
from libc.string cimport memset

from shadowcore.engine.types cimport u32, u64

cdef enum:
    MEMO_ENTRIES = 4096
    MEMO_REGIONS = 256
    # A tag: bits 24-63 of the address, then 16 of the epoch, then a bit per kind, set if that kind is not allowed.
    MEMO_EPOCH = 40                 # first bit of the epoch
    MEMO_DENIED = 56                # first bit of the kinds
    MEMO_EPOCHS = 0xFFF0            # epochs that differ in their 16 bits

# Kinds of accesses: load, store, fetch by supervisor code, then by user code. One more is that of no access: always
# denied.
cdef enum:
    KIND_STORE = 1
    KIND_FETCH = 2
    KIND_USER = 3                   # how many a privilege level has
    KIND_NONE = 7
    MEMO_KINDS = 8                  # kinds that there are bits for

cdef struct sc_memo_entry:
    u64 tag
    u64 target                      # gpa of the page | what _capi notes of it (bits 52-57) | entries that a walk reads

cdef struct sc_memo:
    sc_memo_entry entry[MEMO_ENTRIES]   # by the low bits of the page number
    sc_memo_entry spill[MEMO_ENTRIES]   # by a hash of it: what had to make room there
    u64 marked[64]                  # native: regions of 2 MiB whose tables are marked, as memo_region_tag
    u64 region[MEMO_REGIONS]        # regions of 2 MiB met lately: 256 of them have leaf tables of 1 MiB
    u64 since                       # epoch in which it was last cleared
    # What the last chunks of batches have shown: who makes batches goes by it, which shows in nothing but the time.
    bint unused                     # accesses did not repeat: the memo is not asked
    bint far                        # their tables did not lie in the caches
    u32 chunks                      # of batches, ever

cdef inline u64 memo_context(sc_memo *memo, u64 epoch) noexcept nogil:
    """What tags of this epoch have in common; 0 is none's, so that a zeroed entry fits nothing."""
    if epoch - memo.since >= MEMO_EPOCHS:
        memset(memo.entry, 0, sizeof(memo.entry))
        memset(memo.spill, 0, sizeof(memo.spill))
        memset(memo.marked, 0, sizeof(memo.marked))
        memo.since = epoch
    return (epoch - memo.since + 1) << MEMO_EPOCH

cdef inline u64 memo_mask(u32 kind) noexcept nogil:
    """Bits of a tag that have to be as expected for an access of `kind`."""
    return (((<u64>1 << MEMO_DENIED) - 1)) | (<u64>1 << (MEMO_DENIED + kind))

cdef inline u64 memo_tag(u64 va, u64 context) noexcept nogil:
    """Tag of the page of `va`, less the kinds."""
    return (va >> 24) + context

cdef inline bint memo_allows(const sc_memo_entry *e, u64 va, u64 context, u64 mask) noexcept nogil:
    """The entry is of the page of `va`, of this epoch, and lets an access pass whose kind has this memo_mask."""
    return (e.tag ^ memo_tag(va, context)) & mask == 0

cdef inline sc_memo_entry *memo_entry(sc_memo *memo, u64 va) noexcept nogil:
    return &memo.entry[(va >> 12) & (MEMO_ENTRIES - 1)]

cdef inline sc_memo_entry *memo_spill(sc_memo *memo, u64 va) noexcept nogil:
    """The tag lacks the low bits of the page number: place and tag together have to give them, here as well."""
    return &memo.spill[((va >> 12) ^ (((va >> 24) * <u64>0x9E3779B97F4A7C15ULL) >> 52)) & (MEMO_ENTRIES - 1)]

cdef inline u32 memo_region(u64 va) noexcept nogil:
    return (va >> 21) & 63

cdef inline u64 memo_region_tag(u64 va, u64 context) noexcept nogil:
    """All pages of 2 MiB from a multiple of that on have the same tables."""
    return memo_tag(va, context) | ((va >> 21) & 7) << MEMO_DENIED

cdef inline void memo_promote(sc_memo *memo, u64 va, u64 context) noexcept nogil:
    """The page of `va`, found in the spill, changes places with the one that holds its entry."""
    cdef sc_memo_entry *e = memo_entry(memo, va)
    cdef sc_memo_entry *s = memo_spill(memo, va)
    cdef sc_memo_entry held = e[0]
    cdef u64 upper = held.tag & ((<u64>1 << MEMO_EPOCH) - 1)
    e[0] = s[0]
    s.tag = 0
    if (held.tag ^ context) << (64 - MEMO_DENIED) >> (64 - MEMO_DENIED + MEMO_EPOCH) == 0:
        memo_spill(memo, upper << 24 | (va & 0xFFF000))[0] = held

cdef inline bint memo_is(const sc_memo_entry *e, u64 tag) noexcept nogil:
    """The entry is of that page, whatever it allows."""
    return (e.tag ^ tag) & (((<u64>1 << MEMO_DENIED) - 1)) == 0

cdef inline void memo_note(sc_memo_entry *e, u64 tag) noexcept nogil:
    """Make it an entry of that page that allows nothing, if it is of another."""
    if not memo_is(e, tag):
        e.tag = tag | ~((<u64>1 << MEMO_DENIED) - 1)

cdef inline void memo_put(sc_memo *memo, u64 context, u64 va, u32 kind, u64 target) noexcept nogil:
    """An access of `kind` at `va` leads to `target`; where a store does, so does a load."""
    cdef sc_memo_entry *e = memo_entry(memo, va)
    cdef u64 page = memo_tag(va, context)
    cdef u64 same = ((<u64>1 << MEMO_DENIED) - 1)
    cdef u64 live = same & ~((<u64>1 << MEMO_EPOCH) - 1)
    cdef u64 allowed = <u64>1 << (MEMO_DENIED + kind)
    if kind == KIND_STORE or kind == KIND_STORE + KIND_USER:
        allowed |= allowed >> KIND_STORE
    if (e.tag ^ page) & same:
        if (e.tag ^ page) & live == 0 and ((memo_spill(memo, va).tag ^ page) & live
                                           or (memo_spill(memo, va).tag ^ page) & same == 0):
            e = memo_spill(memo, va)
        memo_note(e, page)
    e.target = target
    e.tag &= ~allowed
