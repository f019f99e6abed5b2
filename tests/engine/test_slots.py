"""Memory slots that are added, removed, moved and logged while the guest runs, under every design."""

import copy
import pickle

import numpy as np
import pytest
from changing_slots import (
    DESIGNS,
    EXACT,
    HERE,
    LOW,
    LOW_SIZE,
    MIB,
    MODES,
    PAGE,
    RAM,
    SIZE,
    THERE,
    VA_HERE,
    VA_LOW,
    VA_MIXED,
    VA_THERE,
    Machine,
    same,
)

import shadowcore as sc

EVERY = {"native": "native", **DESIGNS}
TLB = sc.TLB(16, 4, 4, 4, 0, 1)
every_design = pytest.mark.parametrize("design", EVERY)


@pytest.mark.parametrize("tlb", [None, TLB], ids=["walks", "tlb"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", EXACT)
def test_a_random_program_is_what_it_is_natively(design, mode, tlb):
    for seed in range(3):
        same(design, mode, seed, tlb=tlb)


@every_design
@pytest.mark.parametrize("mode", MODES)
def test_a_slot_that_is_removed_is_no_memory(design, mode):
    m = Machine(EVERY[design], mode)
    for i in range(4):
        m.write(VA_HERE + i * PAGE, 7 + i)
        m.read(VA_MIXED + i * PAGE)
    view = m.memory.bytes[LOW_SIZE : LOW_SIZE + PAGE]
    m.vm.remove_slot(1)
    assert m.vm.memory.slots == (sc.MemorySlot(0, LOW_SIZE),)
    for i in range(4):
        with pytest.raises(sc.MMIOAccess) as caught:
            m.read(VA_HERE + i * PAGE)
        assert caught.value.gpa == HERE + i * PAGE
        with pytest.raises(sc.PageFault):  # its table is gone
            m.read(VA_MIXED + i * PAGE)
    assert m.read(VA_LOW) == 0
    assert view[0] == 7  # what is in its frames stays, and so do views
    with pytest.raises(sc.ConfigError, match="gpa"):
        m.vm.write_physical(HERE, b"x")
    assert m.vm.add_slot(HERE, SIZE) == 1
    assert [m.read(VA_HERE + i * PAGE) for i in range(4)] == [7, 8, 9, 10]
    assert m.read(VA_MIXED) == 0
    assert m.vm.audit().ok


@every_design
@pytest.mark.parametrize("mode", MODES)
def test_a_slot_that_moves_keeps_its_frames(design, mode):
    m = Machine(EVERY[design], mode)
    m.write(VA_HERE, 5)
    with pytest.raises(sc.MMIOAccess):
        m.read(VA_THERE)
    m.vm.set_slot(1, gpa=THERE)
    with pytest.raises(sc.MMIOAccess):
        m.read(VA_HERE)
    assert m.read(VA_THERE) == 5
    m.write(VA_THERE, 6)
    assert m.memory.bytes[LOW_SIZE] == 6
    assert m.vm.memory.slots[1].gpa == THERE
    assert m.vm.audit().ok


@every_design
def test_a_device_that_becomes_memory(design):
    m = Machine(EVERY[design])
    for _ in range(2):
        with pytest.raises(sc.MMIOAccess):
            m.write(VA_THERE, 1)
    assert m.vm.add_slot(THERE, "1MiB") == 2
    m.write(VA_THERE, 1)
    assert m.read(VA_THERE) == 1
    assert m.memory.bytes[LOW_SIZE + SIZE] == 1  # the first free place
    assert m.vm.audit().ok


@every_design
@pytest.mark.parametrize("mode", MODES)
def test_a_read_only_slot(design, mode):
    m = Machine(EVERY[design], mode)
    m.write(VA_HERE, 5)
    m.vm.remove_slot(1)
    m.vm.add_slot(HERE, SIZE, read_only=True)
    for _ in range(3):
        assert m.read(VA_HERE) == 5
        with pytest.raises(sc.MMIOAccess) as caught:
            m.write(VA_HERE + 8, 9)
        assert caught.value.gpa == HERE + 8
    assert m.read(VA_HERE + 8) == 0
    assert m.read(VA_MIXED) == 0
    m.write(VA_MIXED, 3)  # the tables are read-only, the page is not
    assert m.read(VA_MIXED) == 3
    with pytest.raises(sc.ConfigError, match=r"gpa.*written"):
        m.vm.write_physical(HERE, b"x")
    batch = np.zeros(3, sc.OP_DTYPE)
    batch["op"], batch["size"], batch["addr"] = [sc.Op.WRITE, sc.Op.READ, sc.Op.XCHG], 8, VA_HERE
    assert m.cpu.run(batch).outcome.tolist() == [3, 0, 3]
    assert m.vm.audit().ok


@every_design
def test_walks_set_no_bits_in_read_only_tables(design):
    m = Machine(EVERY[design])
    table = m.tables.entry(VA_MIXED, 1).gpa
    entry = int(m.memory.words[(m.memory.frame(table >> 12) << 9) + (table >> 3 & 511)])
    m.vm.write_physical(table, (entry & ~0x60).to_bytes(8, "little"))
    m.cpu.cr3 = m.cpu.cr3
    m.vm.remove_slot(1)
    m.vm.add_slot(HERE, SIZE, read_only=True)
    for _ in range(2):
        m.write(VA_MIXED, 3)
        assert m.read(VA_MIXED) == 3
        assert int.from_bytes(m.vm.read_physical(table, 8), "little") == entry & ~0x60
    assert m.vm.audit().ok


@every_design
def test_dirty_logs_follow_their_slots(design):
    m = Machine(EVERY[design])
    m.vm.set_slot(1, dirty_log=True)
    m.vm.set_slot(1, dirty_log=True)
    m.write(VA_HERE + PAGE, 5)
    assert m.memory.dirty_log(1).nonzero()[0].tolist() == [1]
    m.vm.set_slot(1, gpa=THERE)
    assert m.memory.dirty_log(1).nonzero()[0].tolist() == [1]
    m.write(VA_THERE + 2 * PAGE, 5)
    assert m.memory.dirty_log(1).nonzero()[0].tolist() == [1, 2]
    m.vm.remove_slot(1)
    assert m.memory.logged_slots == ()
    with pytest.raises(sc.ConfigError, match="slot"):
        m.memory.dirty_log(1)
    m.vm.add_slot(HERE, SIZE, dirty_log=True)
    assert m.memory.logged_slots == (1,)
    assert not m.memory.dirty_log(1).any()
    m.write(VA_HERE + PAGE, 5)
    assert m.memory.dirty_log(1)[1]
    m.vm.set_slot(1, dirty_log=False)
    assert m.memory.logged_slots == ()
    assert m.vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_a_root_that_led_nowhere_gets_memory(design):
    """CR3 names a table where there is no memory; then there is."""
    m = Machine(EVERY[design])
    home = m.cpu.cr3
    root = m.vm.read_physical(home, PAGE)
    m.cpu.cr3 = THERE
    with pytest.raises(sc.PageFault):
        m.read(VA_LOW)
    m.vm.add_slot(THERE, SIZE)
    m.vm.write_physical(THERE, root)
    m.cpu.cr3 = THERE
    assert m.read(VA_LOW) == 0
    assert m.vm.audit().ok
    m.vm.remove_slot(2)
    with pytest.raises(sc.PageFault):
        m.read(VA_LOW)
    m.cpu.cr3 = home
    assert m.read(VA_LOW) == 0
    assert m.vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_several_processors_and_many_changes(design):
    """Each processor loses its roots; generations that entries can tell apart come round."""
    m = Machine(EVERY[design], vcpus=3)
    for _ in range(3):
        for cpu in m.vm.vcpus:
            cpu.write(VA_HERE, 3, 8)
        m.vm.remove_slot(1)
        for cpu in m.vm.vcpus:
            with pytest.raises(sc.MMIOAccess):
                cpu.read(VA_HERE, 8)
        m.vm.add_slot(HERE, SIZE)
    with pytest.raises(sc.MMIOAccess):
        m.read(VA_THERE)
    for _ in range(1100):
        m.vm.set_slot(0, dirty_log=True)
        m.vm.set_slot(0, dirty_log=False)
    with pytest.raises(sc.MMIOAccess):
        m.read(VA_THERE)
    m.vm.add_slot(THERE, SIZE)
    assert m.read(VA_THERE) == 0
    assert m.vm.audit().ok


@every_design
def test_all_slots_can_go(design):
    m = Machine(EVERY[design])
    m.read(VA_LOW)
    m.vm.remove_slot(0)
    m.vm.remove_slot(1)
    assert m.memory.slots == ()
    with pytest.raises(sc.PageFault):
        m.read(VA_LOW)
    assert m.vm.add_slot(0, LOW_SIZE) == 0
    assert m.read(VA_LOW) == 0
    assert m.vm.audit().ok


def test_where_slots_can_be():
    vm = sc.VM(memory=RAM, slots=[sc.MemorySlot(0, MIB), None, sc.MemorySlot(4 * MIB, MIB, offset=6 * MIB)])
    assert vm.memory.slots[1] is None
    assert vm.memory.frame(0x400) == 0x600
    assert vm.add_slot(sc.MemorySlot(64 * MIB, MIB)) == 1
    assert vm.memory.frame(64 << 8) == 0x100
    assert vm.add_slot(80 * MIB, MIB, slot=31, offset=7 * MIB) == 31
    assert vm.add_slot(96 * MIB, 4 * MIB) == 3
    assert vm.memory.frame(96 << 8) == 0x200
    assert [slot and slot.gpa for slot in vm.memory.slots[:4]] == [0, 64 * MIB, 4 * MIB, 96 * MIB]
    assert len(vm.memory.slots) == 32
    vm.remove_slot(31)
    assert len(vm.memory.slots) == 4
    slot = vm.memory.slots[3]
    assert pickle.loads(pickle.dumps(slot)) == copy.deepcopy(slot) == slot


class Liar(int):
    def __index__(self):
        return 7


BAD = {
    "no such slot": ("slot", lambda vm: vm.remove_slot(2)),
    "a free number": ("slot", lambda vm: vm.remove_slot(5)),
    "a negative number": ("slot", lambda vm: vm.remove_slot(-1)),
    "a huge number": ("slot", lambda vm: vm.remove_slot(1 << 70)),
    "a text": ("slot", lambda vm: vm.remove_slot("0")),
    "none": ("slot", lambda vm: vm.remove_slot(None)),
    "a bool": ("slot", lambda vm: vm.remove_slot(True)),
    "set, no such slot": ("slot", lambda vm: vm.set_slot(7, gpa=0)),
    "set, a free number, log": ("slot", lambda vm: vm.set_slot(2, dirty_log=True)),
    "set, misaligned": ("slot.gpa", lambda vm: vm.set_slot(1, gpa=HERE + 1)),
    "set, overlap": ("slot.gpa", lambda vm: vm.set_slot(1, gpa=LOW_SIZE - PAGE)),
    "set, beyond 52 bits": ("slot.gpa", lambda vm: vm.set_slot(1, gpa=(1 << 52) - PAGE)),
    "set, huge": ("slot.gpa", lambda vm: vm.set_slot(1, gpa=1 << 80)),
    "set, log is a number": ("dirty_log", lambda vm: vm.set_slot(1, gpa=THERE, dirty_log=2)),
    "number in use": ("slot", lambda vm: vm.add_slot(THERE, MIB, slot=1)),
    "number too large": ("slot", lambda vm: vm.add_slot(THERE, MIB, slot=32)),
    "overlap": ("slot.gpa", lambda vm: vm.add_slot(HERE - PAGE, 2 * PAGE)),
    "overlap, whole": ("slot.gpa", lambda vm: vm.add_slot(0, 64 * MIB)),
    "misaligned": ("slot.gpa", lambda vm: vm.add_slot(THERE + 8, MIB)),
    "misaligned size": ("slot.size", lambda vm: vm.add_slot(THERE, 100)),
    "no size": ("size", lambda vm: vm.add_slot(THERE)),
    "two sizes": ("size", lambda vm: vm.add_slot(sc.MemorySlot(THERE, MIB), MIB)),
    "size 0": ("slot.size", lambda vm: vm.add_slot(THERE, 0)),
    "huge size": ("slot.size", lambda vm: vm.add_slot(THERE, 1 << 51)),
    "more than is free": ("slot.size", lambda vm: vm.add_slot(THERE, 4 * MIB)),
    "offset in use": ("slot.offset", lambda vm: vm.add_slot(THERE, MIB, offset=LOW_SIZE)),
    "offset beyond": ("slot.offset", lambda vm: vm.add_slot(THERE, MIB, offset=RAM - PAGE)),
    "huge offset": ("slot.offset", lambda vm: vm.add_slot(THERE, MIB, offset=1 << 52)),
    "misaligned offset": ("slot.offset", lambda vm: vm.add_slot(THERE, MIB, offset=LOW_SIZE + SIZE + 1)),
    "backing": ("slot.backing", lambda vm: vm.add_slot(THERE, MIB, backing="hot")),
    "host page": ("slot.host_page_size", lambda vm: vm.add_slot(THERE, MIB, host_page_size="2MiB")),
    "read-only": ("slot.read_only", lambda vm: vm.add_slot(THERE, MIB, read_only=None)),
    "liar": ("slot", lambda vm: vm.remove_slot(Liar(9))),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("design", ["native", "cached", "unsync"])
def test_bad_input_changes_nothing(design, bad):
    field, call = BAD[bad]
    m = Machine(EVERY[design])
    m.write(VA_HERE, 5)
    before = m.memory.slots, m.vm.stats.as_dict(), m.memory.bytes.tobytes()
    with pytest.raises(sc.ConfigError, match=f"^{field}:"):
        call(m.vm)
    assert (m.memory.slots, m.vm.stats.as_dict(), m.memory.bytes.tobytes()) == before
    assert m.read(VA_HERE) == 5


def test_bad_slots_at_first():
    for slots, what in (
        ([sc.MemorySlot(0, MIB), sc.MemorySlot(0, MIB)], "overlap"),
        ([sc.MemorySlot(0, MIB), sc.MemorySlot(MIB, MIB, offset=PAGE)], "two of them"),
        ([sc.MemorySlot(0, 16 * MIB)], "they hold"),
        ([sc.MemorySlot(0, MIB, offset=RAM)], "they hold"),
        ([None] * 33, "1 to 32"),
        (["slot"], "MemorySlot"),
    ):
        with pytest.raises(sc.ConfigError, match=what):
            sc.VM(memory=RAM, slots=slots)


@pytest.mark.parametrize("design", ["cached", "unsync"])
def test_slots_of_a_vm_in_use_do_not_change(design):
    m = Machine(EVERY[design])
    m.read(VA_HERE)
    lent = m.vm.mmu.writable_arrays()
    for call in (lambda: m.vm.remove_slot(1), lambda: m.vm.add_slot(THERE, MIB), lambda: m.vm.host_unmap(LOW >> 12)):
        with pytest.raises(sc.EngineError):
            call()
    del lent
    errors = []

    def refuse(gva, gpa, nbytes):
        for call in (lambda: m.vm.remove_slot(1), lambda: m.vm.set_slot(1, gpa=THERE), lambda: m.vm.host_unmap(0)):
            try:
                call()
            except sc.EngineError as error:
                errors.append(error)
        return True

    m.vm.mmu.can_emulate = refuse
    m.cpu.cr3 = m.cpu.cr3
    m.tables.map(VA_LOW + (1 << 23), 0x200000, MIB, "rwx", PAGE, accessed=True, dirty=True)
    root = m.cpu.cr3 & ~0xFFF
    m.cpu.write(VA_LOW + (1 << 23) + root - 0x200000, m.cpu.read(VA_LOW + (1 << 23) + root - 0x200000, 8), 8)
    assert len(errors) == 3
    assert m.memory.slots[1].gpa == HERE
    assert m.read(VA_HERE) == 0
