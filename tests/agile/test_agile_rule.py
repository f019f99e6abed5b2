"""Which tables the processor walks itself, when that changes, and what its walks and exits then are."""

import pytest
from agile_machine import DEVICE, DIRECT, MIB, MODES, PAGE, VA, AgileMachine

import shadowcore as sc
from shadowcore.engine.mmu import DIMENSIONS

GUEST, HOST, SHADOW = range(3)


def counted(vm, call):
    before = vm.stats.copy()
    call()
    made = vm.stats - before
    return {name: value for name, value in made.as_dict().items() if value}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("writes", [1, 2, 5])
def test_a_table_is_given_to_the_processor(mode, writes):
    """At the last of so many stores; from then on none of them exits, and data is where the guest's tables say."""
    machine = AgileMachine(sc.Shadow.agile(nested_writes=writes), mode)
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.touch(DIRECT)  # the stores' own leaf, elsewhere
    for number in range(writes):
        cpu.read(VA)  # a flood ends the shadow, and this makes it again
        assert machine.nested == []
        assert counted(vm, machine.touch)["exits_emulate"] == 1, number
    assert machine.nested == [machine.table()]
    assert vm.stats.to_nested == 1
    assert vm.stats.nested_tables == len(vm.mmu.pages[vm.mmu.pages["nested"] == 1]) > 0
    machine.touch()  # W comes to the leaf of the direct map
    assert "exits_total" not in counted(vm, machine.touch)
    cpu.read(VA)
    old = machine.entry(VA).value
    machine.store(VA, old ^ 5 * PAGE)
    cpu.read(VA + PAGE)
    assert cpu.translate(VA).gpa == old & ~4095 & 0xFFFFFFFF ^ 5 * PAGE
    vm.memory.words[5 * 512] = 77
    assert cpu.read(VA) == 77
    assert "exits_total" not in counted(vm, lambda: cpu.read(VA))
    assert vm.audit().ok


def test_a_flood_does_not_hide_stores():
    """Each store zaps the table's shadow; they are counted all the same."""
    machine = AgileMachine(sc.Shadow.agile(flood_threshold=1))
    for _ in range(2):
        machine.cpu.read(VA)
        assert machine.nested == []
        machine.touch()
    assert machine.nested == [machine.table()]


def test_stores_of_several_intervals_do_not_add_up():
    machine = AgileMachine(sc.Shadow.agile(nested_interval=2))
    machine.cpu.read(VA)
    for _ in range(4):
        machine.touch()
        machine.touch(VA, 2)  # of another table, which the stores before it are not of
    assert machine.nested == []
    machine = AgileMachine(sc.Shadow.agile(nested_interval=3))
    machine.cpu.read(VA)
    for _ in range(4):
        machine.touch()
        machine.touch(VA, 2)
    assert machine.nested == sorted([machine.table(VA), machine.table(VA, 2)])


def test_what_is_below_goes_along():
    machine = AgileMachine("agile")
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.touch(VA, 2)
    machine.touch(VA, 2)
    below = machine.table()
    assert machine.nested == [machine.table(VA, 2)]
    assert not (vm.mmu.pages["gfn"][vm.mmu.pages["direct"] == 0] == below).any()
    cpu.read(VA)
    machine.touch()
    assert "exits_total" not in counted(vm, machine.touch)


def test_roots_stay():
    """The table of CR3 is shadowed however often it is stored to; one that becomes a root is shadowed again."""
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1))
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    for _ in range(5):
        machine.touch(VA, 4)
    assert machine.nested == []
    machine.touch(VA, 3)
    assert machine.nested == [machine.table(VA, 3)]
    cpu.read(VA)
    root, table = cpu.cr3, machine.table(VA, 3)
    cpu.cr3 = table << 12
    assert machine.nested == []
    assert vm.stats.to_shadow == 1
    cpu.cr3 = root
    assert vm.audit().ok


@pytest.mark.parametrize("back", ["scan", "reset", "never"])
def test_the_way_back(back):
    """Two tables; stores go on to one of them."""
    machine = AgileMachine(sc.Shadow.agile(nested_interval=40, nested_back=back))
    vm, cpu = machine.vm, machine.cpu
    other = DEVICE - PAGE
    machine.tables.map(other, 0, PAGE, "rwu", PAGE)
    quiet, busy = machine.table(), machine.table(other)
    assert quiet != busy
    cpu.read(VA)
    cpu.read(other)
    for va in (VA, VA, other, other):
        machine.touch(va)
    assert machine.nested == sorted([quiet, busy])
    seen = []
    for number in range(200):
        cpu.read(VA)
        cpu.read(other)
        if number % 10 == 0:
            machine.touch(other)
        seen.append(machine.nested)
        if number % 20 == 0:
            assert vm.audit().ok
    if back == "never":
        assert all(each == sorted([quiet, busy]) for each in seen)
        assert vm.stats.to_shadow == 0
    elif back == "scan":
        assert seen[-1] == [busy]
        assert all(busy in each for each in seen)
        assert vm.stats.to_shadow == 1
        for _ in range(100):
            cpu.read(other)
        assert machine.nested == []
    else:
        assert vm.stats.to_shadow >= 2
        assert quiet not in seen[-1]


@pytest.mark.parametrize(("mode", "level", "shadow", "guest", "host"), [
    ("64", 1, 3, 1, 8), ("64", 2, 2, 2, 12), ("64", 3, 1, 3, 16), ("la57", 1, 4, 1, 8), ("la57", 4, 1, 4, 20),
    ("pae", 1, 1, 1, 8), ("32", 1, 1, 1, 8),
])  # fmt: skip
def test_references(mode, level, shadow, guest, host):
    """The shadow's entries down to the mark; of each table of the guest four of the host's and its own; four of the
    page."""
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1), mode)
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.touch(VA, level)
    cpu.read(VA)
    vm.record_walks(1000)
    before = vm.stats.walk_references
    cpu.read(VA)
    found = vm.walks()
    assert vm.stats.walk_references - before == len(found) == shadow + guest + host
    assert [(found["dimension"] == DIMENSIONS.index(name)).sum() for name in ("shadow", "guest", "host")] == [
        shadow, guest, host,
    ]  # fmt: skip
    assert len(set(found["walk"].tolist())) == 1
    # Each entry says where the next one of its tables lies.
    last = found[found["dimension"] == GUEST][-1]
    at = int(last["hpa"]) - vm.memory.ram_hpa
    assert at == machine.entry(VA).gpa
    assert list(found["dimension"][:shadow]) == [SHADOW] * shadow
    assert found["dimension"][-1] == HOST


def test_caches_leave_out_what_they_have():
    bank = sc.TLBBank
    tlb = sc.ProcessorTLB(load=(bank(1),), store=(bank(1),), pd=bank(8), nested=bank(16))
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1, nested_back="never"), tlb=tlb)
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.touch(VA)
    for page in (0, 1, 0, 1):
        cpu.read(VA + page * PAGE)
    made = counted(vm, lambda: cpu.read(VA))
    # The table is known from the cache of level 2, the page from the nested TLB: its own entry is left.
    assert made["walk_references"] == 1
    assert made["walk_cache_references"] == 11
    assert vm.audit().ok


def test_exits_of_the_host_are_counted():
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1))
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.touch()
    made = counted(vm, lambda: cpu.read(VA))
    # The guest's table, and the page.
    assert made["npf_violation"] == made["exits_fill"] == made["pf_taken"] == 2
    with pytest.raises(sc.MMIOAccess):
        cpu.read(DEVICE)
    machine.touch(DEVICE)
    for _ in range(2):
        with pytest.raises(sc.MMIOAccess):
            cpu.read(DEVICE)
    assert vm.audit().ok


def test_a_page_fault_of_the_guest_does_not_exit():
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1))
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.store(VA, 0)
    cpu.read(VA + PAGE)
    machine.store(VA + 8 * PAGE, 0)

    def fault():
        with pytest.raises(sc.PageFault):
            cpu.read(VA + 8 * PAGE)

    assert counted(vm, fault)["pf_guest"] == 1
    assert "exits_total" not in counted(vm, fault)


@pytest.mark.parametrize(("settings", "says"), [
    ({"nested_writes": 0}, "nested_writes: 0 is not within 1 to 255"),
    ({"nested_writes": 256}, "nested_writes"),
    ({"nested_interval": 0}, "nested_interval: 0 is not 1 or more"),
    ({"nested_back": "scann"}, "nested_back: 'scann' is not one of scan, reset, never"),
    ({"nested_back": 3}, "nested_back: 3 is not one of"),
    ({"prefetch": 8}, "prefetch, flood_pages, update_in_place: not with tables that switch"),
    ({"lagging": True}, "switching: shadow tables have to belong to guest tables"),
    ({"keep": False}, "switching: shadow tables have to belong"),
    ({"quirks": sc.Quirk.TWO_EXITS}, "quirks: "),
])  # fmt: skip
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(sc.ConfigError, match=says):
        sc.Shadow.agile(**settings)


def test_a_pool_that_is_too_small_keeps_everything_shadowed():
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1, pool_pages=48))
    machine.cpu.read(VA)
    for _ in range(8):
        machine.touch()
    assert machine.nested == []


def test_recycling():
    """Whatever is recycled, the host's root and the pages that stand for tables too, the guest goes on."""
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1, pool_pages=74, refill=6))
    vm, cpu = machine.vm, machine.cpu
    large = 1 << 21
    for region in range(64):
        machine.tables.map(0x10_0000_0000 + region * large, region * PAGE, PAGE, "rwu", PAGE)
    for _ in range(3):
        for region in range(64):
            va = 0x10_0000_0000 + region * large
            cpu.write(va, region)
            machine.touch(va)
            assert cpu.read(va) == region
        assert vm.audit().ok
    assert vm.stats.mmu_recycled > 0
    assert vm.stats.nested_walks > 0


def test_stores_that_the_dirty_log_has_to_see():
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1))
    vm, cpu = machine.vm, machine.cpu
    cpu.write(VA, 1)
    machine.touch()
    cpu.write(VA, 2)
    vm.memory.start_dirty_log(0)
    cpu.read(VA)
    data, table = machine.entry(VA).value >> 12 & 0xFFFFF, machine.table()
    assert not vm.memory.dirty_log(0)[[data, table]].any()
    cpu.write(VA, 3)
    assert vm.memory.dirty_log(0)[data]
    machine.touch()
    assert vm.memory.dirty_log(0)[table]
    assert vm.audit().ok


def test_a_user_store_to_a_shadowed_table_on_its_own_way():
    """The table above the mark is mapped for user mode: it stays shadowed, and the store is emulated."""
    machine = AgileMachine(sc.Shadow.agile(nested_writes=1))
    vm, cpu = machine.vm, machine.cpu
    cpu.read(VA)
    machine.touch()
    upper = machine.table(VA, 3)
    machine.tables.map(VA + 3 * PAGE, upper << 12, PAGE, "rwu", PAGE)
    at = VA + 3 * PAGE + 0x800
    assert counted(vm, lambda: cpu.write(at, 0, user=True))["exits_emulate"] == 1
    assert (vm.mmu.pages["gfn"] == upper).any()
    assert vm.audit().ok


def test_unicorns_own_walker_does_not_know_marks():
    pytest.importorskip("unicorn")
    from shadowcore.unicorn import Machine

    with pytest.raises(sc.ConfigError, match="agile paging needs 'fills'"):
        Machine(sc.VM(16 * MIB, "agile"), "walker")
