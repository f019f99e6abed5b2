"""Operations of the guest kernel, checked and carried out one after the other."""
from shadowcore.engine.types cimport RC_BAD_OP, RC_OK, u32, u64
from shadowcore.guest.call cimport (
    BAD_AMID, BAD_CPU, BAD_FILE, BAD_FLAGS, BAD_NOTHING, BAD_OP, BAD_PIPE, BAD_PROCESS, BAD_PROGRAM, BAD_PROT,
    BAD_RANGE, BAD_SIZE, CALL_AGE, CALL_BARE, CALL_BRK, CALL_COUNT, CALL_CPU, CALL_DROP, CALL_EXEC, CALL_EXIT,
    CALL_FORK, CALL_IDLE, CALL_MMAP, CALL_MOVE, CALL_MPROTECT, CALL_MUNMAP, CALL_PIPE_READ, CALL_PIPE_WRITE, CALL_SPAWN,
    CALL_SWAP_OUT, CALL_SWITCH, CALL_SYSCALL, CALL_TOUCH, sc_call,
)
from shadowcore.guest.cpu cimport cpu_enter, cpu_go, cpu_work
from shadowcore.guest.lifecycle cimport (
    process_age, process_exec, process_exit, process_fork, process_idle, process_reap, process_spawn, process_swap_out,
    process_switch,
)
from shadowcore.guest.mappings cimport memory_brk, memory_drop, memory_map, memory_move, memory_protect, memory_unmap
from shadowcore.guest.state cimport (
    FILE_LARGE, MAP_ANON, MAP_GROWS, MAP_LARGE, MAP_SHARED, NO_PROCESS, PROCESS_ALIVE, PROCESS_ENDED, sc_guest,
)
from shadowcore.guest.tables cimport flush_aside, flush_resume, sc_flush
from shadowcore.guest.user cimport (
    TOUCH_FETCH, TOUCH_RANDOM, TOUCH_WRITE, pipe_read, pipe_write, user_reclaim, user_touch,
)

cdef enum:
    LOW_FRAMES = 32


cdef inline bint _pages(const sc_guest *g, u64 addr, u64 nbytes) noexcept nogil:
    """[addr, addr + nbytes) is made of pages of the user half, at least one."""
    return (addr | nbytes) & 4095 == 0 and nbytes != 0 and addr < g.task_size and nbytes <= g.task_size - addr


cdef int _check_map(const sc_guest *g, const sc_call *c) noexcept nogil:
    cdef u64 file = c.value & 0xFFFFFFFFU
    if c.flags & ~(MAP_SHARED | MAP_GROWS) or (c.flags & MAP_GROWS and (c.flags & MAP_SHARED or file)):
        return BAD_FLAGS
    if file > g.n_files:
        return BAD_FILE
    if file == 0 and (c.flags & MAP_SHARED or c.value):
        return BAD_FILE             # shared memory is a file too
    # Page 0 is never mapped (mmap_min_addr); address 0 lets the kernel choose.
    return BAD_NOTHING if _pages(g, c.addr, c.count) else BAD_RANGE


cdef int call_check(const sc_guest *g, const sc_call *c, u64 after) noexcept nogil:
    """Why `c` cannot be, whatever the state of the processes; BAD_NOTHING if it can. `after` calls follow it."""
    cdef u64 i
    if c.op >= CALL_COUNT:
        return BAD_OP
    if c.op != CALL_IDLE and c.process >= g.max_procs:
        return BAD_PROCESS
    if c.op == CALL_TOUCH:
        if c.size != 1 and c.size != 2 and c.size != 4 and c.size != 8:
            return BAD_SIZE
        if c.flags & ~(TOUCH_WRITE | TOUCH_FETCH | TOUCH_RANDOM) or c.flags & 3 == 3:
            return BAD_FLAGS
        if c.flags & TOUCH_RANDOM and (c.value < c.size or c.value // c.size > <u64>1 << 32):
            return BAD_RANGE
    elif c.op == CALL_MMAP or c.op == CALL_MPROTECT or c.op == CALL_MUNMAP or c.op == CALL_DROP or c.op == CALL_MOVE:
        if c.prot > 7:
            return BAD_PROT
        if c.op == CALL_MMAP:
            return _check_map(g, c)
        if not _pages(g, c.addr, c.count) or (c.op == CALL_MOVE and not _pages(g, c.value, c.count)):
            return BAD_RANGE
        if c.op == CALL_MUNMAP:
            if c.value > after:
                return BAD_AMID
            for i in range(1, c.value + 1):
                if c[i].op != CALL_TOUCH and c[i].op != CALL_CPU:
                    return BAD_AMID
    elif c.op == CALL_BRK:
        if c.addr >= g.task_size:
            return BAD_RANGE
    elif c.op == CALL_FORK:
        if c.value >= g.max_procs or c.value == c.process:
            return BAD_PROCESS
    elif c.op == CALL_SPAWN or c.op == CALL_EXEC:
        if c.value >= g.n_programs and c.value != NO_PROCESS:
            return BAD_PROGRAM
        if c.flags & ~CALL_BARE or (c.flags and c.value != NO_PROCESS):
            return BAD_FLAGS
        if c.flags and (c.addr & 4095 or c.addr >= g.task_size):
            return BAD_RANGE
    elif c.op == CALL_SYSCALL or c.op == CALL_IDLE:
        if c.count > 1 << 20:
            return BAD_RANGE
    elif c.op == CALL_CPU:
        if c.value >= g.n_cpus:
            return BAD_CPU
    elif c.op == CALL_PIPE_WRITE:
        if c.value >= g.n_pipes:
            return BAD_PIPE
        if c.count & 7 or c.count == 0 or (c.addr & 4095) + c.count > 4096 or c.addr >= g.task_size:
            return BAD_RANGE
    elif c.op == CALL_PIPE_READ:
        if c.value >= g.n_pipes:
            return BAD_PIPE
        if c.addr >= g.task_size or (c.addr & 4095) > 4088:
            return BAD_RANGE
    return BAD_NOTHING


cdef int _touch(sc_guest *g, const sc_call *c, u64 start, u64 stop, u64 *result) noexcept nogil:
    cdef int rc = RC_OK
    if g.procs[c.process].state != PROCESS_ALIVE:
        return RC_BAD_OP
    if g.current != c.process or g.idle:
        rc = process_switch(g, c.process)
    return user_touch(g, c.flags, c.size, c.addr, c.value, start, stop, result) if rc == RC_OK else rc


cdef struct sc_amid:                # calls that are carried out amid another one
    const sc_call *calls
    u64 *results
    u64 n
    u64 at                          # the next
    u32 cpu                         # whose call it is


cdef int _meanwhile(sc_guest *g) noexcept nogil:
    """Go on with the calls that come amid this one, up to the return to its processor."""
    cdef sc_amid *amid = <sc_amid *>g.meanwhile_data
    cdef const sc_call *c
    cdef sc_flush waiting
    cdef int rc = RC_OK
    if amid.at == amid.n:
        return RC_OK
    g.meanwhile = NULL
    flush_aside(g, &waiting)
    while rc == RC_OK and amid.at < amid.n:
        c = &amid.calls[amid.at]
        if c.op == CALL_TOUCH:
            rc = _touch(g, c, 0, c.count, &amid.results[amid.at])
        else:
            cpu_go(g, <u32>c.value)
        amid.at += rc == RC_OK
        if c.op == CALL_CPU and c.value == amid.cpu:
            break
    flush_resume(g, &waiting)
    cpu_go(g, amid.cpu)
    g.meanwhile = _meanwhile
    return rc


cdef int _unmap(sc_guest *g, const sc_call *c, u64 *at, u64 *results) noexcept nogil:
    """munmap, with the c.value calls after it amid; at[0] passes those that were."""
    cdef sc_amid amid
    cdef int rc
    amid.calls, amid.results, amid.n, amid.at, amid.cpu = c + 1, results + 1, c.value, 0, g.cpu
    g.meanwhile, g.meanwhile_data = _meanwhile, &amid
    rc = memory_unmap(g, c.process, c.addr, c.count)
    g.meanwhile = NULL
    at[0] += amid.at
    return rc


cdef inline bint _slot_free(const sc_guest *g, u64 p) noexcept nogil:
    return g.procs[p].state != PROCESS_ALIVE


cdef int _as_process(sc_guest *g, const sc_call *c, u64 *at, u64 *result) noexcept nogil:
    """What a process does or asks for: it is scheduled, and all but accesses of its own enter the kernel. at[0] passes
    calls that were done amid this one."""
    cdef u32 p = c.process
    cdef u32 flags
    cdef int rc
    if g.procs[p].state != PROCESS_ALIVE or (c.op == CALL_FORK and not _slot_free(g, c.value)):
        return RC_BAD_OP
    rc = process_switch(g, p) if g.current != p or g.idle else RC_OK
    if rc == RC_OK:
        rc = cpu_enter(g)
    if rc != RC_OK or c.op == CALL_SWITCH:
        return rc
    g.n.syscalls += 1
    rc = cpu_work(g, p, <u32>c.count if c.op == CALL_SYSCALL else g.kernel_work)
    if rc == RC_OK and g.n_free < LOW_FRAMES:
        rc = user_reclaim(g)
    if rc != RC_OK or c.op == CALL_SYSCALL:
        return rc
    if c.op == CALL_FORK:
        if g.procs[c.value].state == PROCESS_ENDED:
            rc = process_reap(g)    # another processor has not left its root yet
            if rc != RC_OK:
                return rc
        return process_fork(g, p, <u32>c.value)
    if c.op == CALL_EXEC:
        return process_exec(g, p, <u32>c.value, c.flags & CALL_BARE, c.addr)
    if c.op == CALL_EXIT:
        return process_exit(g, p)
    if c.op == CALL_MMAP:
        flags = c.flags
        if c.value & 0xFFFFFFFFU and g.file_kind[(c.value & 0xFFFFFFFFU) - 1] == FILE_LARGE:
            flags |= MAP_SHARED | MAP_LARGE
        if flags & MAP_GROWS:
            flags |= MAP_ANON
        return memory_map(g, p, c.addr, c.count, c.prot, flags, <u32>c.value, c.value >> 32, result)
    if c.op == CALL_MUNMAP:
        return _unmap(g, c, at, result)
    if c.op == CALL_MPROTECT:
        return memory_protect(g, p, c.addr, c.count, c.prot)
    if c.op == CALL_DROP:
        return memory_drop(g, p, c.addr, c.count)
    if c.op == CALL_MOVE:
        return memory_move(g, p, c.value, c.count, c.addr)
    if c.op == CALL_BRK:
        rc = memory_brk(g, p, c.addr)
        result[0] = g.procs[p].brk
        return rc
    if c.op == CALL_PIPE_WRITE:
        return pipe_write(g, <u32>c.value, c.addr, <u32>c.count)
    return pipe_read(g, <u32>c.value, c.addr)


cdef int _as_kernel(sc_guest *g, const sc_call *c, u64 *result) noexcept nogil:
    """What the kernel does by itself, on whatever root is loaded."""
    cdef int rc
    if c.op == CALL_IDLE:
        return process_idle(g)
    if c.op == CALL_SPAWN:
        if not _slot_free(g, c.process):
            return RC_BAD_OP
        if g.procs[c.process].state == PROCESS_ENDED:
            rc = process_reap(g)
            if rc != RC_OK:
                return rc
        return process_spawn(g, c.process, <u32>c.value, c.flags & CALL_BARE, c.addr)
    if g.procs[c.process].state != PROCESS_ALIVE:
        return RC_BAD_OP
    rc = cpu_enter(g)
    if rc != RC_OK:
        return rc
    if c.op == CALL_AGE:
        return process_age(g, c.process, c.count, result)
    return process_swap_out(g, c.process, c.count, result)


cdef int call_run(sc_guest *g, const sc_call *calls, u64 n, u64 *at, u64 *within, u64 budget,
                  u64 *results) noexcept nogil:
    """Carry out calls from number at[0], access within[0] of it, on, until `n` are done or some `budget` of accesses
    is used up. A call that fails leaves at[0] at itself."""
    cdef const sc_call *c
    cdef u64 stop
    cdef int rc
    while at[0] < n and budget:
        c = &calls[at[0]]
        if c.op == CALL_TOUCH:
            stop = c.count if c.count - within[0] <= budget else within[0] + budget
            rc = _touch(g, c, within[0], stop, &results[at[0]])
            if rc != RC_OK:
                return rc
            budget -= stop - within[0]
            within[0] = stop
            if stop < c.count:
                return RC_OK
            within[0] = 0
        elif c.op == CALL_CPU:
            cpu_go(g, <u32>c.value)
        else:
            if c.op == CALL_SPAWN or c.op == CALL_AGE or c.op == CALL_SWAP_OUT or c.op == CALL_IDLE:
                rc = _as_kernel(g, c, &results[at[0]])
            else:
                rc = _as_process(g, c, at, &results[at[0]])
            if rc != RC_OK:
                return rc
            budget -= min(budget, <u64>1024)    # it may take long
        at[0] += 1
    return RC_OK
