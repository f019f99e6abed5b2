"""The operations that reach the MMU of a guest in Unicorn, to be run again without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Shadow
from ..engine.batch import OP_DTYPE
from ..engine.machine import VM
from ..errors import EngineError

if TYPE_CHECKING:
    from ..engine.counters import Stats


class Recording:
    """The operations that reached the MMU, to be run again without Unicorn.

    ops: an OP_DTYPE array. data: bool[n], which of them moved bytes. entries: (operation, gpa, size, value): what an
    entry of a guest table held just before the operation. Stores that no MMU sees, to tables that no shadow follows,
    are known by them.
    """

    def __init__(self) -> None:
        self._ops: list[tuple[int, int, int, int, int]] = []
        self._data: list[bool] = []
        self.entries: list[tuple[int, int, int, int]] = []
        self._known: dict[int, np.ndarray[Any, Any] | None] = {}

    @property
    def ops(self) -> np.ndarray[Any, Any]:
        return np.array(self._ops, dtype=OP_DTYPE)

    @property
    def data(self) -> np.ndarray[Any, Any]:
        return np.array(self._data, dtype=bool)

    def __len__(self) -> int:
        return len(self._ops)

    def add_entry(self, gpa: int, size: int, value: int) -> None:
        """An entry of a table that a shadow follows: replay checks it."""
        self.entries.append((len(self._ops), gpa, size, value))

    def add_table(self, gpa: int, words: np.ndarray[Any, Any]) -> None:
        """All of a table that no shadow follows."""
        known = self._known.get(gpa, np.zeros_like(words))
        changed = range(len(words)) if known is None else np.flatnonzero(words != known).tolist()
        for i in changed:
            self.entries.append((len(self._ops), gpa + 8 * i, 8, int(words[i])))
        self._known[gpa] = words.copy()

    def follow(self, gpa: int) -> None:
        """From now on the operations change the table at gpa."""
        self._known[gpa] = None

    def add(self, op: tuple[int, int, int, int, int], data: bool) -> None:
        self._ops.append(op)
        self._data.append(data)

    def replay(self, vm: VM) -> Stats:
        """Run the operations on a fresh `vm` of the same settings; its counters.

        Entries that the guest stored unseen are put in place before the operation that reads them. EngineError if
        that would change a table that a shadow follows: every store to it has to be among the operations.
        """
        cpu = vm.vcpus[0]
        ram = vm.memory.bytes
        frames = None if not isinstance(vm.mmu.design, Shadow) else vm.mmu.arrays["frames"]["shadowed"]
        ops, data, at = self.ops, self.data, 0
        for number in range(len(ops)):
            while at < len(self.entries) and self.entries[at][0] == number:
                _, gpa, size, value = self.entries[at]
                at += 1
                start = (vm.memory.frame(gpa >> 12) << 12) + (gpa & 0xFFF)
                if int.from_bytes(ram[start : start + size].tobytes(), "little") == value:
                    continue
                if frames is not None and frames[start >> 12]:
                    raise EngineError(
                        f"replay: operation {number} finds another entry at gpa {gpa:#x} of a shadowed table"
                    )
                # As a device would, for no memo may outlive it; the counters are those of a table that is not shadowed.
                vm.write_physical(gpa, value.to_bytes(size, "little"))
            cpu.run(ops[number : number + 1], data=bool(data[number]))
        return vm.stats
