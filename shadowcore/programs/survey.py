"""What recorded programs need, by one pass over their recordings: pages, mappings, and where image and stack lie.

Image and stack are mapped by the kernel at exec, and are in no line of a recording: they are put together from the
accesses that are outside of every mapping. docs/programs.md says how.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import check_int
from ..errors import ConfigError, TraceError
from ..files import check_path
from ..guest.options import Prot
from ..recording.reader import Reader
from .spaces import Accesses, Area, Follower, Key, Life, Piece, close_all, open_all, walk
from .touched import FETCH, WRITE, PageSet

Image = tuple[int, int, int]

GAP = 16
"""Pages between two that were touched, in what is taken for one piece of an image (fault-around of Linux: 16)."""
STACK_LIMIT = 2048
"""Pages of a stack, at most (ulimit -s)."""
STACK_FIRST = 33
"""Pages of a stack that exec maps; it grows by faults."""
TURN = 100_000
_MIB = 1 << 20


@dataclass(frozen=True)
class Region:
    """Pages [first, stop) of an image. page: in the image's file, None: anonymous. grows: a stack."""

    first: int
    stop: int
    prot: int
    page: int | None = None
    grows: bool = False


@dataclass(frozen=True)
class Survey:
    """What was found in recordings. Sizes are in pages of 4096 bytes unless they say bytes.

    paths: of the recordings; turn: accesses of a turn, where they take turns. name: of them all. records: accesses.
    regions: of each image; groups: its program; heaps: where its heap begins (bytes); image_files: pages that come
        from the file of a program.
    touched: for each process, pages that it touched, each counted once in each of its lives. peak: touched pages of
        all processes alive, and of those gone whose children inherited them, at most at a time.
    mappings, processes: at most at a time. files: pages of each file mapped. shared: how many shared anonymous
        mappings are made, and pages of them.
    highest: end of the highest range touched or mapped (bytes), and its process. extents: ranges of 1 MiB and more
        that are used, as bytes.
    fetches, sizes, events: there are fetches, accesses of more than one byte, changes of mappings.
    """

    paths: tuple[str, ...]
    turn: int
    name: str
    records: int
    regions: dict[Image, tuple[Region, ...]]
    groups: dict[Image, str]
    image_files: dict[str, int]
    heaps: dict[Image, int]
    touched: dict[Key, int]
    peak: int
    mappings: int
    processes: int
    files: dict[str, int]
    shared: tuple[int, int]
    highest: tuple[int, Key]
    extents: tuple[tuple[int, int], ...]
    fetches: bool = True
    sizes: bool = True
    events: bool = True

    @property
    def memory(self) -> int:
        """Bytes of guest memory that hold the programs: what they touch, twice over for page tables and the page
        cache's read-ahead, files as far as they may come to be cached, and the kernel."""
        cached = sum(self.files.values()) + sum(self.image_files.values()) + self.shared[1]
        pages = self.peak * 5 // 4 + min(cached, GAP * self.peak) + 32 * self.processes + 2048
        pages += pages // 16
        return max(16 * _MIB, 1 << (pages * 4096 - 1).bit_length())


class _Touched:
    """What a process has touched since its exec, or since it was forked from `parent`. Pages of one that is gone are
    in memory as long as there are `kids`, forked from it, that inherited them."""

    def __init__(self, parent: _Touched | None = None) -> None:
        self.pages = PageSet()
        self.parent = parent
        self.kids = 0
        self.left: int | None = None  # pages of a process that is gone
        if parent is not None:
            parent.kids += 1

    def leave(self) -> int:
        """The process is gone; pages that are free now."""
        self.left = len(self.pages)
        self.pages.clear()
        free, node = 0, self
        while node.left is not None and node.kids == 0:
            free += node.left
            if node.parent is None:
                break
            node = node.parent
            node.kids -= 1
        return free


class _Surveyor(Follower):
    """Counts pages, and notes those that are in no mapping."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        super().__init__(readers)
        self.loose: dict[Image, dict[int, int]] = {}
        self.names: dict[Image, str | None] = {}
        self.heaps: dict[Image, int] = {}
        self.touched: dict[Key, int] = {}
        self.files: dict[str, int] = {}
        self.windows: set[int] = set()
        self.fetches = self.sizes = self.events = False
        self.shared = (0, 0)
        self.highest: tuple[int, Key] = (0, (0, 0))
        self.resident = self.peak = self.mappings = self.processes = 0

    def _started(self, life: Life, parent: _Touched | None = None) -> None:
        life.own = _Touched(parent)
        self.loose.setdefault(life.image, {})
        self.processes = max(self.processes, len(self.lives))

    def born(self, life: Life) -> None:
        self.names[life.image] = None
        self._started(life)

    def executed(self, life: Life, file: str | None) -> None:
        self.names[life.image] = file
        self.resident -= life.own.leave()
        self._started(life)

    def cloned(self, parent: Life, child: Life) -> None:
        self._started(child, parent.own)

    def exited(self, life: Life) -> None:
        self.resident -= life.own.leave()

    def _gone(self, life: Life, start: int, end: int) -> None:
        pages: PageSet = life.own.pages
        before = len(pages)
        pages.remove(start >> 12, end >> 12)
        self.resident -= before - len(pages)

    def _seen(self, life: Life, first: int, last: int) -> None:
        """Pages up to `last` are used by a process, of them `first` and `last`."""
        if (last + 1) << 12 > self.highest[0]:
            self.highest = (last + 1) << 12, life.key
        self.windows.update((first >> 8, last >> 8))

    def mapped(self, life: Life, start: int, end: int, area: Area) -> Area:
        self.events = True
        self._gone(life, start, end)
        self.mappings = max(self.mappings, len(life.space.pieces) + 1)
        if area.file is not None:
            pages = area.page_at(start) + (end - start >> 12)
            self.files[area.file] = max(self.files.get(area.file, 0), pages)
        elif area.shared:
            self.shared = self.shared[0] + 1, self.shared[1] + (end - start >> 12)
        self._seen(life, start >> 12, (end >> 12) - 1)
        self.windows.update(range(start >> 20, min(end >> 20, (start >> 20) + 4096)))
        return area

    def unmapped(self, life: Life, pieces: list[Piece]) -> None:
        for start, end, _ in pieces:
            self._gone(life, start, end)

    def heap_set(self, life: Life, start: int) -> None:
        self.heaps.setdefault(life.image, start)

    def heap_moved(self, life: Life, old: int, new: int) -> None:
        self.events = True
        self._gone(life, min(old, new), max(old, new))
        self._seen(life, min(old, new) >> 12, max(old, new, 1) - 1 >> 12)
        self.mappings = max(self.mappings, len(life.space.pieces) + 1)

    def moved(self, life: Life, start: int, end: int, to: int) -> None:
        self._gone(life, start, end)
        self._seen(life, to >> 12, (to + end - start >> 12) - 1)

    def dropped(self, life: Life, pieces: list[Piece]) -> None:
        self.unmapped(life, pieces)

    def protected(self, life: Life, pieces: list[Piece], prot: int) -> None:
        self.mappings = max(self.mappings, len(life.space.pieces))

    def accessed(self, life: Life, accesses: Accesses) -> None:
        known: PageSet = life.own.pages
        before = len(known)
        pages, flags = known.add(*accesses)
        self.sizes = self.sizes or bool((accesses[1] > 1).any())
        if not len(pages):
            return
        new = len(known) - before
        self.fetches = self.fetches or bool(np.bitwise_or.reduce(flags) & FETCH)
        self.resident += new
        self.peak = max(self.peak, self.resident)
        self.touched[life.key] = self.touched.get(life.key, 0) + new
        loose = life.space.outside(pages)
        image = self.loose[life.image]
        for page, flag in zip(pages[loose].tolist(), flags[loose].tolist(), strict=True):
            image[page] = image.get(page, 0) | flag
        low, high = int(pages.min()), int(pages.max())
        self._seen(life, low, high)
        self.windows.update(np.unique(pages >> np.uint64(8)).tolist())


def _extents(pages: list[int]) -> list[list[int]]:
    """Pages with gaps of GAP at most between them, piece by piece."""
    found: list[list[int]] = []
    for page in pages:
        if not found or page - found[-1][-1] > GAP:
            found.append([])
        found[-1].append(page)
    return found


def lay_out(pages: dict[int, int]) -> tuple[tuple[Region, ...], int]:
    """Regions of an image of which these pages were touched (READ, WRITE, FETCH), and pages of its file."""
    extents = _extents(sorted(pages))
    if not extents:
        return (), 0
    regions: list[Region] = []
    top = extents[-1][-1] + 1
    stack: list[int] = []
    while extents and extents[-1][0] >= top - STACK_LIMIT and not any(pages[page] & FETCH for page in extents[-1]):
        stack = extents.pop() + stack
    file = 0
    for extent in extents:
        backed = any(pages[page] & FETCH for page in extent)
        kind, first = 0, extent[0]
        runs: list[tuple[int, int, int]] = []
        for page in extent:
            here = pages[page] & (WRITE | FETCH)
            if here and here != kind and not (kind == 0 and here == FETCH):
                if page > first:
                    runs.append((first, page, kind))
                first = page
            kind = here or kind
        for begin, stop, rights in [*runs, (first, extent[-1] + 1, kind)]:
            prot = Prot.READ | (Prot.WRITE if rights & WRITE else 0) | (Prot.EXEC if rights & FETCH else 0)
            regions.append(Region(begin, stop, int(prot), file if backed else None))
            file += stop - begin if backed else 0
    if stack and any(pages[page] & WRITE for page in stack):
        first = max(stack[0], top - STACK_FIRST)
        regions.append(Region(first, top, int(Prot.READ | Prot.WRITE), grows=True))
    else:
        for extent in _extents(stack):
            regions.append(Region(extent[0], extent[-1] + 1, int(Prot.READ)))
    return tuple(regions), file


def survey(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    turn: int = TURN,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read recordings of programs, as `programs.run` will; what they need. progress: accesses done, and all."""
    given = paths if isinstance(paths, Iterable) and not isinstance(paths, (str, bytes, os.PathLike)) else [paths]
    names = [check_path(name, "recordings") for name in given]
    check_int("turn", turn, 1, 1 << 40)
    readers = open_all(names)
    try:
        found = _Surveyor(readers)
        records = sum(reader.records for reader in readers)
        for number, part in walk(readers, turn):
            found.take(number, part)
            if progress is not None and isinstance(part, tuple):
                progress(found.accesses, records)
        return _conclude(found, names, readers, turn)
    finally:
        close_all(readers)


def _conclude(found: _Surveyor, names: Sequence[Any], readers: Sequence[Reader], turn: int) -> Survey:
    groups = {image: name if name is not None else f"program of {image}" for image, name in found.names.items()}
    union: dict[str, dict[int, int]] = {}
    for image, pages in found.loose.items():
        group = union.setdefault(groups[image], {})
        for page, flag in pages.items():
            group[page] = group.get(page, 0) | flag
    laid = {group: lay_out(pages) for group, pages in union.items()}
    return Survey(
        paths=tuple(os.fspath(name) for name in names),
        turn=turn,
        name="+".join(reader.name for reader in readers),
        records=found.accesses,
        regions={image: laid[group][0] for image, group in groups.items()},
        groups=groups,
        image_files={group: pages for group, (_, pages) in laid.items() if pages},
        heaps=found.heaps,
        touched=found.touched,
        peak=found.peak,
        mappings=found.mappings + max((len(regions) for regions, _ in laid.values()), default=0),
        processes=found.processes,
        files=found.files,
        shared=found.shared,
        highest=found.highest,
        extents=_merged(found.windows),
        fetches=found.fetches,
        sizes=found.sizes,
        events=found.events,
    )


def _merged(windows: set[int]) -> tuple[tuple[int, int], ...]:
    """Ranges of bytes that windows of 1 MiB make up."""
    ranges: list[list[int]] = []
    for window in sorted(windows):
        if ranges and window <= ranges[-1][1]:
            ranges[-1][1] = window + 1
        else:
            ranges.append([window, window + 1])
    return tuple((first << 20, stop << 20) for first, stop in ranges)


@dataclass(frozen=True)
class Fold:
    """Ranges of addresses that move down, so that they fit below an end: starts, ends and new starts, ascending."""

    starts: np.ndarray[Any, np.dtype[np.uint64]]
    ends: np.ndarray[Any, np.dtype[np.uint64]]
    deltas: np.ndarray[Any, np.dtype[np.uint64]]

    def one(self, addr: int) -> int:
        i = int(np.searchsorted(self.starts, np.uint64(addr), side="right")) - 1
        return addr - int(self.deltas[i]) if i >= 0 and addr < int(self.ends[i]) else addr

    def all(self, addr: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        i = np.searchsorted(self.starts, addr, side="right") - 1
        inside = (i >= 0) & (addr < self.ends[i])
        return np.where(inside, addr - self.deltas[i], addr)


def folding(found: Survey, end: int) -> Fold | None:
    """How addresses at `end` and above come below it; None if there are none. ConfigError if there is no room.

    What is used above `end` is packed below it, in its order, each piece as far into 4 MiB as it was.
    """
    high = [extent for extent in found.extents if extent[1] > end]
    if found.highest[0] <= end or not high:
        return None
    low_end = max((extent[1] for extent in found.extents if extent[1] <= end), default=0)
    at, placed = end, []
    for start, stop in reversed(high):
        at = (at - (stop - start) - 4 * _MIB) & ~(4 * _MIB - 1)
        new = at + (start & 4 * _MIB - 1)
        placed.append((start, stop, new))
    if at < low_end + 4 * _MIB:
        size = sum(stop - start for start, stop in high) >> 20
        raise ConfigError(f"fold: {size} MiB of addresses above {end:#x} do not fit between {low_end:#x} and it")
    bounds = np.array(placed[::-1], dtype=np.uint64)
    return Fold(bounds[:, 0].copy(), bounds[:, 1].copy(), bounds[:, 0] - bounds[:, 2])


def check_addresses(found: Survey, end: int, mode: str) -> None:
    """TraceError for addresses that the user half of a mode does not have."""
    top, (recording, process) = found.highest
    if top > end:
        expected = (
            f"process {process}: addresses below {end:#x} expected in mode {mode!r}, not {top - 4096:#x}; "
            "fold=True packs those above it"
        )
        raise TraceError(found.paths[recording], None, expected)
