"""Recorded programs on the guest kernel: what is counted, what is seen, and that no design changes any of it."""

import itertools
import json
import random

import numpy as np
import pytest
from click.testing import CliRunner
from kernel_model import disk
from places import DATA
from program_model import Model

import shadowcore as sc
from shadowcore import programs
from shadowcore.cli import programs as cli_programs
from shadowcore.programs.spaces import close_all, open_all, walk
from shadowcore.programs.survey import folding, lay_out
from shadowcore.programs.touched import PageSet
from shadowcore.recordings import Event, Reader, Writer

FAMILY, TRUE = DATA / "programs" / "family.screc", DATA / "programs" / "true.screc"
LACKEY = [DATA / "lackey" / "parent.txt", DATA / "lackey" / "child.txt"]
MODES = ("32", "pae", "64", "la57")
DESIGNS = ("native", "flush", "cached")
EXACT = ("faults", "faults_zero", "faults_zero_page", "faults_file", "faults_copied", "faults_reused", "stack_growth",
         "forks", "execs", "exits")  # fmt: skip
PAGE = 4096
RW, ANON, SHARED = 3, 0x22, 0x21
EXACT_OPTIONS = {"fault_around": 1}


def options(mode="64", **more):
    return sc.KernelOptions(mode=mode, **more)


@pytest.fixture(scope="session")
def lackey(tmp_path_factory):
    out = tmp_path_factory.mktemp("programs") / "program.screc"
    sc.importers.convert(LACKEY, out)
    return out


def made(path, steps, numbers=1, **more):
    """A recording by hand: accesses as (process, op, size, addresses), events as (Event, process, fields)."""
    with Writer(path, "program", **more) as writer:
        writer.processes.extend({"number": n} for n in range(numbers))
        running = None
        for step in steps:
            if isinstance(step[0], Event):
                kind, process, fields = step
                writer.event(kind, process, **fields)
            else:
                process, op, size, addr = step
                if process != running:
                    writer.event(Event.RUN, process)
                    running = process
                writer.write(op=np.full(len(addr), op), size=size, addr=np.array(addr, dtype=np.uint64))
    return path


# -- against a model of our own ----------------------------------------------------------------------------


def modelled(path, found):
    images = [found.regions[image] for image in sorted(found.regions) if image[2] > 0 or image[1] > 0]
    order = {}
    with Reader(path) as reader:
        seen = {}
        for block in reader:
            for part in block.segments():
                if not isinstance(part, tuple) and part["kind"] == Event.EXEC:
                    number = int(part["process"])
                    forked = number != 0
                    seen[number] = seen.get(number, -1 if forked else 0) + 1
                    order[len(order)] = found.regions[0, number, seen[number]]
        assert len(images) == len(order)
        return Model(reader, order.values()).run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", [FAMILY, TRUE], ids=["family", "true"])
def test_every_fault_is_one_that_a_model_expects(path, mode):
    """Demand zero, file, copy-on-write by a copy or by reuse, growth of the stack: each as often as the model says,
    and as many pages touched by each process."""
    found = programs.survey(path)
    model = modelled(path, found)
    result = programs.run(found, "native", options=options(mode, **EXACT_OPTIONS), fold=mode in ("32", "pae"))
    assert {name: result.counters[name] for name in EXACT} == {name: model.n[name] for name in EXACT}
    assert result.refused == model.refused == 0
    assert result.accesses == model.accesses == found.records
    assert {key[1]: n for key, n in found.touched.items()} == model.touched
    assert {entry["number"]: entry["pages"] for entry in result.processes} == model.touched


def test_the_model_expects_what_is_worth_expecting():
    model = modelled(FAMILY, programs.survey(FAMILY))
    assert min(model.n[name] for name in EXACT if name not in ("stack_growth",)) > 0
    assert len(model.touched) == 4


@pytest.mark.parametrize("path", [FAMILY, TRUE], ids=["family", "true"])
def test_demand_faults_with_fault_around_are_between_bounds(path):
    """Pages come in by faults or by being around one: together at least those that were touched first."""
    found = programs.survey(path)
    counters = programs.run(found, "cached").counters
    made = sum(counters[f"faults_{name}"] for name in ("zero", "zero_page", "file", "around", "copied", "reused"))
    assert counters["faults_spurious"] == counters["faults_segv"] == 0
    assert made >= max(found.touched.values())
    assert counters["faults"] <= sum(found.touched.values()) + counters["faults_copied"] + counters["faults_reused"]


# -- no design changes anything ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["family", "lackey"])
def test_no_design_changes_the_history(path, mode, lackey):
    found = programs.survey(FAMILY if path == "family" else lackey)
    fold = mode in ("32", "pae")
    results = [
        programs.run(found, mmu, options=options(mode), seed=3, fold=fold, audit_every=1000)
        for mmu in (*DESIGNS, sc.Shadow.cached(pool_pages=16, flood_threshold=1))
    ]
    assert len({result.history for result in results}) == 1
    for result in results:
        assert result.counters == results[0].counters
        frames = result.frames
        assert frames["free"] + frames["boot"] == frames["total"]
        assert frames["anonymous"] == frames["cache"] == frames["tables"] == frames["kernel"] == 0
    assert results[2].stats["exits_total"] > results[0].stats["exits_total"] == 0


@pytest.mark.parametrize("more", [{"isolation": True}, {"pcid": True}, {"direct_map": "4k", "global_": False}])
def test_settings_of_the_kernel_are_kept(more):
    result = programs.run(FAMILY, "cached", options=options(**more), audit_every=2000)
    assert result.counters["forks"] == 3
    assert result.refused == 0
    plain = programs.run(FAMILY, "cached")
    assert (result.history == plain.history) == ("pcid" in more)


def test_a_run_repeats_itself_operation_by_operation():
    found = programs.survey(FAMILY)
    result = programs.run(found, "native", memory="16MiB", record=True)
    vm = sc.VM("16MiB", mmu="cached")
    sc.Kernel(vm, programs._options(found, sc.KernelOptions(), 0))
    again = vm.vcpus[0].run(result.recording)
    assert np.count_nonzero(again.outcome) == result.counters["faults"]
    vm.audit(strict=True)


# -- what programs see -------------------------------------------------------------------------------------------

AT = 0x10000000
LIFE = [
    (Event.MMAP, 0, {"addr": AT, "size": 4 * PAGE, "prot": RW, "flags": SHARED}),
    (Event.MMAP, 0, {"addr": AT + 16 * PAGE, "size": 4 * PAGE, "prot": RW, "flags": ANON}),
    (0, 1, 8, [AT, AT + 16 * PAGE, AT + 17 * PAGE]),
    (Event.CLONE, 0, {"other": 1}),
    (1, 1, 8, [AT + 8, AT + 16 * PAGE]),
    (0, 0, 8, [AT + 8, AT + 16 * PAGE]),
    (Event.MREMAP, 0, {"addr": AT + 64 * PAGE, "size": 8 * PAGE, "other": AT + 16 * PAGE, "offset": 4 * PAGE}),
    (0, 0, 8, [AT + 64 * PAGE, AT + 65 * PAGE, AT + 71 * PAGE]),
    (Event.MADVISE, 0, {"addr": AT + 65 * PAGE, "size": PAGE, "flags": 4}),
    (0, 0, 8, [AT + 65 * PAGE]),
    (Event.MUNMAP, 0, {"addr": AT, "size": 4 * PAGE}),
    (1, 0, 8, [AT, AT + 8, AT + 17 * PAGE]),
    (Event.EXIT, 0, {"other": 0}),
    (1, 0, 8, [AT]),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_stores_are_seen_by_those_who_should(tmp_path, mode, mmu):
    """Shared memory across a fork, copies that are private, pages that moved, pages that were dropped."""
    found = programs.survey(made(tmp_path / "life.screc", LIFE, 2))
    result = programs.run(found, "native", memory="16MiB", options=options(mode), record=True)
    assert result.refused == 0
    vm = sc.VM("16MiB", mmu=mmu)
    sc.Kernel(vm, programs._options(found, options(mode), 0))
    ops = result.recording
    again = vm.vcpus[0].run(ops)
    mine = (ops["user"] == 1) & (again.outcome == 0)
    seen = list(zip(ops["op"][mine].tolist(), ((ops["addr"][mine] - AT) // 8).tolist(),
                    again.value[mine].tolist(), ops["value"][mine].tolist(), strict=True))  # fmt: skip
    stores = [value for op, _, _, value in seen if op == 1]
    loads = [value for op, _, value, _ in seen if op == 0]
    assert len(stores) == 5
    assert len(set(stores)) == 5
    shared, own, second, its, its_own = stores
    assert its_own != own
    # parent: the child's store to shared memory, its own page; moved; dropped. child: both stores; the page they share.
    assert loads == [its, own, own, second, 0, 0, shared, its, second, shared]


def test_what_a_program_may_not_do_it_may_not_do_here(tmp_path):
    steps = [
        (Event.MMAP, 0, {"addr": AT, "size": 3 * PAGE, "prot": RW, "flags": ANON}),
        (0, 1, 8, [AT, AT + PAGE, AT + 2 * PAGE]),
        (Event.MPROTECT, 0, {"addr": AT + PAGE, "size": PAGE, "prot": 1}),
        (Event.MPROTECT, 0, {"addr": AT + 2 * PAGE, "size": PAGE, "prot": 0}),
        (0, 1, 8, [AT, AT + PAGE, AT + 2 * PAGE]),
        (0, 0, 8, [AT, AT + PAGE, AT + 2 * PAGE]),
        (0, 2, 4, [AT]),
        (0, 3, 4, [AT, AT + PAGE]),
    ]
    path = made(tmp_path / "rights.screc", steps)
    for mmu in DESIGNS:
        result = programs.run(path, mmu)
        assert result.refused == result.counters["faults_segv"] == 5
        assert result.processes[0]["refused"] == 5
    assert programs.run(path, options=options("32")).refused == 4  # without NX all that can be read can be fetched


def test_threads_share_and_the_end_of_a_process_is_the_end(tmp_path):
    steps = [
        (Event.MMAP, 0, {"addr": AT, "size": PAGE, "prot": RW, "flags": ANON}),
        (0, 1, 8, [AT]),
        (Event.CLONE, 0, {"other": 0, "flags": 0x100}),
        (0, 1, 8, [AT + 8]),
        (Event.EXIT, 0, {}),
        (0, 0, 8, [AT, AT]),
        (Event.MUNMAP, 0, {"addr": AT, "size": PAGE}),
    ]
    result = programs.run(made(tmp_path / "threads.screc", steps), audit_every=1)
    assert (result.accesses, result.ignored, result.counters["forks"]) == (2, 2, 0)
    assert (result.counters["faults"], result.counters["exits"]) == (1, 1)


def test_the_heap_and_what_lies_in_its_way(tmp_path):
    steps = [
        (Event.BRK, 0, {"addr": AT + 100}),
        (Event.BRK, 0, {"addr": AT + 4 * PAGE + 1}),
        (0, 1, 8, [AT + PAGE, AT + 4 * PAGE]),
        (Event.BRK, 0, {"addr": AT + 2 * PAGE}),
        (Event.MMAP, 0, {"addr": AT + 3 * PAGE, "size": PAGE, "prot": RW, "flags": ANON}),
        (0, 1, 8, [AT + 3 * PAGE]),
        (Event.BRK, 0, {"addr": AT + 6 * PAGE}),
        (0, 0, 8, [AT + PAGE, AT + 3 * PAGE]),
    ]
    result = programs.run(made(tmp_path / "heap.screc", steps), audit_every=1)
    assert result.refused == 0
    assert result.counters["faults_zero"] == 3
    assert result.counters["faults_zero_page"] == 1  # the page that was another mapping
    bad = made(tmp_path / "bad.screc", [*steps, (Event.BRK, 0, {"addr": AT - PAGE})])
    with pytest.raises(sc.TraceError, match=r"bad\.screc: process 0: brk: an end of the heap from 0x10001000 on"):
        programs.run(bad)


def test_a_mapping_takes_the_place_of_what_is_there(tmp_path):
    steps = [
        (Event.MMAP, 0, {"addr": AT, "size": 8 * PAGE, "prot": RW, "flags": ANON}),
        (0, 1, 8, AT + np.arange(8) * PAGE),
        (Event.MMAP, 0, {"addr": AT + 2 * PAGE, "size": 2 * PAGE, "prot": 1, "flags": ANON}),
        (0, 0, 8, AT + np.arange(8) * PAGE),
        (0, 1, 8, AT + np.arange(8) * PAGE),
        (Event.MREMAP, 0, {"addr": AT, "size": PAGE, "other": AT, "offset": 2 * PAGE}),
        (Event.MREMAP, 0, {"addr": AT + 4 * PAGE, "size": 6 * PAGE, "other": AT + 4 * PAGE, "offset": 4 * PAGE}),
        (0, 1, 8, AT + np.arange(10) * PAGE),
    ]
    result = programs.run(made(tmp_path / "over.screc", steps), audit_every=1)
    # Refused: two pages without W; then those, and the one that was cut off.
    assert result.refused == 2 + 3
    assert result.counters["faults_zero"] == 8 + 2
    assert result.counters["faults_zero_page"] == 2


# -- who runs when ---------------------------------------------------------------------------------------------


def test_processes_of_several_files_take_turns(lackey, tmp_path):
    """A child waits until it was made, whichever file comes first; turns are counted in accesses."""
    switches = {}
    for turn in (5, 100_000):
        result = programs.run(lackey, "native", turn=turn)
        assert result.counters["forks"] == 1
        assert result.accesses == 111
        switches[turn] = result.counters["switches"]
    assert switches[5] > switches[100_000]
    other = tmp_path / "other.screc"
    sc.importers.convert(LACKEY[::-1], other)
    result = programs.run(other, "native")
    assert result.counters["exits"] == 2
    assert result.accesses == 111


def test_several_recordings_run_side_by_side(lackey):
    alone = [programs.run(path, "native", options=options(**EXACT_OPTIONS)) for path in (FAMILY, lackey)]
    for mmu in DESIGNS:
        both = programs.run([FAMILY, lackey], mmu, turn=500, options=options(**EXACT_OPTIONS), audit_every=4000)
        assert both.accesses == sum(result.accesses for result in alone)
        for name in ("forks", "exits", "faults_zero", "faults_zero_page", "faults_file"):
            assert both.counters[name] == sum(result.counters[name] for result in alone)
        assert both.counters["switches"] > sum(result.counters["switches"] for result in alone)
    assert [entry["number"] for entry in both.processes] == [0, 1, 2, 3, 0, 1]
    # The same program twice: its code is in the page cache once, and mapped by both.
    found = programs.survey([FAMILY, FAMILY])
    assert list(found.image_files.items()) == [("./family", 1)]
    twice = programs.run(found, "native", options=options(**EXACT_OPTIONS))
    once = programs.run(FAMILY, "native", options=options(**EXACT_OPTIONS))
    assert twice.counters["faults_file"] == 2 * once.counters["faults_file"]


def test_a_part_of_a_recording(tmp_path):
    done = []
    result = programs.run(TRUE, "native", operations=10_001, windows=1000, progress=lambda *at: done.append(at))
    assert result.accesses == 10_001
    assert done[-1] == (10_001, 10_001)
    assert sorted(done) == done
    rows = result.windows
    assert rows["start"].tolist() == list(range(0, 10_001, 1000))
    assert rows["end"].tolist() == [*range(1000, 10_001, 1000), 10_001]
    assert rows["kernel.faults"].sum() == result.counters["faults"]
    assert rows["kernel.faults"][0] > rows["kernel.faults"][5]
    assert programs.run(TRUE, "native", operations=0).accesses == 0
    assert result.as_dict()["windows"]["end"][-1] == 10_001


# -- image and stack -----------------------------------------------------------------------------------------------


def test_an_image_is_cut_by_what_is_done_to_its_pages():
    r, w, x = 1, 2, 4
    code = {0x400: r, 0x401: x | r, 0x405: r, 0x408: w | r, 0x409: r, 0x420: w}
    stack = {0x7FFF0: r | w, 0x7FF00: r}
    regions, file = lay_out(code | stack)
    assert [(g.first, g.stop, g.prot, g.page, g.grows) for g in regions] == [
        (0x400, 0x408, 5, 0, False),
        (0x408, 0x40A, 3, 8, False),
        (0x420, 0x421, 3, None, False),
        (0x7FFD0, 0x7FFF1, 3, None, True),
    ]
    assert file == 10
    assert lay_out({}) == ((), 0)
    assert lay_out({5: r})[0][0].prot == 1
    assert [g.prot for g in lay_out({5: w | x})[0]] == [7]


def test_folded_addresses_stay_apart():
    found = programs.survey(TRUE)
    assert found.highest[0] > 1 << 32
    end = 0xC0000000
    down = folding(found, end)
    pages = np.array(
        sorted({page for regions in found.regions.values() for g in regions for page in (g.first, g.stop - 1)})
    )
    addr = pages.astype(np.uint64) << np.uint64(12)
    moved = down.all(addr)
    assert len(set(moved.tolist())) == len(addr)
    assert moved.max() < end
    assert (np.diff(moved.astype(np.int64)) > 0).all()
    assert moved.tolist() == [down.one(at) for at in addr.tolist()]
    assert (moved[addr < end] == addr[addr < end]).all()
    assert folding(found, 1 << 47) is None


def test_page_sets_are_sets():
    """Against Python's, with removals, and pages that a wide access reaches."""
    rng = random.Random(1)
    pages, mine = PageSet(), {}
    for _ in range(300):
        n = rng.randrange(1, 200)
        op = np.array([rng.randrange(4) for _ in range(n)], dtype=np.uint8)
        size = np.array([rng.choice((0, 1, 8, 64, 9000)) for _ in range(n)], dtype=np.uint16)
        addr = np.array([rng.randrange(1 << rng.choice((16, 26, 40))) for _ in range(n)], dtype=np.uint64)
        news = []
        for o, s, a in zip(op.tolist(), size.tolist(), addr.tolist(), strict=True):
            for page in range(a >> 12, (a + max(s, 1) - 1 >> 12) + 1):
                bits = mine.get(page, 0) | (1, 2, 4, 3)[o]
                if bits != mine.get(page, 0):
                    mine[page] = bits
                    news.append((page, bits))
        assert list(zip(*(column.tolist() for column in pages.add(op, size, addr)), strict=True)) == news
        first = rng.randrange(1 << 14)
        stop = first + rng.choice((1, 50, 1 << 30)) if rng.random() < 0.3 else first
        pages.remove(first, stop)
        mine = {page: bits for page, bits in mine.items() if not first <= page < stop}
        assert len(pages) == len(mine)
    pages.clear()
    assert len(pages) == 0
    for code in (4, 255):  # none is taken for another
        with pytest.raises(ValueError, match="op: a code that is none of 0 to 3"):
            pages.add(np.array([0, code], np.uint8), np.ones(2, np.uint16), np.zeros(2, np.uint64))
    assert len(pages) == 0


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["32", "pae"])
def test_addresses_that_a_mode_has_not(mode):
    with pytest.raises(sc.TraceError, match=r"true\.screc: process 0: addresses below 0xc0000000 expected in mode"):
        programs.run(TRUE, options=options(mode))


def test_a_guest_that_is_too_small_says_what_is_needed(tmp_path):
    steps = [(Event.MMAP, 0, {"addr": AT, "size": 8000 * PAGE, "prot": RW, "flags": ANON}),
             (0, 1, 8, AT + np.arange(6000) * PAGE)]  # fmt: skip
    path = made(tmp_path / "large.screc", steps)
    with pytest.raises(
        sc.GuestOutOfMemory, match=r"large touches 23\.4 MiB .* the guest has 16 MiB, 64 MiB are enough"
    ):
        programs.run(path, memory="16MiB")
    assert programs.run(path, memory="64MiB").counters["faults_zero"] == 6000
    assert programs.run(path).counters["faults_zero"] == 6000


def test_wrong_input(tmp_path, lackey):
    guest = tmp_path / "guest.screc"
    sc.trace.load().head(100).save(guest)
    with pytest.raises(
        sc.TraceError, match=r"guest\.screc: a recording of a program expected, not of the stream 'guest'"
    ):
        programs.run(guest)
    with pytest.raises(sc.TraceError, match=r"none\.screc: a readable recording expected"):
        programs.run([lackey, tmp_path / "none.screc"])
    for bad in ({"operations": -1}, {"windows": -1}, {"audit_every": -2}, {"seed": -1}, {"turn": 0}, {"options": 5}):
        with pytest.raises(sc.ConfigError):
            programs.run(lackey, **bad)
    with pytest.raises(sc.ConfigError, match="paths"):
        programs.run([])
    far = made(tmp_path / "far.screc", [(Event.MMAP, 0, {"addr": (1 << 64) - PAGE, "size": 2 * PAGE, "prot": 3})])
    with pytest.raises(sc.TraceError, match=r"far\.screc: process 0: mmap: a range of addresses expected"):
        programs.run(far)
    beyond = made(tmp_path / "beyond.screc", [(0, 0, 8, [0xFFFF800000001000])])
    with pytest.raises(sc.TraceError, match="addresses below 0x7ffffffff000 expected"):
        programs.run(beyond)
    assert programs.run(beyond, fold=True).accesses == 1
    wide = made(
        tmp_path / "wide.screc", [(Event.MMAP, 0, {"addr": 1 << 40, "size": 4 << 30, "prot": 0, "flags": ANON})]
    )
    with pytest.raises(sc.ConfigError, match="4096 MiB of addresses above 0xc0000000 do not fit"):
        programs.run(wide, options=options("pae"), fold=True)
    overlap = {"addr": AT, "size": 2 * PAGE, "other": AT + PAGE, "offset": 2 * PAGE}
    steps = [(Event.MMAP, 0, {"addr": AT, "size": 8 * PAGE, "prot": 3, "flags": ANON}), (Event.MREMAP, 0, overlap)]
    with pytest.raises(sc.TraceError, match="mremap: another range"):
        programs.run(made(tmp_path / "overlap.screc", steps))


def test_traces_without_events_run(tmp_path):
    """All that such a trace has is outside of every mapping: image, heap and stack are put together from it."""
    rows = np.zeros(3000, dtype=sc.importers.CHAMPSIM_DTYPE)
    rows["ip"] = 0x400000 + 4 * np.arange(3000)
    rows["source_memory"][:, 0] = 0x600000 + 64 * (np.arange(3000) * 7 % 3000)
    rows["destination_memory"][:, 0] = 0x7FFFFFFE0000 - 64 * (np.arange(3000) % 500)
    trace = tmp_path / "trace.champsim"
    trace.write_bytes(rows.tobytes())
    out = tmp_path / "trace.screc"
    sc.importers.convert([trace], out, "champsim")
    results = [programs.run(out, mmu, audit_every=3000) for mmu in DESIGNS]
    assert len({result.history for result in results}) == 1
    assert results[0].refused == 0
    assert results[0].accesses == 9000
    assert results[0].counters["faults"] >= 3 + 47 // 16


# -- comparisons ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json():
    done = CliRunner().invoke(cli_programs.programs, [str(FAMILY), "--mmu", "native", "--mmu", "cached"])
    assert done.exit_code == 0, done.output
    head, designs, exits, *_ = done.output.splitlines()
    assert head.startswith("family: 10,470 accesses of 4 processes, ")
    assert designs.split() == ["native", "cached"]
    cached = programs.run(FAMILY, "cached")
    assert exits.split() == ["VM", "exits", "0", f"{cached.stats['exits_total']:,}"]
    arguments = [str(FAMILY), "--json", "--mode", "pae", "--fold", "--operations", "5000", "--memory", "32MiB"]
    plain = json.loads(CliRunner().invoke(cli_programs.programs, arguments).output)
    assert [entry["design"] for entry in plain] == ["native", "flush", "cached"]
    assert {entry["accesses"] for entry in plain} == {5000}
    assert {entry["frames"]["total"] for entry in plain} == {8192}
    assert len({entry["history"] for entry in plain}) == 1


def test_guests_that_did_not_do_the_same_are_no_comparison():
    """A kernel that forgets to flush, under `flush`, where that shows."""
    sloppy = options(sloppy=("fork", "munmap", "cow"))
    with pytest.raises(sc.EngineError, match="family: the guest did not do the same under native, flush"):
        programs.compare(FAMILY, ("native", "flush"), options=sloppy)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_pages_that_children_inherited_are_counted_as_long_as_they_live(tmp_path):
    """A process touches memory, forks and ends; its child touches other memory. Those that exec or end give it back."""
    pages = 3000
    area = {"size": pages * PAGE, "prot": RW, "flags": ANON}
    daemon = [
        (Event.MMAP, 0, {"addr": AT, **area}),
        (0, 1, 8, AT + np.arange(pages) * PAGE),
        (Event.CLONE, 0, {"other": 1}),
        (Event.CLONE, 0, {"other": 2}),
        (Event.EXIT, 0, {}),
        (Event.MMAP, 1, {"addr": AT + (64 << 20), **area}),
        (1, 1, 8, AT + (64 << 20) + np.arange(pages) * PAGE),
    ]
    path = made(tmp_path / "daemon.screc", daemon, 3)
    found = programs.survey(path)
    assert found.peak == 2 * pages
    assert programs.run(found).counters["faults_zero"] == 2 * pages
    with pytest.raises(sc.GuestOutOfMemory):
        programs.run(found, memory=2 * pages * PAGE)
    end = [(Event.EXEC, 1, {}), (Event.EXIT, 2, {}), (Event.MMAP, 1, {"addr": AT, **area})]
    more = [*daemon, *end, (1, 1, 8, AT + np.arange(pages) * PAGE)]
    assert programs.survey(made(tmp_path / "more.screc", more, 3)).peak == 2 * pages
    half = [*daemon[:-2], *end, (1, 1, 8, AT + np.arange(pages) * PAGE)]
    assert programs.survey(made(tmp_path / "half.screc", half, 3)).peak == pages


def test_a_guest_that_is_too_small_may_swap(tmp_path):
    pages = 6000
    steps = [(Event.MMAP, 0, {"addr": AT, "size": pages * PAGE, "prot": RW, "flags": ANON}),
             (0, 1, 8, np.concatenate([AT + np.arange(pages) * PAGE] * 2))]  # fmt: skip
    path = made(tmp_path / "large.screc", steps)
    results = [programs.run(path, mmu, memory="16MiB", options=options(swap_pages=8192)) for mmu in DESIGNS]
    assert len({result.history for result in results}) == 1
    assert results[0].refused == 0
    assert results[0].counters["swapped_in"] > 2000


def test_a_turn_ends_after_so_many_accesses_once_another_can_run(lackey):
    readers = open_all([lackey])
    order = [(part[0], len(part[1])) for _, part in walk(readers, 5) if isinstance(part, tuple)]
    close_all(readers)
    first = next(n for n, (process, _) in enumerate(order) if process == 1)
    last = max(n for n, (process, _) in enumerate(order) if process == 1)
    groups = itertools.groupby(order[first:last], lambda part: part[0])
    assert [(process, sum(n for _, n in group)) for process, group in groups] == [(1, 5), (0, 5), (1, 5), (0, 5)]
    # The child runs when the turn in which it was made is over.
    made = sum(n for _, n in order[:first])
    readers = open_all([lackey])
    clone = 0
    for _, part in walk(readers, 5):
        if not isinstance(part, tuple) and part["kind"] == Event.CLONE:
            break
        clone += len(part[1]) if isinstance(part, tuple) else 0
    close_all(readers)
    assert made - clone <= 5


def test_each_page_of_an_image_is_its_own_page_of_the_file(tmp_path):
    steps = [(0, 2, 4, [0x400000]), (0, 0, 8, [0x400010, 0x401010, 0x402010]), (0, 1, 8, [0x402020])]
    found = programs.survey(made(tmp_path / "image.screc", steps))
    result = programs.run(found, "native", memory="16MiB", record=True)
    vm = sc.VM("16MiB", mmu="cached")
    sc.Kernel(vm, programs._options(found, sc.KernelOptions(), 0))
    ops = result.recording
    again = vm.vcpus[0].run(ops)
    loads = (ops["user"] == 1) & (again.outcome == 0) & (ops["op"] == 0)
    assert again.value[loads].tolist() == [disk(0, page, 2) for page in range(3)]
