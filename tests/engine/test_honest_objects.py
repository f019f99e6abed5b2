"""Objects that say one thing when asked and another when used: they are taken apart once, into plain values."""

import threading
from dataclasses import fields
from functools import cache

import numpy as np
import pytest

import shadowcore as sc
from shadowcore import embed, programs
from shadowcore.config import check_int, taken
from shadowcore.engine.vcpu import VCpu
from shadowcore.files import check_path
from shadowcore.guest.kernel import Kernel
from shadowcore.guest.options import KernelOptions
from shadowcore.recording import importers
from shadowcore.recording import replay as trace
from shadowcore.recordings import Reader, Writer, is_recording
from shadowcore.studies import explain


class Liar(int):
    """An integer that agrees with every comparison, and has no arithmetic of its own."""

    def _yes(self, other):
        return True

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _yes
    __hash__ = int.__hash__

    def _zero(self, *_):
        return 0

    __index__ = __int__ = __rshift__ = __and__ = __mod__ = __sub__ = _zero


class Changing:
    """An index of another value each time."""

    def __init__(self, *values):
        self.values = list(values)

    def __index__(self):
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def test_an_integer_is_read_once_and_plain():
    found = check_int("x", Changing(5, 1 << 40), 0, 10)
    assert (found, type(found)) == (5, int)
    assert type(check_int("x", np.uint8(7), 0, 10)) is int
    for wrong in (Liar(1 << 40), Liar(-1), True, 1.0, "1", None, Changing("x")):
        with pytest.raises(sc.ConfigError, match="x: "):
            check_int("x", wrong, 0, 10)


# -- settings --------------------------------------------------------------------------------------------------

WRONG = {
    sc.Features: ("maxphyaddr",),
    sc.TLB: ("small_entries", "large_ways", "huge_entries"),
    sc.Shadow: ("pool_pages", "min_free", "refill", "flood_threshold", "prev_roots", "prefetch", "quirks"),
    KernelOptions: ("max_processes", "max_mappings", "kernel_data", "atomic_bytes", "seed"),
}


def used(settings):
    if isinstance(settings, sc.Shadow):
        return sc.VM("1MiB", settings).mmu.design
    if isinstance(settings, sc.TLB):
        return sc.VM("1MiB", tlb=settings).tlb
    if isinstance(settings, sc.Features):
        return sc.VM("1MiB", features=settings).features
    return Kernel(sc.VM("16MiB"), settings).options


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in WRONG.items() for name in names])
def test_settings_that_lie(kind, name):
    """By an integer, by a property of a subclass, and by a change behind the back of a frozen object."""
    with pytest.raises(sc.ConfigError, match=name):
        kind(**{name: Liar(-1)})
    changed = kind()
    object.__setattr__(changed, name, -1)
    with pytest.raises(sc.ConfigError, match=name):
        used(changed)
    good = getattr(kind(), name)
    # Its own value when it is checked, another one afterwards.
    asked = []
    lying = type(
        "Lying", (kind,), {name: property(lambda _: asked.append(1) or (good if len(asked) == 1 else 1 << 60))}
    )
    made = used(object.__new__(lying))
    assert type(made) is kind
    assert getattr(made, name) == good


def test_plain_settings_are_kept_plain():
    made = sc.Shadow.cached(pool_pages=np.int64(64), min_free=Changing(5), name=type("S", (str,), {})("mine"))
    assert [type(getattr(made, f.name)) for f in fields(made) if f.name != "quirks"] == [
        *(str, bool, int, int, int, int, bool, type(None), bool),
        *(str, bool, int, bool, int, str),
        *(str, tuple, bool, int, str),
        *(bool, int, int, str),
        *(bool, tuple, str),
    ]
    copy = taken(sc.Shadow, made, "mmu")
    assert copy == made
    assert copy is not made
    for wrong in ({"keep": "no"}, {"keep": 2}, {"flood_reset": None}, {"name": 5}, {"release": 6.1}):
        with pytest.raises(sc.ConfigError, match=next(iter(wrong))):
            sc.Shadow(**wrong)
    assert sc.Features(nx=np.bool_(False), pcid=0) == sc.Features(nx=False, pcid=False)
    for wrong in (["cached"], {}, 5, sc.Shadow):
        with pytest.raises(sc.ConfigError, match="mmu"):
            sc.VM("1MiB", wrong)


def test_a_tlb_with_a_geometry_of_its_own():
    class Wide(sc.TLB):
        @property
        def geometry(self):
            return ((4, 1 << 20),) * 3

    vm = sc.VM("1MiB", tlb=Wide())
    assert vm.tlb == sc.TLB()
    for gva in range(0, 1 << 20, 4096):
        vm.vcpus[0].read(gva)
    with pytest.raises(sc.ConfigError, match="tlb"):
        VCpu(vm.mmu, sc.Features(), 5)
    with pytest.raises(sc.ConfigError, match="features"):
        VCpu(vm.mmu, None)


# -- memory ----------------------------------------------------------------------------------------------------


class LyingArray(np.ndarray):
    """Says that it is large, of bytes, writable and elsewhere."""

    dtype = property(lambda self: np.dtype(np.uint8))
    size = property(lambda self: 1 << 30)
    nbytes = property(lambda self: 1 << 30)
    shape = property(lambda self: (1 << 30,))
    ndim = property(lambda self: 1)
    base = property(lambda self: None)

    @property
    def ctypes(self):
        raise AssertionError("asked for its address")

    def view(self, *_):
        raise AssertionError("asked for a view")

    reshape = __len__ = view


def lying(array):
    return np.ndarray.view(array, LyingArray)


def test_arrays_that_lie_about_themselves_as_memory():
    honest = np.zeros(8192, np.uint8)
    vm = sc.VM(lying(honest), "native")
    assert (type(vm.memory.bytes), vm.memory.bytes.size) == (np.ndarray, 8192)
    vm.vcpus[0].write(0x1000, 0x55, size=1)
    assert honest[0x1000] == 0x55
    with pytest.raises(sc.MMIOAccess):
        vm.vcpus[0].read(0x2000)
    pages = embed.allocate(8192)
    assert embed.machine(lying(pages), "native").memory.bytes.size == 8192
    for wrong in (np.zeros(5000, np.uint8), np.zeros(1024, np.uint64), np.zeros((2, 4096), np.uint8)):
        with pytest.raises(sc.ConfigError, match="memory"):
            sc.VM(lying(wrong), "native")


def test_arrays_that_lie_about_themselves_as_operations():
    class LyingOps(np.ndarray):
        dtype = property(lambda self: sc.OP_DTYPE)

    ops = np.zeros(4, dtype=sc.OP_DTYPE)
    ops["size"] = 8
    cpu = sc.VM("1MiB", "native").vcpus[0]
    assert cpu.run(ops.view(LyingOps)).outcome.tolist() == [0] * 4
    with pytest.raises(sc.ConfigError, match="ops"):
        cpu.run(np.ndarray.view(np.zeros(4, np.uint8), LyingOps))
    assert cpu.run(ops.view(np.recarray)).outcome.tolist() == [0] * 4
    calls = np.ndarray.view(np.zeros(4, np.uint8), LyingArray)
    with pytest.raises(sc.ConfigError, match="calls"):
        Kernel(sc.VM("16MiB")).run(calls)


def test_slots_that_change():
    class Growing(sc.MemorySlot):
        asked = 0

        @property
        def size(self):
            Growing.asked += 1
            return 4096 if Growing.asked < 2 else 1 << 30

        @size.setter
        def size(self, value):
            pass

    slot = object.__new__(Growing)
    for name, value in (("gpa", 0), ("dirty_log", False)):
        object.__setattr__(slot, name, value)
    vm = sc.VM([slot], "native")
    assert vm.memory.bytes.size == 4096
    assert type(vm.memory.slots[0]) is sc.MemorySlot


def test_slots_changed_afterwards_move_nothing():
    vm = sc.VM("64MiB")
    object.__setattr__(vm.memory.slots[0], "size", 4096)
    vm.memory.start_dirty_log()
    vm.vcpus[0].write(63 << 20, 1)
    assert vm.memory.dirty_log().sum() == 1
    assert len(vm.memory.dirty_log()) == 64 << 8
    small = sc.VM("4MiB")
    object.__setattr__(small.memory.slots[0], "size", 1 << 40)
    kernel = Kernel(small)
    assert kernel.frames
    small.memory.start_dirty_log()


@pytest.mark.parametrize("slot", [-1, 1, 64, 1 << 31, 1 << 40, "0", None, 0.5, Liar(7)])
def test_slots_that_are_none(slot):
    for mmu in ("cached", "native"):
        vm = sc.VM("1MiB", mmu)
        vm.vcpus[0].write(0, 1)
        for call, more in (
            (vm.mmu.slot_logged, ("start",)),
            (vm.memory._changed, ("start",)),
            (vm.memory.start_dirty_log, ()),
            (vm.memory.on_log, ("start", 0, 0)),
        ):
            with pytest.raises(sc.ConfigError, match="slot"):
                call(slot, *more)


# -- processors ------------------------------------------------------------------------------------------------


def test_sizes_and_levels_that_lie():
    vm = sc.VM("1MiB", "native")
    cpu = vm.vcpus[0]
    for size in (Liar(200), Liar(3)):
        for call in (
            lambda size: cpu.read(0, size),
            lambda size: cpu.write(0, 1, size),
            lambda size: cpu.cmpxchg(0, 0, 1, size),
            lambda size: cpu.modify(0, "add", 1, size),
        ):
            with pytest.raises(sc.ConfigError, match="size"):
                call(size)
    with pytest.raises(sc.ConfigError, match="cpl"):
        cpu.cpl = Liar(200)
    assert cpu.cpl == 0
    vm.memory.bytes[:16] = 255
    assert cpu.read(0, Liar(8)) == (1 << 64) - 1
    assert len(vm.read_physical(0, Changing(8, 1 << 40))) == 8
    process = Kernel(sc.VM("16MiB")).spawn()
    with pytest.raises(sc.ConfigError, match="size"):
        process.touch([0], size=Liar(200))


def test_no_processor_is_added_while_a_batch_runs():
    vm = sc.VM("1MiB", "native")
    ops = np.zeros(3_000_000, dtype=sc.OP_DTYPE)
    ops["size"] = 8
    refused = 0
    for _ in range(20):
        runner = threading.Thread(target=vm.vcpus[0].run, args=(ops,))
        runner.start()
        while runner.is_alive() and not refused:
            try:
                vm.vcpus[0].export_state()
            except sc.EngineError:
                with pytest.raises(sc.EngineError, match="in use"):
                    VCpu(vm.mmu, sc.Features())
                refused += 1
        runner.join()
        if refused:
            break
    assert refused


def test_no_processor_is_added_by_a_callback():
    vm = sc.VM("1MiB")
    caught = []

    def callback(event):
        try:
            VCpu(vm.mmu, sc.Features())
        except sc.EngineError as error:
            caught.append(error)

    embed.on_event(vm, callback)
    vm.vcpus[0].write(0, 1)
    assert caught


# -- paths -----------------------------------------------------------------------------------------------------


@cache
def short():
    return trace.load().head(10)


TAKES_A_PATH = {
    "Reader": Reader,
    "Writer": lambda path: Writer(path, "program"),
    "is_recording": is_recording,
    "load": trace.load,
    "open_recording": trace.open_recording,
    "Recording.save": lambda path: short().save(path),
    "VM.save": lambda path: sc.VM("1MiB", "native").save(path),
    "VM.load": sc.VM.load,
    "load_image": explain.load_image,
    "guess": importers.guess,
    "convert": lambda path: importers.convert([path], "x"),
    "convert, out": lambda path: importers.convert(["x"], path),
    "programs.run": programs.run,
    "programs.survey": lambda path: programs.survey([path]),
    "study": sc.study,
    "to_csv": lambda path: sc.study("pingpong", ("native",), operations=100).to_csv(path),
}


@pytest.mark.parametrize("name", TAKES_A_PATH)
def test_integers_are_no_paths(name, tmp_path, monkeypatch):
    """To `open` they are files that are open already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open").write_bytes(b"untouched")
    with open(tmp_path / "open", "r+b") as file:
        for wrong in (file.fileno(), True, 1.5, [file.fileno()] if name != "programs.run" else 7, "a\0b", object()):
            with pytest.raises(sc.ConfigError if wrong != "a\0b" else (sc.ConfigError, sc.TraceError)):
                TAKES_A_PATH[name](wrong)
        assert file.read() == b"untouched"
    assert [path.name for path in tmp_path.iterdir()] == ["open"]


def test_paths_are_texts_bytes_and_path_objects(tmp_path):
    for path in (str(tmp_path), bytes(tmp_path), tmp_path):
        assert check_path(path) == str(tmp_path)
    short().save(bytes(tmp_path / "x.screc"))
    assert trace.open_recording(bytes(tmp_path / "x.screc")).operations == 10
