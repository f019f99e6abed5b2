"""Arrays that somebody else writes to, or would resize, while the engine reads them: guest memory, other threads."""

import contextlib
import ctypes
import gc
import threading

import numpy as np
import pytest

import shadowcore as sc
from shadowcore import embed
from shadowcore.recording.records import replay

DATA = 0x40_0000
FRAME = 0x20_0000
"""gpa of DATA."""
OPS = 0x8_0000
"""Where in the mapped data an array lies."""
DESIGNS = ("native", "flush", "cached", "kvm-2007", "unsync")
ALIGNED = np.dtype(sc.OP_DTYPE.descr, align=True)
SEVERAL = np.dtype([*sc.OP_DTYPE.descr, ("vcpu", "u1")])
LAYOUTS = {"packed": sc.OP_DTYPE, "aligned": ALIGNED, "several": SEVERAL}


def guest(mmu="cached", vcpus=1, tlb=None):
    """A VM over an array of ours, 1 MiB of it mapped at DATA."""
    vm = embed.machine(embed.allocate("8MiB"), mmu, vcpus=vcpus, tlb=tlb)
    tables = sc.PageTables(vm.memory, "64", allocate=range(16, 64))
    tables.map(DATA, FRAME, 0x10_0000, "rwxu", accessed=True, dirty=True)
    for cpu in vm.vcpus:
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
    return vm


def in_memory(vm, dtype, n, at=OPS):
    """An array of n elements in guest RAM, and the linear address of each."""
    array = np.ndarray(n, dtype, buffer=vm.memory.bytes.data, offset=FRAME + at)
    return array, DATA + at + dtype.itemsize * np.arange(n, dtype=np.uint64)


def plain(ops, **fields):
    ops[...] = 0
    ops["op"], ops["size"], ops["addr"] = sc.Op.READ, 8, DATA + 64
    for name, value in fields.items():
        ops[name] = value


SPOILED = {
    "size": [(200, "size 200 is not"), (3, "size 3 is not"), (0, "size 0 is not"), (16, "size 16 is not")],
    "op": [(77, "operation code 77"), (17, "operation code 17"), (255, "operation code 255")],
    "vcpu": [(77, "no vcpu 77"), (2, "no vcpu 2")],
}
CASES = [(field, value, message) for field, cases in SPOILED.items() for value, message in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("field", "value", "message"), CASES)
def test_the_guest_stores_over_an_operation_to_come(field, value, message, layout):
    """The batch ends at the operation, with an error that says what it is by now; those before it were done."""
    if field == "vcpu" and layout != "several":
        return
    for design, op in zip(DESIGNS, (sc.Op.READ, sc.Op.WRITE, sc.Op.READ, sc.Op.CMPXCHG, sc.Op.READ), strict=True):
        for victim in (1, 31, 40, 5000):
            vm = guest(design, vcpus=2)
            ops, where = in_memory(vm, LAYOUTS[layout], 6000)
            plain(ops)
            vm.vcpus[0].run(ops.copy())  # what is met again is remembered
            ops[0]["op"], ops[0]["size"], ops[0]["value"] = sc.Op.WRITE, 1, value
            ops[0]["addr"] = where[victim] + LAYOUTS[layout].fields[field][1]
            ops[victim]["op"] = op
            before = vm.stats.accesses
            with pytest.raises(sc.ConfigError, match=rf"ops\[{victim}\].*{message}.*wrote to the array") as caught:
                vm.vcpus[0].run(ops)
            result = caught.value.result
            assert len(result) == len(result.gpa) == victim
            assert vm.stats.accesses - before == victim == result.stats.accesses
            assert not result.outcome.any()
            assert (result.gpa[1:] == FRAME + 64).all()
            assert vm.audit().ok
            assert vm.vcpus[0].read(DATA) == 0


def test_what_remains_an_operation_is_done_as_it_stands():
    """Fields that are changed to others that can be: the later value counts, or the earlier one, but one for all."""
    for design in DESIGNS:
        for layout in LAYOUTS.values():
            vm = guest(design)
            ops, where = in_memory(vm, layout, 100)
            plain(ops, op=sc.Op.WRITE, addr=DATA + 8 * np.arange(100), value=np.uint64(2**64 - 1))
            for i, (name, value) in enumerate([("size", 4), ("user", 2), ("user", 255), ("op", sc.Op.READ)]):
                ops[i]["addr"] = where[50 + i] + layout.fields[name][1]
                ops[i]["size"], ops[i]["value"] = 1, value
            result = vm.vcpus[0].run(ops)
            assert not result.outcome.any()
            words = vm.memory.words[FRAME // 8 : FRAME // 8 + 100]
            assert words[50] == 0xFFFF_FFFF
            assert words[51] == words[52] == words[54] == 2**64 - 1
            assert words[53] == 0


def test_a_store_that_was_judged_a_load_stores_nowhere():
    """A word is read once: what was found to be allowed for a load is not used by a store."""
    for design in DESIGNS:
        vm = guest(design)
        tables = sc.PageTables(vm.memory, "64", allocate=range(64, 80), root=vm.vcpus[0].cr3)
        tables.map(DATA + 0x20_0000, FRAME + 0xF_0000, 4096, "ru", accessed=True)
        ops, where = in_memory(vm, sc.OP_DTYPE, 32)
        plain(ops, value=7, user=1)
        ops["addr"][10:] = DATA + 0x20_0000
        ops[0]["op"], ops[0]["size"], ops[0]["value"] = sc.Op.WRITE, 1, sc.Op.READ
        ops[0]["addr"] = where[20]
        for _ in range(2):
            vm.vcpus[0].run(ops.copy())
        ops[0]["value"] = sc.Op.WRITE
        result = vm.vcpus[0].run(ops)
        assert not vm.memory.bytes[FRAME + 0xF_0000 : FRAME + 0xF_1000].any()
        assert set(np.flatnonzero(result.outcome)) <= {20}
        assert vm.audit().ok


@pytest.mark.parametrize(("column", "value"), [("kind", 3), ("kind", 77), ("kind", 16), ("size", 200), ("size", 3)])
@pytest.mark.parametrize("design", DESIGNS)
def test_the_guest_stores_over_a_column(design, column, value):
    n, victim = 20_000, 15_000
    vm = guest(design)
    array, where = in_memory(vm, np.dtype("u1"), n)
    array[:] = 1 if column == "kind" else 8
    gva = np.full(n, DATA + 64, np.uint64)
    gva[3] = where[victim]
    values = np.full(n, value, np.uint64)
    sizes = np.full(n, 1, np.uint8)
    columns = {"kind": array, "size": sizes} if column == "kind" else {"kind": "w", "size": array}
    if column == "size":
        array[3] = 1
    with pytest.raises(sc.ConfigError, match=rf"ops\[{victim}\].* {value} is not") as caught:
        embed.access_many(vm.vcpus[0], gva, value=values, **columns)
    assert len(caught.value.result) == victim
    assert vm.audit().ok


@pytest.mark.parametrize("design", DESIGNS)
def test_the_guest_stores_over_the_columns_and_results_of_a_c_call(design):
    """Over kinds and sizes, over the gpas that were found, and over the structure that names them all."""
    from capi import API, Accesses, C, error, made

    n, victim = 20_000, 15_000
    for what in ("kind", "size", "gpa", "struct"):
        vm = guest(design)
        handle = embed.handle(vm)
        gva = np.full(n, DATA + 64, np.uint64)
        value = np.full(n, 77, np.uint64)
        many = made(Accesses, count=n, gva=gva.ctypes.data, value=value.ctypes.data, all_kind=1, all_size=1, flags=1)
        if what == "struct":
            place, where = in_memory(vm, np.dtype("u1"), ctypes.sizeof(Accesses))
            place[:] = np.frombuffer(many, np.uint8)
            gva[:] = np.resize(where, n)
            many = Accesses.from_buffer(place)
        else:
            array, where = in_memory(vm, np.dtype("u8" if what == "gpa" else "u1"), n)
            array[:] = 1
            setattr(many, what, array.ctypes.data)
            gva[3:10] = where[victim]
            if what == "gpa":
                gva[:] = np.resize(where[: n // 2], n)
                value[:] = np.uint64(2**64 - 1)
                many.all_size = 8
        rc = API.access_many(handle, many)
        if what in ("gpa", "struct"):
            assert rc == 0, error()
        else:
            assert rc == C["SC_E_ARGUMENT"]
            assert "wrote to the arrays" in error()
            assert many.done == victim
        assert vm.audit().ok
        embed.release(handle)


def test_an_array_that_another_thread_writes():
    """Whatever comes of it: ConfigError or none, and a machine whose audit is clean."""
    rng = np.random.default_rng(5)
    for design in ("native", "cached", "unsync"):
        vm = guest(design)
        ops = np.zeros(30_000, sc.OP_DTYPE)
        plain(ops, addr=DATA + rng.integers(0, 0x7_0000, len(ops)))
        good = ops.copy()
        stop = threading.Event()
        spoiled = rng.integers(0, 256, ops.nbytes).astype(np.uint8)

        def spoil(ops=ops, good=good, spoiled=spoiled, stop=stop):
            while not stop.is_set():
                ops.view(np.uint8)[:] = spoiled
                ops[:] = good

        thread = threading.Thread(target=spoil)
        thread.start()
        try:
            for _ in range(30):
                with contextlib.suppress(sc.ConfigError):
                    assert len(vm.vcpus[0].run(ops)) == len(ops)
        finally:
            stop.set()
            thread.join()
        assert vm.audit().ok


def waiting(vm):
    """Have the VM wait, in the middle of a batch, at a store to its root table; what tells of it, and lets it go on."""
    tables = sc.PageTables(vm.memory, "64", allocate=range(64, 80), root=vm.vcpus[0].cr3)
    tables.map(1 << 30, tables.root, 4096, "rw", accessed=True, dirty=True)
    inside, go = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        return go.wait(60)

    vm.mmu.can_emulate = wait
    return inside, go, (1 << 30) + 8 * 300


def read_meanwhile(vm, call, attempt):
    """`attempt()` while `call(address)` is in the middle of its work."""
    inside, go, address = waiting(vm)
    errors = []

    def work():
        try:
            call(address)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert inside.wait(60)
        attempt()
    finally:
        go.set()
        thread.join()
    assert errors == []


def resized(array, refcheck=False):
    with pytest.raises(ValueError, match="cannot resize"):
        array.resize(1 << 20, refcheck=refcheck)


VIEWS = {
    "itself": lambda array: array,
    "view": lambda array: array[:],
    "memoryview": lambda array: np.frombuffer(memoryview(array), array.dtype),
    "strided": lambda array: np.lib.stride_tricks.as_strided(array, array.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_operations_cannot_be_resized_while_they_run(view):
    ops = np.zeros(100, sc.OP_DTYPE)
    plain(ops, op=sc.Op.WRITE)
    vm = guest()

    def call(address):
        ops["addr"][50], ops["size"][50] = address, 8
        vm.vcpus[0].run(VIEWS[view](ops))

    read_meanwhile(vm, call, lambda: resized(ops))
    gc.collect()
    ops.resize(10, refcheck=False)


@pytest.mark.parametrize("view", VIEWS)
def test_memory_cannot_be_resized_through_what_it_is_a_view_of(view):
    whole = np.zeros(2 << 20, np.uint8)
    first = -whole.ctypes.data % 4096
    vm = embed.machine(VIEWS[view](whole)[first : first + (1 << 20)])
    resized(whole)
    assert vm.vcpus[0].read(0) == 0


def test_columns_of_a_replay_are_held():
    """Neither resized, nor freed with the dict that names them; kinds that change meanwhile are read once."""
    vm = guest()
    arrays = {"kind": np.full(1000, 6, "u1"), "flags": np.full(1000, 1, "<u2"), "addr": np.full(1000, DATA, "<u8")}
    arrays["value"] = np.full(1000, FRAME, "<u8")
    held = dict(arrays)

    def attempt():
        for array in held.values():
            resized(array)
        arrays.clear()
        held.clear()
        gc.collect()

    def call(address):
        arrays["addr"][500] = held["addr"][500] = address
        replay(vm, arrays, 0, 1000)

    read_meanwhile(vm, call, attempt)


def test_a_replayed_store_stays_within_its_page():
    vm = guest()
    arrays = {"kind": np.array([3], "u1"), "flags": np.zeros(1, "<u2"), "value": np.zeros(1, "<u8")}
    with pytest.raises(ValueError, match="too near to the end"):
        replay(vm, arrays | {"addr": np.array([(8 << 20) - 1], "<u8")}, 0, 1)


def handed_out(vm):
    yield vm.memory.dirty_words()
    yield vm.memory.bytes
    yield vm.memory.words
    yield vm.memory.pool
    yield from vm.mmu.arrays.values()
    yield from vm.vcpus[0].tlb_arrays
    ops = np.zeros(10, sc.OP_DTYPE)
    plain(ops)
    result = vm.vcpus[0].run(ops)
    yield result.gpa
    yield result.value


def test_arrays_of_the_engine_are_not_resized():
    """None of those that it goes on to use owns its bytes, nor does what they are views of."""
    vm = sc.VM("8MiB", "cached", tlb=sc.TLB())
    vm.memory.start_dirty_log()
    for array in handed_out(vm):
        while array is not None:
            if isinstance(array, np.ndarray):
                assert not array.flags.owndata
                with pytest.raises(ValueError, match="resize"):
                    array.resize(array.size * 2 + 1, refcheck=False)
            array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    log = vm.memory.dirty_words()
    log.shape = (1, len(log))  # of the view alone
    assert vm.memory.dirty_log().shape == (2048,)
    vm.memory.stop_dirty_log()
    log[:] = 0
