"""Workloads that others measured on KVM: memory that is stored to for the first time (sources: docs/workloads.md)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .script import AREA, Guest, workload

TODAY = {"grouped": True, "flush_gather": 9622}
"""What a kernel of 2026 does that one of 2007 did not, and what decides how a large page of the host fares."""
THREADS = {
    "chunk": (16, 1, 4096, "pages that a thread touches before the next one's turn"),
}


def _threads(guest: Guest) -> int:
    """A process with a thread on each processor, and its number."""
    process = guest.spawn(guest.kernel.program())
    for processor in range(guest.processors):
        guest.on(processor)
        guest.syscall(process)
    guest.go()
    return process


def _areas(guest: Guest, pages: int) -> list[int]:
    """Where each thread has its mapping: aligned as tables are, and a table's reach between two of them."""
    reach = guest.huge
    return [AREA + i * (((pages << 12) + reach - 1) // reach + 1) * reach for i in range(guest.processors)]


def _in_turns(guest: Guest, process: int, areas: list[int], pages: int, chunk: int, write: bool) -> None:
    """Every thread goes over its mapping once, `chunk` pages at a time, one thread after the other."""
    for first in range(0, pages, chunk):
        for processor, area in enumerate(areas):
            guest.on(processor)
            guest.sweep(process, area + (first << 12), min(chunk, pages - first), write=write)


def _map_all(guest: Guest, process: int, areas: list[int], pages: int) -> None:
    for processor, area in enumerate(areas):
        guest.on(processor)
        guest.map(process, area, pages)


def _unmap_all(guest: Guest, process: int, areas: list[int], pages: int) -> None:
    for processor, area in enumerate(areas):
        guest.on(processor)
        guest.unmap(process, area, pages)


@workload("page-fault", "512MiB", TODAY, pages=(65536, 1, 1 << 22, "pages stored to"))
def page_fault(guest: Guest, pages: int) -> Iterator[None]:
    """Anonymous memory is mapped and each of its pages stored to once."""
    process = guest.spawn(guest.kernel.program())
    guest.syscall(process)
    guest.go()
    yield
    guest.map(process, AREA, pages)
    guest.sweep(process, AREA, pages, write=True)
    guest.go()
    yield
    guest.unmap(process, AREA, pages)
    guest.map(process, AREA, pages)
    guest.sweep(process, AREA, pages, write=True)
    yield from guest.repeat()


def _drifting(guest: Guest, process: int, areas: list[int], pages: int, chunk: int, meanwhile: int) -> Iterator[None]:
    """Rounds of parallel-fault by threads that drift apart; one is over when each has had as many pages in the mean.

    A munmap is not in one piece: between its stores to the table above the leaves' the others go on.
    """
    stored = [0] * len(areas)
    tables = -(-(pages << 12) // guest.huge)

    def turn(processor: int, most: int) -> int:
        """The thread stores to its next pages, `most` if it has as many; how many."""
        at = stored[processor]
        stored[processor] = min(at + most, pages)
        guest.sweep(process, areas[processor] + (at << 12), stored[processor] - at, write=True)
        return stored[processor] - at

    def finish(processor: int) -> int:
        """It reads its pages, unmaps them, and maps others; the other threads store to pages meanwhile: how many."""
        done = 0
        while_stored = guest.rng.poisson(meanwhile / 100, (tables, len(areas)))
        while_stored[:, processor] = 0
        guest.sweep(process, areas[processor], pages)  # without exits that takes no time
        guest.unmap(process, areas[processor], pages, amid=tables + 2 * int(np.count_nonzero(while_stored)))
        for others in while_stored:
            for other in np.flatnonzero(others):
                guest.on(int(other))
                done += turn(int(other), int(others[other]))
            guest.on(processor)
        guest.map(process, areas[processor], pages)
        stored[processor] = 0
        return done

    _map_all(guest, process, areas, pages)
    while True:
        left = pages * len(areas)
        while left > 0:
            processor = int(guest.rng.integers(len(areas)))
            guest.on(processor)
            left -= turn(processor, 1 + int(guest.rng.exponential(max(chunk - 1, 0))))
            if stored[processor] == pages:
                left -= finish(processor)
        guest.go()
        yield


@workload(
    "parallel-fault",
    "512MiB",
    TODAY,
    pages=(4096, 1, 1 << 20, "pages that each thread maps, stores to, reads and unmaps in a round"),
    **THREADS,
    ahead=(0, 0, 1 << 20, "pages by which a thread is ahead of the one before it"),
    drift=(1, 0, 1, "1: threads take turns at random, each of random length, `chunk` pages in the mean; 0: in step"),
    meanwhile=(
        25,
        0,
        10000,
        "with drift: hundredths of a page that another thread stores to in the time of an emulation",
    ),
)
def parallel_fault(guest: Guest, pages: int, chunk: int, ahead: int, drift: int, meanwhile: int) -> Iterator[None]:
    """A thread on each processor maps memory, stores to its pages, reads them back and unmaps it, again and again."""
    process = _threads(guest)
    areas = _areas(guest, pages)
    guest.go()
    yield
    if drift and ahead == 0 and len(areas) > 1:
        yield from _drifting(guest, process, areas, pages, chunk, meanwhile)
    if ahead == 0:
        _map_all(guest, process, areas, pages)
        _in_turns(guest, process, areas, pages, chunk, write=True)
        _in_turns(guest, process, areas, pages, chunk, write=False)
        _unmap_all(guest, process, areas, pages)
        yield from guest.repeat()
    turns = (pages + chunk - 1) // chunk
    first = [number * ahead // chunk % turns for number in range(len(areas))]
    _map_all(guest, process, areas, pages)
    guest.go()
    for turn in range(turns):
        for processor, area in enumerate(areas):
            guest.on(processor)
            at = (turn + first[processor]) % turns * chunk
            guest.sweep(process, area + (at << 12), min(chunk, pages - at), write=True)
            if at + chunk >= pages:  # without exits the rest takes no time
                guest.sweep(process, area, pages)
                guest.unmap(process, area, pages)
                guest.map(process, area, pages)
    yield from guest.repeat()


@workload(
    "fault-scaling",
    "512MiB",
    TODAY,
    pages=(8192, 1, 1 << 20, "pages of each thread"),
    **THREADS,
)
def fault_scaling(guest: Guest, pages: int, chunk: int) -> Iterator[None]:
    """Threads store for the first time to pages that were mapped before; then all is unmapped and mapped anew."""
    process = _threads(guest)
    areas = _areas(guest, pages)
    _map_all(guest, process, areas, pages)
    guest.go()
    yield
    while True:
        _in_turns(guest, process, areas, pages, chunk, write=True)
        guest.go()
        yield
        _unmap_all(guest, process, areas, pages)
        _map_all(guest, process, areas, pages)
        guest.go()
        yield


@workload(
    "unmap-scaling",
    "512MiB",
    TODAY,
    pages=(4096, 1, 1 << 20, "pages of each thread"),
    **THREADS,
)
def unmap_scaling(guest: Guest, pages: int, chunk: int) -> Iterator[None]:
    """Threads unmap memory whose pages were all stored to; then it is mapped and stored to anew."""
    process = _threads(guest)
    areas = _areas(guest, pages)
    _map_all(guest, process, areas, pages)
    _in_turns(guest, process, areas, pages, chunk, write=True)
    guest.go()
    yield
    while True:
        _unmap_all(guest, process, areas, pages)
        guest.go()
        yield
        _map_all(guest, process, areas, pages)
        _in_turns(guest, process, areas, pages, chunk, write=True)
        guest.go()
        yield
