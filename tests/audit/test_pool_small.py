"""Pools of few pages: roots that pin them, and what a guest sees, which is what it sees with many pages."""

from functools import cache, partial

import numpy as np
import pytest
import streams
from guest2007 import DATA, MODES, PAGE, RAM, USER, WINDOW, Guest
from scripted import CR0_PG, DESIGNS, LARGE, Scripted, columns, playing, roots_of, same, undisturbed

import shadowcore as sc

# -- the pool is really too small ---------------------------------------------------------------------------------


def two_processors(mode, pool_pages):
    """Two processors with tables of their own, in a pool that may not hold the roots and paths of both. min_free = 0:
    nothing is recycled before it must be."""
    vm = sc.VM(memory=RAM, mmu=sc.Shadow.cached(pool_pages=pool_pages, min_free=0, refill=0), vcpus=2)
    frames = iter(range(0x440, 0x4C0))
    spaces = [sc.PageTables(vm.memory, mode, allocate=lambda: next(frames)) for _ in vm.vcpus]
    for number, (cpu, space) in enumerate(zip(vm.vcpus, spaces, strict=True)):
        for slot in range(4):  # a page in each GiB
            space.map((slot << 30) + 0x400000, DATA + (4 * number + slot) * PAGE, PAGE, dirty=False)
        for name, value in space.registers.items():
            setattr(cpu, name, value)
    return vm


def pinned(mode, pool_pages):
    """The first processor holds all its roots; the second one has none yet."""
    vm = two_processors(mode, pool_pages)
    first = vm.vcpus[0]
    vm.mmu.zap_all()
    first.cr3 = first.cr3
    return vm


# Pages that the second processor needs to get anywhere: the roots of the first, its own, and the rest of a path.
ENOUGH = {"32": 4 + 1 + 1, "pae": 4 + 1 + 1, "64": 1 + 1 + 3, "la57": 1 + 1 + 4}


@pytest.mark.parametrize("mode", MODES)
def test_both_fit_into_just_enough(mode):
    """However often they take turns."""
    vm = pinned(mode, ENOUGH[mode])
    for _ in range(2):
        for number, cpu in reversed(list(enumerate(vm.vcpus))):
            for slot in range(4):
                cpu.write((slot << 30) + 0x400000, 10 * number + slot)
                assert vm.audit().ok
    assert [vm.memory.words[(DATA + i * PAGE) // 8] for i in range(8)] == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize("mode", MODES)
def test_roots_of_another_processor_pin_the_pool(mode):
    """One page less: an error that names the roots; nothing had been changed, for room is made before a fault is
    looked into; and the same store succeeds when the other processor gives way."""
    vm = pinned(mode, ENOUGH[mode] - 1)
    first, second = vm.vcpus
    names = ("cr0", "cr2", "cr3", "cr4", "efer", "pdptes")
    memory, registers = vm.memory.bytes.tobytes(), [[getattr(cpu, name) for name in names] for cpu in vm.vcpus]
    with pytest.raises(sc.PoolExhausted) as caught:
        second.write(0x400000, 77)
    assert vm.memory.bytes.tobytes() == memory
    assert [[getattr(cpu, name) for name in names] for cpu in vm.vcpus] == registers
    assert vm.audit().ok
    assert first.read(0x400000) == 0
    directories = {"32": [first.cr3] * 4, "pae": first.pdptes, "64": [first.cr3], "la57": [first.cr3]}[mode]
    assert {entry >> 12 for entry in directories} <= set(caught.value.roots)
    assert caught.value.had == ENOUGH[mode] - 1
    first.cr0 &= ~CR0_PG
    first.cr3 = second.cr3
    first.cr0 |= CR0_PG
    second.write(0x400000, 77)
    assert second.read(0x400000) == 77
    assert vm.audit().ok


@pytest.mark.parametrize("mode", MODES)
def test_needed_pages_are_enough_and_not_too_many(mode):
    """What the error asks for is what it takes."""
    with pytest.raises(sc.PoolExhausted) as caught:
        pinned(mode, ENOUGH[mode] - 1).vcpus[1].write(0x400000, 1)
    assert caught.value.needed == ENOUGH[mode]


@pytest.mark.parametrize("mode", MODES)
def test_processors_that_share_their_tables(mode):
    """A root that is there already, for another processor, takes no page: two fit where one fits."""
    vm = two_processors(mode, {"la57": 5}.get(mode, 4))
    first, second = vm.vcpus
    second.cr3 = first.cr3
    for _ in range(2):
        for cpu in vm.vcpus:
            cpu.write(0x400000, 1 + cpu.number)
            assert vm.audit().ok


def test_five_levels_do_not_fit_into_four_pages():
    """The one case in which a pool of the least size is too small for a single processor."""
    guest = Guest("la57", sc.Shadow.cached(pool_pages=4))
    before = guest.vm.memory.bytes.tobytes()
    for _ in range(2):
        with pytest.raises(sc.PoolExhausted, match="5 pages needed, the pool has 4") as caught:
            guest.cpu.write(USER, 1)
        assert (caught.value.needed, caught.value.had) == (5, 4)
        assert sorted(caught.value.roots) == roots_of(guest.vm)
        assert guest.vm.memory.bytes.tobytes() == before
        assert guest.vm.audit().ok
    guest.cpu.cr0 &= ~CR0_PG
    assert guest.cpu.read(DATA) == 0


# -- the smallest pools -------------------------------------------------------------------------------------------

FUZZ = [name for name in streams.STREAMS if "fuzz" in name]
TINY = (4, 5, 6, 8)
RECYCLING = ({}, {"min_free": 0, "refill": 0}, {"min_free": 2, "refill": 2, "flood_threshold": None})


def played(name, number, pages):
    """What the guest saw of a stream under RECYCLING[number], and the pages that were zapped."""
    vm, ops = playing(name, pool_pages=pages, **RECYCLING[number])
    result = vm.vcpus[0].run(ops)
    assert vm.audit().ok
    assert streams.different_frames(streams.frames_of(vm), streams.expected(name)[1]) == []
    return columns(result), result.stats.mmu_shadow_zapped


in_a_large_pool = cache(partial(played, pages=4096))


@pytest.mark.parametrize("pool_pages", TINY)
@pytest.mark.parametrize("name", [*FUZZ, "modeswitch_mix_s1", "recursive_pae_s1", "upper_64_s1", "wp0_32_s1"])
def test_tiny_pools(name, pool_pages):
    """In a pool of 4 to 8 pages every fault zaps, and the guest sees what it sees with 4096: also when nothing is
    recycled before it must be. No stream has five levels."""
    expected, _ = streams.expected(name)
    accesses = streams.is_access(streams.stream(name)["ops"])
    for number in range(len(RECYCLING)):
        tiny, zapped = played(name, number, pool_pages)
        large, few = in_a_large_pool(name, number)
        assert same(tiny, large)
        assert zapped > few
        for got, want in zip(tiny[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(got[accesses], want[accesses].astype(got.dtype))


@pytest.mark.parametrize("pool_pages", TINY)
@pytest.mark.parametrize("mode", MODES)
def test_script_in_tiny_pools(mode, pool_pages):
    """The script has every mode, five levels too: these fit into all pools but the one of 4 pages."""
    results, memory, *_ = undisturbed(mode, DESIGNS["cached"])
    for design in (sc.Shadow.cached, sc.Shadow.flush):
        quirks = {"quirks": sc.Quirk.NONE}
        for settings in ({"min_free": 0, "refill": 0}, {"min_free": 5, "refill": 25}):
            scripted = Scripted(mode, design(pool_pages=pool_pages, **settings, **quirks))
            if (mode, pool_pages) == ("la57", 4):
                with pytest.raises(sc.PoolExhausted) as caught:
                    scripted.seen(scripted.steps()[0])
                assert (caught.value.needed, caught.value.had) == (5, 4)
                continue
            for number, step in enumerate(scripted.steps()):
                assert scripted.seen(step) == results[number]
                assert scripted.guest.vm.audit().ok
            assert scripted.memory() == memory


@pytest.mark.parametrize("pool_pages", [*TINY, 12])
@pytest.mark.parametrize("name", ["fuzz_32_s6", "fuzz_64_s6", "fuzz_pae_s6", "q_fuzzlarge_64_s100"])
def test_tiny_pools_with_the_defects_of_2007(name, pool_pages):
    """The original crashed or hung for want of pages. Here a stream ends, or a typed error says that it does not go on:
    with less free pages than min_free for ever, a leaf by which ROLE_WITHOUT_ACCESS judges is recycled at each exit."""
    data = streams.stream(name)
    vm = streams.machine(data, sc.Shadow.kvm_2007(pool_pages=pool_pages))
    ops = data["ops"]
    try:
        done = len(vm.vcpus[0].run(ops))
    except (sc.PoolExhausted, sc.EngineError) as error:
        done = len(error.result)
    assert [str(v) for v in vm.audit().violations if v.invariant not in ("I1", "I2")] == []
    assert done == len(ops) or pool_pages < 12


def test_window_is_where_the_script_expects_it():
    """The script stores to tables through a window that must not overlap the pages it uses."""
    assert all(not USER <= base < LARGE + (4 << 20) for base in WINDOW.values())
