"""Bits of page table entries and control registers. Predicates are one line; no state."""
from shadowcore.engine.types cimport ACC_U, ACC_W, u32, u64

cdef enum:
    PTE_P = 1 << 0                  # present
    PTE_W = 1 << 1                  # writable
    PTE_U = 1 << 2                  # user
    PTE_A = 1 << 5                  # accessed
    PTE_D = 1 << 6                  # dirty (leaf only)
    PTE_PS = 1 << 7                 # large page (levels 2 and 3)
    PTE_G = 1 << 8                  # global (leaf only)
    # Software bits of an spte; the processor ignores bits 9 to 11.
    SPTE_MARK = 1 << 9              # level 2: the child stands for a large gpte; level 1, not present: device frame
    SPTE_MMU_W = 1 << 9             # the same bit of a present leaf (unsync): W is given, or only a dirty log took it
    SPTE_GUEST_W = 1 << 10          # the guest's tables allow writes; bit 1 says what is granted now
    SPTE_GUEST_U = 1 << 11          # the guest's tables allow user access; bit 2 says what is granted now
    SPTE_ABSENT = 1 << 10           # level 1, not present, and no other bit: the guest's entry is not present either
    SPTE_GENERATION = 52            # not present, device: first of 11 bits, the generation of the memory slots

    CR0_PE = 1 << 0
    CR0_ET = 1 << 4
    CR0_WP = 1 << 16
    CR0_NW = 1 << 29
    CR0_CD = 1 << 30
    CR4_PSE = 1 << 4
    CR4_PAE = 1 << 5
    CR4_PGE = 1 << 7
    CR4_UMIP = 1 << 11
    CR4_LA57 = 1 << 12
    CR4_FSGSBASE = 1 << 16
    CR4_PCIDE = 1 << 17
    CR4_OSXSAVE = 1 << 18
    CR4_SMEP = 1 << 20
    CR4_SMAP = 1 << 21
    CR4_PKE = 1 << 22
    EFER_SCE = 1 << 0
    EFER_LME = 1 << 8
    EFER_LMA = 1 << 10
    EFER_NXE = 1 << 11
    EFER_FFXSR = 1 << 14            # AMD
    EFER_TCE = 1 << 15              # AMD: INVLPG leaves paging-structure caches of other addresses alone

cdef inline u64 cr0_pg() noexcept nogil:
    return <u64>1 << 31

cdef inline u64 cr0_ignored() noexcept nogil:
    """Reserved bits of CR0 that a load may try to set, with no effect: 6 to 15, 17 and 19 to 28."""
    return <u64>0x1FFAFFC0

cdef inline u64 cr0_kept(u64 value) noexcept nogil:
    """What CR0 holds after a load of `value`: those bits stay clear, ET stays set (SDM vol. 2, MOV to control
    registers)."""
    return (value & ~cr0_ignored()) | CR0_ET

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #include <intrin.h>
    static int sc_ctz64(unsigned long long x) { unsigned long i; _BitScanForward64(&i, x); return (int)i; }
    #else
    #define sc_ctz64(x) __builtin_ctzll(x)
    #endif
    """
    int sc_ctz64(u64 x) noexcept nogil      # place of the lowest bit that is set, of a word that is not 0

cdef inline u64 pte_nx() noexcept nogil:
    return <u64>1 << 63

cdef inline u64 pte_addr() noexcept nogil:
    """Address field of an 8-byte entry: bits 51:12."""
    return <u64>0x000FFFFFFFFFF000ULL

cdef inline u32 pte_rights(u64 entry) noexcept nogil:
    """ACC_* of one entry: W and U are bits 1 and 2, X is bit 63 inverted."""
    return <u32>((entry & (PTE_W | PTE_U)) | ((~entry) >> 63))

cdef inline u32 pte_pkey(u64 entry) noexcept nogil:
    """Protection key of a leaf: bits 62:59 (4- and 5-level paging only)."""
    return <u32>((entry >> 59) & 15)

cdef inline u64 level_mask(int level) noexcept nogil:
    """Bits of an address below a table entry of `level` in 8-byte tables: 4 KiB, 2 MiB, 1 GiB, ... minus one."""
    return (<u64>1 << (12 + 9 * (level - 1))) - 1

cdef inline u32 level_index(u64 address, int level) noexcept nogil:
    """Index of `address` in an 8-byte table of `level`."""
    return <u32>((address >> (12 + 9 * (level - 1))) & 511)

cdef inline bint is_canonical(u64 va, int bits) noexcept nogil:
    """Bits 63 down to `bits`-1 of a linear address are all alike (SDM vol. 1, 3.3.7.1)."""
    return <u64>((<long long>(va << (64 - bits))) >> (64 - bits)) == va
