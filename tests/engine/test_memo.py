"""The memo of `run` shows in nothing: batches against the same operations one by one, which know no memo."""

import numpy as np
import pytest
import streams
from guest2007 import DATA, PAGE, USER, Guest, W
from operations import operations

import shadowcore as sc
from shadowcore.pagetables import P, U

COLUMNS = ("outcome", "error_code", "gpa", "value", "exits", "emulated")


def machine(name, design, tlb=None):
    data = streams.stream(name)
    return streams.machine(data, design, tlb=tlb, features=sc.Features(maxphyaddr=40)), data["ops"]


def one_by_one(vm, ops):
    """Rows of results, by calls of `run` that hold one operation, on a machine with a modelled TLB of no entries:
    every access goes the whole way."""
    rows = [vm.vcpus[0].run(ops[i : i + 1]) for i in range(len(ops))]
    return {key: np.concatenate([getattr(row, key) for row in rows]) for key in COLUMNS}


def counters(vm):
    return {name: n for name, n in vm.stats.as_dict().items() if not name.startswith("tlb_")}


@pytest.mark.parametrize("design", ["native", "flush", "cached", "kvm-2007", "unsync", "adaptive"])
@pytest.mark.parametrize("name", ["fuzz_32_s6", "fuzz_64_s6", "fuzz_pae_s6", "modeswitch_mix_s1", "recursive_64_s1"])
def test_streams(name, design):
    """Each access three times, so that most are repeats: results, counters and memory are those of single steps."""
    vm, ops = machine(name, design)
    if design == "kvm-2007":
        ops = ops[:300]
    ops = np.repeat(ops, np.where(streams.is_access(ops), 3, 1))
    result = vm.vcpus[0].run(ops)
    other, _ = machine(name, design, sc.TLB(small_entries=0, large_entries=0, huge_entries=0))
    single = one_by_one(other, ops)
    for key in COLUMNS:
        np.testing.assert_array_equal(getattr(result, key), single[key], key)
    assert counters(vm) == counters(other)
    assert np.array_equal(vm.memory.bytes, other.memory.bytes)


@pytest.mark.parametrize("design", ["native", "cached"])
def test_store_to_a_table_in_the_midst_of_hits(design):
    """The guest turns a page to another frame: the very next load sees it, and one that was between does not."""
    made = Guest("64", design)
    other = (DATA + 5 * PAGE) | P | W | U | 0x60
    window = made.window(made.entry(USER))
    before = made.cpu.read(window)
    made.vm.memory.words[(DATA + 8) // 8] = 1
    made.vm.memory.words[(DATA + 5 * PAGE + 8) // 8] = 2
    load, edit = (sc.Op.READ, USER + 8, 0), (sc.Op.WRITE, window, other)
    back = (sc.Op.WRITE, window, before)
    result = made.cpu.run(operations(load, load, load, edit, load, load, back, load, edit, load))
    assert result.value.tolist() == [1, 1, 1, 0, 2, 2, 0, 1, 0, 2]
    assert result.outcome.sum() == 0


@pytest.mark.parametrize("design", ["native", "flush", "cached", "unsync", "adaptive"])
def test_memory_written_between_batches(design):
    """Tables edited by the host between two batches; `native` obeys at once, the others after INVLPG or a flood of
    none: their shadow stands until it is told."""
    made = Guest("64", design)
    load = operations(*[(sc.Op.READ, USER, 0)] * 4)
    made.cpu.run(load)
    entry = made.entry(USER)
    words = made.vm.memory.words
    words[entry // 8] = 0
    assert made.cpu.run(load).outcome.tolist() == ([1] * 4 if design == "native" else [0] * 4)
    words[entry // 8] = (DATA + PAGE) | P | U
    made.vm.write_physical(entry, int(words[entry // 8]).to_bytes(8, "little"))
    made.cpu.invlpg(USER)
    assert made.cpu.run(load).gpa.tolist() == [DATA + PAGE] * 4


@pytest.mark.parametrize("design", ["native", "cached", "unsync", "adaptive"])
def test_registers_in_the_midst_of_hits(design):
    """Rights are judged by the registers as they are at each access."""
    made = Guest("64", design)
    made.cpu.cr4 |= 1 << 21  # SMAP
    read, allow, forbid = (sc.Op.READ, USER, 0), (sc.Op.AC, 0, 1), (sc.Op.AC, 0, 0)
    made.cpu.ac = True
    result = made.cpu.run(operations(read, read, forbid, read, allow, read, read, forbid, read))
    assert result.outcome.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    made.cpu.cr4 |= 1 << 22  # PKE
    key = (sc.Op.PKRU, 0, 1)
    made.cpu.ac = True
    result = made.cpu.run(operations(read, read, key, read, (sc.Op.PKRU, 0, 0), read))
    assert result.outcome.tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("design", ["native", "cached", "unsync", "adaptive"])
def test_many_epochs(design):
    """More changes than a tag has epochs for."""
    made = Guest("64", design)
    made.cpu.cr4 |= 1 << 21
    made.cpu.ac = True
    ops = operations((sc.Op.READ, USER, 0), (sc.Op.AC, 0, 0), (sc.Op.AC, 0, 1), (sc.Op.READ, USER, 0))
    assert not made.cpu.run(np.tile(ops, 50_000)).outcome.any()
    made.cpu.ac = False
    assert made.cpu.run(ops[:1]).outcome.tolist() == [1]


@pytest.mark.parametrize("design", ["native", "cached", "unsync", "adaptive"])
def test_pages_that_share_an_entry_of_the_memo(design):
    """Addresses 16 MiB apart, more than there is room for."""
    made = Guest("64", design, pages=0)
    count = 64
    for i in range(count):
        made.map(USER + (i << 24), DATA + (i % 16) * PAGE)
    ops = operations(*[(sc.Op.READ, USER + (i << 24) + 8, 0) for i in range(count)])
    gpa = np.array([DATA + (i % 16) * PAGE + 8 for i in range(count)], dtype=np.uint64)
    rng = np.random.default_rng(1)
    order = rng.integers(0, count, 20_000)
    result = made.cpu.run(ops[order])
    assert np.array_equal(result.gpa, gpa[order])
    assert result.stats.walk_references >= 4 * len(order)
    assert result.stats.accesses == len(order)


def test_results_that_are_kept_while_others_come():
    """Blocks of freed results serve again; those that arrays look into do not."""
    made = Guest("64")
    kept = []
    for i in range(8):
        ops = operations(*[(sc.Op.READ, USER + i * PAGE + 8 * (k % 8), 0) for k in range(2000)])
        kept.append((i, made.cpu.run(ops).gpa))
        del ops
        made.cpu.run(operations(*[(sc.Op.READ, USER, 0)] * 2000))
    for i, gpa in kept:
        assert gpa.tolist() == [DATA + i * PAGE + 8 * (k % 8) for k in range(2000)]
