/* The loops that the engine is measured against: what C does for the same work, with nothing around it.
 *
 * Written for these benchmarks, from the architecture's rules; it shares no code with the engine. Built when a
 * benchmark runs (yardsticks.py), for the same instruction set as a wheel.
 *
 *   walk_batch  one page walk per address over a flat array: every level, reserved bits, rights, error codes,
 *               accessed and dirty bits.
 *   nested_batch   the same in two dimensions: each address of the walk, and what it comes to, is translated by host
 *               tables of 4 levels.
 *   hit_batch   one check of a direct-mapped cache of translations per operation; a miss walks and refills.
 *   compare_tables   for each pair of a guest's table and its shadow, whether frame and rights of each entry agree.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LIKELY(x) __builtin_expect(!!(x), 1)

enum { P = 1, PS_SHIFT = 7, A = 1 << 5, D = 1 << 6 };            /* bits of an entry */
enum { X = 1, W = 2, U = 4 };                                    /* rights: X is bit 63 inverted */
enum { CODE_P = 1, CODE_W = 2, CODE_U = 4, CODE_RSVD = 8, CODE_I = 16 };
enum { DONE = 0, PAGE_FAULT = 1, GENERAL_PROTECTION = 2, MMIO = 3 };
#define NX (UINT64_C(1) << 63)
#define ADDRESS UINT64_C(0x000FFFFFFFFFF000)

/* yardsticks.py has the same structure. */
struct paging {
    uint8_t *ram;                   /* guest RAM from gpa 0 */
    uint64_t size;                  /* its bytes */
    uint64_t root;                  /* gpa of the top table */
    uint64_t pdpte[4];              /* PAE: its root entries, cached */
    uint64_t reserved[2][6];        /* bits that must be 0, by [PS bit][level] */
    uint32_t large_levels;          /* bit L: PS makes an entry of level L a leaf */
    uint32_t levels;                /* 2, 3 (PAE), 4 or 5 */
    uint8_t forbidden[8][32];       /* by [rights][access]: not 0 where the access is refused */
};

struct translation {                /* entry of the direct-mapped cache */
    uint64_t tag[3];                /* load, store, fetch: page | user, or -1 */
    uint64_t offset;                /* gpa - linear address */
};

/* Walk `va` for `access` (CODE_W, CODE_U, CODE_I). */
INLINE int walk(const struct paging *p, uint64_t va, uint32_t access, uint64_t *gpa, uint32_t *code, const int levels)
{
    const int entry_size = levels == 2 ? 4 : 8, bits = levels == 2 ? 10 : 9;
    const int unused = levels == 5 ? 7 : 16;
    uint8_t *slot[6];
    uint64_t entry, base = p->root, all = UINT64_MAX, mask;      /* all: AND of the entries, NX inverted */
    uint32_t rights;
    int level;
    const int top = levels == 3 ? 2 : levels;

    *gpa = UINT64_MAX;
    *code = 0;
    if (levels >= 4) {
        if (!LIKELY((uint64_t)((int64_t)(va << unused) >> unused) == va))
            return GENERAL_PROTECTION;
    } else {
        va = (uint32_t)va;
    }
    if (levels == 3) {
        base = p->pdpte[va >> 30];
        if (!LIKELY(base & P)) {
            *code = access;
            return PAGE_FAULT;
        }
        base &= ADDRESS;
    }
#pragma GCC unroll 5
    for (level = top; level >= 1; level--) {
        int ps;
        slot[level] = p->ram + base + (va >> (12 + bits * (level - 1)) & ((1u << bits) - 1)) * entry_size;
        if (!LIKELY(base < p->size)) {
            *code = access;
            return PAGE_FAULT;
        }
        entry = entry_size == 8 ? *(const uint64_t *)slot[level] : *(const uint32_t *)slot[level];
        if (!LIKELY(entry & P)) {
            *code = access;
            return PAGE_FAULT;
        }
        ps = entry >> PS_SHIFT & 1;
        if (!LIKELY(!(entry & p->reserved[ps][level]))) {
            *code = access | CODE_P | CODE_RSVD;
            return PAGE_FAULT;
        }
        all &= entry ^ NX;
        if (level == 1 || (ps && p->large_levels >> level & 1))
            break;
        base = entry & (entry_size == 8 ? ADDRESS : 0xFFFFF000u);
    }
    rights = (uint32_t)(all & (W | U)) | (uint32_t)(all >> 63);
    if (!LIKELY(!p->forbidden[rights][access])) {
        *code = access | CODE_P;
        return PAGE_FAULT;
    }
    mask = (UINT64_C(1) << (12 + bits * (level - 1))) - 1;
    if (entry_size == 8 || level == 1)
        *gpa = (entry & ADDRESS & ~mask) | (va & mask);
    else                            /* PSE-36 */
        *gpa = (entry & 0xFFC00000u) | (entry >> 13 & 0xFF) << 32 | (va & mask);
    if (!LIKELY(all & A && (entry & D || !(access & CODE_W)))) {
        *slot[level] |= access & CODE_W ? A | D : A;
        while (++level <= top)
            *slot[level] |= A;
    }
    return LIKELY(*gpa < p->size) ? DONE : MMIO;
}

#define WALKS(levels)                                                                                   \
    for (size_t i = 0; i < n; i++) {                                                                    \
        uint32_t fault;                                                                                 \
        outcome[i] = walk(p, va[i], access[i], &gpa[i], &fault, levels);                                \
        code[i] = fault;                                                                                \
    }

void walk_batch(const struct paging *p, const uint64_t *restrict va, const uint8_t *restrict access, size_t n,
                uint64_t *restrict gpa, uint8_t *restrict outcome, uint16_t *restrict code)
{
    if (p->levels == 4)
        WALKS(4)
    else if (p->levels == 3)
        WALKS(3)
    else if (p->levels == 2)
        WALKS(2)
    else
        WALKS(5)
}

/* yardsticks.py has the same structure. */
struct host {
    uint8_t *pool;                  /* the host's tables */
    uint64_t pool_hpa;              /* where they lie */
    uint64_t pool_size;
    uint64_t root;                  /* hpa of the top one */
    uint64_t ram_hpa;               /* of gpa 0 */
};

/* Walk the host's tables for `gpa`: the hpa, or all ones. */
INLINE uint64_t host_walk(const struct host *h, uint64_t gpa, uint32_t access)
{
    uint64_t *slot = NULL, entry = 0, base = h->root, mask;
    int level;

    if (!LIKELY(!(gpa >> 48)))
        return UINT64_MAX;
#pragma GCC unroll 4
    for (level = 4; level >= 1; level--) {
        if (!LIKELY(base - h->pool_hpa < h->pool_size))
            return UINT64_MAX;
        slot = (uint64_t *)(h->pool + (base - h->pool_hpa)) + (gpa >> (12 + 9 * (level - 1)) & 511);
        entry = *slot;
        if (!LIKELY(entry & P))
            return UINT64_MAX;
        if (level == 1 || (level <= 3 && entry >> PS_SHIFT & 1))
            break;
        base = entry & ADDRESS;
    }
    if (!LIKELY(!(access & CODE_W) || entry & W))
        return UINT64_MAX;
    if (!LIKELY(entry & A && (entry & D || !(access & CODE_W))))
        *slot |= access & CODE_W ? A | D : A;
    mask = (UINT64_C(1) << (12 + 9 * (level - 1))) - 1;
    return (entry & ADDRESS & ~mask) | (gpa & mask);
}

/* Walk `va` in two dimensions, 4 levels on 4; tables are read as stores. */
INLINE int nested(const struct paging *p, const struct host *h, uint64_t va, uint32_t access, uint64_t *gpa,
                  uint32_t *code)
{
    uint64_t *slot[5];
    uint64_t entry = 0, base = p->root, all = UINT64_MAX, mask, hpa;
    uint32_t rights;
    int level;

    *gpa = UINT64_MAX;
    *code = 0;
    if (!LIKELY((uint64_t)((int64_t)(va << 16) >> 16) == va))
        return GENERAL_PROTECTION;
#pragma GCC unroll 4
    for (level = 4; level >= 1; level--) {
        int ps;
        hpa = host_walk(h, base + (va >> (12 + 9 * (level - 1)) & 511) * 8, CODE_W);
        if (!LIKELY(hpa != UINT64_MAX))
            return MMIO;
        slot[level] = (uint64_t *)(p->ram + (hpa - h->ram_hpa));
        entry = *slot[level];
        if (!LIKELY(entry & P)) {
            *code = access;
            return PAGE_FAULT;
        }
        ps = entry >> PS_SHIFT & 1;
        if (!LIKELY(!(entry & p->reserved[ps][level]))) {
            *code = access | CODE_P | CODE_RSVD;
            return PAGE_FAULT;
        }
        all &= entry ^ NX;
        if (level == 1 || (ps && p->large_levels >> level & 1))
            break;
        base = entry & ADDRESS;
    }
    rights = (uint32_t)(all & (W | U)) | (uint32_t)(all >> 63);
    if (!LIKELY(!p->forbidden[rights][access])) {
        *code = access | CODE_P;
        return PAGE_FAULT;
    }
    mask = (UINT64_C(1) << (12 + 9 * (level - 1))) - 1;
    *gpa = (entry & ADDRESS & ~mask) | (va & mask);
    if (!LIKELY(all & A && (entry & D || !(access & CODE_W)))) {
        *slot[level] |= access & CODE_W ? A | D : A;
        while (++level <= 4)
            *slot[level] |= A;
    }
    return LIKELY(host_walk(h, *gpa, access & CODE_W) != UINT64_MAX) ? DONE : MMIO;
}

void nested_batch(const struct paging *p, const struct host *h, const uint64_t *restrict va,
                  const uint8_t *restrict access, size_t n, uint64_t *restrict gpa, uint8_t *restrict outcome,
                  uint16_t *restrict code)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t fault;
        outcome[i] = nested(p, h, va[i], access[i], &gpa[i], &fault);
        code[i] = fault;
    }
}

INLINE size_t check(const struct paging *p, struct translation *restrict cache, size_t entries,
                    const uint8_t *restrict ops, size_t n, uint64_t *restrict gpa, uint8_t *restrict outcome,
                    const size_t stride, const size_t addr)
{
    size_t misses = 0;
    for (size_t i = 0; i < n; i++, ops += stride) {
        static const uint8_t access_of[3] = {0, CODE_W, CODE_I};
        uint32_t op = ops[0], user = ops[1], size = ops[2], code;
        uint64_t va, page;
        struct translation *t;
        memcpy(&va, ops + addr, 8);
        page = va & ~UINT64_C(4095);
        t = &cache[va >> 12 & (entries - 1)];
        if (LIKELY(t->tag[op] == (page | user) && (va & 4095) + size <= 4096)) {
            gpa[i] = va + t->offset;
            outcome[i] = DONE;
            continue;
        }
        misses++;
        outcome[i] = walk(p, va, access_of[op] | (user ? CODE_U : 0), &gpa[i], &code, 4);
        if (outcome[i] == DONE) {
            if ((t->tag[0] & ~UINT64_C(4095)) != page)
                memset(t->tag, 0xFF, sizeof t->tag);
            t->tag[op] = page | user;
            t->offset = gpa[i] - va;
        }
    }
    return misses;
}

/* Operations as shadowcore.OP_DTYPE lays them out, packed (19 bytes) or aligned (24): op, user, size (a byte each), addr,
 * value (8 bytes each). 4-level paging; `cache` has a power of two of entries. Returns the number of misses. */
size_t hit_batch(const struct paging *p, struct translation *restrict cache, size_t entries,
                 const uint8_t *restrict ops, size_t n, uint64_t *restrict gpa, uint8_t *restrict outcome,
                 size_t stride)
{
    return stride == 19 ? check(p, cache, entries, ops, n, gpa, outcome, 19, 3)
                        : check(p, cache, entries, ops, n, gpa, outcome, 24, 8);
}

/* n entries of 8 bytes of guest tables, and of their shadows: how many of the latter are not what the former say. A shadow
 * is writable once the guest's entry is dirty. */
size_t compare_tables(const uint64_t *restrict guest, const uint64_t *restrict shadow, size_t n)
{
    const uint64_t looked_at = ADDRESS | NX | P | W | U;
    size_t differ = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t entry = guest[i];
        if (!(entry & P) || !(entry & A))
            entry = 0;
        else if (!(entry & D))
            entry &= ~(uint64_t)W;
        differ += ((entry ^ shadow[i]) & looked_at) != 0;
    }
    return differ;
}
