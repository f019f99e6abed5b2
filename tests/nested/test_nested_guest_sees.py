"""What a guest sees under nested paging is what it sees under none: random lives, with all that a host does to it."""

import random

import numpy as np
import pytest

import shadowcore as sc

PAGE, MIB = 4096, 1 << 20
RAM = 16 * MIB
VA, DEVICE = 0x4000_0000, 0x4100_0000
PAGES = 48
DESIGNS = {
    "tdp": sc.Nested(),
    "direct": sc.Nested(mmu="direct"),
    "direct, few tables": sc.Nested(mmu="direct", pool_pages=8, min_free=2, refill=3),
    "5 levels, few tables": sc.Nested(levels=5, pool_pages=9),
    "4 KiB": sc.Nested(host_page_size=PAGE),
}
HOSTS = {"warm": {}, "2 MiB": {"host": 2 * MIB}, "cold": {"backing": "cold"}, "thp": {"backing": "thp"}}


class Machine:
    def __init__(self, mmu, mode, host=PAGE, backing="warm", **more):
        slots = [
            sc.MemorySlot(0, RAM // 2, host_page_size=host),
            sc.MemorySlot(32 * MIB, RAM // 2, host_page_size=host),
        ]
        self.vm = sc.VM(memory=RAM, slots=slots, mmu=mmu, backing=backing, **more)
        self.tables = sc.PageTables(self.vm, mode, allocate=range(1024, 2048))
        rights = ["rwxu", "rwx", "rxu", "rx"] if mode == "32" else ["rwxu", "rw", "ru", "r"]
        for i in range(PAGES):
            gpa = (i * 7 % 64) * PAGE + (32 * MIB if i % 3 == 0 else 5 * MIB if i % 3 == 1 else 0)
            self.tables.map(VA + i * PAGE, gpa, PAGE, rights[i % 4], 4096)
        self.rights = rights
        self.tables.map(DEVICE, 64 * MIB, 4 * PAGE, "rwxu", 4096)
        large = 1 << 22 if mode == "32" else 1 << 21
        self.tables.map(VA + 16 * large, 0, large, "rwxu", large)
        self.large = VA + 16 * large
        for cpu in self.vm.vcpus:
            self.tables.activate(cpu)


def seen(call, *arguments):
    try:
        return call(*arguments)
    except sc.GuestFault as fault:
        return repr(fault)


def step(machine, chosen):
    """One thing that a guest, a device or the host does; what the guest sees of it."""
    kind, page, offset, value, user, number = chosen
    vm, cpu = machine.vm, machine.vm.vcpus[number % len(machine.vm.vcpus)]
    va = VA + page * PAGE + offset
    if kind < 6:
        return seen(cpu.read, va, 8, user)
    if kind < 10:
        return seen(cpu.write, va, value, 8, user)
    if kind == 10:
        return seen(cpu.fetch, va, user)
    if kind == 11:
        return seen(cpu.read, DEVICE + offset, 4, user)
    if kind == 12:
        return seen(cpu.write, machine.large + (page << 12) + offset, value, 8, user)
    if kind == 13:  # the guest edits its own tables
        machine.tables.unmap(va & ~4095, PAGE)
        machine.tables.map(va & ~4095, (value % 128) * PAGE, PAGE, machine.rights[value % 4], 4096)
        cpu.invlpg(va)
        return None
    if kind == 14:
        cpu.cr3 = cpu.cr3
        return None
    if kind == 15:
        return vm.write_physical((value % 128) * PAGE + offset, bytes([value & 255] * 8))
    if kind == 16:
        cpu.cr0 ^= 1 << 16
        return None
    if kind == 17:
        return seen(cpu.write, (VA + page * PAGE + PAGE - 4), value, 8, user)
    if kind == 18:
        ops = np.zeros(64, sc.OP_DTYPE)
        ops["op"] = [(value >> i) & 1 for i in range(64)]
        ops["addr"] = VA + (np.arange(64) * page % PAGES) * PAGE + 8 * np.arange(64)
        ops["size"], ops["value"], ops["user"] = 8, value, user
        found = cpu.run(ops)
        return tuple(getattr(found, name).tobytes() for name in ("outcome", "error_code", "gpa", "value"))
    return None


def host(vm, chosen):
    """What only the machine under test meets."""
    kind, page, _, value, _, _ = chosen
    if kind == 19:
        vm.host_unmap(page * 8 % 1024, 1 + value % 16)
    elif kind == 20 and vm.memory.slots[0].dirty_log:
        vm.memory.clear_dirty_log(0)
    elif kind == 21:
        (vm.memory.stop_dirty_log if vm.memory.slots[0].dirty_log else vm.memory.start_dirty_log)(0)
    elif kind == 22:
        vm.host_collapse(value % 4 * 512, 512)
    elif kind == 23:
        vm.mmu.zap_all()


def lives(machines, seed, n):
    chosen = random.Random(seed)
    for number in range(n):
        each = (
            chosen.choice(range(24)), chosen.randrange(PAGES), chosen.randrange(0, 4080, 8), chosen.getrandbits(64),
            chosen.random() < 0.5, chosen.randrange(2),
        )  # fmt: skip
        found = [step(machine, each) for machine in machines]
        assert found[0] == found[1], (number, each)
        host(machines[0].vm, each)
        yield number


@pytest.mark.parametrize("mode", ["32", "pae", "64", "la57"])
@pytest.mark.parametrize("design", DESIGNS)
def test_random_lives(design, mode):
    for seed, (name, settings) in enumerate(HOSTS.items()):
        vcpus = 1 + seed % 2
        made = Machine(DESIGNS[design], mode, vcpus=vcpus, **settings)
        native = Machine("native", mode, vcpus=vcpus)
        for number in lives((made, native), f"{design} {mode} {seed}", 120):
            if number % 40 == 39:
                report = made.vm.audit()
                assert report.ok, (name, str(report))
        assert np.array_equal(made.vm.memory.words, native.vm.memory.words), name


@pytest.mark.parametrize("design", ["tdp", "direct"])
def test_a_dirty_log_misses_nothing(design):
    """Whatever is stored to is in the log; and a store to a page that is in it exits no more."""
    made = Machine(DESIGNS[design], "64", host=2 * MIB)
    vm, cpu = made.vm, made.vm.vcpus[0]
    for page in range(PAGES):
        seen(cpu.read, VA + page * PAGE, 8, False)
    vm.memory.start_dirty_log(0)
    vm.memory.start_dirty_log(1)
    for _ in range(3):
        before = vm.memory.bytes.reshape(-1, PAGE).copy()
        for page in range(0, PAGES, 4):
            cpu.write(VA + page * PAGE, before[page, 0] + 1)
        exits = vm.stats.exits_total
        for page in range(0, PAGES, 4):
            cpu.write(VA + page * PAGE, 7 + _)
        assert vm.stats.exits_total == exits
        changed = np.flatnonzero((before != vm.memory.bytes.reshape(-1, PAGE)).any(axis=1))
        logged = np.concatenate([vm.memory.dirty_log(0), vm.memory.dirty_log(1)])
        assert logged[changed].all()
        vm.memory.clear_dirty_log(0)
        vm.memory.clear_dirty_log(1)
    assert vm.audit().ok


@pytest.mark.parametrize("backing", HOSTS)
@pytest.mark.parametrize("design", ["tdp", "direct", "5 levels, few tables"])
def test_saved_and_loaded(design, backing, tmp_path):
    made = Machine(DESIGNS[design], "64", **HOSTS[backing])
    native = Machine("native", "64")
    for _ in lives((made, native), f"saved {design} {backing}", 150):
        pass
    made.vm.save(tmp_path / "vm")
    loaded = sc.VM.load(tmp_path / "vm")
    assert loaded.mmu.design == made.vm.mmu.design
    assert np.array_equal(loaded.mmu.pages, made.vm.mmu.pages)
    ops = np.zeros(PAGES * 2, sc.OP_DTYPE)
    ops["addr"], ops["size"] = VA + np.arange(PAGES * 2) % PAGES * PAGE, 8
    ops["op"] = np.arange(PAGES * 2) >= PAGES
    results = [vm.vcpus[0].run(ops) for vm in (made.vm, loaded)]
    for name in ("outcome", "error_code", "gpa", "value", "exits"):
        assert np.array_equal(*(getattr(each, name) for each in results))
    assert loaded.stats.as_dict() == made.vm.stats.as_dict()
    assert loaded.audit().ok


def test_a_table_in_a_read_only_slot():
    """Walks set nothing there, and the emulator makes the access, each time."""
    found = []
    for mmu in ("nested", "native"):
        slots = [sc.MemorySlot(0, 4 * MIB), sc.MemorySlot(8 * MIB, MIB)]
        vm = sc.VM(memory=8 * MIB, slots=slots, mmu=mmu)
        tables = sc.PageTables(vm.memory, "64", allocate=range(0x800, 0x880))
        tables.map(VA, MIB, 8 * PAGE, "rwu", 4096)
        tables.activate(vm.vcpus[0])
        vm.remove_slot(1)
        vm.add_slot(8 * MIB, MIB, slot=1, read_only=True, offset=4 * MIB)
        cpu = vm.vcpus[0]
        outcomes = [
            seen(cpu.write, VA + 8, 5),
            seen(cpu.read, VA + 8),
            seen(cpu.read, VA + 64 * PAGE),
            seen(cpu.fetch, VA),
        ]
        found.append((outcomes, vm.memory.bytes.tobytes()))
        if mmu == "nested":
            assert (vm.stats.exits["emulate"], vm.stats.exits["guest"]) == (2, 2)
            assert vm.audit().ok
    assert found[0] == found[1]
