"""One processor in 64-bit mode over entries given by address, in the engine or the oracle."""

import oracle
from oracle import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    EFER_LME,
    EFER_NXE,
    A,
    D,
    P,
    U,
    W,
)

import shadowcore as sc

DESIGNS = ["native", "cached", "unsync", "adaptive", "nested", "agile"]

# Physical layout (access.c: the page at 32 MiB, its tables behind it) and the linear address under test.
PAGE = 32 << 20
TABLES = 33 << 20
RAM = 40 << 20
ADDRESS = 0xFFFF923400000000
KERNEL_FLAGS = P | W | A | D


class Frames:
    """Guest memory under construction: 8-byte entries by address, and the next free table frame."""

    def __init__(self, first=TABLES):
        self.entries = {}
        self.next = first

    def table(self):
        self.next += 4096
        return self.next - 4096

    def map(self, root, levels, address, leaf, last=1, flags=P | W | U | A):
        """Put `leaf` at level `last` of a linear address, making the tables above with `flags`.  Returns the
        addresses of the entries, root first."""
        base, path = root, []
        for level in range(levels, last - 1, -1):
            where = base + (address >> (12 + 9 * (level - 1)) & 511) * 8
            path.append(where)
            if level == last:
                self.entries[where] = leaf
            elif where not in self.entries:
                self.entries[where] = self.table() | flags
            base = self.entries[where] & oracle.bits(51, 12)
        return path


class Machine:
    """One processor in 64-bit mode over given entries, in the engine or the oracle."""

    def __init__(self, frames, root, levels, design=None, cr4=0, efer=EFER_NXE, **features):
        registers = {
            "efer": EFER_LME | efer,
            "cr4": CR4_PAE | (CR4_LA57 if levels == 5 else 0) | cr4,
            "cr3": root,
            "cr0": CR0_PG | CR0_WP | 0x11,
        }
        if design:
            self.vm = sc.VM(memory=RAM, mmu=design, features=sc.Features(**features))
            words = self.vm.memory.words
            for where, entry in frames.entries.items():
                words[where // 8] = entry
            self.cpu = self.vm.vcpus[0]
            for name, value in registers.items():
                setattr(self.cpu, name, value)
        else:
            self.memory = oracle.Memory((0, RAM // 4096))
            for where, entry in frames.entries.items():
                self.memory.write(where, entry, 8)
            self.cpu = oracle.Cpu(self.memory, oracle.Features(**features))
            for name, value in registers.items():
                getattr(self.cpu, f"load_{name}")(value)
