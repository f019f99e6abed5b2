/*
 * shadowcore.h: the shadow paging engine for C11 and C++17.
 *
 * All of it is reached through one table of functions, sc_api. A program that embeds Python, or an extension module,
 * gets it with shadowcore_import(), which needs Python.h (include that first, or define SHADOWCORE_PYTHON). A plug-in
 * that is compiled without Python.h is handed the table by whoever has it, and asks sc_api_fits() whether it will do.
 *
 * Handles. A VM is named by a number. Numbers are not used again, so that a call on a VM that is gone, or never was,
 * is SC_E_HANDLE and nothing else.
 *
 * Return values. 0 is done; what ends in the guest is positive (SC_PAGE_FAULT, SC_GENERAL_PROTECTION, SC_MMIO,
 * SC_UNDEFINED);
 * errors of the caller or the host are negative, sc_api.last_error() says in words what was wrong, and nothing has
 * changed.
 *
 * Threads. A VM is used by one thread at a time: who has several makes a lock for each VM. A call that comes while
 * another one is under way is SC_E_BUSY, and so is one that a callback makes on its own VM; what a callback does with
 * it by way of Python raises EngineError. Different VMs never wait for each other. vm_create, vm_destroy, vm_adopt, save,
 * vm_load and prices take Python's GIL, from whatever state the thread is in; so do functions of which it is said below;
 * nothing else does.
 *
 * Versions. Functions are only ever added at the end of sc_api, fields at the end of structures. Each structure begins
 * with its own size, which the caller sets (SC_INIT); a library knows the sizes that its predecessors had.
 */
#ifndef SHADOWCORE_H
#define SHADOWCORE_H

#if defined(SHADOWCORE_PYTHON) && !defined(Py_PYTHON_H)
#include <Python.h>
#endif
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SC_ABI_VERSION 1

typedef uint64_t sc_vm; /* 0 is no VM */

/* What calls return. */
enum {
    SC_OK = 0,
    SC_PAGE_FAULT = 1,         /* the guest's #PF: error_code; CR2 is loaded */
    SC_GENERAL_PROTECTION = 2, /* the guest's #GP */
    SC_MMIO = 3,               /* the gpa is in no memory slot: a device's */
    SC_UNDEFINED = 6,          /* the guest's #UD */
    SC_E_NULL = -1,            /* a pointer that must not be NULL is */
    SC_E_STRUCT = -2,          /* struct_size is that of no version of the structure */
    SC_E_HANDLE = -3,          /* no such VM, or no more */
    SC_E_BUSY = -4,            /* the VM is in use, by another thread or by the callback that makes this call */
    SC_E_ARGUMENT = -5,        /* a value that cannot be; of several accesses: `done` is the number of the bad one */
    SC_E_ALIGNMENT = -6,       /* memory that does not begin at a multiple of 4096 */
    SC_E_MEMORY = -7,          /* the host has no room */
    SC_E_POOL = -8,            /* every page of the shadow pool is pinned as a root */
    SC_E_FILE = -9,            /* a file that cannot be read or written, or is not what it should be */
    SC_E_PYTHON = -10,         /* there is no Python interpreter (any more) */
    SC_E_CALLBACK = -11,       /* a Python callback of the VM raised, or an audit at a named point found something */
    SC_E_ENGINE = -12          /* a defect of the engine, or a store that cannot be emulated */
};

/* Of sc_new_slot. */
#define SC_ANY 0xFFFFFFFFu
#define SC_ANYWHERE 0xFFFFFFFFFFFFFFFFu
enum {
    SC_BACKING_ANY = 0,     /* as the VM's; without account of the host: all it needs */
    SC_BACKING_COLD = 1,    /* nothing, small pages at first touches */
    SC_BACKING_WARM = 2,    /* everything, in pages of host_page_size */
    SC_BACKING_THP = 3      /* nothing, pages of 2 MiB at first touches where they fit */
};

/* Designs. */
enum {
    SC_NATIVE = 0,
    SC_FLUSH = 1,
    SC_CACHED = 2,
    SC_KVM_2007 = 3,
    SC_UNSYNC = 4,
    SC_KVM_6_1 = 5,
    SC_KVM_6_12 = 6,
    SC_NESTED = 7,         /* nested paging: no shadow, host tables filled by exits */
    SC_KVM_6_1_TDP = 8,
    SC_KVM_6_1_DIRECT = 9,
    SC_AGILE = 10,         /* SC_CACHED, of which tables that are stored to often are walked nested */
    SC_ADAPTIVE = 11       /* unsync, in which each leaf table is kept in the way that costs least */
};

/* Kinds of accesses. From SC_CMPXCHG on they are locked read-modify-writes. */
enum {
    SC_READ = 0,
    SC_WRITE = 1,
    SC_FETCH = 2,
    SC_CMPXCHG = 10,
    SC_XCHG = 11,
    SC_ADD = 12,
    SC_AND = 13,
    SC_OR = 14,
    SC_XOR = 15
};

/* Registers. Loading one is the instruction that does, with its exits and faults. */
enum {
    SC_CR0 = 0,
    SC_CR2 = 1,
    SC_CR3 = 2,
    SC_CR4 = 3,
    SC_EFER = 4,
    SC_PKRU = 5,
    SC_AC = 6, /* EFLAGS.AC: 0 or 1. It does not count for accesses with SC_IMPLICIT */
    SC_CPL = 7 /* 0 or 3 */
};

/* Which page is recycled when pages run short, for sc_config.policy. "Optimal" is for Python alone. */
enum {
    SC_POLICY_FIFO = 0,
    SC_POLICY_LRU = 1,
    SC_POLICY_CLOCK = 2,
    SC_POLICY_2Q = 3,
    SC_POLICY_ARC = 4,
    SC_POLICY_LIRS = 5,
    SC_POLICY_SIEVE = 6,
    SC_POLICY_S3_FIFO = 7,
    SC_POLICY_RANDOM = 8,
    SC_POLICY_COST = 9
};

/* What is a use of a shadow page, for sc_config.uses: bits. */
enum { SC_USE_FAULT = 1, SC_USE_LINK = 2, SC_USE_CR3 = 4, SC_USE_ACCESSED = 8, SC_USE_WALK = 16 };

/* Rights of a translation; a page that is mapped can be read. */
enum { SC_RIGHT_EXECUTE = 1, SC_RIGHT_WRITE = 2, SC_RIGHT_USER = 4 };

/* Processor features, for sc_config.features. */
enum {
    SC_FEATURE_NX = 1 << 0,
    SC_FEATURE_GBPAGES = 1 << 1,
    SC_FEATURE_LA57 = 1 << 2,
    SC_FEATURE_PSE36 = 1 << 3,
    SC_FEATURE_SMEP = 1 << 4,
    SC_FEATURE_SMAP = 1 << 5,
    SC_FEATURE_PKU = 1 << 6,
    SC_FEATURE_PCID = 1 << 7,
    SC_FEATURE_UMIP = 1 << 8,
    SC_FEATURE_FSGSBASE = 1 << 9,
    SC_FEATURE_XSAVE = 1 << 10,
    SC_FEATURE_INVPCID = 1 << 11
};

/* Whose processor it is, for sc_config.vendor. */
enum { SC_INTEL = 0, SC_AMD = 1 };

/* Exits, the index of sc_counters.exits and the detail of SC_EVENT_EXIT. */
enum {
    SC_EXIT_FILL = 0,    /* a shadow entry was missing */
    SC_EXIT_WRITE = 1,   /* a present leaf got more rights */
    SC_EXIT_EMULATE = 2, /* a store to a guest table */
    SC_EXIT_GUEST = 3,   /* the guest's own fault */
    SC_EXIT_MMIO = 4,
    SC_EXIT_CR0 = 5,
    SC_EXIT_CR3 = 6,
    SC_EXIT_CR4 = 7,
    SC_EXIT_EFER = 8,
    SC_EXIT_INVLPG = 9,  /* or INVPCID */
    SC_EXITS = 10
};

/* Events. */
enum {
    SC_EVENT_EXIT = 0,    /* detail: SC_EXIT_*; address: the linear address, or the value of the register */
    SC_EVENT_ZAP = 1,     /* a shadow page goes. detail: its number; address: its gfn */
    SC_EVENT_PROTECT = 2, /* a shadow entry lost W: its frame became a guest table. detail: entry; address: gfn */
    SC_EVENT_FLUSH = 3,   /* TLBs have to be flushed. detail: SC_FLUSH_*; address, frames: of what */
    SC_EVENTS = 4
};
/* Why TLBs have to be flushed, the detail of SC_EVENT_FLUSH. */
enum {
    SC_FLUSH_PROTECT = 0,   /* a frame became a guest table: its writable entries lost W */
    SC_FLUSH_ZAP = 1,       /* a leaf table was zapped */
    SC_FLUSH_ZAP_UPPER = 2, /* a table above the leaves was zapped */
    SC_FLUSH_STORE = 3,     /* an emulated store dropped a present entry */
    SC_FLUSH_WITHHELD = 4,  /* W was withheld from a new leaf */
    SC_FLUSH_LEAF = 5,      /* a present leaf lost W or got another frame */
    SC_FLUSH_LINK = 6,      /* an upper entry was turned to another page */
    SC_FLUSH_LOG = 7,       /* a dirty log was started or cleared */
    SC_FLUSH_CR3 = 8,       /* the guest loaded CR3: its own flush, of which there is no event */
    SC_FLUSH_CONTEXT = 9,   /* ... CR0, CR4 or EFER: likewise */
    SC_FLUSH_INVLPG = 10,   /* an INVLPG dropped a shadow entry */
    SC_FLUSH_FAULT = 11,    /* a page fault of the guest dropped a shadow entry */
    SC_FLUSH_SLOTS = 12,    /* memory slots changed */
    SC_FLUSH_HOST = 13      /* the host took frames away */
};
#define SC_EVENT_MASK(kind) (1u << (kind))
#define SC_NO_VCPU 0xFFFFFFFFu

#define SC_DATA 1u        /* flags of an access: bytes move */
#define SC_BRIEF 2u       /* ... page_shift and rights are not wanted (they are 0): saves a walk where none is needed */
/* ... the processor makes it itself, to the IDT, GDT, LDT or TSS: as the supervisor whatever `user` says, and SMAP
 * refuses it whatever EFLAGS.AC is (SDM vol. 3, 4.6.1) */
#define SC_IMPLICIT 4u
#define SC_SETTING_ZERO 0xFFFFFFFFu /* a setting of which 0 means the default is to be 0, or never, or none */
#define SC_NOWHERE UINT64_MAX       /* a gpa or hpa that is none */

/* Sets a structure to zero, and its size. */
#define SC_INIT(p) (memset((p), 0, sizeof *(p)), (void)((p)->struct_size = (uint32_t)sizeof *(p)))

typedef struct sc_memory_slot { /* both multiples of 4096; in ascending order, without overlap */
    uint64_t gpa;
    uint64_t size;
} sc_memory_slot;

typedef struct sc_config {
    uint32_t struct_size;
    uint32_t design;       /* SC_NATIVE, ... */
    void *memory;          /* guest RAM, 4096-aligned, the caller's until the VM is destroyed; NULL: the VM makes it */
    uint64_t memory_size;  /* bytes, a multiple of 4096 */
    const sc_memory_slot *slots; /* where in guest physical space it lies; NULL: at 0 */
    uint32_t n_slots;
    uint32_t vcpus;        /* 0: one */
    /* Of the shadow; 0 is the default of the design. */
    uint32_t pool_pages;
    uint32_t min_free;
    uint32_t refill;
    uint32_t flood_threshold;
    uint32_t quirks;       /* bits of shadowcore.Quirk; of them SC_NATIVE has IGNORED_BITS_REFUSED */
    /* Of the processors. */
    uint32_t features;     /* SC_FEATURE_*; 0: all */
    uint32_t maxphyaddr;   /* 0: 46 */
    /* A hardware TLB to be modelled: entries and ways for 4 KiB, 2 and 4 MiB, 1 GiB. All 0: none. */
    uint32_t tlb_entries[3];
    uint32_t tlb_ways[3];
    uint32_t reserved;     /* 0 */
    /* Of the shadow; 0 is the default. A caller whose sc_config ends before these may go on. */
    uint32_t prev_roots;   /* roots of earlier CR3s that a vcpu keeps; SC_UNSYNC to SC_KVM_6_12, SC_ADAPTIVE */
    uint32_t prefetch;     /* entries that a fault fills; SC_CACHED and later */
    uint64_t host_page_size; /* bytes of the host's pages under guest RAM; 0: 4096 */
    /* Of the processors. A caller whose sc_config ends before this may go on. */
    uint32_t vendor;       /* SC_INTEL, SC_AMD: whose rules hold where they differ (shadowcore.Features) */
    uint32_t reserved_2;   /* 0 */
    /* Of the shadow; 0 is the default. A caller whose sc_config ends before these may go on. */
    uint32_t policy;       /* SC_POLICY_* */
    uint32_t uses;         /* SC_USE_*; 0: FAULT, LINK and CR3 */
    uint32_t recycle_children; /* 1: pages below a recycled one, to which nothing else leads, go with it */
    uint32_t reserved_3;   /* 0 */
    uint64_t policy_seed;  /* of what is random in a policy */
    /* Of the shadow; 0 is the default; SC_CACHED to SC_KVM_6_12, and SC_ADAPTIVE. A caller whose sc_config ends before
     * these may go on. */
    uint32_t update_in_place; /* 1: an emulated store makes the leaf of the new entry at once */
    uint32_t flood_pages;  /* 1: each shadow page counts the stores to its table by itself; lagging tables always do */
    uint32_t flood_forget; /* stores to other tables after which a page's count is forgotten; 0: never */
    uint32_t reserved_4;   /* 0 */
} sc_config;

typedef struct sc_access {
    uint32_t struct_size;
    uint32_t vcpu;
    uint64_t gva;
    uint8_t kind;          /* SC_READ, ... */
    uint8_t size;          /* bytes: 1, 2, 4, 8 or 16 */
    uint8_t user;          /* made in user mode */
    uint8_t flags;         /* SC_DATA, SC_BRIEF, SC_IMPLICIT */
    uint32_t reserved;     /* 0 */
    uint64_t value[2];     /* SC_DATA: what is stored, low half first */
    uint64_t expected[2];  /* SC_CMPXCHG: what must be there */
} sc_access;

/* Without SC_DATA an access only translates, with all side effects: exits, A and D bits. The caller then moves the
 * bytes at `host` itself; after a store with `emulated` set, which is one to a guest table, it has to call
 * sc_api.stored(). An access that crosses into another page is best made with SC_DATA: gpa, hpa and host are those of
 * its first byte. SC_MMIO: nothing was loaded or stored, gpa is that of the first byte that is a device's. If that is in
 * the second page, or the access goes on from a device into RAM, the half in RAM is the caller's as well: it makes it as
 * an access of its own. */
typedef struct sc_outcome {
    uint32_t struct_size;
    uint32_t error_code;   /* of a page fault */
    uint64_t gpa;          /* of the first byte, or SC_NOWHERE */
    uint64_t hpa;          /* ... in host physical space, in which the shadow tables are written */
    void *host;            /* ... where it lies in memory; NULL if nowhere */
    uint64_t value[2];     /* SC_DATA: what a load or read-modify-write read */
    uint32_t exits;        /* page-fault exits it took */
    uint32_t references;   /* table entries that the processor's walks read */
    uint32_t guest_references; /* guest table entries that the shadow MMU read */
    uint32_t cycles;       /* at the prices of the handle (set_prices); 0 if it has none */
    uint8_t outcome;       /* SC_OK, SC_PAGE_FAULT, SC_GENERAL_PROTECTION or SC_MMIO */
    uint8_t emulated;      /* stores that the emulator did */
    uint8_t page_shift;    /* log2 of the guest's page size */
    uint8_t rights;        /* SC_RIGHT_*, by the guest's tables */
    uint32_t reserved;
} sc_outcome;

/* Many loads, stores and fetches of at most 8 bytes. An array that is NULL stands for one value for all of them.
 * Results that are not wanted are NULL. */
typedef struct sc_accesses {
    uint32_t struct_size;
    uint32_t vcpu;
    uint64_t count;
    const uint64_t *gva;
    const uint64_t *value; /* SC_DATA: what stores store */
    const uint8_t *kind;
    const uint8_t *size;
    const uint8_t *user;
    uint8_t all_kind;
    uint8_t all_size;
    uint8_t all_user;
    uint8_t flags;         /* SC_DATA */
    uint32_t reserved;     /* 0 */
    uint64_t *gpa;         /* results */
    uint64_t *loaded;      /* SC_DATA: what loads read */
    uint16_t *error_code;
    uint16_t *exits;
    uint8_t *outcome;
    uint8_t *emulated;
    uint64_t done;         /* set: how many were made, all unless an error stopped them */
} sc_accesses;

typedef struct sc_counters {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t exits[SC_EXITS];
    uint64_t pf_taken;
    uint64_t pf_fixed;
    uint64_t pf_guest;
    uint64_t pf_emulate;
    uint64_t pf_mmio;
    uint64_t pf_spurious;
    uint64_t tlb_flush;
    uint64_t remote_tlb_flush;
    uint64_t invlpg;
    uint64_t mmu_shadow_zapped;
    uint64_t mmu_pte_write;
    uint64_t mmu_pde_zapped;
    uint64_t mmu_flooded;
    uint64_t mmu_recycled;
    uint64_t mmu_cache_miss;
    uint64_t mmu_cache_hit;
    uint64_t mmu_unprotect;
    uint64_t page_frees;
    uint64_t spte_installed;
    uint64_t spte_removed;
    uint64_t rmap_protected;
    uint64_t root_loads;
    uint64_t gp_guest;
    uint64_t accesses;
    uint64_t walk_references;
    uint64_t guest_walk_references;
    uint64_t tlb_hits;
    uint64_t tlb_misses;
    uint64_t mmu_unsync;
    uint64_t unsync_made;
    uint64_t synced;
    uint64_t prefetched;
    uint64_t prev_root_hits;
    uint64_t insn_emulation;
    uint64_t pf_mmio_spte_created;
    uint64_t pages_4k;
    uint64_t pages_2m;
    uint64_t pages_1g;
    uint64_t remote_tlb_flush_requests;
    uint64_t max_mmu_rmap_size;
    uint64_t pf_mmio_spte_hit;
    uint64_t host_faults;
    uint64_t host_unmaps;
    uint64_t markers_made;
    uint64_t marker_hits;
    uint64_t markers_stale;
    uint64_t host_faults_large;
    uint64_t outer_faults;
    uint64_t outer_faults_large;
    uint64_t invpcid;
    uint64_t npf_violation;
    uint64_t npf_misconfig;
    uint64_t pf_fast;
    uint64_t tlb_load_hits;
    uint64_t tlb_store_hits;
    uint64_t tlb_fetch_hits;
    uint64_t tlb_load_second;
    uint64_t tlb_store_second;
    uint64_t tlb_fetch_second;
    uint64_t tlb_load_misses;
    uint64_t tlb_store_misses;
    uint64_t tlb_fetch_misses;
    uint64_t walk_cache_hits;
    uint64_t walk_cache_references;
    uint64_t nested_tlb_hits;
    uint64_t nested_tlb_misses;
    uint64_t host_cache_hits;
    uint64_t nested_tables;
    uint64_t to_nested;
    uint64_t to_shadow;
    uint64_t nested_walks;
} sc_counters;

typedef struct sc_event {
    uint32_t struct_size;
    uint32_t kind;         /* SC_EVENT_* */
    uint32_t detail;
    uint32_t vcpu;         /* or SC_NO_VCPU */
    uint64_t address;
    sc_vm vm;
    /* SC_EVENT_FLUSH: what was translated to one of so many guest frames from gfn `address` on holds no more; 0: what was
     * translated at all. Of the guest's own flushes (registers, INVLPG, INVPCID, its page faults) the caller knows. */
    uint64_t frames;
} sc_event;

/* Called in the middle of what the engine does, without the GIL. It must return (no longjmp, no C++ exception), and
 * may use every VM but its own. */
typedef void (*sc_event_function)(void *context, const sc_event *event);

/* Of which tables an entry is that a walk reads. */
enum {
    SC_DIMENSION_GUEST = 0,
    SC_DIMENSION_HOST = 1,   /* those that translate the guest's addresses (nested) */
    SC_DIMENSION_SHADOW = 2
};

/* A reference to memory that a walk of a processor makes. */
typedef struct sc_reference {
    uint64_t hpa;          /* of the entry */
    uint64_t gva;          /* linear address that is translated */
    uint32_t walk;         /* number of the walk */
    uint8_t vcpu;
    uint8_t level;         /* of the entry, in its tables: 1 to 5 */
    uint8_t dimension;     /* SC_DIMENSION_* */
    uint8_t size;          /* bytes of the entry: 4 or 8 */
} sc_reference;

/* Called once for each walk, with its references in their order, as sc_event_function is. */
typedef void (*sc_reference_function)(void *context, const sc_reference *references, uint32_t count);

typedef struct sc_audit_result {
    uint32_t struct_size;
    uint32_t violations;   /* how many */
    uint64_t sptes;        /* present shadow entries looked at */
    uint32_t invariant;    /* of the first violation: 1 for I1, ... */
    uint32_t page;         /* ... its pool page, or UINT32_MAX */
    uint32_t index;        /* ... the entry in the page */
    uint32_t reserved;
    uint64_t gfn;          /* ... the guest frame concerned */
} sc_audit_result;

/* A memory slot that comes while the guest runs. */
typedef struct sc_new_slot {
    uint32_t struct_size;
    uint32_t number;         /* 0 to 31; SC_ANY: the lowest that is free */
    uint64_t gpa;
    uint64_t size;           /* bytes, a multiple of 4096 */
    uint64_t offset;         /* where in guest RAM its frames begin, in bytes; SC_ANYWHERE: where there is room */
    uint64_t host_page_size; /* bytes of the host's pages under it; 0: 4096 */
    uint8_t dirty_log;       /* 1: with a log of the frames that are stored to */
    uint8_t read_only;       /* 1: stores are the caller's, as those to a device */
    uint8_t backing;         /* SC_BACKING_*: what the host has under it */
    uint8_t reserved[5];     /* 0 */
} sc_new_slot;

/* What memory virtualization costs, in cycles: a price for each count, as in shadowcore.Costs, which says where the
 * numbers come from. What the guest's own instructions take is not in it. */
typedef struct sc_prices {
    uint32_t struct_size;
    uint32_t reserved;        /* 0 */
    double tlb_miss;          /* a miss of the TLB that is modelled; without one each access is a miss */
    double upper_reference;   /* an entry that the processor's walk reads, but for the last one ... */
    double leaf_reference;    /* ... and that one */
    double exit_fault;        /* all changes of world of an exit: of a page fault, ... */
    double exit_register;     /* ... a load of CR0, CR3, CR4 or EFER, ... */
    double exit_invlpg;       /* ... INVLPG */
    double dispatch;          /* the way of all hypervisors from an exit to its handler and back */
    double fill;              /* the handler of SC_EXIT_FILL, ... */
    double rights;            /* ... SC_EXIT_WRITE, ... */
    double inject;            /* ... SC_EXIT_GUEST, ... */
    double mmio;              /* ... SC_EXIT_MMIO */
    double emulate;           /* a store that the emulator does */
    double load;              /* the handler of a register load (Costs.register), ... */
    double flush_page;        /* ... of INVLPG */
    double guest_reference;   /* a guest entry that the shadow MMU reads */
    double page_new;          /* a shadow page made, ... */
    double page_zap;          /* ... zapped */
    double entry;             /* a shadow entry that becomes present, or ceases to be */
    /* A caller whose sc_prices ends before these may go on: they are 0. */
    double violation;         /* an EPT violation, its exit and handler; 0: as a page fault's exit and fill or rights */
    double violation_table;   /* ... and of each table made for one, what another hypervisor does beside page_new */
    double first_touch;       /* a page that a host finds for a frame that nothing was behind; of an outer host, too */
    double first_touch_large; /* ... one of 2 MiB */
    double outer_touch;       /* the exit to an outer host for such a page of its own */
} sc_prices;

/* Formats of page tables; the number of levels. */
enum { SC_TABLES_32 = 2, SC_TABLES_PAE = 3, SC_TABLES_64 = 4, SC_TABLES_LA57 = 5 };

/* A guest's page tables, which the functions tables_* build in its memory. Set up by the caller, who keeps it. */
typedef struct sc_tables {
    uint32_t struct_size;
    uint32_t mode;         /* SC_TABLES_* */
    uint64_t root;         /* gpa of the root table, what CR3 is to be; 0: tables_map makes one and sets it */
    uint64_t next_gfn;     /* frames for tables: calls take the next ones, ... */
    uint64_t frames;       /* ... and say how many are left */
} sc_tables;

/* What is to be mapped; for tables_protect gva, size, and rights or bits. As in shadowcore.PageTables.map. */
typedef struct sc_mapping {
    uint32_t struct_size;
    uint32_t rights;       /* SC_RIGHT_*; SC_TABLES_32 needs SC_RIGHT_EXECUTE */
    uint64_t gva;          /* all multiples of 4096 */
    uint64_t gpa;
    uint64_t size;
    uint64_t page_size;    /* bytes of a page; 0: at each address the largest that its alignment allows */
    uint64_t bits;         /* bits of the leaves beside address and size, taken as they are; 0: what the rest says */
    uint8_t global_;
    uint8_t pkey;          /* protection key, 0 to 15 */
    uint8_t accessed;
    uint8_t dirty;
    uint8_t reserved[4];   /* 0 */
} sc_mapping;

/* An entry of a table. */
#define SC_ANY_LEVEL 0u
typedef struct sc_entry {
    uint32_t struct_size;
    uint32_t level;        /* of its table, 1 maps 4096-byte pages; asked for with SC_ANY_LEVEL: where the walk ends */
    uint64_t gpa;          /* where it lies: sc_api.store changes it */
    uint64_t value;
} sc_entry;

/* Where the walks of a vcpu's processor begin. Tables are those of x86, 4- and 5-level or PAE; hpas are those of
 * sc_pool. */
typedef struct sc_root {
    uint32_t struct_size;
    uint32_t mode;         /* SC_TABLES_*, of the shadow; nested paging: of the host's tables */
    uint64_t hpa;          /* of the top table; SC_NOWHERE: none is in place yet, the next access sees to it. PAE: none */
    uint64_t pdpte[4];     /* PAE: of the four directories, or SC_NOWHERE */
} sc_root;

/* Host physical space. Tables of the pool follow each other, and so do the frames of RAM; entries of tables hold hpas.
 * All of it may be read while the VM is not in use, and is the VM's to write. */
typedef struct sc_pool {
    uint32_t struct_size;
    uint32_t pages;          /* in the pool; 0: the design has none */
    uint32_t active;         /* ... and in use */
    uint32_t reserved;
    const uint64_t *tables;  /* 512 entries a page; with nested paging the host's tables */
    uint64_t tables_hpa;     /* hpa of the first page */
    void *ram;
    uint64_t ram_hpa;        /* hpa of the first byte of RAM */
    uint64_t ram_size;
} sc_pool;

/* A page of the pool. */
typedef struct sc_shadow_page {
    uint32_t struct_size;
    uint32_t root_count;   /* vcpus' roots that it is */
    uint64_t hpa;
    uint64_t gfn;          /* of the guest's table that it stands for; direct: the first that it maps */
    uint8_t active;        /* in use; else all but hpa and root_count is 0 */
    uint8_t level;         /* 1: its entries map pages */
    uint8_t guest_mode;    /* SC_TABLES_* of the guest; 0: paging was off */
    uint8_t quadrant;      /* which part of a table of 4-byte entries */
    uint8_t direct;        /* there is no table of the guest behind it */
    uint8_t rights;        /* SC_RIGHT_* that the levels above allow */
    uint8_t unsync;        /* it may lag behind the guest's table */
    uint8_t reserved;
} sc_shadow_page;

typedef struct sc_api {
    uint32_t abi_version;  /* SC_ABI_VERSION */
    uint32_t struct_size;  /* of this table */
    const char *version;   /* of the package */

    /* A VM over the caller's memory, which stays where it is until vm_destroy. */
    int (*vm_create)(const sc_config *config, sc_vm *vm);
    int (*vm_destroy)(sc_vm vm);

    int (*register_read)(sc_vm vm, uint32_t vcpu, uint32_t reg, uint64_t *value);
    /* SC_OK, SC_GENERAL_PROTECTION, or an error. */
    int (*register_load)(sc_vm vm, uint32_t vcpu, uint32_t reg, uint64_t value);
    int (*invlpg)(sc_vm vm, uint32_t vcpu, uint64_t gva);

    /* One access, its outcome also as the return value. */
    int (*access)(sc_vm vm, const sc_access *access, sc_outcome *outcome);
    /* Where it would lead by the guest's tables, without side effect; says nothing of exits. */
    int (*translate)(sc_vm vm, const sc_access *access, sc_outcome *outcome);
    /* Many; outcomes in the arrays. SC_OK, or the error that stopped them. The structure is read once, and each element
     * of the columns once after all were checked: SC_E_ARGUMENT, with `done` so far, where one has become none since.
     * Signals are not looked for, as that would take the GIL: `count` is how long the call may take. */
    int (*access_many)(sc_vm vm, sc_accesses *accesses);

    /* A device's store of `size` bytes to guest RAM, which the shadow follows. SC_E_ARGUMENT, and nothing stored, where
     * not all of it lies in memory slots, or one of them is read-only. */
    int (*store)(sc_vm vm, uint64_t gpa, const void *data, uint64_t size);
    /* The caller has stored there itself, through a host pointer: the shadow follows. */
    int (*stored)(sc_vm vm, uint64_t gpa, uint64_t size);
    /* Where the byte at gpa lies in memory. SC_MMIO: in no slot. */
    int (*host_address)(sc_vm vm, uint64_t gpa, void **host);

    int (*counters)(sc_vm vm, sc_counters *counters);
    /* function NULL or mask 0: no events any more. One function for a VM. */
    int (*on_event)(sc_vm vm, uint32_t mask, sc_event_function function, void *context);
    int (*audit)(sc_vm vm, sc_audit_result *result);

    /* The complete state, to a file; and a VM that continues as the saved one would, over `memory`, into which its
     * RAM is put (NULL: the VM makes it). path is UTF-8. */
    int (*save)(sc_vm vm, const char *path);
    int (*vm_load)(const char *path, void *memory, uint64_t memory_size, sc_vm *vm);

    /* What the last error of this thread was; valid until its next one. */
    const char *(*last_error)(void);

    /* A VM that Python has made: object is a PyObject * of shadowcore.VM, of which a reference is held until
     * vm_destroy, which lets it live on. */
    int (*vm_adopt)(void *object, sc_vm *vm);

    /* A preset of shadowcore.Costs by its name (`shadowcore costs` lists them), such as "modern". Takes the GIL. */
    int (*prices)(const char *preset, sc_prices *prices);
    /* From now on accesses by this handle say what they cost; they take the engine's general path. NULL: no more. */
    int (*set_prices)(sc_vm vm, const sc_prices *prices);
    /* What all counters of the VM come to, at the prices of the handle. While paging is on, a difference is what came
     * between; of all entries read, as many as there were misses count as the last ones of their walks. */
    int (*cycles)(sc_vm vm, double *cycles);

    /* Memory slots that change while the guest runs. All of these, and those below, take the GIL; SC_E_ARGUMENT, and
     * nothing is changed, for what cannot be.
     * A slot comes, over frames of guest RAM that no slot has; *number is its number. */
    int (*slot_add)(sc_vm vm, const sc_new_slot *slot, uint32_t *number);
    /* It goes; its addresses are a device's, its frames are free. */
    int (*slot_remove)(sc_vm vm, uint32_t number);
    /* It is mapped at gpa, with its frames and its dirty log. */
    int (*slot_move)(sc_vm vm, uint32_t number, uint64_t gpa);

    /* What the host has under guest RAM, n frames from gfn on. It takes them back, as a call of KVM's MMU notifier;
     * discard: what is in them is gone. */
    int (*host_unmap)(sc_vm vm, uint64_t gfn, uint64_t n, uint32_t discard);
    /* A program on the host accesses them; write: stores. */
    int (*host_touch)(sc_vm vm, uint64_t gfn, uint64_t n, uint32_t write);
    /* The host makes pages of 2 MiB of them. */
    int (*host_collapse)(sc_vm vm, uint64_t gfn, uint64_t n);

    /* INVPCID of this type (0 to 3: an address, a PCID, all, all that is not global) by supervisor code. descriptor: its
     * two words, the PCID and the linear address. SC_GENERAL_PROTECTION, SC_UNDEFINED as SDM vol. 2 says. Neither this
     * nor the next one takes the GIL. */
    int (*invpcid)(sc_vm vm, uint32_t vcpu, uint64_t type, const uint64_t descriptor[2]);
    /* The state that an INIT leaves in what this library has of a processor (SDM vol. 3, table 10-1). */
    int (*vcpu_init)(sc_vm vm, uint32_t vcpu);

    /* The references to memory of every walk of a processor, as they are made: what the TLB and the caches of the
     * processor leave out, if they are modelled, is not among them, nor are the walks of the hypervisor. While there is
     * such a function all accesses take the engine's general path. function NULL: no more. One for a VM; takes the
     * GIL. */
    int (*on_references)(sc_vm vm, sc_reference_function function, void *context);

    /* A preset as sc_api.prices gives it, with what lies below nested paging where that is the design of the VM: what
     * `shadowcore compare --costs` uses. Takes the GIL. */
    int (*prices_for)(sc_vm vm, const char *preset, sc_prices *prices);

    /* What the processor walks. SC_E_ARGUMENT under SC_NATIVE, which has no such root. */
    int (*shadow_root)(sc_vm vm, uint32_t vcpu, sc_root *root);
    int (*shadow_pool)(sc_vm vm, sc_pool *pool);
    int (*shadow_page)(sc_vm vm, uint32_t number, sc_shadow_page *page);

    /* Page tables of a guest, as shadowcore.PageTables builds them: stores are a device's, so that the guest may run.
     * All of these take the GIL. SC_E_ARGUMENT, and nothing is changed, for what cannot be. */
    int (*tables_map)(sc_vm vm, sc_tables *tables, const sc_mapping *mapping);
    int (*tables_unmap)(sc_vm vm, sc_tables *tables, uint64_t gva, uint64_t size);
    int (*tables_protect)(sc_vm vm, sc_tables *tables, const sc_mapping *mapping);
    int (*tables_entry)(sc_vm vm, const sc_tables *tables, uint64_t gva, sc_entry *entry);
    /* Load EFER, CR4, CR3 and CR0 as the guest would, which turns paging on. */
    int (*tables_activate)(sc_vm vm, uint32_t vcpu, const sc_tables *tables);
} sc_api;

/* 1 if the table has all that this header declares. */
static inline int sc_api_fits(const sc_api *api) {
    return api != NULL && api->abi_version == SC_ABI_VERSION && api->struct_size >= sizeof(sc_api);
}

#ifdef Py_PYTHON_H
#define SC_CAPSULE "shadowcore._capi._C_API"

/* The table, or NULL with a Python exception set. Needs the GIL. The table lives as long as the process. */
static inline const sc_api *shadowcore_import(void) {
    PyObject *module = PyImport_ImportModule("shadowcore._capi");
    PyObject *capsule = module == NULL ? NULL : PyObject_GetAttrString(module, "_C_API");
    const sc_api *api = capsule == NULL ? NULL : (const sc_api *)PyCapsule_GetPointer(capsule, SC_CAPSULE);
    Py_XDECREF(capsule);
    Py_XDECREF(module);
    if (api != NULL && !sc_api_fits(api)) {
        PyErr_Format(PyExc_ImportError, "shadowcore %s has version %u of its C interface, with %u bytes; %u, %u needed",
                     api->version, (unsigned)api->abi_version, (unsigned)api->struct_size, (unsigned)SC_ABI_VERSION,
                     (unsigned)sizeof(sc_api));
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif
#endif
