"""Rows that are recorded while the engine works, and what becomes of them where they are too many.

Events, references of walks and exits are recorded in the same way: there is room for so many, what comes beyond is
counted, and whoever asks for the rows is told so instead of getting some of them.
"""
import numpy as np

from shadowcore.engine.state cimport sc_room

from shadowcore.config import check_int
from shadowcore.errors import ConfigError, EngineError


cdef class Kept:
    """Rows of a dtype, and room for them."""

    cdef int begin(self, object size) except -1:
        """Room for `size` rows, and none is there; 0: nothing is recorded any more."""
        size = check_int("size", size, 0, 1 << 32)
        array = np.zeros(size, dtype=self.dtype) if size else None
        self.rows[0] = <void *><size_t>array.ctypes.data if size else NULL
        self.room.size = size
        self.room.count = 0
        self.array = array
        return 0

    cdef object take(self):
        """The rows, which begin anew. ConfigError if none are recorded, EngineError if some were lost."""
        if self.array is None:
            raise ConfigError(f"{self.what}: none are recorded, see {self.where}")
        count = self.room.count
        self.room.count = 0
        if count > self.room.size:
            raise EngineError(f"there were {count} {self.what}, there was room for {self.room.size}")
        return self.array[:count].copy()


cdef Kept kept_new(str what, str where, object dtype, void **rows, sc_room *room):
    cdef Kept kept = Kept.__new__(Kept)
    kept.what = what
    kept.where = where
    kept.dtype = dtype
    kept.rows = rows
    kept.room = room
    return kept


cdef void kept_grow(void *kept) noexcept with gil:
    cdef Kept k = <Kept>kept
    try:
        array = np.empty(2 * k.room.size, dtype=k.dtype)
    except MemoryError:
        return
    array[:len(k.array)] = k.array
    k.rows[0] = <void *><size_t>array.ctypes.data
    k.room.size = len(array)
    k.array = array
