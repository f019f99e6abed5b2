"""`can_emulate`: the embedder says that it cannot emulate a store to a table, which then is made natively."""

import pytest
from guest2007 import DATA, LEVELS, PAGE, USED, USER, A, D, Guest, P, U, W, every_mode
from operations import WIDE, operations
from twins import CROSS, FAR, PAGES, TABLE, WORD, crossing

import shadowcore as sc


class Hook:
    """A can_emulate that answers, raises, or does something, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def __call__(self, gva, gpa, nbytes):
        self.asked.append((gva, gpa, nbytes))
        answer = self.answer
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer


def hooked(mode, answer, pages=PAGES, mmu="cached"):
    """A guest whose table of USER is in use and can be seen through the window."""
    guest = Guest(mode, mmu, pages)
    guest.see(guest.entry(USER))
    for i in range(pages):
        guest.cpu.read(USER + i * PAGE, 4)
    guest.vm.mmu.can_emulate = hook = Hook(answer)
    return guest, hook


@every_mode
def test_hook_is_asked_for_stores_to_tables_alone(mode):
    guest, hook = hooked(mode, True)
    gpa = guest.entry(USER + PAGE)
    guest.cpu.read(guest.window(gpa), 4)
    guest.cpu.write(USER, 5)
    guest.cpu.fetch(USER)
    assert hook.asked == []
    value = guest.tables.entry(USER).value
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa), value, guest.size)
        guest.cpu.cmpxchg(guest.window(gpa), 0, 0, 4)
    assert moved["pf_emulate"] == 2
    assert hook.asked == [(guest.window(gpa), gpa, guest.size), (guest.window(gpa), gpa, 4)]
    guest.vm.mmu.can_emulate = None
    guest.cpu.write(guest.window(gpa), value, guest.size)
    assert len(hook.asked) == 2
    assert guest.vm.mmu.can_emulate is None
    assert guest.vm.audit().ok


OPERATION = {
    "write": lambda guest, va, value: guest.cpu.write(va, value, guest.size),
    "xchg": lambda guest, va, value: guest.cpu.modify(va, "xchg", value, guest.size),
    "cmpxchg": lambda guest, va, value: guest.cpu.cmpxchg(va, DATA | P | W | U | A | D, value, guest.size),
    "run": lambda guest, va, value: guest.cpu.run(
        operations({"op": sc.Op.WRITE, "size": guest.size, "addr": va, "value": value}, dtype=WIDE)
    ),
}


@pytest.mark.parametrize("operation", OPERATION)
@every_mode
def test_refused_store_is_made_natively(mode, operation):
    """The exit that asks, the table unprotected, and the exit that grants W; nothing is emulated. The next stores are
    the processor's own, until the table is used again."""
    guest, hook = hooked(mode, False)
    gpa, value = guest.entry(USER), DATA + PAGE | P | W | U | A | D
    with guest.counting("pf_fixed", "mmu_pte_write") as moved:
        result = OPERATION[operation](guest, guest.window(gpa), value)
    assert moved == {"pf_taken": 2, "pf_fixed": 2, "mmu_shadow_zapped": 1, "mmu_unprotect": 1}
    if operation == "run":
        assert (result.exits.tolist(), result.emulated.tolist(), result.outcome.tolist()) == ([2], [0], [0])
    assert hook.asked == [(guest.window(gpa), gpa, guest.size)]
    assert guest.tables.entry(USER).value == value
    assert not len(guest.pages(gpa >> 12))
    assert guest.vm.audit().ok
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa) + guest.size, value, guest.size)
    assert moved == {}
    assert guest.exits(USER) == 1
    assert guest.cpu.translate(USER).gpa == DATA + PAGE
    assert guest.cpu.translate(USER + PAGE).gpa == DATA + PAGE
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa), value, guest.size)
    assert moved["mmu_unprotect"] == 1
    assert len(hook.asked) == 2
    assert guest.vm.audit().ok


@pytest.mark.parametrize("refused", ["first", "second", "both"])
@every_mode
def test_refused_part_of_a_store_over_a_page_boundary(mode, refused):
    """One of two tables, or both: the store is made, whole, and never through the emulator where that was refused."""
    twins = crossing(mode, TABLE, TABLE)
    guest = twins.guest
    low, high = guest.entry(USER) & -PAGE, guest.entry(FAR) & -PAGE
    refuses = {"first": {low}, "second": {high}, "both": {low, high}}[refused]
    asked = []

    def answer(gva, gpa, nbytes):
        asked.append((gva, gpa, nbytes))
        return gpa & -PAGE not in refuses

    twins.do(lambda g: [g.cpu.read(CROSS, 4), g.cpu.read(CROSS + PAGE, 4)])
    guest.vm.mmu.can_emulate = answer
    with guest.counting() as moved:
        twins.do(lambda g: g.cpu.write(CROSS + PAGE - 3, 0x1122334455667788, 8))
    assert (CROSS + PAGE - 3, low + PAGE - 3, 3) in asked or refused == "second"
    assert (CROSS + PAGE, high, 5) in asked or refused == "first"
    assert moved["mmu_unprotect"] == len(refuses)
    assert moved.get("pf_emulate", 0) == 2 - len(refuses)
    assert twins.ram(low + PAGE - 3, 3) == 0x667788
    assert twins.ram(high, 5) == 0x1122334455
    twins.check()


@every_mode
def test_refused_store_to_a_root_in_use(mode):
    """It cannot be unprotected: an error, and nothing is changed; in a batch with what was done before."""
    guest, hook = hooked(mode, False)
    level = 2 if mode == "pae" else LEVELS[mode]
    gpa = guest.entry(USER, level) + 8 * guest.size
    guest.see(gpa)
    memory, roots = guest.vm.memory.bytes.tobytes(), guest.vm.mmu.roots()
    for _ in range(2):
        with pytest.raises(sc.EngineError, match="root"):
            guest.cpu.write(guest.window(gpa), 0x1000, guest.size)
        assert guest.vm.memory.bytes.tobytes() == memory
        assert guest.vm.mmu.roots() == roots
        assert guest.vm.audit().ok
    assert set(hook.asked) == {(guest.window(gpa), gpa, guest.size)}
    rows = [
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 7},
        {"op": sc.Op.WRITE, "size": guest.size, "addr": guest.window(gpa), "value": 0x1000},
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 8},
    ]
    with pytest.raises(sc.EngineError, match="root") as caught:
        guest.cpu.run(operations(*rows, dtype=WIDE))
    assert caught.value.result.outcome.tolist() == [0]
    assert guest.cpu.read(USER) == 7
    guest.vm.mmu.can_emulate = None
    guest.cpu.run(operations(*rows[1:], dtype=WIDE))
    assert guest.cpu.read(USER) == 8
    assert int.from_bytes(guest.vm.read_physical(gpa, guest.size), "little") == 0x1000
    assert guest.vm.audit().ok


@every_mode
def test_refused_store_to_a_table_that_maps_itself(mode):
    """The leaf table of the window is mapped by itself: to make the store natively the table has to be walked, which
    protects it anew. Whatever comes of it, it is not emulated against the embedder's word."""
    guest, hook = hooked(mode, False)
    own = guest.entry(guest.window(guest.entry(USER))) & -PAGE
    assert guest.table(guest.window(own)) << 12 == own
    gpa = guest.entry(guest.window(own))
    value = guest.tables.entry(guest.window(own)).value
    guest.see(gpa)
    memory = guest.vm.memory.bytes.tobytes()
    emulated = guest.vm.stats.pf_emulate
    with pytest.raises(sc.EngineError):
        guest.cpu.write(guest.window(gpa), value | 1 << 9, guest.size)
    assert guest.vm.stats.pf_emulate == emulated
    assert guest.vm.memory.bytes.tobytes() == memory
    assert guest.vm.audit().ok
    hook.answer = True
    guest.cpu.write(guest.window(gpa), value | 1 << 9, guest.size)
    assert guest.tables.entry(guest.window(own)).value == value | 1 << 9


class Surprise(Exception):
    """What a hook raises."""


@pytest.mark.parametrize(
    "error", [Surprise("no idea"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
@every_mode
def test_exception_of_a_hook(mode, error):
    """It comes out of the call as it is; the store was not made; the next call goes on as if nothing had been."""
    guest, hook = hooked(mode, error)
    gpa = guest.entry(USER)
    memory = guest.vm.memory.bytes.tobytes()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            guest.cpu.write(guest.window(gpa), 0, guest.size)
        assert caught.value is error
        assert guest.vm.memory.bytes.tobytes() == memory
        assert guest.vm.audit().ok
    assert guest.cpu.read(USER + PAGE, 4) == 0
    hook.answer = True
    guest.cpu.write(guest.window(gpa), 0, guest.size)
    assert guest.tables.entry(USER).value == 0
    assert guest.vm.audit().ok


@every_mode
def test_exception_of_a_hook_in_a_batch(mode):
    """The batch stops there: what comes later is not done, and the exception has the result of what came before."""
    guest, hook = hooked(mode, Surprise("once"))
    rows = [
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 7},
        {"op": sc.Op.WRITE, "size": guest.size, "addr": guest.window(guest.entry(USER)), "value": 0},
        {"op": sc.Op.WRITE, "size": guest.size, "addr": guest.window(guest.entry(USER + PAGE)), "value": 0},
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 8},
    ]
    with pytest.raises(Surprise) as caught:
        guest.cpu.run(operations(*rows, dtype=WIDE))
    assert len(hook.asked) == 1
    assert guest.cpu.read(USER) == 7
    assert guest.tables.entry(USER).value
    assert guest.tables.entry(USER + PAGE).value
    assert caught.value.result.outcome.tolist() == [0]
    assert guest.vm.audit().ok
    hook.answer = True
    guest.cpu.run(operations(*rows[2:], dtype=WIDE))
    assert guest.cpu.read(USER) == 8
    assert not guest.tables.entry(USER + PAGE).value


REENTRY = {
    "read": lambda guest: guest.cpu.read(USER),
    "write": lambda guest: guest.cpu.write(USER, 9),
    "fetch": lambda guest: guest.cpu.fetch(USER),
    "cmpxchg": lambda guest: guest.cpu.cmpxchg(USER, 0, 9),
    "modify": lambda guest: guest.cpu.modify(USER, "add", 9),
    "invlpg": lambda guest: guest.cpu.invlpg(USER),
    "translate": lambda guest: guest.cpu.translate(USER),
    "run": lambda guest: guest.cpu.run(operations((sc.Op.WRITE, USER, 9), dtype=WIDE)),
    "cr0": lambda guest: setattr(guest.cpu, "cr0", guest.cpu.cr0 & ~(1 << 31)),
    "cr3": lambda guest: setattr(guest.cpu, "cr3", 0),
    "cr4": lambda guest: setattr(guest.cpu, "cr4", guest.cpu.cr4 ^ 1 << 7),
    "efer": lambda guest: setattr(guest.cpu, "efer", guest.cpu.efer ^ 1),
    "pkru": lambda guest: setattr(guest.cpu, "pkru", WORD & 0xFFFF_FFFF),
    "ac": lambda guest: setattr(guest.cpu, "ac", True),
    "other": lambda guest: guest.vm.vcpus[-1].read(USER),
    "write_physical": lambda guest: guest.vm.write_physical(DATA, b"\x09"),
    "unprotect": lambda guest: guest.vm.mmu.unprotect(guest.table(USER)),
    "zap_all": lambda guest: guest.vm.mmu.zap_all(),
    "can_emulate": lambda guest: setattr(guest.vm.mmu, "can_emulate", None),
    "audit": lambda guest: guest.vm.audit(),
    "reset": lambda guest: guest.vm.stats.reset(),
    "dirty_log": lambda guest: guest.vm.memory.start_dirty_log(0),
}


@pytest.mark.parametrize("scalar", [True, False], ids=["call", "batch"])
@pytest.mark.parametrize("what", REENTRY)
def test_hook_that_uses_its_own_vm(what, scalar):
    """An error that says so, from the call in the hook; nothing has changed, and the VM is usable afterwards."""
    guest, hook = hooked("64", None)
    caught = []

    def reenter():
        with pytest.raises(sc.EngineError) as error:
            REENTRY[what](guest)
        caught.append(error.value)
        return True

    hook.answer = reenter
    registers = guest.cpu.export_state()
    row = {"op": sc.Op.WRITE, "size": 8, "addr": guest.window(guest.entry(USER + 40 * PAGE)), "value": 0}
    if scalar:
        guest.cpu.write(row["addr"], row["value"])
    else:
        assert guest.cpu.run(operations(row, dtype=WIDE)).emulated.tolist() == [1]
    assert len(caught) == 1
    same = {name: value for name, value in registers.items() if not name.startswith("flood")}
    assert {name: guest.cpu.export_state()[name] for name in same} == same
    assert guest.vm.memory.words[DATA // 8] == 0
    assert guest.vm.stats.pf_emulate == 1
    assert guest.vm.audit().ok
    hook.answer = True
    guest.cpu.write(USER, 3)
    assert guest.cpu.read(USER) == 3


def test_hook_that_uses_its_own_vm_is_told_so():
    """There is no other thread: what is wrong is the call from the callback."""
    guest, _ = hooked("64", lambda: guest.cpu.read(USER))
    with pytest.raises(sc.EngineError, match=r"callback|can_emulate"):
        guest.edit(USER, 0)


def test_hook_may_use_another_vm():
    other = Guest("64")
    guest, hook = hooked("64", lambda: other.cpu.read(USER) == 0)
    guest.edit(USER, 0)
    assert len(hook.asked) == 1
    assert guest.tables.entry(USER).value == 0


def test_what_can_be_a_hook():
    guest = Guest("64")
    for nonsense in (1, "yes", True, object()):
        with pytest.raises(sc.ConfigError, match="can_emulate"):
            guest.vm.mmu.can_emulate = nonsense
    assert guest.vm.mmu.can_emulate is None
    hook = Hook(True)
    guest.vm.mmu.can_emulate = hook
    assert guest.vm.mmu.can_emulate is hook


def test_native_has_nothing_to_ask_for():
    guest, hook = hooked("64", False, mmu="native")
    guest.edit(USER, 0)
    assert hook.asked == []
    assert guest.cpu.translate(USER + PAGE).gpa == DATA + PAGE


def test_unused_flags():
    """Guests of these tests map with accessed and dirty bits set: what they count is not mixed with setting those."""
    assert USED["accessed"]
    assert USED["dirty"]
