/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the parts of the recorder share. A back end (qemu_v1.c, qemu_v4.c) tells registers and addresses by the
 * emulator's plug-in interface of one version; all else is common to them.
 */
#ifndef RECORDER_H
#define RECORDER_H

#include "emulator.h"

#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define NOWHERE UINT64_MAX
#define VCPUS_MAX 64

/* Records: docs/recordings.md has what they mean. They go to the command as they lie here. */
enum {
    LOAD_CR3 = 1,
    LOAD_CR,
    STORE,
    TABLE,
    INVLPG,
    ACCESS,
    TABLE_END,
    LOAD_EFER,
    INVPCID,
    MARK,
    END = 255,          /* of the stream */
};
enum { STORE_SNAPSHOT = 1 << 7, TABLE_ROOT = 1 << 4 };
enum { ACCESS_WRITE = 1, ACCESS_USER = 2, ACCESS_FETCH = 4, ACCESS_SIZE_SHIFT = 4, ACCESS_CPL_SHIFT = 8,
       ACCESS_CPL_KNOWN = 1 << 10 };

struct record {
    uint8_t kind, vcpu;
    uint16_t flags;
    uint32_t insns;     /* instructions since the record before */
    uint64_t addr, value;
};

struct heading {        /* what the stream begins with, when a processor first turns paging on */
    char magic[8];      /* "SCGUEST1" */
    uint32_t vcpus, interface;
    uint64_t nframes, cr0, cr4, efer;
};

/* Registers, by the numbers that the emulator's debugger stub has for x86-64. */
enum { RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8, R15 = 15, RIP, EFLAGS, CS, FS_BASE = 24, GS_BASE, CR0 = 27, CR3 = 29,
       CR4, EFER = 32, REGISTERS };

enum mode { MODE_OFF, MODE_32, MODE_PAE, MODE_64, MODE_LA57 };

#define FILTER_WAYS 8
struct set {                    /* of a filter: pages whose accesses need no record */
    uint64_t tag[FILTER_WAYS];  /* linear page, user mode, and 1; 0: none */
    uint32_t gfn[FILTER_WAYS];  /* where it led */
    uint32_t used[FILTER_WAYS]; /* when, in uses of the set that did not follow one of the same */
    uint32_t uses;
} __attribute__((aligned(64)));
enum { FILTER_LOAD, FILTER_STORE, FILTER_FETCH, FILTERS };

struct block;           /* of translated code: core.c */
struct op;              /* of an instruction that changes registers or drops translations: decode.c */
struct table;           /* a frame that serves as a table of some level: tables.c */

struct vcpu {
    unsigned number;
    uint64_t cr0, cr3, cr4, efer;
    enum mode mode;
    uint8_t cpl, low;   /* of the block; low: bits 0 and 1 of its tags */
    bool seen;          /* it has executed something */
    uint64_t begun;     /* instructions executed when its block began */
    uint64_t fetch;     /* tag of the page fetched from last */
    const struct op *pending;
    const struct block *block;  /* the one that it executes, or executed last */
    bool raised;        /* an exception, which is not delivered yet */
    struct table *root;
    uint64_t *hand[2];  /* of loads and of stores: for each set the tag that was used last, if its page needs no look */
    struct set *filter[FILTERS];
};

#pragma GCC visibility push(hidden)     /* what follows is of this library: reached without a table of addresses */

/* core.c */
extern uint64_t nframes;            /* guest RAM, in frames of 4096 bytes */
extern uint8_t *ram;                /* the same, in this process */
extern struct vcpu *vcpus;
extern unsigned vcpu_count;
extern bool recording;
extern bool tells_delivery;         /* core_delivered is called: the emulator tells of interrupts and exceptions */
int core_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv);
void core_translated(struct qemu_plugin_tb *tb);
void core_forgotten(void);
void core_delivered(unsigned vcpu, bool raised, uint64_t from);

/* events.c */
void events_install(qemu_plugin_id_t id);

/* filter.c */
extern uint64_t filter_sets;        /* a power of two */
void filter_install(uint64_t pages);
struct set *filter_set(const struct vcpu *v, int which, uint64_t page);
int filter_find(struct set *set, uint64_t tag);
void filter_enter(struct set *set, uint64_t tag, uint64_t gfn);
void filter_drop_page(struct vcpu *v, uint64_t va);
void filter_drop_all(struct vcpu *v);
void filter_watch(void);            /* a frame has become a table */

/* stream.c: records on their way out */
extern uint64_t stream_clock;       /* instructions executed */
extern uint64_t stream_limit;       /* where to end */
void stream_open(int fd);
extern bool stream_ended;           /* nothing more is told; the emulator goes on until it has its signal */
void stream_head(const struct heading *heading, uint64_t now);
void emit(struct vcpu *v, uint64_t now, int kind, unsigned flags, uint64_t addr, uint64_t value);
void stream_end(void);
void fatal(const char *what, const char *which) __attribute__((noreturn));

/* tables.c */
enum { WATCH_NOT, WATCH_TABLE, WATCH_LATE };
extern uint8_t *watched;            /* for each frame, and one for all that is no RAM: WATCH_* */
enum mode mode_of(const struct vcpu *v);
void tables_install(void);
void tables_root(struct vcpu *v, uint64_t now);
void tables_store(struct vcpu *v, uint64_t now, uint64_t va, uint64_t gpa, unsigned size, unsigned flags);
bool walk(const struct vcpu *v, uint64_t va, uint64_t *gpa, bool *user, uint64_t *span);

/* decode.c */
enum op_kind { OP_NONE, OP_CR0, OP_CR3, OP_CR4, OP_SYSTEM, OP_INVLPG, OP_INVPCID, OP_CPUID };
struct op {
    uint8_t kind, length;
    uint8_t source;             /* of OP_CR*, OP_INVPCID: the general register */
    int8_t base, index;         /* of an address: registers, -1 none, RIP the next instruction */
    uint8_t scale, segment;     /* segment: FS_BASE, GS_BASE or 0 */
    bool narrow;                /* addresses of 32 bits by prefix */
    int32_t displacement;
    uint64_t next;              /* linear address of the next instruction */
};
bool decode(const uint8_t *bytes, size_t length, uint64_t va, struct op *op);
uint64_t op_address(const struct op *op, const struct vcpu *v);

/* A back end */
#define MAGIC_MARK 0x53435243u      /* EAX of a CPUID that marks a place: "SCRC"; ECX has its number */
extern const int backend_flags;     /* of callbacks that read registers */
void backend_install(const qemu_info_t *info);
void backend_begins(unsigned vcpu);              /* a processor does */
size_t backend_bytes(const struct qemu_plugin_insn *insn, uint8_t bytes[16]);
uint64_t backend_register(unsigned vcpu, int number);
unsigned backend_vcpu(unsigned told);            /* the processor that runs, where it was told this one */
uint64_t backend_gpa(qemu_plugin_meminfo_t info, uint64_t va);  /* where an access led; NOWHERE if it cannot be told */

#pragma GCC visibility pop

#endif
