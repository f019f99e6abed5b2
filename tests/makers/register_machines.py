"""Processors in every mode, beside the oracle in the same."""

import oracle
import pytest
from oracle import (
    CR0_PE,
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LME,
    P,
    U,
    W,
)

import shadowcore as sc

DESIGNS = ["native", "cached", "flush", "unsync", "adaptive", "nested", "agile"]
GLOBAL = 1 << 8
PAGING = CR0_PG | CR0_PE | 0x10

# Registers in the order in which they are loaded to enter a mode.
MODES = {
    "off": {},
    "32": {"cr4": CR4_PSE, "cr3": 0x1000, "cr0": PAGING},
    "pae": {"cr4": CR4_PAE, "cr3": 0x1000, "cr0": PAGING},
    "64": {"efer": EFER_LME, "cr4": CR4_PAE, "cr3": 0x1000, "cr0": PAGING},
    "la57": {"efer": EFER_LME, "cr4": CR4_PAE | CR4_LA57, "cr3": 0x1000, "cr0": PAGING},
}
REGISTERS = ("cr0", "cr3", "cr4", "efer")


def enter(mode, design="native", features=None):
    """A machine of 64 zeroed frames in some mode: (vm, cpu)."""
    vm = sc.VM(memory=64 * 4096, mmu=design, features=features or sc.Features())
    cpu = vm.vcpus[0]
    for name, value in MODES[mode].items():
        setattr(cpu, name, value)
    return vm, cpu


def enter_oracle(mode, **features):
    cpu = oracle.Cpu(oracle.Memory((0, 64)), oracle.Features(**features))
    for name, value in MODES[mode].items():
        getattr(cpu, f"load_{name}")(value)
    assert cpu.mode == mode
    return cpu


def state(cpu):
    return [getattr(cpu, name) for name in REGISTERS]


def load(cpu, name, value):
    """Load a register of either kind of processor: True, or False if it is refused."""
    try:
        if isinstance(cpu, oracle.Cpu):
            getattr(cpu, f"load_{name}")(value)
        else:
            setattr(cpu, name, value)
    except (oracle.GeneralProtection, sc.GeneralProtection):
        return False
    return True


def refused(cpu, name, value):
    """The load raises #GP(0) and changes no register."""
    before = state(cpu), cpu.cr2
    with pytest.raises(sc.GeneralProtection) as caught:
        setattr(cpu, name, value)
    return caught.value.error_code == 0 and (state(cpu), cpu.cr2) == before


def all_modes_machine(design):
    """Tables for every mode, each mapping its linear page 0 to its own frame; frame 16 + n holds 100 + n."""
    vm = sc.VM(memory=64 * 4096, mmu=design)
    words, halves = vm.memory.words, vm.memory.bytes.view("<u4")
    halves[1 * 1024] = 2 << 12 | P | W | U
    halves[2 * 1024] = 17 << 12 | P | W | U
    words[3 * 512] = 4 << 12 | P
    words[4 * 512] = 5 << 12 | P | W | U
    words[5 * 512] = 18 << 12 | P | W | U
    for root, leaf, frame in ((6, 9, 19), (10, 14, 20)):
        for gfn in range(root, leaf):
            words[gfn * 512] = (gfn + 1) << 12 | P | W | U
        words[leaf * 512] = frame << 12 | P | W | U
    words[16 * 512 :: 512] = range(100, 148)
    roots = {"off": 0, "32": 0x1000, "pae": 0x3000, "64": 0x6000, "la57": 0xA000}
    return vm, vm.vcpus[0], roots
