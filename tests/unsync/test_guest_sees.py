"""What a guest sees of tables that lag: what a processor with a TLB may show it, and nothing older.

(Random programs: tests/tlb/test_tlb_lazy.py, tests/engine/test_vcpus_random.py.)"""

import pytest
from tlb_machine import DATA_A, DATA_B, DIRECT, KEEP, MIB, MODES, X, Y

import shadowcore as sc

LONG = ["64", "la57"]
RESERVED = 1 << 51  # of an entry of 8 bytes


def guest(mode="64", mmu="unsync"):
    """(vm, tables, cpu): X leads to DATA_A by a clean entry, Y to DATA_B; the direct map."""
    vm = sc.VM(memory=8 * MIB, mmu=mmu)
    tables = sc.PageTables(vm, mode)
    tables.map(X, DATA_A, 4096, "rwx", dirty=False)
    tables.map(Y, DATA_B, 4096, "rwx")
    tables.map(DIRECT, 0, 8 * MIB, "rwx")
    for cpu in vm.vcpus:
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
    vm.write_physical(DATA_A, b"A")
    vm.write_physical(DATA_B, b"B")
    return vm, tables, vm.vcpus[0]


def store_entry(cpu, tables, va, value):
    """By the guest's own store, and nothing else."""
    cpu.write(DIRECT + tables.entry(va, 1).gpa, value, tables.format.entry_size)


def faults(access, *arguments):
    """The error code of the access's page fault."""
    with pytest.raises(sc.PageFault) as caught:
        access(*arguments)
    return caught.value.error_code


# -- leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", ["unsync", "kvm-6.1", "kvm-6.12"])
def test_a_leaf_lags_until_it_is_invalidated(mode, mmu):
    _, tables, cpu = guest(mode, mmu)
    assert cpu.read(X, 1) == ord("A")
    store_entry(cpu, tables, X, DATA_B | 0x63)
    assert cpu.read(X, 1) == ord("A")
    cpu.invlpg(X)
    assert cpu.read(X, 1) == ord("B")
    store_entry(cpu, tables, X, DATA_A | 0x63)
    assert cpu.read(X, 1) == ord("B")
    cpu.cr3 = cpu.cr3
    assert cpu.read(X, 1) == ord("A")


@pytest.mark.parametrize("absent", [0, RESERVED | DATA_A | 0x63])
@pytest.mark.parametrize("mode", MODES)
def test_fault_keeps_leaf_for_what_is_absent(mode, absent):
    """Each page fault drops what translates its address (SDM volume 3, 4.10.4.1), of whatever kind. KVM leaves it where
    the entry is absent now, or has a reserved bit."""
    if mode == "32" and absent:
        return
    for mmu in ("unsync", sc.Shadow.unsync(release="6.12"), "kvm-6.1"):
        _, tables, cpu = guest(mode, mmu)
        cpu.read(X, 1)
        store_entry(cpu, tables, X, absent)
        assert cpu.read(X, 1) == ord("A")
        code = 9 if absent else 0
        assert faults(cpu.write, X, 0) == code | 2
        if mmu == "kvm-6.1":
            assert cpu.read(X, 1) == ord("A")
        else:
            assert faults(cpu.read, X) == code


@pytest.mark.parametrize("mode", LONG)
def test_tagged_cr3_lags_under_another_pcid(mode):
    """Two spaces have their leaf tables in common. While one is in use an entry changes twice: the other, of another
    PCID, can only remember what was there when it was in use."""
    for mmu in ("unsync", "kvm-6.1"):
        vm, tables, cpu = guest(mode, mmu)
        cpu.cr4 |= 1 << 17
        root = tables.registers["cr3"]
        twin = 4 * MIB
        vm.write_physical(twin, vm.read_physical(root, 4096))
        first, second = root | 1, twin | 2
        cpu.cr3 = first
        cpu.cr3 = second
        cpu.read(Y, 1)
        store_entry(cpu, tables, X, 0)  # the second space cannot remember X
        cpu.cr3 = first
        assert faults(cpu.read, X) == 0
        store_entry(cpu, tables, X, DATA_A | 0x63)
        assert cpu.read(X, 1) == ord("A")
        store_entry(cpu, tables, X, DATA_B | 0x63)
        assert cpu.read(X, 1) == ord("A")
        cpu.cr3 = KEEP | second
        assert cpu.read(X, 1) == ord("B" if mmu == "unsync" else "A")


# -- devices ---------------------------------------------------------------------------------------------

NOWHERE = 0x80_0000  # beyond RAM


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", ["unsync", "kvm-6.1", "kvm-6.12"])
@pytest.mark.parametrize("va", [0, X])
def test_a_device_that_became_memory(mode, mmu, va):
    """Address 0 is not remembered as that of a device, so the emulator looks it up, and finds memory: that is what it
    loads, stores and fetches."""
    vm, tables, cpu = guest(mode, mmu)
    if va == 0:
        tables.map(0, NOWHERE, 4096, "rwx", dirty=True)
    else:
        tables.set_entry(X, 1, NOWHERE | 0x63)
    with pytest.raises(sc.MMIOAccess):
        cpu.read(va)
    store_entry(cpu, tables, va, DATA_B | 0x63)
    if va == 0:
        assert cpu.read(va, 1) == ord("B")
        cpu.write(va, ord("C"), 1)
        assert vm.read_physical(DATA_B, 1) == b"C"
    else:
        with pytest.raises(sc.MMIOAccess) as caught:
            cpu.read(va)
        assert caught.value.gpa == NOWHERE
    assert cpu.fetch(va) == DATA_B
    cpu.invlpg(va)
    cpu.write(va, ord("D"), 1)
    assert vm.read_physical(DATA_B, 1) == b"D"


@pytest.mark.parametrize("mode", MODES)
def test_device_unasked_whether_its_entry_is_dirty(mode):
    """With CR0.WP off a supervisor needs no W; D is set all the same."""
    for mmu in ("unsync", "kvm-6.1"):
        _, tables, cpu = guest(mode, mmu)
        tables.set_entry(X, 1, NOWHERE | 0x3)
        cpu.cr0 &= ~(1 << 16)
        with pytest.raises(sc.MMIOAccess):
            cpu.read(X)
        with pytest.raises(sc.MMIOAccess):
            cpu.write(X, 1)
        assert tables.entry(X, 1).value & 0x60 == (0x60 if mmu == "unsync" else 0x20)


@pytest.mark.parametrize("mode", LONG)
def test_device_unasked_for_its_key(mode):
    for mmu in ("unsync", "kvm-6.1"):
        _, tables, cpu = guest(mode, mmu)
        tables.map(DIRECT + 64 * MIB, NOWHERE, 4096, "rwxu", dirty=True, pkey=3)
        cpu.cr4 |= 1 << 22
        with pytest.raises(sc.MMIOAccess):
            cpu.read(DIRECT + 64 * MIB)
        cpu.pkru = 1 << 6
        error = sc.PageFault if mmu == "unsync" else sc.MMIOAccess
        with pytest.raises(error):
            cpu.read(DIRECT + 64 * MIB)


# -- tables of two formats -------------------------------------------------------------------------------


def test_a_walk_of_a_directory_that_holds_large_leaves():
    """A 32-bit processor takes for an entry of its own the upper half of one that is large, and sets A in it."""
    slots = [sc.MemorySlot(0, 4 * MIB), sc.MemorySlot(1 << 32, 4 * MIB, host_page_size=2 * MIB)]
    vm = sc.VM(memory=slots, mmu="unsync", vcpus=2)
    tables = sc.PageTables(vm, "64")
    tables.map(2 * MIB, 1 << 32, 2 * MIB, "rwx", page_size=2 * MIB, dirty=True)
    first, second = vm.vcpus
    for name, value in tables.registers.items():
        setattr(first, name, value)
    first.write(2 * MIB, 77)
    assert vm.stats.pages_2m == 1
    directory = tables.entry(2 * MIB, 2).gpa & -4096
    second.cr3 = directory
    second.cr0 = 0x8000_0011
    with pytest.raises(sc.PageFault):
        second.read(3 << 22)  # A is set where a walk comes to its end alone
    vm.write_physical(0, (1).to_bytes(4, "little"))
    second.read(3 << 22)
    assert vm.stats.pages_2m == 0
    assert tables.entry(2 * MIB, 2).value >> 32 == 0x21
    with pytest.raises(sc.MMIOAccess):
        first.read(2 * MIB)


# -- stores to tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES[1:])
def test_store_rounded_to_one_entry(mode):
    """Four bytes, two of them in the entry that leads to X. KVM rounds the address down to that of one entry."""
    for mmu in ("unsync", "kvm-6.1"):
        _, tables, cpu = guest(mode, mmu)
        assert cpu.read(X, 1) == ord("A")
        cpu.write(DIRECT + tables.entry(X, 2).gpa - 2, 0, 4)
        cpu.cr3 = cpu.cr3
        if mmu == "unsync":
            assert faults(cpu.read, X) == 0
        else:
            assert cpu.read(X, 1) == ord("A")


@pytest.mark.parametrize("mode", LONG)
def test_a_key_that_forbids_stores_to_user_mode(mode):
    """With CR0.WP off the supervisor may store; the processor, whose CR0.WP is on, would not: the store is emulated."""
    for mmu in ("unsync", "kvm-6.1"):
        vm, tables, cpu = guest(mode, mmu)
        tables.map(DIRECT + 64 * MIB, DATA_A, 4096, "rwxu", dirty=True, pkey=3)
        cpu.cr4 |= 1 << 22
        cpu.pkru = 2 << 6
        assert faults(cpu.write, DIRECT + 64 * MIB, 1) == 0x23
        cpu.cr0 &= ~(1 << 16)
        for value in (1, 2):
            cpu.write(DIRECT + 64 * MIB, value, 1)
            assert vm.read_physical(DATA_A, 1) == bytes([value])
        cpu.cr0 |= 1 << 16
        assert faults(cpu.write, DIRECT + 64 * MIB, 3) == 0x23


# -- pools -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prev_roots", [0, 3])
def test_roots_make_room(mode, prev_roots):
    """As few pages as one path has, and roots of earlier CR3s, or three more in PAE format: they go when they must."""
    pages = {"32": 4, "pae": 4, "64": 4, "la57": 5}[mode]
    design = sc.Shadow.unsync(pool_pages=pages, min_free=0, refill=0, prev_roots=prev_roots)
    vm, tables, cpu = guest(mode, design)
    twin = 4 * MIB
    root = tables.registers["cr3"]
    vm.write_physical(twin, vm.read_physical(root, 4096))
    for _ in range(3):
        for cr3 in (root, twin):
            cpu.cr3 = cr3
            assert cpu.read(X, 1) == ord("A")
            assert cpu.read(Y, 1) == ord("B")
            assert cpu.read(DIRECT + DATA_B, 1) == ord("B")
            assert vm.audit().ok
