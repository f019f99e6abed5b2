"""Batches of stores and read-modify-writes to guest tables in use: as on `native`, and as one by one."""

import numpy as np
import pytest
from guest2007 import DATA, MODES, PAGE, RAM, USER, A, D, Guest, P, U, W, every_mode
from operations import WIDE, operations
from twins import CALM, CODES, PAGES, PLACE, WORD, different_frames

import shadowcore as sc
from shadowcore.pagetables import NX


def random_rows(mode, rng, n):
    """Operations on the tables of USER and on its pages: mostly what a kernel does, some of it nonsense."""
    guest = Guest(mode)
    leaf, top = guest.entry(USER) & -PAGE, guest.entry(USER, 2)
    leaves = [
        DATA | P | W | U | A | D,
        DATA + PAGE | P | U | A,
        PLACE | P | W,
        RAM | P | W | U,
        0,
        leaf | P | W | U | A | D,
    ]
    if guest.size == 8:
        leaves.append(NX | DATA | P | W | U | A | D)
    rows = []
    for _ in range(n):
        size = int(rng.choice([1, 2, 4, 8, 16, guest.size]))
        kind = rng.choice(["table", "entry", "page", "top"], p=[0.25, 0.3, 0.4, 0.05])
        if kind == "table":
            va = guest.window(leaf + int(rng.integers(0, PAGES * guest.size)))
        elif kind == "entry":
            va, size = guest.window(leaf + guest.size * int(rng.integers(0, PAGES))), guest.size
        elif kind == "top":
            va, size = guest.window(top + guest.size), guest.size
        else:
            va = USER + int(rng.integers(0, PAGES)) * PAGE + int(rng.choice([0, 0x10, 0xFF8, 0xFFC, 0xFFF]))
        if size == 16 and rng.random() < 0.7:
            va &= -16
        codes = [sc.Op.READ, sc.Op.WRITE, sc.Op.WRITE, sc.Op.CMPXCHG]
        op = int(rng.choice([*codes, *CODES.values()] if size < 16 else codes))
        if op in (sc.Op.AND, sc.Op.OR, sc.Op.XOR, sc.Op.ADD):
            value = (0x1, 0x2, 0x4, 0x1000, WORD - W, WORD - U, 0xFFFF_FF00)[rng.integers(7)]
        else:
            value = int(leaves[rng.integers(len(leaves))])
        expected = int(leaves[rng.integers(len(leaves))])
        rows.append(
            {
                "op": op,
                "user": rng.random() < 0.2,
                "size": size,
                "addr": va,
                "value": value,
                "expected": expected,
                "value_high": value * (size == 16),
                "expected_high": expected * (size == 16),
            }
        )
    return rows


def scalar(cpu, row):
    """One operation of a batch as a call; what `run` would have given for it."""
    arguments = {"size": row["size"], "user": bool(row["user"])}
    value, expected = (row.get(name, 0) | row.get(f"{name}_high", 0) << 64 for name in ("value", "expected"))
    keep = (1 << 8 * row["size"]) - 1
    old = 0
    try:
        if row["op"] == sc.Op.READ:
            old = cpu.read(row["addr"], **arguments)
        elif row["op"] == sc.Op.WRITE:
            cpu.write(row["addr"], value & (keep if row["size"] == 16 else WORD), **arguments)
        elif row["op"] == sc.Op.CMPXCHG:
            was = cpu.cmpxchg(row["addr"], expected, value & (keep if row["size"] == 16 else WORD), **arguments)
            return 0, 0, was
        else:
            name = next(name for name, code in CODES.items() if code == row["op"])
            old = cpu.modify(row["addr"], name, value, **arguments)
        return 0, 0, old
    except sc.PageFault as fault:
        return 1, fault.error_code, 0
    except sc.GeneralProtection:
        return 2, 0, 0
    except sc.MMIOAccess:
        return 3, 0, 0


@pytest.mark.parametrize("seed", range(4))
@every_mode
def test_random_stores_to_live_tables(mode, seed):
    """The shadow's results, and each byte of memory, are those of `native`, in a batch as well as one by one; with
    floods, and without."""
    rng = np.random.default_rng([seed, MODES.index(mode)])
    floods = sc.Shadow.cached(pool_pages=16, min_free=2, refill=4)
    guests = [Guest(mode, mmu, PAGES) for mmu in ("native", CALM, floods, "cached")]
    native, called = guests[0], guests[-1]
    start = native.vm.memory.bytes.copy()
    tables = slice(native.entry(USER) & -PAGE, (native.entry(USER) & -PAGE) + PAGE)
    kinds = set()
    for _ in range(6):
        rows = random_rows(mode, rng, 120)
        ops = operations(*rows, dtype=WIDE)
        results = [guest.cpu.run(ops) for guest in guests[:-1]]
        for result in results[1:]:
            for name in ("outcome", "error_code", "gpa", "value", "value_high"):
                np.testing.assert_array_equal(getattr(result, name), getattr(results[0], name), err_msg=name)
        first = results[0]
        for i, row in enumerate(rows):
            outcome, code, old = scalar(called.cpu, row)
            assert (outcome, code) == (first.outcome[i], first.error_code[i]), (i, row)
            if row["op"] == sc.Op.CMPXCHG:
                if outcome == 0:
                    keep = (1 << 8 * row["size"]) - 1
                    read = int(first.value[i]) | int(first.value_high[i]) << 64
                    assert old is (read == (row["expected"] | row["expected_high"] << 64) & keep)
            else:
                assert old == int(first.value[i]) | int(first.value_high[i]) << 64
        for guest in guests[1:]:
            assert different_frames(guest, native) == []
            assert guest.cpu.cr2 == native.cpu.cr2
            assert guest.vm.audit().ok
        kinds |= {(int(o), int(c)) for o, c in zip(first.outcome, ops["op"], strict=True)}
        assert not results[0].emulated.any()
        assert int(results[1].emulated.sum()) == results[1].stats.pf_emulate > 0
        # Repair the table, for the next round.
        for guest in guests:
            guest.vm.write_physical(tables.start, start[tables].tobytes())
    assert {outcome for outcome, _ in kinds} == {0, 1, 2, 3}
    assert {op for outcome, op in kinds if outcome == 0} == {sc.Op.READ, sc.Op.WRITE, sc.Op.CMPXCHG, *CODES.values()}


@every_mode
def test_batch_of_compare_and_exchange(mode):
    """value, the upper halves, exits and emulated stores of each row; without the optional fields they are 0."""
    guest = Guest(mode, CALM)
    gpa = guest.entry(USER + 16 * PAGE) & -16
    guest.see(gpa)
    guest.cpu.read(USER, 4)
    va = guest.window(gpa)
    low, high = 0x1111_2222_3333_4444, 0x5555_6666_7777_8888
    two = guest.size < 8
    rows = [
        {"op": sc.Op.CMPXCHG, "size": 16, "addr": va, "value": low, "value_high": high},
        {"op": sc.Op.CMPXCHG, "size": 16, "addr": va, "expected": low, "value": 1},
        {
            "op": sc.Op.CMPXCHG,
            "size": 16,
            "addr": va,
            "expected": low,
            "expected_high": high,
            "value": 5,
            "value_high": 6,
        },
        {"op": sc.Op.READ, "size": 16, "addr": va},
        {"op": sc.Op.WRITE, "size": 16, "addr": va, "value": 0, "value_high": 0},
        {"op": sc.Op.CMPXCHG, "size": 16, "addr": va + 8, "value": 1},
        {"op": sc.Op.CMPXCHG, "size": 8, "addr": va + 8, "value": high, "value_high": WORD},
        {"op": sc.Op.ADD, "size": 1, "addr": va + 8, "value": 0x178},
    ]
    result = guest.cpu.run(operations(*rows, dtype=WIDE))
    assert result.outcome.tolist() == [0, 0, 0, 0, 0, 2, 0, 0]
    assert result.value.tolist() == [0, low, low, 5, 0, 0, 0, 0x88]
    assert result.value_high.tolist() == [0, high, high, 6, 0, 0, 0, 0]
    assert guest.vm.read_physical(gpa, 16) == bytes(8) + (high - 0x88).to_bytes(8, "little")
    assert guest.vm.audit().ok
    # The first store is longer than an entry and zaps the table, so that those after it meet a frame like any other.
    assert result.emulated.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert result.exits.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert result.stats.pf_emulate == 1

    guest.cpu.read(USER + PAGE, 4)
    narrow = guest.cpu.run(operations({"op": sc.Op.CMPXCHG, "size": 8, "addr": va, "value": 3}))
    assert (narrow.value.tolist(), narrow.value_high, narrow.emulated.tolist()) == ([0], None, [1])
    assert guest.vm.read_physical(gpa, 8) == bytes([3]) + bytes(7)
    assert narrow.stats.mmu_flooded == two


@pytest.mark.parametrize("op", [sc.Op.XCHG, sc.Op.ADD, sc.Op.AND, sc.Op.OR, sc.Op.XOR])
def test_batch_with_a_size_that_is_none(op):
    """16 bytes exist for loads, stores and CMPXCHG alone; found before anything runs."""
    guest = Guest("64")
    rows = [{"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 1}, {"op": op, "size": 16, "addr": USER}]
    with pytest.raises(sc.ConfigError, match=r"ops\[1\]: size 16"):
        guest.cpu.run(operations(*rows, dtype=WIDE))
    assert not guest.vm.memory.words[DATA // 8]


@every_mode
def test_batch_without_data(mode):
    """data=False: no value is read or stored, but the exits and emulated stores are those of the same operations with
    data that changes nothing."""
    twins = [Guest(mode, CALM), Guest(mode, CALM)]
    for guest in twins:
        guest.see(guest.entry(USER))
        guest.cpu.read(USER, 4)
    at = twins[0].window(twins[0].entry(USER))
    was = twins[0].tables.entry(USER).value
    memory = twins[0].vm.memory.bytes.tobytes()
    rows = [
        {"op": sc.Op.WRITE, "size": twins[0].size, "addr": at, "value": was},
        {"op": sc.Op.READ, "size": 4, "addr": USER},
        {"op": sc.Op.CMPXCHG, "size": twins[0].size, "addr": at, "expected": was + 1, "value": 0},
        {"op": sc.Op.READ, "size": 4, "addr": USER},
        {"op": sc.Op.OR, "size": 1, "addr": at, "value": 0},
        {"op": sc.Op.WRITE, "size": 1, "addr": USER, "value": 0},
    ]
    moving = twins[0].cpu.run(operations(*rows, dtype=WIDE))
    still = twins[1].cpu.run(
        operations(*[{**row, "value": 0x55, "expected": was} for row in rows], dtype=WIDE), data=False
    )
    for name in ("outcome", "error_code", "gpa", "exits", "emulated"):
        np.testing.assert_array_equal(getattr(still, name), getattr(moving, name))
    assert still.emulated.tolist() == [1, 0, 1, 0, 1, 0]
    assert not still.value.any()
    assert twins[1].vm.memory.bytes.tobytes() == memory
    assert twins[1].vm.audit().ok
