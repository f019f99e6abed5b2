"""Counters. Every field is a u64, so that the struct is also a flat array. The order is that of sc_counters in
shadowcore.h; the names in Python (counters.COUNTERS) are made from the struct."""
from shadowcore.engine.types cimport u64

# Why control left the guest, in the order of counters.EXIT_REASONS. Page faults come first, by what the fault turned
# out to be.
cdef enum:
    EXIT_FILL = 0                   # a shadow entry was missing
    EXIT_WRITE = 1                  # a present leaf got more rights (dirty bit, write access)
    EXIT_EMULATE = 2                # an access that only the emulator can do: a store to a guest table
    EXIT_GUEST = 3                  # the guest's own fault, injected
    EXIT_MMIO = 4                   # an address in no slot
    EXIT_CR0 = 5
    EXIT_CR3 = 6
    EXIT_CR4 = 7
    EXIT_EFER = 8
    EXIT_INVLPG = 9                 # or INVPCID: one control intercepts both
    EXIT_COUNT = 10
    EXIT_FAULTS = 5                 # how many are page faults: the first ones

cdef struct sc_stats:
    u64 exits[EXIT_COUNT]           # by reason, above
    u64 pf_taken                    # page-fault exits
    u64 pf_fixed                    # of these, mended (with those that go on to emulation); not with paging off
    u64 pf_guest                    # of these, injected into the guest; and page faults of the guest without an exit
    u64 pf_emulate                  # stores done by the emulator
    u64 pf_mmio                     # of these, handed out as device accesses
    u64 pf_spurious                 # of these, nothing had to change
    u64 tlb_flush                   # flush requests
    u64 remote_tlb_flush            # of these, that had to reach another vcpu
    u64 invlpg                      # INVLPG instructions
    u64 mmu_shadow_zapped           # shadow pages zapped, roots in use included
    u64 mmu_pte_write               # emulated stores that hit a shadowed guest table
    u64 mmu_pde_zapped              # non-leaf sptes cleared by such stores
    u64 mmu_flooded                 # shadow pages zapped by a write flood or a misaligned store
    u64 mmu_recycled                # shadow pages zapped to refill the pool
    u64 mmu_cache_miss              # shadow pages created
    u64 mmu_cache_hit               # shadow pages found again by (gfn, role)
    u64 mmu_unprotect               # gfns unprotected: user write, failed emulation, request
    u64 page_frees                  # shadow pages returned to the pool
    u64 spte_installed              # sptes that became present
    u64 spte_removed                # sptes that ceased to be present
    u64 rmap_protected              # writable sptes made read-only because their frame became a guest table
    u64 root_loads                  # roots put in place by loads of CR0, CR3, CR4, EFER
    u64 gp_guest                    # #GP delivered to the guest
    u64 accesses                    # loads, stores and fetches
    u64 walk_references             # entries read by the processor's walks
    u64 guest_walk_references       # guest entries read by the shadow MMU's own walks
    u64 tlb_hits                    # accesses that the modelled TLB translated
    u64 tlb_misses                  # accesses that it did not
    u64 mmu_unsync                  # shadow pages that are unsync now
    u64 unsync_made                 # shadow pages that became unsync
    u64 synced                      # unsync pages brought back in sync
    u64 prefetched                  # leaves made for a neighbour's fault, or at INVLPG
    u64 prev_root_hits              # CR3 loads for which an earlier root served
    u64 insn_emulation              # instructions given to the emulator
    u64 pf_mmio_spte_created        # entries that remember a device
    u64 pages_4k                    # leaves of 4 KiB that are present now (unsync)
    u64 pages_2m                    # ... of 2 MiB
    u64 pages_1g                    # ... of 1 GiB
    u64 remote_tlb_flush_requests   # flush requests of the shadow MMU to all vcpus (unsync)
    u64 max_mmu_rmap_size           # most leaves that mapped a frame when one more was added (unsync)
    u64 pf_mmio_spte_hit            # page-fault exits at an entry that remembers a device: not in pf_taken (unsync)
    u64 host_faults                 # frames, or blocks of 2 MiB, that an access made the host find a page for
    u64 host_unmaps                 # times that the host took frames in memory slots away
    u64 markers_made                # entries marked as not present in the guest's tables either
    u64 marker_hits                 # page faults of the guest that a marker let the processor deliver, without an exit
    u64 markers_stale               # markers met where the guest's entry was present by then
    u64 host_faults_large           # of host_faults, blocks of 2 MiB
    u64 outer_faults                # frames, or blocks of 2 MiB, that an outer host had to find for that
    u64 outer_faults_large          # of these, blocks
    u64 invpcid                     # INVPCID instructions that were executed
    u64 npf_violation               # exits at what the host's tables do not map, or not so: EPT violations (nested)
    u64 npf_misconfig               # exits at an entry that remembers a device: EPT misconfigurations (nested)
    u64 pf_fast                     # page-fault exits mended without the lock: W came back to a leaf (nested)
    u64 tlb_load_hits               # loads that the first level of the TLB translated, ...
    u64 tlb_store_hits              # ... stores
    u64 tlb_fetch_hits              # ... fetches
    u64 tlb_load_second             # loads that its second level translated, ...
    u64 tlb_store_second            # ... stores
    u64 tlb_fetch_second            # ... fetches
    u64 tlb_load_misses             # loads that it did not translate, ...
    u64 tlb_store_misses            # ... stores
    u64 tlb_fetch_misses            # ... fetches
    u64 walk_cache_hits             # complete walks that began below the root, by a paging-structure cache
    u64 walk_cache_references       # references that caches left out, of both dimensions
    u64 nested_tlb_hits             # addresses that the nested TLB translated, of walks in two dimensions, ...
    u64 nested_tlb_misses           # ... and that it did not
    u64 host_cache_hits             # walks of the host's tables that began below their root, by a cache of these
    u64 nested_tables               # pages that stand for guest tables which the processor walks itself, now (agile)
    u64 to_nested                   # guest tables that were given to the processor, stored to often (agile)
    u64 to_shadow                   # guest tables that were shadowed again, stored to no more (agile)
    u64 nested_walks                # walks that went on below a mark, in the guest's own tables (agile)

cdef class Stats:
    cdef sc_stats *c                # counters of a VM, or `own`
    cdef sc_stats own               # counts of one run, when no VM is behind the object
    cdef object owner               # keeps the memory behind c alive

cdef Stats stats_between(const sc_stats *before, const sc_stats *after)
