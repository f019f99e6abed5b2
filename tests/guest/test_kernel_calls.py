"""What the guest kernel refuses, and what leaves it fit to go on."""

import signal
import threading
import time

import numpy as np
import pytest
from kernel_model import PAGE
from kernels import all_free, boot

import shadowcore as sc
from shadowcore import Prot


def test_broken_tables_are_a_panic():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(PAGE)
    process.write(base, 1)
    tables = kernel.vm.memory.bytes[process.root : process.root + 4096].view(np.uint64)
    tables[:256] |= np.uint64(0xFFFF_FFFF_F000)
    with pytest.raises(sc.GuestPanic):
        process.munmap(base, PAGE)
    with pytest.raises(sc.GuestPanic, match="has stopped"):
        kernel.spawn()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "16"}, "mode"),
        ({"direct_map": "big"}, "direct_map"),
        ({"direct_map": "huge", "mode": "pae"}, "direct_map"),
        ({"isolation": True, "mode": "32"}, "isolation"),
        ({"pcid": True, "mode": "pae"}, "pcid"),
        ({"sloppy": ("everything",)}, "sloppy"),
        ({"sloppy": "munmap"}, "sloppy"),
        ({"atomic_bytes": 2}, "atomic_bytes"),
        ({"fault_around": 3}, "fault_around"),
        ({"fault_around": 0}, "fault_around"),
        ({"swap_pages": -1}, "swap_pages"),
        ({"swap_pages": 1 << 20}, "swap_pages"),
        ({"max_processes": 0}, "max_processes"),
        ({"seed": 1.5}, "seed"),
        ({"kernel_work": 1 << 30}, "kernel_work"),
    ],
)
def test_bad_options(options, field):
    with pytest.raises(sc.ConfigError, match=f"^{field}"):
        sc.KernelOptions(**options)


def test_bad_machines():
    def refused(match, vm, **options):
        with pytest.raises(sc.ConfigError, match=match):
            sc.Kernel(vm, sc.KernelOptions(**options))

    refused("at most 939524096", sc.VM("1GiB"), mode="32")
    refused("at most 939524096", sc.VM("900MiB"), mode="pae")
    refused("from 0", sc.VM([sc.MemorySlot(1 << 20, "16MiB")]))
    refused("features.la57", sc.VM(features=sc.Features(la57=False)), mode="la57")
    refused("features.pcid", sc.VM(features=sc.Features(pcid=False)), pcid=True)
    refused("features.gbpages", sc.VM("2GiB", features=sc.Features(gbpages=False)), direct_map="huge")
    refused("large_pages", sc.VM("16MiB"), large_pages=5)
    vm = sc.VM("16MiB")
    sc.Kernel(vm)
    refused("paging on", vm)
    with pytest.raises(sc.ConfigError, match="vm"):
        sc.Kernel("cached")
    with pytest.raises(sc.ConfigError, match="options"):
        sc.Kernel(sc.VM("16MiB"), {"mode": "64"})
    assert sc.Kernel(sc.VM("2GiB", mmu="native"), sc.KernelOptions(direct_map="huge")).spawn().read(0x7FFFFFFFEFF8) == 0


def test_bad_calls():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(4 * PAGE)
    for match, call in [
        ("addr", lambda: process.munmap(base + 8, PAGE)),
        ("length", lambda: process.mmap(0)),
        ("length", lambda: process.mmap(1 << 60)),
        ("prot", lambda: process.mmap(PAGE, 8)),
        ("file", lambda: process.mmap(PAGE, shared=True)),
        ("file", lambda: process.mmap(PAGE, file=sc.File(7, 1))),
        ("program", lambda: kernel.spawn("sh")),
        ("program", lambda: process.exec(sc.Program(5, 1, 1, 1))),
        ("size", lambda: process.touch([base], size=16)),
        ("addresses", lambda: process.touch([[base]])),
        ("addresses", lambda: process.touch([-1])),
        ("addresses", lambda: process.touch([0.5])),
        ("write", lambda: process.touch([base, base], np.array([True]))),
        ("values", lambda: process.touch([base, base], True, [1])),
        ("no such pipe", lambda: process.send(0, base, 8)),
        ("count", lambda: process.scatter(base, 4, 1)),
        ("calls", lambda: kernel.run([1, 2])),
        ("no such number", lambda: kernel.call(sc.Call.SWITCH, 1 << 20)),
        ("ended", lambda: kernel.call(sc.Call.SWITCH, 5)),
        (r"\(op 99\)", lambda: kernel.call(99)),
        ("flags", lambda: kernel.call(sc.Call.TOUCH, 0, base, 1, 8, flags=3)),
        ("mprotect", lambda: process.mprotect(base, 5 * PAGE, Prot.READ)),
        ("pages", lambda: kernel.file(0)),
        ("process", lambda: kernel.switch(3)),
    ]:
        with pytest.raises(sc.ConfigError, match=match):
            call()
    pipe = kernel.pipe()
    for length in (0, 7, 4104):
        with pytest.raises(sc.ConfigError, match="addr, count"):
            process.send(pipe, base, length)
    with pytest.raises(sc.ConfigError, match="rights"):
        process.send(pipe, 0x10000, 8)
    with pytest.raises(sc.GuestOutOfMemory, match="no room"):
        process.mmap(PAGE, addr=base)
    with pytest.raises(sc.GuestOutOfMemory, match="no room"):
        process.brk(PAGE)
    for addr in (0, kernel.task_size, kernel.direct_map, 1 << 63):
        with pytest.raises(sc.PageFault):
            process.read(addr)
    ended = process.fork()
    ended.exit()
    with pytest.raises(sc.ConfigError, match="has ended"):
        ended.read(base)
    assert process.fork() != ended
    calls = np.zeros(3, dtype=sc.CALL_DTYPE)
    calls["op"] = (sc.Call.SYSCALL, sc.Call.SYSCALL, 77)
    before = kernel.counters
    with pytest.raises(sc.ConfigError, match=r"calls\[2\]"):
        kernel.run(calls)
    assert kernel.counters == before


def test_bad_calls_amid_another():
    """As many as are announced must follow, and they are accesses and changes of the processor."""
    kernel = boot("native", vcpus=2)
    process = kernel.spawn()
    base = process.mmap(PAGE)
    calls = np.zeros(3, dtype=sc.CALL_DTYPE)
    calls["op"] = (sc.Call.MUNMAP, sc.Call.CPU, sc.Call.SYSCALL)
    calls["addr"][0], calls["count"][0] = base, PAGE
    before = kernel.counters
    for amid in (2, 3, 1 << 63):
        calls["value"][0] = amid
        with pytest.raises(sc.ConfigError, match=r"calls\[0\]: value: as many operations, TOUCH and CPU"):
            kernel.run(calls)
    assert kernel.counters == before
    # One that the state forbids is named when its turn comes; the mapping is gone by then.
    calls["value"][0], calls["op"][2], calls["process"][2], calls["count"][2] = 2, sc.Call.TOUCH, 7, 1
    calls["size"] = 8
    process.write(base, 1)
    with pytest.raises(sc.ConfigError, match=r"calls\[2\], touch"):
        kernel.run(calls)
    with pytest.raises(sc.PageFault):
        process.read(base)
    process.exit()
    assert all_free(kernel, ())


def test_room_in_its_tables():
    kernel = boot("native", max_processes=2, max_mappings=8, max_files=3, max_programs=1, max_pipes=1)
    kernel.pipe()
    with pytest.raises(sc.ConfigError, match="max_pipes"):
        kernel.pipe()
    kernel.program()
    with pytest.raises(sc.ConfigError, match="max_programs"):
        kernel.program()
    kernel.file(1)
    kernel.file(1)
    with pytest.raises(sc.ConfigError, match="max_files"):
        kernel.file(1)
    process = kernel.spawn()
    kernel.spawn()
    with pytest.raises(sc.GuestOutOfMemory, match="max_processes"):
        process.fork()
    for i in range(6):
        process.mmap(PAGE, addr=0x50000000 + 2 * i * PAGE)
    with pytest.raises(sc.GuestOutOfMemory, match="max_mappings"):
        process.mmap(PAGE, addr=0x60000000)
    assert len(process.mappings) == 7


def test_a_pool_that_is_too_small_is_said():
    with pytest.raises(sc.PoolExhausted):
        boot(sc.Shadow.cached(pool_pages=4), mode="la57").spawn().write(0x7FFFFFFFE000, 1)


def test_ctrl_c_leaves_a_guest_that_goes_on():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(64 * PAGE)
    process.sweep(base, 64, write=True)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(sc.Interrupted):
        process.scatter(base, 64 * PAGE, 1 << 40)
    timer.join()
    assert process.sweep(base, 64) == 0
    assert all_free(kernel, [])


def test_one_user_at_a_time():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(64 * PAGE)
    seen = []

    def disturb():
        time.sleep(0.1)
        for call in (kernel.spawn, lambda: process.read(base), lambda: kernel.file(1), lambda: kernel.vm.audit()):
            try:
                call()
            except sc.EngineError as error:
                seen.append(error)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=disturb)
    thread.start()
    with pytest.raises(sc.Interrupted):
        process.scatter(base, 64 * PAGE, 1 << 40)
    thread.join()
    assert len(seen) == 4
