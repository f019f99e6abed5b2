"""A model of what the guest kernel does for recorded programs, page by page, with dictionaries: nothing of the engine.

It takes a recording's segments in their order, and counts what the kernel counts with fault_around=1.
"""

from collections import Counter
from dataclasses import dataclass

from shadowcore.recordings import FETCH, MODIFY, READ, WRITE, Event

R, W, X = 1, 2, 4
STACK_PAGES = 2048


class Frame:
    def __init__(self, anonymous):
        self.count = 1
        self.anonymous = anonymous


ZERO = Frame(False)


@dataclass
class Mapping:
    """What mmap made: all of its pages are of one file, or of none."""

    prot: int
    shared: bool
    file: object = None
    written: bool = False


@dataclass
class Entry:
    frame: Frame
    w: bool


class Process:
    def __init__(self):
        self.map = {}  # page: (Mapping, prot, page of the file)
        self.entries = {}
        self.touched = set()
        self.stack = None  # (lowest page, top)
        self.heap = None


def pages_of(event, addr="addr", size="size"):
    start, length = int(event[addr]), int(event[size])
    return range(start >> 12, start + length + 4095 >> 12)


class Model:
    def __init__(self, reader, regions):
        """regions: of the images that are mapped at each exec, in the order of these."""
        self.reader, self.regions = reader, iter(regions)
        self.processes, self.cache, self.n = {}, {}, Counter()
        self.touched = Counter()
        self.accesses = self.refused = self.shared = 0

    def run(self):
        for block in self.reader:
            for part in block.segments():
                if isinstance(part, tuple):
                    for op, size, addr in zip(*(column.tolist() for column in part[1:]), strict=True):
                        self.access(self.process(part[0]), part[0], op, size, addr)
                else:
                    getattr(self, Event(part["kind"]).name.lower())(self.process(int(part["process"])), part)
        return self

    def process(self, number):
        if number not in self.processes:
            self.processes[number] = Process()
        return self.processes[number]

    # -- events

    def exec(self, p, event):
        self.drop(p, list(p.entries))
        p.map, p.touched, p.heap, p.stack = {}, set(), None, None
        self.n["execs"] += 1
        for region in next(self.regions):
            if region.grows:
                p.stack = [region.first, region.stop]
            mapping = Mapping(region.prot, False, None if region.page is None else "image", written=region.grows)
            for page in range(region.first, region.stop):
                p.map[page] = mapping, region.prot, page - region.first + (region.page or 0)

    def clone(self, p, event):
        if int(event["flags"]) & 0x100:
            return
        child = self.processes[int(event["other"])] = Process()
        child.map, child.heap, child.stack = dict(p.map), p.heap, p.stack and list(p.stack)
        self.n["forks"] += 1
        for page, entry in p.entries.items():
            mapping = p.map[page][0]
            if mapping.shared or (mapping.file is not None and not mapping.written):
                continue  # left to faults
            entry.w = False
            entry.frame.count += 1
            child.entries[page] = Entry(entry.frame, False)

    def exit(self, p, event):
        self.drop(p, list(p.entries))
        p.map = {}
        self.n["exits"] += 1

    def mmap(self, p, event):
        pages = pages_of(event)
        self.unmap(p, pages)
        shared, file, first = int(event["flags"]) & 1, int(event["file"]), int(event["offset"]) >> 12
        if shared and not file:
            self.shared += 1
            file, first = ("shared", self.shared), 0
        mapping = Mapping(int(event["prot"]), bool(shared), file or None)
        for page in pages:
            p.map[page] = mapping, mapping.prot, first + page - pages[0]

    def munmap(self, p, event):
        self.unmap(p, pages_of(event))

    def mprotect(self, p, event):
        for page in pages_of(event):
            if page in p.map:
                mapping, prot, at = p.map[page]
                if prot != event["prot"]:
                    p.map[page] = mapping, int(event["prot"]), at
                    if page in p.entries:
                        p.entries[page].w = mapping.shared and bool(event["prot"] & W)

    def brk(self, p, event):
        end = int(event["addr"]) + 4095 >> 12
        if p.heap is None:
            p.heap = [end, Mapping(R | W, False)]
        self.unmap(p, [page for page in p.map if p.map[page][0] is p.heap[1] and page >= end])
        first = max((page + 1 for page in p.map if p.map[page][0] is p.heap[1]), default=p.heap[0])
        for page in range(first, end):
            p.map[page] = p.heap[1], R | W, 0

    def mremap(self, p, event):
        old, new = pages_of(event, "other", "offset"), pages_of(event)
        last = p.map[old[-1]]
        self.unmap(p, old[len(new) :])
        if old[0] != new[0]:
            self.unmap(p, new)
            for source, target in zip(old, new, strict=False):
                p.map[target] = p.map.pop(source)
                p.touched.discard(source)
                if source in p.entries:
                    p.entries[target] = p.entries.pop(source)
        for n in range(len(old), len(new)):
            p.map[new[n]] = last[0], last[1], last[2] + n - len(old) + 1

    def madvise(self, p, event):
        if event["flags"] == 4:
            self.drop(p, pages_of(event))

    def unmap(self, p, pages):
        self.drop(p, pages)
        for page in pages:
            p.map.pop(page, None)

    def drop(self, p, pages):
        for page in pages:
            p.touched.discard(page)
            entry = p.entries.pop(page, None)
            if entry is not None:
                entry.frame.count -= 1

    # -- accesses

    def access(self, p, number, op, size, addr):
        self.accesses += 1
        refused = False
        for page in range(addr >> 12, (addr + max(size, 1) - 1 >> 12) + 1):
            if page not in p.touched:
                p.touched.add(page)
                self.touched[number] += 1
            refused = refused or not self.touch(p, page, op in (WRITE, MODIFY), op == FETCH)
            assert op in (READ, WRITE, FETCH, MODIFY)
        self.refused += refused

    def touch(self, p, page, write, fetch):
        """One page of an access; False: refused."""
        entry = p.entries.get(page)
        if (
            entry is not None
            and not (write and not entry.w)
            and not (fetch and not p.map[page][1] & X)
            and p.map[page][1]
        ):
            return True
        self.n["faults"] += 1
        if page not in p.map and p.stack and p.stack[1] - STACK_PAGES <= page < p.stack[0]:
            self.n["stack_growth"] += p.stack[0] - page
            for more in range(page, p.stack[0]):
                p.map[more] = p.map[p.stack[0]]
            p.stack[0] = page
        if page not in p.map:
            return False
        mapping, prot, at = p.map[page]
        if not prot or (write and not prot & W) or (fetch and not prot & X):
            return False
        if entry is not None:
            self.write_fault(p, page, entry, mapping)
        elif mapping.file is not None:
            self.n["faults_file"] += 1
            private = write and not mapping.shared
            mapping.written |= private
            frame = Frame(True) if private else self.cache.setdefault((mapping.file, at), Frame(False))
            frame.count += not private
            p.entries[page] = Entry(frame, private or (mapping.shared and bool(prot & W)))
        elif write:
            self.n["faults_zero"] += 1
            p.entries[page] = Entry(Frame(True), True)
        else:
            self.n["faults_zero_page"] += 1
            p.entries[page] = Entry(ZERO, False)
        return True

    def write_fault(self, p, page, entry, mapping):
        if mapping.shared or (entry.frame.anonymous and entry.frame.count == 1):
            self.n["faults_reused"] += 1
            entry.w = True
            return
        self.n["faults_copied"] += 1
        mapping.written = True
        entry.frame.count -= 1
        p.entries[page] = Entry(Frame(True), True)
