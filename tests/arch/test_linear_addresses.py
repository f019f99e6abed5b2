"""Linear addresses that do not exist: every entry point that takes one raises #GP where it is not canonical (SDM volume
1, 3.3.7.1), or truncates it to 32 bits below 4-level paging."""

import ctypes

import numpy as np
import pytest
from guest2007 import DATA, PAGE, USER, Guest, every_mode
from operations import operations

import shadowcore as sc
from shadowcore.studies.explain import explain

LONG = ["64", "la57"]
EVERY = ["native", "cached", "flush", "unsync", "adaptive", "nested", "agile"]
COLUMNS = ("outcome", "error_code", "gpa", "value", "exits", "emulated")
NOWHERE = (1 << 64) - 1

long_modes = pytest.mark.parametrize("mode", LONG)
every_design = pytest.mark.parametrize("design", EVERY)


def aliases(mode):
    """Addresses that differ from USER in bits which no table is indexed by."""
    width = 48 if mode == "64" else 57
    return [USER | 1 << width, USER | 1 << 63, USER | (1 << 64) - (1 << width), USER | 1 << 62 | 1 << width]


def refused(call, *args):
    with pytest.raises(sc.GeneralProtection):
        call(*args)


@every_design
@long_modes
def test_calls_refuse_what_is_not_canonical(mode, design):
    """Whether the address was met before or not."""
    guest = Guest(mode, design)
    cpu = guest.cpu
    for _ in range(2):
        for va in aliases(mode):
            for access in "rwx":
                refused(cpu.translate, va, access)
                refused(sc.embed.translate, cpu, va, access)
            refused(cpu.walk_levels, va)
            refused(cpu.read, va)
            refused(cpu.write, va, 1)
            refused(cpu.fetch, va)
            refused(cpu.cmpxchg, va, 0, 1)
            refused(cpu.modify, va, "add", 1)
            assert explain(guest.vm, va).fault == "#GP"
            assert not explain(guest.vm, va).steps
            with pytest.raises(sc.ConfigError, match="canonical"):
                guest.tables.walk(va)
        cpu.read(USER)
        cpu.write(USER, 5)
        cpu.fetch(USER)
    assert cpu.read(USER) == 5


@every_mode
def test_walk_levels(mode):
    """The entries that a walk examines, of an address that is canonical, in all of its bits or in those that count."""
    guest = Guest(mode)
    guest.cpu.read(USER)  # accessed bits
    walked = guest.cpu.walk_levels(USER)
    assert walked == list(guest.cpu.translate(USER).levels)
    if mode in LONG:
        edge = 1 << (46 if mode == "64" else 55)
        for va in (2 * edge - 1, (1 << 64) - 2 * edge, NOWHERE, 0):
            assert guest.cpu.walk_levels(va)
        for va in (2 * edge, (1 << 64) - 2 * edge - 1):
            refused(guest.cpu.walk_levels, va)
    else:
        for high in (1 << 32, 1 << 63, NOWHERE - 0xFFFF_FFFF):
            assert guest.cpu.walk_levels(USER | high) == walked
            assert guest.cpu.translate(USER | high).gpa == DATA
            assert guest.cpu.read(USER | high) == guest.cpu.read(USER)
            assert guest.cpu.run(operations((sc.Op.READ, USER | high, 0))).gpa.tolist() == [DATA]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
@every_design
@long_modes
def test_batches_refuse_what_is_not_canonical(mode, design, data, warm):
    """Beside accesses to the page whose tables such an address would be translated by: few of them and many, before
    those and after them, by loads, stores and fetches."""
    guest = Guest(mode, design)
    if warm:
        guest.cpu.write(USER, 0)
    kinds = (sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH)
    rows = []
    for number, va in enumerate(aliases(mode)):
        rows += [(op, va + 8 * k, 0xBAD) for op in kinds for k in range(3)]
        rows += [(op, USER + (number % 2) * PAGE + 8, 1) for op in kinds] * 8
        rows += [(kinds[number % 3], va + 16, 0xBAD)]
    ops = operations(*rows)
    ops = np.concatenate([ops, np.tile(ops, 100)])
    bad = ops["addr"] >> 12 != (ops["addr"] & 0x7FFF_FFFF) >> 12
    for run in (
        lambda: guest.cpu.run(ops, data=data),
        lambda: sc.embed.access_many(
            guest.cpu, ops["addr"].copy(), ops["op"].copy(), value=ops["value"].copy(), data=data
        ),
    ):
        count = guest.vm.stats.gp_guest
        result = run()
        np.testing.assert_array_equal(result.outcome, np.where(bad, 2, 0))
        np.testing.assert_array_equal(result.gpa == NOWHERE, bad)
        assert not result.exits[bad].any()
        assert guest.vm.stats.gp_guest - count == bad.sum()
    assert not (guest.vm.memory.words == 0xBAD).any()


@every_design
@long_modes
def test_batches_of_addresses_that_are_not_canonical_alone(mode, design):
    """Nothing was met before: the first access to a page is the one that is refused."""
    for op in (sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH):
        guest = Guest(mode, design)
        rows = [(op, va + i * PAGE, 0xBAD) for i in range(8) for va in aliases(mode)]
        result = guest.cpu.run(operations(*rows))
        assert result.outcome.tolist() == [2] * len(rows)
        assert guest.vm.stats.pf_taken == 0
        assert not (guest.vm.memory.words == 0xBAD).any()


@every_design
@long_modes
def test_the_table_of_functions_refuses_what_is_not_canonical(mode, design):
    from capi import API, Access, Accesses, C, Outcome, made

    guest = Guest(mode, design)
    handle = sc.embed.handle(guest.vm)
    try:
        for _ in range(2):
            for va in aliases(mode):
                for kind in ("SC_READ", "SC_WRITE", "SC_FETCH", "SC_ADD"):
                    for flags in (0, C["SC_DATA"]):
                        access = made(Access, gva=va, kind=C[kind], size=8, flags=flags)
                        for function in (API.access, API.translate):
                            outcome = made(Outcome)
                            assert function(handle, access, ctypes.byref(outcome)) == C["SC_GENERAL_PROTECTION"]
                            assert outcome.gpa == NOWHERE
            gva = np.array([USER, *aliases(mode), USER + 8], np.uint64)
            outcomes = np.zeros(len(gva), np.uint8)
            many = made(Accesses, count=len(gva), gva=gva.ctypes.data, all_size=8, outcome=outcomes.ctypes.data)
            assert API.access_many(handle, ctypes.byref(many)) == 0
            assert outcomes.tolist() == [0, 2, 2, 2, 2, 0]
    finally:
        sc.embed.release(handle)


@pytest.mark.parametrize("tlb", [None, sc.TLB()], ids=["walks", "tlb"])
@long_modes
def test_invlpg_of_what_is_not_canonical_does_nothing(mode, tlb):
    """It is a NOP to the guest (SDM volume 2, INVLPG), and an exit to `flush`."""
    guest = Guest(mode, "flush", tlb=tlb)
    guest.cpu.read(USER)
    leaf = guest.leaf(USER)
    assert leaf
    for va in aliases(mode):
        guest.cpu.invlpg(va)
        guest.cpu.run(operations((sc.Op.INVLPG, va, 0)))
        assert guest.leaf(USER) == leaf
    assert guest.vm.stats.exits["invlpg"] == 2 * len(aliases(mode))
    guest.cpu.invlpg(USER)
    assert not guest.leaf(USER)
