"""Batches of operations: a structured array in, or columns; arrays of results out, without the GIL in between."""
import numpy as np

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from shadowcore.engine.access cimport OP_COUNT, OP_FETCH, access_implicit, op_is_access, sc_op, sc_result
from shadowcore.engine.batch cimport sc_columns, sc_columns_out
from shadowcore.engine.design cimport design_begin
from shadowcore.engine.exits cimport exits_next
from shadowcore.engine.held cimport Held
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.quick cimport (
    ALIGNED, CHUNK, FIELD_ADDR, FIELD_IMPLICIT, FIELD_OP, FIELD_SIZE, FIELD_USER, FIELD_VALUE, FIELD_VCPU, FIELDS,
    PACKED, PACKED_ADDR, PACKED_VALUE, addr_at, batch_tell, load_op, op_stands, quick_candidates, quick_chunk,
    sc_batch, sc_layout, value_at,
)
from shadowcore.engine.results cimport Block, RunResult, block_new, sc_row
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport RC_AUDIT, RC_BAD_OP, RC_EXHAUSTED, RC_OK, SC_NONE, i64, u8, u32, u64
from shadowcore.engine.watch cimport watch_due, watch_error

from shadowcore.config import Op
from shadowcore.errors import ConfigError

OP_DTYPE = np.dtype([("op", "u1"), ("user", "u1"), ("size", "u1"), ("addr", "<u8"), ("value", "<u8")])

# Optional fields of an operations array; the order of both is that of FIELD_*.
_OPTIONAL = (("vcpu", np.dtype("u1")), ("value_high", np.dtype("<u8")), ("expected", np.dtype("<u8")),
             ("expected_high", np.dtype("<u8")), ("implicit", np.dtype("u1")))

cdef enum:
    LOOK = 256                      # operations made one by one between two looks at the clock
    FEW = 4                         # rows that need no block of their own: as many as RunResult.few has

cdef object _ARRAY = np.ndarray
cdef object _seen_dtype = None      # the layout that was asked for last ...
cdef u64 _seen_at[FIELDS]           # ... and the offsets of its fields

# 0 for the codes and sizes that most batches are made of.
cdef u8 _odd_op[256]
cdef u8 _odd_size[256]
for _i in range(256):
    _odd_op[_i] = _i > OP_FETCH
    _odd_size[_i] = _i not in (1, 2, 4, 8)


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


cdef object _complaint(u64 i, const sc_op *o, u32 last, u32 vcpus):
    """What is wrong with operation i, which op_stands refuses."""
    if o.op >= OP_COUNT or o.op > last:
        known = ", ".join(f"{known.name}={known.value}" for known in Op if known.value <= last)
        return f"ops[{i}]: operation code {o.op} is not one of {known}"
    if o.vcpu >= vcpus:
        return f"ops[{i}]: there is no vcpu {o.vcpu}, the VM has {vcpus}"
    return f"ops[{i}]: size {o.size} is not 1, 2, 4 or 8 (or 16, but for read-modify-write)"


cdef i64 _stride_of(const sc_layout *layout) noexcept nogil:
    """PACKED or ALIGNED, if that is how operations are laid out, and have no other fields; else 0."""
    cdef int field
    for field in range(FIELDS):
        if layout.at[field] != (<u64>field if field <= FIELD_SIZE else addr_at(layout.stride) if field == FIELD_ADDR
                                else value_at(layout.stride) if field == FIELD_VALUE else <u64>-1):
            return 0
    return layout.stride if layout.stride == PACKED or layout.stride == ALIGNED else 0


cdef int _check_values(sc_batch *b, u64 n, u32 vcpus) except -1:
    """ConfigError if an operation, a size or a vcpu does not exist; before anything is run. 1: some size is 16.

    This says so early, and which loops will do. The array may be another when its operations are made: each is judged
    again then, see quick_chunk.
    """
    cdef const sc_layout *layout = &b.ops
    cdef u64 i
    cdef sc_op o
    cdef bint bad = False
    cdef bint wide = False
    cdef const u8 *element = layout.base
    cdef i64 known_stride = _stride_of(layout)
    cdef u8 odd = layout.at[FIELD_VCPU] & layout.at[FIELD_IMPLICIT] != <u64>-1
    with nogil:
        # Loads, stores and fetches of 1, 2, 4 or 8 bytes are the bulk; only where there are others, each is looked at.
        if known_stride:
            odd |= not quick_candidates(element, n, known_stride)
        else:
            for _ in range(n):
                odd |= _odd_op[element[layout.at[FIELD_OP]]] | _odd_size[element[layout.at[FIELD_SIZE]]]
                element += layout.stride
        for i in range(n if odd else 0):
            load_op(&o, layout, i, 0)
            if not op_stands(&o, vcpus, b.last, True):
                bad = True
                break
            if op_is_access(o.op):
                wide = wide or (o.size == 16 and o.op != OP_FETCH)
                if _odd_size[o.size] or layout.base[<i64>i * layout.stride + <i64>layout.at[FIELD_USER]] > 1:
                    known_stride = 0
    if bad:
        raise ConfigError(_complaint(i, &o, b.last, vcpus))
    b.known_stride = known_stride
    return wide


cdef object run_batch(Mmu shell, u32 number, object ops, bint data):
    """VCpu.run, for vcpu `number` where operations do not name another."""
    cdef Held held                  # as long as it lives, the array cannot be resized
    cdef sc_batch b
    memset(&b, 0, sizeof(b))
    _layout(ops, &b.ops)
    b.number = number
    b.data = data
    b.last = OP_COUNT - 1
    held = Held.__new__(Held, ops)
    if held.view.ndim != 1:
        raise ConfigError(f"ops: one dimension is needed, not {held.view.ndim}")
    b.ops.base = <const u8 *>held.view.buf
    b.ops.stride = held.view.strides[0]
    return _run(shell, &b, held.view.shape[0], NULL)


cdef void _packed_layout(sc_batch *b) noexcept nogil:
    """That of OP_DTYPE."""
    cdef int field
    for field in range(FIELDS):
        b.ops.at[field] = ~<u64>0
    b.ops.at[FIELD_OP], b.ops.at[FIELD_USER], b.ops.at[FIELD_SIZE] = 0, 1, 2
    b.ops.at[FIELD_ADDR], b.ops.at[FIELD_VALUE] = PACKED_ADDR, PACKED_VALUE
    b.ops.stride = PACKED
    b.known_stride = PACKED
    b.last = OP_FETCH


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
            memcpy(element + PACKED_ADDR, &word, 8)
            gva += c.gva_step
            element += PACKED
    elif c.user == NULL and c.size == NULL:
        op = c.op + <i64>i * c.op_step
        head &= ~<u32>0xFF
        for _ in range(i, stop):
            memcpy(&word, gva, 8)
            both = head | op[0]
            memcpy(element, &both, 4)
            memcpy(element + PACKED_ADDR, &word, 8)
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
            memcpy(element + PACKED_ADDR, &word, 8)
            gva += c.gva_step
            element += PACKED
    if not b.data:
        return
    word = 0
    element = at + PACKED_VALUE
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
    _packed_layout(&b)
    return _run(shell, &b, n, c)


cdef void _results(const sc_batch *b, const sc_columns_out *out, u64 i, u64 stop) noexcept nogil:
    """What became of operations i to stop, from the rows of those of which there is more to say than where they led."""
    cdef u64 j
    cdef const sc_row *row
    if out.gpa != NULL and b.gpa != out.gpa:
        memcpy(out.gpa + i, b.gpa + i, 8 * (stop - i))
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


cdef inline bint _is_implicit(const sc_batch *b, u64 i) noexcept nogil:
    """Of an operation that is no access the field means nothing."""
    cdef const u8 *element = b.ops.base + <i64>i * b.ops.stride
    return element[b.ops.at[FIELD_IMPLICIT]] and op_is_access(element[b.ops.at[FIELD_OP]])


cdef int _mixed_chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil:
    """quick_chunk; implicit accesses are made one by one, and what lies between them as everything is."""
    cdef sc_op o
    cdef sc_result r
    cdef u64 i = done[0]
    cdef u64 last
    cdef u32 left = LOOK            # to be made before the next look at the clock
    cdef int rc = RC_OK
    while i < stop and rc == RC_OK:
        last = i
        while last < stop and not _is_implicit(b, last):
            last += 1
        if last > i:
            rc = quick_chunk(mmu, b, &i, last)
            if i < last:
                break               # it failed, or somebody wants to look for signals
            continue
        load_op(&o, &b.ops, i, b.number)
        if not op_is_access(o.op) or not op_stands(&o, mmu.n_vcpus, b.last, b.high != NULL):
            b.bad = o
            rc = RC_BAD_OP
            break
        rc = access_implicit(mmu, mmu.vcpus[o.vcpu], &o, b.data, &r)
        if rc < 0:
            break
        batch_tell(b, i, &r)
        i += 1
        rc = RC_AUDIT if mmu.audit_found else RC_OK
        left -= 1
        if left == 0:
            left = LOOK
            if watch_due(b.watch):
                break
    done[0] = i
    return rc


cdef int _logged_chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil:
    """The same where exits are logged: one by one, as the log wants to know when an operation is over."""
    cdef u64 i = done[0]
    cdef u64 before
    cdef u32 left = LOOK
    cdef int rc = RC_OK
    while i < stop and rc == RC_OK and left:
        before = i
        if b.ops.at[FIELD_IMPLICIT] == <u64>-1:
            rc = quick_chunk(mmu, b, &i, i + 1)
        else:
            rc = _mixed_chunk(mmu, b, &i, i + 1)
        if i > before:
            exits_next(mmu)
        left -= 1
        if left == 0 and not watch_due(b.watch):
            left = LOOK
    done[0] = i
    return rc


cdef inline int _chunk(sc_mmu *mmu, sc_batch *b, u64 *done, u64 stop) noexcept nogil:
    """Operations done[0] to stop, as quick_chunk has it."""
    if mmu.exits != NULL:
        return _logged_chunk(mmu, b, done, stop)
    if b.ops.at[FIELD_IMPLICIT] == <u64>-1:
        return quick_chunk(mmu, b, done, stop)
    return _mixed_chunk(mmu, b, done, stop)


cdef int columns_run(sc_mmu *mmu, u32 number, const sc_columns *c, u64 n, bint data, const sc_columns_out *out,
                     bint *no_memo, u64 *done) noexcept nogil:
    """The same without Python: done[0] operations were made. RC_OK, the negative code of the one that failed, or
    RC_EXHAUSTED with mmu.exhausted = SC_NONE where the host had no room for the work. no_memo: for those who were
    compiled with it, nothing looks at it (NULL will do)."""
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
    _packed_layout(&b)
    room = <u8 *>malloc(rows + 2 * words + PACKED * min(n, CHUNK))
    if room == NULL:
        mmu.exhausted = SC_NONE
        return RC_EXHAUSTED
    b.rows = <sc_row *>room
    design_begin(mmu)
    while i < n and rc == RC_OK:
        begin = i
        stop = min(n, i + CHUNK)
        # Bytes move to and from the gpas that were found: these are kept where nobody else, nor the guest, can write.
        b.gpa = out.gpa if out.gpa != NULL and not data else <u64 *>(<size_t>room + rows - 8 * i)
        b.value = out.value if out.value != NULL else <u64 *>(<size_t>room + rows + words - 8 * i)
        b.n_rows = 0
        _gather(c, &b, room + rows + 2 * words, i, stop)
        rc = _chunk(mmu, &b, &i, stop)
        _results(&b, out, begin, i)
    free(room)
    done[0] = i
    return rc


cdef object _run(Mmu shell, sc_batch *b, u64 n, const sc_columns *columns):
    cdef sc_mmu *mmu = shell.c
    cdef bint wide = columns == NULL and _check_values(b, n, mmu.n_vcpus)
    cdef RunResult result
    cdef Block more
    cdef Block gathered = None if columns == NULL else block_new(PACKED * min(n, CHUNK))
    cdef u64 i = 0
    cdef u64 stop, room
    cdef int rc = RC_OK
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
    b.watch = &shell.watch
    error = None
    shell.enter()
    design_begin(mmu)
    try:
        while i < n and rc == RC_OK:
            if room < b.n_rows + min(n - i, CHUNK):
                room = min(n, 2 * room + CHUNK)
                more = block_new(room * sizeof(sc_row))
                memcpy(more.at, result.rows, b.n_rows * sizeof(sc_row))
                result.many = more
                result.rows = <sc_row *>more.at
            b.rows = result.rows
            with nogil:             # until signals have to be looked for, or rows want more room
                while True:
                    stop = min(n, i + CHUNK)
                    if room < b.n_rows + (stop - i):
                        break
                    if columns != NULL:
                        _gather(columns, b, <u8 *>gathered.at, i, stop)
                    rc = _chunk(mmu, b, &i, stop)
                    if rc != RC_OK or i == n or watch_due(b.watch):
                        break
            if rc == RC_OK and i < n:
                error = shell.stopped()
                if error is not None:
                    break
    except BaseException as raised:     # no room for rows
        error = raised
    finally:
        shell.leave()
    result.n = i
    result.n_rows = b.n_rows
    result.after = mmu.stats[0]
    if rc == RC_BAD_OP:
        error = ConfigError(_complaint(i, &b.bad, b.last, mmu.n_vcpus)
                            + "; it was when the batch began, somebody wrote to the array since")
    elif rc < 0:
        error = shell.failure(rc)
    if error is not None:
        raise watch_error(error, result)
    return result
