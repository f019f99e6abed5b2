/* The program whose accesses parent.txt and child.txt are: gcc -O1 -nostdlib -static -fno-stack-protector program.c */
static long call(long n, long a, long b, long c, long d, long e, long f)
{
    register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
    asm volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return n;
}

void _start(void)
{
    volatile char *heap = (char *)call(12, 0, 0, 0, 0, 0, 0);
    call(12, (long)heap + 8192, 0, 0, 0, 0, 0);
    heap[0] = 1;
    volatile char *p = (char *)call(9, 0, 16384, 3, 0x22, -1, 0);
    p[0] = 1;
    p[4096] += 2;
    p = (char *)call(25, (long)p, 16384, 32768, 1, 0, 0);
    call(28, (long)p, 4096, 4, 0, 0, 0);
    long fd = call(2, (long)"/proc/self/exe", 0, 0, 0, 0, 0);
    volatile char *file = (char *)call(9, 0, 4096, 1, 2, fd, 0);
    heap[1] = file[0];
    if (call(57, 0, 0, 0, 0, 0, 0) == 0) {
        p[8192] = 3;
        call(10, (long)p, 4096, 1, 0, 0, 0);
        call(231, 7, 0, 0, 0, 0, 0);
    }
    call(61, -1, 0, 0, 0, 0, 0);
    call(11, (long)p, 32768, 0, 0, 0, 0);
    call(231, 0, 0, 0, 0, 0, 0);
}
