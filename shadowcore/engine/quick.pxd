"""Operations of a batch, done by the shortest way that each has."""
from libc.string cimport memcpy

from shadowcore.engine.access cimport OP_CMPXCHG, OP_FETCH, op_is_access, sc_op
from shadowcore.engine.results cimport sc_row
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport i64, u8, u32, u64
from shadowcore.engine.watch cimport sc_watch

cdef enum:
    CHUNK = 4096                    # operations that are made in one go
    FIELDS = 9                      # of an operation, required and optional: see sc_layout
    # Bytes from an element to the next: of OP_DTYPE, and of the same fields aligned as a C compiler does it. In both,
    # op, user and size are the first three bytes.
    PACKED = 19
    ALIGNED = 24

cdef inline u64 plain_addr(i64 stride) noexcept nogil:
    """Where addr lies, in elements PACKED or ALIGNED."""
    return 3 if stride == PACKED else 8

cdef inline u64 plain_value(i64 stride) noexcept nogil:
    return 11 if stride == PACKED else 16

cdef struct sc_layout:
    const u8 *base                  # element 0
    i64 stride                      # bytes from one to the next
    # Offset in an element, or all ones: op, user, size, addr, value; vcpu, value_high, expected, expected_high.
    u64 at[FIELDS]

cdef struct sc_batch:
    sc_layout ops
    u32 number                      # vcpu of operations that name none
    bint data                       # bytes move
    # PACKED or ALIGNED: laid out so, and nothing but loads, stores and fetches of 1, 2, 4 or 8 bytes, or operations
    # that have these sizes by chance; `user` is 0 or 1. So it was when the batch began; the fast loops see that it
    # still is. 0: `ops` has the layout.
    i64 plain
    u32 last                        # highest code that an operation may have
    sc_op bad                       # after RC_BAD_OP: the operation that was refused
    sc_watch *watch                 # when it is due, a chunk may end early; NULL: it does not
    u64 *gpa                        # results: per operation
    u64 *value                      # ... if data
    u64 *high                       # ... if some size is 16
    sc_row *rows                    # ... of those that did not just lead somewhere
    u64 n_rows
    # Of a chunk, by what sc_memo has of those before.
    bint remember                   # the memo is asked and filled
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

cdef inline void load_plain(sc_op *o, const sc_batch *b, u64 i) noexcept nogil:
    """load_op of an array laid out as b.plain says."""
    cdef const u8 *element = b.ops.base + <i64>i * b.plain
    o.op = element[0]
    o.user = element[1]
    o.size = element[2]
    memcpy(&o.addr, element + b.ops.at[3], 8)
    memcpy(o.value, element + b.ops.at[4], 8)

cdef inline void load_op(sc_op *o, const sc_layout *layout, u64 i, u32 vcpu) noexcept nogil:
    """Gather an operation from an element of the caller's array, which may be packed."""
    cdef const u8 *element = layout.base + <i64>i * layout.stride
    o.op = element[layout.at[0]]
    o.user = element[layout.at[1]] != 0
    o.size = element[layout.at[2]]
    o.addr = element_word(element, layout.at[3])
    o.value[0] = element_word(element, layout.at[4])
    o.vcpu = vcpu if layout.at[5] == <u64>-1 else element[layout.at[5]]
    o.value[1] = element_word(element, layout.at[6])
    o.expected[0] = element_word(element, layout.at[7])
    o.expected[1] = element_word(element, layout.at[8])

cdef inline bint op_stands(const sc_op *o, u32 vcpus, u32 last, bint wide) noexcept nogil:
    """There is such an operation, of such a size, and such a vcpu. wide: accesses of 16 bytes are welcome."""
    if o.op > last or o.vcpu >= vcpus:
        return False
    if not op_is_access(o.op) or o.op == OP_FETCH:
        return True
    if o.size == 16:                # for loads, stores and CMPXCHG
        return wide and o.op <= OP_CMPXCHG
    return o.size != 0 and o.size <= 8 and o.size & (o.size - 1) == 0

cdef bint quick_usual(const u8 *element, u64 n, i64 stride) noexcept nogil
cdef int quick_chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil
