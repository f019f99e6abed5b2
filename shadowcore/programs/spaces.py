"""Address spaces of recorded programs: what is mapped where, as their system calls tell it, and who runs when.

`walk` goes through recordings in the order in which their processes run; a `Follower` keeps the address space of each
process as the events change it, and calls its own methods for what there is to do about it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, TraceError
from ..guest.options import Prot
from ..recording.format import CLONE_VM, PROGRAM, Event
from ..recording.reader import Reader

Key = tuple[int, int]
"""A process: number of the recording, number in it."""
Accesses = tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint64]]
"""op, size, addr of accesses that nothing interrupts."""

RW = int(Prot.READ | Prot.WRITE)
MAP_TYPE, MAP_SHARED, MAP_SHARED_VALIDATE = 3, 1, 3
MADV_DONTNEED = 4
TOP = 1 << 64


@dataclass(frozen=True)
class Area:
    """What a mapping is: rights, whether stores are seen by others, the file (None: anonymous) and the page of it that
    stands at address `base`. backing: whatever the follower wants to keep."""

    prot: int
    shared: bool = False
    file: str | None = None
    base: int = 0
    page: int = 0
    backing: Any = None

    def page_at(self, addr: int) -> int:
        return self.page + (addr - self.base >> 12)


Piece = tuple[int, int, Area]
"""[start, end) of an area."""


class Space:
    """The mappings of an address space, ascending, no two of which overlap; and its heap."""

    def __init__(self, other: Space | None = None) -> None:
        self.pieces: list[Piece] = list(other.pieces) if other else []
        self._starts: list[int] = list(other._starts) if other else []
        self._bounds: NDArray[np.uint64] | None = None
        self.heap_start: int | None = other.heap_start if other else None
        self.heap_end: int = other.heap_end if other else 0

    def _between(self, start: int, end: int) -> tuple[int, int]:
        """Indices of the pieces that overlap [start, end)."""
        low = bisect_right(self._starts, start)
        if low and self.pieces[low - 1][1] > start:
            low -= 1
        high = low
        while high < len(self.pieces) and self.pieces[high][0] < end:
            high += 1
        return low, high

    def within(self, start: int, end: int) -> list[Piece]:
        """What is mapped in [start, end), cut to that."""
        low, high = self._between(start, end)
        return [(max(first, start), min(last, end), area) for first, last, area in self.pieces[low:high]]

    def remove(self, start: int, end: int) -> None:
        self._replace(start, end, [])

    def add(self, start: int, end: int, area: Area) -> None:
        self._replace(start, end, [(start, end, area)])

    def protect(self, start: int, end: int, prot: int) -> None:
        self._replace(start, end, [(a, b, replace(area, prot=prot)) for a, b, area in self.within(start, end)])

    def _replace(self, start: int, end: int, pieces: list[Piece]) -> None:
        low, high = self._between(start, end)
        new = list(pieces)
        if low < high:
            first, last = self.pieces[low], self.pieces[high - 1]
            if first[0] < start:
                new.insert(0, (first[0], start, first[2]))
            if last[1] > end:
                new.append((end, last[1], last[2]))
        self.pieces[low:high] = new
        self._starts[low:high] = [piece[0] for piece in new]
        self._bounds = None

    def outside(self, pages: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of some pages (numbers) are in no mapping."""
        if self._bounds is None:
            flat = [bound >> 12 for start, end, _ in self.pieces for bound in (start, end)]
            self._bounds = np.array(flat, dtype=np.uint64)
        # Between an even number of bounds: outside. Pieces that touch count two bounds at once.
        inside: NDArray[np.bool_] = np.searchsorted(self._bounds, pages, side="right") % 2 == 0
        return inside


# -- the order in which they run -----------------------------------------------------------------------------


def open_all(paths: Sequence[str | os.PathLike[str]]) -> list[Reader]:
    """Readers of program recordings; TraceError if one is none."""
    if not paths:
        raise ConfigError("paths: at least one recording is needed")
    readers: list[Reader] = []
    try:
        for path in paths:
            reader = Reader(path)
            if reader.stream == PROGRAM and split(reader):
                # As many streams as processes: none of them reads ahead in threads of its own.
                reader.close()
                reader = Reader(path, ahead=0)
            readers.append(reader)
            if readers[-1].stream != PROGRAM:
                expected = f"a recording of a program expected, not of the stream {readers[-1].stream!r}"
                raise TraceError(path, None, expected)
    except BaseException:
        close_all(readers)
        raise
    return readers


def close_all(readers: Sequence[Reader]) -> None:
    for reader in readers:
        reader.close()


class _Stream:
    """What is run in turn: a recording in its own order, or one process of it. It may be looked at piece by piece."""

    def __init__(self, number: int, parts: Iterator[Any]) -> None:
        self.number = number
        self._parts = parts
        self._left: tuple[Any, ...] | None = None

    def take(self, room: int) -> Any:
        """The next event, or accesses, `room` of them at most; None at the end."""
        part = self._left if self._left is not None else next(self._parts, None)
        self._left = None
        if isinstance(part, tuple) and len(part[1]) > room:
            process, *columns = part
            self._left = (process, *(column[room:] for column in columns))
            part = (process, *(column[:room] for column in columns))
        return part


def _segments(reader: Reader) -> Iterator[Any]:
    for block in reader.blocks():
        yield from block.segments()


def split(reader: Reader) -> bool:
    """Whether the processes of a recording follow one another in it, for each was read from a file of its own: there
    is no order between them that one could keep."""
    files = reader.source.get("files") if isinstance(reader.source, dict) else None
    return isinstance(files, list) and len(files) > 1 and len(reader.processes) > 1


def walk(readers: Sequence[Reader], turn: int) -> Iterator[tuple[int, Any]]:
    """(number of the recording, event or (process, op, size, addr)), in the order in which the processes run.

    A recording that says in which order its processes ran keeps it. Several recordings, and processes that were read
    from files of their own, take turns of `turn` accesses; a process begins when another one has made it.
    """
    ready: deque[_Stream] = deque()
    waiting: dict[Key, _Stream] = {}
    for number, reader in enumerate(readers):
        if not split(reader):
            ready.append(_Stream(number, _segments(reader)))
            continue
        for entry in reader.processes:
            process = int(entry["number"])
            stream = _Stream(number, reader.process(process))
            if entry.get("parent") is None:
                ready.append(stream)
            else:
                waiting[number, process] = stream
    while ready or waiting:
        if not ready:  # nobody made it in these recordings
            ready.append(waiting.pop(min(waiting)))
        stream = ready.popleft()
        room = turn if ready or waiting else 1 << 62
        while room > 0:
            part = stream.take(room)
            if part is None:
                break
            if isinstance(part, tuple):
                room -= len(part[1])
            elif part["kind"] == Event.CLONE:
                made = waiting.pop((stream.number, int(part["other"])), None)
                if made is not None:
                    ready.append(made)
            yield stream.number, part
        else:
            ready.append(stream)


# -- what happens to them --------------------------------------------------------------------------------------


@dataclass
class Life:
    """A process while it is alive. image: which program it runs: (recording, process, how manieth of that process)."""

    key: Key
    image: tuple[int, int, int]
    space: Space
    own: Any = None


class Follower:
    """Keeps the address spaces of the processes of recordings, event by event. A subclass does something about it."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self.lives: dict[Key, Life] = {}
        self.ended: set[Key] = set()
        self.accesses = 0
        self.ignored = 0
        self._images: dict[Key, int] = {}

    # What a subclass does. Ranges are of whole pages; what is unmapped, protected, dropped or moved is mapped.

    def born(self, life: Life) -> None: ...

    def executed(self, life: Life, file: str | None) -> None: ...

    def cloned(self, parent: Life, child: Life) -> None: ...

    def exited(self, life: Life) -> None: ...

    def mapped(self, life: Life, start: int, end: int, area: Area) -> Area:
        return area

    def unmapped(self, life: Life, pieces: list[Piece]) -> None: ...

    def protected(self, life: Life, pieces: list[Piece], prot: int) -> None: ...

    def heap_set(self, life: Life, start: int) -> None: ...

    def heap_moved(self, life: Life, old: int, new: int) -> None: ...

    def moved(self, life: Life, start: int, end: int, to: int) -> None: ...

    def dropped(self, life: Life, pieces: list[Piece]) -> None: ...

    def accessed(self, life: Life, accesses: Accesses) -> None: ...

    # What happens.

    def take(self, number: int, part: Any) -> None:
        """The next part of recording `number`, as `walk` gives it."""
        if isinstance(part, tuple):
            key = number, part[0]
            if key in self.ended:
                self.ignored += len(part[1])
            else:
                self.accessed(self.life(key), part[1:])
            self.accesses += len(part[1])
            return
        key = number, int(part["process"])
        if key in self.ended:
            return
        _EVENTS[Event(int(part["kind"]))](self, self.life(key), part)

    def life(self, key: Key) -> Life:
        """The process, which begins here if it was not heard of."""
        life = self.lives.get(key)
        if life is None:
            life = Life(key, self._image(key), Space())
            self.lives[key] = life
            self.born(life)
        return life

    def _image(self, key: Key) -> tuple[int, int, int]:
        count = self._images.get(key, 0)
        self._images[key] = count + 1
        return (*key, count)

    def error(self, life: Life, expected: str) -> TraceError:
        return TraceError(self.readers[life.key[0]].path, None, f"process {life.key[1]}: {expected}")

    def _range(self, life: Life, event: Any, addr: str = "addr", size: str = "size") -> tuple[int, int]:
        """[start, end) of an event, in whole pages."""
        start = int(event[addr]) & ~4095
        end = (int(event[addr]) + int(event[size]) + 4095) & ~4095
        if end > TOP:
            what = Event(int(event["kind"])).name.lower()
            raise self.error(life, f"{what}: a range of addresses expected, not {event[size]:#x} from {start:#x} on")
        return start, end

    def file(self, life: Life, event: Any) -> str | None:
        number = int(event["file"])
        files = self.readers[life.key[0]].files
        return files[number - 1] if 0 < number <= len(files) else f"file {number}" if number else None

    def _exec(self, life: Life, event: Any) -> None:
        life.image = self._image(life.key)
        life.space = Space()
        self.executed(life, self.file(life, event))

    def _clone(self, life: Life, event: Any) -> None:
        other = life.key[0], int(event["other"])
        if int(event["flags"]) & CLONE_VM or other in self.lives:
            return
        self.ended.discard(other)
        child = Life(other, life.image, Space(life.space))
        self.lives[other] = child
        self.cloned(life, child)

    def _exit(self, life: Life, event: Any) -> None:
        self.end(life)

    def end(self, life: Life) -> None:
        """The process ends."""
        del self.lives[life.key]
        self.ended.add(life.key)
        self.exited(life)

    def _free(self, life: Life, start: int, end: int) -> None:
        pieces = life.space.within(start, end)
        if pieces:
            life.space.remove(start, end)
            self.unmapped(life, pieces)

    def map(self, life: Life, start: int, end: int, area: Area) -> None:
        """Map [start, end), in place of what is mapped there."""
        self._free(life, start, end)
        life.space.add(start, end, self.mapped(life, start, end, area))

    def _mmap(self, life: Life, event: Any) -> None:
        start, end = self._range(life, event)
        if start < end:
            shared = int(event["flags"]) & MAP_TYPE in (MAP_SHARED, MAP_SHARED_VALIDATE)
            prot = int(event["prot"]) & 7
            file = self.file(life, event)
            page = int(event["offset"]) >> 12 if file is not None else 0
            self.map(life, start, end, Area(prot, shared, file, start, page))

    def _munmap(self, life: Life, event: Any) -> None:
        self._free(life, *self._range(life, event))

    def _mprotect(self, life: Life, event: Any) -> None:
        start, end = self._range(life, event)
        pieces = life.space.within(start, end)
        prot = int(event["prot"]) & 7
        if pieces:
            life.space.protect(start, end, prot)
            self.protected(life, pieces, prot)

    def _brk(self, life: Life, event: Any) -> None:
        space, end = life.space, (int(event["addr"]) + 4095) & ~4095
        if space.heap_start is None:
            space.heap_start = space.heap_end = end
            self.heap_set(life, end)
            return
        if end < space.heap_start or end > TOP:
            raise self.error(life, f"brk: an end of the heap from {space.heap_start:#x} on expected, not {end:#x}")
        old, space.heap_end = space.heap_end, end
        if end > old:
            self._free(life, old, end)
        if end != old:
            self.heap_moved(life, old, end)
        if end > old:
            space.add(old, end, Area(RW, base=old))
        else:
            space.remove(end, old)

    def _mremap(self, life: Life, event: Any) -> None:
        old, old_end = self._range(life, event, "other", "offset")
        new, new_end = self._range(life, event)
        pieces = life.space.within(old, old_end)
        if new >= new_end or not pieces:
            return
        if old != new and new < old_end and old < new_end:
            raise self.error(life, f"mremap: another range than that at {old:#x} expected, not one at {new:#x}")
        area = pieces[-1][2]
        keep = min(old_end - old, new_end - new)
        self._free(life, old + keep, old_end)
        if old != new:
            self._free(life, new, new_end)
            for start, end, piece in life.space.within(old, old + keep):
                self.moved(life, start, end, start - old + new)
                life.space.add(start - old + new, end - old + new, replace(piece, base=piece.base - old + new))
            life.space.remove(old, old + keep)
            area = replace(area, base=area.base - old + new)
        if keep < new_end - new:
            self.map(life, new + keep, new_end, area)

    def _madvise(self, life: Life, event: Any) -> None:
        if int(event["flags"]) == MADV_DONTNEED:
            pieces = life.space.within(*self._range(life, event))
            if pieces:
                self.dropped(life, pieces)


_EVENTS = {
    Event.EXEC: Follower._exec,
    Event.CLONE: Follower._clone,
    Event.EXIT: Follower._exit,
    Event.MMAP: Follower._mmap,
    Event.MUNMAP: Follower._munmap,
    Event.MPROTECT: Follower._mprotect,
    Event.BRK: Follower._brk,
    Event.MREMAP: Follower._mremap,
    Event.MADVISE: Follower._madvise,
}
