"""Control registers: which loads are refused, what else a load changes, and changes of mode."""

import itertools

import numpy as np
import oracle
import pytest
from oracle import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PKE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    PS,
    A,
    P,
    U,
    W,
)
from register_machines import (
    DESIGNS,
    GLOBAL,
    MODES,
    PAGING,
    all_modes_machine,
    enter,
    enter_oracle,
    load,
    refused,
    state,
)

import shadowcore as sc


@pytest.mark.parametrize("design", DESIGNS)
def test_reset(design):
    _, cpu = enter("off", design)
    assert (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer, cpu.pkru) == (0x60000010, 0, 0, 0, 0, 0)
    assert cpu.cpl == 0
    assert not cpu.ac


@pytest.mark.parametrize("mode", MODES)
def test_pairs_of_loads(mode):
    """Two loads in a row of the bits that depend on each other."""
    cr0 = [0x10, CR0_PE | 0x40, PAGING, PAGING | CR0_WP, PAGING | CR0_NW, PAGING | CR0_CD | CR0_NW, CR0_PG]
    cr4 = [0, CR4_PSE, CR4_PAE, CR4_PAE | CR4_PCIDE, CR4_PAE | CR4_LA57, CR4_LA57, CR4_PAE | CR4_PGE]
    efer = [0, EFER_LME, EFER_LMA, EFER_LME | EFER_NXE, EFER_LME | EFER_LMA]
    cr3 = [0, 0x1001, 0x1008, 0x1020, 0x3000]
    values = {"cr0": cr0, "cr4": cr4, "efer": efer, "cr3": cr3}
    loads = [(name, value) for name, choices in values.items() for value in choices]
    for pair in itertools.product(loads, repeat=2):
        _, cpu = enter(mode)
        reference = enter_oracle(mode)
        for name, value in pair:
            assert load(cpu, name, value) == load(reference, name, value), pair
            assert state(cpu) == state(reference), pair


@pytest.mark.parametrize(
    ("mode", "name", "value", "why"),
    [
        ("off", "cr0", 1 << 32, "bits 63:32"),
        ("off", "cr0", CR0_PG, "PG without PE"),
        ("off", "cr0", CR0_NW, "NW without CD"),
        ("64", "cr3", 1 << 46, "a bit above MAXPHYADDR"),
        ("64", "cr3", 1 << 63, "bit 63 without PCIDE"),
        ("off", "cr4", 1 << 13, "VMXE: no nested virtualization"),
        ("off", "cr4", 1 << 23, "a bit that is not defined"),
        ("64", "cr4", 0, "clearing PAE in long mode"),
        ("64", "cr4", CR4_PAE | CR4_LA57, "changing LA57 in long mode"),
        ("la57", "cr4", CR4_PAE, "changing LA57 in long mode"),
        ("pae", "cr4", CR4_PAE | CR4_PCIDE, "PCIDE outside long mode"),
        ("off", "efer", 1 << 1, "a bit that is not defined"),
        ("32", "efer", EFER_LME, "changing LME with paging on"),
        ("64", "efer", 0, "changing LME with paging on"),
    ],
)
@pytest.mark.parametrize("design", DESIGNS)
def test_refused(design, mode, name, value, why):
    _, cpu = enter(mode, design)
    assert refused(cpu, name, value), why


@pytest.mark.parametrize(
    ("feature", "name", "value"),
    [
        ({"nx": False}, "efer", EFER_NXE),
        ({"la57": False}, "cr4", CR4_LA57),
        ({"pku": False}, "cr4", CR4_PKE),
        ({"smep": False}, "cr4", CR4_SMEP),
        ({"smap": False}, "cr4", CR4_SMAP),
    ],
)
def test_bits_of_absent_features_are_refused(feature, name, value):
    assert refused(enter("off", features=sc.Features(**feature))[1], name, value)
    _, cpu = enter("off")
    setattr(cpu, name, value)
    assert getattr(cpu, name) == value


def test_long_mode_needs_pae():
    _, cpu = enter("off")
    cpu.efer = EFER_LME
    assert refused(cpu, "cr0", PAGING)
    cpu.cr4 = CR4_PAE
    cpu.cr0 = PAGING
    assert cpu.efer == EFER_LME | EFER_LMA


def test_lma_follows_paging_and_cannot_be_written():
    _, cpu = enter("64")
    cpu.efer = EFER_LME
    assert cpu.efer == EFER_LME | EFER_LMA
    cpu.cr0 = CR0_PE | 0x10
    assert cpu.efer == EFER_LME
    cpu.efer = EFER_LMA
    assert cpu.efer == 0


def test_pcid():
    _, cpu = enter("64")
    cpu.cr3 = 0x1008
    assert refused(cpu, "cr4", CR4_PAE | CR4_PCIDE)
    cpu.cr3 = 0x1000
    cpu.cr4 = CR4_PAE | CR4_PCIDE
    cpu.cr3 = 0x2FFF | 1 << 63  # PCID 0xFFF, kept entries: bit 63 is not part of the register
    assert cpu.cr3 == 0x2FFF
    assert refused(cpu, "cr0", CR0_PE | 0x10)
    assert refused(cpu, "cr3", 1 << 62)


def test_batches_refuse_the_same():
    _, cpu = enter("64")
    ops = [(sc.Op.CR3, 1 << 46), (sc.Op.CR0, CR0_PG), (sc.Op.CR4, 0), (sc.Op.EFER, 0), (sc.Op.CR3, 0x2000)]
    before = state(cpu)
    rows = np.zeros(len(ops), dtype=sc.OP_DTYPE)
    rows["op"], rows["value"] = zip(*ops, strict=True)
    result = cpu.run(rows)
    assert result.outcome.tolist() == [2, 2, 2, 2, 0]
    assert result.error_code.tolist() == [0] * 5
    assert state(cpu) == [before[0], 0x2000, before[2], before[3]]


# -- PAE root entries --------------------------------------------------------------------------------------


def pae_machine(design):
    """Directory pointers at 0x1000 and 0x1020; linear page 0 is frame 16 through the first and 17 by the
    second; linear 2 MiB and on is physical memory."""
    vm = sc.VM(memory=64 * 4096, mmu=design)
    words = vm.memory.words
    for i in (0, 1):
        words[(0x1000 + 32 * i) // 8] = (2 + i) << 12 | P
        words[(2 + i) * 512] = (4 + i) << 12 | P | W | U
        words[(2 + i) * 512 + 1] = PS | P | W
        words[(4 + i) * 512] = (16 + i) << 12 | P | W | U
        words[(16 + i) * 512] = 100 + i
    cpu = vm.vcpus[0]
    for name, value in MODES["pae"].items():
        setattr(cpu, name, value)
    return vm, cpu


PHYSICAL = 2 << 20


@pytest.mark.parametrize("design", DESIGNS)
def test_pae_root_entries_are_read_at_loads_only(design):
    """SDM 4.4.1: an edit of the four entries shows at the next load of CR3."""
    _, cpu = pae_machine(design)
    assert cpu.read(0) == 100
    cpu.write(PHYSICAL + 0x1000, 3 << 12 | P)
    cpu.invlpg(0)
    assert cpu.read(0) == 100
    cpu.cr3 = 0x1000
    assert cpu.read(0) == 101
    assert cpu.read(PHYSICAL + 0x1000) & A == 0


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 46, 51, 52, 62, 63])
def test_reserved_bits_of_pae_root_entries(design, bit):
    """Refused at the load, if the entry is present; the entries in use stay as they were."""
    _, cpu = pae_machine(design)
    assert cpu.read(0) == 100
    cpu.write(PHYSICAL + 0x1020 + 8, 1 << bit)
    cpu.cr3 = 0x1020
    assert cpu.read(0) == 101
    cpu.write(PHYSICAL + 0x1000 + 24, 1 << bit | P)
    assert refused(cpu, "cr3", 0x1000)
    assert cpu.read(0) == 101
    cpu.write(PHYSICAL + 0x1000 + 24, 0)
    cpu.cr3 = 0x1000
    assert cpu.read(0) == 100


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("way", ["cr0", "cr4"])
def test_invalid_root_entries_refuse_entry_to_pae_paging(design, way):
    vm, cpu = enter("off", design)
    vm.memory.words[0x1008 // 8] = P | W
    cpu.cr3 = 0x1000
    if way == "cr0":
        cpu.cr4 = CR4_PAE
        assert refused(cpu, "cr0", PAGING)
    else:
        cpu.cr0 = PAGING
        assert refused(cpu, "cr4", CR4_PAE)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("name", "bit", "reloads"),
    [
        ("cr4", CR4_PGE, True),
        ("cr4", CR4_PSE, True),
        ("cr4", CR4_SMEP, True),
        ("cr0", CR0_CD, True),
        ("cr0", CR0_WP, False),
        ("cr4", CR4_SMAP, False),
    ],
)
def test_which_loads_reload_the_root_entries(design, name, bit, reloads):
    """SDM 4.4.1: those that modify CR0.CD, NW, PG or CR4.PAE, PGE, PSE, SMEP."""
    _, cpu = pae_machine(design)
    cpu.ac = True
    cpu.write(PHYSICAL + 0x1000, 3 << 12 | P)
    assert cpu.read(0) == 100
    setattr(cpu, name, getattr(cpu, name) ^ bit)
    assert cpu.read(0) == (101 if reloads else 100)


# -- changes of mode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_from_every_mode_to_every_other(design):
    """Through paging off, twice around; the mode decides which tables are walked, and how."""
    vm, cpu, roots = all_modes_machine(design)
    frames = {"off": None, "32": 17, "pae": 18, "64": 19, "la57": 20}
    for _ in range(2):
        for pair in itertools.permutations(MODES, 2):
            for mode in pair:
                cpu.cr0 = CR0_PE | 0x10
                assert cpu.read(16 << 12) == 100  # paging off: linear is physical
                cpu.efer = MODES[mode].get("efer", 0)
                cpu.cr4 = MODES[mode].get("cr4", 0)
                cpu.cr3 = roots[mode]
                cpu.cr0 = MODES[mode].get("cr0", CR0_PE | 0x10)
                if frames[mode]:
                    assert cpu.read(0) == 84 + frames[mode], pair
                    assert cpu.translate(0).gpa == frames[mode] << 12
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_legacy_modes_truncate_linear_addresses(design):
    """Outside 64-bit mode a linear address has 32 bits."""
    _, cpu, roots = all_modes_machine(design)
    assert cpu.read((1 << 32) + (16 << 12)) == 100
    cpu.cr4, cpu.cr3 = CR4_PSE, roots["32"]
    cpu.cr0 = PAGING
    assert cpu.read(0xFFFF_0000_0000_0000) == 101


# -- what else the registers do ----------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_cr2_takes_the_address_of_page_faults_only(design):
    vm, cpu = enter("64", design)
    with pytest.raises(sc.PageFault) as caught:
        cpu.read(0xFFFF_8000_0000_1234)
    assert caught.value.address == cpu.cr2 == 0xFFFF_8000_0000_1234
    with pytest.raises(sc.GeneralProtection) as caught:
        cpu.read(0x8000_0000_0000)
    assert caught.value.error_code == 0
    with pytest.raises(sc.PageFault):
        cpu.translate(0x5000)  # asks, and changes nothing
    assert cpu.cr2 == 0xFFFF_8000_0000_1234
    cpu.cr2 = 0x77
    assert cpu.cr2 == 0x77
    assert vm.audit().ok


def user_page_machine(design, cr4):
    """64-bit mode, linear page 0 = frame 16, a user page with protection key 1."""
    vm = sc.VM(memory=64 * 4096, mmu=design)
    for gfn in range(1, 4):
        vm.memory.words[gfn * 512] = (gfn + 1) << 12 | P | W | U
    vm.memory.words[4 * 512] = 1 << 59 | 16 << 12 | P | W | U
    cpu = vm.vcpus[0]
    for name, value in (MODES["64"] | {"cr4": CR4_PAE | cr4, "cr0": PAGING | CR0_WP}).items():
        setattr(cpu, name, value)
    return vm, cpu


def granted(access, *args, **kwargs):
    try:
        access(*args, **kwargs)
    except sc.PageFault:
        return False
    return True


@pytest.mark.parametrize("design", DESIGNS)
def test_ac_and_pkru_take_effect_at_once(design):
    """Neither has a table or an INVLPG behind it: the next access obeys, also where the last one was
    granted."""
    vm, cpu = user_page_machine(design, CR4_SMAP | CR4_PKE)
    for _ in range(2):
        assert not granted(cpu.read, 0)
        cpu.ac = True
        assert granted(cpu.read, 0)
        assert granted(cpu.write, 0, 1)
        cpu.pkru = 2 << 2  # WD of key 1
        assert granted(cpu.read, 0)
        assert not granted(cpu.write, 0, 1)
        assert not granted(cpu.write, 0, 1, user=True)
        cpu.cr0 &= ~CR0_WP
        assert granted(cpu.write, 0, 1)
        cpu.cr0 |= CR0_WP
        cpu.pkru = 1 << 2  # AD of key 1
        assert not granted(cpu.read, 0)
        assert granted(cpu.fetch, 0)
        cpu.pkru = 0
        assert granted(cpu.read, 0)
        cpu.ac = False
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_each_protection_key_has_its_own_bits(design):
    """Bits 62:59 of the leaf choose bits 2k (AD) and 2k+1 (WD) of PKRU."""
    vm, cpu = user_page_machine(design, CR4_PKE)
    for key in range(16):
        vm.write_physical((4 << 12) + 7, bytes([key << 3]))
        cpu.invlpg(0)
        for other in range(16):
            cpu.pkru = 1 << 2 * other
            assert granted(cpu.read, 0) == (other != key), (key, other)
            cpu.pkru = 2 << 2 * other
            assert granted(cpu.write, 0, 1) == (other != key), (key, other)
            assert granted(cpu.read, 0)
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_global_bit_means_nothing_without_pge(design):
    """SDM 4.10.2.4: with CR4.PGE=0 no translation is global, so a CR3 load drops those with G=1 as well.

    The baseline `flush` ignored that (Quirk.GLOBAL_WITHOUT_PGE).
    """
    vm = sc.VM(memory=64 * 4096, mmu=sc.Shadow.flush(quirks=sc.Quirk.NONE) if design == "flush" else design)
    for gfn in range(1, 4):
        vm.memory.words[gfn * 512] = (gfn + 1) << 12 | P | W
    vm.memory.words[4 * 512] = 16 << 12 | GLOBAL | P | W
    vm.memory.words[4 * 512 + 1] = 4 << 12 | GLOBAL | P | W  # the leaf table, at linear 0x1000
    vm.memory.words[[16 * 512, 17 * 512]] = 100, 101
    cpu = vm.vcpus[0]
    for name, value in MODES["64"].items():
        setattr(cpu, name, value)
    assert cpu.read(0) == 100
    cpu.write(0x1000, 17 << 12 | GLOBAL | P | W)
    cpu.cr3 = 0x1000
    assert cpu.read(0) == 101
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_smep_and_smap_toggled_without_invlpg(design):
    vm, cpu = user_page_machine(design, 0)
    for _ in range(2):
        assert granted(cpu.fetch, 0)
        assert granted(cpu.read, 0)
        cpu.cr4 |= CR4_SMEP | CR4_SMAP
        assert not granted(cpu.fetch, 0)
        assert not granted(cpu.read, 0)
        assert granted(cpu.fetch, 0, user=True)
        assert granted(cpu.read, 0, user=True)
        cpu.cr4 = CR4_PAE
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_nxe_toggled(design):
    """Bit 63: no-execute with NXE=1, reserved with NXE=0."""
    vm, cpu = user_page_machine(design, 0)
    cpu.efer = EFER_LME | EFER_NXE
    vm.write_physical((4 << 12) + 7, b"\x88")
    for _ in range(2):
        assert granted(cpu.read, 0)
        assert not granted(cpu.fetch, 0)
        cpu.efer = EFER_LME
        with pytest.raises(sc.PageFault) as caught:
            cpu.read(0)
        assert caught.value.error_code == oracle.PF_P | oracle.PF_RSVD
        cpu.efer = EFER_LME | EFER_NXE
    assert vm.audit().ok
