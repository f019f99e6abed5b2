"""The log of exits: a row for each that is counted, with what was done about it, under every design."""

import csv

import numpy as np
import pytest
from operations import operations

import shadowcore as sc
from shadowcore.config import DESIGNS
from shadowcore.engine.counters import EXIT_REASONS
from shadowcore.engine.exitlog import EXIT_CHANGES

_NAMES = ("mmu_cache_miss", "mmu_cache_hit", "mmu_shadow_zapped", "mmu_flooded", "mmu_recycled", "synced")
COUNTERS = dict(zip(EXIT_CHANGES, (*_NAMES, "spte_installed", "spte_removed"), strict=True))
every_design = pytest.mark.parametrize("design", DESIGNS)


def machine(design="cached", vcpus=1, **settings):
    """16 pages from 0x400000 on; the guest's tables are mapped from 0x40000000 on. Where 0x480000 leads there is no
    memory."""
    vm = sc.VM("4MiB", design, vcpus, **settings)
    tables = sc.PageTables(vm.memory, mode="64", allocate=range(512, 700))
    tables.map(0x400000, 0x100000, 0x40000, "rwu")
    tables.map(0x480000, 0x4000000, 0x4000, "rw")
    tables.map(0x40000000, 0x200000, 700 << 12, "rw")
    for cpu in vm.vcpus:
        tables.activate(cpu)
    return vm, tables


def stream(tables, seed=5, n=600, vcpus=1):
    """Accesses, CR3 loads, INVLPGs and stores to leaf entries, some of which end in a guest fault or at a device."""
    rng = np.random.default_rng(seed)
    leaf = tables.walk(0x400000)[-1].gpa
    rows = []
    for _ in range(n):
        kind = rng.integers(0, 20)
        page = int(rng.integers(0, 0x44))
        if kind < 12:
            rows.append((int(rng.integers(0, 3)), 0x400000 + 4096 * page, 0, 8))
        elif kind < 15:
            value = 0x100000 + 4096 * int(rng.integers(0, 0x40)) | (7 if rng.integers(0, 4) else 0)
            rows.append((sc.Op.WRITE, 0x40000000 + leaf - 0x200000 + 8 * (page & 63), value, 8))
        elif kind < 17:
            rows.append((sc.Op.CR3, 0, tables.registers["cr3"], 8))
        elif kind < 18:
            rows.append((sc.Op.INVLPG, 0x400000 + 4096 * page, 0, 8))
        elif kind < 19:
            rows.append((sc.Op.ADD, 0x400FFC + 4096 * (page & 31), 3, 8))
        else:
            rows.append((sc.Op.READ, 0x480000, 0, 8))
    made = operations(*rows)
    if vcpus > 1:
        wider = np.zeros(n, [*[(name, made.dtype[name]) for name in made.dtype.names], ("vcpu", "u1")])
        for name in made.dtype.names:
            wider[name] = made[name]
        wider["vcpu"] = rng.integers(0, vcpus, n)
        made = wider
    return made


def adds_up(rows, stats):
    by_reason = np.bincount(rows["reason"], minlength=len(EXIT_REASONS)).tolist()
    assert dict(zip(EXIT_REASONS, by_reason, strict=True)) == stats.exits
    assert {name: int(rows[name].sum()) for name in EXIT_CHANGES} == {k: stats[v] for k, v in COUNTERS.items()}


@every_design
@pytest.mark.parametrize("settings", [{}, {"vcpus": 3}, {"tlb": sc.TLB()}], ids=["one", "three vcpus", "TLB"])
def test_a_row_for_each_exit(design, settings):
    """The rows of a batch are those of its operations one by one, each logged by itself; they add up to the counters;
    and nothing else is different from a run that nobody logs."""
    vm, tables = machine(design, **settings)
    twin, _ = machine(design, **settings)
    plain, _ = machine(design, **settings)
    ops = stream(tables, vcpus=settings.get("vcpus", 1))
    with vm.measure() as counted, vm.record_exits() as log:
        result = vm.vcpus[0].run(ops)
    adds_up(log.rows, counted)
    assert (len(log) > 0) == (design != "native")
    steps = []
    for number in range(len(ops)):
        with twin.record_exits(first=number) as one:
            twin.vcpus[0].run(ops[number : number + 1])
        assert set(one.rows["operation"].tolist()) <= {number}
        steps.append(one.rows)
    assert np.array_equal(log.rows, np.concatenate(steps))
    expected = plain.vcpus[0].run(ops)
    for name in ("outcome", "error_code", "gpa", "value", "exits", "emulated"):
        assert np.array_equal(getattr(result, name), getattr(expected, name)), name
    assert vm.stats.as_dict() == plain.stats.as_dict() == twin.stats.as_dict()
    assert np.array_equal(vm.mmu.pages, plain.mmu.pages) if design != "native" else True
    assert vm.mmu.is_fast() == plain.mmu.is_fast()


@every_design
def test_the_fast_paths_come_back(design):
    """After a log the machine goes on as one that never had one."""
    vm, tables = machine(design)
    plain, _ = machine(design)
    first, second = stream(tables, 1, 100), stream(tables, 2, 300)
    with vm.record_exits():
        vm.vcpus[0].run(first)
    plain.vcpus[0].run(first)
    assert vm.mmu.is_fast() == plain.mmu.is_fast()
    a, b = vm.vcpus[0].run(second), plain.vcpus[0].run(second)
    assert a.stats.as_dict() == b.stats.as_dict()
    assert np.array_equal(a.gpa, b.gpa)
    assert vm.audit().ok


def test_what_a_row_says():
    vm, tables = machine()
    cpu = vm.vcpus[0]
    leaf = tables.walk(0x400000)[-1].gpa
    with vm.record_exits(first=7) as log:
        cpu.write(0x401000, 1)
        cpu.read(0x401008)  # hits
        with pytest.raises(sc.PageFault):
            cpu.read(0x700000, user=True)
        with pytest.raises(sc.MMIOAccess):
            cpu.write(0x480000, 1)
        cpu.read(0x40000000)
        with vm.measure() as counted:
            cpu.write(0x40000000 + leaf - 0x200000 + 8, 0)
        cpu.cr3 = tables.registers["cr3"]
    rows = log.rows
    assert log.reasons() == ["fill", "guest", "mmio", "fill", "emulate", "cr3"]
    assert rows["operation"].tolist() == [7, 9, 10, 11, 12, 13]
    assert rows["gva"].tolist()[:3] == [0x401000, 0x700000, 0x480000]
    assert rows["gva"][5] == tables.registers["cr3"]
    nowhere = 2**64 - 1
    assert rows["gfn"].tolist() == [0x101, nowhere, 0x4000, 0x200, leaf >> 12, nowhere]
    assert rows["error_code"].tolist()[:4] == [2, 4, 2, 0]
    assert (rows["made"][0], rows["installed"][0]) == (3, 4)
    assert {name: rows[name][4] for name in EXIT_CHANGES} == {name: counted[COUNTERS[name]] for name in EXIT_CHANGES}
    assert rows["removed"][4] > 0  # by the emulated store, which the exit has too


def test_what_the_host_does_belongs_to_no_exit():
    vm, tables = machine()
    leaf = tables.walk(0x400000)[-1].gpa
    with vm.record_exits() as log:
        vm.vcpus[0].read(0x401000)
        vm.write_physical(leaf + 8, bytes(8))  # drops what was made
        vm.vcpus[0].cr3 = tables.registers["cr3"]
        vm.mmu.zap_all()
    assert min(vm.stats.spte_removed, vm.stats.mmu_shadow_zapped) > 1
    assert log.rows["removed"].tolist() == log.rows["zapped"].tolist() == [0, 0]


def test_room():
    vm, _ = machine()
    cpu = vm.vcpus[0]
    for size in (0, -1, 1.5, "a", 1 << 40):
        with pytest.raises(sc.ConfigError, match="size"):
            vm.record_exits(size)
    with vm.record_exits(2) as log:
        cpu.read(0x400000)
        cpu.read(0x401000)
        assert len(log) == 2
        cpu.read(0x402000)
        cpu.read(0x403000)
    assert len(log) == 4
    log = vm.record_exits(2)
    for page in range(4, 7):
        cpu.read(0x400000 + 4096 * page)
    with pytest.raises(sc.EngineError, match="there were 3 exits, there was room for 2"):
        log.close()
    assert log.closed
    assert vm.mmu.is_fast() is not vm.mmu.general
    with vm.record_exits() as log:  # more than there is room for at first
        for _ in range(6000):
            cpu.cr3 = cpu.cr3
    assert log.rows["operation"].tolist() == list(range(6000))


def test_one_log_at_a_time():
    vm, _ = machine()
    with vm.record_exits(), pytest.raises(sc.ConfigError, match="logged already"):
        vm.record_exits()
    with vm.record_exits():
        pass
    with pytest.raises(sc.ConfigError, match="none are recorded"):
        vm.mmu.exits()


def test_beside_a_callback():
    """Who is told of events goes on being told, whichever came first."""
    vm, _ = machine()
    told = []
    vm.on_event(told.append, ["exit", "zap"])
    with vm.record_exits() as log:
        vm.vcpus[0].read(0x401000)
        vm.mmu.zap_all()
    assert [event.kind for event in told] == ["exit"] + ["zap"] * vm.stats.mmu_shadow_zapped
    vm.vcpus[0].read(0x401000)
    assert (told[-1].kind, len(log)) == ("exit", 1)
    with vm.record_exits() as log:
        vm.on_event(None)
        count = len(told)
        vm.vcpus[0].read(0x402000)
    assert (len(told), len(log)) == (count, 1)


def test_files(tmp_path):
    vm, tables = machine("unsync")
    tables.map(0xFFFF888000000000, 0, 0x1000, "rw")
    with vm.record_exits() as log:
        vm.vcpus[0].run(stream(tables))
        vm.vcpus[0].read(0xFFFF888000000000)
    log.write(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["reason"] for row in rows] == log.reasons()
    for name in ("operation", "vcpu", "gva", *EXIT_CHANGES):
        assert [int(row[name]) for row in rows] == log.rows[name].tolist()
    assert all(
        (row["gfn"] == "") == (gfn == 2**64 - 1) for row, gfn in zip(rows, log.rows["gfn"].tolist(), strict=True)
    )
    assert {row["reason"] for row in rows if row["error_code"] == ""} == {"cr3", "invlpg"}
    for name in ("a.txt", "a", ""):
        with pytest.raises(sc.ConfigError, match="path"):
            log.write(tmp_path / name if name else "")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the extra parquet")
    log.write(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert (table["reason"], table["gva"]) == (log.reasons(), log.rows["gva"].tolist())
    assert [gfn for gfn in table["gfn"] if gfn is not None] == [
        gfn for gfn in log.rows["gfn"].tolist() if gfn != 2**64 - 1
    ]
