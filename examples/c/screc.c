/* Print the records of a guest's recording, a line each: vcpu kind flags insns addr value, in hexadecimal.
 *
 *     cc -O2 -o screc screc.c -lz && ./screc guest.screc
 *
 * Reads versions 1 and 2 of the format of docs/recordings.md, of files below 4 GiB, and checks every CRC-32.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum { VCPU, KIND, FLAGS, INSNS, ADDR, VALUE, COLUMNS };
static const char *const names[COLUMNS] = { "vcpu", "kind", "flags", "insns", "addr", "value" };

struct array {                  /* a member in the .npy format: count elements of size bytes */
    unsigned char *file, *data;
    size_t count, size;
};
static struct array whole[COLUMNS], pages[COLUMNS], places[COLUMNS], offsets[COLUMNS];

static void fail(const char *what)
{
    fprintf(stderr, "screc: %s\n", what);
    exit(2);
}

static uint64_t number(const unsigned char *at, size_t size)
{
    uint64_t n = 0;
    while (size--)
        n = n << 8 | at[size];
    return n;
}

/* A column's value in a record: an array with an element for each record or for all, or pages and offsets, or 0. */
static uint64_t element(const struct array *a, size_t record)
{
    if (!a->file)
        return 0;
    if (a->count > 1 && record >= a->count)
        fail("an array is too short");
    return number(a->data + a->size * (a->count == 1 ? 0 : record), a->size);
}

static uint64_t field(int column, size_t record)
{
    if (!pages[column].file)
        return element(&whole[column], record);
    uint64_t place = element(&places[column], record);
    if (place >= pages[column].count)
        fail("a page is not there");
    return number(pages[column].data + 8 * place, 8) * 4096 + element(&offsets[column], record);
}

static void print_block(size_t records)
{
    for (size_t record = 0; record < records; record++)
        for (int column = 0; column < COLUMNS; column++)
            printf("%llx%c", (unsigned long long)field(column, record), column + 1 < COLUMNS ? ' ' : '\n');
    struct array *const kinds[] = { whole, pages, places, offsets };
    for (int n = 0; n < 4 * COLUMNS; n++) {
        free(kinds[n / COLUMNS][n % COLUMNS].file);
        kinds[n / COLUMNS][n % COLUMNS] = (struct array){ 0 };
    }
}

/* The contents of the member that an entry of the table of contents is of. */
static unsigned char *contents(const unsigned char *zip, const unsigned char *entry, size_t size)
{
    const unsigned char *local = zip + number(entry + 42, 4);
    z_stream z = { .next_in = (unsigned char *)local + 30 + number(local + 26, 2) + number(local + 28, 2),
                   .avail_in = number(entry + 20, 4) };
    unsigned char *out = malloc(size + 1);
    if (number(entry + 10, 2) == 0) {
        memcpy(out, z.next_in, size);
    } else {
        z.next_out = out;
        z.avail_out = size + 1;
        if (inflateInit2(&z, -15) != Z_OK || inflate(&z, Z_FINISH) != Z_STREAM_END || z.total_out != size)
            fail("a member cannot be inflated");
        inflateEnd(&z);
    }
    if (crc32(0, out, size) != number(entry + 16, 4))
        fail("a checksum is wrong");
    return out;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!file || fseek(file, 0, SEEK_END))
        fail("usage: screc RECORDING");
    long length = ftell(file);
    unsigned char *zip = malloc(length), *end = zip + length - 22;
    rewind(file);
    if (length < 44 || fread(zip, 1, length, file) != (size_t)length || memcmp(zip + 30, "recording.json", 14))
        fail("this is no recording");
    while (end > zip && memcmp(end, "PK\5\6", 4))       /* the end of the table of contents */
        end--;
    if (end == zip)
        fail("the end of the recording is missing");
    unsigned block = 0, records = 0;
    const unsigned char *entry = zip + number(end + 16, 4);
    for (size_t left = number(end + 10, 2); left; left--) {
        char name[64] = "", column[16] = "", part[16] = "";
        unsigned n, count;
        size_t length = number(entry + 28, 2), size = number(entry + 24, 4);
        memcpy(name, entry + 46, length < 63 ? length : 63);
        unsigned char *data = contents(zip, entry, size);
        if (!strcmp(name, "recording.json")) {
            data[size] = 0;
            if (!strstr((char *)data, "\"shadowcore recording\"") || !strstr((char *)data, "\"stream\": \"guest\""))
                fail("a recording of a guest is needed");
            char *version = strstr((char *)data, "\"version\": ");
            if (!version || (version[11] != '1' && version[11] != '2') || (version[12] >= '0' && version[12] <= '9'))
                fail("a version that this program does not know");
        }
        if (sscanf(name, "blocks/%u-%u/%15[a-z].%15[a-z]", &n, &count, column, part) == 4) {
            if (n != block)
                print_block(records);
            block = n, records = count;
            struct array a = { data, data + 10 + number(data + 8, 2), 0, 0 };
            char *type = strstr((char *)data + 10, "'descr': '");
            a.size = type ? type[12] - '0' : 0;
            if (size < 64 || memcmp(data, "\x93NUMPY\1\0", 8) || a.size < 1 || a.size > 8 || type[11] != 'u')
                fail("an array is none");
            a.count = (data + size - a.data) / a.size;
            for (int c = 0; c < COLUMNS; c++)
                if (!strcmp(column, names[c]))
                    *(!strcmp(part, "npy") ? &whole[c] : !strcmp(part, "pages") ? &pages[c]
                      : !strcmp(part, "index") ? &places[c] : &offsets[c]) = a;
        }
        entry += 46 + length + number(entry + 30, 2) + number(entry + 32, 2);
    }
    print_block(records);
    return 0;
}
