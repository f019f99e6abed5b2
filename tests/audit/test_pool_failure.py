"""Shadow pages that cannot be had: what a guest sees does not depend on it.

A page that is not to be had costs zaps and exits. Where there is no way at all, an error names the roots that pin the
pool, nothing is left half done, and the same operation succeeds when there is room again.
"""

from functools import lru_cache

import numpy as np
import oracle
import pytest
import streams
from guest2007 import DATA, MODES, PAGE, RAM, TABLES, USER, WINDOW, A, D, Guest, P, U, W

import shadowcore as sc

EVER = 1 << 30
CR0_WP, CR0_PG, CR4_PGE = 1 << 16, 1 << 31, 1 << 7

FAR = USER + (64 << 20)
NEW = USER + (128 << 20)  # its table is hung in while the guest runs
LARGE = USER + (192 << 20)
READ_ONLY = USER + 4 * PAGE
CLEAN = USER + 5 * PAGE
DEVICE = USER + 6 * PAGE
TABLE_OF_USER = USER + 7 * PAGE  # a table of the guest that user mode may write
NOWHERE = USER + 100 * PAGE
SECOND = USER + 8 * PAGE


class Scripted:
    """A guest, and a script of everything that makes a shadow MMU take pages."""

    def __init__(self, mode, design):
        self.guest = guest = Guest(mode, design)
        large = 1 << guest.tables.format.shift(2)
        guest.map(READ_ONLY, DATA + 4 * PAGE, rights="rxu")
        guest.map(CLEAN, DATA + 5 * PAGE, dirty=False)
        guest.map(DEVICE, RAM)
        guest.map(FAR, DATA + 16 * PAGE, 4 * PAGE)
        guest.map(NEW, DATA + 20 * PAGE, 4 * PAGE)
        guest.map(LARGE, 0, large, page_size=large)
        guest.map(TABLE_OF_USER, guest.entry(NEW) & -PAGE)
        self.directory_entry = guest.tables.entry(NEW, 2).value
        guest.tables.set_entry(NEW, 2, 0)
        self.other = guest.address_space(4)
        guest.vm.memory.words[DATA // 8 : DATA // 8 + 32 * 512] = np.arange(32 * 512)

    def steps(self):
        """Calls, each one operation of the guest."""
        guest, cpu, vm = self.guest, self.guest.cpu, self.guest.vm

        def load(va, **kwargs):
            return lambda: cpu.read(va, 4, **kwargs)

        def store(va, value, size=4, **kwargs):
            return lambda: cpu.write(va, value, size, **kwargs)

        def register(name, value):
            return lambda: setattr(cpu, name, value)

        def edit(va, value, level=1):
            at = guest.window(guest.entry(va, level))
            return [store(at, value, guest.size), lambda: cpu.invlpg(va)]

        cr0, cr3, cr4 = (guest.tables.registers[name] for name in ("cr0", "cr3", "cr4"))
        leaf = DATA | P | W | U | A | D
        return [
            load(USER),
            store(USER + PAGE, 7),
            lambda: cpu.fetch(USER + 2 * PAGE),
            store(USER + 3 * PAGE, 8, user=True),
            store(READ_ONLY, 9, user=True),
            load(CLEAN),
            store(CLEAN, 10),
            load(NOWHERE),
            load(DEVICE),
            load(FAR),
            store(LARGE + 5 * PAGE, 11),
            load(LARGE + (1 << 20)),
            store(USER + PAGE - 4, 0x1122334455667788, 8),
            *edit(USER + PAGE, leaf + 9 * PAGE),
            load(USER + PAGE),
            store(SECOND, 12),
            *edit(FAR, 0, level=2),
            load(FAR),
            *edit(NEW, self.directory_entry, level=2),
            load(NEW),
            store(NEW + PAGE, 13),
            *(step for i in range(4) for step in edit(USER + i * PAGE, leaf + (i ^ 1) * PAGE)),
            *(load(USER + i * PAGE) for i in range(4)),
            lambda: cpu.cmpxchg(guest.window(guest.entry(CLEAN)), 0, 0, guest.size),
            lambda: cpu.modify(guest.window(guest.entry(USER)), "and", 0xFF & ~U, 1),
            lambda: cpu.invlpg(USER),
            load(USER, user=True),
            store(TABLE_OF_USER + 2 * guest.size, leaf + 30 * PAGE, guest.size, user=True),
            lambda: cpu.invlpg(NEW + 2 * PAGE),
            load(NEW + 2 * PAGE),
            register("cr3", self.other.cr3),
            load(USER),
            store(USER + 2 * PAGE, 14),
            load(FAR),
            register("cr3", cr3),
            load(USER + 2 * PAGE),
            register("cr4", cr4 ^ CR4_PGE),
            load(NEW),
            register("cr0", cr0 & ~CR0_WP),
            store(READ_ONLY, 15),
            load(READ_ONLY, user=True),
            register("cr0", cr0),
            store(READ_ONLY, 16),
            register("cr0", cr0 & ~CR0_PG),
            load(DATA),
            store(DATA + 11 * PAGE, 17),
            load(guest.entry(USER)),
            store(guest.entry(USER + 3 * PAGE), 0),
            register("cr0", cr0),
            load(USER + 3 * PAGE),
            lambda: vm.write_physical(guest.entry(USER + 3 * PAGE), int(leaf).to_bytes(guest.size, "little")),
            lambda: cpu.invlpg(USER + 3 * PAGE),
            load(USER + 3 * PAGE),
        ]

    def seen(self, step):
        """What the guest sees of one step."""
        try:
            return step(), self.guest.cpu.cr2
        except sc.GuestFault as fault:
            return repr(fault), self.guest.cpu.cr2

    def memory(self):
        return self.guest.vm.memory.bytes.tobytes()

    def touched(self):
        """The part of memory that the script touches, but for one store through the large page."""
        memory = self.guest.vm.memory.bytes
        return memory[DATA : DATA + 64 * PAGE].tobytes() + memory[TABLES : TABLES + 32 * PAGE].tobytes()


@lru_cache
def undisturbed(mode, design):
    """What a run without a failure shows, and the pages that it takes."""
    scripted = Scripted(mode, design)
    taken = scripted.guest.vm.stats.mmu_cache_miss
    results = [scripted.seen(step) for step in scripted.steps()]
    assert scripted.guest.vm.audit().ok
    stats = scripted.guest.vm.stats
    return results, scripted.memory(), stats.mmu_cache_miss - taken, stats.mmu_shadow_zapped


DESIGNS = {
    "cached": sc.Shadow.cached(),
    "flush": sc.Shadow.flush(quirks=sc.Quirk.NONE),
    "cached, 12 pages": sc.Shadow.cached(pool_pages=12, min_free=3, refill=5),
}


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_one_failure_at_each_point(mode, design):
    """The n-th page is not to be had, for each n: everything is zapped, and the fault begins again."""
    results, memory, taken, zapped = undisturbed(mode, DESIGNS[design])
    failures = 0
    for after in range(taken):
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
    assert failures >= 5


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


def roots_of(vm):
    """gfns of the pages that are pinned."""
    pages = vm.mmu.pages
    return sorted(pages["gfn"][pages["root_count"] > 0].tolist())


def check_exhausted(error, vm):
    """The error names what is pinned."""
    assert sorted(error.roots) == roots_of(vm)
    assert error.had == vm.mmu.design.pool_pages
    assert all(f"{gfn:#x}" in str(error) for gfn in error.roots)


def only_accessed_and_dirty(before, after, size):
    """Entries differ in A and D alone, and only where a table can be."""
    before, after = (np.frombuffer(memory, f"<u{size}") for memory in (before, after))
    return not np.any((before ^ after) & ~np.array(A | D, before.dtype)) and np.all(after | before == after)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", ["cached", "flush"])
def test_exhausted_at_each_point(mode, design):
    """From the n-th page on none is to be had: PoolExhausted, a sound structure, registers and data as they were, and
    the same step succeeds when there are pages again."""
    results, memory, taken, _ = undisturbed(mode, DESIGNS[design])
    for after in range(taken):
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


def playing(name, **settings):
    data = streams.stream(name)
    vm = sc.VM(memory=int(data["nframes"]) * PAGE, mmu=sc.Shadow.cached(**settings))
    streams.put_frames(vm, data["mem_gfn"], data["mem_page"])
    return vm, data["ops"]


def columns(*results):
    """What the guest saw, of results one after the other."""
    return [
        np.concatenate([np.asarray(getattr(result, key)) for result in results])
        for key in ("outcome", "error_code", "gpa", "value")
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
    return columns(*results), vm.memory.bytes.copy(), takes


def same(got, wanted):
    return all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


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
        assert np.array_equal(vm.memory.bytes, memory), after
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
        assert np.array_equal(vm.memory.bytes, memory), after


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
    assert np.array_equal(vm.memory.bytes, memory)


# -- the smallest pools -------------------------------------------------------------------------------------------

FUZZ = [name for name in streams.STREAMS if "fuzz" in name]
TINY = (4, 5, 6, 8)


@pytest.mark.parametrize("pool_pages", TINY)
@pytest.mark.parametrize("name", [*FUZZ, "modeswitch_mix_s1", "recursive_pae_s1", "upper_64_s1", "wp0_32_s1"])
def test_tiny_pools(name, pool_pages):
    """In a pool of 4 to 8 pages every fault zaps, and the guest sees what it sees with 4096: also when nothing is
    recycled before it must be. No stream has five levels."""
    expected, frames = streams.expected(name)
    accesses = streams.is_access(streams.stream(name)["ops"])
    for settings in ({}, {"min_free": 0, "refill": 0}, {"min_free": 2, "refill": 2, "flood_threshold": None}):
        runs = []
        for pages in (pool_pages, 4096):
            vm, ops = playing(name, pool_pages=pages, **settings)
            result = vm.vcpus[0].run(ops)
            assert vm.audit().ok
            assert streams.different_frames(streams.frames_of(vm), frames) == []
            runs.append((columns(result), result.stats.mmu_shadow_zapped))
        (tiny, zapped), (large, few) = runs
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
    vm = sc.VM(memory=int(data["nframes"]) * PAGE, mmu=sc.Shadow.kvm_2007(pool_pages=pool_pages))
    streams.put_frames(vm, data["mem_gfn"], data["mem_page"])
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
