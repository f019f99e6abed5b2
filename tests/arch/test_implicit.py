"""Accesses that the processor makes itself, and the rules of AMD where they differ, against the oracle."""

import itertools

import numpy as np
import oracle
import pytest
from access_machine import ADDRESS, PAGE, Frames, Machine
from oracle import CR0, CR4, CR4_LA57, CR4_PAE, CR4_PKE, CR4_SMAP, CR4_SMEP, EFER, FETCH, READ, WRITE, A, D, P, U, W

import shadowcore as sc

DESIGNS = {
    "native": "native",
    "cached": "cached",
    "flush": sc.Shadow.flush(quirks=0),
    "unsync": "unsync",
    "markers": sc.Shadow.unsync(notpresent_marker="walk", release="6.12"),
    "nested": "nested",
    "nested, direct": sc.Nested(mmu="direct", levels=5),
    "agile": sc.Shadow.agile(nested_writes=1),
}
"""Without the defects that their originals had."""
G = 1 << 8
IMPLICIT = np.dtype([*((name, sc.OP_DTYPE[name]) for name in sc.OP_DTYPE.names), ("implicit", "u1")])


def layout(levels, leaf, upper):
    """Tables with the entry `leaf` at ADDRESS, and `upper` flags above it; all memory is mapped at linear 0."""
    frames = Frames()
    root = frames.table()
    for gpa in range(0, 40 << 20, 2 << 20):
        frames.map(root, levels, gpa, gpa | oracle.PS | P | W | A | D, last=2, flags=P | W | A)
    frames.map(root, levels, ADDRESS, PAGE | leaf, flags=upper)
    return frames, root


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("levels", [4, 5])
def test_implicit_accesses(design, levels):
    """Every combination of rights, SMAP, SMEP, WP, keys, EFLAGS.AC, the privilege level and the access."""
    for leaf, upper in itertools.product((P | W | U, P | U, P | W, P), (P | W | U, P | W)):
        frames, root = layout(levels, leaf | 1 << 59, upper)
        model = Machine(frames, root, levels).cpu
        machine = Machine(frames, root, levels, DESIGNS[design])
        cr4 = CR4_PAE | (CR4_LA57 if levels == 5 else 0)
        rows = []
        for smap, smep, pke, wp, ac in itertools.product((0, 1), repeat=5):
            cr0 = model.cr0 & ~oracle.CR0_WP | oracle.CR0_WP * wp
            rows += [(CR0, 0, 8, 0, cr0, 0), (sc.Op.PKRU, 0, 8, 0, 4 * pke, 0), (sc.Op.AC, 0, 8, 0, ac, 0)]
            rows += [(CR4, 0, 8, 0, cr4 | CR4_SMAP * smap | CR4_SMEP * smep | CR4_PKE * pke, 0)]
            for op, user, implicit in itertools.product((READ, WRITE, FETCH), (0, 1), (0, 1)):
                if op != FETCH or not implicit:
                    rows.append((op, user, 8, ADDRESS, 0x1234, implicit))
        ops = np.zeros(len(rows), IMPLICIT)
        for i, row in enumerate(rows):
            ops[i] = row
        result = machine.cpu.run(ops)
        for i, (op, user, size, address, value, implicit) in enumerate(rows):
            if op == sc.Op.PKRU:
                model.pkru = value
            elif op == sc.Op.AC:
                model.ac = bool(value)
            else:
                wanted = model.step(op, address, value, size, bool(user), bool(implicit))
                got = tuple(int(getattr(result, name)[i]) for name in ("outcome", "error_code", "gpa"))
                assert got == wanted[:3], (i, rows[i], bool(leaf & U))
        assert machine.vm.audit().ok


@pytest.mark.parametrize("design", ["native", "cached", "unsync", "adaptive"])
def test_scalar_implicit_accesses(design):
    """EFLAGS.AC does not count, CPL neither, and both are as before; with the modelled TLB as without."""
    for tlb in (None, sc.TLB()):
        vm = sc.VM("8MiB", mmu=design, tlb=tlb)
        tables = sc.PageTables(vm, "64")
        tables.map(0x40_0000, 0, 4096, "rwu")
        tables.map(0x50_0000, 0x1000, 4096, "rwx")
        cpu = vm.vcpus[0]
        tables.activate(cpu)
        cpu.cr4 |= CR4_SMAP
        cpu.ac = True
        cpu.write(0x40_0000, 5)
        for access, arguments in ((cpu.read, ()), (cpu.write, (1,)), (cpu.cmpxchg, (5, 6)), (cpu.modify, ("or", 1))):
            for cpl in (0, 3):
                cpu.cpl = cpl
                with pytest.raises(sc.PageFault) as raised:
                    access(0x40_0000, *arguments, implicit=True)
                assert raised.value.error_code & oracle.PF_P
                assert not raised.value.error_code & oracle.PF_U
        assert cpu.ac
        assert cpu.read(0x40_0000) == 5  # CPL 3
        cpu.write(0x50_0000, 9, implicit=True)
        assert cpu.read(0x50_0000, implicit=True) == 9
        with pytest.raises(sc.PageFault):
            cpu.read(0x50_0000)


# -- AMD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor", ["intel", "amd"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("levels", [4, 5])
def test_bit_8_of_upper_entries(levels, design, vendor):
    """In each level, with each other flag that a level can lack, and each access."""
    for level, flags, leaf in itertools.product(range(levels, 1, -1), (P | W | U, P | W, P | U, W | U), (P | W | U, P)):
        frames = Frames()
        root = frames.table()
        path = frames.map(root, levels, ADDRESS, PAGE | leaf)
        where = path[levels - level]
        frames.entries[where] = frames.entries[where] & ~(P | W | U) | flags | G
        model = Machine(frames, root, levels, vendor=vendor).cpu
        machine = Machine(frames, root, levels, DESIGNS[design], vendor=vendor)
        met = set()
        for op, user in itertools.product((READ, WRITE, FETCH), (0, 1)):
            ops = np.array([(op, user, 8, ADDRESS, 1)], sc.OP_DTYPE)
            result = machine.cpu.run(ops)
            wanted = model.step(op, ADDRESS, 1, 8, bool(user))
            got = int(result.outcome[0]), int(result.error_code[0]), int(result.gpa[0])
            assert got == wanted[:3], (level, flags, op, user)
            met.add(got[1] & oracle.PF_RSVD)
        assert met == {oracle.PF_RSVD if vendor == "amd" and level >= 4 and flags & P else 0}
        assert machine.vm.audit().ok


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_loads_of_efer(vendor):
    """LMA, FFXSR and TCE, with paging on and off."""
    for paging in (False, True):
        vm = sc.VM("8MiB", features=sc.Features(vendor=vendor))
        cpu = vm.vcpus[0]
        model = oracle.Cpu(oracle.Memory((0, 8)), oracle.Features(vendor=vendor))
        if paging:
            sc.PageTables(vm, "64").activate(cpu)
        model.cr0, model.cr4, model.efer, model.cr3 = cpu.cr0, cpu.cr4, cpu.efer, cpu.cr3
        for bits in itertools.product((0, oracle.EFER_LMA), (0, oracle.EFER_FFXSR), (0, oracle.EFER_TCE), (0, 1 << 13)):
            value = sum(bits) | (oracle.EFER_LME if paging else 0)
            ops = np.array([(EFER, 0, 8, 0, value)], sc.OP_DTYPE)
            assert int(cpu.run(ops).outcome[0]) == model.step(EFER, value=value)[0], hex(value)
            assert cpu.efer == model.efer


def test_a_vendor_that_there_is_not():
    with pytest.raises(sc.ConfigError, match=r"features\.vendor: 'via' is not one of intel, amd"):
        sc.Features(vendor="via")


def test_a_processor_of_amd_is_saved(tmp_path):
    vm = sc.VM("8MiB", mmu="cached", features=sc.Features(vendor="amd"))
    tables = sc.PageTables(vm, "64")
    tables.map(0x40_0000, 0, 4096, "rwx")
    tables.activate(vm.vcpus[0])
    vm.save(tmp_path / "vm.npz")
    other = sc.VM.load(tmp_path / "vm.npz")
    assert other.features.vendor == "amd"
    entry = tables.entry(0x40_0000, 4)
    other.write_physical(entry.gpa, (entry.value | G).to_bytes(8, "little"))
    with pytest.raises(sc.PageFault) as raised:
        other.vcpus[0].read(0x40_0000)
    assert raised.value.error_code == oracle.PF_P | oracle.PF_RSVD


# -- INIT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", ["off", "32", "pae", "64", "la57"])
def test_init(design, mode):
    """The registers as the table says, of one vcpu alone; memory and its shadows stay; the guest starts anew."""
    vm = sc.VM("8MiB", mmu=DESIGNS[design], vcpus=2, tlb=sc.TLB())
    tables = sc.PageTables(vm, "64" if mode == "off" else mode)
    tables.map(0x40_0000, 0x3000, 4096, "rwx", global_=True)
    model = oracle.Cpu(oracle.Memory((0, 8)))
    for cpu in vm.vcpus:
        if mode != "off":
            tables.activate(cpu)
            cpu.cr4 |= CR4_SMEP | CR4_SMAP | oracle.CR4_PGE
            cpu.write(0x40_0000, 77)
        cpu.cr0 |= oracle.CR0_CD
        cpu.pkru, cpu.ac, cpu.cpl, cpu.cr2 = 0xC, True, 3, 0x1234
    first, second = vm.vcpus
    model.cr0 = first.cr0
    model.pkru = 0xC
    exits, registers = sum(vm.stats.exits.values()), [second.cr0, second.cr3, second.cr4, second.efer, second.ac]
    first.init()
    model.init()
    for name in ("cr0", "cr2", "cr3", "cr4", "efer", "pkru", "ac", "mode"):
        assert getattr(first, name) == getattr(model, name), name
    assert (first.cpl, first.pdptes, len(first.tlb)) == (0, (0, 0, 0, 0), 0)
    assert [second.cr0, second.cr3, second.cr4, second.efer, second.ac] == registers
    assert sum(vm.stats.exits.values()) == exits
    assert vm.audit().ok
    assert first.read(0x3000) == (77 if mode != "off" else 0)
    if mode != "off":
        tables.activate(first)
        first.cr0 &= ~oracle.CR0_CD
        assert first.read(0x40_0000) == 77
        second.cpl = 0
        second.ac = False
        assert second.read(0x40_0000) == 77
    assert vm.audit().ok
