/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames that serve as paging structures: which, as what, and until when.
 *
 * A frame serves at a level from the moment that a CR3 names it (a root), or that an entry of a table one level above
 * links it, until no entry links it any more. What a processor does not tell is when a root ceases to be one. A root
 * ends when no processor has it loaded and it has no present entry, or is written in pieces smaller than an entry, or
 * by more stores than a table that is being cleared gets, or when ROOTS_MAX others have been loaded since.
 *
 * Stores to frames that ceased to serve are recorded for a while: guests clear tables late.
 */
#include <stdlib.h>
#include <string.h>

#include "recorder.h"

#define ROOTS_MAX 1024
#define IDLE_STORES 1024        /* to a root since it was loaded last */
#define LATE_STORES 64
#define PRESENT 1u
#define USER_PAGE 4u
#define LARGE 0x80u
#define ADDRESS 0x000FFFFFFFFFF000u

struct table {
    struct table *next;         /* of the same frame, at another level */
    struct table *older, *newer;        /* roots, by the time when they were loaded last */
    uint64_t gfn;
    uint8_t level;
    bool root;
    uint32_t links;             /* entries that link it */
    uint32_t loaded;            /* processors that have it in CR3 */
    uint32_t idle_stores;
    uint64_t groups[2];         /* of PAE roots: which of the frame's 128 groups of four entries a CR3 has named */
    uint64_t words[512];        /* as they were when they were last looked at */
    uint64_t linked[16];        /* entries that are followed, one bit each */
};

uint8_t *watched;
static uint8_t *late_left, *late_level;
static struct table **tables;   /* by frame */
static struct table *oldest, *newest;
static unsigned roots;
static enum mode mode;          /* of all tables */

static const uint8_t top_level[] = { [MODE_32] = 2, [MODE_PAE] = 3, [MODE_64] = 4, [MODE_LA57] = 5 };

static void end_table(struct vcpu *v, uint64_t now, struct table *t);

void tables_install(void)
{
    watched = calloc(nframes + 1, 1);
    late_left = calloc(nframes, 1);
    late_level = calloc(nframes, 1);
    tables = calloc(nframes, sizeof *tables);
    if (!watched || !late_left || !late_level || !tables)
        fatal("no memory", "");
}

enum mode mode_of(const struct vcpu *v)
{
    if (!(v->cr0 >> 31 & 1))
        return MODE_OFF;
    if (v->efer >> 10 & 1)
        return v->cr4 >> 12 & 1 ? MODE_LA57 : MODE_64;
    return v->cr4 >> 5 & 1 ? MODE_PAE : MODE_32;
}

static uint64_t word_at(uint64_t gpa)
{
    return gpa >> 12 < nframes ? __atomic_load_n((uint64_t *)(ram + (gpa & ~(uint64_t)7)), __ATOMIC_RELAXED) : 0;
}

static unsigned entry_count(void)
{
    return mode == MODE_32 ? 1024 : 512;
}

static uint64_t entry_of(const uint64_t *words, unsigned n)
{
    return mode == MODE_32 ? (uint32_t)(words[n >> 1] >> (32 * (n & 1))) : words[n];
}

static bool is_leaf(enum mode m, uint64_t cr4, unsigned level, uint64_t entry)
{
    if (level == 1)
        return true;
    if (!(entry & LARGE))
        return false;
    if (level == 2)
        return m != MODE_32 || cr4 >> 4 & 1;
    return level == 3 && m >= MODE_64;
}

/* The frame that an entry links as a table, or NOWHERE. */
static uint64_t linked_frame(const struct vcpu *v, unsigned level, uint64_t entry)
{
    uint64_t gfn = (entry & (mode == MODE_32 ? 0xFFFFF000u : ADDRESS)) >> 12;
    bool links = entry & PRESENT && !is_leaf(mode, v->cr4, level, entry) && gfn < nframes;
    return links ? gfn : NOWHERE;
}

static bool is_pae_root(unsigned level)
{
    return mode == MODE_PAE && level == 3;
}

/* Whether entry n has a meaning: of the frame of a PAE root, four entries for each CR3 have; the rest is anything. */
static bool has_meaning(const struct table *t, unsigned n)
{
    return !is_pae_root(t->level) || t->groups[n >> 8] >> (n >> 2 & 63) & 1;
}

/* A PAE root entry, but for the accessed bit, has bits 1, 2, 5 to 8 and 52 to 63 clear (SDM vol. 3, 4.4.1). */
static bool is_pae_root_entry(uint64_t word)
{
    return word & PRESENT && !(word & 0xFFF00000000001C6u);
}

/* A word as it is recorded. The emulator sets the accessed bit in PAE root entries, where it is reserved. */
static uint64_t recorded(unsigned level, uint64_t word)
{
    return is_pae_root(level) && is_pae_root_entry(word) ? word & ~(uint64_t)0x20 : word;
}

static struct table *find(uint64_t gfn, unsigned level)
{
    struct table *t = tables[gfn];
    while (t && t->level != level)
        t = t->next;
    return t;
}

static void unlist_root(struct table *t)
{
    *(t->older ? &t->older->newer : &oldest) = t->newer;
    *(t->newer ? &t->newer->older : &newest) = t->older;
    roots--;
}

static void list_root(struct table *t)
{
    t->older = newest;
    t->newer = NULL;
    *(newest ? &newest->newer : &oldest) = t;
    newest = t;
    roots++;
}

static void link_entry(struct vcpu *v, uint64_t now, struct table *t, unsigned n);

/* The frame serves from here on: its contents. */
static void tell_contents(struct vcpu *v, uint64_t now, struct table *t)
{
    emit(v, now, TABLE, t->level | (t->root ? TABLE_ROOT : 0), t->gfn << 12, 0);
    for (unsigned n = 0; n < 512; n++) {
        t->words[n] = word_at((t->gfn << 12) + 8 * n);
        if (t->words[n] && has_meaning(t, n))
            emit(v, now, STORE, t->level | STORE_SNAPSHOT, (t->gfn << 12) + 8 * n, recorded(t->level, t->words[n]));
    }
}

static struct table *begin_table(struct vcpu *v, uint64_t now, uint64_t gfn, unsigned level, bool root)
{
    struct table *t = calloc(1, sizeof *t);
    if (!t)
        fatal("no memory", "");
    t->gfn = gfn;
    t->level = level;
    t->root = root;
    t->next = tables[gfn];
    tables[gfn] = t;
    watched[gfn] = WATCH_TABLE;
    filter_watch();
    if (root) {
        list_root(t);
        return t;               /* and the caller goes on */
    }
    tell_contents(v, now, t);
    if (level > 1)
        for (unsigned n = 0; n < entry_count(); n++)
            link_entry(v, now, t, n);
    return t;
}

static void link_entry(struct vcpu *v, uint64_t now, struct table *t, unsigned n)
{
    if (t->linked[n >> 6] >> (n & 63) & 1 || !has_meaning(t, n))
        return;
    uint64_t gfn = linked_frame(v, t->level, entry_of(t->words, n));
    if (gfn == NOWHERE)
        return;
    t->linked[n >> 6] |= (uint64_t)1 << (n & 63);
    struct table *child = find(gfn, t->level - 1);
    if (!child)
        child = begin_table(v, now, gfn, t->level - 1, false);
    child->links++;
}

static void unlink_entry(struct vcpu *v, uint64_t now, struct table *t, unsigned n, uint64_t entry)
{
    if (!(t->linked[n >> 6] >> (n & 63) & 1))
        return;
    t->linked[n >> 6] &= ~((uint64_t)1 << (n & 63));
    struct table *child = find((entry & (mode == MODE_32 ? 0xFFFFF000u : ADDRESS)) >> 12, t->level - 1);
    if (child && child->links && --child->links == 0 && !child->root)
        end_table(v, now, child);
}

static void end_table(struct vcpu *v, uint64_t now, struct table *t)
{
    struct table **at = &tables[t->gfn];
    while (*at != t)
        at = &(*at)->next;
    *at = t->next;
    if (t->root)
        unlist_root(t);
    if (!tables[t->gfn]) {
        watched[t->gfn] = WATCH_LATE;
        late_left[t->gfn] = LATE_STORES;
        late_level[t->gfn] = t->level;
    }
    emit(v, now, TABLE_END, t->level, t->gfn << 12, 0);
    if (t->level > 1)
        for (unsigned n = 0; n < entry_count(); n++)
            unlink_entry(v, now, t, n, entry_of(t->words, n));
    free(t);
}

/* No processor walks from it any more, as far as one can tell. */
static void end_root(struct vcpu *v, uint64_t now, struct table *t)
{
    if (t->links) {
        t->root = false;
        unlist_root(t);
    } else {
        end_table(v, now, t);
    }
}

/* Another mode of paging begins: the tables of the one before are none any more. */
static void change_mode(struct vcpu *v, uint64_t now, enum mode to)
{
    for (unsigned n = 0; n < vcpu_count; n++)
        vcpus[n].root = NULL;
    while (oldest) {
        oldest->links = 0;
        end_table(v, now, oldest);
    }
    for (uint64_t gfn = 0; gfn < nframes; gfn++)
        while (tables[gfn])
            end_table(v, now, tables[gfn]);
    mode = to;
}

/* CR3 or the mode of paging has changed: what the processor walks from now on serves as a table. */
void tables_root(struct vcpu *v, uint64_t now)
{
    struct table *before = v->root;
    v->root = NULL;
    if (before)
        before->loaded--;
    if (v->mode == MODE_OFF)
        return;
    if (v->mode != mode)
        change_mode(v, now, v->mode);
    uint64_t gfn = (v->cr3 & (mode >= MODE_64 ? ADDRESS : 0xFFFFF000u)) >> 12;
    if (gfn >= nframes)
        return;
    struct table *t = find(gfn, top_level[mode]);
    bool told = t != NULL;
    if (!t)
        t = begin_table(v, now, gfn, top_level[mode], true);
    else if (t->root)
        unlist_root(t), list_root(t);
    else
        t->root = true, list_root(t);
    t->loaded++;
    t->idle_stores = 0;
    v->root = t;
    uint64_t *group = &t->groups[v->cr3 >> 11 & 1], bit = (uint64_t)1 << (v->cr3 >> 5 & 63);
    if (mode == MODE_PAE && !(*group & bit)) {
        *group |= bit;
        told = false;
    }
    if (!told)
        tell_contents(v, now, t);
    for (unsigned n = 0; n < entry_count(); n++)    /* those that were stored while it was not loaded as well */
        link_entry(v, now, t, n);
    for (struct table *old = oldest; old && roots > ROOTS_MAX;) {
        struct table *newer = old->newer;
        if (!old->loaded)
            end_root(v, now, old);
        old = newer;
    }
}

static bool has_present(const struct table *t)
{
    for (unsigned n = 0; n < entry_count(); n++)
        if (entry_of(t->words, n) & PRESENT && has_meaning(t, n))
            return true;
    return false;
}

/* The links of word n of a table become those of `word`. New ones first, so that what only moves goes on serving. */
static void update(struct vcpu *v, uint64_t now, struct table *t, unsigned n, uint64_t word, uint64_t *before)
{
    *before = t->words[n];
    t->words[n] = word;
    if (t->level == 1)
        return;
    unsigned each = mode == MODE_32 ? 2 : 1;
    for (unsigned i = each * n; i < each * (n + 1); i++) {
        uint64_t old = entry_of(before, each == 2 ? i & 1 : 0), new = entry_of(t->words, i);
        if (linked_frame(v, t->level, old) == linked_frame(v, t->level, new))
            continue;
        bool was = t->linked[i >> 6] >> (i & 63) & 1;
        t->linked[i >> 6] &= ~((uint64_t)1 << (i & 63));
        /* A root that is not loaded may be one no more, and what is stored there no links: see tables_root. */
        if (!t->root || t->loaded || t->links)
            link_entry(v, now, t, i);
        if (was) {
            struct table *child = find(linked_frame(v, t->level, old), t->level - 1);
            if (child)
                child->links--; /* and it ends after the store */
        }
    }
}

static void end_unlinked(struct vcpu *v, uint64_t now, unsigned level, uint64_t before)
{
    unsigned each = mode == MODE_32 ? 2 : 1;
    for (unsigned i = 0; i < each; i++) {
        uint64_t gfn = linked_frame(v, level, entry_of(&before, i));
        struct table *child = gfn == NOWHERE || level == 1 ? NULL : find(gfn, level - 1);
        if (child && !child->links && !child->root)
            end_table(v, now, child);
    }
}

/* Four entries of a PAE root's frame, when no CR3 names them and something else is stored there: they are none any more.
 * Small objects of the guest's kernel lie around them. */
static void forget_group(struct vcpu *v, uint64_t now, struct table *t, unsigned n, uint64_t word)
{
    for (unsigned i = 0; i < vcpu_count; i++)
        if (vcpus[i].root == t && (vcpus[i].cr3 >> 5 & 127) == n >> 2)
            return;
    if (!word || is_pae_root_entry(word))
        return;
    for (unsigned i = n & ~3u; i < (n | 3) + 1; i++)
        unlink_entry(v, now, t, i, entry_of(t->words, i));
    t->groups[n >> 8] &= ~((uint64_t)1 << (n >> 2 & 63));
}

/* A store to one aligned word of a frame that serves, or lately did: [gpa, gpa + size), at the linear address va. */
static void store(struct vcpu *v, uint64_t now, uint64_t va, uint64_t gpa, unsigned size, unsigned flags)
{
    uint64_t gfn = gpa >> 12, word = word_at(gpa), before[6] = { 0 };
    unsigned n = gpa >> 3 & 511, length = size == 8 ? 0 : size << 4, level = 0;
    bool loaded = false;
    struct table *only = tables[gfn];
    if (only && !only->next && is_pae_root(only->level)) {
        if (has_meaning(only, n))
            forget_group(v, now, only, n, word);
        if (!has_meaning(only, n))
            return;
    }
    for (struct table *t = tables[gfn]; t; t = t->next) {
        update(v, now, t, n, word, &before[t->level]);
        level = t->level > level ? t->level : level;
        loaded |= t->loaded || t->links;
    }
    emit(v, now, ACCESS, flags | ACCESS_WRITE, va, gpa);
    emit(v, now, STORE, (level ? level : late_level[gfn] | STORE_SNAPSHOT) | length, gpa,
         recorded(level ? level : late_level[gfn], word));
    if (!level) {
        if (!--late_left[gfn])
            watched[gfn] = WATCH_NOT;
        return;
    }
    for (unsigned l = 2; l <= level; l++)
        if (find(gfn, l))
            end_unlinked(v, now, l, before[l]);
    if (loaded)
        return;
    struct table *t = find(gfn, top_level[mode]);
    if (t && (++t->idle_stores > IDLE_STORES || size < (mode == MODE_32 ? 4 : 8) || !has_present(t)))
        end_root(v, now, t);
}

void tables_store(struct vcpu *v, uint64_t now, uint64_t va, uint64_t gpa, unsigned size, unsigned flags)
{
    while (size) {
        unsigned part = 8 - (gpa & 7) < size ? 8 - (gpa & 7) : size;
        while (part & (part - 1))       /* 1, 2, 4 or 8 bytes */
            part &= part - 1;
        if (!watched[gpa >> 12])
            return;
        store(v, now, va, gpa, part, flags);
        va += part;
        gpa += part;
        size -= part;
    }
}

/* Where a linear address leads by the guest's tables, whether user code may use it, and how many bytes one translation
 * covers. False where it leads nowhere, with the span of the entry that says so. */
bool walk(const struct vcpu *v, uint64_t va, uint64_t *gpa, bool *user, uint64_t *span)
{
    *user = true;
    *span = 4096;
    *gpa = va;
    if (v->mode == MODE_OFF)
        return true;
    bool narrow = v->mode == MODE_32;
    unsigned bits = narrow ? 10 : 9, level = top_level[v->mode];
    uint64_t table = v->cr3 & (v->mode == MODE_PAE ? 0xFFFFFFE0u : narrow ? 0xFFFFF000u : ADDRESS);
    for (;; level--) {
        unsigned shift = 12 + bits * (level - 1);
        uint64_t at = table + ((va >> shift & ((1 << bits) - 1)) << (narrow ? 2 : 3)), entry = word_at(at);
        if (narrow)
            entry = (uint32_t)(entry >> (8 * (at & 4)));
        *span = (uint64_t)1 << shift;
        if (!(entry & PRESENT))
            return false;
        if (v->mode != MODE_PAE || level < 3)
            *user &= (entry & USER_PAGE) != 0;
        if (is_leaf(v->mode, v->cr4, level, entry)) {
            uint64_t frame = entry & ADDRESS & ~(*span - 1);
            if (narrow && level == 2)   /* PSE-36: bits 13 to 20 are bits 32 to 39 of the address */
                frame = (entry & 0xFFC00000u) | (entry >> 13 & 0xFF) << 32;
            *gpa = frame | (va & (*span - 1));
            return true;
        }
        table = entry & (narrow ? 0xFFFFF000u : ADDRESS);
    }
}
