"""What a guest sees under agile paging is what it sees under none: random lives of guests that edit their tables."""

import random

import numpy as np
import pytest
from agile_machine import DEVICE, DIRECT, MODES, PAGE, PAGES, VA, AgileMachine

import shadowcore as sc

DESIGNS = {
    "agile": sc.Shadow.agile(),
    "at the first store": sc.Shadow.agile(nested_writes=1, nested_back="never"),
    "back and forth": sc.Shadow.agile(nested_writes=1, nested_interval=7, nested_back="reset"),
    "looked at often, few pages": sc.Shadow.agile(nested_writes=1, nested_interval=9, pool_pages=80, refill=8),
    "lru, absent marked": sc.Shadow.agile(
        nested_writes=1, nested_interval=30, policy="lru", pool_pages=80, refill=8, notpresent_marker=True
    ),
}
HOSTS = {"warm": {}, "cold": {"backing": "cold"}, "thp": {"backing": "thp"}}
KINDS = 24


def seen(call, *arguments):
    try:
        return call(*arguments)
    except sc.GuestFault as fault:
        return repr(fault)


def step(machine, chosen, flushes):
    """One thing that a guest or a device does; what the guest sees of it. flushes: after an edit all load CR3."""
    kind, page, offset, value, user, number = chosen
    vm, cpu = machine.vm, machine.vm.vcpus[number % len(machine.vm.vcpus)]
    va = VA + page * PAGE + offset

    def edited(result):
        for each in vm.vcpus if flushes else ():
            each.cr3 = each.cr3
        return result

    if kind < 5:
        return seen(cpu.read, va, 8, user)
    if kind < 8:
        return seen(cpu.write, va, value, 8, user)
    if kind == 8:
        return seen(cpu.fetch, va, user)
    if kind == 9:
        return seen(cpu.read, DEVICE + offset, 4, user)
    if kind in (10, 11, 12):  # the guest edits a leaf: another frame, other rights, A and D as they come, or absent
        flags = value & 0x67 | (value & 7 != 0)
        return edited(seen(machine.store, va, (value >> 8) % 4096 * PAGE | flags, 1, cpu))
    if kind == 13:  # ... or an entry above, and puts it back, with A or without
        level = 2 if not machine.long or value & 1 else 3
        old = machine.entry(va, level).value
        edited(seen(machine.store, va, 0, level, cpu))
        found = seen(cpu.read, va, 8, user)
        seen(machine.store, va, old & ~(value & 0x26), level, cpu)
        return edited(found)
    if kind == 14:
        cpu.cr3 = cpu.cr3
        return None
    if kind == 15:
        return edited(vm.write_physical((value % 128) * PAGE + offset, bytes([value & 255] * 8)))
    if kind == 16:
        cpu.cr0 ^= 1 << 16
        return None
    if kind == 17:
        return seen(cpu.write, VA + page * PAGE + PAGE - 4, value, 8, user)
    if kind == 18:
        ops = np.zeros(64, sc.OP_DTYPE)
        ops["op"] = [(value >> i) & 1 for i in range(64)]
        ops["addr"] = VA + (np.arange(64) * page % PAGES) * PAGE + 8 * np.arange(64)
        ops["size"], ops["value"], ops["user"] = 8, value, user
        found = cpu.run(ops)
        return tuple(getattr(found, name).tobytes() for name in ("outcome", "error_code", "gpa", "value"))
    if kind == 19:  # a load through the direct map, of a table
        return seen(cpu.read, DIRECT + machine.table(va) * PAGE + offset, 8)
    return None


def host(vm, chosen):
    """What only the machine under test meets."""
    kind, page, _, value, _, _ = chosen
    if kind == 20:
        vm.host_unmap(page * 32 % 2048, 1 + value % 16)
    elif kind == 21:
        (vm.memory.stop_dirty_log if vm.memory.slots[0].dirty_log else vm.memory.start_dirty_log)(0)
    elif kind == 22 and vm.memory.slots[0].dirty_log:
        vm.memory.clear_dirty_log(0)
    elif kind == 23 and value % 4 == 0:
        vm.mmu.zap_all()


def lives(machines, seed, n, flushes=False, kinds=KINDS):
    chosen = random.Random(seed)
    for number in range(n):
        each = (
            chosen.randrange(kinds), chosen.randrange(PAGES), chosen.randrange(0, 4080, 8), chosen.getrandbits(64),
            chosen.random() < 0.5, chosen.randrange(2),
        )  # fmt: skip
        found = [step(machine, each, flushes) for machine in machines]
        assert found[0] == found[1], (number, each)
        host(machines[0].vm, each)
        yield number


def alike(made, native):
    assert np.array_equal(made.vm.memory.words, native.vm.memory.words)
    report = made.vm.audit()
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_random_lives(design, mode):
    walks = 0
    for seed, (name, settings) in enumerate(HOSTS.items()):
        vcpus = 1 + seed % 2
        made = AgileMachine(DESIGNS[design], mode, vcpus=vcpus, **settings)
        native = AgileMachine("native", mode, vcpus=vcpus)
        for number in lives((made, native), f"{design} {mode} {name}", 150):
            if number % 30 == 29:
                alike(made, native)
        alike(made, native)
        walks += made.vm.stats.nested_walks
    assert walks > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_random_lives_with_a_tlb(design, mode):
    """The guest flushes after each edit: then a TLB shows nothing."""
    bank = sc.TLBBank
    tlb = sc.ProcessorTLB(load=(bank(16, 4),), second=(bank(32, 4),), pd=bank(4), nested=bank(8, 2), host_pd=bank(4))
    made, native = AgileMachine(DESIGNS[design], mode, tlb=tlb, vcpus=2), AgileMachine("native", mode, vcpus=2)
    for number in lives((made, native), f"tlb {design} {mode}", 150, flushes=True):
        if number % 30 == 29:
            alike(made, native)
    alike(made, native)


def test_audits_at_every_point():
    made, native = AgileMachine(DESIGNS["back and forth"]), AgileMachine("native")
    made.vm.audit_points = ("pre-fault", "post-fault", "pre-write", "post-write", "post-cr3")
    for _ in lives((made, native), "points", 60):
        pass


def test_the_general_way_makes_no_difference():
    made, general = AgileMachine(DESIGNS["agile"]), AgileMachine(DESIGNS["agile"])
    general.vm.mmu.general = True
    for _ in lives((made, general), "general", 300, kinds=20):
        pass
    assert made.vm.stats.as_dict() == general.vm.stats.as_dict()


@pytest.mark.parametrize("design", DESIGNS)
def test_saved_and_loaded(design, tmp_path):
    made, native = AgileMachine(DESIGNS[design], vcpus=2), AgileMachine("native", vcpus=2)
    for _ in lives((made, native), f"saved {design}", 120):
        pass
    made.vm.save(tmp_path / "vm")
    loaded = sc.VM.load(tmp_path / "vm")
    assert loaded.mmu.design == made.vm.mmu.design
    assert np.array_equal(loaded.mmu.pages, made.vm.mmu.pages)
    assert loaded.audit().ok
    ops = np.zeros(PAGES * 4, sc.OP_DTYPE)
    ops["op"][::2] = 1
    ops["addr"] = VA + np.arange(PAGES * 4) * PAGE // 4 // PAGE * PAGE
    ops["addr"][3::4] = DIRECT + np.arange(PAGES) * 8 + made.table() * PAGE
    ops["size"] = 8
    found = [vm.vcpus[0].run(ops) for vm in (made.vm, loaded)]
    for name in ("outcome", "error_code", "gpa", "value", "exits"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name
    assert made.vm.stats.as_dict() == loaded.stats.as_dict()
    assert np.array_equal(loaded.mmu.pages, made.vm.mmu.pages)
