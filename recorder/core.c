/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What is done at each block of translated code, and at each access.
 *
 * Registers are read where a block begins, for there alone the emulator has all of them in memory. So what an
 * instruction did to CR3 is seen at the block after it; such instructions end their block.
 *
 * One processor runs at a time (the command sees to that), so nothing here is locked.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "recorder.h"

struct block {              /* of translated code: what its execution needs, in one line of the cache */
    uint64_t tag[2];        /* of the pages that it lies in, as FILTER_FETCH has them; 0: none */
    uint64_t va[2], gpa[2]; /* where it begins in each; NOWHERE: to be walked for */
    struct block *next;
    uint32_t insns;
    uint8_t cpl, low;       /* low: bits of tags that say whether it is user code */
    bool odd;               /* one of: not seen, check, marks, in two pages */
    bool seen;              /* it was executed before */
    bool check;             /* it may be reached by a change of registers that no instruction made */
    bool marks;             /* it begins with CPUID */
    bool traps;             /* it ends with an instruction that raises an exception where it is done */
    uint16_t at[];          /* of its instructions: where each begins in it, if the emulator tells of exceptions */
} __attribute__((aligned(64)));

struct kept_op {
    struct kept_op *next;
    struct op op;
};

uint64_t nframes;
uint8_t *ram;
struct vcpu *vcpus;
unsigned vcpu_count;
bool recording, tells_delivery;

static struct vcpu *running;    /* the processor whose block it is */
static struct vcpu *alone;      /* the only processor; NULL: there are several */
static void finish_op(struct vcpu *v, uint64_t now);
static const char *ram_path;
static struct block *blocks;
static struct kept_op *ops;
static uint32_t interface_version;

/* The guest's memory, where the emulator has mapped it. */
static void map_ram(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4096 + 256];
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long begin, end, offset;
        int name = 0;
        if (sscanf(line, "%lx-%lx %*s %lx %*s %*s %n", &begin, &end, &offset, &name) < 3 || !name)
            continue;
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line + name, ram_path, strlen(ram_path)) == 0 && offset == 0 && end - begin >= nframes << 12)
            ram = (uint8_t *)begin;
    }
    if (maps)
        fclose(maps);
    if (!ram)
        fatal("the guest's memory is not mapped from ", ram_path);
}

static unsigned cpl_flags(const struct vcpu *v)
{
    return (unsigned)v->cpl << ACCESS_CPL_SHIFT | ACCESS_CPL_KNOWN;
}

static inline uint64_t tag_of(const struct vcpu *v, uint64_t va)
{
    return va >> 12 << 2 | v->low;
}

static inline struct vcpu *that_runs(unsigned told)
{
    return vcpu_count == 1 ? vcpus : &vcpus[backend_vcpu(told)];
}

/* What an access that missed the filter is recorded with. Code of level 3 reads descriptors as supervisor: such a page
 * is one that user code may not use. */
static unsigned access_flags(const struct vcpu *v, bool user_page)
{
    return cpl_flags(v) | (v->cpl == 3 && user_page ? ACCESS_USER : 0);
}

static void access_page(struct vcpu *v, uint64_t now, qemu_plugin_meminfo_t info, uint64_t va, unsigned size,
                        unsigned shift, bool is_store, bool first)
{
    uint64_t page = va >> 12, tag = tag_of(v, va), gpa = NOWHERE, walked, span;
    uint64_t *hand = &v->hand[is_store][page & (filter_sets - 1)];
    struct set *set = filter_set(v, is_store ? FILTER_STORE : FILTER_LOAD, page);
    int way = filter_find(set, tag);
    *hand = tag;
    if (way >= 0 && !(is_store && watched[set->gfn[way]]))
        return;
    *hand = 0;
    bool user, mapped = walk(v, va, &walked, &user, &span);
    if (way >= 0)
        gpa = (uint64_t)set->gfn[way] << 12 | (va & 4095);
    else if (first)
        gpa = backend_gpa(info, va);
    if (gpa == NOWHERE && mapped)
        gpa = walked;
    if (gpa == NOWHERE)
        return;                 /* by a translation that was taken back since */
    if (way < 0)
        filter_enter(set, tag, gpa >> 12);
    if (is_store != qemu_plugin_mem_is_store(info))
        fatal("the emulator tells loads from stores in another way than it did", "");
    unsigned flags = access_flags(v, mapped && user) | (shift + 1) << ACCESS_SIZE_SHIFT;
    if (is_store && gpa >> 12 < nframes && watched[gpa >> 12])
        tables_store(v, now, va, gpa, size, flags);
    else
        emit(v, now, ACCESS, flags | (is_store ? ACCESS_WRITE : 0), va, gpa);
}

/* What is at hand is the page used last in its set, so that the filter need not know of this use. */
static inline bool at_hand(const struct vcpu *v, uint64_t va, bool is_store)
{
    return v->hand[is_store][va >> 12 & (filter_sets - 1)] == tag_of(v, va) && (va & 4095) <= 4096 - 64;
}

/* Takes what a callback is given, so that the callback ends with a jump to it and keeps no registers. */
static __attribute__((noinline)) void access_other(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t va, void *number,
                                                   bool is_store)
{
    struct vcpu *v = that_runs(vcpu);
    if (!recording || (!alone && at_hand(v, va, is_store)))
        return;
    uint64_t now = v->begun + (uintptr_t)number;
    /* An access of the emulator's own, when it delivers an interrupt: it comes before the next block, and perhaps on a
     * processor whose turn has just begun. */
    if (v->pending && v->pending->kind >= OP_CR0 && v->pending->kind <= OP_CR4)
        finish_op(v, now);
    unsigned shift = qemu_plugin_mem_size_shift(info), size = 1u << shift, here = 4096 - (va & 4095);
    if (size <= here) {
        access_page(v, now, info, va, size, shift, is_store, true);
        return;
    }
    access_page(v, now, info, va, here, shift, is_store, true);
    access_page(v, now, info, va + here, size - here, shift, is_store, false);
}

static inline void access_at(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t va, void *number, bool is_store)
{
    if (UNLIKELY(!alone || !at_hand(alone, va, is_store)))
        access_other(vcpu, info, va, number, is_store);
}

#if INTERFACE < 4
/* It calls what is registered for loads at stores too, and the other way round. Its releases have this bit of `info` for
 * stores; access_page compares it with what the interface says. */
static void on_access(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t va, void *number)
{
    access_at(vcpu, info, va, number, info >> 17 & 1);
}
#else
static void on_load(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t va, void *number)
{
    access_at(vcpu, info, va, number, false);
}

static void on_store(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t va, void *number)
{
    access_at(vcpu, info, va, number, true);
}
#endif

static void register_accesses(struct qemu_plugin_insn *insn, void *number)
{
#if INTERFACE < 4
    qemu_plugin_register_vcpu_mem_cb(insn, on_access, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, number);
#else
    qemu_plugin_register_vcpu_mem_cb(insn, on_load, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_R, number);
    qemu_plugin_register_vcpu_mem_cb(insn, on_store, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_W, number);
#endif
}

static void on_op(unsigned vcpu, void *op)
{
    (void)vcpu;
    running->pending = op;
}

/* Paging is on for the first time: from here on all is recorded. */
static void start(const struct vcpu *v, uint64_t now)
{
    struct heading heading = { "SCGUEST1", vcpu_count, interface_version, nframes, v->cr0, v->cr4, v->efer };
    if (v->number)
        fatal("a guest whose first processor turns paging on first is needed", "");
    stream_head(&heading, now);
    recording = true;
}

/* Take over the registers as they are now, and record what has changed. CR3 by itself where an instruction loaded it:
 * that drops translations even if it is the same. */
static void read_registers(struct vcpu *v, uint64_t now, bool loaded)
{
    struct vcpu was = *v;
    v->cr0 = backend_register(v->number, CR0);
    v->cr3 = backend_register(v->number, CR3);
    v->cr4 = backend_register(v->number, CR4);
    v->efer = backend_register(v->number, EFER);
    v->mode = mode_of(v);
    bool cr = was.cr0 != v->cr0 || was.cr4 != v->cr4, efer = (was.efer ^ v->efer) & ~(uint64_t)0x400;
    bool cr3 = loaded || was.cr3 != v->cr3, off = was.cr0 >> 31 & ~v->cr0 >> 31 & 1, fresh = false;
    if (!cr && !efer && !cr3)
        return;
    if (!recording) {
        if (v->mode == MODE_OFF || stream_ended)
            return;
        start(v, now);
        cr = efer = false;
        cr3 = fresh = true;
    }
    if (cr || cr3)
        filter_drop_all(v);
    if (cr3 || v->mode != was.mode || fresh)
        tables_root(v, now);
    /* One after the other as a processor would take them: paging goes off first and on last. */
    if (off)
        emit(v, now, LOAD_CR, 0, v->cr0, was.cr4);
    if (efer)
        emit(v, now, LOAD_EFER, 0, v->efer & ~(uint64_t)0x400, 0);
    if (cr && was.cr4 != v->cr4)
        emit(v, now, LOAD_CR, 0, off ? v->cr0 : was.cr0, v->cr4);
    if (cr3)
        emit(v, now, LOAD_CR3, 0, v->cr3, 0);
    if (cr && !off && was.cr0 != v->cr0)
        emit(v, now, LOAD_CR, 0, v->cr0, v->cr4);
}

static void finish_op(struct vcpu *v, uint64_t now)
{
    const struct op *op = v->pending;
    v->pending = NULL;
    if (op->kind < OP_INVLPG) {
        /* A load that was refused is none: then the register is not what the operand is. */
        bool loaded = op->kind == OP_CR3 && backend_register(v->number, op->source) << 1 >> 1
            == backend_register(v->number, CR3);
        read_registers(v, now, loaded);
    } else if (recording && op->kind == OP_INVLPG) {
        uint64_t va = op_address(op, v);
        filter_drop_page(v, va);
        emit(v, now, INVLPG, 0, va, 0);
    } else if (recording && op->kind == OP_INVPCID) {
        uint64_t at = op_address(op, v), gpa, high, span;
        bool user;
        if (!walk(v, at, &gpa, &user, &span) || !walk(v, at + 8, &high, &user, &span)
            || (gpa | high) >> 12 >= nframes)
            return;
        filter_drop_all(v);
        emit(v, now, INVPCID, backend_register(v->number, op->source) & 3, *(uint64_t *)(ram + high),
             *(uint64_t *)(ram + gpa));
    }
}

/* Emulators since 8.0 use a block wherever its frame is mapped. Where it is now, the instruction pointer tells. */
static void move_block(struct vcpu *v, struct block *b)
{
    uint64_t rip = v->mode == MODE_OFF ? b->va[0] : backend_register(v->number, RIP), by = rip - b->va[0];
    if (!by || by & 4095)       /* not a move, or a code segment that does not begin at 0 */
        return;
    for (int n = 0; n < 2 && b->tag[n]; n++) {
        b->va[n] += by;
        b->tag[n] = b->va[n] >> 12 << 2 | 1;
    }
}

static __attribute__((noinline, cold)) void fetch_slow(struct vcpu *v, uint64_t now, struct block *b)
{
    for (int n = 0; n < 2 && b->tag[n]; n++) {
        uint64_t tag = tag_of(v, b->va[n]), gpa = b->gpa[n], walked, span;
        struct set *set = filter_set(v, FILTER_FETCH, tag >> 2);
        bool user;
        v->fetch = tag;
        if (filter_find(set, tag) >= 0)
            continue;
        if (n == 0) {
            read_registers(v, now, false);  /* whatever else may have changed them: tasks, resets, system management */
            move_block(v, b);
            tag = tag_of(v, b->va[0]);
            set = filter_set(v, FILTER_FETCH, tag >> 2);
            v->fetch = tag;
            if (filter_find(set, tag) >= 0)
                continue;
        }
        bool mapped = walk(v, b->va[n], &walked, &user, &span);
        if (gpa == NOWHERE && mapped)
            gpa = walked;
        if (gpa == NOWHERE)
            continue;
        filter_enter(set, tag, gpa >> 12);
        v->fetch = tag;
        emit(v, now, ACCESS, access_flags(v, mapped && user) | ACCESS_FETCH, b->va[n], gpa);
    }
}

static uint8_t read_cpl(struct vcpu *v)
{
    if (!(v->cr0 & 1))
        return 0;
    if (!(v->efer >> 10 & 1) && backend_register(v->number, EFLAGS) >> 17 & 1)
        return 3;               /* virtual-8086 mode */
    return backend_register(v->number, CS) & 3;
}

/* Not the first time only: see the calls. */
static __attribute__((noinline, cold)) void block_slow(struct vcpu *v, uint64_t now, struct block *b)
{
    if (!ram)
        map_ram();
    if (now >= stream_limit && recording) {
        stream_end();
        kill(getpid(), SIGTERM);
        return;
    }
    if (v->pending)
        finish_op(v, now);
    if (!b->seen || (b->check && v->mode != MODE_OFF) || !v->seen) {
        read_registers(v, now, false);
        v->seen = b->seen = true;
        b->cpl = read_cpl(v);
        b->low = b->cpl == 3 ? 3 : 1;
        /* The emulator keeps blocks of other privilege and of system management apart, but not those of paging. Paging
         * goes off without an instruction at an interrupt of system management; what turns it on are instructions that
         * `decode` knows, so that code before paging, a kernel that unpacks itself, is not looked at each time. */
        b->check |= v->mode == MODE_OFF;
        b->odd = b->check || b->marks || b->tag[1];
    }
    if (b->marks && recording && (uint32_t)backend_register(v->number, RAX) == MAGIC_MARK)
        emit(v, now, MARK, 0, (uint32_t)backend_register(v->number, RCX), 0);
}

static __attribute__((noinline)) void block_other(struct vcpu *v, struct block *b, uint64_t now)
{
    if (v->pending || !b->seen || !v->seen || (b->check && v->mode != MODE_OFF) || b->marks || now >= stream_limit)
        block_slow(v, now, b);
    v->cpl = b->cpl;
    v->low = b->low;
    if (((b->tag[0] | b->low) != v->fetch || b->tag[1]) && recording)
        fetch_slow(v, now, b);
}

/* What most blocks need, without a call: the rest is jumped to. */
static inline void block_begins(struct vcpu *v, struct block *b)
{
    uint64_t now = stream_clock;
    stream_clock = now + b->insns;
    v->begun = now;
    v->block = b;
    if (UNLIKELY(v->pending || b->odd || now >= stream_limit || (b->tag[0] | b->low) != v->fetch)) {
        block_other(v, b, now);
        return;
    }
    v->cpl = b->cpl;
    v->low = b->low;
}

static __attribute__((noinline)) void block_of_several(unsigned vcpu, struct block *b)
{
    running = that_runs(vcpu);
    block_begins(running, b);
}

static void on_block(unsigned vcpu, void *data)
{
    if (UNLIKELY(!alone))
        block_of_several(vcpu, data);
    else
        block_begins(alone, data);
}

static uint64_t code_gpa(const struct qemu_plugin_insn *insn)
{
    uint8_t *host = qemu_plugin_insn_haddr(insn);
    if (!ram)
        map_ram();
    return host && host >= ram && host < ram + (nframes << 12) ? (uint64_t)(host - ram) : NOWHERE;
}

/* An exception or an interrupt was delivered, or (raised) an exception is about to be. Where it came from is told rightly at
 * the delivery alone. An interrupt comes between blocks; an exception leaves its block, and what follows in it was not
 * executed. Nothing else runs between the two, so that the clock is still the block's. */
void core_delivered(unsigned vcpu, bool raised, uint64_t from)
{
    struct vcpu *v = that_runs(vcpu);
    const struct block *b = v->block;
    bool left = v->raised && !raised;
    v->raised = raised;
    if (!left || !b || stream_clock != v->begun + b->insns)
        return;
    for (uint32_t n = 0; n < b->insns - b->traps; n++)
        if (b->va[0] + b->at[n] == from)
            stream_clock = v->begun + n;
}

void core_translated(struct qemu_plugin_tb *tb)
{
    size_t count = qemu_plugin_tb_n_insns(tb), size = sizeof(struct block) + (tells_delivery ? 2 * count : 0);
    struct block *b = aligned_alloc(64, (size + 63) & ~(size_t)63);
    if (!b)
        fatal("no memory", "");
    memset(b, 0, sizeof *b);
    b->next = blocks;
    blocks = b;
    b->insns = count;
    b->odd = true;
    b->gpa[1] = NOWHERE;
    for (size_t n = 0; n < count; n++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, n);
        uint64_t va = qemu_plugin_insn_vaddr(insn), last = va + qemu_plugin_insn_size(insn) - 1;
        uint8_t bytes[16];
        size_t length = backend_bytes(insn, bytes);
        if (n == 0) {
            b->va[0] = va;
            b->tag[0] = va >> 12 << 2 | 1;
            b->gpa[0] = code_gpa(insn);
        }
        if (!b->tag[1] && last >> 12 != b->va[0] >> 12) {
            b->va[1] = va >> 12 == last >> 12 ? va : last & ~(uint64_t)4095;
            b->tag[1] = last >> 12 << 2 | 1;
            b->gpa[1] = va >> 12 == last >> 12 ? code_gpa(insn) : NOWHERE;
        }
        if (tells_delivery) {
            b->at[n] = va - b->va[0];
            b->traps = length && ((bytes[0] >= 0xCC && bytes[0] <= 0xCE) || bytes[0] == 0xF1);    /* INT3, INT, INTO, INT1 */
        }
        register_accesses(insn, (void *)(uintptr_t)n);
        struct op op;
        if (!decode(bytes, length, va, &op))
            continue;
        if (op.kind == OP_CPUID) {
            b->marks |= n == 0;
            continue;
        }
        struct kept_op *kept = malloc(sizeof *kept);
        if (!kept)
            fatal("no memory", "");
        *kept = (struct kept_op){ ops, op };
        ops = kept;
        qemu_plugin_register_vcpu_insn_exec_cb(insn, on_op, QEMU_PLUGIN_CB_NO_REGS, &kept->op);
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, backend_flags, b);
}

/* All blocks are forgotten. An operation that waits for its block outlives them. */
void core_forgotten(void)
{
    static struct op waiting[VCPUS_MAX];
    for (unsigned n = 0; n < vcpu_count; n++) {
        vcpus[n].block = NULL;
        if (vcpus[n].pending) {
            waiting[n] = *vcpus[n].pending;
            vcpus[n].pending = &waiting[n];
        }
    }
    while (blocks) {
        struct block *b = blocks;
        blocks = b->next;
        free(b);
    }
    while (ops) {
        struct kept_op *kept = ops;
        ops = kept->next;
        free(kept);
    }
}

/* Arguments: ram=PATH, frames=N, fd=N; filter=PAGES, instructions=N. */
int core_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    uint64_t pages = 512;
    if (!info->system_emulation || strcmp(info->target_name, "x86_64") != 0)
        fatal("qemu-system-x86_64 is needed, not ", info->target_name);
    for (int n = 0; n < argc; n++) {
        char *value = strchr(argv[n], '=');
        if (!value)
            fatal("NAME=VALUE expected, not ", argv[n]);
        *value++ = 0;
        uint64_t number = strtoull(value, NULL, 0);
        if (!strcmp(argv[n], "ram"))
            ram_path = value;
        else if (!strcmp(argv[n], "frames"))
            nframes = number;
        else if (!strcmp(argv[n], "fd"))
            stream_open(number);
        else if (!strcmp(argv[n], "filter"))
            pages = number;
        else if (!strcmp(argv[n], "instructions"))
            stream_limit = number ? number : UINT64_MAX;
        else
            fatal("there is no option ", argv[n]);
    }
    if (!ram_path || !nframes)
        fatal("ram, frames and fd are needed", "");
    interface_version = info->version.cur;
    vcpu_count = info->system.max_vcpus;
    if (vcpu_count > VCPUS_MAX)
        fatal("256 processors at most are needed", "");
    vcpus = calloc(vcpu_count, sizeof *vcpus);
    for (unsigned n = 0; vcpus && n < vcpu_count; n++) {
        vcpus[n].number = n;
        vcpus[n].cr0 = 0x60000010;
    }
    if (!vcpus)
        fatal("no memory", "");
    if (vcpu_count == 1)
        alone = running = vcpus;
    filter_install(pages);
    tables_install();
    backend_install(info);
    events_install(id);
    return 0;
}
