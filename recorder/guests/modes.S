/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest that is no operating system: it turns on 32-bit, PAE and 4-level paging one after the other, edits its tables
 * in every way that a recorder has to see, and ends in user mode. What it does is the same each time, so that a
 * recording of it can be compared with a list: tests/recordings/test_record_guest.py has that.
 *
 *     gcc -m32 -nostdlib -static -Wl,-Ttext=0x100000,--build-id=none -o modes recorder/guests/modes.S
 *     qemu-system-x86_64 -cpu max -m 16 -display none -device isa-debug-exit,iobase=0xf4 -kernel modes
 */
#define PD      0x200000
#define PT      0x201000
#define PDPT    0x210020                /* not at the beginning of its frame */
#define PD_PAE  0x211000
#define PT_PAE  0x212000
#define PML4    0x220000
#define PDPT_64 0x221000
#define PD_64   0x222000
#define PT_64   0x223000
#define MARK    0x53435243

        .text
        .code32
        .align 4
        .long 0x1BADB002, 0, -0x1BADB002        /* multiboot */

        .globl _start
_start: mov $stack, %esp
        lgdt gdt_pointer

        /* 32-bit paging: 4 MiB by one large page, the next 4 MiB by a table, and the directory in itself. */
        movl $0x00000083, PD
        movl $PT + 3, PD + 4
        movl $PD + 3, PD + 4 * 1023
        mov $PT, %edi
        mov $0x400003, %eax
1:      mov %eax, (%edi)
        add $0x1000, %eax
        add $4, %edi
        cmp $PT + 4096, %edi
        jne 1b
        mov %cr4, %eax
        or $0x10, %eax
        mov %eax, %cr4
        mov $PD, %eax
        mov %eax, %cr3
        mov %cr0, %eax
        or $0x80010000, %eax
        mov %eax, %cr0                          /* the recording begins */
        jmp 1f
1:      mov %eax, 0x402000
        movl $0x500003, PT + 4 * 5              /* an entry */
        invlpg 0x405000
        mov 0x405010, %ecx
        movb $0x23, PT + 4 * 6                  /* a byte of one, through the large page */
        movw $0x0023, 0xFFC01000 + 4 * 7        /* two, through the directory as a table */
        mov $0x405000, %ebx
        mov $4, %ecx
        invlpg 0x1234(%ebx,%ecx,8)
        mov $0x508003, %eax
        xchg %eax, PT + 4 * 8
        mov $0x409003, %eax
        mov $0x509003, %edx
        lock cmpxchg %edx, PT + 4 * 9
        lock orl $0x200, PT + 4 * 10
        movl $0x7, PT + 4 * 11 - 2              /* half of one, half of the next */
        mov %cr3, %eax
        mov %eax, %cr3                          /* the same again */
        movl $0, PD + 4                         /* the table is none any more */
        movb $0, PT
        mov %cr0, %eax
        and $0x7FFFFFFF, %eax
        mov %eax, %cr0
        jmp 1f

        /* PAE paging. */
1:      movl $PD_PAE + 1, PDPT
        movl $0x00000083, PD_PAE
        movl $0x00200083, PD_PAE + 8
        movl $PT_PAE + 3, PD_PAE + 16
        movl $0x400003, PT_PAE
        mov %cr4, %eax
        or $0x20, %eax
        mov %eax, %cr4
        mov $PDPT, %eax
        mov %eax, %cr3
        mov %cr0, %eax
        or $0x80000000, %eax
        mov %eax, %cr0
        jmp 1f
1:      mov 0x400000, %ecx
        movl $0x55, PDPT + 0x40                 /* of the same frame, but no entry: not recorded */
        movl $PD_PAE + 1, PDPT + 8              /* seen when CR3 is loaded */
        mov %cr3, %eax
        mov %eax, %cr3
        mov 0x40400000, %ecx
        mov %cr0, %eax
        and $0x7FFFFFFF, %eax
        mov %eax, %cr0
        jmp 1f

        /* 4-level paging. */
1:      movl $PDPT_64 + 7, PML4
        movl $PD_64 + 7, PDPT_64
        movl $0x00000087, PD_64
        movl $0x00200087, PD_64 + 8
        movl $PT_64 + 7, PD_64 + 16
        movl $0x400007, PT_64
        mov $PML4, %eax
        mov %eax, %cr3
        mov $0xC0000080, %ecx
        rdmsr
        or $0x900, %eax
        wrmsr
        mov %cr0, %eax
        or $0x80000000, %eax
        mov %eax, %cr0
        ljmp $8, $1f
        .code64
1:      mov 0x400000, %ecx
        movq $0x401007, PT_64 + 8
        mov $0x401007, %rdx
        lock cmpxchg8b PT_64 + 16               /* of EDX:EAX, which differs: nothing is stored but what was there */
        movq $-1, PT_64 + 24 + 4                /* half of one, half of the next */
        mov $0x400000, %r13
        mov $1, %r9
        invlpg 8(%r13,%r9,4)
        .byte 0x0F, 0x01, 0x3D                  /* invlpg there(%rip) */
        .long there - 1f
1:
        mov $MARK, %eax
        mov $7, %ecx
        jmp 1f
1:      cpuid                                   /* a mark */
        pushq $0x23
        mov $stack, %eax
        pushq %rax
        pushq $0x3002                           /* with the right to use ports */
        pushq $0x1B
        mov $user, %eax
        pushq %rax
        iretq
user:   mov 0x401000, %ecx
        mov %ecx, 0x401FFC
there:  mov $0x31, %al
        out %al, $0xF4
1:      jmp 1b

        .align 8
gdt:    .quad 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF, 0x00AFFA000000FFFF, 0x00CFF2000000FFFF
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt
        .align 16
        .skip 1024
stack:
        .section .note.GNU-stack, "", @progbits
