# A small kernel for the MMU to run under: a multiboot ELF that is entered in 32-bit protected mode, goes to long mode
# by itself, and runs a user program in two address spaces.
#
# Demand paging: every page of user data and stack appears at the first touch. Fork: the tables are copied, writable
# pages become read-only in both and are copied at the first store to them (bit 9 of an entry marks them; a count per
# frame says when the last owner may just have it back). The processes take turns by system call 2.
#
# What comes out at the end, as 16 hexadecimal digits on the serial port, is made of the sums that both processes
# computed over their pages and of CR2 and error code of every page fault, in order. See guest_model in guest.py for
# the same arithmetic in Python.
        .intel_syntax noprefix

        PAGES = 48                      # pages of user data
        ROUNDS = 3
        USER_CODE = 0x40000000
        USER_DATA = 0x40010000
        USER_STACK = 0x40080000         # its first byte; the stack grows down from 0x40081000
        FRAMES = 0x400000               # frames are given out from here on
        COW = 0x200
        NX = 63

        .section .multiboot, "a"
        .align 4
        .long 0x1BADB002, 0, -0x1BADB002

        .text
        .code32
        .globl start
start:  mov esp, offset boot_stack_end
        # Kernel half: 16 MiB as they are, in large pages, for the supervisor.
        mov edi, offset kernel_pd
        mov eax, 0x83
        mov ecx, 8
1:      mov [edi], eax
        add eax, 0x200000
        add edi, 8
        loop 1b
        mov eax, offset kernel_pd + 3
        mov [boot_pdpt], eax
        mov eax, offset boot_pdpt + 3
        mov [boot_pml4], eax
        mov eax, 0x20                   # CR4.PAE
        mov cr4, eax
        mov eax, offset boot_pml4
        mov cr3, eax
        mov ecx, 0xC0000080
        rdmsr
        or eax, 0x901                   # EFER.SCE, LME, NXE
        wrmsr
        mov eax, cr0
        or eax, 0x80010000              # CR0.PG, WP
        mov cr0, eax
        lgdt [gdt_pointer]
        .byte 0xEA                      # jmp 0x08:long_mode
        .long long_mode
        .word 0x08

        .code64
long_mode:
        mov eax, 0x10
        mov ds, eax
        mov es, eax
        mov ss, eax
        mov rsp, offset boot_stack_end
        # The TSS descriptor's base, then the gates.
        mov rax, offset tss
        mov [gdt + 0x28 + 2], ax
        shr rax, 16
        mov [gdt + 0x28 + 4], al
        mov [gdt + 0x28 + 7], ah
        mov eax, 0x28
        ltr ax
        mov edi, 6
        mov rsi, offset undefined
        mov edx, 0x8E00
        call set_gate
        mov edi, 13
        mov rsi, offset protection
        call set_gate
        mov edi, 14
        mov rsi, offset page_fault
        call set_gate
        mov edi, 0x80
        mov rsi, offset system_call
        mov edx, 0xEE00
        call set_gate
        lidt [idt_pointer]
        mov ecx, 0xC0000081             # STAR: kernel 0x08 and 0x10, user 0x1B and 0x23
        xor eax, eax
        mov edx, 0x00100008
        wrmsr
        inc ecx                         # LSTAR
        mov eax, offset quick_call
        xor edx, edx
        wrmsr
        ud2                             # the handler steps over it
        mov rax, cr3                    # reads of control registers give what was written
        mov ebx, offset boot_pml4
        cmp rax, rbx
        jne broken
        mov rbx, cr0
        bt rbx, 16
        jnc broken
        mov rbx, cr4
        cmp rbx, 0x20
        jne broken
        mov rbx, 0x1000000000000        # not canonical
        mov rbx, [rbx]                  # the handler steps over it
        # Process 0: the program's page mapped for execution, nothing else.
        call new_space
        mov [process + 0], rax
        mov rbx, [rax]                  # PML4 -> PDPT -> PD -> PT
        and rbx, -4096
        mov rbx, [rbx + 8]
        and rbx, -4096
        mov rbx, [rbx]
        and rbx, -4096
        mov rcx, offset user_program
        or rcx, 5
        mov [rbx], rcx
        mov cr3, rax
        mov qword ptr [current], 0
        push 0x1B
        push USER_STACK + 0x1000
        push 0x002
        push 0x23
        push USER_CODE
        iretq

# By SYSCALL: where a process has its data.
quick_call:
        mov ebp, offset USER_DATA
        sysretq

broken: mov al, 'B'
        out 0xE9, al
        mov dx, 0x3F8
        out dx, al
        mov al, 0x7F
        out 0xF4, al
1:      hlt
        jmp 1b

# A gate for vector edi at rsi, of kind edx.
set_gate:
        shl rdi, 4
        add rdi, offset idt
        mov [rdi], si
        mov word ptr [rdi + 2], 0x08
        mov [rdi + 4], dx
        shr rsi, 16
        mov [rdi + 6], si
        shr rsi, 16
        mov [rdi + 8], esi
        ret

# A zeroed frame in rax.
new_frame:
        push rcx
        push rdi
        mov rdi, [next_frame]
        add qword ptr [next_frame], 4096
        mov rax, rdi
        shr rax, 12
        mov byte ptr [counts + rax], 1
        push [next_frame]
        xor eax, eax
        mov ecx, 512
        cld
        rep stosq
        pop rax
        sub rax, 4096
        pop rdi
        pop rcx
        ret

# New tables in rax: the kernel's half, and one table for user pages.
new_space:
        push rbx
        push rdx
        push r8
        call new_frame
        mov rbx, rax                    # PML4
        call new_frame
        mov rdx, rax                    # PDPT
        call new_frame
        mov r8, rax                     # PD
        call new_frame                  # PT
        or rax, 7
        mov [r8], rax
        or r8, 7
        mov [rdx + 8], r8
        mov rax, offset kernel_pd + 3
        mov [rdx], rax
        or rdx, 7
        mov [rbx], rdx
        mov rax, rbx
        pop r8
        pop rdx
        pop rbx
        ret

# rbx: the user page table of the tables in CR3.
user_table:
        mov rbx, cr3
        mov rbx, [rbx]
        and rbx, -4096
        mov rbx, [rbx + 8]
        and rbx, -4096
        mov rbx, [rbx]
        and rbx, -4096
        ret

undefined:
        add qword ptr [rsp], 2
        iretq
protection:
        add rsp, 8                      # its error code
        add qword ptr [rsp], 3
        iretq

page_fault:
        push rax
        push rbx
        push rcx
        push rdx
        push rsi
        push rdi
        mov rax, cr2
        mov rdx, [rsp + 48]             # error code
        mov rcx, [faults]
        imul rcx, rcx, 33
        add rcx, rax
        add rcx, rdx
        mov [faults], rcx
        call user_table
        mov rcx, rax
        shr rcx, 12
        and ecx, 511
        lea rbx, [rbx + rcx * 8]        # the entry
        mov rcx, [rbx]
        test cl, 1
        jnz 1f
        push rdx
        call new_frame                  # demand paging
        pop rdx
        or rax, 7
        bts rax, NX
        mov [rbx], rax
        jmp 9f
1:      test dl, 2
        jz broken
        test ecx, COW
        jz broken
        mov rsi, rcx
        btr rsi, NX
        and rsi, -4096
        mov rdi, rsi
        shr rdi, 12
        cmp byte ptr [counts + rdi], 1
        je 2f
        dec byte ptr [counts + rdi]
        call new_frame
        mov rdi, rax
        mov ecx, 512
        cld
        rep movsq
        or rax, 7
        bts rax, NX
        mov [rbx], rax
        jmp 3f
2:      lock and qword ptr [rbx], ~COW  # the last owner: one store for each bit, as kernels do
        lock or qword ptr [rbx], 2
3:      mov rax, cr2
        invlpg [rax]
9:      pop rdi
        pop rsi
        pop rdx
        pop rcx
        pop rbx
        pop rax
        add rsp, 8
        iretq

# eax 1: fork (0 in the child, 1 in the parent); 2: the other process, please; 3: done, sum in rdi.
system_call:
        cmp eax, 1
        je fork
        cmp eax, 2
        je switch
        cmp eax, 3
        jne broken
        mov rax, [current]
        mov [sums + rax * 8], rdi
        inc qword ptr [finished]
        cmp qword ptr [finished], 2
        jne switch
        mov rax, [sums]
        imul rax, rax, 31
        add rax, [sums + 8]
        xor rax, [faults]
        mov rbx, rax                    # sixteen digits
        mov ecx, 16
        mov edx, 0x3F8
1:      rol rbx, 4
        mov al, bl
        and al, 15
        add al, '0'
        cmp al, '9'
        jbe 2f
        add al, 39
2:      out dx, al
        loop 1b
        mov al, 10
        out dx, al
        xor eax, eax
        out 0xF4, al
3:      hlt
        jmp 3b

fork:   call new_space
        mov [process + 8], rax
        mov r12, rax
        call user_table
        mov r13, rbx
        mov r12, [r12]
        and r12, -4096
        mov r12, [r12 + 8]
        and r12, -4096
        mov r12, [r12]
        and r12, -4096                  # the child's table
        xor ecx, ecx
1:      mov rax, [r13 + rcx * 8]
        test al, 1
        jz 3f
        test al, 2
        jz 2f
        and rax, ~2
        or rax, COW
        mov [r13 + rcx * 8], rax
        mov rdx, rax
        btr rdx, NX
        shr rdx, 12
        inc byte ptr [counts + rdx]
2:      mov [r12 + rcx * 8], rax
3:      inc ecx
        cmp ecx, 512
        jne 1b
        mov rax, cr3
        mov cr3, rax
        # The child starts where the parent goes on.
        mov rsi, rsp
        mov rdi, offset frames + 40
        mov ecx, 5
        cld
        rep movsq
        mov qword ptr [children], 1
        mov eax, 1
        iretq

switch: cmp qword ptr [children], 0
        je 1f
        mov rcx, [current]              # keep the frame of this one, take that of the other
        imul rdi, rcx, 40
        add rdi, offset frames
        mov rsi, rsp
        mov edx, 5
2:      mov rax, [rsi]
        mov [rdi], rax
        add rsi, 8
        add rdi, 8
        dec edx
        jnz 2b
        mov [kept_rdi + rcx * 8], r14
        mov [kept_rbx + rcx * 8], r15
        xor ecx, 1
        mov [current], rcx
        imul rsi, rcx, 40
        add rsi, offset frames
        mov rdi, rsp
        mov edx, 5
3:      mov rax, [rsi]
        mov [rdi], rax
        add rsi, 8
        add rdi, 8
        dec edx
        jnz 3b
        mov r14, [kept_rdi + rcx * 8]
        mov r15, [kept_rbx + rcx * 8]
        mov rax, [process + rcx * 8]
        mov cr3, rax
1:      xor eax, eax
        iretq

# The user program, on a page of its own, in whatever address space: r14 rounds left, r15 who it is. Filled with int3, for
# assemblers differ in the NOPs that they fill code with.
        .balign 4096, 0xCC
user_program:
        syscall
        xor ecx, ecx
1:      mov rax, rcx                    # page i: word (i * 8) at byte i * 8 + 1, so that faults have low bits
        shl rax, 12
        lea rax, [rax + rcx * 8 + 1]
        lea rdx, [rcx * 8 + 5]
        mov [rbp + rax], rdx
        inc ecx
        cmp ecx, PAGES
        jne 1b
        push rbp                        # the stack, too, comes on demand
        pop rbp
        mov r14d, ROUNDS
        xor r15d, r15d
        mov eax, 1
        int 0x80
        test eax, eax
        jnz 2f
        mov r15d, 1
        mov r14d, ROUNDS
2:      mov ecx, r14d                   # every third page or so, another set each round and process
        add ecx, r15d
3:      mov rax, rcx
        shl rax, 12
        lea rdx, [rcx + r15 * 4 + 7]
        add [rbp + rax + 64], rdx
        add ecx, 3
        cmp ecx, PAGES
        jb 3b
        mov eax, 2
        int 0x80
        dec r14d
        jnz 2b
        xor edi, edi                    # the sum of all there is
        mov rsi, rbp
        mov ecx, PAGES * 512
4:      imul rdi, rdi, 31
        add rdi, [rsi]
        add rsi, 8
        dec ecx
        jnz 4b
        mov eax, 3
        int 0x80
        .balign 4096, 0xCC

        .data
        .balign 16
gdt:    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
        .quad 0x0000890000000067, 0         # TSS
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .quad gdt
idt_pointer:
        .word 0x81 * 16 - 1
        .quad idt
        .balign 8
next_frame: .quad FRAMES
tss:    .long 0
        .quad fault_stack_end
        .fill 92, 1, 0

        .bss
        .balign 4096
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
kernel_pd: .skip 4096
idt:    .skip 4096
boot_stack: .skip 4096
boot_stack_end:
fault_stack: .skip 4096
fault_stack_end:
counts: .skip 4096
process: .skip 16
sums:   .skip 16
frames: .skip 80
kept_rdi: .skip 16
kept_rbx: .skip 16
current: .skip 8
children: .skip 8
finished: .skip 8
faults: .skip 8
