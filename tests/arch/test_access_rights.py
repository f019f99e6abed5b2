"""Rights of pages in every mode, and the special tests of kvm-unit-tests' x86/access.c."""

import itertools

import numpy as np
import oracle
import pytest
from access_machine import ADDRESS, DESIGNS, KERNEL_FLAGS, PAGE, RAM, Frames, Machine
from operations import operations
from oracle import (
    CR0,
    CR0_PG,
    CR0_WP,
    CR3,
    CR4,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER,
    EFER_LME,
    EFER_NXE,
    FETCH,
    INVLPG,
    NX,
    OK,
    PF_P,
    PF_RSVD,
    PF_W,
    PS,
    READ,
    WRITE,
    A,
    D,
    P,
    U,
    W,
)

import shadowcore as sc

# -- rights in every mode ----------------------------------------------------------------------------------

# Bytes of an entry, and levels (for PAE without the root registers).
MODES = {"32": (4, 2), "pae": (8, 2), "64": (8, 4), "la57": (8, 5)}


def rights_program(mode):
    """Every combination of W, U, NX of the two lowest levels with WP, SMEP, SMAP, AC, NXE and the access,
    as rows (op, addr, value, size, user) of one program.  Memory is mapped at linear 0 by supervisor
    tables; the page under test is at 16 MiB, by a table of its own."""
    width, levels = MODES[mode]
    paging = CR0_PG | 0x11
    cr4 = {"32": CR4_PSE, "pae": CR4_PAE, "64": CR4_PAE, "la57": CR4_PAE | CR4_LA57}[mode]
    lme = EFER_LME if levels > 3 else 0
    page, test = 7 << 12, 16 << 20
    tables = {}
    base = 1 << 12
    if mode == "pae":
        tables[base] = 2 << 12 | P
        base = 2 << 12
    for _ in range(levels - 2):
        tables[base] = base + 4096 | P | W | U
        base += 4096
    large = 22 if mode == "32" else 21
    tables[base] = PS | KERNEL_FLAGS
    pde = base + (test >> large) * width
    pte = base + 4096
    rows = [
        (EFER, 0, lme, 8, 0),
        (CR4, 0, cr4, 8, 0),
        (CR3, 0, 1 << 12, 8, 0),
        (CR0, 0, paging, 8, 0),
    ]
    rights = [w | u | nx for w in (0, W) for u in (0, U) for nx in ((0, NX) if width == 8 else (0,))]
    kinds = [(op, user) for op in (READ, WRITE, FETCH) for user in (0, 1)]
    switches = itertools.product((0, CR0_WP), (0, CR4_SMEP), (0, CR4_SMAP), (0, 1), (0, EFER_NXE))
    for wp, smep, smap, ac, nxe in switches:
        rows += [
            (EFER, 0, lme | nxe, 8, 0),
            (CR0, 0, paging | wp, 8, 0),
            (CR4, 0, cr4 | smep | smap, 8, 0),
            (sc.Op.AC, 0, ac, 8, 0),
        ]
        for upper, lower in itertools.product(rights, repeat=2):
            for op, user in kinds:
                rows += [
                    (WRITE, pde, pte | P | upper, width, 0),
                    (WRITE, pte, page | P | lower, width, 0),
                    (INVLPG, test, 0, 8, 0),
                    (op, test | 8, 0x77, 4, user),
                    (READ, pde, 0, width, 0),
                    (READ, pte, 0, width, 0),
                ]
    return tables, width, rows


@pytest.mark.parametrize("mode", MODES)
def test_rights_in_every_mode(mode):
    tables, width, rows = rights_program(mode)
    reference = oracle.Cpu(oracle.Memory((0, 256)))
    vms = [sc.VM(memory=256 * 4096, mmu=design) for design in DESIGNS]
    for where, value in tables.items():
        reference.memory.write(where, value, width)
        for vm in vms:
            vm.memory.bytes[where : where + width] = np.frombuffer(value.to_bytes(width, "little"), np.uint8)
    want = []
    for op, address, value, size, user in rows:
        if op == sc.Op.AC:
            reference.ac = bool(value)
            want.append((OK, 0, oracle.NO_GPA, 0))
        else:
            want.append(reference.step(op, address, value, size, bool(user)))
    want = np.array(want, dtype=np.uint64).T
    ops = operations(*rows)
    read = (ops["op"] == READ) & (want[0] == OK)
    for vm in vms:
        result = vm.vcpus[0].run(ops)
        np.testing.assert_array_equal(result.outcome, want[0])
        np.testing.assert_array_equal(result.error_code, want[1])
        np.testing.assert_array_equal(result.gpa, want[2])
        np.testing.assert_array_equal(result.value[read], want[3][read])
        assert vm.audit().ok


# -- the special tests of access.c -------------------------------------------------------------------------


def special(design, build, **settings):
    """A machine over tables made by `build(frames, root)`; the kernel has all memory at linear 0."""
    frames = Frames()
    root = frames.table()
    for gpa in range(0, RAM, 2 << 20):
        frames.map(root, 4, gpa, gpa | PS | KERNEL_FLAGS, last=2, flags=P | W | A)
    made = build(frames, root)
    machine = Machine(frames, root, 4, design, **settings)
    return machine.cpu, made


def faults(access, *args, **kwargs):
    """The error code of the fault that an access ends in."""
    with pytest.raises(sc.PageFault) as caught:
        access(*args, **kwargs)
    return caught.value.error_code


@pytest.mark.parametrize("design", DESIGNS)
def test_large_page_mapped_read_only_and_writable(design):
    """Two addresses share a 2 MiB page, one read-only: a write through the other must not open the first."""
    ro, rw = ADDRESS, ADDRESS + (2 << 20)

    def build(frames, root):
        frames.map(root, 4, ro, PAGE | PS | P | U, last=2)
        frames.map(root, 4, rw, PAGE | PS | P | U | W, last=2)

    cpu, _ = special(design, build)
    cpu.read(ro)
    cpu.read(rw)
    cpu.write(rw, 1)
    assert faults(cpu.write, ro, 2) == PF_P | PF_W
    assert cpu.read(ro) == 1


@pytest.mark.parametrize("design", DESIGNS)
def test_reserved_bit_in_a_neighbouring_entry(design):
    """An access to the first of two neighbouring entries may bring in the second as well: its reserved bit
    (NX with EFER.NXE=0) must still be reported."""

    def build(frames, root):
        frames.map(root, 4, ADDRESS, PAGE | P | W | U)
        frames.map(root, 4, ADDRESS + 4096, PAGE | P | W | U | NX)

    cpu, _ = special(design, build, efer=0)
    cpu.read(ADDRESS)
    assert faults(cpu.read, ADDRESS + 4096) == PF_P | PF_RSVD


@pytest.mark.parametrize("design", DESIGNS)
def test_dirty_bit_of_read_only_large_pages_without_wp(design):
    """CR0.WP=0: a supervisor write through each of two read-only large pages over the same memory sets D in
    each."""
    first, second = ADDRESS, ADDRESS + (2 << 20)

    def build(frames, root):
        return [frames.map(root, 4, va, PAGE | PS | P | U, last=2)[-1] for va in (first, second)]

    cpu, entries = special(design, build)
    cpu.cr0 &= ~CR0_WP
    cpu.read(first)
    cpu.write(second, 1)
    assert cpu.read(entries[0]) & (A | D) == A
    cpu.write(first, 2)
    assert [cpu.read(where) & (A | D) for where in entries] == [A | D, A | D]


@pytest.mark.parametrize("design", DESIGNS)
def test_supervisor_write_then_fetch_with_smep(design):
    """SMEP: a supervisor page made of a user page for a WP=0 write (so that KVM could grant it) must not
    become executable for the supervisor.  With WP=1 the write itself is refused."""

    def build(frames, root):
        frames.map(root, 4, ADDRESS, PAGE | P | U)

    cpu, _ = special(design, build, cr4=CR4_SMEP)
    assert faults(cpu.write, ADDRESS, 1) == PF_P | PF_W
    assert faults(cpu.fetch, ADDRESS) == PF_P | oracle.PF_I
    cpu.cr0 &= ~CR0_WP
    cpu.write(ADDRESS, 1)
    assert faults(cpu.fetch, ADDRESS) == PF_P | oracle.PF_I


@pytest.mark.parametrize("design", DESIGNS)
def test_toggling_wp_needs_no_invlpg(design):
    """A supervisor write to a read-only page: granted with WP=0, refused with WP=1, each time without
    INVLPG, and with EFER.NXE toggled in between."""

    def build(frames, root):
        frames.map(root, 4, ADDRESS, PAGE | P | U)

    cpu, _ = special(design, build)
    for _ in range(3):
        cpu.cr0 &= ~CR0_WP
        cpu.write(ADDRESS, 1)
        cpu.cr0 |= CR0_WP
        assert faults(cpu.write, ADDRESS, 2) == PF_P | PF_W
        cpu.efer ^= EFER_NXE
    assert cpu.read(ADDRESS) == 1


@pytest.mark.parametrize("design", DESIGNS)
def test_rights_of_a_table_shared_by_two_parents(design):
    """Two directory pointers, one read-only, share a directory: what the writable path fills must not be
    found with write access through the read-only path, and the other way round."""

    def build(frames, root):
        giga = 1 << 30
        path = frames.map(root, 4, ADDRESS, PAGE | P | W | U, flags=P | W | U | A)
        frames.map(root, 4, ADDRESS + (2 << 20), PAGE + 4096 | P | W | U)
        directory = frames.entries[path[1]] & oracle.bits(51, 12)
        frames.entries[path[2]] &= ~W  # first entry of the shared directory: read-only
        frames.map(root, 4, ADDRESS + giga, directory | P | U | A, last=3)
        return [ADDRESS, ADDRESS + (2 << 20), ADDRESS + giga, ADDRESS + giga + (2 << 20)]

    cpu, (rw_ro, rw_rw, ro_ro, ro_rw) = special(design, build)
    cpu.read(rw_ro, user=True)
    cpu.write(rw_rw, 1, user=True)
    cpu.read(ro_ro, user=True)
    assert faults(cpu.write, ro_rw, 2, user=True) == PF_P | PF_W | oracle.PF_U
    assert faults(cpu.write, rw_ro, 2, user=True) == PF_P | PF_W | oracle.PF_U
    cpu.write(rw_rw, 3, user=True)
    assert cpu.read(ro_rw, user=True) == 3
