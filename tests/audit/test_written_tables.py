"""The shadow structure in the hands of others: read-only, or lent for writing and checked before it is used again."""

import gc
import threading

import numpy as np
import pytest
import ruins
from guest2007 import DATA, PAGE, USER, Guest, P, W

import shadowcore as sc

ARRAYS = ["table", "pages", "frames", "links", "hash"]
HELD = "writable_arrays.* is still held"


def guest(design=None):
    made = Guest("64", design or sc.Shadow.cached(pool_pages=64))
    for i in range(8):
        made.cpu.write(USER + i * PAGE, i)
    return made


def ways(vm):
    """What uses the VM, by name."""
    cpu = vm.vcpus[0]
    ops = np.zeros(3, dtype=sc.OP_DTYPE)
    ops["addr"], ops["size"] = USER, 1
    return {
        "read": lambda: cpu.read(USER),
        "batch": lambda: cpu.run(ops),
        "cr3": lambda: setattr(cpu, "cr3", cpu.cr3),
        "invlpg": lambda: cpu.invlpg(USER),
        "device": lambda: vm.write_physical(DATA, b"x"),
        "zap": vm.mmu.zap_all,
        "unprotect": lambda: vm.mmu.unprotect(DATA >> 12),
        "log": vm.memory.start_dirty_log,
        "counters": vm.mmu.counters_reset,
        "settle": vm.mmu.settle,
    }


# -- read-only -----------------------------------------------------------------------------------------------------


def test_what_is_handed_out_cannot_be_written():
    vm = guest().vm
    shown = {**vm.mmu.arrays, "pool": vm.memory.pool}
    for array in shown.values():
        assert not array.flags.writeable
        base = array
        while isinstance(base, np.ndarray):
            with pytest.raises(ValueError, match="WRITEABLE"):
                base.flags.writeable = True
            base = base.base
        assert memoryview(base).readonly
        with pytest.raises((BufferError, ValueError, TypeError)):
            np.frombuffer(base.obj, dtype=np.uint8)[0] = 0
    with pytest.raises(sc.ConfigError, match="read-only"):
        sc.VM(vm.memory.pool.reshape(-1).view(np.uint8))
    vm.vcpus[0].read(USER)  # held arrays that cannot be written are nobody's business
    assert (shown["pool"] == shown["table"]).all()


def test_arrays_show_what_happens_later():
    made = guest()
    frames = made.vm.mmu.arrays["frames"]["rmap"]
    pool = made.vm.memory.pool
    made.vm.mmu.zap_all()
    assert not frames.any()
    made.cpu.write(USER, 1)
    assert np.count_nonzero(frames) == 1
    assert pool.any()


def test_a_tlb_is_shown_read_only_and_put_back_as_a_whole():
    vm = sc.VM("1MiB", tlb=sc.TLB())
    cpu = vm.vcpus[0]
    cpu.write(0x1000, 1)
    shown = cpu.tlb_arrays
    assert not any(array.flags.writeable for array in shown)
    taken = [array.copy() for array in shown]
    cpu.import_tlb(taken)
    before = cpu.tlb.tolist()
    for bad in (taken[:-1], [array[:-1] for array in taken], [array.view(np.int8) for array in taken]):
        with pytest.raises(sc.ConfigError, match="bytes are needed"):
            cpu.import_tlb(bad)
    taken[1][:] = 0xFF
    with pytest.raises(sc.ConfigError, match="rights"):
        cpu.import_tlb(taken)
    assert cpu.tlb.tolist() == before


@pytest.mark.parametrize("look", ["arrays", "pool", "save", "load", "written"])
def test_a_look_changes_nothing_of_what_follows(look, tmp_path):
    """The same batch after it, in results and counters; bench.instructions counts that it takes the same ways."""
    found = []
    for looked in (False, True):
        made = guest()
        vm = made.vm
        if looked and look in ("arrays", "pool"):
            held = vm.mmu.arrays if look == "arrays" else vm.memory.pool
        elif looked and look == "written":
            vm.mmu.writable_arrays()
        elif looked:
            vm.save(tmp_path / "vm")
            vm = sc.VM.load(tmp_path / "vm") if look == "load" else vm
        ops = np.zeros(64, dtype=sc.OP_DTYPE)
        ops["op"], ops["size"] = 1, 8
        ops["addr"] = USER + PAGE * (np.arange(64) % 12 // 2)
        result = vm.vcpus[0].run(ops)
        found.append((result.outcome.tolist(), result.gpa.tolist(), result.exits.tolist(), vm.stats.as_dict()))
        held = None
    assert held is None
    assert found[0] == found[1]


# -- lent for writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRAYS)
def test_nothing_uses_the_vm_while_an_array_is_held(name):
    vm = guest().vm
    held = vm.mmu.writable_arrays()[name][1:]
    for use in ways(vm).values():
        with pytest.raises(sc.EngineError, match=HELD):
            use()
    with pytest.raises(sc.EngineError, match=HELD):
        vm.audit()
    assert len(vm.mmu.arrays) == len(vm.mmu.writable_arrays()) == 5
    assert vm.memory.logged_slots == ()
    held = [held.view(), memoryview(held)]
    for _ in range(2):
        with pytest.raises(sc.EngineError, match=HELD):
            vm.vcpus[0].read(USER)
        held.pop()
    for use in ways(vm).values():
        use()
    assert vm.audit().ok


def test_a_vm_whose_memory_is_the_pool_of_another():
    vm = guest().vm
    other = sc.VM(vm.mmu.writable_arrays()["table"].reshape(-1).view(np.uint8), "native")
    other.vcpus[0].write(0x1000, 1 << 40)
    with pytest.raises(sc.EngineError, match=HELD):
        vm.vcpus[0].read(USER)
    del other
    gc.collect()
    with pytest.raises(sc.AuditError, match="writable_arrays"):
        vm.vcpus[0].read(USER)


def test_nothing_is_lent_while_a_batch_runs():
    """Nor by what was lent before, and is asked for its memory once more."""
    vm = guest().vm
    array = vm.mmu.writable_arrays()["table"]
    while isinstance(array, np.ndarray):
        array = array.base
    source = array.obj
    del array
    ops = np.zeros(3_000_000, dtype=sc.OP_DTYPE)
    ops["addr"], ops["size"] = USER, 1
    thread = threading.Thread(target=lambda: vm.vcpus[0].run(ops))
    before = vm.stats.accesses
    refused = 0
    thread.start()
    while vm.stats.accesses == before and thread.is_alive():
        pass
    while thread.is_alive():
        try:
            vm.mmu.writable_arrays()
        except sc.EngineError:
            refused += 1
        try:
            memoryview(source).release()
        except BufferError:
            refused += 1
    thread.join()
    assert refused
    assert vm.audit().ok


@pytest.mark.parametrize("name", ["read", "batch", "cr3", "device", "zap", "log", "settle"])
def test_what_was_written_is_checked_before_it_is_used(name):
    """Nothing is followed or changed; other values can be written, and then it goes on."""
    made = guest()
    vm = made.vm
    number = int(vm.mmu.pages["page"][0])
    kept = int(vm.mmu.arrays["pages"]["next"][number])
    vm.mmu.writable_arrays()["pages"]["next"][number] = 12345
    state = vm.stats.as_dict(), vm.memory.bytes.tobytes(), vm.mmu.export_state(), made.cpu.export_state()
    for _ in range(2):
        with pytest.raises(sc.AuditError, match="at writable_arrays, first: I6: ") as caught:
            ways(vm)[name]()
        assert caught.value.point == "writable_arrays"
    assert state == (vm.stats.as_dict(), vm.memory.bytes.tobytes(), vm.mmu.export_state(), made.cpu.export_state())
    assert vm.memory.logged_slots == ()
    assert not vm.audit().ok
    with pytest.raises(sc.EngineError, match="12345"):
        _ = vm.mmu.pages
    assert vm.mmu.rmap_length(DATA >> 12) == 1
    vm.mmu.writable_arrays()["pages"]["next"][number] = kept
    ways(vm)[name]()
    assert vm.audit().ok


def test_saving_what_is_broken_is_refused(tmp_path):
    vm = guest().vm
    vm.mmu.writable_arrays()["hash"][:] = 0
    with pytest.raises(sc.AuditError, match="I5"):
        vm.save(tmp_path / "vm")
    assert not list(tmp_path.iterdir())


def test_what_may_be_written_takes_effect():
    """No translation that is remembered outlives it."""
    made = guest()
    ops = np.zeros(8, dtype=sc.OP_DTYPE)
    ops["addr"], ops["size"] = USER, 1
    for _ in range(3):
        made.cpu.run(ops)
    other = int(made.vm.mmu.arrays["table"][made.path(USER + PAGE)[-1][1:3]])
    page, index = made.path(USER)[-1][1:3]
    made.vm.mmu.writable_arrays()["table"][page, index] = other & ~W | P
    with pytest.raises(sc.AuditError):  # the reverse map has the old one
        made.cpu.run(ops)
    arrays = made.vm.mmu.writable_arrays()
    arrays["frames"]["rmap"][DATA >> 12] = 0
    del arrays
    assert (made.cpu.run(ops).gpa == DATA + PAGE).all()


@pytest.mark.parametrize("field", ["free_head", "young", "old", "n_free", "n_active", "n_pte8"])
def test_scalars_that_were_put_back_are_checked_too(field):
    vm = guest().vm
    state = vm.mmu.export_state()
    with pytest.raises(sc.ConfigError, match=field):
        vm.mmu.import_state(state | {field: 0xFFFFFF})
    vm.vcpus[0].read(USER)
    vm.mmu.import_state(state | {field: state[field] ^ 1})
    with pytest.raises(sc.AuditError):
        vm.vcpus[0].read(USER)
    vm.mmu.import_state(state)
    registers = vm.vcpus[0].export_state()
    vm.vcpus[0].import_state(registers | {"roots": [0xFFFFFFFF] * 4})
    with pytest.raises(sc.AuditError, match="I7"):
        vm.vcpus[0].read(USER)
    vm.vcpus[0].import_state(registers)
    vm.vcpus[0].read(USER)
    assert vm.audit().ok


def test_native_has_nothing_to_write():
    with pytest.raises(sc.ConfigError, match="native"):
        sc.VM("1MiB", "native").mmu.writable_arrays()


# -- garbage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all", "scalars"])
def test_garbage_some(name):
    """Whatever was written, each call ends: done, or refused with one of our errors."""
    ruins.in_a_process(name, seed=2, rounds=2, use=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ruins.NAMES)
def test_garbage(name, seed):
    ruins.in_a_process(name, seed, rounds=100, use=True, seconds=600)
