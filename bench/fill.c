/* What Unicorn calls where its TLB misses, for bench_fill.py: a translation by the engine, and none. */
#include <shadowcore.h>
#include <stdbool.h>

struct entry {                          /* uc_tlb_entry of unicorn.h */
    uint64_t paddr;
    uint32_t perms;                     /* UC_PROT_*: 1 read, 2 write, 4 execute */
};

enum { FILL_READ = 16, FILL_WRITE = 17, FILL_FETCH = 18 };              /* uc_mem_type */

struct machine {
    const sc_api *api;
    sc_vm vm;
    uint64_t offset;                    /* of `nothing`: gpa - linear address */
    uint64_t fills;
};

bool engine(void *uc, uint64_t address, int type, struct entry *entry, void *data);
bool engine(void *uc, uint64_t address, int type, struct entry *entry, void *data)
{
    struct machine *machine = data;
    sc_access access;
    sc_outcome outcome;
    (void)uc;
    SC_INIT(&access);
    SC_INIT(&outcome);
    access.gva = address;
    access.kind = type == FILL_WRITE ? SC_WRITE : type == FILL_FETCH ? SC_FETCH : SC_READ;
    access.size = 1;
    access.user = 1;
    access.flags = SC_BRIEF;
    if (machine->api->access(machine->vm, &access, &outcome) != SC_OK)
        return false;
    machine->fills++;
    entry->paddr = outcome.gpa & ~UINT64_C(4095);
    entry->perms = type == FILL_WRITE ? 3 : type == FILL_FETCH ? 4 : 1; /* what was asked for; a store asks again */
    return true;
}

bool nothing(void *uc, uint64_t address, int type, struct entry *entry, void *data);
bool nothing(void *uc, uint64_t address, int type, struct entry *entry, void *data)
{
    struct machine *machine = data;
    (void)uc;
    (void)type;
    machine->fills++;
    entry->paddr = (address & ~UINT64_C(4095)) + machine->offset;
    entry->perms = 7;
    return true;
}
