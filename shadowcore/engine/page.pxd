"""What there is for each shadow page, frame of RAM and spte, beside what the hardware sees."""
from shadowcore.engine.types cimport u8, u16, u32, u64

cdef struct sc_page:                # header of one shadow page, beside its frame in the pool
    u64 gfn                         # guest frame of the table it shadows; direct: first frame it maps
    u32 role                        # ROLE_*
    u32 root_count                  # vcpus' root slots that hold it
    u32 hash_next                   # next page of the bucket, or SC_NONE
    u32 prev                        # neighbour towards the young end of the active list, or SC_NONE
    u32 next                        # neighbour towards the old end; in the free list: next free page
    u32 parents                     # sptes that point to it: a list (see rmap)
    u32 present                     # entries that are not 0
    u8 active                       # in use
    u8 nonglobal                    # a leaf without G was installed: goes at a CR3 load (flush)
    u8 unsync                       # its guest table may be stored to unseen: it lags until the next sync
    u8 flood                        # emulated stores to the table since the page was last used (sc_mmu.flood_pages)
    u32 unsync_children             # bits set among sc_mmu.below of this page
    u32 flood_at                    # sc_mmu.store_clock at the last of these
    u64 slots                       # bit per memslot of which it maps a frame
    u64 used[8]                     # bit per entry that is not 0

cdef struct sc_frame:               # per frame of guest RAM
    u32 rmap                        # writable sptes that map it: a list (see rmap)
    u16 shadowed                    # shadow pages, not direct, of its gfn
    u16 stale                       # quirk RMAP_LEAK: records left behind

cdef struct sc_link:                # neighbours of an spte in its list; only lists of two or more use it
    u32 prev                        # spte + 1, or 0
    u32 next                        # spte + 1, or 0
