/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The few instructions that change registers of paging or drop translations (SDM vol. 2). All have the opcode byte 0F.
 */
#include "recorder.h"

static bool is_prefix(uint8_t byte)
{
    switch (byte) {
    case 0x26: case 0x2E: case 0x36: case 0x3E: case 0x64: case 0x65: case 0x66: case 0x67: case 0xF0: case 0xF2: case 0xF3:
        return true;
    }
    return false;
}

/* The operand in memory that begins with the byte `modrm` at `at`: as 32- and 64-bit code has it. */
static void address(const uint8_t *at, const uint8_t *end, uint8_t rex, struct op *op)
{
    unsigned mod = *at >> 6, rm = *at & 7, bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    at++;
    op->base = rm | (rex & 1) << 3;
    op->index = -1;
    if (rm == 4 && at < end) {
        op->base = (*at & 7) | (rex & 1) << 3;
        op->index = (*at >> 3 & 7) | (rex & 2) << 2;
        op->scale = *at >> 6;
        if (op->index == 4)
            op->index = -1;
        if (mod == 0 && (*at & 7) == 5) {
            op->base = -1;
            bytes = 4;
        }
        at++;
    } else if (mod == 0 && rm == 5) {
        op->base = RIP;         /* in 64-bit code; no base in 32-bit code */
        bytes = 4;
    }
    if (at + bytes > end)
        return;
    if (bytes == 1)
        op->displacement = (int8_t)*at;
    else if (bytes == 4)
        op->displacement = (int32_t)(at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24);
}

/* The debugger's numbers of general registers, by those of the processor. */
static int general(int number)
{
    static const int8_t low[8] = { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
    return number < 0 || number >= 8 ? number : low[number];
}

bool decode(const uint8_t *bytes, size_t length, uint64_t va, struct op *op)
{
    const uint8_t *at = bytes, *end = bytes + length;
    uint8_t rex = 0;
    *op = (struct op){ .length = length, .next = va + length, .base = -1, .index = -1 };
    bool operand = false;
    for (; at < end && is_prefix(*at); at++) {
        operand |= *at == 0x66;
        op->narrow |= *at == 0x67;
        op->segment = *at == 0x64 ? FS_BASE : *at == 0x65 ? GS_BASE : op->segment;
    }
    if (at + 1 < end && (*at & 0xF0) == 0x40)
        rex = *at++;            /* outside of 64-bit code these are instructions of one byte */
    if (at + 1 >= end || *at != 0x0F)
        return false;
    uint8_t code = at[1];
    at += 2;
    bool memory = at < end && *at >> 6 != 3;
    if (code == 0x01 && at < end) {
        unsigned which = *at >> 3 & 7;
        if (which == 6)
            op->kind = OP_SYSTEM;       /* LMSW */
        else if (which == 7 && memory)
            op->kind = OP_INVLPG;
    } else if (code == 0x06 || code == 0x30 || code == 0xAA) {
        op->kind = OP_SYSTEM;           /* CLTS, WRMSR, RSM */
    } else if (code == 0x22 && at < end) {
        unsigned cr = (*at >> 3 & 7) | (rex & 4) << 1;
        op->kind = cr == 0 ? OP_CR0 : cr == 3 ? OP_CR3 : cr == 4 ? OP_CR4 : OP_NONE;
        op->source = general((*at & 7) | (rex & 1) << 3);
    } else if (code == 0x38 && operand && at + 1 < end && *at == 0x82) {
        at++;
        memory = *at >> 6 != 3;
        op->kind = memory ? OP_INVPCID : OP_NONE;
        op->source = general((*at >> 3 & 7) | (rex & 4) << 1);
    } else if (code == 0xA2) {
        op->kind = OP_CPUID;
    }
    if (op->kind == OP_INVLPG || op->kind == OP_INVPCID) {
        address(at, end, rex, op);
        op->base = op->base == RIP ? RIP : general(op->base);
        op->index = general(op->index);
    }
    return op->kind != OP_NONE;
}

/* Where the block was translated, or where it is used now: see move_block. */
static uint64_t next_instruction(const struct op *op, const struct vcpu *v)
{
    uint64_t rip = backend_register(v->number, RIP);
    return (rip ^ op->next) & 4095 ? op->next : rip;
}

/* Linear address of the operand, from the registers as the instruction found and left them. Segments other than FS and
 * GS are taken to begin at 0, and code in long mode to be 64-bit code. */
uint64_t op_address(const struct op *op, const struct vcpu *v)
{
    bool wide = v->efer >> 10 & 1;
    uint64_t at = (int64_t)op->displacement;
    if (op->base == RIP)
        at += wide ? next_instruction(op, v) : 0;
    else if (op->base >= 0)
        at += backend_register(v->number, op->base);
    if (op->index >= 0)
        at += backend_register(v->number, op->index) << op->scale;
    if (!wide || op->narrow)
        at = (uint32_t)at;
    if (op->segment)
        at += backend_register(v->number, op->segment);
    return wide ? at : (uint32_t)at;
}
