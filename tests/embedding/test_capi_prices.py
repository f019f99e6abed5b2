"""Cycles by way of the C functions: what Costs says of the same counters."""

import ctypes
import math

import numpy as np
import pytest
from capi import (
    API,
    DESIGNS,
    C,
    Guest,
    Prices,
    error,
    made,
)

import shadowcore as sc
from shadowcore.engine.levels import of_design

# -- cycles ----------------------------------------------------------------------------------------------


def priced(guest, preset=b"modern"):
    prices = made(Prices)
    assert API.prices(preset, prices) == 0, error()
    assert API.set_prices(guest.vm, prices) == 0
    return prices


def spent(guest):
    cycles = ctypes.c_double()
    assert API.cycles(guest.vm, cycles) == 0
    return cycles.value


def virtualization(costs, stats):
    """What sc.Costs makes of the counters, but for the guest's own instructions."""
    components = getattr(sc.Costs, costs)().of(stats.as_dict()).components
    return sum(cycles for name, cycles in components.items() if name not in ("work", "guest"))


@pytest.mark.parametrize("preset", ["core2007", "modern", "pvm", "nested"])
@pytest.mark.parametrize("tlb", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_cycles_are_those_of_costs(design, tlb, preset):
    """The sum of what accesses cost is the cost of what they counted; with and without prices the same is counted."""
    three = ctypes.c_uint32 * 3
    config = {"tlb_entries": three(64, 32, 4), "tlb_ways": three(4, 4, 4)} if tlb else {}
    guest, free = (Guest(design, **config) for _ in range(2))
    priced(guest, preset.encode())
    began, total = spent(guest), 0
    random = np.random.default_rng(5)
    for i in range(300):
        if i % 50 == 49:
            value = ctypes.c_uint64()
            assert API.register_read(guest.vm, 0, C["SC_CR3"], value) == 0
            before = spent(guest)
            for machine in (guest, free):
                assert API.register_load(machine.vm, 0, C["SC_CR3"], value) == 0
            began += spent(guest) - before
            assert (spent(guest) > before) == (design not in ("native", "nested", "kvm-6.1-tdp", "kvm-6.1-direct"))
        page = random.integers(0x400, 0x52C) if i % 3 else random.integers(0x800, 0x830)
        gva = int(page) * 4096
        kind, size = int(random.integers(0, 2)), 8
        rc, outcome = guest.access(kind, gva, size, value=0)
        assert free.access(kind, gva, size, value=0)[0] == rc
        total += outcome.cycles
    assert guest.counters().tolist() == free.counters().tolist()
    assert (guest.memory == free.memory).all()
    assert spent(guest) - began == pytest.approx(total, abs=300 * 0.5)
    stats = sc.embed.from_handle(guest.vm.value).stats
    assert spent(guest) == pytest.approx(virtualization(preset, stats))
    assert API.set_prices(guest.vm, None) == 0
    assert spent(guest) == 0
    assert guest.access(C["SC_READ"], 0x40_0000)[1].cycles == 0
    guest.close()
    free.close()


def backed(design, **settings):
    """A VM of Python's with account of the host, behind a handle, and prices of its own."""
    vm = sc.VM("8MiB", design, backing="cold", outer_backing="cold", **settings)
    tables = sc.PageTables(vm.memory, allocate=range(16, 64))
    tables.map(0x40_0000, 0x20_0000, 1 << 20, "rwxu")
    tables.activate(vm.vcpus[0])
    return vm


@pytest.mark.parametrize("preset", ["modern", "nested", "pvm", "kvm-2023-8269cy"])
@pytest.mark.parametrize("design", ["native", "cached", "unsync", "nested", "kvm-6.1-direct"])
def test_what_lies_below_has_its_prices(design, preset):
    """EPT violations and first touches: as Costs has them with the levels that belong to the design."""
    vm = backed(design)
    handle, prices, plain = ctypes.c_uint64(sc.embed.handle(vm)), made(Prices), made(Prices)
    assert API.prices_for(handle, preset.encode(), prices) == 0, error()
    assert API.prices(preset.encode(), plain) == 0
    assert API.set_prices(handle, prices) == 0
    for n in range(200):
        vm.vcpus[0].write(0x40_0000 + n * 4096, n)
    vm.host_unmap(0x200, 32)
    for n in range(200):
        vm.vcpus[0].read(0x40_0000 + n * 4096)
    cycles = ctypes.c_double()
    assert API.cycles(handle, cycles) == 0
    costs = sc.Costs.preset(preset)
    costs = costs.replace(levels=of_design(costs.levels, sc.config.design(design).engine))
    parts = costs.of(vm.stats.as_dict()).components
    assert cycles.value == pytest.approx(sum(v for name, v in parts.items() if name not in ("work", "guest")))
    assert vm.stats.host_faults > 200
    assert (prices.violation > 0) == (sc.config.design(design).engine == "nested")
    assert (bytes(prices) == bytes(plain)) == (sc.config.design(design).engine != "nested")
    sc.embed.release(handle.value)


def test_callers_of_before():
    """A structure that ends before the later prices is still filled and taken; they are 0."""
    vm = backed("nested")
    handle, short, full = ctypes.c_uint64(sc.embed.handle(vm)), made(Prices), made(Prices)
    short.struct_size = Prices.violation.offset
    assert API.prices_for(handle, b"modern", short) == API.prices_for(handle, b"modern", full) == 0
    assert short.struct_size == Prices.violation.offset
    assert bytes(short)[4 : short.struct_size] == bytes(full)[4 : short.struct_size]
    assert short.violation == short.first_touch == 0 < min(full.violation, full.first_touch)
    short.violation = 1e9  # beyond its end
    assert API.set_prices(handle, short) == 0
    vm.vcpus[0].write(0x40_0000, 1)
    cycles = ctypes.c_double()
    assert API.cycles(handle, cycles) == 0
    assert 0 < cycles.value < 1e9
    assert API.prices_for(7, b"modern", full) == C["SC_E_HANDLE"]
    assert API.prices_for(handle, None, full) == C["SC_E_NULL"]
    sc.embed.release(handle.value)


def test_prices_that_cannot_be():
    guest = Guest()
    prices = made(Prices)
    assert API.prices(b"cheap", prices) == C["SC_E_ARGUMENT"]
    assert "cheap" in error()
    assert API.prices(b"\xff", prices) == C["SC_E_ARGUMENT"]
    assert API.prices(None, prices) == API.prices(b"pvm", None) == API.cycles(guest.vm, None) == C["SC_E_NULL"]
    for value in (-1.0, math.nan, math.inf):
        for name, _ in Prices._fields_[2:]:
            prices = made(Prices, **{name: value})
            assert API.set_prices(guest.vm, prices) == C["SC_E_ARGUMENT"]
    assert API.set_prices(guest.vm, made(Prices, reserved=1)) == C["SC_E_ARGUMENT"]
    prices.struct_size = 8
    assert API.set_prices(guest.vm, prices) == API.prices(b"pvm", prices) == C["SC_E_STRUCT"]
    assert API.set_prices(99 << 16, None) == API.cycles(99 << 16, ctypes.c_double()) == C["SC_E_HANDLE"]
    assert spent(guest) == 0
    prices = made(Prices, dispatch=1e300)
    assert API.set_prices(guest.vm, prices) == 0
    assert guest.access(C["SC_READ"], 0x40_0000)[1].cycles == 2**32 - 1
    guest.close()
    fresh = Guest()  # in the same place
    assert spent(fresh) == 0
    fresh.close()
