"""Guest page tables, built in guest memory: what an operating system under test would have set up.

    tables = PageTables(memory, "64")
    tables.map(0x400000, gpa=0x10000, size=0x3000, rights="rxu")
    tables.map(0xFFFF_8880_0000_0000, gpa=0, size="32MiB", rights="rw", global_=True)
    tables.activate(cpu)

Past 500 lines, for it is one class and what its formats are.

Addresses are linear (va, the gva of an access) and guest physical (gpa), both in bytes. Sections are those of
the Intel SDM, volume 3A, chapter 4: 4.3 for mode "32", 4.4 for "pae", 4.5 for "64" and "la57".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import notebook
from .config import check_int, parse_size
from .errors import ConfigError

if TYPE_CHECKING:
    from .engine.machine import VM
    from .engine.memory import Memory
    from .engine.vcpu import VCpu

Mode = Literal["32", "pae", "64", "la57"]

# Bits of an entry (SDM 4.3 to 4.5; PAT is bit 12 instead of 7 where the entry maps a large page).
P, W, U, A, D, PS, G, PAT, PAT_LARGE = 1, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 7, 1 << 12
NX = 1 << 63
PKEY_SHIFT = 59

CR0_PE, CR0_ET, CR0_WP, CR0_PG = 1, 1 << 4, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_PGE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 7, 1 << 12
EFER_LME, EFER_NXE = 1 << 8, 1 << 11


@dataclass(frozen=True)
class Format:
    """How one mode lays out its tables.

    levels: levels of tables; level 1 is the one whose entries map 4096-byte pages.
    entry_size: bytes of an entry. index_bits: linear address bits that select an entry of a table.
    va_bits: significant bits of a linear address; the bits above repeat the highest (4.5), or there are none.
    largest: highest level whose entries can map a page.
    cr4, efer: what selects the mode, large pages, global pages and execute-disable included.
    """

    levels: int
    entry_size: int
    index_bits: int
    va_bits: int
    largest: int
    cr4: int
    efer: int

    def shift(self, level: int) -> int:
        """Linear address bits below the index into a table of `level`."""
        return 12 + self.index_bits * (level - 1)

    def index(self, va: int, level: int) -> int:
        """Number of the entry of a table of `level` that translates `va`."""
        return va % (1 << self.va_bits) >> self.shift(level) & (1 << self.index_bits) - 1

    def is_leaf(self, level: int, value: int) -> bool:
        """Whether a present entry of `level` maps a page."""
        return level == 1 or (level <= self.largest and bool(value & PS))

    def address(self, level: int, value: int) -> int:
        """Guest physical address in a present entry: of the page, if it is a leaf, else of the next table."""
        offset = (1 << self.shift(level)) - 1 if self.is_leaf(level, value) else 0xFFF
        if self.entry_size == 8:
            return value & 0xF_FFFF_FFFF_F000 & ~offset
        high = (value >> 13 & 0xFF) << 32 if level == 2 and value & PS else 0  # PSE-36, table 4-4
        return value & 0xFFFF_F000 & ~offset | high


FORMATS: dict[str, Format] = {
    "32": Format(2, 4, 10, 32, 2, CR4_PSE | CR4_PGE, 0),
    "pae": Format(3, 8, 9, 32, 2, CR4_PSE | CR4_PAE | CR4_PGE, EFER_NXE),
    "64": Format(4, 8, 9, 48, 3, CR4_PSE | CR4_PAE | CR4_PGE, EFER_LME | EFER_NXE),
    "la57": Format(5, 8, 9, 57, 3, CR4_PSE | CR4_PAE | CR4_PGE | CR4_LA57, EFER_LME | EFER_NXE),
}


class Entry(NamedTuple):
    """An entry where it lies: `level` of its table (1 maps 4096-byte pages), its `gpa`, and its `value`."""

    level: int
    gpa: int
    value: int

    def __repr__(self) -> str:
        return f"Entry(level={self.level}, gpa={self.gpa:#x}, value={self.value:#x})"


class Registers(dict[str, int]):
    """Registers by name, which print in hexadecimal."""

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {value:#x}" for name, value in self.items()) + "}"


class PageTables:
    """Page tables of one address space, in guest memory.

    memory: where they lie, at their guest physical addresses: a flat contiguous array of uint8 or uint64 that
        stands for guest RAM from gpa 0; a VM (stores are device writes, so that a guest that is running sees
        them); or the `memory` of a VM (plain stores: for tables that no vCPU has used yet).
    mode: "32" (two levels, 4.3), "pae" (three, 4.4), "64" (four, 4.5) or "la57" (five, 4.5).
    allocate: frames for tables: gfns, used in their order, or a function that returns another one each time.
        Default: the highest quarter of memory (of its first slot, and of what lies below 4 GiB).
    root: gpa of a root table that exists, to edit what it holds; default: a new one.

    Entries that point to tables are created present, writable and user (rights are in the leaves), with the
    accessed bit clear. PAE root entries have no rights and are created present; a processor caches them when
    CR3 is loaded, so load it again after the first mapping within another GiB.
    A call that raises has changed nothing in memory. Frames of tables that fall out of use are not reused.

    >>> tables = sc.PageTables(sc.VM("16MiB").memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> [entry.level for entry in tables.walk(0x401000)]
    [4, 3, 2, 1]
    """

    def __init__(
        self,
        memory: NDArray[Any] | VM | Memory,
        mode: Mode = "64",
        allocate: Iterable[int] | Callable[[], int] | None = None,
        root: int | None = None,
    ) -> None:
        if mode not in FORMATS:
            raise ConfigError(f"mode: {mode!r} is not one of {', '.join(map(repr, FORMATS))}")
        self.mode = mode
        self.format = FORMATS[mode]
        self._dtype = np.dtype(f"<u{self.format.entry_size}")
        self._memory = _Guest(memory)
        if allocate is None:
            allocate = self._memory.default_frames()
        self._allocate = allocate if callable(allocate) else None
        self._frames: range | deque[int]
        if isinstance(allocate, range):
            self._frames = allocate  # as it is: that of a large guest has a million frames
        else:
            self._frames = deque() if callable(allocate) else deque(allocate)
        self._taken: deque[int] = deque()
        self.tables: dict[int, int] = {}
        """gfn and level of each table created here, oldest first."""
        if root is None:
            self._reserve(1)
            root = self._new_table(self.format.levels, None)
        else:
            size = 32 if mode == "pae" else 4096
            root = check_int("root", root, 0, (1 << 52 if self.format.levels > 3 else 1 << 32) - 1)
            if root % size:
                raise ConfigError(f"root: {root:#x} is not a multiple of {size}")
            self._memory.load(root, size, np.dtype(np.uint8))
        self.root = root

    # -- what a processor loads ------------------------------------------------------------------------------

    @property
    def cr3(self) -> int:
        """Value for CR3: the gpa of the root table, cache and PCID bits clear."""
        return self.root

    def __repr__(self) -> str:
        return f"PageTables(mode={self.mode!r}, root={self.root:#x})"

    def _repr_html_(self) -> str:
        """The mappings, runs of pages with the same rights as one: 24 at most."""
        rows: list[tuple[str, str, str, str]] = []
        more = False
        for va, gpa, size, flags in self._mapped():
            if len(rows) == 24:
                more = True
                break
            rights = "r" + "".join(c if flags & bit else "-" for c, bit in (("w", W), ("u", U)))
            rights += "-" if flags & NX and self.format.entry_size == 8 else "x"
            rows.append((f"{va:#x} to {va + size - 1:#x}", f"{gpa:#x}", f"{size >> 10:,} KiB", rights))
        title = f"{self!r}{', the first 24 runs' if more else ''}"
        return notebook.table(title, ("linear addresses", "gpa", "size", "rights of the leaves"), rows)

    def _mapped(self) -> Iterator[tuple[int, int, int, int]]:
        """(va, gpa, bytes, flags) of each run of leaves that follow each other in both spaces, upwards from va 0."""
        run: tuple[int, int, int, int] | None = None
        for va, gpa, size, flags in self._every(self.root, self.format.levels, 0):
            if run is not None and (run[0] + run[2], run[1] + run[2], run[3]) == (va, gpa, flags):
                run = (run[0], run[1], run[2] + size, flags)
                continue
            if run is not None:
                yield run
            run = va, gpa, size, flags
        if run is not None:
            yield run

    def _every(self, table: int, level: int, base: int) -> Iterator[tuple[int, int, int, int]]:
        """The leaves below a table whose first entry translates `base`."""
        form = self.format
        count = 4 if self.mode == "pae" and level == 3 else 1 << form.index_bits
        words = self._memory.load(table, count, self._dtype)
        for index in np.flatnonzero(words).tolist():
            value, va = int(words[index]), base + (index << form.shift(level))
            if not value & P:
                continue
            if form.is_leaf(level, value):
                if va >> form.va_bits - 1 and form.levels > 3:
                    va |= -1 << form.va_bits & (1 << 64) - 1
                yield va, form.address(level, value), 1 << form.shift(level), value & (W | U | NX)
            else:
                yield from self._every(form.address(level, value & ~PS), level - 1, va)

    @property
    def registers(self) -> dict[str, int]:
        """Registers that turn this paging on, in the order to load them: efer, cr4, cr3, cr0.

        CR0.WP is set, as are the bits that enable large pages, global pages and, but for mode "32",
        execute-disable. Protection keys need CR4.PKE (bit 22) besides.
        """
        cr0 = CR0_PE | CR0_ET | CR0_WP | CR0_PG
        return Registers(efer=self.format.efer, cr4=self.format.cr4, cr3=self.cr3, cr0=cr0)

    def activate(self, cpu: VCpu) -> None:
        """Load `registers` into a vcpu, as the guest would: with the exits and faults of its MOVs and WRMSR
        (GeneralProtection where the vcpu lacks a feature)."""
        for name, value in self.registers.items():
            setattr(cpu, name, value)

    # -- mappings --------------------------------------------------------------------------------------------

    def map(
        self,
        va: int,
        gpa: int,
        size: int | str,
        rights: str | int = "rwx",
        page_size: int | str = "auto",
        *,
        global_: bool = False,
        pkey: int = 0,
        accessed: bool = False,
        dirty: bool = False,
    ) -> None:
        """Map `size` bytes at linear address `va` to guest physical address `gpa`, all multiples of 4096.

        size: bytes, or text such as "2MiB".
        rights: letters: r (needed), w writable, x executable, u user ("rx", "rwu"); mode "32" needs x.
            Or an int: the bits of the leaves besides address and page size, taken as they are (4.3 to 4.5).
        page_size: bytes of a page (int, or text such as "4MiB"): 4096; also 4 MiB in mode "32", 2 MiB in the
            others, 1 GiB in "64" and "la57". "auto": at each address the largest that its alignment allows.
        global_: set G: the translation outlives CR3 loads.
        pkey: protection key, 0 to 15, in modes "64" and "la57".
        accessed, dirty: set A, D in the leaves, so that the processor need not.

        What was mapped in the range before is replaced; a large page that is covered in part is split first.
        """
        va, size = self._checked_range(va, size)
        flags = self._flags(rights)
        if isinstance(rights, str):
            flags |= (A if accessed else 0) | (D if dirty else 0) | (G if global_ else 0) | self._key(pkey)
        elif global_ or pkey or accessed or dirty:
            raise ConfigError("rights: an int says all by its bits; global_, pkey, accessed, dirty must be unset")
        gpa = check_int("gpa", gpa, 0, (1 << 52) - 1)
        runs = list(self._runs(va, gpa, size, self._page_level(page_size)))
        missing = {key for va_run, _, level, _ in runs for key in self._missing(va_run, level)}
        self._reserve(len(missing | self._splits(va, va + size)))
        self._split(va, va + size)
        for va_run, gpa_run, level, count in runs:
            table = self._table(va_run, level)
            step = 1 << self.format.shift(level)
            pages = np.uint64(gpa_run) + np.uint64(step) * np.arange(count, dtype=np.uint64)
            values = pages | np.uint64(flags | (PS if level > 1 else 0))
            if self.format.entry_size == 4 and level == 2:
                values |= (pages >> np.uint64(32)) << np.uint64(13)  # PSE-36
            self._memory.store(self._entry_gpa(table, va_run, level), values.astype(self._dtype))

    def unmap(self, va: int, size: int | str) -> None:
        """Make `size` bytes at `va` not present: their leaves become 0; tables stay. Holes are no error."""
        va, size = self._checked_range(va, size)
        self._reserve(len(self._splits(va, va + size)))
        self._split(va, va + size)
        for entry, values in self._leaves(va, va + size):
            if values.any():
                self._memory.store(entry.gpa, np.zeros_like(values))

    def protect(self, va: int, size: int | str, rights: str | int) -> None:
        """Give the `size` bytes at `va`, all of them mapped, new rights.

        Letters change W, U and execute-disable only; an int every bit besides address and page size.
        """
        va, size = self._checked_range(va, size)
        flags = self._flags(rights)
        for entry, values in self._leaves(va, va + size):
            if not (values & P).all():
                raise ConfigError(f"va: [{va:#x}, {va + size:#x}) is not all mapped: see the entry at {entry.gpa:#x}")
        self._reserve(len(self._splits(va, va + size)))
        self._split(va, va + size)
        changed = (W | U | NX) if isinstance(rights, str) else self._flag_bits
        keep = ~np.uint64(changed)
        for entry, values in self._leaves(va, va + size):
            new = values.astype(np.uint64) & keep | np.uint64(flags & changed)
            self._memory.store(entry.gpa, new.astype(self._dtype))

    # -- single entries --------------------------------------------------------------------------------------

    def walk(self, va: int, level: int = 1) -> list[Entry]:
        """The entries that translate `va`, root first, down to `level`, a leaf, or the first not present."""
        return self._path(self._checked_va(va), check_int("level", level, 1, self.format.levels))

    def entry(self, va: int, level: int = 1) -> Entry:
        """The entry of `level` that translates `va`, present or not; ConfigError without such a table."""
        found = self.walk(va, level)[-1]
        if found.level != level:
            why = "maps a large page" if found.value & P else "is not present"
            raise ConfigError(f"level: {va:#x} has no table of level {level}: its level {found.level} entry {why}")
        return found

    def set_entry(self, va: int, level: int, value: int) -> None:
        """Store `value`, whatever it says, in the entry of `level` that translates `va`."""
        value = check_int("value", value, 0, (1 << 8 * self.format.entry_size) - 1)
        self._memory.store(self.entry(va, level).gpa, np.array([value], dtype=self._dtype))

    # -- checks ----------------------------------------------------------------------------------------------

    def _checked_va(self, va: int) -> int:
        va = check_int("va", va, 0, (1 << 64) - 1)
        if self.format.levels < 4:
            check_int("va", va, 0, (1 << 32) - 1)
        elif va >> self.format.va_bits - 1 not in (0, (1 << 65 - self.format.va_bits) - 1):
            raise ConfigError(f"va: {va:#x} is not canonical: bits 63:{self.format.va_bits - 1} must be equal")
        return va

    def _checked_range(self, va: int, size: int | str) -> tuple[int, int]:
        va, size = self._checked_va(va), parse_size(size, "size")
        last = self._checked_va(va + size - 1)
        if va % 4096:
            raise ConfigError(f"va: {va:#x} is not a multiple of 4096")
        if (va ^ last) >> 63:
            raise ConfigError(f"size: [{va:#x}, {last:#x}] crosses the addresses that are not canonical")
        return va, size

    def _flags(self, rights: str | int) -> int:
        if not isinstance(rights, str):
            flags = check_int("rights", rights, 0, (1 << 64) - 1)
            if flags & ~self._flag_bits:
                raise ConfigError(f"rights: {flags:#x} has bits besides {self._flag_bits:#x}")
            return flags
        if "r" not in rights or len(set(rights)) != len(rights) or set(rights) - set("rwxu"):
            raise ConfigError(f"rights: {rights!r} is not 'r' with any of w (write), x (execute), u (user)")
        if "x" not in rights and self.mode == "32":
            raise ConfigError(f"rights: {rights!r} withholds x, but mode '32' has no execute-disable")
        return P | (W if "w" in rights else 0) | (U if "u" in rights else 0) | (0 if "x" in rights else NX)

    @property
    def _flag_bits(self) -> int:
        """Bits of a leaf that are neither address nor page size."""
        return 0xF7F if self.format.entry_size == 4 else 0xFFF0_0000_0000_0F7F

    def _key(self, pkey: int) -> int:
        pkey = check_int("pkey", pkey, 0, 15)
        if pkey and self.format.levels < 4:
            raise ConfigError(f"pkey: mode {self.mode!r} has no protection keys, only '64' and 'la57' have")
        return pkey << PKEY_SHIFT

    def _page_level(self, page_size: int | str) -> int | None:
        """Level of the entries that map pages of this size; None: whichever fits."""
        if page_size == "auto":
            return None
        number = parse_size(page_size, "page_size")
        sizes = [1 << self.format.shift(level) for level in range(1, self.format.largest + 1)]
        if number not in sizes:
            raise ConfigError(f"page_size: mode {self.mode!r} has {', '.join(map(str, sizes))}, not {number}")
        return sizes.index(number) + 1

    def _runs(self, va: int, gpa: int, size: int, level: int | None) -> Iterator[tuple[int, int, int, int]]:
        """(va, gpa, level, pages) of leaves that stand side by side in one table."""
        if (gpa | size) % 4096 or gpa + size > 1 << 52:
            raise ConfigError(f"gpa: [{gpa:#x}, {gpa + size:#x}) is not made of frames of 4096 bytes below 2**52")
        page = 1 << self.format.shift(level or 1)
        if (va | gpa | size) % page:
            raise ConfigError(f"page_size: va, gpa and size must be multiples of {page}")
        end = va + size
        while va < end:
            at = level or max(
                k
                for k in range(1, self.format.largest + 1)
                if (va | gpa) % (1 << self.format.shift(k)) == 0 and end - va >= 1 << self.format.shift(k)
            )
            span = 1 << self.format.shift(at + 1)
            count = min(end - va, span - va % span) >> self.format.shift(at)
            length = count << self.format.shift(at)
            if self.format.entry_size == 4 and gpa + length > (1 << 40 if at == 2 else 1 << 32):
                raise ConfigError(f"gpa: {gpa + length - 1:#x} is beyond what a level {at} entry can hold")
            yield va, gpa, at, count
            va, gpa = va + length, gpa + length

    # -- tables ----------------------------------------------------------------------------------------------

    def _entry_gpa(self, table: int, va: int, level: int) -> int:
        return table + self.format.entry_size * self.format.index(va, level)

    def _path(self, va: int, level: int) -> list[Entry]:
        table, found = self.root, []
        for at in range(self.format.levels, level - 1, -1):
            gpa = self._entry_gpa(table, va, at)
            value = int(self._memory.load(gpa, 1, self._dtype)[0])
            found.append(Entry(at, gpa, value))
            if not value & P or self.format.is_leaf(at, value):
                break
            table = self.format.address(at, value)
        return found

    def _leaves(self, va: int, end: int) -> Iterator[tuple[Entry, NDArray[Any]]]:
        """Neighbouring leaves of [va, end), or the entry where tables end: the first one, and all values."""
        while va < end:
            entry = self._path(va, 1)[-1]
            span = 1 << self.format.shift(2 if entry.level == 1 else entry.level)
            stop = min(end, (va // span + 1) * span)
            count = stop - va >> 12 if entry.level == 1 else 1
            yield entry, self._memory.load(entry.gpa, count, self._dtype)
            va = stop

    def _missing(self, va: int, level: int) -> set[tuple[int, int]]:
        """Entries, as (level, va >> shift), that need a new table so that `va` has one of `level`."""
        last = self._path(va, level + 1)[-1] if level < self.format.levels else None
        if last is None or (last.value & P and not self.format.is_leaf(last.level, last.value)):
            return set()
        return {(at, va >> self.format.shift(at)) for at in range(last.level, level, -1)}

    def _splits(self, *edges: int) -> set[tuple[int, int]]:
        """Entries, as (level, va >> shift), that map a large page across one of the edges."""
        found = set()
        for edge in edges:
            if edge % (1 << self.format.shift(self.format.largest)) == 0:
                continue
            last = self._path(edge, 1)[-1]
            if not last.value & P:
                continue
            cut = [at for at in range(last.level, 1, -1) if edge % (1 << self.format.shift(at))]
            if cut and self.format.entry_size == 4 and self.format.address(2, last.value) >> 32:
                raise ConfigError(f"va: {edge:#x} cuts a page above 4 GiB, where 4096-byte pages cannot reach")
            found |= {(at, edge >> self.format.shift(at)) for at in cut}
        return found

    def _split(self, *edges: int) -> None:
        """Replace each large page across an edge by a table of smaller ones: edges become boundaries."""
        for edge in edges:
            for level, _ in sorted(self._splits(edge), reverse=True):
                entry = self._path(edge, level)[-1]
                flags = entry.value & (self._flag_bits | PAT_LARGE)
                if level == 2:
                    flags = flags & ~PAT_LARGE | (PAT if flags & PAT_LARGE else 0)
                else:
                    flags |= PS
                pages = np.arange(1 << self.format.index_bits, dtype=np.uint64)
                pages = (pages << np.uint64(self.format.shift(level - 1))) | np.uint64(
                    self.format.address(level, entry.value) | flags
                )
                self._new_table(level - 1, entry.gpa, pages.astype(self._dtype))

    def _table(self, va: int, level: int) -> int:
        """gpa of the table of `level` that translates `va`, made if it is not there."""
        for at in range(self.format.levels, level, -1):
            entry = self._path(va, at)[-1]
            if not entry.value & P or self.format.is_leaf(at, entry.value):
                self._new_table(at - 1, entry.gpa)
        if level == self.format.levels:
            return self.root
        parent = self._path(va, level + 1)[-1]
        return self.format.address(level + 1, parent.value)

    def _new_table(self, level: int, parent: int | None, values: NDArray[Any] | None = None) -> int:
        """A table in the next reserved frame, filled, and only then linked at gpa `parent`."""
        gfn = self._taken.popleft()
        table = gfn << 12
        self._memory.store(table, np.zeros(4096, dtype=np.uint8) if values is None else values)
        self.tables[gfn] = level
        if parent is not None:
            flags = P if self.mode == "pae" and level == 2 else P | W | U
            self._memory.store(parent, np.array([table | flags], dtype=self._dtype))
        return table

    def _reserve(self, count: int) -> None:
        """Take `count` frames for tables, all or none."""
        if self._allocate is not None:
            self._frames = deque(self._allocate() for _ in range(count))
        if count > len(self._frames):
            left, used = len(self._frames), len(self.tables)
            raise ConfigError(f"allocate: out of frames for tables: {count} needed, {left} left, {used} used")
        # CR3 and the entries of mode "32" have 32 bits.
        limit = 1 << 20 if self.mode == "32" or (self.mode == "pae" and not self.tables) else 1 << 40
        self._taken.clear()
        for _ in range(count):
            gfn = check_int("allocate: gfn", self._next_frame(), 0, limit - 1)
            self._memory.load(gfn << 12, 4096, np.dtype(np.uint8))
            if gfn in self.tables or gfn in self._taken:
                raise ConfigError(f"allocate: gfn {gfn:#x} holds a table already")
            self._taken.append(gfn)

    def _next_frame(self) -> object:
        """Take the next of the frames for tables."""
        if not isinstance(self._frames, range):
            return self._frames.popleft()
        first, self._frames = self._frames[0], self._frames[1:]
        return first


class _Guest:
    """Guest memory by gpa, behind an array, a VM, or a VM's memory."""

    def __init__(self, memory: Any) -> None:
        self._vm: Any = memory if hasattr(memory, "write_physical") else None
        self._slots: Any = memory.memory if self._vm else memory if hasattr(memory, "frame") else None
        if self._slots is not None:
            self._bytes: NDArray[np.uint8] = self._slots.bytes
        elif isinstance(memory, np.ndarray):
            self._bytes = _checked_array(memory)
        else:
            kind = type(memory).__name__
            raise ConfigError(f"memory: an array, a VM or a VM's memory is needed, not {kind}")

    def default_frames(self) -> range:
        """The highest quarter of the first slot, below 4 GiB so that every mode can use it."""
        slots = [slot for slot in self._slots.slots if slot is not None] if self._slots else []
        if self._slots and not slots:
            raise ConfigError("memory: no memory slot has room for tables")
        first = slots[0].gpa >> 12 if slots else 0
        size = slots[0].size if slots else self._bytes.size
        last = min(first + (size >> 12), 1 << 20)
        return range(first + (last - first) * 3 // 4, last)

    def _offset(self, gpa: int, size: int) -> int:
        if self._slots is not None:
            return int(self._slots.frame(gpa >> 12)) << 12 | gpa & 0xFFF
        if gpa + size > self._bytes.size:
            raise ConfigError(f"memory: a table at gpa {gpa:#x} is outside its {self._bytes.size} bytes")
        return gpa

    def load(self, gpa: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """`count` entries at `gpa`, within one frame: a view. ConfigError unless there is memory."""
        start = self._offset(gpa, count * dtype.itemsize)
        return self._bytes[start : start + count * dtype.itemsize].view(dtype)

    def store(self, gpa: int, values: NDArray[Any]) -> None:
        """Put entries at `gpa`, within one frame; the shadow MMU of a VM learns of it."""
        if self._vm is not None:
            self._vm.write_physical(gpa, values.tobytes())
        else:
            self.load(gpa, values.size, values.dtype)[:] = values


def _checked_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype not in (np.uint8, np.uint64) or array.ndim != 1 or not array.flags.c_contiguous:
        raise ConfigError(
            "memory: a contiguous one-dimensional array of uint8 or uint64 is needed, "
            f"not {array.dtype} of shape {array.shape}"
        )
    if not array.flags.writeable:
        raise ConfigError("memory: the array is read-only")
    if array.nbytes == 0 or array.nbytes % 4096:
        raise ConfigError(f"memory: {array.nbytes} bytes is not a positive multiple of 4096")
    return array.view(np.uint8)
