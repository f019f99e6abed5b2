"""Faults through large guest pages and in slots with a dirty log: the fast path (`fast.pyx`) against the general way,
which a machine with a modelled TLB of no entries takes at each access."""

import numpy as np
import pytest

import shadowcore as sc

MIB = 1 << 20
PAGE = 4096
MEMORY = 8 * MIB
TABLES = 1 * MIB
COLUMNS = ("outcome", "error_code", "gpa", "value", "exits", "emulated")
SIZES = [("32", 4 * MIB), ("pae", 2 * MIB), ("64", 2 * MIB), ("64", 1 << 30), ("la57", 2 * MIB), ("la57", 1 << 30)]
KERNEL = {"32": 0xC000_0000, "pae": 0xC000_0000, "64": 0xFFFF_8880_0000_0000, "la57": 0xFFFF_8880_0000_0000}
USER = 0x4000_0000


def machine(mode, size, design, logging, general):
    """By large pages: memory from KERNEL on, for the supervisor, and from USER on, for user code, not dirty."""
    vm = sc.VM(
        memory=MEMORY, mmu=design, tlb=sc.TLB(small_entries=0, large_entries=0, huge_entries=0) if general else None
    )
    frames = iter(range(TABLES // PAGE))
    tables = sc.PageTables(vm.memory, mode, allocate=lambda: next(frames))
    span = max(size, MEMORY)
    tables.map(KERNEL[mode], 0, span, "rwx", page_size=size, accessed=True, dirty=True)
    tables.map(USER, 0, span, "rwxu", page_size=size, accessed=True, dirty=False)
    tables.map(USER * 2, 2 * MIB, 64 * PAGE, "rwxu", page_size=PAGE, accessed=True, dirty=True)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    if logging:
        vm.memory.start_dirty_log(0)
    leaf = tables.entry(USER * 2, 1).gpa & ~(PAGE - 1)
    return vm, leaf


def operations(mode, leaf, n, seed):
    """Loads and stores near and far; by the supervisor to the leaf table of the small pages, of what it holds."""
    rng = np.random.default_rng(seed)
    ops = np.zeros(n, sc.OP_DTYPE)
    kind = rng.integers(0, 6, n)
    where = rng.integers(0, 48, n).astype(np.uint64) * np.uint64(PAGE) + np.uint64(2 * MIB)
    ops["size"] = 4
    ops["op"] = rng.choice([sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH], n, p=[0.5, 0.4, 0.1])
    ops["user"] = kind < 3
    ops["addr"] = np.where(kind < 2, np.uint64(USER), np.uint64(KERNEL[mode])) + where
    ops["user"][kind == 2] = 1
    ops["addr"][kind == 2] = USER * 2 + rng.integers(0, 64, (kind == 2).sum()) * PAGE
    edits = kind == 5
    ops["user"][edits] = 0
    ops["op"][edits] = rng.choice([sc.Op.WRITE, sc.Op.WRITE, sc.Op.READ], edits.sum())
    entry = 4 if mode == "32" else 8
    ops["addr"][edits] = np.uint64(KERNEL[mode] + leaf) + rng.integers(0, 64, edits.sum(), np.uint64) * np.uint64(entry)
    ops["op"][rng.random(n) < 0.01] = sc.Op.INVLPG
    beyond = rng.random(n) < 0.02
    ops["addr"][beyond] += np.uint64(0x100_0000)
    return ops


@pytest.mark.parametrize("logging", [False, True], ids=["", "logged"])
@pytest.mark.parametrize("design", ["cached", "flush", "kvm-2007", "unsync"])
@pytest.mark.parametrize(("mode", "size"), SIZES)
def test_as_the_general_way(mode, size, design, logging):
    """Results, counters, guest memory, dirty logs and the whole shadow structure."""
    (fast, leaf), (general, _) = (machine(mode, size, design, logging, general) for general in (False, True))
    ops = operations(mode, leaf, 1500, 3)
    for part in np.array_split(ops, 5):
        writes = part["addr"] - np.uint64(KERNEL[mode]) - np.uint64(leaf) < np.uint64(PAGE)
        part["value"][writes] = fast.memory.bytes.view("<u4")[
            ((part["addr"][writes] - np.uint64(KERNEL[mode])) // np.uint64(4)).astype(int)
        ]
        one, other = fast.vcpus[0].run(part), general.vcpus[0].run(part)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
        if logging:
            np.testing.assert_array_equal(fast.memory.dirty_log(0), general.memory.dirty_log(0))
            for vm in (fast, general):
                vm.memory.clear_dirty_log(0)
    assert one.stats.pf_taken > 0
    counters = [{k: n for k, n in vm.stats.as_dict().items() if not k.startswith("tlb_")} for vm in (fast, general)]
    assert counters[0] == counters[1]
    np.testing.assert_array_equal(fast.memory.bytes, general.memory.bytes)
    np.testing.assert_array_equal(fast.mmu.pages, general.mmu.pages)
    np.testing.assert_array_equal(fast.memory.pool, general.memory.pool)
    assert fast.audit().ok
