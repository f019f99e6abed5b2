"""What the guest kernel does with memory that is moved or dropped, and with tables that somebody broke on purpose."""

import numpy as np
import pytest

import shadowcore as sc
from shadowcore import Call, Prot

PAGE = 4096
MODES = ("32", "pae", "64", "la57")
DESIGNS = ("native", "flush", "cached", "unsync")
BASE = 0x10000000
LEVELS = {"32": 2, "pae": 3, "64": 4, "la57": 5}


def boot(mode, mmu="native", memory="32MiB", **options):
    return sc.Kernel(sc.VM(memory, mmu=mmu), sc.KernelOptions(mode=mode, **options))


def bits(mode):
    return 10 if mode == "32" else 9


def table(kernel, gpa):
    """A table in guest memory, to be written by the test."""
    dtype = np.uint32 if kernel.options.mode == "32" else np.uint64
    return kernel.vm.memory.bytes[gpa : gpa + PAGE].view(dtype)


def index(mode, level, va=BASE):
    return va >> 12 + bits(mode) * (level - 1) & (1 << bits(mode)) - 1


def path(kernel, root):
    """gpa of the table of each level that BASE is translated by."""
    mode, tables = kernel.options.mode, {LEVELS[kernel.options.mode]: root}
    for level in range(LEVELS[mode], 1, -1):
        tables[level - 1] = int(table(kernel, tables[level])[index(mode, level)]) & 0xFFFFFFFFFF000
    return tables


def huge(mode):
    return 1 << 30 if mode in ("32", "pae") else 1 << 46


def flags(mode, level):
    return 1 if mode == "pae" and level == 3 else 0x67


def everywhere(kernel, level, gpa, entry):
    """Every entry of the user half of a table."""
    mode = kernel.options.mode
    top = level == LEVELS[mode]
    count = {"32": 768, "pae": 3}.get(mode, 256) if top else 1 << bits(mode)
    table(kernel, gpa)[:count] = entry


def loops(mode):
    upper = range(2, LEVELS[mode] + 1)
    return [(level, target, all_of) for level in upper for target in upper if target >= level for all_of in (0, 1)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_unmapping_a_huge_range_through_a_loop_of_tables_ends_in_a_panic(mode, mmu):
    """An upper entry, or all of them, leads back to its own table or one above it. munmap of a range of which every
    table seems to exist ends at once; what it does not come by, exit does."""
    for level, target, all_of in loops(mode):
        kernel = boot(mode, mmu)
        process = kernel.spawn()
        process.mmap(huge(mode), addr=BASE)
        process.write(BASE, 1)
        tables = path(kernel, process.root)
        entry = tables[target] | flags(mode, level)
        if all_of:
            everywhere(kernel, level, tables[level], entry)
        else:
            table(kernel, tables[level])[index(mode, level)] = entry
        before = kernel.vm.stats.copy()

        def act(process=process):
            process.munmap(BASE, huge(mode))
            process.exit()

        with pytest.raises(sc.GuestPanic):
            act()
        assert (kernel.vm.stats - before).accesses < 100, (level, target, all_of)
        with pytest.raises(sc.GuestPanic, match="has stopped"):
            kernel.spawn()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ["munmap", "mprotect", "fork", "move"])
def test_tables_without_end_are_looked_through_as_often_as_there_are_tables(mode, act):
    """All entries of every upper table lead to one table below, and the last is empty: 2^46 bytes of pages to look
    for, none of which says that anything is wrong."""
    kernel = boot(mode)
    process = kernel.spawn()
    process.mmap(huge(mode), addr=BASE)
    process.write(BASE, 1)
    tables = path(kernel, process.root)
    for level in range(2, LEVELS[mode] + 1):
        everywhere(kernel, level, tables[level], tables[level - 1] | flags(mode, level))
    table(kernel, tables[1])[:] = 0
    calls = {
        "munmap": lambda: process.munmap(BASE, huge(mode)),
        "mprotect": lambda: process.mprotect(BASE, huge(mode), Prot.READ),
        "fork": process.fork,
        "move": lambda: kernel.call(Call.MOVE, process.number, BASE + huge(mode), huge(mode) // 2, BASE),
    }
    before = kernel.vm.stats.copy()
    with pytest.raises(sc.GuestPanic):
        calls[act]()
    assert (kernel.vm.stats - before).accesses < 100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_moved_pages_keep_their_contents(mode, mmu):
    """Also those that are shared after a fork, and those that were never touched; the old place is free."""
    kernel = boot(mode, mmu)
    process = kernel.spawn()
    free = kernel.frames["free"]
    where, to = BASE + 5 * PAGE, BASE + (37 << 20) + 3 * PAGE
    process.mmap(600 * PAGE, addr=BASE)
    process.mmap(PAGE, addr=to - 2 * PAGE)
    pages = BASE + np.arange(0, 600, 2) * PAGE
    process.touch(pages, True, np.arange(300))
    child = process.fork()
    kernel.call(Call.MOVE, process.number, to, 550 * PAGE, where)
    moved = np.where((pages >= where) & (pages < where + 550 * PAGE), pages - where + to, pages)
    outcome, value, _ = process.access(moved)
    assert not outcome.any()
    assert value.tolist() == list(range(300))
    assert process.read(to) == 0  # page 5, never touched
    assert process.access([where, where + 549 * PAGE])[0].tolist() == [1, 1]
    assert process.mappings["end"].tolist()[:4] == [where, BASE + 600 * PAGE, to - PAGE, to + 550 * PAGE]
    process.touch(moved, True, 1000 + np.arange(300))
    assert child.access(pages)[1].tolist() == list(range(300))
    kernel.vm.audit(strict=True)
    with pytest.raises(sc.GuestOutOfMemory):
        kernel.call(Call.MOVE, process.number, to + 100 * PAGE, 50 * PAGE, to)
    with pytest.raises(sc.ConfigError):
        kernel.call(Call.MOVE, process.number, where, PAGE, where)  # nothing is mapped there any more
    child.exit()
    process.munmap(BASE, (64 << 20))
    kernel.switch(None)
    kernel.spawn()
    assert process.resident == 1
    assert kernel.frames["anonymous"] == 2  # two stacks
    assert free - kernel.frames["free"] < 12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_dropped_pages_are_zero_again(mode, mmu):
    kernel = boot(mode, mmu)
    process = kernel.spawn()
    process.mmap(8 * PAGE, addr=BASE)
    process.mmap(8 * PAGE, addr=BASE + 10 * PAGE, prot=Prot.READ | Prot.WRITE | Prot.EXEC)
    pages = BASE + np.array([0, 1, 6, 7, 10, 11, 17]) * PAGE
    process.touch(pages, True, 7)
    anonymous, tables = kernel.frames["anonymous"], process.tables
    kernel.call(Call.DROP, process.number, BASE + 6 * PAGE, 6 * PAGE)
    assert kernel.frames["anonymous"] == anonymous - 4
    assert process.tables == tables
    assert process.access(pages)[1].tolist() == [7, 7, 0, 0, 0, 0, 7]
    process.touch(pages, True, 9)
    assert process.access(pages)[1].tolist() == [9] * 7
    kernel.vm.audit(strict=True)


def test_a_bare_process_has_nothing():
    kernel = boot("64")
    number = kernel.free_number()
    kernel.call(Call.SPAWN, number, 0x7000000, value=0xFFFFFFFF, flags=1)
    (process,) = kernel.processes
    assert len(process.mappings) == 0
    assert process.resident == 0
    assert process.heap == (0x7000000, 0x7000000)
    process.brk(0x7003000)
    process.write(0x7002FF8, 1)
    kernel.call(Call.EXEC, number, 0x8000000, value=0xFFFFFFFF, flags=1)
    assert len(process.mappings) == 0
    assert process.heap[0] == 0x8000000
    # A stack as MMAP makes it grows by faults, as far as 8 MiB.
    top = 0x7FFFF0000000
    kernel.call(Call.MMAP, number, top - PAGE, PAGE, flags=2, prot=3)
    assert process.access([top - (8 << 20), top - (8 << 20) - 8], True)[0].tolist() == [0, 1]
    assert kernel.counters["stack_growth"] == 2047
    for arguments in (
        {"op": Call.SPAWN, "flags": 2},
        {"op": Call.SPAWN, "flags": 1, "addr": 5, "value": 0xFFFFFFFF},
        {"op": Call.MMAP, "addr": BASE, "count": PAGE, "flags": 3},
        {"op": Call.MOVE, "addr": BASE, "count": PAGE, "value": 1},
        {"op": Call.DROP, "addr": BASE + 1, "count": PAGE},
    ):
        with pytest.raises(sc.ConfigError):
            kernel.call(**arguments)


def test_accesses_of_any_size_are_made_in_pieces():
    """Bytes that no processor moves at once go in pieces; code on two pages is fetched from both."""
    kernel = boot("64")
    process = kernel.spawn()
    process.mmap(8 * PAGE, addr=BASE)
    process.mmap(2 * PAGE, addr=BASE + 8 * PAGE, prot=Prot.READ | Prot.EXEC)
    kernel.record()
    op, size = [1, 0, 3, 2, 2, 1], [31, 16, 24, 15, 3, 0]
    addr = [BASE + PAGE - 5, BASE, BASE + 2 * PAGE, BASE + 9 * PAGE - 4, BASE + 9 * PAGE, BASE + 5 * PAGE]
    assert kernel.replay(process.number, op, size, addr) == 0
    ops = kernel.recording
    user = ops[ops["user"] == 1]
    made = {(int(o["op"]), int(o["size"]), int(o["addr"]) - BASE) for o in user}
    write, fetch, add = int(sc.Op.WRITE), int(sc.Op.FETCH), int(sc.Op.ADD)
    assert {key for key in made if key[2] < 2 * PAGE} == {
        (write, 16, PAGE - 5), (write, 8, PAGE + 11), (write, 4, PAGE + 19), (write, 2, PAGE + 23),
        (write, 1, PAGE + 25), (0, 16, 0),
    }  # fmt: skip
    assert {key for key in made if 2 * PAGE <= key[2] < 8 * PAGE} == {
        (add, 8, 2 * PAGE), (add, 8, 2 * PAGE + 8), (add, 8, 2 * PAGE + 16), (write, 1, 5 * PAGE),
    }  # fmt: skip
    assert {key for key in made if key[2] >= 8 * PAGE} == {(fetch, 1, 9 * PAGE - 4), (fetch, 1, 9 * PAGE)}
    assert kernel.counters["accesses"] == 5 + 1 + 3 + 2 + 1 + 1
    assert kernel.replay(process.number, [2, 1], [1, 8], [BASE, BASE + 8 * PAGE]) == 2
    for bad in (([4], [1], [BASE]), ([0, 0], [1], [BASE]), ([[0]], [[1]], [[BASE]])):
        with pytest.raises(sc.ConfigError):
            kernel.replay(process.number, *bad)
