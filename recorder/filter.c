/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Pages whose accesses need no record: as many as a TLB has, for each processor and each kind of access.
 */
#include <stdlib.h>
#include <string.h>

#include "recorder.h"

uint64_t filter_sets;

struct set *filter_set(const struct vcpu *v, int which, uint64_t page)
{
    return v->filter[which] + (page & (filter_sets - 1));
}

/* The way of a tag, which is the newest of its set from now on, or -1. */
int filter_find(struct set *set, uint64_t tag)
{
    for (int n = 0; n < FILTER_WAYS; n++)
        if (set->tag[n] == tag) {
            set->used[n] = ++set->uses;
            return n;
        }
    return -1;
}

/* Put a tag in place of the one that was not used for longest. */
void filter_enter(struct set *set, uint64_t tag, uint64_t gfn)
{
    int oldest = 0;
    for (int n = 0; n < FILTER_WAYS; n++) {
        if (!set->tag[n]) {
            oldest = n;
            break;
        }
        if ((int32_t)(set->used[n] - set->used[oldest]) < 0)
            oldest = n;
    }
    set->tag[oldest] = tag;
    set->gfn[oldest] = gfn < nframes ? gfn : nframes;
    set->used[oldest] = ++set->uses;
}

static void forget_hands(struct vcpu *v)
{
    v->fetch = 0;
    memset(v->hand[0], 0, filter_sets * sizeof(uint64_t));
    memset(v->hand[1], 0, filter_sets * sizeof(uint64_t));
}

/* A frame has become a table: stores to it are to be looked at. */
void filter_watch(void)
{
    for (unsigned n = 0; n < vcpu_count; n++)
        memset(vcpus[n].hand[1], 0, filter_sets * sizeof(uint64_t));
}

void filter_drop_all(struct vcpu *v)
{
    for (int which = 0; which < FILTERS; which++)
        memset(v->filter[which], 0, filter_sets * sizeof(struct set));
    forget_hands(v);
}

/* INVLPG: the pages of the translation that the address is in. */
void filter_drop_page(struct vcpu *v, uint64_t va)
{
    uint64_t gpa, span;
    bool user;
    walk(v, va, &gpa, &user, &span);
    if (span > (uint64_t)filter_sets * FILTER_WAYS << 12) {
        filter_drop_all(v);
        return;
    }
    uint64_t first = (va & ~(span - 1)) >> 12, count = span >> 12;
    for (uint64_t page = first; page < first + count; page++)
        for (int which = 0; which < FILTERS; which++) {
            struct set *set = filter_set(v, which, page);
            for (unsigned n = 0; n < FILTER_WAYS; n++)
                if (set->tag[n] >> 2 == page)
                    set->tag[n] = 0;
        }
    forget_hands(v);
}

void filter_install(uint64_t pages)
{
    filter_sets = pages / FILTER_WAYS;
    if (!filter_sets || filter_sets & (filter_sets - 1) || pages % FILTER_WAYS)
        fatal("a filter of 8 pages times a power of two is needed", "");
    for (unsigned n = 0; n < vcpu_count; n++) {
        for (int which = 0; which < FILTERS; which++)
            if (!(vcpus[n].filter[which] = aligned_alloc(64, filter_sets * sizeof(struct set))))
                fatal("no memory", "");
        for (int which = 0; which < 2; which++)
            if (!(vcpus[n].hand[which] = calloc(filter_sets, sizeof(uint64_t))))
                fatal("no memory", "");
        filter_drop_all(&vcpus[n]);
    }
}
