"""TLB flushes of the guest kernel: those that it forgets on purpose, and those that it must not."""

import random

import numpy as np
import pytest
from kernel_model import PAGE
from kernels import all_free, boot

import shadowcore as sc
from shadowcore import Prot

# What a sloppy kernel forgets, and where its processes then may see what is no longer so.


def stale(sloppy, mmu, tlb, act):
    kernel = boot(mmu, tlb=tlb, sloppy=sloppy)
    process = kernel.spawn()
    base = process.mmap(8 * PAGE)
    process.touch(base + np.arange(8) * PAGE, True, np.arange(8))
    process.access(base + np.arange(8) * PAGE)
    return act(kernel, process, base)


def unmap(kernel, process, base):
    process.munmap(base, 4 * PAGE)
    return tuple(process.access(base + np.arange(8) * PAGE)[0])


def protect(kernel, process, base):
    process.mprotect(base, 4 * PAGE, Prot.READ)
    return tuple(process.access(base + np.arange(8) * PAGE, True, 9)[0])


def fork(kernel, process, base):
    child = process.fork()
    process.touch(base + np.arange(4) * PAGE, True, 99)
    return tuple(child.access(base + np.arange(8) * PAGE)[1])


@pytest.mark.parametrize(
    ("name", "act", "right"),
    [
        ("munmap", unmap, (1, 1, 1, 1, 0, 0, 0, 0)),
        ("mprotect", protect, (1, 1, 1, 1, 0, 0, 0, 0)),
        ("fork", fork, (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_a_forgotten_flush_shows_only_where_hardware_may(name, act, right):
    """Without a TLB `native` and `cached` are exact whatever the guest forgets. With one, and in `flush`, which works
    like one, the pages whose flush was forgotten, and no others, may be as they were."""
    for mmu, tlb in (("native", None), ("cached", None), ("native", sc.TLB()), ("cached", sc.TLB()), ("flush", None)):
        assert stale((), mmu, tlb, act) == right
    assert stale((name,), "native", None, act) == right
    assert stale((name,), "cached", None, act) == right
    for mmu, tlb in (("native", sc.TLB()), ("flush", None)):
        seen = stale((name,), mmu, tlb, act)
        assert seen != right
        assert seen[4:] == right[4:]
    # An exit of the shadow MMU may have flushed, so that with `cached` and a TLB either is allowed, page by page.
    assert stale((name,), "cached", sc.TLB(), act)[4:] == right[4:]


def test_a_sloppy_kernel_may_destroy_its_guest_but_nothing_else():
    """Frames that are freed while a TLB knows them: tables are overwritten. What comes of it is a panic, a refusal,
    or nothing, and never more."""
    panics = 0
    for seed in range(6):
        kernel = boot("flush", "8MiB", sloppy=("munmap", "fork", "cow"), seed=seed)
        rng = random.Random(seed)
        process = kernel.spawn()
        try:
            for _ in range(60):
                base = process.mmap(40 * PAGE)
                process.scatter(base, 40 * PAGE, 100, write=True)
                process.munmap(base, 40 * PAGE)
                other = process.mmap(1 << 20, addr=0x60000000 + rng.randrange(64) * (4 << 20))
                process.sweep(other, 4, write=True)
                process.scatter(base, 40 * PAGE, 100, write=True)
                process.munmap(other, 1 << 20)
        except (sc.GuestPanic, sc.GuestOutOfMemory):
            panics += 1
            if kernel.vm.audit().ok:
                continue
    assert panics


def test_switches_load_cr3_once_and_pcids_keep():
    for pcid in (False, True):
        kernel = boot("native", tlb=sc.TLB(), pcid=pcid)
        pair = [kernel.spawn(), kernel.spawn()]
        for process in pair:
            process.sweep(process.mmap(4 * PAGE, addr=0x50000000), 4, write=True)
        before = kernel.counters
        kernel.vm.stats.reset()
        for _ in range(10):
            for process in pair:
                process.sweep(0x50000000, 4)
        assert kernel.counters["cr3_loads"] - before["cr3_loads"] == 20
        kernel.switch(None)
        pair[1].sweep(0x50000000, 4)  # still loaded
        assert kernel.counters["cr3_loads"] - before["cr3_loads"] == 20
        assert (kernel.vm.stats.tlb_misses < 20) is pcid


@pytest.mark.parametrize("isolation", [False, True])
def test_a_process_that_does_not_run_is_flushed_when_it_does(isolation):
    """With PCIDs its translations are still in the TLB when its pages are taken and given to another process."""
    kernel = boot("native", "8MiB", tlb=sc.TLB(), pcid=True, isolation=isolation, swap_pages=64)
    victim, thief = kernel.spawn(), kernel.spawn()
    base = victim.mmap(20 * PAGE)
    victim.touch(base + np.arange(20) * PAGE, True, np.arange(20))
    thief.switch()
    victim.swap_out()
    assert victim.swap_out() > 0
    other = thief.mmap(40 * PAGE)
    thief.touch(other + np.arange(40) * PAGE, True, 12345)
    assert (victim.access(base + np.arange(20) * PAGE)[1] == np.arange(20)).all()


@pytest.mark.parametrize("options", [{}, {"flush_ceiling": 0}, {"pcid": True}, {"isolation": True, "pcid": True}])
@pytest.mark.parametrize("mmu", ["native", "flush", "cached"])
def test_what_one_processor_changes_the_others_hear_of(mmu, options):
    """Threads of one process on three processors, whose TLBs know all of its pages."""
    kernel = boot(mmu, "16MiB", sc.TLB(), 3, **options)
    process = kernel.spawn()
    base = process.mmap(24 * PAGE)
    pages = base + np.arange(24) * PAGE

    def on(number):
        kernel.call(sc.Call.CPU, value=number)
        return process

    for number in range(3):
        on(number).touch(pages, True, 7)
    assert kernel.counters["shootdowns"] == 0
    on(1).mprotect(base, 8 * PAGE, Prot.READ)
    assert kernel.counters["shootdowns"] == 2
    process.munmap(base + 8 * PAGE, 8 * PAGE)
    child = process.fork()
    for number in (0, 2, 1):
        outcome = on(number).access(pages, True, 100 + number)[0]
        assert outcome.tolist() == [1] * 16 + [0] * 8
        assert process.read(base) == 7
    for number in range(3):
        assert on(number).read(base + 20 * PAGE) == 101
    assert child.read(base + 20 * PAGE) == 7
    on(0)
    process.exit()  # the others leave its root
    again = kernel.spawn()
    assert again.access(pages)[0].all()
    kernel.vm.audit(strict=True)


@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
def test_threads_go_on_amid_a_munmap(mmu):
    """Between two stores of a munmap to tables above the leaves another processor stores to pages that it shares with a
    child, and copies them: flushes of its own, and what waits for that of the munmap goes on waiting."""
    kernel = boot(mmu, "16MiB", sc.TLB(), 2)
    process = kernel.spawn()
    reach = 2 << 20
    shared = process.mmap(4 * PAGE, addr=64 * reach)
    process.touch(shared + np.arange(4) * PAGE, True, 7)
    base = process.mmap(4 * reach, addr=80 * reach)
    places = base + np.arange(4) * reach
    process.touch(places, True, 9)
    child = process.fork()
    kernel.call(sc.Call.CPU, value=1)
    process.touch([base], False)
    kernel.call(sc.Call.CPU)
    calls = np.zeros(1 + 2 * 4 + 4, dtype=sc.CALL_DTYPE)
    calls[0] = (sc.Call.MUNMAP, 0, 0, 0, process.number, base, 4 * reach, 12)
    at = 1
    for page in range(4):  # the last one has no store before it, and comes after the munmap
        calls[at] = (sc.Call.CPU, 0, 0, 0, 0, 0, 0, 1)
        calls[at + 1] = (sc.Call.TOUCH, 1, 8, 0, process.number, shared + page * PAGE, 1, 8)
        calls[at + 2] = (sc.Call.CPU, 0, 0, 0, 0, 0, 0, 0)
        at += 3
    before = kernel.counters
    assert not kernel.run(calls).any()
    after = kernel.counters
    assert after["faults_copied"] - before["faults_copied"] == 4
    assert after["tables_freed"] - before["tables_freed"] == 4
    assert process.access(places)[0].tolist() == [1] * 4
    assert child.read(shared) == 7
    assert child.access(places)[1].tolist() == [9] * 4
    kernel.vm.audit(strict=True)
    child.exit()
    process.exit()
    assert all_free(kernel, ())


def test_entries_of_two_halves_appear_and_go_as_one():
    """PAE: what has P is stored last when an entry is made, and first when it is cleared."""
    kernel = boot("native", mode="pae")
    process = kernel.spawn()
    base = process.mmap(PAGE, addr=0x50000000)
    process.mmap(PAGE, addr=base + PAGE)
    process.write(base + PAGE, 1)  # so that the table is there, and stays
    kernel.record()
    process.write(base, 1)
    leaf = kernel.vm.vcpus[0].walk_levels(base)[-1][1] + kernel.direct_map
    process.munmap(base, PAGE)
    ops = kernel.recording
    stores = [op for op in ops.tolist() if op[3] & ~7 == leaf and op[0] in (sc.Op.WRITE, sc.Op.XCHG) and op[2] == 4]
    assert [(op[3] - leaf, op[4] & 1) for op in stores] == [(4, 0), (0, 1), (0, 0), (4, 0)]


@pytest.mark.parametrize("options", [{}, {"pcid": True}, {"isolation": True}, {"isolation": True, "pcid": True}])
@pytest.mark.parametrize("count", [1, 33, 34])
def test_flushes_reach_the_root_that_user_code_runs_on(options, count):
    """Under isolation with PCIDs, INVLPG in the kernel does not: the next load of the user's root flushes."""
    kernel = boot("native", tlb=sc.TLB(small_entries=256), **options)
    process = kernel.spawn()
    base = process.mmap(40 * PAGE)
    pages = base + np.arange(40) * PAGE
    process.touch(pages, True)
    process.access(pages)
    before = kernel.counters
    kernel.record()
    process.munmap(base, count * PAGE)
    process.read(base + 39 * PAGE)
    process.syscall()
    process.read(base + 39 * PAGE)
    loads = [op for op in kernel.recording.tolist() if op[0] == sc.Op.CR3 and op[4] & 0x800]
    if len(options) == 2:  # of the user's root: one that flushes, and one that need not
        assert [op[4] >> 63 for op in loads] == [0, 1]
    kernel.record(False)
    assert kernel.counters["invlpg"] - before["invlpg"] == (count if count <= 33 else 0)
    assert (process.access(pages)[0] == (np.arange(40) < count)).all()
    process.mprotect(base + 39 * PAGE, PAGE, Prot.READ)
    assert process.access(pages[-1:], True)[0] == [1]
