"""shadowcore.embed: memory that is shared, batches of plain arrays, events."""

import gc
import mmap
import threading
import weakref
from multiprocessing import shared_memory

import numpy as np
import pytest

import shadowcore as sc
from shadowcore import embed

DATA = 0x40_0000
DESIGNS = ("native", "flush", "cached", "kvm-2007", "unsync")


def guest(mmu="cached", memory="8MiB"):
    vm = embed.machine(embed.allocate(memory) if isinstance(memory, str) else memory, mmu)
    tables = sc.PageTables(vm.memory, "64", allocate=range(16, 64))
    tables.map(DATA, 0x20_0000, 0x10_0000, "rwxu")
    tables.map(0x80_0000, 16 * 4096, 48 * 4096, "rw")
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    return vm, vm.vcpus[0], tables


def sources(tmp_path):
    array = embed.allocate(1 << 20)
    yield array, array
    words = embed.allocate(1 << 20).view(np.uint32).reshape(1024, -1)
    yield words, words
    mapping = mmap.mmap(-1, 1 << 20)
    yield mapping, mapping
    path = tmp_path / "ram"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file:
        yield (mapped := mmap.mmap(file.fileno(), 0)), mapped


def test_memory_is_shared_with_its_source(tmp_path):
    for source, readable in sources(tmp_path):
        vm = embed.machine(source)
        vm.vcpus[0].write(0x1238, 0x1122334455667788)
        assert bytes(memoryview(readable).cast("B")[0x1238:0x1240]) == (0x1122334455667788).to_bytes(8, "little")


def test_memory_shared_between_processes():
    """SharedMemory: held while the VM lives, to be closed when it is gone."""
    shared = shared_memory.SharedMemory(create=True, size=1 << 20)
    try:
        vm = embed.machine(shared.buf)
        vm.vcpus[0].write(0, 42)
        other = shared_memory.SharedMemory(shared.name)
        assert other.buf[0] == 42
        other.close()
        with pytest.raises(BufferError):
            shared.close()
        assert vm.vcpus[0].read(0) == 42
        del vm
        gc.collect()
    finally:
        shared.close()
        shared.unlink()


def test_memory_that_is_not_let_go():
    """Whatever its owner tries while the VM lives."""
    mapping = mmap.mmap(-1, 1 << 20)
    vm = embed.machine(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    with pytest.raises((BufferError, SystemError)):
        mapping.resize(4096)
    del vm
    gc.collect()
    mapping.close()

    array = aligned(1 << 20)
    vm = embed.machine(array)
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    with pytest.raises(ValueError, match="cannot resize"):
        owner.resize(1, refcheck=False)
    del array, owner
    gc.collect()
    vm.vcpus[0].write(0x8000, 1)
    assert vm.vcpus[0].read(0x8000) == 1


def test_arrays_of_a_vm_cannot_be_resized_either():
    array = np.zeros(1 << 20, dtype=np.uint8)
    vm = sc.VM(array)
    with pytest.raises(ValueError, match="cannot resize"):
        array.resize(1 << 24, refcheck=False)
    assert vm.vcpus[0].read(0) == 0


def aligned(size):
    """An array of numpy's own, that begins at a page."""
    whole = np.zeros(size + 4096, dtype=np.uint8)
    first = -whole.ctypes.data % 4096
    return whole[first : first + size]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: aligned(8192 + 4096)[8:8200], "multiple of 4096; shadowcore.embed.allocate"),
        (lambda: aligned(8192)[:4095], "positive multiple"),
        (lambda: aligned(8192)[:0], "positive multiple"),
        (lambda: aligned(16384)[::2], "not in one piece"),
        (lambda: np.asfortranarray(aligned(8192).reshape(64, 128)), "not in one piece"),
        (lambda: bytes(4096), "read-only"),
        (lambda: object(), "with a buffer"),
        (lambda: "64MiB", "with a buffer"),
        (lambda: None, "with a buffer"),
    ],
)
def test_memory_that_will_not_do(source, message):
    with pytest.raises(sc.ConfigError, match=message):
        embed.machine(source())
    with pytest.raises(sc.ConfigError):
        embed.allocate(4095)


def test_translate():
    _vm, cpu, _ = guest()
    found = embed.translate(cpu, DATA + 5, "w", user=True)
    assert (found.gpa, found.page_size) == (0x20_0005, 4096)
    with pytest.raises(sc.PageFault):
        embed.translate(cpu, 0)


@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("data", [True, False])
def test_access_many_is_run(mmu, data):
    """The same results and counters, of arrays of any step, and of one value for all."""
    (vm, cpu, _), (twin, other, _) = guest(mmu), guest(mmu)
    rng = np.random.default_rng(5)
    for n in (0, 1, 100, 4096, 9001):
        ops = np.zeros(n, dtype=sc.OP_DTYPE)
        ops["op"], ops["size"] = rng.integers(0, 3, n), rng.choice([1, 2, 4, 8], n)
        ops["user"], ops["value"] = rng.integers(0, 2, n), rng.integers(0, 1 << 62, n)
        ops["addr"] = DATA + rng.integers(0, 0x11_0000, n)
        columns = {name: ops[field] for name, field in COLUMNS.items()}
        gva = columns.pop("gva")
        if n % 2:
            gva, columns = gva.copy(), {name: column.copy() for name, column in columns.items()}
        check(embed.access_many(cpu, gva, **columns, data=data), other.run(ops, data=data))
        ops["op"], ops["size"], ops["user"], ops["value"] = sc.Op.WRITE, 4, 1, 77
        check(embed.access_many(cpu, gva, "w", size=4, user=True, value=77, data=data), other.run(ops, data=data))
        ops["op"], ops["user"] = sc.Op.READ, 0
        backward = gva.astype(np.int64)[::-1]
        check(embed.access_many(cpu, backward, size=4, data=data), other.run(ops[::-1], data=data))
        assert vm.stats.as_dict() == twin.stats.as_dict()
    assert (vm.memory.bytes == twin.memory.bytes).all()
    assert vm.audit().ok


COLUMNS = {"gva": "addr", "kind": "op", "size": "size", "user": "user", "value": "value"}


def check(result, wanted):
    assert len(result) == len(wanted)
    for name in ("gpa", "outcome", "error_code", "exits", "emulated", "value"):
        assert (getattr(result, name) == getattr(wanted, name)).all(), name
    assert result.stats.as_dict() == wanted.stats.as_dict()


def test_access_many_follows_cpl_and_takes_lists():
    _vm, cpu, _ = guest()
    assert embed.access_many(cpu, [DATA, 0x80_0000], "r").outcome.tolist() == [0, 0]
    cpu.cpl = 3
    assert embed.access_many(cpu, [DATA, 0x80_0000], [0, 0]).outcome.tolist() == [0, 1]
    assert embed.access_many(cpu, [], "x").outcome.tolist() == []
    result = embed.access_many(cpu, [DATA], "r", data=True)
    assert result.value.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.5],), "gva: an array of integers"),
        ((["a"],), "gva: an array of integers"),
        ((np.zeros((2, 2), np.uint64),), "gva: one dimension"),
        ((5,), "gva: one dimension"),
        (([1], "rw"), "kind: 'rw'"),
        (([1], 3), "kind: 3"),
        (([1], [3]), "element 0"),
        (([1, 2], [0, 10]), "element 1"),
        (([1, 2], [0]), "kind: 1 elements, gva has 2"),
        (([1, 2], [0, 256]), "kind: an array of uint8"),
        (([1, 2], [0.5, 1]), "kind: an array of uint8"),
        (([1, 2], np.zeros((2, 2), np.uint8)), "kind: one dimension"),
    ],
)
def test_arguments_that_will_not_do(arguments, message):
    vm, cpu, _ = guest()
    before = vm.stats.as_dict()
    with pytest.raises(sc.ConfigError, match=message):
        embed.access_many(cpu, *arguments)
    assert vm.stats.as_dict() == before


@pytest.mark.parametrize(
    "named",
    [{"size": 3}, {"size": 16}, {"size": [1]}, {"size": [1, 16]}, {"user": [1]}, {"value": 1 << 64}, {"value": [1]}],
)
def test_named_arguments_that_will_not_do(named):
    _vm, cpu, _ = guest()
    with pytest.raises(sc.ConfigError):
        embed.access_many(cpu, [DATA, DATA], "w", **named)
    with pytest.raises(TypeError):
        embed.access_many(object(), [DATA])


def test_an_array_is_held_while_it_is_read():
    """Another thread cannot resize it meanwhile, and can when the batch is done."""
    vm, cpu, tables = guest()
    gva = np.full(1 << 16, DATA, dtype=np.uint64)
    gva[100] = 0x80_0000 + tables.entry(DATA).gpa - 16 * 4096
    inside, go = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        return go.wait(60)

    vm.mmu.can_emulate = wait
    thread = threading.Thread(target=embed.access_many, args=(cpu, gva, "w"))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(ValueError, match="cannot resize"):
        gva.resize(1, refcheck=False)
    go.set()
    thread.join()
    del thread
    gc.collect()
    gva.resize(1, refcheck=False)


def test_events():
    vm, cpu, tables = guest(sc.Shadow.cached(pool_pages=16))
    seen = []
    embed.on_event(vm, seen.append)
    cpu.read(DATA)
    assert seen[-1] == embed.Event("exit", "fill", 0, DATA)
    assert ("protect" in {event.kind for event in seen}) == (vm.stats.rmap_protected > 0)
    seen.clear()
    cpu.read(DATA)
    assert seen == []
    cpu.write(0x80_0000 + tables.entry(DATA).gpa - 16 * 4096, 0)
    assert embed.Event("exit", "emulate", 0, 0x80_0000 + tables.entry(DATA).gpa - 16 * 4096) in seen
    assert embed.Event("flush", "store", None, 0) in seen
    cpu.cr3 = cpu.cr3
    assert seen[-1].kind != "exit" or seen[-1].detail == "cr3"
    seen.clear()
    vm.mmu.zap_all()
    assert {event.kind for event in seen} >= {"zap"}
    assert len([e for e in seen if e.kind == "zap"]) == vm.stats.mmu_shadow_zapped
    seen.clear()
    embed.on_event(vm, seen.append, "zap")
    cpu.read(DATA + 4096)
    assert seen == []
    embed.on_event(vm, None)
    vm.mmu.zap_all()
    assert seen == []


@pytest.mark.parametrize("mmu", DESIGNS)
def test_events_are_the_counters(mmu):
    """Each exit, zap, protected entry and flush that is counted is told of, in batches too; nothing else changes."""
    (vm, cpu, tables), (twin, other, _) = guest(mmu), guest(mmu)
    vm.stats.reset()
    twin.stats.reset()
    seen = []
    embed.on_event(vm, seen.append)
    rng = np.random.default_rng(3)
    ops = np.zeros(6000, dtype=sc.OP_DTYPE)
    ops["op"] = rng.choice([0, 1, 3, 7], 6000, p=[0.5, 0.4, 0.05, 0.05])
    ops["size"], ops["value"] = 8, tables.cr3
    ops["addr"] = DATA + rng.integers(0, 0x11_0000 // 8, 6000) * 8
    table = (ops["op"] == 1) & (rng.random(6000) < 0.2)
    ops["addr"][table] = 0x80_0000 + tables.entry(DATA).gpa - 16 * 4096 + 8 * rng.integers(0, 512, table.sum())
    ops["value"][table] = 0
    check(cpu.run(ops), other.run(ops))
    assert vm.stats.as_dict() == twin.stats.as_dict()
    exits = {}
    for event in seen:
        if event.kind == "exit":
            exits[event.detail] = exits.get(event.detail, 0) + 1
    assert exits == {reason: n for reason, n in vm.stats.exits.items() if n}
    kinds = [event.kind for event in seen]
    assert kinds.count("zap") == vm.stats.mmu_shadow_zapped
    assert kinds.count("protect") == vm.stats.rmap_protected
    # Loads of CR3 are counted as flushes and are exits themselves; under `unsync` several requests may be one flush.
    flushes = vm.stats.tlb_flush - (0 if mmu == "native" else exits.get("cr3", 0))
    assert kinds.count("flush") == (vm.stats.remote_tlb_flush_requests if mmu == "unsync" else flushes)


def test_a_callback_that_raises():
    vm, cpu, _ = guest()
    calls = []

    def fail(event):
        calls.append(event)
        raise LookupError("from the callback")

    embed.on_event(vm, fail)
    with pytest.raises(LookupError):
        cpu.read(DATA)
    assert len(calls) == 1
    assert cpu.read(DATA) == 0  # the operation was done
    with pytest.raises(LookupError) as raised:
        embed.access_many(cpu, DATA + 4096 * np.arange(1, 50, dtype=np.uint64))
    assert len(raised.value.result) == 1
    for action in (
        lambda: setattr(cpu, "cr3", cpu.cr3),
        lambda: vm.mmu.zap_all(),
        lambda: cpu.run(np.array([(0, 0, 8, DATA + 8192, 0)], dtype=sc.OP_DTYPE)),
    ):
        with pytest.raises(LookupError):
            action()
    embed.on_event(vm, None)
    assert cpu.read(DATA + 8192) == 0
    assert vm.audit().ok


def test_a_callback_may_not_use_its_vm():
    vm, cpu, _ = guest()
    other, others, _ = guest()
    found = []

    def meddle(_event):
        for action in (
            lambda: cpu.read(DATA),
            lambda: vm.mmu.zap_all(),
            lambda: vm.audit(),
            lambda: embed.on_event(vm, None),
            lambda: embed.access_many(cpu, [DATA]),
            lambda: vm.save("/nonexistent/x"),
        ):
            with pytest.raises(sc.EngineError, match="in use"):
                action()
        found.append(others.read(DATA))

    embed.on_event(vm, meddle)
    cpu.read(DATA)
    assert found == [0]
    assert other.stats.exits["fill"] == 1


def test_what_cannot_be_a_callback():
    vm, _cpu, _ = guest()
    with pytest.raises(sc.ConfigError):
        embed.on_event(vm, 5)
    with pytest.raises(sc.ConfigError):
        embed.on_event(vm, print, ["exit", "nothing"])


def test_a_vm_with_a_callback_goes_away():
    vm, cpu, _ = guest()
    embed.on_event(vm, lambda event, vm=vm: vm.stats)
    cpu.read(DATA)
    gone = weakref.ref(vm)
    del vm, cpu, _
    gc.collect()
    assert gone() is None
