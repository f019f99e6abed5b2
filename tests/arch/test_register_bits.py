"""Every single bit of CR0, CR3, CR4 and EFER, from every mode: which are refused, dropped or kept, and that those
which are kept and mean nothing change nothing.

The tables below are read from the SDM (volume 3, 2.2.1, 2.5, tables 4-3, 4-7, 4-12 and 4-13; volume 2, MOV to control
registers). The oracle has to agree with them as well.
"""

import numpy as np
import oracle
import pytest
from oracle import CR0_PE, CR0_PG, CR4_PAE, CR4_PCIDE, EFER_LME
from register_machines import DESIGNS, MODES, PAGING, REGISTERS, all_modes_machine, enter_oracle, load, state

import shadowcore as sc

MAXPHYADDR = 46
UPPER = set(range(32, 64))
FROM_MAXPHYADDR = set(range(MAXPHYADDR, 64))
LEGACY, LONG = ("off", "32", "pae"), ("64", "la57", "pcid")
ALL = (*LEGACY, *LONG)


def refused(mode, name, strict=False):
    """Bits that may not be set in a register that is otherwise as the mode has it."""
    if name == "cr0":  # 29: NW without CD
        return UPPER | {29} | (dropped(mode, name) if strict else set())
    if name == "cr3":
        if mode in LEGACY:
            return {0, 1, 2} if strict else set()
        if mode == "pcid":
            return FROM_MAXPHYADDR - {63}
        return FROM_MAXPHYADDR | (set(range(5, 12)) if strict else set())
    if name == "cr4":
        of_mode = {17} if mode in LEGACY else {12} if mode != "la57" else set()
        return {13, 14, 15, 19, *range(23, 32)} | UPPER | of_mode
    return {*range(1, 8), 9, *range(12, 32)} | UPPER | ({8} if mode in ("32", "pae") else set())


def dropped(mode, name):
    """Bits that read as before whatever was written."""
    if name == "cr0":
        return {*range(6, 16), 17, *range(19, 29)}
    if name == "cr3":
        return UPPER if mode in LEGACY else {63} if mode == "pcid" else set()
    return {10} if name == "efer" else set()


def enter(mode, design, strict=False, **features):
    """A processor of a design, or "oracle", in a mode; CR0 as if it had been loaded before."""
    if design == "oracle":
        cpu = enter_oracle(mode.replace("pcid", "64"), refuses_ignored_bits=strict, **features)
    else:
        made = sc.config.design(design)
        if strict:
            made = type(made)(quirks=sc.Quirk.IGNORED_BITS_REFUSED)
        cpu = sc.VM(memory=64 * 4096, mmu=made, features=sc.Features(**features)).vcpus[0]
        for name, value in MODES[mode.replace("pcid", "64")].items():
            assert load(cpu, name, value)
    if mode == "off":
        assert load(cpu, "cr0", CR0_PE)
    if mode == "pcid":
        assert load(cpu, "cr4", cpu.cr4 | CR4_PCIDE)
    return cpu


@pytest.mark.parametrize("design", ["oracle", *DESIGNS])
@pytest.mark.parametrize("mode", ALL)
def test_every_bit_is_refused_dropped_or_kept(mode, design):
    """Each bit that is clear is set by itself; where that is refused, no register has changed."""
    for strict in (False, True) if design != "flush" else (False,):
        for name in REGISTERS:
            cpu = enter(mode, design, strict)
            before = state(cpu)
            base = before[REGISTERS.index(name)]
            for bit in range(64):
                if base >> bit & 1:
                    continue
                where = mode, name, bit, strict
                assert load(cpu, name, base | 1 << bit) == (bit not in refused(mode, name, strict)), where
                expected = base | 1 << bit
                if bit in refused(mode, name, strict) | dropped(mode, name):
                    expected = base
                assert getattr(cpu, name) == expected, where
                if expected == base:
                    assert state(cpu) == before, where
                assert load(cpu, name, base)
                assert state(cpu) == before, where


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", ALL)
def test_every_single_bit_toggled(mode, design):
    """As the oracle has it, with bits cleared as well: accepted or refused, and the registers afterwards."""
    for name in REGISTERS:
        for bit in range(64):
            cpu, reference = enter(mode, design), enter(mode, "oracle")
            assert state(cpu) == state(reference)
            value = getattr(reference, name) ^ 1 << bit
            accepted = load(reference, name, value)
            assert (load(cpu, name, value), name, bit) == (accepted, name, bit)
            assert (state(cpu), name, bit) == (state(reference), name, bit)


@pytest.mark.parametrize("maxphyaddr", [32, 40, 52])
@pytest.mark.parametrize("mode", LONG)
def test_cr3_is_refused_from_maxphyaddr_on(mode, maxphyaddr):
    for design in ("oracle", "native"):
        cpu = enter(mode, design, maxphyaddr=maxphyaddr)
        accepted = [bit for bit in range(12, 64) if load(cpu, "cr3", 1 << bit)]
        assert accepted == [*range(12, maxphyaddr), *([63] if mode == "pcid" else [])]


@pytest.mark.parametrize("design", ["oracle", *DESIGNS])
def test_et_stays_set(design):
    cpu = enter("off", design)
    for value in (0, CR0_PE, CR0_PE | 1 << 6, CR0_PG | CR0_PE):
        assert load(cpu, "cr0", value)
        assert cpu.cr0 == value & ~(1 << 6) | 0x10


# -- what is ignored changes nothing -----------------------------------------------------------------------------


def in_mode(design, mode, low=0, **machine):
    """The machine of all modes in one of them, with `low` in CR3 before paging goes on and again afterwards."""
    vm, _, roots = all_modes_machine(design)
    if machine:
        old, vm = vm, sc.VM(memory=64 * 4096, mmu=design, **machine)
        vm.memory.words[:] = old.memory.words
    cpu = vm.vcpus[0]
    cpu.efer, cpu.cr4 = MODES[mode].get("efer", 0), MODES[mode].get("cr4", 0)
    cpu.cr3 = roots[mode] | low
    cpu.cr0 = MODES[mode].get("cr0", CR0_PE)
    cpu.cr3 = roots[mode] | low
    assert cpu.cr3 == roots[mode] | low
    return vm, cpu


FRAMES = {"off": 0, "32": 17, "pae": 18, "64": 19, "la57": 20}
IGNORED = {"off": 0xFFF, "32": 0xFFF, "pae": 0x1F, "64": 0xFFF, "la57": 0xFFF}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_ignored_bits_of_cr3_choose_the_same_tables(mode, design):
    """All of them at once, and each alone: the same frames, roots and shadow pages as without; the PAE root table is
    that at CR3 bits 31:5."""
    plain, _ = in_mode(design, mode)
    plain.vcpus[0].write(0x10, 7)
    for low in (IGNORED[mode], *(1 << bit for bit in range(12) if IGNORED[mode] >> bit & 1)):
        vm, cpu = in_mode(design, mode, low)
        cpu.write(0x10, 7)
        assert cpu.translate(0x10).gpa == FRAMES[mode] << 12 | 0x10
        assert np.array_equal(vm.memory.bytes, plain.memory.bytes)
        if mode != "off" or design not in ("unsync", "adaptive"):  # they look for their roots anew: this is another CR3
            assert vm.stats.as_dict() == plain.stats.as_dict()
        assert [level[1] for level in cpu.walk_levels(0x10)] == [level[1] for level in plain.vcpus[0].walk_levels(0x10)]
        if design != "native":
            assert vm.mmu.pages.tolist() == plain.mmu.pages.tolist()
            assert vm.mmu.roots(0) == plain.mmu.roots(0)
        assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_bits_11_to_5_choose_the_pae_root_table(design):
    vm, cpu = in_mode(design, "pae")
    vm.memory.words[0x3FE0 // 8] = 2 << 12 | 1  # entry 0 of the last table of the frame; a directory of zeros at first
    vm.memory.words[2 * 512] = 4 << 12 | 7
    vm.memory.words[4 * 512] = 21 << 12 | 7
    cpu.cr3 = 0x3FFF
    assert cpu.cr3 == 0x3FFF
    assert cpu.pdptes[0] == 2 << 12 | 1
    assert cpu.translate(0).gpa == 21 << 12
    cpu.cr3 = 0x301F
    assert cpu.pdptes[0] == 4 << 12 | 1
    vm.memory.words[0x3000 // 8] = 3 << 1
    cpu.cr0 ^= oracle.CR0_CD  # loads them again, from bits 31:5
    assert cpu.pdptes[0] == 6


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("bit", range(12))
def test_pcids_are_turned_on_with_cr3_bits_11_to_0_clear_only(design, bit):
    """SDM volume 2, MOV: #GP otherwise. Turned off again, CR3 keeps its PCID, which is ignored from then on."""
    vm, cpu = in_mode(design, "64", 1 << bit)
    assert not load(cpu, "cr4", CR4_PAE | CR4_PCIDE)
    cpu.cr3 &= ~0xFFF
    cpu.cr4 = CR4_PAE | CR4_PCIDE
    cpu.cr3 |= 1 << bit
    assert cpu.translate(0).gpa == 19 << 12
    cpu.cr4 = CR4_PAE
    assert cpu.cr3 & 0xFFF == 1 << bit
    assert not load(cpu, "cr4", CR4_PAE | CR4_PCIDE)
    assert cpu.translate(0).gpa == 19 << 12
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_upper_half_of_cr3_is_of_long_mode_only(design):
    """Outside of long mode the operand has 32 bits. What long mode put there stays when it is left, and is ignored."""
    vm, cpu = in_mode(design, "32")
    cpu.cr3 = 0xABCD_0000_1000
    assert cpu.cr3 == 0x1000
    assert cpu.translate(0).gpa == 17 << 12
    vm, cpu = in_mode(design, "64")
    cpu.cr3 = 1 << 33 | 0x1000
    with pytest.raises(sc.PageFault):
        cpu.read(0)
    cpu.cr0 = CR0_PE
    assert cpu.cr3 == 1 << 33 | 0x1000
    cpu.efer, cpu.cr4 = 0, MODES["32"]["cr4"]
    cpu.cr0 = PAGING
    assert cpu.cr3 == 1 << 33 | 0x1000
    assert cpu.translate(0).gpa == 17 << 12
    cpu.cr0, cpu.cr4 = CR0_PE, CR4_PAE
    cpu.cr3 = 0x3000
    cpu.cr0 = PAGING
    assert cpu.translate(0).gpa == 18 << 12
    cpu.cr0, cpu.efer = CR0_PE, EFER_LME
    cpu.cr3 = 1 << 33 | 0x6000  # long mode is not active yet
    cpu.cr0 = PAGING
    assert cpu.translate(0).gpa == 19 << 12
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", ["32", "pae", "64"])
def test_a_modelled_tlb_does_not_look_at_ignored_bits(mode, design):
    """Without PCIDs they are no tag: a load drops what was kept, whatever they are."""
    vm, cpu = in_mode(design, mode, tlb=sc.TLB())
    cpu.read(0)
    assert cpu.tlb["pcid"].tolist() == [0]
    cpu.cr3 |= IGNORED[mode]
    assert len(cpu.tlb) == 0
    cpu.read(0)
    assert cpu.tlb["pcid"].tolist() == [0]
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_ignored_bits_survive_save_and_load(mode, design, tmp_path):
    vm, cpu = in_mode(design, mode, IGNORED[mode])
    cpu.write(0x10, 7)
    vm.save(tmp_path / "vm.npz")
    again = sc.VM.load(tmp_path / "vm.npz")
    assert state(again.vcpus[0]) == state(cpu)
    assert again.vcpus[0].cr3 & 0xFFF == IGNORED[mode]
    for each in (vm, again):
        each.vcpus[0].write(0x20, 8)
    assert np.array_equal(again.memory.bytes, vm.memory.bytes)
    assert again.stats.as_dict() == vm.stats.as_dict()
    assert again.audit().ok


@pytest.mark.parametrize("design", [sc.Native, sc.Shadow.cached])
def test_save_and_load_keep_the_quirk(design, tmp_path):
    vm = sc.VM("1MiB", design(quirks=sc.Quirk.IGNORED_BITS_REFUSED))
    vm.save(tmp_path / "vm.npz")
    again = sc.VM.load(tmp_path / "vm.npz")
    assert again.mmu.design == vm.mmu.design
    assert not load(again.vcpus[0], "cr3", 1)


@pytest.mark.parametrize("design", DESIGNS)
def test_batches_and_events_have_the_register_as_it_is(design):
    """Loads in a batch follow the same rules; the event of the exit has what the register holds."""
    vm, cpu = in_mode(design, "64")
    heard = []
    sc.embed.on_event(vm, heard.append, "exit")
    rows = np.zeros(4, dtype=sc.OP_DTYPE)
    rows["op"] = [sc.Op.CR3, sc.Op.CR0, sc.Op.CR0, sc.Op.READ]
    rows["value"] = [0x6FFF, PAGING & ~0x10 | 0x1FFAFFC0, PAGING | 1 << 32, 0]
    rows["size"] = 8
    result = cpu.run(rows)
    assert result.outcome.tolist() == [0, 0, 2, 0]
    assert result.gpa[3] == 19 << 12
    assert state(cpu) == [PAGING, 0x6FFF, CR4_PAE, EFER_LME | oracle.EFER_LMA]
    if design != "native":
        loads = [PAGING] if design == "nested" else [0x6FFF, PAGING]  # loads of CR3 do not exit
        assert [event.address for event in heard if event.detail in ("cr0", "cr3")] == loads
