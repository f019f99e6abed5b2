"""What an embedding simulator needs that is not there otherwise: batches of plain arrays."""
import numpy as np

from libc.string cimport memset

from shadowcore.engine.batch cimport columns_check, run_columns, sc_columns
from shadowcore.engine.held cimport Held
from shadowcore.engine.types cimport i64, u8, u64
from shadowcore.engine.vcpu cimport VCpu

from shadowcore.config import Op
from shadowcore.errors import ConfigError

cdef dict _KINDS = {"r": Op.READ.value, "w": Op.WRITE.value, "x": Op.FETCH.value}
cdef object _WORDS = np.dtype("<u8")
cdef object _SIGNED = np.dtype("<i8")
cdef tuple _BYTES = (np.dtype("u1"), np.dtype("?"))


cdef object _words(name, values):
    """`values` as an array of 64-bit words, in place where it is one."""
    array = np.asarray(values)
    if array.dtype != _WORDS and array.dtype != _SIGNED:
        if array.dtype.kind not in "iu" and array.size:
            raise ConfigError(f"{name}: an array of integers is needed, not of {array.dtype}")
        array = array.astype(np.uint64)
    if array.ndim != 1:
        raise ConfigError(f"{name}: one dimension is needed, not {array.ndim}")
    return array


cdef object _flags(name, values):
    """`values` as an array of bytes, in place where it is one."""
    array = np.asarray(values)
    if array.dtype not in _BYTES:
        if array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() > 255)):
            raise ConfigError(f"{name}: an array of uint8 is needed, not {array.dtype}")
        array = array.astype(np.uint8)
    if array.ndim != 1:
        raise ConfigError(f"{name}: one dimension is needed, not {array.ndim}")
    return array


cdef Held _column(name, array, Py_ssize_t n, const u8 **at, i64 *step):
    cdef Held held = Held.__new__(Held, array)
    if held.view.shape[0] != n:
        raise ConfigError(f"{name}: {held.view.shape[0]} elements, gva has {n}")
    at[0] = <const u8 *>held.view.buf
    step[0] = held.view.strides[0]
    return held


def access_many(VCpu cpu, gva, kind="r", *, size=8, user=None, value=None, data=None):
    """Loads, stores and fetches of `cpu` at the addresses `gva`, without the GIL: what `cpu.run` does, of plain arrays.

    gva: integers of 64 bits. kind: "r", "w" or "x", or an array of Op codes (uint8). size: 1, 2, 4 or 8, or an array.
    user: made in user mode; a bool, an array, or None: by cpu.cpl. value: what stores store, an array or one number.
    data: move bytes (default: if there are values). Arrays may have gaps between their elements; none is copied unless
    its type asks for it. Returns RunResult. ConfigError before anything is done; else as cpu.run.
    """
    cdef sc_columns c
    cdef list held = []
    cdef u64 n, bad
    cdef u64 word = 0
    memset(&c, 0, sizeof(c))
    array = _words("gva", gva)
    n = len(array)
    held.append(_column("gva", array, n, &c.gva, &c.gva_step))
    if isinstance(kind, str):
        if kind not in _KINDS:
            raise ConfigError(f"kind: {kind!r} is not 'r', 'w' or 'x'")
        c.all_op = _KINDS[kind]
    elif isinstance(kind, int):
        if not 0 <= kind <= 2:
            raise ConfigError(f"kind: {kind!r} is not Op.READ, Op.WRITE or Op.FETCH")
        c.all_op = kind
    else:
        held.append(_column("kind", _flags("kind", kind), n, &c.op, &c.op_step))
    if isinstance(size, int):
        if size not in (1, 2, 4, 8):
            raise ConfigError(f"size: {size!r} is not 1, 2, 4 or 8")
        c.all_size = size
    else:
        held.append(_column("size", _flags("size", size), n, &c.size, &c.size_step))
    if user is None:
        c.all_user = cpu.c.cpl == 3
    elif isinstance(user, (bool, int)):
        c.all_user = bool(user)
    else:
        held.append(_column("user", _flags("user", user), n, &c.user, &c.user_step))
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise ConfigError(f"value: {value!r} has more than 64 bits")
        word = value & 0xFFFFFFFFFFFFFFFF
        c.value = <const u8 *>&word
    elif value is not None:
        held.append(_column("value", _words("value", value), n, &c.value, &c.value_step))
    bad = columns_check(&c, n)
    if bad < n:
        raise ConfigError(f"element {bad}: a load, store or fetch ({Op.READ:d}, {Op.WRITE:d}, {Op.FETCH:d}) of 1, 2, 4"
                          " or 8 bytes is needed")
    return run_columns(cpu.mmu, cpu.c.number, &c, n, value is not None if data is None else data)
