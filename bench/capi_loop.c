/* Loops over the table of functions, and over nothing, for bench_capi.py. */
#include <shadowcore.h>

int table_loop(const sc_api *api, sc_vm vm, const uint64_t *gva, uint64_t n, unsigned flags, uint64_t *gpa);
int table_loop(const sc_api *api, sc_vm vm, const uint64_t *gva, uint64_t n, unsigned flags, uint64_t *gpa) {
    sc_access access;
    sc_outcome outcome;
    uint64_t i;
    SC_INIT(&access);
    SC_INIT(&outcome);
    access.kind = SC_READ;
    access.size = 8;
    access.user = 1;
    access.flags = (uint8_t)flags;
    for (i = 0; i < n; i++) {
        access.gva = gva[i];
        if (api->access(vm, &access, &outcome) != SC_OK)
            return -1;
        gpa[i] = outcome.gpa;
    }
    return 0;
}

int many(const sc_api *api, sc_vm vm, const uint64_t *gva, uint64_t n, uint64_t *gpa);
int many(const sc_api *api, sc_vm vm, const uint64_t *gva, uint64_t n, uint64_t *gpa) {
    sc_accesses accesses;
    SC_INIT(&accesses);
    accesses.count = n;
    accesses.gva = gva;
    accesses.all_kind = SC_READ;
    accesses.all_size = 8;
    accesses.all_user = 1;
    accesses.gpa = gpa;
    return api->access_many(vm, &accesses);
}

/* The engine's own path, one access: what a Cython consumer calls (struct op and result opaque here). */
typedef int (*access_function)(void *mmu, void *vcpu, const void *op, int data, void *result);

struct op { /* access.pxd: sc_op */
    uint8_t op, user, size, vcpu;
    uint64_t addr, value[2], expected[2];
};
struct result { /* access.pxd: sc_result */
    uint64_t gpa, value[2];
    uint32_t error_code, exits;
    uint8_t outcome, emulated;
};

int engine_loop(void *function, void *mmu, void *vcpu, const uint64_t *gva, uint64_t n, uint64_t *gpa);
int engine_loop(void *function, void *mmu, void *vcpu, const uint64_t *gva, uint64_t n, uint64_t *gpa) {
    access_function access;
    struct op op = {0, 1, 8, 0, 0, {0, 0}, {0, 0}};
    struct result result;
    uint64_t i;
    memcpy(&access, &function, sizeof access);
    for (i = 0; i < n; i++) {
        op.addr = gva[i];
        if (access(mmu, vcpu, &op, 0, &result))
            return -1;
        gpa[i] = result.gpa;
    }
    return 0;
}

int price(const sc_api *api, sc_vm vm);
int price(const sc_api *api, sc_vm vm) {
    sc_prices prices;
    SC_INIT(&prices);
    return api->prices("modern", &prices) == SC_OK ? api->set_prices(vm, &prices) : -1;
}

/* An event is counted, and that is all. */
static void counted(void *context, const sc_event *event) {
    (void)event;
    ++*(uint64_t *)context;
}

int watch(const sc_api *api, sc_vm vm, uint32_t mask, uint64_t *count);
int watch(const sc_api *api, sc_vm vm, uint32_t mask, uint64_t *count) {
    return api->on_event(vm, mask, counted, count);
}
