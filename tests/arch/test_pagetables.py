"""The table builder against the slow walker of oracle.py, in every mode."""

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shadowcore as sc
from shadowcore.errors import ConfigError
from shadowcore.pagetables import FORMATS, NX, PS, A, D, G, P, PageTables, U, W

MODES = ["32", "pae", "64", "la57"]
MIB = 1 << 20
FRAMES = 2048  # guest RAM of the tests: 8 MiB, tables in the highest quarter
HIGH = {"32": 0xC0000000, "pae": 0xC0000000, "64": 0xFFFF_8880_0000_0000, "la57": 0xFF11_0000_0000_0000}
LARGE = {"32": 4 * MIB, "pae": 2 * MIB, "64": 2 * MIB, "la57": 2 * MIB}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def ram():
    return np.zeros(FRAMES * 4096, dtype=np.uint8)


def processor(tables, ram, nframes=FRAMES):
    """The oracle's processor on a copy of the tables, its paging turned on in the order of `registers`."""
    pages = ram.view(np.uint8).reshape(-1, 4096)
    used = np.flatnonzero(pages.any(axis=1))
    cpu = oracle.Cpu(oracle.Memory.of_frames(nframes, used, pages[used]))
    for name, value in tables.registers.items():
        getattr(cpu, f"load_{name}")(value)
    assert cpu.mode == tables.mode
    return cpu


def mapped(cpu, va):
    """What the oracle sees at `va`: (gpa, page size, w, u, x), or None."""
    try:
        t = cpu.translate(va)
    except oracle.PageFault:
        return None
    return t.gpa, t.page_size, t.writable, t.user, t.executable


def test_small_pages(mode, ram):
    tables = PageTables(ram, mode)
    tables.map(0x400000, 0x10000, 0x3000, "rxu")
    tables.map(HIGH[mode] + 0x5000, 0, 0x1000, "rwx")
    cpu = processor(tables, ram)
    assert [mapped(cpu, 0x400000 + i * 4096 + 5) for i in range(4)] == [
        (0x10005, 4096, False, True, True),
        (0x11005, 4096, False, True, True),
        (0x12005, 4096, False, True, True),
        None,
    ]
    assert mapped(cpu, HIGH[mode] + 0x5000) == (0, 4096, True, False, True)
    assert mapped(cpu, HIGH[mode] + 0x6000) is None


@pytest.mark.parametrize("rights", ["rx", "rwx", "rxu", "rwxu", "r", "rw", "ru", "rwu"])
def test_rights(mode, ram, rights):
    tables = PageTables(ram, mode)
    if mode == "32" and "x" not in rights:
        with pytest.raises(ConfigError, match="execute-disable"):
            tables.map(0, 0, 4096, rights)
        return
    tables.map(0, 0x1000, 4096, rights)
    assert mapped(processor(tables, ram), 0)[2:] == ("w" in rights, "u" in rights, "x" in rights)


def test_auto_takes_the_largest_page(mode, ram):
    large = LARGE[mode]
    tables = PageTables(ram, mode)
    tables.map(large - 0x2000, large - 0x2000, 2 * large + 0x3000)
    cpu = processor(tables, ram)
    assert mapped(cpu, large - 1)[:2] == (large - 1, 4096)
    assert mapped(cpu, large + 123)[:2] == (large + 123, large)
    assert mapped(cpu, 3 * large - 1)[:2] == (3 * large - 1, large)
    assert mapped(cpu, 3 * large)[:2] == (3 * large, 4096)
    assert mapped(cpu, 3 * large + 0x1000) is None
    # Not aligned to each other: small pages only.
    tables.map(8 * large, 0x1000, large)
    assert mapped(processor(tables, ram), 8 * large)[:2] == (0x1000, 4096)


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_gigantic_pages(mode, ram):
    tables = PageTables(ram, mode)
    tables.map(HIGH[mode] & -(1 << 30), 5 << 30, "3GiB", "rw")
    cpu = processor(tables, ram)
    assert mapped(cpu, (HIGH[mode] & -(1 << 30)) + (2 << 30) + 77) == (
        (7 << 30) + 77,
        1 << 30,
        True,
        False,
        False,
    )


def test_pse36(ram):
    tables = PageTables(ram, "32")
    tables.map(0x400000, 0x12_3440_0000, "4MiB")
    assert mapped(processor(tables, ram), 0x7ABCDE)[:2] == (0x12_347A_BCDE, 4 * MIB)
    with pytest.raises(ConfigError, match="level 1 entry"):
        tables.map(0, 1 << 32, 4096)
    before = ram.copy()
    with pytest.raises(ConfigError, match="above 4 GiB"):
        tables.unmap(0x400000, 4096)
    assert (ram == before).all()


def test_page_size_is_obeyed(mode, ram):
    tables = PageTables(ram, mode)
    tables.map(0, 0, LARGE[mode], page_size=4096)
    assert mapped(processor(tables, ram), 0)[1] == 4096
    tables.map(0, 0, LARGE[mode], page_size=LARGE[mode])
    assert mapped(processor(tables, ram), 0)[1] == LARGE[mode]
    with pytest.raises(ConfigError, match="page_size"):
        tables.map(0, 0, 4096, page_size=LARGE[mode])
    with pytest.raises(ConfigError, match="page_size"):
        tables.map(0, 0, 4096, page_size=8192)


def test_leaf_bits(mode, ram):
    tables = PageTables(ram, mode)
    tables.map(0, 0, 4096, "rwxu", global_=True, accessed=True, dirty=True)
    assert tables.entry(0).value == P | W | U | A | D | G
    tables.map(0, 0x5000, 4096, P | 1 << 9)
    assert tables.entry(0).value == 0x5000 | P | 1 << 9
    for upper in tables.walk(0)[:-1]:
        pae_root = mode == "pae" and upper.level == 3
        assert upper.value & 0xFFF == (P if pae_root else P | W | U)
    if mode in ("64", "la57"):
        tables.map(0, 0, 4096, "rw", pkey=9)
        assert processor(tables, ram).translate(0).key == 9
    else:
        with pytest.raises(ConfigError, match="pkey"):
            tables.map(0, 0, 4096, "rwx", pkey=9)


def test_unmap_and_protect_split_large_pages(mode, ram):
    large = LARGE[mode]
    tables = PageTables(ram, mode)
    tables.map(0, 0, 4 * large, "rwxu", global_=True)
    tables.unmap(0x3000, 0x2000)
    tables.protect(large - 0x1000, large + 0x3000, "rx")
    cpu = processor(tables, ram)
    assert mapped(cpu, 0x2000) == (0x2000, 4096, True, True, True)
    assert mapped(cpu, 0x3000) is mapped(cpu, 0x4FFF) is None
    assert mapped(cpu, 0x5000) == (0x5000, 4096, True, True, True)
    assert mapped(cpu, large - 1) == (large - 1, 4096, False, False, True)
    assert mapped(cpu, large) == (large, large, False, False, True)
    assert mapped(cpu, 2 * large + 0x1FFF) == (2 * large + 0x1FFF, 4096, False, False, True)
    assert mapped(cpu, 2 * large + 0x2000) == (2 * large + 0x2000, 4096, True, True, True)
    assert mapped(cpu, 3 * large)[1] == large
    assert tables.entry(0x5000).value & G
    assert not tables.entry(0x5000).value & PS


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_one_page_out_of_a_gib(mode, ram):
    tables = PageTables(ram, mode)
    tables.map(1 << 30, 1 << 30, "1GiB", "rw")
    used = len(tables.tables)
    tables.unmap((1 << 30) + 0x201000, 4096)
    assert len(tables.tables) == used + 2
    cpu = processor(tables, ram)
    assert mapped(cpu, (1 << 30) + 0x201000) is None
    assert mapped(cpu, (1 << 30) + 0x202000)[:2] == ((1 << 30) + 0x202000, 4096)
    assert mapped(cpu, (1 << 30) + 0x400000)[:2] == ((1 << 30) + 0x400000, 2 * MIB)


def test_pat_moves_when_a_page_is_split(ram):
    tables = PageTables(ram, "64")
    tables.map(0, 0, 2 * MIB)
    tables.set_entry(0, 2, tables.entry(0, 2).value | 1 << 12)
    tables.unmap(0, 4096)
    assert tables.entry(0x1000).value & 0xFFF == P | W | 1 << 7
    assert mapped(processor(tables, ram), 0x1000)[:2] == (0x1000, 4096)


def test_entry(mode, ram):
    tables = PageTables(ram, mode)
    tables.map(0x7000, 0x123000, 4096)
    path = tables.walk(0x7000)
    assert [e.level for e in path] == list(range(FORMATS[mode].levels, 0, -1))
    for e in path:
        assert tables.entry(0x7000, e.level) == e
        size = FORMATS[mode].entry_size
        assert int.from_bytes(ram[e.gpa : e.gpa + size].tobytes(), "little") == e.value
    assert path[0].gpa == tables.cr3
    assert path[-1].value == 0x123000 | P | W
    assert tables.entry(0x8000).value == 0
    tables.set_entry(0x8000, 1, 0x124000 | P)
    assert mapped(processor(tables, ram), 0x8000) == (0x124000, 4096, False, False, True)
    far = 0x8000_0000
    with pytest.raises(ConfigError, match="is not present"):
        tables.entry(far, 1)
    tables.map(far, 0, LARGE[mode])
    with pytest.raises(ConfigError, match="maps a large page"):
        tables.entry(far, 1)
    assert tables.entry(far, 2).value & PS


def test_existing_root(mode, ram):
    first = PageTables(ram, mode, allocate=range(1600, 1800))
    first.map(0x1000, 0x1000, 4096)
    second = PageTables(ram, mode, allocate=range(1800, 2000), root=first.cr3)
    second.map(0x2000, 0x9000, 4096)
    cpu = processor(first, ram)
    assert mapped(cpu, 0x1000)[0] == 0x1000
    assert mapped(cpu, 0x2000)[0] == 0x9000
    assert not second.tables


def test_words_and_bytes_are_the_same_memory(mode):
    words = np.zeros(FRAMES * 512, dtype=np.uint64)
    tables = PageTables(words, mode)
    tables.map(0, 0x3000, 4096)
    assert mapped(processor(tables, words.view(np.uint8)), 0)[0] == 0x3000


def test_frames_come_from_the_allocator(mode, ram):
    frames = iter([700, 600, 500, 400, 300, 200])
    tables = PageTables(ram, mode, allocate=lambda: next(frames))
    tables.map(0, 0, 4096)
    levels = FORMATS[mode].levels
    assert list(tables.tables.items()) == list(zip([700, 600, 500, 400, 300], range(levels, 0, -1), strict=False))
    assert tables.cr3 == 700 << 12
    with pytest.raises(ConfigError, match="holds a table already"):
        PageTables(ram, mode, allocate=lambda: 5).map(0, 0, 4096)


def test_new_tables_are_cleared(mode, ram):
    ram[:] = 0xFF
    tables = PageTables(ram, mode)
    tables.map(0, 0, 4096)
    ram[: 1 << 20] = 0
    assert mapped(processor(tables, ram), 0x1000) is None


def test_out_of_frames_changes_nothing(mode, ram):
    levels = FORMATS[mode].levels
    tables = PageTables(ram, mode, allocate=range(100, 100 + levels))
    tables.map(0, 0, 4096)
    before = ram.copy()
    with pytest.raises(ConfigError, match=r"out of frames.* 0 left"):
        tables.map(0, 0x1000, 2 * LARGE[mode], page_size=4096)
    assert (ram == before).all()
    tables.map(0x1000, 0x1000, 4096)


BAD = [
    (dict(va=-4096), "va"),
    (dict(va=1 << 64), "va"),
    (dict(va=0x123), "va"),
    (dict(va=1.5), "va"),
    (dict(gpa=0x123), "gpa|page_size"),
    (dict(gpa=-4096), "gpa"),
    (dict(gpa=1 << 52), "gpa"),
    (dict(size=0), "size"),
    (dict(size=100), "size"),
    (dict(size=-4096), "size"),
    (dict(size=1 << 64), "size"),
    (dict(size="1 parsec"), "size"),
    (dict(rights="w"), "rights"),
    (dict(rights="rwz"), "rights"),
    (dict(rights="rr"), "rights"),
    (dict(rights=PS), "rights"),
    (dict(rights=P, global_=True), "rights"),
    (dict(pkey=16), "pkey"),
    (dict(page_size=3), "page_size"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=lambda x: str(x))
def test_bad_arguments(mode, ram, change, field):
    tables = PageTables(ram, mode)
    before = ram.copy()
    with pytest.raises(ConfigError, match=rf"^({field})"):
        tables.map(**{"va": 0, "gpa": 0, "size": 4096, **change})
    assert (ram == before).all()


def test_addresses_that_are_not_canonical(ram):
    for mode, width in (("64", 48), ("la57", 57)):
        tables = PageTables(ram, mode)
        for va in (1 << (width - 1), (1 << 64) - (1 << (width - 1)) - 4096):
            with pytest.raises(ConfigError, match="canonical"):
                tables.map(va, 0, 4096)
        with pytest.raises(ConfigError, match="canonical"):
            tables.map((1 << (width - 1)) - 4096, 0, 8192)
    with pytest.raises(ConfigError, match="va"):
        PageTables(ram, "pae").map((1 << 32) - 4096, 0, 8192)


def test_bad_memory_and_roots(ram):
    with pytest.raises(ConfigError, match="mode"):
        PageTables(ram, "48")
    readonly = ram.copy()
    readonly.flags.writeable = False
    for memory in (
        ram[:100],
        ram[::2],
        ram.view(np.uint32),
        ram.reshape(2, -1),
        readonly,
        ram[:0],
        bytearray(9),
    ):
        with pytest.raises(ConfigError, match="memory"):
            PageTables(memory)
    for root in (0x123, -4096, FRAMES << 12, 1 << 60):
        with pytest.raises(ConfigError, match=r"root|memory"):
            PageTables(ram, root=root)
    with pytest.raises(ConfigError, match="allocate"):
        PageTables(ram, "32", allocate=[1 << 20])
    with pytest.raises(ConfigError, match="memory"):
        PageTables(ram, allocate=[FRAMES])


def test_replacing_needs_exactly_the_frames_that_it_takes(mode, ram):
    """Small pages over a part of a large one and over several whole ones; a large one over small ones."""
    large = LARGE[mode]
    tables = PageTables(ram, mode)
    tables.map(0, 0, 4 * large)
    used = len(tables.tables)
    tables.map(large - 0x1000, 0x100000, 2 * large + 0x2000, page_size=4096)
    assert len(tables.tables) == used + 4
    cpu = processor(tables, ram)
    assert mapped(cpu, large - 0x2000)[:2] == (large - 0x2000, 4096)
    assert mapped(cpu, large - 0x1000)[:2] == (0x100000, 4096)
    assert mapped(cpu, 3 * large)[:2] == (0x100000 + 2 * large + 0x1000, 4096)
    assert mapped(cpu, 3 * large + 0x1000)[:2] == (3 * large + 0x1000, 4096)
    tables.map(large, 0, large)
    assert mapped(processor(tables, ram), large)[:2] == (0, large)
    assert len(tables.tables) == used + 4


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence(mode, data):
    """A model that knows pages only: every page of the window is where the last operation on it put it."""
    ram = np.zeros(FRAMES * 4096, dtype=np.uint8)
    tables = PageTables(ram, mode)
    base, model = 0x40000000 - 2 * LARGE[mode], {}
    letters = ["rx", "rwx", "rwxu"] + ([] if mode == "32" else ["r", "rwu"])
    edges = st.sampled_from([0, 1, 2, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 3000])
    for _ in range(data.draw(st.integers(1, 6))):
        first, last = sorted(data.draw(st.tuples(edges, edges).filter(lambda p: p[0] != p[1])))
        va, size = base + (first << 12), (last - first) << 12
        what = data.draw(st.sampled_from(["map", "map", "unmap", "protect"]))
        pages = range(first, last)
        if what == "map":
            gpa = data.draw(st.sampled_from([va, 0x1000, 0x4000000 + (first << 12)]))
            rights = data.draw(st.sampled_from(letters))
            tables.map(va, gpa, size, rights, data.draw(st.sampled_from(["auto", 4096])))
            model.update({p: (gpa + ((p - first) << 12), rights) for p in pages})
        elif what == "unmap":
            tables.unmap(va, size)
            for p in pages:
                model.pop(p, None)
        else:
            rights = data.draw(st.sampled_from(letters))
            if all(p in model for p in pages):
                tables.protect(va, size, rights)
                model.update({p: (model[p][0], rights) for p in pages})
            else:
                before = ram.copy()
                with pytest.raises(ConfigError, match="not all mapped"):
                    tables.protect(va, size, rights)
                assert (ram == before).all()
    cpu = processor(tables, ram)
    for p in {*range(0, 3001, 97), *(q + d for q in (0, 512, 1024, 2048, 3000) for d in (-1, 0, 1))}:
        seen = mapped(cpu, base + (p << 12))
        if p not in model:
            assert seen is None
        else:
            gpa, rights = model[p]
            assert seen[0] == gpa
            assert seen[2:] == ("w" in rights, "u" in rights, "x" in rights)


def test_nx_is_the_highest_bit(ram):
    tables = PageTables(ram, "64")
    tables.map(0, 0, 4096, "r")
    assert tables.entry(0).value == P | NX


# -- virtual machines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["native", "flush", "cached", "unsync", "adaptive"])
def test_registers_turn_paging_on(mode, design):
    vm = sc.VM("8MiB", design)
    tables = PageTables(vm.memory, mode)
    tables.map(0x400000, 0x10000, 0x4000, "rwxu")
    cpu = vm.vcpus[0]
    for name, value in tables.registers.items():
        setattr(cpu, name, value)
    assert cpu.mode == mode
    cpu.write(0x401000, 0x1234, user=True)
    assert vm.memory.words[0x11000 >> 3] == 0x1234
    assert tables.entry(0x401000).value & (A | D) == A | D


def test_a_guest_that_runs_sees_changes(mode):
    """Through a VM, stores are those of a device: shadow tables stay coherent."""
    vm = sc.VM("8MiB", "cached")
    tables = PageTables(vm, mode)
    tables.map(0x400000, 0x10000, 0x4000, "rwxu")
    cpu = vm.vcpus[0]
    for name, value in tables.registers.items():
        setattr(cpu, name, value)
    cpu.write(0x400000, 1)
    tables.map(0x400000, 0x20000, 0x1000, "rwx")
    cpu.write(0x400000, 2)
    assert vm.memory.words[0x10000 >> 3] == 1
    assert vm.memory.words[0x20000 >> 3] == 2
    tables.protect(0x400000, 0x1000, "rx")
    with pytest.raises(sc.PageFault):
        cpu.write(0x400000, 3)
    tables.unmap(0x401000, 0x1000)
    with pytest.raises(sc.PageFault):
        cpu.read(0x401000)
    assert vm.audit().ok


def test_tables_in_a_slot(mode):
    """Guest RAM with a hole: gpas are not offsets into it."""
    vm = sc.VM([sc.MemorySlot(0x100000, 0x100000), sc.MemorySlot(0x400000, 0x200000)], "cached")
    for tables in (PageTables(vm, mode), PageTables(vm.memory, mode, allocate=range(0x410, 0x420))):
        tables.map(0x10000, 0x404000, 0x1000)
        cpu = vm.vcpus[0]
        cpu.cr0 = 0x11
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
        cpu.write(0x10008, 77)
        assert vm.memory.words[0x104008 >> 3] == 77
        assert all(vm.memory.frame(gfn) for gfn in tables.tables)
    with pytest.raises(ConfigError, match="slot"):
        PageTables(vm.memory, mode, allocate=[0x300])


@pytest.mark.parametrize("mode", ["32", "pae", "64", "la57"])
def test_activate_loads_the_registers(mode):
    vm = sc.VM("4MiB", "cached")
    tables = sc.PageTables(vm.memory, mode, allocate=range(512, 1024))
    tables.map(0x400000, 0x10000, 4096, "rwx")
    cpu = vm.vcpus[0]
    tables.activate(cpu)
    assert {name: getattr(cpu, name) & value for name, value in tables.registers.items()} == tables.registers
    cpu.write(0x400010, 5)
    assert vm.read_physical(0x10010, 1) == b"\5"
    poor = sc.VM("4MiB", "native", features=sc.Features(nx=False, la57=False)).vcpus[0]
    if mode != "32":
        with pytest.raises(sc.GeneralProtection):
            tables.activate(poor)
