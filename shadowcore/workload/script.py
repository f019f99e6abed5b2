"""What workloads are written in: a list of kernel operations that grows, and the register of workloads."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import check_int
from ..errors import ConfigError
from ..guest.kernel import CALL_DTYPE, NO_PROGRAM, Kernel
from ..guest.options import Call, File, Program, Prot, Touch

RW = int(Prot.READ | Prot.WRITE)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a workload: its default, the lowest and highest value, and what it is (with its unit)."""

    default: int
    low: int
    high: int
    help: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """A workload: `function` makes its generator; memory: guest RAM in bytes that its defaults need; options: settings
    of the kernel that it needs."""

    name: str
    summary: str
    function: Callable[..., Iterator[None]]
    memory: str
    parameters: dict[str, Parameter]
    options: dict[str, Any]

    def checked(self, given: dict[str, Any]) -> dict[str, int]:
        """Every parameter with its value; ConfigError for one that there is not, or that is out of range."""
        for name in given:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ConfigError(f"{self.name}: there is no parameter {name!r}; its parameters: {known}")
        return {
            name: check_int(f"{self.name}: {name}", given.get(name, what.default), what.low, what.high)
            for name, what in self.parameters.items()
        }


WORKLOADS: dict[str, Workload] = {}
"""By name."""


def workload(
    name: str, memory: str, options: dict[str, Any] | None = None, **parameters: tuple[int, int, int, str]
) -> Callable[[Callable[..., Iterator[None]]], Callable[..., Iterator[None]]]:
    def register(function: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        summary = (function.__doc__ or "").partition("\n")[0].rstrip(".")
        made = {key: Parameter(*what) for key, what in parameters.items()}
        WORKLOADS[name] = Workload(name, summary, function, memory, made, options or {})
        return function

    return register


AREA = 0x50000000
"""Where workloads map what they share or scan: free in every mode."""


class Guest:
    """A kernel with a list of operations that is being written, and numbers for its processes."""

    def __init__(self, kernel: Kernel, rng: np.random.Generator) -> None:
        self.kernel = kernel
        self.rng = rng
        self.carry_out: Callable[[NDArray[Any]], NDArray[np.uint64]] = kernel.run
        self.processors = len(kernel.vm.vcpus)
        self._rows: list[tuple[int, ...]] = []
        self._free: list[int] = []
        self._next = 0
        self.huge = 2 << 20 if kernel.options.mode != "32" else 4 << 20
        self.text = 0x400000 if kernel.options.mode in ("64", "la57") else 0x8048000
        self.stack = 0x7FFFFFFFF000 if kernel.options.mode in ("64", "la57") else 0xBFFFF000

    def _add(
        self,
        op: int,
        process: int = 0,
        addr: int = 0,
        count: int = 0,
        value: int = 0,
        flags: int = 0,
        size: int = 8,
        prot: int = 0,
    ) -> None:
        self._rows.append((op, flags, size, prot, process, addr, count, value))

    def _number(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def repeat(self) -> Iterator[None]:
        """The round that was written, again and again."""
        calls = self.take()
        while True:
            self.carry_out(calls)
            yield

    def take(self) -> NDArray[Any]:
        """The operations written so far, which are forgotten here."""
        calls = np.array(self._rows, dtype=CALL_DTYPE)
        self._rows.clear()
        return calls

    def go(self) -> NDArray[np.uint64]:
        """Carry out the operations written so far."""
        return self.carry_out(self.take())

    def spawn(self, program: Program | None = None) -> int:
        """A new process, of `program` or with nothing but a stack; its number."""
        number = self._number()
        self._add(Call.SPAWN, number, value=NO_PROGRAM if program is None else program.number)
        return number

    def fork(self, parent: int) -> int:
        """A child of process `parent`, whose pages become copy-on-write; its number."""
        number = self._number()
        self._add(Call.FORK, parent, value=number)
        return number

    def exec(self, process: int, program: Program) -> None:
        """Replace what the process maps by `program`."""
        self._add(Call.EXEC, process, value=program.number)

    def exit(self, process: int) -> None:
        """End the process; its number serves again."""
        self._add(Call.EXIT, process)
        heapq.heappush(self._free, process)

    def sweep(self, process: int, addr: int, count: int, stride: int = 4096, write: bool = False) -> None:
        """`count` accesses of 8 bytes from `addr` on, `stride` bytes apart."""
        self._add(Call.TOUCH, process, addr, count, stride, Touch.WRITE if write else 0)

    def scatter(self, process: int, addr: int, length: int, count: int, write: bool = False) -> None:
        """`count` accesses of 8 bytes at random places in the `length` bytes from `addr` on."""
        self._add(Call.TOUCH, process, addr, count, length, Touch.RANDOM | (Touch.WRITE if write else 0))

    def execute(self, process: int, addr: int, count: int, stride: int = 4096) -> None:
        """`count` fetches from `addr` on, `stride` bytes apart."""
        self._add(Call.TOUCH, process, addr, count, stride, Touch.FETCH, 1)

    def on(self, processor: int) -> None:
        """What follows is done by that processor."""
        self._add(Call.CPU, value=processor)

    def syscall(self, process: int, accesses: int = 8) -> None:
        """Into the kernel and back, with `accesses` accesses to its own data."""
        self._add(Call.SYSCALL, process, count=accesses)

    def map(self, process: int, addr: int, pages: int, file: File | None = None, shared: bool = False) -> None:
        """Map `pages` pages at `addr`, readable and writable: of `file`, shared or private, or anonymous."""
        backing = 0 if file is None else file.number + 1
        self._add(Call.MMAP, process, addr, pages << 12, backing, 1 if shared else 0, prot=RW)

    def unmap(self, process: int, addr: int, pages: int, amid: int = 0) -> None:
        """Unmap `pages` pages from `addr` on. The next `amid` operations (`sweep`, `scatter`, `execute`, `on`) come
        amid it: after each store to a table above the leaves those up to the return to this processor."""
        self._add(Call.MUNMAP, process, addr, pages << 12, amid)

    def protect(self, process: int, addr: int, pages: int, prot: int) -> None:
        """Change the rights of `pages` pages from `addr` on to `prot` (Prot)."""
        self._add(Call.MPROTECT, process, addr, pages << 12, prot=prot)

    def send(self, process: int, pipe: int, addr: int, length: int) -> None:
        """Write `length` bytes from `addr` to the pipe number `pipe`."""
        self._add(Call.PIPE_WRITE, process, addr, length, pipe)

    def receive(self, process: int, pipe: int, addr: int) -> None:
        """Read one buffer of the pipe number `pipe` to `addr`."""
        self._add(Call.PIPE_READ, process, addr, value=pipe)

    def age(self, process: int, pages: int) -> None:
        """Clear the accessed bits of the next `pages` pages of the process, as page replacement does."""
        self._add(Call.AGE, process, count=pages)

    def swap_out(self, process: int, pages: int) -> None:
        """Look at the next `pages` pages of the process for some to take out of memory."""
        self._add(Call.SWAP_OUT, process, count=pages)

    def idle(self, accesses_only: int = 1) -> None:
        """`accesses_only` timer ticks with nothing to run."""
        for _ in range(accesses_only):
            self._add(Call.IDLE)

    def heap(self, process: int, end: int) -> None:
        """Let the heap end at `end` (brk)."""
        self._add(Call.BRK, process, end)

    def heap_of(self, program: Program) -> int:
        """Where the heap of a program begins."""
        return self.text + (program.text + program.data + program.bss + 1 + self.kernel.options.heap_gap << 12)
