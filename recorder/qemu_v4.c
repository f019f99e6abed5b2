/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Back end for QEMU 10.0 and later, versions 4 to 7 of the plug-in interface. With one processor nothing but that
 * interface is used.
 */
#include <dlfcn.h>
#include <string.h>

#include "recorder.h"

EXPORTED int qemu_plugin_version = INTERFACE;
const int backend_flags = QEMU_PLUGIN_CB_R_REGS;

struct qemu_plugin_register;
typedef struct {
    struct qemu_plugin_register *handle;
    const char *name, *feature;
    bool is_readonly;           /* since version 5; the array says how large its elements are */
} descriptor;

typedef struct {
    uint8_t *data;
    unsigned len;
} GArray;

GArray *qemu_plugin_get_registers(void);
int qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *to);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *to, size_t length);
unsigned g_array_get_element_size(GArray *array);

static const char *const names[REGISTERS] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
    "eflags", "cs", [FS_BASE] = "fs_base", [GS_BASE] = "gs_base", [CR0] = "cr0", [CR3] = "cr3", [CR4] = "cr4",
    [EFER] = "efer",
};
static struct qemu_plugin_register *handles[REGISTERS];
static GByteArray *bytes_read;
static void *const *current;    /* the emulator's variable of its thread for processors: which of them runs */
static void *cpus[VCPUS_MAX];

size_t backend_bytes(const struct qemu_plugin_insn *insn, uint8_t bytes[16])
{
    return qemu_plugin_insn_data(insn, bytes, 16);
}

uint64_t backend_register(unsigned vcpu, int number)
{
    (void)vcpu;                 /* always the one that runs */
    uint64_t value = 0;
    g_byte_array_set_size(bytes_read, 0);
    qemu_plugin_read_register(handles[number], bytes_read);
    memcpy(&value, bytes_read->data, bytes_read->len < 8 ? bytes_read->len : 8);
    return value;
}

uint64_t backend_gpa(qemu_plugin_meminfo_t info, uint64_t va)
{
    struct qemu_plugin_hwaddr *at = qemu_plugin_get_hwaddr(info, va);
    return at ? qemu_plugin_hwaddr_phys_addr(at) : NOWHERE;
}

/* Since 10.0 the emulator puts the number of the processor that a block was translated for into the block where one
 * thread runs all processors, and then tells it for others too. So it is asked which of them runs. */
unsigned backend_vcpu(unsigned told)
{
    static unsigned last;
    if (vcpu_count == 1)
        return told;
    if (!current && !(current = dlsym(RTLD_DEFAULT, "current_cpu")))
        fatal("several processors need an emulator that tells which of them runs", "");
    if (cpus[last] != *current)
        for (last = 0; last < vcpu_count && cpus[last] != *current;)
            last++;
    if (last == vcpu_count)
        fatal("a processor runs that was not begun", "");
    return last;
}

void backend_begins(unsigned vcpu)
{
    if (vcpu_count > 1) {
        void *const *here = dlsym(RTLD_DEFAULT, "current_cpu");
        if (!here || !*here || vcpu >= VCPUS_MAX)
            fatal("several processors need an emulator that tells which of them runs", "");
        cpus[vcpu] = *here;
    }
    if (handles[RAX])
        return;
    GArray *found = qemu_plugin_get_registers();
    unsigned size = g_array_get_element_size(found);
    for (unsigned n = 0; n < found->len; n++) {
        const descriptor *one = (const descriptor *)(found->data + (size_t)n * size);
        for (int number = 0; number < REGISTERS; number++)
            if (names[number] && !handles[number] && !strcmp(one->name, names[number]))
                handles[number] = one->handle;
    }
    for (int number = 0; number < REGISTERS; number++)
        if (names[number] && !handles[number])
            fatal("the emulator does not tell the register ", names[number]);
}

void backend_install(const qemu_info_t *info)
{
    if (info->version.cur < INTERFACE)
        fatal("a later version of the plug-in interface is needed", "");
    bytes_read = g_byte_array_new();
}

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    return core_install(id, info, argc, argv);
}
