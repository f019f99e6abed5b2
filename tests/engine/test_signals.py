"""Signals come through long calls, soon, whatever the operations cost; and what was done until then is not lost."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import shadowcore as sc
from shadowcore import embed
from shadowcore.guest.kernel import CALL_DTYPE
from shadowcore.recording.records import replay

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")

DATA = 0x40_0000
FRAME = 0x20_0000
SOON = 1.0
"""Seconds: 0.1 are allowed from one look to the next, the rest is for a machine that others use."""
EVERYWHERE = ("pre-fault", "post-fault", "pre-write", "post-write", "post-cr3")


class TimeIsUp(Exception):
    pass


@contextlib.contextmanager
def ended(by=TimeIsUp, after=0.1):
    """A signal after so many seconds, whose handler raises `by`: that comes out of the block, soon."""
    caught = []

    def handler(*_):
        raise by("time is up")

    kept = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after)
    began = time.monotonic()
    try:
        with pytest.raises(sc.Interrupted if by is KeyboardInterrupt else by) as error:
            yield caught
        assert time.monotonic() - began < after + SOON
        caught.append(error.value)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def guest(mmu=None, points=()):
    """A VM whose root can be stored to at 1 << 30, so that a store there is emulated: with audits, for ages."""
    vm = embed.machine(embed.allocate("8MiB"), mmu or sc.Shadow.cached(pool_pages=1024))
    tables = sc.PageTables(vm.memory, "64", allocate=range(16, 64))
    tables.map(DATA, FRAME, 0x10_0000, "rwxu", accessed=True, dirty=True)
    tables.map(1 << 30, tables.root, 4096, "rw", accessed=True, dirty=True)
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    vm.audit_points = points
    return vm


def stores(n):
    ops = np.zeros(n, sc.OP_DTYPE)
    ops["op"], ops["size"], ops["addr"] = sc.Op.WRITE, 8, (1 << 30) + 8 * 300
    return ops


def consistent(vm, result, n):
    """The result has the operations that were done, and no other was."""
    assert 0 < len(result) < n
    assert len(result.gpa) == len(result.outcome) == len(result)
    assert result.stats.accesses == len(result) == result.stats.pf_emulate
    vm.audit_points = ()
    assert vm.audit().ok
    vm.vcpus[0].run(stores(10))


@pytest.mark.parametrize("by", [TimeIsUp, KeyboardInterrupt])
@pytest.mark.parametrize("n", [1000, 100_000])
def test_a_batch_with_audits(n, by):
    """Few operations that take long: they are looked at no less often than many quick ones."""
    vm = guest(points=EVERYWHERE)
    with ended(by) as caught:
        vm.vcpus[0].run(stores(n))
    consistent(vm, caught[0].result, n)


@pytest.mark.parametrize("by", [TimeIsUp, KeyboardInterrupt])
def test_columns_with_audits(by):
    vm = guest(points=EVERYWHERE)
    with ended(by) as caught:
        embed.access_many(vm.vcpus[0], stores(1000)["addr"], "w")
    consistent(vm, caught[0].result, 1000)


def test_a_batch_of_quick_operations():
    vm = guest()
    ops = np.zeros(1 << 22, sc.OP_DTYPE)
    ops["size"], ops["addr"] = 8, DATA
    vm.vcpus[0].run(ops[:10])
    with ended(after=0.02) as caught:
        for _ in range(1000):
            vm.vcpus[0].run(ops)
    result = getattr(caught[0], "result", None)  # None: between two batches
    assert result is None or len(result) % (256 if vm.mmu.general else 4096) == 0


def test_a_handler_that_does_not_raise():
    """It runs in the middle of the batch, which goes on."""
    vm = guest(sc.Shadow.cached(pool_pages=64), EVERYWHERE)
    seen = []

    def handler(*_):
        seen.append(vm.stats.pf_emulate)
        if len(seen) == 3:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TimeIsUp

    kept = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(TimeIsUp) as caught:
            vm.vcpus[0].run(stores(100_000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    assert 0 <= seen[0] < seen[1] < seen[2] <= len(caught.value.result)


@pytest.mark.parametrize("by", [TimeIsUp, KeyboardInterrupt])
def test_a_replay_with_audits(by):
    n = 1000
    vm = guest(points=EVERYWHERE)
    arrays = {"kind": np.full(n, 6, "u1"), "flags": np.ones(n, "<u2"), "addr": stores(n)["addr"].copy()}
    arrays["value"] = np.full(n, vm.vcpus[0].cr3 + 8 * 300, "<u8")
    with ended(by) as caught:
        replay(vm, arrays, 0, n)
    counts = caught[0].result
    assert counts["accesses"] == vm.stats.pf_emulate
    # An audit that ends early belongs to a record that was done, and is not counted as such.
    assert counts["records"] == caught[0].record in (vm.stats.pf_emulate, vm.stats.pf_emulate - 1)


def booted(pool_pages=8192):
    vm = sc.VM("32MiB", sc.Shadow.cached(pool_pages=pool_pages))
    kernel = sc.Kernel(vm)
    process = kernel.spawn()
    base = process.mmap(1024 * 4096)
    return kernel, process, base


def audited(kernel):
    kernel.vm.audit_points = EVERYWHERE


def goes_on(kernel, process, base):
    kernel.vm.audit_points = ()
    assert process.sweep(base, 1024, write=True) == 0
    assert kernel.vm.audit().ok


@pytest.mark.parametrize("by", [TimeIsUp, KeyboardInterrupt])
def test_calls_of_the_guest_kernel(by):
    kernel, process, base = booted()
    calls = np.zeros(100_000, CALL_DTYPE)
    calls["op"], calls["process"] = sc.Call.MMAP, process.number
    calls["addr"], calls["count"], calls["prot"] = 0, 4096, 3
    calls[1::2]["op"] = sc.Call.TOUCH
    calls[1::2]["addr"], calls[1::2]["count"], calls[1::2]["value"], calls[1::2]["size"] = base, 1024, 4096, 8
    audited(kernel)
    with ended(by) as caught:
        kernel.run(calls)
    assert len(caught[0].result) < len(calls)
    goes_on(kernel, process, base)


@pytest.mark.parametrize("results", [False, True])
def test_accesses_of_a_process(results):
    kernel, process, base = booted()
    addresses = base + 4096 * np.arange(1024, dtype=np.uint64)
    audited(kernel)
    with ended() as caught:
        (process.access if results else process.touch)(addresses)
    if results:
        outcome, loaded, gpa = caught[0].result
        assert 0 < len(outcome) == len(loaded) == len(gpa) <= 1024
        assert gpa.all()
    else:
        assert caught[0].result == 0
    goes_on(kernel, process, base)


def test_a_replay_by_the_guest_kernel():
    kernel, process, base = booted()
    audited(kernel)
    n = 1024
    with ended() as caught:
        kernel.replay(process.number, np.ones(n, "u1"), np.full(n, 8, "u2"), base + 4096 * np.arange(n))
    assert caught[0].result == 0
    goes_on(kernel, process, base)


def test_what_an_audit_finds_is_told_of_by_the_guest_kernel():
    """At the end of the call in which it was found, at the latest."""
    kernel, process, base = booted(64)
    vm = kernel.vm
    audited(kernel)
    state = vm.mmu.export_state()
    vm.mmu.import_state(state | {"spte_base": state["spte_base"] + 1})  # what the engine does not follow
    with pytest.raises(sc.AuditError, match="present sptes are not"):
        process.touch(np.array([base]), True)
    state = vm.mmu.export_state()
    vm.mmu.import_state(state | {"spte_base": state["spte_base"] - 1})
    goes_on(kernel, process, base)


def test_an_audit_of_a_large_pool():
    vm = sc.VM("8MiB", sc.Shadow.cached(pool_pages=1 << 19))
    with ended(after=0.03):
        vm.audit()
        vm.audit()
        vm.audit()
    assert sc.VM("8MiB", "cached").audit().ok


def test_a_guest_kernel_out_of_memory_keeps_results():
    kernel, process, _ = booted(256)
    calls = np.zeros(100, CALL_DTYPE)
    calls["process"], calls["size"] = process.number, 8
    calls[::2]["op"], calls[::2]["count"], calls[::2]["prot"] = sc.Call.MMAP, 1 << 20, 3
    calls[::2]["addr"] = 0x1000_0000 + (1 << 20) * np.arange(50)
    calls[1::2]["op"], calls[1::2]["flags"] = sc.Call.TOUCH, 1
    calls[1::2]["addr"], calls[1::2]["count"], calls[1::2]["value"] = calls[::2]["addr"], 256, 4096
    with pytest.raises(sc.GuestOutOfMemory, match=r"calls\[(\d+)\]") as caught:
        kernel.run(calls)
    result = caught.value.result
    assert 0 < len(result) < 100
    assert f"calls[{len(result)}]" in str(caught.value)
    assert (result[::2] == calls["addr"][: len(result) : 2]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_batch_out_of_memory_keeps_its_result():
    """The host runs out of memory for the results in the middle."""
    program = """
        import resource
        import numpy as np
        import shadowcore as sc
        vm = sc.VM("1MiB", "native")
        cpu = vm.vcpus[0]
        cpu.run(np.zeros(0, sc.OP_DTYPE))
        ops = np.zeros(1_000_000, sc.OP_DTYPE)
        ops["size"], ops["addr"] = 8, 1 << 30  # a device: a row of results for each
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), -1))
        try:
            cpu.run(ops, data=False)
        except MemoryError as error:
            result = error.result
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert 0 < len(result) < len(ops), len(result)
        assert (result.outcome == 3).all() and (result.gpa == 1 << 30).all()
        assert result.stats.accesses == len(result) == vm.stats.accesses
        assert len(cpu.run(ops[:10])) == 10
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
