"""Rows that are recorded while the engine works, and what becomes of them where they are too many."""
from shadowcore.engine.state cimport sc_room

cdef class Kept:
    cdef str what                   # they are, for messages
    cdef str where                  # to ask for them
    cdef object dtype
    cdef void **rows                # points to the first; of the owner, like room
    cdef sc_room *room
    cdef object array               # what rows[0] points into, or None

    cdef int begin(self, object size) except -1
    cdef object take(self)

# what: the rows are; where: the call that begins to record them. rows and room: of whoever keeps the object.
cdef Kept kept_new(str what, str where, object dtype, void **rows, sc_room *room)
# Twice the room for rows of `kept`, a Kept; as it was, where the host has none.
cdef void kept_grow(void *kept) noexcept nogil
