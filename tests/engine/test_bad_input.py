"""Misuse by the host: one clear typed error each, at the call; nothing has changed afterwards."""

import numpy as np
import pytest
from operations import operations

import shadowcore as sc

P, W, U = 1, 2, 4


@pytest.fixture(params=["native", "cached", "flush", "unsync"])
def machine(request):
    """64-bit mode, linear page 0 = frame 16, run a little so that there is something to damage."""
    vm = sc.VM(memory=64 * 4096, mmu=request.param)
    for gfn in range(1, 5):
        vm.memory.words[gfn * 512] = (16 if gfn == 4 else gfn + 1) << 12 | P | W | U
    cpu = vm.vcpus[0]
    cpu.efer, cpu.cr4, cpu.cr3, cpu.cr0 = 0x100, 0x20, 0x1000, 0x80010011
    cpu.write(0x10, 0x1234)
    return vm


def state(vm):
    cpu = vm.vcpus[0]
    registers = [getattr(cpu, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer", "pkru", "cpl", "ac")]
    return registers, vm.memory.bytes.tobytes()


def refuses(vm, error, call, *args, **kwargs):
    """The call raises, with a message that says something; memory, registers and structure are as before."""
    before = state(vm)
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value)) > 10
    assert state(vm) == before
    assert vm.audit().ok
    assert vm.vcpus[0].read(0x10) == 0x1234


# -- addresses, sizes and values of single accesses --------------------------------------------------------


@pytest.mark.parametrize("address", [-1, -(1 << 63), 1 << 64, 1 << 200])
def test_addresses_that_are_none(machine, address):
    cpu = machine.vcpus[0]
    for call in (cpu.read, cpu.fetch, cpu.translate, cpu.invlpg):
        refuses(machine, sc.ConfigError, call, address)
    refuses(machine, sc.ConfigError, cpu.write, address, 1)


@pytest.mark.parametrize("address", ["0x1000", 1.5, None, b"\0"])
def test_addresses_of_another_type(machine, address):
    cpu = machine.vcpus[0]
    for call in (cpu.read, cpu.fetch, cpu.translate, cpu.invlpg):
        refuses(machine, (sc.ConfigError, TypeError), call, address)


@pytest.mark.parametrize("size", [0, 3, 5, 7, 9, 12, 17, 32, -1, -8, 1 << 40])
def test_sizes_that_are_none(machine, size):
    cpu = machine.vcpus[0]
    refuses(machine, sc.ConfigError, cpu.read, 0x10, size=size)
    refuses(machine, sc.ConfigError, cpu.write, 0x10, 1, size=size)


def test_kinds_of_access_that_are_none(machine):
    refuses(machine, sc.ConfigError, machine.vcpus[0].translate, 0x10, access="q")


@pytest.mark.parametrize("name", ["cr0", "cr2", "cr3", "cr4", "efer", "pkru"])
@pytest.mark.parametrize("value", [-1, 1 << 64, 1 << 100])
def test_register_values_of_more_than_64_bits(machine, name, value):
    refuses(machine, sc.ConfigError, setattr, machine.vcpus[0], name, value)


# -- batches -----------------------------------------------------------------------------------------------


GOOD = {"op": sc.Op.WRITE, "size": 8, "addr": 0x10, "value": 0x4321}


@pytest.mark.parametrize("size", [0, 3, 5, 12, 32, 255])
@pytest.mark.parametrize("op", [sc.Op.READ, sc.Op.WRITE])
def test_batch_with_a_bad_size(machine, op, size):
    """Found before anything runs: the good store in front of it has not been done."""
    batch = operations(GOOD, {"op": op, "size": size, "addr": 0x20})
    refuses(machine, sc.ConfigError, machine.vcpus[0].run, batch)


@pytest.mark.parametrize("op", [99, 255])
def test_batch_with_an_unknown_operation(machine, op):
    refuses(machine, sc.ConfigError, machine.vcpus[0].run, operations(GOOD, {"op": op, "size": 8}))


def without(*names):
    kept = [name for name in sc.OP_DTYPE.names if name not in names]
    return np.zeros(3, dtype=[(name, sc.OP_DTYPE[name]) for name in kept])


def with_type(name, kind):
    fields = [(field, kind if field == name else sc.OP_DTYPE[field]) for field in sc.OP_DTYPE.names]
    return np.zeros(3, dtype=fields)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros(8, dtype=np.uint64),
        np.zeros(8, dtype=object),
        np.zeros((2, 5)),
        without("op"),
        without("addr"),
        without("value"),
        without("size"),
        without("user"),
        with_type("addr", "<f8"),
        with_type("addr", "<u4"),
        with_type("value", "<i4"),
        with_type("op", "<u8"),
        with_type("size", "<f4"),
        with_type("user", "O"),
        with_type("addr", ">u8"),
        with_type("op", ("u1", (2,))),
        "not an array",
        None,
        7,
    ],
    ids=lambda batch: str(getattr(batch, "dtype", batch))[:60],
)
def test_batch_of_another_type(machine, batch):
    refuses(machine, (sc.ConfigError, TypeError), machine.vcpus[0].run, batch)


def test_batch_of_two_dimensions(machine):
    refuses(machine, sc.ConfigError, machine.vcpus[0].run, operations(GOOD, GOOD).reshape(1, 2))


def test_empty_batch_is_fine(machine):
    result = machine.vcpus[0].run(operations())
    assert len(result.outcome) == len(result.gpa) == 0


def test_packed_aligned_strided_and_read_only_batches_are_fine(machine):
    """`run` takes any array whose fields have the names; it never writes to it."""
    rows = operations(GOOD, {"op": sc.Op.READ, "size": 8, "addr": 0x10}, GOOD)
    names = ("op", "user", "size", "addr", "value")
    packed = np.dtype([(name, sc.OP_DTYPE[name]) for name in names])
    aligned = np.dtype([(name, sc.OP_DTYPE[name]) for name in reversed(names)], align=True)
    for dtype in (packed, aligned):
        batch = np.zeros(6, dtype=dtype)
        for name in names:
            batch[name][::2] = rows[name]
        batch = batch[::2]
        batch.flags.writeable = False
        result = machine.vcpus[0].run(batch)
        assert result.outcome.tolist() == [0, 0, 0]
        assert int(result.value[1]) == 0x4321


def test_wild_operations_harm_nobody(machine):
    """Any address and any value is a guest's right; it gets faults and refused loads."""
    rng = np.random.default_rng(1)
    n = 50_000

    def any_number():
        """64-bit numbers of every magnitude."""
        return rng.integers(0, 1 << 64, n, dtype=np.uint64) >> rng.integers(0, 64, n, dtype=np.uint64)

    batch = np.zeros(n, dtype=sc.OP_DTYPE)
    batch["op"] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7], n, p=[0.3, 0.3, 0.2, 0.04, 0.04, 0.04, 0.04, 0.04])
    batch["size"] = rng.choice([1, 2, 4, 8], n)
    batch["user"] = rng.integers(0, 2, n)
    batch["addr"] = any_number() & ~np.uint64(7)
    batch["value"] = any_number()
    result = machine.vcpus[0].run(batch)
    assert set(np.unique(result.outcome)) == {0, 1, 2, 3}
    assert machine.audit().ok


# -- guest memory ------------------------------------------------------------------------------------------


def read_only():
    memory = np.zeros(8192, dtype=np.uint8)
    memory.flags.writeable = False
    return memory


@pytest.mark.parametrize(
    "memory",
    [
        0,
        -4096,
        4095,
        4097,
        1 << 64,
        4096.0,
        True,
        None,
        "",
        "0",
        "lots",
        "-4KiB",
        "1000",
        "4 parsecs",
        b"4096",
        [],
        [4096],
        np.zeros(0, np.uint8),
        np.zeros(5000, np.uint8),
        np.zeros(4096, np.int64),
        np.zeros((2, 4096), np.uint8),
        np.zeros(16384, np.uint8)[::2],
        read_only(),
    ],
    ids=lambda memory: repr(memory)[:40].replace("\n", " "),
)
@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_memory_that_cannot_be(memory, mmu):
    with pytest.raises(sc.ConfigError) as caught:
        sc.VM(memory=memory, mmu=mmu)
    assert "memory" in str(caught.value)


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="4096"):
        sc.VM(memory=4097)


def test_read_only_array_is_not_written():
    memory = read_only()
    with pytest.raises(sc.ConfigError, match="read"):
        sc.VM(memory=memory)
    assert not memory.any()


def test_memory_in_place():
    """The sizes next to the refused ones: one page, a text, an array that is used as it is."""
    assert len(sc.VM(memory=4096).memory.bytes) == 4096
    assert len(sc.VM(memory="64KiB").memory.bytes) == 65536
    memory = np.zeros(8192, dtype=np.uint8)
    sc.VM(memory=memory, mmu="cached").vcpus[0].write(0x1000, 0x55, size=1)
    assert memory[0x1000] == 0x55


# -- designs and features ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"mmu": "telepathy"},
        {"mmu": 7},
        {"mmu": None},
        {"vcpus": 0},
        {"vcpus": -1},
        {"vcpus": 1.5},
        {"features": "all"},
    ],
    ids=str,
)
def test_settings_of_a_vm_that_cannot_be(settings):
    with pytest.raises((sc.ConfigError, TypeError)) as caught:
        sc.VM(memory=4096, **settings)
    assert next(iter(settings)) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"pool_pages": 0},
        {"pool_pages": -5},
        {"pool_pages": 2.5},
        {"pool_pages": 1 << 22},
        {"pool_pages": 1 << 60},
        {"flood_threshold": 0},
        {"flood_threshold": -1},
        {"min_free": -1},
        {"refill": -1},
    ],
    ids=str,
)
def test_settings_of_a_design_that_cannot_be(settings):
    with pytest.raises(sc.ConfigError, match=next(iter(settings))):
        sc.VM(memory=4096, mmu=sc.Shadow.cached(**settings))


@pytest.mark.parametrize("maxphyaddr", [0, -1, 53, 1 << 40, 40.5, "40"])
def test_physical_address_widths_that_cannot_be(maxphyaddr):
    with pytest.raises(sc.ConfigError, match="maxphyaddr"):
        sc.VM(memory=4096, features=sc.Features(maxphyaddr=maxphyaddr))


# -- recordings --------------------------------------------------------------------------------------------

ROOT = 0x1000


def recording():
    """A recording in which one table tree is built, loaded, and used: 5 snapshot pairs, CR3, two accesses."""
    rows = []
    for level in (4, 3, 2, 1):
        table = ROOT * (5 - level)
        target = 16 << 12 if level == 1 else table + 0x1000
        rows.append((4, level | (16 if level == 4 else 0), 0, table, 0))
        rows.append((3, level | 128, 0, table, target | P | W | U))
    rows.append((1, 0, 10, ROOT, 0))
    rows.append((6, 0, 10, 0x18, (16 << 12) + 0x18))
    rows.append((6, 1, 10, 0x20, (16 << 12) + 0x20))
    kinds, flags, insns, addr, value = zip(*rows, strict=True)
    return {
        "kind": np.array(kinds, np.uint8),
        "flags": np.array(flags, np.uint16),
        "insns": np.array(insns, np.uint32),
        "addr": np.array(addr, np.uint64),
        "value": np.array(value, np.uint64),
        "cr0": np.uint64(0x80010011),
        "cr4": np.uint64(0x20),
        "efer": np.uint64(0x501),
        "nframes": np.uint32(64),
    }


def saved(tmp_path, arrays):
    path = tmp_path / "guest.npz"
    np.savez(path, **arrays)
    return path


def refused_recording(path, record=None):
    """TraceError that names the file, and the record if one is to blame."""
    with pytest.raises(sc.TraceError) as caught:
        sc.trace.load(path)
    assert path.name in str(caught.value)
    if record is not None:
        assert f"record {record}" in str(caught.value)


def test_the_recording_that_the_others_damage_is_good(tmp_path):
    sc.trace.load(saved(tmp_path, recording()))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_recording(tmp_path, part):
    path = saved(tmp_path, recording())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused_recording(path)


def test_damaged_recording(tmp_path):
    """Bytes overwritten inside an array: the checksum of the archive does not hold."""
    path = saved(tmp_path, recording())
    data = bytearray(path.read_bytes())
    at = data.index(recording()["value"].tobytes())
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    refused_recording(path)


@pytest.mark.parametrize("content", [b"not an archive at all", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_file_of_another_kind(tmp_path, content):
    path = tmp_path / "guest.npz"
    path.write_bytes(content)
    refused_recording(path)


def test_single_array_instead_of_an_archive(tmp_path):
    path = tmp_path / "guest.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    refused_recording(path)


@pytest.mark.parametrize("key", sorted(recording()))
def test_recording_without_an_array(tmp_path, key):
    arrays = recording()
    del arrays[key]
    refused_recording(saved(tmp_path, arrays))


@pytest.mark.parametrize("key", ["kind", "flags", "insns", "addr", "value"])
def test_recording_with_an_array_of_another_type(tmp_path, key):
    good = recording()
    other_types = good[key].astype(np.float64), good[key].astype("S8")
    for array in (*other_types, good[key][:-1], good[key].reshape(1, -1)):
        refused_recording(saved(tmp_path, good | {key: array}))


def test_pickled_objects_are_not_loaded(tmp_path):
    refused_recording(saved(tmp_path, recording() | {"addr": np.array([ROOT] * 11, dtype=object)}))


@pytest.mark.parametrize("key", ["cr0", "cr4", "efer", "nframes"])
def test_recording_with_a_scalar_of_another_type(tmp_path, key):
    for scalar in (np.array(["x"]), np.float64(1.5), np.array([1, 2], np.uint64)):
        refused_recording(saved(tmp_path, recording() | {key: scalar}))


@pytest.mark.parametrize("kind", [0, 11, 255])
def test_record_of_unknown_kind(tmp_path, kind):
    arrays = recording()
    arrays["kind"][9] = kind
    refused_recording(saved(tmp_path, arrays), record=9)


def test_recording_of_no_memory(tmp_path):
    refused_recording(saved(tmp_path, recording() | {"nframes": np.uint32(0)}))
