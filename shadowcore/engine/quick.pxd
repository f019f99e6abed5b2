"""Operations of a batch, done by the fastest path that each has."""
from libc.string cimport memcpy

from shadowcore.engine.access cimport OP_CMPXCHG, OP_FETCH, OP_INVPCID, sc_op, sc_result
from shadowcore.engine.results cimport sc_row
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport i64, u8, u16, u32, u64
from shadowcore.engine.watch cimport sc_watch

cdef enum:
    CHUNK = 4096                    # operations that are made in one go
    # Bytes from an element to the next: of OP_DTYPE, and of the same fields aligned as a C compiler does it. In both,
    # op, user and size are the first three bytes.
    PACKED = 19
    ALIGNED = 24
    PACKED_ADDR = 3                 # offset of the fourth field
    PACKED_VALUE = 11               # ... and of the last
    ALIGNED_ADDR = 8
    ALIGNED_VALUE = 16

# Fields of an operation: those of OP_DTYPE, in its order, then the optional ones, in that of batch._OPTIONAL.
cdef enum:
    FIELD_OP = 0
    FIELD_USER = 1
    FIELD_SIZE = 2
    FIELD_ADDR = 3
    FIELD_VALUE = 4
    FIELD_VCPU = 5
    FIELD_VALUE_HIGH = 6
    FIELD_EXPECTED = 7
    FIELD_EXPECTED_HIGH = 8
    FIELD_IMPLICIT = 9
    FIELDS = 10

cdef inline u64 addr_at(i64 stride) noexcept nogil:
    """Where addr lies, in elements PACKED or ALIGNED."""
    return PACKED_ADDR if stride == PACKED else ALIGNED_ADDR

cdef inline u64 value_at(i64 stride) noexcept nogil:
    return PACKED_VALUE if stride == PACKED else ALIGNED_VALUE

cdef struct sc_layout:
    const u8 *base                  # element 0
    i64 stride                      # bytes from one to the next
    u64 at[FIELDS]                  # by FIELD_*: its offset in an element, or all ones

cdef struct sc_batch:
    sc_layout ops
    u32 number                      # vcpu of operations that name none
    bint data                       # bytes move
    # PACKED or ALIGNED: laid out so, and nothing but loads, stores and fetches of 1, 2, 4 or 8 bytes, or operations
    # that have these sizes by chance; `user` is 0 or 1. So it was when the batch began; the fast loops see that it
    # still is. 0: `ops` has the layout.
    i64 known_stride
    u32 last                        # highest code that an operation may have
    sc_op bad                       # after RC_BAD_OP: the operation that was refused
    sc_watch *watch                 # when it is due, a chunk may end early; NULL: it does not
    u64 *gpa                        # results: per operation
    u64 *value                      # ... if data
    u64 *high                       # ... if some size is 16
    sc_row *rows                    # ... of those that did not just lead somewhere
    u64 n_rows
    # Of a chunk, by what sc_memo has of those before.
    bint use_memo                   # the memo is asked and filled
    bint use_tlb                    # the vcpu's TLB is asked before anything else
    bint note                       # pages are noted in the memo, to see whether they come again
    bint far                        # tables are far more than caches hold
    u64 hits                        # of the memo
    u64 glances                     # accesses that a glance answered
    u64 repeats                     # ... of a page that the memo had a note of
    u64 regions                     # ... of 2 MiB, that had not been met lately
    u64 target                      # of the last glance: gpa of the page | entries read
    u64 va                          # ... its linear address
    u32 word                        # ... what the operation was, see quick._word; also of the last that the spill had
    u64 nowhere                     # where loads store to

cdef inline u64 element_word(const u8 *element, u64 at) noexcept nogil:
    cdef u64 word = 0
    if at != <u64>-1:
        memcpy(&word, element + at, 8)
    return word

cdef inline void load_known(sc_op *o, const sc_batch *b, u64 i) noexcept nogil:
    """load_op of an array laid out as b.known_stride says."""
    cdef const u8 *element = b.ops.base + <i64>i * b.known_stride
    o.op = element[0]
    o.user = element[1]
    o.size = element[2]
    memcpy(&o.addr, element + b.ops.at[FIELD_ADDR], 8)
    memcpy(o.value, element + b.ops.at[FIELD_VALUE], 8)

cdef inline void load_op(sc_op *o, const sc_layout *layout, u64 i, u32 vcpu) noexcept nogil:
    """Gather an operation from an element of the caller's array, which may be packed."""
    cdef const u8 *element = layout.base + <i64>i * layout.stride
    o.op = element[layout.at[FIELD_OP]]
    o.user = element[layout.at[FIELD_USER]] != 0
    o.size = element[layout.at[FIELD_SIZE]]
    o.addr = element_word(element, layout.at[FIELD_ADDR])
    o.value[0] = element_word(element, layout.at[FIELD_VALUE])
    o.vcpu = vcpu if layout.at[FIELD_VCPU] == <u64>-1 else element[layout.at[FIELD_VCPU]]
    o.value[1] = element_word(element, layout.at[FIELD_VALUE_HIGH])
    o.expected[0] = element_word(element, layout.at[FIELD_EXPECTED])
    o.expected[1] = element_word(element, layout.at[FIELD_EXPECTED_HIGH])

cdef inline bint op_stands(const sc_op *o, u32 vcpus, u32 last, bint wide) noexcept nogil:
    """There is such an operation, of such a size, and such a vcpu. wide: accesses of 16 bytes are welcome."""
    if o.op > last or o.vcpu >= vcpus:
        return False
    if o.op >= OP_FETCH and o.op < OP_CMPXCHG:
        return True
    if o.size == 16:                # for loads, stores and CMPXCHG
        return (wide and o.op <= OP_CMPXCHG) or o.op == OP_INVPCID
    return (o.size != 0 and o.size <= 8 and o.size & (o.size - 1) == 0) or o.op == OP_INVPCID

cdef inline void batch_tell(sc_batch *b, u64 i, const sc_result *r) noexcept nogil:
    """What became of operation i."""
    cdef sc_row *row
    if r.exits or r.outcome or r.emulated:
        row = &b.rows[b.n_rows]
        b.n_rows += 1
        row.number = i
        row.error_code = <u16>r.error_code
        row.exits = <u16>r.exits
        row.outcome = r.outcome
        row.emulated = r.emulated
    b.gpa[i] = r.gpa
    if b.data:
        b.value[i] = r.value[0]
        if b.high != NULL:
            b.high[i] = r.value[1]

cdef bint quick_candidates(const u8 *element, u64 n, i64 stride) noexcept nogil
cdef u64 quick_translated(sc_mmu *mmu, sc_batch *b, u64 i, u64 stop) noexcept nogil
cdef int quick_chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil
