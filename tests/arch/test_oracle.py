"""The oracle against the recorded answers, and against single rules worked out by hand.

If a test of this file fails, the yardstick is bent: look here before believing any other failure.
"""

import zlib

import numpy as np
import oracle
import pytest
import streams
from oracle import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PKE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LME,
    EFER_NXE,
    FETCH,
    NX,
    PF_I,
    PF_P,
    PF_PK,
    PF_RSVD,
    PF_U,
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


class Cpu2621(oracle.Cpu):
    """Linux 2.6.21 sets A also in the entries that a refused access passed: those, from the root down, that
    are present and grant it."""

    def access(self, address, op, user=False, implicit=False):
        try:
            return super().access(address, op, user, implicit)
        except oracle.PageFault as fault:
            for _, where, entry in fault.walked:
                refused = not entry & P
                refused |= op == WRITE and not entry & W and bool(user or self.cr0 & CR0_WP)
                refused |= user and not entry & U
                refused |= op == FETCH and bool(self.efer & EFER_NXE and entry & NX)
                if refused:
                    break
                self.memory.write(where, self.memory.read(where, 1) | A, 1)
            raise


@pytest.mark.parametrize("name", streams.STREAMS)
def test_every_answer_of_a_stream(name):
    data = streams.stream(name)
    outcome, error, gpa, _ = streams.expected(name)[0]
    for engine in streams.ENGINES:
        results = data[f"{engine}_res"]
        n = streams.first_deviation(results) + 1
        n = min(n, len(results))
        want_outcome, want_error, want_gpa = (column[:n] for column in streams.architecture(results))
        np.testing.assert_array_equal(outcome[:n], want_outcome, engine)
        np.testing.assert_array_equal(error[:n], want_error, engine)
        np.testing.assert_array_equal(gpa[:n], want_gpa, engine)


@pytest.mark.parametrize("name", streams.STREAMS)
def test_before_answers_for_the_architecture_to_the_end(name):
    """Two engines go astray in some streams; the guest memory of `before` answers right to the last operation
    of each, although it errs itself in large_32 and recursive_pae.  So its arch_* fields are what the other
    tests compare with."""
    data = streams.stream(name)
    outcome, error, gpa, _ = streams.expected(name)[0]
    want_outcome, want_error, want_gpa = streams.architecture(data["before_res"])
    assert tuple(data["before_stop"]) == (0, 0)
    np.testing.assert_array_equal(outcome, want_outcome)
    np.testing.assert_array_equal(error, want_error)
    np.testing.assert_array_equal(gpa, want_gpa)


@pytest.mark.parametrize("name", streams.STREAMS)
def test_memory_and_values_are_those_of_2_6_21(name):
    """Up to the first defect that shows, 2.6.21 leaves the same bytes in memory, A and D bits included."""
    data = streams.stream(name)
    ops, recorded = data["ops"], data["rel21_res"]
    end = streams.first_deviation(recorded)
    cpu = streams.oracle_cpu(data, streams.FEATURES_2007, Cpu2621)
    results, done = [], 0
    for checkpoint, op in enumerate(data["ckpt_op"].tolist()):
        if op >= end:
            break
        results += cpu.run(ops[done : op + 1])
        done = op + 1
        rows = data["rel21_mem"][data["rel21_mem"]["ckpt"] == checkpoint]
        want = dict(zip(rows["gfn"].tolist(), rows["crc32"].tolist(), strict=True))
        assert want == {gfn: zlib.crc32(page) for gfn, page in cpu.memory.frames.items() if any(page)}
    results += cpu.run(ops[done:end])
    loads = np.isin(ops["op"][:end], (READ, FETCH)) & (recorded["outcome"][:end] == 0)
    values = np.array([row[3] for row in results], dtype=np.uint64)
    np.testing.assert_array_equal(values[loads], recorded["rval"][:end][loads])


@pytest.mark.parametrize("name", streams.LINUX)
def test_every_translation_of_linux(name):
    tables = streams.linux(name)
    cpu = streams.oracle_cpu(tables)
    streams.set_registers(cpu, tables)
    for number, root in enumerate(tables["root"].tolist()):
        cpu.load_cr3(root)
        rows = tables["leaf_root"] == number
        columns = (tables[key][rows].tolist() for key in ("leaf_va", "leaf_pa", "leaf_bits"))
        end = None
        for va, pa, leaf_bits in zip(*columns, strict=True):
            t = cpu.translate(va)
            large = PS if t.page_size > oracle.PAGE else 0
            # PS is PAT in a 4 KiB entry; the listing clears it there.
            listed = t.entry & (NX | oracle.bits(8, 1) & ~PS) | large
            assert (t.gpa, listed) == (pa, leaf_bits), hex(va)
            # Nothing is mapped just behind the previous row, unless this row is there.
            if end is not None and end != va:
                with pytest.raises((oracle.PageFault, oracle.GeneralProtection)):
                    cpu.translate(end)
            end = (va + t.page_size) % (1 << 64)


@pytest.mark.parametrize("name", streams.LINUX[:3])
def test_rights_by_range_of_linux(name):
    tables = streams.linux(name)
    cpu = streams.oracle_cpu(tables)
    streams.set_registers(cpu, tables)
    assert len(tables["range_rights"])
    for start, end, rights in tables["range_rights"].tolist():
        va = start
        while va < end:
            t = cpu.translate(va)
            assert (1 | 2 * t.writable | 4 * t.user) == rights, hex(va)
            va = (va | t.page_size - 1) + 1


def test_linux_pae_as_dumped_is_refused():
    """Why streams.linux() clears a bit: 24 of the 33 present PDPTEs carry bit 5, which is reserved."""
    with np.load(streams.DATA / "linux-pagetables" / "linux_pae.npz") as file:
        tables = {key: file[key] for key in file.files}
    cpu = streams.oracle_cpu(tables)
    cpu.load_efer(int(tables["efer"]))
    cpu.load_cr4(int(tables["cr4"]))
    cpu.load_cr3(int(tables["cr3"]))
    with pytest.raises(oracle.GeneralProtection):
        cpu.load_cr0(int(tables["cr0"]))


# -- single rules, worked out by hand, for what the recordings do not reach --------------------------------

PAGE_ENTRY = P | W | U


def small_cpu(mode="64", frames=64, **features):
    """Tables at frames 1, 2, 3, ... from the root down, entry 0 leading on; linear page 0 is frame 16."""
    cpu = oracle.Cpu(oracle.Memory((0, frames)), oracle.Features(**features))
    levels = {"32": 2, "pae": 3, "64": 4, "la57": 5}[mode]
    width = 4 if mode == "32" else 8
    for i in range(1, levels + 1):
        flags = P if mode == "pae" and i == 1 else PAGE_ENTRY
        cpu.memory.write(i << 12, (16 if i == levels else i + 1) << 12 | flags, width)
    cpu.load_efer((EFER_LME if levels > 3 else 0) | EFER_NXE)
    cpu.load_cr4((CR4_PAE if levels > 2 else CR4_PSE) | (CR4_LA57 if levels > 4 else 0))
    cpu.load_cr3(1 << 12)
    cpu.load_cr0(CR0_PG | CR0_WP | 0x11)
    assert cpu.mode == mode
    return cpu, levels << 12


def fault_of(cpu, address, op, user=False):
    with pytest.raises(oracle.PageFault) as caught:
        cpu.access(address, op, user)
    return caught.value.error_code


@pytest.mark.parametrize("mode", ["32", "pae", "64", "la57"])
def test_accessed_and_dirty(mode):
    cpu, leaf = small_cpu(mode)
    cpu.read(0x123, 1)
    used = range(2 if mode == "pae" else 1, (leaf >> 12) + 1)
    assert all(cpu.memory.read(i << 12, 1) == PAGE_ENTRY | A for i in used)
    cpu.write(0x123, 7, 1)
    assert cpu.memory.read(leaf, 1) == PAGE_ENTRY | A | D
    assert cpu.memory.read(leaf - 0x1000, 1) & D == 0
    if mode == "pae":
        assert cpu.memory.read(1 << 12, 1) == P


def test_fault_changes_no_accessed_bit():
    cpu, leaf = small_cpu()
    cpu.memory.write(leaf, 16 << 12 | P | U, 8)
    assert fault_of(cpu, 0, WRITE) == PF_P | PF_W
    assert all(cpu.memory.read(i << 12, 1) & (A | D) == 0 for i in range(1, 5))
    assert cpu.cr2 == 0


@pytest.mark.parametrize(
    ("maxphyaddr", "pse36", "pde_bits", "gpa"),
    [
        (46, True, 1 << 13, 1 << 32 | 0x1234),
        (46, True, 1 << 20, 1 << 39 | 0x1234),
        (46, True, 1 << 21, None),
        (36, True, 1 << 16, 1 << 35 | 0x1234),
        (36, True, 1 << 17, None),
        (46, False, 1 << 13, None),
        (46, False, 1 << 12, 0x1234),
    ],
)
def test_pse36(maxphyaddr, pse36, pde_bits, gpa):
    cpu, _ = small_cpu("32", maxphyaddr=maxphyaddr, pse36=pse36)
    cpu.memory.write(1 << 12, pde_bits | PS | PAGE_ENTRY, 4)
    if gpa is None:
        assert fault_of(cpu, 0x1234, READ) == PF_P | PF_RSVD
    else:
        assert cpu.translate(0x1234).gpa == gpa
    cpu.load_cr4(0)  # PSE=0: the bits are part of a table's address, or ignored
    assert fault_of(cpu, 0x1234, READ) == 0


@pytest.mark.parametrize(
    ("level", "bit", "features", "reserved"),
    [
        (4, 7, {}, True),
        (3, 7, {"gbpages": False}, True),
        (1, 7, {}, False),
        (4, 45, {}, False),
        (4, 46, {}, True),
        (1, 51, {}, True),
        (1, 52, {}, False),
        (1, 62, {}, False),
        (2, 51, {"maxphyaddr": 52}, False),
    ],
)
def test_reserved_bits_of_64_bit_entries(level, bit, features, reserved):
    cpu, _ = small_cpu(**features)
    where = (5 - level) << 12
    cpu.memory.write(where, cpu.memory.read(where, 8) | 1 << bit, 8)
    try:
        cpu.translate(0)
        code = 0
    except oracle.PageFault as fault:
        code = fault.error_code
    assert (code == PF_P | PF_RSVD) == reserved


def test_bits_52_to_62_are_reserved_in_pae_entries():
    cpu, leaf = small_cpu("pae")
    cpu.memory.write(leaf, 1 << 59 | PAGE_ENTRY, 8)
    assert fault_of(cpu, 0, READ, user=True) == PF_P | PF_RSVD | PF_U


def test_not_present_above_hides_reserved_below():
    cpu, leaf = small_cpu()
    cpu.memory.write(leaf - 0x1000, 1 << 51, 8)  # not present: its other bits are ignored
    assert fault_of(cpu, 0, FETCH) == PF_I
    cpu.memory.write(leaf - 0x1000, 1 << 51 | P, 8)
    assert fault_of(cpu, 0, FETCH) == PF_P | PF_RSVD | PF_I


@pytest.mark.parametrize(("level", "size"), [(2, 2 << 20), (3, 1 << 30)])
def test_large_pages(level, size):
    cpu, _ = small_cpu(frames=1 << 20)
    where = (5 - level) << 12
    cpu.memory.write(where, size | PS | 1 << 12 | PAGE_ENTRY, 8)
    t = cpu.translate(0x12345)
    assert (t.gpa, t.page_size) == (size + 0x12345, size)
    cpu.memory.write(where, size | PS | 1 << 13 | PAGE_ENTRY, 8)
    assert fault_of(cpu, 0x12345, READ) == PF_P | PF_RSVD


@pytest.mark.parametrize(("mode", "bad", "good"), [("64", 1 << 47, (1 << 47) - 1), ("la57", 1 << 56, 1 << 47)])
def test_canonical_addresses(mode, bad, good):
    cpu, _ = small_cpu(mode)
    for address in (bad, ~bad % (1 << 64), 1 << 63):
        with pytest.raises(oracle.GeneralProtection):
            cpu.read(address)
    for address in (good, ~good % (1 << 64)):
        with pytest.raises(oracle.PageFault):
            cpu.read(address)


def test_protection_keys():
    cpu, leaf = small_cpu()
    cpu.load_cr4(CR4_PAE | CR4_PKE)
    cpu.memory.write(leaf, 5 << 59 | 16 << 12 | PAGE_ENTRY, 8)
    cpu.pkru = 2 << 10  # WD of key 5
    assert fault_of(cpu, 0, WRITE, user=True) == PF_P | PF_W | PF_U | PF_PK
    assert fault_of(cpu, 0, WRITE) == PF_P | PF_W | PF_PK
    cpu.read(0, 1, user=True)
    cpu.load_cr0(CR0_PG | 0x11)  # WP=0 exempts the supervisor
    cpu.write(0, 0, 1)
    cpu.pkru = 1 << 10  # AD of key 5
    assert fault_of(cpu, 0, READ) == PF_P | PF_PK
    assert cpu.fetch(0, user=True) == 16 << 12
    cpu.memory.write(leaf, 5 << 59 | 16 << 12 | P, 8)  # a supervisor page has no key
    cpu.read(0, 1)
    assert fault_of(cpu, 0, READ, user=True) == PF_P | PF_U


def test_smap_and_smep():
    cpu, _ = small_cpu()
    cpu.load_cr4(CR4_PAE | CR4_SMAP | CR4_SMEP)
    assert fault_of(cpu, 0, READ) == PF_P
    assert fault_of(cpu, 0, WRITE) == PF_P | PF_W
    assert fault_of(cpu, 0, FETCH) == PF_P | PF_I
    cpu.ac = True
    cpu.read(0, 1)
    cpu.write(0, 0, 1)
    assert fault_of(cpu, 0, FETCH) == PF_P | PF_I


def test_fetch_bit_of_the_error_code():
    """NXE with PAE-format entries, or SMEP in any mode; otherwise a fetch reports like a read."""
    cpu, _ = small_cpu("32")
    unmapped = 5 << 22
    assert fault_of(cpu, unmapped, FETCH) == 0
    cpu.load_cr4(CR4_SMEP)
    assert fault_of(cpu, unmapped, FETCH) == PF_I
    cpu, _ = small_cpu("pae")
    assert fault_of(cpu, 1 << 30, FETCH, user=True) == PF_I | PF_U
    cpu.load_efer(0)
    assert fault_of(cpu, 1 << 30, FETCH, user=True) == PF_U


def test_pae_root_entries_are_those_of_the_last_load():
    cpu, _ = small_cpu("pae")
    cpu.memory.write(1 << 12, 0, 8)
    cpu.read(0, 1)
    cpu.memory.write((1 << 12) + 8, P | U, 8)
    with pytest.raises(oracle.GeneralProtection):
        cpu.load_cr3(1 << 12)
    cpu.read(0, 1)
    cpu.memory.write((1 << 12) + 8, 0, 8)
    cpu.load_cr3(1 << 12)
    assert fault_of(cpu, 0, READ) == 0


def test_device_access_sets_accessed_and_dirty():
    cpu, leaf = small_cpu()
    cpu.memory.write(leaf, 0x100 << 12 | PAGE_ENTRY, 8)
    with pytest.raises(oracle.MMIOAccess) as caught:
        cpu.write(8, 1)
    assert caught.value.gpa == 0x100008
    assert cpu.memory.read(leaf, 1) == PAGE_ENTRY | A | D


def test_table_outside_memory_is_not_present():
    cpu, leaf = small_cpu()
    cpu.memory.write(leaf - 0x1000, 0x100 << 12 | PAGE_ENTRY, 8)
    assert fault_of(cpu, 0, WRITE, user=True) == PF_W | PF_U
    assert cpu.memory.read(leaf - 0x1000, 1) == PAGE_ENTRY
