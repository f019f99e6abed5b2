"""The runs whose instructions are counted: `python -m bench.microruns LIBRARY`, under callgrind (instructions.py).

Each run does N and then 2 N operations from the same state. Their difference is N operations and nothing else: what a
batch costs by itself, the interpreter included, is in both.
"""

import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import shadowcore as sc

sys.path.insert(0, str(Path(__file__).parent))

from guests import (
    ALIGNED,
    MIB,
    PAGE,
    Guest,
    accesses,
    demand_paging,
    entries_of,
    one_per_region,
    pages,
    sparse_tables,
    stores_to,
)

COUNT = 2000
"""N."""
REPLAYED = 20_000
"""Records of a recording: their kinds come in stretches."""
LOOKED = ", tables looked at"
"""Behind the name of a run that has to cost what the run without it costs."""
LARGE = {2 * MIB: ", 2 MiB", 4 * MIB: ", 4 MiB", 1024 * MIB: ", 1 GiB"}
"""Behind the name of a run with large guest pages."""
HELD: list[object] = []
"""What was looked at."""
TABLES = 20
"""Tables that are zapped."""


class Run(NamedTuple):
    """A run: `prepare` brings about the state, `call(n)` gives what does n operations, which `check` looks at."""

    name: str
    count: int
    prepare: Callable[[], Any]
    call: Callable[[int], Callable[[], Any]]
    check: Callable[[Any, int], None]


def exits(reason: str | None) -> Callable[[sc.RunResult, int], None]:
    """A check: so many operations are done, each with an exit for `reason` (None: without)."""

    def check(result: sc.RunResult, n: int) -> None:
        assert len(result) == n
        assert not result.outcome.any()
        assert result.stats.exits_total == (0 if reason is None else n), result.stats.exits
        assert reason is None or result.stats.exits[reason] == n, result.stats.exits

    return check


def part(guest: Guest, ops: np.ndarray, data: bool = False) -> Callable[[int], Callable[[], Any]]:
    """The first n of the operations."""

    def call(n: int) -> Callable[[], Any]:
        some = ops[:n]
        assert len(some) == n
        return lambda: guest.run(some, data=data)

    return call


def nothing() -> None:
    """State that needs no preparation."""


CACHED = sc.Shadow.cached(pool_pages=256)


def faulting(mode: str, page_size: int = PAGE, mmu: sc.Shadow = CACHED) -> tuple[Guest, np.ndarray, np.ndarray]:
    """A guest; the first page of each of its leaf tables, and 2 N others."""
    guest = Guest(mode, 32 * MIB, mmu).map(page_size=page_size).start()
    every = pages(32 * MIB // PAGE).reshape(-1, 512)
    return guest, every[:, 0].copy(), every[:, 1:].ravel()[: 2 * COUNT]


def looked_at(guest: Guest) -> None:
    """Let everybody see the shadow structure: no access costs more for that."""
    HELD.append((guest.vm.mmu.arrays, guest.vm.memory.pool))
    with tempfile.TemporaryDirectory(prefix="shadowcore-bench-") as directory:
        guest.vm.save(Path(directory) / "vm")


def hits(name: str, count: int, forget: bool = False, looked: bool = False, dtype: np.dtype = sc.OP_DTYPE) -> Run:
    """Accesses to so many pages, in turns. forget: with a CR3 load before, after which none is known. looked: see
    looked_at. dtype: the layout of operations."""
    guest, _, rest = faulting("64")
    if looked:
        looked_at(guest)
    ops = accesses(np.resize(np.random.default_rng(1).permutation(rest)[:count], 2 * COUNT)).astype(dtype)

    def prepare() -> None:
        for _ in range(2):
            guest.run(ops)
        if forget:
            guest.cpu.cr3 = guest.tables.cr3

    return Run(name, COUNT, prepare, part(guest, ops), exits(None))


def walks() -> Run:
    guest = Guest("64", 32 * MIB, "native").map().start()
    ops = accesses(np.random.default_rng(1).permutation(pages(2 * COUNT)))
    return Run("guest walk", COUNT, nothing, part(guest, ops), exits(None))


def leaf_faults(mode: str, looked: bool = False, page_size: int = PAGE) -> Run:
    guest, first, rest = faulting(mode, page_size)
    if looked:
        looked_at(guest)
    ops = accesses(rest)

    def prepare() -> None:
        guest.vm.mmu.zap_all()
        guest.run(accesses(first))

    name = f"leaf fault, {mode}{LOOKED if looked else ''}{LARGE.get(page_size, '')}"
    return Run(name, COUNT, prepare, part(guest, ops), exits("fill"))


def dirty_faults() -> Run:
    guest, first, rest = faulting("64")
    loads, stores = accesses(rest), accesses(rest, sc.Op.WRITE)

    def prepare() -> None:
        guest.vm.mmu.zap_all()
        for table in guest.leaf_tables(0, guest.size):
            guest.entries(table)[:] &= ~np.uint64(1 << 6)
        guest.run(accesses(first))
        guest.run(loads)

    return Run("store that sets dirty", COUNT, prepare, part(guest, stores), exits("write"))


def emulated_stores(page_size: int = PAGE, mode: str = "64", filled: bool = True) -> Run:
    """Stores to tables, through a direct map of such pages. filled: the shadow has the entries, and drops them."""
    guest, _, _ = faulting(mode)
    guest.map_tables(page_size=page_size).start()  # again, for PAE root entries are read when CR3 is loaded
    tables = guest.leaf_tables(0, guest.size)
    ops = stores_to(guest, entries_of(guest, tables))[: 2 * COUNT]

    def prepare() -> None:
        guest.run(accesses(pages(32 * MIB // PAGE)))
        guest.run(accesses(guest.edit_address(tables), user=0))
        if not filled:
            guest.run(ops, data=True)

    name = "emulated store" + ("" if mode == "64" else f", {mode}") + ("" if filled else ", no spte")
    return Run(name + LARGE.get(page_size, ""), COUNT, prepare, part(guest, ops, data=True), exits("emulate"))


def sparse(name: str, regions: int, pool_pages: int, recycled: bool) -> Run:
    guest = Guest("64", 16 * MIB, sc.Shadow.cached(pool_pages=pool_pages), table_room=(regions + 640) * PAGE)
    va = one_per_region(regions)
    sparse_tables(guest, va)
    guest.start()
    by_directory = va[: regions // 512 * 512].reshape(-1, 512) if not recycled else va.reshape(1, -1)
    ops = accesses(by_directory[:, 1:].ravel() if not recycled else np.tile(va, -(-2 * COUNT // regions)))

    def prepare() -> None:
        guest.vm.mmu.zap_all()
        guest.run(ops[: -(-COUNT // regions) * regions] if recycled else accesses(by_directory[:, 0].copy()))

    def check(result: sc.RunResult, n: int) -> None:
        exits("fill")(result, n)
        assert result.stats.mmu_cache_miss >= n
        assert (result.stats.mmu_recycled > 0.9 * n) == recycled

    return Run(name, COUNT, prepare, part(guest, ops), check)


def cr3_loads() -> Run:
    guest = Guest("64", 4 * MIB)
    spaces = [guest.tables] + [guest.address_space() for _ in range(7)]
    for tables in spaces:
        guest.map_in(tables)
    guest.start()
    cr3 = np.array([tables.cr3 for tables in spaces], dtype=np.uint64)
    ops = accesses(np.zeros(2 * COUNT), sc.Op.CR3, value=np.resize(cr3, 2 * COUNT))
    return Run("CR3 load, cached root", COUNT, lambda: guest.run(ops), part(guest, ops), exits("cr3"))


def zaps() -> Run:
    """A store to a full leaf table, with a flood threshold of 1."""
    size = 2 * TABLES * 2 * MIB
    guest = Guest("64", size, sc.Shadow.cached(pool_pages=256, flood_threshold=1)).map().map_tables().start()
    tables = guest.leaf_tables(0, size)
    ops = accesses(guest.edit_address(tables), sc.Op.WRITE, user=0)
    ops["value"] = guest.vm.memory.words[tables // np.uint64(8)]

    def prepare() -> None:
        guest.run(accesses(pages(size // PAGE)))
        guest.run(accesses(guest.edit_address(tables), user=0))

    def check(result: sc.RunResult, n: int) -> None:
        exits("emulate")(result, n)
        assert result.stats.mmu_flooded == n
        assert result.stats.spte_removed == 513 * n

    return Run("zap of a full leaf table", TABLES, prepare, part(guest, ops, data=True), check)


def unsync_faults(prefetch: int) -> Run:
    """Accesses to one page of each group that a fault fills: each a fault."""
    guest, first, _ = faulting("64", mmu=sc.Shadow.unsync(pool_pages=256, prefetch=prefetch))
    step = max(1, prefetch)
    ops = accesses((first[:, None] + np.arange(step, PAGE // 8, step, dtype=np.uint64) * PAGE).ravel())

    def prepare() -> None:
        guest.vm.mmu.zap_all()
        guest.run(accesses(first))

    name = f"leaf fault, unsync, {prefetch} prefetched" if prefetch else "leaf fault, unsync"
    return Run(name, min(COUNT, len(ops) // 2), prepare, part(guest, ops), exits("fill"))


def demand(mmu: sc.Shadow, name: str) -> Run:
    """The guest's kernel fills a page's entry at the fault for it; the access is made again."""
    guest, *_ = faulting("64", mmu=mmu)
    guest.map_tables().start()
    ops, prepare = demand_paging(guest)

    def call(n: int) -> Callable[[], Any]:
        some = ops[: 3 * n]
        return lambda: guest.run(some, data=True)

    def check(result: sc.RunResult, n: int) -> None:
        assert (result.outcome[0::3] == 1).all()
        assert not result.outcome[1::3].any()
        assert not result.outcome[2::3].any()

    return Run(name, COUNT, prepare, call, check)


def syncs() -> Run:
    """CR3 loads with a leaf table each to bring back in sync."""
    guest, *_ = faulting("64", mmu=sc.Shadow.unsync(pool_pages=256))
    guest.map_tables().start()
    table = guest.leaf_tables(0, guest.size)[:1]
    ops = np.zeros(4 * TABLES, sc.OP_DTYPE)
    ops["size"] = 8
    ops["op"][0::2], ops["addr"][0::2] = sc.Op.WRITE, guest.edit_address(table)
    ops["value"][0::2] = guest.vm.memory.words[table // np.uint64(8)]
    ops["op"][1::2], ops["value"][1::2] = sc.Op.CR3, guest.tables.cr3

    def prepare() -> None:
        guest.run(accesses(pages(512)))
        guest.run(ops[:2], data=True)

    def call(n: int) -> Callable[[], Any]:
        some = ops[: 2 * n]
        return lambda: guest.run(some, data=True)

    def check(result: sc.RunResult, n: int) -> None:
        assert not result.outcome.any()
        assert result.stats.synced == n

    return Run("sync of a full leaf table", TABLES, prepare, call, check)


def replay() -> Run:
    recording = sc.trace.load(Path(__file__).parents[1] / "tests" / "data" / "recordings" / "linux-fork.npz")
    start = recording.first_user or 0

    def call(n: int) -> Callable[[], Any]:
        return lambda: sc.trace.replay(recording, "cached", start=start, stop=start + n)

    def check(result: Any, n: int) -> None:
        assert result.whole.records == n
        assert result.gpa_mismatches == 0

    return Run("record of a replay", REPLAYED, nothing, call, check)


def runs() -> Iterator[Run]:
    """All runs, in the order in which they are made."""
    yield hits("hit", 64)
    yield hits("hit, aligned operations", 64, dtype=ALIGNED)
    yield hits("hit" + LOOKED, 64, looked=True)
    yield hits("hit, first of a page", 2 * COUNT, forget=True)
    yield walks()
    for mode in ("64", "pae", "32"):
        yield leaf_faults(mode)
    yield leaf_faults("64", looked=True)
    yield leaf_faults("64", page_size=2 * MIB)
    yield dirty_faults()
    for filled in (True, False):
        for page_size in (PAGE, 2 * MIB, 1024 * MIB):
            yield emulated_stores(page_size, filled=filled)
        for mode, page_size in (("pae", PAGE), ("pae", 2 * MIB), ("32", PAGE), ("32", 4 * MIB)):
            yield emulated_stores(page_size, mode, filled)
    yield sparse("fault that needs a new table", 4608, 8192, recycled=False)
    yield sparse("fault that needs a new table, recycling", 200, 64, recycled=True)
    yield cr3_loads()
    yield zaps()
    yield unsync_faults(0)
    yield unsync_faults(8)
    yield demand(sc.Shadow.cached(pool_pages=256, flood_threshold=None), "demand paging by the guest, cached")
    yield demand(sc.Shadow.unsync(pool_pages=256), "demand paging by the guest, unsync")
    yield syncs()
    yield replay()


def marker() -> Callable[[Callable[[], Any]], Any]:
    """measured.c: calls what it is given, and has callgrind count that."""
    measured = ctypes.PyDLL(sys.argv[1]).bench_measured
    measured.restype, measured.argtypes = ctypes.py_object, [ctypes.py_object]
    return measured


def main() -> None:
    measured = marker()
    gc.disable()  # when the interpreter collects depends on all that was made before, not on the run
    for run in runs():
        gc.collect()
        run.prepare()
        run.call(run.count)()  # whatever is done only once is done
        for n in (run.count, 2 * run.count):
            run.prepare()
            call = run.call(n)
            run.check(measured(call), n)
        print(run.name, run.count, 2, sep="\t", flush=True)


if __name__ == "__main__":
    main()
