"""Operations of a batch, by the fastest path that each has.

Most operations of most batches are accesses that the tables allow as they stand. Those are done here, by the memo or
by a glance at the tables; every other is handed to `access`. Which of them does an access can be seen in nothing but
the time that it takes.

Past 500 lines, for it is one loop, of which each part is inlined into it for each mode and layout.
"""
from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport (
    OP_COUNT, OP_FETCH, OP_READ, OP_WRITE, access_bits, access_bytes, access_missed, in_one_page, sc_op, sc_result,
    vcpu_op,
)
from shadowcore.engine.bits cimport PTE_P, PTE_PS, is_canonical, pte_addr
from shadowcore.engine.check cimport sc_check
from shadowcore.engine.designs.native cimport MARK_STORED, MARK_TABLE, marked_table
from shadowcore.engine.gmode cimport GLANCE, TABLES_GUEST, TABLES_NESTED, TABLES_SHADOW, in_mode, sc_gmode
from shadowcore.engine.memo cimport (
    KIND_FETCH, KIND_NONE, KIND_STORE, KIND_USER, MEMO_DENIED, MEMO_EPOCH, MEMO_EPOCHS, MEMO_KINDS, MEMO_REGIONS,
    memo_allows, memo_context, memo_entry, memo_is, memo_mask, memo_note, memo_promote, memo_put, memo_region,
    memo_region_tag, memo_spill, memo_tag, sc_memo, sc_memo_entry,
)
from shadowcore.engine.memory cimport mem_frame, mem_gfn, mem_guest_frame, mem_host_frame, sc_mem, sc_no_frame
from shadowcore.engine.quick cimport (
    ALIGNED, CHUNK, FIELD_ADDR, FIELD_OP, FIELD_SIZE, FIELD_USER, FIELD_VALUE, FIELD_VCPU, PACKED, addr_at, batch_tell,
    element_word, load_known, load_op, op_stands, sc_batch, value_at,
)
from shadowcore.engine.state cimport memo_drop, sc_mmu, sc_vcpu, vcpu_pcid
from shadowcore.engine.tlb cimport TLB_FETCH, TLB_LOAD, TLB_STORE, sc_tlb, sc_tlb_entry, tlb_look
from shadowcore.engine.tlbhit cimport tlb_hit, tlb_kind
from shadowcore.engine.types cimport (
    PF_I, PF_U, PF_W, RC_AUDIT, RC_BAD_OP, RC_OK, i64, u8, u16, u32,
    u64,
)
from shadowcore.engine.walker cimport (
    host_glance, host_need, probe_walk, sc_paging, sc_walk, table_index, walk_body,
)
from shadowcore.engine.watch cimport watch_due

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #include <intrin.h>
    #define sc_prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
    #else
    #define sc_prefetch(p) __builtin_prefetch(p)
    #endif
    """
    void sc_prefetch(const void *p) noexcept nogil

cdef enum:
    STREAK = 2                      # exits in a row after which the next operation is taken to need one as well
    HITS = 800                      # operations that the loop over hits does in one go
    HITS_NESTED = 117               # ... where walks read up to 35 entries
    CANDIDATE = 1 << 8              # of a word: by its size and user, the operation may be one for the loops below
    PROMOTED = 4                    # one hit in PROMOTED, in the spill of the memo, moves the page out of it
    AHEAD = 32                      # operations whose bytes are prefetched: brought into the cache ahead of their use
    TRANSLATED = 64                 # pages that the loop over hits of a TLB remembers
    NOTES = 8                       # while the memo is of no use, one chunk in NOTES looks whether it would be now
    LOOK = 256                      # operations done by other paths between two looks at the clock

# By `user | size << 8`, as they lie in an element of OP_DTYPE: CANDIDATE | user << 9 | size << 16 if user is 0 or 1 and
# the size 1, 2, 4 or 8; else 0. That plus the code of the operation is its word.
cdef u32 _candidate[1 << 16]

# By the lower half of the word of an operation. The first 256 are of those that are no candidates.
cdef u64 _mask[1024]                 # memo_mask of the kind
cdef u64 _loads[1024]                # bits that come back as the value: of a store none, of a fetch a byte
cdef u32 _access[1024]               # PF_*
cdef u8 _kind[1024]                  # KIND_*, KIND_NONE where it is no load, store or fetch, or no candidate

cdef u64 _bytes[9]                  # by size: the bits of as many bytes

# Below CANDIDATE a word has room for every code of an operation, whether there is one or not: none is taken for
# another.
sc_check(8 * sizeof((<sc_op *>NULL).op) == 8)
sc_check(CANDIDATE == 1 << 8)
sc_check(<int>OP_COUNT <= <int>CANDIDATE)
# _fill_tables makes a kind of the code of a load, store or fetch; quick_candidates passes codes of two bits.
sc_check(OP_READ == 0)
sc_check(<int>OP_WRITE == <int>KIND_STORE)
sc_check(<int>OP_FETCH == <int>KIND_FETCH)
sc_check(OP_FETCH <= 3)
# Counters of hits follow each other in the order of operations.
sc_check(<int>TLB_LOAD >> 1 == <int>OP_READ)
sc_check(<int>TLB_STORE >> 1 == <int>OP_WRITE)
sc_check(<int>TLB_FETCH >> 1 == <int>OP_FETCH)
# A tag has a bit for each kind, above those of the epoch, and no access is of the last.
sc_check(KIND_USER == KIND_FETCH + 1)
sc_check(KIND_USER + KIND_FETCH < KIND_NONE)
sc_check(KIND_NONE < MEMO_KINDS)
sc_check(MEMO_DENIED + MEMO_KINDS == 8 * sizeof(u64))
sc_check(MEMO_EPOCHS >> (MEMO_DENIED - MEMO_EPOCH) == 0)


cdef void _fill_tables() noexcept nogil:
    cdef u32 op, user, i
    for i in range(1024):
        _kind[i] = KIND_NONE
        _mask[i] = memo_mask(KIND_NONE)
        _loads[i] = _access[i] = 0
    for user in range(2):
        for op in range(OP_FETCH + 1):
            i = op | CANDIDATE | user << 9
            _kind[i] = op + KIND_USER * user    # OP_READ, OP_WRITE, OP_FETCH are 0, KIND_STORE, KIND_FETCH
            _mask[i] = memo_mask(_kind[i])
            _loads[i] = 0 if op == OP_WRITE else 0xFF if op == OP_FETCH else ~<u64>0
            _access[i] = (PF_U if user else 0) | (PF_W if op == OP_WRITE else PF_I if op == OP_FETCH else 0)
    for i in range(4):
        _bytes[1 << i] = ~<u64>0 >> (64 - (8 << i))
        for user in range(2):
            _candidate[user | 256 << i] = CANDIDATE | user << 9 | 65536 << i


_fill_tables()


cdef inline u64 _width(sc_gmode g) noexcept nogil:
    """The bits of a linear address that count; a shadow has 4 levels and more only where the guest's tables have."""
    return ~<u64>0 if g.top >= 4 else 0xFFFFFFFF


# Each of the loops below is compiled for elements of known layout as well: known_stride, as in sc_batch, is a constant.

cdef inline i64 _stride(const sc_batch *b, i64 known_stride) noexcept nogil:
    return known_stride if known_stride else b.ops.stride


cdef inline u64 _addr(const sc_batch *b, const u8 *element, i64 known_stride) noexcept nogil:
    cdef u64 va
    memcpy(&va, element + (addr_at(known_stride) if known_stride else b.ops.at[FIELD_ADDR]), 8)
    return va


cdef inline u32 _word(const sc_batch *b, const u8 *element, i64 known_stride) noexcept nogil:
    """What the operation is: its index in the tables above, and its size << 16. The caller's array may change while it
    is read (it may lie in guest memory, or another thread may write to it), so each byte of an operation is read once,
    judged by the tables, and the word kept as long as it is needed."""
    cdef u16 both = 0
    cdef u32 op
    if known_stride:
        memcpy(&both, element + 1, 2)
        return element[0] + _candidate[both]
    op = element[b.ops.at[FIELD_OP]]
    both = 1 if op == OP_FETCH else element[b.ops.at[FIELD_SIZE]]       # a fetch is of one byte, whatever it says
    return op + _candidate[(element[b.ops.at[FIELD_USER]] != 0) | both << 8]


cdef inline u32 _code(u32 word) noexcept nogil:
    return word & 0xFFFF


cdef inline bint _all_candidates(const u8 *element, u64 n, i64 stride) noexcept nogil:
    cdef u32 all_ = CANDIDATE
    cdef u8 op = 0
    cdef u16 both = 0
    cdef int k
    for _ in range(n // 4):
        for k in range(4):
            memcpy(&both, element + k * stride + 1, 2)
            op |= element[k * stride]
            all_ &= _candidate[both]
        element += 4 * stride
    for _ in range(n % 4):
        memcpy(&both, element + 1, 2)
        op |= element[0]
        all_ &= _candidate[both]
        element += stride
    return op <= 3 and all_


cdef bint quick_candidates(const u8 *element, u64 n, i64 stride) noexcept nogil:
    """Of an array laid out PACKED or ALIGNED, all are candidates with a code of at most 3."""
    return _all_candidates(element, n, PACKED) if stride == PACKED else _all_candidates(element, n, ALIGNED)


cdef inline void _move(sc_batch *b, u64 i, u64 value, u8 *at, u32 code, u32 size) noexcept nogil:
    """Load or store the bytes of operation i, of at most 8 from `at` on, which lie in one page. Loads and stores come
    in no order that could be foreseen, so both do the same: a load stores too, to where nobody looks."""
    cdef u64 word
    memcpy(&word, at, 8)
    b.value[i] = word & _loads[code] & _bytes[size]
    if _access[code] & PF_W == 0:
        at = <u8 *>&b.nowhere
    if size == 8:
        memcpy(at, &value, 8)
    elif size == 4:
        memcpy(at, &value, 4)
    elif size == 2:
        memcpy(at, &value, 2)
    else:
        at[0] = <u8>value


cdef bint _mark_tables(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """Native: the frames of the tables that lead to `va` are known to be such. If the memo has a store to one, all of
    it is dropped. False: nothing of `va` may go into it."""
    cdef sc_walk w
    cdef int level
    cdef u64 frame
    if probe_walk(mmu.mem, &v.guest, va, 0, &w) != RC_OK and mem_frame(mmu.mem, w.table[w.level]) == sc_no_frame():
        return False                # somebody else writes to the tables at this moment
    level = w.level
    while level <= w.top:
        frame = mem_frame(mmu.mem, w.table[level])
        if mmu.marks[frame] >> 2 != mmu.memo_epoch:
            mmu.marks[frame] = mmu.memo_epoch << 2
        if mmu.marks[frame] & MARK_STORED:
            memo_drop(mmu)
            level = w.level
            continue
        mmu.marks[frame] |= MARK_TABLE
        mmu.marked_epoch = mmu.memo_epoch
        level += 1
    return True


cdef u64 _memo_fill(sc_mmu *mmu, sc_batch *b, sc_vcpu *v) noexcept nogil:
    """Put what the last glance found into the memo; returns the context, which may be another by then.

    Native, nothing tells of stores to tables but the stores themselves: frames of tables are marked, and no store to
    one is put there.
    """
    cdef u64 va = b.va
    cdef u32 code = _code(b.word)
    cdef u64 context = memo_context(v.memo, mmu.memo_epoch)
    cdef u64 frame
    if not mmu.shadow:
        if v.memo.marked[memo_region(va)] != memo_region_tag(va, context):
            if not _mark_tables(mmu, v, va):
                return memo_context(v.memo, mmu.memo_epoch)
            context = memo_context(v.memo, mmu.memo_epoch)
            v.memo.marked[memo_region(va)] = memo_region_tag(va, context)
        if _access[code] & PF_W:
            frame = mem_frame(mmu.mem, b.target >> 12)
            if marked_table(mmu, frame):
                return context
            mmu.marks[frame] = mmu.memo_epoch << 2 | MARK_STORED
    memo_put(v.memo, context, va, _kind[code], b.target)
    return context


cdef inline u64 _hits(sc_mmu *mmu, sc_batch *b, const sc_vcpu *v, u64 context, u64 i, u64 stop, u32 *words,
                      i64 known_stride, bint data, sc_gmode g) noexcept nogil:
    """Where operations from number i on lead that are in the memo, up to the first that is not; returns its number.
    The loop is kept this small for everything in it to have a register. words: what the operations are, if bytes move:
    data, a constant.

    At most HITS operations: that many numbers of entries read, each at most 5 (nested: HITS_NESTED and 35), add up to
    less than 4096."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef i64 stride = _stride(b, known_stride)
    cdef const u64 *mask = _mask
    cdef u64 *gpa = b.gpa
    cdef u8 *ram = mmu.mem.ram
    cdef sc_memo *memo = v.memo
    cdef u64 width = _width(g)
    cdef sc_memo_entry *e
    cdef u64 references = 0
    cdef u64 first = i
    cdef u64 va, offset, target
    cdef u32 word
    stop = min(stop, i + (HITS_NESTED if g.nested else HITS))
    while i < stop:
        word = _word(b, element, known_stride)
        va = _addr(b, element, known_stride) & width
        offset = va & 4095
        e = memo_entry(memo, va)
        if not memo_allows(e, va, context, mask[_code(word)]) or offset > 4088:
            break
        target = e.target
        references += target        # of which the low bits count, in the end
        target = (target & pte_addr()) | offset
        gpa[i] = target
        if data:
            words[i - first] = word
            sc_prefetch(ram + target)               # only a hint where gpas are not offsets in RAM
        i += 1
        element += stride
    mmu.stats.walk_references += references & 4095
    b.hits += i - first
    return i


cdef inline void _moves(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop, const u32 *words, i64 known_stride) noexcept nogil:
    """Move the bytes of operations of which gpas are known. words[i]: what operation i is."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    while i < stop:
        _move(b, i, element_word(element, value_at(known_stride) if known_stride else b.ops.at[FIELD_VALUE]),
              mem_guest_frame(mmu.mem, b.gpa[i]) + (b.gpa[i] & 4095), _code(words[i]), words[i] >> 16)
        i += 1
        element += _stride(b, known_stride)


cdef inline u64 _glances(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 context, u64 i, u64 stop, u32 *words,
                         i64 known_stride, sc_gmode g) noexcept nogil:
    """Where operations from number i on lead that are loads, stores and fetches, which the tables allow as they are,
    up to the first that is none; returns its number. words[i]: what operation i is, if bytes move. b.target: what the
    memo would say of the last, and b.va, b.word of which access, if it was the only one that was asked for."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef i64 stride = _stride(b, known_stride)
    cdef sc_mem *m = mmu.mem
    cdef const sc_paging *p = &v.hw if g.host else &v.guest
    cdef sc_memo *memo = v.memo
    cdef sc_memo_entry *e
    cdef u64 width = _width(g)
    cdef int canonical = 57 if g.top == 5 else 48 if g.top == 4 else 64
    cdef u64 references = 0
    cdef u64 first = i
    cdef u64 repeats = 0
    cdef u64 new = 0
    cdef u64 *region
    cdef bint watched = m.logging or mmu.marked_epoch == mmu.memo_epoch     # stores may have more to do
    cdef bint note = b.note
    cdef bint data = b.data
    cdef u64 *gpa = b.gpa
    cdef u64 offset, frame, hpa
    cdef int host_read
    cdef u64 va = 0
    cdef u64 target = 0
    cdef u32 word = 0
    cdef u32 code
    cdef u32 read = 0
    while i < stop:
        word = _word(b, element, known_stride)
        code = _code(word)
        va = _addr(b, element, known_stride) & width
        offset = va & 4095
        if offset > 4088 or _kind[code] == KIND_NONE or not is_canonical(va, canonical):
            break                   # it may reach into the next page, or is no load, store or fetch
        if walk_body(m, p, va, _access[code], NULL, &target, &read, g) != RC_OK:
            break
        if g.host:
            frame = (target >> 12) - m.ram_hfn
            if frame >= m.nframes:
                break
            target = mem_gfn(m, frame) << 12
        else:
            if g.nested:
                host_read = host_glance(m, p, target, host_need(_access[code]), &hpa)
                if host_read < 0:
                    break
                read += host_read
            frame = mem_frame(m, target >> 12)
            if frame == sc_no_frame() or (watched and _access[code] & PF_W and (
                    m.logging or marked_table(mmu, frame))):
                break
            target &= ~<u64>4095
        if note:
            region = &memo.region[(va >> 21) & (MEMO_REGIONS - 1)]
            new += region[0] != va >> 21
            region[0] = va >> 21
            # ... and the page, without what it would allow
            e = memo_entry(memo, va)
            repeats += memo_is(e, memo_tag(va, context))
            memo_note(e, memo_tag(va, context))
        references += read
        gpa[i] = target | offset
        if data:
            words[i] = word
            sc_prefetch(mem_guest_frame(m, target) + offset)
        i += 1
        element += stride
        if not g.host and data and _access[code] & PF_W:
            break                   # its bytes may be those of a table that the next walk reads
    mmu.stats.walk_references += references
    b.glances += i - first
    b.repeats += repeats
    b.regions += new
    b.target = target | <u64>read
    b.va = va
    b.word = word
    return i


cdef inline void _prefetch_tables(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 i, u64 stop, i64 known_stride,
                                  sc_gmode g) noexcept nogil:
    """Bring the entries by which operations i to stop (at most AHEAD) are walked into the cache. Level by level, so
    that the misses of all of them are under way at once; nothing is judged here."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef const sc_mem *m = mmu.mem
    cdef const sc_paging *p = &v.hw if g.host else &v.guest
    cdef u64 va[AHEAD]
    cdef const u8 *slot[AHEAD]
    cdef u64 entry, base
    cdef const u8 *table
    cdef int n = <int>(stop - i)
    cdef int k, step, level
    for k in range(n):
        va[k] = _addr(b, element, known_stride)
        base = p.pdpte[(va[k] >> 30) & 3] & pte_addr() if g.pae_root else p.root
        table = mem_host_frame(m, base) if g.host else mem_guest_frame(m, base)
        slot[k] = NULL
        if table != NULL:
            slot[k] = table + table_index(va[k], g.top, g.pte_size) * g.pte_size
        element += _stride(b, known_stride)
    for step in range(g.top - 1):
        level = g.top - 1 - step    # of the tables that this step comes to
        for k in range(n):
            if slot[k] == NULL:
                continue
            entry = (<const u64 *>slot[k])[0] if g.pte_size == 8 else (<const u32 *>slot[k])[0]
            slot[k] = NULL
            if not entry & PTE_P or entry & PTE_PS:
                continue
            base = entry & pte_addr()
            table = mem_host_frame(m, base) if g.host else mem_guest_frame(m, base)
            if table != NULL:
                slot[k] = table + table_index(va[k], level, g.pte_size) * g.pte_size
                sc_prefetch(slot[k])


cdef u64 _spilled(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 context, u64 i, i64 known_stride, u64 width) noexcept nogil:
    """Operation i if the second part of the memo has it: i + 1, else i. b.word: what it is."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef u32 word = _word(b, element, known_stride)
    cdef u64 va = _addr(b, element, known_stride) & width
    cdef sc_memo_entry *e = memo_spill(v.memo, va)
    if not memo_allows(e, va, context, _mask[_code(word)]) or (va & 4095) > 4088:
        return i
    b.word = word
    b.hits += 1
    b.gpa[i] = (e.target & pte_addr()) | (va & 4095)
    mmu.stats.walk_references += e.target & 4095
    if b.hits % PROMOTED == 0:      # often enough for what is in use to come to the fore, seldom enough for two pages
        memo_promote(v.memo, va, context)                   # that want the same place not to change it all the time
    return i + 1


cdef inline u64 _quick(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 i, u64 stop, i64 known_stride,
                       sc_gmode g) noexcept nogil:
    """Do operations from number i on, up to the first that is no load, store or fetch, or none that the tables allow
    as they are; returns its number. In groups: while the bytes of one are on their way to the cache, more are looked
    at."""
    cdef u64 first = i
    cdef u64 context, group, begin, after
    cdef u32 room[AHEAD]            # what the operations of a group are, if bytes move: as judged, so moved
    cdef u32 *words                 # ... by their numbers
    context = memo_context(v.memo, mmu.memo_epoch)
    while i < stop:
        begin = i
        words = <u32 *>(<size_t>room - i * sizeof(u32))
        group = min(i + AHEAD, stop) if b.data or (b.far and not b.use_memo) else stop
        while i < group:
            if b.use_memo:
                if b.data:
                    after = _hits(mmu, b, v, context, i, group, words + i, known_stride, True, g)
                else:
                    after = _hits(mmu, b, v, context, i, group, NULL, known_stride, False, g)
                if after > i:
                    i = after
                    continue
                after = _spilled(mmu, b, v, context, i, known_stride, _width(g))
                if after > i:
                    if b.data:
                        words[i] = b.word
                    i = after
                    continue
            if b.data and not g.host:
                # Stores come before the walks that follow them.
                _moves(mmu, b, begin, i, words, known_stride)
                begin = i
            if b.far and not b.use_memo and i == begin:
                _prefetch_tables(mmu, b, v, i, group, known_stride, g)
            after = _glances(mmu, b, v, context, i, i + 1 if b.use_memo else group, words, known_stride, g)
            if after == i:
                break
            if b.use_memo:
                context = _memo_fill(mmu, b, v)
            i = after
        if b.data:
            _moves(mmu, b, begin, i, words, known_stride)
        if i < group:
            break
    mmu.stats.accesses += i - first
    return i


cdef struct sc_asked:
    sc_mmu *mmu
    sc_batch *b
    u64 i
    u64 stop
    i64 known_stride


cdef inline u64 _quick_in(void *asked, sc_gmode g) noexcept nogil:
    cdef const sc_asked *a = <const sc_asked *>asked
    if g.top == 0:
        return a.i                  # paging off: no tables
    return _quick(a.mmu, a.b, a.mmu.vcpus[a.b.number], a.i, a.stop, a.known_stride, g)


cdef inline u64 _by_mode(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop, i64 known_stride) noexcept nogil:
    """_quick, for the tables that the processor walks; the mode stays for as long as nothing but accesses are made."""
    cdef sc_vcpu *v = mmu.vcpus[b.number]
    cdef sc_asked a
    a.mmu = mmu
    a.b = b
    a.i = i
    a.stop = stop
    a.known_stride = known_stride
    if mmu.shadow:
        return in_mode(v.hw.mode, TABLES_SHADOW, GLANCE, _quick_in, &a)
    if mmu.nested:
        return in_mode(v.guest.mode, TABLES_NESTED, GLANCE, _quick_in, &a)
    return in_mode(v.guest.mode, TABLES_GUEST, GLANCE, _quick_in, &a)


cdef u64 _packed(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    return _by_mode(mmu, b, i, stop, PACKED)


cdef u64 _aligned(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    return _by_mode(mmu, b, i, stop, ALIGNED)


cdef u64 _any_layout(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    return _by_mode(mmu, b, i, stop, 0)


cdef inline u64 _by_layout(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    if b.known_stride == PACKED:
        return _packed(mmu, b, i, stop)
    if b.known_stride == ALIGNED:
        return _aligned(mmu, b, i, stop)
    return _any_layout(mmu, b, i, stop)


cdef struct sc_translated:          # an access that a first level of the TLB translates, while one function runs
    u64 key                         # page | op << 1 | user << 3 | 1; 0: none
    u64 gpa                         # of the page
    u8 *page                        # ... its bytes
    const u64 *filled               # of the entry: when it was,
    u64 when                        # ... then: as long as that is so, the place has the same walk's
    u64 *used                       # ... and when it was used


cdef inline void _translation(const sc_mmu *mmu, const sc_vcpu *v, u64 va, u32 access, u64 key, u64 gpa,
                              sc_translated *m) noexcept nogil:
    """Remember where the entry stands that has just translated `va`."""
    cdef u32 bank = 0
    cdef const sc_tlb_entry *e = tlb_look(v.tlb, va, vcpu_pcid(v), mmu.flush_epoch, tlb_kind(access), &bank)
    if e == NULL or v.tlb.bank[bank].plru:
        return
    m.key = key
    m.gpa = gpa & ~<u64>4095
    m.page = mem_guest_frame(mmu.mem, gpa)
    m.filled = &e.filled
    m.when = e.filled
    m.used = v.tlb.bank[bank].used + <u64>(e - v.tlb.bank[bank].entry)


cdef u64 quick_translated(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    """Where operations from number i on lead that are loads, stores and fetches in one page, which the TLB translates,
    up to the first that is none; returns its number. Their bytes are moved.

    What an entry was found to allow stays so while nothing but such accesses is made: registers, slots and epochs are
    as they were. An entry of a first level can make room for one of the second, which another walk has filled."""
    cdef sc_vcpu *v = mmu.vcpus[b.number]
    cdef sc_tlb *t = v.tlb
    cdef sc_translated memo[TRANSLATED]
    cdef sc_translated *m
    cdef sc_op o
    cdef u64 first = i
    cdef u64 hits[OP_FETCH + 1]
    cdef u64 va, gpa, key, before
    cdef u32 size, access
    cdef u64 value[2]
    cdef u8 *at
    cdef bint open = False          # the memo is in use
    hits[0] = hits[1] = hits[2] = 0
    o.value[0] = o.value[1] = 0
    while i < stop:
        if b.known_stride:
            load_known(&o, b, i)
            if o.op > OP_FETCH or not _candidate[o.user | o.size << 8]:
                break
        else:
            load_op(&o, &b.ops, i, b.number)
            if o.op > OP_FETCH or not op_stands(&o, mmu.n_vcpus, b.last, False):
                break
        if not in_one_page(v, &o, &va, &size):
            break
        key = (va & ~<u64>4095) | (o.user != 0) << 3 | o.op << 1 | 1
        m = &memo[(va >> 12) & (TRANSLATED - 1)]
        if open and m.key == key and m.filled[0] == m.when:
            t.clock += 1
            m.used[0] = t.clock
            hits[o.op] += 1
            gpa = m.gpa | (va & 4095)
            at = m.page + (va & 4095)
        else:
            access = access_bits(&o)
            before = (&mmu.stats.tlb_load_hits)[tlb_kind(access) >> 1]
            if not tlb_hit(mmu, v, va, access, &gpa):
                break
            at = mem_guest_frame(mmu.mem, gpa) + (gpa & 4095)
            if before != (&mmu.stats.tlb_load_hits)[tlb_kind(access) >> 1] and mmu.mem.host == NULL:
                if not open:
                    memset(memo, 0, sizeof(memo))
                    open = True
                _translation(mmu, v, va, access, key, gpa, m)
        value[0] = 0
        access_bytes(mmu, &o, gpa, at, b.data, size, value)
        b.gpa[i] = gpa
        if b.data:
            b.value[i] = value[0]
        i += 1
    mmu.stats.accesses += i - first
    mmu.stats.tlb_hits += hits[0] + hits[1] + hits[2]
    for size in range(OP_FETCH + 1):
        (&mmu.stats.tlb_load_hits)[size] += hits[size]
    return i


cdef inline void _begin(sc_batch *b, sc_memo *memo) noexcept nogil:
    """Before a chunk."""
    b.hits = b.glances = b.repeats = b.regions = 0
    memo.chunks += 1
    b.far = memo.far
    b.use_memo = not memo.unused
    b.note = memo.unused and memo.chunks % NOTES == 0


cdef inline void _learn(const sc_batch *b, sc_memo *memo, u64 n) noexcept nogil:
    """After a chunk of n operations. Where accesses do not repeat, the memo only costs; where they lead to ever new
    regions, their tables do not lie in the caches."""
    if n > CHUNK // 2 and (b.use_memo or b.note):
        if b.note:
            memo.far = b.regions * 2 > n
        memo.unused = (b.hits + b.repeats) * 2 <= n


cdef int quick_chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil:
    """Operations done[0] to stop; done[0] tells how far it came: to where b.watch is due, at the latest. RC_OK or the
    negative code of the one that failed; RC_BAD_OP: by now it is none, see b.bad."""
    cdef sc_op o
    cdef sc_result r
    # NULL: no fast path is open, or operations are those of several vcpus.
    cdef sc_memo *memo = mmu.vcpus[b.number].memo if b.ops.at[FIELD_VCPU] == <u64>-1 else NULL
    cdef u64 i = done[0]
    cdef u64 before
    cdef u32 left = LOOK            # operations to be done by other paths before the next look at the clock
    cdef u32 both
    cdef u32 exits = 0              # operations in a row that took one: it is the rule then, and no glance is worth it
    cdef int rc = RC_OK
    memset(&o, 0, sizeof(o))
    o.vcpu = b.number
    if memo != NULL:
        _begin(b, memo)
    else:
        b.use_tlb = b.ops.at[FIELD_VCPU] == <u64>-1 and mmu.vcpus[b.number].tlb != NULL and mmu.vcpus[b.number].tlb.open
    while True:
        if memo != NULL:
            if (exits < STREAK and i < stop
                    and b.ops.base[<i64>i * b.ops.stride + <i64>b.ops.at[FIELD_OP]] <= OP_FETCH):
                before = i
                i = _by_layout(mmu, b, i, stop)
                if i > before:
                    exits = 0
        elif b.use_tlb:
            i = quick_translated(mmu, b, i, stop)
        if i == stop:
            break
        both = 0                    # no candidate: to be judged
        if b.known_stride:
            load_known(&o, b, i)
            both = o.user | o.size << 8
        else:
            load_op(&o, &b.ops, i, b.number)
        if _candidate[both] and o.op <= OP_FETCH:
            rc = access_missed(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r)
        elif not op_stands(&o, mmu.n_vcpus, b.last, b.high != NULL):
            b.bad = o
            rc = RC_BAD_OP
            break
        elif o.op > OP_FETCH:
            rc = vcpu_op(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r)
        else:
            rc = access_missed(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r)
        if rc < 0:
            break
        exits = exits + 1 if r.exits else 0
        batch_tell(b, i, &r)
        i += 1
        rc = RC_OK
        if mmu.audit_found:
            rc = RC_AUDIT
            break
        left -= 1
        if left == 0:
            left = LOOK
            if watch_due(b.watch):
                break
    if memo != NULL:
        _learn(b, memo, i - done[0])
    done[0] = i
    return rc
