"""Design `adaptive`: each rule chooses what it says, `explain` tells of it, and the guest sees the same as always."""

import pickle

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.config import RULES

BASE, MAP, DATA, PAGE = 0x40000000, 0x80000000, 64, 4096
"""Where the guest maps its data, and all of its RAM; the first frame of the data."""


class Guest:
    """A guest that edits its own tables by way of a map of all RAM, beside one that runs natively."""

    def __init__(self, design="adaptive", vcpus=1, **settings):
        mmu = sc.Shadow.adaptive(**settings) if design == "adaptive" else sc.design(design)
        self.machines = [sc.VM("8MiB", which, vcpus) for which in (mmu, "native")]
        self.vm = self.machines[0]
        for vm in self.machines:
            self.tables = tables = sc.PageTables(vm.memory, "64", allocate=range(1024, 1100))
            tables.map(BASE, DATA * PAGE, 512 * PAGE, "rw", PAGE, accessed=True, dirty=True)
            tables.map(MAP, 0, 8 << 20, "rw", PAGE, accessed=True, dirty=True)
            for cpu in vm.vcpus:
                tables.activate(cpu)
        self.table = tables.entry(BASE).gpa // PAGE

    def each(self, step):
        answers = [step(vm.vcpus[0]) for vm in self.machines]
        assert answers[0] == answers[1]
        return answers[0]

    def put(self, page, frame, present=True):
        """Store entry number `page` of the table: of that frame of the data."""
        value = (DATA + frame) * PAGE | 0x62 | present
        self.each(lambda cpu: cpu.write(MAP + self.table * PAGE + page * 8, value))

    def read(self, page):
        return self.each(lambda cpu: cpu.read(BASE + page * PAGE))

    def write(self, page, value):
        self.each(lambda cpu: cpu.write(BASE + page * PAGE, value))

    def invlpg(self, page):
        self.each(lambda cpu: cpu.invlpg(BASE + page * PAGE))

    def switch(self):
        self.each(lambda cpu: setattr(cpu, "cr3", cpu.cr3))

    def sound(self):
        self.vm.audit(strict=True)
        assert self.vm.memory.bytes[DATA * PAGE : 1024 * PAGE].tobytes() == (
            self.machines[1].memory.bytes[DATA * PAGE : 1024 * PAGE].tobytes()
        )

    def remap(self, rounds=1):
        """As ioremap does: many entries stored, each with an INVLPG, one of them used."""
        for turn in range(rounds):
            for page in range(64):
                self.put(page, (page + turn) % 512)
                self.invlpg(page)
            self.write(turn % 64, turn)
            assert self.read(turn % 64) == turn

    def told(self):
        return self.vm.mmu.explain(self.table)


def test_storms_of_invlpg_zap():
    guest = Guest()
    guest.write(0, 1)
    guest.remap()
    told = guest.told()
    assert (told.way, told.rule, told.level) == ("zap", "invlpg", 1)
    before = guest.vm.stats.exits_invlpg
    guest.remap(20)
    assert guest.told().way == "zap"
    assert guest.vm.stats.exits_invlpg == before  # nothing is out of sync
    guest.sound()
    fixed = Guest(rules=("emulate", "invlpg", "freed", "hysteresis"))
    fixed.write(0, 1)
    fixed.remap(21)
    assert fixed.told().way == "unsync"
    assert fixed.vm.stats.exits_total > 5 * guest.vm.stats.exits_total


def test_a_zapped_table_that_is_used_runs_out_of_sync_again():
    guest = Guest()
    guest.write(0, 1)
    guest.remap(2)
    assert guest.told().way == "zap"
    for turn in range(40):
        guest.put(0, turn)
        guest.invlpg(0)
        for page in range(0, 512, 16):
            guest.read(page)
    told = guest.told()
    assert (told.way, told.rule, told.doubts) == ("unsync", "refaults", 1)
    guest.sound()


def test_what_is_zapped_for_long_is_tried_again():
    guest = Guest()
    guest.write(0, 1)
    guest.remap(130)
    seen = set()
    for _ in range(140):
        guest.remap()
        seen.add((guest.told().way, guest.told().rule))
    assert guest.told().changes >= 3  # zapped, tried, and zapped again within the same round
    assert ("zap", "invlpg") in seen
    guest.sound()


def test_demand_paging_across_loads_of_cr3_is_emulated_and_bursts_are_not():
    guest = Guest(prefetch=0)
    for page in range(512):
        guest.put(page, 0, present=False)
    guest.write(MAP // PAGE - BASE // PAGE, 0)
    for page in range(1, 60):
        guest.switch()
        guest.put(page, page)
        guest.switch()
        guest.write(page, page)
    told = guest.told()
    assert (told.way, told.rule) == ("emulate", "short")
    assert told.stores > 10
    guest.sound()
    guest.switch()
    for page in range(60, 200):  # a fork, or mprotect
        guest.put(page, page)
    told = guest.told()
    assert (told.way, told.rule, told.doubts) == ("unsync", "long", 1)
    guest.switch()
    guest.sound()


def test_invlpg_exits_only_while_a_table_is_out_of_sync():
    guest, always = Guest(), Guest(rules=("emulate", "zap"))
    for one in (guest, always):
        one.write(0, 1)
        one.invlpg(0)
    assert (guest.vm.stats.exits_invlpg, always.vm.stats.exits_invlpg) == (0, 1)
    guest.put(0, 9)
    assert guest.vm.stats.mmu_unsync == 1
    guest.invlpg(0)
    assert guest.vm.stats.exits_invlpg == 1
    assert guest.read(0) == 0
    guest.switch()
    guest.invlpg(0)
    assert guest.vm.stats.exits_invlpg == 1
    guest.sound()


@pytest.mark.parametrize("rules", [("freed",), ()])
def test_a_table_that_is_unlinked_and_empty_is_none(rules):
    guest = Guest(rules=rules)
    guest.write(5, 1)
    for page in range(512):
        guest.put(page, 0, present=False)
    vm = guest.vm
    parent = next(
        frame
        for frame in range(1024, 1100)
        for entry in [int.from_bytes(vm.read_physical(frame * PAGE + (BASE >> 21 & 511) * 8, 8), "little")]
        if entry >> 12 & 0xFFFFF == guest.table
    )
    guest.switch()
    before = vm.stats.exits_total
    guest.each(lambda cpu: cpu.write(MAP + parent * PAGE + (BASE >> 21 & 511) * 8, 0))
    assert vm.stats.exits_total == before + 1
    guest.each(lambda cpu: cpu.write(MAP + guest.table * PAGE + 16, 0x1234))
    assert vm.stats.exits_total == before + (1 if rules else 2)
    guest.switch()
    with pytest.raises(sc.PageFault):
        vm.vcpus[0].read(BASE)
    vm.audit(strict=True)


def test_an_embedder_sees_why():
    guest = Guest()
    unknown = guest.told()
    assert not unknown.known
    assert str(unknown).endswith("nothing is known of it")
    guest.write(0, 1)
    guest.remap()
    text = str(guest.told())
    assert text.startswith(f"table {guest.table:#x}: a store zaps what shadows it")
    assert "INVLPG" in text
    assert pickle.loads(pickle.dumps(guest.told())) == guest.told()
    root = guest.vm.vcpus[0].cr3 >> 12
    assert guest.vm.mmu.explain(root).rule == "upper"
    with pytest.raises(sc.ConfigError, match="'cached' decides by no history"):
        sc.VM("1MiB").mmu.explain(1)
    for gfn in (-1, 1 << 52, "x", 0.5):
        with pytest.raises(sc.ConfigError, match="gfn"):
            guest.vm.mmu.explain(gfn)


def test_saved_in_the_middle_it_decides_as_it_would_have(tmp_path):
    guest = Guest()
    guest.write(0, 1)
    guest.remap()
    guest.vm.save(tmp_path / "vm")
    copy = sc.VM.load(tmp_path / "vm")
    assert copy.mmu.explain(guest.table) == guest.told()
    guest.remap(3)
    other = guest.machines[0] = copy
    first, guest.vm = guest.vm, other
    guest.machines[1] = twin = sc.VM("8MiB", "native")
    twin.memory.bytes[:] = other.memory.bytes
    guest.tables.activate(twin.vcpus[0])
    guest.remap(3)
    assert other.stats.as_dict() == first.stats.as_dict()
    assert np.array_equal(other.mmu.arrays["history"], first.mmu.arrays["history"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rules": ("emulat",)}, "did you mean 'emulate'"),
        ({"rules": 5}, "rules"),
        ({"lagging": False}, "adapts"),
        ({"decides": "nobody"}, "decides"),
        ({"adapts": 2}, "adapts"),
        ({"prices": 7}, "prices"),
    ],
)
def test_what_cannot_be_is_refused(settings, named):
    with pytest.raises(sc.ConfigError, match=named):
        sc.Shadow.adaptive(**settings)


def test_prices_are_looked_up():
    with pytest.raises(sc.ConfigError, match="did you mean 'modern'"):
        sc.VM("1MiB", sc.Shadow.adaptive(prices="modernn"))
    sc.VM("1MiB", sc.Shadow.adaptive(prices="core2007"))


@pytest.mark.parametrize("rules", [RULES, (), *((rule,) for rule in RULES)])
def test_whatever_is_switched_off_the_guest_sees_the_same(rules):
    guest = Guest(rules=rules, pool_pages=16, prefetch=4)
    rng = np.random.default_rng(len(rules))
    for _ in range(1500):
        page, frame = (int(n) for n in rng.integers(0, 512, 2))
        what = rng.integers(0, 12)
        if what < 5:
            guest.put(page, frame)
            guest.invlpg(page)
        elif what < 8:
            guest.write(page, frame)
        elif what < 11:
            guest.read(page)
        else:
            guest.switch()
    guest.sound()
