"""What a vcpu does: loads, stores, fetches, read-modify-write, register loads. The unit of batches."""
from libc.string cimport memcpy

from shadowcore.engine.designs.native cimport store_seen
from shadowcore.engine.state cimport linear_address, linear_exists, sc_mmu, sc_vcpu
from shadowcore.engine.types cimport PF_I, PF_U, PF_W, u8, u16, u32, u64

# Values of shadowcore.config.Op.
cdef enum:
    OP_READ = 0
    OP_WRITE = 1
    OP_FETCH = 2
    OP_CR3 = 3
    OP_CR0 = 4
    OP_CR4 = 5
    OP_EFER = 6
    OP_INVLPG = 7
    OP_PKRU = 8
    OP_AC = 9
    OP_CMPXCHG = 10
    OP_XCHG = 11
    OP_ADD = 12
    OP_AND = 13
    OP_OR = 14
    OP_XOR = 15
    OP_INVPCID = 16
    OP_COUNT = 17

cdef struct sc_op:
    u8 op                           # OP_*
    u8 user                         # made in user mode
    u8 size                         # bytes of an access: 1, 2, 4, 8 or 16; INVPCID: its type
    u8 vcpu                         # number of the vcpu
    u64 addr                        # linear address; INVPCID: that of its descriptor
    u64 value[2]                    # what is stored, or loaded into a register, low half first; INVPCID: PCID
    u64 expected[2]                 # CMPXCHG: what must be there

cdef struct sc_result:
    u64 gpa                         # where it led (its first byte); all ones if nowhere
    u64 value[2]                    # what a load, fetch or read-modify-write read
    u32 error_code                  # of a guest fault
    u32 exits                       # page-fault exits it took
    u8 outcome                      # RC_OK, RC_PF, RC_GP, RC_MMIO or RC_UD
    u8 emulated                     # stores to RAM that the emulator did

cdef inline bint op_is_access(u32 op) noexcept nogil:
    return op <= OP_FETCH or op - OP_CMPXCHG <= <u32>(OP_XOR - OP_CMPXCHG)

cdef inline bint op_is_rmw(u32 op) noexcept nogil:
    """Of an access."""
    return op >= OP_CMPXCHG

cdef inline u32 access_bits(const sc_op *o) noexcept nogil:
    """PF_* of a load, store or fetch."""
    return (PF_U if o.user else 0) | (PF_W if o.op == OP_WRITE else PF_I if o.op == OP_FETCH else 0)

cdef inline bint in_one_page(const sc_vcpu *v, const sc_op *o, u64 *va, u32 *size) noexcept nogil:
    """The operation is a load, store or fetch of at most 8 bytes in one page, at an address that can be."""
    size[0] = 1 if o.op == OP_FETCH else o.size
    va[0] = linear_address(v, o.addr)
    if not linear_exists(v, va[0]):
        return False
    return o.op <= OP_FETCH and size[0] <= 8 and (va[0] & 4095) + size[0] <= 4096

cdef inline void access_bytes(sc_mmu *mmu, const sc_op *o, u64 gpa, u8 *at, bint data, u32 size,
                              u64 *value) noexcept nogil:
    """What a load, store or fetch in one page does, once it is known where it leads: to `at`, which is gpa."""
    if o.op == OP_WRITE:
        if data:
            memcpy(at, o.value, size)
        if not mmu.shadow:
            store_seen(mmu, gpa)
    elif data:
        memcpy(value, at, size)

cdef int vcpu_access(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
cdef int vcpu_op(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
# By fast paths alone (a glance, a fault), or with vcpu_access behind them: what all of these do is what that does, if
# they do it. A glance is a walk without side effects, given up where there is more to do than to follow it (gmode.pxd).
cdef bint access_glance(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
cdef bint access_fault(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
cdef int access_missed(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
cdef int access_do(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
# An implicit one: made by the processor itself, as the supervisor whatever o.user says (SDM vol. 3, 4.6.1).
cdef int access_implicit(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
cdef int access_shortest(sc_mmu *mmu, sc_vcpu *v, const sc_op *o, bint data, sc_result *r) noexcept nogil
