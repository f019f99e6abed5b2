"""What the guest's processes do. An access that faults is taken to the kernel, serviced, and made again."""
from libc.string cimport memset

from shadowcore.engine.access cimport OP_ADD, OP_FETCH, OP_READ, OP_WRITE, access_do, sc_op, sc_result
from shadowcore.engine.types cimport RC_GP, RC_MMIO, RC_OK, u8, u16, u32, u64
from shadowcore.guest.cpu cimport cpu_access, cpu_enter, cpu_leave, cpu_log, cpu_string, cpu_string_at, cpu_work
from shadowcore.guest.fault cimport fault_service
from shadowcore.guest.frames cimport frame_put, frame_take
from shadowcore.guest.lifecycle cimport process_swap_out
from shadowcore.guest.state cimport (
    FRAME_KERNEL, PIPE_BUFFERS, PROCESS_ALIVE, RC_NOMEM, RC_PANIC, RC_SEGV, history_add, sc_gpipe, sc_guest,
)
from shadowcore.guest.user cimport (
    PROGRAM_FETCH, PROGRAM_MODIFY, PROGRAM_READ, PROGRAM_WRITE, TOUCH_FETCH, TOUCH_RANDOM, TOUCH_WRITE,
)

cdef enum:
    FAULTS = 4                      # that one access may take: a swapped page that was shared takes two
    LOW_FRAMES = 32                 # fewer free frames than this: pages are swapped out first, if there is swap
    RECLAIM_SCAN = 128              # pages looked at in each process, each time round
    RECLAIM_ROUNDS = 8


cdef int user_reclaim(sc_guest *g) noexcept nogil:
    """Swap pages out, a little of every process, until frames are free again or nothing more can be had."""
    cdef u64 done
    cdef u32 p
    cdef u32 rounds = 0
    cdef u32 idle = 0
    cdef int rc
    if g.swap_pages == 0:
        return RC_OK
    while g.n_free < LOW_FRAMES and rounds < RECLAIM_ROUNDS and idle < 2:
        rounds += 1
        done = 0
        for p in range(g.max_procs):
            if g.procs[p].state == PROCESS_ALIVE:
                rc = process_swap_out(g, p, RECLAIM_SCAN, &done)
                if rc != RC_OK:
                    return rc
        idle = 0 if done else idle + 1
    return RC_OK


cdef int _fault(sc_guest *g, bint user, u64 va, u32 code) noexcept nogil:
    """The page fault of the current process: into the kernel, service, back. RC_SEGV: refused."""
    cdef int back
    cdef int rc = cpu_enter(g) if user else RC_OK
    if rc == RC_OK:
        rc = cpu_work(g, g.current, g.kernel_work // 4)
    if rc == RC_OK and g.n_free < LOW_FRAMES:
        rc = user_reclaim(g)
    if rc == RC_OK:
        rc = fault_service(g, g.current, va, code)
    if rc == RC_SEGV:
        g.n.faults_segv += 1
    elif rc != RC_OK:
        return rc
    if user:
        back = cpu_leave(g)
        if back != RC_OK:
            return back
    return rc


cdef inline int _one(sc_guest *g, sc_op *o, sc_result *r) noexcept nogil:
    """One access of the current process, made again after each fault that was serviced."""
    cdef int left = FAULTS
    cdef int rc
    while True:
        if g.recording:
            rc = cpu_log(g, o.op, o.user, o.size, o.addr, o.value[0])
            if rc != RC_OK:
                return rc
        rc = access_do(g.mmu, g.v, o, True, r)
        if rc == RC_OK:
            history_add(g, r.gpa, r.value[0] ^ o.value[0])
            return RC_OK
        if rc < 0:
            return rc
        if rc == RC_MMIO or left == 0:
            return RC_PANIC         # nothing maps a device; a fault that comes back was not serviced
        if rc == RC_GP:
            g.n.faults_segv += 1
            rc = RC_SEGV
        else:
            left -= 1
            rc = _fault(g, o.user, g.v.cr2, r.error_code)
        if rc == RC_SEGV:
            history_add(g, ~o.addr, rc)
        if rc != RC_OK:
            return rc


cdef int user_access(sc_guest *g, u32 op, bint user, u32 size, u64 va, u64 value, sc_result *r) noexcept nogil:
    """One access of the current process; user False: the kernel's, on its behalf, to user memory."""
    cdef sc_op o
    memset(&o, 0, sizeof(o))
    o.op = <u8>op
    o.user = user
    o.size = <u8>size
    o.addr = va
    o.value[0] = value
    return _one(g, &o, r)


cdef inline u64 _random(sc_guest *g) noexcept nogil:
    """xorshift64*: the next of the kernel's own random numbers."""
    cdef u64 x = g.random
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    g.random = x
    return x * <u64>0x2545F4914F6CDD1DULL


cdef int user_touch(sc_guest *g, u32 flags, u32 size, u64 addr, u64 value, u64 start, u64 stop,
                    u64 *refused) noexcept nogil:
    """Accesses number `start` to `stop` of a series (TOUCH_*). Each store stores another value."""
    cdef sc_op o
    cdef sc_result r
    cdef u64 i
    cdef u64 span = value // size
    cdef bint write = flags & TOUCH_WRITE != 0
    cdef int rc = cpu_leave(g)
    if rc != RC_OK:
        return rc
    memset(&o, 0, sizeof(o))
    o.op = OP_FETCH if flags & TOUCH_FETCH else OP_WRITE if write else OP_READ
    o.user = True
    o.size = <u8>size
    for i in range(start, stop):
        if flags & TOUCH_RANDOM:
            # the high half of a 64 x 32 bit product: uniform over `span` words, at most 2**32 of them
            o.addr = addr + ((_random(g) >> 32) * span >> 32) * size
        else:
            o.addr = addr + i * value
        if write:
            g.sequence += 1
            o.value[0] = o.addr ^ g.sequence * <u64>0x9E3779B97F4A7C15ULL
        g.n.accesses += 1
        rc = _one(g, &o, &r)
        if rc == RC_SEGV:
            refused[0] += 1
        elif rc != RC_OK:
            return rc
    return RC_OK


cdef int user_array(sc_guest *g, const u64 *addr, const u8 *write, bint all_write, const u64 *value, u32 size,
                    u64 *done, u64 stop, u8 *outcome, u64 *loaded, u64 *gpa, u64 *refused) noexcept nogil:
    """Accesses done[0] to stop at the addresses of an array; done[0] tells how far it came. write NULL: all as
    all_write says; value NULL: each store another one.

    outcome (0 done, 1 refused), loaded, gpa: results, each where it is not NULL.
    """
    cdef sc_op o
    cdef sc_result r
    cdef u64 i
    cdef int rc = cpu_leave(g)
    if rc != RC_OK:
        return rc
    memset(&o, 0, sizeof(o))
    o.user = True
    o.size = <u8>size
    for i in range(done[0], stop):
        done[0] = i
        o.addr = addr[i]
        o.op = OP_READ
        o.value[0] = 0
        if write != NULL:
            all_write = write[i] != 0
        if all_write:
            o.op = OP_WRITE
            g.sequence += 1
            o.value[0] = value[i] if value != NULL else o.addr ^ g.sequence * <u64>0x9E3779B97F4A7C15ULL
        g.n.accesses += 1
        rc = _one(g, &o, &r)
        if rc == RC_SEGV:
            refused[0] += 1
        elif rc != RC_OK:
            return rc
        if outcome != NULL:
            outcome[i] = rc != RC_OK
            loaded[i] = o.value[0] if o.op == OP_WRITE else r.value[0]
            gpa[i] = r.gpa
    done[0] = stop
    return RC_OK


cdef inline u32 _piece(u32 left) noexcept nogil:
    """The widest access that a processor makes at once of this many bytes."""
    return 16 if left >= 16 else 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


cdef int user_program(sc_guest *g, const u8 *op, const u16 *size, const u64 *addr, u64 *done, u64 stop,
                      u64 *refused) noexcept nogil:
    """Accesses done[0] to stop as a program recording has them: reads, writes, fetches, and those that modify
    (PROGRAM_*). done[0] tells how far it came.

    A fetch is one access for each page that the instruction lies in. What modifies is one read-modify-write. An
    access of a size that the processor does not have is made piece by piece; a refusal ends it.
    """
    cdef sc_op o
    cdef sc_result r
    cdef u64 i, at
    cdef u32 left
    cdef u8 kind
    cdef int rc = cpu_leave(g)
    if rc != RC_OK:
        return rc
    memset(&o, 0, sizeof(o))
    o.user = True
    for i in range(done[0], stop):
        done[0] = i
        kind = op[i]
        at = addr[i]
        left = size[i] if size[i] else 1
        while left:
            o.addr = at
            o.value[0] = 0
            if kind == PROGRAM_FETCH:
                o.op = OP_FETCH
                o.size = 1
                left -= min(left, <u32>(4096 - (at & 4095)))
                at = (at & ~<u64>4095) + 4096
            else:
                o.size = <u8>_piece(left)
                if kind == PROGRAM_READ:
                    o.op = OP_READ
                else:
                    if kind == PROGRAM_MODIFY and o.size == 16:
                        o.size = 8
                    o.op = OP_WRITE if kind == PROGRAM_WRITE else OP_ADD
                    g.sequence += 1
                    o.value[0] = at ^ g.sequence * <u64>0x9E3779B97F4A7C15ULL
                left -= o.size
                at += o.size
            g.n.accesses += 1
            rc = _one(g, &o, &r)
            if rc == RC_SEGV:
                refused[0] += 1
                break
            if rc != RC_OK:
                return rc
    done[0] = stop
    return RC_OK


cdef int pipe_write(sc_guest *g, u32 number, u64 va, u32 nbytes) noexcept nogil:
    """write() of `nbytes` at `va`, within a page and multiples of 8, to a pipe: copied to a frame of the kernel's."""
    cdef sc_gpipe *pipe = &g.pipes[number]
    cdef sc_result r
    cdef u64 frame
    cdef u32 slot
    cdef int rc
    if pipe.count == PIPE_BUFFERS:
        g.n.pipe_blocked += 1
        return RC_OK
    frame = frame_take(g, FRAME_KERNEL)
    if frame == 0:
        return RC_NOMEM
    rc = user_access(g, OP_READ, False, 8, va, 0, &r)
    if rc == RC_OK and r.gpa >> 12 >= g.all_frames:
        rc = RC_PANIC               # a broken table of the process
    if rc == RC_OK:
        rc = cpu_string(g, frame << 12, g.ram + r.gpa, nbytes)
    if rc != RC_OK:
        frame_put(g, frame)
        return rc
    slot = (pipe.first + pipe.count) % PIPE_BUFFERS
    pipe.frame[slot] = frame
    pipe.used[slot] = nbytes
    pipe.count += 1
    g.n.pipe_writes += 1
    return RC_OK


cdef int pipe_read(sc_guest *g, u32 number, u64 va) noexcept nogil:
    """read() of the oldest buffer of a pipe to `va`; its frame is freed."""
    cdef sc_gpipe *pipe = &g.pipes[number]
    cdef sc_result r
    cdef u64 frame, word
    cdef u32 slot = pipe.first
    cdef int rc
    if pipe.count == 0:
        g.n.pipe_blocked += 1
        return RC_OK
    if (va & 4095) + pipe.used[slot] > 4096:
        return RC_SEGV              # the reader's buffer does not hold what was written
    frame = pipe.frame[slot]
    rc = cpu_access(g, OP_READ, 8, g.direct_map + (frame << 12), 0, &r)
    if rc != RC_OK:
        return rc
    word = r.value[0]
    rc = user_access(g, OP_WRITE, False, 8, va, word, &r)
    if rc == RC_OK:
        rc = cpu_string_at(g, va, r.gpa, g.ram + (frame << 12), pipe.used[slot])
    if rc != RC_OK:
        return rc
    pipe.first = (slot + 1) % PIPE_BUFFERS
    pipe.count -= 1
    frame_put(g, frame)
    g.n.pipe_reads += 1
    return RC_OK
