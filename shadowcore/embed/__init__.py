"""What a simulator written in Python needs of the engine: its own memory shared, many accesses at once, events.

    ram = sc.embed.allocate("64MiB")  # or a numpy array, an mmap, a shared memory of one's own
    vm = sc.embed.machine(ram, mmu="cached")
    result = sc.embed.access_many(vm.vcpus[0], addresses, "r")  # result.gpa, result.outcome, result.exits, ...

C and C++ code gets at the same VM by `handle`. See docs/embedding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .._capi.table import from_handle, get_include, handle, release, table_address
from ..config import PAGE_SIZE, Design, parse_size
from ..engine.events import EVENTS, Event
from ..engine.machine import VM
from ..engine.memory import allocate as _allocate
from ..errors import ConfigError
from .arrays import access_many

if TYPE_CHECKING:
    from typing import Literal

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from ..engine.translation import Translation
    from ..engine.vcpu import VCpu

__all__ = [
    "EVENTS",
    "Event",
    "access_many",
    "allocate",
    "from_handle",
    "get_include",
    "handle",
    "machine",
    "memory",
    "on_event",
    "release",
    "table_address",
    "translate",
]


def allocate(size: int | str) -> NDArray[np.uint8]:
    """Zeroed memory that `machine` takes: a uint8 array that begins at a page of the host, committed when touched."""
    array: NDArray[np.uint8] = _allocate(parse_size(size))
    return array


def memory(source: Buffer | NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of `source` as the array that `machine` takes, not copied.

    source: a numpy array of any type, an mmap, the `buf` of a SharedMemory, or anything else with a writable buffer in
    one piece. It has to begin at a multiple of 4096 and to be a multiple of 4096 long. The array, and a VM made of it,
    hold the buffer: until both are gone an mmap or SharedMemory cannot be closed, nor an array resized. ConfigError.
    """
    if isinstance(source, np.ndarray):
        source = np.asarray(source)  # without what a subclass says of itself
    try:
        view = memoryview(cast("Buffer", source))
    except (TypeError, ValueError, BufferError) as error:
        raise ConfigError(f"memory: an object with a buffer is needed: {error}") from None
    if view.readonly:
        raise ConfigError("memory: the buffer is read-only")
    if not view.c_contiguous:
        raise ConfigError("memory: the buffer is not in one piece")
    if view.nbytes == 0 or view.nbytes % PAGE_SIZE:
        raise ConfigError(f"memory: {view.nbytes} bytes is not a positive multiple of {PAGE_SIZE}")
    if isinstance(source, np.ndarray):
        # A view of the array itself, whose owner the VM can keep from being resized.
        array = source.reshape(-1).view(np.uint8)
    else:
        array = np.frombuffer(view.cast("B"), dtype=np.uint8)
    if array.ctypes.data % PAGE_SIZE:
        raise ConfigError(
            f"memory: the buffer begins at {array.ctypes.data:#x}, which is not a multiple of {PAGE_SIZE}; "
            "shadowcore.embed.allocate makes one that does"
        )
    return array


def machine(source: Buffer | NDArray[Any], mmu: str | Design = "cached", **settings: Any) -> VM:
    """A VM over the caller's memory (see `memory`). settings: as of VM."""
    return VM(memory(source), mmu, **settings)


def translate(cpu: VCpu, gva: int, access: Literal["r", "w", "x"] = "r", user: bool | None = None) -> Translation:
    """Where `gva` leads by the guest's tables, without any side effect: as cpu.translate."""
    return cpu.translate(gva, access, user)


def on_event(vm: VM, callback: Callable[[Event], object] | None, kinds: Iterable[str] = EVENTS) -> None:
    """As `vm.on_event(callback, kinds)`."""
    vm.on_event(callback, kinds)
