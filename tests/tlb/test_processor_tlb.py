"""TLBs of two levels, and paging-structure caches: against a slow model, the forgetful processor, and by hand."""

import dataclasses
import random

import numpy as np
import pytest
from oracle import CR4_PCIDE, FETCH, READ, WRITE
from samples import sampled
from tlb_machine import DATA_A, MIB, X, machine, start
from tlb_programs import DESIGNS, MODES, program_on, seeded

import shadowcore as sc
from shadowcore.engine.tlbs import PRESETS

# -- a model that shares nothing with the engine -----------------------------------------------------------


class Lru:
    """A set, its members from the one used longest ago on."""

    def __init__(self, ways):
        self.ways, self.members = ways, []

    def touch(self, key):
        self.members.remove(key)
        self.members.append(key)

    def full(self):
        return len(self.members) == self.ways

    def add(self, key):
        self.members.append(key)

    def replace(self, key):
        self.members = [*self.members[1:], key]


class Tree:
    """A set of which a tree of bits names the next victim: each inner node points away from what was used last."""

    def __init__(self, ways):
        self.ways, self.members = ways, []
        self.points = {}  # (first way, ways below): True for the right half

    def touch(self, key):
        way, first, below = self.members.index(key), 0, self.ways
        while below > 1:
            below //= 2
            right = way >= first + below
            self.points[first, below] = not right
            first += below * right

    def full(self):
        return len(self.members) == self.ways

    def add(self, key):
        self.members.append(key)
        self.touch(key)

    def replace(self, key):
        first, below = 0, self.ways
        while below > 1:
            below //= 2
            first += below * self.points.get((first, below), False)
        self.members[first] = key
        self.touch(key)


class Level:
    """Banks of one level, as (number of sets, ways, sizes); pages are (size, number)."""

    def __init__(self, banks, made):
        self.banks = [([made(bank.ways) for _ in range(bank.entries // bank.ways)], bank.sizes) for bank in banks]
        self.turn = 0
        self.clock = 0
        self.used = {}

    def sets(self, page):
        return [sets[page[1] % len(sets)] for sets, sizes in self.banks if page[0] in sizes]

    def has(self, page):
        return any(page in each.members for each in self.sets(page))

    def use(self, page):
        self.clock += 1
        self.used[page] = self.clock
        for each in self.sets(page):
            if page in each.members:
                each.touch(page)

    def fill(self, page):
        candidates = self.sets(page)
        self.clock += 1
        self.used[page] = self.clock
        for each in candidates:
            if page in each.members:
                each.touch(page)
                return
        for each in candidates:
            if not each.full():
                each.add(page)
                return
        if not candidates:
            return
        if isinstance(candidates[0], Tree):
            chosen = candidates[self.turn % len(candidates)]
            self.turn += len(candidates) > 1
        else:
            chosen = min(candidates, key=lambda each: self.used[each.members[0]])
        chosen.replace(page)


def bank(entries, ways, *sizes):
    return sc.TLBBank(entries, ways, sizes or ("4k", "2m", "1g"))


GEOMETRIES = {
    "one bank": {"load": (bank(8, 4),), "second": (bank(32, 8),)},
    "by size": {"load": (bank(8, 2, "4k"), bank(4, 4, "2m")), "second": (bank(24, 4, "4k", "2m"),)},
    "two banks": {"load": (bank(4, 4),), "second": (bank(16, 4, "4k", "2m"), bank(16, 2, "4k"))},
    "by kind": {
        "load": (bank(8, 8),),
        "store": (bank(4, 2),),
        "fetch": (bank(12, 4),),
        "second": (bank(32, 4),),
        "second_fetch": (bank(16, 8),),
    },
    "none behind": {"load": (bank(16, 4),)},
}


@pytest.mark.parametrize("replacement", ["lru", "plru"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_hits_of_each_level_are_the_models(name, replacement):
    geometry = GEOMETRIES[name]
    vm, tables = machine("native", "64", sc.ProcessorTLB(**geometry, replacement=replacement))
    pages = {}
    for i in range(70):
        tables.map(X + (i << 12), i % 30 << 12, 4096, "rwx", dirty=True)
        pages[X + (i << 12)] = ("4k", (X >> 12) + i)
    for i in range(9):
        tables.map(0x3000_0000 + (i << 21), 0, 2 * MIB, "rwx", page_size="2MiB", dirty=True)
        pages[0x3000_0000 + (i << 21)] = ("2m", (0x3000_0000 >> 21) + i)
    cpu = start(vm, tables)
    made = Lru if replacement == "lru" else Tree
    load = Level(geometry["load"], made)
    second = Level(geometry.get("second", ()), made)
    first = {
        READ: load,
        WRITE: Level(geometry["store"], made) if "store" in geometry else load,
        FETCH: Level(geometry["fetch"], made) if "fetch" in geometry else load,
    }
    behind = {
        READ: second,
        WRITE: second,
        FETCH: Level(geometry["second_fetch"], made) if "second_fetch" in geometry else second,
    }
    rng = random.Random(name)
    names = {READ: "load", WRITE: "store", FETCH: "fetch"}
    wanted = dict.fromkeys((f"tlb_{k}_{w}" for k in names.values() for w in ("hits", "second", "misses")), 0)
    vm.stats.reset()
    every = list(pages)
    rows = []
    for _ in range(4000):
        va = rng.choice(every[: rng.choice([3, 12, 40, len(every)])])
        op = rng.choice([READ, READ, WRITE, FETCH])
        rows.append((op, 0, 8, va + 8 * rng.randrange(500), 0))
        page, one, two = pages[va], first[op], behind[op]
        if one.has(page):
            wanted[f"tlb_{names[op]}_hits"] += 1
            one.use(page)
        elif two.has(page):
            wanted[f"tlb_{names[op]}_second"] += 1
            two.use(page)
            one.fill(page)
        else:
            wanted[f"tlb_{names[op]}_misses"] += 1
            one.fill(page)
            two.fill(page)
    assert not cpu.run(np.array(rows, sc.OP_DTYPE)).outcome.any()
    counters = vm.stats.as_dict()
    assert {name: counters[name] for name in wanted} == wanted
    assert counters["tlb_hits"] == sum(n for name, n in wanted.items() if not name.endswith("misses"))
    assert all(wanted[f"tlb_load_{what}"] for what in ("hits", "misses"))
    assert vm.audit().ok


@sampled("number", 8)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_random_programs_with_each_preset(mode, design, number):
    """Every outcome is one that the architecture allows, and I8 holds; small ones replace more."""
    small = sc.ProcessorTLB(
        load=(bank(2, 2),),
        store=(bank(1, 1),),
        second=(bank(4, 2), bank(2, 1, "4k")),
        pd=bank(2, 2),
        pml4=bank(1, 1),
        nested=bank(4, 2),
        host_pd=bank(2, 1),
    )
    kinds = [*PRESETS.values(), small, dataclasses.replace(small, replacement="plru")]
    for seed, _, program in seeded(9000, number):
        program_on(MODES[mode], DESIGNS[design][seed % len(DESIGNS[design])], kinds[seed % len(kinds)], program)


# -- paging-structure caches -------------------------------------------------------------------------------


def caches(**settings):
    """Pages in three leaf tables, two directories; each is walked to."""
    tlb = sc.ProcessorTLB(load=(bank(1, 1, "1g"),), **settings)  # keeps no page that is here
    vm, tables = machine("native", "64", tlb)
    places = (0x40_0000, 0x40_1000, 0x60_0000, 0x4000_0000)
    for va in places:
        tables.map(va, DATA_A, 4096, "rw")
    return vm, tables, start(vm, tables), places


def references(vm, access):
    before = vm.stats.walk_references
    access()
    return vm.stats.walk_references - before


def test_what_they_leave_of_a_walk():
    for settings, wanted in [
        ({}, (4, 4, 4, 4)),
        ({"pd": bank(4, 4)}, (4, 1, 4, 4)),
        ({"pdpt": bank(4, 4)}, (4, 2, 2, 4)),
        ({"pml4": bank(4, 4)}, (4, 3, 3, 3)),
        ({"pml4": bank(2, 2), "pdpt": bank(4, 4), "pd": bank(4, 4)}, (4, 1, 2, 3)),
    ]:
        vm, _, cpu, places = caches(**settings)
        assert tuple(references(vm, lambda va=va, cpu=cpu: cpu.read(va)) for va in places) == wanted, settings
        assert vm.stats.walk_cache_references == 16 - sum(wanted)


@pytest.mark.parametrize(
    ("flush", "wanted"),
    [
        (lambda cpu, tables: None, 1),
        (lambda cpu, tables: cpu.invlpg(0x7000_0000), 4),  # all of the PCID go, whatever the address
        (lambda cpu, tables: setattr(cpu, "cr3", cpu.cr3), 4),
        (lambda cpu, tables: setattr(cpu, "cr3", cpu.cr3 | 1 << 63), 1),
        (lambda cpu, tables: setattr(cpu, "cr4", cpu.cr4 ^ 1 << 7), 4),
        (lambda cpu, tables: cpu.invpcid(2), 4),
        (lambda cpu, tables: cpu.invpcid(1, 5), 1),
        (lambda cpu, tables: cpu.invpcid(1, 0), 4),
        (lambda cpu, tables: cpu.init() or tables.activate(cpu), 4),
    ],
)
def test_what_flushes_them(flush, wanted):
    vm, tables, cpu, places = caches(pml4=bank(2, 2), pdpt=bank(4, 4), pd=bank(4, 4))
    cpu.cr4 |= CR4_PCIDE
    for va in places:
        cpu.read(va)
    flush(cpu, tables)
    assert references(vm, lambda: cpu.read(places[0])) == wanted


def test_geometries_that_cannot_be():
    for settings, named in [
        ({"load": ()}, "tlb.load"),
        ({"load": 5}, "tlb.load"),
        ({"load": (bank(6, 3),), "replacement": "plru"}, "tlb.load"),
        ({"load": (bank(4, 4),), "replacement": "fifo"}, "tlb.replacement"),
        ({"load": (bank(4, 4),), "second": (bank(4, 4),) * 3}, "tlb.second"),
        ({"load": (bank(4, 4),), "pd": 3}, "tlb.pd"),
    ]:
        with pytest.raises(sc.ConfigError, match=named.replace(".", r"\.")):
            sc.ProcessorTLB(**settings)
    for arguments, named in [((10, 4), "entries"), ((0,), "entries"), ((4, 4, ("8k",)), "sizes"), ((4, 0), "ways")]:
        with pytest.raises(sc.ConfigError, match=rf"bank\.{named}"):
            sc.TLBBank(*arguments)
    with pytest.raises(sc.ConfigError, match="'zen44'; did you mean 'zen4'"):
        sc.ProcessorTLB.preset("zen44")


@pytest.mark.parametrize("name", PRESETS)
def test_saved_and_loaded(name, tmp_path):
    vm, tables = machine("cached", "64", sc.ProcessorTLB.preset(name), vcpus=2)
    tables.map(X, DATA_A, 0x4_0000, "rwx")
    cpus = [start(vm, tables, vcpu=i) for i in range(2)]
    for cpu in cpus:
        for i in range(64):
            cpu.read(X + (i << 12))
    vm.save(tmp_path / "vm.npz")
    other = sc.VM.load(tmp_path / "vm.npz")
    assert other.tlb == vm.tlb
    for ours, theirs in zip(vm.vcpus, other.vcpus, strict=True):
        assert ours.tlb.tolist() == theirs.tlb.tolist()
        for i in range(0, 64, 3):
            assert ours.read(X + (i << 12)) == theirs.read(X + (i << 12))
    assert vm.stats.as_dict() == other.stats.as_dict()
    assert other.audit().ok
