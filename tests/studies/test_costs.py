"""Prices, and what counters come to."""

import dataclasses

import pytest

import shadowcore as sc
from shadowcore.engine.costs import COMPONENTS, PRESETS, find

COUNTERS = {
    "instructions": 1000,
    "accesses": 100,
    "walk_references": 400,
    "exits_fill": 7,
    "exits_write": 3,
    "exits_emulate": 5,
    "exits_guest": 2,
    "exits_cr3": 11,
    "exits_invlpg": 4,
    "pf_emulate": 5,
    "guest_walk_references": 60,
    "guest_cr3_loads": 13,
    "guest_invlpg": 9,
    "guest_faults": 2,
    "mmu_cache_miss": 6,
    "mmu_shadow_zapped": 2,
    "spte_installed": 30,
    "spte_removed": 10,
}


def plain(**changes):
    """All prices 0, but for some."""
    zero = {f.name: 0.0 for f in dataclasses.fields(sc.Costs) if f.type == "float"}
    fixed = {
        "name": "test",
        "clock_ghz": 2.0,
        "leaf_shares": (1, 0, 0, 0),
        "leaf_latencies": (0, 0, 0, 0),
        "exit_factor": 1,
    }
    return sc.Costs(**(zero | fixed | changes))


@pytest.mark.parametrize(
    ("price", "component", "count"),
    [
        ("instruction", "work", 1000),
        ("tlb_miss", "translation", 100),
        ("upper_reference", "translation", 300),
        ("cr3_load", "guest", 2),
        ("invlpg", "guest", 5),
        ("guest_fault", "guest", 2),
        ("exit_fault", "switches", 17),
        ("exit_register", "switches", 11),
        ("exit_invlpg", "switches", 4),
        ("dispatch", "dispatch", 32),
        ("fill", "faults", 7),
        ("rights", "faults", 3),
        ("inject", "faults", 2),
        ("guest_reference", "faults", 60),
        ("emulate", "emulation", 5),
        ("register", "registers", 11),
        ("flush_page", "registers", 4),
        ("page_new", "pages", 6),
        ("page_zap", "pages", 2),
        ("entry", "pages", 40),
    ],
)
def test_each_price_is_paid_as_often_as_it_should(price, component, count):
    """One price at a time, of 3 cycles."""
    cost = plain(**{price: 3.0}).of(COUNTERS)
    assert cost.components == {name: 3.0 * count if name == component else 0 for name in COMPONENTS}
    assert cost.total == 3 * count
    assert cost.microseconds == pytest.approx(3 * count / 2000)


def test_leaf_entries_wait_for_a_level_of_the_cache():
    costs = plain(leaf_shares=(0.5, 0.25, 0.15, 0.1), leaf_latencies=(4, 12, 40, 200))
    assert costs.leaf_reference == pytest.approx(2 + 3 + 6 + 20)
    assert costs.of(COUNTERS).total == pytest.approx(31 * 100)
    with_tlb = COUNTERS | {"tlb_hits": 80, "tlb_misses": 20}
    assert costs.of(with_tlb).total == pytest.approx(31 * 20)


def test_factor_of_nested_hypervisors():
    costs = plain(exit_fault=10, dispatch=5, exit_factor=3)
    assert costs.of(COUNTERS).components["switches"] == 17 * 30
    assert costs.of(COUNTERS).components["dispatch"] == 32 * 5


def test_work_without_instructions_is_operations_or_accesses():
    costs = plain(access=2)
    assert costs.of({"operations": 50, "accesses": 70}).total == 100
    assert costs.of({"accesses": 70}).total == 140


def test_slow_down_and_dict():
    costs = plain(instruction=1, dispatch=10)
    cost = costs.of(COUNTERS, {"instructions": 1000})
    assert cost.slow_down == pytest.approx(1.32)
    assert costs.of(COUNTERS).slow_down is None
    shown = cost.as_dict()
    assert shown["cycles"] == cost.total == sum(shown["cycles_by_component"].values())
    assert (shown["costs"], shown["clock_ghz"], shown["slow_down"]) == ("test", 2.0, cost.slow_down)


def test_counters_of_a_vm_are_enough():
    vm = sc.VM("16MiB", "cached")
    sc.Kernel(vm).spawn()
    assert sc.Costs.modern().of(vm.stats.as_dict()).total > 0


def test_presets():
    assert set(PRESETS) == {"modern", "core2007", "pvm", "nested"}
    for name, make in PRESETS.items():
        costs = make()
        assert costs.name == name
        assert find(name) == costs == find(costs)
        documented = getattr(sc.Costs, name).__doc__
        assert "exit_" in documented
        assert costs.as_dict()["leaf_shares"] == list(costs.leaf_shares)
        with pytest.raises(dataclasses.FrozenInstanceError):
            costs.fill = 1
    exits = {"accesses": 1, "exits_cr3": 100}
    slow = {name: make().of(exits).total for name, make in PRESETS.items()}
    assert slow["modern"] < slow["nested"] < slow["core2007"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"fill": -1}, "costs.fill"),
        ({"fill": float("nan")}, "costs.fill"),
        ({"fill": float("inf")}, "costs.fill"),
        ({"fill": "3"}, "costs.fill"),
        ({"fill": True}, "costs.fill"),
        ({"clock_ghz": 0}, "costs.clock_ghz"),
        ({"exit_factor": 0.5}, "costs.exit_factor"),
        ({"leaf_shares": (1, 1, 0, 0)}, "costs.leaf_shares"),
        ({"leaf_shares": (1, 0, 0)}, "costs.leaf_shares"),
        ({"leaf_latencies": 4}, "costs.leaf_latencies"),
        ({"name": ""}, "costs.name"),
        ({"tlb": 64}, "costs.tlb"),
        ({"fil": 1}, "there is no 'fil'"),
    ],
)
def test_refused_prices(changes, what):
    with pytest.raises(sc.ConfigError, match=what):
        sc.Costs.modern().replace(**changes)


@pytest.mark.parametrize(
    ("counters", "what"),
    [
        ({}, "nothing says what was done"),
        ({"accesses": -1}, "'accesses'"),
        ({"accesses": "many"}, "'accesses'"),
        ({"accesses": 1, "exits_cr3": None}, "'exits_cr3'"),
        (7, "a mapping"),
    ],
)
def test_refused_counters(counters, what):
    with pytest.raises(sc.ConfigError, match=what):
        sc.Costs.modern().of(counters)
    with pytest.raises(sc.ConfigError, match="native_counters"):
        sc.Costs.modern().of({"accesses": 1}, counters)


def test_refused_names():
    with pytest.raises(sc.ConfigError, match="'fast' is not one of modern, core2007"):
        find("fast")
    with pytest.raises(sc.ConfigError, match="is not one of"):
        find(7)
