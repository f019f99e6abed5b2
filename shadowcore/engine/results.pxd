"""What a batch of operations came to."""
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.types cimport u8, u16, u64

cdef struct sc_row:                 # an operation of which there is more to say than where it led
    u64 number                      # its place in the batch
    u16 error_code
    u16 exits
    u8 outcome
    u8 emulated

cdef class Block:
    cdef void *at                   # malloc'ed
    cdef size_t size                # bytes

cdef Block block_new(size_t size)

cdef class RunResult:
    cdef u64 n                      # operations
    cdef u64 n_rows
    cdef u64 capacity               # operations that there is room for
    cdef Block words                # u64 per operation: gpas; if bytes moved, values; if some are of 16 bytes, highs
    cdef bint data                  # bytes moved
    cdef bint wide                  # some operation has 16 bytes
    cdef sc_row *rows               # `few`, or in `many`
    cdef sc_row few[4]
    cdef Block many
    cdef sc_stats before            # counters of the VM before the batch
    cdef sc_stats after
    cdef dict columns               # arrays that were asked for

    cdef object _sparse(self, name)
    cdef object _dense(self, name, int part)
