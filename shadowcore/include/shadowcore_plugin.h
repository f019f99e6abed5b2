/*
 * shadowcore_plugin.h: policies of replacement and decisions about stores to guest tables, compiled, for C11 and C++17.
 *
 * A plug-in is a structure of functions in a capsule (PyCapsule) of the name that is said below: what an entry point of
 * a package leads to, in the group shadowcore.policies or shadowcore.designs, or the attribute `compiled` of a class.
 *
 * Functions are called without the GIL, by one thread at a time for each VM, in the middle of what its engine does: they
 * must return, and may not use the VM. All but those that can be NULL are needed; otherwise making the VM is refused.
 *
 * Versions. A structure begins with its own size. Fields are only ever added at the end; those that this shadowcore
 * does not know have to be 0.
 */
#ifndef SHADOWCORE_PLUGIN_H
#define SHADOWCORE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Names of the capsules. */
#define SC_POLICY_CAPSULE "shadowcore.policy"
#define SC_DECISIONS_CAPSULE "shadowcore.decisions"

/* The header of a shadow page. More follows in later versions: use sc_plugin_page_at. */
typedef struct sc_plugin_page {
    uint64_t gfn;          /* of the guest table, or of what the page maps */
    uint32_t role;         /* level in bits 4 to 7; docs/design.md has the rest */
    uint32_t root_count;   /* not 0: a root in use, which is no victim */
    uint32_t links[4];     /* the engine's */
    uint32_t present;      /* entries that are not 0 */
    uint8_t active;        /* the page is in use */
    uint8_t nonglobal;
    uint8_t unsync;        /* out of sync */
    uint8_t flood;
} sc_plugin_page;

/* What a plug-in sees of its VM, until `close`, by when the pages are gone. */
typedef struct sc_plugin_host {
    uint32_t struct_size;
    uint32_t pool_pages;   /* pages are numbered from 0 on */
    const void *pages;     /* their headers */
    uint32_t page_size;    /* bytes from one header to the next */
    uint32_t reserved;
} sc_plugin_host;

static inline const sc_plugin_page *sc_plugin_page_at(const sc_plugin_host *host, uint32_t page)
{
    return (const sc_plugin_page *)(const void *)((const char *)host->pages + (size_t)page * host->page_size);
}

/* What victim returns for "the page that was made first". */
#define SC_PLUGIN_NO_PAGE 0xFFFFFFFFu
/* What save returns where it fails; and the most bytes that it can say. */
#define SC_PLUGIN_FAILED ((size_t)-1)
#define SC_PLUGIN_STATE_MAX ((size_t)1 << 30)

/* Which shadow page is recycled. See shadowcore.Policy. */
typedef struct sc_policy_plugin {
    uint32_t struct_size;
    uint32_t reserved;     /* 0 */
    /* A VM is made: what the other functions are given, not NULL. NULL: it cannot be made. */
    void *(*open)(const sc_plugin_host *host);
    void (*close)(void *state);
    /* A page is in use; it was used, by what Shadow.uses says is a use (may be NULL); it was zapped, by whatever. */
    void (*made)(void *state, uint32_t page);
    void (*used)(void *state, uint32_t page);
    void (*gone)(void *state, uint32_t page);
    /* The page that goes next: one in use that is no root; or SC_PLUGIN_NO_PAGE. */
    uint32_t (*victim)(void *state);
    /* Both NULL: a VM with it cannot be saved. save: puts up to `room` bytes at `bytes`, and returns how many there
     * are, or SC_PLUGIN_FAILED. restore: of a new state, before it is told anything, in place of `made` for each page
     * that there is. 0: done; else the bytes are refused. They come from a file, and can be anything. */
    size_t (*save)(void *state, void *bytes, size_t room);
    int (*restore)(void *state, const void *bytes, size_t size);
} sc_policy_plugin;

/* Answers of sc_decisions_plugin.store. */
enum { SC_DECIDE_EMULATE = 0, SC_DECIDE_UNPROTECT = 1, SC_DECIDE_UNSYNC = 2, SC_DECIDE_ZAP = 3 };

/* A store to a guest table that has a shadow. See shadowcore.TableStore. */
typedef struct sc_table_store {
    uint32_t struct_size;
    uint32_t nbytes;       /* or 0 */
    uint64_t gva;          /* all ones: a leaf table is about to run out of sync */
    uint64_t gpa;
    uint64_t gfn;          /* of the table */
    const uint32_t *pages; /* n_pages: its shadow pages */
    const uint8_t *levels; /* ... and the level of each */
    uint32_t n_pages;
    uint8_t in_use;        /* one of them is a root in use */
    uint8_t unsync;        /* SC_DECIDE_UNSYNC can be answered */
    uint16_t reserved;
} sc_table_store;

/* What becomes of a store to a guest table. See shadowcore.Decisions. */
typedef struct sc_decisions_plugin {
    uint32_t struct_size;
    uint32_t reserved;     /* 0 */
    void *(*open)(const sc_plugin_host *host);
    void (*close)(void *state);
    /* SC_DECIDE_*. What cannot be done is emulated. */
    int (*store)(void *state, const sc_table_store *store);
    /* As of sc_policy_plugin. */
    size_t (*save)(void *state, void *bytes, size_t room);
    int (*restore)(void *state, const void *bytes, size_t size);
} sc_decisions_plugin;

#ifdef __cplusplus
}
#endif

#endif
