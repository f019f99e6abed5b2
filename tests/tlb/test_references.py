"""References to memory that walks make: counted by hand, followed through the tables, and all that is counted."""

import itertools

import numpy as np
import pytest
from samples import sampled
from tlb_machine import DATA_A, MIB, X, machine, start
from tlb_programs import DESIGNS, MODES, Steps, registers, seeded, step
from tlb_programs import machine as program_machine

import shadowcore as sc
from shadowcore.engine.mmu import DIMENSIONS, REFERENCE_DTYPE

GUEST, HOST, SHADOW = range(3)
PAGE = 4096
VA = 0x4000_0000
LEVELS = {"32": 2, "pae": 3, "64": 4, "la57": 5}


def bank(entries, ways=None, *sizes):
    return sc.TLBBank(entries, ways, sizes or ("4k", "2m", "1g"))


def nested(mode="64", levels=4, size=PAGE, **settings):
    vm = sc.VM(memory=64 * MIB, mmu=sc.Nested(levels=levels), **settings)
    tables = sc.PageTables(vm.memory, mode)
    tables.map(VA, 16 * MIB if size == PAGE else 0, 2 * size, "rwxu", size)
    tables.activate(vm.vcpus[0])
    return vm, vm.vcpus[0], tables


def of_a_second_read(vm, cpu, va=VA):
    """References of a walk that finds everything."""
    cpu.read(va)
    vm.record_walks(1000)
    before = vm.stats.walk_references
    cpu.read(va)
    found = vm.walks()
    assert len(found) == vm.stats.walk_references - before
    vm.record_walks(0)
    return found


def entry(vm, reference):
    """What the entry says."""
    hpa, size = int(reference["hpa"]), int(reference["size"])
    if hpa >= vm.memory.ram_hpa:
        return int.from_bytes(vm.memory.bytes[hpa - vm.memory.ram_hpa :][:size].tobytes(), "little")
    return int(vm.memory.pool.reshape(-1)[(hpa - MIB) // 8])


def index(va, reference):
    """hpa of the first entry of the table, if the entry is the one for va."""
    level, size = int(reference["level"]), int(reference["size"])
    bits = 9 if size == 8 else 10
    number = va >> (12 + bits * (level - 1)) & ((1 << bits) - 1)
    return int(reference["hpa"]) - number * size


def follow(vm, found, va, gpa_of_root=None):
    """Follow a walk through what its entries say; returns the address that it comes to (an hpa if it is nested, or of a
    shadow). Every reference has to be the one that the entry before asks for."""
    found = list(found)
    base = None  # of the next table: a gpa where the guest's are translated
    two = any(r["dimension"] == HOST for r in found)
    host_root = index(gpa_of_root, found[0]) if two else None

    def through(gpa):
        table = host_root
        while True:
            reference = found.pop(0)
            assert reference["dimension"] == HOST
            assert index(gpa, reference) == table
            value = entry(vm, reference)
            shift = 12 + 9 * (int(reference["level"]) - 1)
            if reference["level"] == 1 or value & 0x80:
                return (value & 0xF_FFFF_FFFF_F000 & -(1 << shift)) | gpa & ((1 << shift) - 1)
            table = value & 0xF_FFFF_FFFF_F000

    base = gpa_of_root
    while True:
        here = through(base) if two else None
        reference = found.pop(0)
        assert reference["dimension"] != HOST
        assert int(reference["gva"]) == va
        if two:
            assert int(reference["hpa"]) - here == int(reference["hpa"]) - index(va, reference)
        elif base is not None:
            assert index(va, reference) == base
        value = entry(vm, reference)
        shift = 12 + (9 if reference["size"] == 8 else 10) * (int(reference["level"]) - 1)
        last = reference["level"] == 1 or value & 0x80
        mask = 0xF_FFFF_FFFF_F000 if reference["size"] == 8 else 0xFFFF_F000
        base = value & mask
        if last:
            base = base & -(1 << shift) | va & ((1 << shift) - 1)
            break
        if reference["dimension"] == GUEST and not two:
            base += vm.memory.ram_hpa
    if two:
        base = through(base)
    elif reference["dimension"] == GUEST:
        base += vm.memory.ram_hpa
    assert not found
    return base


@pytest.mark.parametrize(("mode", "levels"), list(itertools.product(("32", "64", "la57"), (4, 5))))
def test_walks_in_two_dimensions(mode, levels):
    """24 for 4 by 4, 35 for 5 by 5: before each of the guest's entries those that lead there."""
    vm, cpu, tables = nested(mode, levels)
    n = LEVELS[mode]
    found = of_a_second_read(vm, cpu)
    assert len(found) == (n + 1) * (levels + 1) - 1
    one = [(HOST, level) for level in range(levels, 0, -1)]
    wanted = [part for level in range(n, 0, -1) for part in (*one, (GUEST, level))] + one
    assert list(zip(found["dimension"].tolist(), found["level"].tolist(), strict=True)) == wanted
    assert set(found["size"][found["dimension"] == GUEST].tolist()) == {4 if mode == "32" else 8}
    assert follow(vm, found, VA, tables.registers["cr3"]) == vm.memory.ram_hpa + 16 * MIB


def test_walks_with_root_entries():
    """PAE: the root entry is touched, through the host's tables."""
    vm, cpu, _ = nested("pae")
    found = of_a_second_read(vm, cpu)
    assert found["level"][found["dimension"] == GUEST].tolist() == [3, 2, 1]
    assert len(found) == 19


def test_large_pages():
    """15 for 2 MiB on 2 MiB, 19 for the mixed cases."""
    large = [sc.MemorySlot(0, 64 * MIB, host_page_size="2MiB")]
    for size, slots, wanted in ((2 * MIB, large, 15), (PAGE, large, 19), (2 * MIB, None, 19), (PAGE, None, 24)):
        vm = sc.VM(memory=64 * MIB, mmu="nested", slots=slots)
        tables = sc.PageTables(vm.memory)
        tables.map(VA, 16 * MIB if size == PAGE else 0, size, "rw", size)
        tables.activate(vm.vcpus[0])
        found = of_a_second_read(vm, vm.vcpus[0], VA + 0x100)
        assert len(found) == wanted
        to = follow(vm, found, VA + 0x100, tables.registers["cr3"])
        assert to == vm.memory.ram_hpa + (16 * MIB if size == PAGE else 0) + 0x100


@pytest.mark.parametrize("design", ["native", "cached", "flush", "unsync"])
@pytest.mark.parametrize("mode", LEVELS)
def test_walks_in_one_dimension(mode, design):
    vm, tables = machine(design, mode, tlb=sc.TLB(0, 1, 0, 1, 0, 1))
    tables.map(X, DATA_A, PAGE, "rwx")
    cpu = start(vm, tables)
    found = of_a_second_read(vm, cpu, X)
    native = design == "native"
    # Shadows of 32-bit tables are PAE; the root entries of PAE are in the processor.
    levels = {"32": 2, "pae": 2, "64": 4, "la57": 5}[mode]
    assert found["level"].tolist() == list(range(levels, 0, -1))
    assert set(found["dimension"].tolist()) == {GUEST if native else SHADOW}
    assert set(found["size"].tolist()) == {4 if native and mode == "32" else 8}
    assert set(found["walk"].tolist()) == {0}
    assert follow(vm, found, X) == vm.memory.ram_hpa + DATA_A
    if native:
        assert found["hpa"].tolist() == [vm.memory.ram_hpa + tables.entry(X, n).gpa for n in range(levels, 0, -1)]


def test_walks_that_fault_end_where_they_failed():
    vm, tables = machine("native", "64", tlb=sc.TLB(0, 1, 0, 1, 0, 1))
    tables.map(X, DATA_A, PAGE, "rw")
    cpu = start(vm, tables)
    vm.record_walks(100)
    for va, wanted in ((X + PAGE, [4, 3, 2, 1]), (X + 0x20_0000, [4, 3, 2]), (1 << 40, [4])):
        with pytest.raises(sc.PageFault):
            cpu.read(va)
        assert vm.walks()["level"].tolist() == wanted


class Recorder(Steps):
    """Runs a program's steps on the engine alone, and looks at the references of each."""

    def __init__(self, vm, mode):
        super().__init__(mode, vm.vcpus[0])
        self.vm = vm
        self.ops = np.zeros(1, dtype=sc.OP_DTYPE)
        for op, value in registers(mode):
            self.op(op, value=value)

    def op(self, op, address=0, value=0, size=8, user=0):
        self.ops[0] = (op, user, size, address, value)
        self.cpu.run(self.ops)

    def device(self, gpa, value, size):
        self.vm.write_physical(gpa, value.to_bytes(size, "little"))


SMALL = sc.ProcessorTLB(
    load=(bank(2, 2),),
    second=(bank(4, 2),),
    pd=bank(2, 2),
    pml4=bank(1, 1),
    nested=bank(4, 2),
    host_pd=bank(2, 1),
    host_pml4=bank(1),
)


@sampled("number", 4)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_all_that_is_counted_is_told(mode, design, number):
    """And to look changes nothing: counters are those of the same program that nobody looks at."""
    for (seed, _, program), tlb in itertools.product(seeded(7000, number), (None, sc.TLB(), SMALL)):
        mmu = DESIGNS[design][seed % len(DESIGNS[design])][0]
        plain, told = (Recorder(program_machine([MODES[mode]], mmu, tlb), MODES[mode]) for _ in range(2))
        told.vm.record_walks(100_000)
        before = told.vm.stats.walk_references
        for word in program:
            for part in (plain, told):
                part.step(step(part.mode, word))
        found = told.vm.walks()
        assert len(found) == told.vm.stats.walk_references - before > 0
        assert told.vm.stats.as_dict() == plain.vm.stats.as_dict()
        assert np.array_equal(plain.vm.memory.bytes, told.vm.memory.bytes)
        assert told.vm.audit().ok
        assert (np.diff(found["walk"].astype(int)) >= 0).all()
        kinds = {"native": {GUEST}, "nested": {GUEST, HOST}}.get(design, {SHADOW})
        assert set(found["dimension"].tolist()) <= kinds


def test_of_several_processors_in_turn():
    vm, tables = machine("cached", "64", tlb=sc.TLB(0, 1, 0, 1, 0, 1), vcpus=2)
    tables.map(X, DATA_A, PAGE, "rw")
    cpus = [start(vm, tables, vcpu=i) for i in range(2)]
    for cpu in cpus:
        cpu.read(X)
    vm.record_walks(100)
    for i in (1, 0, 1):
        cpus[i].read(X)
    found = vm.walks()
    assert found["vcpu"][::4].tolist() == [1, 0, 1]
    assert found["walk"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_cannot_be_asked_for():
    assert REFERENCE_DTYPE.names == ("hpa", "gva", "walk", "vcpu", "level", "dimension", "size")
    assert DIMENSIONS == ("guest", "host", "shadow")
    vm, cpu, _ = nested()
    with pytest.raises(sc.ConfigError, match="record_walks"):
        vm.walks()
    for size in (-1, 1 << 33, "many"):
        with pytest.raises(sc.ConfigError, match="size"):
            vm.record_walks(size)
    vm.record_walks(30)
    cpu.read(VA)
    with pytest.raises(sc.EngineError, match="room for 30"):
        vm.walks()
    cpu.read(VA)
    assert len(vm.walks()) == 24
    vm.record_walks(0)
    cpu.read(VA)
    with pytest.raises(sc.ConfigError):
        vm.walks()
