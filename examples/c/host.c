/*
 * A host program that embeds Python for the engine's sake: it has the guest's memory, and asks where accesses lead.
 *
 * The guest: 16 MiB of RAM, 4-level tables in its first frames, and 512 pages mapped at 4 MiB. It reads and writes them,
 * edits an entry of its own tables, and switches between two address spaces.
 */
#define SHADOWCORE_PYTHON
#include <shadowcore.h>
#include <stdio.h>
#include <stdlib.h>

#define PAGE 4096u
#define RAM (16u << 20)
#define DATA 0x400000u /* gpa and gva of the data */
#define PAGES 512u
#define TABLES_AT 0x7f0000000000u /* gva at which the kernel sees the leaf table of the first address space */

static _Alignas(4096) unsigned char ram[RAM];

static const sc_api *api;

/* Where a call must succeed. */
static void must(int rc, const char *what) {
    if (rc == SC_OK)
        return;
    fprintf(stderr, "%s: %d: %s\n", what, rc, rc < 0 ? api->last_error() : "a fault of the guest");
    exit(1);
}

/* Tables in the frames from `first` on, that map the data and, for the kernel, their own leaf table. */
static void make_tables(sc_vm vm, uint64_t first, sc_tables *tables) {
    sc_mapping mapping;
    sc_entry leaf;
    SC_INIT(tables);
    tables->mode = SC_TABLES_64;
    tables->next_gfn = first;
    tables->frames = 8;
    SC_INIT(&mapping);
    mapping.gva = mapping.gpa = DATA;
    mapping.size = PAGES * PAGE;
    mapping.page_size = PAGE;
    mapping.rights = SC_RIGHT_WRITE | SC_RIGHT_USER | SC_RIGHT_EXECUTE;
    mapping.accessed = mapping.dirty = 1;
    must(api->tables_map(vm, tables, &mapping), "tables_map");
    SC_INIT(&leaf);
    leaf.level = 1;
    must(api->tables_entry(vm, tables, DATA, &leaf), "tables_entry");
    mapping.gva = TABLES_AT;
    mapping.gpa = leaf.gpa & ~(uint64_t)(PAGE - 1);
    mapping.size = PAGE;
    mapping.rights = SC_RIGHT_WRITE;
    must(api->tables_map(vm, tables, &mapping), "tables_map");
}

static void count_event(void *context, const sc_event *event) {
    ((unsigned *)context)[event->kind]++;
}

static int access_at(sc_vm vm, unsigned kind, uint64_t gva, uint64_t value, sc_outcome *outcome) {
    sc_access access;
    SC_INIT(&access);
    SC_INIT(outcome);
    access.gva = gva;
    access.kind = (uint8_t)kind;
    access.size = 8;
    access.user = gva < TABLES_AT;
    access.flags = SC_DATA;
    access.value[0] = value;
    return api->access(vm, &access, outcome);
}

static void run(const char *path) {
    unsigned events[SC_EVENTS] = {0};
    sc_config config;
    sc_tables first, second;
    sc_outcome outcome;
    sc_counters counters;
    sc_audit_result audit;
    sc_accesses many;
    sc_vm vm, again;
    static uint64_t gva[PAGES], gpa[PAGES];
    static uint8_t what[PAGES];
    unsigned i;

    SC_INIT(&config);
    config.design = SC_CACHED;
    config.memory = ram;
    config.memory_size = RAM;
    config.pool_pages = 64;
    must(api->vm_create(&config, &vm), "vm_create");
    make_tables(vm, 1, &first);
    make_tables(vm, 16, &second);
    must(api->on_event(vm, SC_EVENT_MASK(SC_EVENT_EXIT) | SC_EVENT_MASK(SC_EVENT_ZAP), count_event, events), "on_event");
    must(api->tables_activate(vm, 0, &first), "tables_activate");

    /* One by one. The first access of a page takes an exit, the second none. */
    must(access_at(vm, SC_WRITE, DATA + 0x18, 42, &outcome), "store");
    printf("store: gpa %#llx, %u exit, page of %u bytes\n", (unsigned long long)outcome.gpa, outcome.exits,
           1u << outcome.page_shift);
    must(access_at(vm, SC_READ, DATA + 0x18, 0, &outcome), "load");
    printf("load: %llu, %u exits, at host address ram + %#lx\n", (unsigned long long)outcome.value[0], outcome.exits,
           (unsigned long)((unsigned char *)outcome.host - ram));

    /* Many at once. */
    for (i = 0; i < PAGES; i++)
        gva[i] = DATA + i * PAGE + 8 * i;
    SC_INIT(&many);
    many.count = PAGES;
    many.gva = gva;
    many.all_kind = SC_READ;
    many.all_size = 8;
    many.all_user = 1;
    many.gpa = gpa;
    many.outcome = what;
    must(api->access_many(vm, &many), "access_many");
    for (i = 0; i < PAGES; i++)
        if (what[i] != SC_OK || gpa[i] != gva[i])
            exit(1);

    /* The guest takes a page away: a store to its own table, which is write-protected and therefore emulated. */
    must(access_at(vm, SC_WRITE, TABLES_AT + 8 * 5, 0, &outcome), "store to a table");
    printf("store to a table: emulated %u\n", outcome.emulated);
    if (access_at(vm, SC_READ, DATA + 5 * PAGE, 0, &outcome) != SC_PAGE_FAULT)
        exit(1);
    printf("page fault, error code %#x\n", outcome.error_code);

    /* Another address space, and back: the shadow of the first is still there. */
    must(api->register_load(vm, 0, SC_CR3, second.root), "cr3");
    must(access_at(vm, SC_READ, DATA + 5 * PAGE, 0, &outcome), "load");
    must(api->register_load(vm, 0, SC_CR3, first.root), "cr3");
    must(access_at(vm, SC_READ, DATA + 6 * PAGE, 0, &outcome), "load");
    printf("back in the first address space: %u exits\n", outcome.exits);

    SC_INIT(&audit);
    must(api->audit(vm, &audit), "audit");
    printf("audit: %u violations, %llu entries\n", audit.violations, (unsigned long long)audit.sptes);
    SC_INIT(&counters);
    must(api->counters(vm, &counters), "counters");
    printf("exits: %llu fill, %llu cr3; %u exits told as events\n", (unsigned long long)counters.exits[SC_EXIT_FILL],
           (unsigned long long)counters.exits[SC_EXIT_CR3], events[SC_EVENT_EXIT]);

    must(api->save(vm, path), "save");
    must(api->vm_destroy(vm), "vm_destroy");
    must(api->vm_load(path, NULL, 0, &again), "vm_load");
    must(access_at(again, SC_READ, DATA + 0x18, 0, &outcome), "load");
    printf("loaded again: %llu, %u exits\n", (unsigned long long)outcome.value[0], outcome.exits);
    must(api->vm_destroy(again), "vm_destroy");
    if (api->vm_destroy(again) != SC_E_HANDLE)
        exit(1);
}

int main(int argc, char **argv) {
    PyThreadState *state;
    if (argc != 2) {
        fprintf(stderr, "usage: host FILE (to save the VM in)\n");
        return 2;
    }
    Py_Initialize();
    api = shadowcore_import();
    if (api == NULL) {
        PyErr_Print();
        return 1;
    }
    /* From here on no GIL is held; the functions that need it take it. */
    state = PyEval_SaveThread();
    run(argv[1]);
    PyEval_RestoreThread(state);
    return Py_FinalizeEx() == 0 ? 0 : 1;
}
