"""The guest kernel's own structures: plain arrays, linked by index, beside the guest's memory.

What a real kernel keeps in its memory and no walk of a page table reads (frame counts, lists of mappings, the page
cache's index) is kept here. Page tables, data, kernel stacks and pipe buffers are in guest memory.
"""
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport u8, u16, u32, u64

cdef enum:
    NO_PROCESS = 0xFFFFFFFF
    PIPE_BUFFERS = 16               # pages of a pipe (PIPE_DEF_BUFFERS)
    ASIDS = 6                       # PCIDs that one processor keeps in use (TLB_NR_DYN_ASIDS)
    SPARE_STACKS = 2                # kernel stacks of the dead that one processor keeps (NR_CACHED_STACKS)
    USER_PCID = 1 << 11             # of the PCID that goes with the user's root (X86_CR3_PTI_PCID_USER_BIT)
    PTE_NONE = 1 << 8               # entry that is not present: it keeps its frame (PROT_NONE), else a swap slot
    MAX_AROUND = 512

# What became of a kernel operation, beside the codes of types.pxd.
cdef enum:
    RC_NOMEM = -16                  # no free frame
    RC_PANIC = -17                  # the guest's tables or registers are not what the kernel made them
    RC_NOLOG = -18                  # the host has no memory for the recording
    RC_NOROOM = -19                 # no room in the list of mappings, or in the address space
    RC_SEGV = 16                    # the process may not make the access

# What a frame is used for.
cdef enum:
    FRAME_FREE = 0
    FRAME_TABLE = 1
    FRAME_ANON = 2
    FRAME_CACHE = 3                 # a page of a file; the page cache holds one count
    FRAME_KERNEL = 4                # stacks, the tables that map them, pipe buffers
    FRAME_BOOT = 5                  # made at boot, never freed
    FRAME_LARGE = 6                 # first frame of a large page, which counts for all
    FRAME_DYING = 7                 # a table that waits for the flush after which it is freed
    FRAME_WAS_TABLE = 1 << 7        # free, and a table in its last life

cdef enum:
    PROT_READ = 1
    PROT_WRITE = 2
    PROT_EXEC = 4

cdef enum:
    MAP_SHARED = 1
    MAP_GROWS = 2                   # a stack
    MAP_HEAP = 4
    MAP_ANON = 8                    # has had anonymous pages: fork copies it
    MAP_LARGE = 16                  # in large pages, shared

cdef enum:
    FILE_DISK = 0
    FILE_ZERO = 1                   # shared memory: its pages begin as zeros
    FILE_LARGE = 2                  # the same in large pages

cdef enum:
    PROCESS_NONE = 0
    PROCESS_ALIVE = 1
    PROCESS_ENDED = 2               # only its root is left, still loaded (lazy TLB): freed at the next switch

# Addresses of a kernel stack.
cdef enum:
    STACK_FREE = 0
    STACK_USED = 1                  # mapped
    STACK_LOST = 2                  # unmapped, but a TLB may not know yet

# Flushes that a sloppy kernel forgets.
cdef enum:
    SLOPPY_MUNMAP = 1
    SLOPPY_MPROTECT = 2
    SLOPPY_FORK = 4
    SLOPPY_COW = 8
    SLOPPY_SWAP = 16
    SLOPPY_AGE = 32

cdef struct sc_gvma:                # a mapping; those of a process lie in one piece, ascending, no two overlap
    u64 start
    u64 end
    u64 page                        # of the file, at start
    u32 file                        # number + 1, or 0
    u16 prot
    u16 flags                       # MAP_*

cdef struct sc_gproc:
    u64 root                        # gpa of the top table
    u64 user_root                   # with isolation: of the one that user code runs on; else the same
    u64 brk_start
    u64 brk
    u64 stack                       # frame of its kernel stack; of several the uppermost, which is used first
    u64 stack_at                    # linear address of that frame
    u64 resident                    # leaf entries with a frame
    u64 swapped                     # leaf entries with a swap slot
    u64 tables                      # frames of its tables
    u64 hand                        # where ageing goes on
    u64 swap_hand                   # where swapping out goes on
    u64 changed                     # PCID: flushes that translations of it have to hear of
    u32 nvmas
    u32 generation                  # which life of the slot
    u32 state                       # PROCESS_*
    u32 mm                          # number of the address space: exec makes a new one

cdef struct sc_gprogram:            # what exec maps
    u32 text                        # file: executable pages, then those of initialized data
    u32 library                     # file + 1: of the same shape, or 0
    u64 text_pages
    u64 data_pages
    u64 bss_pages
    u64 library_pages
    u64 library_data

cdef struct sc_gpipe:
    u64 frame[PIPE_BUFFERS]
    u32 used[PIPE_BUFFERS]          # bytes
    u32 first
    u32 count

cdef struct sc_gasid:
    u32 mm                          # sc_gproc.mm, or 0
    u32 flush_user                  # the PCID of the user's root has to be flushed at its next load
    u64 changed                     # sc_gproc.changed when the PCID was last flushed

cdef struct sc_gcpu:                # a processor, while another one is at work: see the fields of sc_guest
    sc_vcpu *v
    u32 current
    bint idle
    bint in_user
    sc_gasid asids[ASIDS]
    u32 asid
    u32 asid_next
    u64 spare_stacks[SPARE_STACKS]

cdef struct sc_gcount:              # u64s; kernel_base.COUNTERS are their names
    u64 accesses                    # of user code
    u64 kernel_accesses             # of the kernel; a string instruction is one
    u64 cr3_loads
    u64 invlpg
    u64 full_flushes                # CR3 loads that were made to flush
    u64 shootdowns                  # flushes that one processor asked of another
    u64 table_stores                # stores to frames that serve as tables
    u64 leaf_installs               # leaf entries that became present
    u64 leaf_clears                 # leaf entries that ceased to be present
    u64 write_protects              # locked instructions that took W away
    u64 tables_made
    u64 tables_freed
    u64 roots_made
    u64 tables_reused               # frames that were tables in their last life, now data
    u64 pages_zeroed
    u64 pages_copied
    u64 switches
    u64 syscalls
    u64 faults                      # guest page faults that came to the kernel
    u64 faults_zero                 # demand zero, a frame given
    u64 faults_zero_page            # a read: the page of zeros mapped
    u64 faults_file
    u64 faults_around               # further file pages mapped on the way
    u64 faults_copied               # copy-on-write, by a copy
    u64 faults_reused               # copy-on-write, the last user keeps the frame
    u64 faults_swap
    u64 faults_large                # large pages of shared memory mapped
    u64 faults_spurious
    u64 faults_segv
    u64 stack_growth                # pages by which stacks grew
    u64 forks
    u64 execs
    u64 exits
    u64 age_scanned                 # leaf entries looked at by ageing
    u64 age_young                   # of these, with A, which was cleared
    u64 swapped_out
    u64 swapped_in
    u64 pipe_writes
    u64 pipe_reads
    u64 pipe_blocked                # writes to a full pipe, reads of an empty one
    u64 stacks_mapped               # kernel stacks, in an area of their own
    u64 stacks_unmapped

cdef packed struct sc_glog:         # one operation of a recording; the layout of OP_DTYPE
    u8 op
    u8 user
    u8 size
    u64 addr
    u64 value

cdef struct sc_guest

# What other processors do between two stores of this one.
ctypedef int (*sc_meanwhile)(sc_guest *g) noexcept nogil

cdef struct sc_guest:
    sc_mmu *mmu
    sc_vcpu *v                      # the processor that is at work
    sc_gcpu *cpus
    u32 n_cpus
    u32 cpu                         # number of v
    sc_meanwhile meanwhile          # called after stores of a munmap to tables above the leaves, or NULL
    void *meanwhile_data            # its own
    u8 *ram                         # guest memory from gpa 0
    u64 nframes                     # frames that the allocator has; large pages lie behind them
    u64 all_frames                  # frames of memory
    # Settings
    int mode                        # MODE_*
    int levels
    int pte_size
    bint isolation
    bint pcid
    bint nx
    u32 sloppy                      # SLOPPY_*
    u32 atomic_bytes                # of the locked instruction that takes W away
    u32 fault_around                # pages
    u32 flush_ceiling               # more pages than this: everything is flushed (tlb_single_page_flush_ceiling)
    u32 kernel_work                 # accesses of the kernel to its own data at each entry
    bint age_flush
    # Layout
    u64 direct_map                  # linear address of gpa 0
    bint regions                    # the kernel is mapped besides, as Linux is:
    u64 image                       # ... its data, at this linear address; without regions that in the direct map
    u64 text                        # ... a page of its text
    u64 idt                         # ... the gates, a page of the entry area
    u64 page_structs                # ... 64 bytes for each frame of RAM
    bint vmap_stacks                # kernel stacks are mapped in an area of their own, and not used by the direct map
    u64 stack_area                  # ... its linear address
    u64 stack_bits                  # ... flags of its leaf entries
    u8 *stack_state                 # ... STACK_* of each place in it
    u64 stack_places
    u64 stack_next                  # ... no place below is free
    u64 stacks_lost                 # ... places that are STACK_LOST
    u64 heap_gap                    # pages between a program and its heap
    u64 task_size                   # end of the user half
    u64 mmap_base                   # mappings are placed below, top down
    u64 stack_top
    u64 stack_limit                 # bytes a stack may grow to
    u64 entry_va                    # with isolation: the page that both roots map for entry into the kernel
    u64 kernel_root                 # gpa
    u64 entry_link                  # with isolation: the entry of a user root that leads to entry_va
    u32 entry_index
    u64 data_first                  # frames of the kernel's data
    u64 data_frames
    u64 zero_frame                  # all zero, mapped for reads of anonymous memory
    # Frames
    u32 *count                      # references: mappings, and one for the page cache
    u32 *next_free                  # next in the free list, of frames that are in it
    u8 *kind                        # FRAME_*
    u64 free_head                   # last freed, first given; 0 ends
    u64 fresh                       # frames from here to fresh_end have not been given yet
    u64 fresh_end                   # above lie, if frames are grouped, the blocks of what cannot be moved
    bint grouped
    u64 fixed_head                  # free frames of these blocks, as above
    u64 fixed                       # of the last block taken, frames from here to fixed_end have not been given yet
    u64 fixed_end
    u64 n_free
    u64 boot_end
    u64 large_head                  # free large pages, as above
    u64 n_large                     # how many
    # Processes
    sc_gproc *procs                 # and one more, in which exec makes the new address space
    u32 max_procs
    u32 mm_next
    sc_gvma *vmas                   # max_vmas for each of them
    u32 max_vmas
    u32 n_alive
    # The processor that is at work
    u32 current                     # process whose root is loaded, or NO_PROCESS
    bint idle                       # nobody runs: the root of `current` stays loaded (lazy TLB)
    bint in_user                    # the root of user code is loaded (isolation)
    sc_gasid asids[ASIDS]
    u32 asid                        # of `current`
    u32 asid_next                   # taken next
    u64 spare_stacks[SPARE_STACKS]  # linear addresses of kernel stacks that are kept, or 0
    # Files and programs
    u64 *file_first                 # index in cache of a file's page 0
    u64 *file_pages
    u8 *file_kind                   # FILE_*
    u32 n_files
    u32 max_files
    u32 *cache                      # frame of a file's page, or 0
    u64 cache_used
    u64 cache_size
    sc_gprogram *programs
    u32 n_programs
    u32 max_programs
    sc_gpipe *pipes
    u32 n_pipes
    u32 max_pipes
    # Swap
    u8 *swap                        # 4096 bytes a slot
    u32 *swap_count
    u32 *swap_next
    u32 swap_free                   # slot + 1, or 0
    u32 swap_pages
    # What waits for a flush
    u64 *gather                     # frames
    u32 n_gather
    u32 gather_room
    u32 gather_first                # those below wait for a flush that was put aside
    u64 flush_start
    u64 flush_end
    bint flush_wanted
    # Results
    sc_gcount n
    u64 history                     # of every access: gpa and value, and every refusal
    u64 sequence                    # makes stored values differ
    u64 random
    # Recording
    bint recording
    sc_glog *log
    u64 log_length
    u64 log_room

cdef inline u64 guest_mix(u64 x) noexcept nogil:
    """A bijection of u64 in which every bit of x reaches every bit (the finalizer of MurmurHash3)."""
    x ^= x >> 33
    x *= <u64>0xFF51AFD7ED558CCDULL
    x ^= x >> 33
    x *= <u64>0xC4CEB9FE1A85EC53ULL
    return x ^ (x >> 33)

cdef inline void history_add(sc_guest *g, u64 gpa, u64 value) noexcept nogil:
    """Fold an access into the history: its order counts, and each bit of both words."""
    cdef u64 h = (g.history ^ gpa) * <u64>0x9E3779B97F4A7C15ULL
    g.history = ((h ^ (h >> 29)) ^ value) * <u64>0xD6E8FEB86659FD93ULL

cdef inline int guest_shift(const sc_guest *g, int level) noexcept nogil:
    """log2 of the bytes that an entry of a table of `level` covers."""
    return 12 + (10 if g.pte_size == 4 else 9) * (level - 1)

cdef inline u64 guest_span(const sc_guest *g, int level) noexcept nogil:
    """Bytes that an entry of a table of `level` covers."""
    return <u64>1 << guest_shift(g, level)

cdef inline u32 guest_index(const sc_guest *g, u64 va, int level) noexcept nogil:
    return <u32>(va >> guest_shift(g, level)) & (1023 if g.pte_size == 4 else 511)

cdef inline sc_gvma *vmas_of(const sc_guest *g, u32 p) noexcept nogil:
    return g.vmas + <u64>p * g.max_vmas
