"""What recorded programs see of their memory: stores, heap, mappings, images, stacks and swap."""

import itertools
import random

import numpy as np
import pytest
from kernel_model import disk
from program_recordings import ANON, AT, DESIGNS, MODES, PAGE, RW, SHARED, TRUE, made, options

import shadowcore as sc
from shadowcore import programs
from shadowcore.programs.spaces import close_all, open_all, walk
from shadowcore.programs.survey import folding, lay_out
from shadowcore.programs.touched import PageSet
from shadowcore.recordings import Event

# -- what programs see -------------------------------------------------------------------------------------------

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
