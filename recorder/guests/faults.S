/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest that is no operating system: between two marks it divides by 0 a hundred times, each time in the middle of
 * code without a jump. How many instructions that is, is known: tests/recordings/test_record_guest.py has the sum.
 *
 *     gcc -m32 -nostdlib -static -Wl,-Ttext=0x100000,--build-id=none -o faults recorder/guests/faults.S
 */
#define PD      0x200000
#define MARK    0x53435243

        .text
        .code32
        .align 4
        .long 0x1BADB002, 0, -0x1BADB002        /* multiboot */

        .globl _start
_start: mov $stack, %esp
        lgdt gdt_pointer
        ljmp $8, $1f
1:      mov $handler, %eax                      /* the gate of #DE */
        mov %ax, idt
        movw $8, idt + 2
        movw $0x8E00, idt + 4
        shr $16, %eax
        mov %ax, idt + 6
        lidt idt_pointer
        movl $0x00000083, PD
        mov %cr4, %eax
        or $0x10, %eax
        mov %eax, %cr4
        mov $PD, %eax
        mov %eax, %cr3
        mov %cr0, %eax
        or $0x80010000, %eax
        mov %eax, %cr0                          /* the recording begins */
        jmp 1f
1:      mov $MARK, %eax
        mov $1, %ecx
        jmp 1f
1:      cpuid                                   /* 1 */
        xor %ecx, %ecx
        mov $100, %esi                          /* 3 */
2:      .rept 5
        nop
        .endr
        div %ecx                                /* is not done; the handler's two are */
        .rept 50
        nop
        .endr
        dec %esi
        jnz 2b                                  /* 3 + 100 * 59 */
        mov $MARK, %eax
        mov $2, %ecx
        jmp 1f                                  /* 5906 */
1:      cpuid
        mov $0x31, %al
        out %al, $0xf4
1:      hlt
        jmp 1b

handler:
        addl $2, (%esp)
        iret

        .align 16
gdt:    .quad 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt
idt_pointer:
        .word 7
        .long idt

        .balign 4096
idt:    .skip 4096
        .skip 4096
stack:
