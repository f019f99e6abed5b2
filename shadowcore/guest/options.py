"""Settings of the guest kernel, and the codes of its operations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from ..config import check_bool, check_int
from ..errors import ConfigError

MODES = ("32", "pae", "64", "la57")
DIRECT_MAPS = {"4k": 1, "large": 2, "huge": 3}
SLOPPY = {"munmap": 1, "mprotect": 2, "fork": 4, "cow": 8, "swap": 16, "age": 32}


class Call(IntEnum):
    """Codes of the `op` field of CALL_DTYPE; the fields that each uses, beside `process`, are in its docstring.

    >>> calls = np.zeros(1, sc.CALL_DTYPE)
    >>> calls["op"] = sc.Call.SYSCALL
    >>> sc.Call(int(calls["op"][0])).name
    'SYSCALL'
    """

    TOUCH = 0
    """`count` accesses of `size` bytes from `addr` on, every `value` bytes or, with Touch.RANDOM, at random within
    `value` bytes. Result: how many were refused."""
    SWITCH = 1
    """Schedule the process."""
    SYSCALL = 2
    """Into the kernel and back, with `count` accesses to its own data."""
    SPAWN = 3
    """A new process, of program `value` (NO_PROGRAM: none), under a number that is free. flags 1, without a program:
    nothing is mapped, not even a stack, and the heap begins at `addr`."""
    FORK = 4
    """`value`: number of the child."""
    EXEC = 5
    """`value`: the program; flags and `addr` as those of SPAWN."""
    EXIT = 6
    MMAP = 7
    """`count` bytes at `addr` (0: anywhere), rights `prot`; `value`: 0, or number of a file + 1, and its first page
    in the upper half; flags: 1 shared, 2 a stack, which grows. Result: the address."""
    MUNMAP = 8
    """`count` bytes at `addr`. The `value` operations after it, TOUCH and CPU, are done amid it: after each store to a
    table above the leaves those up to the return to this processor; what is left then, after it."""
    MPROTECT = 9
    """`count` bytes at `addr` get rights `prot`."""
    BRK = 10
    """The heap ends at `addr`. Result: where it ends."""
    AGE = 11
    """Accessed bits of the next `count` pages. Result: how many were set."""
    SWAP_OUT = 12
    """Look at the next `count` pages for some to take away. Result: how many were."""
    PIPE_WRITE = 13
    """`count` bytes at `addr` to pipe `value`."""
    PIPE_READ = 14
    """One buffer of pipe `value` to `addr`."""
    IDLE = 15
    """A timer tick with nothing to run."""
    DROP = 16
    """The pages of `count` bytes at `addr` are given up, their mappings stay (MADV_DONTNEED)."""
    MOVE = 17
    """`count` bytes at `value`, of one mapping, go to `addr`, where nothing is mapped (mremap)."""
    CPU = 18
    """What follows is done by processor `value`, until another one is named; the first is 0. A process that several
    processors have scheduled has a thread on each."""


class Touch(IntFlag):
    """The `flags` field of Call.TOUCH.

    >>> sc.Touch(0)
    <Touch.READ: 0>
    """

    READ = 0
    WRITE = 1
    FETCH = 2
    RANDOM = 4


class Prot(IntFlag):
    """Rights of a mapping.

    >>> sc.Prot.READ | sc.Prot.WRITE
    <Prot.READ|WRITE: 3>
    """

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


_LIMITS = {
    "atomic_bytes": (1, 8),
    "fault_around": (1, 512),
    "flush_ceiling": (0, 1 << 20),
    "flush_gather": (1, 1 << 20),
    "heap_gap": (0, 8191),
    "kernel_work": (0, 1 << 16),
    "kernel_data": (1, 1 << 20),
    "swap_pages": (0, (1 << 20) - 2),
    "large_pages": (0, 1 << 22),
    "max_processes": (1, 1 << 20),
    "max_mappings": (8, 1 << 20),
    "max_files": (1, 1 << 24),
    "max_file_pages": (1, 1 << 32),
    "max_programs": (1, 1 << 20),
    "max_pipes": (1, 1 << 24),
    "seed": (0, (1 << 64) - 1),
}


@dataclass(frozen=True)
class KernelOptions:
    """How the guest kernel is built. Defaults: a 64-bit Linux of today without mitigations.

    mode: "32", "pae", "64" or "la57", the paging mode.
    direct_map: pages that map all of memory for the kernel: "4k", "large" (2 MiB; 4 MiB in mode "32"), "huge" (1 GiB).
    global_: the kernel's pages are global (CR4.PGE).
    isolation: user code runs on a root of its own without the kernel half (page-table isolation); not in mode "32".
    pcid: address spaces are tagged, CR3 loads keep translations ("64" and "la57").
    swap_pages: 4096-byte slots of swap space.
    large_pages: of 2 MiB (4 MiB in mode "32"), set aside at the end of memory for shared memory (hugetlbfs).
    sloppy: flushes that the kernel forgets, of "munmap", "mprotect", "fork", "cow", "swap", "age".
    atomic_bytes: width of the locked instruction that takes W away: 1 (Linux since 2008), 4 or 8 (before; at most that
        of a long).
    fault_around: pages that a load from a file maps at once, a power of two up to 512 (Linux: 16 since 3.15, 1 before).
    flush_ceiling: pages that are flushed one by one; more: everything (Linux: 33).
    flush_gather: frames that wait for one flush before they are freed (Linux: 9,622 since 3.7, about 500 in 2007).
    grouped: frames of tables, kernel stacks and pipe buffers come from blocks of their own, of the size of a large page
        (Linux since 2.6.24: mobility). The defaults of these two are those of 2007.
    regions: the kernel half has what Linux has there beside the direct map, under root entries of its own: the kernel's
        image (its data), the structs of pages, the entry area of the processor. Each new root is used in all of them.
        Modes "64" and "la57".
    vmap_stacks: a kernel stack is four pages in an area of the kernel's own, mapped when a process is made; when it has
        ended they are kept for the next one, or unmapped without a flush (Linux since 4.9: CONFIG_VMAP_STACK). Else it
        is a frame, used through the direct map. Modes "64" and "la57".
    heap_gap: pages between a program and its heap (Linux since 2.6.25: a random number up to 8,191). From about 512 on
        the heap has leaf tables of its own.
    kernel_work: the kernel's accesses to its own data at a system call; half of them at a switch, a quarter at a fault.
    kernel_data: pages of that data.
    age_flush: clearing an accessed bit is followed by a flush (Linux until 2014; without one, TLBs hide accesses).
    max_processes, max_mappings (of each), max_files, max_file_pages (of all), max_programs, max_pipes: room in tables.
    seed: of the kernel's random numbers (Touch.RANDOM), 64 bits.

    >>> kernel = sc.Kernel(sc.VM("16MiB"), options=sc.KernelOptions(mode="pae", direct_map="4k"))
    >>> kernel.options.mode
    'pae'
    """

    mode: str = "64"
    direct_map: str = "large"
    global_: bool = True
    isolation: bool = False
    pcid: bool = False
    swap_pages: int = 0
    large_pages: int = 0
    sloppy: tuple[str, ...] = ()
    atomic_bytes: int = 1
    fault_around: int = 16
    flush_ceiling: int = 33
    flush_gather: int = 512
    grouped: bool = False
    regions: bool = False
    vmap_stacks: bool = False
    heap_gap: int = 0
    kernel_work: int = 8
    kernel_data: int = 64
    age_flush: bool = True
    max_processes: int = 1024
    max_mappings: int = 256
    max_files: int = 1024
    max_file_pages: int = 1 << 20
    max_programs: int = 256
    max_pipes: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, names in (("mode", MODES), ("direct_map", DIRECT_MAPS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in names:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(names)}")
        for name in ("global_", "isolation", "pcid", "grouped", "regions", "vmap_stacks", "age_flush"):
            object.__setattr__(self, name, check_bool(name, getattr(self, name)))
        for name, (low, high) in _LIMITS.items():
            object.__setattr__(self, name, check_int(name, getattr(self, name), low, high))
        if self.direct_map == "huge" and self.mode not in ("64", "la57"):
            raise ConfigError(f"direct_map: 'huge' needs mode '64' or 'la57', not {self.mode!r}")
        if self.isolation and self.mode == "32":
            raise ConfigError("isolation: mode 'pae', '64' or 'la57' is needed, not '32'")
        if self.pcid and self.mode not in ("64", "la57"):
            raise ConfigError(f"pcid: mode '64' or 'la57' is needed, not {self.mode!r}")
        for name in ("regions", "vmap_stacks"):
            if getattr(self, name) and self.mode not in ("64", "la57"):
                raise ConfigError(f"{name}: mode '64' or 'la57' is needed, not {self.mode!r}")
        sloppy = tuple(self.sloppy)
        for name in sloppy:
            if name not in SLOPPY:
                raise ConfigError(f"sloppy: a tuple of {', '.join(SLOPPY)} is needed, not {self.sloppy!r}")
        object.__setattr__(self, "sloppy", sloppy)
        if self.atomic_bytes not in (1, 4, 8):
            raise ConfigError(f"atomic_bytes: {self.atomic_bytes!r} is not 1, 4 or 8")
        if self.fault_around & (self.fault_around - 1):
            raise ConfigError(f"fault_around: {self.fault_around} is not a power of two")


@dataclass(frozen=True)
class File:
    """A file of the guest, or shared memory: its number, its pages of 4096 bytes, and whether they begin as
    zeros, and are large.

    >>> sc.File(3, 16).pages
    16
    """

    number: int
    pages: int
    zero: bool = False
    large: bool = False


@dataclass(frozen=True)
class Program:
    """What exec maps: its number, and pages of each part.

    >>> sc.Program(0, text=16, data=4, bss=4).text
    16
    """

    number: int
    text: int
    data: int
    bss: int
