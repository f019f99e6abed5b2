"""Several processors in one VM: whose an operation is, what one does to the others, and modes beside each other."""

import numpy as np
import oracle
import pytest
from oracle import CR0, CR0_PE, CR0_PG, CR3, CR4, CR4_PCIDE, INVLPG, READ, WRITE, D, P, U, W
from several_vcpus import ALIGNED, FLUSHES, OPS, delta, ops, pair
from tlb_machine import (
    ACC_W,
    DATA_A,
    DATA_B,
    DATA_C,
    DESIGNS,
    DIRECT,
    KEEP,
    MIB,
    MODES,
    X,
    Y,
    hits,
    invariants,
    leaf,
    pages,
    start,
)

import shadowcore as sc

# The fields of OP_DTYPE where a C compiler puts them, and one more in what that leaves free.
IN_THE_GAP = np.dtype(
    {
        "names": [*sc.OP_DTYPE.names, "vcpu"],
        "formats": ["u1", "u1", "u1", "<u8", "<u8", "u1"],
        "offsets": [0, 1, 2, 8, 16, 3],
        "itemsize": 24,
    }
)

# -- operations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [OPS, ALIGNED, IN_THE_GAP])
@pytest.mark.parametrize("mmu", DESIGNS)
def test_operations_say_who_performs_them(mmu, dtype):
    vm, tables, _ = pair(mmu, vcpus=3, same=False)
    registers = tables.registers
    loads = [(sc.Op.EFER, "efer"), (CR4, "cr4"), (CR3, "cr3"), (CR0, "cr0")]
    rows = [(2, op, 0, registers[name]) for op, name in loads]
    rows += [(2, READ, X, 0), (0, READ, X, 0), (1, READ, X, 0), (2, WRITE, Y, 7), (1, READ, DATA_B, 0), (0, READ, Y, 0)]
    result = vm.vcpus[1].run(ops(*rows, dtype=dtype))
    assert not result.outcome.any()
    # Paging is on in 0 and 2, off in 1, which so reads at the address itself.
    assert result.value[4:].tolist() == [DATA_A, DATA_A, X, 0, 7, 7]
    assert result.gpa[4:].tolist() == [DATA_A, DATA_A, X, DATA_B, DATA_B, DATA_B]
    assert [cpu.mode for cpu in vm.vcpus] == ["64", "off", "64"]
    assert [cpu.number for cpu in vm.vcpus] == [0, 1, 2]
    assert vm.audit().ok


def test_without_the_field_it_is_the_one_that_is_asked():
    vm, _, _ = pair(same=False)
    plain = np.zeros(1, dtype=sc.OP_DTYPE)
    plain["addr"], plain["size"] = X, 8
    assert vm.vcpus[0].run(plain).value.tolist() == [DATA_A]
    assert vm.vcpus[1].run(plain).value.tolist() == [X]
    # With it, who is asked does not matter.
    assert [cpu.run(ops((1, READ, X, 0))).value.tolist() for cpu in vm.vcpus] == [[X], [X]]


def test_faults_are_those_of_who_performs():
    _, _, cpus = pair()
    result = cpus[0].run(ops((1, READ, 0x7000_0000, 0), (0, READ, X, 0), (0, INVLPG, X, 0), (1, WRITE, 0x7000_1000, 0)))
    assert result.outcome.tolist() == [1, 0, 0, 1]
    assert result.error_code.tolist() == [0, 0, 0, 2]
    assert [cpu.cr2 for cpu in cpus] == [0, 0x7000_1000]


@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("bad", [2, 3, 64, 255])
def test_bad_vcpu(mmu, bad):
    """A number that no vcpu has is an error of the caller's, named, before anything is run."""
    vm, _, cpus = pair(mmu)
    before = vm.stats.as_dict(), vm.memory.bytes.copy(), [len(cpu.tlb) for cpu in cpus]
    rows = ops((0, WRITE, X, 1), (1, CR3, 0, 0), (bad, READ, X, 0), (0, WRITE, X, 2))
    with pytest.raises(sc.ConfigError, match=rf"ops\[2\].*vcpu {bad}"):
        cpus[0].run(rows)
    assert vm.stats.as_dict() == before[0]
    assert np.array_equal(vm.memory.bytes, before[1])
    assert [len(cpu.tlb) for cpu in cpus] == before[2]
    assert vm.audit().ok


@pytest.mark.parametrize("kind", ["u2", "i1", "<u8", "?"])
def test_bad_field(kind):
    _, _, cpus = pair()
    rows = np.zeros(1, dtype=[*sc.OP_DTYPE.descr, ("vcpu", kind)])
    with pytest.raises(sc.ConfigError, match="vcpu"):
        cpus[0].run(rows)


def test_number_of_vcpus():
    for count in (0, 65, 2.0, True):
        with pytest.raises(sc.ConfigError, match="vcpus"):
            sc.VM(memory=MIB, vcpus=count)
    vm = sc.VM(memory=MIB, vcpus=64)
    rows = ops(*[(i, WRITE, i << 12, i) for i in range(64)])
    assert not vm.vcpus[0].run(rows).outcome.any()
    assert vm.memory.words[: 64 * 512 : 512].tolist() == list(range(64))
    assert vm.audit().ok


# -- what one does to the others -------------------------------------------------------------------------


@pytest.mark.parametrize("tlb", [True, False])
def test_store_to_a_table_of_another(tlb):
    """`cached`: a store by one to a table that another walks is emulated; the other's entry, in the shadow and in the
    TLB, is gone."""
    vm, tables, (first, second) = pair(tlb=tlb)
    second.read(DIRECT + leaf(tables, X))
    assert first.read(X) == DATA_A
    assert pages(first) == ([X] if tlb else [])
    count = delta(vm, ("pf_emulate", *FLUSHES), second.write, DIRECT + leaf(tables, X), DATA_B | P | W | U)
    assert count == (1, 1, 1)
    assert pages(first) == []
    assert first.read(X) == DATA_B
    assert second.read(X) == DATA_B
    assert vm.audit().ok


def test_stale_in_native_until_each_invalidates():
    """Without a shadow the TLBs are each vcpu's own: an INVLPG by one is nothing to another."""
    vm, tables, (first, second) = pair("native")
    assert first.read(X) == second.read(X) == DATA_A
    second.write(DIRECT + leaf(tables, X), DATA_B | P | W | U)
    second.invlpg(X)
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_B)
    first.cr3 = first.cr3
    assert (first.read(X), second.read(X)) == (DATA_B, DATA_B)
    assert vm.stats.remote_tlb_flush == 0
    assert vm.audit().ok


@pytest.mark.parametrize("tlb", [True, False])
def test_stale_in_flush_until_each_invalidates(tlb):
    """`flush`: each vcpu has shadow tables of its own addresses, which its own INVLPG mends."""
    vm, tables, (first, second) = pair("flush", tlb=tlb)
    assert first.read(X) == second.read(X) == DATA_A
    second.write(DIRECT + leaf(tables, X), DATA_B | P | W | U)
    second.invlpg(X)
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_B)
    first.invlpg(X)
    assert (first.read(X), second.read(X)) == (DATA_B, DATA_B)
    assert vm.audit().ok


def test_write_protection_reaches_all():
    """One walks through a frame that another has writable in its TLB: the entry is dropped, the flush remote, and
    the other's next store is emulated."""

    def run(*lost, vcpus=2):
        vm, tables, cpus = pair(vcpus=vcpus)
        first, last = cpus[0], cpus[-1]
        table = leaf(tables, Y) & ~0xFFF
        tables.set_entry(X, 1, table | P | W | D)
        first.write(X + 8 * 500, 0)
        assert first.tlb["access"].tolist() == [ACC_W | 1]
        vm.mmu.lose_flushes(*lost)
        count = delta(vm, ("rmap_protected", *FLUSHES), last.read, Y)
        entries = len(first.tlb)
        broken = invariants(vm)
        first.write(X + (Y >> 9 & 0xFF8), DATA_C | P | W | U)
        for cpu in cpus:
            cpu.invlpg(Y)
        return count, entries, broken, vm.stats.pf_emulate, last.read(Y)

    assert run() == ((1, 1, 1), 0, set(), 1, DATA_C)
    assert run(vcpus=3) == ((1, 1, 1), 0, set(), 1, DATA_C)
    # Alone there is nobody to reach; the flush is the same.  (Its TLB has Y by then.)
    assert run(vcpus=1) == ((1, 1, 0), 1, set(), 1, DATA_C)
    # Counted, but lost: the other goes on writing to a table behind the MMU's back.
    assert run("protect") == ((1, 1, 1), 1, {"I8"}, 0, DATA_B)


@pytest.mark.parametrize("mmu", ["cached", "native", "unsync"])
def test_floods_are_counted_by_each(mmu):
    """Stores by two in turn are each one's own sequence: of three by one the third zaps the page that both use."""
    vm, tables, (first, second) = pair(mmu)
    assert first.read(X) == second.read(X) == DATA_A
    slot = DIRECT + (leaf(tables, X) | 0xFF8)

    def flooded(cpu):
        return delta(vm, ("mmu_flooded", "mmu_shadow_zapped"), cpu.write, slot, 0)

    zapped = (1, 1) if mmu == "cached" else (0, 0)
    assert [flooded(first), flooded(second), flooded(first), flooded(second)] == [(0, 0)] * 4
    before = vm.stats.pf_taken
    assert flooded(second) == zapped
    # Both find their leaf table gone, the one that walks first puts another in its place, for both.
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_A)
    assert vm.stats.pf_taken - before == (2 if mmu == "cached" else 0)
    assert vm.audit().ok


def test_user_store_to_a_table_of_another():
    """A store from user mode says that the frame is no table any more: its shadow pages go, whoever uses them."""
    vm, tables, (first, second) = pair()
    table = leaf(tables, X) & ~0xFFF
    tables.set_entry(Y, 1, table | P | W | U | D)
    assert first.read(X) == DATA_A
    assert delta(vm, ("mmu_unprotect", "pf_emulate"), second.write, Y + 0xFF8, 0, user=True) == (1, 0)
    assert first.read(X) == DATA_A
    assert vm.audit().ok


def test_device_store_reaches_all():
    vm, tables, cpus = pair(vcpus=3)
    assert [cpu.read(X) for cpu in cpus] == [DATA_A] * 3
    entry = (DATA_B | P | W | U).to_bytes(8, "little")
    assert delta(vm, FLUSHES, vm.write_physical, leaf(tables, X), entry) == (1, 1)
    assert [len(cpu.tlb) for cpu in cpus] == [0] * 3
    assert [cpu.read(X) for cpu in cpus] == [DATA_B] * 3


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_dirty_log_reaches_all(vcpus):
    """Clearing a log asks each vcpu to flush; stores by any are logged again."""
    vm, _, cpus = pair(vcpus=vcpus)
    vm.memory.start_dirty_log()
    for cpu in cpus:
        cpu.write(X, 1)
    remote = vcpus if vcpus > 1 else 0
    assert delta(vm, FLUSHES, vm.memory.clear_dirty_log) == (vcpus, remote)
    assert [len(cpu.tlb) for cpu in cpus] == [0] * vcpus
    for cpu in cpus:
        vm.memory.clear_dirty_log()
        cpu.write(X, 2)
        assert np.flatnonzero(vm.memory.dirty_log()).tolist() == [DATA_A >> 12]
    assert vm.audit().ok


def test_own_flushes_are_not_remote():
    """Loads of CR3 and INVLPG are a vcpu's own; one's does nothing to the TLB of another."""
    vm, tables, (first, second) = pair()
    first.read(X)
    second.read(X)
    assert delta(vm, FLUSHES, setattr, second, "cr3", tables.cr3) == (1, 0)
    assert delta(vm, FLUSHES, second.invlpg, X) == (0, 0)
    assert (pages(first), pages(second)) == ([X], [])
    second.read(X)
    second.cr4 ^= 1 << 7
    assert (pages(first), pages(second)) == ([X], [])
    assert hits(vm, first.read, X) == (1, 0)


@pytest.mark.parametrize("mode", MODES)
def test_cr3_load_in_flush_throws_away_everybodys_tables(mode):
    """There is one pool: a load of CR3 by one costs the other its leaves, each zap a remote flush; nothing that the
    guest can see."""
    vm, tables, (first, second) = pair("flush", mode)
    first.read(X)
    second.read(X)
    second.read(Y)
    zapped, flushes, remote = delta(vm, ("mmu_shadow_zapped", *FLUSHES), setattr, second, "cr3", tables.cr3)
    assert (zapped, flushes, remote) == (3, 4, 3)
    assert (pages(first), pages(second)) == ([], [])
    assert delta(vm, ("pf_taken",), first.read, X) == (1,)
    assert vm.audit().ok


# -- modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("tlb", [sc.TLB(), None])
def test_every_mode_at_once(mmu, tlb):
    """Five vcpus, one in each mode, in one memory: each sees the others' stores, to data and to its tables."""
    vm = sc.VM(memory=8 * MIB, mmu=mmu, tlb=tlb, vcpus=5)
    spaces = []
    for i, mode in enumerate(MODES):
        tables = sc.PageTables(vm, mode, allocate=range(0x400 + 64 * i, 0x440 + 64 * i))
        tables.map(X, DATA_A, 4096, "rwx", dirty=True)
        tables.map(Y, DATA_B + (i << 12), 4096, "rwx", dirty=True)
        tables.map(DIRECT, 0, 8 * MIB, "rwx", dirty=True)
        start(vm, tables, i)
        spaces.append(tables)
    cpus = vm.vcpus
    flat = cpus[4]
    assert [cpu.mode for cpu in cpus] == [*MODES, "off"]

    for i, cpu in enumerate(cpus):
        cpu.write(X if i < 4 else DATA_A, 100 + i)
        assert [c.read(X) for c in cpus[:4]] + [flat.read(DATA_A)] == [100 + i] * 5
    for i, tables in enumerate(spaces):
        assert cpus[i].read(Y) == 0
        entry = tables.entry(Y)
        for j, editor in enumerate(cpus):
            # Each in turn, the one without paging too, makes Y of vcpu i lead to a frame of its own.
            vm.memory.words[(DATA_C >> 3) + 512 * j] = j + 1
            where = entry.gpa if editor is flat else DIRECT + entry.gpa
            editor.write(where, DATA_C + (j << 12) | entry.value & 0xFFF, tables.format.entry_size)
            cpus[i].invlpg(Y)
            assert (i, j, cpus[i].read(Y)) == (i, j, j + 1)
    assert vm.audit().ok
    if mmu == "cached":
        levels = {int(page["glevels"]) for page in vm.mmu.pages}
        assert levels == {0, 2, 3, 4, 5}


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_modes_that_share_tables(mmu):
    """PAE and 4-level directories have one format: of one directory there are shadow pages for each, and a store by
    either reaches both."""
    vm, tables, _ = pair(mmu, same=False)
    first, second = vm.vcpus
    directory = tables.entry(X, 2).gpa & ~0xFFF
    vm.memory.words[DATA_C // 8 : DATA_C // 8 + 4] = [directory | P, 0, 0, 0]
    second.cr4 = 1 << 5
    second.cr3 = DATA_C
    second.cr0 = CR0_PG | CR0_PE | 0x10
    assert (first.mode, second.mode) == ("64", "pae")
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_A)
    first.write(DIRECT + leaf(tables, X), DATA_B | P | W)
    first.invlpg(X)
    second.invlpg(X)
    assert (first.read(X), second.read(X)) == (DATA_B, DATA_B)
    second.write(X, 5)
    assert tables.entry(X).value & D
    assert vm.audit().ok


def test_each_has_its_own_rights():
    """Registers that judge rights are each vcpu's own, on shared tables."""
    vm, tables, (first, second) = pair()
    tables.set_entry(X, 1, DATA_A | P | U)
    first.cr0 &= ~oracle.CR0_WP
    first.write(X, 9)
    with pytest.raises(sc.PageFault) as caught:
        second.write(X, 10)
    assert caught.value.error_code == 3
    second.cr4 |= oracle.CR4_SMAP
    with pytest.raises(sc.PageFault):
        second.read(X)
    assert first.read(X) == 9
    assert second.read(X, user=True) == 9
    assert vm.audit().ok


def test_pcids_are_each_vcpus_own():
    """The same PCID names different things on two vcpus, and so do their TLBs."""
    vm, tables, (first, second) = pair("native")
    other = sc.PageTables(vm, "64", allocate=range(0x180, 0x1A0))
    other.map(X, DATA_C, 4096, "rw")
    for cpu, space in ((first, tables), (second, other)):
        cpu.cr4 |= CR4_PCIDE
        cpu.cr3 = space.cr3 | 1
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_C)
    second.cr3 = tables.cr3 | 1 | KEEP
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_C)
    second.cr3 = tables.cr3 | 1
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_A)
