# cython: language_level=3
"""Chases of pointers through a guest's memory, at the engine's own speed: structs and functions, without the GIL.

`chase` follows a linked list whose nodes lie in the guest's linear address space, as the guest itself would: each load
goes through its tables, with the exits that the design under study costs.
"""
from libc.string cimport memset

from shadowcore.engine.access cimport OP_READ, sc_op, sc_result, vcpu_access
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport RC_OK, u32, u64
from shadowcore.engine.vcpu cimport mmu_struct, vcpu_struct


cdef u64 _chase(sc_mmu *mmu, sc_vcpu *v, u64 *gva, u64 steps, u64 *exits, int *rc) noexcept nogil:
    """Follow up to `steps` links from gva[0]; the number that were followed. rc: what ended it."""
    cdef sc_op op
    cdef sc_result result
    cdef u64 done = 0
    memset(&op, 0, sizeof(op))
    op.op = OP_READ
    op.user = True
    op.size = 8
    rc[0] = RC_OK
    while done < steps and gva[0]:
        op.addr = gva[0]
        rc[0] = vcpu_access(mmu, v, &op, True, &result)
        if rc[0] != RC_OK:
            break
        exits[0] += result.exits
        gva[0] = result.value[0]
        done += 1
    return done


def chase(vm, u64 start, u64 steps, u32 vcpu=0):
    """(links followed, where it ended, exits, outcome) of a chase in the guest of `vm`."""
    cdef sc_mmu *mmu = mmu_struct(vm)
    cdef sc_vcpu *v = vcpu_struct(vm, vcpu)
    cdef u64 gva = start
    cdef u64 exits = 0
    cdef u64 done
    cdef int rc
    # One VM, one user at a time: Python code that comes meanwhile is told so, and we are told of others.
    if mmu.mem.busy:
        raise RuntimeError("the VM is in use")
    mmu.mem.busy = True
    try:
        with nogil:
            done = _chase(mmu, v, &gva, steps, &exits, &rc)
    finally:
        mmu.mem.busy = False
    return done, gva, exits, rc
