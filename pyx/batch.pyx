"""Batches of operations: a structured array in, arrays of results out, without the GIL in between.

Most operations of most batches are accesses that the tables allow as they stand. Those are done here, by the memo or
by a glance at the tables; every other is handed to vcpu_op, which knows all cases and changes state in the one right
way. Which of the two does an access can be seen in nothing but the time that it takes.
"""
import numpy as np

from cpython.buffer cimport PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from shadowcore.access cimport (
    OP_CMPXCHG, OP_COUNT, OP_FETCH, OP_WRITE, access_fault, op_is_access, sc_op, sc_result, vcpu_access, vcpu_op,
)
from shadowcore.batch cimport sc_columns, sc_columns_out
from shadowcore.bits cimport PTE_P, PTE_PS, is_canonical, pte_addr
from shadowcore.gmode cimport gmode_32, gmode_64, gmode_la57, gmode_pae, sc_gmode
from shadowcore.memo cimport (
    KIND_NONE, KIND_USER, MEMO_REGIONS, memo_context, memo_entry, memo_is, memo_mask, memo_note, memo_promote, memo_put,
    memo_region, memo_region_tag, memo_spill, memo_tag, sc_memo, sc_memo_entry,
)
from shadowcore.memory cimport mem_frame, mem_gfn, mem_guest_frame, mem_host_frame, sc_mem, sc_no_frame
from shadowcore.mmu cimport Mmu
from shadowcore.results cimport Block, RunResult, block_new, sc_row
from shadowcore.state cimport MARK_STORED, MARK_TABLE, marked_table, memo_drop, sc_mmu, sc_vcpu
from shadowcore.types cimport (
    MODE_32, MODE_64, MODE_LA57, MODE_OFF, MODE_PAE, PF_I, PF_U, PF_W, RC_AUDIT, RC_EXHAUSTED, RC_OK, SC_NONE, i64, u8,
    u16, u32, u64,
)
from shadowcore.walker cimport glance_body, probe_walk, sc_paging, sc_walk, table_index

from shadowcore.config import Op
from shadowcore.errors import ConfigError, Interrupted

OP_DTYPE = np.dtype([("op", "u1"), ("user", "u1"), ("size", "u1"), ("addr", "<u8"), ("value", "<u8")])

# Optional fields of an operations array.
_OPTIONAL = (("vcpu", np.dtype("u1")), ("value_high", np.dtype("<u8")), ("expected", np.dtype("<u8")),
             ("expected_high", np.dtype("<u8")))

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
    CHUNK = 4096                    # operations between two looks for Ctrl-C
    FIELDS = 9                      # of an operation, required and optional: see sc_layout
    FEW = 4                         # rows that need no block of their own: as many as RunResult.few has
    STREAK = 2                      # exits in a row after which the next operation is taken to need one as well
    HITS = 800                      # operations that the loop over hits does in one go
    PROMOTED = 4                    # one of so many hits in the spill of the memo moves the page out of it
    NOTES = 8                       # without use for the memo, one chunk of so many looks whether there is one now
    PACKED = 19                     # bytes of an element of OP_DTYPE
    AHEAD = 32                      # operations whose bytes are fetched into the cache ahead of their use

cdef struct sc_layout:
    const u8 *base                  # element 0
    i64 stride                      # bytes from one to the next
    # Offset in an element, or all ones: op, user, size, addr, value; vcpu, value_high, expected, expected_high.
    u64 at[FIELDS]

cdef struct sc_batch:
    sc_layout ops
    u32 number                      # vcpu of operations that name none
    bint data                       # bytes move
    bint far                        # tables are far more than caches hold
    bint plain                      # laid out as OP_DTYPE, `user` is 0 or 1, and no size is above 8
    u64 *gpa                        # results: per operation
    u64 *value                      # ... if data
    u64 *high                       # ... if some size is 16
    sc_row *rows                    # ... of those that did not just lead somewhere
    u64 n_rows
    bint remember                   # the memo is asked and filled
    bint note                       # pages are noted in the memo, to see whether they come again
    u64 hits                        # of the memo
    u64 glances                     # accesses that a glance answered
    u64 repeats                     # ... of a page that the memo had a note of
    u64 regions                     # ... of 2 MiB, that had not been met lately
    u64 target                      # of the last glance: gpa of the page | entries read
    u64 nowhere                     # where loads store to

cdef object _ARRAY = np.ndarray
cdef object _seen_dtype = None      # the layout that was asked for last ...
cdef u64 _seen_at[FIELDS]           # ... and the offsets of its fields

# By what an operation is: its code, | 256 in user mode.
cdef u64 _mask[272]                 # memo_mask of the kind
cdef u64 _loads[272]                # bits that come back as the value: of a store none, of a fetch a byte
cdef u32 _access[272]               # PF_*
cdef u8 _kind[272]                  # KIND_*, KIND_NONE where it is no load, store or fetch

cdef u64 _bytes[9]                  # by size: the bits of so many bytes
cdef u8 _odd_op[256]                # 0 for the codes and sizes that most batches are made of
cdef u8 _odd_size[256]


cdef void _fill_tables() noexcept nogil:
    cdef u32 op, user, i
    for i in range(272):
        _kind[i] = KIND_NONE
        _mask[i] = memo_mask(KIND_NONE)
        _loads[i] = _access[i] = 0
    for user in range(2):
        for op in range(OP_FETCH + 1):
            i = op | user << 8
            _kind[i] = op + KIND_USER * user    # OP_READ, OP_WRITE, OP_FETCH are 0, KIND_STORE, KIND_FETCH
            _mask[i] = memo_mask(_kind[i])
            _loads[i] = 0 if op == OP_WRITE else 0xFF if op == OP_FETCH else ~<u64>0
            _access[i] = (PF_U if user else 0) | (PF_W if op == OP_WRITE else PF_I if op == OP_FETCH else 0)
    for i in range(9):
        _bytes[i] = ~<u64>0 if i == 8 else (<u64>1 << (8 * i)) - 1
    for i in range(256):
        _odd_op[i] = i > OP_FETCH
        _odd_size[i] = not (i == 1 or i == 2 or i == 4 or i == 8)


_fill_tables()


cdef inline u64 _word(const u8 *element, u64 at) noexcept nogil:
    cdef u64 word = 0
    if at != <u64>-1:
        memcpy(&word, element + at, 8)
    return word


cdef inline void _load_plain(sc_op *o, const sc_batch *b, u64 i) noexcept nogil:
    """_load_op of an array laid out as OP_DTYPE."""
    cdef const u8 *element = b.ops.base + i * PACKED
    o.op = element[0]
    o.user = element[1]
    o.size = element[2]
    o.addr = _word(element, 3)
    o.value[0] = _word(element, 11)


cdef inline void _load_op(sc_op *o, const sc_layout *layout, u64 i, u32 vcpu) noexcept nogil:
    """Gather an operation from an element of the caller's array, which may be packed."""
    cdef const u8 *element = layout.base + <i64>i * layout.stride
    o.op = element[layout.at[0]]
    o.user = element[layout.at[1]] != 0
    o.size = element[layout.at[2]]
    o.addr = _word(element, layout.at[3])
    o.value[0] = _word(element, layout.at[4])
    o.vcpu = vcpu if layout.at[5] == <u64>-1 else element[layout.at[5]]
    o.value[1] = _word(element, layout.at[6])
    o.expected[0] = _word(element, layout.at[7])
    o.expected[1] = _word(element, layout.at[8])


cdef inline u64 _width(const sc_vcpu *v) noexcept nogil:
    """The bits of a linear address that count."""
    return ~<u64>0 if v.guest.mode >= MODE_64 else 0xFFFFFFFF


cdef inline u32 _code(const sc_batch *b, const u8 *element, u32 *size, bint plain) noexcept nogil:
    """What the operation is, as an index into the tables of sc_batch; size[0]: its bytes."""
    cdef u32 word
    if plain:
        memcpy(&word, element, 4)
        size[0] = (word >> 16) & 0xFF
        return word & 0x10F
    size[0] = element[b.ops.at[2]]
    return (element[b.ops.at[0]] & 15) | (element[b.ops.at[1]] != 0) << 8


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


cdef void _mark_tables(sc_mmu *mmu, sc_vcpu *v, u64 va) noexcept nogil:
    """Native: the frames of the tables that lead to `va` are known to be such. If a store to one is remembered, all is
    forgotten."""
    cdef sc_walk w
    cdef int level
    cdef u64 frame
    probe_walk(mmu.mem, &v.guest, va, 0, &w)
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


cdef u64 _remember(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 i, bint plain) noexcept nogil:
    """Put what a glance found of operation i into the memo; returns the context, which may be another by then.

    Native, nothing tells of stores to tables but the stores themselves: frames of tables are marked, and no store to
    one is remembered.
    """
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef u64 va, frame, context
    cdef u32 size
    cdef u32 code = _code(b, element, &size, plain)
    memcpy(&va, element + b.ops.at[3], 8)
    va &= _width(v)
    if not mmu.shadow and v.guest.mode != MODE_OFF:
        context = memo_context(v.memo, mmu.memo_epoch)
        if v.memo.marked[memo_region(va)] != memo_region_tag(va, context):
            _mark_tables(mmu, v, va)
            context = memo_context(v.memo, mmu.memo_epoch)
            v.memo.marked[memo_region(va)] = memo_region_tag(va, context)
    if not mmu.shadow and _access[code] & PF_W:
        frame = mem_frame(mmu.mem, b.target >> 12)
        if marked_table(mmu, frame):
            return memo_context(v.memo, mmu.memo_epoch)
        mmu.marks[frame] = mmu.memo_epoch << 2 | MARK_STORED
    memo_put(v.memo, memo_context(v.memo, mmu.memo_epoch), va, _kind[code], b.target)
    return memo_context(v.memo, mmu.memo_epoch)


cdef inline u64 _hits(sc_mmu *mmu, sc_batch *b, const sc_vcpu *v, u64 context, u64 i, u64 stop,
                      bint plain) noexcept nogil:
    """Where operations from number i on lead that are in the memo, up to the first that is not; returns its number.
    The loop is kept this small for everything in it to have a register.

    At most HITS operations: so many numbers of entries read, each at most 5, add up to less than 4096."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef i64 stride = PACKED if plain else b.ops.stride
    cdef const u64 *mask = _mask
    cdef u64 *gpa = b.gpa
    cdef u8 *ram = mmu.mem.ram
    cdef sc_memo *memo = v.memo
    cdef u64 width = _width(v)
    cdef bint data = b.data
    cdef sc_memo_entry *e
    cdef u64 references = 0
    cdef u64 first = i
    cdef u64 va, offset, target
    cdef u32 code, size
    stop = min(stop, i + HITS)
    while i < stop:
        code = _code(b, element, &size, plain)
        memcpy(&va, element + (3 if plain else b.ops.at[3]), 8)
        va &= width
        offset = va & 4095
        e = memo_entry(memo, va)
        if (e.tag ^ memo_tag(va, context)) & mask[code] or offset > 4088 or (not plain and size > 8):
            break
        target = e.target
        references += target        # of which the low bits count, in the end
        target = (target & pte_addr()) | offset
        gpa[i] = target
        if data:
            sc_prefetch(ram + target)               # only a hint where gpas are not offsets in RAM
        i += 1
        element += stride
    mmu.stats.walk_references += references & 4095
    b.hits += i - first
    return i


cdef inline void _moves(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop, bint plain) noexcept nogil:
    """Move the bytes of operations of which gpas are known."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef u32 code, size
    while i < stop:
        code = _code(b, element, &size, plain)
        _move(b, i, _word(element, 11 if plain else b.ops.at[4]),
              mem_guest_frame(mmu.mem, b.gpa[i]) + (b.gpa[i] & 4095), code, size)
        i += 1
        element += PACKED if plain else b.ops.stride


cdef inline u64 _glances(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 context, u64 i, u64 stop, bint plain,
                         sc_gmode g) noexcept nogil:
    """Where operations from number i on lead that are plain accesses, which the tables allow as they are, up to the
    first that is none; returns its number. b.target: what the memo would say of the last."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef i64 stride = PACKED if plain else b.ops.stride
    cdef const sc_mem *m = mmu.mem
    cdef const sc_paging *p = &v.hw if g.host else &v.guest
    cdef sc_memo *memo = v.memo
    cdef sc_memo_entry *e
    cdef u64 width = _width(v)
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
    cdef u64 va, offset, frame
    cdef u64 target = 0
    cdef u32 code, size
    cdef int read = 0
    while i < stop:
        code = _code(b, element, &size, plain)
        memcpy(&va, element + (3 if plain else b.ops.at[3]), 8)
        va &= width
        offset = va & 4095
        if offset > 4088 or size > 8 or _kind[code] == KIND_NONE or not is_canonical(va, canonical):
            break                   # it may reach into the next page, or is no plain access
        read = glance_body(m, p, va, _access[code], &target, g)
        if read < 0:
            break
        if g.host:
            frame = (target >> 12) - m.ram_hfn
            if frame >= m.nframes:
                break
            target = mem_gfn(m, frame) << 12
        else:
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
    return i


cdef inline void _fetch_tables(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 i, u64 stop, bint plain,
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
        memcpy(&va[k], element + (3 if plain else b.ops.at[3]), 8)
        base = p.pdpte[(va[k] >> 30) & 3] & pte_addr() if g.pae_root else p.root
        table = mem_host_frame(m, base) if g.host else mem_guest_frame(m, base)
        slot[k] = NULL
        if table != NULL:
            slot[k] = table + table_index(va[k], g.top, g.pte_size) * g.pte_size
        element += PACKED if plain else b.ops.stride
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


cdef inline void _fetch_ahead(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 i, u64 stop, bint plain) noexcept nogil:
    """_fetch_tables, of the tables that the processor walks."""
    if mmu.shadow:
        if v.hw.mode == MODE_64:
            _fetch_tables(mmu, b, v, i, stop, plain, gmode_64(True, True))
        elif v.hw.mode == MODE_PAE:
            _fetch_tables(mmu, b, v, i, stop, plain, gmode_pae(True, True))
        else:
            _fetch_tables(mmu, b, v, i, stop, plain, gmode_la57(True, True))
    elif v.guest.mode == MODE_64:
        _fetch_tables(mmu, b, v, i, stop, plain, gmode_64(False, True))
    elif v.guest.mode == MODE_PAE:
        _fetch_tables(mmu, b, v, i, stop, plain, gmode_pae(False, True))
    elif v.guest.mode == MODE_32:
        _fetch_tables(mmu, b, v, i, stop, plain, gmode_32(False, True))
    elif v.guest.mode == MODE_LA57:
        _fetch_tables(mmu, b, v, i, stop, plain, gmode_la57(False, True))


cdef inline u64 _glance(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 context, u64 i, u64 stop, bint plain) noexcept nogil:
    """_glances, for the tables that the processor walks."""
    if mmu.shadow:
        if v.hw.mode == MODE_64:
            return _glances(mmu, b, v, context, i, stop, plain, gmode_64(True, True))
        if v.hw.mode == MODE_PAE:
            return _glances(mmu, b, v, context, i, stop, plain, gmode_pae(True, True))
        return _glances(mmu, b, v, context, i, stop, plain, gmode_la57(True, True))
    if v.guest.mode == MODE_64:
        return _glances(mmu, b, v, context, i, stop, plain, gmode_64(False, True))
    if v.guest.mode == MODE_PAE:
        return _glances(mmu, b, v, context, i, stop, plain, gmode_pae(False, True))
    if v.guest.mode == MODE_32:
        return _glances(mmu, b, v, context, i, stop, plain, gmode_32(False, True))
    if v.guest.mode == MODE_LA57:
        return _glances(mmu, b, v, context, i, stop, plain, gmode_la57(False, True))
    return i


cdef u64 _spilled(sc_mmu *mmu, sc_batch *b, sc_vcpu *v, u64 context, u64 i, bint plain) noexcept nogil:
    """Operation i if the second part of the memo has it: i + 1, else i."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    cdef sc_memo_entry *e
    cdef u64 va
    cdef u32 size
    cdef u32 code = _code(b, element, &size, plain)
    memcpy(&va, element + b.ops.at[3], 8)
    va &= _width(v)
    e = memo_spill(v.memo, va)
    if (e.tag ^ memo_tag(va, context)) & _mask[code] or (va & 4095) > 4088 or size > 8:
        return i
    b.hits += 1
    b.gpa[i] = (e.target & pte_addr()) | (va & 4095)
    mmu.stats.walk_references += e.target & 15
    if b.hits % PROMOTED == 0:      # often enough for what is in use to come to the fore, seldom enough for two pages
        memo_promote(v.memo, va, context)                   # that want the same place not to change it all the time
    return i + 1


cdef inline u64 _quick(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop, bint plain) noexcept nogil:
    """Do operations from number i on, up to the first that is not a plain access that the tables allow as they are;
    returns its number. In groups: while the bytes of one are on their way to the cache, more are looked at."""
    cdef u64 first = i
    cdef sc_vcpu *v = mmu.vcpus[b.number]
    cdef u64 context, group, begin, after
    if v.memo == NULL or b.ops.at[5] != <u64>-1:
        return i                    # a modelled TLB; operations of several vcpus
    context = memo_context(v.memo, mmu.memo_epoch)
    while i < stop:
        begin = i
        group = min(i + AHEAD, stop) if b.data or (b.far and not b.remember) else stop
        while i < group:
            if b.remember:
                after = _hits(mmu, b, v, context, i, group, plain)
                if after > i:
                    i = after
                    continue
                after = _spilled(mmu, b, v, context, i, plain)
                if after > i:
                    i = after
                    continue
            if b.data and not mmu.shadow:
                _moves(mmu, b, begin, i, plain)         # stores come before the walks that follow them
                begin = i
            if b.far and not b.remember and i == begin:
                _fetch_ahead(mmu, b, v, i, group, plain)
            after = _glance(mmu, b, v, context, i, i + 1 if b.remember else group, plain)
            if after == i:
                break
            if b.remember:
                context = _remember(mmu, b, v, i, plain)
            i = after
        if b.data:
            _moves(mmu, b, begin, i, plain)
        if i < group:
            break
    mmu.stats.accesses += i - first
    return i


cdef u64 _quick_plain(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    return _quick(mmu, b, i, stop, True)


cdef u64 _quick_other(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil:
    return _quick(mmu, b, i, stop, False)


cdef int _chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil:
    """Operations done[0] to stop; done[0] tells how far it came. RC_OK or the negative code of the one that failed."""
    cdef sc_op o
    cdef sc_result r
    cdef sc_row *row
    cdef u64 i = done[0]
    cdef u64 before
    cdef u32 exits = 0              # operations in a row that took one: it is the rule then, and no glance is worth it
    cdef int rc = RC_OK
    memset(&o, 0, sizeof(o))
    o.vcpu = b.number
    while True:
        if exits < STREAK and i < stop and not _odd_op[b.ops.base[<i64>i * b.ops.stride + <i64>b.ops.at[0]]]:
            before = i
            i = _quick_plain(mmu, b, i, stop) if b.plain else _quick_other(mmu, b, i, stop)
            if i > before:
                exits = 0
        if i == stop:
            break
        if b.plain:
            _load_plain(&o, b, i)
        else:
            _load_op(&o, &b.ops, i, b.number)
        if _odd_op[o.op]:
            rc = vcpu_op(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r)
        elif not access_fault(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r):
            rc = vcpu_access(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r)
        if rc < 0:
            break
        b.gpa[i] = r.gpa
        if b.data:
            b.value[i] = r.value[0]
            if b.high != NULL:
                b.high[i] = r.value[1]
        exits = exits + 1 if r.exits else 0
        if r.outcome or r.exits or r.emulated:
            row = &b.rows[b.n_rows]
            b.n_rows += 1
            row.number = i
            row.error_code = <u16>r.error_code
            row.exits = <u16>r.exits
            row.outcome = r.outcome
            row.emulated = r.emulated
        i += 1
        rc = RC_OK
        if mmu.audit_found:
            rc = RC_AUDIT
            break
    done[0] = i
    return rc


cdef inline void _learn(sc_batch *b, u64 n) noexcept nogil:
    """After a chunk of n operations. Where accesses do not repeat, the memo only costs; where they lead to ever new
    regions, their tables do not lie in the caches."""
    if n > CHUNK // 2 and (b.remember or b.note):
        b.far = b.note and b.regions * 2 > n or (b.far and not b.note)
        b.remember = (b.hits + b.repeats) * 2 > n


cdef int _layout(object ops, sc_layout *layout) except -1:
    """ConfigError unless `ops` is a one-dimensional structured array with the fields of OP_DTYPE."""
    global _seen_dtype
    if not isinstance(ops, _ARRAY) or (ops.dtype is not _seen_dtype and ops.dtype.names is None):
        raise ConfigError(f"ops: a structured array with the fields of OP_DTYPE is needed, not {ops!r:.60}")
    dtype = ops.dtype
    if dtype is not _seen_dtype:
        _seen_dtype = None
        required = [(name, OP_DTYPE.fields[name][0]) for name in OP_DTYPE.names]
        for i, (name, wanted) in enumerate((*required, *_OPTIONAL)):
            _seen_at[i] = <u64>-1
            if name not in dtype.names:
                if i < len(required):
                    raise ConfigError(f"ops: field {name!r} is missing")
                continue
            if dtype.fields[name][0] != wanted:
                raise ConfigError(f"ops: field {name!r} is {dtype.fields[name][0]}, {wanted} is needed")
            _seen_at[i] = dtype.fields[name][1]
        _seen_dtype = dtype
    memcpy(layout.at, _seen_at, sizeof(_seen_at))
    return 0


cdef int _check_values(sc_batch *b, u64 n, u32 vcpus) except -1:
    """ConfigError if an operation, a size or a vcpu does not exist; before anything is run. 1: some size is 16."""
    cdef const sc_layout *layout = &b.ops
    cdef u64 i
    cdef sc_op o
    cdef bint bad = False
    cdef bint wide = False
    cdef const u8 *element = layout.base
    cdef bint packed = (layout.stride == PACKED and layout.at[0] == 0 and layout.at[1] == 1 and layout.at[2] == 2
                        and layout.at[3] == 3 and layout.at[4] == 11)
    cdef u8 odd = layout.at[5] != <u64>-1
    cdef u32 word
    cdef u32 all_ = 0
    cdef int part
    with nogil:
        # Loads, stores and fetches of 1, 2, 4 or 8 bytes are the bulk; only where there are others, each is looked at.
        if packed:
            for _ in range(n // 4):
                for part in range(4):
                    memcpy(&word, element + part * PACKED, 4)
                    all_ |= word
                    odd |= _odd_op[word & 0xFF] | _odd_size[(word >> 16) & 0xFF]
                element += 4 * PACKED
            for _ in range(n % 4):
                memcpy(&word, element, 4)
                all_ |= word
                odd |= _odd_op[word & 0xFF] | _odd_size[(word >> 16) & 0xFF]
                element += PACKED
        else:
            for _ in range(n):
                odd |= _odd_op[element[layout.at[0]]] | _odd_size[element[layout.at[2]]]
                element += layout.stride
        b.plain = packed and not all_ & 0xFE00
        for i in range(n if odd else 0):
            _load_op(&o, layout, i, 0)
            if o.op >= OP_COUNT or o.vcpu >= vcpus:
                bad = True
            elif op_is_access(o.op) and o.op != OP_FETCH:
                wide = wide or o.size == 16
                # 1, 2, 4, 8; and 16 for loads, stores and CMPXCHG
                bad = o.size == 0 or o.size & (o.size - 1) or o.size > 16 or (o.size == 16 and o.op > OP_CMPXCHG)
            if bad:
                break
    if not bad:
        b.plain = b.plain and not wide
        return wide
    if o.op >= OP_COUNT:
        known = ", ".join(f"{known.name}={known.value}" for known in Op)
        raise ConfigError(f"ops[{i}]: operation code {o.op} is not one of {known}")
    if o.vcpu >= vcpus:
        raise ConfigError(f"ops[{i}]: there is no vcpu {o.vcpu}, the VM has {vcpus}")
    raise ConfigError(f"ops[{i}]: size {o.size} is not 1, 2, 4 or 8 (or 16, but for read-modify-write)")


cdef object run_batch(Mmu shell, u32 number, object ops, bint data):
    """VCpu.run, for vcpu `number` where operations do not name another."""
    cdef Py_buffer held             # while it is, the array cannot be resized
    cdef sc_batch b
    memset(&b, 0, sizeof(b))
    _layout(ops, &b.ops)
    b.number = number
    b.data = data
    PyObject_GetBuffer(ops, &held, PyBUF_STRIDES)
    try:
        if held.ndim != 1:
            raise ConfigError(f"ops: one dimension is needed, not {held.ndim}")
        b.ops.base = <const u8 *>held.buf
        b.ops.stride = held.strides[0]
        return _run(shell, &b, held.shape[0], NULL)
    finally:
        PyBuffer_Release(&held)


cdef void _plain_layout(sc_batch *b) noexcept nogil:
    """That of OP_DTYPE."""
    cdef int field
    for field in range(FIELDS):
        b.ops.at[field] = ~<u64>0
    b.ops.at[0], b.ops.at[1], b.ops.at[2], b.ops.at[3], b.ops.at[4] = 0, 1, 2, 3, 11
    b.ops.stride = PACKED
    b.plain = True


cdef void _gather(const sc_columns *c, sc_batch *b, u8 *at, u64 i, u64 stop) noexcept nogil:
    """Lay operations i to stop out as elements of OP_DTYPE from `at` on; they become elements i to stop of b.ops. What
    is gathered stays in the cache until it is used."""
    cdef const u8 *gva = c.gva + <i64>i * c.gva_step
    cdef u8 *element = at
    cdef u64 word
    cdef u32 head = c.all_op | (c.all_user != 0) << 8 | <u32>c.all_size << 16
    cdef u32 both
    cdef const u8 *op
    cdef u64 j
    b.ops.base = <const u8 *>(<size_t>at - i * PACKED)
    if c.op == NULL and c.user == NULL and c.size == NULL:
        for _ in range(i, stop):
            memcpy(&word, gva, 8)
            memcpy(element, &head, 4)
            memcpy(element + 3, &word, 8)
            gva += c.gva_step
            element += PACKED
    elif c.user == NULL and c.size == NULL:
        op = c.op + <i64>i * c.op_step
        head &= ~<u32>0xFF
        for _ in range(i, stop):
            memcpy(&word, gva, 8)
            both = head | op[0]
            memcpy(element, &both, 4)
            memcpy(element + 3, &word, 8)
            gva += c.gva_step
            op += c.op_step
            element += PACKED
    else:
        for j in range(i, stop):
            memcpy(&word, gva, 8)
            head = ((c.op[<i64>j * c.op_step] if c.op != NULL else c.all_op)
                    | ((c.user[<i64>j * c.user_step] if c.user != NULL else c.all_user) != 0) << 8
                    | <u32>(c.size[<i64>j * c.size_step] if c.size != NULL else c.all_size) << 16)
            memcpy(element, &head, 4)
            memcpy(element + 3, &word, 8)
            gva += c.gva_step
            element += PACKED
    if not b.data:
        return
    word = 0
    element = at + 11
    for j in range(i, stop):
        if c.value != NULL:
            memcpy(&word, c.value + <i64>j * c.value_step, 8)
        memcpy(element, &word, 8)
        element += PACKED


cdef u64 columns_check(const sc_columns *c, u64 n) noexcept nogil:
    """Number of the first operation that is no load, store or fetch of 1, 2, 4 or 8 bytes; n if there is none."""
    cdef u64 i
    cdef u8 odd
    if (c.op == NULL and _odd_op[c.all_op]) or (c.size == NULL and _odd_size[c.all_size]):
        return 0
    if c.op == NULL and c.size == NULL:
        return n
    if c.size == NULL and c.op_step == 1:
        odd = 0
        for i in range(n):
            odd |= c.op[i] > OP_FETCH
        if not odd:
            return n
    for i in range(n):
        odd = _odd_op[c.op[<i64>i * c.op_step]] if c.op != NULL else 0
        odd |= _odd_size[c.size[<i64>i * c.size_step]] if c.size != NULL else 0
        if odd:
            return i
    return n


cdef object run_columns(Mmu shell, u32 number, const sc_columns *c, u64 n, bint data):
    """run_batch of columns that columns_check has passed."""
    cdef sc_batch b
    memset(&b, 0, sizeof(b))
    b.number = number
    b.data = data
    _plain_layout(&b)
    return _run(shell, &b, n, c)


cdef void _results(const sc_batch *b, const sc_columns_out *out, u64 i, u64 stop) noexcept nogil:
    """What became of operations i to stop, from the rows of those of which there is more to say than where they led."""
    cdef u64 j
    cdef const sc_row *row
    if out.outcome != NULL:
        memset(out.outcome + i, 0, stop - i)
    if out.emulated != NULL:
        memset(out.emulated + i, 0, stop - i)
    if out.error_code != NULL:
        memset(out.error_code + i, 0, 2 * (stop - i))
    if out.exits != NULL:
        memset(out.exits + i, 0, 2 * (stop - i))
    for j in range(b.n_rows):
        row = &b.rows[j]
        if out.outcome != NULL:
            out.outcome[row.number] = row.outcome
        if out.emulated != NULL:
            out.emulated[row.number] = row.emulated
        if out.error_code != NULL:
            out.error_code[row.number] = row.error_code
        if out.exits != NULL:
            out.exits[row.number] = row.exits


cdef int columns_run(sc_mmu *mmu, u32 number, const sc_columns *c, u64 n, bint data, const sc_columns_out *out,
                     bint *no_memo, u64 *done) noexcept nogil:
    """The same without Python: done[0] operations were made. RC_OK, the negative code of the one that failed, or
    RC_EXHAUSTED with mmu.exhausted = SC_NONE where the host had no room for the work. no_memo: kept for the next."""
    cdef sc_batch b
    cdef u64 i = 0
    cdef u64 begin, stop
    cdef int rc = RC_OK
    cdef size_t words = 8 * min(n, CHUNK)
    cdef size_t rows = sizeof(sc_row) * min(n, CHUNK)
    cdef u8 *room
    done[0] = 0
    if n == 0:
        return RC_OK
    memset(&b, 0, sizeof(b))
    b.number = number
    b.data = data
    _plain_layout(&b)
    room = <u8 *>malloc(rows + 2 * words + PACKED * min(n, CHUNK))
    if room == NULL:
        mmu.exhausted = SC_NONE
        return RC_EXHAUSTED
    b.rows = <sc_row *>room
    b.remember = not no_memo[0]
    if not mmu.shadow or mmu.mem.exposed:
        memo_drop(mmu)              # anybody may have written to what translations are made of
    while i < n and rc == RC_OK:
        begin = i
        stop = min(n, i + CHUNK)
        b.gpa = out.gpa if out.gpa != NULL else <u64 *>(<size_t>room + rows - 8 * i)
        b.value = out.value if out.value != NULL else <u64 *>(<size_t>room + rows + words - 8 * i)
        b.n_rows = 0
        b.hits = b.glances = b.repeats = b.regions = 0
        b.note = not b.remember and (i // CHUNK) % NOTES == 0
        _gather(c, &b, room + rows + 2 * words, i, stop)
        rc = _chunk(mmu, &b, &i, stop)
        _results(&b, out, begin, i)
        _learn(&b, stop - begin)
    free(room)
    no_memo[0] = not b.remember
    done[0] = i
    return rc


cdef object _run(Mmu shell, sc_batch *b, u64 n, const sc_columns *columns):
    cdef sc_mmu *mmu = &shell.c
    cdef bint wide = columns == NULL and _check_values(b, n, mmu.n_vcpus)
    cdef RunResult result
    cdef Block more
    cdef Block gathered = None if columns == NULL else block_new(PACKED * min(n, CHUNK))
    cdef u64 i = 0
    cdef u64 begin, stop, room
    cdef int rc = RC_OK
    shell.idle()
    result = RunResult.__new__(RunResult)
    result.capacity = n
    result.data = b.data
    result.wide = wide
    result.words = block_new(8 * n * (1 + b.data + wide))
    b.gpa = <u64 *>result.words.at
    if b.data:
        b.value = b.gpa + n
    if wide:
        b.high = b.gpa + n * (1 + b.data)
        memset(b.high, 0, 8 * n)
    room = FEW
    result.rows = result.few
    result.before = mmu.stats[0]
    b.remember = not shell.no_memo
    b.far = shell.far
    if not mmu.shadow or mmu.mem.exposed:
        memo_drop(mmu)              # anybody may have written to what translations are made of
    mmu.mem.busy = True
    error = None
    try:
        while i < n and rc == RC_OK:
            begin = i
            stop = min(n, i + CHUNK)
            if room < b.n_rows + (stop - i):
                room = min(n, 2 * room + CHUNK)
                more = block_new(room * sizeof(sc_row))
                memcpy(more.at, result.rows, b.n_rows * sizeof(sc_row))
                result.many = more
                result.rows = <sc_row *>more.at
            b.rows = result.rows
            b.hits = b.glances = b.repeats = b.regions = 0
            shell.chunks += 1
            b.note = not b.remember and shell.chunks % NOTES == 0
            with nogil:
                if columns != NULL:
                    _gather(columns, b, <u8 *>gathered.at, i, stop)
                rc = _chunk(mmu, b, &i, stop)
            _learn(b, stop - begin)
            if n > CHUNK:
                PyErr_CheckSignals()
    except KeyboardInterrupt:
        error = Interrupted(None)
    finally:
        mmu.mem.busy = False
        shell.no_memo = not b.remember
        shell.far = b.far
    result.n = i
    result.n_rows = b.n_rows
    result.after = mmu.stats[0]
    if rc < 0:
        error = shell.failure(rc)
    if error is not None:
        error.result = result
        raise error
    return result
