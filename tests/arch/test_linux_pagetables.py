"""Page tables of real Linux guests, in four paging modes: every translation that was listed for them.

The listing gives, for each leaf of each root, address, size and leaf bits; for one root also effective
rights by range.  `native` and `cached` have to give the same, by `translate` (no side effect) and by
accesses."""

import numpy as np
import oracle
import pytest
import streams
from oracle import NX, OK, PS, READ, WRITE
from samples import strided

import shadowcore as sc

DESIGNS = {
    "native": "native",
    "cached": sc.Shadow.cached(pool_pages=4096),
    "unsync": sc.Shadow.unsync(pool_pages=4096),
    "adaptive": sc.Shadow.adaptive(pool_pages=4096),
    "nested": "nested",
    "agile": sc.Shadow.agile(pool_pages=4096),
}
# The leaf bits of the listing: W, U, PWT, PCD, A, D, PS, G, NX.
LISTED = NX | oracle.bits(8, 1)


def machine(tables, design):
    vm = streams.machine(tables, DESIGNS[design])
    cpu = vm.vcpus[0]
    streams.set_registers(cpu, tables)
    # The guests run with SMAP: a supervisor read of a user page needs EFLAGS.AC.
    cpu.ac = True
    return vm, cpu


def leaves(tables, number):
    rows = tables["leaf_root"] == number
    return (tables[key][rows] for key in ("leaf_va", "leaf_pa", "leaf_bits"))


def accesses(op, addresses, user=0, size=1):
    ops = np.zeros(len(addresses), dtype=sc.OP_DTYPE)
    ops["op"], ops["user"], ops["size"], ops["addr"] = op, user, size, addresses
    return ops


@strided(5)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", streams.LINUX)
def test_translate_gives_every_listed_leaf(name, design, stride):
    """Before any access: same address, size and bits; the entries on the way are those of the oracle's
    walk; and nothing in memory has changed."""
    tables = streams.linux(name)
    vm, cpu = machine(tables, design)
    reference = streams.oracle_cpu(tables)
    streams.set_registers(reference, tables)
    untouched = streams.frames_of(vm)
    for number, root in enumerate(tables["root"].tolist()):
        cpu.cr3 = root
        reference.load_cr3(root)
        for va, pa, leaf_bits in zip(*(column[::stride].tolist() for column in leaves(tables, number)), strict=True):
            t = cpu.translate(va)
            large = PS if t.page_size > oracle.PAGE else 0
            assert (t.gpa, t.entry & (LISTED & ~PS) | large) == (pa, leaf_bits), hex(va)
            want = reference.translate(va)
            assert t.page_size == want.page_size
            assert t.level == want.levels[-1][0]
            assert (t.writable, t.user, t.executable) == (want.writable, want.user, want.executable)
            # In PAE paging the oracle lists no level 3: its entry is a register.
            assert [tuple(step) for step in t.levels][-len(want.levels) :] == want.levels
    assert streams.different_frames(streams.frames_of(vm), untouched) == []


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", streams.LINUX)
def test_every_leaf_is_reached_by_reads(name, design):
    """The gpa of a read of every leaf, of devices too; for `cached` again when its tables have been built,
    and then without any exit."""
    tables = streams.linux(name)
    vm, cpu = machine(tables, design)
    size = int(tables["nframes"]) * oracle.PAGE
    for number, root in enumerate(tables["root"].tolist()):
        va, pa, _ = leaves(tables, number)
        cpu.cr3 = root
        want = np.where(pa < size, OK, oracle.MMIO)
        ops = accesses(READ, va)
        for again in (False, True):
            result = cpu.run(ops)
            np.testing.assert_array_equal(result.outcome, want)
            np.testing.assert_array_equal(result.gpa, pa)
            if again:
                assert not result.exits[want == OK].any()
        assert vm.audit().ok
        # With the tables built, translate still tells what the guest's tables say, A bits included.
        for address, gpa in zip(va[::97].tolist(), pa[::97].tolist(), strict=True):
            t = cpu.translate(address)
            assert (t.gpa, t.entry & oracle.A) == (gpa, oracle.A)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", streams.LINUX[:3])
def test_rights_by_range(name, design):
    """The listed rights, by translate and by what accesses are granted.  (The 5-level file has no list.)"""
    tables = streams.linux(name)
    vm, cpu = machine(tables, design)
    pages, rights, rows = [], [], set(tables["mem_gfn"].tolist())
    for start, end, listed in tables["range_rights"].tolist():
        va = start
        while va < end:
            t = cpu.translate(va)
            assert (1 | 2 * t.writable | 4 * t.user) == listed, hex(va)
            # Zeros are written below: not over a page table, and not into a device.
            if t.gpa // oracle.PAGE not in rows and t.gpa < int(tables["nframes"]) * oracle.PAGE:
                pages.append(va)
                rights.append(listed)
            va = (va | (t.page_size - 1)) + 1
    assert len(pages) > 1000
    rights = np.array(rights)
    for op, user in ((READ, 0), (READ, 1), (WRITE, 0), (WRITE, 1)):
        granted = np.ones(len(rights), bool)
        if op == WRITE:
            granted &= rights & 2 != 0
        if user:
            granted &= rights & 4 != 0
        result = cpu.run(accesses(op, np.array(pages, dtype=np.uint64), user, 8))
        np.testing.assert_array_equal(result.outcome, np.where(granted, OK, oracle.PAGE_FAULT))
        code = oracle.PF_P | (oracle.PF_W if op == WRITE else 0) | (oracle.PF_U if user else 0)
        np.testing.assert_array_equal(result.error_code, np.where(granted, 0, code))
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", streams.LINUX)
def test_every_kind_of_access_to_a_sample(name, design):
    """Reads, fetches and writes, supervisor and user, of every 11th leaf, one after the other through all
    roots: outcome, error code and address as the oracle's, and the same A and D bits in memory at the
    end."""
    tables = streams.linux(name)
    vm, cpu = machine(tables, design)
    reference = streams.oracle_cpu(tables)
    streams.set_registers(reference, tables)
    reference.ac = True
    frames = tables["mem_gfn"].astype(np.uint64)
    for number, root in enumerate(tables["root"].tolist()):
        cpu.cr3 = root
        reference.load_cr3(root)
        va, pa, _ = (column[::11] for column in leaves(tables, number))
        data = ~np.isin(pa // oracle.PAGE, frames)
        kinds = [(op, user) for op in (READ, oracle.FETCH, WRITE) for user in (1, 0)]
        ops = np.concatenate([accesses(op, va[data] if op == WRITE else va, user) for op, user in kinds])
        want = np.array(reference.run(ops), dtype=np.uint64).T
        result = cpu.run(ops)
        np.testing.assert_array_equal(result.outcome, want[0])
        np.testing.assert_array_equal(result.error_code, want[1])
        np.testing.assert_array_equal(result.gpa, want[2])
    wanted = {gfn: bytes(page) for gfn, page in reference.memory.frames.items() if any(page)}
    assert streams.different_frames(streams.frames_of(vm), wanted) == []
    assert vm.audit().ok
