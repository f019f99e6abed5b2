"""What a VM takes of the host's memory, by the sizes of its arrays and by what the kernel says is resident."""

import subprocess
import sys

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.engine.memory import allocate

MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


def anonymous():
    """Bytes of memory that the process has touched and no file is behind."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) * 1024


@pytest.mark.parametrize("nbytes", [4096, 2 * MIB - 4096, 2 * MIB, 2 * MIB + 4096, 7 * MIB])
def test_arrays_of_large_pages(nbytes):
    array = allocate(nbytes, huge=True)
    assert array.dtype == np.uint8
    assert array.shape == (nbytes,)
    assert array.flags.writeable
    assert array.ctypes.data % (2 * MIB if nbytes >= 2 * MIB and sys.platform == "linux" else 8) == 0
    assert not array.any()
    array[-1] = 1


@pytest.mark.parametrize("pool", [256, 1000, 65_536, 65_537])
def test_bytes_of_a_shadow_page(pool):
    """At most 128 besides the page itself, 8 for each frame of the guest, 8 for each entry that is in a list."""
    vm = sc.VM(memory=16 * MIB, mmu=sc.Shadow.cached(pool_pages=pool))
    arrays = vm.mmu.arrays
    assert arrays["table"].nbytes == 4096 * pool
    assert arrays["pages"].nbytes + arrays["hash"].nbytes <= 128 * pool
    assert arrays["frames"].nbytes == 8 * 16 * MIB // 4096
    assert arrays["links"].nbytes == 8 * 512 * pool


@LINUX
def test_links_take_memory_for_further_mappings_only():
    """512 frames mapped once: no link is touched. Mapped twice more: 8 bytes a mapping, and as many for the first."""

    def touched(array):
        return np.count_nonzero(array.view(np.uint64))

    vm = sc.VM(memory=16 * MIB, mmu=sc.Shadow.cached(pool_pages=64))
    tables = sc.PageTables(vm.memory, "64")
    for i in range(3):
        tables.map(i << 21, 8 * MIB, 2 * MIB, "rwu", page_size=4096, accessed=True, dirty=True)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    counts = []
    for i in range(3):
        ops = np.zeros(512, dtype=sc.OP_DTYPE)
        ops["user"], ops["size"] = 1, 8
        ops["addr"] = (i << 21) + 4096 * np.arange(512)
        assert vm.vcpus[0].run(ops).stats.exits["fill"] == 512
        counts.append(touched(vm.mmu.arrays["links"]))
    assert counts == [0, 2 * 512, 3 * 512]


@LINUX
@pytest.mark.parametrize(("mmu", "limit"), [("native", 50), ("flush", 50), ("cached", 50), ("unsync", 100)])
def test_idle_guest(mmu, limit):
    """A guest of 64 GiB that has booted but does nothing takes less than 50 MB, the interpreter included; with the
    headers of a pool of a fiftieth of its frames, which `unsync` has unless another number is given, 100 MB."""
    code = f"""
import shadowcore as sc
vm = sc.VM(memory="64GiB", mmu={mmu!r})
tables = sc.PageTables(vm.memory, "64")
tables.map(0, 0, "1GiB", "rwx")
for name, value in tables.registers.items():
    setattr(vm.vcpus[0], name, value)
vm.vcpus[0].write(0x1000, 1)
for line in open("/proc/self/status"):
    if line.startswith(("VmRSS", "VmHWM")):
        print(int(line.split()[1]) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resident = [int(line) for line in done.stdout.split()]
    assert len(resident) == 2
    assert max(resident) < limit * 1_000_000


@LINUX
def test_a_large_pool_is_taken_as_it_is_used():
    before = anonymous()
    vm = sc.VM(memory=16 * MIB, mmu=sc.Shadow.cached(pool_pages=65_536))
    tables = sc.PageTables(vm.memory, "64")
    tables.map(0, 0, "4MiB", "rw")
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    vm.vcpus[0].write(0x1000, 1)
    # Headers of all pages (112 bytes) and hash heads, and one large page of the pool.
    assert anonymous() - before < 65_536 * 120 + 6 * MIB
