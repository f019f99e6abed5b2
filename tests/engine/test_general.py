"""No fast path shows: random machines with them and without (`vm.mmu.general`), in lock-step.

After each batch the results, every counter, memory, the shadow structure and what the TLB would be told are the same.
"""

import dataclasses
from functools import cache

import numpy as np
import pytest
from guest2007 import MODES
from hypothesis import given, settings
from hypothesis import strategies as st

import shadowcore as sc
from shadowcore.pagetables import A, D, P, U, W

PAGE = 4096
RAM = 8 << 20
TABLES = range(1024, 1280)  # frames of tables, mapped from WINDOW on
USER, WINDOW, LARGE = 0x400000, 0xC00000, 0x2000000
PLACE = slice(TABLES.start * 512, TABLES.stop * 512)  # of words
COLUMNS = ("outcome", "error_code", "gpa", "value", "exits", "emulated")
DESIGNS = {
    "native": lambda: "native",
    "flush": lambda: sc.Shadow.flush(pool_pages=24),
    "cached": lambda: sc.Shadow.cached(pool_pages=24),
    "roomy": lambda: sc.Shadow.cached(pool_pages=200, flood_threshold=None),
    "kvm-2007": lambda: sc.Shadow.kvm_2007(pool_pages=64),
    "unsync": lambda: sc.Shadow.unsync(pool_pages=24),
    "adaptive": lambda: sc.Shadow.adaptive(pool_pages=24),
    "kvm-6.1": lambda: sc.Shadow.kvm_6_1(pool_pages=64),
    "kvm-6.12": lambda: sc.Shadow.kvm_6_12(pool_pages=64),
}


@cache
def built(mode):
    """Two address spaces: pages of mixed rights, their own tables, and two large pages over the same frames. The words
    of their tables, the registers that use the first, and the roots of both."""
    vm = sc.VM(RAM, "native")
    spaces = []
    for number in range(2):
        tables = sc.PageTables(vm.memory, mode, allocate=TABLES[number * 96 : number * 96 + 96])
        for i in range(24):
            bits = (
                P | (W if i % 3 else 0) | (U if i % 4 else 0) | (A if i % 2 else 0) | (D if i % 5 == 0 and i % 3 else 0)
            )
            tables.map(USER + i * PAGE, (i + number) * PAGE, PAGE, bits)
        tables.map(WINDOW, TABLES[0] * PAGE, len(TABLES) * PAGE, "rwx")
        tables.map(LARGE, 0, RAM, "rwx")
        spaces.append(tables)
    words = vm.memory.words.copy()
    assert not words[: TABLES.start * 512].any()
    return words[PLACE], spaces[0].registers, [tables.cr3 for tables in spaces]


SMALL = sc.ProcessorTLB(
    load=(sc.TLBBank(4, 2),), store=(sc.TLBBank(2),), second=(sc.TLBBank(8, 4), sc.TLBBank(6, 2)), pd=sc.TLBBank(2)
)
TLBS = (None, None, sc.TLB(), SMALL, dataclasses.replace(SMALL, replacement="plru"))


def machine(mode, design, log, general, tlb=None):
    words, registers, roots = built(mode)
    vm = sc.VM(RAM, DESIGNS[design](), tlb=tlb)
    vm.mmu.general = general
    vm.memory.words[PLACE] = words
    for name, value in registers.items():
        setattr(vm.vcpus[0], name, value)
    if log:
        vm.memory.start_dirty_log()
    return vm, roots


def batch(rng, roots, n):
    """Operations that make sense often enough: few pages again and again, some stores to tables, some of everything."""
    ops = np.zeros(n, sc.OP_DTYPE)
    kind = rng.integers(0, 100, n)
    page = rng.integers(0, 26, n)
    offset = rng.integers(0, 512, n) * 8
    ops["addr"] = USER + page * PAGE + offset
    ops["op"] = rng.integers(0, 3, n)
    ops["user"] = rng.integers(0, 2, n)
    ops["size"] = 1 << rng.integers(0, 4, n)
    ops["value"] = rng.integers(0, 1 << 20, n)
    window = kind < 14
    frame = rng.integers(0, 12, n) + 96 * rng.integers(0, 2, n)
    ops["addr"][window] = (WINDOW + frame * PAGE + rng.integers(0, 24, n) * 8)[window]
    entry = (rng.integers(0, 40, n) * PAGE) | P | W | (rng.integers(0, 2, n) * (U | A | D))
    stores = window & (kind < 10)
    ops["op"][stores], ops["size"][stores], ops["value"][stores] = sc.Op.WRITE, 8, entry[stores]
    ops["user"][window] = 0
    large = (kind >= 14) & (kind < 26)
    ops["addr"][large] = (LARGE + rng.integers(0, RAM, n))[large]
    ops["user"][large] = 0
    for at, op in ((96, sc.Op.INVLPG), (97, sc.Op.CR3), (98, sc.Op.CR0)):
        chosen = kind == at
        ops["op"][chosen] = op
    ops["value"][kind == 97] = rng.choice(roots, n)[kind == 97]
    ops["value"][kind == 98] = (0x80000011 | rng.integers(0, 2, n) << 16)[kind == 98]
    ops["addr"][kind == 99] |= 4095  # over the end of a page
    return ops


def state(vm):
    """All that there is to compare, as it lies there: nothing is copied."""
    found = [vm.stats.as_dict(), vm.memory.words, vm.vcpus[0].cr2, *vm.vcpus[0].tlb_arrays]
    if isinstance(vm.mmu.design, sc.Shadow):
        found += [vm.mmu.pages, *vm.mmu.arrays.values()]
    if vm.memory.logged_slots:
        found.append(vm.memory.dirty_log())
    return found


def same(a, b):
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
@settings(max_examples=12)
@given(seed=st.integers(0, (1 << 32) - 1), log=st.booleans(), data=st.booleans(), tlb=st.sampled_from(TLBS))
def test_no_fast_path_shows(mode, design, seed, log, data, tlb):
    rng = np.random.default_rng(seed)
    both = [machine(mode, design, log, general, tlb) for general in (False, True)]
    roots = both[0][1]
    assert roots == both[1][1]
    for _ in range(4):
        ops = batch(rng, roots, int(rng.integers(1, 120)))
        results = [vm.vcpus[0].run(ops, data=data) for vm, _ in both]
        for column in COLUMNS if data else [name for name in COLUMNS if name != "value"]:
            np.testing.assert_array_equal(*(getattr(result, column) for result in results), column)
        assert same(*(state(vm) for vm, _ in both))
        if log and rng.integers(0, 2):
            for vm, _ in both:
                vm.memory.clear_dirty_log()
        access = USER + int(rng.integers(0, 26)) * PAGE
        assert len({outcome(vm, access) for vm, _ in both}) == 1
    assert both[0][0].audit().count == both[1][0].audit().count


def outcome(vm, address):
    """A scalar store and load."""
    cpu = vm.vcpus[0]
    try:
        cpu.write(address, 0x1234, 2)
        return cpu.read(address, 8), vm.stats.exits_total
    except sc.GuestFault as fault:
        return repr(fault), vm.stats.exits_total


def test_the_switch(monkeypatch):
    """It can be turned while the machine is in use, new machines take it from the environment, and a TLB is not touched
    by it."""
    monkeypatch.setenv("SHADOWCORE_GENERAL", "1")
    assert sc.VM("1MiB", "cached").mmu.general is True
    monkeypatch.delenv("SHADOWCORE_GENERAL")
    vm = sc.VM("1MiB", "cached", vcpus=2)
    assert vm.mmu.general is False
    vm.mmu.general = True
    assert vm.mmu.general is True
    with pytest.raises(sc.ConfigError, match="general"):
        vm.mmu.general = "yes"
    vm.mmu.general = False
    with_tlb = sc.VM("1MiB", "cached", tlb=sc.TLB())
    with_tlb.mmu.general = True
    with_tlb.mmu.general = False
    with_tlb.vcpus[0].read(0)
    assert len(with_tlb.vcpus[0].tlb) == 1
