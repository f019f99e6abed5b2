"""Machines of several vcpus, and operations that say who performs them."""

import numpy as np
from operations import operations
from tlb_machine import (
    DATA_A,
    DATA_B,
    DATA_C,
    DIRECT,
    MIB,
    X,
    Y,
    Z,
    machine,
    start,
)

import shadowcore as sc

OPS = np.dtype([*sc.OP_DTYPE.descr, ("vcpu", "u1")])
ALIGNED = np.dtype(OPS.descr[::-1], align=True)


def ops(*rows, dtype=OPS):
    """Rows (vcpu, op, address, value)."""
    array = operations(*[row[1:] for row in rows], dtype=dtype)
    array["vcpu"] = [row[0] for row in rows]
    return array


def pair(mmu="cached", mode="64", tlb=True, vcpus=2, same=True, **settings):
    """(vm, tables, vcpus) with X, Y, Z mapped to data, and the direct map; with same=False the vcpus but the first
    have their paging off."""
    vm, tables = machine(mmu, mode, sc.TLB() if tlb else None, vcpus, **settings)
    if not tlb:
        vm = sc.VM(memory=8 * MIB, mmu=mmu, vcpus=vcpus, **settings)
        vm.memory.words[: 6 * MIB // 8 : 512] = np.arange(0, 6 * MIB, 4096)
        tables = sc.PageTables(vm, mode)
    for va, gpa in ((X, DATA_A), (Y, DATA_B), (Z, DATA_C)):
        tables.map(va, gpa, 4096, "rwx", dirty=True)
    tables.map(DIRECT, 0, 8 * MIB, "rwx", page_size=4096, dirty=True)
    return vm, tables, [start(vm, tables, i) if same or i == 0 else vm.vcpus[i] for i in range(vcpus)]


def delta(vm, names, action, *arguments, **settings):
    """What an action adds to some counters."""
    before = [getattr(vm.stats, name) for name in names]
    action(*arguments, **settings)
    return tuple(getattr(vm.stats, name) - b for name, b in zip(names, before, strict=True))


FLUSHES = ("tlb_flush", "remote_tlb_flush")
