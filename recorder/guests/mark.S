/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A program for guests: `mark N` (one digit) marks a place in the recording. It is CPUID with EAX = "SCRC" and ECX = N, as
 * the first instruction of a block; any other way to do that is as good. Processors take it for an unknown leaf.
 *
 *     gcc -nostdlib -static -o mark recorder/guests/mark.S
 */
        .text
        .globl _start
_start: mov 16(%rsp), %rsi              /* argv[1] */
        xor %ecx, %ecx
        test %rsi, %rsi
        jz 1f
        movzbl (%rsi), %ecx
        sub $'0', %ecx
1:      mov $0x53435243, %eax
        jmp 1f
1:      cpuid
        mov $60, %eax                   /* exit(0) */
        xor %edi, %edi
        syscall
        .section .note.GNU-stack, "", @progbits
