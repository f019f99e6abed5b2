"""Arrays of the caller that are read, or written, without the GIL."""

cdef class Held:
    cdef Py_buffer view
    cdef bint has_view
    cdef list owners                # weak references

cdef list held_owners(object array)
