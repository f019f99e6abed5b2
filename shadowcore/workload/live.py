"""A live Linux guest under Linux's own shadow MMU: what KVM counted, and what the workload `shell` comes to here.

The guest was Debian's kernel 6.1 with busybox, 128 MiB and one processor, and ran 60 pipelines of three programs; its
host's shadow MMU was that of Linux 6.1 or 6.12. Three parameters of the workload are set by what the guest itself did
(forks and execs, page faults of its own, INVLPGs). What its MMU did follows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..config import check_int, design
from ..engine.machine import VM
from ..errors import ConfigError
from ..guest.kernel import Kernel
from ..guest.options import KernelOptions
from .script import WORKLOADS, Guest

COUNTERS = {
    "pf_taken": "page-fault exits",
    "pf_fixed": "mended",
    "pf_guest": "the guest's own",
    "pf_emulate": "given to the emulator",
    "pf_spurious": "nothing had to change",
    "mmu_flooded": "shadow pages zapped by floods",
    "mmu_shadow_zapped": "shadow pages zapped",
    "mmu_cache_miss": "shadow pages made",
    "invlpg": "INVLPGs",
}
"""What is compared, by KVM's names."""
MEASURED = {
    "6.1": (670.92, 369.14, 206.91, 82.87, 12.01, 0.01, 42.14, 39.77, 45.27),
    "6.12": (677.36, 372.39, 209.32, 82.92, 12.72, 0.01, 41.73, 39.48, 46.74),
}
"""By release of the host: COUNTERS of a pipeline, the mean of three runs (6.1) and of two (6.12), which agree within 2
percent."""
PARAMETERS = {"children": 3, "exec_percent": 100, "windows": 18, "heap": 26, "dirty": 13, "fresh": 0, "work": 2000}
"""Of `shell`. A program takes memory by brk alone."""
KERNEL = KernelOptions(grouped=True, flush_gather=9622, regions=True)
"""A kernel of 2022."""
MEMORY, HOST = "128MiB", "2MiB"
WARM = 5
"""Pipelines before those that are counted."""


class Row(NamedTuple):
    """A counter of a pipeline: its name, what it is, in the live guest, in the model."""

    counter: str
    what: str
    linux: float
    model: float

    @property
    def ratio(self) -> float:
        """Model to live guest."""
        return self.model / self.linux


def model(release: str = "6.1", pipelines: int = 60, seed: int = 1) -> dict[str, float]:
    """All counters of the MMU here, of a pipeline. release: of the host's Linux, "6.1" or "6.12"; pipelines: those that
    are counted; seed: of everything random."""
    check_int("pipelines", pipelines, 1, 1 << 16)
    if release not in MEASURED:
        raise ConfigError(f"release: {release!r} is not one of {', '.join(MEASURED)}")
    vm = VM(MEMORY, design(f"kvm-{release}"), host_page_size=HOST)
    workload = WORKLOADS["shell"]
    guest = Guest(Kernel(vm, KERNEL), np.random.default_rng(seed))
    rounds = workload.function(guest, **workload.checked(PARAMETERS))
    for _ in range(1 + WARM):  # the first sets it up
        next(rounds)
    before = vm.stats.as_dict()
    for _ in range(pipelines):
        next(rounds)
    return {name: (after - before[name]) / pipelines for name, after in vm.stats.as_dict().items()}


def rows(release: str = "6.1", pipelines: int = 60, seed: int = 1) -> list[Row]:
    """COUNTERS of the live guest beside those of `model`."""
    here = model(release, pipelines, seed)
    return [
        Row(name, what, linux, here[name])
        for (name, what), linux in zip(COUNTERS.items(), MEASURED[release], strict=True)
    ]
