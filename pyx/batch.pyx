"""Batches of operations: a structured array in, arrays of results out, without the GIL in between."""
import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.string cimport memcpy

from shadowcore.access cimport OP_CMPXCHG, OP_COUNT, OP_FETCH, op_is_access, sc_op, sc_result, vcpu_op
from shadowcore.events cimport Stats, stats_copy, stats_since
from shadowcore.mmu cimport Mmu
from shadowcore.state cimport sc_mmu
from shadowcore.types cimport RC_AUDIT, i64, u8, u16, u32, u64

from shadowcore.config import Op
from shadowcore.errors import ConfigError, Interrupted
from shadowcore.results import RunResult

OP_DTYPE = np.dtype([("op", "u1"), ("user", "u1"), ("size", "u1"), ("addr", "<u8"), ("value", "<u8")])

# Optional fields of an operations array.
_OPTIONAL = (("vcpu", np.dtype("u1")), ("value_high", np.dtype("<u8")), ("expected", np.dtype("<u8")),
             ("expected_high", np.dtype("<u8")))

cdef enum:
    CHUNK = 4096                    # operations between two looks for Ctrl-C
    FIELDS = 9                      # of an operation, required and optional


cdef int _check_ops(object ops, u64 *at) except -1:
    """ConfigError unless `ops` is a one-dimensional structured array with the fields of OP_DTYPE; at: offsets of the
    fields in an element, all ones for one that is absent."""
    if not isinstance(ops, np.ndarray) or ops.dtype.names is None:
        raise ConfigError(f"ops: a structured array with the fields of OP_DTYPE is needed, not {ops!r:.60}")
    if ops.ndim != 1:
        raise ConfigError(f"ops: one dimension is needed, not {ops.ndim}")
    required = [(name, OP_DTYPE.fields[name][0]) for name in OP_DTYPE.names]
    for i, (name, dtype) in enumerate((*required, *_OPTIONAL)):
        at[i] = <u64>-1
        if name not in ops.dtype.names:
            if i < len(required):
                raise ConfigError(f"ops: field {name!r} is missing")
            continue
        if ops.dtype.fields[name][0] != dtype:
            raise ConfigError(f"ops: field {name!r} is {ops.dtype.fields[name][0]}, {dtype} is needed")
        at[i] = ops.dtype.fields[name][1]
    return 0


cdef inline u64 _word(const u8 *element, u64 at) noexcept nogil:
    cdef u64 word = 0
    if at != <u64>-1:
        memcpy(&word, element + at, 8)
    return word


cdef inline void _load_op(sc_op *o, const u8 *element, const u64 *at, u32 vcpu) noexcept nogil:
    """Gather an operation from an element of the caller's array, which may be packed."""
    o.op = element[at[0]]
    o.user = element[at[1]] != 0
    o.size = element[at[2]]
    o.addr = _word(element, at[3])
    o.value[0] = _word(element, at[4])
    o.vcpu = vcpu if at[5] == <u64>-1 else element[at[5]]
    o.value[1] = _word(element, at[6])
    o.expected[0] = _word(element, at[7])
    o.expected[1] = _word(element, at[8])


cdef int _check_values(const u8 *base, u64 n, i64 stride, const u64 *at, u32 vcpus) except -1:
    """ConfigError if an operation, a size or a vcpu does not exist; before anything is run. 1: some size is 16."""
    cdef u64 i
    cdef sc_op o
    cdef bint bad = False
    cdef bint wide = False
    with nogil:
        for i in range(n):
            _load_op(&o, base + <i64>i * stride, at, 0)
            if o.op >= OP_COUNT or o.vcpu >= vcpus:
                bad = True
            elif op_is_access(o.op) and o.op != OP_FETCH:
                wide = wide or o.size == 16
                # 1, 2, 4, 8; and 16 for loads, stores and CMPXCHG
                bad = o.size == 0 or o.size & (o.size - 1) or o.size > 16 or (o.size == 16 and o.op > OP_CMPXCHG)
            if bad:
                break
    if not bad:
        return wide
    if o.op >= OP_COUNT:
        known = ", ".join(f"{known.name}={known.value}" for known in Op)
        raise ConfigError(f"ops[{i}]: operation code {o.op} is not one of {known}")
    if o.vcpu >= vcpus:
        raise ConfigError(f"ops[{i}]: there is no vcpu {o.vcpu}, the VM has {vcpus}")
    raise ConfigError(f"ops[{i}]: size {o.size} is not 1, 2, 4 or 8 (or 16, but for read-modify-write)")


cdef object run_batch(Mmu shell, u32 number, object ops, bint data):
    """VCpu.run, for vcpu `number` where operations do not name another."""
    cdef u64 at[FIELDS]
    _check_ops(ops, at)
    cdef const u8 *base = <const u8 *><size_t>ops.ctypes.data
    cdef u64 n = ops.shape[0]
    cdef i64 stride = ops.strides[0]
    cdef bint wide = _check_values(base, n, stride, at, shell.c.n_vcpus)
    shell.idle()
    outcome = np.zeros(n, dtype=np.uint8)
    error_code = np.zeros(n, dtype=np.uint16)
    gpa = np.zeros(n, dtype=np.uint64)
    value = np.zeros(n, dtype=np.uint64)
    value_high = np.zeros(n if wide else 0, dtype=np.uint64)
    exits = np.zeros(n, dtype=np.uint16)
    emulated = np.zeros(n, dtype=np.uint8)
    cdef u8[::1] c_outcome = outcome
    cdef u16[::1] c_error = error_code
    cdef u64[::1] c_gpa = gpa
    cdef u64[::1] c_value = value
    cdef u64[::1] c_high = value_high
    cdef u16[::1] c_exits = exits
    cdef u8[::1] c_emulated = emulated
    cdef sc_mmu *mmu = &shell.c
    cdef sc_op o
    cdef sc_result r
    cdef u64 i = 0
    cdef u64 stop
    cdef int rc = 0
    cdef bint move = data
    cdef Stats before = stats_copy(mmu.stats)
    hold = memoryview(ops)      # the array cannot be resized while the batch runs
    mmu.mem.busy = True
    error = None
    try:
        while i < n and rc >= 0:
            stop = min(n, i + CHUNK)
            with nogil:
                while i < stop:
                    _load_op(&o, base + <i64>i * stride, at, number)
                    rc = vcpu_op(mmu, mmu.vcpus[o.vcpu], &o, move, &r)
                    if rc < 0:
                        break
                    c_outcome[i] = r.outcome
                    c_error[i] = <u16>r.error_code
                    c_gpa[i] = r.gpa
                    c_value[i] = r.value[0]
                    if wide:
                        c_high[i] = r.value[1]
                    c_exits[i] = <u16>r.exits
                    c_emulated[i] = r.emulated
                    i += 1
                    if mmu.audit_found:
                        rc = RC_AUDIT
                        break
            PyErr_CheckSignals()
    except KeyboardInterrupt:
        error = Interrupted(None)
    finally:
        mmu.mem.busy = False
        del hold
    result = RunResult(outcome[:i], error_code[:i], gpa[:i], value[:i], exits[:i], emulated[:i],
                       stats_since(mmu.stats, before), value_high[:i] if wide else None)
    if rc < 0:
        error = shell.failure(rc)
    if error is not None:
        error.result = result
        raise error
    return result
