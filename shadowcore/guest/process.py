"""Processes of the guest kernel, as Python sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import check_int
from ..errors import ConfigError, PageFault
from .options import Call, File, Program, Prot, Touch

NO_PIPE = 0xFFFFFFFF


def _page_range(name: str, addr: SupportsIndex, length: SupportsIndex, high: int) -> tuple[int, int]:
    """Checked (addr, length) of whole pages below `high`."""
    first = check_int(f"{name}: addr", addr, 0, high - 4096)
    if first & 4095:
        raise ConfigError(f"{name}: addr: {first:#x} is not a multiple of 4096")
    return first, (check_int(f"{name}: length", length, 1, high - first) + 4095) & ~4095


class Scheduler(Protocol):
    """What a process asks of its kernel (kernel.Kernel)."""

    @property
    def task_size(self) -> int: ...
    def generation_of(self, number: SupportsIndex) -> int: ...
    def state_of(self, number: SupportsIndex, generation: int) -> dict[str, Any]: ...
    def free_number(self) -> int: ...
    def call(
        self,
        op: SupportsIndex,
        process: SupportsIndex = 0,
        addr: SupportsIndex = 0,
        count: SupportsIndex = 0,
        value: SupportsIndex = 0,
        *,
        flags: SupportsIndex = 0,
        size: SupportsIndex = 8,
        prot: SupportsIndex = 0,
    ) -> int: ...
    def access(
        self,
        number: SupportsIndex,
        addresses: ArrayLike,
        write: bool | NDArray[np.bool_] | NDArray[np.uint8],
        values: ArrayLike | None,
        size: int,
        results: bool,
    ) -> Any: ...
    def _file(self, file: File) -> int: ...
    def _program(self, program: Program | None) -> int: ...


class ProcessState(NamedTuple):
    """What the kernel knows of a process."""

    root: int
    user_root: int
    brk: int
    brk_start: int
    resident: int
    swapped: int
    tables: int
    mappings: NDArray[np.void]


class Process:
    """A process of a guest kernel. Whatever it does, it is scheduled first, if it is not the one that runs.

    number: under which the kernel knows it. Everything but `alive` raises ConfigError once it has ended.

    >>> process = sc.Kernel(sc.VM("16MiB")).spawn()
    >>> process.switch()
    >>> heap = process.mmap(8192)
    >>> process.write(heap, 7)
    >>> process.read(heap), process.alive
    (7, True)
    """

    __slots__ = ("_generation", "kernel", "number")

    def __init__(self, kernel: Scheduler, number: int) -> None:
        self.kernel = kernel
        self.number = number
        self._generation = kernel.generation_of(number)

    @property
    def alive(self) -> bool:
        """It has not exited."""
        try:
            self._state()
        except ConfigError:
            return False
        return True

    def _state(self) -> ProcessState:
        return ProcessState(**self.kernel.state_of(self.number, self._generation))

    def _call(
        self,
        op: Call,
        addr: SupportsIndex = 0,
        count: SupportsIndex = 0,
        value: SupportsIndex = 0,
        *,
        flags: int = 0,
        size: SupportsIndex = 8,
        prot: int = 0,
    ) -> int:
        self._state()
        return self.kernel.call(op, self.number, addr, count, value, flags=flags, size=size, prot=prot)

    @property
    def root(self) -> int:
        """gpa of its top table (under isolation: the kernel's)."""
        return self._state().root

    @property
    def user_root(self) -> int:
        """gpa of the top table that its own code runs on."""
        return self._state().user_root

    @property
    def mappings(self) -> NDArray[np.void]:
        """Structured array (MAPPING_DTYPE), ascending. file: number + 1, or 0."""
        return self._state().mappings

    @property
    def resident(self) -> int:
        """Pages mapped to frames."""
        return self._state().resident

    @property
    def swapped(self) -> int:
        """Pages in swap space."""
        return self._state().swapped

    @property
    def tables(self) -> int:
        """Frames of its page tables."""
        return self._state().tables

    @property
    def heap(self) -> tuple[int, int]:
        """(start, end) of the heap."""
        state = self._state()
        return state.brk_start, state.brk

    def switch(self) -> None:
        """Schedule it."""
        self._call(Call.SWITCH)

    def syscall(self, accesses: SupportsIndex = 8) -> None:
        """A system call that does nothing but `accesses` to the kernel's data."""
        self._call(Call.SYSCALL, count=accesses)

    def touch(
        self,
        addresses: ArrayLike,
        write: bool | NDArray[np.bool_] | NDArray[np.uint8] = False,
        values: ArrayLike | None = None,
        size: int = 8,
    ) -> int:
        """Access each of an array of addresses (uint64) from user mode, in order; how many were refused.

        write: bool, or an array of them. values: what the stores store (None: each another number). size in bytes.
        """
        self._state()
        return int(self.kernel.access(self.number, addresses, write, values, size, False))

    def access(
        self,
        addresses: ArrayLike | Sequence[int],
        write: bool | NDArray[np.bool_] | NDArray[np.uint8] = False,
        values: ArrayLike | None = None,
        size: int = 8,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64]]:
        """The same, as arrays: outcome (uint8: 0 done, 1 refused), value (uint64: loaded or stored), gpa (uint64)."""
        self._state()
        outcome, value, gpa = self.kernel.access(self.number, addresses, write, values, size, True)
        return outcome, value, gpa

    def sweep(
        self,
        addr: SupportsIndex,
        count: SupportsIndex,
        stride: SupportsIndex = 4096,
        write: bool = False,
        size: SupportsIndex = 8,
    ) -> int:
        """`count` accesses, every `stride` bytes from `addr` on; how many were refused."""
        return self._call(Call.TOUCH, addr, count, stride, flags=Touch.WRITE if write else 0, size=size)

    def scatter(
        self,
        addr: SupportsIndex,
        length: SupportsIndex,
        count: SupportsIndex,
        write: bool = False,
        size: SupportsIndex = 8,
    ) -> int:
        """`count` accesses at random in `length` bytes from `addr` on; how many were refused."""
        return self._call(
            Call.TOUCH, addr, count, length, flags=Touch.RANDOM | (Touch.WRITE if write else 0), size=size
        )

    def execute(self, addr: SupportsIndex, count: SupportsIndex = 1, stride: SupportsIndex = 4096) -> int:
        """`count` instruction fetches, every `stride` bytes from `addr` on; how many were refused."""
        return self._call(Call.TOUCH, addr, count, stride, flags=Touch.FETCH, size=1)

    def read(self, addr: SupportsIndex, size: int = 8) -> int:
        """Load from `addr`; PageFault if the process may not."""
        at = check_int("addr", addr, 0, (1 << 64) - 1)
        outcome, value, _ = self.access([at], False, None, size)
        if outcome[0]:
            raise PageFault(at, 4)
        return int(value[0])

    def write(self, addr: SupportsIndex, value: SupportsIndex, size: int = 8) -> None:
        """Store to `addr`; PageFault if the process may not."""
        number = check_int("value", value, 0, (1 << 64) - 1)
        at = check_int("addr", addr, 0, (1 << 64) - 1)
        outcome, _, _ = self.access([at], True, [number], size)
        if outcome[0]:
            raise PageFault(at, 6)

    def mmap(
        self,
        length: SupportsIndex,
        prot: SupportsIndex = Prot.READ | Prot.WRITE,
        *,
        addr: SupportsIndex = 0,
        shared: bool = False,
        file: File | None = None,
        page: SupportsIndex = 0,
    ) -> int:
        """Map `length` bytes, rounded up to pages: zeros, or a file from `page` on. addr: where (0: anywhere).

        shared: stores go to the file; else they get copies. Shared memory is kernel.file(pages, zero=True).
        """
        addr, length = _page_range("mmap", addr, length, self.kernel.task_size)
        rights = check_int("prot", prot, 0, 7)
        if file is None and (shared or page):
            raise ConfigError("file: shared and page need one; kernel.file(pages, zero=True) makes shared memory")
        first = check_int("page", page, 0, 0xFFFFFFFF)
        backing = 0 if file is None else self.kernel._file(file) + 1 | first << 32
        return self._call(Call.MMAP, addr, length, backing, flags=1 if shared else 0, prot=rights)

    def munmap(self, addr: SupportsIndex, length: SupportsIndex) -> None:
        """Unmap whatever lies in [addr, addr + length)."""
        self._call(Call.MUNMAP, *_page_range("munmap", addr, length, self.kernel.task_size))

    def mprotect(self, addr: SupportsIndex, length: SupportsIndex, prot: SupportsIndex) -> None:
        """Give [addr, addr + length), all of it mapped, the rights `prot`."""
        addr, length = _page_range("mprotect", addr, length, self.kernel.task_size)
        self._call(Call.MPROTECT, addr, length, prot=check_int("prot", prot, 0, 7))

    def brk(self, end: SupportsIndex) -> int:
        """End the heap at `end`; where it ends now."""
        return self._call(Call.BRK, end)

    def sbrk(self, pages: int) -> int:
        """Move the end of the heap by `pages` pages; where it was."""
        _, end = self.heap
        self.brk(end + 4096 * pages)
        return end

    def fork(self) -> Process:
        """The child: a copy of this process that shares its pages until one of them is written."""
        child = self.kernel.free_number()
        self._call(Call.FORK, value=child)
        return Process(self.kernel, child)

    def exec(self, program: Program | None = None) -> None:
        """Become another program."""
        self._call(Call.EXEC, value=self.kernel._program(program))

    def exit(self) -> None:
        """End."""
        self._call(Call.EXIT)

    def age(self, pages: SupportsIndex = 1 << 40) -> int:
        """The kernel looks at the accessed bits of the next `pages` pages and clears them; how many were set."""
        return self._call(Call.AGE, count=pages)

    def swap_out(self, pages: SupportsIndex = 1 << 40) -> int:
        """The kernel looks at the next `pages` pages, takes those that were not accessed since it last looked; how
        many that were."""
        return self._call(Call.SWAP_OUT, count=pages)

    def send(self, pipe: SupportsIndex, addr: SupportsIndex, length: SupportsIndex) -> None:
        """Write `length` bytes (a multiple of 8, within a page) to a pipe."""
        self._call(Call.PIPE_WRITE, addr, length, check_int("pipe", pipe, 0, NO_PIPE))

    def receive(self, pipe: SupportsIndex, addr: SupportsIndex) -> None:
        """Read the oldest buffer of a pipe to `addr`, where the page has room for it."""
        self._call(Call.PIPE_READ, addr, value=check_int("pipe", pipe, 0, NO_PIPE))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Process)
            and other.kernel is self.kernel
            and other.number == self.number
            and other._generation == self._generation
        )

    def __hash__(self) -> int:
        return hash((id(self.kernel), self.number, self._generation))

    def __repr__(self) -> str:
        return f"Process({self.number}{'' if self.alive else ', ended'})"
