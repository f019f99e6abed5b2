"""Each invariant of design `unsync` broken by hand (`broken_unsync`), and streams in which none is ever broken."""

import pathlib

import broken
import broken_unsync
import numpy as np
import pytest
from guest2007 import MODES, PAGE, TABLES, USER, Guest
from kvm_files import POKE
from kvm_streams import replay

import shadowcore as sc

DATA = pathlib.Path(__file__).parents[1] / "data"
FILES = sorted(DATA.glob("kvm-6.1/*.npz"))
MORE = [path for name in ("smp", "wide", "giant") for path in sorted(DATA.glob(f"kvm-6.1-more/{name}*.npz"))]
SMALL = ("unsync_32", "unsync_pae", "modeswitch", "largeH_32", "fuzzH_64", "rights_wp0_64", "pressure64_64")


@pytest.mark.parametrize(("break_it", "expected", "mode"), broken_unsync.CASES)
def test_broken(break_it, expected, mode):
    guest = broken_unsync.machine(mode)
    break_it(guest)
    found = {(v.invariant, v.what) for v in guest.vm.audit().violations}
    assert found == set(expected) - getattr(guest, "skipped", set())


def test_each_sentence_has_a_case():
    by_hand = {sentence for case in broken_unsync.CASES for _, sentence in case.values[1]}
    unreached = {broken.LAGS}  # a sync leaves nothing of what can be written before it
    assert by_hand >= broken_unsync.SENTENCES - unreached


@pytest.mark.parametrize("mode", MODES)
def test_what_was_broken_is_not_used(mode):
    """The engine follows marks, lists of large leaves and roots: they are checked before it does."""
    for break_it in (broken_unsync.marks_are_miscounted, broken_unsync.reverse_map_of_large_leaves_is_lost):
        guest = broken_unsync.machine(mode)
        break_it(guest)
        with pytest.raises(sc.AuditError):
            guest.cpu.read(USER)


def clean(made, every):
    """Every operation, with an audit after each `every`-th and at checkpoints."""
    poked = False
    for k in range(len(made.ops)):
        assert made.step(k) == []
        poked |= made.ops[k][0] == POKE  # memory that changes with no store is nothing that a shadow can know of
        if not poked and (k % every == 0 or k in made.checkpoints):
            report = made.vm.audit()
            assert report.ok, (k, made.ops[k], str(report))


def small(name):
    return next(path for path in FILES + MORE if path.name.startswith(name))


@pytest.mark.parametrize("name", [*SMALL, "smp_32", "giant"])
def test_no_invariant_is_ever_broken(name):
    clean(replay(small(name)), 50)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES + MORE, ids=[path.stem for path in FILES + MORE])
def test_no_invariant_is_broken_in_any_stream(path):
    clean(replay(path), 50)
    later = DATA / "kvm-6.12" / path.name
    if later.exists():
        clean(replay(later), 50)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_no_invariant_is_broken_by_any_operation(name):
    clean(replay(small(name)), 1)


@pytest.mark.parametrize("name", ["unsync_32", "unsync_64", "modeswitch", "forkswitch_64", "largeH_64"])
def test_audits_inside_of_the_engine(name):
    """Around syncs and faults too every invariant holds, and nothing changes by looking."""
    made = replay(small(name))
    made.vm.audit_points = ("pre-sync", "post-sync", "pre-fault", "post-fault", "pre-write", "post-write", "post-cr3")
    for k in range(min(len(made.ops), 700)):
        assert made.step(k) == []


@pytest.mark.parametrize("mode", MODES)
def test_points_around_a_sync(mode):
    """A load of CR3 syncs: an audit before it sees the table lag, one after it finds that it does not."""
    for point in ("pre-sync", "post-sync"):
        guest = broken_unsync.machine(mode)
        scalars = guest.vm.mmu.export_state()
        guest.vm.mmu.import_state(scalars | {"spte_base": scalars["spte_base"] + 1})
        guest.vm.audit_points = [point]
        with pytest.raises(sc.AuditError) as caught:
            guest.cpu.cr3 = guest.tables.root
        assert caught.value.point == point
        assert {v.invariant for v in caught.value.violations} == {"I9"}
        assert guest.vm.stats.mmu_unsync == 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_below_roots_that_were_synced_lags(mode):
    """A page that says it is in sync, and whose mark stays: the sync passes it by, and the marks above it too."""
    guest = broken_unsync.machine(mode)
    guest.vm.audit_points = ["post-sync"]
    guest.cpu.cr3 = guest.tables.root
    root = next(root for root in guest.vm.mmu.roots() if root is not None)
    assert not guest.vm.mmu.arrays["pages"]["unsync_children"][root]


def test_pages_that_were_zapped_and_are_roots_still():
    """Two vcpus at one root, which is zapped: each lets go of it when it runs, and the last one frees it."""
    vm = sc.VM("8MiB", sc.Shadow.unsync(pool_pages=40), vcpus=2)
    tables = sc.PageTables(vm.memory, "64", allocate=range(100, 200))
    tables.map(USER, 0x100000, 8 * PAGE, "rwxu", accessed=True, dirty=True)
    for cpu in vm.vcpus:
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
        cpu.write(USER, 1)
    for times in (1, 2):
        vm.mmu.zap_all()
        vm.audit(strict=True)
        assert vm.mmu.export_state()["n_dying"] == times
        assert [cpu.export_state()["requests"] & 1 for cpu in vm.vcpus] == [1, 1]
        vm.vcpus[0].write(USER, 2)
        vm.audit(strict=True)
    assert vm.mmu.export_state()["n_dying"] == 1  # the second one went with the only vcpu that held it
    vm.vcpus[1].write(USER, 3)
    vm.audit(strict=True)
    assert vm.mmu.export_state()["n_dying"] == 0
    assert vm.mmu.pages_used + vm.mmu.pages_free == 40


# -- what Python sees ---------------------------------------------------------------------------------------------


def test_arrays_columns_and_leaves():
    guest = broken_unsync.machine("64")
    arrays = guest.vm.mmu.arrays
    assert {name: (array.dtype.str, array.shape) for name, array in arrays.items() if name not in sc_arrays()} == {
        "below": ("<u8", (40, 8)),
        "mapped": ("<u2", (2048,)),
        "large_rmap_2m": ("<u4", (5,)),
        "no_large_2m": ("<u4", (5,)),
        "large_rmap_1g": ("<u4", (1,)),
        "no_large_1g": ("<u4", (1,)),
    }
    assert list(guest.vm.mmu.writable_arrays()) == list(arrays)
    pages = {int(row["page"]): row for row in guest.vm.mmu.pages}
    page, _ = broken.place(guest, USER)
    above, index = broken.place(guest, USER, 2)
    assert (pages[page]["unsync"], pages[page]["unsync_children"]) == (1, 0)
    assert (pages[above]["unsync"], pages[above]["unsync_children"]) == (0, 1)
    assert arrays["below"][above, index >> 6] == 1 << (index & 63)
    # USER, ALIAS, the same address of another space, and the large page: read-only leaves are listed as well.
    leaves = guest.vm.mmu.rmap(0x100000 >> 12)
    assert len(leaves) == guest.vm.mmu.rmap_length(0x100000 >> 12) == 4
    assert tuple(leaves[-1]) == broken.place(guest, broken.LARGE, 2)
    assert len(guest.vm.mmu.rmap((0x100000 >> 12) + 1)) == 2


def sc_arrays():
    return sc.VM("1MiB").mmu.arrays


def test_a_reset_keeps_what_is_there():
    guest = broken_unsync.machine("64")
    before = guest.vm.stats.as_dict()
    guest.vm.stats.reset()
    kept = {name: count for name, count in guest.vm.stats.as_dict().items() if count}
    assert kept == {name: before[name] for name in ("mmu_unsync", "pages_4k", "pages_2m")}
    guest.vm.audit(strict=True)
    guest.cpu.cr3 = guest.tables.root
    assert guest.vm.stats.mmu_unsync == 0
    guest.vm.audit(strict=True)


def test_stats_of_a_run_say_what_is_there_at_its_end():
    guest = broken_unsync.machine("64")
    ops = np.zeros(1, sc.OP_DTYPE)
    ops["op"], ops["addr"] = sc.Op.CR3, guest.tables.root
    ops["value"] = guest.tables.root
    stats = guest.cpu.run(ops).stats
    assert (stats.mmu_unsync, stats.pages_2m) == (0, 1)


def test_a_pool_that_is_too_small_leaves_counters_that_agree():
    guest = Guest("la57", sc.Shadow.unsync(pool_pages=4, min_free=0, refill=0))
    exhausted = 0
    for va in (USER, guest.window(TABLES), USER + PAGE, guest.window(TABLES)) * 2:
        try:
            guest.cpu.read(va)
        except sc.PoolExhausted:
            exhausted += 1
        guest.vm.audit(strict=True)
    assert exhausted


@pytest.mark.parametrize("design", [sc.Shadow.unsync, sc.Shadow.kvm_6_12])
def test_keys_of_neighbours_and_of_what_is_synced(design):
    """A neighbour in a direct page has the key of the large page; a sync takes another key over though nothing else
    changed."""
    vm = sc.VM("8MiB", design(pool_pages=40))
    cpu = vm.vcpus[0]
    tables = sc.PageTables(vm.memory, "64", allocate=range(1024, 1100))
    tables.map(3 << 30, 0, 2 << 20, "rwxu", 2 << 20, accessed=True, dirty=True, pkey=3)
    tables.map(USER, 2 << 20, 8 * PAGE, "rwxu", PAGE, accessed=True, dirty=True, pkey=5)
    tables.map(2 << 30, 1024 * PAGE, 76 * PAGE, "rw", PAGE, accessed=True, dirty=True)
    for name, value in tables.registers.items():
        setattr(cpu, name, value | (1 << 22 if name == "cr4" else 0))
    cpu.read((3 << 30) + 9 * PAGE)
    cpu.write(USER, 1)
    assert vm.stats.prefetched
    vm.audit(strict=True)
    at = (2 << 30) + tables.entry(USER).gpa - 1024 * PAGE
    cpu.write(at, tables.entry(USER).value ^ (5 ^ 9) << 59)
    assert vm.stats.mmu_unsync == 1
    cpu.cr3 = tables.root
    vm.audit(strict=True)
    cpu.pkru = 1 << 18
    with pytest.raises(sc.PageFault):
        cpu.read(USER, user=True)
