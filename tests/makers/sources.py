"""A small one of each kind of thing that a study runs."""

from pathlib import Path

import numpy as np
from places import LINUX_FORK
from program_recordings import FAMILY

import shadowcore as sc
from shadowcore.recording.kinds import ACCESS, CPL_KNOWN, FETCH, LOAD_CR3, MARK, STORE, TABLE, USER
from shadowcore.recordings import GUEST, OPERATIONS, Writer

KINDS = ("workload", "guest", "operations", "program")
SHORT = 4000
"""Operations of the workload; the recordings have about as many."""


def guest(path, records=4000):
    """The first records of a recorded Linux guest, without fetches."""
    sc.trace.load(LINUX_FORK).head(records).save(path)
    return path


def operations(path, count=4000, complete=True):
    """Reads, writes, fetches, stores to a table, INVLPGs and CR3 loads between two roots, on two processors."""
    vm = sc.VM(memory="1MiB", mmu="cached", vcpus=2)
    roots = []
    for first in (128, 176):
        tables = sc.PageTables(vm.memory, mode="64", allocate=range(first, first + 48))
        tables.map(0x400000, 0x10000, 0x20000, "rwx")
        tables.map(0x800000, 128 << 12, 0x60000, "rw")  # the tables themselves
        roots.append(tables.registers["cr3"])
    for cpu in vm.vcpus:
        tables.activate(cpu)
    rng = np.random.default_rng(1)
    ops = np.zeros(count, np.dtype([*sc.OP_DTYPE.descr, ("vcpu", "u1")]))
    ops["op"] = rng.choice([sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH], count)
    ops["size"] = np.where(ops["op"] == sc.Op.FETCH, 1, 8)
    ops["addr"] = 0x400000 + 8 * rng.integers(0, 0x22000 // 8, count)
    ops["value"], ops["vcpu"] = np.arange(count), rng.integers(0, 2, count)
    ops["op"][50::50], ops["value"][50::50], ops["size"][50::50] = sc.Op.CR3, rng.choice(roots, len(ops[50::50])), 0
    ops["op"][60::50], ops["size"][60::50] = sc.Op.INVLPG, 0
    with Writer(path, OPERATIONS, vm=vm, block=1500) as writer:
        writer.write(ops)
        writer.close(complete=complete)
    return path


def marked(path, names=True):
    """A guest whose boot ends behind its first mark; a loop of accesses to 128 pages, in three phases."""
    rows = [
        (TABLE, 0x1000, 0, 4),
        (STORE, 0x1000, 0x2027, 4 | 128),
        (TABLE, 0x2000, 0, 3),
        (STORE, 0x2000, 0x3027, 3 | 128),
    ]
    rows += [(TABLE, 0x3000, 0, 2), (STORE, 0x3000, 0x4027, 2 | 128), (STORE, 0x3008, 0x4000A7, 2 | 128)]
    rows += [
        (TABLE, 0x4000, 0, 1),
        *((STORE, 0x4000 + 8 * page, 0x10067 + 4096 * page, 1 | 128) for page in range(128)),
    ]
    rows += [(LOAD_CR3, 0x1000, 0, 0)]
    user = USER | CPL_KNOWN | 3 << 8 | 4 << 4
    places = []
    for mark in range(1, 4):
        places.append(len(rows))
        rows.append((MARK, mark, 0, 0))
        for turn in range(200):
            page = turn * 7 % 128
            rows.append((ACCESS, page << 12, 0x10000 + (page << 12), user | (FETCH if turn % 3 == 0 else 0)))
    kind, addr, value, flags = zip(*rows, strict=True)
    registers = {"cr0": 0x80010033, "cr4": 0x20, "efer": 0xD01, "nframes": 2048}
    source = {"marks": {"1": "loop", "2": "again", "3": "last"}} if names else None
    with Writer(path, GUEST, guest=registers, source=source) as writer:
        writer.write(
            kind=np.array(kind, "u1"),
            flags=np.array(flags, "u2"),
            insns=np.full(len(rows), 10, "u4"),
            addr=np.array(addr, "u8"),
            value=np.array(value, "u8"),
        )
    return path, places


def made(kind, folder):
    """What the command line and `sc.compare` call it."""
    if kind == "workload":
        return "fork-storm"
    if kind == "program":
        return str(FAMILY)
    return str({"guest": guest, "operations": operations}[kind](Path(folder) / f"{kind}.screc"))
