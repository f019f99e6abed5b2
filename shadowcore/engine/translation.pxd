"""The class Translation, between the engine's own modules: no header that others cimport may reach it."""
from shadowcore.engine.walker cimport sc_walk

cdef class Translation:
    cdef sc_walk w                  # the guest's tables, read
    cdef int mode                   # MODE_* of the walk

cdef list walk_levels(const sc_walk *w)
