"""yardsticks.c, compiled when a benchmark first asks for it, and called through ctypes."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np

import shadowcore as sc

SOURCE = Path(__file__).with_name("yardsticks.c")
FLAGS = ["-O3", "-fPIC", "-shared"]  # as in a wheel: no tuning to this machine's CPU
NOWHERE = 2**64 - 1

READ, WRITE, FETCH = 0, 1, 2
ACCESS = np.array([0, 2, 16], dtype=np.uint8)
"""Error code bits of an access, by operation."""
USER = 4

PTE_P, PTE_W, PTE_U, PTE_A, PTE_D, PTE_PS = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7


class NoCompiler(Exception):
    """There is nothing to build the yardsticks with."""


class Paging(ctypes.Structure):
    """struct paging."""

    _fields_ = (
        ("ram", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("root", ctypes.c_uint64),
        ("pdpte", ctypes.c_uint64 * 4),
        ("reserved", ctypes.c_uint64 * 6 * 2),
        ("large_levels", ctypes.c_uint32),
        ("levels", ctypes.c_uint32),
        ("forbidden", ctypes.c_uint8 * 32 * 8),
    )


def compiler() -> list[str]:
    """The command of the C compiler: $CC, the one Python was built with, or whichever there is."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise NoCompiler("no C compiler to build the yardsticks with (CC names one)")


def build(source: Path, directory: str, *options: str) -> ctypes.CDLL:
    """The library made from the C file `source`, in `directory`."""
    library = Path(directory) / f"{source.stem}.so"
    command = [*compiler(), *FLAGS, *options, "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
    return ctypes.CDLL(str(library))


def paging(memory: np.ndarray, tables: sc.PageTables, maxphyaddr: int = 46) -> Paging:
    """What walk_batch needs to walk `tables`, which lie in the flat array `memory` (uint8)."""
    p = Paging(memory.ctypes.data, memory.size, tables.root)
    levels = tables.format.levels
    p.levels = levels
    high = (1 << 52) - (1 << maxphyaddr)
    if levels == 2:
        p.large_levels = 1 << 2
        p.reserved[1][2] = 0x3FE000 & ~(((1 << (min(maxphyaddr, 40) - 32)) - 1) << 13)
    else:
        if levels == 3:
            high = (1 << 63) - (1 << maxphyaddr)
            root = memory[tables.root : tables.root + 32].view("<u8")
            p.pdpte[:] = [int(entry) for entry in root]
        p.large_levels = 1 << 2 if levels == 3 else 1 << 2 | 1 << 3
        for level in range(1, 6):
            p.reserved[0][level] = high
            in_page = ((1 << (12 + 9 * (level - 1))) - 1) & ~0x1FFF
            p.reserved[1][level] = high | (0 if level == 1 else in_page if level < 4 else PTE_PS)
    for rights in range(8):
        for access in range(32):
            user, write, fetch = access & USER, access & 2, access & 16
            allowed = (rights & USER or not user) and (rights & 2 or not write) and (rights & 1 or not fetch)
            p.forbidden[rights][access] = not allowed
    return p


class Walks:
    """A batch of page walks in C, of the accesses of an operation array, over the tables of a guest."""

    def __init__(self, library: ctypes.CDLL, memory: np.ndarray, tables: sc.PageTables, ops: np.ndarray) -> None:
        self.memory = memory
        self.operations = len(ops)
        self.paging = paging(memory, tables)
        self.va = np.ascontiguousarray(ops["addr"])
        self.access = ACCESS[ops["op"]] | np.where(ops["user"] != 0, USER, 0).astype(np.uint8)
        if tables.format.levels == 2:
            self.access &= ~ACCESS[FETCH]  # 32-bit paging knows no execute-disable and reports no fetches
        self.gpa = np.zeros(self.operations, dtype=np.uint64)
        self.outcome = np.zeros(self.operations, dtype=np.uint8)
        self.error_code = np.zeros(self.operations, dtype=np.uint16)
        arrays = (self.va, self.access, self.operations, self.gpa, self.outcome, self.error_code)
        pointers = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arrays]
        pointers[2] = ctypes.c_size_t(self.operations)
        self.arguments = (ctypes.byref(self.paging), *pointers)
        self.function = library.walk_batch
        self.function.restype = None

    def __call__(self) -> None:
        self.function(*self.arguments)


class Host(ctypes.Structure):
    """Host tables, as nested_batch walks them."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("pool", "pool_hpa", "pool_size", "root", "ram_hpa"))


class NestedWalks(Walks):
    """A batch of walks in two dimensions in C: `tables` of a guest, 4 levels, through the host's tables of its VM."""

    def __init__(self, library: ctypes.CDLL, vm: sc.VM, tables: sc.PageTables, ops: np.ndarray) -> None:
        super().__init__(library, vm.memory.bytes, tables, ops)
        memory, pool = vm.memory, vm.memory.pool
        assert pool is not None
        root = vm.mmu.roots()[0]
        assert root is not None
        self.host = Host(pool.ctypes.data, memory.pool_hpa, pool.nbytes, memory.pool_hpa + (root << 12), memory.ram_hpa)
        self.arguments = (self.arguments[0], ctypes.byref(self.host), *self.arguments[1:])
        self.function = library.nested_batch
        self.function.restype = None


class Hits:
    """A batch of operations in C, each translated by a direct-mapped cache (4-level paging)."""

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: np.ndarray,
        tables: sc.PageTables,
        ops: np.ndarray,
        entries: int = 4096,
    ) -> None:
        assert (ops.itemsize, ops.dtype.fields["addr"][1]) in ((19, 3), (24, 8))
        assert entries & (entries - 1) == 0
        self.ops = ops
        self.memory = memory
        self.operations = len(ops)
        self.paging = paging(memory, tables)
        self.cache = np.full(entries * 4, NOWHERE, dtype=np.uint64)
        self.gpa = np.zeros(self.operations, dtype=np.uint64)
        self.outcome = np.zeros(self.operations, dtype=np.uint8)
        self.arguments = (
            ctypes.byref(self.paging),
            ctypes.c_void_p(self.cache.ctypes.data),
            ctypes.c_size_t(entries),
            ctypes.c_void_p(ops.ctypes.data),
            ctypes.c_size_t(self.operations),
            ctypes.c_void_p(self.gpa.ctypes.data),
            ctypes.c_void_p(self.outcome.ctypes.data),
            ctypes.c_size_t(ops.itemsize),
        )
        self.function = library.hit_batch
        self.function.restype = ctypes.c_size_t
        self.misses = 0

    def __call__(self) -> None:
        self.misses = self.function(*self.arguments)


class Tables:
    """A comparison in C of guest tables with what their shadows should be, both (tables, 512) arrays of u64."""

    def __init__(self, library: ctypes.CDLL, guest: np.ndarray, shadow: np.ndarray) -> None:
        assert guest.shape == shadow.shape
        assert guest.dtype == shadow.dtype == np.uint64
        self.arrays = (np.ascontiguousarray(guest), np.ascontiguousarray(shadow))
        self.arguments = (*(ctypes.c_void_p(a.ctypes.data) for a in self.arrays), ctypes.c_size_t(guest.size))
        self.function = library.compare_tables
        self.function.restype = ctypes.c_size_t
        self.differ = 0

    def __call__(self) -> None:
        self.differ = self.function(*self.arguments)


class Yardsticks:
    """The compiled loops. `walk`: the unit in which the costs of other software are given."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shadowcore-bench-")
        self.library = build(SOURCE, self._directory.name)

    def close(self) -> None:
        self._directory.cleanup()

    def walks(self, memory: np.ndarray, tables: sc.PageTables, ops: np.ndarray) -> Walks:
        return Walks(self.library, memory, tables, ops)

    def nested(self, vm: sc.VM, tables: sc.PageTables, ops: np.ndarray) -> NestedWalks:
        return NestedWalks(self.library, vm, tables, ops)

    def hits(self, memory: np.ndarray, tables: sc.PageTables, ops: np.ndarray) -> Hits:
        return Hits(self.library, memory, tables, ops)

    def tables(self, guest: np.ndarray, shadow: np.ndarray) -> Tables:
        return Tables(self.library, guest, shadow)

    @cached_property
    def walk(self) -> Walks:
        """Full page walks, 4-level, loads by user code at random within 2 MiB: everything in cache."""
        memory = np.zeros(4 << 20, dtype=np.uint8)
        tables = sc.PageTables(memory, "64")
        tables.map(0x400000, 0, 2 << 20, "rwu", page_size=4096, accessed=True, dirty=True)
        ops = np.zeros(1 << 14, dtype=sc.OP_DTYPE)
        ops["user"] = 1
        ops["addr"] = 0x400000 + np.random.default_rng(1).integers(0, 2 << 20, len(ops), dtype=np.uint64)
        walks = self.walks(memory, tables, ops)
        walks()
        assert not walks.outcome.any()
        assert (walks.gpa == ops["addr"] - np.uint64(0x400000)).all()
        return walks
