"""Shadow pages that cannot be had: what a guest sees does not depend on it.

A page that is not to be had costs zaps and exits. Where there is no way at all, an error names the roots that pin the
pool, nothing is left half done, and the same operation succeeds when there is room again.
"""

from functools import lru_cache

import numpy as np
import oracle
import pytest
from guest2007 import DATA, MODES, PAGE, USER, A, D, Guest
from samples import strided
from scripted import DESIGNS, EVER, FAR, Scripted, check_exhausted, columns, playing, same, undisturbed

import shadowcore as sc


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_script_shows_what_native_shows(mode, design):
    """The script obeys the rules on INVLPG, so that `flush` is exact as well. It has loads that succeed and others."""
    results, memory, taken, _ = undisturbed(mode, DESIGNS[design])
    native_results, native_memory, *_ = undisturbed(mode, sc.Native())
    assert results == native_results
    assert memory == native_memory
    assert taken >= 15
    assert {type(result) for result, _ in results} >= {int, str, bool, type(None)}
    kinds = {result.split("(")[0] for result, _ in results if isinstance(result, str)}
    assert kinds == {"PageFault", "MMIOAccess"}


# -- one failure, at each point in turn ---------------------------------------------------------------------------


@strided(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_one_failure_at_each_point(mode, design, stride):
    """The n-th page is not to be had, for each n: everything is zapped, and the fault begins again."""
    results, memory, taken, zapped = undisturbed(mode, DESIGNS[design])
    failures = 0
    for after in range(0, taken, stride):
        scripted = Scripted(mode, DESIGNS[design])
        vm = scripted.guest.vm
        vm.mmu.fail_pages(after)
        for number, step in enumerate(scripted.steps()):
            assert scripted.seen(step) == results[number], (after, number)
            report = vm.audit()
            assert report.ok, (after, number, str(report))
        assert scripted.memory() == memory, after
        failures += vm.stats.mmu_shadow_zapped != zapped
    # A root that is missing at a register load is loaded by the fault that needs it: nothing is zapped then.
    assert failures * stride >= 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", ["cached", "flush"])
def test_one_failure_in_each_step(mode, design):
    """As often as a run without an error can bear it: one failure in every step."""
    results, memory, *_ = undisturbed(mode, DESIGNS[design])
    for after in range(4):
        scripted = Scripted(mode, DESIGNS[design])
        for number, step in enumerate(scripted.steps()):
            scripted.guest.vm.mmu.fail_pages(after)
            assert scripted.seen(step) == results[number], (after, number)
            assert scripted.guest.vm.audit().ok, (after, number)
        assert scripted.memory() == memory, after


# -- no page to be had from some point on -------------------------------------------------------------------------


def only_accessed_and_dirty(before, after, size):
    """Entries differ in A and D alone, and only where a table can be."""
    before, after = (np.frombuffer(memory, f"<u{size}") for memory in (before, after))
    return not np.any((before ^ after) & ~np.array(A | D, before.dtype)) and np.all(after | before == after)


@strided(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", ["cached", "flush"])
def test_exhausted_at_each_point(mode, design, stride):
    """From the n-th page on none is to be had: PoolExhausted, a sound structure, registers and data as they were, and
    the same step succeeds when there are pages again."""
    results, memory, taken, _ = undisturbed(mode, DESIGNS[design])
    for after in range(0, taken, stride):
        scripted = Scripted(mode, DESIGNS[design])
        vm, cpu = scripted.guest.vm, scripted.guest.cpu
        registers = {name: getattr(cpu, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer", "pdptes")}
        vm.mmu.fail_pages(after, EVER)
        exhausted = 0
        for number, step in enumerate(scripted.steps()):
            before = scripted.touched()
            try:
                seen = scripted.seen(step)
            except sc.PoolExhausted as error:
                exhausted += 1
                check_exhausted(error, vm)
                assert vm.audit().ok, (after, number)
                assert {name: getattr(cpu, name) for name in registers} == registers
                after_it = scripted.touched()
                if design == "cached":  # room is made before anything changes
                    assert after_it == before, (after, number)
                assert only_accessed_and_dirty(before, after_it, scripted.guest.size), (after, number)
                vm.mmu.fail_pages(0, 0)
                seen = scripted.seen(step)
            assert seen == results[number], (after, number)
            assert vm.audit().ok, (after, number)
            registers = {name: getattr(cpu, name) for name in registers}
        assert exhausted == 1, after
        assert scripted.memory() == memory, after


def test_failures_are_counted_as_asked_for():
    """fail_pages(n, k): n pages can be taken, the next k attempts fail, and then it is over."""
    guest = Guest("64", pages=8)
    guest.map(FAR, DATA, 8 * PAGE)
    mmu = guest.vm.mmu
    mmu.fail_pages(2, 2)  # the third table of the path, and again after everything was zapped
    with pytest.raises(sc.PoolExhausted):
        guest.cpu.read(USER)
    with guest.counting("mmu_cache_miss") as counted:
        guest.cpu.read(USER)
    assert counted["mmu_cache_miss"] >= 1
    mmu.fail_pages(0, 3)
    with pytest.raises(sc.PoolExhausted):
        guest.cpu.read(FAR)
    mmu.fail_pages(0, 0)
    assert guest.cpu.read(FAR) == 0
    assert guest.vm.audit().ok
    for arguments in ((-1, 1), (1, -1), (1.5, 1), (None, 1), (0, 1 << 40)):
        with pytest.raises(sc.ConfigError):
            mmu.fail_pages(*arguments)
    with pytest.raises(sc.ConfigError):
        sc.VM(memory=PAGE, mmu="native").mmu.fail_pages(1)


# -- batches ------------------------------------------------------------------------------------------------------

SWEPT = [
    "fuzz_32_s6",
    "fuzz_64_s6",
    "fuzz_pae_s6",
    "modeswitch_mix_s1",
    "recursive_64_s1",
    "usertable1_32_s1",
    "wp0_64_s1",
]


@lru_cache(maxsize=1)
def points(name):
    """(columns, memory) of a run without failures, and for each page that it takes the operation that takes it."""
    vm, ops = playing(name)
    missed = vm.stats.mmu_cache_miss
    results, takes = [], []
    for number in range(len(ops)):
        results.append(vm.vcpus[0].run(ops[number : number + 1]))
        takes += [number] * (vm.stats.mmu_cache_miss - missed)
        missed = vm.stats.mmu_cache_miss
    return columns(*results), vm.memory.words.copy(), takes


@pytest.mark.parametrize("name", SWEPT)
def test_stream_with_a_failure_at_each_point(name):
    """Up to the operation that meets the failure, an audit, and on to the end. (Of a long stream, at every eighth
    point.)"""
    wanted, memory, takes = points(name)
    assert len(takes) > 20
    zapped = 0
    for after, number in list(enumerate(takes))[:: 1 if len(takes) < 150 else 8]:
        vm, ops = playing(name)
        vm.mmu.fail_pages(after)
        first = vm.vcpus[0].run(ops[: number + 1])
        zapped += first.stats.mmu_shadow_zapped
        assert vm.audit().ok, after
        second = vm.vcpus[0].run(ops[number + 1 :])
        assert vm.audit().ok, after
        assert same(columns(first, second), wanted), after
        assert np.array_equal(vm.memory.words, memory), after
    assert zapped > 20


@pytest.mark.parametrize("name", SWEPT)
def test_stream_that_exhausts_the_pool(name):
    """`run` raises PoolExhausted with the operations that were done; the run goes on where it stopped."""
    wanted, memory, takes = points(name)
    for after, number in list(enumerate(takes))[:: 1 + len(takes) // 12]:
        vm, ops = playing(name)
        taken = vm.stats.mmu_cache_miss
        vm.mmu.fail_pages(after, EVER)
        with pytest.raises(sc.PoolExhausted) as caught:
            vm.vcpus[0].run(ops)
        done = caught.value.result
        # A fault wants all that it may need, up to three tables below the root, before it takes the first.
        taken = vm.stats.mmu_cache_miss - taken
        assert after - 3 < taken <= after
        # A root that is missing after a register load is missed only by an access.
        assert len(done) <= number or ops["op"][number] in (oracle.CR0, oracle.CR3, oracle.CR4, oracle.EFER)
        check_exhausted(caught.value, vm)
        assert vm.audit().ok, after
        assert same(columns(done), [column[: len(done)] for column in wanted]), after
        with pytest.raises(sc.PoolExhausted) as caught:
            vm.vcpus[0].run(ops[len(done) :])
        assert len(caught.value.result) == 0
        vm.mmu.fail_pages(0, 0)
        rest = vm.vcpus[0].run(ops[len(done) :])
        assert vm.audit().ok, after
        assert same(columns(done, rest), wanted), after
        assert np.array_equal(vm.memory.words, memory), after


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["fuzz_32_s11", "fuzz_64_s11", "pingpong_n4_64_s1", "pressure_32_s1"])
def test_stream_with_a_failure_every_few_operations(name, seed):
    wanted, memory, _ = points(name)
    rng = np.random.default_rng(seed)
    vm, ops = playing(name, pool_pages=40)
    results = []
    start = 0
    while start < len(ops):
        stop = start + int(rng.integers(1, 60))
        vm.mmu.fail_pages(int(rng.integers(0, 6)))
        results.append(vm.vcpus[0].run(ops[start:stop]))
        assert vm.audit().ok, start
        start = stop
    assert same(columns(*results), wanted)
    assert np.array_equal(vm.memory.words, memory)
