# A 32-bit multiboot guest that edits its two-level page tables in odd ways: bits and strings, unaligned, over a page
# boundary, 16 bytes at once, with CR0.WP clear; that takes page faults in 32-bit gates and talks to the local APIC.
# Port 0xf4 gets 0, or the number of the check that failed.
        .intel_syntax noprefix
        .code32

        PT2 = 0x300000                  # the table of 0x800000 to 0xBFFFFF
        PAGE_A = 0x302000               # page frames
        PAGE_B = 0x303000

        .section .multiboot, "a"
        .align 4
        .long 0x1BADB002, 0, -0x1BADB002

        .macro check number, register, value
        mov edi, \number
        cmp \register, \value
        jne failed
        .endm

        .text
        .globl start
start:  mov esp, offset stack_end
        mov edi, offset pt0             # 4 MiB as they are, in small pages
        mov eax, 3
        mov ecx, 1024
1:      mov [edi], eax
        add eax, 4096
        add edi, 4
        loop 1b
        mov dword ptr [pd], offset pt0 + 3
        mov dword ptr [pd + 4 * 0x3FB], 0xFEC00083      # 4 MiB at once: the APICs
        mov dword ptr [PAGE_A], 0x11111111
        mov dword ptr [PAGE_B], 0x22222222
        lgdt [gdt_pointer]
        mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        ljmp 0x08, offset 1f
1:      mov eax, offset page_fault
        mov [idt + 14 * 8], ax
        mov word ptr [idt + 14 * 8 + 2], 0x08
        mov word ptr [idt + 14 * 8 + 4], 0x8E00
        shr eax, 16
        mov [idt + 14 * 8 + 6], ax
        lidt [idt_pointer]
        mov eax, 0x210                  # PSE, OSFXSR
        mov cr4, eax
        mov eax, offset pd
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80010000
        mov cr0, eax

        # 1, 2: the local APIC, by a load and by a read-modify-write.
        mov eax, [0xFEE00030]
        check 1, eax, 0x50014
        mov dword ptr [0xFEE00080], 0x20
        or dword ptr [0xFEE00080], 1
        mov eax, [0xFEE00080]
        check 2, eax, 0x21

        # 3, 4: a page fault that the handler mends.
        mov dword ptr [0x00800123], 0x12345678
        mov eax, [PAGE_A + 0x123]
        check 3, eax, 0x12345678
        mov eax, [faults]
        check 4, eax, 1

        # 5: an entry exchanged, 6: added to, 7: compared and exchanged.
        mov eax, PAGE_B + 3
        lock xchg [PT2], eax
        invlpg [0x00800000]
        mov eax, [0x00800000]
        check 5, eax, 0x22222222
        sub dword ptr [PT2], 0x1000
        invlpg [0x00800000]
        mov eax, [0x00800000]
        check 6, eax, 0x11111111
        mov eax, [PT2]
        mov ecx, PAGE_B + 3
        lock cmpxchg [PT2], ecx
        invlpg [0x00800000]
        mov eax, [0x00800000]
        check 7, eax, 0x22222222

        # 8: a string of entries.
        mov eax, PAGE_A + 3
        mov edi, PT2
        mov ecx, 16
        cld
        rep stosd
        mov eax, cr3
        mov cr3, eax
        mov eax, [0x0080F000]
        check 8, eax, 0x11111111

        # 9, 10: a store over two entries.
        mov eax, [0x00801000]
        mov eax, [0x00802000]
        mov eax, ((PAGE_B + 3) << 16 | (PAGE_A >> 16)) & 0xFFFFFFFF
        mov [PT2 + 6], eax
        mov eax, cr3
        mov cr3, eax
        mov eax, [0x00802000]
        check 9, eax, 0x22222222
        mov eax, [0x00801000]
        check 10, eax, 0x11111111

        # 11: four entries at once.
        movups xmm0, [four]
        movups [PT2 + 0x10], xmm0
        mov eax, cr3
        mov cr3, eax
        mov eax, [0x00806000]
        check 11, eax, 0x22222222
        mov eax, [0x00807000]
        check 12, eax, 0x11111111

        # 13: over the end of the table.
        mov eax, [0x00800000]           # so that it is shadowed
        mov dword ptr [PT2 + 4092], PAGE_B + 3
        mov eax, [0x00BFF000]
        check 13, eax, 0x22222222
        mov dword ptr [PT2 + 4094], 0x00550030
        mov eax, [PT2 + 4096]
        and eax, 0xFFFF
        check 14, eax, 0x55

        # 15: with WP clear the supervisor may store to a page that is read-only.
        mov dword ptr [PT2 + 4], PAGE_A + 1
        mov eax, cr0
        and eax, 0xFFFEFFFF
        mov cr0, eax
        mov dword ptr [0x00801040], 0x55667788
        add dword ptr [0x00801040], 1
        mov eax, [PAGE_A + 0x40]
        check 15, eax, 0x55667789
        mov eax, cr0
        or eax, 0x10000
        mov cr0, eax
        mov eax, [faults]
        check 16, eax, 1
        mov dword ptr [0x00801040], 7   # and with WP set it may not: the handler grants it
        mov eax, [PAGE_A + 0x40]
        check 17, eax, 7
        mov eax, [faults]
        check 18, eax, 2

        # 19: the stack lies in a page that serves as a table, which is used as one meanwhile.
        mov ebp, esp
        mov esp, PT2 + 0x800
        push 0x77777777
        pop eax
        mov esp, ebp
        check 19, eax, 0x77777777

        # 20: a load from one table stored to the other.
        mov esi, PT2 + 0x14
        mov edi, offset pt0 + 0xC00     # 0x300000: not where we run
        mov eax, [edi]
        push eax
        movsd
        pop eax
        mov ecx, [edi - 4]
        mov [edi - 4], eax
        mov eax, cr3
        mov cr3, eax
        check 20, ecx, PAGE_A + 3
        xor edi, edi
failed: mov eax, edi
        out 0xF4, al
1:      hlt
        jmp 1b

page_fault:
        push eax
        inc dword ptr [faults]
        mov eax, cr2
        cmp eax, 0x00800123
        je 1f
        cmp eax, 0x00801040
        je 2f
3:      mov edi, 0x80
        jmp failed
1:      cmp dword ptr [esp + 4], 2
        jne 3b
        mov dword ptr [PT2], PAGE_A + 3
        mov dword ptr [pd + 8], PT2 + 3
        jmp 4f
2:      cmp dword ptr [esp + 4], 3
        jne 3b
        or dword ptr [PT2 + 4], 2
        invlpg [0x00801000]
4:      pop eax
        add esp, 4
        iretd

        .data
        .balign 16
gdt:    .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt
idt_pointer:
        .word 32 * 8 - 1
        .long idt
        .balign 4
four:   .long PAGE_A + 3, PAGE_A + 3, PAGE_B + 3, PAGE_A + 3

        .bss
        .balign 4096
pd:     .skip 4096
pt0:    .skip 4096
idt:    .skip 4096
stack:  .skip 4096
stack_end:
faults: .skip 4
