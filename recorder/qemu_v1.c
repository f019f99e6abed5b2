/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Back end for QEMU 7.2, version 1 of the plug-in interface, which gives no registers. They are read where the
 * emulator's debugger stub reads them: by functions that its program exports because it loads modules.
 */
#include <string.h>

#include "recorder.h"

EXPORTED int qemu_plugin_version = 1;
const int backend_flags = QEMU_PLUGIN_CB_NO_REGS;

struct CPUState;
struct CPUState *qemu_get_cpu(int number);
int x86_cpu_gdb_read_register(struct CPUState *cpu, GByteArray *to, int number);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);

static GByteArray *bytes_read;

size_t backend_bytes(const struct qemu_plugin_insn *insn, uint8_t bytes[16])
{
    size_t length = qemu_plugin_insn_size(insn);
    length = length < 16 ? length : 16;
    memcpy(bytes, qemu_plugin_insn_data(insn), length);
    return length;
}

uint64_t backend_register(unsigned vcpu, int number)
{
    static struct CPUState *cpus[VCPUS_MAX];
    uint64_t value = 0;
    if (!cpus[vcpu])
        cpus[vcpu] = qemu_get_cpu(vcpu);
    g_byte_array_set_size(bytes_read, 0);
    x86_cpu_gdb_read_register(cpus[vcpu], bytes_read, number);
    memcpy(&value, bytes_read->data, bytes_read->len < 8 ? bytes_read->len : 8);
    return value;
}

unsigned backend_vcpu(unsigned told)
{
    return told;
}

/* Of memory other than the guest's RAM this version tells places in the emulator's, not where the guest has it. */
uint64_t backend_gpa(qemu_plugin_meminfo_t info, uint64_t va)
{
    struct qemu_plugin_hwaddr *at = qemu_plugin_get_hwaddr(info, va);
    if (!at)
        return NOWHERE;
    uint64_t gpa = qemu_plugin_hwaddr_phys_addr(at);
    return qemu_plugin_hwaddr_is_io(at) || gpa >> 12 < nframes ? gpa : NOWHERE;
}

void backend_begins(unsigned vcpu)
{
    (void)vcpu;
}

void backend_install(const qemu_info_t *info)
{
    if (info->version.cur != 1)
        fatal("the version 1 of the plug-in interface is needed", "");
    bytes_read = g_byte_array_new();
}

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    return core_install(id, info, argc, argv);
}
