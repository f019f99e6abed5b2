"""INVPCID: what it refuses, against the oracle, in every mode and design; and what it drops of a modelled TLB."""

import numpy as np
import oracle
import pytest
from oracle import CR4_PCIDE, INVPCID, OK, UNDEFINED
from tlb_machine import DATA_A, DATA_B, DATA_C, DESIGNS, MODES, X, Y, invariants, machine, pages, start

import shadowcore as sc

ADDRESSES = [X, 1 << 46, 1 << 47, (1 << 64) - (1 << 47), (1 << 64) - 4096, 1 << 56, (1 << 64) - (1 << 56), 1 << 63]


def refusals(features):
    """(type, descriptor, address, user)"""
    for kind in (0, 1, 2, 3, 4, 5, 16, 255):
        for descriptor in (0, 7, 0xFFF, 0x1000, 7 | 1 << 63):
            for address in ADDRESSES:
                for user in (0, 1):
                    yield kind, descriptor, address, user


@pytest.mark.parametrize("pcide", [False, True])
@pytest.mark.parametrize("mode", ["off", *MODES])
@pytest.mark.parametrize("mmu", DESIGNS)
def test_what_is_refused(mmu, mode, pcide):
    """As an operation, and as a method: the oracle's answers. Nothing else of the processor changes."""
    if pcide and mode not in ("64", "la57"):
        pytest.skip("there are no PCIDs outside of long mode")
    for has in (True, False):
        features = {"invpcid": has}
        vm, tables = machine(mmu, "64" if mode == "off" else mode, features=sc.Features(**features))
        model = oracle.Cpu(oracle.Memory((0, 8)), oracle.Features(**features))
        cpu = vm.vcpus[0]
        if mode != "off":
            tables.map(X, DATA_A, 4096, "rwx")
            start(vm, tables, cr4=CR4_PCIDE * pcide)
        model.cr0, model.cr4, model.efer = cpu.cr0, cpu.cr4, cpu.efer
        assert model.mode == mode
        rows = list(refusals(features))
        ops = np.zeros(len(rows), sc.OP_DTYPE)
        for i, (kind, descriptor, address, user) in enumerate(rows):
            ops[i] = (sc.Op.INVPCID, user, kind, address, descriptor)
        wanted = [model.step(INVPCID, address, pcid, kind, user)[0] for kind, pcid, address, user in rows]
        before = vm.stats.invpcid, vm.stats.gp_guest
        assert cpu.run(ops).outcome.tolist() == wanted
        assert (UNDEFINED in wanted) != has
        assert vm.stats.invpcid - before[0] == wanted.count(OK)
        assert vm.stats.gp_guest - before[1] == wanted.count(oracle.GENERAL_PROTECTION)
        for (kind, descriptor, address, user), outcome in list(zip(rows, wanted, strict=True))[::7]:
            cpu.cpl = 3 * user
            raises = {OK: None, UNDEFINED: sc.UndefinedInstruction}.get(outcome, sc.GeneralProtection)
            if raises:
                with pytest.raises(raises):
                    cpu.invpcid(kind, descriptor, address)
            else:
                cpu.invpcid(kind, descriptor, address)
        assert vm.audit().ok


def test_what_goes():
    """Exactly what SDM 4.10.4.1 lists, of entries under two PCIDs, one of them global."""
    for kind, pcid, address, stay in [
        (0, 1, X, {(X, 2), (Y, 1), (Y + 0x1000, 1), (Y, 2)}),
        (0, 1, Y + 0x1000, {(X, 1), (X, 2), (Y, 1), (Y + 0x1000, 1), (Y, 2)}),  # a global one
        (0, 3, X, {(X, 1), (X, 2), (Y, 1), (Y + 0x1000, 1), (Y, 2)}),
        (1, 2, 0, {(X, 1), (Y, 1), (Y + 0x1000, 1)}),
        (2, 0, 0, set()),
        (3, 0, 0, {(Y + 0x1000, 1)}),
    ]:
        vm, tables = machine("native")
        tables.map(X, DATA_A, 4096, "rwx")
        tables.map(Y, DATA_B, 4096, "rwx")
        tables.map(Y + 0x1000, DATA_C, 4096, "rwx", global_=True)
        cpu = start(vm, tables, cr4=CR4_PCIDE | oracle.CR4_PGE)
        for each in (1, 2):
            cpu.cr3 = tables.root | each
            for va in (X, Y, Y + 0x1000):
                cpu.read(va)
        held = {(row["page"].item(), row["pcid"].item()) for row in cpu.tlb}
        assert held == {(X, 1), (X, 2), (Y, 1), (Y, 2), (Y + 0x1000, 1)}
        cpu.invpcid(kind, pcid, address)
        assert {(row["page"].item(), row["pcid"].item()) for row in cpu.tlb} == stay, (kind, pcid)
        assert vm.audit().ok


@pytest.mark.parametrize("kind", range(4))
def test_a_lost_flush_is_found(kind):
    vm, tables = machine("native")
    tables.map(X, DATA_A, 4096, "rwx")
    cpu = start(vm, tables)
    cpu.read(X)
    vm.mmu.lose_flushes("invlpg")
    cpu.invpcid(kind, 0, X)
    assert pages(cpu) == [X]
    assert invariants(vm) == {"I8"}


@pytest.mark.parametrize(("mmu", "exits"), [("native", 0), ("cached", 0), ("flush", 1), ("unsync", 1), ("adaptive", 0)])
@pytest.mark.parametrize("kind", range(4))
def test_exits_are_those_of_invlpg(mmu, exits, kind):
    """One control intercepts both (SDM vol. 3, 25.1.3), and a table that was edited is seen anew."""
    vm, tables = machine(mmu)
    tables.map(X, DATA_A, 4096, "rwx")
    cpu = start(vm, tables)
    assert cpu.read(X) == DATA_A
    entry = tables.entry(X, 1)
    vm.write_physical(entry.gpa, (entry.value ^ DATA_A ^ DATA_B).to_bytes(8, "little"))
    before = vm.stats.exits["invlpg"]
    cpu.invpcid(kind, 0, X)
    assert vm.stats.exits["invlpg"] - before == exits
    assert cpu.read(X) == DATA_B
    assert vm.audit().ok
