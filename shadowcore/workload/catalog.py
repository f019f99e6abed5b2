"""The workloads: what processes of the guest kernel do, each a short function with parameters and a seed.

A workload is a generator: it sets its processes up, yields, and from then on yields after each round of work. Rounds
are arrays of kernel operations (CALL_DTYPE), carried out without the GIL. The same seed gives the same operations
whatever the design of the VM.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ConfigError
from ..guest.options import File, Program
from .script import AREA, Guest, workload


@workload(
    "pingpong",
    "64MiB",
    processes=(2, 2, 512, "processes in the ring"),
    pages=(16, 1, 4096, "pages that each works on"),
    touches=(512, 1, 1 << 20, "accesses by which each does so, at random"),
)
def pingpong(guest: Guest, processes: int, pages: int, touches: int) -> Iterator[None]:
    """A token goes round a ring of processes through pipes; each works on its pages (lmbench's lat_ctx)."""
    program = guest.kernel.program(text=32, data=4, bss=4)
    ring = [guest.spawn(program) for _ in range(processes)]
    pipes = [guest.kernel.pipe() for _ in ring]
    token = guest.stack - 64
    for process in ring:
        guest.map(process, AREA, pages)
        guest.sweep(process, AREA, pages, write=True)
    guest.send(ring[0], pipes[0], token, 8)
    guest.go()
    yield
    for i in range(processes):
        process = ring[(i + 1) % processes]
        guest.receive(process, pipes[i], token)
        guest.scatter(process, AREA, pages << 12, touches)
        guest.send(process, pipes[(i + 1) % processes], token, 8)
    yield from guest.repeat()


@workload(
    "hackbench",
    "128MiB",
    groups=(1, 1, 20, "groups of 40 tasks: 20 senders, 20 receivers"),
    bytes=(104, 8, 4096, "bytes of a message, rounded up to a multiple of 8"),
    burst=(8, 1, 16, "messages that wait in a pipe before its reader runs"),
    touches=(64, 1, 4096, "accesses of a task to its own data, each time it runs"),
)
def hackbench(guest: Guest, groups: int, bytes: int, burst: int, touches: int) -> Iterator[None]:
    """Groups of 20 senders and 20 receivers, all to all, processes forked from one (hackbench)."""
    kernel = guest.kernel
    program = kernel.program(text=64, data=16, bss=16)
    parent = guest.spawn(program)
    guest.heap(parent, guest.heap_of(program) + (64 << 12))
    guest.sweep(parent, guest.heap_of(program), 64, write=True)
    teams = [([guest.fork(parent) for _ in range(20)], [guest.fork(parent) for _ in range(20)]) for _ in range(groups)]
    pipes = [[kernel.pipe() for _ in range(20)] for _ in range(groups)]
    guest.go()
    yield
    length = min((bytes + 7) & ~7, 4096)
    message = guest.heap_of(program)
    for first in range(0, 20, burst):
        for (senders, receivers), own in zip(teams, pipes, strict=True):
            some = senders[first : first + burst]
            for sender in some:
                guest.scatter(sender, message, 16 << 12, touches, write=True)
                for pipe in own:
                    guest.send(sender, pipe, message, length)
            for receiver, pipe in zip(receivers, own, strict=True):
                for _ in some:
                    guest.receive(receiver, pipe, message)
                guest.scatter(receiver, message, 16 << 12, touches)
    yield from guest.repeat()


@workload(
    "fork-storm",
    "128MiB",
    pages=(256, 1, 65536, "pages of the parent"),
    children=(16, 1, 256, "children alive at a time"),
    written=(32, 0, 65536, "pages that each child writes"),
)
def fork_storm(guest: Guest, pages: int, children: int, written: int) -> Iterator[None]:
    """A process forks without end; its children write some of their pages and exit."""
    parent = guest.spawn(guest.kernel.program())
    guest.map(parent, AREA, pages)
    guest.sweep(parent, AREA, pages, write=True)
    guest.go()
    yield
    while True:
        alive = [guest.fork(parent) for _ in range(children)]
        guest.scatter(parent, AREA, pages << 12, written, write=True)
        for child in alive:
            guest.scatter(child, AREA, pages << 12, written, write=True)
            guest.exit(child)
        guest.go()
        yield


SHELL = {
    "children": (4, 1, 16, "processes of a pipeline"),
    "exec_percent": (31, 0, 100, "percent of them that exec; the others are built in"),
    "text": (500, 16, 16384, "pages of the program's code"),
    "windows": (19, 1, 1024, "stretches of 16 of them that a process runs through"),
    "heap": (20, 1, 4096, "pages of the shell's heap"),
    "dirty": (4, 0, 4096, "of these, pages that the shell writes between two forks, and each child"),
    "stack": (2, 0, 32, "pages of the stack that they write besides"),
    "reads": (11, 0, 4096, "other pages of the heap that each child reads first"),
    "fresh": (8, 0, 4096, "pages that a process allocates"),
    "work": (250_000, 0, 1 << 32, "accesses of each process to these"),
    "slice": (8_000_000, 1000, 1 << 32, "accesses after which a process is preempted"),
}


def _run_code(guest: Guest, process: int, text: int, windows: int) -> None:
    """Fetches from `windows` different stretches of 16 pages of code."""
    total = text // 16
    for window in guest.rng.permutation(total)[:windows].tolist():
        guest.execute(process, guest.text + window * 65536, 4, 4096)


def _write(guest: Guest, p: dict[str, int], program: Program, process: int) -> None:
    """What the shell, and each child of it, writes after a fork."""
    guest.sweep(process, guest.heap_of(program), p["dirty"], write=True)
    guest.sweep(process, guest.stack - (p["stack"] << 12), p["stack"], write=True)


def _start(guest: Guest, p: dict[str, int], program: Program, child: int) -> None:
    """A member of a pipeline comes to life: it reads of what the shell has, writes what that has written since, and
    perhaps execs."""
    guest.sweep(child, guest.heap_of(program) + (p["dirty"] << 12), p["reads"])
    _write(guest, p, program, child)
    _run_code(guest, child, p["text"], p["windows"])
    if guest.rng.integers(100) < p["exec_percent"]:
        guest.exec(child, program)
        _run_code(guest, child, p["text"], p["windows"])
        guest.sweep(child, guest.text + (program.text << 12), program.data // 2, write=True)


def _finish(guest: Guest, p: dict[str, int], shell: int, child: int, pipes: list[int], place: int) -> None:
    """It reads from the one before it, works, writes to the one after it, and exits."""
    buffer = guest.stack - 4096
    if place:
        guest.receive(child, pipes[place - 1], buffer)
    if p["fresh"]:
        guest.map(child, AREA, p["fresh"])
        guest.sweep(child, AREA, p["fresh"], write=True)
        for done in range(0, p["work"], p["slice"]):
            piece = min(p["slice"], p["work"] - done)
            if done:
                guest.syscall(shell)
            guest.scatter(child, AREA, p["fresh"] << 12, piece // 2)
            guest.scatter(child, AREA, p["fresh"] << 12, piece - piece // 2, write=True)
        guest.unmap(child, AREA, min(p["fresh"], 4))
    if place + 1 < p["children"]:
        guest.send(child, pipes[place], buffer, 512)
    guest.exit(child)


def _pipeline(guest: Guest, p: dict[str, int], program: Program, shell: int, pipes: list[int]) -> None:
    """The shell forks the members, each of which runs until it waits for the one before it; then they finish, one
    after the other, and the shell hears of each."""
    children = []
    for _ in range(p["children"]):
        children.append(guest.fork(shell))
        _write(guest, p, program, shell)
    for child in children:
        _start(guest, p, program, child)
    for place, child in enumerate(children):
        _finish(guest, p, shell, child, pipes, place)
        guest.syscall(shell)


@workload("shell", "64MiB", None, **SHELL)
def shell(guest: Guest, **p: int) -> Iterator[None]:
    """A shell script of pipelines: fork, sometimes exec, exit; calibrated by a recording of one."""
    if p["dirty"] + p["reads"] > p["heap"]:
        raise ConfigError(
            f"shell: dirty, reads: {p['dirty']} and {p['reads']} are more than the {p['heap']} pages of the heap"
        )
    program = guest.kernel.program(text=p["text"], data=8, bss=8)
    me = guest.spawn(program)
    heap = guest.heap_of(program)
    guest.heap(me, heap + (p["heap"] << 12))
    guest.sweep(me, heap, p["heap"], write=True)
    guest.sweep(me, guest.stack - (p["stack"] << 12), p["stack"], write=True)
    _run_code(guest, me, p["text"], p["windows"])
    pipes = [guest.kernel.pipe() for _ in range(p["children"])]
    guest.go()
    yield
    while True:
        _pipeline(guest, p, program, me, pipes)
        guest.go()
        yield


def _compiler(guest: Guest, make: int, cc: Program, headers: File, p: dict[str, int]) -> None:
    """make forks, the child becomes the compiler, reads its source and headers, builds its trees, exits."""
    job = guest.fork(make)
    guest.exec(job, cc)
    _run_code(guest, job, cc.text, cc.text // 24)
    guest.map(job, AREA, headers.pages, headers)
    for first in guest.rng.integers(0, headers.pages, 24).tolist():
        guest.sweep(job, AREA + (first << 12), min(8, headers.pages - first))
    heap = guest.heap_of(cc)
    for step in range(4):
        guest.heap(job, heap + ((step + 1) * p["heap"] // 4 << 12))
        grown = max(1, (step + 1) * p["heap"] // 4)
        guest.sweep(job, heap + (step * p["heap"] // 4 << 12), p["heap"] // 4, write=True)
        guest.scatter(job, heap, grown << 12, p["work"] // 6)
        guest.scatter(job, heap, grown << 12, p["work"] // 12, write=True)
    for _ in range(4):
        guest.send(job, p["pipe"], heap, 2048)
        guest.receive(make, p["pipe"], guest.stack - 4096)
    guest.exit(job)


COMPILE = {
    "text": (1200, 64, 16384, "pages of the compiler's code"),
    "headers": (1024, 32, 1 << 18, "pages of source files, in the page cache"),
    "heap": (384, 4, 1 << 18, "pages that a job allocates"),
    "work": (60_000, 0, 1 << 32, "accesses of a job to them"),
}


@workload("compile", "128MiB", None, **COMPILE)
def compile_(guest: Guest, **p: int) -> Iterator[None]:
    """Many short processes of one program, that read files from the page cache and grow heaps (a build)."""
    cc = guest.kernel.program(text=p["text"], data=48, bss=32)
    headers = guest.kernel.file(p["headers"])
    make = guest.spawn(guest.kernel.program(text=128, data=8, bss=8))
    guest.go()
    yield
    settings = p | {"pipe": guest.kernel.pipe()}
    while True:
        _compiler(guest, make, cc, headers, settings)
        guest.go()
        yield


@workload(
    "webserver",
    "192MiB",
    workers=(16, 1, 512, "processes, forked in advance"),
    shared=(8192, 16, 1 << 20, "pages of the cache that all share"),
    touches=(256, 1, 1 << 16, "accesses to it for a request, 7 of 8 to its sixteenth that is asked for most"),
    requests=(8, 1, 1024, "requests that a worker serves before the next one runs"),
)
def webserver(guest: Guest, workers: int, shared: int, touches: int, requests: int) -> Iterator[None]:
    """Workers forked in advance, which serve requests from a large shared memory (a prefork server)."""
    program = guest.kernel.program(text=256, data=32, bss=32)
    master = guest.spawn(program)
    guest.map(master, AREA, shared, guest.kernel.file(shared, zero=True), shared=True)
    guest.sweep(master, AREA, shared, write=True)
    team = [guest.fork(master) for _ in range(workers)]
    for worker in team:
        guest.map(worker, AREA + (shared << 12) + 0x10000, 32)
        guest.sweep(worker, AREA + (shared << 12) + 0x10000, 32, write=True)
    guest.go()
    yield
    for worker in team:
        for _ in range(requests):
            guest.syscall(worker)
            guest.scatter(worker, AREA, max(1, shared // 16) << 12, touches - touches // 8)
            guest.scatter(worker, AREA, shared << 12, touches // 8)
            guest.scatter(worker, AREA + (shared << 12) + 0x10000, 32 << 12, touches // 4 + 1, write=True)
            guest.scatter(worker, AREA, shared << 12, 2, write=True)
            guest.syscall(worker, 16)
    yield from guest.repeat()


@workload(
    "database",
    "256MiB",
    pages=(24576, 64, 1 << 24, "pages of the buffer pool, of which an eighth is asked for most of the time"),
    index=(1024, 1, 1 << 24, "of these, pages of the upper levels of its trees"),
    lookups=(64, 1, 4096, "transactions between two system calls"),
)
def database(guest: Guest, pages: int, index: int, lookups: int) -> Iterator[None]:
    """One big process with random access: down a tree, to a row, and sometimes a change (a database)."""
    if index > pages:
        raise ConfigError(f"database: index: {index} is more than the {pages} pages of the pool")
    server = guest.spawn(guest.kernel.program(text=1024, data=64, bss=64))
    guest.map(server, AREA, pages)
    guest.sweep(server, AREA, pages, write=True)
    guest.go()
    yield
    for _ in range(16):
        guest.scatter(server, AREA, max(4096, index << 8), 2 * lookups)
        guest.scatter(server, AREA, index << 12, 2 * lookups)
        guest.scatter(server, AREA, max(1, pages // 8) << 12, 3 * lookups)
        guest.scatter(server, AREA, pages << 12, lookups)
        guest.scatter(server, AREA, max(1, pages // 8) << 12, lookups, write=True)
        guest.syscall(server, 16)
    yield from guest.repeat()


@workload(
    "analytics",
    "256MiB",
    {"large_pages": 32},
    large=(32, 1, 32, "large pages (2 MiB; 4 MiB in mode 32) of the columns"),
    scan=(1, 0, 1, "1: in large pages, 0: in pages of 4096 bytes"),
    stride=(64, 8, 4096, "bytes between two accesses"),
    groups=(64, 1, 4096, "pages of the table of groups"),
)
def analytics(guest: Guest, large: int, scan: int, stride: int, groups: int) -> Iterator[None]:
    """A scan of columns in large pages, aggregated into a small table (a column store)."""
    analyst = guest.spawn(guest.kernel.program(text=256, data=32, bss=32))
    pages = large * (guest.huge >> 12)
    base = 0x60000000
    guest.map(analyst, base, pages, guest.kernel.file(pages, zero=True, large=bool(scan)), shared=True)
    guest.sweep(analyst, base, pages, write=True)
    guest.map(analyst, AREA, groups)
    guest.sweep(analyst, AREA, groups, write=True)
    guest.go()
    yield
    chunk = 65536
    for at in range(0, pages << 12, chunk):
        guest.sweep(analyst, base + at, chunk // stride, stride)
        guest.scatter(analyst, AREA, groups << 12, chunk // stride // 8 + 1, write=True)
    yield from guest.repeat()


@workload(
    "demand",
    "128MiB",
    pages=(4096, 1, 1 << 22, "pages touched and given back, again and again"),
    touches=(64, 1, 512, "accesses to each, spread over the page"),
)
def demand(guest: Guest, pages: int, touches: int) -> Iterator[None]:
    """Memory is mapped, touched and unmapped, again and again: page faults and dying tables."""
    eater = guest.spawn(guest.kernel.program())
    guest.go()
    yield
    guest.map(eater, AREA, pages)
    guest.sweep(eater, AREA, pages * touches, 4096 // touches // 8 * 8 or 8, write=True)
    guest.unmap(eater, AREA, pages)
    yield from guest.repeat()


@workload(
    "ageing",
    "96MiB",
    {"swap_pages": 32768},
    processes=(4, 1, 256, "processes"),
    pages=(4096, 8, 1 << 20, "pages of each"),
    hot=(256, 1, 1 << 20, "of these, pages in use"),
    scan=(256, 1, 1 << 20, "pages of a process looked at in each round"),
    touches=(16384, 1, 1 << 20, "accesses of a process in each round"),
    swap=(1, 0, 1, "1: pages that were not accessed are swapped out, 0: accessed bits are cleared alone"),
)
def ageing(guest: Guest, processes: int, pages: int, hot: int, scan: int, touches: int, swap: int) -> Iterator[None]:
    """The kernel looks at accessed bits and takes away what is not used (kswapd)."""
    hot = min(hot, pages)
    program = guest.kernel.program()
    team = [guest.spawn(program) for _ in range(processes)]
    for process in team:
        guest.map(process, AREA, pages)
        guest.sweep(process, AREA, pages, write=True)
    guest.go()
    yield
    while True:
        for process in team:
            guest.scatter(process, AREA, hot << 12, touches)
            guest.scatter(process, AREA, hot << 12, touches // 4 + 1, write=True)
            guest.scatter(process, AREA, pages << 12, 16)
            (guest.swap_out if swap else guest.age)(process, scan)
        guest.go()
        yield


@workload(
    "kbuild-like",
    "192MiB",
    None,
    **COMPILE,
    scripts=(4, 0, 64, "pipelines of the shell for each four jobs of the compiler"),
)
def kbuild_like(guest: Guest, scripts: int, **p: int) -> Iterator[None]:
    """A mixture: jobs of a compiler, pipelines of a shell between them, idle time, ageing (a kernel build)."""
    kernel = guest.kernel
    cc = kernel.program(text=p["text"], data=48, bss=32)
    headers = kernel.file(p["headers"])
    make = guest.spawn(kernel.program(text=128, data=8, bss=8))
    busybox = kernel.program(text=500, data=16, bss=8)
    sh = guest.spawn(busybox)
    settings = {name: what[0] for name, what in SHELL.items()} | {"work": 2000, "children": 2}
    guest.heap(sh, guest.heap_of(busybox) + (settings["heap"] << 12))
    guest.sweep(sh, guest.heap_of(busybox), settings["heap"], write=True)
    pipes = [kernel.pipe() for _ in range(settings["children"])]
    p["pipe"] = kernel.pipe()
    guest.go()
    yield
    while True:
        for _ in range(4):
            _compiler(guest, make, cc, headers, p)
        for _ in range(scripts):
            _pipeline(guest, settings, busybox, sh, pipes)
        guest.idle(2)
        guest.age(sh, 64)
        guest.go()
        yield


@workload(
    "idle",
    "16MiB",
    processes=(8, 1, 512, "processes asleep"),
    ticks=(1000, 1, 1 << 20, "timer ticks between two wakeups"),
)
def idle(guest: Guest, processes: int, ticks: int) -> Iterator[None]:
    """Nothing runs but timer ticks; now and then a process wakes up for a moment."""
    program = guest.kernel.program(text=32, data=4, bss=4)
    team = [guest.spawn(program) for _ in range(processes)]
    for process in team:
        guest.sweep(process, guest.stack - 8, 1, write=True)
    guest.go()
    yield
    for process in team:
        guest.syscall(process)
        guest.sweep(process, guest.stack - 64, 8, 8, write=True)
        guest.idle(ticks)
    yield from guest.repeat()
