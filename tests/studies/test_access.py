"""One access explained: what is said is what the engine then does, and saying it changes nothing."""

import json
import random

import numpy as np
import pytest

import shadowcore as sc

MODES = ("32", "pae", "64", "la57")
DESIGNS = ("native", "flush", "cached", "unsync", "kvm-2007")
DIRECT = {"32": 0xC0000000, "pae": 0xC0000000, "64": 0xFFFF888000000000, "la57": 0xFF11000000000000}
USER = 0x400000


def machine(design, mode="64", tlb=None):
    """A VM with user pages of several rights at USER, a device, and all of memory at DIRECT[mode]."""
    vm = sc.VM("4MiB", design, tlb=tlb)
    tables = sc.PageTables(vm.memory, mode, allocate=range(512, 1024))
    x = "x" if mode == "32" else ""  # there is no other page there
    for page, rights in enumerate(("rwu" + x, "ru" + x, "rw" + x, "r" + x, "rwxu")):
        tables.map(USER + page * 4096, 0x10000 + page * 4096, 4096, rights)
    tables.map(USER + 0x5000, 0xFEE00000, 4096, "rwu" + x)
    tables.map(DIRECT[mode], 0, 4 << 20, "rw" + x, 4096)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    return vm, tables


def state(vm, path):
    vm.save(path)
    return path.read_bytes()


def done(vm, asked):
    """The same access on the machine itself: what it came to."""
    cpu, before = vm.vcpus[asked.vcpu], vm.stats.as_dict()
    outcome = value = code = None
    try:
        if asked.access == "x":
            cpu.fetch(asked.gva, user=asked.user)
        elif asked.access == "r":
            value = cpu.read(asked.gva, asked.size, user=asked.user)
        else:
            gpa = cpu.translate(asked.gva, "w", asked.user).gpa
            there = vm.read_physical(gpa, asked.size) if gpa < 4 << 20 else b""
            cpu.write(asked.gva, int.from_bytes(there, "little"), asked.size, user=asked.user)
        outcome = "done"
    except sc.PageFault as fault:
        outcome, code = "#PF", fault.error_code
        if asked.access == "w":  # translate has no side effect: the fault has to be taken
            with pytest.raises(sc.PageFault):
                cpu.write(asked.gva, 0, asked.size, user=asked.user)
    except sc.GeneralProtection:
        outcome, code = "#GP", 0
    except sc.MMIOAccess:
        outcome = "device"
    after = vm.stats.as_dict()
    return outcome, value, code, {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_said_is_what_happens_and_nothing_changes(design, mode, tmp_path):
    rng = random.Random(f"{design} {mode}")
    vm, tables = machine(design, mode, sc.TLB() if rng.random() < 0.5 else None)
    places = [USER + page * 4096 + 8 * word for page in range(7) for word in (0, 5)]
    places += [DIRECT[mode] + tables.entry(USER).gpa, DIRECT[mode] + 0x10000, 0x1234567]
    for _ in range(12):
        gva, access, user = rng.choice(places), rng.choice("rwx"), rng.random() < 0.6
        before = state(vm, tmp_path / "vm")
        found = sc.explain(vm, gva, access, user)
        assert state(vm, tmp_path / "vm") == before
        table = None if found.after is None else [(step.page, step.index, step.entry) for step in found.after]
        outcome, value, code, counters = done(vm, found)
        assert (found.outcome, found.value, found.error_code, found.counters) == (outcome, value, code, counters)
        assert len(found.exits) == sum(n for name, n in counters.items() if name == "exits_total")
        assert found.hit == (not found.exits)
        assert vm.audit().ok
        # The shadow's walk afterwards is the one that is there now.
        again = sc.explain(vm, gva, access, user).shadow
        assert (None if again is None else [(step.page, step.index, step.entry) for step in again]) == table


def test_both_walks_of_a_machine_that_is_warm():
    vm, tables = machine("cached")
    vm.vcpus[0].read(USER, user=True)
    found = sc.explain(vm, USER, "r", True)
    assert found.verdict() == ["hit: the shadow's tables serve, no exit"]
    assert found.changes == ()
    assert [step.level for step in found.shadow] == [4, 3, 2, 1]
    assert [(step.level, step.gpa, step.entry) for step in found.guest.steps] == tables.walk(USER)
    for step in found.shadow:
        assert vm.mmu.table(step.page)[step.index] == step.entry
    assert found.shadow[-1].leads_to.endswith("which is gfn 0x10 (4 KiB)")
    assert found.shadow[2].leads_to == f"leads to shadow page {found.shadow[3].page}"


def test_a_fill_in_words():
    vm, _ = machine("cached")
    found = sc.explain(vm, USER, "w", True)
    assert found.exits == ("fill",)
    assert "no entry for what the guest maps" in found.verdict()[0]
    text = str(found)
    for words in (
        "user write of 8 bytes at gva 0x400000, design cached",
        "ends the walk: nothing is there yet",
        "is made: guest table at gfn",
        "A and D of the guest's PTE 0 at gpa",
        "the reverse map of gfn 0x10 has 1 entries, not 0",
        "its store to gpa 0x10000 is done",
    ):
        assert words in text


def test_a_store_to_a_guest_table_in_words():
    cached, tables = machine("cached")
    table = DIRECT["64"] + tables.entry(USER).gpa
    for vm, words in ((cached, "the emulator has to do the store"), (machine("unsync")[0], "becomes unsync")):
        vm.vcpus[0].read(USER, user=True)
        vm.vcpus[0].read(table)
        assert words in str(sc.explain(vm, table, "w"))
    assert "is cleared, it was" in str(sc.explain(cached, table, "w"))


def test_frames_that_become_guest_tables_are_write_protected():
    """A page that is writable becomes a table: its leaves lose W."""
    vm, tables = machine("cached")
    cpu = vm.vcpus[0]
    gpa = tables.entry(USER).gpa & ~0xFFF
    cpu.write(DIRECT["64"] + gpa + 0x800, 0)  # no shadow page stands for the leaf table yet
    found = sc.explain(vm, USER, "r", True)
    assert [change for change in found.changes if "is write-protected" in change]
    assert found.counters["rmap_protected"] == 1


@pytest.mark.parametrize(
    ("gva", "access", "user", "outcome", "said"),
    [
        (USER + 0x1000, "w", True, "#PF", "#PF, error code 0x7"),
        (USER + 0x2000, "r", True, "#PF", "#PF, error code 0x5"),
        (USER + 0x9000, "r", True, "#PF", "#PF, error code 0x4"),
        (USER + 0x5000, "r", True, "device", "what the device at gpa 0xfee00000 answers"),
        (1 << 60, "r", False, "#GP", "#GP: the address is not canonical"),
    ],
)
def test_what_the_guest_sees_of_an_access_that_fails(gva, access, user, outcome, said):
    for design in DESIGNS:
        found = sc.explain(machine(design)[0], gva, access, user)
        assert (found.outcome, found.sees[: len(said)]) == (outcome, said)


def test_paging_off_and_other_processors():
    vm = sc.VM("1MiB", "cached", vcpus=2)
    vm.memory.words[4] = 7
    found = sc.explain(vm, 32, vcpu=1)
    assert (found.guest, found.value, found.gpa, found.user) == (None, 7, 32, False)
    assert "paging is off" in str(found)
    assert found.shadow
    vm.vcpus[1].read(32)
    assert sc.explain(vm, 32, vcpu=1).hit


def test_slots_and_large_pages():
    vm = sc.VM([sc.MemorySlot(0, 8 << 20, host_page_size="2MiB"), sc.MemorySlot(1 << 32, 4 << 20)], "unsync")
    tables = sc.PageTables(vm.memory, "64", allocate=range(1024, 2048))
    tables.map(0x40000000, 0, 2 << 20, "rw", 2 << 20)
    tables.map(0x50000000, 1 << 32, 4096, "rw", 4096)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    for gva in (0x40000000, 0x50000000):
        vm.vcpus[0].read(gva)
    assert sc.explain(vm, 0x40001000).shadow[-1].leads_to.endswith("which is gfn 0x0 (2 MiB)")
    assert sc.explain(vm, 0x50000000).shadow[-1].leads_to.endswith("which is gfn 0x100000 (4 KiB)")


def test_forms():
    found = sc.explain(machine("cached")[0], USER, "w", True)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["exits"] == ["fill"]
    assert [step["level"] for step in plain["guest"]["levels"]] == [4, 3, 2, 1]
    page = found._repr_html_()
    assert page.count("<th ") == 2
    assert "the guest&#x27;s walk" in page
    assert "PML4E 0" in page
    assert "shadow page" in page
    assert "<b>the access would do</b>" in page
    assert "in no memory slot: a device" in sc.explain(machine("cached")[0], USER + 0x5000, "r", True).html()
    assert "has no shadow" in sc.explain(machine("native")[0], USER).html()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, "q"), "access: one of r, w, x"),
        ((-1,), "gva"),
        ((1 << 64,), "gva"),
        ((0, "r", None), "vcpu"),
    ],
)
def test_what_cannot_be_asked(arguments, said):
    vm, _ = machine("cached")
    with pytest.raises(sc.ConfigError, match=said):
        sc.explain(vm, *arguments, vcpu=3 if said == "vcpu" else 0)
    with pytest.raises(sc.ConfigError, match="size"):
        sc.explain(vm, 0, size=3)
    with pytest.raises(sc.ConfigError, match="32 bits"):
        sc.explain(machine("cached", "32")[0], 1 << 40)


def test_nothing_is_shared_with_the_copy():
    """Callbacks of the machine are not called, and its memory is not written."""
    vm, _ = machine("cached")
    seen = []
    sc.embed.on_event(vm, seen.append)
    before = np.array(vm.memory.bytes)
    sc.explain(vm, USER, "w", True)
    assert seen == []
    assert (before == vm.memory.bytes).all()


def test_frames_of_slots_that_moved():
    """Guest RAM is not in the order of gfns, and one slot number is free."""
    vm = sc.VM(
        "8MiB", "unsync", slots=[sc.MemorySlot(0, "4MiB", offset=4 << 20), sc.MemorySlot(8 << 20, "1MiB", offset=0)]
    )
    vm.remove_slot(1)
    moved = vm.add_slot(1 << 30, "2MiB", offset=1 << 20)
    tables = sc.PageTables(vm.memory, "64", allocate=range(512, 1024))
    tables.map(USER, 0x3000, 4096, "rw")
    tables.map(USER + 4096, (1 << 30) + 0x5000, 4096, "rw")
    tables.activate(vm.vcpus[0])
    for page, gfn in enumerate((0x3, 0x40005)):
        vm.vcpus[0].read(USER + page * 4096)
        assert sc.explain(vm, USER + page * 4096).shadow[-1].leads_to.endswith(f"which is gfn {gfn:#x} (4 KiB)")
    vm.set_slot(moved, gpa=2 << 30)
    assert sc.explain(vm, USER + 4096).outcome == "device"
