"""Walks explained in words, on dumps of real guests and on each cause of a fault."""

import json

import numpy as np
import pytest
import streams

import shadowcore as sc
from shadowcore.pagetables import FORMATS, NX, PS, A, P, PageTables, U, W
from shadowcore.studies.explain import explain, load_image

MODES = ["32", "pae", "64", "la57"]
CR4_PKE, CR4_SMEP, CR4_SMAP = 1 << 22, 1 << 20, 1 << 21


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def machine(mode, *mappings, cr4=0):
    """A VM with the mappings in its tables, paging on; and the tables."""
    vm = sc.VM("8MiB", "native")
    tables = PageTables(vm, mode)
    for mapping in mappings:
        tables.map(*mapping)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value | (cr4 if name == "cr4" else 0))
    return vm, tables


@pytest.mark.parametrize("name", streams.LINUX)
def test_images_of_real_guests(name):
    """Every 97th leaf of the image's CR3: its gpa and size, and the entries that the table builder finds."""
    listed = streams.linux(name)
    image = load_image(streams.DATA / "linux-pagetables" / f"{name}.npz")
    assert image.mode == str(listed["mode"])
    vm = image.machine()
    vm.vcpus[0].ac = True
    tables = PageTables(vm.memory, image.mode, root=image.cr3)
    rows = np.flatnonzero(listed["leaf_root"] == list(image.roots).index(image.cr3))[::97]
    for va, pa in zip(listed["leaf_va"][rows].tolist(), listed["leaf_pa"][rows].tolist(), strict=True):
        found = explain(vm, va + 0xABC)
        assert (found.gpa, found.fault) == (pa + 0xABC, None)
        assert [(s.level, s.gpa, s.entry) for s in found.steps] == tables.walk(va)
        for step in found.steps:
            assert step.index == FORMATS[image.mode].index(va, step.level)
            assert step.bits[0] == "present"
            assert step.leads_to.startswith("leads to")
        assert found.steps[-1].rights == found.rights


def test_a_translation_in_words(mode):
    vm, _ = machine(mode, (0x400000, 0x5000, 4096, "rxu" if mode == "32" else "ru"))
    found = explain(vm, 0x400123, user=True)
    assert (found.gpa, found.page_size, found.fault) == (0x5123, 4096, None)
    assert found.rights == f"read only, user and supervisor, {'' if mode == '32' else 'not '}executable"
    text = "\n".join(found.lines())
    assert "gva 0x400123: user read" in text
    assert "not accessed yet, clean" in text
    assert "leads to a page of 4 KiB at gpa 0x5000" in text
    assert text.endswith(f"gpa 0x5123, in a page of 4 KiB: {found.rights}")
    for entry in PageTables(vm.memory, mode, root=vm.vcpus[0].cr3).walk(0x400000):
        assert f"at gpa {entry.gpa:#x} = 0x{entry.value:0{8 if mode == '32' else 16}x}" in text
    assert json.loads(json.dumps(found.as_dict()))["levels"][-1]["name"] == "PTE"


def test_devices(mode):
    vm, _ = machine(mode, (0, 0xFEC00000, 4096))
    found = explain(vm, 0x10)
    assert (found.gpa, found.mmio) == (0xFEC00010, True)
    assert found.lines()[-1].strip() == "in no memory slot: a device (MMIO)"


def test_nothing_changes(mode):
    vm, _ = machine(mode, (0, 0x5000, 4096, "rwxu"))
    before = vm.memory.bytes.copy()
    explain(vm, 0, "w", user=True)
    assert (vm.memory.bytes == before).all()
    assert vm.vcpus[0].cr2 == 0


def test_large_pages(mode):
    size = (4 if mode == "32" else 2) << 20
    vm, tables = machine(mode, (size, 0, size))
    found = explain(vm, size + 0x1234)
    assert (found.gpa, found.page_size) == (0x1234, size)
    assert f"maps a page of {size >> 20} MiB" in found.steps[-1].bits
    tables.set_entry(size, 2, tables.entry(size, 2).value | (1 << 21 if mode == "32" else 1 << 20))
    found = explain(vm, size)
    assert (found.fault, found.error_code) == ("#PF", 9)
    assert found.steps[-1].leads_to == f"ends the walk: bit {21 if mode == '32' else 20} must be 0"


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_gigantic_page(mode):
    vm, _ = machine(mode, (1 << 30, 4 << 30, 1 << 30, "rw"))
    found = explain(vm, (1 << 30) + 5, "w")
    assert (found.gpa, found.page_size) == ((4 << 30) + 5, 1 << 30)
    assert found.lines()[-2].startswith("gpa 0x100000005, in a page of 1 GiB: read and write")


def fault(vm, gva, access="r", user=False):
    found = explain(vm, gva, access, user)
    assert (found.fault, found.gpa, found.page_size, found.rights) == ("#PF", None, 0, "")
    with pytest.raises(sc.PageFault) as caught:
        vm.vcpus[0].translate(gva, access, user)
    assert found.error_code == caught.value.error_code
    assert f"error code {found.error_code:#x}: {found.why}" in "\n".join(found.lines())
    return found


def test_not_present(mode):
    vm, tables = machine(mode, (0, 0, 4096))
    found = fault(vm, 0x1000, "w")
    assert found.why == "the level 1 entry (PTE 1) is not present"
    assert found.code_bits == ("P clear: an entry is not present", "W: it was a write")
    assert found.steps[-1].bits == ("not present",)
    tables.set_entry(0x1000, 1, 0x1230)
    assert fault(vm, 0x1000).steps[-1].bits == ("not present", "the other bits are the guest's own")
    top = FORMATS[mode].levels
    found = fault(vm, 0xC000_0000, user=True)
    assert len(found.steps) == (2 if mode in ("64", "la57") else 1) + (mode == "la57")
    assert found.code_bits[-1] == "U: it was made in user mode"
    assert found.steps[0].level == top


def test_rights(mode):
    vm, tables = machine(mode, (0, 0, 4096, "rwx"), (0x1000, 0, 4096, "rxu"))
    assert fault(vm, 0, user=True).why == ("a user access to a page for the supervisor only: U is clear in the PTE")
    for user in (False, True):
        assert fault(vm, 0x1000, "w", user).why == "a write to a page that is read only: W is clear in the PTE"
    pde = tables.entry(0, 2)
    tables.set_entry(0, 2, pde.value & ~U)
    assert fault(vm, 0x1000, user=True).why.endswith("U is clear in the PDE")


@pytest.mark.parametrize("mode", MODES[1:])
def test_execute_disable(mode):
    vm, tables = machine(mode, (0, 0, 4096, "rwu"))
    found = fault(vm, 0, "x", user=True)
    assert found.why == "a fetch from a page that is not executable: XD is set in the PTE"
    assert "I: it was an instruction fetch" in found.code_bits
    tables.set_entry(0, 1, P | W | U)
    assert explain(vm, 0, "x", user=True).fault is None
    tables.set_entry(0, 1, NX | P | W | U)
    vm.vcpus[0].efer &= ~(1 << 11)
    found = fault(vm, 0)
    assert found.why == "the level 1 entry (PTE 0) is present with a reserved bit set"
    assert found.steps[-1].leads_to == "ends the walk: bit 63 must be 0"
    assert "RSVD: a reserved bit is set" in found.code_bits


def test_smep_and_smap(mode):
    vm, _ = machine(mode, (0, 0, 4096, "rwxu"), cr4=CR4_SMEP | CR4_SMAP)
    assert fault(vm, 0, "x").why == "a supervisor fetch from a user page, with CR4.SMEP set"
    for access in "rw":
        why = fault(vm, 0, access).why
        assert why == "a supervisor access to a user page, with CR4.SMAP set and EFLAGS.AC clear"
    vm.vcpus[0].ac = True
    assert explain(vm, 0).fault is None


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_protection_keys(mode):
    vm, tables = machine(mode, cr4=CR4_PKE)
    tables.map(0, 0, 4096, "rwu", pkey=5)
    vm.vcpus[0].pkru = 2 << 10
    found = explain(vm, 0, user=True)
    assert "protection key 5" in found.steps[-1].bits
    found = fault(vm, 0, "w", user=True)
    assert found.why == "protection key 5 of the page, with PKRU 0x800, forbids it"
    assert "PK: a protection key forbids it" in found.code_bits


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_reserved_bits_above(mode):
    vm, tables = machine(mode, (0, 0, 4096))
    entry = tables.entry(0, 4)
    tables.set_entry(0, 4, entry.value | PS)
    assert fault(vm, 0).steps[-1].leads_to == "ends the walk: bit 7 must be 0"


def test_large_pages_switched_off():
    """Without CR4.PSE a 32-bit directory entry leads to a table, whatever its bit 7 says."""
    vm, tables = machine("32", (0, 0x7000, 4096))
    tables.set_entry(0, 2, tables.entry(0, 2).value | PS)
    vm.vcpus[0].cr4 &= ~0x10
    found = explain(vm, 0x10)
    assert (found.gpa, found.page_size, len(found.steps)) == (0x7010, 4096, 2)
    assert "leads to the level 1 table" in found.steps[0].leads_to


def test_cache_bits_and_pat(mode):
    vm, tables = machine(mode, (0, 0, 4096))
    tables.set_entry(0, 1, P | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 8)
    assert {"write-through", "uncached", "PAT", "global"} <= set(explain(vm, 0).steps[-1].bits)


@pytest.mark.parametrize(("mode", "gva", "low"), [("64", 1 << 47, 47), ("la57", 1 << 56, 56)])
def test_addresses_that_are_not_canonical(mode, gva, low):
    vm, _ = machine(mode)
    found = explain(vm, gva)
    assert (found.fault, found.steps) == ("#GP", ())
    assert found.why == f"the address is not canonical: bits 63 to {low} are not all equal"
    assert "#GP, error code 0x0" in found.lines()[-1]


def test_addresses_that_are_too_long():
    for mode in ("32", "pae"):
        with pytest.raises(sc.ConfigError, match="32 bits"):
            explain(machine(mode)[0], 1 << 32)


def test_paging_off():
    with pytest.raises(sc.ConfigError, match="paging is off"):
        explain(sc.VM("1MiB", "native"), 0)


# -- images ----------------------------------------------------------------------------------------------


def image(tmp_path, **changes):
    vm, tables = machine("64", (0, 0, 4096))
    arrays = {
        "mode": np.str_("64"),
        "nframes": np.uint32(2048),
        **{name: np.uint64(getattr(vm.vcpus[0], name)) for name in ("cr0", "cr3", "cr4", "efer")},
        "mem_gfn": np.array(list(tables.tables), dtype=np.uint32),
        "mem_page": vm.memory.bytes.reshape(-1, 4096)[list(tables.tables)],
        "root": np.array([tables.cr3], dtype=np.uint64),
    }
    arrays |= changes
    path = tmp_path / "image.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_image_of_ones_own(tmp_path):
    read = load_image(image(tmp_path))
    assert (read.name, read.mode, read.nframes) == ("image", "64", 2048)
    assert explain(read.machine(), 0x123).gpa == 0x123


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mode": np.str_("48")}, "'mode': one of 32, pae, 64, la57 expected, not 48"),
        ({"mode": None}, "array 'mode' expected, there is none"),
        ({"nframes": np.float64(5)}, "'nframes': one unsigned integer expected"),
        ({"nframes": np.uint64(0)}, "'nframes': 1 to 0x10000000000 expected, not 0x0"),
        ({"cr3": np.zeros(2, np.uint64)}, "'cr3': one unsigned integer expected"),
        ({"mem_gfn": np.zeros(4, np.int64)}, "array 'mem_gfn': 1 dimension(s) of uint32 expected"),
        ({"mem_gfn": np.zeros(3, np.uint32)}, "array 'mem_page': shape (3, 4096) expected"),
        (
            {"mem_gfn": np.array([1, 2, 2048, 3], np.uint32)},
            "record 2: 'mem_gfn': a gfn below 0x800 expected",
        ),
        ({"mem_page": np.zeros((4, 512), np.uint8)}, "array 'mem_page': shape (4, 4096) expected"),
        ({"root": np.zeros(1, np.uint32)}, "array 'root': 1 dimension(s) of uint64 expected"),
    ],
)
def test_bad_images(tmp_path, changes, expected):
    with pytest.raises(sc.TraceError) as caught:
        load_image(image(tmp_path, **changes))
    assert expected in str(caught.value)


def test_images_that_no_processor_can_load(tmp_path):
    with pytest.raises(sc.TraceError, match="registers of mode '64' expected, not of 'la57'"):
        load_image(image(tmp_path, cr4=np.uint64(0x10B0))).machine()
    with pytest.raises(sc.ConfigError, match="is #GP"):
        load_image(image(tmp_path, cr4=np.uint64(0))).machine()
    with pytest.raises(sc.ConfigError, match="cr3: the image holds no table at 0x5000; its roots are 0x600000"):
        load_image(image(tmp_path)).machine(0x5000)


@pytest.mark.parametrize("low", [0, 5, 0xFFF])
@pytest.mark.parametrize("pcide", [0, 1 << 17])
def test_images_with_pcids_or_ignored_bits_in_cr3(tmp_path, pcide, low):
    """Both are part of what a dump shows as CR3; bit 63, as an operand of MOV has it, may be asked for with PCIDs."""
    vm, tables = machine("64", (0, 0, 4096))
    changes = {"cr3": np.uint64(tables.cr3 | low), "cr4": np.uint64(vm.vcpus[0].cr4 | pcide)}
    read = load_image(image(tmp_path, **changes))
    for cr3 in (None, tables.cr3 | 1, *([tables.cr3 | 1 << 63] if pcide else [])):
        cpu = (vm := read.machine(cr3)).vcpus[0]
        assert cpu.cr4 == changes["cr4"]
        assert cpu.cr3 == (tables.cr3 | low if cr3 is None else cr3 & ~(1 << 63))
        assert explain(vm, 0x123).gpa == 0x123


def test_accessed_bits_in_pae_root_entries_are_dropped():
    """Emulators set them; a processor would refuse to load CR3."""
    read = load_image(streams.DATA / "linux-pagetables" / "linux_pae.npz")
    page = read.pages[list(read.frames).index(read.cr3 >> 12)].view(np.uint64)
    assert page[read.cr3 % 4096 // 8 :][:4].any()
    assert not any(entry & A for entry in read.machine().vcpus[0].pdptes)
