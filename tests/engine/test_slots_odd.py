"""Slots and host pages in states that are rarely met: each was wrong once."""

import struct

import pytest

import shadowcore as sc
from shadowcore.config import Shadow
from shadowcore.engine import snapshot

DESIGNS = ("native", "flush", "cached", "unsync", "kvm-2007", "kvm-6.12")


def started(vm, entries):
    """The first vcpu, with 4-level tables at 0x1000; entries: of the leaf table at 0x4000."""
    for gpa, entry in {0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027}.items():
        vm.write_physical(gpa, struct.pack("<Q", entry))
    for index, entry in entries.items():
        vm.write_physical(0x4000 + 8 * index, struct.pack("<Q", entry))
    cpu = vm.vcpus[0]
    cpu.efer, cpu.cr4, cpu.cr3, cpu.cr0 = 0x100, 0x20, 0x1000, 0x80010001
    return cpu


@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("flush", ["cr3", "invlpg"])
def test_ram_where_a_device_was(mmu, flush):
    """A table that lags remembers the device; brought in line, it looks whether there is RAM by now."""
    vm = sc.VM("4MiB", sc.config.design(mmu), slots=[sc.MemorySlot(0, "2MiB")])
    if mmu == "kvm-6.12":
        vm = sc.VM("4MiB", Shadow.unsync(release="6.12"), slots=[sc.MemorySlot(0, "2MiB")])
    cpu = started(vm, {5: (32 << 20) | 0x67, 8: 0x4067})
    with pytest.raises(sc.MMIOAccess):
        cpu.read(0x5000, 8)
    cpu.write(0x8000 + 72, 0, 8)  # to the table itself
    vm.add_slot(32 << 20, "1MiB")
    if flush == "cr3":
        cpu.cr3 = 0x1000
    else:
        cpu.invlpg(0x5000)
    assert cpu.read(0x5000, 8) == 0
    assert vm.audit().ok


def test_a_table_of_other_reserved_bits_is_not_synced_by_ours():
    """2.6.28: bit 63 is reserved while EFER.NXE is off."""
    seen = []
    for mmu in ("native", Shadow("2.6.28", lagging=True, release="2.6.28", prefetch=0, prev_roots=0)):
        vm = sc.VM("2MiB", mmu)
        cpu = started(vm, {**{i: (0x10000 + i * 4096) | 0x67 for i in range(8)}, 8: 0x4067})
        cpu.read(0x5000, 8)
        cpu.write(0x8000 + 40, (1 << 63) | 0x15067, 8)
        cpu.efer |= 0x800
        cpu.read(0x6000, 8)
        cpu.efer &= ~0x800
        cpu.read(0x6000, 8)
        with pytest.raises(sc.PageFault) as fault:
            cpu.read(0x5000, 8)
        seen.append(fault.value.error_code)
    assert seen == [9, 9]


def test_a_machine_whose_large_slot_went_is_loaded(tmp_path):
    slots = [sc.MemorySlot(0, "2MiB"), sc.MemorySlot(1 << 30, "2MiB", host_page_size="2MiB")]
    vm = sc.VM("8MiB", "unsync", slots=slots)
    vm.remove_slot(1)
    cpu = started(vm, {0: 0x10067})
    cpu.read(0, 8)
    vm.save(tmp_path / "vm")
    again = sc.VM.load(tmp_path / "vm")
    again.vcpus[0].read(0, 8)
    assert again.audit().ok


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_a_copy_has_all_of_ram(mmu):
    vm = sc.VM("4MiB", mmu, slots=[None, sc.MemorySlot(0, "2MiB")])
    assert snapshot.copy(sc.VM, vm).memory.bytes.size == 4 << 20
    assert sc.explain(vm, 0).outcome == "done"
    vm.remove_slot(1)
    assert not any(snapshot.copy(sc.VM, vm).memory.slots)


@pytest.mark.parametrize("mmu", DESIGNS)
def test_a_refused_store_to_a_frame_that_the_host_lacks(mmu):
    vm = sc.VM("2MiB", mmu, backing="cold")
    cpu = started(vm, {5: 0x15025})
    with pytest.raises(sc.PageFault):
        cpu.write(0x5000, 1, 8)
    assert vm.audit().ok
    assert cpu.read(0x5000, 8) == 0
    assert vm.memory.backing_arrays()[0][0x15]
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["cached", "unsync"])
def test_no_table_at_all_is_no_reference(mmu):
    counted = []
    for general in (False, True):
        vm = sc.VM("4MiB", mmu)
        vm.mmu.general = general
        cpu = vm.vcpus[0]
        cpu.efer, cpu.cr4, cpu.cr3, cpu.cr0 = 0x100, 0x20, 64 << 20, 0x80010001
        for page in range(3):
            with pytest.raises(sc.PageFault):
                cpu.read(0x400000 + page * 4096, 8)
        counted.append(vm.stats.as_dict())
    assert counted[0] == counted[1]
    assert counted[0]["guest_walk_references"] == 0


def test_a_slot_that_is_refused_changes_nothing():
    vm = sc.VM("4MiB", "cached", slots=[sc.MemorySlot(0, "2MiB")])
    arrays = vm.mmu.writable_arrays()
    with pytest.raises(sc.EngineError):
        vm.add_slot(1 << 30, "1MiB", backing="cold")
    assert not vm.memory.backing_arrays()
    del arrays


def test_a_block_that_nobody_touched_stays_whole():
    vm = sc.VM("4MiB", "native", backing="thp")
    vm.host_unmap(512, 512)
    vm.read_physical(2 << 20, 1)
    other = sc.VM("4MiB", "native", backing="thp")
    other.read_physical(2 << 20, 1)
    for mine, fresh in zip(vm.memory.backing_arrays(), other.memory.backing_arrays(), strict=True):
        assert (mine == fresh).all()
