"""Row 14: bytes of a shadow page, of a further mapping of a frame, and of a guest that does nothing."""

import subprocess
import sys

import numpy as np
import pytest
from guests import MIB, PAGE, Guest, accesses, pages

import shadowcore as sc


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("pool", [256, 65_536])
def test_shadow_page(figure, pool):
    """The page itself, its header, and its share of the hash."""

    def measured():
        arrays = sc.VM(memory=16 * MIB, mmu=sc.Shadow.cached(pool_pages=pool)).mmu.arrays
        return sum(arrays[name].nbytes for name in ("table", "pages", "hash")) / pool

    figure(
        row=14,
        what=f"a shadow page of {pool}",
        goal=1.0,
        ours=measured,
        yardstick=4096 + 128,
        named="4096 + 128",
        unit="B",
    )


@pytest.mark.benchmark(group="memory")
def test_guest_frame(figure):
    def measured():
        vm = sc.VM(memory=1024 * MIB)
        return vm.mmu.arrays["frames"].nbytes / (1024 * MIB // PAGE)

    figure(row=14, what="a frame of the guest", goal=1.0, ours=measured, yardstick=8, named="8", unit="B")


@pytest.mark.benchmark(group="memory")
def test_further_mapping(figure):
    """Links that come into use with each mapping of 512 frames beyond the first, the first one's own included."""
    more = 8

    def measured():
        guest = Guest("64", 2 * MIB)
        for i in range(more + 1):
            guest.map(i << 21)
        guest.start()
        links = guest.vm.mmu.arrays["links"].view(np.uint64)
        guest.run(accesses(pages(512)))
        assert not links.any()
        result = guest.run(accesses(pages(more * 512, first=512)))
        assert result.stats.exits_total == result.stats.exits["fill"] == more * 512
        assert guest.vm.mmu.rmap_length(guest.table_room // PAGE) == more + 1
        return np.count_nonzero(links) * links.itemsize / (more * 512)

    figure(row=14, what="a further mapping of a frame", goal=1.0, ours=measured, yardstick=16, named="16", unit="B")


IDLE = """
import shadowcore as sc
vm = sc.VM(memory="64GiB")
tables = sc.PageTables(vm.memory, "64")
tables.map(0, 0, "1GiB", "rwx")
for name, value in tables.registers.items():
    setattr(vm.vcpus[0], name, value)
vm.vcpus[0].write(0x1000, 1)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.benchmark(group="memory")
def test_idle_guest(figure):
    """Resident memory of a process with an idle guest of 64 GiB, interpreter and numpy included."""

    def measured():
        done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True)
        return int(done.stdout) / 1e6

    figure(
        row=14,
        what="a process with an idle guest of 64 GiB",
        goal=1.0,
        ours=measured,
        yardstick=50,
        named="50 MB",
        unit="MB",
    )
