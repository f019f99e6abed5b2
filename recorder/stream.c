/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Records on their way to the command that writes the file.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "recorder.h"

#define BUFFER 4096             /* records */

uint64_t stream_clock, stream_limit = UINT64_MAX;
static struct record buffer[BUFFER];
static unsigned filled;
static uint64_t last;           /* instructions executed by the last record */
static int out = -1;
bool stream_ended;

void fatal(const char *what, const char *which)
{
    fprintf(stderr, "shadowcore recorder: %s%s\n", what, which);
    stream_ended = true;            /* what exits calls tells of no end */
    exit(3);
}

static void put(const void *data, size_t length)
{
    const char *at = data;
    while (length) {
        ssize_t done = write(out, at, length);
        if (done < 0 && errno != EINTR)
            _exit(3);           /* nobody reads any more */
        if (done > 0) {
            at += done;
            length -= done;
        }
    }
}

void stream_open(int fd)
{
    out = fd;
}

/* Instructions are counted from here on. */
void stream_head(const struct heading *heading, uint64_t now)
{
    last = now;
    if (stream_limit != UINT64_MAX)
        stream_limit += now;
    put(heading, sizeof *heading);
}

static void flush(void)
{
    put(buffer, filled * sizeof *buffer);
    filled = 0;
}

static void append(struct vcpu *v, uint64_t now, int kind, unsigned flags, uint64_t addr, uint64_t value)
{
    /* A processor that was left in the middle of a block goes on with a count that is behind the others'. */
    uint64_t passed = now > last ? now - last : 0;
    if (passed > UINT32_MAX)
        passed = UINT32_MAX;
    last += passed;
    buffer[filled++] = (struct record){ kind, v ? v->number : 0, flags, passed, addr, value };
    if (filled == BUFFER)
        flush();
}

void emit(struct vcpu *v, uint64_t now, int kind, unsigned flags, uint64_t addr, uint64_t value)
{
    if (!stream_ended && now <= stream_limit)
        append(v, now, kind, flags, addr, value);
}

void stream_end(void)
{
    if (stream_ended)
        return;
    stream_ended = true;
    if (recording) {
        append(NULL, last, END, 0, 0, last);
        flush();
    }
    recording = false;
}
