"""How the cost of an operation grows: `python -m bench.curves`, in the root of the repository. See README.md.

Five curves: size of the guest, address spaces, size of the pool, mappings of one frame, links to one table. Each point
is a batch that must have the exits and counters that it is measured for. The figures go to docs/performance/NAME.json,
the picture drawn from them to NAME.svg beside it; --redraw draws without measuring.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import shadowcore as sc

# Scripts and benchmarks name the modules beside them alike: pytest puts this directory on the path as well.
sys.path.insert(0, str(Path(__file__).parent))

from guests import MIB, PAGE, Guest, accesses, one_per_region, pages, sparse_tables
from yardsticks import NoCompiler, Yardsticks

OUTPUT = Path(__file__).parent.parent / "docs" / "performance"
ROUNDS, PASSES = 7, 3
"""Rounds of a pass over the points; the passes are far apart in time, for a shared machine has bad minutes."""
REGION = 2 * MIB
"""What a leaf table maps."""


Data = dict[str, Any]


@dataclass
class Work:
    """One line of a curve at one x.

    call: a batch of `operations`. prepare: called before, outside of the time. check: asserts on its result.
    bare: the call costs nothing but its operations (a batch of the engine has a fixed cost, which is taken away).
    """

    line: str
    call: Callable[[], Any]
    operations: int
    check: Callable[[Any], None] | None = None
    prepare: Callable[[], Any] | None = None
    bare: bool = False


def exits(reason: str | None, count: int = 0) -> Callable[[sc.RunResult], None]:
    """A check: every operation is done, with so many exits, all for `reason`."""

    def check(result: sc.RunResult) -> None:
        assert not result.outcome.any()
        assert result.stats.exits_total == count, (result.stats.exits, count)
        assert reason is None or result.stats.exits[reason] == count, (result.stats.exits, count)

    return check


def fixed_cost(cpu: Any) -> float:
    """Nanoseconds that a batch without operations takes."""
    nothing = np.zeros(0, dtype=sc.OP_DTYPE)
    times = []
    for _ in range(200):
        start = time.perf_counter_ns()
        cpu.run(nothing, data=False)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def measure(works: list[Work], cpu: Any, rounds: int) -> dict[str, float]:
    """Nanoseconds an operation, by line: the least of the rounds, in which the lines take turns."""
    best = {work.line: float("inf") for work in works}
    gc.collect()
    gc.disable()
    try:
        overhead = fixed_cost(cpu)
        for number in range(rounds):
            for work in works:
                if work.prepare is not None:
                    work.prepare()
                elif number == 0:
                    work.call()
                start = time.perf_counter_ns()
                result = work.call()
                elapsed = time.perf_counter_ns() - start
                if work.check is not None:
                    work.check(result)
                del result
                cost = (elapsed - (0 if work.bare else overhead)) / work.operations
                best[work.line] = min(best[work.line], cost)
    finally:
        gc.enable()
    return best


# -- the size of the guest ------------------------------------------------------------------------------------------

SIZES = [4, 16, 64, 256, 1024, 4096, 16384]
HOT = 1024
FAULTS = 100_000


def guest_sizes(x: int, yardsticks: Yardsticks | None) -> tuple[Any, list[Work]]:
    """A guest of x MiB, all of it mapped by pages of 4 KiB; pages at random."""
    size = x * MIB
    room = size // 400 + 4 * MIB & ~(PAGE - 1)
    shadow = sc.Shadow.cached(pool_pages=10_000, flood_threshold=None)
    guest = Guest("64", size, shadow, room).map().map_tables(room).start()
    native = Guest("64", size, "native", room).map().start()
    rng = np.random.default_rng(11)
    va = pages(size // PAGE).reshape(-1, 512)
    first = accesses(va[:, 0].copy())
    rest = rng.permutation(va[:, 1:].ravel())[:FAULTS]
    loads, stores = accesses(rest), accesses(rest, sc.Op.WRITE)
    hot = rng.integers(0, size // (HOT * PAGE), HOT) * HOT + rng.permutation(HOT)
    hits = accesses((rng.choice(hot, FAULTS) * PAGE).astype(np.uint64))
    everywhere = accesses(rng.integers(0, size // 8, FAULTS, dtype=np.uint64) * np.uint64(8))
    tables = guest.leaf_tables(0, size)
    entries = rng.choice(tables, FAULTS) + rng.integers(0, 512, FAULTS, dtype=np.uint64) * np.uint64(8)
    edits = accesses(guest.edit_address(entries), sc.Op.WRITE, user=0)
    look = accesses(guest.edit_address(tables), user=0)

    def cold() -> None:
        guest.vm.mmu.zap_all()
        guest.run(first)

    def filled() -> None:
        guest.run(everywhere)
        for _ in range(2):
            guest.run(hits)

    def unmapped() -> None:
        cold()
        guest.run(look)

    def clean() -> None:
        for table in tables:
            guest.entries(table)[:] &= np.uint64(0xFFFF_FFFF_FFFF_FFBF)
        cold()
        guest.run(loads)

    works = [
        Work("hit, 1024 pages", lambda: guest.run(hits), FAULTS, exits(None), filled),
        Work("hit, all pages", lambda: guest.run(everywhere), FAULTS, exits(None), filled),
        Work("fault on a missing leaf", lambda: guest.run(loads), len(loads), exits("fill", len(loads)), cold),
        Work("store that sets dirty", lambda: guest.run(stores), len(stores), exits("write", len(stores)), clean),
        Work("emulated store", lambda: guest.run(edits), len(edits), exits("emulate", len(edits)), unmapped),
        Work("hit, native, all pages", lambda: native.run(everywhere), FAULTS, exits(None)),
    ]
    if yardsticks is not None:
        walks = yardsticks.walks(native.vm.memory.bytes, native.tables, everywhere)
        works.append(Work("walk of the tables in C", walks, FAULTS, bare=True))
    return guest.cpu, works


# -- address spaces -------------------------------------------------------------------------------------------------

SPACES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000]


def address_spaces(x: int, yardsticks: Yardsticks | None) -> tuple[Any, list[Work]]:
    """x address spaces that map the same 512 frames, in a pool with room for the shadows of all of them.

    Each maps them elsewhere. At one place in all spaces the entries in use lie at the same place in every table, and
    compete for the same sets of the host's caches.
    """
    guest = Guest("64", REGION, sc.Shadow.cached(pool_pages=65_536), table_room=(4 * x + 1024) * PAGE)
    spaces = [guest.tables, *(guest.address_space() for _ in range(x - 1))]
    number = np.arange(x, dtype=np.uint64)
    base = (number * np.uint64(57) % np.uint64(256)) << np.uint64(39)
    base |= (number * np.uint64(101) % np.uint64(512)) << np.uint64(30)
    base |= (number * np.uint64(37) % np.uint64(512)) << np.uint64(21)
    for tables, va in zip(spaces, base.tolist(), strict=True):
        guest.map_in(tables, va)
    guest.start()
    cr3 = np.array([tables.cr3 for tables in spaces], dtype=np.uint64)
    loads = accesses(np.zeros(FAULTS), sc.Op.CR3, value=np.resize(cr3, FAULTS))
    each = min(511, max(20, 2 * FAULTS // x))
    va = pages(each + 1)

    def visits(first: int, last: int) -> np.ndarray:
        """In each space: a load of CR3, and a load from each of the pages."""
        block = accesses(np.concatenate([[0], va[first:last]]))
        block[0]["op"] = sc.Op.CR3
        ops = np.tile(block, x)
        ops["value"][:: len(block)] = cr3
        # Another page of each space comes first, too.
        page = (ops["addr"] >> np.uint64(12)) + number.repeat(len(block)) * np.uint64(61)
        ops["addr"] = base.repeat(len(block)) + page % np.uint64(512) * np.uint64(PAGE)
        return ops

    first, rest, hits = visits(0, 1), visits(1, each + 1), visits(0, 1)
    hits = np.tile(hits, max(1, FAULTS // len(hits)))

    def cold() -> None:
        guest.vm.mmu.zap_all()
        guest.run(first)

    def check_hits(result: sc.RunResult) -> None:
        exits("cr3", len(hits) // 2)(result)
        assert result.stats.mmu_cache_miss == 0

    def check_faults(result: sc.RunResult) -> None:
        assert not result.outcome.any()
        assert result.stats.exits["fill"] == each * x
        assert result.stats.mmu_cache_miss == result.stats.mmu_recycled == 0

    works = [
        Work("CR3 load, cached root", lambda: guest.run(loads), FAULTS, exits("cr3", FAULTS), cold),
        Work("CR3 load and a hit", lambda: guest.run(hits), len(hits) // 2, check_hits, lambda: guest.run(first)),
        Work("fault on a missing leaf", lambda: guest.run(rest), each * x, check_faults, cold),
    ]
    return guest.cpu, works


# -- the size of the pool -------------------------------------------------------------------------------------------

POOLS = [64, 256, 1024, 4096, 16_384, 65_536, 262_144]


def pool_sizes(x: int, yardsticks: Yardsticks | None) -> tuple[Any, list[Work]]:
    """A pool of x pages, and a guest that needs an eighth more leaf tables than that, each for one page."""
    regions = x + x // 8
    guest, va = sparse_guest(regions, x)
    ops = accesses(np.tile(va, -(-FAULTS // regions)))  # in turns: the oldest is always the next to be needed
    small = Guest("64", 32 * MIB, sc.Shadow.cached(pool_pages=x)).map().map_tables().start()
    spread = pages(32 * MIB // PAGE).reshape(-1, 512)
    first, rest = accesses(spread[:, 0].copy()), accesses(spread[:, 1:].ravel())
    tables = small.leaf_tables(0, small.size).reshape(-1, 2)
    entries = tables[:, None, :] + (np.arange(512, dtype=np.uint64) * np.uint64(8))[None, :, None]
    edits = accesses(small.edit_address(entries.ravel()), sc.Op.WRITE, user=0)
    look = accesses(small.edit_address(tables.ravel()), user=0)
    held = accesses(np.resize(va[: x // 2], FAULTS))

    def check_recycled(result: sc.RunResult) -> None:
        exits("fill", len(ops))(result)
        assert result.stats.mmu_cache_miss >= len(ops)
        assert result.stats.mmu_recycled >= len(ops) * 0.99

    def cold() -> None:
        small.vm.mmu.zap_all()
        small.run(first)

    def edited() -> None:
        cold()
        small.run(rest)
        small.run(look)

    def hold() -> None:
        for _ in range(2):
            guest.run(held)

    works = [
        Work("fault, table recycled", lambda: guest.run(ops), len(ops), check_recycled, lambda: guest.run(ops)),
        Work("hit, half of the tables", lambda: guest.run(held), FAULTS, exits(None), hold),
        Work("fault on a missing leaf", lambda: small.run(rest), len(rest), exits("fill", len(rest)), cold),
        Work("emulated store", lambda: small.run(edits), len(edits), exits("emulate", len(edits)), edited),
    ]
    return guest.cpu, works


def sparse_guest(regions: int, pool_pages: int) -> tuple[Guest, np.ndarray]:
    """One page mapped in each of so many 2 MiB regions, and its address."""
    va = one_per_region(regions)
    room = (regions + regions // 512 + 600) * PAGE
    guest = Guest("64", regions * PAGE, sc.Shadow.cached(pool_pages=pool_pages), room)
    sparse_tables(guest, va)
    return guest.start(), va


# -- mappings of one frame ------------------------------------------------------------------------------------------

MAPPINGS = [1, 4, 16, 64, 256, 1024, 4096, 16_384]
MEASURED = 16 * 512


def mappings(x: int, yardsticks: Yardsticks | None) -> tuple[Any, list[Work]]:
    """One frame that is mapped writable x times before anything is measured."""
    before = -(-x // 512) * 512
    size = (before + MEASURED) * PAGE
    shadow = sc.Shadow.cached(pool_pages=256, flood_threshold=None)
    guest = Guest("64", size, shadow).map().map_tables().start()
    frame = guest.table_room
    leaf_tables = guest.leaf_tables(0, size)
    for table in leaf_tables:
        guest.entries(table)[:] = guest.entries(table)[0] & np.uint64(0xFFF) | np.uint64(frame)
    guest.entries(leaf_tables[0])[1] = np.uint64(frame + PAGE | 0x67)  # a page of its own, to be the new table's user
    va = pages(size // PAGE)
    fill = accesses(np.delete(va[:before], 1)[:x] if before > x else va[:before])
    fill["addr"][fill["addr"] == PAGE] = 0
    mapped = len(np.unique(fill["addr"]))
    measured = va[before:].reshape(-1, 512)
    first, rest = accesses(measured[:, 0].copy()), accesses(measured[:, 1:].ravel())
    tables = leaf_tables[before // 512 :].reshape(-1, 2)
    entries = tables[:, None, :] + (np.arange(8, 4096, 8, dtype=np.uint64))[None, :, None]
    edits = accesses(guest.edit_address(entries.ravel()), sc.Op.WRITE, user=0)
    edits["value"] = frame | 0x67
    look = accesses(guest.edit_address(tables.ravel()), user=0)
    top = guest.tables.entry(0, 2).gpa + 8 * (size // REGION)
    new_table = REGION * (size // REGION)
    protect = accesses(np.array([new_table], dtype=np.uint64))

    def cold() -> None:
        guest.vm.memory.words[top // 8] = 0
        guest.vm.memory.words[frame // 8] = 0
        guest.vm.mmu.zap_all()
        guest.run(fill)
        guest.run(first)
        assert guest.vm.mmu.rmap_length(frame // PAGE) == mapped + len(first)

    def filled() -> None:
        cold()
        guest.run(rest)
        guest.run(look)

    def about_to_be_a_table() -> None:
        cold()
        guest.vm.memory.words[top // 8] = frame | 0x67
        guest.vm.memory.words[frame // 8] = frame + PAGE | 0x67

    def check_protected(result: sc.RunResult) -> None:
        exits("fill", 1)(result)
        assert result.stats.rmap_protected == mapped + len(first)
        assert guest.vm.mmu.rmap_length(frame // PAGE) == 0

    works = [
        Work("fault that maps it once more", lambda: guest.run(rest), len(rest), exits("fill", len(rest)), cold),
        Work("store that unmaps it once", lambda: guest.run(edits), len(edits), exits("emulate", len(edits)), filled),
        Work(
            "write protection, a mapping",
            lambda: guest.run(protect),
            mapped + len(first),
            check_protected,
            about_to_be_a_table,
        ),
    ]
    return guest.cpu, works


# -- links to one table ---------------------------------------------------------------------------------------------

LINKS = [1, 4, 16, 64, 256, 1024, 4096, 16_384]
MORE = 4096


def shared_tables(x: int, yardsticks: Yardsticks | None) -> tuple[Any, list[Work]]:
    """One leaf table that x entries of directories lead to, all by one shadow page."""
    regions = x + MORE
    guest = Guest("64", REGION, sc.Shadow.cached(pool_pages=256, flood_threshold=1), 4 * MIB)
    guest.map().map_tables()
    one = int(guest.tables.entry(0, 2).value)
    leaf = one & ~0xFFF
    sparse_tables(guest, np.arange(1, regions, dtype=np.uint64) * np.uint64(REGION), leaf=one)
    guest.start()
    va = np.arange(regions, dtype=np.uint64) * np.uint64(REGION)
    fill = accesses(va[:x])
    # The first entry in each directory builds that; those are not measured.
    number = np.arange(x, regions)
    new = (number == x) & (x % 512 != 0) | (number % 512 == 0)
    directories, more = accesses(va[x:][new]), accesses(va[x:][~new])
    store = accesses(guest.edit_address(np.array([leaf + 8], dtype=np.uint64)), sc.Op.WRITE, user=0)
    store["value"] = guest.vm.memory.words[(leaf + 8) // 8]
    look = accesses(store["addr"], user=0)

    def cold() -> None:
        guest.vm.mmu.zap_all()
        guest.run(fill)
        guest.run(directories)

    def check_zapped(result: sc.RunResult) -> None:
        exits("emulate", 1)(result)
        assert result.stats.mmu_flooded == 1
        assert result.stats.spte_removed == x + len(directories) + 1

    def looked() -> None:
        cold()
        guest.run(look)

    works = [
        Work("fault that links it once more", lambda: guest.run(more), len(more), exits("fill", len(more)), cold),
        Work("zap of the table, a link", lambda: guest.run(store), x + len(directories), check_zapped, looked),
    ]
    return guest.cpu, works


# -- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A curve: `points`, and what is built and measured at each of them."""

    name: str
    title: str
    label: str
    points: list[int]
    build: Callable[[int, Yardsticks | None], tuple[Any, list[Work]]]


CURVES = [
    Curve("guest-size", "Size of the guest", "guest memory, MiB", SIZES, guest_sizes),
    Curve("address-spaces", "Address spaces", "address spaces that share all frames", SPACES, address_spaces),
    Curve("pool-size", "Size of the pool", "shadow pages in the pool", POOLS, pool_sizes),
    Curve("mappings", "Mappings of one frame", "writable mappings of the frame", MAPPINGS, mappings),
    Curve("shared-tables", "Links to one table", "directory entries that lead to the table", LINKS, shared_tables),
]


def curve_data(curve: Curve, points: list[int], rounds: int, passes: int, yardsticks: Yardsticks | None) -> Data:
    """What a picture is drawn from: nanoseconds an operation, by line, at each point; the least of all passes."""
    lines: dict[str, list[float]] = {}
    for number in range(passes):
        for i, x in enumerate(points):
            cpu, works = curve.build(x, yardsticks)
            found = measure(works, cpu, rounds)
            for line, ns in found.items():
                costs = lines.setdefault(line, [])
                if number == 0:
                    costs.append(round(ns, 2))
                costs[i] = min(costs[i], round(ns, 2))
            if number == passes - 1:
                shown = ", ".join(f"{line} {costs[i]:.1f}" for line, costs in lines.items())
                click.echo(f"{curve.name} {x}: {shown}", err=True)
            del cpu, works
            gc.collect()
    return {"name": curve.name, "title": curve.title, "label": curve.label, "x": points, "ns": lines}


def chosen(names: tuple[str, ...]) -> Iterator[Curve]:
    return (curve for curve in CURVES if not names or curve.name in names)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([curve.name for curve in CURVES]))
@click.option("--redraw", is_flag=True, help="Draw from the figures that are there.")
@click.option("--quick", is_flag=True, help="The smaller points, each line once; writes nothing.")
def main(names: tuple[str, ...], redraw: bool, quick: bool) -> None:
    """Measure the curves NAMES (default: all), and draw them into docs/performance/."""
    yardsticks = None
    if not redraw:
        try:
            yardsticks = Yardsticks()
        except NoCompiler as error:
            click.echo(f"without the yardsticks: {error}", err=True)
    for curve in chosen(names):
        if not redraw:
            points = [x for x in curve.points if x <= 256] if quick else curve.points
            data = curve_data(curve, points, *((1, 1) if quick else (ROUNDS, PASSES)), yardsticks)
            if quick:
                continue
            OUTPUT.mkdir(exist_ok=True)
            (OUTPUT / f"{curve.name}.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        from plots import draw

        draw(OUTPUT / f"{curve.name}.json")


if __name__ == "__main__":
    main()
