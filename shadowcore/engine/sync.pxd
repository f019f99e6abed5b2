"""Leaves made from the guest's entries: at faults, for neighbours, and when an unsync page is brought back in sync."""
from shadowcore.engine.bits cimport PTE_D, PTE_P, PTE_U, PTE_W, SPTE_MMU_W
from shadowcore.engine.features cimport FEAT_PKU
from shadowcore.engine.memory cimport mem_frame_hpa
from shadowcore.engine.rmap cimport list_add
from shadowcore.engine.spte cimport spte_put
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport ACC_U, ACC_W, ACC_X, MODE_64, u32, u64

# What setting a leaf came to.
cdef enum:
    LEAF_SET = 0                    # it changed
    LEAF_SAME = 1                   # it was right as it was
    LEAF_DEVICE = 2                 # there is no RAM: the entry remembers a device
    LEAF_PROTECTED = 3              # it changed or not, and W is withheld from a store

# What a leaf is set for.
cdef enum:
    FOR_LOAD = 0
    FOR_STORE = 1
    FOR_NEIGHBOUR = 2               # no access: A stays clear, no page becomes unsync

cdef inline u64 leaf_key(const sc_vcpu *v, u32 pkey) noexcept nogil:
    """The bits of a leaf that hold its protection key, where the processor has them."""
    return <u64>pkey << 59 if v.guest.mode >= MODE_64 and v.features & FEAT_PKU else 0

cdef inline u64 leaf_value(u64 entry) noexcept nogil:
    """A leaf that remembers the rights of `entry`: the hpa of the frame, P, W, U, NX and the key, each at its place."""
    return entry | (entry & (PTE_W | PTE_U)) << 9

cdef inline u64 leaf_bits(const sc_mmu *mmu, const sc_vcpu *v, u64 frame, u32 rights, u32 pkey) noexcept nogil:
    """A leaf for `frame` with the guest's `rights`, but for A, and for W, which not every frame may be given."""
    return leaf_value(mem_frame_hpa(mmu.mem, frame) | PTE_P | (rights & (ACC_W | ACC_U)) | (~<u64>rights & ACC_X) << 63
                      | leaf_key(v, pkey)) & ~<u64>PTE_W

cdef inline u64 gpte_granting(u64 gpte) noexcept nogil:
    """What a guest's leaf grants before a walk has come by: no W unless it is dirty (bit 6; W is bit 1)."""
    return gpte & ~(~gpte >> 5 & PTE_W)

cdef inline u64 leaf_writable() noexcept nogil:
    """What a leaf has beside, if it may be written."""
    return PTE_W | PTE_D | SPTE_MMU_W

cdef inline void leaf_fill(sc_mmu *mmu, u32 spte, u64 frame, u64 value) noexcept nogil:
    """A leaf of level 1 for an entry that is 0."""
    spte_put(mmu, spte, value)
    list_add(mmu, &mmu.frames[frame].rmap, spte)
    if mmu.mapped[frame] > mmu.stats.max_mmu_rmap_size:
        mmu.stats.max_mmu_rmap_size = mmu.mapped[frame]
    mmu.mapped[frame] += 1
    mmu.stats.pages_4k += 1

cdef bint is_tracked(const sc_mmu *mmu, u64 gfn) noexcept nogil
cdef bint table_let_go(sc_mmu *mmu, u64 gfn, u64 frame) noexcept nogil
cdef int leaf_set(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u32 rights, u32 pkey, int what) noexcept nogil
cdef int leaf_put(sc_mmu *mmu, const sc_vcpu *v, u32 spte, u64 gfn, u32 rights, int what) noexcept nogil
cdef void prefetch_around(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil
cdef void prefetch_followed(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil
cdef void entry_update(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil
cdef void leaf_refetch(sc_mmu *mmu, const sc_vcpu *v, u32 spte) noexcept nogil
cdef int page_sync(sc_mmu *mmu, const sc_vcpu *v, u32 page) noexcept nogil
cdef int leaf_level(const sc_mmu *mmu, u64 gfn, u64 frame, int most) noexcept nogil
cdef void sync_below(sc_mmu *mmu, const sc_vcpu *v, u32 page) noexcept nogil
cdef u64 direct_page_gfn(const sc_mmu *mmu, u32 spte) noexcept nogil
cdef bint device_is_stale(const sc_mmu *mmu, u64 value) noexcept nogil
cdef u32 device_rights(u64 value) noexcept nogil
