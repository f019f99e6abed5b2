"""Guests for the benchmarks: a VM, the page tables of its address space, and operations on it."""

from collections.abc import Callable

import numpy as np

import shadowcore as sc

MODES = ("64", "pae", "32")
"""The modes that the series was measured in."""
ALL_MODES = ("32", "pae", "64", "la57")
PAGE = 4096
ALIGNED = np.dtype(sc.OP_DTYPE.descr, align=True)
"""The fields of OP_DTYPE as a C compiler lays them out: 24 bytes."""
MIB = 1 << 20


class Guest:
    """A VM with `table_room` bytes for page tables, from gpa 0, and behind them `size` bytes for the rest.

    Leaves are made user, writable, executable, accessed, dirty, of 4096 bytes unless it is said otherwise.
    kernel: where the tables can be mapped for supervisor code: the guest edits them there.
    """

    def __init__(
        self,
        mode: str,
        size: int,
        mmu: str | sc.Native | sc.Shadow = "cached",
        table_room: int = 16 * MIB,
        tlb: sc.TLB | sc.ProcessorTLB | None = None,
    ) -> None:
        self.mode = mode
        self.size = size
        self.kernel = 0xFFFF_8880_0000_0000 if mode in ("64", "la57") else 0xC000_0000
        self.vm = sc.VM(memory=size + table_room, mmu=mmu, tlb=tlb)
        self.cpu = self.vm.vcpus[0]
        self.frames = iter(range(table_room // PAGE))
        self.table_room = table_room
        self.tables = self.address_space()

    def address_space(self) -> sc.PageTables:
        """Empty page tables of one more address space."""
        return sc.PageTables(self.vm.memory, self.mode, allocate=lambda: next(self.frames))

    def map(self, va: int = 0, offset: int = 0, size: int | None = None, page_size: int = PAGE) -> "Guest":
        """Map memory to user code in the first address space; default: all of it, from va 0."""
        self.map_in(self.tables, va, offset, size, page_size)
        return self

    def map_in(
        self, tables: sc.PageTables, va: int = 0, offset: int = 0, size: int | None = None, page_size: int = PAGE
    ) -> None:
        """The same in any address space. offset: into the memory behind the tables."""
        size = self.size if size is None else size
        gpa = self.table_room + offset
        tables.map(va, gpa, size, "rwxu", page_size=page_size, accessed=True, dirty=True)

    def map_tables(self, size: int = 4 * MIB, page_size: int = PAGE) -> "Guest":
        """Map the frames of the tables at `kernel`, for supervisor code."""
        self.tables.map(self.kernel, 0, max(size, page_size), "rwx", page_size=page_size, accessed=True, dirty=True)
        return self

    def start(self) -> "Guest":
        """Turn paging on."""
        for name, value in self.tables.registers.items():
            setattr(self.cpu, name, value)
        return self

    def run(self, ops: np.ndarray, data: bool = False) -> sc.RunResult:
        return self.cpu.run(ops, data=data)

    def edit_address(self, gpa: np.ndarray) -> np.ndarray:
        """Where supervisor code reaches gpas of tables."""
        return np.uint64(self.kernel) + gpa

    @property
    def entry_dtype(self) -> np.dtype:
        return np.dtype("<u4") if self.mode == "32" else np.dtype("<u8")

    def leaf_tables(self, va: int, size: int) -> np.ndarray:
        """gpas of the tables of level 1 for [va, va + size), one after the other."""
        step = 1 << self.tables.format.shift(2)
        return np.array([self.tables.entry(at).gpa & ~0xFFF for at in range(va, va + size, step)], dtype=np.uint64)

    def entries(self, table: int) -> np.ndarray:
        """The entries of the table at gpa `table`, in guest memory (a view)."""
        return self.vm.memory.bytes[int(table) : int(table) + PAGE].view(self.entry_dtype)


def accesses(va: np.ndarray, op: int = sc.Op.READ, user: int = 1, size: int = 8, value: object = 0) -> np.ndarray:
    """Operations, one at each address."""
    ops = np.zeros(len(va), dtype=sc.OP_DTYPE)
    ops["op"], ops["user"], ops["size"] = op, user, size
    ops["addr"], ops["value"] = va, value
    return ops


def pages(count: int, first: int = 0) -> np.ndarray:
    """Linear addresses of `count` pages, one after the other."""
    return np.arange(first, first + count, dtype=np.uint64) * np.uint64(PAGE)


def one_per_region(count: int, region: int = 2 * MIB) -> np.ndarray:
    """Addresses, one in each region of a leaf shadow table, in changing places: no cache set is crowded."""
    number = np.arange(count, dtype=np.uint64)
    return number * np.uint64(region) + (number * np.uint64(37) % np.uint64(region // PAGE)) * np.uint64(PAGE)


def sparse_tables(guest: Guest, va: np.ndarray, leaf: int | None = None) -> None:
    """Map a page at each of these addresses, one in each region of 2 MiB at most, in 4-level tables made at once.

    Every address gets a leaf table of its own; with `leaf`, all directories' entries have that value instead.
    """
    assert guest.mode == "64"
    words = guest.vm.memory.words
    used = np.uint64(0x67)  # present, writable, user, accessed, dirty
    region = va >> np.uint64(21)
    assert len(np.unique(region)) == len(region)
    frames = np.full(len(va), leaf or 0, dtype=np.uint64)
    if leaf is None:
        frames = np.array([next(guest.frames) for _ in region], dtype=np.uint64)
        entry = frames * np.uint64(512) + (va >> np.uint64(12)) % np.uint64(512)
        number = np.arange(len(va), dtype=np.uint64) % np.uint64(guest.size // PAGE)
        words[entry] = np.uint64(guest.table_room) + number * np.uint64(PAGE) | used
        frames = frames * np.uint64(PAGE) | used
    for upper in (9, 18):  # directories, then the tables above them; the root is there
        group, member = np.unique(region >> np.uint64(9), return_inverse=True)
        tables = np.array([_upper(guest, int(number), upper) for number in group], dtype=np.uint64)
        words[tables[member] * np.uint64(512) + region % np.uint64(512)] = frames
        region, frames = group, tables * np.uint64(PAGE) | used
    words[np.uint64(guest.tables.root // 8) + region] = frames


def _upper(guest: Guest, number: int, bits: int) -> int:
    """Frame of the table that translates addresses number << (21 + bits) on: the one there is, or a new one."""
    found = guest.tables.walk(number << (21 + bits), 3 if bits == 9 else 4)[-1]
    wanted = 3 if bits == 9 else 4
    return found.value >> 12 & 0xFFFFFFFFFF if found.level == wanted and found.value & 1 else next(guest.frames)


def editing_guest(mode: str, flood_threshold: int = 3, page_size: int = PAGE) -> tuple[Guest, np.ndarray]:
    """A guest of 400 MiB that can edit its tables, through pages of `page_size`, and the gpas of its 200 leaf tables
    (mode 32: 100)."""
    shadow = sc.Shadow.cached(pool_pages=1024, flood_threshold=flood_threshold)
    guest = Guest(mode, 400 * MIB, shadow).map().map_tables(page_size=page_size).start()
    return guest, guest.leaf_tables(0, guest.size)


def stores_to(guest: Guest, gpa: np.ndarray) -> np.ndarray:
    """Supervisor stores to entries of tables, of what they hold."""
    size = guest.entry_dtype.itemsize
    values = guest.vm.memory.bytes.view(guest.entry_dtype)[gpa // np.uint64(size)]
    return accesses(guest.edit_address(gpa), sc.Op.WRITE, user=0, size=size, value=values)


def entries_of(guest: Guest, tables: np.ndarray) -> np.ndarray:
    """gpas of all entries of the tables. Two tables take turns: stores to one after the other are a flood."""
    offsets = np.arange(0, PAGE, guest.entry_dtype.itemsize, dtype=np.uint64)
    return (tables.reshape(-1, 1, 2) + offsets[None, :, None]).ravel()


def demand_paging(guest: Guest) -> tuple[np.ndarray, Callable[[], None]]:
    """Operations by which a guest fills its leaf tables, which have to be mapped, page by page: the access faults, the
    kernel stores the entry, the access is made again. And what clears entries and shadow before."""
    leaves = guest.leaf_tables(0, guest.size)
    at = (leaves[:, None] + np.arange(0, PAGE, 8, dtype=np.uint64)).ravel()
    entries = guest.vm.memory.words[at // np.uint64(8)].copy()
    ops = np.zeros(3 * len(at), sc.OP_DTYPE)
    ops["size"], ops["user"] = 8, 1
    ops["addr"][0::3] = ops["addr"][2::3] = pages(len(at))
    ops["op"][1::3], ops["user"][1::3] = sc.Op.WRITE, 0
    ops["addr"][1::3], ops["value"][1::3] = guest.edit_address(at), entries

    def prepare() -> None:
        guest.vm.mmu.zap_all()
        guest.vm.memory.words[at // np.uint64(8)] = 0
        guest.cpu.cr3 = guest.tables.cr3

    return ops, prepare
