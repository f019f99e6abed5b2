"""A guest kernel that has booted."""
from shadowcore.engine.types cimport u64
from shadowcore.engine.vcpu cimport VCpu
from shadowcore.guest.state cimport sc_guest

cdef class KernelBase:
    cdef sc_guest g
    cdef readonly object vm         # the machine that it runs on
    cdef readonly object options    # KernelOptions
    cdef VCpu _cpu
    cdef list _arrays               # what g points into
    cdef object _stopped            # why the kernel cannot go on, or None

    cdef void *_array(self, u64 items, u64 size) except NULL
    cdef int _ready(self) except -1
    cdef object _failure(self, int rc, object where)
