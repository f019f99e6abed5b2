/* The program of family.screc: gcc -O1 -nostdlib -static -fno-stack-protector -fcf-protection=none -o family family.c,
   then shadowcore record -o family.screc -- ./family */
static long call(long n, long a, long b, long c, long d, long e, long f)
{
    register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
    asm volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return n;
}

static char *map(long length, long flags)
{
    return (char *)call(9, 0, length, 3, flags, -1, 0);
}

static void fill(volatile char *at, long pages, long stride)
{
    for (long i = 0; i < pages * 4096; i += stride)
        at[i] += 1;
}

static void leave(long status)
{
    call(231, status, 0, 0, 0, 0, 0);
}

/* The stack of a process that has arguments: the second program. */
static void second(void)
{
    volatile char deep[3 * 4096];
    fill(deep, 3, 512);
    fill(map(6 * 4096, 0x22), 6, 1024);
    leave(3);
}

void run(long *sp)
{
    if (sp[0] > 1)
        second();
    char *shared = map(8 * 4096, 0x21), *own = map(40 * 4096, 0x22);
    fill(own, 40, 1024);
    char *heap = (char *)call(12, 0, 0, 0, 0, 0, 0);
    call(12, (long)heap + 12 * 4096 + 100, 0, 0, 0, 0, 0);
    fill(heap, 12, 2048);
    for (long n = 0; n < 3; n++) {
        if (call(57, 0, 0, 0, 0, 0, 0) == 0) {
            fill(shared + n * 4096, 2, 256);
            fill(own + 8 * 4096 * n, 8, 512);
            call(11, (long)own + 16 * 4096, 4 * 4096, 0, 0, 0, 0);
            call(10, (long)own, 4 * 4096, 1, 0, 0, 0);
            fill(own + 20 * 4096, 4, 2048);
            if (n == 1) {
                char *argv[] = {"family", "again", 0}, *env[] = {0};
                call(59, sp[1], (long)argv, (long)env, 0, 0, 0);
            }
            leave(n);
        }
        fill(own + 30 * 4096, 10, 1024);
    }
    for (long n = 0; n < 3; n++)
        call(61, -1, 0, 0, 0, 0, 0);
    fill(shared, 8, 1024);
    own = (char *)call(25, (long)own, 40 * 4096, 200 * 4096, 1, 0, 0);
    fill(own, 60, 1024);
    call(28, (long)own + 4096, 16 * 4096, 4, 0, 0, 0);
    fill(own, 20, 2048);
    call(12, (long)heap + 4096, 0, 0, 0, 0, 0);
    call(11, (long)own, 30 * 4096, 0, 0, 0, 0);
    char *again = map(16 * 4096, 0x22);
    fill(again, 16, 512);
    leave(0);
}

__attribute__((naked)) void _start(void)
{
    asm("mov %rsp, %rdi\n and $-16, %rsp\n call run");
}
