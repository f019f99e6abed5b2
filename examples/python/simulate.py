"""A simulator in Python, in forty lines: a direct-mapped cache behind our MMU, over memory that is its own.

The simulator owns the guest's RAM (an mmap, which other processes could share), makes the addresses, asks where they
lead, a batch at a time, and counts the misses of a cache that is indexed by host physical addresses.
"""

import mmap

import numpy as np

import shadowcore as sc

RAM = 64 << 20
DATA = 0x400000
SIZE = 16 << 20
LINES = 1024

ram = mmap.mmap(-1, RAM)
for design in ("native", "flush", "cached"):
    ram[:] = bytes(RAM)
    vm = sc.embed.machine(ram, design)
    cpu = vm.vcpus[0]
    frames = iter(range(16, 1024))
    spaces = [sc.PageTables(vm.memory, "64", allocate=lambda frames=frames: next(frames)) for _ in range(2)]
    for tables in spaces:
        tables.map(DATA, RAM // 2, SIZE, "rwu")
    for name, value in spaces[0].registers.items():
        setattr(cpu, name, value)

    zaps = []
    sc.embed.on_event(vm, zaps.append, "zap")
    cache = np.full(LINES, -1, dtype=np.int64)
    rng = np.random.default_rng(1)
    misses = faults = exits = 0
    for step in range(20):
        cpu.cr3 = spaces[step % 2].cr3
        gva = DATA + np.minimum(rng.geometric(1e-6, 10_000), SIZE - 8).astype(np.uint64)
        found = sc.embed.access_many(cpu, gva, kind=rng.integers(0, 2, len(gva), dtype=np.uint8), user=True)
        line = (found.gpa >> np.uint64(6)).astype(np.int64)
        for index, tag in zip(line % LINES, line // LINES, strict=True):
            misses += cache[index] != tag
            cache[index] = tag
        faults += np.count_nonzero(found.outcome)
        exits += int(found.exits.sum())
    print(f"{design:8} {misses} cache misses, {faults} guest faults, {exits} page-fault exits, {len(zaps)} zaps")
    where = sc.embed.translate(cpu, DATA + 0x1234, "w", user=True)
    assert where.gpa == RAM // 2 + 0x1234
    assert vm.audit().ok
