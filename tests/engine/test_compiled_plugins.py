"""Policies and decisions in capsules: what they are asked, saved and refused. The functions here are Python's, by
ctypes; examples/compiled is compiled."""

import ctypes
import gc
from ctypes import c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

import numpy as np
import pytest
import streams
from guest2007 import USER, Guest, W
from places import ROOT

import shadowcore as sc

NONE = 0xFFFFFFFF
COLUMNS = ("outcome", "error_code", "gpa", "value", "exits")
OPEN = ctypes.CFUNCTYPE(c_void_p, c_void_p)
CLOSE = ctypes.CFUNCTYPE(None, c_void_p)
TELL = ctypes.CFUNCTYPE(None, c_void_p, c_uint32)
VICTIM = ctypes.CFUNCTYPE(c_uint32, c_void_p)
STORE = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
SAVE = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p, c_size_t)
RESTORE = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
capsule_new = ctypes.pythonapi.PyCapsule_New
capsule_new.restype, capsule_new.argtypes = ctypes.py_object, (c_void_p, ctypes.c_char_p, c_void_p)


class Host(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("pool_pages", c_uint32),
        ("pages", c_void_p),
        ("page_size", c_uint32),
        ("reserved", c_uint32),
    )


class Policy(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("open", OPEN),
        ("close", CLOSE),
        ("made", TELL),
        ("used", TELL),
        ("gone", TELL),
        ("victim", VICTIM),
        ("save", SAVE),
        ("restore", RESTORE),
        ("later", c_uint64),
    )


class Decisions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("open", OPEN),
        ("close", CLOSE),
        ("store", STORE),
        ("save", SAVE),
        ("restore", RESTORE),
        ("later", c_uint64),
    )


class Store(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("nbytes", c_uint32),
        ("gva", c_uint64),
        ("gpa", c_uint64),
        ("gfn", c_uint64),
        ("pages", ctypes.POINTER(c_uint32)),
        ("levels", ctypes.POINTER(c_uint8)),
        ("n_pages", c_uint32),
        ("in_use", c_uint8),
        ("unsync", c_uint8),
        ("reserved", c_uint16),
    )


class Functions:
    """The functions of an lru; a test replaces some."""

    def __init__(self):
        self.order, self.host, self.closed = {}, None, 0
        self.answer = None

    def open(self, host):
        self.host, self.order = Host.from_address(host), {}
        return 0x1234

    def close(self, state):
        assert state == 0x1234
        self.closed += 1

    def roots(self, page):
        return c_uint32.from_address(self.host.pages + page * self.host.page_size + 12).value

    def made(self, _state, page):
        assert page not in self.order
        self.order[page] = True

    def used(self, _state, page):
        del self.order[page]
        self.order[page] = True

    def gone(self, _state, page):
        del self.order[page]

    def victim(self, _state):
        if self.answer is not None:
            return self.answer(self) if callable(self.answer) else self.answer
        return next((page for page in self.order if not self.roots(page)), NONE)

    def save(self, _state, to, room):
        kept = np.array(list(self.order), dtype="<u4").tobytes()
        ctypes.memmove(to, kept, min(room, len(kept)))
        return len(kept)

    def restore(self, _state, given, size):
        pages = np.frombuffer(ctypes.string_at(given, size), dtype="<u4") if size % 4 == 0 else [0, 0]
        if len(set(pages)) != len(pages):
            return -1
        self.order = dict.fromkeys(map(int, pages), True)
        return 0


class Deciding(Functions):
    def __init__(self):
        super().__init__()
        self.answer, self.asked = 0, []

    def store(self, _state, store):
        s = Store.from_address(store)
        self.seen = (s.gfn, s.nbytes, s.pages[: s.n_pages], s.levels[: s.n_pages], s.in_use, s.unsync)
        self.asked.append(s.unsync)
        assert s.struct_size == ctypes.sizeof(Store)
        return self.answer


KEPT = []
"""Functions live as long as code does: a machine calls `close` when it is collected."""


@pytest.fixture
def plug():
    """Make a capsule of functions, and a class of a name that has it."""

    def made(functions, base=sc.Policy, name="test-compiled", capsule=None, **fields):
        structure = Policy if base is sc.Policy else Decisions
        given = structure()
        given.struct_size = structure.later.offset
        for field, kind in structure._fields_:
            if hasattr(functions, field):
                setattr(given, field, kind(getattr(functions, field)))
        for field, value in fields.items():
            setattr(given, field, value)
        label = {sc.Policy: b"shadowcore.policy", sc.Decisions: b"shadowcore.decisions"}[base]
        label = label if capsule is None else capsule
        KEPT.append((given, label))
        type("Compiled", (base,), {"compiled": capsule_new(ctypes.addressof(given), label, None)}, name=name)

    return made


def design(**more):
    return sc.Shadow.cached(**{"pool_pages": 16, "min_free": 5, "refill": 8, "policy": "test-compiled", **more})


def ran(name, mmu):
    data = streams.stream(name)
    vm = streams.machine(data, mmu)
    return vm, vm.vcpus[0].run(data["ops"])


@pytest.mark.parametrize("name", ["pressure_64_s1", "fuzz_pae_s6"])
def test_a_policy_in_functions_is_what_the_engine_has(name, plug):
    plug(Functions())
    ours, one = ran(name, design())
    theirs, other = ran(name, design(policy="lru"))
    assert ours.stats.as_dict() == theirs.stats.as_dict()
    assert np.array_equal(one.exits, other.exits)
    assert ours.stats.mmu_recycled or name != "pressure_64_s1"
    assert ours.audit().ok


def test_it_is_closed_with_its_machine(plug):
    functions = Functions()
    plug(functions)
    vm = sc.VM("1MiB", design())
    assert functions.host.pool_pages == 16
    assert functions.host.page_size == vm.mmu.arrays["pages"].dtype.itemsize
    assert functions.host.struct_size == ctypes.sizeof(Host)
    assert not functions.closed
    del vm
    gc.collect()
    assert functions.closed == 1


def test_the_layout_of_headers():
    """sc_plugin_page is the beginning of what Mmu.arrays shows."""
    offsets = {name: at for name, (_, at) in sc.VM("1MiB").mmu.arrays["pages"].dtype.fields.items()}
    wanted = {"gfn": 0, "role": 8, "root_count": 12, "present": 32, "active": 36, "unsync": 38, "flood": 39}
    assert {name: offsets[name] for name in wanted} == wanted
    header = (ROOT / "shadowcore" / "include" / "shadowcore_plugin.h").read_text("utf-8")
    fields = header.split("typedef struct sc_plugin_page {")[1].split("}")[0]
    assert [name for name in offsets if f" {name};" in fields] == [
        "gfn", "role", "root_count", "present", "active", "nonglobal", "unsync", "flood"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (99, "victim: page 99 is not in use"),
        (NONE - 1, "victim: page 4294967294 is not in use"),
        (lambda self: next(page for page in self.order if self.roots(page)), "is a root in use"),
        (lambda self: next(page for page in range(16) if page not in self.order), "is not in use"),
    ],
)
def test_a_bad_victim_is_an_error_and_nothing_is_half_done(answer, said, plug):
    functions = Functions()
    functions.answer = answer
    plug(functions)
    data = streams.stream("pressure_64_s1")
    vm = streams.machine(data, design())
    with pytest.raises(sc.PluginError, match=f"test-compiled: .*{said}") as caught:
        vm.vcpus[0].run(data["ops"])
    assert vm.audit().ok
    functions.answer = NONE  # no opinion: as fifo
    rest = vm.vcpus[0].run(data["ops"][len(caught.value.result) :])
    _, whole = ran("pressure_64_s1", design(policy="fifo"))
    for column in COLUMNS[:4]:
        got = np.concatenate([getattr(caught.value.result, column), getattr(rest, column)])
        np.testing.assert_array_equal(got, getattr(whole, column))
    assert vm.audit().ok


def test_it_may_not_use_its_machine(plug):
    told = []

    class Nosy(Functions):
        def made(self, state, page):
            super().made(state, page)
            for vm in vms:
                with pytest.raises(sc.EngineError, match="this VM is in use"):
                    vm.vcpus[0].read(0)
                told.append(page)

    vms = []
    plug(Nosy())
    guest = Guest("64", sc.Shadow.cached(policy="test-compiled"))
    vms.append(guest.vm)
    guest.cpu.read(USER)
    assert told
    assert guest.vm.audit().ok


FITS = ctypes.sizeof(Policy) - 8


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"capsule": b"shadowcore.policies"},
            "a capsule of the name 'shadowcore.policy' is needed, not 'shadowcore.pol",
        ),
        ({"capsule": b"\xff"}, "is needed, not"),
        ({"struct_size": 0}, "struct_size is 0, and 72 to 4096 are needed"),
        ({"struct_size": FITS - 1}, "struct_size is 71, and"),
        ({"struct_size": 1 << 31}, "struct_size is 2147483648, and"),
        ({"struct_size": FITS + 8, "later": 1}, "has 80 bytes, and something in those that this version does not know"),
        ({"reserved": 1}, "sc_policy_plugin.reserved is not 0"),
        ({"open": OPEN(0)}, "sc_policy_plugin.open is NULL"),
        ({"close": CLOSE(0)}, "sc_policy_plugin.close is NULL"),
        ({"made": TELL(0)}, "sc_policy_plugin.made is NULL"),
        ({"gone": TELL(0)}, "sc_policy_plugin.gone is NULL"),
        ({"victim": VICTIM(0)}, "sc_policy_plugin.victim is NULL"),
        ({"save": SAVE(0)}, "sc_policy_plugin.save and restore: one of them is NULL"),
        ({"restore": RESTORE(0)}, "sc_policy_plugin.save and restore: one of them is NULL"),
        ({"open": OPEN(lambda host: 0)}, "sc_policy_plugin.open made nothing"),
    ],
)
def test_capsules_that_are_refused(fields, said, plug):
    plug(Functions(), **fields)
    with pytest.raises(sc.ConfigError, match=f"'test-compiled': .*{said}"):
        sc.VM("1MiB", design())


def test_what_may_be_left_out_or_come_later(plug):
    plug(Functions(), used=TELL(0), struct_size=FITS + 8)
    ours, _ = ran("pressure_64_s1", design())
    deaf = Functions()
    deaf.used = lambda *_: None
    plug(deaf)
    theirs, _ = ran("pressure_64_s1", design())
    assert ours.stats.as_dict() == theirs.stats.as_dict()
    type("Odd", (sc.Policy,), {"compiled": "no capsule"}, name="test-odd")
    with pytest.raises(sc.ConfigError, match=r"'test-odd': Odd\.compiled is no capsule: 'no capsule'"):
        sc.VM("1MiB", design(policy="test-odd"))


def test_a_saved_machine_goes_on(plug, tmp_path):
    data = streams.stream("pressure_64_s1")
    half = len(data["ops"]) // 2
    plug(Functions())
    vm = streams.machine(data, design())
    vm.vcpus[0].run(data["ops"][:half])
    vm.save(tmp_path / "vm")
    plug(Functions())
    loaded = sc.VM.load(tmp_path / "vm")
    one, other = (each.vcpus[0].run(data["ops"][half:]) for each in (vm, loaded))
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(other, column), getattr(one, column))
    assert vm.stats.as_dict() == loaded.stats.as_dict()
    # The same file, and a plug-in that takes it for none, or that has to be written by one that says nothing.
    refusing = Functions()
    refusing.restore = lambda *_: 1
    plug(refusing)
    with pytest.raises(sc.SnapshotError, match=r"test-compiled: restore: \d+ bytes are no state of it"):
        sc.VM.load(tmp_path / "vm")
    plug(Functions(), save=SAVE(0), restore=RESTORE(0))
    with pytest.raises(sc.SnapshotError, match="no state of it"):
        sc.VM.load(tmp_path / "vm")
    with pytest.raises(sc.ConfigError, match=r"cannot be saved, for sc_policy_plugin\.save is NULL"):
        sc.VM("1MiB", design()).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([2**64 - 1], "save: it failed"),
        ([(1 << 30) + 1], "save: 1073741825 bytes"),
        ([3, 4], "save: it said another number of bytes than before"),
    ],
)
def test_a_state_that_is_not_said(answers, said, plug, tmp_path):
    functions = Functions()
    functions.save = lambda *_: answers.pop(0)
    plug(functions)
    with pytest.raises(sc.PluginError, match=f"test-compiled: {said}"):
        sc.VM("1MiB", design()).save(tmp_path / "vm")


def editing(answer, plug, make=sc.Shadow.cached, **fields):
    functions = Deciding()
    plug(functions, sc.Decisions, "test-deciding", **fields)
    guest = Guest("64", make(decides="test-deciding"))
    guest.cpu.read(USER)
    guest.see(guest.entry(USER))
    functions.answer = answer
    return guest, guest.tables.entry(USER).value, functions


@pytest.mark.parametrize(
    ("answer", "moved"),
    [
        (0, {"pf_taken": 1, "pf_emulate": 1}),
        (3, {"pf_taken": 1, "pf_emulate": 1, "mmu_shadow_zapped": 1, "mmu_unprotect": 1}),
        (1, {"pf_taken": 2, "mmu_shadow_zapped": 1, "mmu_unprotect": 1}),
        (2, {"pf_taken": 1, "pf_emulate": 1}),
    ],
)
def test_what_becomes_of_a_store(answer, moved, plug):
    guest, value, functions = editing(answer, plug)
    with guest.counting() as counted:
        guest.edit(USER, value & ~W)
    counted.pop("rmap_protected", None)
    assert counted == moved
    gfn, nbytes, pages, levels, in_use, unsync = functions.seen
    assert (gfn, nbytes, levels, in_use, unsync) == (guest.table(USER), 8, [1], 0, 0)
    assert len(pages) == 1
    assert guest.vm.audit().ok
    with pytest.raises(sc.PageFault):
        guest.cpu.write(USER, 1, user=True)


@pytest.mark.parametrize(("answer", "unsync"), [(2, 1), (0, 0), (3, 0)])
def test_a_leaf_table_that_is_not_let_go(answer, unsync, plug):
    functions = Deciding()
    functions.answer = answer
    plug(functions, sc.Decisions, "test-deciding")
    guest = Guest("64", sc.Shadow.unsync(decides="test-deciding"))
    guest.cpu.read(USER)
    guest.see(guest.entry(USER))
    guest.edit(USER, 0)
    assert guest.vm.stats.mmu_unsync == unsync
    assert functions.asked[0] == 1  # before any store it could run out of sync
    assert guest.vm.audit().ok
    guest.cpu.invlpg(USER)
    with pytest.raises(sc.PageFault):
        guest.cpu.read(USER)


@pytest.mark.parametrize("answer", [4, -1, 1 << 30])
def test_a_bad_decision_stores_nothing(answer, plug):
    guest, value, functions = editing(answer, plug)
    with pytest.raises(sc.PluginError, match=f"test-deciding: store: 0 to 3 is needed, not {answer}"):
        guest.edit(USER, 0)
    functions.answer = 0
    assert guest.cpu.read(guest.window(guest.entry(USER)), 8) == value
    guest.edit(USER, value)
    guest.vm.mmu.can_emulate = lambda *_: True
    guest.see(guest.entry(USER))
    guest.edit(USER, value)
    assert guest.vm.audit().ok


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"capsule": b"shadowcore.policy"}, "a capsule of the name 'shadowcore.decisions' is needed"),
        ({"struct_size": 40}, "sc_decisions_plugin.struct_size is 40, and 48 to 4096 are needed"),
        ({"store": STORE(0)}, "sc_decisions_plugin.store is NULL"),
    ],
)
def test_decisions_that_are_refused(fields, said, plug):
    with pytest.raises(sc.ConfigError, match=f"'test-deciding': .*{said}"):
        editing(0, plug, **fields)
