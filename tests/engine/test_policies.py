"""Policies of replacement: what they recycle is what their papers say; what the guest sees is the same under each."""

import numpy as np
import policies as models
import pytest
import streams

import shadowcore as sc
from shadowcore.config import POLICIES, USES
from shadowcore.engine.future import NEVER, Future
from shadowcore.engine.policies.references import misses

COLUMNS = ("outcome", "error_code", "gpa", "value")
BOOKS = [name for name in POLICIES if name not in ("fifo", "optimal")]


def strings(seed):
    """Strings of references of several kinds: by popularity, in loops, with a scan in between, at random."""
    rng = np.random.default_rng(seed)
    popular = np.minimum(rng.zipf(1.2, 800), 200)
    loop = np.tile(np.arange(30), 20)
    scan = np.concatenate([popular[:300], np.arange(1000, 1060), popular[:300], loop[:100]])
    return {"popular": popular, "loop": loop, "scan": scan, "any": rng.integers(0, 60, 600)}


def missed(model, string):
    return sum(not model.ask(int(key)) for key in string)


@pytest.mark.parametrize("policy", models.MODELS)
def test_misses_are_those_of_the_model(policy):
    for seed in range(2):
        for kind, string in strings(seed).items():
            for size in (4, 13, 40, 200):
                assert misses(policy, size, string) == missed(models.MODELS[policy](size), string), (kind, size)


def test_lirs_with_more_than_one_cold_page():
    string = np.minimum(np.random.default_rng(3).zipf(1.05, 6000), 3000)
    assert misses("lirs", 420, string) == missed(models.Lirs(420), string)


def test_optimal_is_beladys_and_nothing_is_better():
    for string in strings(5).values():
        for size in (4, 13, 40):
            best = misses("optimal", size, string)
            assert best == missed(models.Optimal(size, string), string)
            assert all(misses(policy, size, string) >= best for policy in POLICIES)


def test_random_is_that_of_its_seed():
    string = strings(1)["any"]
    found = [misses("random", 20, string, seed=seed) for seed in range(8)]
    assert found == [misses("random", 20, string, seed=seed) for seed in range(8)]
    assert len(set(found)) > 1
    assert misses("optimal", 20, string) <= min(found)


def test_a_pool_that_holds_all_misses_each_once():
    for string in strings(0).values():
        for policy in POLICIES:
            assert misses(policy, 1100, string) == len(np.unique(string)), policy


def test_the_future_ends_at_a_death():
    keys = np.array([1, 2, 1, 1, 2], np.uint64)
    assert Future(keys).next_use.tolist() == [2, 4, 3, NEVER, NEVER]
    # Page 1 is zapped by the guest after three uses, 2 after one that it never had.
    future = Future(keys, np.array([1, 2], np.uint64), np.array([3, 1], np.uint64))
    assert future.next_use.tolist() == [2, 4, NEVER, NEVER, NEVER]


# In the engine.


def design(kind, policy, pool=16, **more):
    make = {"cached": sc.Shadow.cached, "kvm-2007": sc.Shadow.kvm_2007, "unsync": sc.Shadow.unsync}[kind]
    return make(pool_pages=pool, min_free=min(5, pool // 3), refill=pool // 2, policy=policy, **more)


def ran(name, mmu, general=False, points=(), **more):
    data = streams.stream(name)
    vm = streams.machine(data, mmu, **more)
    vm.mmu.general = general
    vm.audit_points = points
    result = vm.vcpus[0].run(data["ops"])
    report = vm.audit()
    assert report.ok, str(report)
    return vm, result


@pytest.fixture(scope="module")
def without():
    """What the guest sees with room for everything."""
    return {name: ran(name, "native") for name in ("pressure_64_s1", "fuzz_32_s6", "fuzz_pae_s6")}


@pytest.mark.parametrize("uses", ["fault+link+cr3", "fault+accessed", "walk"])
@pytest.mark.parametrize("policy", BOOKS)
@pytest.mark.parametrize("name", ["pressure_64_s1", "fuzz_32_s6", "fuzz_pae_s6"])
def test_the_guest_sees_the_same(name, policy, uses, without):
    vm, result = ran(name, design("cached", policy, uses=uses), points=("post-fault",) if uses == "walk" else ())
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(result, column), getattr(without[name][1], column))
    assert streams.different_frames(streams.frames_of(vm), streams.frames_of(without[name][0])) == []
    assert vm.stats.mmu_recycled or name != "pressure_64_s1"


@pytest.mark.parametrize("kind", ["cached", "kvm-2007", "unsync"])
@pytest.mark.parametrize("policy", BOOKS)
def test_fast_paths_do_not_show(policy, kind):
    for name, uses in (
        ("pressure_64_s1", "fault"),
        ("pressure_64_s1", "link+cr3"),
        ("pressure_64_s1", "fault+link+cr3+accessed"),
        ("fuzz_pae_s6", "fault+link+cr3"),
    ):
        fast, one = ran(name, design(kind, policy, uses=uses))
        slow, other = ran(name, design(kind, policy, uses=uses), general=True)
        assert fast.stats.as_dict() == slow.stats.as_dict(), uses
        assert np.array_equal(one.exits, other.exits)
        assert np.array_equal(fast.mmu.arrays["table"], slow.mmu.arrays["table"])


@pytest.mark.parametrize("policy", BOOKS)
def test_a_saved_machine_goes_on(policy, tmp_path):
    for kind in ("cached", "unsync"):
        mmu = design(kind, policy, policy_seed=3, recycle_children=True)
        vm, loaded = streams.saved_half_way("pressure_64_s1", mmu, tmp_path / "vm")
        assert np.array_equal(vm.mmu.arrays["members"], loaded.mmu.arrays["members"])


@pytest.mark.parametrize("policy", BOOKS)
def test_the_audit_reads_the_books(policy):
    vm, _ = ran("pressure_64_s1", design("cached", policy))
    members = vm.mmu.arrays["members"]
    used = np.flatnonzero(vm.mmu.arrays["pages"]["active"])
    inside = members["slot"] if policy in ("random", "cost") else members["queue"][:, 0]
    name, none = ("slot", 0xFFFFFFFF) if policy in ("random", "cost") else ("queue", 255)
    arrays = vm.mmu.writable_arrays()
    page = next(int(page) for page in used if inside[page] != none)
    arrays["members"][name][page] = none
    del arrays, members, inside
    with pytest.raises(sc.AuditError, match="I14"):
        vm.vcpus[0].translate(0)
    assert [violation.invariant for violation in vm.audit().violations] == ["I14"]


def test_children_go_along():
    stayed, _ = ran("pressure_64_s1", design("cached", "lru"))
    gone, _ = ran("pressure_64_s1", design("cached", "lru", recycle_children=True))
    assert gone.stats.mmu_recycled != stayed.stats.mmu_recycled
    with_fifo, _ = ran("pressure_64_s1", design("cached", "fifo", recycle_children=True))
    assert with_fifo.stats.exits_total > 0


def test_accessed_bits_save_a_page_that_is_used_without_faults():
    """A page that the processor goes through all the time, without exits, outlives others under lru only if A is asked
    for."""

    def left(uses):
        mmu = sc.Shadow.cached(pool_pages=8, min_free=2, refill=3, policy="lru", uses=uses)
        vm = sc.VM("32MiB", mmu)
        tables = sc.PageTables(vm.memory, "64", allocate=range(64, 512))
        for region in range(12):
            tables.map(region << 21, region << 12, 4096, "rwx")
        tables.activate(vm.vcpus[0])
        vm.vcpus[0].read(0)
        faults = []
        for region in range(1, 12):
            vm.vcpus[0].read(region << 21)
            before = vm.stats.exits_total
            vm.vcpus[0].read(0)
            faults.append(vm.stats.exits_total - before)
        assert vm.audit().ok
        return sum(faults)

    # A is set where an entry is made, so that the first look tells nothing.
    assert left("fault+link") > left("fault+link+accessed") <= 1


def test_settings_are_checked():
    with pytest.raises(sc.ConfigError, match=r"policy: there is no 'lruu'; did you mean 'lru'\?"):
        sc.Shadow.cached(policy="lruu")
    with pytest.raises(sc.ConfigError, match=r"uses: there is no 'faultt'; did you mean 'fault'\?"):
        sc.Shadow.cached(policy="lru", uses="faultt")
    with pytest.raises(sc.ConfigError, match="uses: some of"):
        sc.Shadow.cached(uses=3)
    with pytest.raises(sc.ConfigError, match="policy, recycle_children: guest tables"):
        sc.Shadow.flush(policy="lru")
    with pytest.raises(sc.ConfigError, match="'optimal' needs to know what is to come"):
        sc.VM("1MiB", sc.Shadow.cached(policy="optimal"))
    with pytest.raises(sc.ConfigError, match="policy 'optimal' is needed"):
        sc.VM("1MiB", sc.Shadow.cached(policy="lru"), future=Future(np.zeros(1, np.uint64)))
    with pytest.raises(sc.ConfigError, match="references: an array"):
        misses("lru", 8, np.array([-1]))
    assert sc.Shadow.cached(policy="lru", uses=("cr3", "fault")).uses == ("fault", "cr3")
    assert set(sc.Shadow.cached(policy="optimal").uses) == {USES[-1]}


def test_optimal_in_the_engine():
    """Two passes: the second knows what the first has seen, and recycles what is not needed."""
    data = streams.stream("pressure_64_s1")
    first = streams.machine(data, design("cached", "fifo"), record_uses=True)
    first.vcpus[0].run(data["ops"])
    future = Future.of(first.mmu)
    assert len(future) > 100
    found = {}
    for policy in ("fifo", "lru", "optimal"):
        more = {"future": future} if policy == "optimal" else {}
        vm, _ = ran("pressure_64_s1", design("cached", policy), **more)
        assert vm.mmu.strayed == 0
        found[policy] = vm.stats.mmu_cache_miss
    assert found["optimal"] <= min(found.values())
